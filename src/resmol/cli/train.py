"""Commands: prepare, train, reproduce, quickstart."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.markup import escape

from resmol.cli.app import (
    ConfigFile,
    Corpus,
    Json,
    Preset,
    Set,
    TokenizerHash,
    TokenizerSource,
    app,
    chosen_config,
    set_up_for,
)
from resmol.cli.field_options import takes_fields
from resmol.cli.terminal import print_json, report_checks, suggest
from resmol.config.load import load_preset
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import last_fact, read_ledger
from resmol.system.installation import CHECKOUT
from resmol.system.launcher import this_launch
from resmol.system.tables import result_console, text_table

Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="PATH",
        help="Text, JSON lines, CSV, Parquet, Arrow, folder, hf://datasets/..., or -; repeatable.",
    ),
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option(
        "--val",
        metavar="PATH",
        help="Text to hold out: file or folder; repeatable. A folder with train/ and val/ needs none.",
    ),
]
ValFraction = Annotated[
    float | None, typer.Option(help="Share of the documents to hold out; 0.01 unless the text says what to.")
]
TextField = Annotated[
    str,
    typer.Option(metavar="KEYS", help="The field or column with the text, e.g. data.text; the first of several: a,b."),
]
Encoding = Annotated[
    str | None, typer.Option(metavar="NAME", help="Encoding of text without a byte order mark; UTF-8 if left out.")
]
Format = Annotated[str, typer.Option("--format", metavar="auto|text|jsonl|csv", help="What every input is.")]
SpecialTokens = Annotated[
    str,
    typer.Option(
        metavar="as-tokens|as-text", help="What the spelling of a control token, such as <|im_end|>, becomes."
    ),
]
Executor = Annotated[
    str | None, typer.Option(metavar="local|slurm|ray", help="Let datatrove run it, also on a cluster.")
]
Tasks = Annotated[int, typer.Option(min=1, help="With --executor: parts of the work.")]
NearDedup = Annotated[
    bool, typer.Option("--near-dedup", help="With --executor: leave out documents that are nearly the same.")
]
Partition = Annotated[str | None, typer.Option(metavar="NAME", help="With --executor slurm.")]
Workers = Annotated[int, typer.Option(help="Threads, with --executor tasks at a time; 0 takes all cores.")]
IncludeHidden = Annotated[bool, typer.Option("--include-hidden", help="Also hidden files of a folder.")]

Epochs = Annotated[float | None, typer.Option(help="Stop after so many passes over the data, instead of --steps.")]
Duration = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Train for about so long, e.g. 30m or 2h, with a decay planned for it."),
]
AllowFresh = Annotated[bool, typer.Option("--allow-fresh", help="Start over if every checkpoint is corrupt.")]
AcceptDrift = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="A class B field that may change in a run, e.g. optimizer.lr; repeatable."),
]

Strict = Annotated[bool, typer.Option("--strict", help="Refuse to resume where bitwise equality is not promised.")]
Mirror = Annotated[
    str | None,
    typer.Option(
        "--mirror",
        metavar="PATH|hf://OWNER/NAME",
        help="Copy each checkpoint there; a run that is not here is copied back.",
    ),
]


def _text(inputs: list[str] | None, val: list[str] | None, val_fraction: float | None, **more: Any) -> Any:
    """Return the `Text` to prepare (`UsageError` when it is said twice what to hold out)."""
    from resmol.data.resolve import Text

    if val and val_fraction is not None:
        raise UsageError("--val and --val-fraction are both given", fix="leave one of them out")
    share = 0.01 if val_fraction is None else val_fraction
    return Text(tuple(inputs or ()), tuple(val or ()), val_fraction=share, **more)


@app.command(
    epilog="""
    resmol prepare data/mine --input articles.jsonl.zst --text-field content
    resmol prepare data/mine --input 'hf://datasets/OWNER/NAME/*.parquet'
    resmol prepare data/mine --input texts/ --val held-out.jsonl --dedup --stats
    resmol prepare data/big --input texts/ --executor ray --near-dedup
    """
)
def prepare(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    input_: Inputs = None,
    val: HeldOut = None,
    corpus: Corpus = None,
    tokenizer: TokenizerSource = None,
    tokenizer_sha256: TokenizerHash = None,
    val_fraction: ValFraction = None,
    text_field: TextField = "text",
    encoding: Encoding = None,
    format_: Format = "auto",
    include_hidden: IncludeHidden = False,
    special_tokens: SpecialTokens = "as-tokens",
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out exact copies of documents.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show lengths, scripts, copies; without input: of the prepared OUT.")
    ] = False,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Take about so many tokens of the text, e.g. 100M.")
    ] = None,
    sample_seed: Annotated[
        int | None, typer.Option(help="Draw the order of files and Parquet row groups, for --max-tokens.")
    ] = None,
    executor: Executor = None,
    tasks: Tasks = 100,
    partition: Partition = None,
    workers: Workers = 0,
    near_dedup: NearDedup = False,
    json_: Json = False,
) -> None:
    """Turn text into token shards and a manifest."""
    if workers and executor is None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read by the tokenizers library when it is imported
    from resmol.data.sample import parse_tokens
    from resmol.data.shards import open_dataset
    from resmol.data.text_file import ReadOptions
    from resmol.data.tokenizer import load_tokenizer

    reading = ReadOptions(text_field, encoding, format_, include_hidden, sample_seed)
    most = None if max_tokens is None else parse_tokens(max_tokens)
    if stats and not input_ and corpus is None:
        dataset = open_dataset(out)
    else:
        how = {"options": reading, "special_tokens": special_tokens, "dedup": dedup, "max_tokens": most}
        text = _text(input_, val, val_fraction, corpus=corpus, **how)
        cluster = {"tasks": tasks, "workers": workers or -1, "partition": partition, "near_dedup": near_dedup}
        made = _prepared(out, text, load_tokenizer(tokenizer, sha256=tokenizer_sha256), executor, cluster)
        if made is None:
            return  # Slurm makes it later
        dataset = made
    if stats and not json_:
        _show_statistics(dataset.manifest)
    if json_:
        print_json({"path": str(out), "fingerprint": dataset.fingerprint, **dataset.manifest.model_dump(mode="json")})
    else:
        suggest(f"train runs/{quote(out.name)} --preset nano --data {quote(str(out))}")


def _prepared(out: Path, text: Any, tokenizer: Any, executor: str | None, cluster: dict[str, Any]) -> Any:
    """Return the prepared text; None where Slurm makes it later."""
    from resmol.data.cluster import ClusterOptions, prepare_on_cluster
    from resmol.data.resolve import prepare_text

    if executor is not None:
        return prepare_on_cluster(out, text, tokenizer, ClusterOptions(executor, **cluster))
    if cluster["near_dedup"]:
        raise UsageError(
            "--near-dedup needs --executor", fix="add --executor local, or leave out exact copies: --dedup"
        )
    return prepare_text(out, text, tokenizer)


def _show_statistics(manifest: Any) -> None:
    """Print the statistics of prepared data as a table."""
    from resmol.data.summary import statistics_rows

    table = text_table("Text")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in statistics_rows(manifest):
        table.add_row(escape(name), escape(value))
    result_console().print(table)


@app.command(
    epilog="""
    resmol train runs/mine --preset nano --data input.txt
    resmol train runs/mine --steps 8000
    resmol train runs/own --config own.toml --data texts --tokenizer tok --time 2h
    resmol train runs/b --preset nano --data input.txt --lr 1e-3 --epochs 3
    """
)
@takes_fields()
def train(
    run: Annotated[Path, typer.Argument(help="Run directory; training resumes from its newest checkpoint.")],
    preset: Preset = None,
    config: ConfigFile = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Prepared folder, or text to prepare on the fly.")
    ] = None,
    val: HeldOut = None,
    val_fraction: ValFraction = None,
    text_field: TextField = "text",
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this step.")] = None,
    epochs: Epochs = None,
    time: Duration = None,
    set_: Set = None,
    tokenizer: TokenizerSource = None,
    accept_drift: AcceptDrift = None,
    allow_fresh: AllowFresh = False,
    strict: Strict = False,
    mirror: Mirror = None,
    json_: Json = False,
) -> None:
    """Start a run, or resume it bit for bit."""
    chosen = chosen_config(preset, config)
    overrides = [*(set_ or []), *([f"train.steps={steps}"] if steps is not None else [])]
    set_up_for(run, chosen, overrides)
    from resmol.data.text_file import ReadOptions
    from resmol.train.start import train_model
    from resmol.train.time_budget import parse_duration, train_for

    if data is None and (val or val_fraction is not None or text_field != "text"):
        raise UsageError("--val, --val-fraction and --text-field say how to read --data", fix="add --data PATH")
    options = ReadOptions(text_field=text_field)
    start = train_model if time is None else partial(train_for, parse_duration(time))
    state = start(
        chosen,
        run,
        data=None if data is None else _text([data], val, val_fraction, options=options),
        overrides=overrides,
        tokenizer=tokenizer,
        accept_drift=accept_drift or [],
        epochs=epochs,
        allow_fresh=allow_fresh,
        strict=strict,
        mirror=mirror,
        progress=True,
    )
    if json_:
        print_json({"run": str(run), "step": state.step, "tokens_seen": state.tokens_seen, **_evidence(RunDir(run))})
    elif this_launch().rank == 0:
        name = quote(str(run))
        suggest(f"generate {name} --interactive", f"evaluate {name}", f"report {name}")


def _evidence(run: RunDir) -> dict[str, Any]:
    """Return what a script may want to keep of a training: the digest of the newest checkpoint, and the memory."""
    from resmol.system.peak_memory import peak_device_memory_bytes, peak_memory_bytes

    sha256 = last_fact(read_ledger(run.ledger).records, "manifest_sha256")
    device = {"peak_device_memory_bytes": peak_device} if (peak_device := peak_device_memory_bytes()) else {}
    return {"checkpoint_sha256": sha256, "peak_memory_bytes": peak_memory_bytes(), **device}


@app.command(
    epilog="""
    resmol reproduce runs/quickstart --preset nano
    resmol reproduce runs/mine --preset nano --input input.txt --steps 1000
    resmol reproduce runs/mine
    """
)
@takes_fields()
def reproduce(
    run: Annotated[Path | None, typer.Argument(help="Run directory; runs/PRESET if left out.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="smollm2-135m-cpu if left out; with a GPU smollm2-135m."),
    ] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="PATH", help="Text to train on instead of the plays of Shakespeare; repeatable."
        ),
    ] = None,
    corpus: Corpus = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the first process; 5000 by default.")] = None,
    then: Annotated[int | None, typer.Option(min=1, help="Further steps of the second process; 50 by default.")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train, resume, evaluate and audit, each in its own process.

    Claims are printed with their evidence. The same command continues an interrupted one; RUN alone is enough then.
    """
    _run_protocol(json_, run, preset, tuple(input_ or ()), corpus, steps, then, tuple(set_ or ()))


