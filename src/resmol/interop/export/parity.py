"""Compare an export with the model that it was made from, as transformers reads it."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from resmol.checks import Check, largest
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, DataError
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.export.card_check import NEW_TOKENS, CardExpectation
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.model.llama import CausalLM
from resmol.system.installation import install_hint
from resmol.system.wording import counted

VOCABULARY_TEXTS = 100
# Relative to the largest logit. Two float32 implementations differ by some 1e-6; the smallest mistake, by over 1e-2.
TOLERANCE = 1e-4
# Texts that tokenizers disagree about: digits, runs of spaces, newlines, scripts, control characters, special tokens.
HARD_TEXTS = (
    "a  1", "  2024-11-24  12:30", "x=1234567890;\n\n\ty  =  3.14", "tabs\t\tand   spaces \n \n",
    "naïve café — “quotes”…", "日本語 123 العربية ٣",
    "\U0001f642 \U0001f469\u200d\U0001f467 e\u0301", "\u200b\ufeff\x7f",
    "don't we'll I'M", "<|endoftext|>a<|im_start|>", "", " ", "def f(x):\n    return x**2  # 2nd",
    "ROMEO:\nO, she doth teach the torches to burn bright!",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Another implementation that can load an export.

    Attributes:
        name: Its usual name.
        program: The file of ours beside this one that runs it, in a process of its own.
        package: The package that it imports.
        extra: The extra of resmol that installs it.
    """

    name: str
    program: str
    package: str
    extra: str


TRANSFORMERS = Reader("transformers", "reader_transformers.py", "transformers", "verify")


@dataclass(frozen=True)
class ReadBack:
    """The results of another implementation that read an export; ``card``, where it also followed the card."""

    logits: list[Tensor]
    greedy: list[list[int]]
    ids: list[list[int]]
    card: dict[str, Any] | None = None


def compare_with_transformers(
    model: CausalLM, tokenizer: ExportedTokenizer, folder: Path, *, python: str = sys.executable
) -> list[Check]:
    """Load a folder with transformers in a process of its own and compare it with ``model``.

    Args:
        model: Ours, with the rounded weights of the file, computing in float32.
        tokenizer: Its tokenizer, as the export describes it.
        folder: The export.
        python: The interpreter, whose version of transformers reads.

    Returns:
        The checks, failed ones included.

    Raises:
        DataError: transformers is not installed.
        CheckFailed: transformers cannot load the folder.
    """
    inputs, texts = comparison_inputs(model), comparison_texts(tokenizer.tokenizer)
    card = CardExpectation(model, tokenizer, texts)
    with where_it_can_be_mapped(folder) as readable:
        theirs = read_back(TRANSFORMERS, readable, inputs, texts, python=python, card=card.request(readable))
    return [
        logits_check("logits", model, inputs, theirs),
        greedy_check("greedy tokens", model, inputs, theirs),
        token_ids_check("token ids", tokenizer.tokenizer, texts, theirs),
        *card.checks(theirs.card or {}),
    ]


@contextmanager
def where_it_can_be_mapped(folder: Path) -> Iterator[Path]:
    """Yield a folder, or a copy of it where its file system cannot map files: the readers of weights map them."""
    try:
        for weights in (*folder.glob("*.safetensors"), *folder.glob("*.gguf")):
            with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
                pass
    except OSError:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(shutil.copytree(folder, Path(scratch) / folder.name))
    else:
        yield folder


