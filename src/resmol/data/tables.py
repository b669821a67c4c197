"""Parquet and Arrow files: the column with the text, a few rows at a time, whatever the size of a row group."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resmol.data.compression import BombCheck
from resmol.data.json_lines import Row, decode_escaped
from resmol.data.sample import sample_order
from resmol.data.text_field import candidates, name_the_field, shown_fields
from resmol.errors import DataError

MAX_BATCH_ROWS = 128  # a dictionary stores a long text once, however many rows hold it
BATCH_BYTES = 4 << 20
READ_BYTES = 1 << 20  # of a column, at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class TableFile:
    """An open Parquet or Arrow file.

    Args:
        file: It can be positioned.
        path: For messages.
        kind: ``parquet``, ``arrow`` (the file that Feather 2 is as well) or ``arrow-stream`` (as `save_to_disk` of
            Hugging Face's data sets writes it).
        text_field: The column with the text, or several of which the first that is there counts.
        size: Bytes of the file.
        sample_seed: Draws the order of the row groups of a Parquet file; None leaves it.
    """

    def __init__(
        self,
        file: io.RawIOBase | io.BufferedIOBase,
        path: object,
        kind: str,
        text_field: str,
        size: int,
        sample_seed: int | None = None,
    ) -> None:
        self._file = file
        self._path = path
        self._kind = kind
        self._text_field = text_field
        self._size = size
        self._sample_seed = sample_seed
        self._bomb_check = BombCheck(path)

    def rows(self) -> Iterator[tuple[Row, int]]:
        """Yield each row, and how many bytes of the file lie before its end, about.

        Raises:
            DataError: The file is damaged, cut off or encrypted, or has no column with text of that name; the row
                group is named.
        """
        batches = {"parquet": self._parquet, "arrow": self._arrow_file, "arrow-stream": self._arrow_stream}[self._kind]
        number = 0
        for column, position in batches():
            for start in range(0, len(column), MAX_BATCH_ROWS):
                for value in _as_bytes(column.slice(start, MAX_BATCH_ROWS)):
                    number += 1
                    self._bomb_check.add(len(value or b""), self._size)
                    text, invalid = (None, 0) if value is None else decode_escaped(value)
                    yield Row(str(number), value or b"", invalid, text), position

    def _parquet(self) -> Iterator[tuple[Any, int]]:
        import pyarrow.parquet

        with self._damage_is_an_error("the end of the file, which lists its row groups"):
            parquet = pyarrow.parquet.ParquetFile(
                self._file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )  # with pre_buffer, its default, a column of a row group is read whole
            names = self._column_path(parquet.schema_arrow)
        facts, done = parquet.metadata, 0
        for group in sample_order(range(facts.num_row_groups), self._sample_seed):
            with self._damage_is_an_error(f"row group {group}"):
                size, rows = facts.row_group(group).total_byte_size, facts.row_group(group).num_rows
                batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
                batches = parquet.iter_batches(
                    batch_size=batch_rows, row_groups=[group], columns=[".".join(names)], use_threads=False
                )
                for batch in batches:
                    done += len(batch)
                    yield _column(batch, names), self._size * done // max(1, facts.num_rows)

    def _arrow_stream(self) -> Iterator[tuple[Any, int]]:
        import pyarrow.ipc

        with self._damage_is_an_error("the end of the file"):
            self._file.seek(max(0, self._size - len(_END_OF_STREAM)))
            if self._file.read() != _END_OF_STREAM:
                raise EOFError("the mark that ends a stream is missing, so it was cut off")
            self._file.seek(0)
        with (
            self._damage_is_an_error("a batch of rows"),
            pyarrow.ipc.open_stream(pyarrow.PythonFile(self._file, mode="r")) as reader,
        ):
            names = self._column_path(reader.schema)
            for batch in reader:
                yield _column(batch, names), self._file.tell()

    def _arrow_file(self) -> Iterator[tuple[Any, int]]:
        import pyarrow.ipc

        with (
            self._damage_is_an_error("a batch of rows"),
            pyarrow.ipc.open_file(pyarrow.PythonFile(self._file, mode="r")) as reader,
        ):
            names = self._column_path(reader.schema)
            for number in range(reader.num_record_batches):
                yield _column(reader.get_batch(number), names), self._size * (number + 1) // reader.num_record_batches

    def _column_path(self, schema: Any) -> list[str]:
        """Return the column with the text as its path into structs (`DataError` if there is none)."""
        for candidate in candidates(self._text_field):
            found = _find(schema, candidate)
            if found is not None:
                path, kind = found
                if not _is_text(kind):
                    raise self._no_text(schema, f"the column {candidate!r} of {self._path} holds {kind}, not text")
                return path
        columns = shown_fields(schema.names)
        raise self._no_text(schema, f"{self._path} has no column {self._text_field!r}; its columns are {columns}")

    def _no_text(self, schema: Any, what: str) -> DataError:
        texts = list(_text_columns(schema, ""))
        if not texts:
            return DataError(f"{what}; none of them holds text", fix="write its text into a column of strings first")
        more = f"; columns of text: {shown_fields(texts)}" if len(texts) > 1 else ""
        return DataError(f"{what}{more}", fix=name_the_field(self._path, texts[0]))

    @contextmanager
    def _damage_is_an_error(self, place: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            why = f"{error}".strip().partition("\n")[0]
            if "decrypt" in why:
                raise DataError(
                    f"{self._path} is an encrypted Parquet file", fix="write it without encryption, with its keys"
                ) from error
            raise DataError(
                f"{self._path} cannot be read: {place}: {why}",
                fix="it is damaged or was cut off: fetch or write it again; nothing was made of it",
            ) from error


def _find(schema: Any, name: str) -> tuple[list[str], Any] | None:
    """Return the path and the type of a column by its name, else by its path through structs."""
    if name in schema.names:
        return [name], schema.field(name).type
    path = name.split(".")
    if path[0] not in schema.names:
        return None
    kind = schema.field(path[0]).type
    for part in path[1:]:
        place = kind.get_field_index(part) if _is_struct(kind) else -1
        if place < 0:
            return None
        kind = kind.field(place).type
    return path, kind


def _text_columns(fields: Any, prefix: str) -> Iterator[str]:
    """Yield the names of the columns of text, those within structs as paths."""
    for field in fields:
        if _is_text(field.type):
            yield f"{prefix}{field.name}"
        elif _is_struct(field.type):
            yield from _text_columns([field.type.field(place) for place in range(field.type.num_fields)],
                                     f"{prefix}{field.name}.")  # fmt: skip


def _is_struct(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _column(batch: Any, path: list[str]) -> Any:
    """Return a column, or what lies in it at the end of a path through structs."""
    import pyarrow.compute

    column = batch.column(path[0])
    return pyarrow.compute.struct_field(column, path[1:]) if len(path) > 1 else column


def _as_bytes(column: Any) -> list[bytes | None]:
    """Return the values as they are stored, since a damaged or careless file may hold what is no UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return list(column.cast(pyarrow.large_binary()).to_pylist())
