"""Hugging Face's ``config.json``: read strictly, written so that transformers reads back the same model.

The fields of `ModelConfig` have Hugging Face's names. Whatever else a config.json holds is either known to leave
the numbers alone, or must have the one value under which this implementation is right, or is refused by name:
a field that is skipped silently is how a reproduction goes wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from resmol.config.strict_model import StrictModel
from resmol.errors import ConfigError, DataError
from resmol.system.hub_download import hub_file, is_hub_id
from resmol.system.untrusted_text import parse_json
from resmol.system.user_paths import user_path

MAX_CONFIG_BYTES = 1_000_000

# Present in published files, without influence on the numbers of a forward pass.
_WITHOUT_INFLUENCE = frozenset(
    [
        "_name_or_path",
        "architectures",
        "dtype",
        "is_llama_config",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
# Fields with one value that we implement; any other value is another architecture.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "mlp_bias": (False,),
    "model_type": ("llama",),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "rope_scaling": (None,),
}


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

    Raises:
        ConfigError: A field is missing, contradictory, unknown or stands for another architecture; all are listed.
    """
    problems = [*_wrong_values(table), *_unknown_fields(table)]
    theta, theta_problem = _rope_theta(table)
    problems += theta_problem
    values = {name: table[name] for name in ModelConfig.model_fields if name in table} | {"rope_theta": theta}
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


def _wrong_values(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {table[name]!r}; only {allowed[0]!r} is implemented"
        for name, allowed in _MUST_BE.items()
        if name in table and table[name] not in allowed
    ]


def _unknown_fields(table: Mapping[str, Any]) -> list[str]:
    known = {*ModelConfig.model_fields, *_MUST_BE, *_WITHOUT_INFLUENCE, "rope_parameters", "head_dim"}
    return [
        f"{name}: unknown field, refused because it could change the numbers" for name in table if name not in known
    ]


def _rope_theta(table: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Find theta in both spellings; the default of the reference library would be silently wrong."""
    parameters = table.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        return 1.0, [f"rope_parameters is {parameters!r}, not a table"]
    found = [value for value in (table.get("rope_theta"), parameters.get("rope_theta")) if value is not None]
    problems = [
        f"rope_parameters.{key} is not implemented" for key in parameters if key not in ("rope_theta", "rope_type")
    ]
    if parameters.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type is {parameters['rope_type']!r}; only 'default' is implemented")
    if not found:
        return 1.0, [
            *problems,
            "rope_theta is missing, here and in rope_parameters (the library's 10000 would be a guess)",
        ]
    if len(found) == 2 and found[0] != found[1]:
        problems.append(f"rope_theta ({found[0]}) and rope_parameters.rope_theta ({found[1]}) disagree")
    try:
        theta = math.nan if isinstance(found[0], bool | str) else float(found[0])
    except (TypeError, OverflowError):
        theta = math.nan
    if not math.isfinite(theta):
        return 1.0, [*problems, f"rope_theta is {str(found[0])[:40]}, not a number"]
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
    try:
        if path.exists() and not path.is_file():  # a device or a pipe could be read for ever
            raise ConfigError(f"{path} is not a regular file", fix="name a config.json")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has over {MAX_CONFIG_BYTES} bytes", fix="name a config.json")
        table = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            fix="name a config.json, a folder that holds one, a preset or a Hub id like HuggingFaceTB/SmolLM2-135M",
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not sound JSON ({error}); it may be truncated", fix="fetch the file again"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds a {type(table).__name__}, not an object", fix="name a model's config.json")
    return parse_hf_config(table, str(path))
