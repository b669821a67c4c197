"""An RFC 3161 authority on loopback: OpenSSL's own, which shares no code with the library that we verify with."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SETTINGS = """
[tsa]
default_tsa = here
[here]
serial = {folder}/serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
accuracy = secs:1
ess_cert_id_chain = no
ess_cert_id_alg = sha256
"""
EXTENSIONS = "extendedKeyUsage=critical,timeStamping\nkeyUsage=critical,digitalSignature\nbasicConstraints=CA:FALSE\n"


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)


@dataclass(frozen=True)
class Authority:
    """Its root certificate, its folder, and what it does with an answer before it sends it."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root.pem"

    def answer(self, query: bytes) -> bytes:
        asked, answered = self.folder / "query.tsq", self.folder / "answer.tsr"
        asked.write_bytes(query)
        done = openssl(
            "ts", "-reply", "-config", self.folder / "settings", "-queryfile", asked, "-out", answered,
            "-signer", self.folder / "signer.pem", "-inkey", self.folder / "signer.key",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return answered.read_bytes()


def make_authority(folder: Path, name: str) -> Authority:
    """Make a root, and a certificate for time-stamping under it."""
    folder.mkdir()
    (folder / "settings").write_text(SETTINGS.format(folder=folder))
    (folder / "extensions").write_text(EXTENSIONS)
    (folder / "serial").write_text("01\n")
    new_key = ["-newkey", "rsa:2048", "-nodes", "-keyout"]
    root, signer = folder / "root.pem", folder / "signer.pem"
    for done in (
        openssl("req", "-x509", *new_key, folder / "root.key", "-out", root, "-subj", f"/CN={name} Root"),
        openssl("req", *new_key, folder / "signer.key", "-out", folder / "request", "-subj", f"/CN={name}"),
        openssl(
            "x509", "-req", "-in", folder / "request", "-CA", root, "-CAkey", folder / "root.key",
            "-CAcreateserial", "-out", signer, "-days", "30", "-extfile", folder / "extensions",
        ),
    ):  # fmt: skip
        assert done.returncode == 0, done.stderr
    return Authority(folder)


@contextmanager
def served(answer: Callable[[bytes], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """Serve what ``answer`` makes of a request's body (status, headers, body) on loopback; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, headers, body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/tsr"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
