"""What `prepare` tells its user when it is done: what was held out, replaced, repeated and left out."""

from __future__ import annotations

import logging

from resmol.data.folders import shown_unused
from resmol.data.shards import Dataset, SourceFacts

logger = logging.getLogger(__name__)

_HELD_OUT = {
    "named": "{documents} documents, as named",
    "documents": "{documents} documents",
    "position": "the end of the last document",
    "none": "nothing",
}


def log_summary(dataset: Dataset) -> None:
    """Log what was prepared, what was lost on the way, and what makes the held-out text less than that."""
    source, train, val = dataset.manifest.source, dataset.manifest.train, dataset.manifest.val
    share = 100 * val.tokens / (train.tokens + val.tokens)
    held_out = _HELD_OUT[source.held_out].format(documents=val.documents)
    logger.info(f"data: {source.documents} documents, {train.tokens + val.tokens} tokens in {dataset.root}")
    logger.info(f"data: held out {held_out}: {val.tokens} tokens, {share:.1f} %")
    for sentence in _findings(source):
        logger.info(f"data: {sentence}")


def _findings(source: SourceFacts) -> list[str]:
    where = f" (in {', '.join(source.replaced_in)})" if source.replaced_in else ""
    spellings = ", ".join(f"{token} {count}" for token, count in source.special_tokens.items())
    counted = {
        f"bytes or surrogates that are not Unicode, replaced by U+FFFD{where}; `resmol prepare --encoding NAME` "
        "reads text in another encoding": source.replacements,
        "bytes without a token, dropped": source.untokenizable_bytes,
        "cuts inside text without white space": source.forced_cuts,
        "empty documents": source.empty_documents,
        f"spellings of control tokens in the text became these tokens ({spellings}); `resmol prepare "
        "--special-tokens as-text` keeps them text": sum(source.special_tokens.values()),
        "documents are exact copies of others": source.duplicates,
        "held-out documents are word for word in the training text too: the held-out loss is lower than it should be; "
        "remove the copies": source.val_in_train,
    }
    unused = [f"not used: {shown_unused(facts)}" for facts in source.unused]
    return [f"{number} {what}" for what, number in counted.items() if number] + unused
