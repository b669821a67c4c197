"""Rows C1 to C8: bytes of a checkpoint that are not those that were saved, whoever changed them."""

from __future__ import annotations

import json
import math
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest
from campaign import Campaign
from safetensors.torch import load_file, save_file
from trials import STEPS, TENSOR_FILES, Forks, Oracle, Setting, error_of, finish, train_run

from resmol.errors import CheckpointError, ResmolError
from resmol.interop import load, model_ref
from resmol.run import checkpoint_manifest
from resmol.run.checkpoint import digest_all
from resmol.run.checkpoint_manifest import (
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Manifest,
    checkpoint_name,
    file_entry,
    list_checkpoints,
    newest_valid,
    read_manifest,
    step_of,
)
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select

NEWEST, BEFORE, STEPS_SO_FAR = checkpoint_name(50), checkpoint_name(45), 50
FILES = (*TENSOR_FILES, STATE, CONFIG, MANIFEST)


# --- a run that has come to step 50, and what may be done to it -------------------------------------------------


@pytest.fixture(scope="module")
def stopped(forks: Forks, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps with the checkpoints of steps 40, 45 and 50; tests work on copies."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert forks.run(train_run, run, setting, f"train.steps={STEPS_SO_FAR}") == 0
    assert [path.name for path in list_checkpoints(RunDir(run).checkpoints)] == [NEWEST, BEFORE, checkpoint_name(40)]
    return run


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy of the stopped run, under a name of its own."""
    return lambda name: Path(shutil.copytree(stopped, tmp_path / name))


@pytest.fixture
def victim(copy: Callable[[str], Path]) -> Path:
    """The newest checkpoint of a copy; what a trial does to it, it undoes."""
    return RunDir(copy("victim")).checkpoints / NEWEST


def recorded(run: Path) -> dict[str, str]:
    """Return what the ledger says of each checkpoint's manifest."""
    saves = select(read_ledger(RunDir(run).ledger).records, "save")
    return {record["checkpoint"]: record["manifest_sha256"] for record in saves}


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """Give a file another content for a while, or take it away."""
    original = path.read_bytes()
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        yield
    finally:
        path.write_bytes(original)


def detection_problems(checkpoint: Path, known: dict[str, str], what: str, named: str) -> list[str]:
    """The corrupt newest checkpoint must be skipped for the one before, with a reason that names ``named``."""
    try:
        found, skipped = newest_valid(checkpoint.parent, known)
    except CheckpointError as error:
        return [f"{what}: no checkpoint is valid any more: {error.what}"]
    if found.path.name != BEFORE:
        return [f"{what}: {found.path.name} was believed"]
    reasons = [item.reason for item in skipped]
    return [] if len(reasons) == 1 and named in reasons[0] else [f"{what}: the reason is {reasons}"]


def resumption_problems(run: Path, forks: Forks, setting: Setting, oracle: Oracle, what: str) -> list[str]:
    """The run must go on from the checkpoint before, record that, keep the corrupt one, and end like the oracle."""
    corrupt = (run / "checkpoints" / NEWEST).exists()
    known = len(read_ledger(RunDir(run).ledger).records)
    for steps in (47, STEPS):  # the first leg saves, and prunes, below the corrupt one
        if code := forks.run(train_run, run, setting, f"train.steps={steps}"):
            return [f"{what}: exit code {code}: {error_of(run)}"]
    records = read_ledger(RunDir(run).ledger).records[known:]
    problems = oracle.differences(run)
    if next(select(records, "resume"))["checkpoint"] != BEFORE:
        problems.append("it did not resume from the checkpoint before")
    if corrupt and [r["checkpoint"] for r in select(records, "warn") if "checkpoint" in r] != [NEWEST]:
        problems.append("the ledger does not say what was skipped")
    if corrupt and not list((run / "checkpoints").glob(f"corrupt-{NEWEST}-*")):
        problems.append("the corrupt checkpoint was not kept")
    return [f"{what}: {problem}" for problem in problems[:1]]


# --- C1 to C3 ---------------------------------------------------------------------------------------------------


def flipped(content: bytes, draw: Random) -> bytes:
    """Change one bit."""
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def test_c1_flipped_bits(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, victim: Path, copy: Callable[[str], Path]
) -> None:
    """One bit of any file."""
    count, resumed, draw = campaign.count(200, 500), campaign.count(2, 25), campaign.draw("C1")
    known, problems = recorded(victim.parents[1]), []
    for trial in range(count):
        name = draw.choice(FILES)
        content = flipped((victim / name).read_bytes(), draw)
        with changed(victim / name, content):
            problems += detection_problems(victim, known, f"trial {trial}", name)
        if trial < resumed:
            run = copy(f"run-{trial}")
            (run / "checkpoints" / NEWEST / name).write_bytes(content)
            problems += resumption_problems(run, forks, setting, oracle, f"trial {trial}")
            shutil.rmtree(run)
    assert newest_valid(victim.parent, known)[0].path.name == NEWEST  # it is the trials that were refused
    campaign.record(
        "C1", "a flipped bit in a checkpoint", "detected and named; the one before is used, with the same bits after",
        problems, count, note=f"{resumed} of the runs were resumed to their end",
    )  # fmt: skip


def tensor_ends(content: bytes) -> list[int]:
    """Return where the header and each tensor of a safetensors file end."""
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + length])
    return [8 + length, *(8 + length + entry["data_offsets"][1] for name, entry in table.items() if name[0] != "_")]


