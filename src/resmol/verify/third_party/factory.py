"""Find the student's class or function, and call it with the configuration in the form that it wants."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from torch import nn

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed, UsageError
from resmol.system.untrusted_text import listed, quoted
from resmol.system.user_paths import user_path
from resmol.verify.third_party.config_view import ConfigView, field_value, is_pretrained_config, own_config
from resmol.verify.third_party.guarded import Phase, guarded

Factory: TypeAlias = Callable[..., Any]

_EXAMPLE = "write e.g. --model my_model.py:SmolLM2, or --model my_package.my_model:build"


def import_factory(name: str) -> Factory:
    """Import ``path.py:Class``, ``module:Class`` or a function; the current and the file's folder are searched too.

    Raises:
        UsageError: There is no such file, module or callable.
        CheckFailed: The file raises an exception when it is imported.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon:
        source, attribute = name, ""
    _search_first(Path.cwd())
    path = user_path(source)
    if path.suffix == ".ipynb":
        raise UsageError(
            f"--model {name}: a notebook cannot be imported", fix="write its cells into a .py file: jupyter nbconvert"
        )
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"--model {name}: there is no file {path}", fix=_EXAMPLE)
        module = guarded(Phase.IMPORTING, lambda: _import_file(path.resolve()))
    else:
        module = _import_module(source, name)
    try:
        found = _attribute(module, attribute)
    except AttributeError:
        raise UsageError(f"--model {name}: {_what_is_there(module, attribute)}", fix=_EXAMPLE) from None
    if not callable(found):
        raise UsageError(f"--model {name} is a {type(found).__name__}, not a class or function", fix=_EXAMPLE)
    return typing.cast("Factory", found)


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import_module(source: str, name: str) -> ModuleType:
    try:
        return guarded(Phase.IMPORTING, lambda: importlib.import_module(source))
    except CheckFailed as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and source.startswith(cause.name):
            raise UsageError(f"--model {name}: there is no module {quoted(cause.name)}", fix=_EXAMPLE) from None
        raise


def _import_file(path: Path) -> ModuleType:
    """Import a file under its own name, or as part of its package, so that its neighbors can be imported too.

    It is executed each time: it may have been changed.
    """
    root, dotted = path.parent, path.stem
    while (root / "__init__.py").is_file():
        root, dotted = root.parent, f"{root.name}.{dotted}"
    _search_first(root)
    known = sys.modules.get(dotted)
    is_same = getattr(known, "__file__", None) == str(path)
    if "." in dotted:
        return importlib.reload(known) if known is not None and is_same else importlib.import_module(dotted)
    unique = dotted if known is None or is_same else f"{dotted}_of_{abs(hash(path))}"  # a library keeps its name
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module


def _attribute(module: ModuleType, dotted: str) -> Any:
    found: Any = module
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def _what_is_there(module: ModuleType, wanted: str) -> str:
    classes = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    near = get_close_matches(wanted, list(vars(module)), n=1)
    missing = f"it has no {quoted(wanted)}" if wanted else "the name of the class is missing"
    choice = (
        f"; its modules are {listed(classes, 8)}" if classes else f"; the nearest name is {near[0]}" if near else ""
    )
    return missing + choice


# --- calling it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """What a factory made.

    Attributes:
        module: The module, as it came.
        note: Which form of the configuration it got, in words.
        own_config: The student's configuration class, if the factory got one.
        ignores_config: Whether the factory takes no configuration at all.
    """

    module: nn.Module
    note: str
    own_config: type | None = None
    ignores_config: bool = False


def build(factory: Factory, config: ModelConfig) -> Built:
    """Build a module from the architecture.

    Args:
        factory: A class, a function, or a module that is there already. Its first parameter decides on the form of the
            configuration: an annotated configuration class, or the class of its default, gets the architecture's
            values; parameters with names of fields get them one by one; everything else gets a `ConfigView`.
        config: The architecture.

    Raises:
        CheckFailed: The factory raised an exception, or returned no module.
    """
    if isinstance(factory, nn.Module):
        return Built(factory, "a module that is there already: its sizes are fixed", ignores_config=True)
    call, note, kind, ignores = guarded(Phase.BUILDING, lambda: _prepared(factory, config))
    module = guarded(Phase.BUILDING, call)
    if isinstance(module, tuple | list) and any(isinstance(item, nn.Module) for item in module):
        module = next(item for item in module if isinstance(item, nn.Module))
    if not isinstance(module, nn.Module):
        raise CheckFailed(
            f"building: the factory returned {_described(module)}", fix="return a torch.nn.Module from the factory"
        )
    return Built(module, note, kind, ignores)


_Prepared: TypeAlias = tuple[Callable[[], Any], str, type | None, bool]


def _prepared(factory: Factory, config: ModelConfig) -> _Prepared:
    """Return how to call the factory, in words too, with the configuration class used and whether it takes none."""
    kind = getattr(factory, "config_class", None)
    if isinstance(kind, type) and is_pretrained_config(kind):
        own = own_config(kind, config)
        return lambda: factory(own), f"configured by transformers' {kind.__name__}", None, False
    parameters = _parameters(factory)
    if not parameters:
        return factory, "it takes no configuration: its sizes are its own", None, True
    first = parameters[0]
    if first.kind is first.VAR_KEYWORD:
        return lambda: factory(**ConfigView(config)), "configured by **fields", None, False
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if field_value(first.name, config)[0]:
        fields = {name: field_value(name, config, names) for name in names}
        values = {name: value for name, (known, value) in fields.items() if known}
        return lambda: factory(**values), f"configured by its parameters {listed(list(values), 12)}", None, False
    kind = _kind_of(first, factory)
    if kind is ModelConfig:
        return _with(factory, first, config), "configured by resmol's ModelConfig", None, False
    own = own_config(kind, config) if kind is not None and not issubclass(kind, _CONTAINERS) else None
    if own is not None:
        return _with(factory, first, own), f"configured by its own {type(own).__name__}, filled in", kind, False
    return _with(factory, first, ConfigView(config)), "", None, False


_CONTAINERS = (dict, list, tuple, str, int, float, type(None), nn.Module)


def _with(factory: Factory, parameter: inspect.Parameter, value: Any) -> Callable[[], Any]:
    if parameter.kind is parameter.KEYWORD_ONLY:
        return lambda: factory(**{parameter.name: value})
    return lambda: factory(value)


def _parameters(factory: Factory) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("config", inspect.Parameter.POSITIONAL_ONLY)]


def _kind_of(parameter: inspect.Parameter, factory: Factory) -> type | None:
    """Return the class that a parameter is annotated with, or the class of its default."""
    owner = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    try:
        annotation = typing.get_type_hints(owner).get(parameter.name)
    except Exception:  # an annotation that cannot be evaluated
        annotation = None
    options = [annotation, *typing.get_args(annotation)]  # Optional[Config] too
    kinds = [option for option in options if isinstance(option, type) and option is not type(None)]
    default = parameter.default
    if not kinds and default is not parameter.empty and default is not None:
        kinds = [type(default)]
    return kinds[0] if kinds else None


def _described(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
