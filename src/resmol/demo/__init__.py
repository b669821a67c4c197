"""A page to try a model in: the same for `resmol demo` and for a Hugging Face Space.

Gradio draws the page and keeps the queue. A stranger's request is checked before Gradio gets it: `asgi_allowlist` lists
the requests that exist, `request_limits` the values that they may have.
"""

from __future__ import annotations

from resmol.demo.request_limits import Limits
from resmol.demo.server import build_app, serve, serve_space

__all__ = ["Limits", "build_app", "serve", "serve_space"]
