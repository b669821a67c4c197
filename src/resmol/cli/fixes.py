"""The options that the fix of an error names: where they belong to another command, the text says to which.

An error knows what went wrong, not which command met it: text that `train` cannot decode is named by `prepare`'s
option. The command line completes the sentence before it prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from resmol.config.load import FROM_SCRATCH

# A command with its words up to the end of the quotation or sentence; or an option by itself.
_MENTION = re.compile(r"(?P<command>`?resmol [a-z]+[^`;,()]*)|(?P<option>(?<![\w-])--[a-z][a-z0-9-]*)")


# What people type for `train` in other tools -> what to give here. The most usual names are options: field_options.py.
_NO_WEIGHTS = f"no weights: {FROM_SCRATCH}"
USUAL_OPTIONS = {
    "--learning-rate": "--lr 1e-3",
    "--block-size": "--seq-len 512",
    "--context-length": "--seq-len 512",
    "--max-length": "--seq-len 512",
    "--max-steps": "--steps 5000",
    "--num-train-epochs": "--epochs 3",
    "--gradient-accumulation-steps": "--batch-size 32 --micro-batch-size 8; the steps between them follow",
    "--dtype": "--precision bfloat16",
    "--bf16": "--precision bfloat16",
    "--fp16": "--precision float16",
    "--train-file": "--data input.txt",
    "--validation-file": "--val val.txt",
    "--input": "--data input.txt",
    "--save-steps": "--save-every 500",
    "--eval-steps": "--eval-every 500",
    "--logging-steps": "--log-every 10",
    "--resume": "nothing more: `resmol train RUN` goes on from the newest checkpoint",
    "--model": "--preset NAME or --config FILE, which describe a model; resmol trains from scratch",
    "--weights": _NO_WEIGHTS,
    "--init": _NO_WEIGHTS,
}


def usual_option(arguments: Sequence[str]) -> str | None:
    """Return what to give instead of the first option of other tools on a command line; None where there is none."""
    names = (word.partition("=")[0].replace("_", "-") for word in arguments)
    return next((f"give {USUAL_OPTIONS[name]}" for name in names if name in USUAL_OPTIONS), None)


def options_of_commands(app: typer.Typer) -> dict[str, set[str]]:
    """Return command (such as ``bench train``) -> its long options."""
    return dict(_options(typer.main.get_command(app), ""))


def _options(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
    if hasattr(command, "commands"):  # a group
        for word, inner in command.commands.items():
            yield from _options(inner, f"{name} {word}".strip())
        return
    names = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    yield name, {option for option in names if option.startswith("--")} | {"--help", "--debug"}


def command_of(arguments: Sequence[str], commands: Mapping[str, set[str]]) -> str:
    """Return the command that a command line begins with, empty where it names none."""
    words = [word for word in arguments if not word.startswith("-")]
    return next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in commands), "")


def as_started(text: str, commands: Mapping[str, set[str]], start: str) -> str:
    """Return a text whose ``resmol COMMAND`` begins with the words that start resmol here.

    Args:
        text: The fix of an error, or a command.
        commands: Command -> its options.
        start: ``resmol`` where the shell finds it; else such as ``.venv/bin/resmol``.
    """
    words = "|".join(sorted({name.split()[0] for name in commands}))
    return re.sub(rf"(?<![\w./-])resmol(?= (?:{words})\b)", lambda _: start, text)


def complete_fix(fix: str, command: str, commands: Mapping[str, set[str]]) -> str:
    """Say of the options in a fix that the command does not have which command has them.

    Args:
        fix: The sentence of an error.
        command: The command that met the error, empty where there is none.
        commands: Command -> its options.
    """
    named = ""

    def completed(mention: re.Match[str]) -> str:
        nonlocal named
        if mention["command"]:
            named = command_of(mention["command"].strip("`").split()[1:], commands)
            return mention[0]
        option = mention["option"]
        if not command or option in commands[command] or option in commands.get(named, ()):
            return option
        owners = [f"`resmol {name}`" for name, options in commands.items() if option in options]
        return f"{option} (of {' or '.join(owners[:2])})" if owners else option

    return _MENTION.sub(completed, fix)
