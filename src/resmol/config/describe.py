"""Write docs/configuration.md: every field of a configuration, from its declaration."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from resmol.config.run_config import RunConfig, drift_classes, field_declarations

_TABLE_HEAD = "| field | default | drift | meaning |\n| --- | --- | --- | --- |"
_PREAMBLE = """# Configuration

Written by `python -m resmol.config.describe > docs/configuration.md`; a test keeps it current.

A run is described by one TOML file: a preset (`--preset nano`) or one's own (`--config my.toml`). It may name one
`base`, a preset or a file beside it, over which it is laid, and an `architecture`: the path of a config.json or a Hub
id, whose values replace those of the base. `--set section.key=value` comes last, or the short options of the usual
fields (`--lr 1e-3`; `resmol train --help` lists them). Unknown keys are refused. `resmol config` prints a resolved
configuration, lists the presets and these fields.

`--batch-size N`, or `--set batch.windows_per_step=N`, states the windows of a step instead of its tokens: it sets
`batch.global_batch_tokens`, and the micro-batch to the largest size that divides it. Another `model.hidden_size` than
that of the base brings `model.initializer_range` = 1/sqrt(hidden_size) with it, unless you state a value. A file
without a `name` gives its own to the configuration.

```toml
base = "nano"

[optimizer]
lr = 1e-3
```

`[[data.source]]` and `[[data.stage]]` describe a mixture of several prepared folders ([Training](training.md)).

The drift class decides what happens when a run is resumed with another value. **A**: refused. **B**: refused, unless
`--accept-drift section.key` is given; the change is recorded in the ledger. **C**: free.

The ledger of a run records every field of class A and B at its start, and each accepted drift. A resume compares what
is asked for with that record. A run's `config.toml` may be edited: `resmol train RUN` without `--preset` and `--config`
takes the edit as a request, with the same rules. A lost `config.toml` is restored from the ledger. The digest of all
fields of class A and B (`config_sha256`) is the identity of a configuration.
"""


@dataclass(frozen=True)
class FieldDescription:
    """A field of the configuration in words.

    Attributes:
        key: ``section.key``.
        default: As JSON; ``required`` where there is none.
        drift: Its drift class: A, B or C.
        meaning: What it sets.
        choices: The values that it may have, where they are few.
    """

    key: str
    default: str
    drift: str
    meaning: str
    choices: tuple[str, ...]

    @classmethod
    def of(cls, key: str, field: FieldInfo) -> FieldDescription:
        """Read the declaration of a field."""
        default = "required" if field.is_required() else json.dumps(field.default)
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        return cls(key, default, drift_classes()[key], field.description or "", choices if len(choices) > 1 else ())


def described_fields(word: str = "") -> list[FieldDescription]:
    """Return the fields of a section, or those whose key or meaning holds a word; all of them for an empty one."""
    fields = [FieldDescription.of(key, field) for key, field in field_declarations().items()]
    section = [field for field in fields if field.key.startswith(f"{word}.")]
    return section or [field for field in fields if word.lower() in f"{field.key} {field.meaning}".lower()]


def describe() -> str:
    """Return docs/configuration.md: every field with its default, its drift class and its meaning."""
    lines = [_PREAMBLE]
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"## {section}", inspect.getdoc(kind) or "", "", _TABLE_HEAD]
            lines += [_row(described) for described in described_fields(section)]
        else:
            lines += [_TABLE_HEAD, _row(FieldDescription.of(section, field))]
        lines.append("")
    return "\n".join(lines)


def _row(field: FieldDescription) -> str:
    default = field.default if field.default == "required" else f"`{field.default}`"
    allowed = f" ({', '.join(f'`{choice}`' for choice in field.choices)})" if field.choices else ""
    return f"| `{field.key}` | {default} | {field.drift} | {field.meaning}{allowed} |"


if __name__ == "__main__":
    print(describe(), end="")  # noqa: T201
