"""Rows M: the harness itself. Each line that durability rests on is taken out of a copy; a drill must then fail.

A matrix of faults that never turns red proves nothing. Each mutant is a copy of the package with one place changed;
the same drill is green on the unchanged copy, and must find problems on the mutant.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from campaign import Campaign
from trials import Forks, Setting, finish

import resmol

pytestmark = pytest.mark.usefixtures("shim")
# Every 7th state: not a divisor of the number of ways to lose, so that each way comes up.
POWER: tuple[str, dict[str, Any]] = ("power_losses", {"share": 7})


MEANWHILE: tuple[str, dict[str, Any]] = ("saved_meanwhile", {})


def crash(scenario: str) -> tuple[str, dict[str, Any]]:
    return "crash_points", {"name": scenario}


@dataclass(frozen=True)
class Mutant:
    """One place changed in one file, and the drill that must notice.

    ``old`` must be there exactly once, so that a mutant cannot become healthy unnoticed when the package changes.
    """

    what: str
    file: str
    old: str
    new: str
    drill: tuple[str, dict[str, Any]]


MUTANTS = (
    Mutant("the payload is not synced", "system/atomic_io.py",
           "        for file in sorted(temporary.iterdir()):\n            fsync_path(file)\n", "", POWER),
    Mutant("manifest and small files are not synced", "system/atomic_io.py",
           "        file.flush()\n        fsync_file(file.fileno())\n", "        file.flush()\n", POWER),
    Mutant("the temporary directory is not synced", "system/atomic_io.py",
           "        fsync_path(temporary)\n", "", POWER),
    Mutant("the parent is not synced after the rename", "system/atomic_io.py",
           "    fsync_path(final.parent)\n", "", POWER),
    Mutant("a file is not flushed before it is synced", "system/atomic_io.py",
           "        file.flush()\n        fsync_file(file.fileno())\n", "        fsync_file(file.fileno())\n", POWER),
    Mutant("a checkpoint is written in place", "system/atomic_io.py",
           '    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:12]}")\n',
           "    temporary = final\n", crash("save")),
    Mutant("a file is written in place", "system/atomic_io.py",
           "            _write_and_sync(temporary, data)\n            os.replace(temporary, path)",
           "            _write_and_sync(path, data)", crash("resume")),
    Mutant("the rename comes before the manifest", "system/atomic_io.py",
           '        _write_and_sync(temporary / "manifest.json", manifest(temporary))\n'
           "        fsync_path(temporary)\n        os.rename(temporary, final)",
           "        os.rename(temporary, final)\n"
           '        _write_and_sync(final / "manifest.json", manifest(final))\n        fsync_path(final)',
           crash("save")),
    Mutant("a checkpoint is removed under its own name", "system/atomic_io.py",
           "    _patiently(lambda: os.rename(path, expired))  # noqa: PTH104\n",
           "    expired = path\n", crash("prune")),
    Mutant("a removed name is not synced", "system/atomic_io.py",
           "    fsync_path(path.parent)\n    _remove_tree(expired)\n",
           "    _remove_tree(expired)\n", POWER),
    Mutant("leftovers stay", "run/directory.py", "        remove_leftovers(self.checkpoints)\n", "", crash("save")),
    Mutant("the name of the run is not synced", "system/atomic_io.py",
           "        fsync_path(folder.parent)\n", "        pass\n",
           POWER),
    Mutant("the ledger is not synced before a save", "run/async_save.py",
           "        self.run_log.sync()  # the checkpoint refers", "        # the checkpoint refers", POWER),
    Mutant("a torn line stays in the ledger", "run/ledger.py",
           "            os.ftruncate(self._file.fileno(), content.length)\n            if", "            if",
           crash("save")),
    Mutant("zeros in the ledger are a line like any other", "run/ledger.py", 'content.partition(b"\\0")[0]', "content",
           ("power_losses", {"share": 3, "fates": ["holed"]})),
    Mutant("what has a checkpoint's name stays in its way", "run/checkpoint.py", "    quarantine(final)\n", "",
           crash("name taken")),
    Mutant("files are not compared with their hashes", "run/checkpoint_manifest.py",
           "            if found != entry.sha256:\n", "            if False:\n", ("flipped_bits", {})),
    Mutant("tensors are not compared with their digests", "run/checkpoint_load.py",
           "    if changed:\n", "    if False:\n",
           ("changed_on_the_way", {})),
    Mutant("nothing is read back before older ones go", "run/retention.py",
           "        open_checkpoint(paths[0]).verify()\n", "        pass\n", ("prune_on_corruption", {})),
    Mutant("the run is not locked", "system/locks.py",
           "    lock = _locked(path)\n", "    lock = FileLock(path)\n",
           ("second_process", {})),
    Mutant("the files are written in the background, from weights that go on changing", "run/async_save.py",
           "        seconds = self._thread.submit(self._commit, staged, started)\n",
           "        seconds = self._thread.submit(\n"
           "            lambda: self._commit(self._stage(state, tensors), started)\n        )\n", MEANWHILE),
    Mutant("a save does not wait for the one before", "run/async_save.py",
           "        self.wait_until_finished()\n        self._start(state, tensors)\n        if",
           "        self._start(state, tensors)\n        if", MEANWHILE),
    Mutant("the end does not wait for the save on its way", "run/async_save.py",
           "            self._finish()\n", "            pass\n", MEANWHILE),
    Mutant("what a checkpoint is bound to is not compared", "train/resume.py",
           "        if found != recorded:\n", "        if False:\n", ("foreign_bindings", {})),
)  # fmt: skip


def play_on_copy(source: Path, out: Path, drill: str, *arguments: Any, **options: Any) -> int:
    """Forget the package, import the copy in ``source`` instead, and play a drill."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("resmol", "trials", "drills")]:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    importlib.invalidate_caches()
    drills = importlib.import_module("drills")
    assert Path(drills.resmol.__file__).is_relative_to(source)
    return int(drills.play(out, drill, *arguments, **options))


