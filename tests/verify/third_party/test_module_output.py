"""Logits and a loss are found in whatever a module returns, and what holds none is refused in words."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from students import IDS, SMALL, Config, SmolLM2, distance, loaded, returning
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from resmol.errors import CheckFailed

Named = namedtuple("Named", ["hidden", "logits"])


@dataclass(slots=True)
class Result:
    loss: Any
    scores: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.cache, self.logits = [logits[..., :3]], logits


ACCEPTED = {
    "mapping": lambda logits: {"hidden": logits[..., :48], "logits": logits},
    "mapping of other names": lambda logits: {"prediction": logits},
    "loss first in a tuple": lambda logits: (None, logits, ()),
    "logits first in a list": lambda logits: [logits, None],
    "named tuple": lambda logits: Named(logits[..., :48], logits),
    "dataclass": lambda logits: Result(torch.tensor(1.0), logits),
    "ModelOutput": lambda logits: CausalLMOutput(logits=logits),
    "object": Plain,
    "rows": lambda logits: logits.flatten(0, 1),
    "rows in a tuple": lambda logits: (logits.flatten(0, 1), None),
    "double": lambda logits: logits.double(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_logits_are_found(name: str) -> None:
    assert distance(returning(ACCEPTED[name])) < 1e-5


REFUSED = {
    "nothing": (lambda _: None, r"returned nothing \(None\)", "return logits"),
    "text": (lambda _: "logits", "returned a str without logits", "return logits"),
    "hidden states": (lambda logits: logits[..., :48], "hidden states", "apply the output layer"),
    "last position": (lambda logits: logits[:, -1], "last position only", "all positions"),
    "last position kept": (lambda logits: logits[:, -1:], "last position only", "all positions"),
    "tokens": (lambda logits: logits.argmax(-1), "of type torch.int64: not logits", "before any argmax"),
    "sparse": (lambda logits: logits.to_sparse(), "torch.sparse_coo", "an ordinary tensor"),
    "without data": (lambda logits: logits.to("meta"), "on meta", "an ordinary tensor"),
    "integers": (lambda logits: logits.int(), "of type torch.int32", "before any argmax"),
    "transposed": (lambda logits: logits.mT, r"\[B, V, T\]", "transpose"),
    "time first": (lambda logits: logits.transpose(0, 1), r"\[T, B, V\]", "batch first"),
    "another vocabulary": (lambda logits: logits[..., :500], "500 logits for 512 tokens", "512 tokens"),
    "one row too few": (lambda logits: logits[:, 1:], r"logits would be \[2, 12, 512\]", "return logits"),
    "the loss alone": (lambda logits: logits.mean(), "loss alone", "return the logits too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_logits_is_refused(name: str) -> None:
    change, words, fix = REFUSED[name]
    model, _ = loaded(returning(change))
    with pytest.raises(CheckFailed, match=f"forward: .*{words}") as caught:
        model.logits(IDS)
    assert fix in caught.value.fix


def test_what_was_done_is_said() -> None:
    model, _ = loaded(returning(ACCEPTED["rows in a tuple"]))
    model.logits(IDS)
    model.logits(IDS)
    assert model.notes.count("logits [B*T, V] are reshaped to [B, T, V]") == 1
    half, _ = loaded(returning(lambda logits: logits.bfloat16()))
    half.logits(IDS)
    assert "logits are returned in bfloat16" in half.notes


# --- labels --------------------------------------------------------------------------------------------------


class LossAlone(SmolLM2):
    def forward(self, idx: Tensor, y: Tensor | None = None) -> Any:
        return super().forward(idx) if y is None else super().forward(idx, y)[1]


class AllLogitsWithTargets(SmolLM2):
    """As in llama2.c: without targets it computes the last position alone."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(tokens)
        return logits[:, [-1]] if targets is None else logits


class KeywordsOnly(SmolLM2):
    def forward(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        assert attention_mask.shape == input_ids.shape
        logits, loss = super().forward(input_ids, labels)
        return {"loss": loss, "logits": logits}


class LossAsANumber(SmolLM2):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits, loss = super().forward(ids, ids if targets is None else targets)
        return logits, loss.item()


class NeedsAMask(SmolLM2):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        (SmolLM2, "labels"),
        (LossAlone, "y"),
        (AllLogitsWithTargets, "targets"),
        (KeywordsOnly, "labels"),
        (LossAsANumber, "targets"),
    ],
)
def test_labels_are_found_under_any_usual_name(kind: Any, label: str) -> None:
    model, ours = loaded(kind)
    right = F.cross_entropy(ours(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert torch.allclose(model.logits(IDS), ours(IDS), atol=1e-5)
    assert model.label_argument == label
    loss = model.loss(IDS, IDS)
    assert loss is None if kind is AllLogitsWithTargets else torch.allclose(loss, right)


def test_a_module_without_labels_has_no_loss() -> None:
    model, _ = loaded(returning(lambda logits: logits))
    assert model.label_argument is None
    assert model.loss(IDS, IDS) is None


def test_an_argument_that_nobody_can_give_is_named() -> None:
    with pytest.raises(CheckFailed, match="forward: it also needs `mask`") as caught:
        loaded(NeedsAMask)
    assert "give `mask` a default" in caught.value.fix


# --- what it raises ------------------------------------------------------------------------------------------


class Raises(SmolLM2):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).view(3, 5)


class Ends(SmolLM2):
    def forward(self, ids: Tensor) -> Tensor:
        raise SystemExit(2)


class Detaches(SmolLM2):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).detach().requires_grad_() * 1.0


class FailsBackward(SmolLM2):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits.exp().add_(1).sum()
        widened = logits.exp()
        result = widened * 2
        widened.add_(1)
        return result + widened.log()


class PrintsAndSets(SmolLM2):
    """It changes the settings of the whole process, and prints."""

    def forward(self, ids: Tensor) -> Tensor:
        print("shape", ids.shape)
        torch.set_default_dtype(torch.float64)
        ids.zero_() if False else None
        return super().forward(ids)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Raises, r"forward: RuntimeError: shape .* \(.*test_module_output.py:\d+: `return super\(\).*view\(3, 5\)`\)"),
        (Ends, r"forward: it ends the program: sys.exit\(2\)"),
        (FailsBackward, "backward: RuntimeError: one of the variables .* modified by an inplace"),
    ],
)
def test_an_exception_names_the_phase_and_the_students_line(kind: Any, words: str) -> None:
    model, _ = loaded(kind)
    with pytest.raises(CheckFailed, match=words):
        model.capture(IDS)


def test_what_is_detached_has_no_gradients() -> None:
    model, _ = loaded(Detaches)
    assert not [name for name in model.capture(IDS) if name.startswith("gradients")]


def test_nothing_is_printed_and_no_setting_stays(capsys: Any) -> None:
    assert distance(PrintsAndSets) < 1e-5
    printed = capsys.readouterr()
    assert (printed.out, "shape" in printed.err) == ("", True)
    assert torch.get_default_dtype() is torch.float32


def test_ids_stay_as_they_are() -> None:
    class Overwrites(SmolLM2):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            ids.zero_()
            return logits

    def build(config: Config) -> Any:
        return Overwrites(config)

    model, _ = loaded(build)
    before = IDS.clone()
    model.logits(IDS)
    assert torch.equal(IDS, before)
    assert SMALL.vocab_size == 512
