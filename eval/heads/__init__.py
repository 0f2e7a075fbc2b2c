"""Small networks that are fitted on bags: the features of one slide to a verdict on it."""
