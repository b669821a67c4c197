"""The tokens with a role, as model folders and GGUF files state them, and what is padding where none is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_folders import CHATML, begins_folder, chat_folder, small_folder, small_tokenizer
from transformers import AutoTokenizer

from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckpointError, ConfigError
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.gguf_names import gguf_ends
from resmol.interop.resolve import Source, resolve
from resmol.interop.special_tokens import SpecialTokens, harmless_padding, special_tokens


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer((folder / "tokenizer.json").read_bytes(), folder / "tokenizer.json")


def found_in(folder: Path) -> SpecialTokens:
    source = resolve(folder)
    assert source.config is not None
    return special_tokens(source, source.config, tokenizer_of(folder))


def change(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not ...}), encoding="utf-8")


def test_a_chat_model_keeps_what_its_files_state(tmp_path: Path) -> None:
    found = found_in(chat_folder(tmp_path))
    assert found.roles == {"bos_token": 1, "eos_token": 2, "unk_token": 0, "pad_token": 2}
    assert (found.ends, found.config_pad, found.additional) == ((2, 0), 2, (1, 2))
    assert found.chat_templates == {"default": CHATML}


def test_the_roles_are_those_of_transformers(tmp_path: Path) -> None:
    for make in (chat_folder, begins_folder):
        folder = make(tmp_path / make.__name__)
        theirs: Any = AutoTokenizer.from_pretrained(folder)
        stated = {
            role: token
            for role in ("bos_token", "eos_token", "pad_token")
            if (token := getattr(theirs, f"{role}_id")) is not None
        }
        assert found_in(folder).roles.items() >= stated.items()


def test_a_run_has_one_token_for_begin_end_and_unknown(
    genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path: Path
) -> None:
    """As SmolLM2's own tokenizer; what pads is a mark of data that no chat uses."""
    config = tiny_config.model.model_copy(update={"vocab_size": 49_152})
    found = special_tokens(Source("checkpoint", tmp_path, config), config, genuine_tokenizer)
    assert found.roles == {"bos_token": 0, "eos_token": 0, "unk_token": 0, "pad_token": 16}
    assert genuine_tokenizer.spelling(found.pad) == "<empty_output>"
    assert (found.ends, found.chat_templates, found.padding_side) == ((0,), {}, "left")


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        (["<|endoftext|>"], "<|endoftext|>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>"),
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], "<|eom_id|>"),
        (["</s>", "<s>", "<unk>"], "<unk>"),
        (["<|endoftext|>", "<|pad|>", "<|reserved_1|>", "<|other|>"], "<|pad|>"),
        (["<|endoftext|>", "<|finetune_right_pad_id|>", "<|reserved_1|>"], "<|finetune_right_pad_id|>"),
        (["<|endoftext|>", "<|other|>", "<|reserved_0|>", "<|reserved_1|>"], "<|reserved_1|>"),
        (["<|endoftext|>", "<|start_header_id|>", "<filename>"], "<filename>"),
    ],
)
def test_padding_is_not_the_end_where_there_is_another(special: list[str], pad: str, tmp_path: Path) -> None:
    small_tokenizer(*special).save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(tmp_path)
    free = set(tokenizer.added_tokens) - {tokenizer.eos_id}
    assert tokenizer.spelling(harmless_padding(tokenizer, free, [], tokenizer.eos_id)) == pad


def test_padding_is_nothing_that_a_chat_template_writes(tmp_path: Path) -> None:
    small_tokenizer("<|endoftext|>", "<|a|>", "<|b|>").save(str(tmp_path / "tokenizer.json"))
    assert harmless_padding(tokenizer_of(tmp_path), {1, 2}, [], 0) == 2
    assert harmless_padding(tokenizer_of(tmp_path), {1, 2}, ["x <|b|> y"], 0) == 1


