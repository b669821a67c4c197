"""How every command parses its words and how its help looks: plain metavariables, panels, examples.

An option that takes one value and is given twice is an error: the last one would count, the first be dropped.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperOption

from resmol.errors import UsageError

_INSTEAD = {
    "--data": "; to use several texts: resmol prepare OUT --input FIRST --input SECOND",
    "--prompt": "; to give several prompts: --prompts FILE",
}
_METAVARS = {"int": "N", "float": "NUMBER", "Path": "PATH"}


class Command(TyperCommand):
    """A command whose options are given once, unless they are declared as lists; flags may be repeated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            if getattr(parameter, "metavar", None) is None:
                parameter.metavar = _metavar(parameter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments (`UsageError` when an option is repeated)."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            if count > 1 and isinstance(parameter, TyperOption) and not (parameter.multiple or parameter.is_flag):
                name = parameter.opts[0]
                raise UsageError(
                    f"{name} is given {count} times, and takes one value", fix=f"give it once{_INSTEAD.get(name, '')}"
                )
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line, such as RUN and [SOURCE]."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, each panel under its heading, in the order of their first options."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            line: Any = parameter.get_help_record(ctx)
            if isinstance(parameter, TyperArgument):
                panels["Arguments"].append((str(parameter.metavar), line[1]))
            elif line is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(line)
        for heading, lines in panels.items():
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the interface of typer
        """Write the examples as they are, one on each line."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in inspect.cleandoc(self.epilog).splitlines()))


def _metavar(parameter: Any) -> str:
    """Return how the help names a value: RUN for an argument, PATH for a path, instead of the types of Python."""
    if isinstance(parameter, TyperArgument):
        return parameter.name.upper()
    return next((word for kind, word in _METAVARS.items() if kind in parameter.bare_type()), "TEXT")