@app.command(
    epilog="""
    resmol quickstart
    resmol quickstart --json > claims.json
    """
)
def quickstart(json_: Json = False) -> None:
    """Reproduce the smallest preset, nano, in minutes.

    The same as `resmol reproduce runs/quickstart --preset nano`; in a checkout, a published run is made again as well.
    """
    record = CHECKOUT / "records" / "nano-100.json"
    published = record if record.is_file() else None
    _run_protocol(json_, Path("runs/quickstart"), "nano", (), None, None, None, (), published=published)


def _run_protocol(as_json: bool, *choice: Any, published: Path | None = None) -> None:
    """Do what `ReproduceSpec.choose` makes of the arguments, and print the claims."""
    run, preset, *_, overrides = choice
    begun = run is not None and RunDir(run).exists()
    chosen = None if preset is None or begun else load_preset(preset)
    set_up_for(run, chosen, overrides)  # the estimate trains in this process, as fast as `train` will
    from resmol.audit.reproduce import ReproduceSpec
    from resmol.audit.reproduce import reproduce as run_reproduction

    spec = ReproduceSpec.choose(*choice)
    report_checks("claims", run_reproduction(spec, published), as_json)
    if not as_json:
        name = quote(str(spec.run.path))
        suggest(f"generate {name} --interactive", f"demo {name}", f"export {name} out/{quote(spec.run.path.name)}")
