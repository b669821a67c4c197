"""The same ids from datatrove's executors as from one machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import synthetic_texts

from resmol.data import cluster
from resmol.data.cluster import ClusterOptions, prepare_on_cluster
from resmol.data.prepare import prepare
from resmol.data.readers import read_inputs
from resmol.data.resolve import Text
from resmol.data.shards import Dataset, TokenStream
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        lines = (json.dumps({"text": text}) + "\n" for text in ["", *synthetic_texts(30, seed=number)])
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def ids_of(stream: TokenStream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def ids(dataset: Dataset | None) -> list[int]:
    assert dataset is not None
    return [*ids_of(dataset.train), *ids_of(dataset.val)]


def one_machine(texts: Path, tokenizer: Tokenizer) -> list[int]:
    return ids(prepare(texts.with_name("one"), read_inputs([texts]), tokenizer, val_fraction=0.0))


def many(texts: Path, tokenizer: Tokenizer, options: ClusterOptions) -> Dataset | None:
    return prepare_on_cluster(texts.with_name("many"), Text((str(texts),)), tokenizer, options)


@pytest.mark.interop
def test_processes_of_this_machine_write_the_same_ids(texts, tiny_tokenizer):
    pytest.importorskip("datatrove")
    dataset = many(texts, tiny_tokenizer, ClusterOptions("local", tasks=3, workers=2))
    assert ids(dataset) == one_machine(texts, tiny_tokenizer)
    assert dataset is not None
    assert len(dataset.manifest.train.shards) == 3
    assert dataset.manifest.source.documents == 150
    assert len(dataset.val) > 0


@pytest.mark.interop
def test_folders_say_what_is_held_out_and_near_duplicates_are_left_out(texts, tiny_tokenizer, tmp_path, messages):
    """Documents of 60 words; in the training text are near-copies of one of them and of the held-out ones."""
    pytest.importorskip("datatrove")
    words = " ".join(synthetic_texts(200, seed=9)).split()
    some = [" ".join(words[60 * number : 60 * number + 60]) for number in range(8)]
    for name, documents in (("val", some[:2]), ("train", [f"So: {some[0]}", *some[2:], f"{some[5]} Again."])):
        (texts / name).mkdir()
        for number in range(2):
            lines = [json.dumps({"text": text}) + "\n" for text in documents[number::2]]
            (texts / name / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    (texts / "train" / "2.jsonl").write_text(json.dumps({"text": f"{some[1]} More."}), encoding="utf-8")
    for file in texts.glob("*.jsonl"):
        file.unlink()
    straight = prepare(tmp_path / "straight", read_inputs([texts]), tiny_tokenizer)
    whole = many(texts, tiny_tokenizer, ClusterOptions("local", tasks=5, workers=2))
    assert whole is not None
    assert ids_of(whole.train) == ids_of(straight.train)
    assert ids_of(whole.val) == ids_of(straight.val)
    options = ClusterOptions("local", tasks=5, workers=2, near_dedup=True)
    clean = prepare_on_cluster(tmp_path / "clean", Text((str(texts),)), tiny_tokenizer, options)
    assert clean is not None
    assert "data: left out 3 near-duplicates" in messages
    assert (clean.manifest.source.dedup, clean.manifest.source.duplicates) == ("minhash", 3)
    assert (clean.manifest.train.documents, clean.manifest.val.documents) == (6, 2)
    assert ids_of(clean.val) == ids_of(straight.val)


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes of one processor each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.interop
def test_a_ray_cluster_writes_the_same_ids_though_a_worker_is_killed(
    texts, tiny_tokenizer, tmp_path, ray_cluster, monkeypatch
):
    pytest.importorskip("datatrove")
    killed, whole_pipeline = tmp_path / "killed", cluster.pipeline

    def killing(data: Any, rank: int, world_size: int) -> Iterator[Any]:
        for number, document in enumerate(data):
            if (rank, number) == (1, 20) and not killed.exists():
                killed.touch()
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    def with_killing(*arguments: Any) -> list[Any]:
        read, write = whole_pipeline(*arguments)

        def read_and_kill(data: Any, rank: int, world_size: int) -> Iterator[Any]:
            return killing(read(data, rank, world_size), rank, world_size)

        return [read_and_kill, write]

    monkeypatch.setattr(cluster, "pipeline", with_killing)
    dataset = many(texts, tiny_tokenizer, ClusterOptions("ray", tasks=3))
    assert killed.exists()
    assert ids(dataset) == one_machine(texts, tiny_tokenizer)


@pytest.mark.interop
def test_slurm_gets_a_job_array(texts, tiny_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    options = ClusterOptions("slurm", tasks=3, workers=2, partition="cpu", time="1:00:00")
    assert many(texts, tiny_tokenizer, options) is None
    logs = tmp_path / "many.datatrove"
    script = (logs / "launch_script.slurm").read_text(encoding="utf-8").splitlines()
    assert {line for line in script if "--output" not in line and "--error" not in line} >= {
        "#!/bin/bash",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --partition=cpu",
        "#SBATCH --time=1:00:00",
        "#SBATCH --array=0-2%2",
        "#SBATCH --requeue",
        f"srun  -l -n 1 launch_pickled_pipeline {logs / 'executor.pik'}",
    }
    assert json.loads((logs / "ranks_to_run.json").read_text(encoding="utf-8")) == [0, 1, 2]


@pytest.mark.parametrize(("options", "word"), [({"executor": "dask"}, "dask"), ({"executor": "slurm"}, "partition")])
def test_options_that_do_not_fit_are_refused(options, word):
    with pytest.raises(UsageError, match=word):
        ClusterOptions(tasks=1, **options)
