"""Find the weight files of a Hugging Face folder, and compare them with its config.json.

No PyTorch and no tensor data: names, types and shapes stand in the headers. Loading and `resmol inspect` have
the same rules; loading refuses what `inspect` reports.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckpointError, DataError
from resmol.model.shapes import tensor_shapes
from resmol.system.safetensors_header import TensorInfo, read_header
from resmol.system.untrusted_text import listed, parse_json, quoted

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")  # all become float32
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
MAX_INDEX_BYTES = 10_000_000
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", ".metadata")
# Tables that older versions of transformers stored beside the weights, and that theta determines.
_ROTARY = re.compile(r"(model\.)?(layers\.(?P<layer>\d+)\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_SHOWN = 4  # names in a message


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights, with their headers read and checked.

    Attributes:
        files: The files, in the order of their names; none where only their headers were fetched.
        tensors: Dtype and shape of each tensor, over all files.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files of a folder and read their headers.

    Raises:
        CheckpointError: A header or the index breaks a rule, or the folder only holds pickles.
        DataError: There are no weights in the folder.
    """
    if (folder / WEIGHTS).exists():
        path = folder / WEIGHTS
        return WeightFiles((path,), read_header(path).tensors)
    if (folder / INDEX).exists():
        return _sharded(folder, _read_index(folder / INDEX))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only in {pickles[0]}, a kind of pickle; resmol never unpickles",
            fix="use the safetensors version of the model",
        )
    raise DataError(
        f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}",
        fix="name a run, a checkpoint, a Hugging Face folder with safetensors, a GGUF file or a Hub id",
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor -> file name, where each file name is a plain name: an index leads nowhere else."""
    if not path.is_file():
        raise _bad_index(path, "it is not a regular file")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise _bad_index(path, f"it has more than {MAX_INDEX_BYTES} bytes")
    try:
        table: Any = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="check the file's permissions") from None
    except (ValueError, RecursionError) as error:
        raise _bad_index(path, f"it is not JSON ({str(error)[:200]})") from None
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names:
        raise _bad_index(path, "it has no weight_map")
    return {tensor: _plain_name(path, name) for tensor, name in names.items()}


def _plain_name(path: Path, name: object) -> str:
    plain = name.removeprefix("./") if isinstance(name, str) else ""
    if not _PLAIN_NAME.fullmatch(plain):
        raise _bad_index(path, f"it names {quoted(name)}, not a plain .safetensors name")
    return plain


def _sharded(folder: Path, index: Mapping[str, str]) -> WeightFiles:
    tensors: dict[str, TensorInfo] = {}
    files = tuple(folder / name for name in sorted(set(index.values())))
    for path in files:
        listed = {tensor for tensor, name in index.items() if name == path.name}
        found = read_header(path).tensors
        if found.keys() != listed:
            odd = _listing(found.keys() ^ listed)
            raise _bad_index(folder / INDEX, f"{path.name} does not hold the tensors that the index lists ({odd})")
        tensors |= found
    return WeightFiles(files, tensors)


def _bad_index(origin: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{origin} is not a sound index: {reason}", fix="fetch or export the model again")


# --- config.json against the weights -----------------------------------------------------------------------


def weight_names(config: ModelConfig, names: Collection[str]) -> dict[str, str]:
    """Return the name in a weight file of each weight that it holds: Hugging Face's name -> name in the file.

    Of a tied matrix, a file may hold either name, or both. The file of a model without its output layer (LlamaModel)
    leaves out the prefix ``model.``.
    """
    bare = EMBEDDING.removeprefix(_PREFIX) in names and not any(name.startswith(_PREFIX) for name in names)
    weights = [name for name in names if not is_rotary_table(config, name)]
    found = {f"{_PREFIX}{name}" if bare and name != OUTPUT else name: name for name in weights}
    if config.tie_word_embeddings and OUTPUT in found:
        found.setdefault(EMBEDDING, OUTPUT)
        del found[OUTPUT]
    return found


def surplus_names(config: ModelConfig, names: Collection[str]) -> set[str]:
    """Return the tensors of a weight file that repeat what weights or theta say; loading compares them (`surplus`)."""
    return set(names) - set(weight_names(config, names).values())


def is_rotary_table(config: ModelConfig, name: str) -> bool:
    """Return whether a tensor is a table of rotary frequencies, sines or cosines of this model."""
    match = _ROTARY.fullmatch(name)
    return match is not None and int(match["layer"] or 0) < config.num_hidden_layers


def cross_check(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], dtypes: Collection[str] = WEIGHT_DTYPES
) -> list[Check]:
    """Compare an architecture with the tensors of a weight file; every disagreement is named.

    Args:
        config: The architecture.
        tensors: Dtype and shape of each tensor, by Hugging Face's name.
        dtypes: The dtypes that weights may have in this format.

    Returns:
        Three checks: names, shapes and types.
    """
    expected = tensor_shapes(config)
    found = {name: tensors[stored] for name, stored in weight_names(config, tensors).items()}
    surplus = surplus_names(config, tensors)
    return [_check_names(expected, found, surplus), _check_shapes(expected, found), _check_types(found, dtypes)]


def _check_names(expected: Mapping[str, Any], tensors: Mapping[str, TensorInfo], surplus: Collection[str]) -> Check:
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    odd = [f"{kind}: {_listing(names)}" for kind, names in (("missing", missing), ("unexpected", extra)) if names]
    repeated = [f"and {_listing(surplus)}, which loading compares with what it repeats"] if surplus else []
    return Check(
        name="tensor names",
        passed=not odd,
        measured="; ".join([*(odd or [f"{len(tensors)} names"]), *_hints(missing, extra), *repeated]),
        expected=f"the {len(expected)} names of this architecture",
        guards="an untied or cloned output layer, biases, wrapper prefixes, missing blocks",
    )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]) -> Check:
    common = [name for name in expected if name in tensors]
    wrong = [
        f"{name} is {list(tensors[name].shape)}, not {list(expected[name])}"
        for name in common
        if tensors[name].shape != expected[name]
    ]
    return Check(
        name="tensor shapes",
        passed=not wrong,
        measured=listed(wrong, _SHOWN, "; ") or f"{len(common)} shapes",
        expected="the shapes that the configuration implies",
        guards="a config.json that belongs to another model",
    )


def _check_types(tensors: Mapping[str, TensorInfo], dtypes: Collection[str]) -> Check:
    wrong = [f"{name} is {info.dtype}" for name, info in tensors.items() if info.dtype not in dtypes]
    kinds = sorted({info.dtype for info in tensors.values()})
    return Check(
        name="tensor types",
        passed=not wrong,
        measured=listed(wrong, _SHOWN, "; ") or ", ".join(kinds),
        expected=" or ".join(dtypes),
        guards="quantised numbers read as if they were weights",
    )


def _hints(missing: Iterable[str], extra: Iterable[str]) -> list[str]:
    """Return what a set of odd names usually means, in words."""
    hints = []
    if OUTPUT in missing:
        hints.append("config.json does not say that the output layer is the embedding, and the file has none")
    if any(name.endswith(".bias") for name in extra):
        hints.append("these layers have biases, which config.json does not mention")
    if any(name.startswith(("module.", "_orig_mod.")) or "._orig_mod." in name for name in extra):
        hints.append("the names carry the prefix of a training wrapper")
    return hints


def _listing(names: Iterable[str]) -> str:
    return listed([quoted(name) for name in sorted(names)], _SHOWN)
