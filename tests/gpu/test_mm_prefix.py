# SPDX-License-Identifier: Apache-2.0
"""FlashAttention's bidirectional images against Triton's, through whole engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
elif torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("heads of 512 in FlashAttention need Hopper", allow_module_level=True)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each backend's engine answered to the same requests."""
    from scripts import tiny_gemma4

    root = tmp_path_factory.mktemp("soak")
    # Real head sizes and a window that images are wider than.
    text = {"head_dim": 256, "global_head_dim": 512, "sliding_window": 128}
    path = tiny_gemma4.build(root / "31b", "31b", dtype="float16", text=text)
    found = {}
    for backend in ("FLASH_ATTN", "TRITON_ATTN"):
        out = root / f"{backend}.json"
        command = [str(Path(__file__).with_name("driver.py")), str(path), str(out)]
        subprocess.run(
            [sys.executable, *command, backend],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.getenv('PYTHONPATH', '')}",
            },
            check=True,
            timeout=900,
        )
        found[backend] = json.loads(out.read_text())
    return found


def test_soak(answers: dict[str, dict[str, Any]]) -> None:
    """Over 500 mixed requests greedy tokens are the same, save at ties.

    At a tie both engines hold the two tokens for as good as equal: no further apart
    than twice what rounding moved any probability where they agree. Each is printed.
    """
    flash, triton = answers["FLASH_ATTN"], answers["TRITON_ATTN"]
    assert all(name.startswith("FLASH_ATTN") for name in flash["backends"])
    assert all(name.startswith("TRITON_ATTN") for name in triton["backends"])
    assert len(flash["answers"]) >= 500

    rounding = 0.0
    ties = []
    for ours, theirs in zip(flash["answers"], triton["answers"], strict=True):
        assert ours["prompt_tokens"] == theirs["prompt_tokens"]
        steps = zip(
            ours["tokens"],
            theirs["tokens"],
            ours["candidates"],
            theirs["candidates"],
            strict=True,
        )
        for position, (a, b, mine, other) in enumerate(steps):
            if a != b:
                ties.append((ours["name"], position, str(a), str(b), mine, other))
                break  # what follows answers another prompt
            moved = abs(mine[str(a)] - other[str(a)])
            rounding = max(rounding, moved)
    tokens = sum(len(answer["tokens"]) for answer in flash["answers"])
    print(f"\n{flash['backends']} against {triton['backends']}")
    print(f"{tokens} tokens, rounding moves a log probability by {rounding:.4f}")
    assert rounding < 0.1
    for name, position, a, b, mine, other in ties:
        gap = mine[a] - mine.get(b, -99.0), other[b] - other.get(a, -99.0)
        print(f"tie: request {name}, token {position}: {a} or {b}, gaps {gap}")
        assert max(gap) <= 2 * rounding, (name, position, gap)
    hits = sum(answer["cached_tokens"] > 0 for answer in flash["answers"])
    print(f"{hits} requests began in the prefix cache")
    assert hits > 50