def _file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("prepare", "templates"),
    [
        (lambda f: change(f / "tokenizer_config.json", chat_template=...), {}),
        (_file("chat_template.jinja", "of a file"), {"default": "of a file"}),
        (_file("additional_chat_templates/tools.jinja", "t"), {"default": CHATML, "tools": "t"}),
        (
            lambda f: change(
                f / "tokenizer_config.json",
                chat_template=[{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}, 7],
            ),
            {"default": "d", "rag": "r"},
        ),
        (lambda f: change(f / "tokenizer_config.json", chat_template={"no": "list"}), {}),
    ],
)
def test_where_chat_templates_stand(prepare: Callable[[Path], None], templates: dict[str, str], tmp_path: Path) -> None:
    """In transformers 4 in the table, later in files; several of them in a list."""
    folder = chat_folder(tmp_path)
    prepare(folder)
    assert found_in(folder).chat_templates == templates


def test_roles_that_are_no_tokens_are_left_out(tmp_path: Path) -> None:
    """A token of the ordinary vocabulary would be cut out of every text; one beyond the model has no row."""
    folder = chat_folder(tmp_path)
    change(folder / "tokenizer_config.json", bos_token="the", pad_token="[PAD]", unk_token=None, eos_token=...)
    change(folder / "config.json", pad_token_id=-1, eos_token_id=2)
    change(folder / "generation_config.json", pad_token_id=99_999, eos_token_id=None)
    found = found_in(folder)
    assert found.roles == {"eos_token": 2, "pad_token": 0}  # the only token that no chat template writes
    assert (found.ends, found.config_pad) == ((2,), None)


def test_without_a_tokenizer_config_the_ids_of_the_model_count(tmp_path: Path) -> None:
    rust = small_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    found = found_in(small_folder(tmp_path, rust, {}, bos_token_id=1, eos_token_id=2))
    assert (found.roles["bos_token"], found.roles["eos_token"], found.ends) == (1, 2, (2,))
    change(tmp_path / "config.json", bos_token_id=7)  # "%" or so: never a role
    assert "bos_token" not in found_in(tmp_path).roles


def test_the_padding_of_tokenizer_json_is_the_models(tmp_path: Path) -> None:
    rust = small_tokenizer("<|endoftext|>", "<|a|>", "<|b|>")
    rust.enable_padding(pad_id=1, pad_token="<|a|>")
    assert found_in(small_folder(tmp_path, rust, {})).pad == 1


def test_how_a_model_is_sampled_is_kept_and_lengths_are_not(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path)
    change(folder / "generation_config.json", do_sample=True, temperature=0.6, max_length=7, top_p="x")
    assert found_in(folder).sampling == {"do_sample": True, "temperature": 0.6}


def test_roles_of_a_gguf_file(genuine_tokenizer: Tokenizer, tiny_config: RunConfig, tmp_path: Path) -> None:
    """Keys of the GGUF specification; llama.cpp ends a text at eos, eot and eom."""
    config = tiny_config.model.model_copy(update={"vocab_size": 49_152})
    names = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2, "eot": 3, "eom": "no id"}
    metadata: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": token for name, token in names.items()}
    metadata |= {
        "tokenizer.chat_template": "t",
        "tokenizer.chat_template.rag": "r",
        "tokenizer.chat_templates": ["rag"],
    }
    header = GGUFHeader(metadata, {})
    found = special_tokens(Source("gguf", tmp_path, config, header, ends=gguf_ends(header)), config, genuine_tokenizer)
    assert found.roles == {"bos_token": 1, "eos_token": 2, "unk_token": 0, "pad_token": 2}
    assert (found.ends, found.chat_templates) == ((2, 3), {"default": "t", "rag": "r"})


def test_a_file_elsewhere_is_not_published(tmp_path: Path) -> None:
    """A downloaded folder whose chat template is a link to somebody's key."""
    folder = chat_folder(tmp_path / "model")
    (tmp_path / "secret").write_text("key", encoding="utf-8")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja leads out of its folder"):
        found_in(folder)


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "models--me--x" / "snapshots" / "abc")
    blob = tmp_path / "models--me--x" / "blobs" / ("0a" * 20)
    blob.parent.mkdir()
    blob.write_text("of a blob", encoding="utf-8")
    (folder / "chat_template.jinja").symlink_to(blob)
    assert found_in(folder).chat_templates == {"default": "of a blob"}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_file_is_no_silent_loss(name: str, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path)
    (folder / name).write_text('{"eos_token": ', encoding="utf-8")
    with pytest.raises(ConfigError, match=name):
        found_in(folder)
