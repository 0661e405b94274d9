"""The training loop, one step of it, and what it reports."""
