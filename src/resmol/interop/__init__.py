"""Weights from elsewhere, for verification, evaluation and generation; nothing here is imported by training."""
