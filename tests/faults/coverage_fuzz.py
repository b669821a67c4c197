"""Fuzz one reader, guided by coverage: `python coverage_fuzz.py READER CORPUS_FOLDER [libFuzzer's options]`.

A script of its own, because atheris must see the modules before they are imported, and libFuzzer ends the process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resmol"]):
    from resmol.config.load import load_config
    from resmol.config.model_config import read_model_config
    from resmol.errors import ResmolError
    from resmol.interop.gguf_header import read_gguf_header
    from resmol.run.ledger import read_ledger
    from resmol.system.safetensors_header import read_header

READERS = {
    "safetensors": (read_header, "model.safetensors"),
    "GGUF": (read_gguf_header, "model.gguf"),
    "ledger": (read_ledger, "ledger.jsonl"),
    "config.json": (read_model_config, "config.json"),
    "TOML": (load_config, "config.toml"),
}


def main() -> None:
    """Give the reader whatever libFuzzer thinks of: our errors, or a result; anything else ends with code 77."""
    reader, name = READERS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name

        def read(content: bytes) -> None:
            path.write_bytes(content)
            try:
                reader(path)
            except ResmolError:
                return

        atheris.Setup([sys.argv[0], *sys.argv[2:]], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
