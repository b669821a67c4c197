"""Commands: inspect, verify, audit, anchor, report."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from resmol.cli.app import Best, ConfigFile, Json, Preset, Weights, app, chosen_config, model_ref, set_up_for
from resmol.cli.terminal import print_json, report_checks, say, suggest
from resmol.config.load import load_preset
from resmol.errors import CheckFailed, UsageError
from resmol.run.directory import RunDir
from resmol.system.process_setup import set_up_process
from resmol.system.progress import running_time
from resmol.system.tables import result_console
from resmol.system.wording import counted

Replay = Annotated[
    str,
    typer.Option(
        metavar="COUNT|all", help="Execute so many random segments again, bit for bit; or all, from the text."
    ),
]
DrawSeed = Annotated[
    int | None, typer.Option(help="Seed of the random choice of segments; another each time if left out.")
]
RecordedInputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="PATH", help="With --replay all: where the run's text is now. Repeatable."),
]
Jobs = Annotated[int, typer.Option(min=1, help="With --replay all: segments at once, each in a process.")]
ProgressFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="With --replay all: where to keep its progress; not in the run.")
]
ExportOfRun = Annotated[
    Path | None, typer.Option(metavar="DIR", help="An export of the run, to be compared with its checkpoint.")
]
Against = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Another run that should be equal: where they differ first.")
]
PublicKeys = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Demand an anchor signed with this Ed25519 key. Repeatable.")
]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="RUN is a folder of transformers' Trainer: say what its files tell.")
]
TrainerArguments = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Of --foreign: a training argument, e.g. warmup_steps=100. Repeatable."),
]
PublishedFile = Annotated[
    Path | None, typer.Option("--record", metavar="FILE", help="Make a published run again, from nothing, and compare.")
]
Publish = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write what --record reads of a portable run, or that it was seen here."),
]
TsaRoots = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Root certificate of the authority, to verify its time stamp by. Repeatable."),
]


@app.command(
    epilog="""
    resmol inspect smollm2-135m
    resmol inspect smollm2-1.7b --seq-len 1024 --shards 8
    resmol inspect runs/mine
    resmol inspect model.gguf
    """
)
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="Run, checkpoint, Hugging Face folder, GGUF or safetensors file, Hub id, preset, TOML file of "
            "settings, or config.json."
        ),
    ] = "smollm2-135m",
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window, for FLOPs and memory; the source's if left out.")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows in a forward pass, for memory; the source's if left out.")
    ] = None,
    shards: Annotated[
        int, typer.Option(min=1, help="Devices that share the model in training (parallel.strategy=fsdp), for memory.")
    ] = 1,
    weights: Weights = "last",
    best: Best = False,
    json_: Json = False,
) -> None:
    """Show an architecture: parameters, FLOPs, memory, diagram."""
    from resmol.interop.inspect import inspect_model

    chosen = model_ref(source, weights, best=best)
    inspection = inspect_model(chosen, seq_len=seq_len, batch=micro_batch_size, shards=shards)
    if json_:
        print_json(inspection.to_dict())
    else:
        inspection.render(result_console())
    if not all(check.passed for check in inspection.checks):
        raise CheckFailed(f"{source} contradicts itself", fix="see the failed checks above")


@app.command(
    epilog="""
    resmol verify
    resmol verify --preset nano --explain
    resmol verify --weights runs/mine
    resmol verify --preset nano --model my_model.py:SmolLM2
    """
)
def verify(
    preset: Preset = None,
    config: ConfigFile = None,
    weights: Annotated[
        str, typer.Option(metavar="MODEL", help="random, or a run, folder, GGUF file, Hub id or pypi.")
    ] = "random",
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE:CLASS", help="Another implementation, or MODULE:FUNCTION; its code is run."),
    ] = None,
    names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON object: its parameter name -> Hugging Face's.")
    ] = None,
    write_names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write such a JSON object to complete, and stop.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which mistake each check guards against.")] = False,
    json_: Json = False,
) -> None:
    """Prove the model by checks and parity with transformers."""
    chosen = chosen_config(preset, config)
    if weights != "random" and (chosen or model):
        raise UsageError("--weights brings its own configuration", fix="leave out --preset, --config and --model")
    if model is None and (names or write_names):
        raise UsageError(
            "--names and --write-names are about --model", fix="name the implementation: --model FILE:CLASS"
        )
    set_up_process()
    from resmol.verify import import_factory, read_name_map, verify_model, write_name_map

    architecture = (chosen or load_preset("smollm2-135m")).model
    if model and write_names:
        typer.echo(write_name_map(write_names, import_factory(model), architecture, read_name_map(names)))
        return
    with running_time("verify"):
        checks = verify_model(architecture, weights, model, names)
    report_checks("verify", checks, json_, explain)


@app.command(
    epilog="""
    resmol audit runs/mine --replay 3 --certify
    resmol audit runs/mine --replay all --input input.txt --export out/mine
    resmol audit runs/mine --against runs/again
    resmol audit --foreign out/trainer --trainer-arg lr_scheduler_type=cosine
    """
)
def audit(
    run: Annotated[
        Path | None, typer.Argument(help="Run directory; with --foreign, what transformers' Trainer wrote.")
    ] = None,
    replay: Replay = "0",
    replay_steps: Annotated[int, typer.Option(min=1, help="The most steps in a random segment.")] = 100,
    seed: DrawSeed = None,
    input_: RecordedInputs = None,
    jobs: Jobs = 1,
    progress: ProgressFolder = None,
    export: ExportOfRun = None,
    against: Against = None,
    strict: Annotated[bool, typer.Option("--strict", help="What cannot be checked here is a failure.")] = False,
    certify: Annotated[bool, typer.Option("--certify", help="Write RUN/certificate.json if everything holds.")] = False,
    tsa_root: TsaRoots = None,
    public_key: PublicKeys = None,
    foreign: Foreign = False,
    trainer_arg: TrainerArguments = None,
    record: PublishedFile = None,
    publish: Publish = None,
    json_: Json = False,
) -> None:
    """Check a run's record and checkpoints, and replay it.

    Hash chain, continuity, configuration, learning rate, data order, and every byte of every checkpoint.
    """
    if record is not None or run is None:
        _redo(run, record, input_ or [], json_, strict)
        return
    if against is not None and not foreign:
        _compare(run, against, json_, strict)
        return
    if foreign or trainer_arg:
        ours = replay != "0" or certify or strict or tsa_root or public_key or input_ or progress or export or against
        _audit_foreign(run, trainer_arg or [], json_, is_alone=foreign and not ours)
        return
    amount = _replay_amount(replay, complete=bool(input_ or jobs > 1 or progress))
    set_up_for(run)
    from resmol.audit.anchor import Trust
    from resmol.audit.audit import audit_run
    from resmol.audit.certificate import write_certificate

    trust = Trust(tuple(tsa_root or ()), tuple(public_key or ()))
    checks = audit_run(
        run, replay=amount, replay_steps=replay_steps, seed=seed, strict=strict, inputs=input_ or [], jobs=jobs,
        progress_folder=progress, trust=trust,
    )  # fmt: skip
    if export is not None:
        from resmol.interop.export.replayed import check_export

        checks.append(check_export(export, RunDir(run), strict=strict))
    report_checks(f"audit of {run}", checks, json_)
    if certify:
        say(f"certificate: {write_certificate(RunDir(run), checks, trust)}")
    if publish is not None:
        _publish(run, publish)
    if not json_:
        name = quote(str(run))
        suggest(*([] if amount else [f"audit {name} --replay 3"]), f"report {name}")


def _redo(run: Path | None, record: Path | None, inputs: list[str], as_json: bool, strict: bool) -> None:
    if record is None or run is not None:
        raise UsageError("audit checks either a run or a published record", fix="give RUN, or --record FILE")
    set_up_process(portable=True)
    from resmol.audit.published_run import PublishedRun, redo

    report_checks(f"{record}, made again", redo(PublishedRun.read(record), inputs, strict=strict), as_json)


def _publish(run: Path, file: Path) -> None:
    from resmol.audit.published_run import PublishedRun, publish

    published = publish(RunDir(run))
    if file.exists():
        published = PublishedRun.read(file).seen_again(published)
    published.write(file)
    seen = counted(len(published.machines), "machine")
    say(f"record: {file}, {len(published.steps)} steps, seen on {seen}, digest {published.digest}")


def _compare(run: Path, other: Path, as_json: bool, strict: bool) -> None:
    set_up_for(run)
    from resmol.audit.compare import compare_runs

    report_checks(f"A = {run} against B = {other}", compare_runs(run, other, strict=strict), as_json)


def _replay_amount(text: str, *, complete: bool) -> int | Literal["all"]:
    """Return what ``--replay`` asks for (`UsageError` for anything else)."""
    if text != "all" and not text.isdecimal():
        raise UsageError(f"--replay is {text!r}", fix="give a number of segments, or all")
    if text != "all" and complete:
        raise UsageError("--input, --jobs and --progress are for a complete replay", fix="add --replay all")
    return "all" if text == "all" else int(text)


def _audit_foreign(folder: Path, trainer_arguments: list[str], as_json: bool, *, is_alone: bool) -> None:
    if not is_alone:
        raise UsageError(
            "--foreign and --trainer-arg are about runs of transformers' Trainer, which have no chain",
            fix="leave out the other options, and give --foreign: resmol audit --foreign DIR",
        )
    from resmol.audit.foreign.audit import audit_foreign

    report_checks(f"audit of {folder}", audit_foreign(folder, trainer_arguments), as_json)


@app.command(
    epilog="""
    resmol anchor runs/mine --tsa https://freetsa.org/tsr
    resmol anchor runs/mine --key key.pem
    """
)
def anchor(
    run: Annotated[Path, typer.Argument(help="Run directory; it may be in training.")],
    tsa: Annotated[
        list[str] | None,
        typer.Option("--tsa", metavar="URL", help="Ask this RFC 3161 authority for a time stamp. Repeatable."),
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Sign with this Ed25519 private key, PEM or OpenSSH. Repeatable."),
    ] = None,
    tsa_root: TsaRoots = None,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Also ask an authority over unencrypted HTTP.")
    ] = False,
    json_: Json = False,
) -> None:
    """Have the head of a run's record time-stamped, or signed.

    An authority gets one digest. `resmol audit` verifies the answer without a network.
    """
    from resmol.audit.anchor import anchor_run

    made = anchor_run(run, tsa=tsa or (), keys=key or (), tsa_roots=tsa_root or (), allow_http=allow_http)
    if json_:
        print_json(made.to_dict())
    else:
        typer.echo(f"{made.folder}\n{made.summary}")
        root = "".join(f" --tsa-root {quote(str(path))}" for path in tsa_root or ("CERTIFICATE.pem",)) if tsa else ""
        suggest(f"audit {quote(str(run))}{root}")


@app.command(
    epilog="""
    resmol report runs/mine
    resmol report runs/mine --plot loss.svg
    """
)
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html if left out.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the loss curve instead, as .svg or .png.")
    ] = None,
) -> None:
    """Write a run as one page, or its loss curve as an image."""
    from resmol.audit.report import report_run

    typer.echo(str(report_run(run, out, plot=plot)))
    suggest(f"demo {quote(str(run))}", f"export {quote(str(run))} out/{quote(run.resolve().name)}")
