"""Rows 9 to 14: mistakes in saving, loading and going on."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Mistake, mistake, replaced

from resmol.data.loader import Batch, Loader
from resmol.errors import CheckpointError, ResmolError
from resmol.model.shapes import tensor_shapes
from resmol.run import checkpoint
from resmol.run import checkpoint_manifest as manifest
from resmol.run.checkpoint_manifest import WEIGHTS, list_checkpoints, open_checkpoint, read_manifest
from resmol.run.ledger import effective_steps, read_ledger, select
from resmol.system import atomic_io as atomic
from resmol.system.safetensors_header import read_header
from resmol.train import resume, start
from resmol.train.step_result import REPRODUCIBLE_FIELDS

# --- going on ------------------------------------------------------------------------------------------------


def resume_guard(bench: Bench) -> set[str]:
    """Resume twice within an epoch and across its border; compare every step with the uninterrupted run."""
    run, data = bench.folder / "run", {"data": str(bench.short_data.root)}
    found = set()
    for steps in (5, 9, 12, 24):
        try:
            bench.train(run, steps, **data)
        except ResmolError as error:
            found.add(f"refused: {error.what}")
            break
    ours, straight = _history(run), _history(bench.straight)
    if ours.keys() != straight.keys():
        found.add("steps 1 to 24, each once")
    for step in ours.keys() & straight.keys():
        found |= {f"{name} of every step" for name in REPRODUCIBLE_FIELDS if ours[step][name] != straight[step][name]}
    last = run / "checkpoints" / "step-00000024"
    if last.exists() and _bits(last) != _bits(bench.straight / "checkpoints" / "step-00000024"):
        found.add("weights and moments, bit for bit")
    return found


def _history(run: Path) -> dict[int, Any]:
    return effective_steps(read_ledger(run / "ledger.jsonl").records)


def _bits(path: Path) -> list[dict[str, str]]:
    return [entry.tensors for _, entry in sorted(read_manifest(path).files.items())]


def after_a_resume(change: Any) -> Any:
    """Return what calls ``change(state)`` at the end of each `restore`."""

    def put_in(patch: pytest.MonkeyPatch) -> None:
        genuine = resume.restore

        def restore(state: Any, checkpoint: Any, *ranks: Any) -> None:
            genuine(state, checkpoint, *ranks)
            change(state)

        patch.setattr(resume, "restore", restore)

    return put_in


def _skip_a_step(state: Any) -> None:
    state.step += 1


def _draw_again(state: Any) -> None:
    state.model.init_weights(1)


def windows_from(position: Any) -> Any:
    """Return what makes the steps of a resumed run read the windows after ``position(seen, resumed_at, per_step)``."""

    def put_in(patch: pytest.MonkeyPatch) -> None:
        genuine, resumed_at = Loader.windows_after, []
        genuine_restore = resume.restore

        def restore(state: Any, checkpoint: Any, *ranks: Any) -> None:
            genuine_restore(state, checkpoint, *ranks)
            resumed_at.append(state.windows_seen)

        def windows_after(self: Loader, seen: int) -> Any:
            place = position(seen, resumed_at, self.windows_per_step) if resumed_at else seen
            return genuine(self, place)

        patch.setattr(resume, "restore", restore)
        patch.setattr(Loader, "windows_after", windows_after)

    return put_in


def _saved_by_the_last_process(seen: int, resumed_at: list[int], _per_step: int) -> int:
    """The position that is saved counts from the start of the process: right once, wrong the second time."""
    before = resumed_at[-2] if len(resumed_at) > 1 else 0
    return seen - before


def random_tokens(patch: pytest.MonkeyPatch) -> None:
    genuine, resumed = Loader._batch, []
    genuine_restore = resume.restore

    def restore(state: Any, checkpoint: Any, *ranks: Any) -> None:
        genuine_restore(state, checkpoint, *ranks)
        resumed.append(checkpoint)

    def batch(self: Loader, windows: Any) -> Batch:
        made = genuine(self, windows)
        if not resumed:
            return made
        ids = torch.randint(512, made.input_ids.shape)
        return Batch(ids, ids.roll(-1, 1), None, made.window_ids, made.tokens)

    patch.setattr(resume, "restore", restore)
    patch.setattr(Loader, "_batch", batch)


def reseeded(patch: pytest.MonkeyPatch) -> None:
    genuine, seeds = start.make_loader, iter(range(100))

    def make(config: Any, stream: Any, order: Any) -> Loader:
        return genuine(config.replace({"data.seed": next(seeds)}), stream, order)

    patch.setattr(start, "make_loader", make)


def weights_only(patch: pytest.MonkeyPatch) -> None:
    genuine = resume.load_into

    def load_into(saved: Any, model: Any, optimizer: Any, *_: Any) -> None:
        genuine(saved, model)
        checkpoint.allocate_moments(optimizer, saved.state.step)

    patch.setattr(resume, "load_into", load_into)


def half_precision(patch: pytest.MonkeyPatch) -> None:
    genuine = checkpoint.weight_tensors

    def rounded(model: Any) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return genuine(model)

    patch.setattr(checkpoint, "weight_tensors", rounded)


# --- files ---------------------------------------------------------------------------------------------------


def files_guard(bench: Bench) -> set[str]:
    """Look at what 20 saves leave: few, whole, no pickle, float32, Hugging Face's names."""
    run = bench.folder / "files"
    with suppress(ResmolError):
        bench.train(run, 20, "checkpoint.every=1", "checkpoint.keep_last=3", "sampling.every=0", "evaluation.every=0")
    kept = list_checkpoints(run / "checkpoints")
    found = set() if len(kept) == 3 else {f"retention: {len(kept)} checkpoints are kept"}
    for path in kept:
        for file in path.iterdir():
            if file.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
                found.add("no pickle")
    if found:
        return found
    header = read_header(kept[0] / WEIGHTS)
    if {info.dtype for info in header.tensors.values()} != {"F32"}:
        found.add("weights are saved in float32")
    names = {name: tuple(info.shape) for name, info in header.tensors.items()}
    return found if names == tensor_shapes(bench.config.model) else found | {"names of a Hugging Face file"}


