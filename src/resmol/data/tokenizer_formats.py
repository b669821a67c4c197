"""Build a `tokenizer.json` from other formats: the vocabulary of a GGUF file, and vocab.json with merges.txt.

Only byte-level BPE, and only where the rule that cuts a text into words is known: a tokenizer with another rule gives
other ids, and nothing would show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from resmol.errors import DataError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# Llama 3's rule for words, as its tokenizer.json has it.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_STEPS = [_BYTE_LEVEL]
_DIGIT_STEPS = [_DIGITS, _BYTE_LEVEL]
_LLAMA3_STEPS = [
    {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
    {**_BYTE_LEVEL, "use_regex": False},
]
# Name of a rule in GGUF (tokenizer.ggml.pre) -> the steps with the same effect. Source: llama.cpp, llama-vocab.cpp.
GGUF_STEPS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGIT_STEPS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _GPT2_STEPS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_STEPS),
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type; 1 is normal
_ID_DIGITS = 10
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Roles of tokenizer_config.json, whose tokens are control tokens; GPT-2's class has a name for three of them.
_GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_ROLES = (*_GPT2_ROLES, "pad_token", "sep_token", "cls_token", "mask_token")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


# --- GGUF ------------------------------------------------------------------------------------------------------


def tokenizer_json_from_gguf(path: Path) -> bytes:
    """Rebuild `tokenizer.json` from a GGUF file of SmolLM2 that is trusted, in the layout of tokenizers 0.19.

    Byte-exact for SmolLM2: string merges, ``ignore_merges`` false, indented by 2, no newline at the end.

    Raises:
        DataError: The file has no byte-level BPE vocabulary.
    """
    from gguf import GGUFReader  # here, because only this rare path needs it

    fields = GGUFReader(path).fields
    keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    if any(key not in fields for key in keys):
        raise DataError(f"{path.name} holds no tokenizer", fix="use a GGUF file with tokenizer.ggml.* metadata")
    return tokenizer_json_from_metadata({key: fields[key].contents() for key in keys}, path, rule="smollm")


def tokenizer_json_from_metadata(metadata: Mapping[str, Any], path: Path, *, rule: str | None = None) -> bytes:
    """Build `tokenizer.json` from the metadata of a GGUF file.

    Source of the keys: the GGUF specification, section "Tokenizer".

    Args:
        metadata: Keys and values of the file.
        path: The file, for messages.
        rule: The name of the rule that cuts a text into words; None for the file's own (``tokenizer.ggml.pre``).

    Raises:
        DataError: The file has no byte-level BPE vocabulary, or a rule that is not implemented.
    """
    stated = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens, kinds, merges = stated.get("tokens"), stated.get("token_type"), stated.get("merges")
    kind, name = stated.get("model"), rule or stated.get("pre")
    if kind not in (None, "gpt2") or not _are_texts(tokens) or not _are_texts(merges):
        raise _unusable(path, f"its tokenizer {str(kind)[:40]!r} is no byte-level BPE with merges")
    if not isinstance(name, str) or name not in GGUF_STEPS:
        raise _unusable(path, f"its rule for words, {str(name)[:40]!r}, is not implemented")
    kinds = kinds if isinstance(kinds, list) and len(kinds) == len(tokens) else [1] * len(tokens)
    added = [
        _added_token(index, tokens[index], special=kind == _CONTROL)
        for index, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    steps = GGUF_STEPS[name]
    document = _document(vocabulary, list(merges), steps, added, ignore_merges=steps is _LLAMA3_STEPS)
    return _to_bytes(document)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _unusable(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} brings no tokenizer.json, and {why}",
        fix=f"put the model's tokenizer.json into {path.parent}, or name it with --tokenizer PATH",
    )


# --- vocab.json and merges.txt ---------------------------------------------------------------------------------


def tokenizer_json_from_vocab(
    vocabulary: Mapping[str, Any], merges: str, stated: Mapping[str, Any], added: Mapping[str, Any], path: Path
) -> bytes:
    """Build `tokenizer.json` as transformers does for its class GPT2Tokenizer.

    Args:
        vocabulary: The content of vocab.json: token -> id.
        merges: The content of merges.txt.
        stated: The content of tokenizer_config.json, laid over special_tokens_map.json.
        added: The content of added_tokens.json: token -> id.
        path: The folder, for messages.

    Raises:
        DataError: vocab.json does not hold ids, or merges.txt no pairs.
    """
    lines = [line for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    if any(len(line.split()) != 2 for line in lines):
        raise DataError(f"{path}/merges.txt has a line that is not a pair of tokens", fix="fetch the file again")
    if not all(type(index) is int and index >= 0 for index in (*vocabulary.values(), *added.values())):
        raise DataError(f"{path}/vocab.json does not give every token a number", fix="fetch the file again")
    entries = {index: _added_token(index, token, special=True) for token, index in added.items()}
    ids = {**vocabulary, **added}
    names = _control_names({**_GPT2_ROLES, **stated})
    entries |= {ids[name]: _added_token(ids[name], name, special=True) for name in names if name in ids}
    entries |= _decoder_entries(stated.get("added_tokens_decoder"))
    prefix = {"add_prefix_space": stated.get("add_prefix_space") is True}
    steps = [{**_BYTE_LEVEL, **prefix}]
    document = _document(dict(vocabulary), lines, steps, [entries[index] for index in sorted(entries)])
    before = [_role(stated, "bos_token", ids, path)] if stated.get("add_bos_token") is True else []
    after = [_role(stated, "eos_token", ids, path)] if stated.get("add_eos_token") is True else []
    document["post_processor"] = _template(before, after)
    return _to_bytes(document)


def _role(stated: Mapping[str, Any], role: str, ids: Mapping[str, int], path: Path) -> tuple[str, int]:
    name = token_spelling(stated.get(role, _GPT2_ROLES[role]))
    if name not in ids:
        raise DataError(f"{path} adds its {role} {name!r} to a text, which is no token", fix="fetch the files again")
    return name, ids[name]


def _control_names(stated: Mapping[str, Any]) -> list[str]:
    """Return the tokens that tokenizer_config.json gives a role, or lists as control tokens."""
    entries = [*(stated.get(role) for role in _ROLES), *further_control_tokens(stated)]
    return [name for entry in entries if (name := token_spelling(entry))]


def further_control_tokens(stated: Mapping[str, Any]) -> list[Any]:
    """Return what tokenizer_config.json lists besides the roles, under the name of transformers 4 or 5."""
    further = stated.get("additional_special_tokens", stated.get("extra_special_tokens"))
    return further if isinstance(further, list) else []


def token_spelling(entry: Any) -> str:
    """Return a token that a file names as a string, or as a table with the string in "content"."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def _decoder_entries(stated: Any) -> dict[int, dict[str, Any]]:
    """Return the added tokens of ``added_tokens_decoder``: id -> token with its flags."""
    if not isinstance(stated, dict):
        return {}
    entries = {}
    for key, item in stated.items():
        if (
            key.isdecimal()
            and len(key) < _ID_DIGITS
            and isinstance(item, dict)
            and isinstance(item.get("content"), str)
        ):
            flags = {name: item[name] for name in _FLAGS if isinstance(item.get(name), bool)}
            entries[int(key)] = _added_token(int(key), item["content"], special=False) | flags
    return entries


