"""Encodings: which one a text looks like, and a share of wrong bytes that is too large to be an accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from resmol.data.encodings import MAX_REPLACED_SHARE, DecodingCheck, likely_encoding, require_encoding
from resmol.errors import DataError, UsageError

SENTENCES = {
    "cp1252": "Der Fluß läuft über die Mühle, où l'été dure jusqu'à la fenêtre.\n",
    "cp1251": "Река течёт через мельницу, а зимой сад стоит в снегу и тишине.\n",
    "koi8-r": "Река течёт через мельницу, а зимой сад стоит в снегу и тишине.\n",
    "cp1253": "το ποτάμι περνά από τον μύλο και τον χειμώνα ο κήπος κοιμάται.\n",
    "cp1255": "הנהר זורם דרך הטחנה ובחורף הגן שקט מאוד.\n",
    "shift_jis": "川は水車小屋を通って流れ、冬の庭はとても静かです。\n",
    "euc-jp": "川は水車小屋を通って流れ、冬の庭はとても静かです。\n",
    "cp949": "강은 방앗간을 지나 흐르고 겨울의 정원은 매우 조용합니다.\n",
    "gb18030": "河水流过磨坊，冬天的花园很安静，我们在那里说了一个故事。\n",
    "big5": "河水流過磨坊，冬天的花園很安靜，我們在那裡說了一個故事。\n",
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_the_likely_encoding_is_the_right_one(encoding: str) -> None:
    assert likely_encoding(SENTENCES[encoding].encode(encoding) * 5) == encoding


def test_noise_looks_like_no_encoding() -> None:
    noise = bytes((i * i * 7 + i) % 256 for i in range(3000))
    assert " " in likely_encoding(noise)


@pytest.mark.parametrize("encoding", ["cp1251", "gb18030", "shift_jis"])
def test_a_file_in_another_encoding_is_named_with_share_and_encoding(encoding: str) -> None:
    data = SENTENCES[encoding].encode(encoding) * 100
    check = DecodingCheck(Path("old.txt"), "utf-8", certain=False)
    check.add(data, sum(value > 127 for value in data))
    with pytest.raises(DataError) as caught:
        check.finish()
    assert "old.txt: " in caught.value.what
    assert " % of its bytes" in caught.value.what
    assert f"looks like {encoding}" in caught.value.what
    assert f"--input 'old.txt' --encoding {encoding}" in caught.value.fix


def test_the_share_decides_and_an_encoding_that_was_named_overrides_it() -> None:
    for share, certain, refused in (
        (MAX_REPLACED_SHARE - 0.01, False, False), (MAX_REPLACED_SHARE + 0.01, False, True), (0.9, True, False),
    ):  # fmt: skip
        check = DecodingCheck(Path("a.txt"), "utf-8", certain)
        check.add(b"x" * 1000, round(1000 * share))
        if refused:
            with pytest.raises(DataError):
                check.finish()
        else:
            check.finish()


def test_a_giant_file_is_refused_after_its_first_megabyte() -> None:
    check = DecodingCheck(Path("a.txt"), "utf-8", certain=False)
    check.add(b"x" * (1 << 19), 1 << 18)
    with pytest.raises(DataError):
        check.add(b"x" * (1 << 19), 0)


@pytest.mark.parametrize("name", ["rot13", "hex", "klingon", "base64", "\0"])
def test_an_encoding_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no text encoding"):
        require_encoding(name)
    require_encoding("Latin-1")
    require_encoding(None)
