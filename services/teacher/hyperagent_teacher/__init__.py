"""The teacher: scores token sequences over gRPC and fills the cache with its top-k rows."""
