"""Training loop, training step, reporting and run control."""
