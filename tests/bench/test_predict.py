"""The prediction for other devices against counts by hand, and against what published programs reached."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from resmol.bench.predict import DEVICES, Device, largest_fit, predict, predict_speed, step_parts
from resmol.cli import app
from resmol.config.load import load_preset
from resmol.model.flops import training_flops_per_token, training_memory

CONFIG = load_preset("smollm2-135m")
ENDLESS = Device("endless memory and links", 1e14, 1e30, 1e30, 1e30)


def test_the_parts_have_all_operations_of_a_step_and_the_bytes_counted_by_hand() -> None:
    parts = step_parts(CONFIG.model, 16_384, 2048, 1)
    assert sum(part.flops for part in parts.values()) == 16_384 * training_flops_per_token(CONFIG.model, 2048)
    # AdamW reads weight, gradient and two moments and writes weight and moments; the norm reads the gradient.
    assert parts["gradient norm and AdamW"].bytes == 134_515_008 * 4 * (4 + 3 + 1)
    # SwiGLU reads gate and up and writes one: 3 x 1536 halves; forward once, backward twice.
    assert parts["norms, rotation, SwiGLU"].bytes > 3 * 30 * 16_384 * 3 * 1536 * 2


def test_where_only_products_take_time_a_step_takes_its_operations_at_the_assumed_share() -> None:
    speed = predict_speed(CONFIG, ENDLESS)
    flops = 16_384 * training_flops_per_token(CONFIG.model, 2048)
    assert speed.step_seconds == pytest.approx(flops / 1e14 / 0.6)
    assert speed.mfu == pytest.approx(0.6)


def test_gradients_that_cross_a_slow_link_are_exposed() -> None:
    device = Device("a slow link", 1e14, 1e30, 1e30, 1e9)
    one, four = predict_speed(CONFIG, device), predict_speed(CONFIG, device, 4)
    ring = 4 * 134_515_008 * 2 * 3 / 4 / 0.8e9
    assert four.exposed_seconds == pytest.approx(ring - one.step_seconds * 2 / 3)
    assert four.step_seconds == pytest.approx(one.step_seconds + four.exposed_seconds)


def test_published_programs_lie_between_the_prediction_and_the_ceiling() -> None:
    """A 124M model at 1024 tokens in plain PyTorch; a token of SmolLM2-135M at 2048 costs 1 / 0.84 as much.

    A100: 182,000 tokens/s in the lecture build-nanogpt at 16,384 tokens a step; H100: 442,000 in the baseline of
    modded-nanogpt's track 3.
    """
    devices = {device.name: predict_speed(CONFIG, device) for device in DEVICES}
    for name, published in (("A100 80 GB", 182_000), ("H100 SXM", 442_000)):
        assert devices[name].tokens_per_second < 0.84 * published < devices[name].ceiling


def test_shards_divide_what_is_kept_and_gather_what_is_computed_with() -> None:
    whole = training_memory(CONFIG.model, 1, 128, 128)
    shared = training_memory(CONFIG.model, 1, 128, 128, shards=4)
    for part in ("weights", "gradients", "adamw moments"):
        assert shared[part] * 4 == whole[part]
    assert shared["activations"] == whole["activations"]
    block = (134_515_008 - 49152 * 576 - 576) // 30 - 2 * 576
    assert shared["gathered"] == 2 * 4 * (49152 * 576 + 2 * block)


def test_a_model_that_does_not_fit_on_one_device_fits_on_more() -> None:
    large = load_preset("smollm2-1.7b")
    assert not largest_fit(large, 24e9, 1).windows
    assert largest_fit(large, 24e9, 2).windows
    assert largest_fit(CONFIG, 80e9, 1).windows >= 8


def test_the_command_prints_what_it_assumes_and_json() -> None:
    assert "Predicted, not measured" in CliRunner().invoke(app, ["bench", "predict"]).output
    found = json.loads(CliRunner().invoke(app, ["bench", "predict", "--json"]).output)
    assert found == json.loads(json.dumps(predict(CONFIG).to_dict()))
