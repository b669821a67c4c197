"""The roofline: the time of an ideal step that consists of nothing but the model's matrix products (matmuls).

**Training.** A step on N tokens must compute, for each weight matrix W (O x I) with input x (N x I), three matmuls:
``y = x W^T``, the input's gradient ``dx = dy W`` and the weight's ``dW = dy^T x``, each 2 N I O operations. Attention
adds ``Q K^T`` and ``P V`` with two gradients each. Each matmul is timed by itself, at its own shape, on matrices that
nothing else uses, and the best time of several calls and of both libraries (linear.py) counts; its rate r is its
operations divided by that time. Operations are counted as in flops.py: attention counts only its causal half, at the
rate of the whole matmul. The roofline is

    tokens per second = N / sum(operations_p / r_p).

It leaves out norms, activations, softmax, loss and optimizer, so no implementation on these matmuls reaches it.
``with_update`` adds the traffic of AdamW, which reads weight, gradient and two moments and writes three of them back:
7 x 4 bytes a parameter at the measured bandwidth of reading and writing numbers in place. (A copy is slower: memory
that is only written to is read as well.)

**Generation.** A new token needs every weight once, whatever the cache. The roofline is the read bandwidth divided by
the bytes of the weights (a tied embedding counts once; of an untied one only a row is read) and of the keys and values
of the mean context. A batch of B shares the weights. The roofline of the prompt is that of the forward matmuls.

The process gets the allocator settings of training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resmol.bench.workers.main import Metrics, worker_main
from resmol.config.model_config import ModelConfig
from resmol.model.flops import forward_flops_per_token, inference_memory, total_parameters
from resmol.model.linear import has_onednn, onednn_product

STREAM_BYTES = 1 << 29  # far beyond any cache
SECONDS_PER_MATMUL = 0.25
LEAST_REPEATS = 3
LOGITS_ROWS = 1024  # more of them at once need gigabytes and are no faster
ADAMW_BYTES_PER_PARAMETER = 7 * 4


@dataclass(frozen=True)
class Matmul:
    """The matmuls of one shape in a step: (batch of) m x k by k x n.

    Attributes:
        role: Its purpose.
        batch: Independent matmuls in one call; 0 is a plain matmul.
        m: Rows of the result.
        k: Length of the sums.
        n: Columns of the result.
        times: Calls in a step; a fraction where a piece of a long matmul is timed.
        counted: The share of the operations that is counted; a half for causal attention.
    """

    role: str
    batch: int
    m: int
    k: int
    n: int
    times: int | float
    counted: float = 1.0

    @property
    def operations(self) -> float:
        """Counted operations in a step; a multiply-add is two."""
        return 2.0 * max(1, self.batch) * self.m * self.k * self.n * self.times * self.counted


def forward_matmuls(config: ModelConfig, rows: int, seq_len: int) -> list[Matmul]:
    """Return the matmuls of a forward pass over ``rows`` windows of ``seq_len`` tokens."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    key_value, tokens = config.num_key_value_heads * config.head_dim, rows * seq_len
    heads, causal = rows * config.num_attention_heads, (seq_len + 1) / (2 * seq_len)
    chunk = min(tokens, LOGITS_ROWS)
    return [
        Matmul("query, output", 0, tokens, width, width, 2 * layers),
        Matmul("key, value", 0, tokens, width, key_value, 2 * layers),
        Matmul("gate, up", 0, tokens, width, hidden, 2 * layers),
        Matmul("down", 0, tokens, hidden, width, layers),
        Matmul("logits", 0, chunk, width, config.vocab_size, tokens / chunk),
        Matmul("scores", heads, seq_len, config.head_dim, seq_len, layers, causal),
        Matmul("mixed values", heads, seq_len, seq_len, config.head_dim, layers, causal),
    ]


def training_matmuls(config: ModelConfig, rows: int, seq_len: int) -> list[Matmul]:
    """Return the matmuls of a step: forward, then the gradients by both factors (m x n by n x k, k x m by m x n)."""
    forward = forward_matmuls(config, rows, seq_len)
    left = [Matmul(f"{p.role}: by input", p.batch, p.m, p.n, p.k, p.times, p.counted) for p in forward]
    right = [Matmul(f"{p.role}: by weight", p.batch, p.n, p.m, p.k, p.times, p.counted) for p in forward]
    return [*forward, *left, *right]


