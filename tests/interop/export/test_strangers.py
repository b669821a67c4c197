"""Exports in the versions of transformers that other people have: what the card proposes gives what we compute.

Each version has an environment of its own, made by pip the first time. PyTorch and whatever else is not transformers'
own comes from the environment that runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from small_folders import begins_folder, chat_folder, small_tokenizer

from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.tokenizer import Tokenizer
from resmol.interop.export import export_gguf, export_hf, gguf
from resmol.interop.export.exported_tokenizer import exported_tokenizer
from resmol.interop.export.gguf_parity import compare_gguf
from resmol.interop.export.parity import TRANSFORMERS, compare_with_transformers
from resmol.interop.load import load_model
from resmol.train.start import train_model

pytestmark = pytest.mark.interop

VERSIONS = ("4.46.3", "4.57.6")  # and the locked one, which is the environment of the tests


@pytest.fixture(scope="module", params=[*VERSIONS, "locked"])
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter of an environment with a version of transformers."""
    return sys.executable if request.param == "locked" else str(environment(request.param))


def environment(version: str) -> Path:
    """Return the interpreter of a kept environment, made where it is missing; skip where the index is out of reach."""
    folder = Path(sys.prefix) / f"transformers-{version}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        venv.create(folder, clear=True, with_pip=True)
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            f"transformers=={version}",
        ]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers {version}: {done.stderr.strip()[-200:]}")
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (packages / "zz_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the rest, behind its own
        finished.touch()
    return python


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: RunConfig, tiny_dataset: Any, tiny_tokenizer: Tokenizer
) -> dict[str, Path]:
    """A run, a run whose tokenizer would begin each text, a chat model, a model whose tokenizer begins each text."""
    root = tmp_path_factory.mktemp("sources")
    wanted = {"data": str(tiny_dataset.root), "tokenizer": tiny_tokenizer.path}
    train_model(tiny_config, root / "run", overrides=["train.steps=3"], **wanted)
    path = root / "tokenizer.json"
    small_tokenizer("<|endoftext|>", "<|begin_of_text|>", begin="<|begin_of_text|>").save(str(path))
    begins = Tokenizer(path.read_bytes(), path)
    data = prepare(root / "data", from_texts(["once upon a time the river went on"] * 60), begins, val_fraction=0.1)
    settings = ["train.steps=3", f"tokenizer.sha256={begins.sha256}"]
    train_model(tiny_config, root / "begins_run", overrides=settings, data=str(data.root), tokenizer=path)
    named = chat_folder(root / "chat") / "additional_chat_templates" / "rag.jinja"
    named.parent.mkdir()
    named.write_text("{{ documents }}", encoding="utf-8")
    return {
        "run": root / "run",
        "begins_run": root / "begins_run",
        "chat": root / "chat",
        "begins": begins_folder(root / "begins"),
    }


@pytest.fixture(scope="module")
def exports(sources: dict[str, Path]) -> dict[tuple[str, str], Path]:
    """Each source as an export in each format; that they are finished means that the locked version agrees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "gguf_readers", lambda: [TRANSFORMERS])
        found = {}
        for name, source in sources.items():
            for form, export in (("hf", export_hf), ("gguf", export_gguf)):
                found[name, form] = export(source, source.parent / f"{name}-{form}").path
    return found


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.measured for check in checks if not check.passed}


@pytest.mark.parametrize("name", ["run", "begins_run", "chat", "begins"])
def test_a_hugging_face_export(
    name: str, python: str, sources: dict[str, Path], exports: dict[tuple[str, str], Path]
) -> None:
    loaded = load_model(sources[name], device="cpu")
    checks = compare_with_transformers(loaded.model, exported_tokenizer(loaded), exports[name, "hf"], python=python)
    assert failed(checks) == {}


@pytest.mark.parametrize("name", ["run", "begins_run", "chat", "begins"])
def test_a_gguf_export(name: str, python: str, sources: dict[str, Path], exports: dict[tuple[str, str], Path]) -> None:
    """By the card; transformers 4.46 reads the output layer of a tied model only where the card's code says so."""
    loaded = load_model(sources[name], device="cpu")
    (file,) = exports[name, "gguf"].glob("*.gguf")
    checks = compare_gguf(loaded.model, exported_tokenizer(loaded), file, "float32", [TRANSFORMERS], python=python)
    by_card = [check for check in checks if not check.name.startswith(("logits", "greedy"))]
    assert failed(by_card if "4.46" in python else checks) == {}


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_the_code_in_the_card_as_it_stands(form: str, python: str, exports: dict[tuple[str, str], Path]) -> None:
    """Copied out of README.md and executed in the export's folder, with nothing around it."""
    text = (exports["chat", form] / "README.md").read_text(encoding="utf-8")
    (code,) = [token.content for token in MarkdownIt().parse(text) if token.info == "python"]
    options: dict[str, Any] = {"cwd": exports["chat", form], "capture_output": True, "text": True}
    done = subprocess.run([python, "-c", code], check=False, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("Once upon a time")
    assert "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n" in done.stdout


def test_what_transformers_4_needs_and_5_does_not(python: str, exports: dict[tuple[str, str], Path]) -> None:
    """The tokenizer by itself: no token_type_ids, also where a caller pads, and a template that renders."""
    code = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{"role": "user", "content": "a  1"}]
keys = [sorted(tokenizer("a  1")), sorted(tokenizer(["a", "a  1"], padding=True))]
text = tokenizer.apply_chat_template(chat, tokenize=False)
print(json.dumps([*keys, text, tokenizer.pad_token, tokenizer.model_max_length]))
"""
    done = subprocess.run([python, "-c", code], cwd=exports["chat", "hf"], capture_output=True, text=True, check=True)
    keys = '["attention_mask", "input_ids"]'
    wanted = f'[{keys}, {keys}, "<|im_start|>user\\na  1<|im_end|>\\n", "<|im_end|>", 128]'
    assert done.stdout.splitlines()[-1] == wanted
