"""Which GGUF files belong together: the parts of a split model, and the one model of a folder or repository.

llama.cpp splits a model into ``NAME-00001-of-00003.gguf`` and so on. The first part holds the metadata, and each holds
its number and how many there are (``split.no`` from 0, ``split.count``). Source: llama.cpp, tools/gguf-split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from resmol.errors import CheckpointError, DataError
from resmol.interop.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from resmol.system.untrusted_text import listed
from resmol.system.wording import counted

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
SHOWN = 5  # names in a message


def part_names(name: str) -> list[str]:
    """Return the names of all parts of the model that a file belongs to; of a file that is whole, its own."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """Return a name for each model among files: the file, or the first part of a split one."""
    files = (name for name in names if name.endswith(".gguf") and "/" not in name)
    return sorted({name if (match := _PART.fullmatch(name)) is None else _first_part(match, name) for name in files})


def _first_part(match: re.Match[str], name: str) -> str:
    return f"{match['stem']}-00001-of-{match['count']}.gguf" if int(match["count"]) else name


def gguf_of_folder(folder: Path) -> Path | None:
    """Return the GGUF model of a folder, its first part if it is split; None if there is none.

    Raises:
        DataError: There are several, so that one has to be named.
    """
    models = gguf_models(path.name for path in folder.iterdir())
    if len(models) > 1:
        raise DataError(
            f"{folder} holds {len(models)} GGUF models: {listed(models, SHOWN)}",
            fix=f"name the one that you mean, such as {folder / models[0]}",
        )
    return folder / models[0] if models else None


def read_gguf(path: Path) -> GGUFHeader:
    """Read the header of a GGUF model: of one file, or of all parts if ``path`` is one of them.

    Raises:
        CheckpointError: A file breaks a rule of the format, or a part is not the one that its name says.
        DataError: A part is missing, or cannot be read.
    """
    names = part_names(path.name)
    if len(names) == 1:
        header = read_gguf_header(path)
        _check_whole(path, header)
        return header
    files = [path.with_name(name) for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise DataError(
            f"{path} is one of {len(files)} parts of a model, and {path.parent} lacks {listed(missing, SHOWN)}",
            fix="download all parts into one folder, and name the folder or any of them",
        )
    return _joined(path, [read_gguf_header(file) for file in files])


def _check_whole(path: Path, header: GGUFHeader) -> None:
    """Refuse a part of a split model whose name does not say which one it is."""
    count, number = (header.metadata.get(f"split.{key}") for key in ("count", "no"))
    if isinstance(count, int) and count > 1:
        raise DataError(
            f"{path} is part {int(number) + 1 if isinstance(number, int) else '?'} of {count} of a model, and its name "
            "does not say so, so the others cannot be found",
            fix=f"give the parts the names that llama.cpp gave them: NAME-00001-of-{count:05}.gguf and so on",
        )


def _joined(path: Path, parts: list[GGUFHeader]) -> GGUFHeader:
    """Return the header of the whole; no two parts hold the same tensor."""
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        stated = tuple(part.metadata.get(f"split.{key}") for key in ("no", "count"))
        if stated != (number, len(parts)):
            raise _mixed(part.files[0], f"it says that it is part {stated[0]} (from 0) of {stated[1]}")
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise _mixed(part.files[0], f"another part holds {twice[0]!r} too")
        tensors |= {name: replace(tensor, part=number) for name, tensor in part.tensors.items()}
    total = parts[0].metadata.get("split.tensors.count")
    if isinstance(total, int) and total != len(tensors):
        raise _mixed(
            path, f"the parts hold {counted(len(tensors), 'tensor')}, and the first says that there are {total}"
        )
    return GGUFHeader(parts[0].metadata, tensors, tuple(file for part in parts for file in part.files))


def _mixed(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not belong to the parts beside it: {why}", fix="download all parts of one model again"
    )
