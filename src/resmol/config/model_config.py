"""Hugging Face's ``config.json``: read strictly, written so that transformers reads back the same model.

The fields of `ModelConfig` have Hugging Face's names. Whatever else a config.json holds is either known to leave
the numbers alone, or must mean what this implementation does, or is refused by name (`hf_fields`): a field that is
skipped silently is how a reproduction goes wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from resmol.config.hf_fields import field_problems, stated_thetas
from resmol.config.strict_model import StrictModel
from resmol.errors import ConfigError, DataError
from resmol.system.hub_download import hub_file, is_hub_id
from resmol.system.untrusted_text import parse_json
from resmol.system.user_paths import user_path

MAX_CONFIG_BYTES = 1_000_000
_WANTED = "name a config.json, a folder that holds one, a preset or a Hub id like HuggingFaceTB/SmolLM2-135M"


def architecture_field(description: str, **constraints: Any) -> Any:
    """Declare a field of the architecture: always drift class A, since another shape is another model."""
    return Field(description=description, json_schema_extra={"drift": "A"}, **constraints)


class ModelConfig(StrictModel):
    """The architecture of a Llama-family decoder, in Hugging Face's names."""

    vocab_size: int = architecture_field("V, entries of the vocabulary", ge=1)
    hidden_size: int = architecture_field("D, width of the residual stream", ge=1)
    intermediate_size: int = architecture_field("F, width of the feed-forward layer", ge=1)
    num_hidden_layers: int = architecture_field("number of blocks", ge=1)
    num_attention_heads: int = architecture_field("H, query heads", ge=1)
    num_key_value_heads: int = architecture_field("K, key/value heads; each serves H / K query heads", ge=1)
    max_position_embeddings: int = architecture_field("longest context", ge=1)
    rms_norm_eps: float = architecture_field("added to the mean square, inside the root", gt=0)
    rope_theta: float = architecture_field("base of the rotation frequencies", gt=0)
    tie_word_embeddings: bool = architecture_field("the output layer is the embedding matrix")
    initializer_range: float = architecture_field("standard deviation of the initial weights", gt=0)
    bos_token_id: int = architecture_field("id that begins a text; 0 is an id like any other", ge=0)
    eos_token_id: int = architecture_field("id that ends a document; 0 is an id like any other", ge=0)
    hidden_act: Literal["silu"] = Field("silu", description="gate of SwiGLU", json_schema_extra={"drift": "A"})

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"the head size ({self.head_dim}) is odd: rotary embeddings turn pairs of numbers")
        if max(self.bos_token_id, self.eos_token_id) >= self.vocab_size:
            raise ValueError(f"bos_token_id or eos_token_id is not below vocab_size ({self.vocab_size})")
        return self

    @property
    def head_dim(self) -> int:
        """Dh, the size of a head."""
        return self.hidden_size // self.num_attention_heads

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Return the contents of a config.json, in the spelling of transformers 5 and of 4 at the same time."""
        return self.model_dump() | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": dtype,
            "head_dim": self.head_dim,
            "mlp_bias": False,
            "model_type": "llama",
            "pretraining_tp": 1,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_scaling": None,
            "torch_dtype": dtype,
            "use_cache": True,
        }


def parse_hf_config(table: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """Turn the contents of a config.json into a `ModelConfig`.

    What a file may leave out, or hold as null, has the value that transformers gives it: as many key/value heads as
    query heads, an output layer of its own, an initializer of 0.02. Of several ends, `ModelConfig` holds the first;
    `end_token_ids` returns all.

    Raises:
        ConfigError: A field is missing, contradictory, unknown or stands for another architecture; all are listed.
    """
    theta, problems = _rope_theta(table)
    problems += field_problems(table, ModelConfig.model_fields)
    values = _with_defaults(table) | {"rope_theta": theta}
    try:
        config = ModelConfig.model_validate_json(json.dumps(values))
        problems += _head_dim_problem(table, config)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, p['loc'])) or 'shape'}: {p['msg']}" for p in error.errors()]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(
            f"{origin} does not describe a model that resmol implements:\n{lines}",
            fix="use the config.json of a Llama-family base model without bias, scaling or remote code",
        )
    return config


def end_token_ids(table: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a text by the field ``eos_token_id``: one, several, or none."""
    stated = table.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(token for token in ids if type(token) is int and token >= 0)


