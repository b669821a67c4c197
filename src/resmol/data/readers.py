"""Text in: files, folders, tables, standard input, as documents that are read in pieces.

Nothing here holds a whole document: a file of 1 GB, or a line of 1 GB, passes through as pieces (see `text`).
"""

from __future__ import annotations

import glob
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from resmol.data.chunking import InputCount, ReadCounts, cut_into_pieces, decoded, repaired, without_mark
from resmol.data.compression import COMPRESSED_SUFFIXES
from resmol.data.folders import (
    SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Split,
    Unused,
    find_text_files,
    has_split_folders,
    shown_name,
    shown_unused,
    split_of_path,
    without_test,
)
from resmol.data.remote_files import RemoteFile, find_remote_files, is_address
from resmol.data.sample import sample_order
from resmol.data.source_facts import InputFacts, Reading
from resmol.data.text_file import ReadOptions, TextFile, open_file
from resmol.errors import DataError
from resmol.system.user_paths import user_path


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: For messages: a file name, or a file name and a line.
        pieces: Its text, to be read once, before the next document is asked for.
        split: Where a named corpus wants it; None leaves the choice to `prepare`.
    """

    name: str
    pieces: Iterator[str]
    split: Split | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read, again and again unless they come from standard input.

    Attributes:
        name: For messages.
        bytes_total: Bytes on the disk, None where nobody knows (standard input).
        read: Yields the documents and fills the counts as it goes.
        sample_seed: What drew the order of its files; None where they come in their own.
        reading: How its inputs are read, for the manifest; None where a program has the text in memory.
        identity: What the documents depend on besides the bytes that are read, by name; None where nothing can be read
            a second time.
    """

    name: str
    bytes_total: int | None
    read: Callable[[ReadCounts], Iterator[Document]]
    sample_seed: int | None = None
    reading: Reading | None = None
    identity: Mapping[str, object] | None = None


def read_inputs(paths: Sequence[str | Path], options: ReadOptions | None = None) -> Corpus:
    """Return the documents of files, patterns, folders (see `find_text_files`), addresses and ``-``, standard input.

    JSON lines and tables (CSV, Parquet, Arrow) hold one document a row; any other text is one document. Compressed
    files are unpacked on the way. A text is UTF-8, or what its byte order mark says; invalid bytes are replaced and
    counted, line ends stay as they are. Files in a folder that are in no format that is read are counted as unused. A
    folder with ``train`` and ``val`` (or ``valid``, ``validation``, ``dev``) in it says what is held out; its ``test``
    is then used for neither.

    Raises:
        DataError: Nothing was named, a path is missing or unreadable, or a folder holds no text; later, while
            reading: a named file in another format, one that hardly decodes, a broken archive, or a bad line.
    """
    if not paths:
        raise DataError("no input was named", fix="add --input PATH, or --corpus shakespeare")
    options = options or ReadOptions()
    inputs = [_Input.find(path, options) for path in paths]
    files = [file for one in inputs for file in one.files]
    sizes = [_size(file) for file in files] + [None for one in inputs if one.name == "-"]

    def read(counts: ReadCounts) -> Iterator[Document]:
        for one in inputs:
            yield from one.read(options, counts)

    return Corpus(
        ", ".join(one.name for one in inputs),
        None if None in sizes else sum(cast(list[int], sizes)),
        read,
        options.sample_seed,
        identity=None if None in sizes else {"input": [one.label for one in inputs], **asdict(options)},
    )


def input_files(paths: Sequence[str | Path], options: ReadOptions) -> list[tuple[Path | RemoteFile, Split | None]]:
    """Return the files that `read_inputs` reads, in its order, and where a folder wants each (`DataError` as there)."""
    inputs = [_Input.find(path, options) for path in paths]
    return [(file, one.split_of(file)) for one in inputs for file in one.files]


def _size(file: Path | RemoteFile) -> int | None:
    """Return the bytes of a file; None for a pipe."""
    if isinstance(file, RemoteFile):
        return file.size
    return file.stat().st_size if file.is_file() else None


def with_held_out(train: Corpus, val: Corpus) -> Corpus:
    """Return the documents of both; those of ``val`` are held out, whatever a folder's own subfolders say."""

    def read(counts: ReadCounts) -> Iterator[Document]:
        for corpus, split in ((train, "train"), (val, "val")):
            for document in corpus.read(counts):
                yield replace(document, split=cast(Split, split))

    sizes = [corpus.bytes_total for corpus in (train, val)]
    repeatable = train.identity is not None and val.identity is not None
    return Corpus(
        f"{train.name}, {val.name}",
        None if None in sizes else sum(cast(list[int], sizes)),
        read,
        train.sample_seed,
        identity={**(train.identity or {}), "val": val.identity} if repeatable else None,
    )


def input_facts(source: str | Path) -> InputFacts:
    """Return what the manifest records of an input that `read_inputs` reads with its default options, as it is now.

    Raises:
        DataError: As in `read_inputs`.
    """
    options = ReadOptions()
    one = _Input.find(source, options)
    count = InputCount(one.label)
    for path in one.files:
        one.pass_over(path, options, count)
    return count.facts()


