"""The notebook runs from its first cell to its last, at a small size and without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import synthetic_texts

from resmol.data.tokenizer import Tokenizer

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "smollm2_from_scratch.ipynb"
SMALL = """
PRESET, TEXT, TOKENIZER, STEPS = "nano", "text.txt", {tokenizer!r}, 60
"""


def text_of(cell: dict[str, list[dict[str, object]]]) -> str:
    """Return all that a cell printed or displayed as text."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(part) for part in shown)


@pytest.mark.interop
def test_the_notebook_runs(tokenizer_in_cache: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "text.txt").write_text("\n\n".join(synthetic_texts(400)), encoding="utf-8")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or cell.outputs == [], "what is committed holds no output"
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = SMALL.format(tokenizer=str(tokenizer_in_cache.path))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if keep := os.environ.get("RESMOL_KEEP_NOTEBOOK"):
        nbformat.write(notebook, keep)
    printed = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("tensors are equal, bit for bit" in text for text in printed) == 1
    equal = next(text.split()[:3] for text in printed if "tensors are equal" in text)
    assert equal[0] == equal[2] == "38"
    assert any("killed after step" in text for text in printed)
    trained = next(text for text in printed if "stop: finished at step 60" in text)
    assert "\r" not in trained
    assert "eval at step 60" in trained
