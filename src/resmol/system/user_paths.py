"""The one place where ``~`` in a path becomes the home folder, for every command, option, configuration and in Python.

A shell expands ``~`` only at the beginning of a word: not in ``--data=~/input.txt``, in quotes, in a configuration.
"""

from __future__ import annotations

import os
from pathlib import Path

from resmol.errors import UsageError


def user_path(path: str | Path) -> Path:
    """Return the path with a ``~`` or ``~user`` at its beginning expanded.

    A name that begins with ``~`` and is no user's, such as the ``~$letter.txt`` of an editor, stays as it is.

    Raises:
        UsageError: ``~`` stands for a home folder, and there is none.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib's refuses the names of no user
    if expanded.split("/", 1)[0] == "~":
        raise UsageError(f"{path} cannot be found: there is no home folder", fix="set HOME, or write the path in full")
    return Path(expanded)
