"""Export a model for other software, and publish it.

An export is written into a temporary folder, read back by another implementation in another process, and moved into
place only when logits, token ids and generated tokens equal ours. Otherwise nothing is left, and the error names the
difference.
"""

from __future__ import annotations

from resmol.interop.export.gguf import export_gguf
from resmol.interop.export.hf import Export, export_hf
from resmol.interop.export.manifest import ExportKind, ExportManifest, build_manifest, verify_export

__all__ = ["Export", "ExportKind", "ExportManifest", "build_manifest", "export_gguf", "export_hf", "verify_export"]
