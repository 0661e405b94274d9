"""Control endpoint: start, monitor and stop training runs over REST; imports no torch."""
