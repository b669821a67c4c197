"""The demo as a process: it streams, stops, refuses, keeps to this machine, and never serves other weights."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from served import DATA, DEFAULTS, JOIN, Served, ask, body, final_text, messages, until
from waiting import HANGS

from resmol.demo.server import listening_socket
from resmol.errors import UsageError
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import LoadedModel

LONG = ["ka", 500, 0.0, 1, 0, 0, False, 1.0]


def test_the_long_answer_is_long(demo_model: LoadedModel) -> None:
    """What the tests of stopping rely on."""
    tokens: list[int] = []
    list(demo_model.stream("ka", SamplingParams(500, 0.0), on_token=tokens.append))
    assert len(tokens) == 500


def test_it_streams_what_generate_says(served: Served, demo_model: LoadedModel) -> None:
    found = ask(served.url, ["ka lo", 30, 0.0, 1, 0, 0, False, 1.0], "stream1")
    assert sum(message["msg"] == "process_generating" for message in found) >= 5, "it came in one piece"
    assert final_text(found) == "ka lo" + demo_model.generate("ka lo", max_new_tokens=30, temperature=0.0)


def test_the_seed_decides(served: Served) -> None:
    texts = [
        final_text(ask(served.url, ["ka", 8, 1.0, 1, 0, seed, False, 1.0], f"seed{n}"))
        for n, seed in enumerate((1, 1, 2))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_cancelling_stops_the_computation(served: Served) -> None:
    before = served.tokens()
    with httpx.Client(base_url=served.url, timeout=HANGS) as client:
        event = client.post(JOIN, json=body(LONG, "cancel1")).json()["event_id"]
        with client.stream("GET", DATA, params={"session_hash": "cancel1"}) as stream:
            for message in messages(stream.iter_lines()):
                if message["msg"] == "process_generating":
                    break
            answer = client.post(
                "/gradio_api/cancel", json={"session_hash": "cancel1", "fn_index": 0, "event_id": event}
            )
            assert answer.status_code == 200
    assert served.settle() - before < 100


def test_a_disconnect_stops_the_computation(served: Served) -> None:
    before = served.tokens()
    with httpx.Client(base_url=served.url, timeout=HANGS) as client:
        client.post(JOIN, json=body(LONG, "leaves1"))
        with client.stream("GET", DATA, params={"session_hash": "leaves1"}) as stream:
            for message in messages(stream.iter_lines()):
                if message["msg"] == "process_generating":
                    break
    assert served.settle() - before < 100


def test_nobody_who_never_listens_is_computed_for(served: Served) -> None:
    before = served.tokens()
    assert httpx.post(f"{served.url}{JOIN}", json=body(LONG, "silent1"), timeout=HANGS).status_code == 200
    until(lambda: served.tokens() > before)
    assert served.settle(limit=60) - before < 450  # what is computed in 5 s, and not all 500


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (["x" * 4001, *DEFAULTS[1:]], 0),
        ([*DEFAULTS[:1], 513, *DEFAULTS[2:]], 1),
        ([*DEFAULTS[:5], "abc", *DEFAULTS[6:]], 5),
    ],
)
def test_a_refusal_stands_beside_its_field(served: Served, values: list[object], field: int) -> None:
    answer = httpx.post(f"{served.url}{JOIN}", json=body(list(values), "bad1"), timeout=HANGS)
    assert answer.status_code == 422
    assert [verdict["is_valid"] for verdict in answer.json()["detail"]] == [
        number != field for number in range(len(DEFAULTS))
    ]


def test_a_prompt_beyond_the_context_is_a_sentence(served: Served) -> None:
    last = ask(served.url, ["9" * 2000, *DEFAULTS[1:]], "long1")[-1]
    assert not last["success"]
    assert (
        last["output"]["error"]
        == "the prompt has 2,000 tokens; the model's context is 1,024. Please shorten the prompt."
    )


def test_what_is_too_large_is_refused_unread(served: Served) -> None:
    answer = httpx.post(f"{served.url}{JOIN}", content=b"x" * 200_000, timeout=HANGS)
    assert answer.status_code == 413
    unannounced = httpx.post(f"{served.url}{JOIN}", content=(b"x" * 10_000 for _ in range(20)), timeout=HANGS)
    assert unannounced.status_code == 413


def test_headers_and_names(served: Served) -> None:
    answer = httpx.get(served.url, timeout=HANGS)
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(served.url, headers={"host": "evil.example"}, timeout=HANGS).status_code == 403
    assert "//" not in answer.headers["content-security-policy"], "nothing from elsewhere"


def test_there_is_one_function(served: Served) -> None:
    functions = httpx.get(f"{served.url}/config", timeout=HANGS).json()["dependencies"]
    callable_by_others = [f["id"] for f in functions if f["backend_fn"]]
    assert callable_by_others == [0]
    for number in (1, 2, 3, -1, 99, True, "0", None):
        request = body(DEFAULTS, "fn1", fn_index=number)
        assert httpx.post(f"{served.url}{JOIN}", json=request, timeout=HANGS).status_code == 400


def test_only_this_machine_can_reach_it(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for address in {*others, "127.0.0.2"}:
        with socket.socket() as client:
            assert client.connect_ex((str(address), port)) != 0, address


def demo_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resmol", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)


def test_damaged_weights_are_not_served(demo_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000012"
    checkpoint.mkdir()
    for path in (demo_run / "checkpoints" / checkpoint.name).iterdir():
        content = path.read_bytes()
        (checkpoint / path.name).write_bytes(content[:-4] + bytes(4) if path.name == "model.safetensors" else content)
    done = demo_command(str(checkpoint), "--port", "0")
    assert done.returncode == 65
    assert done.stderr.startswith("error: ")
    assert "http://" not in done.stderr + done.stdout


def test_a_model_that_is_not_there_is_not_served() -> None:
    done = demo_command("nowhere", "--port", "0")
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "error: there is no model nowhere")


def test_a_port_that_is_taken() -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}: "):
            listening_socket("127.0.0.1", port)
    with pytest.raises(UsageError, match="cannot listen at"):
        listening_socket("203.0.113.7", 0)
