"""Rows D3 to D6: tokens, shards, texts and tokenizers that are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from campaign import Campaign
from trials import Forks, Oracle, Setting, error_of, train_run

from resmol.config.load import load_config
from resmol.data.loader import Loader
from resmol.data.prepare import prepare
from resmol.data.readers import read_inputs
from resmol.data.shards import Dataset, token_dtype
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ResmolError
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.train.start import train_model

TOO_LARGE = "token {place} is {token} of 512"


def last_step(run: Path) -> int:
    """Return the last step that a run's ledger holds; 0 without a ledger."""
    ledger = RunDir(run).ledger
    return max((r["step"] for r in select(read_ledger(ledger).records, "step")), default=0) if ledger.exists() else 0


# --- D3: ids that the vocabulary does not have -----------------------------------------------------------------


def copy_of_data(dataset: Dataset, target: Path, token_bytes: int = 2) -> Path:
    """Copy a prepared folder, with tokens of 2 or 4 bytes."""
    shutil.copytree(dataset.root, target)
    if token_bytes == 4:
        for path in target.glob("*/*.ds"):
            np.fromfile(path, dtype="<u2").astype("<u4").tofile(path)
    rehash(target, token_bytes)
    return target


def rehash(folder: Path, token_bytes: int) -> None:
    """Make the manifest fit the shards as they lie there."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["token_bytes"] = token_bytes
    for shard in (*manifest["train"]["shards"], *manifest["val"]["shards"]):
        content = (folder / shard["name"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def first_use(dataset: Dataset, setting: Setting, place: int, steps: int) -> int:
    """Return the first step that sees a token of the training stream; by the definition of a window."""
    config = load_config(setting.config)
    length = config.data.seq_len
    loader = Loader(
        dataset.train, seq_len=length, micro_batch_size=1, grad_accum_steps=2, seed=config.data.seed, eos_id=0
    )
    return next(
        step
        for step in range(1, steps + 1)
        if any(window * length <= place <= (window + 1) * length for window in loader.windows_after(2 * (step - 1)))
    )


def shard_and_offset(dataset: Dataset, place: int) -> tuple[str, int]:
    """Return in which shard a token of the training stream lies, and where."""
    for shard in dataset.train.shards:
        if place < shard.tokens:
            return shard.name, place
        place -= shard.tokens
    raise AssertionError("not in the stream")


def test_d3_ids_outside_the_vocabulary(
    campaign: Campaign, forks: Forks, setting: Setting, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    """An id of 512 or more, or -1, in a shard whose hashes fit."""
    draw, count, problems = campaign.draw("D3"), campaign.count(6, 60), []
    steps, length = 20, load_config(setting.config).data.seq_len
    loader = Loader(tiny_dataset.train, seq_len=length, micro_batch_size=1, grad_accum_steps=2, seed=8, eos_id=0)
    for trial in range(count):
        width = (2, 4)[trial % 2]
        folder = copy_of_data(tiny_dataset, tmp_path / f"data-{trial}", width)
        window = draw.choice(loader.windows_after(2 * draw.randrange(steps)).tolist())
        place = min(window * length + draw.randrange(length), len(tiny_dataset.train) - 1)
        name, offset = shard_and_offset(tiny_dataset, place)
        token = draw.choice([512, 513, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), draw.randrange(512, 65_536)])
        with (folder / name).open("r+b") as file:
            file.seek(width * offset)
            file.write(token.to_bytes(width, "little"))
        rehash(folder, width)
        run = tmp_path / f"run-{trial}"
        bad = Setting(setting.config, folder, setting.tokenizer)
        code = forks.run(train_run, run, bad, f"train.steps={steps}")
        expected = f"{name}: {TOO_LARGE.format(place=offset, token=token)}"
        if code != 3 or expected not in error_of(run):
            problems.append(
                f"trial {trial}: exit code {code}; {expected!r} is not in {error_of(run) if code else ''!r}"
            )
        if (reached := last_step(run) + 1) != (first := first_use(tiny_dataset, setting, place, steps)):
            problems.append(f"trial {trial}: it stopped in step {reached}; step {first} is the first that sees the id")
        shutil.rmtree(folder)
    campaign.record(
        "D3", "token ids outside the vocabulary, all hashes made to fit", "exit 3 in the step that would see them; "
        "shard and offset named", problems, count, note="2 and 4 bytes a token; among them -1",
    )  # fmt: skip


# --- D4: shards that changed -----------------------------------------------------------------------------------


def _flip(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice([0, 1, len(content) // 2, len(content) - 2, len(content) - 8])])


def _extend(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(draw.choice([1, 2, 8, 4096])))


def _zero_a_page(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    start = draw.randrange(max(1, len(content) - 4096))
    path.write_bytes(content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :])


def _replace(path: Path, draw: Random) -> None:
    """Other tokens, all of them valid, in the same number."""
    count = path.stat().st_size // 2
    np.array([draw.randrange(1, 512) for _ in range(count)], dtype=token_dtype(2)).tofile(path)


def _exchange(path: Path, _draw: Random) -> None:
    other = next(sibling for sibling in sorted(path.parent.glob(f"*{path.suffix}")) if sibling != path)
    path.write_bytes(other.read_bytes())


def _remove(path: Path, _draw: Random) -> None:
    path.unlink()


def _link(path: Path, _draw: Random) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


DAMAGES = (_flip, _flip, _flip, _truncate, _extend, _zero_a_page, _replace, _exchange, _remove, _link)


def test_d4_changed_shards(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    """A shard or its index changed, with the size or the time kept where that is possible."""
    draw, count, problems = campaign.draw("D4"), campaign.count(10, 100), []
    begun = tmp_path / "begun"
    assert forks.run(train_run, begun, setting, "train.steps=20") == 0
    for trial in range(count):
        damage = DAMAGES[trial % len(DAMAGES)]
        folder = Path(shutil.copytree(tiny_dataset.root, tmp_path / "data"))
        names = sorted(
            str(path.relative_to(folder)) for path in folder.glob("train/*.ds*") if path.suffix != ".metadata"
        )
        victim = folder / draw.choice(names)
        status, original = victim.stat(), victim.read_bytes()
        damage(victim, draw)
        if victim.is_file() and victim.read_bytes() == original and not victim.is_symlink():
            _flip(victim, draw)  # zeros were there before
        with suppress(FileNotFoundError):
            os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
        run = tmp_path / f"run-{trial}"
        if trial % 2:
            shutil.copytree(begun, run)
        before = RunDir(run).ledger.read_bytes() if trial % 2 else b""
        code = forks.run(train_run, run, Setting(setting.config, folder, setting.tokenizer))
        after = RunDir(run).ledger.read_bytes() if RunDir(run).ledger.exists() else b""
        what = f"trial {trial}: {damage.__name__[1:]} {victim.relative_to(folder)}"
        if code != 3 or victim.name not in error_of(run):
            problems.append(f"{what}: exit code {code}: {error_of(run) if code else ''}")
        if before != after:
            problems.append(f"{what}: the run went on")
        shutil.rmtree(folder)
    assert forks.run(train_run, begun, setting) == 0  # the control: with the data as they were it does go on
    problems += oracle.differences(begun)
    campaign.record(
        "D4", "changed shards of the training data", "exit 3 before the first step, the file named", problems, count,
        note="new and resumed runs; times kept",
    )  # fmt: skip


# --- D5: odd texts ---------------------------------------------------------------------------------------------

MAX_GROWTH = 300_000_000


def peak_bytes() -> int:
    """Return the largest resident size of this process since it began or since `forget_peak`."""
    with suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the peak begin again, where the kernel can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def prepare_here(out: Path, inputs: list[Path], tokenizer: Path, report: Path) -> int:
    """Prepare a text in this process; write what became of it, and the memory that it took."""
    os.environ["RAYON_NUM_THREADS"] = "2"
    found = Tokenizer(tokenizer.read_bytes(), tokenizer)
    found.encode_batch(["warm up", "the library"])
    forget_peak()
    before, outcome = peak_bytes(), {}
    try:
        dataset = prepare(out, read_inputs([str(path) for path in inputs]), found)
        outcome = dataset.manifest.source.model_dump(mode="json") | {"tokens": len(dataset.train) + len(dataset.val)}
    except ResmolError as error:
        outcome = {"error": error.what, "fix": error.fix, "code": error.exit_code}
    report.write_text(json.dumps(outcome | {"growth": peak_bytes() - before}), encoding="utf-8")
    return 0


def write_repeated(path: Path, unit: bytes, size: int) -> None:
    """Write ``unit`` over and over, up to ``size`` bytes."""
    block = unit * ((1 << 20) // len(unit))
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def odd_texts(giant: int) -> dict[str, tuple[Callable[[Path], object], dict[str, Any]]]:
    """Return name -> how to write the text, and what its preparation must say of it."""

    def of(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    return {
        "empty.txt": (of(b""), {"code": 3, "error": "no text"}),
        "only-mark.txt": (of(b"\xef\xbb\xbf"), {"code": 3, "error": "no text"}),
        "empty-lines.jsonl": (of(b"\n\n  \n"), {"code": 3, "error": "no text"}),
        "one-token.txt": (of(b"a"), {"tokens": 2, "replacements": 0}),
        "newline.txt": (of(b"\n"), {"tokens": 2, "replacements": 0}),
        "latin-1.txt": (of("Käse, Brötchen".encode("latin-1")), {"code": 3, "error": "14.3 % of its bytes"}),
        "all-bytes.txt": (of(bytes(range(256)) * 10), {"code": 3, "error": "binary data"}),
        "cut-character.txt": (of(b"x" * 100 + "€".encode()[:-1]), {"replacements": 2}),
        "utf-16.txt": (of("text".encode("utf-16")), {"replacements": 0, "text_bytes": 4}),
        "cut-utf-16.txt": (of(("text" * 20).encode("utf-16")[:-1]), {"replacements": 1}),
        "nul.txt": (of((b"before" * 8 + b"\0") * 100), {"replacements": 0}),
        "nuls.txt": (of(b"before\0after\0" * 100), {"code": 3, "error": "binary data"}),
        "crlf.txt": (of(b"one\r\ntwo\r\n"), {"replacements": 0, "text_bytes": 10}),
        "mark.txt": (of(b"\xef\xbb\xbftext"), {"replacements": 0, "text_bytes": 4}),
        "surrogate-bytes.txt": (of(b"x" * 100 + b" \xed\xa0\x80 y"), {"replacements": 3}),
        "surrogate.jsonl": (of(b'{"text": "a \\ud800 b"}\n'), {"replacements": 1}),
        "bidi.txt": (of("\u202eabc\u202c\u200f".encode()), {"replacements": 0}),
        "combining.txt": (of(("a" + "\u0301" * 50_000).encode()), {"replacements": 0}),
        "bad-line.jsonl": (of(b'{"text": "a"}\n{"text": \n'), {"code": 3, "error": "line 2"}),
        "number.jsonl": (of(b'{"text": 7}\n'), {"code": 3, "error": "line 1"}),
        "deep.jsonl": (of(b'{"text": ' + b"[" * 100_000 + b"\n"), {"code": 3, "error": "line 1"}),
        "long-number.jsonl": (of(b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n"), {"code": 3, "error": "line 1"}),
        "not-gzip.txt.gz": (of(b"text"), {"code": 3, "error": "cannot be read"}),
        "bomb.txt.gz": (write_gzip_bomb(giant // 8), {"forced_cuts": giant // 8 // (1 << 18)}),
        "giant-line.txt": (lambda path: write_repeated(path, b"x", giant), {"replacements": 0, "text_bytes": giant}),
        "giant-words.txt": (lambda path: write_repeated(path, b"word ", giant // 8), {"forced_cuts": 0}),
        "giant-line.jsonl": (
            lambda path: write_giant_json_line(path, giant),
            {"code": 3, "error": "longer than 64 MB"},
        ),
    }


def write_gzip_bomb(size: int) -> Callable[[Path], object]:
    """Write zeros-as-text that unpack to about a thousand times their size on the disk."""
    import gzip

    def write(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(size >> 20):
                file.write(b"x" * (1 << 20))

    return write


def write_giant_json_line(path: Path, size: int) -> None:
    """Write one line of JSON, larger than what is accepted."""
    write_repeated(path, b"y", max(size, 80_000_000))
    with path.open("r+b") as file:
        file.write(b'{"text": "')


def test_d5_odd_texts(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """Texts that are empty, broken, not text, or enormous: an error that says so, or counts; memory stays bounded."""
    giant = campaign.count(32 << 20, 1 << 30)
    problems, growth = [], 0
    texts = odd_texts(giant)
    for name, (write, expected) in texts.items():
        path, report = tmp_path / name, tmp_path / f"{name}.report"
        write(path)
        code = forks.run(prepare_here, tmp_path / f"{name}.out", [path], setting.tokenizer, report, timeout=1800)
        path.unlink()
        if code != 0:
            problems.append(f"{name}: the process ended with {code}")
            continue
        outcome = json.loads(report.read_bytes())
        growth = max(growth, outcome["growth"])
        problems += [f"{name}: {text}" for text in outcome_problems(outcome, expected)]
        if outcome["growth"] > MAX_GROWTH:
            problems.append(f"{name}: {outcome['growth']:,} bytes of memory")
        if "error" in outcome and (tmp_path / f"{name}.out").exists():
            problems.append(f"{name}: something is left behind")
        shutil.rmtree(tmp_path / f"{name}.out", ignore_errors=True)
    campaign.record(
        "D5", "odd texts, one of them a giant line", "a clear error, or replaced and counted; memory under 300 MB",
        problems, len(texts), exhaustive=True,
        note=f"giant: {giant >> 20} MiB; at most {growth / 1e6:.0f} MB more memory",
    )  # fmt: skip


def outcome_problems(outcome: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """Compare what was said of a text with what must be said."""
    if "code" in expected and not outcome.get("fix"):
        yield f"it was accepted: {outcome}"
    for key, value in expected.items():
        found = outcome.get(key)
        if not (str(value) in str(found) if key == "error" else found == value):
            yield f"{key} is {found!r}, not {value!r} {outcome.get('error', '')}"


def test_d5_too_short_to_train(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    """A text of fewer tokens than a window: an error that says how many are needed."""
    problems, cases = [], {"x": 2, "one two three": 0}
    for number, text in enumerate(cases):
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8")
        run = tmp_path / f"run-{number}"
        code = forks.run(train_run, run, Setting(setting.config, path, setting.tokenizer))
        if code != 3 or "a window of 32 needs 33" not in error_of(run):
            problems.append(f"{text!r}: exit code {code}: {error_of(run) if code else ''}")
    campaign.record(
        "D5b", "a text of fewer tokens than a window", "exit 3, the number needed is named", problems, len(cases),
        exhaustive=True,
    )  # fmt: skip


# --- D6: another tokenizer -------------------------------------------------------------------------------------


def edited(content: bytes, draw: Random) -> bytes:
    """Exchange two merges of a tokenizer: the same vocabulary, other tokens."""
    table = json.loads(content)
    merges = table["model"]["merges"]
    first, second = draw.sample(range(len(merges)), 2)
    merges[first], merges[second] = merges[second], merges[first]
    return json.dumps(table, ensure_ascii=False).encode()


def resume_as_stored(run: Path, data: Path) -> int:
    """Resume with what lies in the run directory, as `resmol train RUN` does."""
    try:
        train_model(None, run, data=str(data), overrides=["train.steps=30"])
    except ResmolError as error:
        (run.parent / f"{run.name}.error").write_text(f"{error.what}\n{error.fix}\n", encoding="utf-8")
        return error.exit_code
    return 0


def test_d6_another_tokenizer(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """The tokenizer is not the one that the data, or the run, was made with."""
    draw, count, problems = campaign.draw("D6"), campaign.count(1, 10), []
    begun = tmp_path / "begun"
    assert forks.run(train_run, begun, setting, "train.steps=20") == 0
    before = RunDir(begun).ledger.read_bytes()
    genuine = setting.tokenizer.read_bytes()
    for trial in range(count):
        other = tmp_path / f"tokenizer-{trial}.json"
        other.write_bytes(edited(genuine, draw))
        code = forks.run(train_run, tmp_path / "new", Setting(setting.config, setting.data, other))
        problems += complaint(code, tmp_path / "new", 2, "the data was made with tokenizer")
        code = forks.run(train_run, begun, Setting(setting.config, setting.data, other))
        problems += complaint(code, begun, 2, "was started with the tokenizer")
        RunDir(begun).tokenizer.write_bytes(other.read_bytes())
        code = forks.run(resume_as_stored, begun, setting.data)
        problems += complaint(code, begun, 3, "expected")
        RunDir(begun).tokenizer.write_bytes(genuine)
        if (tmp_path / "new").exists() and last_step(tmp_path / "new"):
            problems.append(f"trial {trial}: it was trained")
    if RunDir(begun).ledger.read_bytes() != before:
        problems.append("the run went on")
    assert forks.run(resume_as_stored, begun, setting.data) == 0, error_of(begun)
    problems += oracle.differences(begun)
    campaign.record(
        "D6", "an edited tokenizer", "refused: for a new run, a resumed one, and in the run's own copy", problems,
        3 * count,
    )  # fmt: skip


def complaint(code: int, run: Path, expected: int, text: str) -> Iterable[str]:
    """A refusal must have its exit code and say what is wrong."""
    said = error_of(run) if code else ""
    return [] if code == expected and text in said else [f"exit code {code}: {said}"]
