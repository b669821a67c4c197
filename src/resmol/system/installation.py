"""How this installation is used from a shell: what its programs are called, and how an extra is added to it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

CHECKOUT = Path(__file__).resolve().parents[3]  # of the sources, where they are used in place


def program(name: str, module: str = "") -> str:
    """Return the words that start a program of this Python's environment.

    That is its name, if the shell finds it by that; else its path.

    Args:
        name: Such as ``resmol``, ``hf`` or ``pip``.
        module: What to run with ``python -m`` where there is no such program; empty takes the name as it is.
    """
    own = shutil.which(name, path=str(Path(sys.executable).parent))
    if own is None:
        return f"{program(Path(sys.executable).name)} -m {module}" if module else name
    found = shutil.which(name)
    if found is not None and Path(found).samefile(own):
        return name
    return shlex.quote(_seen_from_here(Path(own)))


def started_as() -> str:
    """Return the words that start resmol in this shell."""
    return program("resmol", "resmol")


def install_hint(extra: str) -> str:
    """Return the command that adds an extra of resmol, such as ``demo``, to this installation."""
    python = program(Path(sys.executable).name)
    pip_install = f"{program('pip', 'pip')} install" if find_spec("pip") else f"uv pip install --python {python}"
    return f"{pip_install} {_requirement(extra, CHECKOUT, _origin())}"


def _requirement(extra: str, checkout: Path, origin: str) -> str:
    """Return what to install: the package is on no index, so an extra comes from where the package came from."""
    if (checkout / "pyproject.toml").is_file():
        return f"-e {_quoted(f'{_seen_from_here(checkout)}[{extra}]')}"
    if origin.startswith("file:"):
        return _quoted(f"{unquote(urlsplit(origin).path)}[{extra}]")
    return _quoted(f"resmol[{extra}]{f' @ {origin}' if origin else ''}")


def _origin() -> str:
    """Return the address that the package was installed from, as pip recorded it (PEP 610); empty for an index."""
    try:
        record = json.loads(distribution("resmol").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    scheme = record.get("vcs_info", {}).get("vcs", "")
    return f"{scheme}+{record['url']}" if scheme else str(record.get("url", ""))


def _seen_from_here(path: Path) -> str:
    """Return a path from the current folder on, where it lies in that; else in full."""
    here = Path.cwd()
    return os.path.relpath(path) if path.is_relative_to(here) and here != Path(here.anchor) else str(path)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def source_commit() -> str | None:
    """Return the commit of resmol's own sources where they are a checkout, marked when they were changed since."""
    package = CHECKOUT / "src" / "resmol"

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != CHECKOUT:
            return None  # an installed package inside of some other checkout
        changed = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