def comparison_inputs(model: CausalLM) -> list[list[int]]:
    """Return sequences of several lengths, drawn over the whole vocabulary."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    lengths = [length for length in (1, 7, 48) if length + NEW_TOKENS < config.max_position_embeddings]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths or [1]]


def comparison_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts that tokenizers disagree about, and texts drawn from this vocabulary: only those exercise merges."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(tokenizer.vocab_size, (VOCABULARY_TEXTS, 16), generator=generator).tolist()
    return [*HARD_TEXTS, tokenizer.decode(range(32)), *(tokenizer.decode(ids) for ids in drawn)]


def read_back(
    reader: Reader,
    path: Path,
    inputs: list[list[int]],
    texts: list[str],
    *,
    python: str = sys.executable,
    **more: Any,
) -> ReadBack:
    """Let another implementation load an export in a process of its own, offline, and compute.

    Args:
        reader: Which one.
        path: The file or folder that it loads.
        inputs: Token ids to compute the logits of, and to continue.
        texts: Texts to turn into ids.
        python: The interpreter of the process.
        more: Further fields of the request.

    Raises:
        DataError: It is not installed.
        CheckFailed: It cannot load the export.
    """
    request = {"inputs": inputs, "texts": texts, "new_tokens": NEW_TOKENS, **more}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        program = Path(__file__).with_name(reader.program)
        command = [python, "-P", str(program), str(path.absolute()), str(out)]  # -P: nothing beside it is imported
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            check=False,
        )
        if done.returncode:
            raise _unreadable(reader, done.stderr)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        logits = load(out.read_bytes())  # not mapped: what is mapped cannot be removed on Windows
        in_order = [logits[str(n)] for n in range(len(inputs))]
        return ReadBack(in_order, answer["greedy"], answer["ids"], answer.get("card"))


def _unreadable(reader: Reader, stderr: str) -> DataError | CheckFailed:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if f"No module named {reader.package!r}" in last:
        return DataError(
            f"an export is read back with {reader.name}, which is not installed",
            fix=install_hint(reader.extra),
        )
    return CheckFailed(
        f"{reader.name} cannot load the export: {last[:300]}", fix="nothing was written; report this as a bug"
    )


@torch.no_grad()
def logits_check(
    name: str, model: CausalLM, inputs: list[list[int]], theirs: ReadBack, tolerance: float = TOLERANCE,
    why: str = "two implementations in float32",
) -> Check:  # fmt: skip
    """Compare logits; ``tolerance`` is relative to the largest, and ``why`` is its origin."""
    shares = []
    for ids, other in zip(inputs, theirs.logits, strict=True):
        ours = model(torch.tensor([ids]))[0]
        same_shape = ours.shape == other.shape
        shares.append(float((ours - other).abs().max() / ours.abs().max()) if same_shape else torch.inf)
    worst = largest(shares)
    return Check(
        name,
        worst <= tolerance,
        f"largest difference {worst:.1e} of the largest logit",
        f"at most {tolerance:.2g}: {why}",
        "An export whose weights, names, rotation or tying are not those that were trained.",
    )


def greedy_check(name: str, model: CausalLM, inputs: list[list[int]], theirs: ReadBack) -> Check:
    """Compare greedy continuations."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    ours = [list(generate(model, ids, sampling, eos_id=None)) for ids in inputs]
    return Check(
        name,
        ours == theirs.greedy,
        "equal" if ours == theirs.greedy else f"{ours} here, {theirs.greedy} there",
        f"the same {NEW_TOKENS} tokens after each of {counted(len(inputs), 'prompt')}",
        "A cache, position or configuration that generation uses and a single forward pass does not.",
    )


def token_ids_check(name: str, tokenizer: Tokenizer | ExportedTokenizer, texts: list[str], theirs: ReadBack) -> Check:
    """Compare the token ids of `comparison_texts`; an `ExportedTokenizer` has those that belong around a text."""
    wrong = [
        f"{text!r} is {other} there and {ours} here"
        for text, other in zip(texts, theirs.ids, strict=True)
        if (ours := tokenizer.encode(text)) != other
    ]
    return Check(
        name,
        not wrong,
        wrong[0] if wrong else f"{len(texts)} hard texts, the same ids",
        "the ids that the model was trained on",
        "A tokenizer class that drops the step which separates digits: the model then reads numbers it never saw.",
    )


@torch.no_grad()
def cast_check(before: CausalLM, after: CausalLM) -> Check:
    """Measure how rounding the weights to another dtype changes the log-probabilities."""
    ids = torch.arange(64)[None] % before.config.vocab_size
    ids = ids[:, : before.config.max_position_embeddings]
    ours, stored = before(ids).log_softmax(-1), after(ids).log_softmax(-1)
    divergence = float((ours.exp() * (ours - stored)).sum(-1).mean())
    return Check(
        "cast",
        bool(torch.isfinite(stored).all()),
        f"largest change of a log-probability {float((ours - stored).abs().max()):.2e}, "
        f"Kullback-Leibler divergence {divergence:.1e} nats per token",
        "finite numbers; the change is that of the type",
        "Weights beyond the largest number of float16.",
    )
