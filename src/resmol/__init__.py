"""resmol: reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim.

The Python interface is small::

    import resmol

    config = resmol.load_preset("nano", ["train.steps=100"])
    resmol.train_model(config, "runs/mine", data="input.txt")  # starts, or resumes; shows progress in a notebook
    resmol.audit_run("runs/mine")                         # 14 of 14 checks passed
    model = resmol.load_model("runs/mine")                # a run, a checkpoint, a Hugging Face folder or a Hub id
    print(model.generate("JULIET:", max_new_tokens=40))   # text
    resmol.export_model("runs/mine", "out/mine")          # for transformers, or GGUF, or a Space

The functions are the commands: `prepare_data`, `train_model`, `verify_model`, `audit_run`, `compare_runs`,
`evaluate_model`, `export_model`, `report_run`, and `resmol.demo.serve`. They print nothing, but for the progress of
`train_model`.

Importing the package does not import PyTorch; the first use of a function that needs it does.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from resmol.version import __version__

if TYPE_CHECKING:
    from resmol import demo
    from resmol.api import export_model, prepare_data, verify_model
    from resmol.audit.audit import audit_run
    from resmol.audit.compare import compare_runs
    from resmol.audit.report import report_run
    from resmol.checks import Checks
    from resmol.config.load import load_config, load_preset
    from resmol.config.run_config import RunConfig
    from resmol.errors import ResmolError
    from resmol.interop.evaluate import evaluate_model
    from resmol.interop.load import LoadedModel, load_model
    from resmol.interop.model_ref import ModelRef
    from resmol.train.start import train_model

__all__ = [
    "Checks",
    "LoadedModel",
    "ModelRef",
    "ResmolError",
    "RunConfig",
    "__version__",
    "audit_run",
    "compare_runs",
    "demo",
    "evaluate_model",
    "export_model",
    "load_config",
    "load_model",
    "load_preset",
    "prepare_data",
    "report_run",
    "train_model",
    "verify_model",
]

logging.getLogger("resmol").addHandler(logging.NullHandler())  # a library is silent until it is asked

_HOMES = {
    "Checks": "resmol.checks",
    "audit_run": "resmol.audit.audit",
    "compare_runs": "resmol.audit.compare",
    "export_model": "resmol.api",
    "prepare_data": "resmol.api",
    "report_run": "resmol.audit.report",
    "verify_model": "resmol.api",
    "LoadedModel": "resmol.interop.load",
    "ModelRef": "resmol.interop.model_ref",
    "ResmolError": "resmol.errors",
    "RunConfig": "resmol.config.run_config",
    "evaluate_model": "resmol.interop.evaluate",
    "load_config": "resmol.config.load",
    "load_model": "resmol.interop.load",
    "load_preset": "resmol.config.load",
    "train_model": "resmol.train.start",
}


def __getattr__(name: str) -> Any:
    if name == "demo":
        return import_module("resmol.demo")
    if name not in _HOMES:
        raise AttributeError(f"module 'resmol' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
