# SPDX-License-Identifier: Apache-2.0
"""An interrupt in the middle of each command that test_apply and others have not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COUNTED, TREE, Toy, copied, make_toy, release, saboteur, sdist
from test_build import MORE, make_theirs
from test_lint import CONFIG, HOOK
from test_report import head, layer
from toy_wheel import pin, series, sha256

# Ends a command of this project at its nth change of a file.
SPOIL = f"""{COUNTED}
import os, pathlib, shutil, sys
left = int(os.environ["SPOIL_NTH"])
def end(name):
    open(os.environ["SPOIL_HIT"], "w").close()
    os.kill(os.getpid(), int(os.environ["SPOIL_SIGNAL"]))
if any(word.startswith("scripts.") for word in sys.orig_argv):
    for name in ("replace", "rename", "mkdir", "write_text"):
        spoil(pathlib.Path, name)
    for name in ("move", "copy2"):
        spoil(shutil, name)
"""
SIGNALS = {"INT": "2", "TERM": "15"}


def test_while_modules_are_imported(toy: Toy) -> None:
    """And what else can go wrong there is shown as it is."""
    module = toy.root / "scripts" / "pins.py"
    text = module.read_text()
    module.write_text("raise KeyboardInterrupt\n" + text)
    ended = toy.run("apply", ok=None)
    line = "interrupted: nothing is lost, run the same command again\n"
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, line, "")
    code = "import scripts; raise {}"
    for error, status in (("KeyboardInterrupt", 130), ("ValueError('so')", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(error)],
            cwd=toy.root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status
        assert ("Traceback" in done.stderr) == (status == 1)
    assert done.stderr.endswith("\nValueError: so\n")


@pytest.mark.parametrize("nohup", [True, False])
def test_closed_terminal(toy: Toy, nohup: bool) -> None:
    """The shell tells of it, too, while what was started is being ended."""
    code = (
        "import os, signal\n"
        "from scripts import console\n"
        "def main() -> None:\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        print('goes on')\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        print('ended')\n"
        "console.run(main)\n"
    )
    done = subprocess.run(
        [*(["nohup"] if nohup else []), sys.executable, "-c", code],
        cwd=toy.root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if nohup:
        assert (done.returncode, done.stdout) == (0, "goes on\nended\n")
    else:
        assert (done.returncode, done.stdout) == (130, "ended\n")
        assert done.stderr.startswith("interrupted: nothing is lost")


@pytest.mark.parametrize("name", ["build", "build/cache", "patches"])
def test_link_to_nowhere(filled: Toy, name: str) -> None:
    path = filled.root / name
    path.rename(path.with_name("was"))
    path.symlink_to("gone")
    line = "is a link to gone, which is not there: make that folder, or remove the link"
    if name == "build/cache":
        filled.reset()
    said = filled.fails("export" if name == "patches" else "apply")
    assert said == f"error: {name} {line}"


def _plain(base: Path) -> Toy:
    toy = make_toy(base)
    toy.series()
    release(toy, "v1.1.0", TREE | {"vllm/a.py": TREE["vllm/a.py"] + "more = 1\n"})
    return toy


def _export(base: Path) -> Toy:
    toy = _plain(base)
    toy.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More")
    return toy


def _lint(base: Path) -> Toy:
    toy = make_toy(base)
    path = toy.root / "build" / "cache" / "vllm-1.0.0.tar.gz"
    pins = toy.root / "pins.toml"
    more = {".pre-commit-config.yaml": CONFIG, "tools/bad.py": HOOK}
    was, now = sha256(path), sdist(path, TREE | more)
    pins.write_text(pins.read_text().replace(was, now))
    toy.run("apply")
    toy.change("vllm/a.py", "a10 = 10\n", 'a10 = "ten"\n', "Name ten")
    toy.run("export")
    return toy


def _build(base: Path) -> Toy:
    toy = make_toy(base)
    python = make_theirs(toy, base, TREE | MORE)
    toy.series()
    # For a copy of the folder: relative to the project.
    toy.env["PYTHON"] = os.path.relpath(python, toy.root)
    return toy


def _test(base: Path) -> Toy:
    toy = _build(base)
    # Of those tools that run this there is pytest.
    site = next((base / "their env").glob("lib/python3*/site-packages"))
    own = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "tools.pth").write_text(own + "\n")
    tests = toy.root / "tests" / "cpu"
    tests.mkdir(parents=True)
    (tests / "test_x.py").write_text("import vllm.a\n\ndef test_x(): pass\n")
    return toy


def _report(base: Path) -> Toy:
    """Results of which there is no plot, for that needs another environment."""
    toy = _plain(base)
    folder = toy.root / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    record = {"job": "host"} | layer("256 decodes", "find, patched", 71.0)
    lines = [json.dumps(line) + "\n" for line in (head("host"), record)]
    (folder / "gpu.jsonl").write_text("".join(lines))
    folder.with_suffix(".md").write_text("# As it was\n")
    return toy


def _wheel(base: Path) -> Toy:
    toy = make_toy(base)
    pin(toy)
    series(toy)
    return toy


BUMP: dict[str, Any] = {"DEVICE": "cpu", "MACHINE": "x86_64", "BUMP": "1"}
# The verb of each, what makes a project for it and what it is given.
VERBS: dict[str, tuple[str, Callable[[Path], Toy], dict[str, Any]]] = {
    "export": ("export", _export, {}),
    "build": ("build", _build, {}),
    "test": ("test", _test, {"STAGE": "cpu"}),
    "report": ("report", _report, {}),
    "lint": ("lint", _lint, {"STAGE": "patches"}),
    "status": ("status", _plain, {}),
    "wheel": ("wheel", _wheel, BUMP | {"BUMP": ""}),
    "wheel BUMP=1": ("wheel", _wheel, BUMP),
}


@pytest.fixture(scope="module", params=VERBS)
def _made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any], Toy]:
    """A project before a verb, and the same after it."""
    verb, make, env = VERBS[request.param]
    base = tmp_path_factory.mktemp("before")
    toy = make(base)
    if request.param == "wheel":
        toy.run("wheel", **BUMP)
    done = copied(base, tmp_path_factory.mktemp("after"))
    done.env = toy.env
    done.run(verb, **env)
    return verb, base, env | toy.env, done


def state(toy: Toy) -> dict[str, Any]:
    """What a person has and could lose."""
    return {
        "patches": {path.name: path.read_bytes() for path in toy.patches.iterdir()},
        "pins": (toy.root / "pins.toml").read_text(),
        "heads": toy.git("for-each-ref", "refs/heads"),
        "status": toy.git("status", "--porcelain"),
        "head": (toy.own / ".git/HEAD").read_text(),
        "pages": {p.name: p.read_text() for p in toy.root.glob("docs/*.md")},
        "wheels": {p.name: sha256(p) for p in toy.root.glob("build/wheels/*")},
    }


@pytest.mark.parametrize("kill", SIGNALS)
@pytest.mark.parametrize("at", ["git", "files"])
def test_interrupted(
    _made: tuple[str, Path, dict[str, Any], Toy], tmp_path: Path, kill: str, at: str
) -> None:
    verb, base, env, done = _made
    if (verb, at) == ("report", "git"):
        pytest.skip("it asks git nothing")
    wanted = state(done)
    hits = 0
    for nth in (3, 9, 20) if at == "git" else (2, 5, 8):
        toy = copied(base, tmp_path / str(nth))
        before = state(toy)
        spoilt = tmp_path / str(nth) / "spoilt"
        spoilt.mkdir()
        hit = spoilt / "hit"
        if at == "git":
            folder = saboteur(spoilt, nth, kill, ":")
            hit = folder / "hit"
            more = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        else:
            (spoilt / "sitecustomize.py").write_text(SPOIL)
            more = {"PYTHONPATH": str(spoilt), "SPOIL_NTH": str(nth)}
            more |= {"SPOIL_HIT": str(hit), "SPOIL_SIGNAL": SIGNALS[kill]}
        ended = toy.run(verb, ok=None, **(env | more))
        if not hit.exists():
            assert ended.returncode == 0, ended.stderr
            break
        hits += 1
        line = ended.stderr.splitlines()[-1]
        assert ended.returncode == 130, (nth, ended.stderr)
        assert line == "interrupted: nothing is lost, run the same command again"
        # Each thing is as it was or as it will be.
        now = state(toy)
        for name, found in now.items():
            assert found in (before[name], wanted[name]), (nth, name)
        assert toy.run(verb, **env).returncode == 0
        assert state(toy) == wanted, nth
        assert not list((toy.root / "build").glob(".tmp-*"))
    assert hits >= 1
