"""Read what generation_config.json says about the end of a text, and say what else it asks for.

transformers takes the ends from this file where there is one, and from config.json otherwise. Settings of sampling are
the user's choice here; those that differ from what is done are named, so that a difference from another program has an
explanation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resmol.config.model_config import end_token_ids, read_optional_hf_table
from resmol.errors import ConfigError

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
# Settings that change greedy tokens as well, with the values that change nothing.
_CHANGES_GREEDY: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
}


def text_ends(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a text; none, if the model's files name none.

    Args:
        folder: The model's folder.
        config: The contents of its config.json, whose ends count where generation_config.json names none.

    Raises:
        ConfigError: generation_config.json is damaged, or its ends are no token ids.
    """
    path = folder / GENERATION_CONFIG
    table = read_optional_hf_table(path)
    _say_what_is_not_done(table)
    if table.get("eos_token_id") is None:
        return end_token_ids(config)
    ends = end_token_ids(table)
    if not ends:
        raise ConfigError(
            f"{path}: eos_token_id is {str(table['eos_token_id'])[:40]}, not a token id or a list of them",
            fix="correct it, or remove the line to use config.json's",
        )
    return ends


def _say_what_is_not_done(table: Mapping[str, Any]) -> None:
    asked = [f"{key} {table[key]!r}"[:60] for key, neutral in _CHANGES_GREEDY.items() if table.get(key) not in neutral]
    if asked:
        logger.info(f"{GENERATION_CONFIG} asks for {', '.join(asked)}; only options and arguments set these here")
