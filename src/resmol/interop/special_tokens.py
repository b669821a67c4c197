"""The tokens with a role and the chat template of a model, as the files beside its weights state them; no PyTorch.

An export writes them again, so that other programs begin, end, pad and lay out a text as they do with the source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmol.config.model_config import ModelConfig, read_optional_hf_table
from resmol.data.tokenizer import Tokenizer
from resmol.data.tokenizer_formats import further_control_tokens, token_spelling
from resmol.errors import CheckpointError, DataError
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.resolve import Source
from resmol.system.untrusted_text import parse_json

MAX_BYTES = 10_000_000
DEFAULT = "default"  # the name of the chat template that is taken where none is named
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a source may say of sampling. Other fields of generation_config.json are left out: lengths belong to a use.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_GGUF_ROLES = dict(zip(ROLES, ("bos", "eos", "unknown", "padding"), strict=True))
_GGUF_TEMPLATE = "tokenizer.chat_template"
_HASH = re.compile(r"[0-9a-f]{30,64}")
# What a control token does, by its name, and its rank as padding: the first that fits decides, the lowest rank wins.
_PADDING = (
    (r"pad", 0),
    (r"reserved|unused|dummy", 1),
    (r"end|eo[mst]|sep|stop|/s", 4),
    (r"start|begin|bos|user|assistant|system|inst", 3),
    (r"", 2),
)


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a role, by id.

    Attributes:
        roles: bos_token, eos_token, unk_token, pad_token, as far as they are taken -> the token.
        ends: The tokens that end a generated text; none, if only a limit does.
        chat_templates: Name -> Jinja template; the usual one is "default".
        additional: Further control tokens that the source lists by name.
        config_pad: ``pad_token_id`` of the source's config.json; transformers never trains the row of that token.
        padding_side: Where a batch is padded, if that is stated.
        sampling: Fields of generation_config.json.
    """

    roles: Mapping[str, int]
    ends: tuple[int, ...]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    additional: tuple[int, ...] = ()
    config_pad: int | None = None
    padding_side: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pad(self) -> int:
        """The token for padding."""
        return self.roles["pad_token"]


def special_tokens(source: Source, config: ModelConfig, tokenizer: Tokenizer) -> SpecialTokens:
    """Return the tokens with a role, from the files of a model.

    A model that states no token for padding gets one that does no harm, see `harmless_padding`.

    Args:
        source: The model.
        config: Its architecture.
        tokenizer: Its tokenizer.

    Raises:
        CheckpointError: A chat template is a link that leads out of its folder.
        ConfigError: A file is not what its name says; `DataError`: it cannot be read.
    """
    if isinstance(source.weights, GGUFHeader):
        found = _of_gguf(source.weights.metadata)
    elif source.kind in ("huggingface", "hub"):
        found = _of_folder(source.path, tokenizer)
    else:  # what training knows: documents end with one token, which SmolLM2's tokenizer also uses for bos and unk
        end = config.eos_token_id
        found = _Stated({"bos_token": config.bos_token_id, "unk_token": end, "eos_token": end}, padding_side="left")
    ends = (config.eos_token_id,) if source.ends is None else source.ends
    return _completed(found, ends, config, tokenizer)


@dataclass
class _Stated:
    """What the files say, unchecked: ids may be anything that JSON can hold."""

    roles: dict[str, Any]
    chat_templates: dict[str, str] = field(default_factory=dict)
    additional: list[Any] = field(default_factory=list)
    config_pad: Any = None
    padding_side: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)


