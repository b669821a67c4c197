"""Jinja templates of resmol's packages; an unknown name is an error, and a line with only a tag leaves none."""

from __future__ import annotations

import jinja2


def template_environment(package: str, *, autoescape: bool, keep_trailing_newline: bool = False) -> jinja2.Environment:
    """Return an environment of the templates in ``package`` (its folder ``templates``).

    Args:
        package: A package such as ``resmol.audit``.
        autoescape: Escape values for HTML; off for Markdown and programs, which escape with filters of their own.
        keep_trailing_newline: Keep the newline at the end of a template.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=autoescape,  # noqa: S701 - Markdown and programs are not HTML; what goes in there is escaped by filters
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
    )
