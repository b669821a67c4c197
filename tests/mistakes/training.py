"""Rows 3, 4, 6, 7, 8, 18, 20, 21, 22: mistakes in the step, the schedule and what is shown of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench import RUNTIME, Bench, Mistake, mistake, replaced
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.config.load import with_overrides
from resmol.data.loader import IGNORE_INDEX, Batch, Loader
from resmol.inference.sampling_params import SamplingParams
from resmol.model.llama import CausalLM, Decoder
from resmol.run.checkpoint_manifest import open_checkpoint
from resmol.run.ledger import effective_steps, read_ledger, select
from resmol.train import gradients, step
from resmol.train import loop as train
from resmol.train import parallel as distributed
from resmol.train import start as launch
from resmol.train.build import make_loader, new_state
from resmol.train.parallel import Runtime

# --- what a step computes ------------------------------------------------------------------------------------


def reference_step(bench: Bench, seen: int) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of the step after ``seen`` windows by transformers, from the text itself, as one mean."""
    config = bench.config
    loader = make_loader(config, bench.short_data.train)
    reference = LlamaForCausalLM(LlamaConfig(**config.model.to_hf()))
    reference.load_state_dict(new_state(config, RUNTIME).model.state_dict(), strict=True)
    stream, length = bench.short_data.train, config.data.seq_len
    total, tokens = torch.zeros(()), 0
    for window in loader.windows_after(seen).tolist():
        text = stream.read(window * length, min((window + 1) * length + 1, len(stream)))
        ids = torch.from_numpy(text)[None]
        loss = reference(ids, labels=ids).loss  # it shifts the labels itself
        total, tokens = total + loss * (ids.numel() - 1), tokens + ids.numel() - 1
    (total / tokens).backward()
    return float(total.detach()) / tokens, {n: p.grad for n, p in reference.named_parameters()}, tokens


def step_guard(bench: Bench) -> set[str]:
    """Compare loss and gradients of a step of unequal micro-batches with transformers, on one process and on two."""
    whole = make_loader(bench.config, bench.short_data.train)
    places = range(0, 40 * whole.windows_per_step, whole.windows_per_step)
    seen = next(place for place in places if whole.step_after(place).tokens != 64)
    loss, gradients, tokens = reference_step(bench, seen)
    found = set()
    for micro, world in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 2)):
        overrides = [f"batch.micro_batch_size={micro}", "data.document_mask=false"]
        config = with_overrides(bench.config, overrides)
        state = new_state(config, RUNTIME)
        loader = make_loader(config, bench.short_data.train)
        ours = _on_processes(state, loader, seen, config, world)
        where = "micro-batches" if world == 1 else "processes"
        if not math.isclose(ours / tokens, loss, rel_tol=1e-5):
            found.add(f"loss of the step over {where}")
        for name, parameter in state.model.named_parameters():
            if not torch.allclose(parameter.grad / tokens, gradients[name], rtol=1e-3, atol=1e-6):
                found.add(f"gradients of the step over {where}")
    return found


