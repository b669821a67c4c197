"""The configuration that third-party code gets: Hugging Face's names in every usual form, other usual names too."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from resmol.config.model_config import ModelConfig

# Other projects' names of the architecture's fields: GPT-2, Meta's Llama, litgpt, nanochat and courses.
ALIASES = {
    "vocab_size": "n_vocab vocab padded_vocab_size vocabulary_size num_embeddings",
    "hidden_size": (
        "n_embd n_embed d_model dim emb_dim embed_dim embedding_dim embd_dim model_dim width emb_size embed_size"
    ),
    "intermediate_size": (
        "n_hidden d_ff ff_dim ffn_dim mlp_dim intermediate_dim ffn_hidden_size ffn_hidden_dim mlp_hidden_dim "
        "hidden_dim ffn_size d_ffn ffn_inner_dim"
    ),
    "num_hidden_layers": "n_layer n_layers num_layers n_blocks num_blocks depth layers",
    "num_attention_heads": "n_head n_heads num_heads n_q_heads num_q_heads num_query_heads nhead heads n_query_heads",
    "num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads n_kv_groups n_query_groups kv_heads",
    "max_position_embeddings": (
        "block_size max_seq_len max_seq_length max_sequence_length context_length context_len n_ctx max_position "
        "max_positions max_len max_length context_size ctx_len seq_len max_context"
    ),
    "rms_norm_eps": "norm_eps eps rms_eps layer_norm_eps norm_epsilon layer_norm_epsilon rmsnorm_eps",
    "rope_theta": "rope_base theta rotary_base rope_freq_base base",
    "tie_word_embeddings": "tie_embeddings tie_weights weight_tying tied_embeddings tie_embedding tied",
    "initializer_range": "init_std initializer_std std",
    "head_dim": "head_size d_head dim_head d_k",
}
_FIELD_OF = {alias: field for field, aliases in ALIASES.items() for alias in aliases.split()}
# Switches, as SmolLM2 has them. A configuration class of the student's keeps its own.
_SWITCHES: dict[str, Any] = {
    "use_return_dict": True,
    "rope_freq": None,  # a course's name of rope_scaling
    **dict.fromkeys(("bias", "qkv_bias", "use_bias", "attn_bias"), False),
    **dict.fromkeys(
        ("dropout", "attn_dropout", "resid_dropout", "embd_dropout", "hidden_dropout", "dropout_rate"), 0.0
    ),
}
# With fewer fields than these a class is no configuration of an architecture.
FEWEST_FIELDS = 3


def published_fields(config: ModelConfig) -> dict[str, Any]:
    """Return every field of SmolLM2's published config.json, with an architecture's values, and `LlamaConfig`'s own."""
    return config.to_hf() | {
        "dtype": torch.float32,
        "torch_dtype": torch.float32,
        "is_llama_config": True,
        "rope_interleaved": False,
        "pad_token_id": None,
        "transformers_version": "4.40.1",
    }


def field_value(name: str, config: ModelConfig, beside: Iterable[str] = ()) -> tuple[bool, Any]:
    """Return whether a name stands for a field of the architecture, and its value.

    Args:
        name: Hugging Face's or another usual name.
        config: The architecture.
        beside: The other fields of the same class. ``hidden_dim`` is the width where another one is the feed-forward
            layer's, and the feed-forward layer's elsewhere.
    """
    field = _FIELD_OF.get(name, name)
    others = {_FIELD_OF.get(other, other) for other in beside if other != name}
    if name == "hidden_dim" and "intermediate_size" in others and "hidden_size" not in others:
        field = "hidden_size"
    known = field in ModelConfig.model_fields or field == "head_dim"
    return known, getattr(config, field) if known else None


