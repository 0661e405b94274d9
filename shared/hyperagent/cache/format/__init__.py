"""The bytes of the cache: records, shards, codecs, the manifest."""
