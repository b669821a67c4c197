"""Rows H1 to H4: what a stranger may do to the demo, over a real connection to a process that serves a tiny model."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from campaign import Campaign
from served import DATA, DEFAULTS, JOIN, Served, ask, body, final_text, messages, slow_demo
from trials import INTERVAL, Forks, Setting, train_run
from waiting import HANGS

from resmol.demo.request_limits import FIELDS, Limits
from resmol.interop.load import LoadedModel, load_model

MIB = 1 << 20
LIMITS = Limits()
CANARY = "canary-7c1d"
CONTEXT = 1024
RESET = 0  # a body that is refused unread: the kernel may say so before the answer has arrived
QUICK = 1.0  # seconds in which a refusal must come, in a campaign; the ordinary suite measures no time


@pytest.fixture(scope="module")
def spoken_run(forks: Forks, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose context holds a prompt, with a file in it that nobody may read."""
    run = tmp_path_factory.mktemp("spoken") / "run"
    changes = [f"train.steps={INTERVAL}", f"model.max_position_embeddings={CONTEXT}"]
    assert forks.run(train_run, run, setting, *changes) == 0
    (run / "secret.txt").write_text(CANARY)
    return run


@pytest.fixture(scope="module")
def spoken(spoken_run: Path) -> LoadedModel:
    return load_model(spoken_run)


@pytest.fixture
def served(spoken_run: Path, tmp_path: Path) -> Iterator[Served]:
    with slow_demo(spoken_run, tmp_path, patience=60.0) as demo:  # many ask at once before they listen
        yield demo


