"""Write docs/configuration.md: every field of a configuration, from its declaration."""

from __future__ import annotations

import inspect
import json
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from resmol.config.run_config import RunConfig, drift_classes

_TABLE_HEAD = "| field | default | drift | meaning |\n| --- | --- | --- | --- |"
_PREAMBLE = """# Configuration

Written by `python -m resmol.config.describe > docs/configuration.md`; a test keeps it current.

A run is described by one TOML file: a preset (`--preset nano`) or one's own (`--config my.toml`). It may name one
`base`, a preset or a file beside it, over which it is laid, and an `architecture`: the path of a config.json or a Hub
id, whose values replace those of the base. `--set section.key=value` comes last. Unknown keys are refused.

```toml
base = "nano"

[optimizer]
lr = 1e-3
```

The drift class decides what happens when a run is resumed with another value. **A**: refused. **B**: refused, unless
`--accept-drift section.key` is given; the change is recorded in the ledger. **C**: free.

The ledger of a run records every field of class A and B at its start, and each accepted drift. A resume compares what
is asked for with that record. A run's `config.toml` may be edited: `resmol train RUN` without `--preset` and `--config`
takes the edit as a request, with the same rules. A lost `config.toml` is restored from the ledger. The digest of all
fields of class A and B (`config_sha256`) is the identity of a configuration.
"""


def describe() -> str:
    """Return docs/configuration.md: every field with its default, its drift class and its meaning."""
    lines = [_PREAMBLE]
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [f"## {section}", inspect.getdoc(kind) or "", "", _TABLE_HEAD]
            lines += [_describe_field(f"{section}.{key}", inner) for key, inner in kind.model_fields.items()]
        else:
            lines += [_TABLE_HEAD, _describe_field(section, field)]
        lines.append("")
    return "\n".join(lines)


def _describe_field(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    allowed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if len(choices) > 1 else ""
    return f"| `{name}` | {default} | {drift_classes()[name]} | {field.description}{allowed} |"


if __name__ == "__main__":
    print(describe(), end="")  # noqa: T201
