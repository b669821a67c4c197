"""Jinja templates of resmol's packages; an unknown name is an error, and a line with only a tag leaves none."""

from __future__ import annotations

import jinja2

from resmol.system.wording import counted


def template_environment(package: str, *, autoescape: bool, keep_trailing_newline: bool = False) -> jinja2.Environment:
    """Return an environment of the templates in ``package`` (its folder ``templates``), with `counted` as a filter.

    Args:
        package: A package such as ``resmol.audit``.
        autoescape: Escape values for HTML; off for Markdown and programs, which escape with filters of their own.
        keep_trailing_newline: Keep the newline at the end of a template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=autoescape,  # noqa: S701 - Markdown and programs are not HTML; what goes in there is escaped by filters
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
    )
    environment.filters["counted"] = counted
    return environment
