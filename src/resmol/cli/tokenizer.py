"""Commands: tokenizer train."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from resmol.cli.app import Corpus, Json, app
from resmol.cli.terminal import print_json, suggest
from resmol.cli.train import Encoding, Format, IncludeHidden, Inputs, TextField

tokenizer = typer.Typer(help="Make a tokenizer of your own.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer, name="tokenizer")


@tokenizer.command(
    "train",
    epilog="""
    resmol tokenizer train tok --input texts/ --vocab-size 8192
    resmol tokenizer train tok --input dump.jsonl.gz --vocab-size 16384
    """,
)
def tokenizer_train(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Entries of the vocabulary, e.g. 8192.")],
    input_: Inputs = None,
    corpus: Corpus = None,
    text_field: TextField = "text",
    encoding: Encoding = None,
    format_: Format = "auto",
    include_hidden: IncludeHidden = False,
    json_: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer with SmolLM2's rule for words."""
    from resmol.data.resolve import Text
    from resmol.data.text_file import ReadOptions
    from resmol.data.tokenizer_training import train_tokenizer

    options = ReadOptions(text_field, encoding, format_, include_hidden)
    made = train_tokenizer(out, Text(tuple(input_ or ()), corpus=corpus, options=options).open(), vocab_size)
    if json_:
        print_json({"path": str(out), "sha256": made.sha256, "vocab_size": made.vocab_size})
    else:
        text = quote(input_[0]) if input_ else "TEXT"
        text += f" --text-field {quote(text_field)}" if text_field != "text" else ""
        suggest(f"train runs/{quote(out.name)} --preset nano --data {text} --tokenizer {quote(str(out))}")
