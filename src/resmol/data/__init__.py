"""From text to batches: corpora -> prepare -> shards -> order -> loader."""
