"""Recognize what a third-party parameter is by the words in its name: Hugging Face's, Meta's, GPT-2's, courses'."""

from __future__ import annotations

import re
from collections.abc import Mapping

WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel

_WEIGHT_WORDS = ("weight", "w", "scale", "gamma", "g", "kernel")
_BIAS_WORDS = ("bias", "b", "beta")

# The last word of a weight's name -> Hugging Face's, or several whose rows it holds one after the other.
_OUTER = {
    "model.embed_tokens": (
        "embed_tokens tok_embeddings wte tok_emb tok_embed token_embedding token_embeddings token_emb token_embed "
        "token_embedding_table embedding embeddings emb embed embedder word_embeddings embed_in input_embedding "
        "tokens_embed embed_token"
    ),
    "model.norm": (
        "norm ln_f final_norm norm_f layernorm layer_norm rms_norm rmsnorm final_layernorm final_layer_norm "
        "ln_final final_rmsnorm final_rms_norm norm_final final_ln output_norm rms_final last_norm norm_out "
        "out_norm ln f_norm"
    ),
    "lm_head": (
        "lm_head output out_head head output_layer unembed unembedding embed_out output_proj out_proj classifier "
        "to_logits fc_out out proj"
    ),
}
_ATTENTION = {
    "q_proj": "q_proj wq w_q q query queries to_q w_query q_linear query_proj linear_q",
    "k_proj": "k_proj wk w_k k key keys to_k w_key k_linear key_proj linear_k",
    "v_proj": "v_proj wv w_v v value values to_v w_value v_linear value_proj linear_v",
    "o_proj": (
        "o_proj wo w_o o to_out out_proj output_proj c_proj proj dense out output fc_out linear_o out_linear "
        "o_linear w_out fc"
    ),
    "q_proj k_proj v_proj": (
        "qkv_proj qkv c_attn wqkv w_qkv to_qkv query_key_value in_proj in_proj_weight attn qkv_linear"
    ),
    "k_proj v_proj": "kv_proj kv wkv w_kv to_kv c_kv",
}
_FEED_FORWARD = {
    "gate_proj": "gate_proj w1 gate w_gate fc1 fc_1 c_fc1 gate_linear linear_gate",
    "up_proj": "up_proj w3 up w_up fc2 fc_2 c_fc2 c_fc up_linear linear_up",
    "down_proj": "down_proj w2 down w_down fc3 fc_3 c_proj proj down_linear linear_down out_proj",
    "gate_proj up_proj": "gate_up_proj gate_up w13 w12 gate_and_up gate_up_linear",
}
_NORMS = {
    "input_layernorm": (
        "input_layernorm attention_norm attn_norm ln_1 ln1 norm1 norm_1 rms_1 rms1 rms_norm1 rms_norm_1 rmsnorm1 "
        "rmsnorm_1 layernorm1 layer_norm1 pre_attention_norm pre_attn_norm norm_attn input_norm sa_norm ln_attn "
        "input_layer_norm pre_norm attn_ln"
    ),
    "post_attention_layernorm": (
        "post_attention_layernorm ffn_norm mlp_norm ln_2 ln2 norm2 norm_2 rms_2 rms2 rms_norm2 rms_norm_2 rmsnorm2 "
        "rmsnorm_2 layernorm2 layer_norm2 pre_ffn_norm pre_mlp_norm norm_ffn norm_mlp post_attention_norm "
        "post_attn_norm ln_mlp ffn_layernorm mlp_layernorm ff_norm post_norm attention_layernorm "
        "post_attn_layernorm feed_forward_norm ln_ffn mlp_ln"
    ),
}


def _by_word(table: dict[str, str], place: str = "") -> dict[str, tuple[str, ...]]:
    return {
        word: tuple(f"{place}{part}.weight" for part in target.split())
        for target, words in table.items()
        for word in words.split()
    }


