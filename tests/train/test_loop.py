"""The step: gradients, counting, learning rate, what evaluation and sampling must not touch, what stops it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import TrainTiny
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.loader import IGNORE_INDEX, Batch, StepBatch
from resmol.data.shards import Dataset
from resmol.errors import DataError, DiskFull, NonFiniteError
from resmol.model.llama import CausalLM
from resmol.run import async_save as saving
from resmol.run.checkpoint_manifest import open_checkpoint
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.train import loop as module
from resmol.train.build import make_loader, new_state
from resmol.train.gradients import accumulate_gradients
from resmol.train.loop import is_due
from resmol.train.lr_schedule import lr_at
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.step import TrainState, start_step, train_step
from resmol.train.step_result import REPRODUCIBLE_FIELDS, first_difference

RUNTIME = Runtime.single()
GOLDEN = Path(__file__).with_name("three_steps.json")


def gradients(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


def test_accumulation_is_one_large_batch(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    found = []
    for micro in (1, 2, 4):
        config = with_overrides(tiny_config, [f"batch.micro_batch_size={micro}"])
        state = new_state(config, RUNTIME)
        batches = make_loader(config, tiny_dataset.train).step_after(8).batches
        assert len({window for batch in batches for window in batch.window_ids}) == 4, "no window twice"
        loss = accumulate_gradients(state.model, batches, config, RUNTIME)
        found.append((float(loss), gradients(state)))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-4, atol=1e-4)


def test_two_threads_give_the_same_bits_each_time(tiny_config: RunConfig) -> None:
    """At the width of the real model, where PyTorch computes with several threads, and with tokens that come often."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 768}
    model = tiny_config.model.model_copy(update={**sizes, "num_hidden_layers": 2, "max_position_embeddings": 256})
    config = with_overrides(tiny_config.model_copy(update={"model": model}), ["runtime.threads=2"])
    ids = torch.randint(0, 40, (2, 128), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, None, (0, 1), ids.numel())
    threads, found = torch.get_num_threads(), []
    try:
        with open_runtime(config) as runtime:
            assert torch.get_num_threads() == 2
            for _ in range(8):
                state = new_state(config, runtime)
                accumulate_gradients(state.model, [batch], config, runtime)
                found.append(gradients(state))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert [name for name, grad in again.items() if not torch.equal(grad, found[0][name])] == []