def _on_processes(state: Any, loader: Loader, seen: int, config: Any, world: int) -> float:
    """Run the ranks one after the other; what the last one reduces over is what the others computed."""
    others: list[list[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in reversed(range(world)):
            computed: list[Tensor] = []
            queue = [iter(tensors) for tensors in others] if rank == 0 else []

            def all_reduce(
                tensor: Tensor, *, async_op: bool = False, _computed: list[Tensor] = computed, _queue: Any = queue
            ) -> Any:
                _computed.append(tensor.clone())
                for other in _queue:
                    tensor += next(other)
                return SimpleNamespace(get_future=lambda: _finished([tensor])) if async_op else None

            patch.setattr(distributed.dist, "all_reduce", all_reduce)
            state.optimizer.zero_grad(set_to_none=True)
            runtime = Runtime(rank, world, RUNTIME.device, None)
            batches = loader.step_after(seen, rank, world).batches
            total = step.accumulate_gradients(state.model, batches, config, runtime)
            for parameter in state.model.parameters() if world > 1 else ():  # a bucket each, in DDP's place
                bucket = SimpleNamespace(buffer=lambda grad=parameter.grad: grad, is_last=lambda: False)
                parameter.grad.copy_(gradients._sum_over_ranks(runtime, bucket).wait())
            others.append(computed)
    return float(total)


def _finished(result: Any) -> torch.futures.Future[Any]:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return future


GENUINE_BATCH, GENUINE_ACCUMULATE = Loader._batch, step.accumulate_gradients
GENUINE_SUM = gradients._sum_over_ranks


def shifted_twice(self: Loader, windows: Any) -> Batch:
    batch = GENUINE_BATCH(self, windows)
    targets = torch.full_like(batch.targets, IGNORE_INDEX)
    targets[:, :-1] = batch.targets[:, 1:]
    return Batch(batch.input_ids, targets, batch.document_ids, batch.window_ids, batch.tokens)


def never_shifted(self: Loader, windows: Any) -> Batch:
    batch = GENUINE_BATCH(self, windows)
    return Batch(batch.input_ids, batch.input_ids.clone(), batch.document_ids, batch.window_ids, batch.tokens)


def the_same_again(model: CausalLM, batches: Any, config: Any, runtime: Runtime) -> Tensor:
    return GENUINE_ACCUMULATE(model, [batches[0]] * len(batches), config, runtime)


def mean_of_means(model: CausalLM, batches: Any, config: Any, runtime: Runtime) -> Tensor:
    """Every micro-batch weighs the same, however many tokens it has."""
    tokens = sum(batch.tokens for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        hidden = model.hidden(batch.input_ids, batch.document_ids)
        logits = model.lm_head(hidden).flatten(0, 1)
        mean = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE_INDEX) / len(batches)
        (mean * tokens).backward()
        total += mean.detach() * tokens
    runtime.all_reduce_sum(total)
    return total


def averaged_over_processes(runtime: Runtime, bucket: Any) -> Any:
    return GENUINE_SUM(runtime, bucket).then(lambda done: done.value() / runtime.world_size)


# --- the learning rate ---------------------------------------------------------------------------------------


def schedule_guard(bench: Bench) -> set[str]:
    """Compare the recorded learning rates of a run that was resumed with the closed form, written down again here."""
    overrides = ("schedule.kind=cosine", "schedule.horizon=40", "schedule.final_fraction=0.1")
    for steps in (14, 24):
        bench.train(bench.folder / "schedule", steps, *overrides)
    records = effective_steps(read_ledger(bench.folder / "schedule" / "ledger.jsonl").records)
    found = set()
    for number in (1, 2, 5, 9, 10, 11, 14, 15, 20, 24):
        wave = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (number - 10) / 30))
        if not math.isclose(records[number]["lr"], 0.01 * (number / 10 if number <= 10 else wave)):
            found.add("learning rate after a resume" if number > 14 else "learning rate")
    return found


def horizon_is_the_stop(patch: pytest.MonkeyPatch) -> None:
    genuine_train, genuine_rate = launch.train, step.lr_at

    def tied(state: Any, session: Any) -> None:
        update = {"horizon": session.config.train.steps}
        patch.setattr(step, "lr_at", lambda number, s, peak: genuine_rate(number, s.model_copy(update=update), peak))
        genuine_train(state, session)

    patch.setattr(launch, "train", tied)


def multiplied_twice(patch: pytest.MonkeyPatch) -> None:
    genuine = step.lr_at
    patch.setattr(step, "lr_at", lambda number, s, peak: genuine(number, s, peak) ** 2 / peak)


def ratio_as_absolute(patch: pytest.MonkeyPatch) -> None:
    genuine = step.lr_at
    patch.setattr(step, "lr_at", lambda number, s, peak: genuine(number, s, peak) / peak)


# --- what evaluation and sampling leave behind ---------------------------------------------------------------


