"""Hook of mkdocs: the site holds the pages alone, so a link from a page to a source file becomes the file's name."""

import re

SOURCE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with links that lead out of docs/ replaced by their text."""
    return SOURCE_LINK.sub(r"\1", markdown)