# --- tokenizer.json --------------------------------------------------------------------------------------------


def with_control_tokens(data: bytes, stated: Mapping[str, Any]) -> bytes:
    """Return a `tokenizer.json` in which the tokens that tokenizer_config.json names are control tokens.

    transformers makes them so: a text that spells one gets the token. The file is returned as it is where they are that
    already, and where a name is no token.

    Args:
        data: The file.
        stated: The content of tokenizer_config.json, laid over special_tokens_map.json.
    """
    try:
        document = json.loads(data)
        vocabulary, added = document["model"]["vocab"], document["added_tokens"]
        known = {item["content"] for item in added}
        names = [name for name in dict.fromkeys(_control_names(stated)) if name not in known and name in vocabulary]
        more = [_added_token(vocabulary[name], name, special=True) for name in names]
    except (ValueError, RecursionError, KeyError, TypeError):
        return data  # unusable, as trying it out will show
    return _to_bytes(document | {"added_tokens": [*added, *more]}) if more else data


def with_tokens_around(data: bytes, before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> bytes:
    """Return a `tokenizer.json` whose post-processor adds these tokens, and no others.

    Args:
        data: The file.
        before: Spelling and id of each token that begins a text.
        after: Those that end it.
    """
    document = json.loads(data)
    document["post_processor"] = _template(before, after)
    return _to_bytes(document)


def _to_bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8")


def _template(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    if not before and not after:
        return None

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def special(tokens: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": name, "type_id": type_id}} for name, _ in tokens]

        return [*special(before), {"Sequence": {"id": sequence, "type_id": type_id}}, *special(after)]

    named = dict((*before, *after))
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [index], "tokens": [name]} for name, index in sorted(named.items())
        },
    }


def _added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content, **flags}


def _document(
    vocabulary: dict[str, int],
    merges: list[str],
    steps: list[dict[str, Any]],
    added: list[dict[str, Any]],
    *,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
