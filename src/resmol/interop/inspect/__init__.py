"""`resmol inspect`: what configuration and weight files determine about a model, and what they leave open."""

from resmol.interop.inspect.summary import Inspection, inspect_model

__all__ = ["Inspection", "inspect_model"]