def _with_defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `ModelConfig`; what is missing or null and harmless gets the library's value."""
    values = {name: table[name] for name in ModelConfig.model_fields if name in table}
    defaults = {
        "num_key_value_heads": table.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "hidden_act": "silu",
    }
    values |= {name: value for name, value in defaults.items() if values.get(name) is None}
    if values["hidden_act"] == "swish":  # another name of the same function
        values["hidden_act"] = "silu"
    values |= _token_ids(table)
    return values


def _token_ids(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return one id for the beginning and one for the end, which may be several, null, or (the beginning) missing.

    A model without an end still needs an id that stands for an empty prompt: that of its beginning, or 0.
    """
    begin, end, found = table.get("bos_token_id"), table.get("eos_token_id"), {}
    if isinstance(end, list):
        size = table.get("vocab_size")
        inside = [token for token in end_token_ids(table) if not isinstance(size, int) or token < size]
        end = found["eos_token_id"] = inside[0] if inside else end
    if end is None and "eos_token_id" in table:
        end = found["eos_token_id"] = 0 if begin is None else begin
    if begin is None and end is not None:
        found["bos_token_id"] = end
    return found


def _rope_theta(table: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Find theta in all spellings; the default of the reference library would be silently wrong."""
    stated = stated_thetas(table)
    if not stated:
        return 1.0, [
            "rope_theta is missing, here and in rope_parameters (the library's 10000 would be a guess; write it "
            "into the file if the model was trained with it)"
        ]
    (place, first), *others = stated.items()
    problems = [
        f"{place} ({first}) and {other} ({value}) disagree" for other, value in others if value != first
    ]  # fmt: skip
    try:
        theta = math.nan if isinstance(first, bool | str) else float(first)
    except (TypeError, OverflowError):
        theta = math.nan
    if not math.isfinite(theta):
        return 1.0, [*problems, f"rope_theta is {str(first)[:40]}, not a number"]
    return theta, problems


def _head_dim_problem(table: Mapping[str, Any], config: ModelConfig) -> list[str]:
    stated = table.get("head_dim")
    if stated in (None, config.head_dim):
        return []
    return [f"head_dim ({stated}) is not hidden_size / num_attention_heads ({config.head_dim})"]


def read_model_config(source: str | Path) -> ModelConfig:
    """Read an architecture from a config.json, a folder that holds one, or a Hugging Face Hub id.

    Raises:
        ConfigError: The file is not JSON, or describes a model that we do not implement.
        DataError: There is no such file; `NetworkError` when the Hub cannot be reached.
    """
    path = user_path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists() and is_hub_id(str(source)) and path.suffix != ".json":
        path = hub_file(str(source), "config.json", fix="check the name and the network, or name a config.json")
    return parse_hf_config(read_hf_table(path), str(path))


def read_optional_hf_table(path: Path) -> dict[str, Any]:
    """Return what `read_hf_table` reads, and an empty table where there is no such file."""
    return read_hf_table(path) if path.exists() else {}


def read_hf_table(path: Path, wanted: str = _WANTED) -> dict[str, Any]:
    """Read a small JSON file of a model: config.json, generation_config.json, tokenizer_config.json.

    Args:
        path: The file.
        wanted: What to name instead, for the message about a file that is missing.

    Raises:
        ConfigError: It is too large, no regular file, or does not hold a JSON object.
        DataError: There is no such file, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe could be read for ever
            raise ConfigError(f"{path} is not a regular file", fix=f"name a {path.name}")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has over {MAX_CONFIG_BYTES} bytes", fix=f"name a {path.name}")
        table = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix=wanted) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not sound JSON ({error}); it may be truncated", fix="fetch the file again"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds a {type(table).__name__}, not an object", fix=f"name a model's {path.name}")
    return table
