"""Commands: export, publish, demo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import join, quote
from typing import Annotated, Any

import typer

from resmol.cli.app import Best, Json, ModelTokenizer, Weights, app, model_ref
from resmol.cli.terminal import print_json, report_checks, say, suggest
from resmol.system.process_setup import set_up_process
from resmol.system.wording import counted

SOURCE = "resmol/"  # in a Space: this package, in hundreds of files

Title = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Heading of card and Space; the run's name if left out.")
]
License = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="Of the weights, as the Hub spells it: apache-2.0, mit.")
]
Languages = Annotated[
    list[str] | None, typer.Option("--language", metavar="CODE", help="Of the text, such as en. Repeatable.")
]
Card = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Markdown with your own words, for the card; front matter is merged."),
]


@app.command(
    epilog="""
    resmol export runs/mine out/mine
    resmol export runs/mine out/mine-gguf --format gguf --dtype q8_0
    resmol export runs/mine out/mine-space --space
    resmol export runs/mine out/mine --license mit --card words.md
    """
)
def export(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder, GGUF file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    format_: Annotated[
        str,
        typer.Option("--format", metavar="hf|gguf", help="A Hugging Face folder, or GGUF for llama.cpp and ollama."),
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; with gguf also q8_0.")
    ] = "float32",
    space: Annotated[bool, typer.Option("--space", help="A Space with the demo, the weights and the record.")] = False,
    model_repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="With --space: the model repository with the weights.")
    ] = None,
    weights: Weights = "last",
    best: Best = False,
    title: Title = None,
    license_: License = None,
    language: Languages = None,
    card: Card = None,
    tokenizer: ModelTokenizer = None,
    json_: Json = False,
) -> None:
    """Write a folder for other software, read back before it exists.

    It is finished only when the other software computes our logits and token ids from it.
    """
    set_up_process()
    from resmol.api import export_model
    from resmol.interop.export.card_words import card_words

    named, words = model_ref(model, weights, best=best), card_words(title, license_, language or (), card)
    done = export_model(
        named, out, format=format_, dtype=dtype, space=space, model_repo=model_repo, tokenizer=tokenizer,
        words=words,
    )  # fmt: skip
    report_checks(f"export to {out}", done.checks, json_)
    if not json_:
        suggest(f"publish {quote(str(out))} --repo OWNER/{quote(out.name)}{' --space' if space else ''}")


@app.command(
    epilog="""
    resmol publish out/mine --repo OWNER/mine
    resmol publish out/mine --repo OWNER/mine --yes
    resmol publish out/mine-space --repo OWNER/mine-demo --space --yes
    """
)
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `resmol export` wrote.")],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository on the Hub.")],
    space: Annotated[bool, typer.Option("--space", help="DIR is a Space and becomes one.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace files of other origin.")] = False,
    title: Title = None,
    license_: License = None,
    language: Languages = None,
    card: Card = None,
    yes: Annotated[bool, typer.Option("--yes", help="Publish; without it, the plan is only shown.")] = False,
    json_: Json = False,
) -> None:
    """Publish a verified export on the Hub; a dry run unless --yes. The token: HF_TOKEN or `hf auth login`."""
    from resmol.interop.export.card_words import card_words
    from resmol.interop.export.publish import plan_publication, publish_export

    words = card_words(title, license_, language or (), card)
    plan = plan_publication(folder, repo, space=space, words=words)
    if not yes:
        print_plan(plan.to_dict(), json_)
        if not json_:
            own = {"--title": title, "--license": license_, "--language": language, "--card": card}
            flags = {"--space": space, "--private": private, "--overwrite": overwrite, "--yes": True}
            suggest(_typed(["publish", str(folder)], {"--repo": repo, **own, **flags}))
        return
    done = publish_export(plan, private=private, overwrite=overwrite).to_dict()
    if json_:
        print_json(done)
        return
    print_published(done)
    if not space:
        suggest(f"generate {repo} --interactive", f"demo {repo}")


@app.command(
    epilog="""
    resmol demo runs/mine
    resmol demo runs/mine --port 0
    """
)
def demo(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder, GGUF file or Hub id.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; by default this machine alone can reach it.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 7860,
    weights: Weights = "last",
    best: Best = False,
    tokenizer: ModelTokenizer = None,
) -> None:
    """Serve a page to try a model in.

    It shows text as it is generated, settings of the sampling, and the record of the model's training.
    """
    set_up_process()
    from resmol.demo import serve

    serve(model_ref(model, weights, best=best), host, port, tokenizer)


def _typed(words: Iterable[str], options: Mapping[str, object]) -> str:
    """Return a command as it is typed: an option with True is a flag, one with a list is repeated."""
    parts = list(words)
    for name, given in options.items():
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value is not False:
                parts += [name] if value is True else [name, str(value)]
    return join(parts)


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print a plan: the card, and the files with size and sha256; the source of resmol in a Space is one line."""
    if as_json:
        print_json({"dry_run": True, **plan})
        return
    if plan["card"]:
        typer.echo(f"{plan['card'].rstrip()}\n\n{'-' * 40}")
    source = [file["bytes"] for name, file in plan["files"].items() if name.startswith(SOURCE)]
    for name, file in plan["files"].items():
        if not name.startswith(SOURCE):
            typer.echo(f"{file['bytes']:>15,}  {file['sha256'][:16]}  {name}")
    if source:
        typer.echo(f"{sum(source):>15,}  {counted(len(source), 'file'):<16}  {SOURCE}: the source of resmol")
    typer.echo(f"{plan['bytes']:>15,}  bytes in {counted(len(plan['files']), 'file')}; verified: "
               + ", ".join(check["name"] for check in plan["checks"]))  # fmt: skip
    say(f"dry run: nothing was sent. With --yes this becomes the {plan['type']} {plan['url']}")


def print_published(done: dict[str, Any]) -> None:
    """Print the outcome of a publication."""
    seen = "private" if done["private"] else "public"
    removed = f", {len(done['removed'])} of an earlier export removed" if done["removed"] else ""
    sent = (
        f"{counted(len(done['sent']), 'file')} sent{removed}"
        if done["sent"] or removed
        else "nothing to do: all files are there"
    )
    typer.echo(f"{done['url']} ({seen})\ncommit {done['commit']}: {sent}; every file there is as it was verified")
    if done["foreign"]:
        say(f"left alone, since no export wrote them: {', '.join(done['foreign'][:10])}")
