from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from resmol.data import tokenizer as module
from resmol.data.tokenizer import SMOLLM2_TOKENIZER_SHA256, StreamDecoder, Tokenizer, load_tokenizer
from resmol.data.tokenizer_files import cache_path, tokenizer_json_from_gguf
from resmol.errors import DataError, NetworkError

SOURCE = str(Path(module.__file__).resolve().parents[2])
# FACTS of the genuine file: these byte values have no token.
UNTOKENIZABLE = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The wrapper


def test_digits_are_split_from_the_spaces_before_them(genuine_tokenizer):
    # transformers' AutoTokenizer drops the Digits step and gives [81, 216, 216, 33].
    assert genuine_tokenizer.encode("a  1") == [81, 256, 33]


def test_the_genuine_tokenizer_has_its_known_properties(genuine_tokenizer):
    assert genuine_tokenizer.sha256 == SMOLLM2_TOKENIZER_SHA256
    assert (genuine_tokenizer.vocab_size, genuine_tokenizer.eos_id) == (49152, 0)
    assert genuine_tokenizer.untokenizable_bytes == UNTOKENIZABLE
    assert genuine_tokenizer.byte_lengths()[0] == 0  # it ends documents
    assert genuine_tokenizer.byte_lengths()[1:].min() == 1
    assert list(genuine_tokenizer.special_tokens) == list(range(17))
    assert genuine_tokenizer.special_tokens[6] == "<filename>"
    assert genuine_tokenizer.byte_lengths()[6] == len("<filename>")
    assert genuine_tokenizer.spelled_end_bytes(2) == 2 * len("<|endoftext|>")


def test_control_tokens_can_be_text(genuine_tokenizer):
    text = "Save it as <filename>, then <|endoftext|> and <|im_start|>."
    as_text = genuine_tokenizer.with_special_tokens_as_text()
    assert min(as_text.encode(text)) >= 17
    assert as_text.decode(as_text.encode(text)) == text
    assert [token for token in genuine_tokenizer.encode(text) if token < 17] == [6, 0, 1]  # the other one is unchanged
    assert as_text.sha256 == genuine_tokenizer.sha256


def test_ids_equal_the_library_s_on_all_reference_text(genuine_tokenizer, shared_dir):
    direct = tokenizers.Tokenizer.from_file(str(shared_dir / "reference" / "tokenizer" / "tokenizer.json"))
    texts = [
        path.read_bytes().decode("utf-8", errors="replace")
        for path in sorted((shared_dir / "data").rglob("*"))
        if path.is_file()
    ]
    assert len(texts) > 5
    lengths = genuine_tokenizer.byte_lengths()
    expected = [encoding.ids for encoding in direct.encode_batch_fast(texts)]
    for text, ids, wanted in zip(texts, genuine_tokenizer.encode_batch(texts), expected, strict=True):
        assert ids == wanted
        dropped = genuine_tokenizer.count_untokenizable(text)
        ends = genuine_tokenizer.spelled_end_bytes(ids.count(genuine_tokenizer.eos_id))
        assert lengths[ids].sum() + ends + dropped == len(text.encode())
        if not dropped:
            assert genuine_tokenizer.decode(ids) == text


def test_nothing_is_added_and_id_zero_is_a_token(tiny_tokenizer):
    assert tiny_tokenizer.eos_id == 0
    assert tiny_tokenizer.encode("") == []
    assert tiny_tokenizer.encode("a<|endoftext|>b").count(0) == 1
    assert tiny_tokenizer.decode([0]) == "<|endoftext|>"
    assert tiny_tokenizer.decode([0], skip_special_tokens=True) == ""
    assert tiny_tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tiny_tokenizer.token_bytes(512) == tiny_tokenizer.token_bytes(-1) == b""


