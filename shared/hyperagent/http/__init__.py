"""Shared parts of the REST services: problem details, bearer authentication, limits, serving, and clients."""
