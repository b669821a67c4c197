"""The home folder: the one place where ``~`` in a path is expanded, for commands, configurations and in Python.

A shell expands ``~`` only at the beginning of a word: not in ``--data=~/input.txt``, in quotes, in a configuration.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from resmol.errors import UsageError

logger = logging.getLogger(__name__)

HOME = "USERPROFILE" if sys.platform == "win32" else "HOME"  # the variable that names the home folder


def user_path(path: str | Path) -> Path:
    """Return the path with a ``~`` or ``~user`` at its beginning expanded.

    A name that begins with ``~`` and is no user's, such as the ``~$letter.txt`` of an editor, stays as it is.

    Raises:
        UsageError: ``~`` stands for a home folder, and there is none.
    """
    expanded = Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's refuses the names of no user
    if expanded.parts[:1] == ("~",):
        raise UsageError(
            f"{path} cannot be found: there is no home folder", fix=f"set {HOME}, or write the path in full"
        )
    return expanded


def short_path(path: str) -> str:
    """Return a path as seen from the working directory; as it is where that is another drive of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path


def default_cache() -> Path:
    """Return the folder for downloaded files: ``$XDG_CACHE_HOME/resmol``, else ``~/.cache/resmol``.

    Without a home folder it lies in the temporary one.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if configured:
        return user_path(configured) / "resmol"
    return (user_path("~") if _has_home() else _temporary_home()) / ".cache" / "resmol"


def provide_home(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give this process a home folder where it has none: libraries keep caches there, and some make a folder ``~``.

    So it is for a user of a container who is only a number, if no variable says otherwise.
    """
    if environment.get(HOME) == "":  # as if it were not set
        del environment[HOME]
    if _has_home() or environment.get("XDG_CACHE_HOME"):
        return
    environment[HOME] = str(_temporary_home())
    logger.warning(
        f"no home folder: {HOME} is not set, and user {_user_number()} has none; downloads are kept in "
        f"{environment[HOME]} (set {HOME} or XDG_CACHE_HOME for another place)"
    )


def _has_home() -> bool:
    return os.path.expanduser("~") != "~"  # noqa: PTH111


def _temporary_home() -> Path:
    """Return a folder of this user alone in the temporary folder, the same each time where that is possible."""
    folder = Path(tempfile.gettempdir(), f"resmol-{_user_number()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    is_ours = not folder.is_symlink() and folder.stat().st_uid == _user_number()
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="resmol-"))


def _user_number() -> int:
    """Return the number of this user; on Windows 0, the owner of every file, where each user has a temporary folder."""
    if sys.platform == "win32":
        return 0
    else:
        return os.getuid()