def cuts(name: str, content: bytes) -> list[int]:
    """Return the lengths to which a file is cut (or by a byte extended)."""
    ends = (
        tensor_ends(content) if name.endswith(".safetensors") else list(accumulate(map(len, content.splitlines(True))))
    )
    wanted = {0, 1, 8, len(content) - 1, len(content) + 1, *(end + by for end in ends for by in (-1, 0, 1))}
    return sorted(length for length in wanted - {len(content)} if 0 <= length <= len(content) + 1)


def test_c2_truncations(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, victim: Path, copy: Callable[[str], Path]
) -> None:
    """Every file, cut at every border inside it."""
    known, problems, tried, tensors = recorded(victim.parents[1]), [], 0, 0
    draw, resumed = campaign.draw("C2"), campaign.count(1, 2)
    for name in FILES:
        content = (victim / name).read_bytes()
        tensors += len(tensor_ends(content)) - 1 if name.endswith(".safetensors") else 0
        lengths = cuts(name, content)
        for length in lengths:
            with changed(victim / name, content[:length].ljust(length, b"\0")):
                problems += detection_problems(victim, known, f"{name} cut to {length}", name)
        for length in draw.sample(lengths, resumed):
            run = copy(f"{name}-{length}")
            (run / "checkpoints" / NEWEST / name).write_bytes(content[:length].ljust(length, b"\0"))
            problems += resumption_problems(run, forks, setting, oracle, f"{name} cut to {length}")
            shutil.rmtree(run)
        tried += len(lengths)
    assert tensors == 80, "20 weights, 40 moments, 20 averaged weights"
    campaign.record(
        "C2", "a truncated file of a checkpoint", "detected and named; the one before is used", problems, tried,
        exhaustive=True, note=f"every border of {tensors} tensors and {len(FILES)} files, a byte less and a byte more",
    )  # fmt: skip


Damage = Callable[[Path, Path], str]  # of (checkpoint, the same one of another run); returns what must be named


