"""The map of names as a JSON file: what the user gives, and one that is written to be completed."""

from __future__ import annotations

import json
from pathlib import Path

from resmol.config.model_config import ModelConfig
from resmol.errors import UsageError
from resmol.system.byte_order_mark import decode_text
from resmol.system.user_paths import user_path
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_third_party
from resmol.verify.third_party.weight_mapping import NAME_MAP_FIX, NameMap, pattern


def read_name_map(path: Path | None) -> dict[str, str | list[str]] | None:
    """Return a map of parameter names read from a JSON file (`UsageError` when it is none)."""
    if path is None:
        return None
    try:
        table = json.loads(decode_text(user_path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", fix=NAME_MAP_FIX) from None
    if not isinstance(table, dict) or not all(_is_target(value) for value in table.values()):
        raise UsageError(f"{path} is not a map of names", fix=NAME_MAP_FIX)
    return table


def _is_target(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def write_name_map(path: Path, factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> str:
    """Write a map of all parameters of a module as a JSON file; names that are not recognized are left empty.

    Args:
        path: The file, which must not exist.
        factory: Builds the module.
        config: The architecture.
        name_map: What is known already.

    Returns:
        How many names are to be completed, in words.

    Raises:
        UsageError: The file exists, or the map does not fit the module.
        CheckFailed: The module cannot be built.
    """
    path = user_path(path)
    if path.exists():
        raise UsageError(f"{path} exists already", fix="name another file: --write-names FILE")
    table = _table(build_third_party(factory, config, name_map))
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8", newline="\n")
    empty = sum(not target for target in table.values())
    todo = f"write Hugging Face's name for the other {empty}, then give" if empty else "give"
    return f"{path}: {len(table) - empty} of {len(table)} names are recognized; {todo} --names {path}"


def _table(model: ThirdPartyModel) -> dict[str, str | list[str]]:
    """Return Hugging Face's name for each parameter, with ``{}`` for the number of the layer; "" if it is not known."""
    held: dict[str, list[str]] = {}
    for piece in model.mapping.pieces:
        held.setdefault(piece.parameter, []).append(pattern(piece.target))
    table: dict[str, str | list[str]] = {}
    for name, _ in model.module.named_parameters(remove_duplicate=False):
        targets = held.get(name, [""])
        table.setdefault(pattern(name), targets[0] if len(targets) == 1 else targets)
    return table
