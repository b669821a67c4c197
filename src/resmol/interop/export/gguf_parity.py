"""Compare a GGUF file with the model that it was made from, as transformers and llama.cpp read it.

Two errors are kept apart. The rounding of the weights to the file's type is bounded by arithmetic (`TYPE_ERROR`). The
rest is compared with *our* model holding the rounded weights. transformers unpacks them and computes in float32, so it
must agree as closely as for any export. llama.cpp also rounds the input of each matmul to the file's type. The effect
of that rounding on the logits is measured with our own model rounding its inputs, and llama.cpp may be `SLACK` times as
far away: its roundings are as large, and not the same.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resmol.checks import Check, largest
from resmol.errors import DataError
from resmol.interop.description import CARD
from resmol.interop.export.card_check import CardExpectation
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.export.gguf_vocab import gguf_vocabulary
from resmol.interop.export.gguf_writer import KINDS, as_kind, as_stored, share_of_type, stored_kind, type_error
from resmol.interop.export.parity import (
    TOLERANCE,
    TRANSFORMERS,
    Reader,
    cast_check,
    comparison_inputs,
    comparison_texts,
    greedy_check,
    logits_check,
    read_back,
    token_ids_check,
    where_it_can_be_mapped,
)
from resmol.model.llama import CausalLM
from resmol.system.atomic_io import link_or_copy
from resmol.system.installation import install_hint

LLAMA_CPP = Reader("llama.cpp", "reader_llama_cpp.py", "llama_cpp", "interop")
SLACK = 4.0


def gguf_readers() -> list[Reader]:
    """Return the installed readers of GGUF files; transformers needs accelerate for it.

    Raises:
        DataError: There is none.
    """
    needs = {TRANSFORMERS: ("transformers", "accelerate"), LLAMA_CPP: ("llama_cpp",)}
    found = [reader for reader, names in needs.items() if all(find_spec(name) is not None for name in names)]
    if not found:
        raise DataError(
            "a GGUF export is read back before it exists, and neither transformers (with accelerate) nor llama.cpp is "
            "installed",
            fix=f"{install_hint('verify')}, or {install_hint('interop')} for llama.cpp",
        )
    return found


def compare_gguf(
    model: CausalLM,
    tokenizer: ExportedTokenizer,
    file: Path,
    dtype: str,
    readers: list[Reader],
    *,
    python: str = sys.executable,
) -> list[Check]:
    """Compare a file with the model that it was made from.

    Args:
        model: The trained model, in float32.
        tokenizer: Its tokenizer, as the export describes it.
        file: The file that `write_gguf` wrote; where a card lies beside it, that is followed, too.
        dtype: Its type.
        readers: From `gguf_readers`.
        python: The interpreter, whose version of transformers reads.

    Returns:
        The checks, failed ones included; the name of a check by a reader ends with the reader's.

    Raises:
        CheckFailed: A reader cannot load the file.
    """
    stored, inputs = as_stored(model, dtype), comparison_inputs(model)
    checks = [_type_check(model, stored, dtype), cast_check(model, stored)]
    with where_it_can_be_mapped(file.parent) as folder:
        if TRANSFORMERS in readers:
            checks += _with_transformers(stored, tokenizer, folder / file.name, inputs, python)
        if LLAMA_CPP in readers:
            checks += _with_llama_cpp(stored, tokenizer, folder / file.name, inputs, dtype)
    return checks


def _with_transformers(
    stored: CausalLM, tokenizer: ExportedTokenizer, file: Path, inputs: list[list[int]], python: str
) -> list[Check]:
    texts = comparison_texts(tokenizer.tokenizer)
    card = CardExpectation(stored, tokenizer, texts, file.name)
    size = stored.config.vocab_size
    more: dict[str, Any] = {"python": python, "gguf_file": file.name, "vocab_size": size}
    more["pre"] = gguf_vocabulary(tokenizer.tokenizer, size).pre
    if (file.parent / CARD).exists():
        more["card"] = card.request(file.parent)
    with tempfile.TemporaryDirectory() as alone:  # without the tokenizer.json that lies beside the file
        link_or_copy(file.resolve(), Path(alone) / file.name)
        theirs = read_back(TRANSFORMERS, Path(alone), inputs, texts, **more)
    return [
        logits_check("logits, transformers", stored, inputs, theirs),
        greedy_check("greedy tokens, transformers", stored, inputs, theirs),
        token_ids_check("token ids, transformers", tokenizer.tokenizer, texts, theirs),
        *(card.checks(theirs.card, ", transformers") if theirs.card else []),
    ]


def _with_llama_cpp(
    stored: CausalLM, tokenizer: ExportedTokenizer, file: Path, inputs: list[list[int]], dtype: str
) -> list[Check]:
    texts = comparison_texts(tokenizer.tokenizer)
    theirs = read_back(LLAMA_CPP, file, inputs, texts)
    tolerance = TOLERANCE + SLACK * product_error(stored, inputs, dtype)
    why = "float32, and the rounding of the inputs of products to the file's type"
    checks = [
        logits_check("logits, llama.cpp", stored, inputs, theirs, tolerance, why),
        token_ids_check("token ids, llama.cpp", tokenizer, texts, theirs),
    ]
    if dtype == "float32":  # elsewhere a rounding may decide between two tokens that are almost equally good
        checks.append(greedy_check("greedy tokens, llama.cpp", stored, inputs, theirs))
    return checks


def _type_check(model: CausalLM, stored: CausalLM, dtype: str) -> Check:
    share, named = type_error(model, stored, dtype), share_of_type(model.config, dtype)
    rest = "" if named == 1 else f"; {named:.0%} of the numbers are {KINDS[dtype]}, the rest F16"
    return Check(
        "weights",
        share <= 1.0,
        (f"largest error {share:.2f} of what {KINDS[dtype]} allows" if share else "exact") + rest,
        "half a step of the type: 2^-11 (F16), 2^-8 (BF16) of the number, 1/254 + 2^-11 of the largest of 32 (Q8_0)",
        "Numbers beyond the type's range, or rounded more than once.",
    )


@torch.no_grad()
def product_error(model: CausalLM, inputs: list[list[int]], dtype: str) -> float:
    """Return how far the logits move, relative to the largest, when every matmul gets its input rounded to the type.

    ggml's kernels round so: ``vec_dot_type`` of a type is the type itself (ggml-cpu.c).
    """
    exact = [model(torch.tensor([ids]))[0] for ids in inputs]

    def round_input(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        assert isinstance(module, nn.Linear)
        return (as_kind(given[0], stored_kind(tuple(module.weight.shape), dtype)),)

    hooks = [part.register_forward_pre_hook(round_input) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        moved = [model(torch.tensor([ids]))[0] for ids in inputs]
    finally:
        for hook in hooks:
            hook.remove()
    return largest(float((a - b).abs().max() / a.abs().max()) for a, b in zip(exact, moved, strict=True))
