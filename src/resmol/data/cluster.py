"""Prepare text with datatrove's executors: processes of this machine, a Slurm job array, or a Ray cluster.

Each task reads a contiguous block of the files, in our way, and tokenizes it with datatrove's `DocumentTokenizer` into
a `.ds` file of its own. These files in the order of the tasks hold the tokens that `prepare` writes on one machine. A
task that is run again, because its worker was killed, writes its file anew, so that nothing is lost or doubled;
datatrove keeps a list of the finished ones, and the same command goes on with the others.

Near-duplicates are found by MinHash (datatrove's four steps: signatures, buckets, clusters, filter), in one go for
held-out and training text. Held-out files come first, and the first of a cluster of documents stays: none of them has a
near-copy in the training text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from resmol.data.chunking import ReadCounts
from resmol.data.datatrove import import_datatrove
from resmol.data.readers import input_files, read_inputs
from resmol.data.resolve import Text, is_prepared
from resmol.data.shards import Dataset
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.installation import install_hint
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

EXECUTORS = ("local", "slurm", "ray")
_WORD = re.compile(r"[\u3041-\u30ff\u3400-\u9fff]|\w+")  # what is written without spaces, by its characters


@dataclass(frozen=True)
class ClusterOptions:
    """Where to run, in how many parts, and what only this way of preparing does.

    Attributes:
        executor: One of `EXECUTORS`.
        tasks: How many parts the files are divided into; at most one for each file.
        workers: How many run at a time; -1 is all of them.
        partition: Of Slurm.
        time: What Slurm gives each task, such as ``20:00:00``.
        near_dedup: Leave out documents that are nearly the same as another one.
    """

    executor: str
    tasks: int
    workers: int = -1
    partition: str | None = None
    time: str = "20:00:00"
    near_dedup: bool = False

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UsageError(f"--executor is {self.executor!r}", fix=f"choose one of: {', '.join(EXECUTORS)}")
        if self.executor == "slurm" and self.partition is None:
            raise UsageError("--executor slurm needs a partition", fix="add --partition NAME (`sinfo` lists them)")


@dataclass(frozen=True)
class Part:
    """The work of a task.

    Attributes:
        files: What it reads.
        folder: Where its tokens go.
    """

    files: tuple[str, ...]
    folder: str


def prepare_on_cluster(out: Path, text: Text, tokenizer: Tokenizer, cluster: ClusterOptions) -> Dataset | None:
    """Run the pipeline and return the dataset; None on Slurm, which runs it later.

    Args:
        out: The folder to write, on a disk that all nodes share.
        text: Files, patterns, folders and addresses that all nodes can read, and how to read them. Where neither
            ``text.val`` nor folders say what is held out, it is the end of the tokens.
        tokenizer: Makes the tokens; its file must be readable on all nodes.
        cluster: Where to run.

    Raises:
        UsageError: datatrove is not installed, ``out`` is prepared, or ``text`` asks for what only one machine does.
        DataError: A task failed, or there is nothing to read.
    """
    if is_prepared(out):
        raise UsageError(f"{out} is a prepared data folder already", fix=f"train on it as it is: --data {out}")
    alone = text.dedup or text.special_tokens != "as-tokens" or text.max_tokens is not None
    if not text.inputs or "-" in (*text.inputs, *text.val) or alone:
        raise UsageError(
            "--executor reads files only, as they are",
            fix="leave out --executor, or --corpus, --dedup, --special-tokens, --max-tokens and --input -",
        )
    stages = _stages(out, parts_of(out, text, cluster.tasks), text.options, tokenizer, cluster)
    stages[-1].run()  # after those that it depends on
    if cluster.executor == "slurm":
        logger.info(f"data: submitted to Slurm; when it is done: resmol prepare {out} --input {out}")
        return None
    for stage in stages:
        unfinished = stage.get_incomplete_ranks(skip_completed=True)
        if unfinished:
            raise DataError(
                f"{len(unfinished)} of {counted(stage.world_size, 'task')} did not finish, the first is "
                f"{unfinished[0]}",
                fix=f"see {stage.logging_dir.path}/logs, then run the same command again: finished tasks are not "
                "repeated",
            )
    removed = _count_removed(out) if cluster.near_dedup else None
    if removed is not None:
        logger.info(f"data: left out {counted(removed, 'near-duplicate')}")
    return import_datatrove(out, tokenizer, val_fraction=text.val_fraction, near_duplicates=removed)


def _count_removed(out: Path) -> int:
    """Return how many documents the filter left out: their numbers are listed, in 4 bytes each."""
    return sum(file.stat().st_size // 4 for file in (_work(out) / "removed").glob("*.remove"))


def parts_of(out: Path, text: Text, tasks: int) -> list[Part]:
    """Divide the files into at most ``tasks`` parts, each of one split; held-out ones come first."""
    files = input_files(text.inputs, text.options)
    if text.val:
        files = [(file, "train") for file, _ in files]
        files += [(file, "val") for file, _ in input_files(text.val, text.options)]
    parts = []
    for split in ("val", "train", None):
        names = [str(file) for file, of in files if of == split]
        number = min(len(names), max(1, tasks * len(names) // len(files)))
        borders = [len(names) * at // max(1, number) for at in range(number + 1)]
        folder = str(out / split) if split else str(out)
        parts += [Part(tuple(names[begin:end]), folder) for begin, end in pairwise(borders)]
    return parts


def pipeline(parts: Sequence[Part], options: ReadOptions, tokenizer: Tokenizer) -> list[Any]:
    """Return datatrove's pipeline: read, tokenize and write."""
    end = tokenizer.spelling(tokenizer.eos_id)
    write = partial(_write, parts=tuple(parts), tokenizer=str(tokenizer.path), end=end)
    return [partial(_documents, parts=tuple(parts), options=options), write]


