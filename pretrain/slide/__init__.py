"""Slide encoders: the trainer on sets of tile features."""
