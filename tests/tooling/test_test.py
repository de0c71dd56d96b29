# SPDX-License-Identifier: Apache-2.0
"""Running tests, and the Makefile around it all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import OURS, ROOT, Toy
from test_rebase import confined

sys.path.insert(0, str(ROOT))

from scripts import console, pins, series
from scripts import test as runner

TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 0, "the reason"
def test_skipped(): pytest.skip("no")
@pytest.mark.xfail
def test_expected(): assert 0
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
"""


def tooling(toy: Toy, text: str) -> None:
    folder = toy.root / "tests" / "tooling"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_x.py").write_text(text)


def test_counts_and_shows_failures(toy: Toy) -> None:
    tooling(toy, TESTS)
    done = toy.run("test", ok=None, STAGE="tooling")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 passed, 2 failed, 2 skipped"
    assert "the reason" in done.stderr and "::test_bad" in done.stderr


def test_quiet_when_all_is_well(toy: Toy) -> None:
    tooling(toy, "def test_good(): print('noise')\n")
    done = toy.run("test", STAGE="tooling")
    assert done.stdout == "1 passed, 0 failed, 0 skipped\n"
    assert "noise" not in done.stderr


def test_args(toy: Toy) -> None:
    tooling(toy, TESTS)
    done = toy.run("test", STAGE="tooling", ARGS="-k 'good or skipped'")
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"


def test_a_crash_is_a_failure(toy: Toy) -> None:
    tooling(toy, "import os\ndef test_crash(): os._exit(7)\n")
    done = toy.run("test", ok=None, STAGE="tooling")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt(toy: Toy, tmp_path: Path, sent: signal.Signals) -> None:
    """What a test started ends with it."""
    pid = tmp_path / "pid"
    code = f"echo $$ > {pid}.new && mv {pid}.new {pid} && exec sleep 600"
    text = f'import subprocess\n\ndef test_slow(): subprocess.run("{code}", shell=True)'
    tooling(toy, text + "\n")
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.test"],
        cwd=toy.root,
        env=toy.environ(STAGE="tooling"),
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        for _ in range(600):
            if pid.exists():
                break
            time.sleep(0.1)
        running.send_signal(sent)
        try:
            _, said = running.communicate(timeout=30)
        finally:
            running.kill()  # or leaving waits for it
    assert running.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted: nothing is lost")
    # Killed, it may have to be waited for by what has no part in this.
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what a test started is still there")


def test_nothing_run_is_a_failure(toy: Toy) -> None:
    tooling(toy, "")
    assert toy.run("test", ok=None, STAGE="tooling").returncode == 1


def test_unknown_stage(toy: Toy) -> None:
    assert "STAGE=slow is unknown" in toy.fails("test", STAGE="slow")


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("DEVICE", "tpu", "DEVICE=tpu is unknown: give cpu or cuda"),
        ("ARGS", '-k "x', 'ARGS=-k "x (No closing quotation): mend it'),
    ],
)
def test_what_is_wrong_is_said_first(toy: Toy, name: str, said: str, line: str) -> None:
    tooling(toy, "def test_good(): pass\n")
    for stage in ("", "tooling", "cpu"):
        done = toy.run("test", ok=False, STAGE=stage, **{name: said})
        assert done.stderr == f"error: {line}\n"
    assert not toy.own.exists() and not (toy.root / "build" / "reports").exists()


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this process may use, where the system tells."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4}, raising=False)
    assert console.cores() == 3
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(runner, "pytest", lambda *_, flags: asked.append(flags))
    runner.stage("tooling", pins.load(), None)
    assert asked[0][:2] == ("-n", "3")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert console.cores() == 5


def test_touched(filled: Toy) -> None:
    filled.change("tests/a/test_b.py", "", "# SPDX\n", "A test")
    filled.change("tests/a/utils.py", "", "# SPDX\n", "No test")
    filled.run("export")
    assert runner.touched(series.patches(filled.patches)) == ["tests/a/test_b.py"]


@pytest.mark.parametrize("tag", pins.tags())
def test_pins_are_whole(tag: str) -> None:
    release = pins.load(tag)
    assert len(release.base) == 40 and len(release.sdist.sha256) == 64
    for runtime in release.runtimes.values():
        assert runtime.wheels
        for wheel in runtime.wheels.values():
            assert len(wheel.sha256) == 64 and runtime.version in wheel.name
        held = ROOT / "scripts" / f"constraints-v{runtime.version}-{runtime.kind}.txt"
        rows = [row for row in held.read_text().splitlines() if row[:1] != "#"]
        assert all(row.count("==") == 1 for row in rows)


def make(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *args], cwd=cwd, env=clean | env, capture_output=True, text=True
    )


def test_variables() -> None:
    """What make exports is what tests must not inherit."""
    rows = re.findall(r"(?m)^export (.*)$", (ROOT / "Makefile").read_text())
    exported = set(" ".join(rows).split())
    assert {"RELEASE", "RESULTS"} < exported
    ends = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    assert exported | ends == OURS
    assert exported | ends | {"PYTHONPATH"} == runner._OWN


