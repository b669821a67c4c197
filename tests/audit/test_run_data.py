"""What a run was trained on is found while it is the same, and its words are offered as prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny import TrainTiny

from resmol.audit.run_data import example_prompts, recorded_data
from resmol.data.beginnings import first_words
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.run.directory import RunDir


def test_prompts_come_from_the_configuration_and_the_data(
    tmp_path: Path, train_tiny: TrainTiny, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer
) -> None:
    train_tiny(tmp_path / "run", 5)
    run = RunDir(tmp_path / "run")
    config, words = run.load_config(), first_words(tiny_dataset, tiny_tokenizer, 4)
    assert example_prompts(run, tiny_tokenizer) == [config.sampling.prompt, *words][:4]
    found = recorded_data(run, config)
    assert found is not None
    assert found.fingerprint == tiny_dataset.fingerprint
    other = tiny_tokenizer.with_data(tiny_tokenizer.data + b" ")
    assert example_prompts(run, other) == [config.sampling.prompt], "another tokenizer spells the ids otherwise"

    copy = Path(shutil.copytree(tiny_dataset.root, tmp_path / "copy"))
    moved = config.replace({"data.path": str(copy)})
    run.write_config(moved)
    for shard in tiny_dataset.manifest.val.shards:
        (copy / shard.name).write_bytes(b"\xff" * shard.bytes)
    assert recorded_data(run, moved) is not None, "only reading shows it"
    assert example_prompts(run, tiny_tokenizer) == [config.sampling.prompt]
