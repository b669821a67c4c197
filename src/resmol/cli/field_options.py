"""Short options for fields of the configuration: `--lr 1e-3` is `--set optimizer.lr=1e-3`.

One table says which there are; the options, their help and the refusal of contradictions follow from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import typer

from resmol.config.derived import WINDOWS_PER_STEP
from resmol.config.load import toml_value
from resmol.config.run_config import field_declarations
from resmol.config.runtime_config import DeviceKind
from resmol.errors import UsageError

PANEL = "Settings, each short for --set section.key=VALUE"


@dataclass(frozen=True)
class FieldOption:
    """A short option.

    Attributes:
        names: How it is spelled; the first is the usual way.
        keys: The ``section.key`` that it sets.
        metavar: What stands for its value in the help.
        meaning: What it does; empty takes the description of its field.
        excludes: Further keys that may not be set beside it.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    metavar: str = "N"
    meaning: str = ""
    excludes: tuple[str, ...] = ()

    @property
    def parameter(self) -> str:
        """The name of the parsed value."""
        return self.names[0].lstrip("-").replace("-", "_")

    def declaration(self) -> inspect.Parameter:
        """Return the option as typer reads it; its value stays text, since the configuration checks it."""
        meaning = self.meaning or field_declarations()[self.keys[0]].description or ""
        line = f"{capitalized(meaning)} ({', '.join(self.keys)})."
        option = typer.Option(*self.names, metavar=self.metavar, help=line, rich_help_panel=PANEL)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.parameter, kind, default=None, annotation=Annotated[str | None, option])


FIELD_OPTIONS = {
    option.names[0]: option
    for option in (
        FieldOption(("--lr",), ("optimizer.lr",), "RATE"),
        FieldOption(
            ("--batch-size",), (WINDOWS_PER_STEP,), "N", "windows in an optimizer step, over all processes",
            ("batch.global_batch_tokens",),
        ),
        FieldOption(("--micro-batch-size",), ("batch.micro_batch_size",)),
        FieldOption(("--seq-len",), ("data.seq_len",)),
        FieldOption(("--warmup-steps", "--warmup"), ("schedule.warmup_steps",), "N", "linear warm-up of the rate"),
        FieldOption(("--weight-decay",), ("optimizer.weight_decay",), "RATE"),
        FieldOption(("--seed",), ("train.seed", "data.seed"), "N", "seed of the initial weights and the data order"),
        FieldOption(("--device",), ("runtime.device",), "|".join(("auto", *get_args(DeviceKind)))),
        FieldOption(("--precision",), ("runtime.precision",), "auto|float32|bfloat16|float16"),
        FieldOption(("--compile",), ("runtime.compile",), "auto|on|off"),
        FieldOption(("--threads",), ("runtime.threads",)),
        FieldOption(("--save-every",), ("checkpoint.every",)),
        FieldOption(("--eval-every",), ("evaluation.every",)),
        FieldOption(("--log-every",), ("logging.every",)),
    )
}  # fmt: skip

COMPUTED = ("--lr", "--batch-size", "--micro-batch-size", "--seq-len", "--weight-decay", "--device", "--precision",
            "--compile", "--threads")  # fmt: skip


def capitalized(sentence: str) -> str:
    """Return a sentence with a capital letter, unless it begins with a name such as torch.compile."""
    name = "." in sentence.partition(" ")[0]
    return sentence if name else f"{sentence[:1].upper()}{sentence[1:]}"


def takes_fields(names: Iterable[str] = tuple(FIELD_OPTIONS)) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds short options to a command; what they set is added to its ``set_``.

    Args:
        names: Which of `FIELD_OPTIONS`.
    """
    options = [FIELD_OPTIONS[name] for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_fields(**given: Any) -> None:
            values = {option.parameter: given.pop(option.parameter) for option in options}
            command(**given | {"set_": [*(given["set_"] or ()), *overrides_of(options, values, given["set_"] or ())]})

        declared = inspect.signature(command, eval_str=True)
        added = [option.declaration() for option in options]
        setattr(with_fields, "__signature__", declared.replace(parameters=[*declared.parameters.values(), *added]))  # noqa: B010
        return with_fields

    return decorate


def overrides_of(options: Sequence[FieldOption], values: Mapping[str, str | None], given: Sequence[str]) -> list[str]:
    """Return ``section.key=value`` for the short options that are given.

    Args:
        options: Those of the command.
        values: Their values by `FieldOption.parameter`; None where one is not given.
        given: What stands after ``--set``.

    Raises:
        UsageError: A short option and ``--set`` contradict each other.
    """
    overrides = []
    for option in options:
        value = values[option.parameter]
        if value is None:
            continue
        for text in given:
            key, _, other = (part.strip() for part in text.partition("="))
            same = key in option.keys and toml_value(other) == toml_value(value)
            if key in (*option.keys, *option.excludes) and not same:
                raise UsageError(
                    f"{option.names[0]} {value} and --set {text} contradict each other", fix="leave one of them out"
                )
        overrides += [f"{key}={value}" for key in option.keys]
    return overrides
