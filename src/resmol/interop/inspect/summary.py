"""`resmol inspect`: what configuration and headers of weight files determine about a model, and what they leave open.

No PyTorch and no weights: a configuration, the headers of the weight files (from the Hub: a few kB), arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.config.runtime_config import RuntimeConfig
from resmol.errors import UsageError
from resmol.interop.gguf_header import GGUFHeader, readable_types
from resmol.interop.hf_folder import WEIGHT_DTYPES, cross_check
from resmol.interop.inspect.diagram import mermaid
from resmol.interop.inspect.open_questions import (
    LEFT_OPEN,
    OpenQuestion,
    derive,
    left_open_by_weights,
    parameters_by_part,
)
from resmol.interop.model_ref import ModelRef
from resmol.interop.resolve import Source, SourceKind, resolve
from resmol.model.flops import (
    forward_flops_per_token,
    inference_memory,
    parameter_counts,
    training_flops_per_token,
    training_memory,
)
from resmol.system.tables import text_table

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Inspection:
    """All that is known of a model without reading its weights.

    Attributes:
        source: What was asked for.
        kind: What was found; see `resolve.Source`.
        config: The architecture; None where only a weight file is known.
        derived: What the weight files alone determine.
        parameters: Parameters by part.
        seq_len: Tokens in a window, for operations and memory.
        batch: Windows in a forward pass, for memory.
        shards: Devices that share weights, gradients and moments in training.
        runtime: What else the memory depends on: the run's or the preset's settings, or the defaults of training.
        averaging: Whether training keeps averaged weights as well.
        checks: config.json against the weight file, where both are known.
        open_questions: What all this does not determine.
        notes: Sentences for a person, such as that the Hub did not give the headers.
    """

    source: str
    kind: SourceKind
    config: ModelConfig | None
    derived: dict[str, Any]
    parameters: dict[str, int]
    seq_len: int
    batch: int
    shards: int
    runtime: RuntimeConfig
    averaging: bool
    checks: list[Check]
    open_questions: tuple[OpenQuestion, ...]
    notes: tuple[str, ...] = ()

    @property
    def flops_per_token(self) -> dict[str, int]:
        """Floating-point operations for one token of a window of ``seq_len``."""
        if self.config is None:
            return {}
        return {
            "forward": forward_flops_per_token(self.config, self.seq_len),
            "training": training_flops_per_token(self.config, self.seq_len),
        }

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by part on each device, in float32, for ``batch`` windows of ``seq_len``.

        Activation checkpointing that is ``auto`` counts as off: what it becomes depends on the machine that trains.
        """
        if self.config is None:
            return {}
        chunk, recompute = self.runtime.loss_chunk_tokens, self.runtime.activation_checkpointing == "on"
        return {
            "training": training_memory(
                self.config,
                self.batch,
                self.seq_len,
                chunk,
                activation_checkpointing=recompute,
                averaging=self.averaging,
                shards=self.shards,
            ),
            "inference": inference_memory(self.config, self.batch, self.seq_len),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that ``--json`` prints."""
        memory = {kind: parts | {"total": sum(parts.values())} for kind, parts in self.memory.items()}
        return {
            "source": self.source,
            "kind": self.kind,
            "architecture": self.config.model_dump() | {"head_dim": self.config.head_dim} if self.config else None,
            "derived": self.derived,
            "parameters": self.parameters | {"total": sum(self.parameters.values())},
            "seq_len": self.seq_len,
            "batch": self.batch,
            "shards": self.shards,
            "loss_chunk_tokens": self.runtime.loss_chunk_tokens,
            "activation_checkpointing": self.runtime.activation_checkpointing,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": memory,
            "checks": [check.to_dict() for check in self.checks],
            "open_questions": [vars(question) for question in self.open_questions],
            "notes": list(self.notes),
            "mermaid": mermaid(self.config) if self.config else None,
        }

    def render(self, console: Console) -> None:
        """Print tables that fit 80 columns, and the diagram."""
        console.print(f"{self.source} ({self.kind})", markup=False, highlight=False)
        for table in (
            _architecture_table(self),
            _share_table(f"Parameters: {sum(self.parameters.values()):,}", self.parameters, "{:,}".format),
            *(
                _share_table(f"Memory, {kind}{self._place(kind)}: {_bytes(sum(parts.values()))}", parts, _bytes)
                for kind, parts in self.memory.items()
            ),
            _flops_table(self),
            _check_table(self.checks),
            _question_table(self.open_questions),
        ):
            if table.row_count:
                console.print()
                console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        if self.config is not None:
            console.print("\nDiagram (mermaid):", mermaid(self.config), sep="\n", markup=False, soft_wrap=True)

    def _place(self, kind: str) -> str:
        return f" on each of {self.shards} devices" if kind == "training" and self.shards > 1 else ""


def inspect_model(
    source: str | ModelRef, *, seq_len: int | None = None, batch: int | None = None, shards: int = 1
) -> Inspection:
    """Inspect a model without its weights.

    Args:
        source: Whatever `resolve` takes: MODEL, a preset, a config.json or config.toml, or a safetensors file.
        seq_len: Tokens in a window; by default the run's or the preset's, else 2048 or the longest context.
        batch: Windows in a forward pass; by default the micro-batch of the run or the preset, else 1.
        shards: Devices that share weights, gradients and moments in training.

    Raises:
        UsageError: ``seq_len`` or ``batch`` is impossible.
        ConfigError: The configuration describes a model that resmol does not implement.
        CheckpointError: A weight file's header breaks a rule, or it is a pickle.
        DataError: There is nothing of that name; `NetworkError` when the Hub cannot be reached.
    """
    found = resolve(source, headers_only=True)
    config, tensors, settings = found.config, found.tensors, found.settings
    longest = config.max_position_embeddings if config else DEFAULT_SEQ_LEN
    window = seq_len or (settings.data.seq_len if settings else min(DEFAULT_SEQ_LEN, longest))
    windows = batch or (settings.batch.micro_batch_size if settings else 1)
    if not 1 <= window <= longest or windows < 1:
        raise UsageError(
            f"seq_len {window} and batch {windows} do not fit a context of {longest}",
            fix=f"give a seq_len from 1 to {longest}, and a batch of 1 or more",
        )
    return Inspection(
        source=str(source),
        kind=found.kind,
        config=config,
        derived={} if config else derive(tensors or {}),
        parameters=parameter_counts(config) if config else parameters_by_part(tensors or {}),
        seq_len=window,
        batch=windows,
        shards=shards,
        runtime=settings.runtime if settings else RuntimeConfig(),
        averaging=settings is not None and settings.averaging.fraction > 0,
        checks=_checks(found),
        open_questions=LEFT_OPEN if config else left_open_by_weights(tensors or {}),
        notes=found.notes,
    )


def _checks(found: Source) -> list[Check]:
    if found.config is None or found.tensors is None:
        return []
    gguf = isinstance(found.weights, GGUFHeader)
    types = [name for name, _, _ in readable_types().values()] if gguf else WEIGHT_DTYPES
    return cross_check(found.config, found.tensors, types)


# --- showing ---------------------------------------------------------------------------------------------


def _architecture_table(inspection: Inspection) -> Table:
    if inspection.config is None:
        table = text_table("What the weight file determines", "field", "value")
        for name, value in inspection.derived.items():
            table.add_row(name, _text(value))
        return table
    table = text_table("Architecture", "field", "value", "meaning")
    for name, info in ModelConfig.model_fields.items():
        table.add_row(name, _text(getattr(inspection.config, name)), info.description)
    return table


def _share_table(title: str, parts: Mapping[str, int], show: Callable[[int], str]) -> Table:
    total = sum(parts.values()) or 1
    table = text_table(title, "part", "amount", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, amount in parts.items():
        table.add_row(part, show(amount), f"{100 * amount / total:.1f} %")
    return table


def _flops_table(inspection: Inspection) -> Table:
    title = f"Operations for one token, at {inspection.seq_len} tokens in a window"
    table = text_table(title, "pass", "floating-point operations")
    for kind, flops in inspection.flops_per_token.items():
        table.add_row(kind, f"{flops:,}")
    return table


def _check_table(checks: list[Check]) -> Table:
    table = text_table("Configuration against the weight file", "check", "verdict", "found", "expected")
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        table.add_row(check.name, verdict, escape(check.measured), escape(check.expected))
    return table


def _question_table(questions: tuple[OpenQuestion, ...]) -> Table:
    table = text_table("Not determined by configuration, names and shapes", "question", "what settles it")
    for question in questions:
        table.add_row(question.what, question.experiment)
    return table


def _text(value: object) -> str:
    """Show a value; brackets from outside are not markup."""
    text = f"{value:,}" if type(value) is int else "unknown" if value is None else str(value)
    return escape(text)


def _bytes(count: int) -> str:
    """Show bytes in units of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
