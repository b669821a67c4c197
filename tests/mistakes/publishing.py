"""Rows 14, 23, 24, 25: mistakes in demos, tables and exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Mistake, mistake
from typer.testing import CliRunner

from resmol.bench import ablate as ablation
from resmol.bench import comparison
from resmol.bench.ablate import Ablation
from resmol.bench.workers.main import Metrics
from resmol.cli import app
from resmol.errors import CheckFailed, ResmolError
from resmol.interop import load
from resmol.interop.export import export_hf, hf
from resmol.interop.resolve import resolve
from resmol.model.llama import CausalLM
from resmol.run.checkpoint_manifest import WEIGHTS, list_checkpoints

# --- generating ----------------------------------------------------------------------------------------------


def generation_guard(bench: Bench) -> set[str]:
    """A text names its checkpoint, and there is no text when the checkpoint cannot be loaded."""
    run, found = bench.folder / "generating", set()
    bench.train(run, 10, "sampling.every=0")
    arguments = ["generate", str(run), "--prompt", "ka", "--max-new-tokens", "2", "--json"]
    answer = json.loads(_call(arguments).stdout)["model"]
    if (answer["step"], len(answer["sha256"])) != (10, 64):
        found.add("the checkpoint is named")
    for path in list_checkpoints(run / "checkpoints"):
        content = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(content[:-4] + bytes(4))
    done = _call(arguments)
    if not isinstance(done.exception, ResmolError):
        found.add("weights that cannot be loaded are an error")
    return found | ({"no other model generates instead"} if done.stdout.strip() else set())


def _call(arguments: list[str]) -> Any:
    return CliRunner().invoke(app, arguments)


def serves_other_weights(patch: pytest.MonkeyPatch) -> None:
    def find(source: Any, **options: Any) -> Any:
        try:
            return resolve(source, **options)
        except ResmolError:  # the mistake
            healthy = Path(source).parent / "fallback"
            return resolve(healthy, **options)

    patch.setattr(load, "resolve", find)
    genuine = list_checkpoints

    def keeps_a_copy(folder: Path) -> list[Path]:
        """Stands for the weights that such a demo has at hand: those of the run before they were damaged."""
        if not (folder.parent.parent / "fallback").exists():
            shutil.copytree(folder.parent, folder.parent.parent / "fallback")
        return genuine(folder)

    patch.setattr("publishing.list_checkpoints", keeps_a_copy)


def generates_unnamed(patch: pytest.MonkeyPatch) -> None:
    genuine = load.load_model

    def load_model(*arguments: Any, **options: Any) -> Any:
        loaded = genuine(*arguments, **options)
        return replace(loaded, source=replace(loaded.source, checkpoint=None, sha256=""))

    patch.setattr(load, "load_model", load_model)


# --- tables --------------------------------------------------------------------------------------------------


def table_guard(bench: Bench) -> set[str]:
    """Speeds on a machine whose pace drifts, of settings that do the same: the table must not call them different."""
    found = set()
    for pace in (0.0, 0.1):  # a quiet machine, and one that becomes faster all the time
        clock, wanted = [0.0], Ablation(bench.config, ("runtime.attention=sdpa,eager",), str(bench.data.root))

        def measure(*_: Any, _pace: float = pace, _clock: list[float] = clock) -> Metrics:
            _clock[0] += 1
            noise = [0.99, 1.01, 1.0, 1.015, 0.985, 1.005, 0.995][int(_clock[0] * 3) % 7]
            speed = 100.0 * (1 + _pace * _clock[0]) * noise
            return {"tokens_per_second": speed, "peak_bytes": 1 << 20, "loss": 2.0, "loss_bits": "40000000"}

        result = ablation.ablate(wanted, measure)
        if not result.variants[-1].name.startswith("control"):
            found.add("a control")
        if any(word in result.verdict(row) for row in result.variants[1:] for word in ("faster", "slower")):
            found.add("what is the same is not called different")
    return found


def one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """All repeats of a variant in a row, each compared with the mean of the first, without an interval."""
    patch.setattr(comparison, "interleaved", lambda variants, rounds, seed: [[i] * rounds for i in range(variants)])
    patch.setattr(comparison, "verdict", lambda ratio, control: "faster" if ratio.middle > 1.02 else "")


def no_control(patch: pytest.MonkeyPatch) -> None:
    genuine = ablation.Comparison
    patch.setattr(ablation, "Comparison", lambda variants, **options: genuine(variants=variants[:-1], **options))


# --- exports -------------------------------------------------------------------------------------------------


def export_guard(bench: Bench) -> set[str]:
    """An export that exists is the trained model; one that is not does not exist."""
    run, out = bench.folder / "exported", bench.folder / "export"
    bench.train(run, 3, "sampling.every=0", "evaluation.every=0")
    failed: set[str] = set()
    try:
        export_hf(run, out)
    except CheckFailed as error:
        failed.add(error.what.partition(": ")[2])
        if out.exists():
            failed.add("a refused export is left behind")
    return failed


def other_weights(patch: pytest.MonkeyPatch) -> None:
    """The weights of another moment: those of the initial model, say."""
    genuine = hf.weight_tensors

    def initial(model: CausalLM) -> dict[str, torch.Tensor]:
        other = CausalLM.empty(model.config)
        other.init_weights(0)
        return genuine(other)

    patch.setattr(hf, "weight_tensors", initial)


def transposed(patch: pytest.MonkeyPatch) -> None:
    """Square matrices the wrong way round: every name and shape is right."""
    genuine = hf.weight_tensors
    patch.setattr(
        hf, "weight_tensors", lambda m: {n: t.T.contiguous() if "q_proj" in n else t for n, t in genuine(m).items()}
    )


def head_cloned(patch: pytest.MonkeyPatch) -> None:
    """An output layer of its own, a copy that was made before the last step."""
    genuine = hf.write_folder

    def write(loaded: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        genuine(loaded, tokenizer, folder, *rest)
        tensors = hf.weight_tensors(loaded.model)
        head = tensors["model.embed_tokens.weight"] * 0.99
        (folder / "model.safetensors").unlink()
        hf.write_tensor_file(folder / "model.safetensors", tensors | {"lm_head.weight": head})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")

    patch.setattr(hf, "write_folder", write)


MISTAKES: list[Mistake] = [
    mistake(14, "export: the head cloned", head_cloned, export_guard, "logits"),
    mistake(23, "other weights are served when loading fails", serves_other_weights, generation_guard,
            "weights that cannot be loaded are an error"),
    mistake(23, "what is served is not named", generates_unnamed, generation_guard, "the checkpoint is named"),
    mistake(24, "ablation: repeats in a row, no interval", one_after_the_other, table_guard, "what is the same"),
    mistake(24, "ablation: no control", no_control, table_guard, "a control"),
    mistake(25, "export: the weights of another moment", other_weights, export_guard, "logits"),
    mistake(25, "export: matrices transposed", transposed, export_guard, "logits"),
]  # fmt: skip
