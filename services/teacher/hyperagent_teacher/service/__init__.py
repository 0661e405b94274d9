"""The gRPC service around an engine."""