class ConfigView(dict[str, Any]):
    """An architecture as an object, as a dict and under ``**``.

    As a dict it holds the fields of SmolLM2's config.json. Asked for more, as an object or by subscription, it answers
    by other usual names (``n_embd``, ``block_size``), by the sections of the pretraining recipe (``model``,
    ``model_config``), and with the defaults of transformers' `LlamaConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(published_fields(config))
        object.__setattr__(self, "architecture", config)

    def __missing__(self, name: str) -> Any:
        known, value = field_value(name, object.__getattribute__(self, "architecture"))
        if known:
            return value
        if name in ("model", "model_config", "config"):
            return self
        if name == "init_method":
            return {"std": self["initializer_range"]}
        if name in _SWITCHES:
            return _SWITCHES[name]
        raise KeyError(f"{name} is no field of the configuration{_nearest(name, self)}")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            try:
                return self[name]
            except KeyError as error:
                found = getattr(_llama_config(), name, _llama_config)
                if found is not _llama_config:
                    return found
                raise AttributeError(error.args[0]) from None
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field by any of its names, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of config.json, as transformers' method does."""
        return dict(self)


def _nearest(name: str, fields: Iterable[str]) -> str:
    near = get_close_matches(name, [*fields, *_FIELD_OF], n=1)
    return f"; the nearest is {near[0]}" if near else ""


def _llama_config() -> Any:
    """Return transformers' defaults, or None where it is not installed."""
    try:
        from transformers import LlamaConfig
    except ImportError:
        return None
    return LlamaConfig()


def own_config(kind: type, config: ModelConfig) -> Any | None:
    """Return the student's own configuration class with the architecture's values.

    Args:
        kind: A dataclass, a `PretrainedConfig` or any class whose constructor or attributes have usual names.
        config: The architecture.

    Returns:
        An instance; fields that are no part of the architecture keep their defaults. None where the class has fewer
        than `FEWEST_FIELDS` known fields, or requires others.
    """
    if is_pretrained_config(kind):
        values = published_fields(config)
        special = ("architectures", "model_type", "transformers_version", "torch_dtype")
        return kind(**{name: value for name, value in values.items() if name not in special})
    accepted = _constructor_fields(kind)
    names = [*accepted, *(name for name in vars(kind) if not name.startswith("_") and name not in accepted)]
    answers = {name: field_value(name, config, names) for name in names}
    values = {name: value for name, (known, value) in answers.items() if known}
    values = {name: value for name, value in values.items() if not isinstance(vars(kind).get(name), property)}
    if len(values) < FEWEST_FIELDS or any(name not in values for name, required in accepted.items() if required):
        return None
    instance = kind(**{name: value for name, value in values.items() if name in accepted})
    for name in values.keys() - set(accepted):
        setattr(instance, name, values[name])
    return instance


def _constructor_fields(kind: type) -> dict[str, bool]:
    """Return whether each parameter of a constructor is required; a dataclass has the same signature as its fields."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def is_pretrained_config(kind: type) -> bool:
    """Return whether a class is a configuration of transformers."""
    return any(base.__module__.startswith("transformers.") for base in kind.__mro__)


def different_defaults(kind: type, published: ModelConfig) -> Mapping[str, tuple[Any, Any]]:
    """Return the fields in which the defaults of a configuration class differ from SmolLM2's.

    Args:
        kind: The student's class.
        published: SmolLM2-135M.

    Returns:
        (default, right value) by the student's name. Empty unless the class can be built without arguments and its
        sizes are SmolLM2-135M's: other defaults describe another model.
    """
    try:
        defaults = kind()
    except Exception:  # a class with required fields has no defaults to look at
        return {}
    names = [*_constructor_fields(kind), *vars(kind)]
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys(names):
        known, right = field_value(name, published, names)
        if known and hasattr(defaults, name) and _FIELD_OF.get(name, name) != "initializer_range":
            found[name] = (getattr(defaults, name), right)
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    stated = {_FIELD_OF.get(name, name) for name, (stated, right) in found.items() if stated == right}
    if len(sizes & stated) < FEWEST_FIELDS:
        return {}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}
