"""`resmol inspect`: what a configuration or a weight file says about a model, and what it cannot say.

No PyTorch and no weights: a configuration, the header of a weight file (from the Hub: a few kB), arithmetic.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmol.checks import Check
from resmol.config.load import load_config, load_preset, preset_names
from resmol.config.model_config import ModelConfig, read_model_config
from resmol.config.run_config import RunConfig, RuntimeConfig
from resmol.errors import DataError, NetworkError, UsageError
from resmol.interop.gguf_header import is_gguf, only_gguf, read_gguf_header
from resmol.interop.gguf_names import gguf_config
from resmol.interop.hf_folder import INDEX, WEIGHTS, cross_check, find_weights, parse_index
from resmol.interop.inspect.diagram import mermaid
from resmol.interop.inspect.open_questions import (
    LEFT_OPEN,
    OpenQuestion,
    derive,
    left_open_by_weights,
    parameters_by_part,
)
from resmol.model.flops import (
    forward_flops_per_token,
    inference_memory,
    parameter_counts,
    training_flops_per_token,
    training_memory,
)
from resmol.run.checkpoint_manifest import list_checkpoints
from resmol.run.directory import RunDir
from resmol.system.hub_download import is_hub_id
from resmol.system.safetensors_header import TensorInfo, read_header, read_remote_header

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Inspection:
    """All that is known of a model without reading its weights.

    Attributes:
        source: What was asked for.
        kind: preset, config, run, folder, hub, safetensors or gguf.
        config: The architecture; None where only a weight file is known.
        derived: What a weight file alone tells.
        parameters: Parameters by part.
        seq_len: Tokens in a window, for operations and memory.
        batch: Windows in a forward pass, for memory.
        runtime: What else the memory depends on: the run's or the preset's settings, or the defaults of training.
        checks: config.json against the weight file, where both are known.
        open_questions: What all this cannot tell.
        notes: What the reader should know, such as that the weights could not be reached.
    """

    source: str
    kind: str
    config: ModelConfig | None
    derived: dict[str, Any]
    parameters: dict[str, int]
    seq_len: int
    batch: int
    runtime: RuntimeConfig
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
        """Bytes by part, in float32, for ``batch`` windows of ``seq_len``.

        Activation checkpointing that is ``auto`` counts as off: what it becomes depends on the machine that trains.
        """
        if self.config is None:
            return {}
        chunk, recompute = self.runtime.loss_chunk_tokens, self.runtime.activation_checkpointing == "on"
        return {
            "training": training_memory(self.config, self.batch, self.seq_len, chunk, recompute=recompute),
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
                _share_table(f"Memory, {kind}: {_bytes(sum(parts.values()))}", parts, _bytes)
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


def inspect_model(source: str, *, seq_len: int | None = None, batch: int | None = None) -> Inspection:
    """Inspect a model without its weights.

    Args:
        source: A preset, a config.json, a run's config.toml, a run or a folder (its weight headers are
            compared with its configuration), a Hub id (likewise), a safetensors file (its header) or a GGUF
            file.
        seq_len: Tokens in a window; by default the preset's, else 2048 or the longest context.
        batch: Windows in a forward pass; by default the preset's micro-batch, else 1.

    Raises:
        UsageError: ``seq_len`` or ``batch`` is impossible.
        ConfigError: The configuration describes a model that resmol does not implement.
        CheckpointError: A weight file's header breaks a rule, or it is a pickle.
        DataError: There is nothing of that name; `NetworkError` when the Hub cannot be reached.
    """
    found = _find(source)
    longest = found.config.max_position_embeddings if found.config else DEFAULT_SEQ_LEN
    window = seq_len or found.seq_len or min(DEFAULT_SEQ_LEN, longest)
    windows = batch or found.batch or 1
    if not 1 <= window <= longest or windows < 1:
        raise UsageError(
            f"seq_len {window} and batch {windows} do not fit a context of {longest}",
            fix=f"give a seq_len from 1 to {longest}, and a batch of 1 or more",
        )
    config, tensors = found.config, found.tensors or {}
    return Inspection(
        source=source,
        kind=found.kind,
        config=config,
        derived={} if config else derive(tensors),
        parameters=parameter_counts(config) if config else parameters_by_part(tensors),
        seq_len=window,
        batch=windows,
        runtime=found.runtime,
        checks=cross_check(config, tensors) if config and found.tensors is not None else [],
        open_questions=LEFT_OPEN if config else left_open_by_weights(tensors),
        notes=found.notes,
    )


# --- finding ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    kind: str
    config: ModelConfig | None
    tensors: Mapping[str, TensorInfo] | None = None
    seq_len: int | None = None
    batch: int | None = None
    notes: tuple[str, ...] = ()
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def of_run(
        cls,
        kind: str,
        config: RunConfig,
        tensors: Mapping[str, TensorInfo] | None = None,
        notes: tuple[str, ...] = (),
    ) -> _Found:
        length, batch = config.data.seq_len, config.batch.micro_batch_size
        return cls(kind, config.model, tensors, length, batch, notes, config.runtime)


def _find(source: str) -> _Found:
    if source in preset_names():
        return _Found.of_run("preset", load_preset(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _file(path)
    if is_hub_id(source) and not source.endswith((".json", ".toml", ".safetensors", ".gguf")):
        return _hub(source)
    nearest = difflib.get_close_matches(source, preset_names(), n=1)
    raise DataError(
        f"there is no file, folder or preset {source}" + (f"; did you mean {nearest[0]}?" if nearest else ""),
        fix=f"name a config.json, folder, Hub id, .safetensors file or preset: {', '.join(preset_names())}",
    )


def _file(path: Path) -> _Found:
    if path.suffix == ".json":
        return _Found("config", read_model_config(path))
    if path.suffix == ".toml":
        return _Found.of_run("config", load_config(path))
    if is_gguf(path):
        return _Found("gguf", gguf_config(read_gguf_header(path), str(path)))
    return _Found("safetensors", None, read_header(path).tensors)


def _folder(path: Path) -> _Found:
    run = RunDir(path)
    if run.exists():
        saved = list_checkpoints(run.checkpoints)
        tensors = find_weights(saved[0]).tensors if saved else None
        notes = (f"compared with {saved[0].name}" if saved else "the run has no checkpoint yet",)
        return _Found.of_run("run", run.load_config(), tensors, notes)
    if (gguf := only_gguf(path)) is not None:
        return _file(gguf)
    config_file, has_weights = path / "config.json", any((path / name).exists() for name in (WEIGHTS, INDEX))
    if not config_file.exists() and has_weights:
        return _Found("safetensors", None, find_weights(path).tensors, notes=("the folder has no config.json",))
    return _Found("folder", read_model_config(path), find_weights(path).tensors if has_weights else None)


def _hub(hub_id: str) -> _Found:
    config = read_model_config(hub_id)
    try:
        return _Found("hub", config, _remote_tensors(hub_id))
    except NetworkError as error:
        return _Found("hub", config, notes=(f"config.json was not compared with the weights: {error.what}",))


def _remote_tensors(hub_id: str) -> dict[str, TensorInfo]:
    """Read the headers of a Hub model's weight files by HTTP range: one file, or the shards of an index."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    try:
        return read_remote_header(hf_hub_url(hub_id, WEIGHTS)).tensors
    except NetworkError as error:
        try:
            index = Path(hf_hub_download(hub_id, INDEX, etag_timeout=5))
        except Exception:  # the client raises many kinds; then the first error is the one to tell
            raise error from None
    names = sorted(set(parse_index(index.read_bytes(), f"{hub_id}/{INDEX}").values()))
    headers = [read_remote_header(hf_hub_url(hub_id, name)) for name in names]
    return {name: info for header in headers for name, info in header.tensors.items()}


