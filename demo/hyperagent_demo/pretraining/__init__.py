"""Pre-training of the two tiny models."""
