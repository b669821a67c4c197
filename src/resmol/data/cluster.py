"""Prepare text with datatrove's executors: processes of this machine, a Slurm job array, or a Ray cluster.

Each task reads a contiguous block of the files, in our way, and tokenizes it with datatrove's `DocumentTokenizer` into
a `.ds` file of its own. These files in the order of the tasks hold the tokens that `prepare` writes on one machine. A
task that is run again, because its worker was killed, writes its file anew, so that nothing is lost or doubled;
datatrove keeps a list of the finished ones, and the same command goes on with the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class ClusterOptions:
    """Where to run, and in how many parts.

    Attributes:
        executor: One of `EXECUTORS`.
        tasks: How many parts the files are divided into; at most one for each file.
        workers: How many run at a time; -1 is all of them.
        partition: Of Slurm.
        time: What Slurm gives each task, such as ``20:00:00``.
    """

    executor: str
    tasks: int
    workers: int = -1
    partition: str | None = None
    time: str = "20:00:00"

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UsageError(f"--executor is {self.executor!r}", fix=f"choose one of: {', '.join(EXECUTORS)}")
        if self.executor == "slurm" and self.partition is None:
            raise UsageError("--executor slurm needs a partition", fix="add --partition NAME (`sinfo` lists them)")


def prepare_on_cluster(out: Path, text: Text, tokenizer: Tokenizer, cluster: ClusterOptions) -> Dataset | None:
    """Run the pipeline and return the dataset; None on Slurm, which runs it later.

    Args:
        out: The folder to write, on a disk that all nodes share.
        text: Files, patterns, folders and addresses that all nodes can read, and how to read them. The share that is
            held out is the end of the tokens.
        tokenizer: Makes the tokens; its file must be readable on all nodes.
        cluster: Where to run.

    Raises:
        UsageError: datatrove is not installed, ``out`` is prepared, or ``text`` asks for what only one machine does.
        DataError: A task failed, or there is nothing to read.
    """
    if is_prepared(out):
        raise UsageError(f"{out} is a prepared data folder already", fix=f"train on it as it is: --data {out}")
    alone = text.val or text.dedup or text.special_tokens != "as-tokens" or text.max_tokens is not None
    if not text.inputs or "-" in text.inputs or alone:
        raise UsageError(
            "--executor reads files only, as they are",
            fix="leave out --executor, or --corpus, --val, --dedup, --special-tokens, --max-tokens and --input -",
        )
    files = [str(file) for file in input_files(text.inputs, text.options)]
    executor = _executor(out, pipeline(out, files, text.options, tokenizer), min(cluster.tasks, len(files)), cluster)
    executor.run()
    if cluster.executor == "slurm":
        logger.info(f"data: submitted to Slurm; when it is done: resmol prepare {out} --input {out}")
        return None
    unfinished = executor.get_incomplete_ranks(skip_completed=True)
    if unfinished:
        raise DataError(
            f"{len(unfinished)} of {counted(executor.world_size, 'task')} did not finish, the first is {unfinished[0]}",
            fix=f"see {_logs(out)}/logs, then run the same command again: finished tasks are not repeated",
        )
    return import_datatrove(out, tokenizer, val_fraction=text.val_fraction)


def pipeline(out: Path, files: Sequence[str], options: ReadOptions, tokenizer: Tokenizer) -> list[Any]:
    """Return datatrove's pipeline: read, tokenize, write."""
    try:
        from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer
    except ImportError as error:
        raise UsageError("--executor needs datatrove", fix=install_hint("cluster")) from error
    write = DocumentTokenizer(
        str(out),
        str(tokenizer.path),
        eos_token=tokenizer.spelling(tokenizer.eos_id),
        shuffle_documents=False,
        batch_size=1000,
    )
    return [partial(_documents, files=tuple(files), options=options), write]


def _documents(_data: Any, rank: int, world_size: int, *, files: Sequence[str], options: ReadOptions) -> Iterator[Any]:
    """Yield the documents of the files of one task, for datatrove."""
    from datatrove.data import Document

    begin, end = (len(files) * at // world_size for at in (rank, rank + 1))
    for document in read_inputs(files[begin:end], options).read(ReadCounts()):
        text = "".join(document.pieces)
        if text:
            yield Document(text=text, id=document.name)


def _executor(out: Path, steps: list[Any], tasks: int, cluster: ClusterOptions) -> Any:
    makers: dict[str, Callable[..., Any]] = {"local": _local, "slurm": _slurm, "ray": _ray}
    return makers[cluster.executor](steps, cluster, tasks=tasks, workers=cluster.workers, logging_dir=str(_logs(out)))


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


def _logs(out: Path) -> Path:
    return out.with_name(f"{out.name}.datatrove")