@examples(150)
@given(st.text(max_size=60))
def test_text_comes_back_whole_and_bytes_add_up(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@examples(150)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_streaming_gives_the_text_of_the_whole_and_never_half_a_character(tiny_tokenizer, ids):
    decoder = StreamDecoder(tiny_tokenizer)
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == tiny_tokenizer.decode(ids)


def test_streaming_waits_for_the_rest_of_a_character(tiny_tokenizer):
    ids = tiny_tokenizer.encode("😀")
    assert len(ids) == 4
    decoder = StreamDecoder(tiny_tokenizer, skip_ids=[tiny_tokenizer.eos_id])
    assert [decoder.push(token) for token in [*ids, 0]] == ["", "", "", "😀", ""]
    assert decoder.flush() == ""


def test_bytes_without_a_token_are_counted(genuine_tokenizer):
    text = "bell\x07 eot\x04 \U000ea9c0 \U00050000"
    kept = genuine_tokenizer.byte_lengths()[genuine_tokenizer.encode(text)].sum()
    # U+0004 is one such byte, and the first byte of a character of planes 4 to 11 (0xF1, 0xF2) is another.
    assert genuine_tokenizer.count_untokenizable(text) == 2 == len(text.encode()) - kept


# Loading


def test_a_file_or_its_folder_with_the_right_hash_loads_and_is_cached(tiny_tokenizer_file, own_cache):
    digest = sha(tiny_tokenizer_file)
    loaded = load_tokenizer(tiny_tokenizer_file, sha256=digest)
    assert loaded.path == tiny_tokenizer_file
    assert cache_path(digest, None).parent == own_cache
    assert load_tokenizer(str(tiny_tokenizer_file.parent), sha256=digest).sha256 == digest
    assert load_tokenizer(sha256=digest).path == cache_path(digest, None)


def test_a_hash_is_a_check_and_not_a_condition(tiny_tokenizer_file, own_cache):
    digest = sha(tiny_tokenizer_file)
    with pytest.raises(DataError, match=f"has sha256 {digest}, expected 000"):
        load_tokenizer(tiny_tokenizer_file, sha256="0" * 64)
    assert not own_cache.exists()
    assert load_tokenizer(tiny_tokenizer_file).sha256 == digest


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """The name of a private folder would be sent there; nothing here answers."""
    (tmp_path / "tok").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer tok/mien"):
        load_tokenizer("tok/mien")


@pytest.mark.parametrize("name", ["</s>", "<eos>", "[EOS]"])
def test_the_usual_names_of_an_end_are_known(tiny_tokenizer_file, name):
    data = tiny_tokenizer_file.read_bytes().replace(b"<|endoftext|>", name.encode())
    assert Tokenizer(data, tiny_tokenizer_file).eos_id == 0


def test_the_way_out_without_an_option_leads_there(tiny_tokenizer_file, own_cache):
    """Most commands have no --tokenizer: what their message names is a file that they will read."""
    digest = sha(tiny_tokenizer_file)
    with pytest.raises(DataError, match="is in the cache") as caught:
        load_tokenizer(sha256=digest)
    target = re.search(r"copy its file to (\S+),", caught.value.fix)
    assert target is not None
    own_cache.mkdir(parents=True)
    shutil.copy(tiny_tokenizer_file, target[1])
    assert load_tokenizer(sha256=digest).sha256 == digest


def test_every_option_that_a_message_names_exists():
    """Of the commands that they name, and of no other."""
    from typer.testing import CliRunner

    from resmol.cli import app

    for command, option in (("prepare", "--tokenizer-sha256"), ("prepare", "--tokenizer"), ("train", "--tokenizer")):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        assert option in text


def test_a_damaged_cache_is_not_used(tiny_tokenizer_file, own_cache):
    digest = sha(tiny_tokenizer_file)
    own_cache.mkdir(parents=True)
    cache_path(digest, None).write_bytes(tiny_tokenizer_file.read_bytes()[:-1])
    with pytest.raises(DataError, match="is in the cache"):
        load_tokenizer(sha256=digest)
    load_tokenizer(tiny_tokenizer_file, sha256=digest)
    assert sha(cache_path(digest, None)) == digest


def test_a_cache_that_cannot_be_written_costs_one_line(tiny_tokenizer_file, tmp_path, messages):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    load_tokenizer(tiny_tokenizer_file, sha256=sha(tiny_tokenizer_file), cache=blocked / "cache")
    assert len(messages) == 1
    assert "not cached" in messages[0]


def test_a_missing_file_is_said(tmp_path, own_cache):
    with pytest.raises(DataError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "nothing.json")


def test_a_pointer_of_git_lfs_is_named(tmp_path, own_cache):
    (tmp_path / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:9ca9\nsize 2104556\n"
    )
    with pytest.raises(DataError, match="is a Git LFS pointer") as caught:
        load_tokenizer(tmp_path)
    assert "git lfs pull" in caught.value.fix


# Hostile files


def write_tokenizer(path: Path, change) -> Path:
    config = json.loads(path.read_text())
    change(config)
    hostile = path.with_name(f"hostile-{change.__name__}.json")
    hostile.write_text(json.dumps(config))
    return hostile


def panic_in_merges(config):
    config["model"]["continuing_subword_prefix"] = "########"


def panic_in_pattern(config):
    pattern = {"Regex": "(a+)+$"}
    config["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def no_byte_level(config):
    config["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def no_end_of_text(config):
    config["added_tokens"] = []
    config["model"]["vocab"] = {
        "<x>" if name == "<|endoftext|>" else name: index for name, index in config["model"]["vocab"].items()
    }


def one_huge_id(config):
    config["model"]["vocab"]["zzz"] = 2_000_000_000  # a table of that many entries takes 16 GB


@pytest.mark.parametrize("change", [panic_in_merges, panic_in_pattern, no_byte_level, no_end_of_text, one_huge_id])
def test_a_hostile_tokenizer_is_an_error_and_not_the_end(tiny_tokenizer_file, own_cache, change):
    hostile = write_tokenizer(tiny_tokenizer_file, change)
    with pytest.raises(DataError, match="not a usable tokenizer"):
        load_tokenizer(hostile, sha256=sha(hostile))
    assert not own_cache.exists()


def test_a_panic_in_this_process_is_an_error_too(tiny_tokenizer_file):
    hostile = write_tokenizer(tiny_tokenizer_file, panic_in_merges)
    with pytest.raises(DataError, match="PanicException"):
        Tokenizer(hostile.read_bytes(), hostile)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"model": null}'])
def test_rubbish_is_an_error(tmp_path, data):
    with pytest.raises(DataError, match="not a usable tokenizer"):
        Tokenizer(data, tmp_path / "tokenizer.json")


def test_a_tokenizer_that_hangs_is_given_up(tiny_tokenizer_file, own_cache, monkeypatch, tmp_path):
    (tmp_path / "trial.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(module, "_TRIAL", tmp_path / "trial.py")
    monkeypatch.setattr(module, "_TRIAL_SECONDS", 0.5)
    with pytest.raises(DataError, match=r"took more than 0\.5 s"):
        load_tokenizer(tiny_tokenizer_file, sha256=sha(tiny_tokenizer_file))


def test_a_tokenizer_that_wants_all_memory_is_stopped(tiny_tokenizer_file, own_cache, monkeypatch, tmp_path):
    (tmp_path / "trial.py").write_text("bytes(64 << 30)", encoding="utf-8")
    monkeypatch.setattr(module, "_TRIAL", tmp_path / "trial.py")
    with pytest.raises(DataError, match="MemoryError"):
        load_tokenizer(tiny_tokenizer_file, sha256=sha(tiny_tokenizer_file))


def test_cut_output_asked_for_by_the_file_is_switched_off(tiny_tokenizer_file, tiny_tokenizer):
    def cut(config):
        config["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    changed = write_tokenizer(tiny_tokenizer_file, cut)
    text = "the kalo taminer shu"
    assert Tokenizer(changed.read_bytes(), changed).encode(text) == tiny_tokenizer.encode(text)


# Sources


def write_gguf(path: Path, tokenizer_json: Path) -> Path:
    from gguf import GGUFWriter

    model = json.loads(tokenizer_json.read_text())["model"]
    special = {added["id"] for added in json.loads(tokenizer_json.read_text())["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_tokenizer_rebuilt_from_gguf_gives_the_same_ids(tiny_tokenizer_file, tiny_tokenizer, tmp_path):
    rebuilt = Tokenizer(tokenizer_json_from_gguf(write_gguf(tmp_path / "t.gguf", tiny_tokenizer_file)), tmp_path)
    text = "kalo  12 é\n\n the<|endoftext|>shu 😀"
    assert rebuilt.encode(text) == tiny_tokenizer.encode(text)


def test_the_genuine_file_is_rebuilt_byte_for_byte(genuine_tokenizer, tmp_path):
    rebuilt = tokenizer_json_from_gguf(write_gguf(tmp_path / "t.gguf", genuine_tokenizer.path))
    assert hashlib.sha256(rebuilt).hexdigest() == SMOLLM2_TOKENIZER_SHA256


LOAD = """
import logging, sys, time
waits, genuine = [], time.sleep  # the client of the Hub sleeps a second or more before it tries again
time.sleep = lambda seconds: waits.append(seconds) if seconds >= 0.5 else genuine(seconds)
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import ResmolError
source, sha256 = sys.argv[1:]
logging.getLogger("resmol").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("resmol").setLevel(logging.INFO)
try:
    options = {} if sha256 == "-" else {"sha256": sha256}
    print("loaded", load_tokenizer(None if source == "-" else source, **options).sha256)
except ResmolError as error:
    print(type(error).__name__, error.what, "|", error.fix)
print(sum(waits))
"""


def load_in_a_process(endpoint: str, folder: Path, source: str = "-", sha256: str = "-") -> tuple[str, float]:
    """Load with the real client of the Hub, which reads its settings when it is imported.

    Returns:
        What was printed, and for how many seconds the process would have slept.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PIP_"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": SOURCE,
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-W", "ignore", "-c", LOAD, source, sha256]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    out, waited = done.stdout.rstrip().rsplit("\n", 1)
    return out, float(waited)


@pytest.fixture
def hub(tiny_tokenizer_file):
    """A Hub on this machine with one repository, someone/tiny."""
    data = tiny_tokenizer_file.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            found = self.path.startswith("/someone/tiny/resolve/") and self.path.endswith("/tokenizer.json")
            busy = self.path.startswith("/someone/busy/")
            self.send_response(200 if found else 503 if busy else 404)
            self.send_header("Content-Length", str(len(data) if found else 0))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if not found and not busy:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body and found:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_tokenizer_comes_from_the_hub(hub, tiny_tokenizer_file, tmp_path):
    digest = sha(tiny_tokenizer_file)
    out, _ = load_in_a_process(hub, tmp_path, "someone/tiny", digest)
    assert out.split() == ["loaded", digest]
    # The second time neither the Hub nor the network is needed.
    out, _ = load_in_a_process("http://127.0.0.1:9", tmp_path, "someone/tiny", digest)
    assert out.split() == ["loaded", digest]


@pytest.mark.parametrize("name", ["someone/else", "someone/busy"])
def test_what_the_hub_does_not_give_is_a_network_error_at_once(hub, tmp_path, name):
    out, waited = load_in_a_process(hub, tmp_path, name)
    assert out.startswith("NetworkError")
    assert "--tokenizer PATH" in out
    assert waited == 0


def test_an_unreachable_hub_is_asked_once_and_costs_one_line(tmp_path):
    out, waited = load_in_a_process("http://127.0.0.1:9", tmp_path)
    first, second = out.strip().splitlines()
    assert "the Hub cannot be reached" in first
    assert second.startswith("NetworkError")
    assert "--tokenizer PATH" in second
    assert waited == 0


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    from huggingface_hub import constants

    from resmol.system import hub_download as hub

    end, answered = threading.Event(), []

    class Silent:
        def head(self, *_args, **_options):
            answered.append(end.wait(300))

    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    monkeypatch.setattr(hub, "PROBE_SECONDS", -0.8)
    with pytest.raises(NetworkError, match="cannot be reached"):
        hub.require_answer("http://example.invalid", constants.ENDPOINT, fix="")
    assert not answered, "it was waited for"
    end.set()