_OUTER_WORDS = _by_word(_OUTER)
_ATTENTION_WORDS = _by_word(_ATTENTION, "self_attn.")
_FEED_FORWARD_WORDS = _by_word(_FEED_FORWARD, "mlp.")
_NORM_WORDS = _by_word(_NORMS)


def unwrapped(name: str) -> str:
    """Return a name without the prefixes that wrappers add."""
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def kind_of(name: str, dimensions: int = 2) -> str:
    """Return what an additional parameter is: bias, norm, gain (another vector), positions, or weight."""
    parts = name.lower().split(".")
    if parts[-1] in _BIAS_WORDS or parts[-1].endswith("_bias"):
        return "bias"
    word = parts[-2] if parts[-1] in _WEIGHT_WORDS and len(parts) > 1 else parts[-1]
    if "norm" in word or re.match(r"(ln|rms)(_|\d|$)", word):
        return "norm"
    if dimensions == 1:
        return "gain"
    return "positions" if word in ("wpe", "pos_emb", "position_embedding", "pos_embedding") else "weight"


def recognize(name: str) -> tuple[str, ...]:
    """Return Hugging Face's names whose rows a parameter holds one after the other, by the words of its name.

    ``transformer.h.3.attn.c_attn.weight`` -> q, k and v of layer 3. Words like ``c_proj`` and ``out`` need one for
    attention or feed-forward before them. Empty if it is not known.
    """
    words = unwrapped(name).lower().split(".")
    if words[-1] in _BIAS_WORDS:
        return ()
    if words[-1] in _WEIGHT_WORDS and len(words) > 1:
        words = words[:-1]
    numbers = [(i, match[1]) for i, word in enumerate(words) if (match := re.fullmatch(r"(?:[a-z]+_?)?(\d+)", word))]
    if not numbers or numbers[0][0] == len(words) - 1:
        return _OUTER_WORDS.get(words[-1], ())
    position, number = numbers[0]
    return tuple(f"model.layers.{number}.{target}" for target in _in_layer(words[position + 1 :]))


def _in_layer(words: list[str]) -> tuple[str, ...]:
    *path, word = words
    about_attention = any("att" in part or part in ("sa", "mha", "gqa", "mqa") for part in path)
    about_feed_forward = any(
        part in ("ff", "ffwd") or any(key in part for key in ("mlp", "ffn", "feed", "glu")) for part in path
    )
    if word in _NORM_WORDS and not (about_attention or about_feed_forward):
        return _NORM_WORDS[word]
    if about_attention and not about_feed_forward:
        return _ATTENTION_WORDS.get(word, ())
    if about_feed_forward and not about_attention:
        return _FEED_FORWARD_WORDS.get(word, ())
    both = (_ATTENTION_WORDS.get(word, ()), _FEED_FORWARD_WORDS.get(word, ()))
    return both[0] or both[1] if not (both[0] and both[1]) else ()


def scheme_of(found: Mapping[str, str]) -> str:
    """Return in words whose naming this is; empty for Hugging Face's.

    Args:
        found: Hugging Face's name for each recognized parameter that holds one tensor.
    """
    plain = {unwrapped(name): target for name, target in found.items()}
    if all(name == target for name, target in plain.items()):
        return ""
    if all(f"model.{name}" == target or name == target for name, target in plain.items()):
        return "Hugging Face's without `model.`"
    words = {_word(name): _word(target) for name, target in plain.items()}
    is_gpt = "wte" in words and any(".h." in f".{name}" for name in plain)
    whose = "Meta's" if {"wq", "w1"} <= words.keys() else "GPT-2's" if is_gpt else "its own"
    return f"{whose}: " + ", ".join(f"{own} = {usual}" for own, usual in words.items() if own != usual)


def _word(name: str) -> str:
    parts = [part for part in name.split(".") if part.lower() not in _WEIGHT_WORDS]
    return parts[-1] if parts else name