# --- showing ---------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, width=80, header_style="", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _architecture_table(inspection: Inspection) -> Table:
    if inspection.config is None:
        table = _table("What the weight file tells", "field", "value")
        for name, value in inspection.derived.items():
            table.add_row(name, _text(value))
        return table
    table = _table("Architecture", "field", "value", "meaning")
    for name, info in ModelConfig.model_fields.items():
        table.add_row(name, _text(getattr(inspection.config, name)), info.description)
    return table


def _share_table(title: str, parts: Mapping[str, int], show: Callable[[int], str]) -> Table:
    total = sum(parts.values()) or 1
    table = _table(title, "part", "amount", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, amount in parts.items():
        table.add_row(part, show(amount), f"{100 * amount / total:.1f} %")
    return table


def _flops_table(inspection: Inspection) -> Table:
    title = f"Operations for one token, at {inspection.seq_len} tokens in a window"
    table = _table(title, "pass", "floating-point operations")
    for kind, flops in inspection.flops_per_token.items():
        table.add_row(kind, f"{flops:,}")
    return table


def _check_table(checks: list[Check]) -> Table:
    table = _table("config.json against the weight file", "check", "verdict", "found", "expected")
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        table.add_row(check.name, verdict, escape(check.measured), escape(check.expected))
    return table


def _question_table(questions: tuple[OpenQuestion, ...]) -> Table:
    table = _table("Not determined by configuration, names and shapes", "question", "what settles it")
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
