"""The same documents in every format, and files in each that are damaged, cut off or hold no text."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from tiny import synthetic_texts

from resmol.data import compression
from resmol.data.chunking import ReadCounts
from resmol.data.prepare import prepare
from resmol.data.readers import read_inputs
from resmol.data.sample import parse_tokens
from resmol.data.shards import Dataset
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError

TEXTS = [*synthetic_texts(80), 'Ünïcode 漢字 😀, "quotes"; a\ttab\nand a\r\nline', "", "word " * 9000]


def zstd(data: bytes) -> bytes:
    """Compress in two frames, as a program that compresses on two cores does."""
    half = len(data) // 2
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress,
}  # fmt: skip


SCHEMA = pa.schema(
    [("id", pa.int64()), ("data", pa.struct([("n", pa.int8()), ("text", pa.string())])), ("text", pa.string())]
)


def table(texts: list[str | None] = TEXTS) -> pa.Table:
    rows = {"id": list(range(len(texts))), "data": [{"n": 1, "text": text} for text in texts], "text": texts}
    return pa.table(rows, schema=SCHEMA)


def json_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "data": {"text": text}, "text": text}) + "\n" for text in texts).encode()


def csv_of(texts: list[str], **dialect: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, **dialect)
    writer.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    return out.getvalue().encode()


def parquet_of(made: pa.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(made, out, row_group_size=30, **options)
    return out.getvalue()


def stream_of(made: pa.Table) -> bytes:
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=35)
    return out.getvalue()


def file_of(made: pa.Table) -> bytes:
    out = io.BytesIO()
    with pyarrow.ipc.new_file(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=35)
    return out.getvalue()


FORMATS: dict[str, tuple[bytes, str]] = {
    **{f"a.jsonl{end}": (pack(json_of(TEXTS)), "text") for end, pack in PACKED.items()},
    **{f"a.csv{end}": (pack(csv_of(TEXTS)), "text") for end, pack in PACKED.items()},
    "no-ending": (zstd(json_of(TEXTS)), "data.text"),
    "a.tsv": (csv_of(TEXTS, delimiter="\t"), "text"),
    "semicolons.csv": (csv_of(TEXTS, delimiter=";").decode().encode("utf-16"), "body, text"),
    "a.parquet": (parquet_of(table()), "text"),
    "odd.bin": (parquet_of(table(), compression="zstd", data_page_version="2.0"), "content,data.text"),
    "dictionary.parquet": (parquet_of(table().set_column(2, "text", table()["text"].dictionary_encode())), "text"),
    "a.arrow": (stream_of(table()), "text"),
    "b.arrow": (file_of(table()), "data.text"),
}


@pytest.fixture(scope="module")
def expected(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the fingerprint of the same documents as text files, one for each."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return prepare(folder / "out", read_inputs([folder]), tiny_tokenizer).fingerprint


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_give_the_same_ids_in_every_format(
    name: str, expected: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content, field = FORMATS[name]
    path = written(tmp_path, name, content)
    corpus = read_inputs([path], ReadOptions(text_field=field))
    dataset = prepare(tmp_path / "out", corpus, tiny_tokenizer)
    assert dataset.fingerprint == expected
    facts = dataset.manifest.source.inputs[0]
    assert (facts.bytes, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("end", PACKED)
def test_a_text_is_one_document_under_every_compression(end: str, tmp_path: Path) -> None:
    text = "Ünïcode 漢字\r\n" * 30_000
    for name in (f"a.txt{end}", "a"):
        assert texts_of(written(tmp_path, name, PACKED[end](text.encode()))) == [text]


def test_a_saved_data_set_is_a_folder_of_arrow_files(tmp_path: Path) -> None:
    """As `DatasetDict.save_to_disk` of Hugging Face's library lays it out."""
    root = tmp_path / "saved"
    for split, texts in (("train", ["a", "b"]), ("validation", ["c"]), ("test", ["d"])):
        written(root, f"{split}/data-00000-of-00001.arrow", stream_of(table(texts)))
        written(root, f"{split}/state.json", b'{\n  "_data_files": []\n}')
        written(root, f"{split}/dataset_info.json", b"{}")
    written(root, "dataset_dict.json", b'{"splits": ["train", "validation", "test"]}')
    counts = ReadCounts()
    found = [("".join(one.pieces), one.split) for one in read_inputs([root]).read(counts)]
    assert found == [("a", "train"), ("b", "train"), ("c", "val")]


