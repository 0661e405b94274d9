"""Checks that prove a student can be trained before training starts."""
