"""Readers and writers of a data set's files: trajectories, side tables, tokens."""
