"""The rows of the training step: every way to compute it passes, and a fault in one of them fails its row alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from resmol.checks import Check, all_passed
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.data.loader import Batch
from resmol.model import linear
from resmol.model.linear import has_onednn
from resmol.model.llama import CausalLM
from resmol.train.compiler import has_compiler
from resmol.verify import training as module
from resmol.verify.training import VARIANTS, training_parity

ROWS = ["training, mkl", "training, onednn", "training, bfloat16", "training, float16", "training, checkpointing",
        "training, compiled"]  # fmt: skip
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_preset("nano").model


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_every_way_to_compute_a_step_has_its_row(config: ModelConfig) -> None:
    checks = training_parity(config)
    assert [check.name for check in checks] == ROWS
    assert all_passed(checks), failed(checks)
    assert [check.measured for check in checks if check.measured.startswith("not checked")] == [
        "not checked: not under pytest"  # what is checked for shapes at every call cannot be compiled
    ]


def test_an_untied_model_passes_too(config: ModelConfig) -> None:
    assert all_passed(training_parity(config.model_copy(update={"tie_word_embeddings": False})))


def test_without_onednn_its_row_is_not_checked(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    row = training_parity(config)[1]
    assert (row.passed, row.measured) == (True, "not checked: this PyTorch has no oneDNN")


@needs_onednn
def test_a_fault_in_onednns_product(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = linear.onednn_product
    monkeypatch.setattr(linear, "onednn_product", lambda x, weight: genuine(x, weight) * 1.0001)
    assert failed(training_parity(config)) == {"training, onednn"}


def test_a_fault_in_activation_checkpointing(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of a block is detached, so no gradient reaches the ones below."""
    monkeypatch.setattr(
        "resmol.model.llama.checkpoint", lambda layer, x, *given, **_: layer(x.detach().requires_grad_(), *given)
    )
    assert failed(training_parity(config)) == {"training, checkpointing"}


def test_documents_that_training_does_not_mask(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = CausalLM.loss

    def unmasked(self: CausalLM, ids: Tensor, targets: Tensor, _documents: Tensor, chunk: int) -> Tensor:
        return genuine(self, ids, targets, None, chunk)

    monkeypatch.setattr(CausalLM, "loss", unmasked)
    assert failed(training_parity(config)) == set(ROWS[:-1])


def test_a_gradient_that_forgets_the_first_micro_batch(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = module.accumulate_gradients

    def last_only(model: CausalLM, batches: list[Batch], *given: Any) -> Tensor:
        total = genuine(model, batches[:1], *given)
        model.zero_grad()
        return total + genuine(model, batches[1:], *given)

    monkeypatch.setattr(module, "accumulate_gradients", last_only)
    assert failed(training_parity(config)) == set(ROWS[:-1])


def test_a_compiler_that_fails_is_a_failure_and_no_traceback(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no header file\nand more")

    monkeypatch.setattr(module, "compiler_problem", lambda _device: "")
    monkeypatch.setattr(module, "compile_blocks", broken)
    monkeypatch.setattr(module, "VARIANTS", VARIANTS[-1:])
    (row,) = training_parity(config)
    assert (row.passed, row.measured) == (False, "RuntimeError: no header file")


COMPILED = """
import json
import torch
from resmol.config.load import load_preset
from resmol.model import attention_backward as attention
from resmol.train import compiler
from resmol.verify import training

training.VARIANTS = training.VARIANTS[-1:]
training.compiler_problem = compiler.compiler_problem = lambda _device: ""
compile = torch.nn.Module.compile  # traced and differentiated as ever, but no C++ is generated
torch.nn.Module.compile = lambda self, **options: compile(self, backend="aot_eager_decomp_partition", **options)
genuine, found = attention._gradients_of_block, []
value_gradient_off = lambda *given: (lambda query, key, value: (query, key, value * 1.0001))(*genuine(*given))
for attention._gradients_of_block in (genuine, value_gradient_off):
    torch.compiler.reset()
    (row,) = training.training_parity(load_preset("nano").model)
    found.append([row.passed, row.measured])
print(json.dumps(found))
"""


def in_a_process(*command: str, **variables: str) -> Any:
    """Run Python and return the JSON it prints: what is checked for shapes at every call cannot be compiled."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), **variables)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_fault_in_the_backward_pass_of_compiled_attention() -> None:
    healthy, faulty = in_a_process("-c", COMPILED)
    assert healthy[0], healthy
    assert not faulty[0], faulty
    assert "compared" in healthy[1]
    assert "compared" in faulty[1]


def test_a_compiler_that_is_switched_off_is_no_proof() -> None:
    (healthy, _) = in_a_process("-c", COMPILED, TORCH_COMPILE_DISABLE="1")
    assert healthy == [True, "not checked: PyTorch's compiler is switched off"]


@pytest.mark.slow
def test_the_command_checks_what_the_compiler_generates(tmp_path: Path) -> None:
    command = ("-m", "resmol", "verify", "--preset", "nano", "--json")
    checks = in_a_process(*command, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))["checks"]
    (row,) = (check for check in checks if check["name"] == "training, compiled")
    assert row["passed"], row
    assert has_compiler() == ("compared" in row["measured"]), row