def matmul_seconds(matmul: Matmul, dtype: torch.dtype) -> float:
    """Return the best time of one call in seconds, with the operand layouts of PyTorch's own linear layers.

    The forward pass multiplies by a transposed weight, the weight's gradient transposes its first factor, and the
    input's gradient transposes nothing.
    """
    lead = (matmul.batch,) if matmul.batch else ()
    by_weight, by_input = matmul.role.endswith("by weight"), matmul.role.endswith("by input")
    first = torch.rand(*lead, matmul.k, matmul.m, dtype=dtype).mT if by_weight else None
    first = torch.rand(*lead, matmul.m, matmul.k, dtype=dtype) if first is None else first
    plain = by_weight or by_input or matmul.role == "mixed values"
    second = torch.rand(*lead, matmul.k, matmul.n, dtype=dtype) if plain else None
    second = torch.rand(*lead, matmul.n, matmul.k, dtype=dtype).mT if second is None else second
    out = torch.empty(*lead, matmul.m, matmul.n, dtype=dtype)
    seconds = best_seconds(lambda: torch.matmul(first, second, out=out))
    if matmul.batch or dtype != torch.float32 or out.device.type != "cpu" or not has_onednn():
        return seconds
    return min(seconds, best_seconds(lambda: onednn_product(first, second.mT)))


def best_seconds(work: Callable[[], object], budget: float = SECONDS_PER_MATMUL) -> float:
    """Return the shortest of several times, in seconds: other programs can only lengthen one."""
    on_device = torch.get_default_device().type != "cpu"
    work()
    if on_device:  # what is still running would be part of the first time
        torch.accelerator.synchronize()
    best, spent, count = math.inf, 0.0, 0
    while spent < budget or count < LEAST_REPEATS:
        started = time.perf_counter()
        work()
        if on_device:
            torch.accelerator.synchronize()
        took = time.perf_counter() - started
        best, spent, count = min(best, took), spent + took, count + 1
    return max(best, 1e-9)


def sum_seconds(matmuls: list[Matmul], dtype: torch.dtype) -> tuple[float, list[dict[str, Any]]]:
    """Return the sum of counted operations / measured rate over all matmuls, and the part of each."""
    total, parts = 0.0, []
    for matmul in matmuls:
        seconds = matmul_seconds(matmul, dtype) * matmul.times * matmul.counted
        total += seconds
        parts.append(
            {
                "role": matmul.role,
                "shape": [matmul.batch, matmul.m, matmul.k, matmul.n],
                "operations": matmul.operations,
                "flops_per_second": matmul.operations / seconds,
            }
        )
    return total, parts


def bandwidth(size: int = STREAM_BYTES) -> dict[str, float]:
    """Return the bytes per second of reading memory (a sum, or a matrix by a vector) and of updating it in place."""
    numbers, vector = torch.ones(size // 4), torch.ones(1024)
    matrix = numbers.view(-1, 1024)
    read = min(best_seconds(numbers.sum, 0.5), best_seconds(lambda: torch.mv(matrix, vector), 0.5))
    update = best_seconds(lambda: numbers.mul_(1.0), 0.5)
    return {"read_bytes_per_second": size / read, "update_bytes_per_second": 2 * size / update}


def training_roofline(config: ModelConfig, rows: int, seq_len: int, dtype: torch.dtype) -> Metrics:
    """Measure the roofline of training; see the derivation above.

    Returns:
        ``tokens_per_second`` of matmuls only, ``with_update`` with AdamW's traffic, and the parts of both.
    """
    tokens = rows * seq_len
    seconds, parts = sum_seconds(training_matmuls(config, rows, seq_len), dtype)
    memory = bandwidth()
    update = ADAMW_BYTES_PER_PARAMETER * total_parameters(config) / memory["update_bytes_per_second"]
    operations = sum(part["operations"] for part in parts)
    return {
        "tokens_per_second": tokens / seconds,
        "with_update": tokens / (seconds + update),
        "flops_per_second": operations / seconds,
        "operations": operations,
        "matmuls": parts,
        **memory,
    }


def generation_roofline(config: ModelConfig, batch: int, prompt: int, new: int, dtype: torch.dtype) -> Metrics:
    """Measure the roofline of greedy decoding (``tokens_per_second``) and of the prompt (``prefill_per_second``)."""
    memory = bandwidth()
    itemsize = dtype.itemsize
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = itemsize * (total_parameters(config) - embedding)
    cache = batch * inference_memory(config, 1, prompt + new // 2)["kv cache"] * itemsize / 4
    seconds, parts = sum_seconds(forward_matmuls(config, batch, prompt), dtype)
    return {
        "tokens_per_second": batch * memory["read_bytes_per_second"] / (weights + cache),
        "prefill_per_second": batch * prompt / seconds,
        "flops_per_second": batch * prompt * forward_flops_per_token(config, prompt) / seconds,
        "bytes_per_step": weights + cache,
        "matmuls": parts,
        **memory,
    }


def measure_roofline(task: Mapping[str, Any]) -> Metrics:
    """Measure the roofline that a task asks for."""
    config, dtype = ModelConfig.model_validate(task["model"]), getattr(torch, task["precision"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    with torch.device(task["device"]):  # all that is timed is made there
        if task["of"] == "training":
            return training_roofline(config, task["rows"], task["seq_len"], dtype)
        return generation_roofline(config, task["batch"], task["prompt"], task["new"], dtype)


if __name__ == "__main__":
    worker_main(measure_roofline)
