"""The rules of the house as tests: layers, imports, sizes, names, documentation, the lock file."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "resmol"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "tools", "core", "base"}
COMMANDS = {path.name for path in (PACKAGE / "cli").glob("*.py")}
LAZY_BY_DESIGN = {"__init__.py", "__main__.py", *COMMANDS}  # they answer before PyTorch is imported
HEAVY = ("torch", "transformers")
PEER_WITH_PICKLES = (
    PACKAGE / "bench" / "workers" / "checkpoint.py"
)  # measures torch.save on tensors that it made itself


# --- no PyTorch in layer 0 ----------------------------------------------------------------------------------


WITHOUT_TORCH = ("errors", "checks", "version", "system", "config")  # the lowest layers of the contract, whole
# Files of other rooms that a command reads before it knows whether it needs PyTorch.
ALSO_WITHOUT_TORCH = (
    "model/flops", "model/shapes", "run/directory", "run/ledger", "run/checkpoint_manifest", "train/lr_schedule",
    "train/loss_spikes", "inference/sampling_params", "inference/stop_strings", "data/tokenizer_files",
)  # fmt: skip


def layer_0() -> list[str]:
    """Return the modules that never import PyTorch."""
    inside = [
        path.relative_to(PACKAGE)
        for path in SOURCES
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in WITHOUT_TORCH
    ]
    names = [str(path.with_suffix("")) for path in inside if path.name != "__init__.py"] + list(ALSO_WITHOUT_TORCH)
    return [f"resmol.{name.replace('/', '.')}" for name in names]


def heavy_after(code: str) -> list[str]:
    """Return which heavy packages are loaded in a fresh interpreter after ``code``."""
    report = f"import sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_the_layers_without_torch_are_the_lowest_ones() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    assert {name.strip() for layer in layers[-3:] for name in re.split(r"[:|]", layer)} == set(WITHOUT_TORCH)
    assert len(layers) <= 13


def test_layer_0_does_not_import_torch() -> None:
    assert heavy_after("\n".join(f"import {name}" for name in layer_0())) == []


def test_the_package_and_its_configuration_do_not_import_torch() -> None:
    assert heavy_after("import resmol; resmol.__version__; resmol.load_preset('nano'); resmol.ResmolError") == []


def test_help_and_usage_errors_do_not_import_torch() -> None:
    commands = [
        ["--help"],
        ["--version"],
        ["nonsense"],
        ["train"],
        ["train", "--help"],
        ["train", "x", "--nonsense"],
    ]
    run = f"from resmol.__main__ import run\nfor given in {commands!r}:\n    run(given, debug=False)"
    assert heavy_after(run) == []


def test_the_check_above_can_fail() -> None:
    assert heavy_after("import resmol.model.llama") == ["torch"]


# --- imports ------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports as lint; exit(lint(no_cache=True, no_logo=True))"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(folder / "src"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_imports_run_downwards_only() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [("errors.py", "from resmol.checks import Check"), ("system/host.py", "import resmol.config.drift")],
    ids=["upwards", "sideways"],
)
def test_the_import_contract_can_fail(module: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "src" / "resmol", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / "src" / "resmol" / module
    changed.write_text(changed.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "is not allowed to import" in done.stdout


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_modules_are_imported_at_the_top(path: Path) -> None:
    if path.name in LAZY_BY_DESIGN:
        return
    for function in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
        lazy = [name for name in imports_of(function) if name.partition(".")[0] == "resmol"]
        assert not lazy, f"{function.name} imports {lazy}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_import_is_for_the_type_checker_only(path: Path) -> None:
    """The import contract does not see such imports; the package's own list of names is the exception."""
    assert path == PACKAGE / "__init__.py" or "TYPE_CHECKING" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_ever_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"} & set(imports_of(tree))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if path == PEER_WITH_PICKLES:
        assert "torch.load(path, weights_only=True)" in path.read_text(encoding="utf-8")
        calls -= {"torch.load", "torch.save"}
    assert not {"torch.load", "torch.save", "eval", "exec"} & calls


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def declared(extras: tuple[str, ...] | None = None) -> set[str]:
    """Return the libraries of these extras; by default of all, and what is always needed."""
    optional = PROJECT["project"]["optional-dependencies"]
    always = PROJECT["project"]["dependencies"] if extras is None else []
    groups = [always, *(optional[name] for name in (extras or optional))]
    return {distribution(item) for group in groups for item in group}


