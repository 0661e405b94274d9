"""Check that a student can be trained before training starts."""
