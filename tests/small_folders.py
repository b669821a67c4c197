"""Small Hugging Face folders as other people publish them: a chat model, a tokenizer that begins each text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from small_models import reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = {
    "config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2},
    "tokenizer_config.json": {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": CHATML,
    },
}


def small_tokenizer(*special: str, begin: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of 320 tokens; ``begin`` is put before each text, as Llama 3's does."""
    rust = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Sequence([digits, bytes_]), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(["once upon a time the river of the mill went on upon the time"] * 9, trainer)
    if begin is not None:
        named = [(begin, rust.token_to_id(begin))]
        pair = f"{begin} $A {begin} $B"
        rust.post_processor = processors.TemplateProcessing(single=f"{begin} $A", pair=pair, special_tokens=named)
    return rust


def small_folder(folder: Path, rust: tokenizers.Tokenizer, files: dict[str, Any], **config: Any) -> Path:
    """Write a small model of transformers with a tokenizer, and what ``files`` adds to its JSON files."""
    sizes = {"vocab_size": 320, "max_position_embeddings": 128, "initializer_range": 0.2}
    reference(**(sizes | config)).save_pretrained(folder)
    rust.save(str(folder / "tokenizer.json"))
    for name, table in files.items():
        path = folder / name
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(known | table), encoding="utf-8")
    return folder


def chat_folder(folder: Path) -> Path:
    """A chat model, as SmolLM2-Instruct: ends, pad and template of its own, and a card."""
    made = small_folder(folder, small_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>"), CHAT)
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\nmodel_name: Small Chat\n---\n# Small Chat\n"
    (made / "README.md").write_text(card, encoding="utf-8")
    return made


def begins_folder(folder: Path) -> Path:
    """A model whose tokenizer begins each text, as Llama 3's."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    rust = small_tokenizer(end, begin, "<|reserved_special_token_0|>", begin=begin)
    return small_folder(folder, rust, {"tokenizer_config.json": stated}, bos_token_id=1, eos_token_id=0)
