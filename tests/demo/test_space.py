"""A Space is complete: it starts from its folder, with its own copy of the package and nothing else of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from served import ask, demo_process, final_text
from waiting import HANGS

import resmol
from resmol.demo.space import export_space, requirements
from resmol.errors import UsageError
from resmol.interop.load import load_model

ROOT = Path(__file__).resolve().parents[2]


def environment(port: int = 0) -> dict[str, str]:
    """An environment in which nothing points to this checkout."""
    ours = {"PYTHONPATH", "SPACE_ID", "GRADIO_SERVER_NAME"}
    return {k: v for k, v in os.environ.items() if k not in ours} | {"GRADIO_SERVER_PORT": str(port)}


def front_matter(space: Path) -> dict[str, Any]:
    text = (space / "README.md").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_front_matter(demo_space: Path) -> None:
    found = front_matter(demo_space)
    wanted = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file",
              "short_description", "suggested_hardware"}  # fmt: skip
    assert wanted <= found.keys()
    assert (found["sdk"], found["sdk_version"]) == ("gradio", distribution("gradio").version)
    assert (found["suggested_hardware"], found["python_version"]) == ("cpu-basic", "3.11")
    assert len(found["short_description"]) <= 60
    assert {found["colorFrom"], found["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert (demo_space / found["app_file"]).is_file()


def needs(name: str, extra: str) -> set[str]:
    """Return the names of everything that a package needs, and what that needs."""
    found: set[str] = set()
    todo = [(name, (extra,))]
    while todo:
        package, extras = todo.pop()
        for text in distribution(package).requires or []:
            item = Requirement(text)
            wanted = item.marker is None or any(item.marker.evaluate({"extra": e}) for e in extras or ("",))
            key = re.sub(r"[-_.]+", "-", item.name).lower()
            if wanted and key not in found:
                found.add(key)
                todo.append((key, tuple(item.extras)))
    return found - {name}


def test_the_versions_are_those_of_the_lock_and_complete(demo_space: Path) -> None:
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    pins = requirements()
    assert pins == {name: lock[name] for name in pins}
    assert set(pins) == needs("resmol", "demo")
    text = (demo_space / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu", "a free Space has no GPU"
    assert lines[1:] == [f"{name}=={version}" for name, version in pins.items()]
    assert f"{pins['torch']}+cpu" in text, "the comment names the version that is pinned"


def test_the_manifest_lists_every_file(demo_space: Path) -> None:
    listed = json.loads((demo_space / "manifest.json").read_text())["files"]
    there = {p.relative_to(demo_space).as_posix(): p for p in demo_space.rglob("*") if p.is_file()}
    assert listed.keys() == there.keys() - {"manifest.json"}
    assert all(hashlib.sha256(there[name].read_bytes()).hexdigest() == file["sha256"] for name, file in listed.items())


def test_the_package_in_it_is_whole(demo_space: Path) -> None:
    """Every file that a wheel would hold."""
    package = Path(resmol.__file__).parent
    ours = {p.relative_to(package) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    theirs = {p.relative_to(demo_space / "resmol") for p in (demo_space / "resmol").rglob("*") if p.is_file()}
    assert ours == theirs


def test_it_starts_from_its_folder(demo_space: Path, demo_run: Path, tmp_path: Path) -> None:
    space = Path(shutil.copytree(demo_space, tmp_path / "space"))
    heading = space / "resmol" / "demo" / "templates" / "demo_heading.html.j2"
    heading.write_text(heading.read_text().replace("<h1>", "<h1>from the folder: "))
    with demo_process([sys.executable, "app.py"], tmp_path, cwd=space, env=environment()) as served:
        assert "from the folder: tiny-run" in httpx.get(f"{served.url}/config", timeout=HANGS).text
        said = final_text(ask(served.url, ["ka", 8, 0.0, 1, 0, 0, False, 1.0]))
    assert said == "ka" + load_model(demo_run).generate("ka", max_new_tokens=8, temperature=0.0)


def test_on_the_hub_it_can_be_framed(demo_space: Path, tmp_path: Path) -> None:
    there = environment() | {"SPACE_ID": "owner/name", "GRADIO_SERVER_NAME": "127.0.0.1"}
    with demo_process([sys.executable, "app.py"], tmp_path, cwd=demo_space, env=there) as served:
        headers = httpx.get(served.url, timeout=HANGS).headers
        assert "frame-ancestors https://huggingface.co" in headers["content-security-policy"]


def test_without_its_weights_it_does_not_start(demo_space: Path, tmp_path: Path) -> None:
    space = Path(shutil.copytree(demo_space, tmp_path / "space"))
    weights = space / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = subprocess.run([sys.executable, "app.py"], cwd=space, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "http://" not in done.stdout


def test_weights_in_a_repository_of_their_own(demo_run: Path, tmp_path: Path) -> None:
    space = export_space(demo_run, tmp_path / "space", model_repo="owner/name").path
    assert not (space / "model" / "model.safetensors").exists()
    assert (front_matter(space)["models"], front_matter(space)["preload_from_hub"]) == (["owner/name"], ["owner/name"])
    assert 'serve_space(Path(__file__).resolve().parent, model="owner/name")' in (space / "app.py").read_text()
    for bad in ("name", "a/b/c", 'a/b")', "../x"):
        with pytest.raises(UsageError, match="does not name a repository"):
            export_space(demo_run, tmp_path / "other", model_repo=bad)
    with pytest.raises(UsageError, match="exists already"):
        export_space(demo_run, tmp_path / "space")


@pytest.mark.slow
def test_it_starts_in_a_clean_environment(demo_space: Path, tmp_path: Path) -> None:
    """As a stranger would: a new virtual environment, its requirements and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-r", demo_space / "requirements.txt"]
    subprocess.run(install, check=True, env=environment())
    with demo_process([str(python), "app.py"], tmp_path, cwd=demo_space, env=environment()) as served:
        assert final_text(ask(served.url, ["ka", 8, 0.8, 1, 0, 0, False, 1.0])).startswith("ka")


def test_weights_from_elsewhere_get_no_licence_from_a_space(demo_space: Path, tmp_path: Path) -> None:
    """The card in its model/ leaves the licence to their source; so must the Space around it."""
    assert "license" not in front_matter(demo_space)
    space = export_space(demo_space / "model", tmp_path / "space").path
    assert not (space / "model" / "LICENSE").exists()
    assert "license" not in front_matter(space)