def test_unequal_micro_batches_are_weighted_by_tokens(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    """Against transformers: one mean over all tokens of the step, not a mean of the micro-batches' means."""
    batches = make_loader(tiny_config, tiny_dataset.train).step_after(0).batches
    targets = batches[0].targets.clone()
    targets[:, 3:] = IGNORE_INDEX
    short = Batch(batches[0].input_ids, targets, None, batches[0].window_ids, int((targets != IGNORE_INDEX).sum()))
    full = Batch(batches[1].input_ids, batches[1].targets, None, batches[1].window_ids, batches[1].tokens)
    state = new_state(tiny_config, RUNTIME)
    reference = LlamaForCausalLM(LlamaConfig(**tiny_config.model.to_hf()))
    reference.load_state_dict(state.model.state_dict(), strict=True)
    logits = reference(torch.cat([short.input_ids, full.input_ids])).logits
    wanted = F.cross_entropy(
        logits.flatten(0, 1), torch.cat([targets, full.targets]).flatten(), ignore_index=IGNORE_INDEX
    )
    wanted.backward()
    tokens = short.tokens + full.tokens
    total = accumulate_gradients(state.model, [short, full], tiny_config, RUNTIME)
    assert float(total) / tokens == pytest.approx(float(wanted.detach()), rel=1e-6)
    for name, grad in gradients(state).items():
        torch.testing.assert_close(grad / tokens, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("step", "length"), [(1, 2), (3, 2), (4, 4), (7, 8), (9, 8), (10, 16)])
def test_a_short_row_is_a_context_of_its_own(
    tiny_config: RunConfig, tiny_dataset: Dataset, step: int, length: int
) -> None:
    """Against transformers, of the same tokens in shorter rows; documents cannot matter where none ends."""
    config = with_overrides(tiny_config, ["data.seq_len_warmup_steps=9", "data.document_mask=false"])
    assert config.data.seq_len == 16
    state = new_state(config, RUNTIME)
    batch = make_loader(config, tiny_dataset.train).step_after(0)
    reference = LlamaForCausalLM(LlamaConfig(**config.model.to_hf()))
    reference.load_state_dict(state.model.state_dict(), strict=True)
    rows = [(b.input_ids.reshape(-1, length), b.targets.reshape(-1, length)) for b in batch.batches]
    logits = reference(torch.cat([ids for ids, _ in rows])).logits
    F.cross_entropy(logits.flatten(0, 1), torch.cat([targets for _, targets in rows]).flatten()).backward()
    start_step(state, step, batch, config, RUNTIME)
    for name, grad in gradients(state).items():
        torch.testing.assert_close(grad / batch.tokens, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_loss_is_that_of_the_next_token(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    """Labels shifted exactly once: the reference shifts the windows itself."""
    state = new_state(tiny_config, RUNTIME)
    reference = LlamaForCausalLM(LlamaConfig(**tiny_config.model.to_hf()))
    reference.load_state_dict(state.model.state_dict(), strict=True)
    config = with_overrides(tiny_config, ["data.document_mask=false"])
    batch = make_loader(config, tiny_dataset.train).step_after(0).batches[0]
    whole = torch.cat([batch.input_ids, batch.targets[:, -1:]], dim=1)
    expected = reference(whole, labels=whole).loss
    found = accumulate_gradients(state.model, [batch], config, RUNTIME) / batch.tokens
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_documents_do_not_see_each_other(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    """With the mask, the hidden states after an end-of-document token do not depend on what came before it."""
    loader = make_loader(tiny_config, tiny_dataset.train)
    batch = next(b for step in range(200) for b in loader.step_after(4 * step).batches if b.document_ids is not None)
    row = next(i for i, ids in enumerate(batch.document_ids) if ids.max() > 0)
    border = int((batch.document_ids[row] == 0).sum())
    model = new_state(tiny_config, RUNTIME).model
    changed = batch.input_ids.clone()
    changed[row, 0] = (changed[row, 0] + 1) % 512
    with torch.no_grad():
        before, after = (
            model.hidden(batch.input_ids, batch.document_ids),
            model.hidden(changed, batch.document_ids),
        )
    assert torch.equal(before[row, border:], after[row, border:])
    assert not torch.equal(before[row, :border], after[row, :border])


def test_the_record_of_a_step_is_what_the_step_returns(
    tmp_path: Path, train_tiny: TrainTiny, tiny_config: RunConfig, tiny_dataset: Dataset
) -> None:
    train_tiny(tmp_path / "run", 2)
    records = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)
    state, loader = new_state(tiny_config, RUNTIME), make_loader(tiny_config, tiny_dataset.train)
    for step in (1, 2):
        result = train_step(state, loader.step_after(state.windows_seen), tiny_config, RUNTIME).to_record()
        assert records[step].items() >= result.items()
        assert set(REPRODUCIBLE_FIELDS) < set(result)
        assert records[step].keys() - result.keys() == {"seconds", "seq", "prev", "time", "kind"}
    assert result["tokens_seen"] == records[1]["tokens"] + records[2]["tokens"]


def test_the_first_difference_is_the_one_that_the_others_follow_from(
    tiny_config: RunConfig, tiny_dataset: Dataset
) -> None:
    loader = make_loader(tiny_config, tiny_dataset.train)
    result = train_step(new_state(tiny_config, RUNTIME), loader.step_after(0), tiny_config, RUNTIME)
    changed = dataclasses.replace(result, loss=1.5, windows="other")
    assert first_difference(result.to_record(), changed.to_record()) == "windows"
    assert first_difference(result.to_record(), dataclasses.replace(result, loss=1.5).to_record()) == "loss_bits"
    assert first_difference(result.to_record(), result.to_record()) is None


def test_learning_rate_logged_is_the_closed_form(tmp_path: Path, train_tiny: TrainTiny, tiny_config: RunConfig) -> None:
    schedule = ["schedule.decay_start=15", "schedule.decay_steps=10"]
    train_tiny(tmp_path / "run", 22, *schedule)
    steps = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)
    config = with_overrides(tiny_config, schedule)
    assert [r["lr"] for r in steps.values()] == [lr_at(s, config.schedule, 0.01) for s in range(1, 23)]
    assert steps[5]["lr"] == pytest.approx(0.005)
    assert steps[20]["lr"] == pytest.approx(0.005)


def test_loss_of_the_step_is_the_mean_over_its_tokens(
    tmp_path: Path, train_tiny: TrainTiny, tiny_config: RunConfig, tiny_dataset: Dataset
) -> None:
    train_tiny(tmp_path / "run", 1)
    record = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)[1]
    model = new_state(tiny_config, RUNTIME).model
    total = tokens = 0.0
    for batch in make_loader(tiny_config, tiny_dataset.train).step_after(0).batches:
        logits = model(batch.input_ids, batch.document_ids)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        total += float(loss.detach())
        tokens += int((batch.targets != IGNORE_INDEX).sum())
    assert record["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert record["tokens"] == tokens


def test_seconds_are_those_of_the_step_alone(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any) -> None:
    """A clock that only saving, evaluation and sampling move: the step's own time must stay zero."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    for name in ("save", "record_evaluation", "record_sample"):
        genuine = getattr(module, name)

        def slow(*arguments: Any, _genuine: Any = genuine, **options: Any) -> Any:
            now[0] += 1000.0
            return _genuine(*arguments, **options)

        monkeypatch.setattr(module, name, slow)
    train_tiny(tmp_path / "run", 20)
    steps = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)
    assert {record["seconds"] for record in steps.values()} == {0.0}


def test_evaluation_and_sampling_change_nothing(tmp_path: Path, train_tiny: TrainTiny) -> None:
    found = []
    for name, every in (("busy", 1), ("quiet", 0)):
        torch.manual_seed(0)
        train_tiny(tmp_path / name, 12, f"evaluation.every={every}", f"sampling.every={every}")
        losses = [r["loss_bits"] for r in select(read_ledger(tmp_path / name / "ledger.jsonl").records, "step")]
        found.append((losses, open_checkpoint(tmp_path / name / "checkpoints" / "step-00000012").state.random_state))
    assert found[0] == found[1]


def test_a_rank_other_than_0_evaluates_and_does_not_sample(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "is_rank_zero", False)
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("a sample"))
    train_tiny(tmp_path / "run", 4, "evaluation.every=2", "sampling.every=2", "checkpoint.every=2")
    kinds = [record["kind"] for record in read_ledger(tmp_path / "run" / "ledger.jsonl").records]
    assert [kind for kind in kinds if kind != "save"] == [
        "start",
        "step",
        "step",
        "eval",
        "step",
        "step",
        "eval",
        "stop",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_leaves_everything_as_it_was(
    tiny_config: RunConfig, tiny_dataset: Dataset, bad: float, monkeypatch: Any
) -> None:
    state = new_state(tiny_config, RUNTIME)
    loader = make_loader(tiny_config, tiny_dataset.train)
    first = train_step(state, loader.step_after(0), tiny_config, RUNTIME)
    weights = {name: t.clone() for name, t in state.model.state_dict().items()}
    moments = [state.optimizer.state[p]["exp_avg_sq"].clone() for p in state.model.parameters()]
    genuine = CausalLM.loss
    monkeypatch.setattr(CausalLM, "loss", lambda *a: genuine(*a) * bad)
    with pytest.raises(NonFiniteError, match=r"step 2 .*windows") as stopped:
        train_step(state, loader.step_after(state.windows_seen), tiny_config, RUNTIME)
    assert stopped.value.exit_code == 70
    assert (state.step, state.tokens_seen, state.windows_seen) == (1, first.tokens, first.windows_seen)
    assert all(torch.equal(t, weights[name]) for name, t in state.model.state_dict().items())
    assert all(
        torch.equal(state.optimizer.state[p]["exp_avg_sq"], m)
        for p, m in zip(state.model.parameters(), moments, strict=True)
    )


def test_a_fault_that_does_not_come_twice_is_survived(
    tiny_config: RunConfig, tiny_dataset: Dataset, monkeypatch: Any
) -> None:
    loader = make_loader(tiny_config, tiny_dataset.train)
    results = []
    for faults in (0, 1):
        state, left, genuine = new_state(tiny_config, RUNTIME), [faults], CausalLM.loss

        def flaky(*a: Any, _left: list[int] = left, _genuine: Any = genuine) -> torch.Tensor:
            _left[0] -= 1
            return _genuine(*a) * (math.nan if _left[0] == 0 else 1.0)

        with monkeypatch.context() as patch:
            patch.setattr(CausalLM, "loss", flaky)
            results.append(train_step(state, loader.step_after(0), tiny_config, RUNTIME))
    assert results[0] == results[1]


def test_a_full_disk_prunes_once_then_stops(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: Any) -> None:
    genuine, calls = saving.stage_checkpoint, []

    def full(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].step)
        if arguments[1].step >= 15:
            raise DiskFull("full", fix="")
        return genuine(*arguments, **options)

    monkeypatch.setattr(saving, "stage_checkpoint", full)
    with pytest.raises(DiskFull) as stopped:
        train_tiny(tmp_path / "run", 30)
    assert stopped.value.exit_code == 28
    assert calls == [5, 10, 15, 15]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def test_run_directory_that_vanishes_is_not_made_again(tmp_path: Path, train_tiny: TrainTiny) -> None:
    class Move:
        def show(self, record: Record) -> None:
            if record["kind"] == "step" and record["step"] == 7:
                (tmp_path / "run").rename(tmp_path / "away")

        def close(self) -> None:
            pass

    with pytest.raises(DataError, match="moved or removed"):
        train_tiny(tmp_path / "run", 20, log_writers=lambda _: [Move()])
    assert not (tmp_path / "run").exists()


def test_learns(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 100)
    steps = effective_steps(read_ledger(tmp_path / "run" / "ledger.jsonl").records)
    assert steps[1]["loss"] > math.log(512) - 0.5
    assert sum(steps[s]["loss"] for s in range(91, 101)) / 10 < steps[1]["loss"] - 1.0
    evaluations = list(select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "eval"))
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_is_due() -> None:
    assert [step for step in range(1, 12) if is_due(5, step, 11)] == [5, 10, 11]
    assert not any(is_due(0, step, 11) for step in range(1, 12))


def test_three_steps_give_the_golden_numbers(tiny_config: RunConfig) -> None:
    """If this fails and no numerics were meant to change, that is a bug.

    If they were meant to change, look at the difference, then bless it: delete the golden file, run this test once
    (it fails and writes the new one), and say why in the commit.
    """
    state, found = new_state(tiny_config, RUNTIME), []
    for step in range(1, 4):
        ids = (torch.arange(4 * 17).reshape(4, 17) * 7919 * step) % 512
        batches = [Batch(rows[:, :-1], rows[:, 1:], None, (0, 1), 32) for rows in ids.split(2)]
        result = train_step(
            state, StepBatch(batches, 64, window_digest="", windows_seen=0, epoch=0.0), tiny_config, RUNTIME
        )
        found.append({"loss": result.loss, "grad_norm": result.grad_norm})
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        pytest.fail("the golden file was missing and has been written; run again")
    assert found == [pytest.approx(step, rel=2e-5) for step in json.loads(GOLDEN.read_text(encoding="utf-8"))]
