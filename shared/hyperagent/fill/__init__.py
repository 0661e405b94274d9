"""Filling the cache: a queue of trajectories that many processes share, and the workers that empty it."""