def test_every_library_that_is_imported_is_declared() -> None:
    imported = {name.partition(".")[0] for path in SOURCES for name in imports_of(ast.parse(path.read_text("utf-8")))}
    providers = packages_distributions() | {
        "pydantic_core": ["pydantic"],  # one library in two packages
        "llama_cpp": ["llama-cpp-python"],  # not installed unless `make interop` was run
    }
    outside = imported - sys.stdlib_module_names - {"resmol", ""}
    undeclared = {name for name in outside if not {distribution(d) for d in providers.get(name, [name])} & declared()}
    assert not undeclared


# --- systems ------------------------------------------------------------------------------------------------


def windows() -> ModuleType:
    """Return the list of what Windows lacks, which tests/system/test_windows.py takes away."""
    spec = importlib.util.spec_from_file_location("windows", ROOT / "tests" / "windows" / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def posix_alone(tree: ast.AST) -> list[str]:
    """Return what a file uses that not every system has, or by which it asks for the system."""
    lacking = windows()
    names = {f"{module}.{name}" for module, found in lacking.NAMES.items() for name in found}
    names |= {"sys.platform", "os.name", "platform.system", "platform.libc_ver"}
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    options = [node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg]
    without_readline = lacking.MODULES - {"readline"}  # the chat imports it if it is there
    return [
        *(name for name in imports_of(tree) if name in without_readline or name in ("ctypes", "psutil")),
        *(name for name in used if name in names or name.endswith(".is_mount")),
        *(name for name in options if name in ("preexec_fn", "pass_fds", "process_group", "start_new_session")),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_differs_between_systems_lies_in_one_folder(path: Path) -> None:
    found = posix_alone(ast.parse(path.read_text(encoding="utf-8")))
    assert found == [] or path.is_relative_to(PACKAGE / "system")


def test_the_check_above_sees_each_kind() -> None:
    code = """
import fcntl, os, signal, sys
os.fork(); os.getpid(); signal.SIGKILL; signal.SIGINT; sys.platform; path.is_mount(); run(pass_fds=())
"""
    expected = ["fcntl", "os.fork", "pass_fds", "path.is_mount", "signal.SIGKILL", "sys.platform"]
    assert sorted(posix_alone(ast.parse(code))) == expected


ACCELERATORS = {"cuda", "mps", "xpu", "nccl", "xccl"}
KNOW_DEVICES = (PACKAGE / "train" / "devices.py", PACKAGE / "config" / "runtime_config.py")


def accelerators_in(tree: ast.AST) -> list[str]:
    """Return where code names a kind of accelerator; what is said in a sentence does not count."""
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [word for word in (*words, *(name.lower() for name in names)) if word.partition(":")[0] in ACCELERATORS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_one_file_knows_devices(path: Path) -> None:
    assert path in KNOW_DEVICES or accelerators_in(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_check_of_devices_sees_each_kind() -> None:
    code = "model.cuda(); torch.mps; x.to('cuda:0'); ProfilerActivity.XPU; print('needs CUDA')"
    assert sorted(accelerators_in(ast.parse(code))) == ["cuda", "cuda:0", "mps", "xpu"]


def unportable_texts(tree: ast.AST) -> list[str]:
    """Return the calls that open a text and leave its encoding, or the end of its lines, to the system."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else f"{node.func.id}()"
        texts = [str(value.value) for value in node.args if isinstance(value, ast.Constant)]
        mode = next((text for text in texts if re.fullmatch("[rwax][bt+]*", text)), "r")
        given = {option.arg for option in node.keywords}
        is_text = name == "write_text" or (name == "read_text" and not node.args)  # a distribution's takes a name
        is_text |= name in ("open", "open()") and bool(texts) and "b" not in mode
        needed = {"encoding"} | ({"newline"} if name == "write_text" or set(mode) & set("wax") else set())
        if is_text and not needed <= given:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_text_has_the_same_bytes_on_every_system(path: Path) -> None:
    assert unportable_texts(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_check_of_texts_sees_each_kind() -> None:
    wrong = ["path.read_text()", "path.write_text('a', encoding='utf-8')", "path.open('a', encoding='utf-8')"]
    right = ["path.open('wb')", "path.open('r+b', buffering=0)", "path.read_text(encoding='utf-8')"]
    assert unportable_texts(ast.parse("\n".join(wrong + right))) == wrong


# --- sizes, names, documentation ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions_of(ast.parse(text))}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_most_functions_are_short() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    lengths = sorted((f.end_lineno or 0) - f.lineno + 1 for tree in trees for f in functions_of(tree))
    assert statistics.median(lengths) <= 10
    assert lengths[len(lengths) * 9 // 10] <= 35


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_is_named_after_a_concept(path: Path) -> None:
    assert not {*path.relative_to(PACKAGE).parts[:-1], path.stem} & EMPTY_NAMES


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    assert [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_function_is_annotated(path: Path) -> None:
    for function in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        extra = [item for item in (arguments.vararg, arguments.kwarg) if item is not None]
        bare = [a.arg for a in [*named, *extra] if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
        assert (function.name, bare, function.returns is None) == (function.name, [], False)


LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


# --- what is shipped ----------------------------------------------------------------------------------------

LOCKS = {
    name: (ROOT / name).read_text(encoding="utf-8").splitlines()
    for name in ("requirements.lock", "requirements-interop.lock")
}
INTEROP = ("interop", "eval", "notebook", "wandb", "trackio", "cluster")  # extras that only `make interop` installs


def locked(name: str) -> list[str]:
    return [line.partition("==")[0] for line in LOCKS[name]]


@pytest.mark.parametrize("name", list(LOCKS))
def test_a_lock_holds_exact_versions_and_nothing_else(name: str) -> None:
    """No addresses, no paths, no local versions: it must install from any index."""
    assert [line for line in LOCKS[name] if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line)] == []
    assert locked(name) == sorted(set(locked(name)))


def test_the_locks_do_not_overlap() -> None:
    assert not set(locked("requirements.lock")) & set(locked("requirements-interop.lock"))


def test_the_locks_pin_every_direct_dependency() -> None:
    build = {distribution(item) for item in PROJECT["build-system"]["requires"]}
    interop = declared(INTEROP) - {"resmol"}
    assert interop <= set(locked("requirements-interop.lock"))
    stores = declared(("s3", "gcs", "https"))  # whoever needs one takes the newest, which fits no other pin
    assert (declared() | build) - interop - stores - {"resmol"} <= set(locked("requirements.lock"))


def test_the_locks_install_on_the_oldest_python_that_we_name() -> None:
    """A pin that asks for a later release of Python breaks the set-up of a system that has the first one."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    installed = {name: package for name in locked("requirements.lock") for package in distributions(name=name)}
    pinned = dict(line.split("==") for line in LOCKS["requirements.lock"])
    too_new = [
        f"{name} {package.version}: {package.metadata['Requires-Python']}"
        for name, package in installed.items()
        if package.version == pinned[name]
        and not SpecifierSet(package.metadata.get("Requires-Python", "")).contains(oldest)
    ]
    assert too_new == []


def test_the_license_is_the_standard_text() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_wheel_holds_the_whole_package_and_works_without_the_checkout(tmp_path: Path) -> None:
    """Built as pip builds it; presets, templates and what else is no Python are in it."""
    tracked = ("src", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    for name in tracked:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
        names = {name for name in wheel.namelist() if name.startswith("resmol/")}
    there = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    assert names == {path.as_posix() for path in there if "__pycache__" not in path.parts}
    assert "resmol/py.typed" in names
    elsewhere = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "resmol", "inspect", "nano"], cwd=tmp_path, capture_output=True, text=True,
        env={**elsewhere, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "parameters" in shown.stdout, shown.stderr


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make (\w+) ", done.stdout, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert listed == phony[1].split()
