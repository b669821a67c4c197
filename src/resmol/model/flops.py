"""Counts that follow from the architecture alone: parameters, floating-point operations, bytes of memory."""

from __future__ import annotations

from resmol.config.model_config import ModelConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part; a tied output layer has none of its own.

    For SmolLM2-135M the parts add up to 134,515,008.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    key_value = config.num_key_value_heads * config.head_dim
    return {
        "embedding": config.vocab_size * width,
        "attention": layers * (2 * width * width + 2 * width * key_value),
        "mlp": layers * 3 * width * config.intermediate_size,
        "norms": (2 * layers + 1) * width,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * width,
    }


def total_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter_counts(config).values())


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the multiply-adds x 2 of a forward pass, per token, at a training length of ``seq_len``.

    Matrix products are 2 x parameters (Kaplan et al. 2020, table 1); the output layer counts when tied, too.
    Attention adds 2 products of 2 x D for each attended position, on average ``(seq_len + 1) / 2`` of them.
    """
    counts = parameter_counts(config)
    matrices = counts["attention"] + counts["mlp"] + config.vocab_size * config.hidden_size
    attended = config.num_hidden_layers * 2 * 2 * config.hidden_size * (seq_len + 1) // 2
    return 2 * matrices + attended


def training_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the operations of a training step, per token: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, seq_len)


def training_memory(
    config: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    loss_chunk_tokens: int,
    *,
    activation_checkpointing: bool = False,
    low_precision: bool = False,
    eager: bool = False,
    averaging: bool = False,
    shards: int = 1,
) -> dict[str, int]:
    """Estimate the bytes that training needs on each device, by part.

    Activations are the tensors saved for the backward pass, counted for each token and block of the uncompiled model:
    eight of the width (the norms' inputs and results, the queries, the mixed values), key and value, four of
    SwiGLU, and a row of the document mask, which the CPU's fused attention saves as numbers in each block. With
    ``activation_checkpointing`` they exist for one block at a time, and the other blocks save their input only.
    Under autocast to bfloat16 or float16 (``low_precision``) the inputs of products have two bytes, and the weights a
    copy of two bytes; the residual stream and the norms (five of the eight tensors) stay in float32. ``eager``
    attention saves its weights, one for each head and pair of positions, in float32 and rounded. ``averaging`` keeps a
    second set of weights. With several ``shards`` (FSDP) a device keeps one of them of weights, gradients and moments,
    and gathers what it computes with: embedding, output layer and two blocks, with their gradients. Blocks are gathered
    in the low precision, so only the output layer has a copy.
    """
    parameters = 4 * total_parameters(config)
    kept_parameters = -(-parameters // shards)
    width, key_value = config.hidden_size, config.num_key_value_heads * config.head_dim
    half = 2 if low_precision else 4
    kept = 5 * width * 4 + (3 * width + 2 * key_value + 4 * config.intermediate_size) * half + 4 * seq_len
    if eager:
        kept += config.num_attention_heads * seq_len * (4 + 2 * low_precision)
    copied = parameters if shards == 1 else 4 * config.vocab_size * config.hidden_size
    tokens = micro_batch_size * seq_len
    layers = config.num_hidden_layers
    activations = kept + layers * width * 4 if activation_checkpointing else layers * kept
    return {
        "weights": kept_parameters + (copied // 2 if low_precision else 0),
        "gradients": kept_parameters,
        "adamw moments": 2 * kept_parameters,
        **({"averaged weights": kept_parameters} if averaging else {}),
        **({"gathered": 2 * _gathered_parameters(config)} if shards > 1 else {}),
        "activations": tokens * activations,
        "logits chunk": 4 * min(tokens, loss_chunk_tokens) * config.vocab_size,
    }


def _gathered_parameters(config: ModelConfig) -> int:
    """Return the bytes of the weights that FSDP holds whole at a time: those outside the blocks, and two blocks."""
    counts = parameter_counts(config)
    outside = counts["embedding"] + counts["lm_head"]
    return 4 * (outside + 2 * (counts["attention"] + counts["mlp"]) // config.num_hidden_layers)


def inference_memory(config: ModelConfig, batch_size: int, context: int) -> dict[str, int]:
    """Estimate the bytes of generation in float32: the weights, and the keys and values of ``context`` tokens."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"weights": 4 * total_parameters(config), "kv cache": 4 * batch_size * context * per_token}
