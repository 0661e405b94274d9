"""The cache's rows as torch tensors, for those who train on them."""
