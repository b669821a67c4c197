"""Read an export as a stranger would: with transformers alone, offline, in a process of its own.

``python reader_transformers.py PATH OUT`` takes ``{"inputs": [[id, ...], ...], "texts": [...], "new_tokens": n}`` on
standard input, writes the logits to OUT and prints ``{"ids": [[...], ...], "greedy": [[...], ...]}``. With
``"gguf_file": NAME`` it reads that file of PATH, and nothing else in it. With ``"card": {...}`` it also does what the
card of an export proposes, see `follow_card`, and prints the results as ``"card"``.

The file imports nothing of resmol, so that it also runs where only another version of transformers is installed.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers


def main(folder: str, out: str) -> None:
    """Read ``folder`` and answer the request on standard input; see the module."""
    wanted: dict[str, Any] = json.load(sys.stdin)
    logits, answer = read(folder, wanted)
    save_file(logits, out)
    if "card" in wanted:
        answer["card"] = follow_card(wanted["card"])
    sys.stdout.write(json.dumps(answer) + "\n")


def read(folder: str, wanted: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return logits, token ids and greedy continuations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True}
    if "gguf_file" in wanted:
        options["gguf_file"] = wanted["gguf_file"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    if model.dtype != torch.float32:  # said so, and not by an option that has one name in transformers 4, another in 5
        model = model.float()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    backend = tokenizer.backend_tokenizer
    if "gguf_file" in wanted:
        backend = _of_the_file(backend, wanted["pre"], wanted["vocab_size"])
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
                repetition_penalty=1.0,
                pad_token_id=0,
                eos_token_id=None,
            )
            greedy.append(continued[0, len(ids) :].tolist())
    ids = [backend.encode(text, add_special_tokens=False).ids for text in wanted["texts"]]
    return logits, {"ids": ids, "greedy": greedy}


def _of_the_file(backend: Tokenizer, pre: str, vocab_size: int) -> Tokenizer:
    """Return what the file alone says of two things that transformers 5 does by its own rules.

    It leaves out the rule for digits, and adds <|endoftext|> to a vocabulary that does not have it, as an id for which
    the model has no row.
    """
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    document = json.loads(backend.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(document))


def follow_card(wanted: dict[str, Any]) -> dict[str, Any]:
    """Execute the code that a card shows, then the calls that its readers make next, with nothing stated twice.

    Args:
        wanted: ``folder`` and ``code`` of the card; ``texts`` to tokenize; ``batch``, several texts to pad and
            continue; ``prompt`` for a pipeline; ``new_tokens``; ``by_name``, whether a pipeline can load the folder.

    Returns:
        ``printed`` by the code; ``called``, the tables of ``tokenizer(text)``; ``named_inputs``, the names that the
        export itself gives for their columns; ``padded``, the table of the batch;
        ``rows``, the new tokens of each text of the batch; ``text`` of the pipeline; ``roles``, ``ends``,
        ``chat_template`` and ``dtype`` of what the code loaded.
    """
    from transformers import pipeline

    printed = io.StringIO()
    with chdir(wanted["folder"]), redirect_stdout(printed), TemporaryDirectory() as elsewhere:
        program = Path(elsewhere) / "card.py"
        program.write_text(wanted["code"], encoding="utf-8", newline="\n")
        names = runpy.run_path(str(program))  # resmol's own code, which the request holds; no file of the export is run
        model, tokenizer = names["model"], names["tokenizer"]
        called = [dict(tokenizer(text)) for text in wanted["texts"]]
        padded = dict(tokenizer(wanted["batch"], padding=True))  # before a pipeline, which changes the side
        greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": wanted["new_tokens"]}
        left = tokenizer(wanted["batch"], padding=True, padding_side="left", return_tensors="pt")
        rows = model.generate(**left, **greedy)[:, left["input_ids"].shape[1] :].tolist()
        by_name = {"model": "."} if wanted["by_name"] else {"model": model, "tokenizer": tokenizer}
        text = pipeline("text-generation", **by_name)(wanted["prompt"], **greedy)[0]["generated_text"]
    return {
        "printed": printed.getvalue(),
        "called": called,
        "named_inputs": tokenizer.init_kwargs.get("model_input_names"),
        "padded": padded,
        "rows": rows,
        "text": text,
        "roles": {
            name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        },
        "ends": model.generation_config.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
