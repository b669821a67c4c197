"""What `resmol inspect` says: counts against transformers, every disagreement, tables of 80 columns."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from hub_server import Hub, Repo, hub_with_client, sha256
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf
from tiny import TrainTiny

from resmol.config.load import load_preset, preset_names
from resmol.config.model_config import ModelConfig
from resmol.config.runtime_config import RuntimeConfig
from resmol.errors import CheckpointError, DataError, UsageError
from resmol.interop.inspect import inspect_model
from resmol.interop.inspect.diagram import mermaid
from resmol.model.flops import training_memory
from resmol.model.llama import CausalLM

PUBLISHED = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def shown(source: str, width: int = 80) -> str:
    out = io.StringIO()
    inspect_model(source).render(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(inspect_model(name).parameters.values()) == PUBLISHED[name]


def test_parameters_by_part_are_those_of_transformers(folder: Path) -> None:
    found = inspect_model(str(folder))
    counts = dict.fromkeys(found.parameters, 0)
    for name, parameter in reference().named_parameters():
        words = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "norm": "norms"}
        counts[next(part for word, part in words.items() if word in name)] += parameter.numel()
    assert found.parameters == counts
    header_only = inspect_model(str(folder / "model.safetensors"))
    assert header_only.parameters == counts


def test_operations_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = load_preset("nano").model
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    length = 64
    found = inspect_model(str(tmp_path / "config.json"), seq_len=length).flops_per_token
    model = CausalLM(config, attention="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    # The written-out attention computes the masked half as well; the estimate counts what is attended to.
    masked = config.num_hidden_layers * 2 * 2 * config.hidden_size * (length - 1) / 2
    assert counter.get_total_flops() / length == pytest.approx(found["forward"] + masked, rel=1e-3)
    assert found["training"] == 3 * found["forward"]


@pytest.mark.parametrize(("preset", "batch", "length"), [("nano", 8, 64), ("nano", 1, 256), ("smollm2-135m", 1, 128)])
def test_the_estimate_of_activations_is_what_autograd_keeps(preset: str, batch: int, length: int) -> None:
    config = load_preset(preset).model.model_copy(update={"num_hidden_layers": 4, "vocab_size": 64})
    model = CausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.hidden(ids, ids)
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert result.requires_grad
    assert training_memory(config, batch, length, 256)["activations"] == pytest.approx(measured, rel=0.05)


def test_the_json_object_is_complete() -> None:
    found = json.loads(json.dumps(inspect_model("smollm2-135m", seq_len=512, batch=2).to_dict()))
    assert found["parameters"]["total"] == 134_515_008
    assert found["architecture"]["head_dim"] == 64
    assert (found["seq_len"], found["batch"]) == (512, 2)
    for parts in found["memory_bytes"].values():
        assert parts["total"] == sum(parts.values()) - parts["total"]
    assert found["memory_bytes"]["training"]["weights"] == 4 * 134_515_008
    assert found["open_questions"]
    assert found["mermaid"].startswith("flowchart TD")


def test_batch_and_length_scale_the_memory() -> None:
    one, two = (inspect_model("nano", seq_len=64, batch=n).memory for n in (1, 2))
    assert (
        inspect_model("nano", seq_len=64, batch=1, shards=4).memory["training"]["weights"] * 4
        == one["training"]["weights"]
    )
    assert two["training"]["activations"] == 2 * one["training"]["activations"]
    assert two["inference"]["kv cache"] == 2 * one["inference"]["kv cache"]
    assert two["training"]["weights"] == one["training"]["weights"]


def test_memory_is_counted_with_the_settings_of_the_run(tmp_path: Path) -> None:
    overrides = ["runtime.loss_chunk_tokens=32", "runtime.activation_checkpointing=on", "averaging.fraction=0.2"]
    config = load_preset("nano", overrides)
    (tmp_path / "nano.toml").write_text(config.to_toml(), encoding="utf-8")
    sizes = config.batch.micro_batch_size, config.data.seq_len
    found = inspect_model(str(tmp_path / "nano.toml"))
    wanted = training_memory(config.model, *sizes, 32, activation_checkpointing=True, averaging=True)
    assert found.memory["training"] == wanted
    assert wanted["averaged weights"] == wanted["weights"]
    assert found.to_dict()["loss_chunk_tokens"] == 32
    assert found.to_dict()["activation_checkpointing"] == "on"


def test_without_settings_those_of_training_count(folder: Path) -> None:
    found = inspect_model("smollm2-135m", batch=1)
    assert found.memory["training"]["logits chunk"] == 4 * RuntimeConfig().loss_chunk_tokens * 49_152
    alone = inspect_model(str(folder), seq_len=16, batch=64)
    assert alone.memory["training"]["logits chunk"] == 4 * RuntimeConfig().loss_chunk_tokens * 64


@pytest.mark.parametrize(("seq_len", "batch"), [(8193, 1), (-1, 1), (16, -1)])
def test_impossible_sizes_are_refused(seq_len: int, batch: int) -> None:
    with pytest.raises(UsageError, match="context of 8192"):
        inspect_model("smollm2-135m", seq_len=seq_len, batch=batch)


# --- config.json against the weights -----------------------------------------------------------------------


def test_a_sound_folder_agrees_with_itself(folder: Path) -> None:
    found = inspect_model(str(folder))
    assert found.kind == "huggingface"
    assert [check.passed for check in found.checks] == [True, True, True]


def test_every_disagreement_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(24, 24)
    tensors["lm_head.weight"] = torch.ones(64, 24)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    checks = inspect_model(str(folder)).checks
    text = "\n".join(check.measured for check in checks if not check.passed)
    for part in (
        "k_proj.weight is [24, 24], not [8, 24]",
        "missing: 'model.layers.1.mlp.up_proj.weight'",
        "lm_head",
    ):
        assert part in text
    assert "FAIL" in shown(str(folder))


def test_a_run_is_compared_with_its_newest_checkpoint(train_tiny: TrainTiny, tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", 10)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000010"):
        found = inspect_model(str(source))
        assert found.kind == "checkpoint"
        assert all(check.passed for check in found.checks)
        assert len(found.checks) == 3
        assert found.notes == ("step 10 of the run run",)
        assert (found.seq_len, found.batch) == (16, 2), "those of the run"


def test_a_run_without_a_checkpoint_is_shown(train_tiny: TrainTiny, tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", 5)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    found = inspect_model(str(tmp_path / "run"))
    assert (found.kind, found.checks, found.notes) == ("run", [], ("the run has no checkpoint yet",))


def test_a_gguf_file_tells_its_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), GGMLQuantizationType.Q8_0)
    found = inspect_model(str(path))
    assert found.config == GGUF_CONFIG
    assert [check.passed for check in found.checks] == [True, True, True]


def test_a_gguf_file_that_contradicts_its_metadata_is_shown(tmp_path: Path) -> None:
    weights = hf_weights(GGUF_CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"][:100]
    names, shapes, types = inspect_model(str(write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights))).checks
    assert (names.passed, shapes.passed, types.passed) == (True, False, True)
    assert "norm.weight is [100], not [192]" in shapes.measured


def test_a_folder_that_is_there_for_a_gguf_file_tells_its_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = inspect_model(str(tmp_path))
    assert (found.kind, found.config) == ("gguf", GGUF_CONFIG)


# --- a weight file alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_header_tells_what_its_shapes_determine(tied: bool, tmp_path: Path) -> None:
    reference(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path / "model.safetensors"))
    assert found.config is None
    expected = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    expected |= {"key_value_width": 8, "tie_word_embeddings": tied, "biases": [], "dtypes": ["BF16"]}
    assert found.derived.items() >= expected.items()
    assert found.flops_per_token == {}
    assert found.to_dict()["architecture"] is None


def test_a_header_says_what_it_cannot_tell(tmp_path: Path) -> None:
    reference(hidden_size=192, num_attention_heads=3, head_dim=64).save_pretrained(tmp_path)
    alone = " ".join(q.what for q in inspect_model(str(tmp_path / "model.safetensors")).open_questions)
    with_config = " ".join(q.what for q in inspect_model("smollm2-135m").open_questions)
    for word in (
        "heads",
        "theta",
        "epsilon",
        "rotary pairs",
        "arithmetic of the norms",
        "place of the norms",
    ):
        assert word in alone
    assert "3 : 1 heads of 64" in alone
    assert "theta" not in with_config
    assert "rotary pairs" in with_config


def test_a_header_of_something_else_is_described_without_a_guess(tmp_path: Path) -> None:
    save_file({"x.bias": torch.ones(3), "model.layers.1.y": torch.ones(2)}, tmp_path / "x.safetensors")
    derived = inspect_model(str(tmp_path / "x.safetensors")).derived
    assert derived["hidden_size"] is None
    assert derived["num_hidden_layers"] is None
    assert derived["biases"] == ["x"]
    assert "unknown" in shown(str(tmp_path / "x.safetensors"))


# --- the Hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one model, alice/nano."""
    monkeypatch.chdir(tmp_path)
    with hub_with_client(tmp_path, monkeypatch) as server:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.objects |= {sha256(data): data for data in files.values()}
        server.repos["models/alice/nano"] = Repo(private=False, sdk=None)
        server.repos["models/alice/nano"].commit(files, "a push")
        yield server


