"""What MODEL names: a run, a checkpoint, a Hugging Face folder, a GGUF file, a Hub id, a package or a configuration.

Every command resolves MODEL here, once and without PyTorch. `inspect` shows the result, `load` reads the weights, and
evaluation, export and the demo take the run of a checkpoint from it.

Nothing from outside is executed, and nothing is believed before it is checked: configuration, names, shapes and types
here, before a weight is read; every number when it is read.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from resmol.config.load import load_config, load_preset, preset_names
from resmol.config.model_config import (
    ModelConfig,
    end_token_ids,
    parse_hf_config,
    read_hf_table,
    read_model_config,
)
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer_files import (
    SMOLLM2_HUB_ID,
    SMOLLM2_HUB_REVISION,
    SMOLLM2_WHEEL,
    SMOLLM2_WHEEL_MEMBER_SHA256,
)
from resmol.errors import DataError, NetworkError
from resmol.interop.generation_config import text_ends
from resmol.interop.gguf_header import GGUFHeader, is_gguf
from resmol.interop.gguf_names import gguf_config, gguf_ends, gguf_notes, gguf_tensor_infos
from resmol.interop.gguf_parts import gguf_of_folder, part_names, read_gguf
from resmol.interop.hf_folder import INDEX, WEIGHTS, WeightFiles, find_weights
from resmol.interop.hub_repository import (
    HUB_FILES,
    TOKENIZER_FILES,
    WRONG_NAME,
    downloaded,
    only_gguf_of,
    refuse_local,
)
from resmol.interop.model_ref import ModelRef, checkpoint_of_run, weights_of_checkpoint
from resmol.interop.pypi_weights import pypi_weights
from resmol.run.checkpoint_manifest import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    Checkpoint,
    list_checkpoints,
    open_checkpoint,
)
from resmol.run.directory import RunDir
from resmol.system.atomic_io import file_sha256
from resmol.system.hub_download import hub_file, hub_names, hub_tensors, is_hub_id
from resmol.system.locks import kept_while_read
from resmol.system.safetensors_header import TensorInfo, read_header
from resmol.system.user_paths import user_path

logger = logging.getLogger(__name__)

PYPI = "pypi"
ADAPTER = "adapter_config.json"
FILE_ENDINGS = (".json", ".toml", ".safetensors", ".gguf")  # of a name that was meant for a file, not for the Hub

SourceKind = Literal["preset", "config", "run", "checkpoint", "huggingface", "gguf", "safetensors", "hub", "pypi"]


@dataclass(frozen=True)
class Source:
    """A model that was found; none of its numbers were read.

    Attributes:
        kind: What was found. A run that has a checkpoint is its newest checkpoint; "run" is one that has none yet.
        path: The file or folder; of a model on the Hub that is not downloaded, its id.
        config: The architecture; None where only a weight file is known.
        weights: Headers of the weights; None where there are no weights, or the Hub did not give their headers.
        sha256: Of a checkpoint's manifest, of the weight file, or of the list of the shards' sha256; empty where the
            weights were not hashed.
        checkpoint: The checkpoint, with its manifest and state.
        averaged: Whether ``weights`` are the averaged ones of the checkpoint.
        run: The run that the checkpoint belongs to, or that has none yet.
        settings: The configuration of the run or of the preset.
        ends: The tokens that end a text, where the files beside the weights name them; None for `config`'s.
        notes: Sentences for a person.
    """

    kind: SourceKind
    path: Path
    config: ModelConfig | None = None
    weights: WeightFiles | GGUFHeader | None = None
    sha256: str = ""
    checkpoint: Checkpoint | None = None
    averaged: bool = False
    run: RunDir | None = None
    settings: RunConfig | None = None
    ends: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def trained_here(self) -> bool:
        """Whether resmol's own training made the weights."""
        return self.checkpoint is not None

    @property
    def step(self) -> int | None:
        """The optimizer step of a checkpoint; None for other weights."""
        return None if self.checkpoint is None else self.checkpoint.state.step

    @property
    def tensors(self) -> Mapping[str, TensorInfo] | None:
        """Dtype and shape of each tensor by Hugging Face's name, where headers are known."""
        if isinstance(self.weights, GGUFHeader):
            return gguf_tensor_infos(self.weights)
        return None if self.weights is None else self.weights.tensors

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies the weights, as a JSON object."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "sha256": self.sha256,
            "trained_here": self.trained_here,
            "step": self.step,
            "weights": None if self.checkpoint is None else "averaged" if self.averaged else "last",
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """Return a line that identifies the weights."""
        step = "" if self.step is None else f", step {self.step}"
        average = ", averaged weights" if self.averaged else ""
        return f"model: {self.kind} {self.path}{step}{average}, sha256 {self.sha256[:16]}"


