"""The owner's part of a card: title, licence, languages and a text of their own, laid over the card that resmol wrote.

What resmol derived is not theirs to change: a front matter that contradicts the export is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmol.errors import DataError, UsageError
from resmol.interop.description import MAX_CARD_BYTES, stated_word, stated_words
from resmol.interop.export.markdown import plain
from resmol.system.byte_order_mark import decode_text
from resmol.system.untrusted_text import listed
from resmol.system.user_paths import user_path

BEGIN, END = "<!-- words of the owner -->", "<!-- end of the owner's words -->"
FACTS = "## What resmol states"  # from here on the card is not the owner's
FROM_SCRATCH = "from-scratch"  # the tag of a card with the record of a run
LICENCE_ROW = "| licence of the weights |"
MAX_TITLE = 100
# What the owner may say otherwise than the generated front matter; `tags` are added to it.
_OPEN = {
    "title", "license", "language", "tags", "emoji", "colorFrom", "colorTo", "pinned", "short_description",
    "suggested_hardware",
}  # fmt: skip
_HEADING = re.compile(r"^# (.*)$", re.MULTILINE)
_ROW = re.compile(rf"^{re.escape(LICENCE_ROW)}.*$", re.MULTILINE)
_OWN = re.compile(rf"\n{re.escape(BEGIN)}\n.*?\n{re.escape(END)}\n", re.DOTALL)


@dataclass(frozen=True)
class CardWords:
    """What the owner of a model says about it; what is None or empty stays as resmol wrote it.

    Attributes:
        title: The heading, in one line.
        license: Identifier of the weights' licence as the Hub spells it, such as "apache-2.0".
        languages: ISO codes.
        text: Markdown to place below the heading.
        metadata: Further front matter.
    """

    title: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def lay_over(self, card: str) -> str:
        """Return a card of resmol's with these words in it, in place of those of an earlier call.

        Raises:
            UsageError: The front matter contradicts what the card states about the export.
        """
        if self == NO_WORDS:
            return card
        data, body = split_card(card)
        data = self._merged(data)
        if self.title is not None:
            data["title" if "title" in data else "model_name"] = self.title
            body = _HEADING.sub(lambda _: f"# {plain(self.title)}", body, count=1)
        if self.license is not None:
            body = _ROW.sub(lambda _: f"{LICENCE_ROW} {plain(self.license)} |", body, count=1)
        if self.text:
            own = "\n\n".join(("", BEGIN, self.text, FACTS, END))
            body = _HEADING.sub(lambda found: found[0] + own, _OWN.sub("", body), count=1)
        return join_card(data, body)

    def _merged(self, generated: dict[str, Any]) -> dict[str, Any]:
        wrong = [key for key, value in self.metadata.items() if generated.get(key, value) != value and key not in _OPEN]
        if "base_model" in self.metadata and FROM_SCRATCH in generated.get("tags", ()):
            wrong.append("base_model")
        if wrong:
            raise UsageError(
                f"the front matter of --card states {listed(wrong, 5)} otherwise than the export",
                fix="leave out what resmol states itself (base_model too: the weights of a run derive from no other's)",
            )
        data = {**generated, **self.metadata}
        if "tags" in self.metadata:
            data["tags"] = list(dict.fromkeys([*generated.get("tags", ()), *_list(self.metadata["tags"])]))
        if self.license is not None:
            data["license"] = self.license
        if self.languages:
            data["language"] = list(self.languages)
        return data


NO_WORDS = CardWords()


def card_words(
    title: str | None = None, license_: str | None = None, languages: Sequence[str] = (), file: Path | None = None
) -> CardWords:
    """Return the words of options and of a Markdown file; options win where the file leaves a choice.

    Args:
        title: The heading; without it, the first line of the file if that is a heading.
        license_: Identifier of a licence.
        languages: ISO codes.
        file: Markdown, with front matter or without.

    Raises:
        UsageError: A value cannot stand in a card, or option and file contradict each other.
        DataError: The file is missing, too large, no text, or its front matter is no YAML mapping.
    """
    metadata, text = _read(user_path(file)) if file is not None else ({}, "")
    heading = re.match(r"# (.+)\n*", text)
    if heading is not None:
        text = text[heading.end() :].strip("\n")
    titles = [title, metadata.pop("title", None), heading[1] if heading else None]
    stated = None if metadata.get("license") is None else str(metadata["license"])
    metadata.pop("license", None)
    if license_ is not None and stated not in (None, license_):
        raise UsageError(f"--license is {license_}, and {file} states {stated}", fix="say it once, or the same twice")
    own = metadata.pop("language", None)
    words = CardWords(
        title=next((str(value).strip() for value in titles if value is not None), None),
        license=stated if license_ is None else license_,
        languages=tuple(languages) or stated_words(own),
        text=text,
        metadata=metadata,
    )
    _check(words)
    return words


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return front matter and body; the Hub's reader raises what it likes where the front matter is no mapping."""
    from huggingface_hub import RepoCard

    if not card.startswith("---"):
        return {}, card
    parsed = RepoCard(card)
    return parsed.data.to_dict(), parsed.text  # type: ignore[no-untyped-call]


def join_card(data: dict[str, Any], body: str) -> str:
    """Return the text of a card."""
    from huggingface_hub import CardData

    return f"---\n{CardData(**data).to_yaml().strip()}\n---\n{body}"


def _read(file: Path) -> tuple[dict[str, Any], str]:
    try:
        size = file.stat().st_size
        if size > MAX_CARD_BYTES:
            raise DataError(f"{file} has {size:,} bytes; a card has at most {MAX_CARD_BYTES:,}", fix="shorten it")
        content = decode_text(file.read_bytes()).replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", fix="name a Markdown file after --card") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text in UTF-8", fix="name a Markdown file after --card") from None
    try:
        data, body = split_card(content)
        join_card(data, body)
    except Exception as error:  # errors of YAML, of its types, of a key that is no word
        reason = " ".join(str(error).split())
        raise DataError(f"the front matter of {file} cannot be read: {reason}", fix="correct the YAML") from None
    if BEGIN in body or END in body:
        raise UsageError(f"{file} is a card with words in it already", fix="name the file with your own words alone")
    return data, body.strip("\n")


def _check(words: CardWords) -> None:
    title = words.title
    if title is not None and not (title.isprintable() and 0 < len(title) <= MAX_TITLE):
        raise UsageError(f"the title {title[:40]!r} does not fit", fix=f"write one line of 1 to {MAX_TITLE} characters")
    licence = words.license
    if licence is not None and (stated_word(licence) is None or licence != licence.lower()):
        raise UsageError(
            f"--license {licence!r} is no identifier of a licence",
            fix="write it as the Hub does: apache-2.0, mit, cc-by-4.0, or other with license_name in --card",
        )
    for language in words.languages:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code", language):
            raise UsageError(f"--language {language!r} is no code of a language", fix="write en, de, zh, multilingual")


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
