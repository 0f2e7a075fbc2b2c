"""Slides to tiles to shards, and everything that chooses among them."""