def test_nulls_are_texts_that_are_not_there_and_the_first_is_named(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["one", None, "two", None]
    for name, content in (("a.parquet", parquet_of(table(texts))), ("a.jsonl", json_of(texts))):
        dataset = prepare(tmp_path / f"out-{name}", read_inputs([written(tmp_path, name, content)]), tiny_tokenizer)
        source = dataset.manifest.source
        assert (source.null_texts, source.first_null, source.documents) == (2, f"{name}:2", 2)


def test_bytes_that_are_no_utf_8_in_a_column_of_strings_are_replaced(tmp_path: Path) -> None:
    column = pa.array([b"caf\xe9 and more words than that", b"fine"]).view(pa.string())
    path = written(tmp_path, "a.parquet", parquet_of(pa.table({"text": column}), use_dictionary=False))
    counts = ReadCounts()
    (first, _) = ["".join(one.pieces) for one in read_inputs([path], ReadOptions(encoding="utf-8")).read(counts)]
    assert (first[:4], counts.replacements, counts.replaced_in) == ("caf\ufffd", 1, ["a.parquet"])


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts_of(*paths: Path, field: str = "text") -> list[str]:
    corpus = read_inputs(paths, ReadOptions(text_field=field))
    return ["".join(document.pieces) for document in corpus.read(ReadCounts())]


# --- bad input ---------------------------------------------------------------------------------------------------

LONG = json_of(synthetic_texts(600))
BIG = parquet_of(
    pa.table({"text": synthetic_texts(600)}), compression="none", use_dictionary=False, write_page_checksum=True
)
NUMBERS = pa.table({"text": [1, 2], "lists": [["a"], ["b"]], "body": ["x", "y"]})


def damaged(content: bytes, place: int) -> bytes:
    return content[:place] + bytes(9) + content[place + 9 :]


BAD: dict[str, tuple[bytes, str, str]] = {
    **{f"cut.jsonl{end}": (pack(LONG)[:-20], "cannot be read", "cut off") for end, pack in PACKED.items() if end},
    **{
        f"damaged.jsonl{end}": (damaged(pack(LONG), 5000), "cannot be read|line", "fetch or write|repair")
        for end, pack in PACKED.items()
        if end
    },
    "cut.parquet": (BIG[:-9], "cannot be read: the end of the file", "fetch or write it again"),
    "damaged.parquet": (damaged(BIG, len(BIG) // 2), r"row group \d+: .*(CRC|checksum)", "fetch or write it again"),
    "cut.arrow": (stream_of(table())[:-8], "the mark that ends a stream is missing", "fetch or write it again"),
    "encrypted.parquet": (b"PARE" + bytes(range(256)), "an encrypted Parquet file", "without encryption"),
    "column.parquet": (parquet_of(pa.table({"n": [1], "body": ["x"]})), "no column 'text'; its columns are n, body",
                       "--text-field body"),
    "numbers.parquet": (parquet_of(NUMBERS), "column 'text' of .* holds int64, not text", "--text-field body"),
    "lists.arrow": (stream_of(NUMBERS.rename_columns(["n", "text", "body"])), "holds list<.*>, not text",
                    "--text-field body"),
    "no-text.parquet": (parquet_of(pa.table({"n": [1]})), "none of them holds text", "into a column of strings"),
    "packed.parquet.gz": (gzip.compress(BIG), "a Parquet file, compressed as a whole", "unpack it first"),
    "column.csv": (b"id,body\n1,some words\n", "no column 'text'; its columns are id, body", "--text-field body"),
    "header.csv": (b"\n\n", "has no header", "first line"),
    "ragged.csv": (b"id,text\n1,one\n2,two,three\n", "line 3: the row has 3 fields, and the header has 2", "repair"),
    "open.csv": (b'id,text\n1,"one\n2,two\n', "line 3: unexpected end of data", "repair or drop the row"),
    "long.csv": (b"id,text\n1," + b"x" * 5000, "line 2: it is longer", "cut it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_with_its_place_and_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, what, fix = BAD[name]
    path = written(tmp_path, name, content)
    if name == "long.csv":
        monkeypatch.setattr("resmol.data.text_file.MAX_LINE_BYTES", 4000)
    with pytest.raises(DataError, match=what) as caught:
        texts_of(path)
    assert str(path) in caught.value.what
    assert re.search(fix, caught.value.fix), caught.value.fix


def test_files_with_other_columns_are_named_and_several_names_fit_them_all(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"{name}.parquet", parquet_of(pa.table({name: [name]}))) for name in ("text", "body")]
    with pytest.raises(DataError, match=r"body\.parquet has no column 'text'"):
        texts_of(*paths)
    assert texts_of(*paths, field="text,body") == ["text", "body"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_bomb_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "BOMB_BYTES", 1 << 20)
    bombs = {
        "a.txt.gz": lambda: gzip.compress(bytes([32]) * 4_000_000),
        "a.txt.zst": lambda: pa.compress(b"word " * 800_000, codec="zstd", asbytes=True),
        "a.parquet": lambda: parquet_of(pa.table({"text": ["word " * 20_000] * 300})),
    }
    with pytest.raises(DataError, match=r"unpacks to more than 500 times its size: .* MB from the first"):
        texts_of(written(tmp_path, name, bombs[name]()))


def test_an_encrypted_column_is_said_to_be_one(tmp_path: Path) -> None:
    class Keys(pe.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, _name: str) -> bytes:
            return base64.b64encode(key)

        def unwrap_key(self, wrapped: bytes, _name: str) -> bytes:
            return base64.b64decode(wrapped)

    configuration = pe.EncryptionConfiguration(footer_key="a", column_keys={"b": ["text"]}, plaintext_footer=True)
    properties = pe.CryptoFactory(lambda _: Keys()).file_encryption_properties(pe.KmsConnectionConfig(), configuration)
    made = pa.table({"text": ["secret"]})
    path = written(tmp_path, "a.parquet", b"")
    with pq.ParquetWriter(path, made.schema, encryption_properties=properties) as writer:
        writer.write_table(made)
    with pytest.raises(DataError, match="is an encrypted Parquet file"):
        texts_of(path)


def test_a_part_is_drawn_by_its_seed_and_ends_at_a_document(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmol.data.text_stream.BATCH_BYTES", 1000)
    for number in range(3):
        written(tmp_path, f"in/{number}.parquet", parquet_of(table(synthetic_texts(120)[40 * number :][:40])))

    def part(name: str, seed: int | None, most: int | None = 2000) -> Dataset:
        corpus = read_inputs([tmp_path / "in"], ReadOptions(sample_seed=seed))
        return prepare(tmp_path / name, corpus, tiny_tokenizer, val_fraction=0.0, max_tokens=most)

    whole, beginning, drawn = part("whole", None, None), part("beginning", None), part("drawn", 7)
    assert part("again", 7).fingerprint == drawn.fingerprint
    assert part("other", 8).fingerprint != drawn.fingerprint != beginning.fingerprint
    assert 2000 <= len(drawn.train) < 3000 < len(whole.train)
    ids = beginning.train.read(0, len(beginning.train))
    assert ids.tolist() == whole.train.read(0, len(ids)).tolist()
    assert ids[-1] == beginning.eos_id
    assert (drawn.manifest.source.max_tokens, drawn.manifest.source.sample_seed) == (2000, 7)
    assert drawn.manifest.source.documents == drawn.manifest.train.documents


@pytest.mark.parametrize(("text", "count"), [("100M", 100_000_000), ("2.5B", 2_500_000_000), ("7", 7)])
def test_a_number_of_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count
    with pytest.raises(UsageError, match="--max-tokens is"):
        parse_tokens(f"{text} or so")


def test_a_set_without_rows_is_an_error(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet", parquet_of(table([])))
    with pytest.raises(DataError, match="there is no text in"):
        prepare(tmp_path / "out", read_inputs([path]), tiny_tokenizer)
