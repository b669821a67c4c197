"""An export is the checkpoint that it names, whatever its own manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TrainTiny

from resmol.checks import Check
from resmol.interop.description import Description
from resmol.interop.export.exported_tokenizer import exported_tokenizer
from resmol.interop.export.gguf import write_gguf
from resmol.interop.export.hf import commit_export, export_facts, write_folder
from resmol.interop.export.manifest import build_manifest, parse_manifest
from resmol.interop.export.replayed import check_export
from resmol.interop.load import load_model
from resmol.run.directory import RunDir

COMPARED = Check("compared", True, "elsewhere", "")  # with transformers, which takes seconds; not what is tested here


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported") / "run"


@pytest.fixture
def run(trained: Path, train_tiny: TrainTiny) -> RunDir:
    if not trained.exists():
        train_tiny(trained, 10)
    return RunDir(trained)


def exported(run: RunDir, out: Path, dtype: str, *, gguf: bool = False) -> Path:
    loaded = load_model(run.path, device="cpu")

    def write_files(folder: Path) -> list[Check]:
        tokenizer = exported_tokenizer(loaded)
        if gguf:
            write_gguf(folder / "m.gguf", loaded.model, tokenizer, dtype, Description("m", ("en",), None))
        else:
            write_folder(loaded, tokenizer, folder, dtype)
        return [COMPARED]

    return commit_export(out, "gguf" if gguf else "model", export_facts(loaded, dtype), write_files).path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "plain"


@pytest.fixture
def plain(run: RunDir, out: Path) -> Path:
    """An export in float32, not to be changed."""
    return out if out.exists() else exported(run, out, "float32")


def with_manifest(folder: Path, change: Callable[[Path], None], **facts: Any) -> None:
    """Change an export and write its manifest anew, as a forger would."""
    change(folder)
    old = parse_manifest((folder / "manifest.json").read_bytes())
    assert old is not None
    model = {**old.facts["model"], **facts}
    manifest = build_manifest(folder, old.kind, [COMPARED], {**old.facts, "model": model})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


@pytest.mark.parametrize(("dtype", "gguf"), [("float32", False), ("bfloat16", False), ("float16", True)])
def test_an_honest_export(run: RunDir, tmp_path: Path, dtype: str, gguf: bool) -> None:
    check = check_export(exported(run, tmp_path / "out", dtype, gguf=gguf), run, strict=True)
    assert check.passed, check
    assert f"tensors of step-00000010 as {dtype}" in check.measured


def _weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = json.dumps(config).replace("100000.0", "10000.0")
    (folder / "config.json").write_text(changed, encoding="utf-8")


def _tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def _ledger(folder: Path) -> None:
    path = folder / "training" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss":', b'"lose":', 1))


FORGERIES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "weight": (_weight, {}, "FAIL: model.norm.weight holds other numbers than step-00000010"),
    "theta": (_theta, {}, "FAIL: its rope_theta is 10000.0 and not 100000.0"),
    "tokenizer": (_tokenizer, {}, "FAIL: tokenizer.json is another one than"),
    "ledger": (_ledger, {}, "FAIL: training/ledger.jsonl is another ledger than"),
    "other run": (lambda _: None, {"sha256": "0" * 64}, "FAIL: it names a step-00000010 with manifest 00000000"),
    "from elsewhere": (lambda _: None, {"trained_here": False}, "FAIL: it was not made from a checkpoint of a run"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_changed_export_with_a_manifest_that_fits(run: RunDir, plain: Path, tmp_path: Path, name: str) -> None:
    change, facts, words = FORGERIES[name]
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    with_manifest(folder, change, **facts)
    check = check_export(folder, run)
    assert (check.passed, check.measured[: len(words)]) == (False, words)


def test_what_cannot_be_judged(run: RunDir, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    check = check_export(folder, RunDir(tmp_path / "run"))
    assert check.measured == "UNSUPPORTED: it was made from step-00000010, which the run does not keep any more"
    _weight(folder)
    assert "was changed after it was verified" in check_export(folder, run).measured
