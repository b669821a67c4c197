"""Command: ablate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resmol.cli.app import ConfigFile, Json, Preset, app, chosen_config
from resmol.cli.field_options import COMPUTED, takes_fields
from resmol.cli.terminal import newest, print_json, show_result
from resmol.config.load import load_preset
from resmol.errors import Interrupted, UsageError
from resmol.system.tables import result_console


@app.command(
    epilog="""
    resmol ablate --preset nano
    resmol ablate --preset nano --set runtime.attention=sdpa,eager
    resmol ablate --lr 1e-3,3e-3 --seeds 3 --steps 500 --data input.txt
    """
)
@takes_fields(COMPUTED)
def ablate(
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=A,B",
            help="A factor; every combination is a variant. KEY=A sets it for all. Repeatable. Without factors: "
            "attention, precision, compile and tied embeddings, one at a time.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Prepared folder or text; the plays of Shakespeare if left out."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Compare how well settings learn, by whole runs with so many seeds.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="'KEY=A KEY=B'", help="With --seeds: one more variant, of several settings. Repeatable."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="With --seeds: keep finished runs here; by default below runs/ablations.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; each measures every variant once.")] = 5,
    steps: Annotated[
        int | None, typer.Option(help="Timed steps of a measurement, 20; with --seeds the length of a run, 1000.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Steps before these, untimed.")] = 5,
    json_: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --seeds: print the table as Markdown.")] = False,
) -> None:
    """Compare settings: speed and memory, or how well they learn.

    Speeds: a control, the first setting once more under another name, shows the noise. Learning (--seeds): held-out
    bits per byte after whole runs, with differences paired by seed; stopped, the same command goes on.
    """
    chosen = chosen_config(preset, config) or load_preset("nano")
    factors, variants = tuple(set_ or ()), tuple(variant or ())
    if seeds is not None:
        from resmol.bench.sweep import Sweep

        _sweep(Sweep(chosen, factors, variants, data, seeds, 1000 if steps is None else steps, record), json_, markdown)
        return
    if variants or record or markdown:
        raise UsageError("--variant, --record and --markdown belong to --seeds", fix="add --seeds 3")
    from resmol.bench.ablate import Ablation
    from resmol.bench.ablate import ablate as run_ablation

    result = run_ablation(Ablation(chosen, factors, data, repeats, 20 if steps is None else steps, warmup))
    if json_:
        print_json(result.to_dict())
    else:
        result.render(result_console())
    if not result.complete:
        raise Interrupted("interrupted", fix="run it again for all rounds", signal_number=2)


def _sweep(sweep: Any, as_json: bool, as_markdown: bool) -> None:
    """Train what is not trained yet and print the table, also if Ctrl-C ends it early."""
    from resmol.bench.sweep import sweep_settings

    result = newest(sweep_settings(sweep))
    show_result(result, as_json, as_markdown)
    if result.missing:
        raise Interrupted("interrupted", fix="run the same command again to go on", signal_number=2)