def problems_of(
    forks: Forks, setting: Setting, folder: Path, drill: tuple[str, dict[str, Any]], mutant: Mutant | None
) -> list[str]:
    """Play a drill on a copy of the package, with or without a fault in it; return the problems it finds."""
    folder.mkdir()
    source = folder / "source"
    package = Path(resmol.__file__).parent
    shutil.copytree(package, source / "resmol", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        file = source / "resmol" / mutant.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.what}: {mutant.file} holds this {text.count(mutant.old)} times"
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    name, options = drill
    out = folder / "out.json"
    if mutant is not None and name in ("crash_points", "power_losses"):
        options = {**options, "first_only": True}
    child = forks.start(play_on_copy, source, out, name, setting=setting, folder=folder, **options)
    assert finish(child, timeout=300) == 0, "the drill itself failed, which shows nothing"
    result = json.loads(out.read_text())
    return list(result[-1] if name in ("crash_points", "power_losses") else result)


def is_in_selection(number: int) -> bool:
    """A campaign tries all; the ordinary suite those whose drill takes a second or two, and one loss of power."""
    return os.environ.get("RESMOL_FAULTS") == "full" or number in (2, 4, 6, 9, 13, 14, *range(17, 25))


@pytest.fixture(scope="module")
def healthy() -> set[str]:
    """The drills that were seen to be green on a copy without a fault."""
    return set()


@pytest.mark.parametrize(
    "number", [number for number in range(1, len(MUTANTS) + 1) if is_in_selection(number)], ids=lambda n: f"m{n}"
)
def test_a_mutant_is_noticed(
    number: int, campaign: Campaign, forks: Forks, setting: Setting, healthy: set[str], tmp_path: Path
) -> None:
    """The drill is green on a copy without a fault, and red on the mutant."""
    mutant = MUTANTS[number - 1]
    is_a_row = mutant.drill[0] in ("crash_points", "power_losses")  # K2, K3 and K5 show that these are green
    if str(mutant.drill) not in healthy and (campaign.full or not is_a_row):
        assert problems_of(forks, setting, tmp_path / "healthy", mutant.drill, None) == []
        healthy.add(str(mutant.drill))
    found = problems_of(forks, setting, tmp_path / "mutant", mutant.drill, mutant)
    campaign.record(
        f"M{number}", f"mutant: {mutant.what}", f"{mutant.drill[0].replace('_', ' ')} notices",
        [] if found else [mutant.what], 1, exhaustive=True, note=found[0] if found else "",
    )  # fmt: skip