def wholesale_damage() -> dict[str, Damage]:
    """Return the kinds of damage that concern a whole file or several."""
    kinds: dict[str, Damage] = {}
    for name in FILES:

        def zero_filled(path: Path, _other: Path, name: str = name) -> str:
            (path / name).write_bytes(bytes((path / name).stat().st_size))
            return name

        def missing(path: Path, _other: Path, name: str = name) -> str:
            (path / name).unlink()
            return name

        def swapped(path: Path, _other: Path, name: str = name) -> str:
            own, older = (path / name).read_bytes(), path.with_name(BEFORE) / name
            (path / name).write_bytes(older.read_bytes())
            return name if own != older.read_bytes() else ""

        kinds |= {f"{name} zero-filled": zero_filled, f"{name} missing": missing, f"{name} of the one before": swapped}

    def whole_older(path: Path, _other: Path) -> str:
        shutil.rmtree(path)
        shutil.copytree(path.with_name(BEFORE), path)
        return "belongs to step 45"

    def older_manifest_and_state(path: Path, _other: Path) -> str:
        for name in (MANIFEST, STATE):
            shutil.copy(path.with_name(BEFORE) / name, path / name)
        return MANIFEST

    def foreign_manifest(path: Path, other: Path) -> str:
        shutil.copy(other / MANIFEST, path / MANIFEST)
        return NEWEST

    def foreign(path: Path, other: Path) -> str:
        shutil.rmtree(path)
        shutil.copytree(other, path)
        return "not the one that the ledger recorded"

    def renumbered_manifest(path: Path, _other: Path) -> str:
        """The one before, made to fit the number: only the ledger can tell."""
        shutil.rmtree(path)
        shutil.copytree(path.with_name(BEFORE), path)
        state = json.loads((path / STATE).read_bytes())
        (path / STATE).write_text(json.dumps(state | {"step": STEPS_SO_FAR}, indent=1), encoding="utf-8")
        rehash(path, step=STEPS_SO_FAR)
        return "not the one that the ledger recorded"

    def a_link(path: Path, _other: Path) -> str:
        (path / WEIGHTS).rename(path.with_name("elsewhere"))
        (path / WEIGHTS).symlink_to(path.with_name("elsewhere"))
        return WEIGHTS

    kinds |= {
        "the one before in its place": whole_older, "manifest and state of the one before": older_manifest_and_state,
        "manifest of another run": foreign_manifest, "checkpoint of another run": foreign,
        "the one before, renumbered": renumbered_manifest, "a link instead of a file": a_link,
    }  # fmt: skip
    return kinds


def test_c3_whole_files(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """Zeros, absence, files of another checkpoint or another run."""
    other = tmp_path / "other"
    assert forks.run(train_run, other, setting, f"train.steps={STEPS_SO_FAR}", "train.seed=9") == 0
    kinds = wholesale_damage()
    kinds.pop(f"{CONFIG} of the one before")  # the architecture: the same bytes in every checkpoint
    resumed = set(campaign.draw("C3").sample(sorted(kinds), campaign.count(3, len(kinds))))
    problems = []
    for number, (what, damage) in enumerate(kinds.items()):
        run = copy(f"run-{number}")
        checkpoint = run / "checkpoints" / NEWEST
        named = damage(checkpoint, other / "checkpoints" / NEWEST)
        assert named, what
        problems += detection_problems(checkpoint, recorded(run), what, named)
        if what in resumed:
            problems += resumption_problems(run, forks, setting, oracle, what)
        shutil.rmtree(run)
    campaign.record(
        "C3", "files zero-filled, missing, swapped, of another run", "detected and named; the one before is used",
        problems, len(kinds), exhaustive=True, note=f"{len(resumed)} of the runs were resumed to their end",
    )  # fmt: skip


# --- C4 ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_c4_nothing_valid(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, copy: Callable[[str], Path]
) -> None:
    """All checkpoints corrupt: no silent new beginning; an allowed one ends like the oracle."""
    draw, count, problems = campaign.draw("C4"), campaign.count(2, 10), []
    for trial in range(count):
        run = copy(f"run-{trial}")
        for checkpoint in list_checkpoints(RunDir(run).checkpoints):
            file = checkpoint / draw.choice(FILES)
            file.write_bytes(flipped(file.read_bytes(), draw))
        before = files_of(run / "checkpoints")
        lines = (run / "ledger.jsonl").read_bytes()
        code = forks.run(train_run, run, setting)
        if code != 65 or "no valid checkpoint" not in error_of(run):
            problems.append(f"trial {trial}: exit code {code}: {error_of(run)}")
        if files_of(run / "checkpoints") != before or (run / "ledger.jsonl").read_bytes() != lines:
            problems.append(f"trial {trial}: the refusal changed something")
        if code := forks.run(train_run, run, setting, allow_fresh=True):
            problems.append(f"trial {trial}: beginning again: exit code {code}: {error_of(run)}")
            continue
        records = read_ledger(RunDir(run).ledger).records[lines.count(b"\n") :]
        if [r["what"] for r in select(records, "warn")] != ["no valid checkpoint: beginning again, as allowed"]:
            problems.append(f"trial {trial}: the ledger does not say that it began again")
        if [r["to_step"] for r in select(records, "rewind")] != [0]:
            problems.append(f"trial {trial}: the ledger does not take the steps back")
        kept = sorted(files_of(run / "checkpoints").values())
        if any(content not in kept for content in before.values()):
            problems.append(f"trial {trial}: a corrupt checkpoint was deleted")
        problems += [f"trial {trial}: {difference}" for difference in oracle.differences(run)[:1]]
    campaign.record(
        "C4", "every checkpoint corrupt", "exit 65 and nothing deleted; --allow-fresh begins again and is recorded",
        problems, count,
    )  # fmt: skip


