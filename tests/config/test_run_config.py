"""The configuration: every field has a drift class, every problem is named, what is written is read back."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import UNTIMED
from pydantic import BaseModel, ValidationError

from resmol.config.describe import describe
from resmol.config.drift import reconcile
from resmol.config.load import FROM_SCRATCH, load_config, load_preset, parse_overrides, preset_names, with_overrides
from resmol.config.run_config import RunConfig, drift_classes, flatten
from resmol.errors import ConfigError, DataError
from resmol.model.flops import total_parameters
from resmol.train.lr_schedule import end_of_decay

# As the model cards of HuggingFaceTB state them; the pretraining and CPU presets train the 135M model.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-135m-cpu": 134_515_008,
    "smollm2-135m-pretraining": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
ARCHITECTURE = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the configuration, as the enumeration of the models finds it."""

    key: str
    annotation: Any
    extra: Any


def all_fields() -> list[Field]:
    """Enumerate the fields independently of `drift_classes`."""
    found = []
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = field.annotation.model_fields.items()
            found += [Field(f"{section}.{key}", f.annotation, f.json_schema_extra) for key, f in inner]
        else:
            found.append(Field(section, field.annotation, field.json_schema_extra))
    return found


def base_config() -> RunConfig:
    """A configuration in which every field can be changed alone without breaking another rule."""
    table = {
        "model": ARCHITECTURE,
        "data": {"seq_len": 64},
        "batch": {"global_batch_tokens": 4096, "micro_batch_size": 4},
        "schedule": {"warmup_steps": 10, "decay_start": 100, "decay_steps": 50, "horizon": 500},
        "runtime": {"device": "cpu", "precision": "float32", "matmul_backend": "mkl", "compile": "off"},
    }
    return RunConfig.model_validate_json(json.dumps(table))


# Where the rules leave no other value of this field alone, the change that is tried instead.
CHANGED: dict[str, Any] = {
    "model.hidden_size": 192,
    "model.num_attention_heads": 12,
    "model.num_key_value_heads": 3,
    "model.max_position_embeddings": 8192,
    "tokenizer.sha256": "0" * 64,
    "data.seq_len": 128,
    "batch.global_batch_tokens": 8192,
    "batch.micro_batch_size": 8,
    "schedule.decay_start": 101,
    "runtime.determinism": "off",  # portable decides other fields as well
    "optimizer.beta2_halflife_tokens": 1_000_000,
    "checkpoint.permanent": [5000],
}
# One allowed value, so nothing can drift; and the tables of a mixture, which change together (test_mixture.py).
FIXED = {"model.hidden_act", "data.source", "data.stage"}
KEYS = [field.key for field in all_fields() if field.key not in FIXED]


def another_value(key: str, value: Any) -> Any:
    if key in CHANGED:
        return CHANGED[key]
    annotation = next(field.annotation for field in all_fields() if field.key == key)
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice not in (value, "auto"))
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


def changed_config(key: str) -> RunConfig:
    value = another_value(key, flatten(base_config())[key])
    return with_overrides(base_config(), [f"{key}={json.dumps(value)}"])


