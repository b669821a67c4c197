"""The page: a tab to generate in, and a tab with the training record. Gradio draws it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from resmol.audit.claims import read_claims
from resmol.audit.plots import curves
from resmol.audit.report import MALFORMED_RECORD, samples, summary_facts
from resmol.demo.provenance import Provenance
from resmol.demo.request_limits import FIELDS, Limits, Request, parse
from resmol.errors import ResmolError
from resmol.inference.completion import FINISH_REASONS, untokenizable_notice
from resmol.interop.load import LoadedModel
from resmol.model.flops import total_parameters
from resmol.run.ledger import LedgerTampered, read_ledger
from resmol.system.templates import template_environment

SEED = FIELDS.index("seed") - 1  # among the options, which follow the prompt
READING, WRITING = "reading the prompt", "writing"
UPDATE_SECONDS = 0.05  # the text on the page grows twenty times a second, however fast the model is
# These run in the browser. Generate is off while a text is on its way, also while it waits for its turn; Stop is on. No
# event of Gradio's tells that a value was refused: only a new message beside its field does.
_MARK = "for (const [id, off] of [['generate', {0}], ['stop', !{0}]]) document.getElementById(id).disabled = off;"
_BUSY = f"""(...values) => {{
    const refusal = () => document.querySelector("div.validation-error"), before = refusal();
    {_MARK.format("true")}
    const watch = setInterval(() => {{
        const refused = refusal() && refusal() !== before;
        if (refused) {{ {_MARK.format("false")} }}
        if (refused || !document.getElementById("generate").disabled) clearInterval(watch);
    }}, 50);
    return values;
}}"""
_IDLE = f"(s) => {{ {_MARK.format('false')} return (s || '').replace(/{READING}|{WRITING}/, 'stopped'); }}"
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
_MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def build_page(loaded: LoadedModel, provenance: Provenance, limits: Limits, has_listener: Callable[[str], bool]) -> Any:
    """Return the page as Gradio's blocks, and the number of the function that it calls.

    Args:
        loaded: The model.
        provenance: Which weights these are.
        limits: What a request may hold.
        has_listener: Returns whether a session has a listener; the computation ends when it has none.
    """
    import gradio as gr

    title = f"{provenance.title} · resmol"
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.HTML(heading(loaded, provenance), padding=False)
        with gr.Tabs():
            with gr.Tab("Generate"), gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=320):
                    prompt = gr.Textbox(  # with one line, which grows, Enter submits
                        provenance.prompts[0], label="Prompt", lines=1, max_lines=12, max_length=limits.prompt_chars,
                        elem_id="prompt", info="It continues a text; it does not answer questions. Enter generates, "
                        "Shift+Enter begins a new line.",
                    )  # fmt: skip
                    with gr.Row(elem_classes="examples"):
                        buttons = [
                            gr.Button(" ".join(text.split()), size="sm", min_width=60) for text in provenance.prompts
                        ]
                    with gr.Row(elem_classes="actions"):
                        run = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                        stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
                    status = gr.HTML("", elem_id="status", padding=False)
                    output = gr.Textbox(
                        label="Text", lines=8, max_lines=16, interactive=False, buttons=["copy"], elem_id="output",
                        placeholder="What the model makes of the prompt appears here.",
                    )  # fmt: skip
                with gr.Column(scale=2, min_width=280):
                    options = sampling_fields(gr, limits)
            with gr.Tab("Training run"):
                gr.HTML(record_page(provenance), padding=False)
        event = gr.on(
            [run.click, prompt.submit], _generate_for(loaded, limits, has_listener), [prompt, *options],
            [output, status, options[SEED]], js=_BUSY, show_progress="minimal", show_progress_on=[status],
            concurrency_limit=1, api_name="generate", trigger_mode="once",
        )  # fmt: skip
        # In the browser alone, so there is no further function that a stranger could call. The status changes after the
        # end of the answer: an update that is on its way while Stop is pressed would say "writing" again.
        stop.click(None, cancels=[event])
        event.then(None, [status], [status], js=_IDLE)
        for button, text in zip(buttons, provenance.prompts, strict=True):
            button.click(None, None, [prompt], js=f"() => {json.dumps(text)}")
    blocks.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    blocks.state_session_capacity = limits.connections  # Gradio would remember the last 10,000 visitors
    number = next(index for index, function in blocks.fns.items() if function.api_name == "generate")
    return blocks, number


def sampling_fields(gr: Any, limits: Limits) -> list[Any]:
    """Return the fields of the sampling options, in the order of `request_limits.FIELDS`."""
    return [
        gr.Slider(1, limits.new_tokens, 64, step=1, label="New tokens", elem_id="max_new_tokens"),
        gr.Slider(0, limits.temperature, 0.8, step=0.05, label="Temperature", elem_id="temperature",
                  info="0 always takes the likeliest token."),
        gr.Slider(0.01, 1, 0.95, step=0.01, label="Top-p", elem_id="top_p",
                  info="Draws from the likeliest tokens that make up this share; 1 is off."),
        gr.Slider(0, limits.top_k, 50, step=1, label="Top-k", elem_id="top_k",
                  info="Draws from so many of the likeliest tokens; 0 is off."),
        gr.Number(0, label="Seed", info="The same seed gives the same text.", precision=0, elem_id="seed"),
        gr.Checkbox(True, label="Random seed", info="Each text has another seed, which is then shown above.",
                    elem_id="random_seed"),
        gr.Slider(1, limits.repetition_penalty, 1, step=0.05, label="Repetition penalty", elem_id="repetition_penalty",
                  info="Makes tokens that occurred less likely; 1 is off."),
    ]  # fmt: skip


def theme() -> Any:
    """Return a theme whose fonts are those of the visitor's system: the page loads nothing from elsewhere."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="md",
        font=[gr.themes.Font(name) for name in _FONTS], font_mono=[gr.themes.Font(name) for name in _MONOSPACE],
    ).set(  # grey that can be read: 4.7 to 1 and better, where Gradio's own has 2.6 to 1
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


def style() -> str:
    """Return the page's own style sheet."""
    return files("resmol.demo").joinpath("page.css").read_text(encoding="utf-8")


# --- generating -----------------------------------------------------------------------------------------------


def _generate_for(
    loaded: LoadedModel, limits: Limits, has_listener: Callable[[str], bool]
) -> Callable[..., Iterator[tuple[str, str, Any]]]:
    import gradio as gr

    def generate(
        prompt: Any, max_new_tokens: Any, temperature: Any, top_p: Any, top_k: Any, seed: Any, random_seed: Any,
        repetition_penalty: Any, request: gr.Request,
    ) -> Iterator[tuple[str, str, Any]]:  # fmt: skip
        values = (prompt, max_new_tokens, temperature, top_p, top_k, seed, random_seed, repetition_penalty)
        try:
            asked = parse(values, limits)
            shown: Any = asked.sampling.seed
            for text, state in answer(loaded, asked, limits, lambda: has_listener(str(request.session_hash))):
                yield text, state, shown
                shown = gr.skip()  # the visitor may be typing the next one
        except ResmolError as error:
            raise gr.Error(f"{error.what}. Please {error.fix}.", duration=10, print_exception=False) from None

    generate.__annotations__ = {"request": gr.Request}  # Gradio looks for the class itself, not for its name
    return generate


def answer(
    loaded: LoadedModel, request: Request, limits: Limits, wanted: Callable[[], bool]
) -> Iterator[tuple[str, str]]:
    """Yield the text so far and its status line, until the text ends or ``wanted`` returns false.

    Raises:
        UsageError: The prompt fills the model's context.
    """
    notice = untokenizable_notice(loaded.tokenizer, request.prompt)
    tokens: list[int] = []
    text, shown, started, end = request.prompt, 0.0, time.monotonic(), ""
    yield text, _status(READING, 0, 0.0, notice)
    stream = loaded.stream(request.prompt, request.sampling, on_token=tokens.append)
    for piece in stream:
        text += piece
        now = time.monotonic()
        if not wanted():
            return
        if now - started > limits.seconds:
            end = f"stopped after {limits.seconds:.0f} s, the limit of this demo"
            break
        if now - shown >= UPDATE_SECONDS:
            shown = now
            yield text, _status(WRITING, len(tokens), now - started, notice)
    end = end or FINISH_REASONS[stream.completion().finish_reason]
    yield text, _status(end, len(tokens), time.monotonic() - started, notice)


def _status(state: str, tokens: int, seconds: float, notice: str) -> str:
    rate = f"{tokens / seconds:,.1f} tokens/s" if tokens and seconds > 0 else ""
    count = f"{tokens:,} token{'' if tokens == 1 else 's'}" if tokens else ""
    return "<span>" + "</span><span>".join(part for part in (state, count, rate, notice) if part) + "</span>"


# --- provenance and record -----------------------------------------------------------------------------------


def heading(loaded: LoadedModel, provenance: Provenance) -> str:
    """Return the top of the page: the model and its weights."""
    return _render(
        "demo_heading.html.j2", provenance=provenance, parameters=total_parameters(loaded.config), config=loaded.config,
        device=str(loaded.model.lm_head.weight.device.type),
    )  # fmt: skip


def record_page(provenance: Provenance) -> str:
    """Return the second tab: facts, claims and curves of the run; or why there are none."""
    run = provenance.record
    if run is None:
        return _render("demo_record.html.j2", why="No record of a training came with these weights.")
    try:
        content = read_ledger(run.ledger)
        facts, drawn, texts = summary_facts(content.records), curves(content.records), samples(content.records)
        return _render(
            "demo_record.html.j2", why="", facts=facts, curves=drawn, claims=read_claims(run), samples=texts[:1],
            head=content.head, lines=len(content.records),
        )  # fmt: skip
    except LedgerTampered as error:
        return _render("demo_record.html.j2", why=f"The record of this run does not hold together: {error.what}.")
    except MALFORMED_RECORD as error:
        why = f"The record of this run is none that resmol wrote ({type(error).__name__}: {error})."
        return _render("demo_record.html.j2", why=why)


def _render(template: str, **values: Any) -> str:
    environment = template_environment("resmol.demo", autoescape=True)
    html = environment.get_template(template).render(**values)
    # Gradio renders the HTML as a template once more; in a text such as a sample these characters are literal.
    return html.replace("{", "&#123;").replace("$", "&#36;").replace("`", "&#96;")
