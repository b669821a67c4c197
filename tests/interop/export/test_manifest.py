"""Only a compared export gets a manifest, and the manifest shows every change."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from resmol.checks import Check
from resmol.errors import CheckFailed, DataError
from resmol.interop.export.manifest import build_manifest, parse_manifest, verify_export
from resmol.system.atomic_io import commit_directory

PASSED = Check("logits", True, "equal", "equal")
FAILED = Check("token ids", False, "4 here, 5 there", "equal")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    def write(folder: Path) -> None:
        (folder / "training").mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "training" / "ledger.jsonl").write_text("{}\n")

    out = tmp_path / "out"
    commit_directory(
        out, write, lambda folder: build_manifest(folder, "model", [PASSED], {"dtype": "float32"}).to_bytes()
    )
    return out


def test_a_manifest_lists_every_file_with_its_hash(exported: Path) -> None:
    manifest = verify_export(exported)
    assert {name: file.sha256 for name, file in manifest.files.items()} == {
        name: hashlib.sha256((exported / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "training/ledger.jsonl")
    }
    assert [(check.name, check.measured) for check in manifest.checks] == [("logits", "equal")]
    assert (manifest.kind, manifest.facts) == ("model", {"dtype": "float32"})


@pytest.mark.parametrize(
    ("checks", "named"), [([PASSED, FAILED], "token ids: 4 here"), ([], "nothing was compared")], ids=["failed", "none"]
)
def test_an_export_that_was_not_compared_gets_no_manifest(tmp_path: Path, checks: list[Check], named: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckFailed, match=named):
        build_manifest(tmp_path, "model", checks, {})


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[100] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _stray(folder: Path) -> None:
    (folder / "training" / ".env").write_text("HF_TOKEN=x")


def _link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def _edit(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | fields, indent=1, sort_keys=True))

    return change


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_flip, "model.safetensors was changed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "has 5 bytes"),
        (lambda folder: (folder / "training" / "ledger.jsonl").unlink(), "ledger.jsonl is missing"),
        (_stray, "did not write: training/.env"),
        (_link, "is a link"),
        (_pipe, "no file at all"),
        (lambda folder: (folder / "manifest.json").unlink(), "not an export"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not an export"),
        (_edit(checks=[]), "not an export"),
        (_edit(kind="space"), "not an export"),
    ],
)
def test_every_change_is_noticed(exported: Path, damage: Any, named: str) -> None:
    damage(exported)
    with pytest.raises(CheckFailed, match=named):
        verify_export(exported)


def test_what_file_managers_leave_behind_is_named_and_ignored(exported: Path, messages: list[str]) -> None:
    (exported / ".DS_Store").write_bytes(b"x")
    (exported / "training" / "._ledger.jsonl").write_bytes(b"x")
    assert ".DS_Store" not in verify_export(exported).files
    assert messages == [f"{exported} also holds .DS_Store, training/._ledger.jsonl: ignored, not published"]


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a//b", "./a", "a\\b", ".git/hooks/x", "manifest.json", ""]
)
def test_a_manifest_cannot_name_files_elsewhere(exported: Path, name: str) -> None:
    """Also not one whose digest fits: anybody can compute that."""
    genuine = verify_export(exported)
    forged = genuine.model_copy(update={"files": {name: genuine.files["model.safetensors"]}})
    assert parse_manifest(genuine.to_bytes()) == genuine
    assert parse_manifest(forged.to_bytes()) is None


def test_a_manifest_without_checks_is_none(exported: Path) -> None:
    assert parse_manifest(verify_export(exported).model_copy(update={"checks": ()}).to_bytes()) is None


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        verify_export(tmp_path / "nothing")
