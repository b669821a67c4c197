"""What a config.json holds besides the fields of `ModelConfig`, and which of it may be passed over.

A field is passed over by its meaning: its value turns nothing on, or it is known to leave the numbers of a forward pass
alone. Sources: the attributes of `PretrainedConfig` and `LlamaConfig` in transformers 4.46, 4.57 and 5, and what the
tools named below write. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Attributes of PretrainedConfig about outputs, labels, files and the type of the weights.
_LIBRARY = """
    _commit_hash _name_or_path architectures chunk_size_feed_forward dtype finetuning_task id2label is_decoder
    keys_to_ignore_at_inference label2id name_or_path num_labels output_attentions output_hidden_states problem_type
    output_past return_dict task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache use_return_dict xla_device
"""
# Token ids and settings of generation; older versions kept them here. None enters a forward pass.
_GENERATION = """
    begin_suppress_tokens bad_words_ids decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token_id prefix remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens temperature top_k top_p typical_p
"""
# Notes of nanotron's converter, transformers.js, unsloth, axolotl, TRL, PEFT and the first Llama converters on how a
# model was made or named. pretraining_tp is the number of slices that a product was once computed in.
_TOOLS = """
    is_llama_config transformers.js_config use_flash_attention use_flash_attn flash_attn flash_attn_2_enabled
    gradient_checkpointing use_gradient_checkpointing max_sequence_length max_seq_length max_seq_len seq_length
    model_max_length unsloth_fixed unsloth_version pretraining_tp base_model_name_or_path model_name bos_token eos_token
    pad_token unk_token
"""
WITHOUT_INFLUENCE = frozenset(f"{_LIBRARY} {_GENERATION} {_TOOLS}".split())
# Beginnings of further such names: how attention is computed, and whatever transformers.js and unsloth add.
_HARMLESS_BEGINNINGS = (
    "_attn_implementation", "attn_implementation", "_experts_implementation", "_flash_attn_", "transformers.js",
    "unsloth_",
)  # fmt: skip

# Fields with one meaning that we implement, and the values that have it; any other is another architecture.
MUST_BE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "attn_pdrop": (0,),
    "bias": (False,),
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "hidden_dropout": (0,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "model_type": ("llama",),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "qkv_bias": (False,),
    "resid_pdrop": (0,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "tie_encoder_decoder": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
_ROPE_TABLES = ("rope_scaling", "rope_parameters")
_ORIGINAL_CONTEXT = "original_max_position_embeddings"  # what scaling would start from
_ROPE_KINDS_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")


def field_problems(table: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each field that could change the numbers: a value of another meaning, or an unknown name.

    A field that is null says nothing, whatever its name.
    """
    problems = [problem for name in _ROPE_TABLES if (problem := _rope_problem(name, table))]
    for name, value in table.items():
        if value is None or name in known or name in (*_ROPE_TABLES, _ORIGINAL_CONTEXT, "head_dim"):
            continue
        if name in MUST_BE:
            problems += _value_problem(name, value)
        elif name == "layer_types":
            problems += _layers_problem(value)
        elif name not in WITHOUT_INFLUENCE and not name.startswith(_HARMLESS_BEGINNINGS):
            problems.append(f"{name}: unknown field, refused because it could change the numbers")
    return problems


def _value_problem(name: str, value: Any) -> list[str]:
    allowed = MUST_BE[name]
    same_kind = isinstance(value, bool) == isinstance(allowed[0], bool)  # in Python, False is 0
    return [] if same_kind and value in allowed else [f"{name} is {value!r}; only {allowed[0]!r} is implemented"]


def _layers_problem(value: Any) -> list[str]:
    full = isinstance(value, list) and all(kind == "full_attention" for kind in value)
    return [] if full else ["layer_types holds other layers than 'full_attention'"]


# --- rotary embeddings ---------------------------------------------------------------------------------------


def stated_thetas(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return each place that states theta, with its value; null states nothing."""
    found = {"rope_theta": table.get("rope_theta")}
    for name in _ROPE_TABLES:
        if isinstance(inner := table.get(name), Mapping):
            found[f"{name}.rope_theta"] = inner.get("rope_theta")
    return {place: value for place, value in found.items() if value is not None}


def _rope_problem(name: str, table: Mapping[str, Any]) -> str:
    """Return what a table of scaling changes about the rotation; "" if nothing."""
    scaling = table.get(name)
    if not scaling:
        return "" if scaling in (None, {}) else f"{name} is {scaling!r}, not a table"
    if not isinstance(scaling, Mapping):
        return f"{name} is {scaling!r}, not a table"
    contexts = (None, table.get("max_position_embeddings"))
    if _scales_nothing(scaling, all(place.get(_ORIGINAL_CONTEXT) in contexts for place in (scaling, table))):
        return ""
    return f"{name} is {dict(scaling)!r}; only rotation without scaling is implemented"


def _scales_nothing(scaling: Mapping[str, Any], same_context: bool) -> bool:
    """Return whether positions and frequencies stay as they are.

    By modeling_rope_utils.py of transformers: "default" uses none of the other values; with a factor of 1, the others
    multiply or divide by one. yarn derives its factor from the original context, so that must not differ.
    """
    kinds = {scaling[key] for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
    stated: Callable[[str], Any] = scaling.get
    if len(kinds) > 1 or not all(isinstance(stated(key), str | None) for key in ("rope_type", "type")):
        return False
    whole = stated("partial_rotary_factor") in (None, 1)
    if kinds == {"default"}:
        return whole
    ones = all(stated(key) in (None, 1) for key in ("factor", "attention_factor"))
    named = not kinds or (kinds <= set(_ROPE_KINDS_WITH_FACTOR) and stated("factor") is not None)
    known = {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
        _ORIGINAL_CONTEXT, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    }  # fmt: skip
    return whole and ones and same_context and named and scaling.keys() <= known