def test_a_hub_model_is_compared_by_its_headers(hub: Hub) -> None:
    found = inspect_model("alice/nano")
    assert found.kind == "hub"
    assert [check.passed for check in found.checks] == [True, True, True]
    assert hub.sent("GET /cdn")


def test_weights_out_of_reach_are_said_not_hidden(hub: Hub) -> None:
    hub.breaks = lambda request: 404 if "model.safetensors" in request else None
    found = inspect_model("alice/nano")
    assert found.checks == []
    assert "was not compared" in found.notes[0]
    assert "was not compared" in shown("alice/nano")


# --- what is shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["smollm2-135m", "folder", "header"])
@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(source: str, width: int, folder: Path) -> None:
    place = {"folder": str(folder), "header": str(folder / "model.safetensors")}
    text = shown(place.get(source, source), width).partition("Diagram")[0]
    assert max(len(line) for line in text.splitlines()[1:]) <= width  # the first line is the source's own name


def test_names_from_outside_are_not_markup(tmp_path: Path) -> None:
    (tmp_path / "[bold]x").mkdir()
    reference().save_pretrained(tmp_path / "[bold]x")
    file = tmp_path / "[bold]x" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"[red]y[/nothing]": torch.ones(1)}, file)
    text = shown(str(file.parent), 200)
    assert "[bold]x" in text
    assert "[red]y" in text
    save_file({"[red]z[/nothing].bias": torch.ones(1)}, file)
    assert "[red]z[/nothing]" in shown(str(file), 200)


