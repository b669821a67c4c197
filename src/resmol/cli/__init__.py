"""The command line: it parses, calls and prints, and holds no logic.

PyTorch takes seconds to import, so each command imports what it needs when it runs; ``--help`` and usage errors
answer at once.
"""

from resmol.cli import (  # each registers its commands
    bench,
    evaluate,
    export,
    generate,
    train,
    verify,
)
from resmol.cli.app import app
from resmol.cli.once import OnceCommand

for command in (*app.registered_commands, *bench.bench.registered_commands):
    command.cls = OnceCommand

__all__ = ["app", "bench", "evaluate", "export", "generate", "train", "verify"]
