"""Commands: bench train, bench generate, bench prepare, bench checkpoint, bench learn, bench predict."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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
from resmol.cli.field_options import takes_fields
from resmol.cli.terminal import newest, print_json, say, show_result
from resmol.config.load import load_preset, with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import Interrupted, UsageError
from resmol.system.process_setup import set_up_process
from resmol.system.tables import result_console

bench = typer.Typer(
    help="Measure speed and memory against other software.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

Baseline = Annotated[
    str | None,
    typer.Option(
        "--peer", metavar="NAME", help="A library to measure as well: transformers, or for `generate` llama.cpp."
    ),
]
Precision = Annotated[str, typer.Option(metavar="float32|bfloat16", help="Arithmetic of the matmuls.")]
Repeats = Annotated[int, typer.Option(help="Rounds; each measures every variant once.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]
Data = Annotated[
    str | None, typer.Option(metavar="PATH", help="Prepared folder or text; the plays of Shakespeare if left out.")
]


@bench.command(
    "train",
    epilog="""
    resmol bench train --batch 1x128 --batch 2x512
    resmol bench train --preset nano --peer transformers
    resmol bench train --preset nano --trace trace.json
    """,
)
@takes_fields(("--device", "--compile", "--threads"))
def bench_train(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="NxLENGTH", help="Windows x tokens of a step, e.g. 2x512; repeatable.")
    ] = None,
    precision: Precision = "float32",
    baseline: Baseline = None,
    repeats: Repeats = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a measurement.")] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before these, untimed.")] = 3,
    data: Data = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of a few steps to this file instead of measuring.")
    ] = None,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure training steps beside a peer's, and at the roofline."""
    chosen = chosen_config(preset, config) or load_preset("smollm2-135m-cpu")
    if trace is not None:
        if len(batch or ()) > 1:
            raise UsageError(f"--trace profiles one --batch, and {len(batch or ())} are given", fix="give one of them")
        set_up_process()  # it trains in this process, which must meet the same page faults as `train`
    from resmol.bench.subprocess_runs import prepared_folder
    from resmol.bench.train import TrainBench, parse_batch, training_comparisons

    batches = tuple(parse_batch(text) for text in batch or ())
    request = TrainBench(chosen, tuple(set_ or ()), batches, precision, baseline, repeats, steps, warmup)
    if trace is not None:
        _trace(request.configurations()[0], data, trace, steps, warmup)
        return

    def comparisons(folder: Path) -> Sequence[Any]:
        first = request.configurations()[0]  # raises on wrong options before any text is prepared
        return training_comparisons(request, folder, prepared_folder(data, first, folder / "data"))

    _run(comparisons, repeats, json_, markdown)


