"""Text → token shards → batches."""