def _documents(
    _data: Any, rank: int, _world_size: int, *, parts: Sequence[Part], options: ReadOptions
) -> Iterator[Any]:
    """Yield the documents of the files of one task, for datatrove."""
    from datatrove.data import Document

    for document in read_inputs(parts[rank].files, options).read(ReadCounts()):
        text = "".join(document.pieces)
        if text:
            yield Document(text=text, id=document.name)


def _write(
    data: Any, rank: int, world_size: int, *, parts: Sequence[Part], tokenizer: str, end: str | None
) -> Iterator[Any]:
    """Tokenize the documents of one task into the folder of its split, for datatrove."""
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer

    documents = iter(data)
    first = next(documents, None)
    if first is not None:  # else it would write an empty file
        writer = DocumentTokenizer(
            parts[rank].folder, tokenizer, eos_token=end, shuffle_documents=False, batch_size=1000
        )
        yield from writer.run(chain([first], documents), rank, world_size) or ()


def _stages(
    out: Path, parts: list[Part], options: ReadOptions, tokenizer: Tokenizer, cluster: ClusterOptions
) -> list[Any]:
    """Return the executors, each of which depends on the one before."""
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise UsageError("--executor needs datatrove", fix=install_hint("cluster")) from error
    read, write = pipeline(parts, options, tokenizer)
    if not cluster.near_dedup:
        return [_executor(_work(out), [read, write], len(parts), cluster)]
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    WordTokenizer.register(_Words)
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1", precision=64))
    signatures, buckets, removed = (str(_work(out) / name) for name in ("signatures", "buckets", "removed"))
    steps = [
        ("1-signatures", [read, MinhashDedupSignature(signatures, config, language=_Words())], len(parts)),
        ("2-buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ("3-clusters", [MinhashDedupCluster(buckets, removed, config)], 1),
        ("4-tokens", [read, MinhashDedupFilter(removed), write], len(parts)),
    ]
    stages: list[Any] = []
    for name, step, tasks in steps:
        stages.append(_executor(_work(out) / name, step, tasks, cluster, depends=stages[-1] if stages else None))
    return stages


class _Words:
    """Divides a text into words, without the models for each language that datatrove's own needs."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words; the only method that MinHash calls."""
        return _WORD.findall(text)


def _executor(logs: Path, steps: list[Any], tasks: int, cluster: ClusterOptions, **more: Any) -> Any:
    makers: dict[str, Callable[..., Any]] = {"local": _local, "slurm": _slurm, "ray": _ray}
    return makers[cluster.executor](steps, cluster, tasks=tasks, workers=cluster.workers, logging_dir=str(logs), **more)


def _local(steps: list[Any], _cluster: ClusterOptions, **more: Any) -> Any:
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(steps, **more)


def _slurm(steps: list[Any], cluster: ClusterOptions, **more: Any) -> Any:
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(steps, time=cluster.time, partition=cluster.partition, job_name="resmol", **more)


def _ray(steps: list[Any], _cluster: ClusterOptions, **more: Any) -> Any:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    ray.init(address="auto", ignore_reinit_error=True)
    return RayPipelineExecutor(steps, **more)


def _work(out: Path) -> Path:
    return out.with_name(f"{out.name}.datatrove")
