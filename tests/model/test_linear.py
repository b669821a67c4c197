"""Both libraries form the same products: as exact as float32 allows, whatever the shape; float64 is the judge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmol.config.run_config import RunConfig
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.model import linear as module
from resmol.model.cross_entropy import IGNORE_INDEX, cross_entropy_sum
from resmol.model.linear import Linear, MatmulBackend, multiply, set_matmul_backend
from resmol.model.llama import CausalLM

EPS = torch.finfo(torch.float32).eps
needs_onednn = pytest.mark.skipif(not module.has_onednn(), reason="this PyTorch has no oneDNN")
BOTH: list[MatmulBackend] = ["mkl", "onednn"]
SHAPES = [((2, 5, 48), 80), ((7, 48), 80), ((1, 48), 80), ((1, 1, 48), 80), ((48,), 80), ((1, 7), 13), ((3, 1), 1)]


def case(shape: tuple[int, ...], outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, shape[-1], generator=generator, requires_grad=True)
    return x, weight


def assert_rounded(computed: Tensor, exact: Tensor, magnitudes: Tensor, terms: int) -> None:
    """A sum of n products is off by at most n eps times the sum of their magnitudes (Higham 2002, section 3.1)."""
    assert computed.shape == exact.shape
    assert bool(((computed.double() - exact).abs() <= terms * EPS * magnitudes).all())


@needs_onednn
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_products_and_their_gradients(
    shape: tuple[int, ...], outputs: int, grads: bool, backend: MatmulBackend
) -> None:
    x, weight = case(shape, outputs)
    with torch.set_grad_enabled(grads):
        y = multiply(x, weight, backend)
    exact_x, exact_weight = x.detach().double(), weight.detach().double()
    assert_rounded(y, exact_x @ exact_weight.T, exact_x.abs() @ exact_weight.abs().T, shape[-1])
    if not grads:
        return
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(pull)
    rows, pulls = exact_x.reshape(-1, shape[-1]), pull.double().reshape(-1, outputs)
    assert x.grad is not None
    assert weight.grad is not None
    assert_rounded(x.grad, pull.double() @ exact_weight, pull.double().abs() @ exact_weight.abs(), outputs)
    assert_rounded(weight.grad, pulls.T @ rows, pulls.abs().T @ rows.abs(), len(rows))


@needs_onednn
def test_the_choice_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, the two columns of the test above could be the same one."""
    genuine, rows = module.onednn_product, []
    monkeypatch.setattr(module, "onednn_product", lambda x, weight: rows.append(len(x)) or genuine(x, weight))
    x, weight = case((3, 48), 80)
    multiply(x, weight, "mkl").sum().backward()
    assert rows == []
    multiply(x, weight, "onednn").sum().backward()
    assert rows == [3, 3]  # the product, and the gradient of its input
    with torch.no_grad():
        multiply(x, weight, "onednn")
        multiply(x[:1], weight, "onednn")  # a single row goes another way
    assert rows == [3, 3, 3]


@needs_onednn
def test_other_arithmetic_has_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_product", lambda *_: pytest.fail("that is not for oneDNN's float32 product"))
    x, weight = case((4, 48), 80)
    double = multiply(x.double(), weight.double(), "onednn")
    torch.testing.assert_close(double, F.linear(x.double(), weight.double()), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        product = multiply(x, weight, "onednn")
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(product, F.linear(x, weight), rtol=0, atol=0)


@needs_onednn
@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_the_loss_by_either_library(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 7, 24, generator=generator, requires_grad=True)
    weight = torch.randn(40, 24, generator=generator, requires_grad=True)
    targets = torch.randint(40, (2, 7), generator=generator)
    targets[0, 4] = IGNORE_INDEX
    exact = F.cross_entropy(
        (hidden.double() @ weight.double().T).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    wanted = torch.autograd.grad(exact, (hidden, weight))
    for backend in BOTH:
        loss = cross_entropy_sum(hidden, weight, targets, chunk, backend)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
        for mine, other in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_a_whole_model_uses_one_library(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(3)
    set_matmul_backend(model, "onednn")
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert {type(part) for part in linear} == {Linear}
    assert {part.backend for part in linear if isinstance(part, Linear)} == {"onednn"}
    ids = torch.arange(24).reshape(2, 12) % 50
    by_onednn = model(ids)
    set_matmul_backend(model, "mkl")
    torch.testing.assert_close(by_onednn, model(ids), rtol=1e-4, atol=1e-5)


@needs_onednn
def test_greedy_tokens_do_not_depend_on_the_library(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(3)
    texts = []
    for backend in BOTH:
        set_matmul_backend(model, backend)
        texts.append(list(generate(model, [1, 2, 3], SamplingParams(max_new_tokens=8, temperature=0.0), eos_id=None)))
    assert texts[0] == texts[1]


def test_reading_follows_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "cpuinfo"
    for vendor, expected in (("AuthenticAMD", "onednn"), ("GenuineIntel", "mkl"), ("", "mkl")):
        facts.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: one\n")
        monkeypatch.setattr(module, "has_onednn", lambda: True)
        assert module.default_matmul_backend(facts) == expected
        monkeypatch.setattr(module, "has_onednn", lambda: False)
        assert module.default_matmul_backend(facts) == "mkl"
    monkeypatch.setattr(module, "has_onednn", lambda: True)
    assert module.default_matmul_backend(tmp_path / "absent") == "mkl"


@pytest.mark.parametrize("backend", ["mkl", "onednn"])
@pytest.mark.parametrize("shape", [(576,), (1, 576), (1, 1, 576), (2, 576)])
def test_rows_in_bfloat16_are_those_of_float64_rounded(shape: tuple[int, ...], backend: MatmulBackend) -> None:
    """By MKL a single row goes through a kernel of its own, and sums in float32 as the other does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).bfloat16() for s in (shape, (192, 576)))
    with torch.no_grad():
        found = multiply(x, weight, backend)
    exact = x.double() @ weight.double().T
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


def test_a_row_in_bfloat16_meets_weights_in_float32_under_autocast() -> None:
    """As in training's own evaluation and loss, where autocast casts the weight."""
    x, weight = torch.ones(1, 8).bfloat16(), torch.ones(4, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = multiply(x, weight, "mkl")
    assert (found.dtype, found.tolist()) == (torch.bfloat16, [[8.0] * 4])
