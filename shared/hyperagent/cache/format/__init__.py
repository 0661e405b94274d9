"""Byte formats of the cache: records, shards, codecs and the manifest."""
