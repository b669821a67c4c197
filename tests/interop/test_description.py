"""Name, languages and licence of a model from its card or its GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resmol.interop.description import Description, description
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.resolve import Source


def of_card(folder: Path, card: str | None) -> Description:
    folder.mkdir(parents=True, exist_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return description(Source("huggingface", folder))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, Description("mine")),
        ("# no front matter", Description("mine")),
        ("---\nlicense: mit\nlanguage: en\n---\n", Description("mine", ("en",), "mit")),
        ("---\nmodel_name: Big One\nlanguage:\n- de\n- no\n---\n", Description("Big One", ("de", "no"))),
        ("---\nlicense: [a]\nlanguage: {a: b}\nmodel_name: 7\n---\n", Description("mine")),
        ("---\nlicense: 'x\\ny'\nlanguage: ['a b', '<b>']\n---\n", Description("mine")),
        ("---\n: {[}\n---\n", Description("mine")),
        ("---\n- a list\n---\n", Description("mine")),
    ],
)
def test_what_a_card_states(card: str | None, expected: Description, tmp_path: Path) -> None:
    """YAML takes the code of Norwegian for False; what is no word of a card is left out."""
    assert of_card(tmp_path / "mine", card) == expected


def test_the_name_in_the_hubs_cache_is_that_of_the_repository(tmp_path: Path) -> None:
    assert of_card(tmp_path / "models--me--nano-chat" / "snapshots" / "abc", None).name == "nano-chat"


def test_what_a_gguf_file_states(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "general.name": "Big One", "general.languages": ["en", 7], "general.license": "apache-2.0",
        "general.organization": "They", "general.file_type": 3, "general.size_label": "135M",
    }  # fmt: skip
    found = description(Source("gguf", tmp_path, weights=GGUFHeader(metadata, {})))
    assert found == Description("Big One", ("en",), "apache-2.0", {"organization": "They", "size_label": "135M"})


def test_a_checkpoint_is_described_by_its_run(tmp_path: Path) -> None:
    assert description(Source("checkpoint", tmp_path)) == Description()