def resolve(source: str | Path | ModelRef, *, headers_only: bool = False, hold: ExitStack | None = None) -> Source:
    """Find what ``source`` names.

    Args:
        source: A path, a Hub id, ``pypi``, or the name of a preset; an existing path takes precedence. A `ModelRef`
            also says which weights of a run.
        headers_only: Read configurations and headers, no weights. Otherwise the weights are made ready to be read: a
            checkpoint is verified against its manifest, of a run the newest checkpoint that passes is taken, other
            weights are hashed, and a model on the Hub is downloaded.
        hold: Keeps a checkpoint where it is until this is closed, also in a run that is being trained.

    Raises:
        CheckpointError: A checkpoint, an index or a header is damaged, or the weights are a pickle.
        ConfigError: The configuration describes a model that resmol does not implement.
        DataError: There is nothing of that name, or not the weights that are asked for; `NetworkError` when it could
            not be downloaded.
        UsageError: The source offers no choice of weights, and one is made.
    """
    ref = ModelRef.of(source)
    path, name = user_path(ref.source), str(ref)
    if path.is_dir():
        with ExitStack() as own:
            return _folder(path, ref, headers_only, own if hold is None else hold)
    ref.require_no_choice()
    if path.exists():
        return _file(path, headers_only)
    if name == PYPI:
        return _pypi()
    if name in preset_names():
        return _settings("preset", path, load_preset(name))
    if is_hub_id(name) and not name.endswith(FILE_ENDINGS):
        refuse_local(path, name)
        return _hub(name, headers_only)
    near = difflib.get_close_matches(name, preset_names(), n=1)
    raise DataError(
        f"there is no model {name}" + (f"; did you mean the preset {near[0]}?" if near else ""),
        fix="name a run, a checkpoint, a Hugging Face folder, a GGUF file, a Hub id like owner/name, or pypi; "
        "`resmol inspect` also takes a preset, a configuration or a safetensors file",
    )


def _folder(path: Path, ref: ModelRef, headers_only: bool, hold: ExitStack) -> Source:
    if RunDir(path).exists():
        return _run(RunDir(path), ref, headers_only, hold)
    # Without its manifest a checkpoint would look like a Hugging Face folder; it must not pass as one.
    if (path / STATE).exists() or (path / OPTIMIZER).exists():
        ref.require_not_best()
        with suppress(FileNotFoundError):  # of the manifest, which `open_checkpoint` reports
            hold.enter_context(kept_while_read(path / MANIFEST))
        checkpoint = open_checkpoint(path)
        if not headers_only:
            checkpoint.verify()
        checkpoint.warn_of_foreign_files()
        return _checkpoint(checkpoint, ref)
    ref.require_no_choice()
    if not _has_safetensors(path) and (file := gguf_of_folder(path)) is not None:
        return _gguf("gguf", file, headers_only)
    return _huggingface("huggingface", path, headers_only)


def _file(path: Path, headers_only: bool) -> Source:
    if path.suffix == ".json":
        return Source("config", path, read_model_config(path))
    if path.suffix == ".toml":
        return _settings("config", path, load_config(path))
    if path.is_file() and is_gguf(path):
        return _gguf("gguf", path, headers_only)
    return Source("safetensors", path, weights=WeightFiles((path,), read_header(path).tensors))


def _settings(kind: Literal["preset", "config", "run"], path: Path, settings: RunConfig) -> Source:
    return Source(kind, path, settings.model, settings=settings)


# --- runs and checkpoints ------------------------------------------------------------------------------------


def _run(run: RunDir, ref: ModelRef, headers_only: bool, hold: ExitStack) -> Source:
    run.require()
    if not list_checkpoints(run.checkpoints):
        found = _settings("run", run.path, run.load_config())
        return replace(found, run=run, notes=("the run has no checkpoint yet",))
    checkpoint, skipped, notes = checkpoint_of_run(run, ref, verify=not headers_only, hold=hold)
    for item in skipped:
        logger.info(f"skipped {item.path.name}: {item.reason}")
    return _checkpoint(checkpoint, ref, notes)


def _checkpoint(checkpoint: Checkpoint, ref: ModelRef, notes: tuple[str, ...] = ()) -> Source:
    path = checkpoint.path
    run = _run_of(path)
    place = () if run is None else (f"step {checkpoint.state.step} of the run {run.path.name}",)
    return Source(
        "checkpoint",
        path,
        read_model_config(path),
        weights_of_checkpoint(checkpoint, ref),
        checkpoint.manifest.sha256,
        checkpoint=checkpoint,
        averaged=ref.weights == "averaged",
        run=run,
        settings=None if run is None else run.load_config(),
        notes=(*place, *notes),
    )


