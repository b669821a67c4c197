"""`resmol inspect`: what a configuration or a weight file says about a model, and what it cannot say."""

from resmol.interop.inspect.summary import Inspection, inspect_model

__all__ = ["Inspection", "inspect_model"]
