"""The whole configuration of a run: frozen, validated, every field with a drift class.

It is read by load.py. The drift class of a field decides what happens when a run is resumed with another value;
drift.py defines A, B and C. The resolved configuration is written into the run directory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from resmol.config.data_config import DataConfig
from resmol.config.derived import WINDOWS_PER_STEP, with_changes
from resmol.config.model_config import ModelConfig
from resmol.config.runtime_config import ParallelConfig, RuntimeConfig
from resmol.config.strict_model import DriftClass, StrictModel, param
from resmol.config.tables import dotted, invalid
from resmol.system.wording import counted


class TokenizerConfig(StrictModel):
    """Which tokenizer the data must have been made with."""

    sha256: str = param(
        "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
        "A",
        "sha256 of tokenizer.json; `train --tokenizer` states it; prepared data with another one is refused",
        pattern=r"^[0-9a-f]{64}$",
    )


class BatchConfig(StrictModel):
    """How many tokens an optimizer step sees, and in which portions."""

    global_batch_tokens: int = param(16384, "B", "tokens in an optimizer step, over all processes", ge=1)
    micro_batch_size: int = param(8, "B", "windows in a forward pass of one process", ge=1)


class OptimizerConfig(StrictModel):
    """AdamW (Loshchilov & Hutter 2019), alone or beside Muon (Jordan et al. 2024) for the matrices of the blocks.

    The second moment is an average over recent steps. Its length in tokens matters, and not in steps: with
    `beta2_halflife_tokens` it stays what it is when the batch changes. Either that or `beta2` is set.
    """

    name: Literal["adamw", "muon"] = param(
        "adamw", "A", "AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest"
    )
    lr: float = param(3e-3, "B", "peak learning rate", gt=0)
    embedding_lr_scale: float = param(
        1.0, "B", "learning rate of the embedding (and of the output layer tied to it), as a multiple of lr", gt=0
    )
    beta1: float = param(0.9, "A", "decay of the first moment", ge=0, lt=1)
    beta2: float | None = param(0.95, "A", "decay of the second moment, a step", ge=0, lt=1)
    beta2_halflife_tokens: int | None = param(
        None, "A", "tokens after which a gradient counts half in the second moment; instead of beta2", gt=0
    )
    muon_momentum: float = param(0.95, "A", "muon: decay of the momentum", ge=0, lt=1)
    eps: float = param(1e-8, "A", "added to the root of the second moment", gt=0)
    weight_decay: float = param(0.01, "B", "decoupled weight decay", ge=0)
    decay: Literal["all", "matrices"] = param("all", "B", "which parameters decay: all, or only matrices")
    clip_norm: float = param(1.0, "B", "largest global gradient norm; 0 switches clipping off", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _halflife_replaces_the_default(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("beta2_halflife_tokens") is not None:
            return {"beta2": None, **table}
        return table

    @model_validator(mode="after")
    def _one_length_of_the_average(self) -> OptimizerConfig:
        if (self.beta2 is None) == (self.beta2_halflife_tokens is None):
            both = f"beta2 ({self.beta2}) and beta2_halflife_tokens ({self.beta2_halflife_tokens})"
            raise ValueError(f"{both} state the same thing: set one of them")
        return self

    def beta2_at(self, tokens: int) -> float:
        """Return the decay of the second moment in a step of so many tokens (Marek et al. 2025, arXiv 2507.07101)."""
        if self.beta2_halflife_tokens is not None:
            return float(0.5 ** (tokens / self.beta2_halflife_tokens))
        assert self.beta2 is not None, "the validator saw to it"
        return self.beta2


class ScheduleConfig(StrictModel):
    """The learning rate as a function of the step. The horizon belongs to the run; ``train.steps`` does not.

    A decay may be planned, or changed, while it lies ahead: no step that is done may get another learning rate.
    """

    kind: Literal["wsd", "cosine", "constant"] = param("wsd", "A", "warm-up-stable-decay, cosine or constant")
    warmup_steps: int = param(2000, "A", "linear warm-up from 0", ge=0)
    decay_start: int = param(0, "B", "wsd: last step before the decay; 0 plans none", ge=0)
    decay_steps: int = param(0, "B", "wsd: length of the decay", ge=0)
    decay_shape: Literal["linear", "1-sqrt"] = param(
        "linear", "B", "wsd: how the rate falls; 1-sqrt falls fast at first, and slowly at the end"
    )
    planned_seconds: int = param(0, "B", "the time that a decay was planned for by `--time`; 0 for none", ge=0)
    horizon: int = param(0, "A", "cosine: the step at which the minimum is reached", ge=0)
    final_fraction: float = param(0.0, "B", "learning rate after the decay, as a share of the peak", ge=0, le=1)

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if self.kind == "cosine" and self.horizon <= self.warmup_steps:
            raise ValueError(f"horizon ({self.horizon}) must lie after warmup_steps ({self.warmup_steps})")
        if self.kind == "wsd" and (self.decay_start > 0) != (self.decay_steps > 0):
            raise ValueError("decay_start and decay_steps belong together: set both, or neither")
        if self.planned_seconds and not self.decay_steps:
            raise ValueError("planned_seconds belongs to the decay that `resmol train --time` plans")
        if self.kind == "wsd" and 0 < self.decay_start < self.warmup_steps:
            raise ValueError(f"decay_start ({self.decay_start}) lies inside the warm-up ({self.warmup_steps})")
        return self


class AveragingConfig(StrictModel):
    """A second set of weights: the average over the newest part of the steps so far (`train/averaging.py`)."""

    fraction: float = param(
        0.0, "A", "share of the steps so far that the average reaches over; 1 is the mean of all, 0 keeps none",
        ge=0, le=1,
    )  # fmt: skip
    every: int = param(8, "A", "steps between updates of the average, each of which reads all weights once", ge=1)


FINGERPRINTED_TOKENS = 16384  # of training, while all is covered once: about 1 % of the time of two cores at 135M


class TrainConfig(StrictModel):
    """Length and seed."""

    steps: int = param(5000, "C", "stop after this step", ge=1)
    seed: int = param(8, "A", "seed of the initial weights", ge=0)
    fingerprint_steps: int = param(
        0, "B", "steps in which fingerprints in the ledger cover all weights and moments; 0: 16384 / tokens of a step",
        ge=0,
    )  # fmt: skip
    on_spike: Literal["warn", "stop"] = param("warn", "C", "reaction to a loss far above the recent ones")


class EvaluationConfig(StrictModel):
    """The held-out loss."""

    every: int = param(500, "C", "steps between evaluations; 0 switches them off", ge=0)
    windows: int = param(64, "C", "windows of the held-out split to use; 0 takes all", ge=0)


class SamplingConfig(StrictModel):
    """The text samples that show what the model generates as it learns."""

    every: int = param(500, "C", "steps between samples; 0 switches them off", ge=0)
    prompt: str = param("", "C", "text that the sample continues; empty takes the first words of held-out text")
    max_new_tokens: int = param(48, "C", "length of a sample", ge=1)
    temperature: float = param(0.8, "C", "0 is greedy", ge=0)
    top_k: int = param(50, "C", "0 is off", ge=0)
    top_p: float = param(0.95, "C", "1 is off", gt=0, le=1)
    seed: int = param(0, "C", "seed of the samples, independent of training", ge=0)


class CheckpointConfig(StrictModel):
    """When to save and what to keep."""

    every: int = param(500, "C", "steps between checkpoints; 0 saves only at the end", ge=0)
    keep_last: int = param(2, "C", "newest checkpoints to keep besides the permanent ones", ge=2)
    permanent: tuple[int, ...] = param((), "C", "steps that are saved and never pruned")


class LoggingConfig(StrictModel):
    """What is shown; everything is in the ledger anyway."""

    every: int = param(500, "C", "steps between lines in train.log", ge=1)
    tensorboard: bool = param(False, "C", "also write TensorBoard events (needs tensorboardX)")
    wandb: bool = param(False, "C", "also log to Weights & Biases (needs wandb); WANDB_MODE=offline sends nothing")
    trackio: bool = param(False, "C", "also log to Trackio (needs trackio); `trackio show` draws its curves")
    project: str = param("resmol", "C", "the project of Weights & Biases and Trackio", min_length=1)


UNBOUND = {"data.stage": None, "data.recut": False, "data.seq_len_warmup_steps": 0}  # a run is what it was without them
_SIZES = {"data.seq_len": DataConfig().seq_len, "batch.micro_batch_size": BatchConfig().micro_batch_size}


class RunConfig(StrictModel):
    """All of it. Every default is stated above; presets state every value that matters, with its source."""

    name: str = Field("custom", description="what the user called it", json_schema_extra={"drift": "C"})
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    parallel: ParallelConfig = ParallelConfig()
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
                f"batch.micro_batch_size x data.seq_len ({micro_tokens}); "
                f"--set {WINDOWS_PER_STEP}={max(1, self.batch.global_batch_tokens // self.data.seq_len)} makes them fit"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def __repr__(self) -> str:
        shape = f"{counted(self.model.num_hidden_layers, 'layer')} of width {self.model.hidden_size}"
        length = f"{counted(self.batch.global_batch_tokens, 'token')} a step, {counted(self.train.steps, 'step')}"
        return f"RunConfig({self.name}: {shape}, {length})"

    __str__ = __repr__

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes in an optimizer step, over all processes."""
        return self.batch.global_batch_tokens // (self.batch.micro_batch_size * self.data.seq_len)

    @property
    def fingerprint_steps(self) -> int:
        """Steps in which fingerprints cover weights and moments once.

        What a part costs follows the parameters, and a step's work parameters x tokens: so their ratio stays the same.
        """
        return self.train.fingerprint_steps or math.ceil(FINGERPRINTED_TOKENS / self.batch.global_batch_tokens)

    @property
    def windows_per_step(self) -> int:
        """Windows of ``data.seq_len`` tokens in an optimizer step, over all processes."""
        return self.batch.global_batch_tokens // self.data.seq_len

    @classmethod
    def parse(cls, table: Mapping[str, Any], origin: str, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """Return the configuration that a table states.

        Args:
            table: Sections, or values by their keys.
            origin: Where it comes from.
            changes: Values to lay over it, named ``section.key``; `WINDOWS_PER_STEP` is one of them.

        Raises:
            ConfigError: The values do not make a configuration; all problems are listed.
        """
        whole = with_changes(table, changes or {}, _SIZES)
        try:
            return cls.model_validate_json(json.dumps(whole, default=str))
        except ValidationError as error:
            raise invalid(error, origin, [*drift_classes(), *cls.model_fields]) from None

    def replace(self, changes: Mapping[str, Any]) -> RunConfig:
        """Return a copy with other values, named ``section.key``.

        Raises:
            ConfigError: There is no such key, or the values do not make a configuration.
        """
        return RunConfig.parse(self.model_dump(mode="json", exclude_none=True), "with changed values", changes)

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML text."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def sha256(self) -> str:
        """The identity of the configuration: the digest of `bound_fields` as sorted JSON."""
        return hashlib.sha256(json.dumps(self.bound_fields(), sort_keys=True).encode()).hexdigest()

    def bound_fields(self) -> dict[str, Any]:
        """Return ``section.key`` -> value of what the numbers depend on: the fields of drift class A and B."""
        classes = drift_classes()
        fields = {key: value for key, value in flatten(self).items() if classes[key] != "C"}
        return {key: value for key, value in fields.items() if UNBOUND.get(key, ...) != value}


def field_declarations() -> dict[str, FieldInfo]:
    """Return ``section.key`` -> its declaration, for every field there is."""
    fields: dict[str, FieldInfo] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= {f"{section}.{key}": inner for key, inner in kind.model_fields.items()}
        else:
            fields[section] = field
    return fields


def drift_classes() -> dict[str, DriftClass]:
    """Return ``section.key`` -> drift class, for every field there is."""
    return {key: field.json_schema_extra["drift"] for key, field in field_declarations().items()}  # type: ignore[index, misc]


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return ``section.key`` -> value."""
    return dotted(config.model_dump(mode="json"))
