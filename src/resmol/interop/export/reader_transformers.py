"""Read an export as a stranger would: with transformers alone, offline, in a process of its own.

``python -m resmol.interop.export.reader_transformers FOLDER OUT`` takes
``{"inputs": [[id, ...], ...], "texts": [...], "new_tokens": n}`` on standard input, writes the logits to OUT and prints
``{"ids": [[...], ...], "greedy": [[...], ...]}``. With ``"gguf_file": NAME`` it reads that file of FOLDER, and nothing
else in it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers


def main(folder: str, out: str) -> None:
    """Read ``folder`` and answer the request on standard input; see the module."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted: dict[str, Any] = json.load(sys.stdin)
    options: dict[str, Any] = {"local_files_only": True}
    if "gguf_file" in wanted:
        options["gguf_file"] = wanted["gguf_file"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    if wanted.get("pre") == "smollm":  # transformers takes the vocabulary from the file, and not the rule for digits
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    logits, greedy = {}, []
    with torch.no_grad():
        for number, ids in enumerate(wanted["inputs"]):
            prompt = torch.tensor([ids])
            logits[str(number)] = model(prompt).logits[0].contiguous()
            continued = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=wanted["new_tokens"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            greedy.append(continued[0, len(ids) :].tolist())
    save_file(logits, out)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wanted["texts"]]
    sys.stdout.write(json.dumps({"ids": ids, "greedy": greedy}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
