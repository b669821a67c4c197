"""The Typer application that the commands register with, and the options that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from resmol.cli.terminal import show_messages
from resmol.config.load import load_config, load_preset, parse_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.system.process_setup import set_up_process
from resmol.system.user_paths import provide_home
from resmol.version import __version__

MAX_HELP_WIDTH = 120  # longer lines are no easier to read

app = typer.Typer(
    name="resmol",
    help="Reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_WIDTH},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any field, e.g. optimizer.lr=1e-3; `resmol config --fields` lists them. Repeatable.",
    ),
]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="Settings that come with resmol: `resmol config --presets`.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings in a TOML file.")]
TokenizerSource = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="PATH", help="tokenizer.json, its folder, or a Hub id; SmolLM2's if left out."),
]
ModelTokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="PATH", help="tokenizer.json, its folder, or a Hub id; the model's own if left out."
    ),
]
Weights = Annotated[
    str, typer.Option(metavar="last|averaged", help="Of a run: those of the newest step, or the average it keeps.")
]
Best = Annotated[bool, typer.Option("--best", help="Of a run: the checkpoint with the lowest held-out loss.")]
TokenizerHash = Annotated[
    str | None, typer.Option(metavar="HEX", help="Refuse a tokenizer.json with another sha256, e.g. of a download.")
]
Corpus = Annotated[str | None, typer.Option(metavar="NAME", help="shakespeare, wikipedia-intros, aws-docs or stdlib.")]


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"resmol {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Reverse-engineer, retrain, resume and replay SmolLM2-135M, with a command that proves each claim."""
    show_messages()
    provide_home()


def chosen_config(preset: str | None, config: Path | None) -> RunConfig | None:
    """Return the configuration that the options name, or None if they name none."""
    if preset is not None and config is not None:
        raise UsageError(
            "--preset and --config are both given", fix="a configuration can name the preset as its `base`"
        )
    return load_preset(preset) if preset is not None else load_config(config) if config is not None else None


def set_up_for(run: Path | None, config: RunConfig | None = None, overrides: Sequence[str] = ()) -> None:
    """Set up this process, before PyTorch is imported, for what a run asks for or has recorded."""
    stored = RunDir(run) if run is not None and config is None else None
    if stored is not None and stored.exists():
        config = stored.load_config()
    default = "machine" if config is None else config.runtime.determinism
    asked = parse_overrides(overrides).get("runtime.determinism", default)
    set_up_process(portable=asked == "portable")


def model_ref(model: str, weights: str, *, best: bool) -> Any:
    """Return the `ModelRef` of MODEL with the weights that the options name."""
    from resmol.interop.model_ref import ModelRef

    if weights not in ("last", "averaged"):
        raise UsageError(f"--weights {weights} is not a set of weights", fix="choose from: last, averaged")
    return ModelRef(model, "averaged" if weights == "averaged" else "last", best)
