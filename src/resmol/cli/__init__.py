"""The command line: it parses arguments, calls the package and prints results, and holds no logic.

PyTorch takes seconds to import, so each command imports what it needs when it runs. ``--help`` and usage errors do
not import it.
"""

from resmol.cli import (  # each registers its commands
    ablate,
    bench,
    config,
    evaluate,
    export,
    generate,
    tokenizer,
    train,
    verify,
)
from resmol.cli.app import app
from resmol.cli.command import Command

IN_ORDER_OF_WORK = (
    "inspect", "config", "prepare", "train", "verify", "audit", "anchor", "evaluate", "generate", "export", "publish",
    "demo", "ablate", "report", "reproduce", "quickstart",
)  # fmt: skip
app.registered_commands.sort(key=lambda command: IN_ORDER_OF_WORK.index(getattr(command.callback, "__name__", "")))
for group in (app, bench.bench, tokenizer.tokenizer):
    for command in group.registered_commands:
        command.cls = Command

__all__ = ["ablate", "app", "bench", "config", "evaluate", "export", "generate", "tokenizer", "train", "verify"]
