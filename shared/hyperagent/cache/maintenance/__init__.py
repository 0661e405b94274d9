"""Verify, measure, compact, repair, merge and publish a cache."""
