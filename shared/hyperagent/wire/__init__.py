"""The teacher's gRPC API: generated stubs, conversion of messages, client."""
