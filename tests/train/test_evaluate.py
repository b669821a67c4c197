"""The held-out loss: a token-weighted mean, and bits for each byte of text."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError
from resmol.model.llama import CausalLM
from resmol.train.build import make_loader
from resmol.train.evaluate import evaluate
from resmol.train.parallel import Runtime

RUNTIME = Runtime.single()


def test_loss_and_bits_per_byte(tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(1)
    loader = make_loader(tiny_config, tiny_dataset.val)
    result = evaluate(model, loader.sequential(3), tiny_tokenizer.byte_lengths(), RUNTIME, chunk_tokens=5)

    ids = tiny_dataset.val.read(0, len(tiny_dataset.val))
    assert result.tokens == len(ids) - 1, "every token but the first is a target once"
    text = tiny_tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True)
    assert result.bytes == len(text.encode())

    total = 0.0
    for batch in loader.sequential(1):
        logits = model(batch.input_ids, batch.document_ids).double()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").detach())
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / result.tokens), rel=1e-5)


def test_a_uniform_model(tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer) -> None:
    model = CausalLM(tiny_config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = evaluate(
        model,
        make_loader(tiny_config, tiny_dataset.val).sequential(4),
        tiny_tokenizer.byte_lengths(),
        RUNTIME,
    )
    assert result.loss == pytest.approx(math.log(512), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_stay(
    tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer, training: bool
) -> None:
    model = CausalLM(tiny_config.model).train(training)
    evaluate(
        model,
        make_loader(tiny_config, tiny_dataset.val).sequential(4, 2),
        tiny_tokenizer.byte_lengths(),
        RUNTIME,
    )
    assert model.training is training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("world_size", [2, 3, 4, 9])
def test_ranks_share_the_batches_and_get_the_bits_of_one(
    tiny_config: RunConfig,
    tiny_dataset: Dataset,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
) -> None:
    """The ranks run one after the other, twice: up to the all-reduce, and with the result that it then has."""
    model, lengths = CausalLM(tiny_config.model), tiny_tokenizer.byte_lengths()
    model.init_weights(1)
    batches = make_loader(tiny_config, tiny_dataset.val).sequential(2, 11)
    alone = evaluate(model, batches, lengths, RUNTIME)
    ranks = [Runtime(rank, world_size, torch.device("cpu"), None) for rank in range(world_size)]
    parts: list[torch.Tensor] = []
    forwards: Counter[int] = Counter()

    def stop(runtime: Runtime, tensor: torch.Tensor) -> None:
        parts.append(tensor)
        raise InterruptedError

    monkeypatch.setattr(Runtime, "all_reduce_sum", stop)
    for runtime in ranks:
        hook = model.model.layers[0].register_forward_hook(lambda *_, rank=runtime.rank: forwards.update([rank]))
        with hook, suppress(InterruptedError):
            evaluate(model, batches, lengths, runtime)
    assert (forwards.total(), max(forwards.values())) == (len(batches), math.ceil(len(batches) / world_size))
    monkeypatch.setattr(Runtime, "all_reduce_sum", lambda _, tensor: tensor.copy_(torch.stack(parts).sum(0)))
    assert [evaluate(model, batches, lengths, runtime) for runtime in ranks] == [alone] * world_size


def test_nothing_to_evaluate(tiny_config: RunConfig, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no held-out tokens"):
        evaluate(CausalLM(tiny_config.model), [], tiny_tokenizer.byte_lengths(), RUNTIME)
