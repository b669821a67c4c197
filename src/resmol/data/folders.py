"""Find the text files of a folder; everything else in it is counted and named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from resmol.data.compression import COMPRESSED_SUFFIXES
from resmol.data.format_signatures import CSV_SUFFIXES
from resmol.data.formats import JSON_SUFFIXES
from resmol.data.source_facts import UnusedFacts
from resmol.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".text", *JSON_SUFFIXES, *CSV_SUFFIXES)
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (
    *(f"{suffix}{packed}" for packed in ("", *COMPRESSED_SUFFIXES) for suffix in TEXT_SUFFIXES),
    *TABLE_SUFFIXES,
)

Split = Literal["train", "val"]

_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
# What `save_to_disk` of Hugging Face's data sets writes beside the files with the rows.
_ABOUT_DATA_SETS = ("dataset_dict.json", "dataset_info.json", "state.json")
_SHOWN_NAMES = 3
_MAX_REASONS = 20  # a folder may hold files with any number of endings


@dataclass
class Unused:
    """Files and folders that were found and not used.

    Attributes:
        reasons: Reason -> how many, and the first names.
    """

    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one, and keep its name if few have been counted for this reason."""
        if reason not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            reason = "other endings"
        count, names = self.reasons.get(reason, (0, []))
        self.reasons[reason] = (count + 1, [*names, name] if count < _SHOWN_NAMES else names)

    def update(self, other: Unused) -> None:
        """Add what another one counted."""
        for reason, (count, names) in other.reasons.items():
            mine, my_names = self.reasons.get(reason, (0, []))
            self.reasons[reason] = (mine + count, [*my_names, *names][:_SHOWN_NAMES])

    def facts(self) -> tuple[UnusedFacts, ...]:
        """Return the counts as the manifest records them."""
        return tuple(
            UnusedFacts(reason=reason, files=count, names=tuple(names))
            for reason, (count, names) in self.reasons.items()
        )


def find_text_files(root: Path, *, include_hidden: bool = False) -> tuple[list[Path], Unused]:
    """Return the files below ``root`` whose names end in `SUFFIXES`, in the order of their paths, and all others.

    Links are followed; a folder that two links lead to is read once. Hidden files and folders, and what editors and
    systems leave behind, are not text, unless ``include_hidden``.

    Raises:
        DataError: A folder cannot be listed.
    """
    files, unused = [], Unused()
    for path in _entries(root, include_hidden, unused):
        reason = _why_not(path, include_hidden)
        if reason is None:
            files.append(path)
        else:
            unused.add(reason, shown_name(path, root))
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), unused


def has_split_folders(files: Sequence[Path]) -> bool:
    """Return whether a folder divides its text itself: some of its files lie in ``train``, and some in ``val``.

    Args:
        files: Its files, relative to it.
    """
    return {"train", "val"} <= {_SPLIT_FOLDERS.get(file.parts[0].lower()) for file in files if len(file.parts) > 1}


def split_of_path(file: Path) -> Split:
    """Return the split of a file in a folder that divides its text itself; what lies beside its subfolders trains."""
    return "val" if len(file.parts) > 1 and _SPLIT_FOLDERS.get(file.parts[0].lower()) == "val" else "train"


def without_test(files: list[Path], root: Path, unused: Unused) -> list[Path]:
    """Return the files that are not in ``test``; those are counted as unused."""
    kept = []
    for file in files:
        place = file.relative_to(root)
        if len(place.parts) > 1 and place.parts[0].lower() == "test":
            unused.add("the test split", shown_name(file, root))
        else:
            kept.append(file)
    return kept


def shown_name(path: Path, root: Path) -> str:
    """Return a file's path from its input on, for messages and the manifest."""
    return f"{root.resolve().name}/{path.relative_to(root).as_posix()}"


def shown_unused(facts: UnusedFacts) -> str:
    """Return one line for people: how many, why, and the first names."""
    more = ", …" if facts.files > len(facts.names) else ""
    return f"{facts.files} ({facts.reason}): {', '.join(facts.names)}{more}"


def _why_not(path: Path, include_hidden: bool) -> str | None:
    """Return why a file is not used; None if it is."""
    if _is_hidden(path.name) and not include_hidden:
        return "hidden"
    if path.name in _ABOUT_DATA_SETS:
        return "describes a data set"
    if not path.name.lower().endswith(SUFFIXES):
        return f"name ends in {path.suffix.lower()}" if path.suffix else "name without an ending"
    if path.is_file():
        return None
    return "not a regular file" if path.exists() else "a link that leads nowhere"  # a pipe would block


def _entries(root: Path, include_hidden: bool, unused: Unused) -> Iterator[Path]:
    seen = {_identity(root)}
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        kept = []
        for name in sorted(folders):
            path = Path(folder, name)
            if _is_hidden(name) and not include_hidden:
                unused.add("hidden", f"{shown_name(path, root)}/")
            elif _identity(path) in seen:
                unused.add("a folder that is read under another name", f"{shown_name(path, root)}/")
            else:
                seen.add(_identity(path))
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            yield Path(folder, name)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name == "__MACOSX"


def _refuse(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read: {error.strerror}", fix="check its permissions, or take it out"
    ) from error
