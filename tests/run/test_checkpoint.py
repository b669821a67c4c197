"""A checkpoint is whole or not there, and whatever is wrong with one is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TrainTiny

from resmol.config.run_config import RunConfig
from resmol.errors import CheckpointError
from resmol.model.llama import CausalLM
from resmol.run import checkpoint as module
from resmol.run import checkpoint_manifest as manifest_module
from resmol.run.checkpoint import (
    CheckpointTensors,
    commit_checkpoint,
    stage_checkpoint,
)
from resmol.run.checkpoint_load import load_into
from resmol.run.checkpoint_manifest import (
    Manifest,
    SavedState,
    file_entry,
    list_checkpoints,
    newest_valid,
    open_checkpoint,
    read_manifest,
)
from resmol.run.retention import prune
from resmol.system.locks import kept_while_read, unless_being_read
from resmol.train.optimizer import build_optimizer
from resmol.train.step import TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def good(folder: Path, train_tiny: TrainTiny, tmp_path: Path) -> Path:
    """A checkpoints directory with steps 5 and 10, a copy for each test."""
    if not (folder / "run").exists():
        train_tiny(folder / "run", 10)
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder / "run" / "checkpoints", copy)
    return copy


def fresh(config: RunConfig) -> tuple[CausalLM, torch.optim.AdamW]:
    model = CausalLM(config.model)
    return model, build_optimizer(model, config.optimizer, config.batch.global_batch_tokens)


def restore(path: Path, config: RunConfig) -> TrainState:
    model, optimizer = fresh(config)
    load_into(open_checkpoint(path), model, optimizer)
    return TrainState(model, optimizer)


def rehash(path: Path) -> None:
    """Write a manifest that fits the (changed) files: only the content checks are left to object."""
    old = read_manifest(path)
    files = {}
    for name in old.files:
        tensors = module.digest_all(load_file(path / name)) if name.endswith(".safetensors") else {}
        files[name] = file_entry(path / name, tensors)
    manifest = Manifest(step=old.step, parent=old.parent, permanent=old.permanent, files=files)
    (path / "manifest.json").write_bytes(manifest.to_bytes())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_was_loaded_does_not_depend_on_the_file(good: Path, tiny_config: RunConfig) -> None:
    state = restore(good / "step-00000010", tiny_config)
    assert state.model.lm_head.weight.isfinite().all()
    assert str(good) not in Path("/proc/self/maps").read_text()


def test_round_trip_is_bitwise(good: Path, tiny_config: RunConfig, tmp_path: Path) -> None:
    state = restore(good / "step-00000010", tiny_config)
    opened = open_checkpoint(good / "step-00000010")
    manifest = commit_checkpoint(
        stage_checkpoint(tmp_path, opened.state, CheckpointTensors.of(state.model, state.optimizer), parent=None)
    )
    assert manifest.files == opened.manifest.files
    assert opened.manifest.parent == read_manifest(good / "step-00000005").sha256


def test_the_weight_file_is_what_transformers_expects(good: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(good / "step-00000010")
    weights = load_file(good / "step-00000010" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_no_pickle_and_nothing_half_precision(good: Path) -> None:
    for path in good.glob("step-*/*.safetensors"):
        assert path.read_bytes()[8:9] == b"{"
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_any_flipped_bit_is_found_and_the_older_one_is_used(good: Path) -> None:
    draw = random.Random(7)
    files = sorted((good / "step-00000010").iterdir())
    for _ in range(150):
        victim = draw.choice(files)
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        original = victim.read_bytes()
        victim.write_bytes(content)
        with pytest.raises(CheckpointError, match=victim.name):
            open_checkpoint(good / "step-00000010").verify()
        assert newest_valid(good, {})[0].path.name == "step-00000005"
        victim.write_bytes(original)
    assert newest_valid(good, {})[0].path.name == "step-00000010"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"]
)
def test_truncation_growth_zeros_absence(good: Path, name: str) -> None:
    victim = good / "step-00000010" / name
    content = victim.read_bytes()
    cuts = {0, 1, 8, len(content) // 2, len(content) - 1}
    for changed in [*(content[:cut] for cut in cuts), content + b"\0", bytes(len(content))]:
        victim.write_bytes(changed)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            open_checkpoint(good / "step-00000010").verify()
    victim.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(good / "step-00000010").verify()


def _swap_everything(good: Path) -> None:
    (good / "step-00000005").rename(good / "step-00000099")


def _swap_one_file(good: Path) -> None:
    shutil.copy(good / "step-00000005" / "model.safetensors", good / "step-00000010" / "model.safetensors")


def _link_a_file(good: Path) -> None:
    victim = good / "step-00000010" / "model.safetensors"
    victim.rename(good / "elsewhere")
    victim.symlink_to(good / "elsewhere")


@pytest.mark.parametrize("change", [_swap_everything, _swap_one_file, _link_a_file])
def test_exchanged_files(good: Path, change: Callable[[Path], None]) -> None:
    change(good)
    newest = list_checkpoints(good)[0]
    with pytest.raises(CheckpointError):
        open_checkpoint(newest).verify()


def test_a_checkpoint_that_the_ledger_does_not_know_in_this_form(good: Path) -> None:
    found, skipped = newest_valid(good, {"step-00000010": "0" * 64})
    assert found.path.name == "step-00000005"
    assert "ledger" in skipped[0].reason


def test_nan_in_every_tensor_once(good: Path, tiny_config: RunConfig) -> None:
    path = good / "step-00000010"
    for file in ("model.safetensors", "optimizer.safetensors"):
        original = (path / file).read_bytes()
        for name in load_file(path / file):
            tensors = load_file(path / file)
            tensors[name].view(-1)[0] = float("nan")
            save_file(tensors, path / file)
            rehash(path)
            with pytest.raises(CheckpointError, match="NaN"):
                restore(path, tiny_config)
            (path / file).write_bytes(original)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_tensors_of_another_model(good: Path, tiny_config: RunConfig, change: str) -> None:
    path = good / "step-00000010"
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["lm_head.weight"] = torch.zeros(512, 24)
    else:
        tensors[name] = tensors[name].T.contiguous() if change == "shape" else tensors[name].half()
    save_file(tensors, path / "model.safetensors")
    rehash(path)
    with pytest.raises(CheckpointError, match="this model has"):
        restore(path, tiny_config)


def test_a_digest_that_does_not_match_memory(good: Path, tiny_config: RunConfig) -> None:
    path = good / "step-00000010"
    manifest = read_manifest(path).model_dump()
    manifest["files"]["model.safetensors"]["tensors"]["model.norm.weight"] = "0" * 64
    (path / "manifest.json").write_bytes(Manifest.model_validate(manifest).to_bytes())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        restore(path, tiny_config)


def test_a_foreign_file_is_a_warning_and_no_damage(good: Path, messages: list[str]) -> None:
    newest = good / "step-00000010"
    for name in (".DS_Store", "a.txt", "b.txt", "c.txt"):
        (newest / name).write_bytes(b"x")
    found, skipped = newest_valid(good, {})
    assert (found.path, skipped) == (newest, [])
    assert found.foreign_files() == [".DS_Store", "a.txt", "b.txt", "c.txt"]
    assert messages == [
        "step-00000010 also holds .DS_Store, a.txt, b.txt and 1 more, which the manifest does not list: ignored"
    ]


def test_a_checkpoint_of_another_format_is_named_as_such(good: Path) -> None:
    path = good / "step-00000010" / "manifest.json"
    for number in (1, 3):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": number}, indent=1, sort_keys=True))
        with pytest.raises(CheckpointError, match=rf"manifest\.json has format {number}; this version"):
            open_checkpoint(path.parent)


def test_opening_reads_manifest_and_state_and_nothing_else(good: Path) -> None:
    path = good / "step-00000010"
    (path / "model.safetensors").unlink()
    opened = open_checkpoint(path)
    assert (opened.state.step, opened.manifest.step) == (10, 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        opened.verify()


def test_the_newest_can_be_found_by_its_manifest_alone(good: Path) -> None:
    (good / "step-00000010" / "model.safetensors").unlink()
    assert newest_valid(good, {}, verify=False)[0].path.name == "step-00000010"
    assert newest_valid(good, {})[0].path.name == "step-00000005"


def test_only_committed_names_are_looked_at(good: Path) -> None:
    for name in ("tmp-step-00000099-abc", "step-12.bak", "foo-step-99", "step-123", "step-00000099.tmp"):
        shutil.copytree(good / "step-00000010", good / name)
    (good / "step-00000098").symlink_to(good / "step-00000010")
    assert [path.name for path in list_checkpoints(good)] == ["step-00000010", "step-00000005"]


def test_retention(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 30, "checkpoint.keep_last=2", "checkpoint.permanent=[12]")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000012", "step-00000025", "step-00000030"]


def test_nothing_is_pruned_when_the_newest_is_corrupt(good: Path) -> None:
    (good / "step-00000010" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError):
        prune(good, keep_last=1)
    assert len(list_checkpoints(good)) == 2


def test_saving_over_a_corrupt_one_quarantines_it(good: Path, tiny_config: RunConfig) -> None:
    state = restore(good / "step-00000010", tiny_config)
    saved = SavedState(
        step=10,
        tokens_seen=1,
        windows_seen=1,
        config_sha256="",
        data_fingerprint="",
        ledger_head="",
        random_state="",
        permanent=False,
    )
    commit_checkpoint(stage_checkpoint(good, saved, CheckpointTensors.of(state.model, state.optimizer), parent=None))
    assert (good / "corrupt-step-00000010-1" / "manifest.json").exists()
    open_checkpoint(good / "step-00000010").verify()


# --- a reader beside a run that is being trained -----------------------------------------------------------------


def test_what_a_reader_holds_is_pruned_when_it_is_done(good: Path) -> None:
    with ExitStack() as hold:
        assert newest_valid(good, {}, hold=hold)[0].path.name == "step-00000010"
        with unless_being_read(good / "step-00000010" / "manifest.json") as free:
            assert not free
    with unless_being_read(good / "step-00000010" / "manifest.json") as free:
        assert free


def test_retention_passes_over_what_is_being_read(good: Path) -> None:
    with kept_while_read(good / "step-00000005" / "manifest.json"):
        assert prune(good, keep_last=1) == []
    assert prune(good, keep_last=1) == ["step-00000005"]


def test_a_reader_looks_again_when_what_it_listed_is_gone(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both that it knew of are pruned, and a newer one is there, before it opens the first."""
    real, looks = list_checkpoints, []

    def stale(folder: Path) -> list[Path]:
        looks.append(found := real(folder))
        if len(looks) == 1:
            (good / "step-00000010").rename(good / "tmp-a")
            (good / "step-00000005").rename(good / "tmp-b")
        elif len(looks) == 2:
            (good / "tmp-b").rename(good / "step-00000005")
        return found if len(looks) < 2 else real(folder)

    monkeypatch.setattr(manifest_module, "list_checkpoints", stale)
    found, skipped = newest_valid(good, {})
    assert (found.path.name, skipped, len(looks)) == ("step-00000005", [], 2)


def test_one_that_goes_while_it_is_verified_is_not_called_corrupt(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the file system has no locks: the next one is taken, and nothing is reported as skipped."""
    real = manifest_module.file_sha256

    def prune_first(file: Path) -> str:
        if file.parent.name == "step-00000010" and file.exists():
            shutil.rmtree(file.parent, ignore_errors=True)
        return real(file)

    monkeypatch.setattr(manifest_module, "file_sha256", prune_first)
    found, skipped = newest_valid(good, {})
    assert (found.path.name, skipped) == ("step-00000005", [])
