"""The built-in sample: trajectories of small repairs, whose every command was really run."""
