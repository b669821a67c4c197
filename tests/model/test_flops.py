"""Counts from the architecture against counts of real tensors, real operations and real buffers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.config.load import load_preset, preset_names
from resmol.config.model_config import ModelConfig
from resmol.model.flops import (
    forward_flops_per_token,
    inference_memory,
    parameter_counts,
    total_parameters,
    training_flops_per_token,
    training_memory,
)
from resmol.model.kv_cache import KVCache
from resmol.model.llama import Attention, CausalLM

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=0,
)
UNTIED = TINY.model_copy(update={"tie_word_embeddings": False})


def reference_counts(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of the reference's module by name, without allocating them."""
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "lm_head": 0}
    words = {
        "embed_tokens": "embedding",
        "self_attn": "attention",
        "mlp": "mlp",
        "norm": "norms",
        "lm_head": "lm_head",
    }
    for name, parameter in reference.named_parameters():  # a tied tensor comes once
        part = next(part for word, part in words.items() if word in name.replace("layernorm", "norm"))
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", preset_names())
def test_parameters_of_every_preset_equal_the_reference(name: str) -> None:
    config = load_preset(name).model
    assert parameter_counts(config) == reference_counts(config)


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_parameters_equal_the_modules(config: ModelConfig) -> None:
    assert parameter_counts(config) == reference_counts(config)
    assert total_parameters(config) == sum(p.numel() for p in CausalLM(config).parameters())


def test_the_parts_of_smollm2_135m() -> None:
    config = load_preset("smollm2-135m").model
    assert parameter_counts(config) == {
        "embedding": 49152 * 576,
        "attention": 30 * (576 * 576 + 2 * 576 * 192 + 576 * 576),
        "mlp": 30 * 3 * 576 * 1536,
        "norms": 61 * 576,
        "lm_head": 0,
    }
    assert total_parameters(config) == 134_515_008
    assert total_parameters(config.model_copy(update={"tie_word_embeddings": False})) == 162_826_560


def counted_flops(config: ModelConfig, seq_len: int, batch: int, *, backward: bool) -> tuple[int, int]:
    """Return what PyTorch counts for the weights' products and for attention's products, in a whole batch."""
    model = CausalLM(config, attention="eager")
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(torch.zeros(batch, seq_len, dtype=torch.long))
        if backward:
            logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    batched = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    return counter.get_total_flops() - batched, batched


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 32])
def test_forward_flops_equal_what_pytorch_counts(config: ModelConfig, seq_len: int) -> None:
    weights, attention = counted_flops(config, seq_len, batch=2, backward=False)
    causal = attention * (seq_len + 1) // (2 * seq_len)  # PyTorch counts the masked half of the scores as well
    assert forward_flops_per_token(config, seq_len) * 2 * seq_len == weights + causal


def test_training_flops_equal_what_pytorch_counts() -> None:
    weights, attention = counted_flops(TINY, 32, batch=2, backward=True)
    causal = attention * 33 // 64
    assert training_flops_per_token(TINY, 32) * 64 == weights + causal


def test_flops_of_smollm2_135m_are_about_six_per_parameter() -> None:
    config = load_preset("smollm2-135m").model
    assert training_flops_per_token(config, 1) == pytest.approx(6 * 134_515_008, rel=0.002)


