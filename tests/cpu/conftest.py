# SPDX-License-Identifier: Apache-2.0
"""Engines, references and the unpatched tree for the tests on CPU.

They run with the interpreter that imports the patched tree: each engine is a
process of its own (``driver.py``) that answers everything at once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if any(importlib.util.find_spec(name) is None for name in ("torch", "vllm")):
    collect_ignore_glob = ["test_*.py"]

Answers = Callable[[str, str], dict[str, Any]]
RunDriver = Callable[..., Path]

# What to run an engine with, by the name of the variant.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TWO_WORKERS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "in-process": ({}, IN_PROCESS),
    "subprocess": ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    "tp2": ({"tensor_parallel_size": 2}, TWO_WORKERS),
    "tp2 data": (
        {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
        TWO_WORKERS,
    ),
    "compiled": (
        {
            "enforce_eager": False,
            "compilation_config": {"compile_mm_encoder": True},
        },
        IN_PROCESS,
    ),
    "unpatched": ({}, IN_PROCESS),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts an engine")


@pytest.fixture(scope="session")
def unpatched_tree() -> Path:
    """A directory with the ``vllm`` package of the release, without the patches."""
    from scripts import unpatched

    return unpatched.unpatched_tree()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the tiny checkpoint of a kind, once."""
    from scripts import tiny_gemma4

    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda kind: tiny_gemma4.build(root / kind, kind))


@pytest.fixture(scope="session")
def run_driver() -> RunDriver:
    """Run one of this directory's scripts, to its end, in a process of its own.

    It is given the checkpoint, the path ``out`` and further arguments, and is to
    write ``out`` with the suffix ``.json``; that path is returned. What it prints is
    kept beside it. One that failed is not tried again.
    """
    failed: set[Path] = set()

    def run(
        script: str,
        checkpoint: Path,
        out: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> Path:
        if out in failed:
            pytest.fail(f"{out.name}: it failed before, see above", pytrace=False)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        with open(out.with_suffix(".log"), "w+") as log:
            process = subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).with_name(script)),
                    str(checkpoint),
                    str(out),
                    *arguments,
                ],
                env={
                    **os.environ,
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": path,
                    **(environment or {}),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=600,
            )
            if process.returncode:
                failed.add(out)
                log.seek(0)
                pytest.fail(f"{out.name}:\n{log.read()[-5000:]}", pytrace=False)
        return out.with_suffix(".json")

    return run


@pytest.fixture(scope="session")
def answers(
    checkpoint: Callable[[str], Path],
    run_driver: RunDriver,
    unpatched_tree: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Answer the driver's requests with a kind and a variant, once for each pair."""
    root = tmp_path_factory.mktemp("answers")

    @functools.cache
    def run(kind: str, variant: str) -> dict[str, Any]:
        import numpy as np

        engine, environment = VARIANTS[variant]
        arguments = ["--engine", json.dumps(engine)]
        if variant == "unpatched":
            arguments += ["--tree", str(unpatched_tree)]
        out = run_driver(
            "driver.py",
            checkpoint(kind),
            root / f"{kind}-{variant}",
            *arguments,
            environment=environment,
        )
        result: dict[str, Any] = json.loads(out.read_text())
        if variant == "unpatched":
            assert Path(result["tree"]).samefile(unpatched_tree)
        else:
            assert not Path(result["tree"]).samefile(unpatched_tree) or os.environ.get(
                "VLLM_BASE_TREE"
            ), "the unpatched tree was imported in place of the patched one"
        # Models that cannot fall back to the default.
        mode = engine.get("mm_encoder_tp_mode", "weights")
        assert result["mm_encoder_tp_mode"] == mode
        if out.with_suffix(".npz").exists():
            result["features"] = dict(np.load(out.with_suffix(".npz")))
        return result

    return run
