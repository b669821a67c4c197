"""The whole configuration of a run: frozen, validated, every field with a drift class.

How it is read is in config_files.py. The drift class of a field says what happens when a run is resumed with
another value; what A, B and C mean is in drift.py. The resolved result is written into the run directory.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from resmol.config.model_config import ModelConfig

DriftClass = Literal["A", "B", "C"]

_TABLE_HEAD = "| field | default | drift | meaning |\n| --- | --- | --- | --- |"
_PREAMBLE = """# Configuration

Written by `python -m resmol.config.run_config > docs/configuration.md`; a test keeps it current.

A run is described by one TOML file: a preset (`--preset nano`) or one's own (`--config my.toml`). It may name one
`base`, a preset or a file beside it, over which it is laid, and an `architecture`: the path of a config.json or a Hub
id, whose values replace those of the base. `--set section.key=value` comes last. Unknown keys are refused.

```toml
base = "nano"

[optimizer]
lr = 1e-3
```

The drift class says what happens when a run is resumed with another value. **A**: refused. **B**: refused, unless
`--accept-drift section.key` is given; the change is recorded in the ledger. **C**: free.
"""


def param(default: Any, drift: DriftClass, description: str, **constraints: Any) -> Any:
    """Declare a configuration field; the drift class is not optional, so no field can forget it."""
    return Field(default, description=description, json_schema_extra={"drift": drift}, **constraints)


class Section(BaseModel):
    """A table of the configuration: immutable, no unknown keys, no silent conversion of types, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TokenizerConfig(Section):
    """Which tokenizer the data must have been made with."""

    sha256: str = param(
        "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
        "A",
        "sha256 of tokenizer.json; prepared data with another one is refused",
        pattern=r"^[0-9a-f]{64}$",
    )


class DataConfig(Section):
    """How the token stream is cut into windows and shuffled (its content is bound by a fingerprint)."""

    path: str = param("", "C", "folder of the prepared data, relative to the run; empty: as before, or RUN/data")
    seq_len: int = param(2048, "A", "tokens in a training window", ge=2)
    document_mask: bool = param(True, "A", "attention stays inside a document")
    seed: int = param(8, "A", "key of the permutation of the windows", ge=0)


class BatchConfig(Section):
    """How many tokens an optimizer step sees, and in which portions."""

    global_batch_tokens: int = param(16384, "B", "tokens in an optimizer step, over all processes", ge=1)
    micro_batch_size: int = param(8, "B", "windows in a forward pass of one process", ge=1)


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = param("adamw", "A", "the optimizer")
    lr: float = param(3e-3, "B", "peak learning rate", gt=0)
    beta1: float = param(0.9, "A", "decay of the first moment", ge=0, lt=1)
    beta2: float = param(0.95, "A", "decay of the second moment", ge=0, lt=1)
    eps: float = param(1e-8, "A", "added to the root of the second moment", gt=0)
    weight_decay: float = param(0.01, "B", "decoupled weight decay", ge=0)
    decay: Literal["all", "matrices"] = param("all", "B", "which parameters decay: all, or only matrices")
    clip_norm: float = param(1.0, "B", "largest global gradient norm; 0 switches clipping off", ge=0)


class ScheduleConfig(Section):
    """The learning rate as a function of the step. The horizon belongs to the run; ``train.steps`` does not."""

    kind: Literal["wsd", "cosine", "constant"] = param("wsd", "A", "warm-up-stable-decay, cosine or constant")
    warmup_steps: int = param(2000, "A", "linear warm-up from 0", ge=0)
    decay_start: int = param(0, "A", "wsd: last step before the decay; 0 plans none", ge=0)
    decay_steps: int = param(0, "A", "wsd: length of the linear decay", ge=0)
    horizon: int = param(0, "A", "cosine: the step at which the minimum is reached", ge=0)
    final_fraction: float = param(0.0, "A", "learning rate after the decay, as a share of the peak", ge=0, le=1)

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if self.kind == "cosine" and self.horizon <= self.warmup_steps:
            raise ValueError(f"horizon ({self.horizon}) must lie after warmup_steps ({self.warmup_steps})")
        if self.kind == "wsd" and (self.decay_start > 0) != (self.decay_steps > 0):
            raise ValueError("decay_start and decay_steps belong together: set both, or neither")
        if self.kind == "wsd" and 0 < self.decay_start < self.warmup_steps:
            raise ValueError(f"decay_start ({self.decay_start}) lies inside the warm-up ({self.warmup_steps})")
        return self


class TrainConfig(Section):
    """Length and seed."""

    steps: int = param(5000, "C", "stop after this step", ge=1)
    seed: int = param(8, "A", "seed of the initial weights", ge=0)
    on_spike: Literal["warn", "stop"] = param("warn", "C", "what a loss far above the recent ones leads to")


