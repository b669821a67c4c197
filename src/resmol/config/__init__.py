"""The configuration of a run and of a model, with presets and drift classes. No PyTorch."""