def problems_of(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_preset("nano", overrides)
    assert caught.value.exit_code == 2
    return caught.value.what


# --- every field --------------------------------------------------------------------------------------------


def test_every_field_has_a_drift_class_and_a_description() -> None:
    for field in all_fields():
        assert isinstance(field.extra, dict), field.key
        assert field.extra["drift"] in ("A", "B", "C"), field.key
    assert drift_classes() == {field.key: field.extra["drift"] for field in all_fields()}
    assert all(row.rstrip(" |") for row in describe().splitlines() if row.startswith("| `"))


def test_the_enumeration_finds_fields_of_every_section() -> None:
    sections = {field.key.partition(".")[0] for field in all_fields()}
    assert sections == set(RunConfig.model_fields)
    assert set(flatten(base_config())) == {field.key for field in all_fields()}


@pytest.mark.parametrize(
    ("key", "drift"),
    {
        "model.rope_theta": "A",
        "data.seed": "A",
        "data.seq_len": "A",
        "tokenizer.sha256": "A",
        "optimizer.beta1": "A",
        "schedule.horizon": "A",
        "train.seed": "A",
        "optimizer.lr": "B",
        "batch.global_batch_tokens": "B",
        "runtime.threads": "B",
        "train.steps": "C",
        "logging.every": "C",
        "evaluation.every": "C",
    }.items(),
)
def test_the_classes_are_those_of_the_fault_matrix(key: str, drift: str) -> None:
    assert drift_classes()[key] == drift


def test_the_page_of_the_documentation_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == describe(), "python -m resmol.config.describe > docs/configuration.md"


def test_nothing_can_be_changed_in_place() -> None:
    config = base_config()
    with pytest.raises(ValidationError):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.train = config.train  # type: ignore[misc]


# --- drift --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_drift_of_every_field(key: str) -> None:
    stored, wanted, drift = base_config(), changed_config(key), drift_classes()[key]
    before, after = flatten(stored)[key], flatten(wanted)[key]
    assert before != after
    if drift == "C":
        assert reconcile(stored, wanted) == (wanted, {})
        return
    with pytest.raises(ConfigError) as caught:
        reconcile(stored, wanted)
    assert f"{key} (class {drift}): {before!r} -> {after!r}" in caught.value.what
    assert (f"--accept-drift {key}" in caught.value.fix) == (drift == "B")
    if drift == "B":
        assert reconcile(stored, wanted, [key]) == (wanted, {key: {"from": before, "to": after}})
    else:
        with pytest.raises(ConfigError):
            reconcile(stored, wanted, [key])


def test_accepting_a_change_is_only_offered_where_it_helps() -> None:
    wanted = base_config().replace({"optimizer.beta1": 0.5, "optimizer.lr": 0.5})
    with pytest.raises(ConfigError) as caught:
        reconcile(base_config(), wanted)
    assert "optimizer.beta1" in caught.value.fix
    assert "--accept-drift" not in caught.value.fix


@pytest.mark.parametrize("key", KEYS)
def test_the_digest_binds_what_the_numbers_depend_on(key: str) -> None:
    same = changed_config(key).sha256 == base_config().sha256
    assert same == (drift_classes()[key] == "C")


def test_the_same_configuration_goes_on() -> None:
    assert reconcile(base_config(), base_config()) == (base_config(), {})


def test_all_drifts_are_reported_at_once() -> None:
    wanted = with_overrides(
        base_config(), ["optimizer.lr=1.0", "data.seed=9", "train.steps=5050", "batch.micro_batch_size=2"]
    )
    with pytest.raises(ConfigError) as caught:
        reconcile(base_config(), wanted, ["optimizer.lr"])
    assert "data.seed" in caught.value.what
    assert "batch.micro_batch_size" in caught.value.what
    assert "optimizer.lr" not in caught.value.what
    assert "train.steps" not in caught.value.what


@pytest.mark.parametrize("key", ["runtime.device", "runtime.precision", "runtime.compile"])
def test_auto_keeps_what_was_decided_at_the_start(key: str) -> None:
    stored = base_config()
    wanted = with_overrides(stored, [f"{key}=auto", "train.steps=5050"])
    config, drifts = reconcile(stored, wanted)
    assert drifts == {}
    assert flatten(config) == flatten(stored) | {"train.steps": 5050}


def test_auto_means_something_in_the_runtime_section_only() -> None:
    stored = with_overrides(base_config(), ["sampling.prompt=JULIET:"])
    config, _ = reconcile(stored, with_overrides(stored, ["sampling.prompt=auto"]))
    assert config.sampling.prompt == "auto"


# --- typed changes ------------------------------------------------------------------------------------------


def test_replace_returns_a_validated_copy() -> None:
    config = base_config()
    changes = {"optimizer.lr": 1, "checkpoint.permanent": (5, 7), "name": "other", "runtime.precision": "bfloat16"}
    changed = config.replace(changes)
    assert (changed.optimizer.lr, changed.checkpoint.permanent, changed.name) == (1.0, (5, 7), "other")
    assert flatten(changed) == flatten(config) | changes | {"checkpoint.permanent": [5, 7]}
    assert config == base_config()
    assert config.replace({}) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lrr", 1.0, r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?"),
        ("optimiser.lr", 1.0, r"optimiser: unknown key; did you mean optimizer"),
        ("name.x", 1, "name: Input should be a valid string"),
        ("optimizer", {}, None),
        ("optimizer.lr", "1e-3", r"optimizer\.lr: Input should be a valid number"),
        ("optimizer.lr", float("nan"), r"optimizer\.lr: "),
        ("data.seq_len", 10**6, r"data\.seq_len \(1000000\) is longer"),
    ],
)
def test_replace_refuses_what_is_no_configuration(key: str, value: object, message: str | None) -> None:
    if message is None:
        assert base_config().replace({key: value}) == base_config()
        return
    with pytest.raises(ConfigError, match=message):
        base_config().replace({key: value})


