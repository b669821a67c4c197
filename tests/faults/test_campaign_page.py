"""The page of the campaign has a place for each row that a test records."""

from __future__ import annotations

import re
from pathlib import Path

from campaign import CHAPTERS, Row, _order, _page


def test_every_row_has_a_chapter() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    names = set(re.findall(r'campaign\.record\(\s*f?"([A-Z]\w*)', sources))
    assert len(names) > 40
    rows = sorted((Row(name, "a fault", "an outcome", 1, 0) for name in names), key=lambda row: _order(row.id))
    page = "\n".join(_page(rows, {"seed": 1, "machine": "a machine", "seconds": 60.0}))
    assert all(f"| {name} |" in page for name in names)
    assert set(CHAPTERS) == {name[0] for name in names}
