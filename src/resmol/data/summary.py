"""What `prepare` tells its user when it is done: what was held out, replaced, repeated and left out."""

from __future__ import annotations

import logging

from resmol.data.folders import shown_unused
from resmol.data.shards import Dataset, Manifest
from resmol.data.source_facts import SourceFacts, TextStatistics
from resmol.data.text_statistics import QUANTILES
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

_HELD_OUT = {
    "named": "{documents}, as named",
    "documents": "{documents}",
    "position": "the end of the last document",
    "none": "nothing",
}


def log_summary(dataset: Dataset) -> None:
    """Log what was prepared, what was lost on the way, and what makes the held-out text less than that."""
    source, train, val = dataset.manifest.source, dataset.manifest.train, dataset.manifest.val
    share = 100 * val.tokens / (train.tokens + val.tokens)
    held_out = _HELD_OUT[source.held_out].format(documents=counted(val.documents, "document"))
    size = f"{counted(source.documents, 'document')}, {counted(train.tokens + val.tokens, 'token')}"
    logger.info(f"data: {size} in {dataset.root}")
    logger.info(f"data: held out {held_out}: {counted(val.tokens, 'token')}, {share:.1f} %")
    for sentence in _findings(source):
        logger.info(f"data: {sentence}")


def statistics_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Return names and values that show at a look whether prepared text is sane."""
    source, train, val = manifest.source, manifest.train, manifest.val
    documents, tokens = train.documents + val.documents, train.tokens + val.tokens
    held_out = _HELD_OUT[source.held_out].format(documents=counted(val.documents, "document"))
    rows = [
        ("documents", f"{documents:,}, held out: {held_out}"),
        ("tokens", f"{tokens:,}, held out: {val.tokens:,}"),
        ("exact copies", f"{source.duplicates:,}{', left out' if source.dedup == 'exact' else ''}"),
        ("held out and in train", f"{source.val_in_train:,}"),
        ("replaced bytes", f"{source.replacements:,} of {source.text_bytes:,}"),
        ("bytes without a token", f"{source.untokenizable_bytes:,}"),
        ("control tokens spelled", f"{sum(source.special_tokens.values()):,}"),
    ]
    if source.statistics is None:
        return rows[:2]  # tokens that were taken over: nobody saw their text
    return [*rows[:2], *_text_rows(source.statistics, tokens), *rows[2:]]


def _text_rows(text: TextStatistics, tokens: int) -> list[tuple[str, str]]:
    total = sum(text.letters.values())
    scripts = sorted(text.letters.items(), key=lambda letters: -letters[1])
    lengths = zip(QUANTILES, text.document_tokens, strict=False)  # a text without documents has no lengths
    return [
        ("characters a token", f"{text.characters / max(tokens, 1):.2f}"),
        ("tokens of a document", ", ".join(f"{share:.0%} {length:,}" for share, length in lengths)),
        ("letters", ", ".join(f"{script} {count / total:.2%}" for script, count in scripts if count > 5e-5 * total)),
        *((f"{one.times:,} times", one.beginning) for one in text.most_frequent),
    ]


def _findings(source: SourceFacts) -> list[str]:
    where = f" (in {', '.join(source.replaced_in)})" if source.replaced_in else ""
    spellings = ", ".join(f"{token} {count}" for token, count in source.special_tokens.items())
    left_out = ", left out" if source.dedup == "exact" else ""
    findings = (
        (source.replacements, "byte or surrogate", f"outside Unicode, replaced by U+FFFD{where}; `resmol prepare "
         "--encoding NAME` reads text in another encoding"),
        (source.untokenizable_bytes, "byte", "without a token, dropped"),
        (source.forced_cuts, "cut", "inside text without white space"),
        (source.empty_documents, "document", "without text"),
        (source.null_texts, "text", f"null, which counts as no text (the first: {source.first_null})"),
        (sum(source.special_tokens.values()), "spelling", f"of control tokens in the text became these tokens "
         f"({spellings}); `resmol prepare --special-tokens as-text` keeps them text"),
        (source.duplicates, "exact copy", f"of other documents{left_out}"),
        (source.val_in_train, "held-out document", "also in the training text, word for word: the held-out loss is "
         "lower than it should be; remove the copies"),
    )  # fmt: skip
    unused = [f"not used: {shown_unused(facts)}" for facts in source.unused]
    return [f"{counted(number, noun)} {rest}" for number, noun, rest in findings if number] + unused
