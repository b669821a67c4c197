"""The name, the languages and the licence of a model, as its own files state them; no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.resolve import Source

CARD = "README.md"
MAX_CARD_BYTES = 1_000_000
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # a language or a licence as cards and GGUF name them
# Fields of GGUF that describe a model to people, and stay true of a copy in another type.
GGUF_FIELDS = (
    "author", "basename", "description", "finetune", "license.link", "license.name", "organization", "size_label",
    "version",
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What a model is called and may be used for.

    Attributes:
        name: Its name; None where nothing states one.
        languages: ISO codes.
        licence: As cards name it, such as "apache-2.0".
        general: Further fields of a GGUF file, without the prefix "general.".
    """

    name: str | None = None
    languages: tuple[str, ...] = ()
    licence: str | None = None
    general: Mapping[str, str] = field(default_factory=dict)


def description(source: Source) -> Description:
    """Return what the files of a model from elsewhere state; of a checkpoint, its run says more."""
    if isinstance(source.weights, GGUFHeader):
        return _of_gguf(source.weights.metadata)
    return _of_folder(source.path) if source.kind in ("huggingface", "hub") else Description()


def _of_gguf(metadata: Mapping[str, Any]) -> Description:
    fields = {name: metadata.get(f"general.{name}") for name in GGUF_FIELDS}
    name = metadata.get("general.name")
    return Description(
        name if isinstance(name, str) and name.strip() else None,
        stated_words(metadata.get("general.languages")),
        stated_word(metadata.get("general.license")),
        {name: text for name, text in fields.items() if isinstance(text, str)},
    )


def _of_folder(folder: Path) -> Description:
    card = _front_matter(folder)
    name = card.get("model_name")
    return Description(
        name if isinstance(name, str) and name.strip() else _folder_name(folder),
        stated_words(card.get("language")),
        stated_word(card.get("license")),
    )


def _folder_name(folder: Path) -> str:
    """Return the name of a folder; the Hub's cache has models--OWNER--NAME/snapshots/REVISION."""
    path = folder.resolve()
    cached = [part for part in path.parts if part.startswith("models--")] if path.parent.name == "snapshots" else []
    return cached[-1].split("--")[-1] if cached else path.name


def _front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata of a model card; none where it is missing or is not what the Hub's own reader takes."""
    from huggingface_hub import metadata_load

    path = folder / CARD
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # errors of the disk, of UTF-8, of YAML: a card that nobody can read states nothing
        return {}


def stated_words(stated: Any) -> tuple[str, ...]:
    """Return the languages of a front matter or a GGUF file: those of its words that are one."""
    entries = stated if isinstance(stated, list) else [stated]
    spelled = ("no" if entry is False else entry for entry in entries)  # YAML takes Norwegian for a truth value
    return tuple(word for entry in spelled if (word := stated_word(entry)) is not None)


def stated_word(stated: Any) -> str | None:
    """Return a licence or a language that files state; None where it is not one word."""
    return stated if isinstance(stated, str) and _WORD.fullmatch(stated) else None
