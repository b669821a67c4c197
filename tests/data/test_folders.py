"""Folders: which files are text, which are not, and what is said of those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resmol.data import folders
from resmol.data.folders import Unused, find_text_files, shown_unused
from resmol.errors import DataError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}", encoding="utf-8")
    return root


def found(root: Path, **options: bool) -> tuple[list[str], dict[str, tuple[int, list[str]]]]:
    files, unused = find_text_files(root, **options)
    return [file.relative_to(root).as_posix() for file in files], unused.reasons


def test_hidden_folders_and_what_editors_leave_are_not_text(tmp_path: Path) -> None:
    root = make(
        tmp_path / "in", "a.txt", "b/c.json", ".ipynb_checkpoints/a-checkpoint.txt", ".git/x/COMMIT.txt", "._a.txt",
        ".#a.txt", "a.txt~", "#a.txt#", ".DS_Store", "~$a.txt", "__MACOSX/a.txt", "b/.hidden.jsonl", "b/.a.txt.swp",
    )  # fmt: skip
    files, reasons = found(root)
    assert files == ["a.txt", "b/c.json"]
    count, names = reasons["hidden"]
    assert count == 9
    assert names == ["in/.git/", "in/.ipynb_checkpoints/", "in/__MACOSX/"]
    assert reasons["name ends in .txt~"] == (1, ["in/a.txt~"])
    assert reasons["name ends in .txt#"] == (1, ["in/#a.txt#"])


def test_hidden_files_are_read_where_they_are_wanted_or_named(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "a.txt", ".notes/b.txt", ".c.txt")
    assert found(root, include_hidden=True)[0] == [".c.txt", ".notes/b.txt", "a.txt"]
    assert found(root / ".notes")[0] == ["b.txt"]


def test_links_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "a.txt", "sub/b.txt")
    make(tmp_path / "elsewhere", "c.txt", "deep/d.txt")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    (root / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe.txt")
    files, reasons = found(root)
    assert files == ["a.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt", "sub/b.txt"]
    assert reasons == {
        "a folder that is read under another name": (2, ["in/sub/again/", "in/sub/up/"]),
        "a link that leads nowhere": (1, ["in/broken.txt"]),
        "not a regular file": (1, ["in/pipe.txt"]),
    }


def test_other_files_are_counted_by_their_endings(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "a.txt", *(f"{n}.py" for n in range(5)), "LICENSE", *(f"x.e{n}" for n in range(40)))
    _, unused = find_text_files(root)
    facts = {one.reason: one for one in unused.facts()}
    assert shown_unused(facts["name ends in .py"]) == "5 (name ends in .py): in/0.py, in/1.py, in/2.py, …"
    assert shown_unused(facts["name without an ending"]) == "1 (name without an ending): in/LICENSE"
    assert len(facts) == folders._MAX_REASONS + 1
    assert sum(one.files for one in facts.values()) == 46


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "a.txt", "locked/b.txt")
    (root / "locked").chmod(0)
    try:
        with pytest.raises(DataError, match="locked cannot be read"):
            find_text_files(root)
    finally:
        (root / "locked").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = make(tmp_path / "in", "a.txt", "locked/b.txt"), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked cannot be read: Permission denied"):
        find_text_files(root)


def test_counts_of_several_folders_add_up() -> None:
    one, other = Unused(), Unused()
    for number in range(2):
        one.add("hidden", f"one/{number}")
        other.add("hidden", f"other/{number}")
    one.update(other)
    assert one.reasons == {"hidden": (4, ["one/0", "one/1", "other/0"])}