# --- C5 and C6: damage with hashes that fit --------------------------------------------------------------------


def rehash(path: Path, step: int | None = None) -> None:
    """Write a manifest that fits the changed files, tensor by tensor where they can be read."""
    old = read_manifest(path) if step is None else read_manifest(path.with_name(BEFORE))
    files = {}
    for name, entry in old.files.items():
        try:
            tensors = digest_all(load_file(path / name)) if name.endswith(".safetensors") else {}
        except Exception:  # the library refuses it as well
            tensors = entry.tensors
        files[name] = file_entry(path / name, tensors)
    manifest = Manifest(
        step=old.step if step is None else step, parent=old.parent, permanent=old.permanent, files=files
    )
    (path / MANIFEST).write_bytes(manifest.to_bytes())


def forget(run: Path, checkpoint: str) -> None:
    """Cut the ledger off before it recorded a checkpoint, as a crash right after the commit does."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    place = max(
        number
        for number, line in enumerate(lines)
        if (record := json.loads(line))["kind"] == "save" and record["checkpoint"] == checkpoint
    )
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:place]))


def refusal_problems(run: Path, forks: Forks, setting: Setting, what: str, named: str) -> list[str]:
    """A consistent checkpoint with an impossible content must not be trained on, and stay as it is."""
    before, lines = files_of(run / "checkpoints"), (run / "ledger.jsonl").read_bytes()
    code = forks.run(train_run, run, setting)
    problems = []
    if code != 65 or named not in error_of(run):
        problems.append(f"exit code {code}: {error_of(run) if code else ''}")
    if files_of(run / "checkpoints") != before:
        problems.append("the checkpoints were changed")
    if b'"step"' in (run / "ledger.jsonl").read_bytes().removeprefix(lines):
        problems.append("it was trained on")
    return [f"{what}: {problem}" for problem in problems[:1]]


@pytest.fixture
def unrecorded(copy: Callable[[str], Path]) -> Path:
    """A copy whose ledger does not know the newest checkpoint, so that only its content speaks against it."""
    run = copy("unrecorded")
    forget(run, NEWEST)
    assert NEWEST not in recorded(run)
    return run


def test_c5_not_finite(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, unrecorded: Path, copy: Callable[[str], Path]
) -> None:
    """NaN or infinity in one place of one tensor, every hash correct."""
    path, draw, problems = unrecorded / "checkpoints" / NEWEST, campaign.draw("C5"), []
    original = files_of(path)
    cases = [(file, name) for file in TENSOR_FILES for name in sorted(load_file(path / file))]
    chosen = cases if campaign.full else draw.sample(cases, 6)
    for file, name in chosen:
        tensors = load_file(path / file)
        values = tensors[name].view(-1)
        values[draw.randrange(len(values))] = draw.choice([math.nan, math.inf, -math.inf])
        save_file(tensors, path / file, metadata={"format": "pt"})
        rehash(path)
        problems += refusal_problems(unrecorded, forks, setting, name, f"NaN or infinity in {name}")
        for restored, content in original.items():
            (path / restored).write_bytes(content)
    known = copy("known")
    tensors = load_file(known / "checkpoints" / NEWEST / WEIGHTS)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, known / "checkpoints" / NEWEST / WEIGHTS, metadata={"format": "pt"})
    rehash(known / "checkpoints" / NEWEST)
    problems += resumption_problems(known, forks, setting, oracle, "with a ledger that knows better")
    problems += [f"untouched: {found}" for found in whole_again(unrecorded, forks, setting, oracle)]
    campaign.record(
        "C5", "NaN or infinity in a tensor, all hashes made to fit", "refused at loading, exit 65, nothing deleted",
        problems, len(chosen) + 1, exhaustive=campaign.full, note="also with the checkpoint in the ledger: passed over",
    )  # fmt: skip


def whole_again(run: Path, forks: Forks, setting: Setting, oracle: Oracle) -> list[str]:
    """The control: the same run without the damage goes on from its newest checkpoint."""
    if code := forks.run(train_run, run, setting):
        return [f"exit code {code}: {error_of(run)}"]
    resumed = next(select(read_ledger(RunDir(run).ledger).records[::-1], "resume"))
    return oracle.differences(run) + ([] if resumed["checkpoint"] == NEWEST else ["not from the newest checkpoint"])


def with_header(content: bytes, change: Callable[[str], str]) -> bytes:
    """Change the text of a safetensors header."""
    length = struct.unpack("<Q", content[:8])[0]
    header = change(content[8 : 8 + length].decode()).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def crafted(content: bytes, name: str) -> dict[str, bytes]:
    """Return what a forger might make of a safetensors file that holds the tensor ``name`` as a matrix."""
    length = struct.unpack("<Q", content[:8])[0]
    table: dict[str, Any] = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    entry, size = table[name], len(data)
    rows, columns = entry["shape"]

    def with_entry(**changes: Any) -> bytes:
        return with_header(content, lambda _: json.dumps(table | {name: entry | changes}))

    def with_more(extra: dict[str, Any], more: bytes = b"") -> bytes:
        return with_header(content, lambda _: json.dumps(table | extra)) + more

    extra = {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]}
    without = {key: value for key, value in table.items() if key != name}
    twice = json.dumps({name: entry})[1:-1]
    return {
        "a name twice": with_header(content, lambda text: text.rstrip()[:-1] + f", {twice}}}"),
        "a field twice": with_header(content, lambda text: text.replace('"dtype":"F32",', '"dtype":"F32",' * 2, 1)),
        "a name twice, other shape": with_header(
            content, lambda text: text.rstrip()[:-1] + ", " + twice.replace(f"[{rows}, {columns}]", "[1]") + "}"
        ),
        "a tensor too many": with_more({"model.extra.weight": extra}, bytes(8)),
        "an output layer too many": with_more({"lm_head.weight": extra}, bytes(8)),
        "an empty tensor too many": with_more({"x": extra | {"shape": [0], "data_offsets": [size, size]}}),
        "a tensor too few": with_header(content, lambda _: json.dumps(without)),
        "another name": with_header(content, lambda text: text.replace(name, f"_orig_mod.{name}")),
        "transposed": with_entry(shape=[columns + 1, rows]) if rows == columns else with_entry(shape=[columns, rows]),
        "flat": with_entry(shape=[rows * columns]),
        "one more dimension": with_entry(shape=[1, rows, columns]),
        "integers": with_entry(dtype="I32"),
        "half as wide": with_entry(dtype="F16", shape=[rows, 2 * columns]),
        "bfloat16": with_entry(dtype="BF16", shape=[2 * rows, columns]),
        "twice as wide": with_entry(dtype="F64", shape=[rows // 2, columns]),
        "an unknown type": with_entry(dtype="F31"),
        "a negative size": with_entry(shape=[-rows, -columns]),
        "sizes that overflow": with_entry(shape=[2**62, 2**62]),
        "an overlap": with_entry(data_offsets=[max(0, begin - 4) for begin in entry["data_offsets"]]),
        "data without a name": content + bytes(8),
        "metadata of another kind": with_more({"__metadata__": {"format": 1}}),
    }


def test_c6_crafted_headers(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, unrecorded: Path
) -> None:
    """Headers that are wrong or ambiguous, every hash correct."""
    path, draw, problems = unrecorded / "checkpoints" / NEWEST, campaign.draw("C6"), []
    original = files_of(path)
    weight = "model.layers.1.mlp.up_proj.weight"
    cases = [
        (file, what, content)
        for file, name in ((WEIGHTS, weight), (OPTIMIZER, f"{weight}.exp_avg"))
        for what, content in crafted(original[file], name).items()
    ]
    assert all(content != original[file] for file, _, content in cases)
    chosen = cases if campaign.full else draw.sample(cases, 8)
    for file, what, content in chosen:
        (path / file).write_bytes(content)
        rehash(path)
        problems += refusal_problems(unrecorded, forks, setting, f"{file}: {what}", file)
        for restored, bytes_before in original.items():
            (path / restored).write_bytes(bytes_before)
    problems += [f"untouched: {found}" for found in whole_again(unrecorded, forks, setting, oracle)]
    campaign.record(
        "C6", "a crafted header, all hashes made to fit", "refused at loading, exit 65, nothing deleted", problems,
        len(chosen), exhaustive=campaign.full, note=f"{len(cases) // 2} forgeries of each of the two files",
    )  # fmt: skip


# --- C7 ---------------------------------------------------------------------------------------------------------

FOREIGN_FILES = (
    ".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", ".nfs000000000000000a", "notes.pkl",
    "pytorch_model.bin", "model.safetensors.index.json", ".ipynb_checkpoints/x-checkpoint.json", "@eaDir/x",
)  # fmt: skip


def test_c7_foreign_files(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, copy: Callable[[str], Path]
) -> None:
    """File managers, editors and people leave something in every checkpoint: the newest is as good as before."""
    names = campaign.draw("C7").sample(FOREIGN_FILES, campaign.count(3, len(FOREIGN_FILES)))
    problems = []
    for name in names:
        run = copy(f"run-{FOREIGN_FILES.index(name)}")
        for checkpoint in list_checkpoints(RunDir(run).checkpoints):
            (checkpoint / name).parent.mkdir(exist_ok=True)
            (checkpoint / name).write_bytes(b"x")
        found = [] if not (code := forks.run(train_run, run, setting)) else [f"exit code {code}: {error_of(run)}"]
        records = read_ledger(RunDir(run).ledger).records
        resumed = [record["checkpoint"] for record in select(records, "resume")]
        found += [] if resumed == [NEWEST] else [f"resumed from {resumed}"]
        found += [path.name for path in RunDir(run).checkpoints.iterdir() if not path.name.startswith("step-")]
        problems += [f"{name}: {text}" for text in [*found, *oracle.differences(run)][:1]]
    campaign.record(
        "C7", "files that are not of the checkpoint lie in every one", "the newest is used, the same bits at the end",
        problems, len(names), exhaustive=campaign.full,
    )  # fmt: skip


# --- C8 ---------------------------------------------------------------------------------------------------------


def test_c8_readers_of_a_live_run(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run saves after every step and keeps two. The reader is slow: all that it listed, or opened, could go."""
    count, run, problems, steps = campaign.count(9, 200), tmp_path / "run", list[str](), list[int]()
    folder = RunDir(run).checkpoints
    child = forks.start(train_run, run, setting, "train.steps=1000000", "checkpoint.every=1", "checkpoint.keep_last=2")

    def newest() -> int:
        return max((step_of(path) for path in list_checkpoints(folder)), default=0)

    def wait_for(step: int) -> None:
        while newest() < step:
            assert child.is_alive(), error_of(run)
            time.sleep(0.001)

    def slow_after(real: Callable[..., Any], at: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if waits.pop(at, None):
                wait_for(newest() + 4)
            return result

        return call

    waits: dict[str, bool] = {}
    for module, name in ((checkpoint_manifest, "list_checkpoints"), (model_ref, "newest_valid"), (load, "resolve")):
        monkeypatch.setattr(module, name, slow_after(getattr(module, name), name))
    wait_for(2)
    for trial in range(count):
        waits |= {("list_checkpoints", "newest_valid", "resolve")[trial % 3]: True}
        present = newest()
        try:
            step = load.load_model(run, device="cpu").source.step or 0
        except ResmolError as error:
            problems.append(f"try {trial}: {error.what}")
            continue
        problems += [f"try {trial}: step {step}, and step {present} was there"] if step < present else []
        steps.append(step)
    child.terminate()
    finish(child)
    kept = len(list_checkpoints(folder))
    problems += [] if kept <= 3 else [f"{kept} checkpoints were left"]  # one may have been read to the end
    campaign.record(
        "C8", "slow readers of a run that saves after every step", "the newest checkpoint that stays, every time",
        problems, count, note=f"{len(set(steps))} different checkpoints were read, up to step {max(steps, default=0)}",
    )  # fmt: skip
