"""A Hugging Face Hub on loopback: the part of its API that publishing and downloading need, for the real client.

It keeps commits as the Hub does: small text in git, the rest by sha256 (LFS); it believes no hash that it was told.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

Files = dict[str, bytes]
BINARY = re.compile(r"\.(safetensors|png|gguf|bin|parquet|gz|zst)$")
GIT_LIMIT = 10_000_000


def is_lfs(path: str, content_size: int) -> bool:
    """Return whether the Hub would keep a file outside of git."""
    return content_size > 0 and (bool(BINARY.search(path)) or content_size > GIT_LIMIT)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool
    sdk: str | None
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head]

    def commit(self, files: Files, message: str) -> str:
        content = json.dumps([self.messages, message, {name: git_blob(data) for name, data in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid


@dataclass
class Hub:
    """The state of the server, open to the test.

    Attributes:
        tokens: Token -> user.
        repos: ``models/owner/name``, or with ``spaces`` or ``datasets`` -> repository.
        gated: Those of them whose files are refused until terms are accepted.
        requests: ``METHOD path`` of everything that came in.
        bytes_sent: Of files that are kept outside of git.
        breaks: Asked at each request: "before" closes the connection instead of doing it, "after" does it and closes
            the connection instead of answering, "half" closes it in the middle of the answer, a number answers with
            that status; None does it.
    """

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_good": "alice", "hf_other": "bob"})
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    breaks: Callable[[str], str | int | None] = lambda _request: None
    endpoint: str = ""

    def sent(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.handle_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.requests.append(request)
        fault = self.hub.breaks(request)
        if fault == "before":
            self.close_connection = True
            return
        self.body = self.read_body()
        if isinstance(fault, int):
            self.answer(fault, {"error": "as the test wants it"})
            return
        self.mute, self.is_cut = fault == "after", fault == "half"
        self.route(request)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def route(self, request: str) -> None:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, request):
                method(self, **found.groupdict())
                return
        self.answer(404, {"error": f"no route for {request}"})

    def answer(self, status: int, content: Any, **headers: str) -> None:
        if getattr(self, "mute", False):
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if getattr(self, "is_cut", False):
            data, self.close_connection = data[: len(data) // 2], True
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- the account and its repositories ---------------------------------------------------------------------

    def root(self) -> None:
        self.answer(200, b"")

    def whoami(self) -> None:
        if self.user is None:
            self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        else:
            self.answer(200, {"name": self.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        kind = {"space": "spaces"}.get(wanted.get("type", "model"), "models")
        key = f"{kind}/{owner}/{wanted['name']}"
        if self.user is None or owner != self.user:
            self.answer(403 if self.user else 401, {"error": f"You may not create repositories under {owner}"})
        elif key in self.hub.repos:
            self.answer(409, {"error": "You already created this repo"})
        elif kind == "spaces" and wanted.get("sdk") != "gradio":
            self.answer(400, {"error": "no sdk"})
        else:
            repo = self.hub.repos[key] = Repo(wanted.get("visibility") == "private", wanted.get("sdk"))
            repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.answer(
                200, {"url": f"{self.hub.endpoint}/{key.removeprefix('models/')}", "name": key.split("/", 1)[1]}
            )

    def validate_yaml(self) -> None:
        """Refuse what the Hub refuses: no mapping, or a licence or tags that are none."""
        wanted = json.loads(self.body)
        front = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", wanted["content"], re.DOTALL)
        try:
            data = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            data = str(error)
        problems = [] if isinstance(data, dict) else [{"message": "metadata is no mapping"}]
        if not problems and not all(isinstance(tag, str) for tag in data.get("tags", [])):
            problems = [{"message": "tags are strings"}]
        if not problems and "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
            problems = [{"message": "license is no identifier"}]
        self.answer(400 if problems else 200, {"errors": problems, "warnings": []})

    # --- reading ----------------------------------------------------------------------------------------------

    def found(self, key: str, revision: str) -> tuple[Repo, str] | None:
        """Return repository and commit, or answer that there is none; a private one is shown to its owner only."""
        repo = self.hub.repos.get(key)
        if repo is None or (repo.private and self.user != key.split("/")[1]):
            status = 404 if self.user else 401  # as the Hub does: what exists is nobody else's business
            self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        oid = repo.head if revision == "main" else revision
        if oid not in repo.commits:
            self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return None
        return repo, oid

    def info(self, key: str, revision: str | None = None) -> None:
        if found := self.found(key, revision or "main"):
            repo, oid = found
            blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [{"rfilename": entry["path"], **(facts_of_blob(entry) if blobs else {})}
                        for entry in tree(repo.commits[oid])]  # fmt: skip
            kind, name = key.split("/", 1)
            facts = {"sdk": repo.sdk} if kind == "spaces" else {}
            self.answer(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, **facts})

    def list_tree(self, key: str, revision: str, folder: str | None = None) -> None:
        if found := self.found(key, revision):
            files = found[0].commits[found[1]]
            below = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
            if folder and not below:
                self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
            else:
                is_deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
                self.answer(200, tree(below) if is_deep else children(tree(below), folder))

    def paths_info(self, key: str, revision: str) -> None:
        wanted = parse_qs(self.body.decode()).get("paths", []) or json.loads(self.body or b"{}").get("paths", [])
        if found := self.found(key, revision):
            self.answer(200, [row for row in tree(found[0].commits[found[1]]) if row["path"] in wanted])

    def resolve(self, name: str, revision: str, path: str, kind: str | None = None) -> None:
        found = self.found(f"{kind or 'models/'}{name}", revision)
        if found is None:
            return
        if f"{kind or 'models/'}{name}" in self.hub.gated:
            self.answer(403, {"error": "Access to this repository is restricted"}, X_Error_Code="GatedRepo")
            return
        repo, oid = found
        content = repo.commits[oid].get(path)
        if content is None:
            self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        if not is_lfs(path, len(content)):
            self.answer(200, content, ETag=f'"{git_blob(content)}"', X_Repo_Commit=oid,
                        Content_Length=str(len(content)))  # fmt: skip
            return
        digest = hashlib.sha256(content).hexdigest()
        store = self.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, as the Hub's store is
        self.answer(302, b"", Location=f"{store}/cdn/{digest}", X_Repo_Commit=oid, ETag='"pointer"',
                    X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(content)))  # fmt: skip

    def cdn(self, digest: str) -> None:
        content = self.hub.objects[digest]
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, last = (int(asked[1]), int(asked[2] or len(content))) if asked else (0, len(content))
        part = content[start : last + 1]
        self.hub.bytes_sent += len(part) if self.command == "GET" else 0
        self.answer(206 if asked else 200, part, ETag=f'"{digest}"', Content_Length=str(len(part)))

    # --- writing ----------------------------------------------------------------------------------------------

    def writable(self, key: str) -> Repo | None:
        found = self.found(key, "main")
        if found and key.split("/")[1] != self.user:
            self.answer(403 if self.user else 401, {"error": "You don't have the rights to write here"})
            return None
        return found[0] if found else None

    def preupload(self, key: str) -> None:
        if (repo := self.writable(key)) is None:
            return
        rows = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], repo.files.get(file["path"])
            oid = None if known is None else git_blob(known) if not is_lfs(path, len(known)) else sha256(known)
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": rows})

    def lfs_batch(self, name: str, kind: str | None = None) -> None:
        if self.writable(f"{kind or 'models/'}{name}") is None:
            return
        rows = []
        for wanted in json.loads(self.body)["objects"]:
            place = f"{self.hub.endpoint}/lfs/{wanted['oid']}?X-Signature=s3cr3t-signature"
            known = wanted["oid"] in self.hub.objects
            rows.append({**wanted, **({} if known else {"actions": {"upload": {"href": place}}})})
        self.answer(200, {"transfer": "basic", "objects": rows})

    def lfs_put(self, digest: str) -> None:
        if sha256(self.body) != digest:
            self.answer(400, {"error": "the content does not have this hash"})
            return
        self.hub.objects[digest] = self.body
        self.answer(200, b"")

    def commit(self, key: str) -> None:
        if (repo := self.writable(key)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(repo.files)
        if header.get("parentCommit", repo.head) != repo.head:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, header["summary"])
        url = f"{self.hub.endpoint}/{key.removeprefix('models/')}/commit/{oid}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree(files: Files) -> list[dict[str, Any]]:
    rows = []
    for path, content in sorted(files.items()):
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if is_lfs(path, len(content)):
            row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            row["oid"] = hashlib.sha1(b"pointer" + content).hexdigest()
        rows.append(row)
    return rows


def children(rows: list[dict[str, Any]], folder: str | None) -> list[dict[str, Any]]:
    """Return the files in a folder and the folders in it, of the files below it."""
    start = len(folder) + 1 if folder else 0
    inner = {row["path"][: start + row["path"][start:].index("/")] for row in rows if "/" in row["path"][start:]}
    files = [row for row in rows if "/" not in row["path"][start:]]
    return files + [{"type": "directory", "path": path, "oid": git_blob(path.encode())} for path in sorted(inner)]


def facts_of_blob(entry: dict[str, Any]) -> dict[str, Any]:
    lfs = entry.get("lfs")
    more = {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
    return {"size": entry["size"], "blobId": entry["oid"], **more}


KEY = r"(?P<key>(?:models|spaces|datasets)/[\w.-]+/[\w.-]+)"
NAME = r"(?P<kind>(?:spaces|datasets)/)?(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"HEAD /?", Handler.root),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET /api/{KEY}", Handler.info),
    (rf"GET /api/{KEY}/revision/(?P<revision>\w+)", Handler.info),
    (rf"GET /api/{KEY}/tree/(?P<revision>\w+)/?(?P<folder>.+)?", Handler.list_tree),
    (rf"POST /api/{KEY}/paths-info/(?P<revision>\w+)", Handler.paths_info),
    (rf"POST /api/{KEY}/preupload/main", Handler.preupload),
    (rf"POST /api/{KEY}/commit/main", Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<digest>\w+)", Handler.lfs_put),
    (r"(?:HEAD|GET) /cdn/(?P<digest>\w+)", Handler.cdn),
    (rf"(?:HEAD|GET) /{NAME}/resolve/(?P<revision>\w+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Serve an empty Hub until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_with_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve an empty Hub; the client is logged in as alice, its cache is empty and it does not wait to try again."""
    with loopback_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server
        huggingface_hub.close_session()