def _run_of(checkpoint: Path) -> RunDir | None:
    """Return the run that a checkpoint lies in, or None where it was moved out of its run."""
    folder = checkpoint.resolve().parent
    run = RunDir(folder.parent)
    return run if run.exists() and run.checkpoints == folder else None


# --- other formats -------------------------------------------------------------------------------------------


def _huggingface(kind: Literal["huggingface", "hub"], path: Path, headers_only: bool) -> Source:
    _refuse_adapter(path, (file.name for file in path.iterdir()))
    has_weights = _has_safetensors(path)
    if has_weights and not (path / "config.json").exists():
        return Source("safetensors", path, weights=find_weights(path), notes=("the folder has no config.json",))
    table = read_hf_table(path / "config.json")
    ends = text_ends(path, table)
    if not end_token_ids(table) and ends:  # generation_config.json alone names one
        table["eos_token_id"] = list(ends)
    config = parse_hf_config(table, str(path / "config.json"))
    if not has_weights and headers_only:
        return Source("config", path, config, notes=("the folder holds no safetensors file",))
    weights = find_weights(path)
    notes = () if ends else ("its files name no token that ends a text, so only the limit of tokens does",)
    for note in notes:
        logger.info(f"{path}: {note}")
    return Source(kind, path, config, weights, "" if headers_only else _digest(weights.files), ends=ends, notes=notes)


def _refuse_adapter(origin: str | Path, names: Iterable[str]) -> None:
    """Refuse a folder with an adapter, which transformers adds to the weights that the adapter names."""
    if ADAPTER in names:
        raise DataError(
            f"{origin} holds a PEFT adapter ({ADAPTER}), which is not implemented",
            fix="merge it into its base model (PEFT: merge_and_unload) and save that; if these weights are merged "
            f"already, move {ADAPTER} out of the folder",
        )


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WEIGHTS, INDEX))


def _digest(files: tuple[Path, ...]) -> str:
    digests = [file_sha256(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{value}  {path.name}\n" for value, path in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _gguf(kind: Literal["gguf", "hub"], path: Path, headers_only: bool) -> Source:
    header = read_gguf(path)
    types = ", ".join(sorted({tensor.kind for tensor in header.tensors.values()}))
    assumed = gguf_notes(header)
    for note in assumed if not headers_only else ():  # where the headers are all that is wanted, notes are shown
        logger.warning(f"{path.name}: {note}")
    return Source(
        kind,
        path,
        gguf_config(header, str(path)),
        header,
        "" if headers_only else _digest(header.files),
        ends=gguf_ends(header),
        notes=(f"{types}; loading dequantizes it to float32", *assumed),
    )


def _pypi() -> Source:
    found = _gguf("gguf", pypi_weights(), headers_only=True)  # whose hash is known
    origin = f"SmolLM2-135M-Instruct of the package {SMOLLM2_WHEEL}, for verification only"
    return replace(found, kind="pypi", sha256=SMOLLM2_WHEEL_MEMBER_SHA256, notes=(origin, *found.notes))


# --- the Hub -------------------------------------------------------------------------------------------------


def _hub(hub_id: str, headers_only: bool) -> Source:
    revision = SMOLLM2_HUB_REVISION if hub_id == SMOLLM2_HUB_ID else None
    names = hub_names(hub_id, revision=revision, fix=WRONG_NAME)
    _refuse_adapter(hub_id, names)
    gguf = only_gguf_of(hub_id, names)
    if gguf is not None and headers_only:
        raise DataError(
            f"{hub_id} keeps its architecture in {gguf}, which is not downloaded to be inspected",
            fix=f"run `hf download {hub_id} {gguf}` and inspect the file",
        )
    if gguf is not None:
        wanted = (*part_names(gguf), *TOKENIZER_FILES)
        return _gguf("hub", downloaded(hub_id, revision, wanted) / gguf, headers_only)
    # A few hundred bytes: another architecture is refused before its weights are downloaded.
    config = read_model_config(hub_file(hub_id, "config.json", revision=revision, fix=WRONG_NAME))
    if not headers_only:
        return _huggingface("hub", downloaded(hub_id, revision, HUB_FILES), headers_only)
    found = Source("hub", Path(hub_id), config)
    try:
        return replace(found, weights=WeightFiles((), hub_tensors(hub_id, revision=revision, fix="try again")))
    except NetworkError as error:
        return replace(found, notes=(f"config.json was not compared with the weights: {error.what}",))