def _completed(stated: _Stated, ends: tuple[int, ...], config: ModelConfig, tokenizer: Tokenizer) -> SpecialTokens:
    """Keep the ids that are tokens, and choose the roles that are missing."""
    added = {token for token in tokenizer.added_tokens if token < config.vocab_size}
    # A token of the ordinary vocabulary never gets a role: transformers would then find it in every text.
    roles = {role: token for role, token in stated.roles.items() if _is_id(token) and token in added}
    end = next((token for token in (config.eos_token_id, tokenizer.eos_id) if token in added), None)
    if end is not None:
        roles.setdefault("eos_token", end)
    ends = tuple(token for token in dict.fromkeys(ends) if token < config.vocab_size)
    if "pad_token" not in roles:
        taken = {*ends, *(roles[role] for role in ("bos_token", "eos_token") if role in roles)}
        roles["pad_token"] = harmless_padding(
            tokenizer, added - taken, stated.chat_templates.values(), config.eos_token_id
        )
    return SpecialTokens(
        {role: roles[role] for role in ROLES if role in roles},
        ends,
        stated.chat_templates,
        tuple(token for token in stated.additional if token in added),
        stated.config_pad if _is_id(stated.config_pad) and stated.config_pad < config.vocab_size else None,
        stated.padding_side if stated.padding_side in ("left", "right") else None,
        stated.sampling,
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def harmless_padding(tokenizer: Tokenizer, free: Collection[int], templates: Iterable[str], end: int) -> int:
    """Return a control token to pad batches with, which training by others can leave out of the loss.

    What is padding is left out of the loss, so a model that pads with its end token never learns to end; and generate()
    does not attend to it where no mask is given, so it is nothing that a chat template writes. Taken is the last token
    of the first group that has one: named after padding, reserved, any other, beginning something, ending something.
    With no such token, it is the end.

    Args:
        tokenizer: The tokenizer.
        free: The tokens that neither begin nor end a text.
        templates: The chat templates.
        end: The end token.
    """
    written = "".join(templates)
    ranks = {
        token: next(rank for pattern, rank in _PADDING if re.search(pattern, spelling, re.IGNORECASE))
        for token, spelling in tokenizer.special_tokens.items()
        if token in free and spelling not in written
    }
    return min(ranks, key=lambda token: (ranks[token], -token), default=end)


# --- GGUF ------------------------------------------------------------------------------------------------------


def _of_gguf(metadata: Mapping[str, Any]) -> _Stated:
    named = {
        key.removeprefix(f"{_GGUF_TEMPLATE}."): value
        for key, value in metadata.items()
        if key.startswith(f"{_GGUF_TEMPLATE}.")
    }
    templates = {DEFAULT: metadata.get(_GGUF_TEMPLATE), **named}
    return _Stated(
        {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in _GGUF_ROLES.items()},
        chat_templates={name: text for name, text in templates.items() if isinstance(text, str)},
    )


# --- Hugging Face's folders ------------------------------------------------------------------------------------


def _of_folder(folder: Path, tokenizer: Tokenizer) -> _Stated:
    names = ("config", "generation_config", "special_tokens_map", "tokenizer_config")
    paths = [folder / f"{name}.json" for name in names]
    config, generation, named, stated = (read_optional_hf_table(path) for path in paths)
    named |= stated
    roles = {role: _token(named[role], tokenizer) for role in ROLES if role in named}
    ids = {"bos_token": config.get("bos_token_id")} if "bos_token" not in named else {}
    pads = [table.get("pad_token_id") for table in (config, generation)]
    if "pad_token" not in roles:
        filled = parse_json(tokenizer.data).get("padding") or {}  # transformers takes its token for that of padding
        ids |= {"pad_token": next((pad for pad in (*pads, filled.get("pad_id")) if _is_id(pad)), None)}
    return _Stated(
        roles | ids,
        chat_templates=_templates(folder, stated),
        additional=[_token(entry, tokenizer) for entry in further_control_tokens(named)],
        config_pad=config.get("pad_token_id"),
        padding_side=stated.get("padding_side"),
        sampling={name: generation[name] for name in _SAMPLING if isinstance(generation.get(name), bool | int | float)},
    )


def _token(entry: Any, tokenizer: Tokenizer) -> int | None:
    """Return the id of a token that a file names as a string, or as a table with the string in "content"."""
    spelling = token_spelling(entry)
    return tokenizer.token_id(spelling) if spelling else None


def _templates(folder: Path, stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates: of files, which transformers prefers since 4.51, or of tokenizer_config.json."""
    entries = stated.get("chat_template")
    entries = entries if isinstance(entries, list) else [{"name": DEFAULT, "template": entries}]
    found = {e.get("name"): e.get("template") for e in entries if isinstance(e, dict)}
    files = {DEFAULT: "chat_template.jinja"}
    more = folder / "additional_chat_templates"
    if more.is_dir() and not more.is_symlink():
        files |= {path.stem: f"{more.name}/{path.name}" for path in sorted(more.glob("*.jinja"))}
    for name, file in files.items():
        if (content := _content(folder, file)) is not None:
            found[name] = content.decode("utf-8", errors="replace")
    return {n: text for n, text in found.items() if isinstance(n, str) and isinstance(text, str)}


def _content(folder: Path, name: str) -> bytes | None:
    """Return the content of a small file of a folder, None where it is missing."""
    path = folder / name
    if not path.is_file():
        return None
    _require_inside(folder, path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="check the file's permissions") from None
    if len(content) > MAX_BYTES:
        raise DataError(
            f"{path} has over {MAX_BYTES:,} bytes", fix="fetch the file again, or move it out of the folder"
        )
    return content


def _require_inside(folder: Path, path: Path) -> None:
    """Refuse a link out of the folder, since an export would publish what it leads to.

    The caches of download tools, whose files are named by their hashes, are no such place.
    """
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not _HASH.fullmatch(target.name):
        raise CheckpointError(f"{path} leads out of its folder, to {target}", fix="put the file itself into the folder")
