"""Command: evaluate."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resmol.cli.app import Best, Json, ModelTokenizer, Weights, app, model_ref
from resmol.cli.terminal import print_json, suggest
from resmol.cli.train import TextField
from resmol.run.directory import RunDir
from resmol.system.process_setup import set_up_process
from resmol.system.tables import result_console, text_table


@app.command(
    epilog="""
    resmol evaluate runs/mine
    resmol evaluate runs/mine --data other.txt --seq-len 256
    resmol evaluate model.gguf --data other.txt
    """
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder, GGUF file or Hub id.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Prepared folder or text; a run's own held-out text if left out."),
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows to use; 0 takes all.")] = 0,
    seq_len: Annotated[int, typer.Option(min=0, help="Tokens in a window; 0 takes the run's, or 512.")] = 0,
    text_field: TextField = "text",
    weights: Weights = "last",
    best: Best = False,
    tokenizer: ModelTokenizer = None,
    json_: Json = False,
) -> None:
    """Measure held-out loss, perplexity and bits per byte."""
    set_up_process()
    from resmol.interop.evaluate import evaluate_model

    named = model_ref(model, weights, best=best)
    result = evaluate_model(named, data, windows=windows, seq_len=seq_len, text_field=text_field, tokenizer=tokenizer)
    if json_:
        print_json(result)
    else:
        result_console().print(_evaluation_table(model, data, result))
        name = quote(model)
        exported = f"export {name} out/{quote(Path(model).resolve().name)}"
        suggest(*([f"report {name}", exported] if RunDir(Path(model)).exists() else [f"demo {name}"]))


_TITLES = {
    "val": "held-out loss of {model}",
    "train": "loss of {model} on text that its training used",
    "all": "loss of {model} on {data}",
}


def _evaluation_table(model: str, data: str | None, result: dict[str, Any]) -> Table:
    table = text_table(_TITLES[result["split"]].format(model=model, data=data), "quantity", "value")
    facts = {f"model {key}": value for key, value in result["model"].items() if value is not None}
    for key, value in ({name: value for name, value in result.items() if name != "model"} | facts).items():
        table.add_row(key.replace("_", " "), escape(_in_words(value)))
    return table


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
