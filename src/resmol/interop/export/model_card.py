"""The model card: facts of the run's record, and nothing else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import jinja2

from resmol.audit.sources_read import sources_read
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.data.builtin_corpora import corpus_of
from resmol.data.tokenizer import SMOLLM2_TOKENIZER_SHA256
from resmol.errors import DataError
from resmol.interop.description import Description, description
from resmol.interop.export.card_words import FROM_SCRATCH, LICENCE_ROW, NO_WORDS, CardWords, join_card
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.export.gguf_writer import share_of_type
from resmol.interop.export.markdown import code_block, code_span, plain
from resmol.interop.export.training_record import RunRecord
from resmol.interop.load import LoadedModel
from resmol.model.flops import total_parameters
from resmol.run.ledger import last_fact, select
from resmol.system.installation import source_commit
from resmol.system.templates import template_environment
from resmol.system.untrusted_text import listed
from resmol.version import __version__

# Preset -> name of the published model of its shape, and the tokens that it saw (its model card).
SMOLLM2 = {
    "smollm2-135m": ("SmolLM2-135M", 2_000_000_000_000),
    "smollm2-360m": ("SmolLM2-360M", 4_000_000_000_000),
    "smollm2-1.7b": ("SmolLM2-1.7B", 11_000_000_000_000),
}
_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings",
)  # fmt: skip
COMPUTE_OPTIMAL = 20  # training tokens for each parameter (Hoffmann et al. 2022, table A3, rounded)
CARD_PROMPT, CARD_NEW_TOKENS = "Once upon a time", 50
SHOWN_TEXTS = 3
SHOWN_SAMPLES = 3
SHOWN_STRETCHES = 6


def model_card(
    loaded: LoadedModel, tokenizer: ExportedTokenizer, dtype: str, record: RunRecord | None, gguf: str | None = None,
    words: CardWords = NO_WORDS,
) -> str:  # fmt: skip
    """Return ``README.md`` of an export.

    Args:
        loaded: The model.
        tokenizer: Its tokenizer, as the export describes it.
        dtype: The type of the weights in the file.
        record: The record of its run; a model from elsewhere gets a short card.
        gguf: Name of the file of a GGUF export.
        words: What its owner says about it.

    Raises:
        UsageError: The words contradict the export.
        DataError: The ledger's chain holds, and its records do not say what resmol's say.
    """
    about = description(loaded.source) if record is None else record.description
    environment = template_environment("resmol.interop.export", autoescape=False)  # Markdown; filters escape
    environment.filters |= {"plain": plain, "code_span": code_span, "code_block": code_block}
    front_matter = card_metadata(record, about, "transformers" if gguf is None else "gguf")
    try:
        body = environment.get_template("model_card.md.j2").render(
            about=about,
            licence_row=LICENCE_ROW,
            licence=about.licence,
            home=home_page(),
            chats=tokenizer.chats,
            own_tokenizer=tokenizer.own_path,
            code=card_code(tokenizer, gguf, tied=loaded.config.tie_word_embeddings).rstrip(),
            gguf=gguf,
            version=__version__,
            commit=source_commit(),
            config=loaded.config,
            parameters=total_parameters(loaded.config),
            dtype=dtype,
            share=1.0 if gguf is None else share_of_type(loaded.config, dtype),
            source=loaded.source,
            run=run_facts(record, loaded.config) if record is not None else None,
        )
    except (TypeError, ValueError, KeyError, IndexError, StopIteration, jinja2.TemplateError) as error:
        raise DataError(
            f"the record of the run cannot be put into words ({type(error).__name__}: {error})",
            fix="its ledger was not written by resmol; name a checkpoint outside of this run to export without it",
        ) from error
    return words.lay_over(join_card(front_matter, body))


def card_code(tokenizer: ExportedTokenizer, gguf: str | None = None, *, tied: bool = False) -> str:
    """Return the Python code of the card's section "Use"; every export executes it before it is finished.

    Args:
        tokenizer: The model's tokenizer, as the export describes it.
        gguf: Name of the file of a GGUF export.
        tied: Whether the output layer is the embedding, which transformers 4.46 does not see in a GGUF file.
    """
    comment, file = ("", "") if gguf is None else ("  # from tokenizer.json", f', gguf_file="{gguf}"')
    file += ", tie_word_embeddings=True" if tied and gguf is not None else ""
    several = gguf is not None and len(tokenizer.tokens.ends) != 1  # of a GGUF file, transformers knows one end
    show = f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={CARD_NEW_TOKENS})[0]))"
    lines = [
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', GenerationConfig' if several else ''}",
        "",
        'name = "."  # this folder, or the name of its repository',
        f"tokenizer = AutoTokenizer.from_pretrained(name){comment}",
        f"model = AutoModelForCausalLM.from_pretrained(name{file})",
        *(["model.generation_config = GenerationConfig.from_pretrained(name)"] if several else []),
        f'inputs = tokenizer("{CARD_PROMPT}", return_tensors="pt")',
        show,
    ]
    asked = [
        "",
        'chat = [{"role": "user", "content": "Who are you?"}]',
        'as_tensors = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
        "inputs = tokenizer.apply_chat_template(chat, **as_tensors)",
        show,
    ]
    return "\n".join([*lines, *(asked if tokenizer.chats else [])]) + "\n"


def card_metadata(record: RunRecord | None, about: Description, library: str) -> dict[str, Any]:
    """Return the front matter. There is no ``base_model``: the weights are derived from no other model's."""
    fields: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["resmol", "llama"] if record is None else ["resmol", "llama", FROM_SCRATCH],
    }
    if about.licence is not None:
        fields["license"] = about.licence
    if about.languages:
        fields["language"] = list(about.languages)
    return fields


