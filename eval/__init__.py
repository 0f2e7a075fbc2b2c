"""What an encoder is worth: probes, intervals, report."""