def test_replace_and_set_are_the_same_change() -> None:
    strings = ["optimizer.lr=1e-3", "runtime.compile=off", "checkpoint.permanent=[3]", 'sampling.prompt="a.b"']
    assert parse_overrides(strings) == {
        "optimizer.lr": 1e-3, "runtime.compile": "off", "checkpoint.permanent": [3], "sampling.prompt": "a.b",
    }  # fmt: skip
    assert with_overrides(base_config(), strings) == base_config().replace(parse_overrides(strings))


# --- presets ------------------------------------------------------------------------------------------------


def test_the_presets_are_those_that_are_promised() -> None:
    assert set(preset_names()) == {*PUBLISHED, "nano"}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_preset_has_the_published_parameter_count(name: str, parameters: int) -> None:
    config = load_preset(name)
    assert config.name == name
    assert total_parameters(config.model) == parameters


def test_nano_keeps_the_proportions_of_the_model() -> None:
    nano, full = load_preset("nano").model, load_preset("smollm2-135m").model
    assert nano.num_attention_heads == 3 * nano.num_key_value_heads
    assert nano.intermediate_size * full.hidden_size == full.intermediate_size * nano.hidden_size
    assert nano.initializer_range == pytest.approx(nano.hidden_size**-0.5)
    assert nano.vocab_size == full.vocab_size


@pytest.mark.parametrize("name", [*PUBLISHED, "nano"])
def test_every_step_is_a_whole_number_of_micro_batches(name: str) -> None:
    config = load_preset(name)
    tokens = config.grad_accum_steps * config.batch.micro_batch_size * config.data.seq_len
    assert tokens == config.batch.global_batch_tokens


@pytest.mark.parametrize("name", [*PUBLISHED, "nano"])
def test_the_job_is_in_every_preset(name: str) -> None:
    if name != "smollm2-135m-pretraining":
        config = load_preset(name)
        assert config.train.steps == 5000
        assert 5000 in config.checkpoint.permanent
        assert end_of_decay(config.schedule) == 5050, "the learning rate reaches 0 with the last step of the job"


