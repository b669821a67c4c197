"""Where a run computes and in which arithmetic, and how several ranks share it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from resmol.config.strict_model import StrictModel, param

DeviceKind = Literal["cpu", "cuda", "mps", "xpu"]  # as PyTorch calls them; train/devices.py knows what each can do
# The arithmetic of ``runtime.determinism = "portable"``; oneDNN and compiled code depend on the processor.
PORTABLE = {"device": "cpu", "precision": "float32", "matmul_backend": "mkl", "compile": "off"}


class RuntimeConfig(StrictModel):
    """Where and in which arithmetic. ``auto`` is decided once, at the start, and then stored in the run."""

    determinism: Literal["machine", "portable", "off"] = param(
        "machine", "B", "the same bits on one kind of machine, on any x86-64 machine (slower), or no such promise"
    )
    device: Literal["auto", DeviceKind] = param("auto", "B", "where to compute")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = param(
        "auto", "B", "arithmetic of the matmuls; float16 with a dynamic loss scale"
    )
    matmul_backend: Literal["auto", "mkl", "onednn"] = param(
        "auto", "B", "library of the float32 matmuls on a CPU: MKL (PyTorch's BLAS) or oneDNN"
    )
    compile: Literal["auto", "on", "off"] = param("auto", "B", "torch.compile of the transformer block")
    attention: Literal["sdpa", "varlen", "eager"] = param(
        "sdpa", "B", "fused attention; on CUDA in half precision without a mask for documents; the formula written out"
    )
    activation_checkpointing: Literal["auto", "on", "off"] = param(
        "auto", "B", "recompute blocks in the backward pass instead of keeping their activations"
    )
    loss_chunk_tokens: int = param(512, "B", "tokens whose logits exist at the same time", ge=1)
    threads: int = param(0, "B", "CPU threads; 0 takes PyTorch's default", ge=0)
    collective_timeout: int = param(
        600, "C", "seconds that the ranks of a run wait for one of them in a collective before they end", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _portable_decides(cls, table: Any) -> Any:
        """Let no machine decide: neither ``auto``, nor the number of threads, by which sums are split."""
        if not isinstance(table, dict) or table.get("determinism") != "portable":
            return table
        decided = {key: value for key, value in PORTABLE.items() if table.get(key, "auto") == "auto"}
        return {**table, **decided, "threads": table.get("threads") or 1}

    @model_validator(mode="after")
    def _portable_arithmetic(self) -> RuntimeConfig:
        others = {key: getattr(self, key) for key, value in PORTABLE.items() if getattr(self, key) != value}
        if self.determinism == "portable" and others:
            wrong = ", ".join(f"{key} {PORTABLE[key]}, not {value}" for key, value in others.items())
            raise ValueError(f"determinism portable needs {wrong}")
        return self

    @property
    def is_low_precision(self) -> bool:
        """Whether the matmuls have factors of two bytes."""
        return self.precision in ("bfloat16", "float16")


class ParallelConfig(StrictModel):
    """How the ranks that torchrun starts share a run; one process ignores it.

    A run may go on with another strategy, as with another number of ranks. That is recorded as a changed environment,
    since it changes the order of the additions, and with it the last bits.
    """

    strategy: Literal["ddp", "fsdp"] = param(
        "ddp", "C", "each rank holds the whole model (ddp), or its share of weights, gradients and moments (fsdp)"
    )
    replicas: int = param(1, "C", "fsdp: groups of ranks that hold the whole model each (HSDP); 1 is one group", ge=1)

    def shards(self, world_size: int) -> int:
        """Return the number of ranks that share one set of weights, gradients and moments."""
        return world_size // self.replicas if self.strategy == "fsdp" else 1
