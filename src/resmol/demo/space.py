"""Export a complete Hugging Face Space: the page of `resmol demo`, the weights, their record, and this package.

resmol is not on the package index that a Space installs from, so the Space carries the package as it runs here. The
versions of everything else are those that the tests of resmol passed with (`templates/space_requirements.txt`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from resmol.checks import Check
from resmol.config.model_config import read_model_config
from resmol.errors import UsageError
from resmol.interop.description import CARD
from resmol.interop.export.card_words import NO_WORDS, CardWords, split_card
from resmol.interop.export.hf import Export, commit_export, export_hf, require_new
from resmol.interop.export.manifest import parse_manifest
from resmol.interop.export.markdown import plain
from resmol.interop.model_ref import ModelRef
from resmol.model.flops import total_parameters
from resmol.run.checkpoint_manifest import MANIFEST, WEIGHTS
from resmol.system.hub_download import is_hub_id
from resmol.system.templates import template_environment
from resmol.system.user_paths import user_path
from resmol.version import __version__

logger = logging.getLogger(__name__)

PYTHON = "3.11"
SHIPPED = {".py", ".toml", ".j2", ".css", ".txt"}  # what a source file of the package ends with


def export_space(
    source: str | Path | ModelRef, out: Path, *, dtype: str = "float32", model_repo: str | None = None,
    tokenizer: str | Path | None = None, words: CardWords = NO_WORDS,
) -> Export:  # fmt: skip
    """Write a Space that serves a model; it can be started where it is, or pushed to the Hub.

    Args:
        source: What `load_model` takes.
        out: The folder to create.
        dtype: The type of the weights in the file.
        model_repo: ``OWNER/NAME`` of the repository that holds the same export: the Space then fetches the weights from
            there, and refuses others than these.
        tokenizer: What `load_model` takes; by default the model's own.
        words: What its owner says about it.

    Returns:
        The Space, with the checks that the export in it passed.

    Raises:
        UsageError: ``out`` exists, or ``model_repo`` is not a name.
        ResmolError: See `export_hf`; nothing is left of the Space.
    """
    require_new(out := user_path(out))
    if model_repo is not None and not is_hub_id(model_repo):
        raise UsageError(f"{model_repo} does not name a repository", fix="write it as OWNER/NAME")

    facts: dict[str, Any] = {"model_repo": model_repo}

    def write_files(folder: Path) -> Sequence[Check]:
        model = export_hf(source, folder / "model", dtype=dtype, tokenizer=tokenizer, words=words)
        if model_repo is not None:
            (folder / "model" / WEIGHTS).unlink()  # its hash stays in the manifest: the Space serves no other weights
        logger.info("writing the Space")
        facts["title"] = _title(folder / "model")
        for name, content in _files(folder / "model", model_repo, words):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return model.checks

    return commit_export(out, "space", facts, write_files)


def requirements() -> dict[str, str]:
    """Return name -> version of everything that a Space installs."""
    return dict(line.split("==") for line in _requirements_text().splitlines() if "==" in line and line[0] != "#")


def _requirements_text() -> str:
    return files("resmol.demo").joinpath("templates/space_requirements.txt").read_text(encoding="utf-8")


def _title(model: Path) -> str:
    """Return what the export in a Space is called."""
    manifest = parse_manifest((model / MANIFEST).read_bytes())
    return str((manifest.facts.get("title") if manifest else None) or "A model")


def _files(model: Path, model_repo: str | None, words: CardWords) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of the Space besides the model."""
    environment = template_environment("resmol.demo", autoescape=False, keep_trailing_newline=True)
    environment.filters |= {"plain": plain}
    stated, _ = split_card((model / CARD).read_text(encoding="utf-8"))
    values = {
        "title": _title(model),
        "model_repo": model_repo,
        "gradio": requirements()["gradio"],
        "python": PYTHON,
        "parameters": total_parameters(read_model_config(model)),
        "version": __version__,
        "licence": stated.get("license"),
    }
    card = environment.get_template("space_readme.md.j2").render(**values)
    yield CARD, words.lay_over(card).encode()
    yield "app.py", environment.get_template("space_app.py.j2").render(**values).encode()
    yield "requirements.txt", _requirements_text().encode()
    yield ".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    yield from _licenses()
    yield from _package()


def _package() -> Iterator[tuple[str, bytes]]:
    """Yield the source of this package."""
    with as_file(files("resmol")) as package:
        for path in sorted(package.rglob("*")):
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and (path.suffix in SHIPPED or path.name == "py.typed")
            ):
                yield f"resmol/{path.relative_to(package).as_posix()}", path.read_bytes()


def _licenses() -> Iterator[tuple[str, bytes]]:
    """Yield the licence files of the installed package; from a bare source folder there are none to find."""
    try:
        installed = distribution("resmol")
    except PackageNotFoundError:
        return
    for name in ("LICENSE", "NOTICE"):
        if text := installed.read_text(f"licenses/{name}"):
            yield name, text.encode()
