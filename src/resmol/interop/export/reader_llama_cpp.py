"""Read a GGUF file with llama.cpp, through llama-cpp-python, in a process of its own.

``python reader_llama_cpp.py FILE OUT`` has the protocol of
`reader_transformers`. Keys and values are kept in float32, so that nothing but the file's type differs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_F32 = 0  # GGML_TYPE_F32


def main(file: str, out: str) -> None:
    """Read ``file`` and answer the request on standard input; see the module."""
    from llama_cpp import Llama

    wanted: dict[str, Any] = json.load(sys.stdin)
    new_tokens = wanted["new_tokens"]
    context = max(map(len, wanted["inputs"])) + new_tokens
    model: Any = Llama(file, n_ctx=context, logits_all=True, type_k=_F32, type_v=_F32, verbose=False)
    logits, greedy = {}, []
    for number, ids in enumerate(wanted["inputs"]):
        model.reset()
        model.eval(ids)
        logits[str(number)] = np.array(model.scores[: len(ids)], dtype=np.float32)
        continued: list[int] = []
        while len(continued) < new_tokens:
            continued.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(continued[-1:])
        greedy.append(continued)
    save_file(logits, out)
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in wanted["texts"]]
    sys.stdout.write(json.dumps({"ids": ids, "greedy": greedy}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
