"""Activation rows: read from a model, shuffled in blocks, cut into batches, stored in shards."""
