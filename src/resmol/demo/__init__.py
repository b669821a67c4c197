"""A page to try a model in: the same for `resmol demo` and for a Hugging Face Space.

Gradio draws the page and keeps the queue. What a stranger may send is decided before Gradio sees it: `limits` says what
a request may hold, `gate` which requests there are.
"""

from __future__ import annotations

from resmol.demo.request_limits import Limits
from resmol.demo.server import build_app, serve, serve_space

__all__ = ["Limits", "build_app", "serve", "serve_space"]
