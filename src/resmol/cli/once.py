"""An option that takes one value and is given twice is an error: the last one would count, the first be dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption

from resmol.errors import UsageError

_INSTEAD = {
    "--data": "; to use several texts: resmol prepare OUT --input FIRST --input SECOND",
    "--prompt": "; to give several prompts: --prompts FILE",
}


class OnceCommand(TyperCommand):
    """A command whose options are given once, unless they are declared as lists; flags may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments (`UsageError` when an option is repeated)."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            if count > 1 and isinstance(parameter, TyperOption) and not (parameter.multiple or parameter.is_flag):
                name = parameter.opts[-1]
                raise UsageError(
                    f"{name} is given {count} times, and takes one value", fix=f"give it once{_INSTEAD.get(name, '')}"
                )
        return super().parse_args(ctx, args)
