"""Command: config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from resmol.cli.app import ConfigFile, Json, Preset, Set, app, chosen_config
from resmol.cli.field_options import takes_fields
from resmol.cli.terminal import print_json
from resmol.config.describe import described_fields
from resmol.config.load import load_preset, preset_names, preset_summary, with_overrides
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.system.tables import result_console, text_table


@app.command(
    epilog="""
    resmol config --preset nano --lr 1e-3 > own.toml
    resmol config runs/mine
    resmol config --fields schedule
    resmol config --presets
    """
)
@takes_fields()
def config(
    subject: Annotated[
        str | None, typer.Argument(metavar="RUN|WORD", help="A run; with --fields, a section or a word to look for.")
    ] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    set_: Set = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List fields with default, drift class and meaning.")
    ] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets.")] = False,
    json_: Json = False,
) -> None:
    """Print a resolved configuration, or list fields and presets.

    What it prints is a TOML file for --config. Drift classes say whether a field may change in a run: A never, B with
    --accept-drift, C freely.
    """
    if fields:
        _print_fields(subject or "", json_)
    elif presets:
        _print_presets(json_)
    else:
        chosen = chosen_config(preset, config_file)
        if (subject is None) == (chosen is None):
            raise UsageError(
                "exactly one configuration can be printed", fix="name a run, or give --preset NAME or --config FILE"
            )
        resolved = with_overrides(chosen or RunDir(Path(subject or "")).load_config(), set_ or ())
        print_json(resolved.model_dump(mode="json")) if json_ else typer.echo(resolved.to_toml(), nl=False)


def _print_fields(word: str, as_json: bool) -> None:
    found = described_fields(word)
    if not found:
        raise UsageError(f"no field has to do with {word!r}", fix="see all of them: `resmol config --fields`")
    if as_json:
        print_json({"fields": [vars(field) for field in found]})
        return
    table = text_table(
        "Fields; their drift class: A never changes in a run, B with --accept-drift, C freely",
        "field",
        "default",
        "drift",
        "meaning",
    )
    for field in found:
        choices = f" ({', '.join(field.choices)})" if field.choices else ""
        table.add_row(*map(escape, (field.key, field.default, field.drift, field.meaning + choices)))
    result_console().print(table)


def _print_presets(as_json: bool) -> None:
    from resmol.model.flops import total_parameters

    rows = [(name, load_preset(name), preset_summary(name)) for name in preset_names()]
    rows.sort(key=lambda row: (total_parameters(row[1].model), row[1].batch.global_batch_tokens))
    if as_json:
        print_json({"presets": [
            {"name": name, "parameters": total_parameters(preset.model), "tokens_per_step":
             preset.batch.global_batch_tokens, "seq_len": preset.data.seq_len, "summary": summary}
            for name, preset, summary in rows
        ]})  # fmt: skip
        return
    table: Table = text_table("Presets", "preset", "parameters", "tokens a step", "for")
    for name, preset, summary in rows:
        numbers = (f"{total_parameters(preset.model):,}", f"{preset.batch.global_batch_tokens:,}")
        table.add_row(name, *numbers, escape(summary))
    result_console().print(table)
