"""Reading a configuration: presets, TOML files with one base, ``--set`` on top; all problems reported at once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from resmol.config.data_config import with_absolute_paths
from resmol.config.derived import laid_over
from resmol.config.model_config import read_model_config
from resmol.config.run_config import RunConfig
from resmol.config.tables import dotted, merged
from resmol.errors import ConfigError, DataError
from resmol.system.byte_order_mark import decode_text
from resmol.system.hub_download import is_hub_id
from resmol.system.user_paths import user_path

FROM_SCRATCH = (
    "resmol trains from scratch; to fine-tune a model, export it (`resmol export`) and use the Trainer of "
    "transformers, or TRL"
)


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    files = resources.files("resmol.config").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def preset_summary(name: str) -> str:
    """Return what a preset is for: the sentence at the top of its file."""
    return _preset_text(name).partition("\n")[0].removeprefix("# ")


def load_preset(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset.

    Raises:
        ConfigError: There is no such preset, or an override does not fit.
    """
    return _build({"name": name} | _preset_table(name), f"preset {name}", overrides)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, resolve its ``base`` and its ``architecture``, and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: The file is not TOML, or its values do not make a configuration; all problems are listed.
        DataError: The file cannot be read.
    """
    path = user_path(path)
    if path.exists():
        _refuse_model(str(path))
    try:
        return _build({"name": _name_of(path)} | _table_with_base(path), str(path), overrides)
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", fix="write [section] and key = value, no more") from None


def _name_of(file: Path) -> str:
    """Return what to call a configuration that does not say it: its file; for config.toml the folder of that."""
    return file.stem if file.stem != "config" else file.resolve().parent.name or file.stem


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Lay ``section.key=value`` overrides over an existing configuration (`ConfigError` when one does not fit)."""
    return config.replace(parse_overrides(overrides)) if overrides else config


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``section.key`` -> value for ``section.key=value`` as it is given with ``--set``.

    Raises:
        ConfigError: One of them is not of that form, or names an ``architecture`` that cannot be read.
    """
    table: dict[str, Any] = {}
    for override in overrides:
        _apply_override(table, override)
    return dotted(_with_architecture(with_absolute_paths(table, Path())))


def _build(table: dict[str, Any], origin: str, overrides: Sequence[str]) -> RunConfig:
    return RunConfig.parse(table, origin, parse_overrides(overrides))


def _with_architecture(table: dict[str, Any]) -> dict[str, Any]:
    """Replace ``architecture`` by the values it names: above those of a base, below those of the same table."""
    if "architecture" not in table:
        return table
    architecture = read_model_config(str(table["architecture"])).model_dump()
    rest = {key: value for key, value in table.items() if key != "architecture"}
    return merged({"model": architecture}, rest)


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r} is not section.key=value", fix="write e.g. --set optimizer.lr=1e-3")
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override!r}: {part} is a value, not a section", fix="`resmol config --fields` lists the keys"
            )
    table[parts[-1]] = toml_value(text.strip())


def toml_value(text: str) -> Any:
    """Return a value as TOML reads it; what is not TOML is a bare string (``runtime.compile=off``)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return text


def _preset_table(name: str) -> dict[str, Any]:
    if name not in preset_names():
        _refuse_model(name)
        nearest = difflib.get_close_matches(name, preset_names(), n=1)
        raise ConfigError(
            f"there is no preset {name!r}" + (f"; did you mean {nearest[0]}?" if nearest else ""),
            fix=f"choose one of: {', '.join(preset_names())}",
        )
    return _over_base(tomllib.loads(_preset_text(name)), folder=None)


def _refuse_model(name: str, folder: Path = Path()) -> None:
    """Refuse the name of a model, such as a folder with a config.json, where a preset or a TOML file is meant.

    Args:
        name: What was named; where no TOML file of this name can be meant, it may be a Hub id.
        folder: The folder that a relative path begins in.

    Raises:
        ConfigError: It is a model; the fix says how to take its shape.
    """
    path = folder / user_path(name)
    holder = path.parent if path.name == "config.json" else path
    if (holder / "config.json").is_file() or (is_hub_id(name) and not path.exists()):
        raise ConfigError(
            f"{name} is a model, not a configuration of a run",
            fix=f'for its shape, write architecture = "{name}" into a TOML file and give that with --config; its '
            f"weights are not taken: {FROM_SCRATCH}",
        )


def _preset_text(name: str) -> str:
    return resources.files("resmol.config").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")


def _table_with_base(path: Path) -> dict[str, Any]:
    return _over_base(_read_toml(path), folder=path.parent)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return with_absolute_paths(tomllib.loads(decode_text(path.read_bytes())), path.parent)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="check the path of --config") from None
    except ValueError as error:  # TOML's error, UTF-8's, and numbers of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}", fix="correct the file at that line") from None


def _over_base(table: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    base = table.pop("base", None)
    table = _with_architecture(table)
    if base is None:
        return table
    if base not in preset_names() and not str(base).endswith(".toml"):
        _refuse_model(str(base), folder or Path())
    if base in preset_names():
        below = _preset_table(base)
    elif folder is not None and isinstance(base, str) and (folder / user_path(base)).is_file():
        below = _read_toml(folder / user_path(base))
        if "base" in below:
            raise ConfigError(f"{base} has a base of its own", fix="a configuration has one base; merge the two")
        below = _with_architecture(below)
    else:
        raise ConfigError(f"the base {base!r} is neither a preset nor a file", fix="correct the key `base`")
    return laid_over(below, table)
