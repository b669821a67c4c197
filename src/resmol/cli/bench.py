"""How fast and how large, against what one would use instead: bench."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
)
from resmol.cli.terminal import print_json, say
from resmol.config.load import load_preset, with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import Interrupted, UsageError
from resmol.system.process_setup import set_up_process

bench = typer.Typer(
    help="Speed and memory, against what one would use instead and what the machine allows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

Peer = Annotated[str | None, typer.Option(help="Measure it as well: transformers.")]
Repeats = Annotated[int, typer.Option(help="Rounds; each measures every contender once.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="The tables as Markdown on standard output.")]
Data = Annotated[str | None, typer.Option(help="Prepared folder or text; the plays of Shakespeare if left out.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16.")]


@bench.command("train")
def bench_train(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    batch: Annotated[
        list[str] | None, typer.Option(help="Windows x tokens of a step, e.g. 2x512; may be repeated.")
    ] = None,
    precision: Precision = "float32",
    peer: Peer = None,
    repeats: Repeats = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a measurement.")] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    data: Data = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of a few steps there instead of measuring.")
    ] = None,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure training steps: ours, the peer's as it is and tuned, and those of an ideal machine."""
    chosen = chosen_config(preset, config) or load_preset("smollm2-135m-cpu")
    if trace is not None:
        if len(batch or ()) > 1:
            raise UsageError(f"--trace watches one --batch, and {len(batch or ())} are given", fix="give one of them")
        set_up_process()  # it trains in this process, which must meet the same page faults as `train`
    from resmol.bench.subprocess_runs import prepared_folder
    from resmol.bench.train import TrainBench, parse_batch, training_contests

    batches = tuple(parse_batch(text) for text in batch or ())
    wanted = TrainBench(chosen, tuple(set_ or ()), batches, precision, peer, repeats, steps, warmup)

    if trace is not None:
        _trace(wanted.configurations()[0], data, trace, steps, warmup)
        return

    def contests(folder: Path) -> Sequence[Any]:
        first = wanted.configurations()[0]  # what is wrong with the options is said before any text is prepared
        return training_contests(wanted, folder, prepared_folder(data, first, folder / "data"))

    _hold(contests, repeats, json_, markdown)


