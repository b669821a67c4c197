"""What is published is what was trained: exports that are loaded elsewhere and compared before they exist.

An export is written into a temporary folder, read back by another implementation in another process, and moved into
place only when logits, token ids and generated tokens are ours. Otherwise nothing is left, and the difference is named.
"""

from __future__ import annotations

from resmol.interop.export.gguf import export_gguf
from resmol.interop.export.hf import Export, export_hf
from resmol.interop.export.manifest import ExportManifest, Kind, verify_export, write_manifest

__all__ = ["Export", "ExportManifest", "Kind", "export_gguf", "export_hf", "verify_export", "write_manifest"]