def from_texts(texts: Iterable[str], *, name: str = "texts") -> Corpus:
    """Return each of ``texts`` as one document; for a program that has its text in memory."""

    def read(counts: ReadCounts) -> Iterator[Document]:
        count = InputCount(name)
        counts.inputs.append(count)
        for number, text in enumerate(texts):
            count.add(text.encode("utf-8", errors="surrogatepass"))
            yield Document(f"{name}[{number}]", cut_into_pieces(repaired([text], counts), counts))

    return Corpus(name, None, read)


def document_of_bytes(name: str, data: bytes, counts: ReadCounts, *, split: Split | None = None) -> Document:
    """Return one file's content as a document, and count it in the newest input."""
    counts.inputs[-1].files += 1
    counts.inputs[-1].add(data)
    text = without_mark(repaired(decoded([data]), counts))
    return Document(name, cut_into_pieces(text, counts), split)


@dataclass(frozen=True)
class _Input:
    """One path that the user named, and the files that it stands for; ``address`` is that of remote ones."""

    name: str
    files: tuple[Path | RemoteFile, ...]
    is_folder: bool
    unused: Unused
    has_splits: bool = False
    address: str = ""

    @classmethod
    def find(cls, path: str | Path, options: ReadOptions) -> _Input:
        if str(path) == "-":
            return cls("-", (), False, Unused())
        if is_address(path):
            remote = find_remote_files(str(path), SUFFIXES)
            return cls(str(path), remote.files, False, Unused(), address=remote.label)
        root = user_path(path)
        # Not pathlib's: the pattern may begin at the root.
        matches = sorted(glob.glob(str(root), recursive=True)) if "*" in root.name and not root.exists() else []  # noqa: PTH207
        if matches:
            return cls(str(path), tuple(Path(one) for one in matches if Path(one).is_file()), False, Unused())
        if root.exists() and not root.is_dir():  # also a pipe, as a shell's <(command) makes it
            return cls(str(path), (root,), False, Unused())
        if not root.is_dir():
            raise DataError(f"there is no file or folder {root}", fix="check the path")
        files, unused = find_text_files(root, include_hidden=options.include_hidden)
        if not files:
            found = "; ".join(f"not used: {shown_unused(facts)}" for facts in unused.facts())
            raise DataError(
                f"{root} holds no text" + (f" ({found})" if found else ""),
                fix=f"put files into it that end in {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))} (also compressed: "
                f"{', '.join(COMPRESSED_SUFFIXES)}), or name other text files one by one",
            )
        has_splits = has_split_folders([file.relative_to(root) for file in files])
        if has_splits:
            files = without_test(files, root, unused)
        return cls(str(path), tuple(files), True, unused, has_splits)

    @property
    def label(self) -> str:
        """The input's name without its path."""
        if self.address:
            return self.address
        return "standard input" if self.name == "-" else user_path(self.name).resolve().name

    def _in_order(self, sample_seed: int | None) -> list[Path | RemoteFile]:
        """Return the files in the order that a seed draws, which depends on their number and not on where they lie."""
        return [self.files[number] for number in sample_order(range(len(self.files)), sample_seed)]

    def read(self, options: ReadOptions, counts: ReadCounts) -> Iterator[Document]:
        count = InputCount(self.label)
        counts.inputs.append(count)
        counts.unused.update(self.unused)
        if self.name == "-":
            pipe = cast(io.BufferedIOBase, sys.stdin.buffer)
            yield from _documents(TextFile(pipe, Path("-"), options), count, counts)
        for path in self._in_order(options.sample_seed):
            if counts.begin_file():
                yield from self._read_file(path, options, count, counts)
            else:
                self.pass_over(path, options, count)

    def _read_file(
        self, path: Path | RemoteFile, options: ReadOptions, count: InputCount, counts: ReadCounts
    ) -> Iterator[Document]:
        with open_file(path) as raw:
            file = TextFile(raw, path, options)
            if self.is_folder and isinstance(path, Path) and file.unsupported:
                counts.unused.add(file.unsupported.name, shown_name(path, user_path(self.name)))
                return
            for document in _documents(file, count, counts):
                yield replace(document, split=self.split_of(path))

    def split_of(self, file: Path | RemoteFile) -> Split | None:
        """Return the split of a file in a folder that divides its text itself; None elsewhere."""
        if not self.has_splits or not isinstance(file, Path):
            return None
        return split_of_path(file.relative_to(user_path(self.name)))

    def pass_over(self, path: Path | RemoteFile, options: ReadOptions, count: InputCount) -> None:
        """Count and hash a file as if it had been read; of a remote one nothing is fetched for that."""
        if isinstance(path, RemoteFile):
            count.files += 1
            count.hash(path.identity.encode())
            count.advance(path.size)
            return
        with open_file(path) as raw:
            file = TextFile(raw, path, options)
            if not (self.is_folder and file.unsupported):
                count.files += 1
                file.read_through(count)


def _documents(file: TextFile, count: InputCount, counts: ReadCounts) -> Iterator[Document]:
    count.files += 1
    for name, text in file.documents(count, counts):
        yield Document(name, cut_into_pieces(text, counts))
