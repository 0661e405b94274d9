"""The control endpoint: starts, watches and stops training runs over REST; imports no torch."""
