"""Render a chat template of somebody else, in a process of its own: a template is a program.

``python render_chat_template.py`` takes ``{"template": text, "tokens": {"bos_token": text, ...}, "conversations":
[{"messages": [...], "add_generation_prompt": bool}, ...]}`` on standard input and prints a list of texts. The rules are
those of transformers: Jinja's sandbox, blocks without the white space around them. A template that asks for the date is
an error, since the text would hold the day of the export.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    """Answer the request on standard input; see the module."""
    wanted: dict[str, Any] = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    template = environment.from_string(wanted["template"])
    texts = [template.render(**conversation, **wanted["tokens"]) for conversation in wanted["conversations"]]
    sys.stdout.write(json.dumps(texts) + "\n")


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


if __name__ == "__main__":
    main()