def test_inference_memory_is_that_of_the_buffers() -> None:
    memory = inference_memory(TINY, batch_size=3, context=40)
    cache = KVCache(TINY, 3, 40)
    assert memory["kv cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory["weights"] == sum(p.nbytes for p in CausalLM(TINY).parameters())


def test_grouped_queries_save_two_thirds_of_the_cache() -> None:
    config = load_preset("smollm2-135m").model
    grouped = inference_memory(config, 1, 8192)["kv cache"]
    full = inference_memory(config.model_copy(update={"num_key_value_heads": 9}), 1, 8192)["kv cache"]
    assert (grouped, full) == (4 * 8192 * 2 * 30 * 192, 3 * grouped)


def kept_for_backward(config: ModelConfig, batch: int, seq_len: int, attention: Attention = "sdpa") -> int:
    """Return the bytes of the activations that autograd really keeps."""
    model = CausalLM(config, attention=attention)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        loss = model.loss(ids, ids)
        total = sum(kept.values())
    loss.backward()
    return total


def test_the_estimate_of_activations_is_near_what_autograd_keeps() -> None:
    config = TINY.model_copy(update={"num_hidden_layers": 8, "vocab_size": 64})
    measured = kept_for_backward(config, batch=4, seq_len=64)
    estimate = training_memory(config, 4, 64, loss_chunk_tokens=8)["activations"]
    assert estimate == pytest.approx(measured, rel=0.08)


def test_the_estimate_with_recomputed_blocks_is_near_what_autograd_keeps_at_once() -> None:
    """Between forward and backward that is the input of every block; in the backward pass one block comes on top."""
    config = TINY.model_copy(update={"num_hidden_layers": 8, "vocab_size": 64})
    one = TINY.model_copy(update={"num_hidden_layers": 1, "vocab_size": 64})
    inputs = 4 * 4 * 64 * 8 * config.hidden_size
    estimate = training_memory(config, 4, 64, loss_chunk_tokens=8, activation_checkpointing=True)["activations"]
    assert estimate == pytest.approx(inputs + kept_for_backward(one, batch=4, seq_len=64), rel=0.15)


@pytest.mark.parametrize(("bfloat16", "attention"), [(True, "sdpa"), (False, "eager"), (True, "eager")])
def test_the_estimate_knows_precision_and_attention(bfloat16: bool, attention: Attention) -> None:
    config = TINY.model_copy(update={"num_hidden_layers": 8, "vocab_size": 64})
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        measured = kept_for_backward(config, batch=4, seq_len=64, attention=attention)
    estimate = training_memory(config, 4, 64, loss_chunk_tokens=8, low_precision=bfloat16, eager=attention == "eager")
    assert estimate["activations"] == pytest.approx(measured, rel=0.15)


def test_training_memory_is_four_copies_of_the_weights_and_what_the_batch_needs() -> None:
    memory = training_memory(TINY, 2, 16, 8)
    copies = memory["weights"] + memory["gradients"] + memory["adamw moments"]
    assert copies == 16 * total_parameters(TINY)
    doubled = training_memory(TINY, 4, 16, 8)
    assert doubled["activations"] == 2 * memory["activations"]
    assert doubled["logits chunk"] == memory["logits chunk"]


# --- the page that explains it ------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")


def numbers_after(label: str) -> list[int]:
    """Return the numbers of the cells of the table row that begins with ``label``."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    cells = [cell.strip(" *").replace(",", "") for cell in row.split("|")[2:-1]]
    return [int(cell) for cell in cells if cell.isdigit()]


def test_the_parameter_table_of_the_page_is_computed() -> None:
    config = load_preset("smollm2-135m").model
    for part, count in parameter_counts(config).items():
        assert numbers_after(part) == [count]
    assert numbers_after("**total**") == [total_parameters(config)]


def test_the_formulas_of_the_parameter_table_give_its_numbers() -> None:
    for part in ("embedding", "attention", "mlp", "norms"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {part} |"))
        formula = row.split("|")[2].replace(",", "").replace("x", "*")
        assert re.fullmatch(r"[0-9*+() ]+", formula)
        assert [eval(formula)] == numbers_after(part)


def test_the_values_of_the_page_are_those_of_the_preset() -> None:
    config = load_preset("smollm2-135m").model
    fields = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
        "intermediate_size max_position_embeddings rope_theta"
    )
    for field in fields.split():
        assert numbers_after(f"`{field}`") == [getattr(config, field)]
    assert numbers_after("`hidden_size / num_attention_heads`") == [config.head_dim]


def test_the_cache_table_of_the_page_is_computed() -> None:
    config = load_preset("smollm2-135m").model
    ungrouped = config.model_copy(update={"num_key_value_heads": 9})
    full = [inference_memory(c, 1, 8192)["kv cache"] for c in (config, ungrouped)]
    assert numbers_after("bytes at 8,192 tokens in float32") == full
    assert numbers_after("bytes at 8,192 tokens in bfloat16") == [size // 2 for size in full]
    assert numbers_after("bytes for a token in bfloat16") == [size // 2 // 8192 for size in full]
    assert numbers_after("numbers kept for a token (2 x 30 x K x 64)") == [size // 4 // 8192 for size in full]


def test_the_wavelengths_of_the_page_are_computed() -> None:
    for theta in (10_000, 100_000):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {theta:,} |"))
        assert f"| {2 * math.pi * theta ** (62 / 64):,.0f} |" in row


def test_the_boxes_of_the_diagrams_add_up() -> None:
    """Every number of parameters in a diagram is that of a module."""
    config = load_preset("smollm2-135m").model
    with torch.device("meta"):
        model = CausalLM(config)
    block = model.model.layers[0]
    sizes = {f"{sum(p.numel() for p in module.parameters()):,}" for module in (model, block, *block.modules())}
    sizes |= {f"{model.model.embed_tokens.weight.numel():,}"}
    drawn = re.findall(r"([\d,]+) parameters", "".join(re.findall(r"```mermaid(.*?)```", PAGE, re.DOTALL)))
    assert len(drawn) >= 14
    assert set(drawn) <= sizes
    assert PAGE.count("```mermaid") == 4
