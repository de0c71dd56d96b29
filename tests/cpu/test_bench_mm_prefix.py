# SPDX-License-Identifier: Apache-2.0
"""The host's part of image attention: its benchmark runs, and says by how much."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_mm_prefix


@pytest.mark.slow
def test_builder_ran(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    # It sets them where they are not: not for other tests.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    out = tmp_path / "out.jsonl"
    assert bench_mm_prefix.main(["builder", "--repeat", "3", "--json", str(out)]) == 0
    cases: dict[str, dict[str, Any]] = {}
    for line in out.read_text().splitlines():
        record = json.loads(line)
        cases.setdefault(record["case"], {})[record["variant"]] = record["median"]
    assert list(cases) == ["256 decodes, text", "1008 decodes, 16 prefills"]
    for name, medians in cases.items():
        assert all(median > 0 for median in medians.values())
        for part, old in (("find", "find"), ("cut", "fill")):
            ratio = medians[f"{part}, patched"] / medians[f"{old}, release"]
            print(f"{name}: {part} takes {ratio:.3f} of the release's time")
            record_property(f"{name}, {part} over release", ratio)
