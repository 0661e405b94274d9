"""The teacher's gRPC contract: generated stubs, packed rows, client."""
