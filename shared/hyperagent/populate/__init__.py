"""Populating a cache from one or more teachers through a work queue."""