def pickled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "create_tensor_file", lambda path, *_: torch.save({}, path))


def saved_in_half(patch: pytest.MonkeyPatch) -> None:
    genuine = checkpoint.weight_tensors
    patch.setattr(checkpoint, "weight_tensors", lambda model: {n: t.half() for n, t in genuine(model).items()})


def prefixed(prefix: str) -> Any:
    def put_in(patch: pytest.MonkeyPatch) -> None:
        genuine = checkpoint.weight_tensors
        patch.setattr(checkpoint, "weight_tensors", lambda model: {prefix + n: t for n, t in genuine(model).items()})

    return put_in


class _PowerFailure(BaseException):
    """The process is gone: nothing cleans up after it."""


def killed_save_guard(bench: Bench) -> set[str]:
    """End a save at each of its fsyncs, as a kill would; what has a checkpoint's name must be a whole one."""
    run, found = bench.folder / "killed", set()
    bench.train(run, 5, "sampling.every=0")
    for moment in range(1, 8):
        with pytest.MonkeyPatch.context() as patch, suppress(_PowerFailure, OSError):
            left, genuine = [moment], atomic.os.fsync

            def fsync(descriptor: int, _left: list[int] = left, _genuine: Any = genuine) -> None:
                _left[0] -= 1
                if _left[0] == 0:
                    raise _PowerFailure
                _genuine(descriptor)

            patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(checkpoint, "fsync_path", lambda _: None)
            saved = manifest.open_checkpoint(run / "checkpoints" / "step-00000005").state.model_copy(update={"step": 6})
            state = _state_of(bench)
            patch.setattr(atomic.os, "fsync", fsync)
            contents = checkpoint.CheckpointTensors.of(state.model, state.optimizer)
            staged = checkpoint.stage_checkpoint(run / "checkpoints", saved, contents, parent=None)
            checkpoint.commit_checkpoint(staged)
        for path in list_checkpoints(run / "checkpoints"):
            try:
                open_checkpoint(path).verify()
            except CheckpointError:
                found.add("a killed save leaves no half of a checkpoint")
        shutil.rmtree(run / "checkpoints" / "step-00000006", ignore_errors=True)
    return found


def _state_of(bench: Bench) -> Any:
    return bench.train(bench.folder / "another", 6, "sampling.every=0", "evaluation.every=0")


def in_place(final: Path, write_files: Any) -> Path:
    final.mkdir()
    write_files(final)
    return final


