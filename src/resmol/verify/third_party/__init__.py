"""Checks of somebody else's implementation."""