def test_the_memory_of_the_published_recipe_is_kept_in_tokens() -> None:
    published, job = load_preset("smollm2-135m-pretraining"), load_preset("smollm2-135m")
    assert published.optimizer.beta2 == 0.95
    tokens = published.batch.global_batch_tokens
    assert job.optimizer.beta2_at(tokens) == pytest.approx(0.95, abs=2e-4)
    assert job.optimizer.beta2_at(tokens // 64) ** 64 == pytest.approx(0.95, abs=2e-4), "64 steps of its own batch"


def test_an_unknown_preset_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean smollm2-135m") as caught:
        load_preset("smollm2-135")
    assert "nano" in caught.value.fix


def test_a_preset_is_not_a_path() -> None:
    with pytest.raises(ConfigError):
        load_preset("../presets/nano")


# --- what is wrong is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimiser.lr=1e-3", "optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.lrr=1e-3", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("model.n_embd=64", "model.n_embd: unknown key"),
        ("data.block_size=64", "data.block_size: unknown key"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("optimizer.lr=-1e-3", "optimizer.lr"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay"),
        ("optimizer.lr=fast", "'fast'"),
        ("optimizer.name=sgd", "optimizer.name"),
        ("optimizer.beta2=1", "optimizer.beta2"),
        ("optimizer.beta2_halflife_tokens=0", "optimizer.beta2_halflife_tokens"),
        ("optimizer.embedding_lr_scale=0", "optimizer.embedding_lr_scale"),
        ("train.steps=0", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=true", "train.steps"),
        ("data.document_mask=1", "data.document_mask"),
        ("data.document_mask=yes", "data.document_mask"),
        ("data.seq_len=1", "data.seq_len"),
        ("checkpoint.keep_last=1", "checkpoint.keep_last"),
        ("tokenizer.sha256=9ca9", "tokenizer.sha256"),
        ("sampling.top_p=0", "sampling.top_p"),
        ("model=3", "model"),
        ("data.seq_len=16384", "data.seq_len (16384) is longer than model.max_position_embeddings (8192)"),
        ("batch.global_batch_tokens=100", "batch.global_batch_tokens (100) is not a multiple"),
        (
            "model.num_key_value_heads=2",
            "num_attention_heads (3) is not a multiple of num_key_value_heads (2)",
        ),
        ("model.hidden_size=50", "hidden_size (50) is not a multiple of num_attention_heads (3)"),
        ("model.hidden_size=45", "the head size (15) is odd"),
        ("model.eos_token_id=49152", "eos_token_id"),
        ("schedule.kind=cosine", "horizon (0) must lie after warmup_steps (100)"),
        ("schedule.decay_start=0", "decay_start and decay_steps belong together"),
        ("schedule.decay_steps=0", "decay_start and decay_steps belong together"),
        ("data.seq_len_warmup_steps=-1", "data.seq_len_warmup_steps"),
        ("optimizer.lr.x=1", "optimizer.lr"),
    ],
)
def test_a_bad_value_is_refused_by_name(override: str, expected: str) -> None:
    assert expected in problems_of([override])


def test_beta2_or_its_half_life_but_not_both() -> None:
    beta2, halflife = "optimizer.beta2=0.9", "optimizer.beta2_halflife_tokens=1000"
    both = "beta2 (0.9) and beta2_halflife_tokens (1000) state the same thing: set one of them"
    assert both in problems_of([beta2, halflife])
    first = with_overrides(base_config(), [beta2])
    second = with_overrides(first, [halflife])
    assert (second.optimizer.beta2, second.optimizer.beta2_halflife_tokens) == (None, 1000)
    assert with_overrides(second, [beta2]) == first, "what is laid over a table replaces the other one"
    assert RunConfig.parse(tomllib.loads(second.to_toml()), "a file") == second


def test_a_gradient_counts_half_after_the_half_life() -> None:
    """Against a sum that is averaged step by step, for two sizes of the step."""
    optimizer = with_overrides(base_config(), ["optimizer.beta2_halflife_tokens=6400"]).optimizer
    for tokens in (64, 1600):
        weight = 1.0
        for _ in range(6400 // tokens):
            weight *= optimizer.beta2_at(tokens)
        assert weight == pytest.approx(0.5, rel=1e-9)


def test_windows_that_have_no_eighths_cannot_be_cut_up() -> None:
    found = problems_of(
        ["data.seq_len=20", "batch.global_batch_tokens=20", "batch.micro_batch_size=1", "data.seq_len_warmup_steps=9"]
    )
    assert "seq_len (20) is no multiple of 8" in found


def test_a_decay_inside_the_warm_up_is_refused() -> None:
    assert "lies inside the warm-up" in problems_of(["schedule.decay_start=50", "schedule.decay_steps=10"])


def test_all_problems_are_reported_at_once() -> None:
    what = problems_of(["optimizer.lr=-1", "train.steps=0", "nmae=x", "data.block_size=4"])
    assert "4 problems" in what
    for name in ("optimizer.lr", "train.steps", "nmae: unknown key; did you mean name?", "data.block_size"):
        assert name in what


@pytest.mark.parametrize("override", ["optimizer.lr", "=1", ".lr=1", "optimizer.=1", ""])
def test_what_is_not_an_assignment_is_refused(override: str) -> None:
    assert "is not section.key=value" in problems_of([override])


def test_a_value_cannot_be_used_as_a_section() -> None:
    assert "is a value, not a section" in problems_of(["name=x", "name.y=1"])


# --- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        (" optimizer.lr = 0.5 ", "optimizer.lr", 0.5),
        ("train.steps=1_000", "train.steps", 1000),
        ("runtime.compile=off", "runtime.compile", "off"),
        ('runtime.compile="off"', "runtime.compile", "off"),
        ("data.document_mask=false", "data.document_mask", False),
        ("checkpoint.permanent=[1, 50]", "checkpoint.permanent", [1, 50]),
        ("sampling.prompt=ROMEO = JULIET", "sampling.prompt", "ROMEO = JULIET"),
        ("sampling.prompt=", "sampling.prompt", ""),
        ("name=mine", "name", "mine"),
    ],
)
def test_an_override_sets_exactly_one_field(override: str, key: str, value: Any) -> None:
    assert flatten(load_preset("nano", [override])) == flatten(load_preset("nano")) | {key: value}


def test_the_last_override_wins() -> None:
    assert load_preset("nano", ["train.steps=1", "train.steps=2"]).train.steps == 2


# --- files --------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*PUBLISHED, "nano"])
def test_what_a_run_stores_is_read_back(name: str, tmp_path: Path) -> None:
    config = load_preset(name, ['sampling.prompt="\\"Ünï\\u0007\\n"'])
    again = load_config(written(tmp_path, "config.toml", config.to_toml()))
    assert again == config
    assert again.sha256 == config.sha256


@given(
    prompt=st.text(st.characters(codec="utf-8")),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    permanent=st.lists(st.integers(-5, 10**9)),
)
@settings(suppress_health_check=[*UNTIMED, HealthCheck.function_scoped_fixture])
def test_any_values_are_read_back(prompt: str, lr: float, seed: int, permanent: list[int], tmp_path: Path) -> None:
    config = base_config()
    changed = config.model_copy(
        update={
            "sampling": config.sampling.model_copy(update={"prompt": prompt}),
            "optimizer": config.optimizer.model_copy(update={"lr": lr}),
            "data": config.data.model_copy(update={"seed": seed}),
            "checkpoint": config.checkpoint.model_copy(update={"permanent": tuple(permanent)}),
        }
    )
    path = tmp_path / "config.toml"
    path.write_bytes(changed.to_toml().encode("utf-8"))
    assert load_config(path) == changed


def test_a_configuration_is_called_as_its_file_or_the_folder_of_a_config_toml(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert load_config(written(tmp_path / "mine", "config.toml", 'base = "nano"\n')).name == "mine"
    assert load_config(written(tmp_path, "other.toml", 'base = "nano"\n')).name == "other"
    assert load_config(written(tmp_path, "other.toml", 'name = "a name"\nbase = "nano"\n')).name == "a name"


@pytest.mark.parametrize("way", ["file", "override"])
def test_another_width_brings_the_spread_of_its_initial_weights(way: str, tmp_path: Path) -> None:
    def spread(base: str, *settings: str) -> float:
        if way == "override":
            return load_preset(base, [f"model.{setting}" for setting in settings]).model.initializer_range
        text = "\n".join([f'base = "{base}"', "[model]", *settings])
        return load_config(written(tmp_path, "own.toml", text)).model.initializer_range

    assert spread("nano", "hidden_size=96") == pytest.approx(1 / math.sqrt(96), abs=1e-15)
    assert spread("nano", "num_hidden_layers=2") == load_preset("nano").model.initializer_range
    assert spread("nano", "hidden_size=96", "initializer_range=0.5") == 0.5
    assert spread("smollm2-1.7b", "hidden_size=1024") == 0.02  # not the rule, so it stays


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.toml", 'base = "nano"\n[optimizer]\nlr = 0.5\n')
    expected = flatten(load_preset("nano")) | {"optimizer.lr": 0.5, "name": "mine"}
    assert flatten(load_config(path)) == expected
    assert flatten(load_config(path, ["optimizer.lr=0.25"])) == expected | {"optimizer.lr": 0.25}


def test_a_base_may_be_a_file_beside_it(tmp_path: Path) -> None:
    written(tmp_path, "below.toml", load_preset("nano", ["name=below"]).to_toml())
    path = written(tmp_path, "mine.toml", 'base = "below.toml"\nname = "mine"\n[train]\nsteps = 7\n')
    assert flatten(load_config(path)) == flatten(load_preset("nano")) | {"name": "mine", "train.steps": 7}


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ('base = "nano"', "has a base of its own"),
        ("[model", "is not TOML"),
        (None, "neither a preset nor a file"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(below: str | None, expected: str, tmp_path: Path) -> None:
    if below is not None:
        written(tmp_path, "below.toml", below)
    with pytest.raises(ConfigError, match=expected):
        load_config(written(tmp_path, "mine.toml", 'base = "below.toml"'))


@pytest.mark.parametrize("base", ["3", "[]", '""', '".."'])
def test_a_base_that_is_no_name_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a preset nor a file"):
        load_config(written(tmp_path, "mine.toml", f"base = {base}"))


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"[model", b"a = \xff\xfe", b"a = 1\na = 2", b'{"model": 1}'])
def test_what_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_an_empty_file_lists_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: Field required"):
        load_config(written(tmp_path, "empty.toml", ""))


# --- architecture -------------------------------------------------------------------------------------------


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    return written(tmp_path, "config.json", json.dumps(ARCHITECTURE | {"model_type": "llama"}))


def test_an_architecture_replaces_that_of_the_base(config_json: Path, tmp_path: Path) -> None:
    text = f'base = "nano"\narchitecture = {json.dumps(str(config_json))}\n'
    config = load_config(written(tmp_path, "mine.toml", text))
    assert config.model.model_dump() == ARCHITECTURE | {"hidden_act": "silu"}
    assert config.schedule == load_preset("nano").schedule


def test_the_model_section_of_the_same_file_lies_over_the_architecture(config_json: Path, tmp_path: Path) -> None:
    text = f"architecture = {json.dumps(str(config_json))}\nmodel.num_hidden_layers = 5\ndata.seq_len = 64\n"
    config = load_config(written(tmp_path, "mine.toml", text), ["model.vocab_size=300"])
    assert config.model.model_dump() == ARCHITECTURE | {
        "hidden_act": "silu", "num_hidden_layers": 5, "vocab_size": 300,
    }  # fmt: skip


def test_an_architecture_can_be_given_as_an_override(config_json: Path) -> None:
    config = load_preset("nano", [f"architecture={config_json}", "model.num_hidden_layers=3"])
    assert config.model.model_dump() == ARCHITECTURE | {"hidden_act": "silu", "num_hidden_layers": 3}


def test_an_architecture_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_config(written(tmp_path, "mine.toml", f'architecture = "{tmp_path}/nowhere/config.json"'))


def test_every_preset_states_its_sources_and_stands_on_the_same_base() -> None:
    folder = Path(__file__).parents[2] / "src" / "resmol" / "config" / "presets"
    for file in folder.glob("*.toml"):
        text = file.read_text(encoding="utf-8")
        assert tomllib.loads(text).get("base") == (None if file.stem == "smollm2-135m" else "smollm2-135m"), file.name
        assert "#" in text, file.name


@pytest.mark.parametrize("name", ["model", "model/config.json"])
def test_a_model_is_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Neither as a preset, nor as a file, nor as a base; its shape is taken by another key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "own.toml").write_text(f'base = "{name}"\n')
    for read, named in ((load_preset, name), (load_config, name), (load_config, "own.toml")):
        with pytest.raises(ConfigError, match="is a model, not a configuration of a run") as caught:
            read(named)
        assert f'architecture = "{name}"' in caught.value.fix
        assert FROM_SCRATCH in caught.value.fix
    with pytest.raises(ConfigError, match="is a model, not a configuration"):
        load_preset("HuggingFaceTB/SmolLM2-135M")
