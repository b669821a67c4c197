"""The page in a real browser: type, generate, watch it stream, stop; errors; both tabs; on a desk and on a phone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from served import Served, ask, final_text
from waiting import HANGS

from resmol.audit.run_data import example_prompts
from resmol.interop.load import LoadedModel
from resmol.run.directory import RunDir

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCROLLS_SIDEWAYS = """[...document.querySelectorAll('.rs-page *')]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))
    .map(e => e.className)"""
DESK, PHONE = (1280, 800), (390, 844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium for the browser tests: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * HANGS)
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root otherwise
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Visit:
    """A visit to the page, and everything that went wrong meanwhile."""

    def __init__(self, browser: Browser, served: Served, size: tuple[int, int] = DESK, dark: bool = False) -> None:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
        )
        self.page: Page = context.new_page()
        self.page.set_default_timeout(1000 * HANGS)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.page.on(
            "request", lambda r: None if r.url.startswith((served.url, "data:")) else self.outside.append(r.url)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.goto(served.url)
        self.page.wait_for_selector("#generate")

    @property
    def text(self) -> str:
        return self.page.input_value("#output textarea")

    def set(self, field: str, value: object) -> None:
        self.page.fill(f"#{field} input[type=number]", str(value))
        self.page.keyboard.press("Tab")

    def generate(self, prompt: str, **values: object) -> None:
        self.page.fill("#prompt textarea", prompt)
        for field, value in values.items():
            self.set(field, value)
        self.page.click("#generate")

    def width_of_content(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Visit]:
    made = Visit(browser, served)
    yield made
    assert made.outside == [], "the page asked for something from elsewhere"
    made.page.context.close()


def test_type_generate_and_watch_it_stream(visit: Visit, demo_model: LoadedModel) -> None:
    visit.generate("ka lo", temperature=0, max_new_tokens=100)
    expected = "ka lo" + demo_model.generate("ka lo", temperature=0.0, top_p=0.95, top_k=50, max_new_tokens=100)
    lengths = set()
    while visit.text != expected:
        lengths.add(len(visit.text))
        assert expected.startswith(visit.text)
        visit.page.wait_for_timeout(30)
        assert len(lengths) < 500
    assert len(lengths) > 5, "it came at once"
    expect(visit.page.locator("#status")).to_contain_text("tokens/s")
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    assert visit.errors == []


def test_the_fields_reach_the_model(visit: Visit, served: Served) -> None:
    visit.page.uncheck("#random_seed input")
    visit.generate("ka", max_new_tokens=9, temperature=1.5, top_p=0.8, top_k=20, seed=5, repetition_penalty=1.3)
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    assert visit.text == final_text(ask(served.url, ["ka", 9, 1.5, 0.8, 20, 5, False, 1.3], "fields1"))


def test_stop(visit: Visit, served: Served) -> None:
    def slowly(route: Route) -> None:  # text that is on its way comes after Stop was pressed
        visit.page.wait_for_timeout(300)
        route.continue_()

    before = served.tokens()
    visit.page.route("**/gradio_api/cancel", slowly)
    visit.generate("ka", temperature=0, max_new_tokens=500)
    expect(visit.page.locator("#status")).to_contain_text("writing")
    visit.page.click("#stop")
    expect(visit.page.locator("#status")).to_contain_text("stopped")
    computed = served.settle() - before
    assert 0 < computed < 300
    stopped = visit.text
    visit.generate("lo", max_new_tokens=3)  # and it goes on with the next
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    assert visit.text.startswith("lo") != stopped.startswith("lo")
    assert visit.errors == []


def test_leaving_the_page_stops_the_computation(browser: Browser, served: Served) -> None:
    before = served.tokens()
    made = Visit(browser, served)
    made.generate("ka", temperature=0, max_new_tokens=500)
    expect(made.page.locator("#status")).to_contain_text("writing")
    made.page.context.close()
    assert served.settle() - before < 300


def test_a_random_seed_is_shown_and_gives_the_text_again(visit: Visit) -> None:
    seeds, texts = [], []
    for _ in range(2):
        visit.generate("ka", max_new_tokens=16, temperature=2)
        expect(visit.page.locator("#status")).to_contain_text(re.compile("token limit|end of the text"))
        expect(visit.page.locator("#generate")).to_be_enabled()
        seeds.append(visit.page.input_value("#seed input"))
        texts.append(visit.text)
    assert len({*seeds}) == len({*texts}) == 2
    visit.page.uncheck("#random_seed input")
    visit.generate("ka", seed=seeds[0])
    expect(visit.page.locator("#output textarea")).to_have_value(texts[0])
    assert visit.page.input_value("#seed input") == seeds[0]


def test_enter_generates_and_shift_enter_begins_a_line(visit: Visit) -> None:
    visit.page.fill("#prompt textarea", "ka")
    visit.set("max_new_tokens", 3)
    visit.page.focus("#prompt textarea")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("lo")
    expect(visit.page.locator("#prompt textarea")).to_have_value("ka\nlo")
    assert visit.text == ""
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    assert visit.text.startswith("ka\nlo")


def test_the_buttons_say_what_goes_on(visit: Visit) -> None:
    run, stop = visit.page.locator("#generate"), visit.page.locator("#stop")
    expect(stop).to_be_disabled()
    visit.generate("ka", temperature=0, max_new_tokens=500)
    expect(run).to_be_disabled()
    expect(stop).to_be_enabled()
    expect(visit.page.locator("#status")).to_contain_text("writing")
    stop.click()
    expect(run).to_be_enabled()
    expect(stop).to_be_disabled()


def test_an_example_fills_the_prompt(visit: Visit, demo_run: Path, demo_model: LoadedModel) -> None:
    first, *others = example_prompts(RunDir(demo_run), demo_model.tokenizer)
    expect(visit.page.locator("#prompt textarea")).to_have_value(first)
    assert others, "words of the run's own text"
    visit.page.get_by_role("button", name=" ".join(others[0].split()), exact=True).click()
    expect(visit.page.locator("#prompt textarea")).to_have_value(others[0])


@pytest.mark.parametrize("value", ["-1", "99999999999", ""])
def test_a_bad_number_is_named_beside_its_field(visit: Visit, value: str) -> None:
    visit.page.uncheck("#random_seed input")
    visit.page.fill("#seed input", value)
    visit.page.click("#generate")
    expect(visit.page.locator("#seed")).to_contain_text("seed must")
    assert visit.text == ""
    visit.page.fill("#seed input", "1")
    visit.generate("ka", max_new_tokens=2)
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    expect(visit.page.locator("#seed")).not_to_contain_text("seed must")


def test_a_prompt_beyond_the_context_is_a_message(visit: Visit) -> None:
    visit.generate("9" * 2000)
    message = visit.page.get_by_text(
        "the prompt has 2,000 tokens; the model's context is 1,024. Please shorten the prompt."
    )
    expect(message).to_be_visible()
    assert "Traceback" not in visit.page.content()


def test_text_is_only_text(visit: Visit) -> None:
    prompt = "<img src=x onerror=document.title='hit'> {{value}} ${value} `x` </textarea><b>bold</b>"
    visit.generate(prompt, max_new_tokens=2)
    expect(visit.page.locator("#status")).to_contain_text("token limit")
    assert visit.text.startswith(prompt)
    assert "hit" not in visit.page.title()
    assert visit.page.locator("img[src=x]").count() == 0


def test_it_names_the_weights(visit: Visit, demo_model: LoadedModel) -> None:
    expect(visit.page.locator("h1")).to_have_text("checkpoint step-00000012 of tiny-run")
    expect(visit.page.locator(".rs-badge")).to_have_text("step 12")
    expect(visit.page.locator("#sha256")).to_have_text(demo_model.source.sha256[:16])


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_both_tabs_fit_and_can_be_read(
    browser: Browser, served: Served, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    made = Visit(browser, served, size, dark)
    for name in (
        "prompt",
        "generate",
        "stop",
        "output",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "random_seed",
        "repetition_penalty",
    ):
        box = made.page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
    button = made.page.locator("#generate").bounding_box()
    assert button is not None
    assert button["y"] + button["height"] < size[1], "what to press is seen without scrolling"
    assert made.width_of_content() <= size[0]
    made.page.get_by_role("tab", name="Training run").click()
    expect(made.page.locator(".rs-curves svg").first).to_be_visible()
    assert made.page.locator(".rs-curves svg").count() == 4
    assert made.page.evaluate(SCROLLS_SIDEWAYS) == []
    expect(made.page.locator(".rs-claims")).to_contain_text("it <generates>")
    expect(made.page.locator(".rs-claims")).to_contain_text("{{x}} ${y}")
    assert made.width_of_content() <= size[0]
    made.page.screenshot(path=tmp_path / "record.png", full_page=True)
    assert (made.outside, made.errors) == ([], [])
    made.page.context.close()
