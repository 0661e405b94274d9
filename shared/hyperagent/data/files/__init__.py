"""The files of a data set: trajectories, side tables, tokens."""
