"""The data that a run was trained on, if it is still at hand and is still the same; prompts in its manner."""

from __future__ import annotations

from resmol.config.run_config import RunConfig
from resmol.data.beginnings import first_words
from resmol.data.sources import RunData, datasets_of, open_recorded
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError
from resmol.run.directory import RunDir
from resmol.run.ledger import last_fact, scan

MOST_PROMPTS = 4


def recorded_data(run: RunDir, config: RunConfig) -> RunData | None:
    """Return the prepared data of a run; None where it is missing or was changed since.

    Args:
        run: The run directory; its ledger records the fingerprint of the data.
        config: Its configuration, which names the folder, or those of a mixture.
    """
    try:
        data = open_recorded(run, config.data)
    except (DataError, OSError):
        return None
    recorded = last_fact(list(scan(run.ledger, "start", "drift")), "data_fingerprint")
    return data if recorded == data.fingerprint else None


def example_prompts(run: RunDir, tokenizer: Tokenizer) -> list[str]:
    """Return up to `MOST_PROMPTS` prompts that fit a run: that of its samples, and words of its text."""
    config = run.load_config()
    prompts = [config.sampling.prompt, *_words_of_data(run, config, tokenizer)]
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))[:MOST_PROMPTS]


def _words_of_data(run: RunDir, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    data = recorded_data(run, config)
    dataset = None if data is None else next(iter(datasets_of(data).values()))
    if dataset is None or dataset.tokenizer_sha256 != tokenizer.sha256:
        return []
    try:
        return first_words(dataset, tokenizer, MOST_PROMPTS)
    except DataError:  # a damaged shard: a model can be shown without it
        return []
