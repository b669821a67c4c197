"""The owner's words are on the card, once, and change nothing of what resmol states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from resmol.errors import DataError, UsageError
from resmol.interop.export.card_words import CardWords, card_words

GENERATED = """---
library_name: transformers
tags:
- resmol
- from-scratch
---

# nano

A Llama.

| | |
| --- | --- |
| licence of the weights | not stated |

# Not the title
"""
OWN = """---
license: mit
language: [de, no]
tags: plays
license_link: LICENSE
---
# My *model*

For a talk.

## Thanks
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def headings(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(ModelCard(card).text)
    return [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]


def test_without_words_the_card_is_untouched() -> None:
    assert CardWords().lay_over(GENERATED) == GENERATED
    assert card_words() == CardWords()


def test_a_file_gives_title_metadata_and_text(tmp_path: Path) -> None:
    words = card_words(file=written(tmp_path / "own.md", OWN))
    card = words.lay_over(GENERATED)
    data = ModelCard(card).data
    assert (data.license, data.language, data.license_link) == ("mit", ["de", "no"], "LICENSE")
    assert data.tags == ["resmol", "from-scratch", "plays"]
    assert headings(card) == ["My \\*model\\*", "Thanks", "What resmol states", "Not the title"]
    assert "| licence of the weights | mit |" in card
    assert "A Llama." in card


def test_words_replace_earlier_words(tmp_path: Path) -> None:
    first = card_words(file=written(tmp_path / "own.md", OWN)).lay_over(GENERATED)
    second = card_words("Other", "cc-by-4.0", ["fr"], written(tmp_path / "new.md", "Anew: \\1 & $x\n")).lay_over(first)
    assert "For a talk." not in second
    assert "Anew: \\1 & $x" in second
    assert headings(second) == ["Other", "What resmol states", "Not the title"]
    data = ModelCard(second).data
    assert (data.license, data.language, data.model_name) == ("cc-by-4.0", ["fr"], "Other")
    again = card_words("Other", "cc-by-4.0", ["fr"], tmp_path / "new.md").lay_over(second)
    assert again == second


def test_a_space_has_a_title() -> None:
    card = CardWords(title='A "quoted": title').lay_over("---\ntitle: nano\nsdk: gradio\n---\n\n# nano\n")
    assert ModelCard(card).data.to_dict() == {"title": 'A "quoted": title', "sdk": "gradio"}


@pytest.mark.parametrize(
    ("front_matter", "named"),
    [
        ("library_name: mlx", "library_name"),
        ("base_model: somebody/else", "base_model"),
        ("license: [mit]", "no identifier"),
        ("license: My License", "no identifier"),
        ("title: ''", "title"),
        ("license: apache-2.0", "--license is mit"),
        ("- a\n- b", "cannot be read"),
        ("a: [", "cannot be read"),
        ("1: 2", "cannot be read"),
        ("ignore_metadata_errors: 2", "cannot be read"),
    ],
)
def test_a_front_matter_that_does_not_fit_is_refused(tmp_path: Path, front_matter: str, named: str) -> None:
    file = written(tmp_path / "own.md", f"---\n{front_matter}\n---\ntext\n")
    with pytest.raises((UsageError, DataError), match=named):
        card_words(None, "mit" if "apache" in front_matter else None, (), file).lay_over(GENERATED)


@pytest.mark.parametrize(
    "options",
    [{"title": "two\nlines"}, {"title": " "}, {"title": "x" * 101}, {"license_": "Apache 2.0"}, {"license_": "MIT"},
     {"languages": ["English"]}, {"languages": [""]}],
)  # fmt: skip
def test_an_option_that_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        card_words(**options)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        card_words(file=tmp_path / "nowhere.md")
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        card_words(file=tmp_path / "latin.md")
    with pytest.raises(DataError, match="at most"):
        card_words(file=written(tmp_path / "large.md", "x" * 1_000_001))
    card = card_words(file=written(tmp_path / "own.md", OWN)).lay_over(GENERATED)
    with pytest.raises(UsageError, match="already"):
        card_words(file=written(tmp_path / "card.md", card))


def test_line_ends_of_windows(tmp_path: Path) -> None:
    (tmp_path / "own.md").write_bytes(OWN.replace("\n", "\r\n").encode("utf-8-sig"))
    assert card_words(file=tmp_path / "own.md") == card_words(file=written(tmp_path / "unix.md", OWN))
