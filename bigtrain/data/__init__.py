"""Raw text to token shards to batches."""