def test_make_lists_the_targets() -> None:
    said = make().stdout
    for target in (
        "apply",
        "build",
        "python",
        "demo",
        "test",
        "export",
        "lint",
        "rebase",
    ):
        assert f"\n  {target} " in said


# `tools`, which every other target needs, is not made for the second.
@pytest.mark.parametrize("words", [["tools"], ["-o", "tools", "report"]])
def test_old_python_is_refused(tmp_path: Path, words: list[str]) -> None:
    python = tmp_path / "a python"
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys, runpy; "
        "sys.version_info = (3, 10, 1); "
        'runpy.run_path("scripts/bootstrap.py", run_name="__main__")\'\n'
    )
    python.chmod(0o755)
    done = make(*words, f"PYTHON3={python}")
    assert done.returncode
    assert "is Python 3.10.1, 3.11 or newer is needed" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_python_is_refused() -> None:
    done = make("tools", "PYTHON3=no-such-python")
    assert "error: no no-such-python: install Python 3.11 or newer" in done.stderr


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The project as someone has just got it."""
    root = tmp_path / "project"
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("Makefile", "pins.toml", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.mark.parametrize("built", [False, True])
def test_read_only_project(fresh: Path, built: bool) -> None:
    if built:
        (fresh / "build").mkdir(mode=0o555)
    fresh.chmod(0o555)
    try:
        done = subprocess.run(
            [*confined(), "make", "apply", f"PYTHON3={sys.executable}"],
            cwd=fresh,
            capture_output=True,
            text=True,
        )
    finally:
        fresh.chmod(0o755)
    assert done.returncode and "Traceback" not in done.stderr
    path = fresh / "build" / (".tools.lock" if built else "")
    line = f"error: {path} cannot be read or written: check its owner, or work in a "
    assert done.stderr.splitlines()[0] == line + "copy of the project"


def test_build_that_is_a_link_to_nowhere(fresh: Path) -> None:
    (fresh / "build").symlink_to("gone")
    done = subprocess.run(
        [sys.executable, "scripts/bootstrap.py"],
        cwd=fresh,
        capture_output=True,
        text=True,
    )
    line = "is a link to gone, which is not there: make that folder, or remove the link"
    assert (done.returncode, done.stderr) == (1, f"error: {fresh / 'build'} {line}\n")


def test_no_space_for_the_tools(fresh: Path) -> None:
    code = (
        "import errno, pathlib, runpy\n"
        "def full(path, *args, **more):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', str(path))\n"
        "pathlib.Path.mkdir = full\n"
        "runpy.run_path('scripts/bootstrap.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fresh, capture_output=True, text=True
    )
    said = f"error: no space left for {fresh / 'build'}: free some and run this again\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_no_space() -> None:
    code = (
        "import errno\nfrom scripts import console\ndef main() -> None:\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', 'a file')\n"
        "console.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    said = "error: no space left for a file: free some and run this again\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_interrupted_before_the_tools(fresh: Path) -> None:
    # One that no Python has built in.
    (fresh / "subprocess.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "scripts/bootstrap.py"],
        cwd=fresh,
        env=os.environ | {"PYTHONPATH": str(fresh)},
        capture_output=True,
        text=True,
    )
    said = "interrupted: run the same command again\n"
    assert (done.returncode, done.stderr) == (130, said)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_tools(fresh: Path, kill: signal.Signals) -> None:
    """While pip runs; what it was making is made by the next run."""
    package = fresh / "nothing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(package, "w") as wheel:
        info = "nothing-1.0.dist-info"
        about = "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (fresh / "pyproject.toml").write_text(
        f"[dependency-groups]\ntools = [{json.dumps(str(package))}]\n"
    )
    command = [sys.executable, "scripts/bootstrap.py"]
    child = subprocess.Popen(
        command,
        cwd=fresh,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    python = fresh / "build" / "tools" / "bin" / "python"
    while not python.exists():
        time.sleep(0.1)
    child.send_signal(kill)
    said = child.communicate(timeout=60)
    made = "making build/tools (once, about half a minute)\n"
    assert said == ("", made + "interrupted: run the same command again\n")
    assert child.returncode == 130
    stamp = fresh / "build" / "tools" / "stamp"
    assert not stamp.exists()
    # Nothing that was started goes on in the folder.
    shutil.rmtree(fresh / "build" / "tools")
    time.sleep(1)
    assert not python.exists()
    subprocess.run(command, cwd=fresh, check=True)
    assert stamp.exists()


def test_checkpoint_of_diffusion_gemma(tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    source.mkdir()
    ids = {"boi_token_id": 1, "eoi_token_id": 2, "image_token_id": 3}
    config = ids | {"vision_config": {"a": 4}, "dtype": "float32", "audio_config": {}}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "model.safetensors"):
        (source / name).touch()
    for _ in range(2):
        path = runner._diffusion(source)
        assert sorted(f.name for f in path.iterdir()) == [
            "config.json",
            "processor_config.json",
        ]
    made = json.loads((path / "config.json").read_text())
    assert made["model_type"] == "diffusion_gemma" and "audio_config" not in made
    assert ids.items() <= made.items() and made["vision_config"] == {"a": 4}
