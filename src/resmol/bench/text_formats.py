"""The same documents as a file of each format that `resmol prepare` reads."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROW_GROUP_CHARACTERS = 64_000_000

Writer = Callable[[Iterable[str], Path], None]


def _zstandard(path: Path, mode: str) -> Any:
    import pyarrow

    return pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), mode), "zstd")


def _json_lines(open_file: Callable[..., Any], **options: int) -> Writer:
    def write(documents: Iterable[str], path: Path) -> None:
        with open_file(path, "wb", **options) as out:
            for text in documents:
                out.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())

    return write


def _text(documents: Iterable[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(documents)


def _text_of_one_line(documents: Iterable[str], path: Path) -> None:
    _text((text.replace("\n", " ") for text in documents), path)


def _csv(documents: Iterable[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out, quoting=csv.QUOTE_ALL)
        rows.writerow(["text"])
        rows.writerows([text] for text in documents)


def _parquet(documents: Iterable[str], path: Path) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema({"text": pyarrow.string()})) as out:
        for group in _groups(documents):
            out.write_table(pyarrow.table({"text": group}))


def _parquet_of_one_row_group(documents: Iterable[str], path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.chunked_array([pyarrow.array(group) for group in _groups(documents)])})
    pyarrow.parquet.write_table(table, path, row_group_size=len(table))


def _arrow(documents: Iterable[str], path: Path) -> None:
    import pyarrow

    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
        for group in _groups(documents, ROW_GROUP_CHARACTERS // 16):
            out.write_batch(pyarrow.record_batch({"text": group}))


def _groups(documents: Iterable[str], characters: int = ROW_GROUP_CHARACTERS) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


# By the name of a format: how its files end, and what writes one. Compression is quick: its ratio is not of interest.
FORMATS: dict[str, tuple[str, Writer]] = {
    "txt": (".txt", _text),
    "txt-one-line": (".txt", _text_of_one_line),
    "jsonl": (".jsonl", _json_lines(Path.open)),
    "jsonl.gz": (".jsonl.gz", _json_lines(gzip.open, compresslevel=1)),
    "jsonl.zst": (".jsonl.zst", _json_lines(_zstandard)),
    "jsonl.xz": (".jsonl.xz", _json_lines(lzma.open, preset=0)),
    "jsonl.bz2": (".jsonl.bz2", _json_lines(bz2.open, compresslevel=1)),
    "csv": (".csv", _csv),
    "parquet": (".parquet", _parquet),
    "parquet-one-row-group": (".parquet", _parquet_of_one_row_group),
    "arrow": (".arrow", _arrow),
}