def send(demo: Served, method: str, path: str, content: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Send a request byte for byte as it is given: no client tidies the path up or looks at the body."""
    address = urlsplit(demo.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=HANGS)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        if content:
            connection.putheader("content-length", str(len(content)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        with suppress(OSError):  # refused before all of it was sent
            connection.send(content)
        try:
            answer = connection.getresponse()
        except ConnectionError:
            return RESET, b""
        try:
            return answer.status, answer.read()
        except (ConnectionError, http.client.IncompleteRead):
            return answer.status, b""
    finally:
        connection.close()


def shows_its_inside(answer: bytes | str) -> bool:
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer
    return any(sign in text for sign in ("Traceback", 'File "', "site-packages", CANARY, "root:x:"))


def is_alive(demo: Served, spoken: LoadedModel, session: str) -> bool:
    """Whether an ordinary visitor still gets the answer that the model gives."""
    wanted = "ka lo" + spoken.generate("ka lo", max_new_tokens=4, temperature=0.0)
    return final_text(ask(demo.url, ["ka lo", 4, 0.0, 1, 0, 0, False, 1.0], session)) == wanted


# --- H1 ------------------------------------------------------------------------------------------------------


def test_h1_huge_prompts(campaign: Campaign, served: Served, spoken: LoadedModel) -> None:
    letters = ["x", "\n", "\0", "\u202e", "\u200d", "\U0001f642", "\ud800", "9", "\\", "<b>"]
    inside = [1, 100, LIMITS.prompt_chars]
    outside = [LIMITS.prompt_chars + 1, 10_000, 60_000, MIB, 10 * MIB, 50 * MIB]
    sizes = inside + (outside if campaign.full else outside[:4])
    repeats = campaign.count(1, 3)
    assert is_alive(served, spoken, "h1first")
    reset_peak(served)
    before, problems, times, trials = served.resident_bytes(), [], [], 0
    for letter, size, _ in itertools.product(letters, sizes, range(repeats)):
        trials += 1
        prompt, session = (letter * size)[:size], f"h1n{trials}"
        content = json.dumps(body([prompt, 1, *DEFAULTS[2:]], session)).encode()
        started = time.perf_counter()
        status, answer = send(served, "POST", JOIN, content, content_type="application/json")
        seconds = time.perf_counter() - started
        allowed = size <= LIMITS.prompt_chars and letter != "\ud800"
        refusals = (413, RESET) if len(content) > LIMITS.body_bytes else (422,)
        if status not in ((200,) if allowed else refusals) or shows_its_inside(answer):
            problems.append(f"{size} x {letter!r}: {status} {answer[:80]!r}")
        if status == 200:
            last = listen(served, session)
            if not (last["success"] or f"{CONTEXT:,}" in last["output"]["error"]):
                problems.append(f"{size} x {letter!r}: {last}")
        elif size <= MIB:  # more than that takes this client a second to write
            times.append(seconds)
    grown, slowest = peak(served) - before, sorted(times)[math.ceil(0.99 * len(times)) - 1]
    if grown > 100 * MIB:
        problems.append(f"the process grew by {grown / MIB:.0f} MiB")
    if campaign.full and slowest > QUICK:
        problems.append(f"99 % of the refusals took up to {slowest:.2f} s")
    if not is_alive(served, spoken, "h1last"):
        problems.append("it does not answer any longer")
    campaign.record(
        "H1", "prompts of 1 character to 50 MB: line breaks, NUL, right-to-left, emoji, halves of characters",
        "answered, or refused with a sentence; memory grows by less than 100 MiB", problems, trials,
        note=f"{grown / MIB:.0f} MiB more; 99 % of the refusals within {1000 * slowest:.0f} ms",
    )  # fmt: skip


def listen(demo: Served, session: str) -> dict[str, Any]:
    """Return the message that ends the answer to a session."""
    with httpx.stream("GET", f"{demo.url}{DATA}", params={"session_hash": session}, timeout=HANGS) as stream:
        for message in messages(stream.iter_lines()):
            if message["msg"] == "process_completed":
                return message
    raise AssertionError("the stream ended without an end")


def reset_peak(demo: Served) -> None:
    """Let the kernel count the peak of the process's memory anew (proc(5), clear_refs)."""
    Path(f"/proc/{demo.pid}/clear_refs").write_text("5")


def peak(demo: Served) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{demo.pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


# --- H2 ------------------------------------------------------------------------------------------------------


def test_h2_many_at_once(campaign: Campaign, served: Served, spoken: LoadedModel) -> None:
    waves, least_seconds = ([1, 10, 100, 500], 300.0) if campaign.full else ([1, 10, 60], 0.0)
    outcomes: Counter[str] = Counter()
    problems, trials, slowest = [], 0, 0.0
    asyncio.run(wave(served, 30, "warm"))  # what a process that is asked holds anyway
    settled = served.resident_bytes()
    started, number = time.monotonic(), 0
    while number < len(waves) or time.monotonic() - started < least_seconds:
        size = waves[number % len(waves)]
        for prompt, outcome, text, seconds in asyncio.run(wave(served, size, f"w{number}")):
            trials, outcomes[outcome] = trials + 1, outcomes[outcome] + 1
            if outcome == "answered" and text != prompt + spoken.generate(prompt, max_new_tokens=4, temperature=0.0):
                problems.append(f"{prompt!r} was answered with {text!r}")
            if outcome == "strange":
                problems.append(f"{prompt!r}: {text}")
            if outcome == "refused":
                slowest = max(slowest, seconds)
        served.settle(quiet=0.2)
        if not is_alive(served, spoken, f"alive{number}"):
            problems.append(f"it does not answer after {size} at once")
        number += 1
    grown = served.resident_bytes() - settled
    if grown > 50 * MIB:
        problems.append(f"the process grew by {grown / MIB:.0f} MiB over {number} waves")
    if not (outcomes["answered"] and outcomes["refused"] and outcomes["left"]):
        problems.append(f"not everything was tried: {dict(outcomes)}")
    campaign.record(
        "H2", "1, 10, 100, 500 requests at once, some read slowly, some leave",
        "everybody gets the own answer or a refusal; it lives; memory stays", problems, trials,
        note=f"{time.monotonic() - started:.0f} s; {', '.join(f'{n} {what}' for what, n in sorted(outcomes.items()))}; "
        f"{grown / MIB:+.0f} MiB; the slowest refusal took {slowest:.1f} s",
    )  # fmt: skip


async def wave(demo: Served, size: int, name: str) -> list[tuple[str, str, str, float]]:
    """Ask so many times at once; return prompt, outcome, text and seconds of each."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=demo.url, timeout=HANGS, limits=limits) as client:
        return list(await asyncio.gather(*(visit(client, f"{name}n{i}", f"ka lo {i}", i) for i in range(size))))


async def visit(client: httpx.AsyncClient, session: str, prompt: str, number: int) -> tuple[str, str, str, float]:
    """Ask once; every fifth visitor leaves before the answer comes, every seventh reads slowly."""
    started = time.monotonic()
    try:
        answer = await client.post(JOIN, json=body([prompt, 4, 0.0, 1, 0, 0, False, 1.0], session))
        if answer.status_code == 503:
            return prompt, "refused", "", time.monotonic() - started
        if answer.status_code != 200:
            return prompt, "strange", f"{answer.status_code} {answer.text[:80]}", 0.0
        async with client.stream("GET", DATA, params={"session_hash": session}) as stream:
            if stream.status_code == 503:
                return prompt, "refused", "", time.monotonic() - started
            async for line in stream.aiter_lines():
                if number % 5 == 4:
                    return prompt, "left", "", 0.0
                if number % 7 == 6:
                    await asyncio.sleep(0.05)
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {"msg": ""}
                if message["msg"] == "process_completed":
                    if message["success"]:
                        return prompt, "answered", str(message["output"]["data"][0]), 0.0
                    full = "queue" in str(message["output"]).lower()
                    return prompt, "refused" if full else "strange", str(message), time.monotonic() - started
    except httpx.TransportError as error:
        return prompt, "strange", repr(error), 0.0
    return prompt, "strange", "the stream ended without an end", 0.0


# --- H3 ------------------------------------------------------------------------------------------------------


def test_h3_bad_numbers(campaign: Campaign, served: Served, spoken: LoadedModel) -> None:
    numbers = ["-1", "-1e309", "1e309", "NaN", "-Infinity", '"abc"', '"5"', "null", "[]", "{}", "true", "1" + "0" * 400]
    fine = [json.dumps(value) for value in DEFAULTS]
    bodies = {}
    for (place, field), number in itertools.product(enumerate(FIELDS), numbers):
        if field == "prompt" and number.startswith('"'):
            continue  # a text is a prompt
        if (field, number) == ("random_seed", "true"):
            continue
        bodies[f"{field} {number[:12]}"] = request_with([*fine[:place], number, *fine[place + 1 :]])
    for place, field in enumerate(FIELDS):
        bodies[f"{field} missing"] = request_with([*fine[:place], *fine[place + 1 :]])
    bodies["one too many"] = request_with([*fine, "0"])
    whole = request_with(fine)
    bodies["an extra field"] = whole.replace('"data"', '"event_data_x": 1, "data"')
    bodies["no data"] = whole.replace('"data"', '"dat"')
    bodies["no JSON"], bodies["nothing"], bodies["half"] = "data=1", "", whole[: len(whole) // 2]
    bodies["deep"], bodies["a number"], bodies["a list"] = "[" * 20_000, "7", "[]"
    bodies["twice"] = whole.replace('"data"', '"data": [], "fn_index": 9, "data"').replace('"fn_index": 0', '"x": 0')
    problems = []
    for name, content in bodies.items():
        status, answer = send(served, "POST", JOIN, content.encode(), content_type="application/json")
        if not 400 <= status < 500 or not said_why(answer) or shows_its_inside(answer):
            problems.append(f"{name}: {status} {answer[:80]!r}")
    if not is_alive(served, spoken, "h3last"):
        problems.append("it does not answer any longer")
    if shows_its_inside(served.log.read_text(errors="replace")):
        problems.append("a traceback in the log")
    campaign.record(
        "H3", "numbers that are none, too large, missing, of another type; odd JSON",
        "4xx with a sentence, no traceback",
        problems, len(bodies), exhaustive=True,
    )  # fmt: skip


def request_with(values: list[str]) -> str:
    """Return a request whose values are given as JSON, so that they may be no JSON at all."""
    return '{"data": [' + ", ".join(values) + '], "fn_index": 0, "trigger_id": 13, "session_hash": "h3"}'


def said_why(answer: bytes) -> bool:
    detail = json.loads(answer)["detail"]
    return bool(detail) and (isinstance(detail, str) or any(verdict["message"] for verdict in detail))


# --- H4 ------------------------------------------------------------------------------------------------------

PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/gradio_api/startup-events")


def test_h4_files_and_routes(campaign: Campaign, served: Served, spoken: LoadedModel, spoken_run: Path) -> None:
    targets = ["/etc/passwd", str(spoken_run / "secret.txt"), f"../../../../../../..{spoken_run}/secret.txt"]
    problems, trials = [], 0
    for prefix, target in itertools.product(PREFIXES, targets):
        for spelt in {target, target.replace("..", "%2e%2e"), target.replace("/", "%2f"), target.replace("/", "\\")}:
            trials += 1
            status, answer = send(served, "GET", prefix + spelt)
            if shows_its_inside(answer) or status in (500, 502):
                problems.append(f"GET {prefix}{spelt}: {status} {answer[:60]!r}")
    for path, method in itertools.product(
        gradio_routes(), ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
    ):
        if path in PAGE and method in ("GET", "HEAD"):
            continue
        trials += 1
        status, answer = send(served, method, path)
        if not 400 <= status < 500 or shows_its_inside(answer):
            problems.append(f"{method} {path}: {status} {answer[:60]!r}")
    for size in (10, 300, 70_000, 50 * MIB if campaign.full else 2 * MIB):
        trials += 1
        content = upload(b"n" * size)
        kind = "multipart/form-data; boundary=b"
        status, answer = send(served, "POST", "/gradio_api/upload", content, content_type=kind)
        if status not in (404, 413, RESET) or shows_its_inside(answer):
            problems.append(f"an upload with a name of {size} bytes: {status}")
    if not is_alive(served, spoken, "h4last"):
        problems.append("it does not answer any longer")
    campaign.record(
        "H4", "files outside, all of Gradio's routes, uploads, one with a name of 50 MB",
        "nothing outside is read; only what the page needs answers", problems, trials, exhaustive=True,
        note=f"{len(gradio_routes())} routes",
    )  # fmt: skip


PREFIXES = (
    "/gradio_api/file=", "/file=", "/gradio_api/file/", "/file/", "/static/", "/static/..", "/assets/", "/assets/../",
    "/static/img/..", "/theme.css/", "/gradio_api/stream/", "/gradio_api/proxy=", "/svelte/",
    "/gradio_api/custom_component/x/client/", "/gradio_api/deep_link?session_hash=", "/config?file=", "/?__theme=", "/gradio_api/file=http://127.0.0.1",
)  # fmt: skip


def gradio_routes() -> list[str]:
    """Return the addresses that Gradio itself would answer, its parameters filled in."""
    show = (
        "import gradio as g; print(*(r.path for r in g.routes.App.create_app(g.Blocks()).routes if hasattr(r, 'path')))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", show], capture_output=True, text=True, check=True)
    routes = done.stdout.split()
    return sorted({re.sub(r"\{[^}]*\}", "x", route) for route in routes if route.startswith("/")} - {JOIN, DATA})


def upload(name: bytes) -> bytes:
    """Return a form with a file of this name (CVE-2025-0187)."""
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="' + name + b'"\r\n\r\n'
    return head + b"x\r\n--b--\r\n"
