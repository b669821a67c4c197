"""Is an export the model that it was made from? What transformers reads, against what we computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from resmol.checks import Check
from resmol.errors import CheckFailed, DataError
from resmol.generate import Sampling, generate
from resmol.model import CausalLM
from resmol.tokenizer import Tokenizer

NEW_TOKENS = 16
# Relative to the largest logit. Two float32 implementations differ by some 1e-6; the smallest mistake, by over 1e-2.
TOLERANCE = 1e-4
# What tokenizers disagree about: digits, runs of spaces, newlines, scripts, control characters, special tokens.
HARD_TEXTS = (
    "a  1", "  2024-11-24  12:30", "x=1234567890;\n\n\ty  =  3.14", "tabs\t\tand   spaces \n \n",
    "naïve café — “quotes”…", "日本語 123 العربية ٣",
    "\U0001f642 \U0001f469\u200d\U0001f467 e\u0301", "\u200b\ufeff\x7f",
    "don't we'll I'M", "<|endoftext|>a<|im_start|>", "", " ", "def f(x):\n    return x**2  # 2nd",
    "ROMEO:\nO, she doth teach the torches to burn bright!",
)  # fmt: skip


@dataclass(frozen=True)
class ReadBack:
    """What another implementation got out of an export."""

    logits: list[Tensor]
    greedy: list[list[int]]
    ids: list[list[int]]


def compare_with_transformers(model: CausalLM, tokenizer: Tokenizer, folder: Path) -> list[Check]:
    """Load a folder with transformers in a process of its own and compare it with ``model``.

    Args:
        model: Ours, with the weights as the file has them, computing in float32.
        tokenizer: Ours.
        folder: The export.

    Returns:
        The checks, failed ones included.

    Raises:
        DataError: transformers is not installed.
        CheckFailed: transformers cannot load the folder.
    """
    inputs = comparison_inputs(model)
    theirs = read_back(folder, inputs)
    return [_logits(model, inputs, theirs), _greedy(model, inputs, theirs), _token_ids(tokenizer, theirs)]


def comparison_inputs(model: CausalLM) -> list[list[int]]:
    """Return sequences of several lengths, drawn over the whole vocabulary."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    lengths = [length for length in (1, 7, 48) if length + NEW_TOKENS < config.max_position_embeddings]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths or [1]]


def read_back(folder: Path, inputs: list[list[int]]) -> ReadBack:
    """Let transformers load a folder, offline, and compute (errors: see `compare_with_transformers`)."""
    request = {"inputs": inputs, "texts": list(HARD_TEXTS), "new_tokens": NEW_TOKENS}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        command = [sys.executable, "-m", "resmol.export.readback", str(folder), str(out)]
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise _unreadable(done.stderr)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        logits = load_file(out)
        return ReadBack([logits[str(n)] for n in range(len(inputs))], answer["greedy"], answer["ids"])


def _unreadable(stderr: str) -> DataError | CheckFailed:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if "No module named 'transformers'" in last:
        return DataError(
            "an export is read back with transformers, which is not installed", fix="pip install 'resmol[verify]'"
        )
    return CheckFailed(f"transformers cannot load the export: {last[:300]}", fix="nothing was written; report this")


@torch.no_grad()
def _logits(model: CausalLM, inputs: list[list[int]], theirs: ReadBack) -> Check:
    worst = 0.0
    for ids, other in zip(inputs, theirs.logits, strict=True):
        ours = model(torch.tensor([ids]))[0]
        worst = (
            max(worst, float((ours - other).abs().max() / ours.abs().max())) if ours.shape == other.shape else torch.inf
        )
    return Check(
        "logits",
        worst <= TOLERANCE,
        f"largest difference {worst:.1e} of the largest logit",
        f"at most {TOLERANCE:g}: two implementations in float32",
        "An export whose weights, names, rotation or tying are not those that were trained.",
    )


def _greedy(model: CausalLM, inputs: list[list[int]], theirs: ReadBack) -> Check:
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
    ours = [list(generate(model, ids, sampling, eos_id=None)) for ids in inputs]
    return Check(
        "greedy tokens",
        ours == theirs.greedy,
        "equal" if ours == theirs.greedy else f"{ours} here, {theirs.greedy} there",
        f"the same {NEW_TOKENS} tokens after each of {len(inputs)} prompts",
        "A cache, position or configuration that generation uses and a single forward pass does not.",
    )


def _token_ids(tokenizer: Tokenizer, theirs: ReadBack) -> Check:
    wrong = [
        f"{text!r} is {other} there and {ours} here"
        for text, other in zip(HARD_TEXTS, theirs.ids, strict=True)
        if (ours := tokenizer.encode(text)) != other
    ]
    return Check(
        "token ids",
        not wrong,
        wrong[0] if wrong else f"{len(HARD_TEXTS)} hard texts, the same ids",
        "the ids that the model was trained on",
        "A tokenizer class that drops the step which separates digits: the model then reads numbers it never saw.",
    )
