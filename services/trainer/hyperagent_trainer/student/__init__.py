"""The frozen student: loading, sharding, attention kernels, activation checkpointing."""
