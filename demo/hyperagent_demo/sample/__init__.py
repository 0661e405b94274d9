"""Built-in sample: trajectories of small repairs in which every command was actually run."""