def side_effects_guard(bench: Bench) -> set[str]:
    """A run that evaluates and samples after every step is the run that never does."""
    runs = {}
    for name, every in (("busy", 1), ("quiet", 0)):
        torch.manual_seed(0)
        state = bench.train(bench.folder / name, 6, f"evaluation.every={every}", f"sampling.every={every}")
        losses = [r["loss_bits"] for r in select(read_ledger(bench.folder / name / "ledger.jsonl").records, "step")]
        random_state = open_checkpoint(bench.folder / name / "checkpoints" / "step-00000006").state.random_state
        runs[name] = {"losses": losses, "random state": random_state, "training mode": state.model.training}
    return {
        f"{what} after evaluation and sampling" for what in runs["busy"] if runs["busy"][what] != runs["quiet"][what]
    }


def evaluation_mode_stays(patch: pytest.MonkeyPatch) -> None:
    genuine = train.generate

    def quiet(model: CausalLM, *arguments: Any, **options: Any) -> Any:
        return genuine(model.eval(), *arguments, **options)

    patch.setattr(train, "generate", quiet)


def evaluation_draws(patch: pytest.MonkeyPatch) -> None:
    genuine = train.evaluate

    def drawing(*arguments: Any, **options: Any) -> Any:
        torch.randperm(10)  # of the windows to look at, say
        return genuine(*arguments, **options)

    patch.setattr(train, "evaluate", drawing)


# --- token 0 -------------------------------------------------------------------------------------------------


