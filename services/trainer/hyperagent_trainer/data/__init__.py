"""Trajectories joined with the teacher's rows, and the order in which training reads them."""