@pytest.mark.parametrize("name", preset_names())
def test_every_box_of_the_diagram_is_connected(name: str) -> None:
    config = load_preset(name).model
    text = mermaid(config)
    boxes = set(re.findall(r'^ +(\w+)\["', text, re.MULTILINE))
    arrows = [line.split(" --> ") for line in text.splitlines() if "-->" in line]
    used = {box.strip() for line in arrows for box in line}
    assert used == boxes
    assert text.count('"') == 2 * text.count("[")  # every label is quoted
    assert f"{config.num_hidden_layers} times" in text
    into = [line[place + 1] for line in arrows for place in range(len(line) - 1)]
    inputs = {box: into.count(box) for box in ("add_attention", "add_mlp", "attention", "swiglu", "lm_head")}
    # Both residual connections; queries, keys and values; gate and up.
    assert inputs == {"add_attention": 2, "add_mlp": 2, "attention": 3, "swiglu": 2, "lm_head": 1}


def test_the_diagram_has_the_numbers_of_the_model() -> None:
    text = mermaid(load_preset("smollm2-135m").model)
    block = (134_515_008 - 49_152 * 576 - 576) // 30
    for number in (
        "49,152 rows of 576",
        "28,311,552",
        "9 heads of 64",
        "theta 100,000",
        f"{block:,} parameters each",
    ):
        assert number in text
    untied = ModelConfig(**GGUF_CONFIG.model_dump() | {"tie_word_embeddings": False})
    assert "the embedding matrix itself" not in mermaid(untied)


# --- what is refused ---------------------------------------------------------------------------------------


def test_bad_sources_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    (tmp_path / "x.bin").write_bytes(b"\x80\x04\x95" + bytes(40))
    cases = {
        "x.safetensors": (CheckpointError, "claims a header of 9,223,372,036,854,775,808"),
        "x.bin": (CheckpointError, "never unpickles"),
        "missing.json": (DataError, "there is no model"),
    }
    for name, (kind, text) in cases.items():
        with pytest.raises(kind, match=text):
            inspect_model(str(tmp_path / name))
    with pytest.raises(DataError, match=r"did you mean the preset smollm2-135m\?"):
        inspect_model("smollm2-135")


def test_inspecting_does_not_need_pytorch(folder: Path) -> None:
    code = (
        "import sys; from resmol.interop.inspect import inspect_model\n"
        "for source in sys.argv[1:]: inspect_model(source).to_dict()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, "smollm2-135m", str(folder), str(folder / "model.safetensors")],
        check=True,
    )
