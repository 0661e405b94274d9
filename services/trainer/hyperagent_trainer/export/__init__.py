"""Turns a run's checkpoint into a bundle or a PEFT adapter."""