def smollm2_of_shape(config: ModelConfig) -> tuple[str, int] | None:
    """Return name and training tokens of the SmolLM2 that has this shape; None for a model of another."""
    for preset, published in SMOLLM2.items():
        theirs = load_preset(preset).model
        if all(getattr(config, field) == getattr(theirs, field) for field in _SHAPE):
            return published
    return None


def run_facts(record: RunRecord, config: ModelConfig) -> dict[str, Any]:
    """Return the facts of the run: from its ledger, its configuration and the manifest of its data."""
    steps, records = record.steps, record.ledger.records
    start = next(select(records, "start"))
    environments = [r["environment"] for r in records if r["kind"] in ("start", "resume")]
    evaluations = record.newest("eval")
    seen = steps[-1]["tokens_seen"] if steps else 0
    published, published_tokens = smollm2_of_shape(config) or (None, 0)
    tokens_per_parameter = seen / total_parameters(config)
    names = [] if record.data is None else [item.name for item in record.data.source.inputs]
    return {
        "name": record.name,
        "config": record.config,
        "start": start,
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "texts": listed(names, SHOWN_TEXTS),
        "published": published,
        "published_tokens": f"{published_tokens / 1e12:g} trillion",
        "compute_optimal": COMPUTE_OPTIMAL,
        "share": seen / published_tokens if published else 0.0,
        "tokens_per_parameter": tokens_per_parameter,
        "undertrained": tokens_per_parameter < COMPUTE_OPTIMAL,
        "seconds": sum(r["seconds"] for r in steps),
        "stretches": record.stretches()[:SHOWN_STRETCHES],
        "processes": len(record.stretches()),
        "crashes": sum(1 for _ in select(records, "rewind")),
        "evaluation": evaluations[0] if evaluations else None,
        "samples": record.newest("sample")[:SHOWN_SAMPLES],
        "machines": [facts for number, facts in enumerate(environments) if facts not in environments[:number]],
        "head": record.ledger.head,
        "lines": len(records),
        "later": max((r["step"] for r in records if r["kind"] == "step"), default=0) > record.step,
        "data": record.data,
        "sources": sources_read(records, steps),
        "places": [f"data/{source.name}" for source in record.config.data.source or ()] or ["data"],
        "fingerprint": last_fact(records, "data_fingerprint"),
        "inputs": () if record.data is None else record.data.source.inputs,
        "other_tokenizer": record.config.tokenizer.sha256 != SMOLLM2_TOKENIZER_SHA256,
        "corpus": (corpus := corpus_of(names)),
        "own_val": corpus is None and record.data is not None and record.data.source.held_out == "named",
        "certificate": record.certificate,
        "curves": record.curves,
    }


def home_page() -> str | None:
    """Return the address that the installed package states for itself; None where it states none."""
    try:
        addresses = metadata("resmol").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    return addresses[0].partition(",")[2].strip() if addresses else None