class RuntimeConfig(Section):
    """Where and in which arithmetic. ``auto`` is decided once, at the start, and then stored in the run."""

    device: Literal["auto", "cpu", "cuda"] = param("auto", "B", "where to compute")
    precision: Literal["auto", "float32", "bfloat16"] = param("auto", "B", "arithmetic of the matrix products")
    matmul_backend: Literal["auto", "mkl", "onednn"] = param(
        "auto", "B", "library of the matrix products in float32 on a CPU: PyTorch's BLAS, or oneDNN"
    )
    compile: Literal["auto", "on", "off"] = param("auto", "B", "torch.compile of the transformer block")
    attention: Literal["sdpa", "eager"] = param("sdpa", "B", "fused attention, or the formula written out")
    activation_checkpointing: Literal["auto", "on", "off"] = param(
        "auto", "B", "compute blocks again in the backward pass instead of keeping what they need"
    )
    loss_chunk_tokens: int = param(512, "B", "tokens whose logits exist at the same time", ge=1)
    threads: int = param(0, "B", "CPU threads; 0 takes what PyTorch takes", ge=0)
    collective_timeout: int = param(
        600, "C", "seconds that the processes of a run wait for one of them before they end", ge=1
    )


class EvaluationConfig(Section):
    """The held-out loss."""

    every: int = param(500, "C", "steps between evaluations; 0 switches them off", ge=0)
    windows: int = param(64, "C", "windows of the held-out split to use; 0 takes all", ge=0)


class SamplingConfig(Section):
    """The text samples that show how the model speaks as it learns."""

    every: int = param(500, "C", "steps between samples; 0 switches them off", ge=0)
    prompt: str = param("The", "C", "text that the sample continues")
    max_new_tokens: int = param(48, "C", "length of a sample", ge=1)
    temperature: float = param(0.8, "C", "0 is greedy", ge=0)
    top_k: int = param(50, "C", "0 is off", ge=0)
    top_p: float = param(0.95, "C", "1 is off", gt=0, le=1)
    seed: int = param(0, "C", "seed of the samples, independent of training", ge=0)


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: int = param(500, "C", "steps between checkpoints; 0 saves only at the end", ge=0)
    keep_last: int = param(2, "C", "newest checkpoints to keep besides the permanent ones", ge=2)
    permanent: tuple[int, ...] = param((), "C", "steps that are saved and never pruned")


class LoggingConfig(Section):
    """What is shown; everything is in the ledger anyway."""

    every: int = param(500, "C", "steps between lines in train.log", ge=1)
    tensorboard: bool = param(False, "C", "also write TensorBoard events (needs tensorboardX)")


class RunConfig(Section):
    """All of it. Every default is stated above; presets state every value that matters, with its source."""

    name: str = Field("custom", description="what the user called it", json_schema_extra={"drift": "C"})
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = []
        if self.data.seq_len > self.model.max_position_embeddings:
            problems.append(
                f"data.seq_len ({self.data.seq_len}) is longer than model.max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        micro_tokens = self.batch.micro_batch_size * self.data.seq_len
        if self.batch.global_batch_tokens % micro_tokens:
            problems.append(
                f"batch.global_batch_tokens ({self.batch.global_batch_tokens}) is not a multiple of "
                f"batch.micro_batch_size x data.seq_len ({micro_tokens})"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes in an optimizer step, over all processes."""
        return self.batch.global_batch_tokens // (self.batch.micro_batch_size * self.data.seq_len)

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML text."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def sha256(self) -> str:
        """Digest of what the numbers depend on: every field of drift class A and B."""
        bound = {key: value for key, value in flatten(self).items() if drift_classes()[key] != "C"}
        return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def drift_classes() -> dict[str, DriftClass]:
    """Return ``section.key`` -> drift class, for every field there is."""
    classes: dict[str, DriftClass] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for key, inner in kind.model_fields.items():
                classes[f"{section}.{key}"] = inner.json_schema_extra["drift"]  # type: ignore[index, assignment]
        else:
            classes[section] = field.json_schema_extra["drift"]  # type: ignore[index, assignment]
    return classes


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return ``section.key`` -> value."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            flat[section] = value
    return flat


def describe() -> str:
    """Return docs/configuration.md: every field with its default, its drift class and its meaning."""
    lines = [_PREAMBLE]
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"## {section}", (kind.__doc__ or "").strip(), "", _TABLE_HEAD]
            lines += [_describe_field(f"{section}.{key}", inner) for key, inner in kind.model_fields.items()]
        else:
            lines += [_TABLE_HEAD, _describe_field(section, field)]
        lines.append("")
    return "\n".join(lines)


def _describe_field(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    allowed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if len(choices) > 1 else ""
    return f"| `{name}` | {default} | {drift_classes()[name]} | {field.description}{allowed} |"


if __name__ == "__main__":
    print(describe(), end="")  # noqa: T201
