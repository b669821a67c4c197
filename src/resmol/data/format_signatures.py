"""How files in unsupported formats begin, and what a user can do about each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from resmol.errors import DataError

_NO_TEXT_FIX = "leave it out: there is no text in it to train on"
_PANDAS = (
    "convert it to JSON lines: python -c \"import pandas; pandas.read_{reader}('{{path}}').to_json('out.jsonl', "
    "orient='records', lines=True)\" (needs: pip install pandas pyarrow)"
)
_PANDOC = "convert it to text: pandoc -t plain '{path}' -o out.txt"
_SQLITE = "take the text out: sqlite3 '{path}' \"select json_object('text', COLUMN) from TABLE\" > out.jsonl"
_JSON_ARRAY_FIX = (
    'write one object on each line: python -c "import json; [print(json.dumps(one)) for one in '
    "json.load(open('{path}', encoding='utf-8-sig'))]\" > out.jsonl"
)
_BINARY_FIX = (
    "leave it out; if it is text with control characters: resmol prepare OUT --input '{path}' --encoding utf-8"
)
_AS_IT_STANDS = "train on it as it stands: resmol prepare OUT --input '{path}' --format text"
_MARKUP_FIX = f"take its text out into a .txt or .jsonl file, or {_AS_IT_STANDS}"

TableKind = Literal["parquet", "arrow", "arrow-stream"]


@dataclass(frozen=True)
class UnsupportedFormat:
    """A format that is not read.

    Attributes:
        name: With its article, such as ``a ZIP archive``.
        fix: What to do about it; ``{path}`` stands for the file.
    """

    name: str
    fix: str

    def refusal(self, path: object) -> DataError:
        """Return the error that names the file, the format and what to do."""
        return DataError(f"{path} is {self.name}, which is not read as text", fix=self.fix.replace("{path}", str(path)))


def _unpack(command: str) -> str:
    return f"unpack it first: {command}"


# (offset, bytes there, name, what to do), from the formats' own specifications and the magic(5) database. Where the
# bytes are letters, the file counts only if control characters are near: a text may begin with PAR1 or "The big WAVE".
BINARY_SIGNS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x28\xb5\x2f\xfd", "Zstandard-compressed data", _unpack("zstd -d '{path}'")),
    (0, b"\xfd7zXZ\0", "xz-compressed data", _unpack("xz -dk '{path}'")),
    (0, b"\x5d\0\0", "LZMA-compressed data", _unpack("xz -dk '{path}'")),
    (0, b"BZh", "bzip2-compressed data", _unpack("bunzip2 -k '{path}'")),
    (0, b"\x1f\x8b", "gzip-compressed data", _unpack("gunzip -k '{path}'")),
    (0, b"\x04\x22\x4d\x18", "LZ4-compressed data", _unpack("lz4 -d '{path}'")),
    (0, b"\xff\x06\0\0sNaPpY", "Snappy-compressed data", _unpack("python -m snappy -d '{path}' out.txt")),
    (0, b"\x1f\x9d", "compress(1) data", _unpack("uncompress '{path}'")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _unpack("7z x '{path}'")),
    (0, b"Rar!\x1a\x07", "a RAR archive", _unpack("unrar x '{path}'")),
    (0, b"PARE", "an encrypted Parquet file", "write it without encryption, with the keys of whoever wrote it"),
    (0, b"ORC", "an ORC file", _PANDAS.format(reader="orc")),
    (0, b"FEA1", "a Feather file", _PANDAS.format(reader="feather")),
    (0, b"Obj\x01", "an Avro file", "convert it to JSON lines: avro-tools tojson '{path}' > out.jsonl"),
    (0, b"SQLite format 3\0", "an SQLite database", _SQLITE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document", "save it as plain text, in UTF-8"),
    (0, b"AT&TFORM", "a DjVu document", "convert it to text: djvutxt '{path}' > out.txt"),
    (60, b"BOOKMOBI", "a Mobipocket book", "convert it to text: ebook-convert '{path}' out.txt"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _NO_TEXT_FIX),
    (0, b"\x93NUMPY", "a NumPy array", _NO_TEXT_FIX),
    (0, b"GGUF", "a GGUF model", _NO_TEXT_FIX),
    (0, b"GGML", "a GGML model", _NO_TEXT_FIX),
    (0, b"\x89PNG\r\n", "a picture (PNG)", _NO_TEXT_FIX),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", _NO_TEXT_FIX),
    (0, b"GIF87a", "a picture (GIF)", _NO_TEXT_FIX),
    (0, b"GIF89a", "a picture (GIF)", _NO_TEXT_FIX),
    (0, b"II*\0", "a picture (TIFF)", _NO_TEXT_FIX),
    (0, b"MM\0*", "a picture (TIFF)", _NO_TEXT_FIX),
    (0, b"\0\0\x01\0", "a picture (icon)", _NO_TEXT_FIX),
    (8, b"WEBP", "a picture (WebP)", _NO_TEXT_FIX),
    (8, b"WAVE", "a sound (WAV)", _NO_TEXT_FIX),
    (8, b"AVI ", "a film (AVI)", _NO_TEXT_FIX),
    (4, b"ftyp", "a film or a picture (MP4, HEIF)", _NO_TEXT_FIX),
    (0, b"\x1aE\xdf\xa3", "a film (Matroska)", _NO_TEXT_FIX),
    (0, b"ID3\x02", "a sound (MP3)", _NO_TEXT_FIX),
    (0, b"ID3\x03", "a sound (MP3)", _NO_TEXT_FIX),
    (0, b"ID3\x04", "a sound (MP3)", _NO_TEXT_FIX),
    (0, b"OggS\0", "a sound (Ogg)", _NO_TEXT_FIX),
    (0, b"fLaC", "a sound (FLAC)", _NO_TEXT_FIX),
    (0, b"\0\x05\x16\x07", "what macOS keeps beside a file (AppleDouble)", _NO_TEXT_FIX),
    (0, b"\x7fELF", "a program (ELF)", _NO_TEXT_FIX),
    (0, b"MZ\x90\0", "a program (Windows)", _NO_TEXT_FIX),
    (0, b"\xca\xfe\xba\xbe", "a program (Java, macOS)", _NO_TEXT_FIX),
    (0, b"\xcf\xfa\xed\xfe", "a program (macOS)", _NO_TEXT_FIX),
    (0, b"\0asm", "a program (WebAssembly)", _NO_TEXT_FIX),
    (0, b"wOF2", "a font", _NO_TEXT_FIX),
    (0, b"OTTO\0", "a font", _NO_TEXT_FIX),
    (0, b"\0\x01\0\0", "a font (TrueType)", _NO_TEXT_FIX),
    (0, b"PACK\0", "a pack of git", _NO_TEXT_FIX),
)
# Formats that are, or begin as, readable characters; their beginnings are unmistakable.
TEXT_SIGNS: tuple[tuple[bytes, str, str], ...] = (
    (b"!<arch>\n", "an ar archive", _unpack("ar x '{path}'")),
    (b"%PDF-", "a PDF", "convert it to text: pdftotext '{path}' out.txt"),
    (b"%!PS", "a PostScript file", "convert it to text: ps2ascii '{path}' > out.txt"),
    (b"{\\rtf", "an RTF document", _PANDOC),
    (
        b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS and not the file itself",
        "fetch the file: git lfs pull",
    ),
    (
        b"/annex/objects/", "a pointer of git-annex and not the file itself",
        "fetch the file: git annex get '{path}'",
    ),
)  # fmt: skip
SIGNS_IN_ZIP: tuple[tuple[bytes, str, str], ...] = (
    (b"mimetypeapplication/epub+zip", "an EPUB book", _PANDOC),
    (b"mimetypeapplication/vnd.oasis.opendocument", "an OpenDocument file", _PANDOC),
    (b"word/", "a Word document (docx)", _PANDOC),
    (b"xl/", "an Excel workbook (xlsx)", _PANDAS.format(reader="excel")),
    (b"ppt/", "a PowerPoint presentation (pptx)", "save it as plain text, in UTF-8"),
    (b"/data.pkl", "a PyTorch file", _NO_TEXT_FIX),
    (b".npy", "a NumPy archive", _NO_TEXT_FIX),
)
MARKUP_SIGNS = (
    (re.compile(rb"<(!doctype html|html[\s>])", re.IGNORECASE), "a web page (HTML)", _MARKUP_FIX),
    (re.compile(rb"<\?xml\s"), "an XML file", _MARKUP_FIX),
    (re.compile(rb"WARC/\d"), "a web archive (WARC)", _MARKUP_FIX),
)
# Tables that are read: how each begins. They are binary, so no option makes text of them.
TABLE_SIGNS: tuple[tuple[bytes, TableKind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1\0\0", "arrow"),
    (b"\xff\xff\xff\xff", "arrow-stream"),
)
TABLE_NAMES: dict[str, str] = {
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "arrow-stream": "an Arrow stream, as Hugging Face data sets are stored",
    "csv": "a table (CSV)",
}
CSV_SUFFIXES = (".csv", ".tsv")

ZIP = UnsupportedFormat("a ZIP archive", _unpack("unzip '{path}' -d FOLDER"))
TAR = UnsupportedFormat("a tar archive", _unpack("tar -xf '{path}'"))
SAFETENSORS = UnsupportedFormat("a safetensors file", _NO_TEXT_FIX)
PICKLE = UnsupportedFormat("a pickle of Python or PyTorch", _NO_TEXT_FIX)
BINARY = UnsupportedFormat("binary data", _BINARY_FIX)
JSON_ARRAY = UnsupportedFormat("a JSON array, not one object on each line", _JSON_ARRAY_FIX)
JSON_DOCUMENT = UnsupportedFormat("one JSON object over several lines, not one on each line", _MARKUP_FIX)


def unmarked(encoding: str) -> UnsupportedFormat:
    """Return the format of a text in UTF-16 whose byte order mark is missing."""
    fix = f"name its encoding: resmol prepare OUT --input '{{path}}' --encoding {encoding}"
    return UnsupportedFormat(f"text in {encoding} without a byte order mark", fix)
