"""DDP and FSDP2 on two and four gloo ranks, beside one process that does the same steps of a reduced 1.7B model."""

from __future__ import annotations

import re

import pytest
import torch
from rank_runs import Outcome, Run, config_of, run_all

from resmol.errors import ConfigError
from resmol.train.parallel import check_ranks

FSDP, PAIRS = "parallel.strategy=fsdp", "parallel.replicas=2"
BF16 = "runtime.precision=bfloat16"
RUNS = {
    "one": Run(1),
    "ddp-4": Run(4, (), 6),
    "ddp-4-resumed": Run(4, (), 6, 3),
    "fsdp-2": Run(2, (FSDP,)),
    "fsdp-3-uneven": Run(2, (FSDP, "model.vocab_size=4095"), 1),
    "hsdp-4": Run(4, (FSDP, PAIRS)),
    "one-bf16": Run(1, (BF16,)),
    "ddp-2-bf16": Run(2, (BF16,)),
    "fsdp-2-bf16": Run(2, (FSDP, BF16), 4),
    "fsdp-2-bf16-resumed": Run(2, (FSDP, BF16), 4, 2),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All runs, in the processes of one program."""
    return run_all(RUNS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["ddp-4", "fsdp-2", "hsdp-4"])
def test_losses_and_norms_are_those_of_one_process(outcomes: dict[str, Outcome], name: str) -> None:
    one, ranks = outcomes["one"], outcomes[name]
    assert ranks.losses[:2] == pytest.approx(one.losses, rel=1e-5)
    assert ranks.norms[:2] == pytest.approx(one.norms, rel=1e-4)


@pytest.mark.parametrize("name", ["fsdp-2", "hsdp-4"])
def test_shards_begin_with_the_bits_of_one_process_and_stay_close(outcomes: dict[str, Outcome], name: str) -> None:
    one, ranks = outcomes["one"], outcomes[name]
    assert ranks.initial.keys() == one.initial.keys()
    assert all(torch.equal(ranks.initial[key], one.initial[key]) for key in one.initial)
    assert ranks.tensors.keys() == one.tensors.keys(), "weights, moments and averages"
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(ranks.tensors[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_each_rank_holds_a_half(outcomes: dict[str, Outcome]) -> None:
    whole = outcomes["one"].held
    assert [outcomes[name].held for name in ("fsdp-2", "hsdp-4", "ddp-4")] == [whole // 2, whole // 2, whole]
    assert outcomes["hsdp-4"].rows == [2048] * 4
    assert outcomes["fsdp-3-uneven"].rows == [2048, 2047]


def test_a_resumed_run_of_four_ranks_has_the_bits_of_an_uninterrupted_one(outcomes: dict[str, Outcome]) -> None:
    """A ring of four adds in an order that depends on the place of a gradient in its bucket."""
    straight, resumed = outcomes["ddp-4"], outcomes["ddp-4-resumed"]
    assert (resumed.losses, resumed.norms) == (straight.losses, straight.norms)
    assert all(torch.equal(resumed.tensors[key], straight.tensors[key]) for key in straight.tensors)


def test_bfloat16_is_gathered_and_no_copy_of_a_block_stays(outcomes: dict[str, Outcome]) -> None:
    """Autocast would keep a copy of each block's weights for the backward pass, as it does with one process."""
    one, ranks = outcomes["one-bf16"], outcomes["fsdp-2-bf16"]
    assert ranks.losses[:2] == pytest.approx(one.losses, rel=1e-4)
    assert ranks.norms[:2] == pytest.approx(one.norms, rel=2e-3)
    assert all(tensor.dtype == torch.float32 for tensor in ranks.tensors.values())
    assert ranks.kept == 0
    assert outcomes["ddp-2-bf16"].kept == outcomes["one-bf16"].kept > 0, "what autocast keeps is found"


def test_a_resumed_run_of_shards_in_bfloat16_has_the_bits_of_an_uninterrupted_one(outcomes: dict[str, Outcome]) -> None:
    straight, resumed = outcomes["fsdp-2-bf16"], outcomes["fsdp-2-bf16-resumed"]
    assert (resumed.losses, resumed.norms) == (straight.losses, straight.norms)
    assert all(torch.equal(resumed.tensors[key], straight.tensors[key]) for key in straight.tensors)


@pytest.mark.parametrize(
    ("world_size", "overrides", "problem"),
    [
        (3, (), "4 micro-batches a step do not divide by 3 ranks; the nearest number that fits is 2"),
        (9, (), "4 micro-batches a step do not divide by 9 ranks; the nearest number that fits is 4"),
        (1, (FSDP,), "parallel.strategy is fsdp, and there is one rank"),
        (2, (PAIRS,), "parallel.replicas is 2, and parallel.strategy is ddp"),
        (2, (FSDP, PAIRS), "parallel.replicas is 2, as many as there are ranks"),
        (4, (FSDP, "parallel.replicas=3"), "parallel.replicas is 3, which does not divide the 4 ranks"),
        (2, (FSDP, "optimizer.name=muon"), "optimizer.name is muon"),
    ],
)
def test_ranks_that_do_not_fit(world_size: int, overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_ranks(config_of(Run(world_size, overrides)), world_size)
