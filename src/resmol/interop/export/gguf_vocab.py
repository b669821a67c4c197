"""Translate a `tokenizer.json` into GGUF metadata: tokens, their kinds, merges, and the name of the pre-tokenizer.

GGUF holds no pre-tokenization rules, only names of rules that llama.cpp implements. A tokenizer without such a name is
refused: llama.cpp would compute other ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError

# The options of a ByteLevel step that change the ids; GPT-2's regular expression is part of it.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# Name in llama.cpp (src/llama-vocab.cpp) -> the steps of `tokenizer.json` with the same effect.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {"smollm": [_DIGITS, _BYTE_LEVEL], "gpt-2": [_BYTE_LEVEL]}
# Options of the model and of added tokens that llama.cpp's BPE does not have, each with the values that mean "off".
_MODEL_OFF = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_ADDED_OFF = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        tokens: Text of each id, in the letters of byte-level BPE.
        kinds: `gguf.TokenType` of each id: normal, control (special), user-defined (added), unused.
        merges: Two tokens with a space between, the first to be applied first.
        pre: Name of the pre-tokenizer in llama.cpp.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to the ``size`` of the model's embedding with unused tokens.

    Raises:
        DataError: The tokenizer has a step that llama.cpp has no name for.
    """
    document = json.loads(tokenizer.data)
    model, added = document["model"], document.get("added_tokens") or []
    texts = {index: token for token, index in model["vocab"].items()} | {item["id"]: item["content"] for item in added}
    kinds = {
        item["id"]: TokenType.CONTROL if item.get("special") else TokenType.USER_DEFINED
        for item in added
    }  # fmt: skip
    _require_plain(tokenizer, document)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(size)],
        kinds=[
            int(kinds.get(index, TokenType.NORMAL if index in texts else TokenType.UNUSED)) for index in range(size)
        ],
        merges=merges,
        pre=_pre_tokenizer(tokenizer, document["pre_tokenizer"]),
    )


def _require_plain(tokenizer: Tokenizer, document: dict[str, Any]) -> None:
    problems = [f"model.{name}" for name in _MODEL_OFF if document["model"].get(name)]
    problems += [
        f"{name} of the added token {item['content']!r}"
        for item in document.get("added_tokens") or []
        for name in _ADDED_OFF
        if item.get(name)
    ]
    problems += ["normalizer"] if document.get("normalizer") else []
    if problems:
        raise no_name(tokenizer, problems[0])


def _pre_tokenizer(tokenizer: Tokenizer, stated: dict[str, Any] | None) -> str:
    steps = (stated or {}).get("pretokenizers", [stated or {}])
    for name, wanted in PRE_TOKENIZERS.items():
        same = len(steps) == len(wanted) and all(
            all(step.get(key, True) == value for key, value in rule.items())
            for step, rule in zip(steps, wanted, strict=True)
        )
        if same:
            return name
    raise no_name(tokenizer, f"pre_tokenizer ({', '.join(str(step.get('type')) for step in steps)})")


def no_name(tokenizer: Tokenizer, what: str) -> DataError:
    """Return the error for a part of a tokenizer that GGUF cannot describe."""
    return DataError(
        f"{tokenizer.path} uses {what}, for which GGUF has no name that resmol writes",
        fix="export with --format hf; llama.cpp would cut texts in another way",
    )
