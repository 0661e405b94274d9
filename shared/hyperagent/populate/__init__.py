"""Fills a cache from one or many teachers, through a work queue."""
