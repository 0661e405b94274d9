"""Commands that look at a running engine."""
