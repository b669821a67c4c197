"""Serve the page: on this machine alone by default, and never with other weights than those that were named."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from resmol.demo.asgi_allowlist import Allowlist
from resmol.demo.page import build_page, style, theme
from resmol.demo.provenance import Provenance, export_title, provenance_of
from resmol.demo.request_limits import Limits
from resmol.demo.sessions import Sessions, gradio_queue
from resmol.errors import DataError, UsageError
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.model_ref import ModelRef
from resmol.system.installation import install_hint

logger = logging.getLogger(__name__)

PORT = 7860
EVERYWHERE = "0.0.0.0"  # noqa: S104 - a Space is reached through the Hub's proxy
SPACE_MARK = "SPACE_ID"  # set by the Hub in every Space


def serve(
    model: str | ModelRef,
    host: str = "127.0.0.1",
    port: int = PORT,
    tokenizer: str | None = None,
    *,
    limits: Limits | None = None,
) -> None:
    """Load a model and serve the page until Ctrl-C.

    Args:
        model: What `load_model` takes.
        host: The address to listen on; any but this machine's own lets others in.
        port: 0 takes a free one; the logged line names it.
        tokenizer: What `load_model` takes; by default the model's own.
        limits: What visitors may ask for.

    Raises:
        ResmolError: The model cannot be loaded, its tokenizer is missing, or the address is taken. Nothing is served.
    """
    require_gradio()
    with listening_socket(host, port) as listener:  # before the weights: a port that is taken is known at once
        loaded = load_model(model, tokenizer=tokenizer)
        _serve_loaded(loaded, provenance_of(loaded), listener, limits or Limits(), embedded=False)


def serve_space(folder: Path, model: str | None = None) -> None:
    """Serve a Space from its folder: what ``app.py`` of an exported Space calls.

    Args:
        folder: The Space, with the export in ``model``.
        model: The Hub id of the repository that the weights are in, where they are not in the folder.

    Raises:
        ResmolError: See `serve`; or the weights are not those that the Space was exported with.
    """
    require_gradio()
    on_the_hub = SPACE_MARK in os.environ
    host = os.environ.get("GRADIO_SERVER_NAME", EVERYWHERE if on_the_hub else "127.0.0.1")
    port = int(os.environ.get("GRADIO_SERVER_PORT", PORT))
    export = folder / "model"

    package = logging.getLogger("resmol")
    package.addHandler(logging.StreamHandler(sys.stdout))  # the Space's log
    package.setLevel(logging.INFO)
    with listening_socket(host, port) as listener:
        loaded = load_model(model or export)
        _serve_loaded(
            loaded, provenance_of(loaded, export, export_title(folder)), listener, Limits(), embedded=on_the_hub
        )


def build_app(
    loaded: LoadedModel, provenance: Provenance, limits: Limits, *, hosts: tuple[str, ...] = (), embedded: bool = False
) -> Any:
    """Return the ASGI application: the allowlist, and Gradio behind it."""
    import gradio as gr
    from fastapi import FastAPI

    loaded.tokenizer  # noqa: B018 - a missing one must be an error now, not an answer later
    blocks, generate = build_page(loaded, provenance, limits, lambda session: sessions.has_listener(session))
    sessions = Sessions(gradio_queue(blocks), limits.listener_seconds, limits.connections)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), blocks, path="", footer_links=[], run_history=False,
        allowed_paths=[], max_file_size=1, show_error=False, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=theme(), css=style(),
    )  # fmt: skip
    return Allowlist(app, limits, generate, sessions, hosts=hosts, embedded=embedded)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address (`UsageError` when it is taken or not one of this machine)."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen at {host} port {port}: {reason}", fix="name another --port or --host"
        ) from None


def require_gradio() -> None:
    """Import Gradio with its analytics switched off (`DataError` when it is not installed)."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise DataError("the demo needs gradio, which is not installed", fix=install_hint("demo")) from None


def _serve_loaded(
    loaded: LoadedModel, provenance: Provenance, listener: socket.socket, limits: Limits, *, embedded: bool
) -> None:
    import uvicorn

    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    names = ("127.0.0.1", "localhost", "[::1]") if local else ()
    app = build_app(loaded, provenance, limits, hosts=names, embedded=embedded)
    logger.info(loaded.source.describe())
    logger.info(f"demo: {provenance.title}, at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)")
    if not local and not embedded:
        logger.info("demo: everybody who reaches this machine can use it")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", server_header=False, timeout_keep_alive=5,
        limit_concurrency=limits.connections, timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
