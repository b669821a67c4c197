"""Publishing, with the Hub's real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, Repo, hub_with_client
from huggingface_hub import constants
from tiny import TrainTiny

from resmol.__main__ import run as resmol
from resmol.checks import Check
from resmol.interop.evaluate import evaluate_model
from resmol.interop.export import ExportKind, build_manifest, export_hf, verify_export
from resmol.interop.load import load_model
from resmol.run.checkpoint_manifest import WEIGHTS
from resmol.system.atomic_io import commit_directory

# The client's upload of large files calls its HTTP library in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: apache-2.0\ntags:\n- resmol\n---\n\n# A model\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b"{}\n",
    WEIGHTS: bytes(range(256)) * 300,
    "training/ledger.jsonl": b'{"kind": "start"}\n',
    "training/loss.png": b"\x89PNG",
}

Export = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine; the client is logged in as alice, its cache is empty and it does not wait to try again."""
    with hub_with_client(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Write a folder with a manifest."""

    def write(name: str = "export", kind: ExportKind = "model", **changed: bytes | None) -> Path:
        files = {**FILES, **{path.replace("__", "/").replace("_md", ".md"): data for path, data in changed.items()}}

        def fill(folder: Path) -> None:
            for path, content in files.items():
                if content is not None:
                    (folder / path).parent.mkdir(exist_ok=True)
                    (folder / path).write_bytes(content)

        checks = [Check("logits", True, "equal", "equal")]
        commit_directory(tmp_path / name, fill, lambda folder: build_manifest(folder, kind, checks, {}).to_bytes())
        return tmp_path / name

    return write


def publish(folder: Path, *options: str, repo: str = "alice/nano") -> int:
    return resmol(["publish", str(folder), "--repo", repo, *options], debug=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(hub: Hub, key: str = "models/alice/nano") -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[key].files.items() if name != ".gitattributes"}


# --- the normal way -----------------------------------------------------------------------------------------


def test_a_dry_run_shows_all_and_sends_nothing(hub: Hub, export: Export, capsys: Any) -> None:
    folder = export()
    assert publish(folder) == 0
    shown = capsys.readouterr()
    assert all(name in shown.out for name in contents(folder))
    assert "# A model" in shown.out
    assert "76,800" in shown.out
    assert "dry run" in shown.err
    assert publish(folder, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["dry_run"], plan["url"], plan["card"]) == (True, f"{hub.endpoint}/alice/nano", CARD)
    assert hub.requests == []


def test_a_dry_run_ends_with_the_command_that_publishes_the_same(hub: Hub, export: Export, capsys: Any) -> None:
    words = ["--title", "It's mine", "--language", "en", "--language", "de", "--private"]
    assert publish(export(), *words) == 0
    (command,) = re.findall(r"resmol (publish .*)", capsys.readouterr().err)
    assert resmol(shlex.split(command), debug=False) == 0
    assert hub.repos["models/alice/nano"].private
    card = published(hub)["README.md"].decode()
    assert "# It's mine" in card
    assert "language:\n- en\n- de\n" in card


def test_what_arrives_is_what_was_verified_and_a_repeat_does_nothing(hub: Hub, export: Export, capsys: Any) -> None:
    folder = export()
    assert publish(folder, "--yes", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert published(hub) == contents(folder)
    repo = hub.repos["models/alice/nano"]
    assert (done["commit"], done["url"], done["private"]) == (repo.head, f"{hub.endpoint}/alice/nano", False)
    assert sorted(done["sent"]) == sorted(contents(folder))
    assert len(repo.commits) == 2  # the Hub's own, and ours
    hub.requests.clear()
    assert publish(folder, "--yes") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert hub.sent("PUT|/commit/|create") == []
    assert len(repo.commits) == 2


def test_own_words_are_sealed_into_what_is_sent(hub: Hub, export: Export, tmp_path: Path, capsys: Any) -> None:
    folder = export()
    before = contents(folder)
    (tmp_path / "own.md").write_text("For a talk.\n", encoding="utf-8")
    words = ["--card", str(tmp_path / "own.md"), "--title", "Mine", "--license", "apache-2.0", "--language", "en"]
    assert publish(folder, *words) == 0
    shown = capsys.readouterr().out
    assert "# Mine\n\n<!-- words of the owner -->\n\nFor a talk." in shown
    for sent in (True, False):  # repeated with the same words, nothing is to do
        assert publish(folder, *words, "--yes") == 0
        assert ("nothing to do" in capsys.readouterr().out) is not sent
    assert contents(folder) == before, "the export stays as it is"
    there = published(hub)
    assert {name for name in there if there[name] != before[name]} == {"README.md", "manifest.json"}
    arrived = tmp_path / "arrived"
    for name, content in there.items():
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(content)
    manifest = verify_export(arrived)
    assert (manifest.facts["title"], manifest.checks) == ("Mine", verify_export(folder).checks)


def test_a_licence_beside_the_text_of_another_is_refused(hub: Hub, export: Export, capsys: Any) -> None:
    assert publish(export(LICENSE=b"Apache License"), "--license", "mit", "--yes") == 2
    assert "holds the text of apache-2.0" in capsys.readouterr().err
    assert hub.requests == []


def test_an_edited_card_names_the_way_for_own_words(export: Export, capsys: Any) -> None:
    folder = export()
    (folder / "README.md").write_text(CARD + "By me.\n", encoding="utf-8")
    assert publish(folder) == 1
    assert "--card FILE" in capsys.readouterr().err


def test_a_gguf_folder_arrives_whole_and_its_weights_outside_of_git(hub: Hub, export: Export) -> None:
    changed = {WEIGHTS: None, "config.json": None, "nano-q8_0.gguf": b"GGUF" + bytes(range(250)) * 400,
               "Modelfile": b"FROM ./nano-q8_0.gguf\n"}  # fmt: skip
    folder = export(kind="gguf", **changed)
    assert publish(folder, "--yes") == 0
    assert published(hub) == contents(folder)
    assert len(hub.sent("PUT")) == 2, "the weights and the picture"


def test_an_update_sends_what_is_new_and_removes_what_is_gone(hub: Hub, export: Export, capsys: Any) -> None:
    assert publish(export("first"), "--yes") == 0
    hub.repos["models/alice/nano"].commit({**hub.repos["models/alice/nano"].files, "NOTES.txt": b"mine"}, "by hand")
    hub.requests.clear()
    second = export("second", README_md=CARD.replace("A model", "Another").encode(), training__ledger_jsonl=None,
                    **{"training/ledger.jsonl": None})  # fmt: skip
    capsys.readouterr()
    assert publish(second, "--yes", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert sorted(done["sent"]) == ["README.md", "manifest.json"]
    assert (done["removed"], done["foreign"]) == (["training/ledger.jsonl"], ["NOTES.txt"])
    assert published(hub) == {**contents(second), "NOTES.txt": b"mine"}
    assert hub.sent("PUT") == []  # the weights are there


def test_a_space_becomes_a_space(hub: Hub, export: Export, capsys: Any) -> None:
    folder = export(kind="space", README_md=b"---\ntitle: nano\nsdk: gradio\n---\n")
    assert publish(folder, "--yes") == 2
    assert "add --space" in capsys.readouterr().err
    assert hub.requests == []
    assert publish(folder, "--space", "--yes") == 0
    assert published(hub, "spaces/alice/nano") == contents(folder)
    assert hub.repos["spaces/alice/nano"].sdk == "gradio"
    assert publish(export("model"), "--space", "--yes") == 2
    assert f"{hub.endpoint}/spaces/alice/nano" in capsys.readouterr().out


def test_private_means_private(hub: Hub, export: Export, capsys: Any) -> None:
    folder = export()
    assert publish(folder, "--yes", "--private") == 0
    assert hub.repos["models/alice/nano"].private
    hub.repos["models/alice/public"] = Repo(private=False, sdk=None)
    hub.repos["models/alice/public"].commit({}, "by hand")
    assert publish(folder, "--yes", "--private", repo="alice/public") == 2
    assert "is public" in capsys.readouterr().err
    assert hub.repos["models/alice/public"].files == {}


def test_what_somebody_else_put_there_is_not_replaced(hub: Hub, export: Export, capsys: Any) -> None:
    """A slip in the name must not replace another model."""
    repo = hub.repos["models/alice/nano"] = Repo(private=False, sdk=None)
    repo.commit({"README.md": b"mine", "config.json": b"mine"}, "by hand")
    folder = export()
    assert publish(folder, "--yes") == 2
    assert "would replace: config.json" in capsys.readouterr().err
    assert repo.files == {"README.md": b"mine", "config.json": b"mine"}
    assert hub.sent("PUT|/commit/") == []
    assert publish(folder, "--yes", "--overwrite") == 0
    assert published(hub) == contents(folder)


# --- what is refused before anything is sent ----------------------------------------------------------------


def _stray(folder: Path) -> None:
    (folder / ".env").write_text("HF_TOKEN=hf_secret")


def _tampered(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"[]\n")


def _without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"), [(_stray, ".env"), (_tampered, "config.json"), (_without_manifest, "not an export")]
)
def test_what_was_not_verified_is_not_sent(
    hub: Hub, export: Export, capsys: Any, damage: Callable[[Path], None], named: str
) -> None:
    folder = export()
    damage(folder)
    assert publish(folder, "--yes") == 1
    assert named in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["nano", "alice/nano/x", "alice/na no", "../nano", "alice/nano.git", "a--b/c", ""])
def test_a_name_that_is_none(hub: Hub, export: Export, repo: str) -> None:
    assert publish(export(), "--yes", repo=repo) == 2
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [(None, "alice/nano", "no token"), ("hf_bad", "alice/nano", "does not accept the token"),
     ("hf_good", "bob/nano", "may not write")],
)  # fmt: skip
def test_without_the_right_token(
    hub: Hub, export: Export, monkeypatch: pytest.MonkeyPatch, capsys: Any, token: str | None, repo: str, said: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert publish(export(), "--yes", repo=repo) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "hf auth login" in error
    assert (token or "hf_") not in error.replace("`hf auth", "")
    assert hub.repos == {}


def test_a_token_is_no_argument(export: Export, capsys: Any) -> None:
    assert publish(export(), "--token", "hf_x") == 2


# --- what breaks on the way ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "fault", "state"),
    [
        ("GET /api/whoami", "before", "nothing was sent"),
        ("GET /api/models", "before", "nothing was sent"),
        ("POST /api/repos/create", "after", "not known whether the repository was created"),
        ("POST .*/preupload", "before", "no file of it was changed"),
        ("PUT /lfs", "before", "no file of it was changed"),
        ("PUT /lfs", "after", "no file of it was changed"),
        ("PUT /lfs", 500, "no file of it was changed"),
        ("POST .*/commit", "before", "not known whether the last commit arrived"),
        ("POST .*/commit", "after", "not known whether the last commit arrived"),
        ("POST .*/commit", 503, "not known whether the last commit arrived"),
        ("POST .*/commit", 412, "changed by somebody else"),
        (r"GET .*/revision/(?!main)", "before", "was made, and not yet compared"),
    ],
)
def test_a_broken_connection_leaves_a_clear_state_and_can_be_repeated(
    hub: Hub, export: Export, capsys: Any, request_: str, fault: str | int, state: str
) -> None:
    folder = export()
    hub.breaks = lambda request: fault if re.match(request_, request) else None
    assert publish(folder, "--yes") == 3
    error = capsys.readouterr().err
    assert state in error
    assert "repeated" in error
    assert "s3cr3t" not in error  # the signature in the address for the upload
    assert "hf_good" not in error
    for repo in hub.repos.values():  # all or nothing
        assert {name for name in repo.files if name != ".gitattributes"} in (set(), set(contents(folder)))
    hub.breaks = lambda _request: None
    hub.requests.clear()
    assert publish(folder, "--yes") == 0
    assert published(hub) == contents(folder)
    if "PUT" in request_ and fault == "after":
        assert hub.sent("PUT") == []  # what has arrived is not sent again


def test_what_somebody_commits_meanwhile_is_not_lost(hub: Hub, export: Export, capsys: Any) -> None:
    assert publish(export("first"), "--yes") == 0
    repo = hub.repos["models/alice/nano"]

    def interfere(request: str) -> None:
        if "/preupload/" in request and len(repo.commits) == 2:
            repo.commit({**repo.files, "config.json": b"theirs"}, "by hand")

    hub.breaks = interfere
    second = export("second", README_md=CARD.replace("A model", "Another").encode())
    assert publish(second, "--yes") == 3
    assert "changed by somebody else" in capsys.readouterr().err
    assert repo.files["config.json"] == b"theirs"
    assert publish(second, "--yes") == 0
    assert published(hub) == contents(second)


def test_nobody_answers(hub: Hub, export: Export, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:s3cr3t@127.0.0.1:9")
    assert publish(export(), "--yes") == 3
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert "nothing was sent" in error
    assert "s3cr3t" not in error


def test_what_arrives_changed_is_noticed(hub: Hub, export: Export, capsys: Any) -> None:
    """A server that stores something else than it was sent, such as other line ends."""
    genuine = Repo.commit

    def commit(repo: Repo, files: dict[str, bytes], message: str) -> str:
        return genuine(repo, {n: b"{}\r\n" if n == "config.json" else data for n, data in files.items()}, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repo, "commit", commit)
        assert publish(export(), "--yes") == 1
    assert "is not what was verified: config.json" in capsys.readouterr().err


def test_a_mirror_without_xet_is_a_clear_error(
    hub: Hub, export: Export, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert publish(export(), "--yes") == 3
    error = capsys.readouterr().err
    assert "no file of it was changed" in error
    assert "HF_HUB_DISABLE_XET=1" in error


# --- and back -----------------------------------------------------------------------------------------------


def test_others_download_what_was_published(hub: Hub, tmp_path: Path, train_tiny: TrainTiny, tiny_dataset: Any) -> None:
    """In processes of their own, as strangers: the commands take the Hub id and say what the run says here."""
    train_tiny(tmp_path / "run", 20)
    export_hf(tmp_path / "run", tmp_path / "out")
    assert publish(tmp_path / "out", "--yes") == 0
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    stranger = kept | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "stranger"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def command(*arguments: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-m", "resmol", *arguments, "--json"], env=stranger,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    sampling = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}
    said = command("generate", "alice/nano", "--prompt", "ka", "--max-new-tokens", "12", "--seed", "3")
    assert said["text"] == load_model(tmp_path / "run", device="cpu").generate("ka", **sampling)
    assert said["model"]["sha256"] == hashlib.sha256((tmp_path / "out" / WEIGHTS).read_bytes()).hexdigest()
    measured = command("evaluate", "alice/nano", "--data", str(tiny_dataset.root))
    here = evaluate_model(tmp_path / "run", str(tiny_dataset.root), seq_len=measured["seq_len"])
    assert measured["loss"] == pytest.approx(here["loss"], rel=1e-6)
    assert command("verify", "--weights", "alice/nano")["passed"]
    assert len(hub.sent("GET /cdn/")) == 1  # the weights came once; then they were in the cache