class _AlwaysZero(CausalLM):
    """Says token 0, whatever it reads."""

    def hidden(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.lm_head.weight[0].detach().expand(*input_ids.shape, -1)


def zero_guard(bench: Bench) -> set[str]:
    """Ids of 0 are ids: the end of a document is seen by the mask, and ends a generation."""
    found = set()
    if (bench.config.model.bos_token_id, bench.config.model.eos_token_id, bench.tokenizer.eos_id) != (0, 0, 0):
        found.add("configuration with bos = eos = 0")
    loader = make_loader(bench.config, bench.short_data.train)
    batches = [batch for step in range(9) for batch in loader.step_after(step * loader.windows_per_step).batches]
    ends = [batch for batch in batches if bool((batch.input_ids[:, :-1] == 0).any())]
    if not ends or any(batch.document_ids is None for batch in ends):
        found.add("documents that end with token 0")
    model = _AlwaysZero(bench.config.model)
    model.lm_head.weight.data.zero_()[0] = 1.0
    if list(train.generate(model, [5], SamplingParams(max_new_tokens=4, temperature=0.0), eos_id=0)):
        found.add("generation stops at token 0")
    return found


def zero_is_no_border(patch: pytest.MonkeyPatch) -> None:
    genuine = Loader.__init__
    patch.setattr(Loader, "__init__", lambda self, *a, eos_id, **o: genuine(self, *a, eos_id=eos_id or -1, **o))


def zero_does_not_stop(patch: pytest.MonkeyPatch) -> None:
    genuine = train.generate
    patch.setattr(train, "generate", lambda *a, eos_id, **o: genuine(*a, eos_id=eos_id or None, **o))


# --- what is shown -------------------------------------------------------------------------------------------


def figures_guard(bench: Bench) -> set[str]:
    """The recorded loss is that of all tokens of the step; its seconds are those of the step alone."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "perf_counter", lambda: now[0])
        for name in ("save", "record_evaluation", "record_sample"):
            patch.setattr(train, name, _after_1000_seconds(now, getattr(train, name)))
        bench.train(bench.folder / "figures", 20)
    records = effective_steps(read_ledger(bench.folder / "figures" / "ledger.jsonl").records)
    found = {"seconds of a step"} if {record["seconds"] for record in records.values()} != {0.0} else set()
    model, losses = new_state(bench.config, RUNTIME).model, []
    for batch in make_loader(bench.config, bench.data.train).step_after(0).batches:
        logits = model(batch.input_ids, batch.document_ids).flatten(0, 1).detach()
        losses.append(F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"))
    mean = float(torch.cat(losses).sum()) / sum(int((loss != 0).sum()) for loss in losses)
    return found | (set() if math.isclose(records[1]["loss"], mean, rel_tol=1e-5) else {"loss of the step"})


def _after_1000_seconds(now: list[float], genuine: Any) -> Any:
    def slow(*arguments: Any, **options: Any) -> Any:
        now[0] += 1000.0
        return genuine(*arguments, **options)

    return slow


def since_the_last_step(patch: pytest.MonkeyPatch) -> None:
    genuine, last = train.record_step, [0.0]

    def record(session: Any, result: Any, _seconds: float) -> None:
        now = train.time.perf_counter()
        seconds, last[0] = now - last[0], now
        genuine(session, result, seconds)

    patch.setattr(train, "record_step", record)


def loss_of_the_last_micro_batch(model: CausalLM, batches: Any, *arithmetic: Any) -> Tensor:
    totals = [GENUINE_ACCUMULATE(model, [batch], *arithmetic) for batch in batches]
    return totals[-1] * len(totals)


# --- the arithmetic ------------------------------------------------------------------------------------------


def arithmetic_guard(bench: Bench) -> set[str]:
    """A run on a CPU ends, without half precision that its configuration does not name."""
    seen: set[torch.dtype] = set()
    genuine = Decoder.transform  # what every forward pass goes through

    def watched(self: Decoder, *arguments: Any, **options: Any) -> Tensor:
        products = torch.ones(1, 1) @ torch.ones(1, 1)
        seen.add(products.dtype)
        return genuine(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "transform", watched)
        try:
            bench.train(bench.folder / "arithmetic", 2, "sampling.every=0", "evaluation.every=0")
        except (RuntimeError, AssertionError) as error:
            return {f"smoke run on a CPU: {error}"}
    return {f"arithmetic in {dtype}" for dtype in seen - {torch.float32}}


def needs_a_gpu(patch: pytest.MonkeyPatch) -> None:
    genuine = step.train_step

    def synchronising(*arguments: Any) -> Any:
        torch.cuda.synchronize()
        return genuine(*arguments)

    patch.setattr(step, "train_step", synchronising)


def half_without_a_scaler(self: Runtime) -> Any:
    return torch.autocast("cpu", dtype=torch.float16)


ACCUMULATE, BATCH = "resmol.train.step.accumulate_gradients", "resmol.data.loader.Loader._batch"
MISTAKES: list[Mistake] = [
    mistake(3, "labels shifted twice", replaced(BATCH, shifted_twice), step_guard, "loss of the step"),
    mistake(3, "labels never shifted", replaced(BATCH, never_shifted), step_guard, "loss of the step"),
    mistake(4, "the same micro-batch in every accumulation step", replaced(ACCUMULATE, the_same_again), step_guard,
            "gradients of the step over micro-batches"),
    mistake(6, "micro-batches: a mean of means", replaced(ACCUMULATE, mean_of_means), step_guard,
            "loss of the step over micro-batches", "gradients of the step over micro-batches"),
    mistake(6, "processes: averaged", replaced("resmol.train.gradients._sum_over_ranks",
            averaged_over_processes), step_guard, "gradients of the step over processes"),
    mistake(7, "learning rate: the horizon is the stop step", horizon_is_the_stop, schedule_guard, "learning rate"),
    mistake(8, "learning rate: multiplied twice", multiplied_twice, schedule_guard, "learning rate"),
    mistake(8, "learning rate: a ratio taken for the rate", ratio_as_absolute, schedule_guard, "learning rate"),
    mistake(18, "evaluation mode left on after sampling", evaluation_mode_stays, side_effects_guard, "training mode"),
    mistake(18, "evaluation draws from training's generator", evaluation_draws, side_effects_guard, "random state"),
    mistake(20, "token 0 is no end of a document", zero_is_no_border, zero_guard, "documents"),
    mistake(20, "token 0 does not end a generation", zero_does_not_stop, zero_guard, "generation stops"),
    mistake(21, "tokens/s with saving, evaluation and sampling", since_the_last_step, figures_guard, "seconds"),
    mistake(21, "loss of the last micro-batch", replaced(ACCUMULATE, loss_of_the_last_micro_batch), figures_guard,
            "loss of the step"),
    mistake(22, "a CPU path that crashes", needs_a_gpu, arithmetic_guard, "smoke run"),
    mistake(22, "float16 without a scaler", replaced("resmol.train.parallel.Runtime.autocast", half_without_a_scaler),
            arithmetic_guard, "arithmetic in torch.float16"),
]  # fmt: skip
