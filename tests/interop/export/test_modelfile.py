"""Ollama's description of a chat model: its template is what the Jinja template does, or is left to ollama."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from small_folders import CHATML, begins_folder, chat_folder
from transformers import AutoTokenizer

from resmol.interop.export import modelfile as module
from resmol.interop.export.exported_tokenizer import ExportedTokenizer, exported_tokenizer
from resmol.interop.export.modelfile import chat_layout, modelfile
from resmol.interop.load import load_model

# As published: SmolLM2's puts in words of a system that has none; Llama 3's writes the begin token; Zephyr's opens an
# answer without the line break that it writes before others.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|h|>' + message['role'] + '<|/h|>\n\n' + message['content'] | trim"
    " + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
INSTRUCT = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
LAST_THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% if not loop.last %}.{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(tokenizer: ExportedTokenizer, template: str) -> ExportedTokenizer:
    tokens = dataclasses.replace(tokenizer.tokens, chat_templates={"default": template})
    return dataclasses.replace(tokenizer, tokens=tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {"chat": chat_folder(root / "chat"), "begins": begins_folder(root / "begins")}


def as_ollama(template: str, system: str, turns: list[tuple[str, str]], default: str | None) -> str:
    """Execute the subset of Go's templates as ollama does: turn by turn, the last one up to the answer."""
    text = ""
    for number, (prompt, response) in enumerate(turns):
        values = {"System": (system or default or "") if number == 0 else "", "Prompt": prompt, "Response": response}
        source = template if response else template.partition("{{ .Response }}")[0]
        for name, value in values.items():
            block = re.compile(rf"\{{\{{ if \.{name} \}}\}}(.*?)\{{\{{ end \}}\}}", re.DOTALL)
            source = block.sub(r"\1" if value else "", source).replace(f"{{{{ .{name} }}}}", value)
        text += source
    return text


@pytest.mark.parametrize(("name", "template"), [("chat", CHATML), ("chat", SMOLLM2), ("begins", LLAMA3)])
@pytest.mark.parametrize("system", ["", "Answer in verse."])
def test_ollama_lays_out_what_transformers_does(
    folders: dict[str, Path], name: str, template: str, system: str
) -> None:
    tokenizer = with_template(exported_tokenizer(load_model(folders[name], device="cpu")), template)
    layout = chat_layout(tokenizer)
    assert layout is not None
    turns = [("Who?", "Me."), ("Why?", "So."), ("And now?", "")]
    messages = [{"role": "system", "content": system}] if system else []
    for prompt, response in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    theirs: Any = AutoTokenizer.from_pretrained(folders[name])
    options = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    wanted = theirs.apply_chat_template(messages[:-1], **options)
    begin = theirs.bos_token if tokenizer.before else ""  # llama.cpp adds it by itself
    assert begin + as_ollama(layout.go_template(), system, turns, layout.system) == wanted


@pytest.mark.parametrize(
    "template",
    [
        ZEPHYR, INSTRUCT, LAST_THINKS, "{{ strftime_now('%d') }}" + CHATML, "{{ raise_exception('no') }}", "{% if %}",
        "{{ messages[0]['content'] * 9 }}", "{{ 'a' * 99999999999 }}", "", "{{ cycler.__init__.__globals__ }}",
    ],
)  # fmt: skip
def test_a_template_that_does_more_is_left_to_ollama(folders: dict[str, Path], template: str) -> None:
    loaded = load_model(folders["chat"], device="cpu")
    tokenizer = with_template(exported_tokenizer(loaded), template)
    assert chat_layout(tokenizer) is None
    text = modelfile(tokenizer, loaded.config, "x.gguf")
    assert "TEMPLATE" not in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_template_that_never_ends_does_not_hold_up_the_export(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENDER_SECONDS", 1.0)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert chat_layout(with_template(exported_tokenizer(load_model(folders["chat"], device="cpu")), loop)) is None


def test_signs_of_the_modelfile_in_a_template(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["chat"], device="cpu")
    for sign in ('"""', "}}"):
        template = CHATML.replace("'<|im_end|>", f"'{sign}<|im_end|>")
        text = modelfile(with_template(exported_tokenizer(loaded), template), loaded.config, "x.gguf")
        assert "TEMPLATE" not in text
    wanted = modelfile(with_template(exported_tokenizer(loaded), SMOLLM2), loaded.config, "x.gguf")
    assert 'SYSTEM """You are helpful"""\n' in wanted
    assert wanted.index("TEMPLATE") < wanted.index("SYSTEM")