@bench.command("generate")
def bench_generate(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; may be repeated.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    peer: Peer = None,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure greedy decoding, and the time until the first token."""
    chosen = with_overrides(chosen_config(preset, config) or load_preset("smollm2-135m-cpu"), set_ or ())
    from resmol.bench.generate import GenerateBench, generation_contests

    wanted = GenerateBench(chosen, tuple(batch or (1,)), prompt, new, peer, repeats)
    _hold(lambda folder: generation_contests(wanted, folder), repeats, json_, markdown)


@bench.command("prepare")
def bench_prepare(
    input_: Annotated[list[str] | None, typer.Option("--input", help="Text to repeat instead of a corpus.")] = None,
    corpus: Corpus = None,
    megabytes: Annotated[int, typer.Option(help="Millions of bytes of text to make of it.")] = 20,
    tokenizer: TokenizerSource = None,
    tokenizer_sha256: TokenizerHash = None,
    workers: Annotated[int, typer.Option(help="Threads; 0 takes all cores.")] = 0,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure text to tokens against the bare tokenizers library, and the memory it takes."""
    from resmol.bench.prepare import PrepareBench, preparation_contest
    from resmol.data.resolve import Text
    from resmol.data.tokenizer import SMOLLM2_TOKENIZER_SHA256, load_tokenizer

    text = Text(tuple(input_ or ()), corpus if corpus or input_ else "shakespeare")
    wanted = PrepareBench(text, megabytes, workers, repeats)
    found = load_tokenizer(tokenizer, sha256=tokenizer_sha256 or SMOLLM2_TOKENIZER_SHA256)
    _hold(lambda folder: [preparation_contest(wanted, found, folder)], repeats, json_, markdown)


@bench.command("checkpoint")
def bench_checkpoint(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure saving and loading against torch.save, safetensors and the disk below TMPDIR."""
    chosen = chosen_config(preset, config) or load_preset("smollm2-135m-cpu")
    from resmol.bench.checkpoint import CheckpointBench, checkpoint_contest
    from resmol.bench.subprocess_runs import prepared_folder

    wanted = CheckpointBench(chosen, tuple(set_ or ()), repeats)

    def contests(folder: Path) -> Sequence[Any]:
        return [checkpoint_contest(wanted, folder, prepared_folder(data, wanted.settled, folder / "data"))]

    _hold(contests, repeats, json_, markdown)


@bench.command("start")
def bench_start(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure how long the help page takes, and the first step of a new run."""
    chosen = with_overrides(chosen_config(preset, config) or load_preset("nano"), set_ or ())
    from resmol.bench.startup import StartBench, starting_contests
    from resmol.bench.subprocess_runs import prepared_folder

    wanted = StartBench(chosen, repeats)

    def contests(folder: Path) -> Sequence[Any]:
        return starting_contests(wanted, folder, prepared_folder(data, chosen, folder / "data"))

    _hold(contests, repeats, json_, markdown)


@bench.command("scaling")
def bench_scaling(
    out: Annotated[Path, typer.Option(help="Folder for the points, the table and the plot.")],
    presets: Annotated[str, typer.Option(help="Names, separated by commas.")] = "nano,smollm2-135m,smollm2-360m",
    lengths: Annotated[str, typer.Option(help="Tokens of a window.")] = "128,256,512,1024,2048,4096,8192",
    batches: Annotated[str, typer.Option(help="Windows of a step.")] = "1",
    set_: Set = None,
    steps: Annotated[int, typer.Option(help="Timed steps of a point.")] = 3,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 2,
    seconds: Annotated[float, typer.Option(help="The most time of a point.")] = 600.0,
    memory: Annotated[float, typer.Option(help="The most GiB of a point; 0 takes what is free.")] = 0.0,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Measure training against length, batch and size; what was measured before is not measured again."""
    from resmol.bench.scaling import Scaling, scale, table
    from resmol.bench.subprocess_runs import prepared_folder

    names = tuple(filter(None, presets.split(",")))
    sizes = (_numbers("--lengths", lengths), _numbers("--batches", batches))
    wanted = Scaling(names, *sizes, tuple(set_ or ()), steps, warmup, seconds, int(memory * 2**30))
    first = wanted.configurations()[0]
    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as folder:
        prepared = prepared_folder(data, first, Path(folder) / "data")
        points = scale(wanted, Path(folder), prepared, out)
    if json_:
        print_json({"points": points})
    else:
        typer.echo(table(points))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} is {text!r}", fix=f"write e.g. {option} 128,256") from None


def _trace(config: RunConfig, data: str | None, file: Path, steps: int, warmup: int) -> None:
    from resmol.bench.profile import trace_training
    from resmol.bench.subprocess_runs import prepared_folder

    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as folder:
        prepared = prepared_folder(data, config, Path(folder) / "data")
        say(trace_training(config, prepared, file, steps=steps, warmup=warmup))
    say(f"trace: {file}; open it in ui.perfetto.dev")


def _hold(prepare: Callable[[Path], Sequence[Any]], repeats: int, as_json: bool, as_markdown: bool) -> None:
    """Run contests one after the other and print their tables, also of what Ctrl-C left."""
    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as name:
        contests = prepare(Path(name))
        for contest in contests:
            say(contest.title)
            contest.run(repeats, 0)
            if as_markdown:
                typer.echo(contest.markdown())
            elif not as_json:
                contest.render(Console())
            if not contest.complete:
                break
    if as_json:
        print_json({"contests": [contest.to_dict() for contest in contests if contest.rounds]})
    if not all(contest.complete for contest in contests):
        raise Interrupted("interrupted", fix="run it again for all rounds", signal_number=2)