@bench.command(
    "generate",
    epilog="""
    resmol bench generate --prompt 128 --new 128
    resmol bench generate --preset nano --batch 1 --batch 8 --peer transformers
    """,
)
def bench_generate(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences that are decoded together; repeatable.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    precision: Precision = "float32",
    baseline: Baseline = None,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure greedy decoding and the prefill."""
    chosen = with_overrides(chosen_config(preset, config) or load_preset("smollm2-135m-cpu"), set_ or ())
    from resmol.bench.generate import GenerateBench, generation_comparisons

    request = GenerateBench(chosen, tuple(batch or (1,)), prompt, new, baseline, repeats, precision)
    _run(lambda folder: generation_comparisons(request, folder), repeats, json_, markdown)


@bench.command(
    "prepare",
    epilog="""
    resmol bench prepare --size 50MB
    resmol bench prepare --input input.txt --format jsonl.zst --format parquet
    resmol bench prepare --size 1GB --format all --repeats 1
    """,
)
def bench_prepare(
    input_: Annotated[
        list[str] | None, typer.Option("--input", metavar="PATH", help="Text to repeat instead of a corpus.")
    ] = None,
    corpus: Corpus = None,
    size: Annotated[str, typer.Option(metavar="20MB|1GB", help="Of the repeated text.")] = "20MB",
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Of the file, e.g. parquet; or all. Repeatable."),
    ] = None,
    tokenizer: TokenizerSource = None,
    tokenizer_sha256: TokenizerHash = None,
    workers: Annotated[int, typer.Option(help="Threads; 0 takes all cores.")] = 0,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure text to tokens against the bare tokenizers library.

    Files of the size are written below TMPDIR.
    """
    from resmol.bench.prepare import BASELINE_FORMAT, PrepareBench, parse_size, preparation_comparison
    from resmol.bench.text_formats import FORMATS
    from resmol.data.resolve import Text
    from resmol.data.tokenizer import load_tokenizer

    text = Text(tuple(input_ or ()), corpus=corpus if corpus or input_ else "shakespeare")
    formats = tuple(FORMATS) if format_ == ["all"] else tuple(format_ or (BASELINE_FORMAT,))
    request = PrepareBench(text, parse_size(size), formats, workers, repeats)
    found = load_tokenizer(tokenizer, sha256=tokenizer_sha256)
    _run(lambda folder: [preparation_comparison(request, found, folder)], repeats, json_, markdown)


@bench.command(
    "checkpoint",
    epilog="""
    resmol bench checkpoint --preset nano --repeats 3
    TMPDIR=/mnt/disk resmol bench checkpoint
    """,
)
@takes_fields(("--device", "--threads"))
def bench_checkpoint(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    repeats: Repeats = 5,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure saving and loading beside torch.save and safetensors.

    Files are written below TMPDIR; the bare disk is measured as well.
    """
    chosen = chosen_config(preset, config) or load_preset("smollm2-135m-cpu")
    from resmol.bench.checkpoint import CheckpointBench, checkpoint_comparison
    from resmol.bench.subprocess_runs import prepared_folder

    request = CheckpointBench(chosen, tuple(set_ or ()), repeats)

    def comparisons(folder: Path) -> Sequence[Any]:
        prepared = prepared_folder(data, request.short_config, folder / "data")
        return [checkpoint_comparison(request, folder, prepared)]

    _run(comparisons, repeats, json_, markdown)


@bench.command(
    "learn",
    epilog="""
    resmol bench learn --preset nano --steps 1000
    resmol bench learn --preset nano --seeds 5 --plot learn.svg
    """,
)
def bench_learn(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    data: Data = None,
    seeds: Annotated[int, typer.Option(help="Seeds; each trains every learner once.")] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Length of a run; where the planned decay ends, or train.steps, if left out.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep finished runs here; by default below runs/learning.")
    ] = None,
    points: Annotated[int, typer.Option(help="How often the held-out loss is measured in a run.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this SVG file.")] = None,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure time to quality beside the Trainer of transformers.

    Same model, weights, windows and held-out text as transformers.Trainer, each with its own recipe: its defaults, and
    the best learning rate of a small sweep. Stopped, the same command goes on.
    """
    chosen = chosen_config(preset, config) or load_preset("nano")
    from resmol.bench.learn import LearnBench, compare_learning

    result = newest(compare_learning(LearnBench(chosen, tuple(set_ or ()), data, seeds, steps, record, points)))
    if plot is not None:
        from resmol.bench.learning_plot import learning_svg

        plot.write_text(learning_svg(result), encoding="utf-8", newline="\n")
    show_result(result, json_, markdown)
    if result.next_run() is not None:
        raise Interrupted("interrupted", fix="run the same command again to go on", signal_number=2)


@bench.command(
    "predict",
    epilog="""
    resmol bench predict
    resmol bench predict --preset smollm2-1.7b --markdown
    """,
)
def bench_predict(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    markdown: Markdown = False,
) -> None:
    """Predict speed and memory on GPUs that are not here.

    Nothing is measured: a step's operations and bytes are counted, and divided by a share of what data sheets say.
    """
    chosen = with_overrides(chosen_config(preset, config) or load_preset("smollm2-135m"), set_ or ())
    from resmol.bench.predict import predict

    show_result(predict(chosen), json_, markdown)


def _trace(config: RunConfig, data: str | None, file: Path, steps: int, warmup: int) -> None:
    from resmol.bench.profile import trace_training
    from resmol.bench.subprocess_runs import prepared_folder

    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as folder:
        prepared = prepared_folder(data, config, Path(folder) / "data")
        say(trace_training(config, prepared, file, steps=steps, warmup=warmup))
    say(f"trace: {file}; open it in ui.perfetto.dev")


def _run(prepare: Callable[[Path], Sequence[Any]], repeats: int, as_json: bool, as_markdown: bool) -> None:
    """Run comparisons one after the other and print their tables, also if Ctrl-C ends them early."""
    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as name:
        comparisons = prepare(Path(name))
        for comparison in comparisons:
            say(comparison.title)
            comparison.run(repeats, 0)
            if as_markdown:
                typer.echo(comparison.markdown())
            elif not as_json:
                comparison.render(result_console())
            if not comparison.complete:
                break
    if as_json:
        print_json({"comparisons": [comparison.to_dict() for comparison in comparisons if comparison.rounds]})
    if not all(comparison.complete for comparison in comparisons):
        raise Interrupted("interrupted", fix="run it again for all rounds", signal_number=2)
