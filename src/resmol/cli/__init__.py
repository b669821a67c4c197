"""The command line: it parses, calls and prints, and holds no logic.

PyTorch takes seconds to import, so each command imports what it needs when it runs; ``--help`` and usage errors
answer at once.
"""

from resmol.cli import checking, generating, measuring, publishing, training  # each registers its commands
from resmol.cli.app import app

__all__ = ["app", "checking", "generating", "measuring", "publishing", "training"]
