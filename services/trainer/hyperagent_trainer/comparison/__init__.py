"""Comparison of trained runs on held-out trajectories: the arms, their measurements, and the report."""
