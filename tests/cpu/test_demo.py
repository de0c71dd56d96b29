# SPDX-License-Identifier: Apache-2.0
"""The demo, as ``make demo`` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_all_is_shown(kind: str, lines: list[str]) -> None:
    for example in ("text", "one image", "two images", "video"):
        assert any(line.startswith(f"{kind}: {example}: ") for line in lines)
    assert sum(line.startswith(f"{kind}:   image ") for line in lines) == 3
    assert sum(line.startswith(f"{kind}:   frame ") for line in lines) == 4


@pytest.mark.slow
def test_right_features() -> None:
    process = run(
        "from scripts.demo import main; raise SystemExit(main(['--kind', '26b']))"
    )
    assert process.returncode == 0, process.stderr[-5000:]
    lines = process.stdout.splitlines()
    assert_all_is_shown("26b", lines)
    assert lines[-1].startswith("demo: done in ")
    # The engine's logs are kept unless something fails.
    assert len(lines) < 20 and not process.stderr


@pytest.mark.slow
def test_wrong_features() -> None:
    """A pooled feature that is off by a little is an error and a status."""
    process = run(
        "import scripts.demo as demo\n"
        "right = demo.reference_features\n"
        "def wrong(*args):\n"
        "    return [item + 2e-3 for item in right(*args)]\n"
        "demo.reference_features = wrong\n"
        "raise SystemExit(demo.main(['--kind', 'e2b']))\n"
    )
    assert process.returncode == 1
    # To two digits: but for what was added they are right.
    assert "features differ by 2.0e-03" in process.stderr.splitlines()[-1]
    assert_all_is_shown("e2b", process.stdout.splitlines())


@pytest.mark.slow
def test_interrupted(tmp_path: Path) -> None:
    """With an engine, whose process group has a hook: a line, and nothing is left."""
    process = run(
        "import os, signal\n"
        "import scripts.demo as demo\n"
        "demo.reference_features = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "demo.main(['--kind', '26b'])\n",
        TMPDIR=str(tmp_path),
    )
    assert process.returncode == 130
    said = process.stderr.splitlines()[-1]
    assert said == "interrupted: nothing is lost, run the same command again"
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("**/*.safetensors"))
