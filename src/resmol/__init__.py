"""resmol: reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim.

The Python interface is small::

    import resmol

    model = resmol.load_model("runs/nano")                # a run, a checkpoint, a Hugging Face folder or a Hub id
    print(model.generate("JULIET:", max_new_tokens=40))   # text
    config = resmol.load_preset("nano", ["train.steps=100"])
    resmol.train_model(config, "runs/mine", data="input.txt")  # starts, or resumes

Importing the package does not import PyTorch; the first use of a function that needs it does.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from resmol.version import __version__

if TYPE_CHECKING:
    from resmol.config.load import load_config, load_preset
    from resmol.config.run_config import RunConfig
    from resmol.errors import ResmolError
    from resmol.interop.evaluate import evaluate_model
    from resmol.interop.load import LoadedModel, load_model
    from resmol.train.start import train_model

__all__ = [
    "LoadedModel",
    "ResmolError",
    "RunConfig",
    "__version__",
    "evaluate_model",
    "load_config",
    "load_model",
    "load_preset",
    "train_model",
]

logging.getLogger("resmol").addHandler(logging.NullHandler())  # a library is silent until it is asked

_HOMES = {
    "LoadedModel": "resmol.interop.load",
    "ResmolError": "resmol.errors",
    "RunConfig": "resmol.config.run_config",
    "evaluate_model": "resmol.interop.evaluate",
    "load_config": "resmol.config.load",
    "load_model": "resmol.interop.load",
    "load_preset": "resmol.config.load",
    "train_model": "resmol.train.start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'resmol' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
