"""Command: generate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from resmol.cli.app import Best, Json, ModelTokenizer, Weights, app, model_ref
from resmol.cli.prompts import Prompt, escape_notice, given_prompt, prompts_from
from resmol.cli.terminal import print_json, say
from resmol.errors import UsageError
from resmol.inference.sampling_params import SamplingParams
from resmol.inference.stop_strings import StopStrings
from resmol.system.process_setup import set_up_process
from resmol.system.wording import counted


@app.command(
    epilog="""
    resmol generate runs/mine --prompt "Once upon a time"
    resmol generate runs/mine --interactive --temperature 0.7
    resmol generate model.gguf --prompts prompts.jsonl --json
    """
)
def generate(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, Hugging Face folder, GGUF file or Hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help='A prompt on each line, or jsonl with "prompt"; - is stdin.')
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Read prompts in a loop (REPL).")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 50,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids tokens seen before; 1 is off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a file to decode together.")] = 8,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(metavar="float32|bfloat16", help="Of the weights; bfloat16 is half the memory to read."),
    ] = "float32",
    weights: Weights = "last",
    best: Best = False,
    tokenizer: ModelTokenizer = None,
    json_: Json = False,
) -> None:
    """Continue a prompt, the prompts of a file, or typed prompts."""
    if (prompt is not None) + (prompts is not None) + interactive != 1:
        raise UsageError(
            "there must be exactly one source of prompts",
            fix="give one of --prompt TEXT, --prompts FILE, --interactive",
        )
    if interactive and json_:
        raise UsageError("--interactive and --json exclude each other", fix="use --prompts - with --json")
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
    stops = StopStrings(stop or ()).strings
    for option, value in (("--prompt", prompt), *(("--stop", one) for one in stops)):
        if notice := escape_notice(option, value or ""):
            say(notice)
    set_up_process()
    from resmol.interop.load import load_model

    # Only now, since the line above may start the process anew, and what was read from a pipe would be gone.
    text = None if prompt is None else given_prompt(prompt)
    several = None if prompts is None else prompts_from(prompts)
    loaded = load_model(model_ref(model, weights, best=best), tokenizer=tokenizer, precision=precision)
    say(loaded.source.describe())
    asked = {"seed": seed, "sampling": asdict(sampling), "stop": list(stops), "precision": precision}
    facts = {**asked, "model": loaded.source.to_dict()}
    if text is not None:
        _generate_one(loaded, text, sampling, stops, facts if json_ else None)
    elif several is not None:
        _generate_several(loaded, several, sampling, stops, batch_size, facts if json_ else None)
    else:
        from resmol.cli.chat import repl

        repl(loaded, sampling, stops)


def _generate_one(
    loaded: Any, prompt: str, sampling: SamplingParams, stop: tuple[str, ...], facts: dict[str, Any] | None
) -> None:
    from resmol.cli.chat import stream, warn_untokenizable

    if facts is None:
        stream(loaded, prompt, sampling, stop)
        return
    warn_untokenizable(loaded, prompt)
    pieces = loaded.stream(prompt, sampling, stop=stop, with_logprobs=True)

    def report() -> None:
        done = pieces.completion()
        print_json({**done.to_dict(), **facts, "timings": done.timings.to_dict()})

    try:
        for _ in pieces:
            pass
    except KeyboardInterrupt:  # report the text so far, as `interrupted`
        report()
        raise
    report()


def _generate_several(
    loaded: Any,
    prompts: list[Prompt],
    sampling: SamplingParams,
    stop: tuple[str, ...],
    batch_size: int,
    facts: dict[str, Any] | None,
) -> None:
    from resmol.cli.chat import print_batch, warn_untokenizable
    from resmol.inference.completion import Timings, complete_batches

    texts, places = [prompt.text for prompt in prompts], [prompt.place for prompt in prompts]
    for text in texts:
        warn_untokenizable(loaded, text)
    rows: list[dict[str, Any]] = []
    tokens: list[int] = []  # the number for each text
    timings: list[Timings] = []

    def report() -> None:
        total = Timings.total(timings)
        if facts is None:
            say(f"[{counted(len(tokens), 'prompt')}, {counted(sum(tokens), 'token')}; {total.describe()}]")
        else:
            print_json({"completions": rows, **facts, "timings": total.to_dict()})

    try:
        for batch in complete_batches(
            loaded.model, loaded.tokenizer, texts, sampling, stop=stop, ends=loaded.ends, batch_size=batch_size,
            names=places, with_logprobs=facts is not None,
        ):  # fmt: skip
            here = places[len(tokens) : len(tokens) + len(batch)]
            if facts is None:
                print_batch(batch, here)
            else:
                rows += [{"place": place, **one.to_dict()} for place, one in zip(here, batch, strict=True)]
            tokens += [len(one.token_ids) for one in batch]
            timings.append(batch[0].timings)
    except KeyboardInterrupt:  # report the texts so far, without those that were not begun
        report()
        raise
    report()
