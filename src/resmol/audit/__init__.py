"""The record of a run: checked, replayed, certified, shown."""
