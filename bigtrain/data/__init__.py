"""From raw text to batches: documents -> tokenizer -> shards -> order -> loader."""