# --- corrupt files -------------------------------------------------------------------------------------------


def damage_guard(bench: Bench) -> set[str]:
    """A corrupt checkpoint is skipped, and said so; when all are, that is an error; none is ever deleted."""
    run, found = bench.folder / "corrupt", set()
    checkpoints = run / "checkpoints"
    bench.train(run, 10, "sampling.every=0")
    evidence = _damage(checkpoints / "step-00000010")
    bench.train(run, 10, "sampling.every=0")
    warned = [record["what"] for record in select(read_ledger(run / "ledger.jsonl").records, "warn")]
    if "checkpoint skipped" not in warned:
        found.add("the fallback is stated")
    if evidence not in {path.read_bytes() for path in checkpoints.glob(f"*/{WEIGHTS}")}:
        found.add("nothing is deleted")
    for path in list_checkpoints(checkpoints):
        _damage(path)
    before = sorted(entry.name for entry in checkpoints.iterdir())
    try:
        bench.train(run, 10, "sampling.every=0")
        found.add("all checkpoints corrupt is an error")
    except CheckpointError:
        if before != sorted(entry.name for entry in checkpoints.iterdir()):
            found.add("nothing is deleted")
    return found


def _damage(path: Path) -> bytes:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (path / WEIGHTS).write_bytes(content)
    return bytes(content)


def starts_over(patch: pytest.MonkeyPatch) -> None:
    genuine = resume._newest_whole

    def careless(*arguments: Any, **options: Any) -> Any:
        try:
            return genuine(*arguments, **options)
        except Exception:  # the mistake
            return None

    patch.setattr(resume, "_newest_whole", careless)


def silent_fallback(patch: pytest.MonkeyPatch) -> None:
    genuine = resume.newest_valid
    patch.setattr(resume, "newest_valid", lambda *a: (genuine(*a)[0], []))


def deletes_the_corrupt(patch: pytest.MonkeyPatch) -> None:
    genuine = resume.newest_valid

    def tidy(folder: Path, recorded: Any) -> Any:
        found = genuine(folder, recorded)
        for item in found[1]:
            shutil.rmtree(item.path)
        return found

    patch.setattr(resume, "newest_valid", tidy)


R, F = resume_guard, files_guard
MISTAKES: list[Mistake] = [
    mistake(9, "resume: weights only",
            weights_only, R, "refused: "),
    mistake(9, "resume: reseeded", reseeded, R, "windows"),
    mistake(9, "resume: fresh weights", after_a_resume(_draw_again), R, "refused: "),
    mistake(9, "resume: a step skipped", after_a_resume(_skip_a_step), R, "steps 1 to 24"),
    mistake(9, "resume: a batch repeated", windows_from(lambda seen, _, size: seen - size), R, "windows"),
    mistake(9, "resume: a batch skipped", windows_from(lambda seen, _, size: seen + size), R, "windows"),
    mistake(9, "resume: random tokens", random_tokens, R, "loss_bits"),
    mistake(10, "loader's state saved, never loaded", windows_from(lambda seen, at, _: seen - at[-1]), R, "windows"),
    mistake(10, "loader's state right once, wrong at the second resume", windows_from(_saved_by_the_last_process), R,
            "windows"),
    mistake(11, "any error in loading means starting over", starts_over, damage_guard, "all checkpoints corrupt"),
    mistake(11, "a fallback that is not stated", silent_fallback, damage_guard, "the fallback is stated"),
    mistake(11, "the corrupt checkpoint is deleted", deletes_the_corrupt, damage_guard, "nothing is deleted"),
    mistake(12, "checkpoint written in place", replaced("resmol.run.checkpoint.stage_directory", in_place),
            killed_save_guard, "a killed save"),
    mistake(12, "checkpoint pickled", pickled, F, "no pickle"),
    mistake(12, "old checkpoints never removed",
            replaced("resmol.run.async_save.prune", lambda *_, **__: []), F, "retention"),
    mistake(13, "weights saved in half precision", saved_in_half, F, "weights are saved in float32"),
    mistake(13, "weights rounded to half precision by a save", half_precision, R, "refused: "),
    mistake(14, "names prefixed with _orig_mod.", prefixed("_orig_mod."), F, "names"),
    mistake(14, "names prefixed with module.", prefixed("module."), F, "names"),
]  # fmt: skip
