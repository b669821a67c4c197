"""A run on disk: its directory, ledger, logs and checkpoints."""
