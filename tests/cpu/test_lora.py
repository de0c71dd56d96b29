# SPDX-License-Identifier: Apache-2.0
"""A LoRA on the vision tower and the connector against merged weights."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IN_PROCESS, TWO_WORKERS
from lora_driver import TOWER_LAYERS, examples

pytestmark = pytest.mark.slow

NAMES = [example.name for example in examples()]
# Of log probabilities, which the merged weights change by over ten times as much.
TOLERANCE = 1e-4
Answers = Callable[[str, int], dict[str, Any]]
engines = pytest.mark.parametrize("kind,ranks", [("26b", 1), ("e2b", 1), ("26b", 2)])


@pytest.fixture(scope="module")
def lora_answers(
    checkpoint: Callable[[str], Path],
    run_driver: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """What the driver wrote for a kind on so many ranks; it runs once for each."""
    root = tmp_path_factory.mktemp("lora")

    @functools.cache
    def run(kind: str, ranks: int) -> dict[str, Any]:
        out = run_driver(
            "lora_driver.py",
            checkpoint(kind),
            root / f"{kind}-{ranks}",
            str(ranks),
            environment=IN_PROCESS if ranks == 1 else TWO_WORKERS,
        )
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of the prompt's log probabilities."""
    pair = (np.array(record["prompt_logprobs"]) for record in (one, other))
    return float(np.abs(np.subtract(*pair)).max())


@engines
def test_adapter_has_every_layer(kind: str, ranks: int, lora_answers: Answers) -> None:
    """The adapter names the tower's seven projections and the connector."""
    layers = lora_answers(kind, ranks)["layers"]
    pattern = r"model\.vision_tower\.encoder\.layers\.\d\.\w+\.(\w+)\.linear"
    found = Counter(
        match[1] for layer in layers if (match := re.fullmatch(pattern, layer))
    )
    assert found == dict.fromkeys(TOWER_LAYERS, 3)
    rest = [layer for layer in layers if not re.fullmatch(pattern, layer)]
    assert rest == ["model.embed_vision.embedding_projection"]


@engines
@pytest.mark.parametrize("name", NAMES)
def test_equals_merged_weights(
    kind: str, ranks: int, name: str, lora_answers: Answers
) -> None:
    """With the adapter all numbers are those of the merged checkpoint."""
    result = lora_answers(kind, ranks)
    lora, merged = result["lora"][name], result["merged"][name]
    assert lora["token_ids"] == merged["token_ids"]
    assert distance(lora, merged) < TOLERANCE
    if name == "text":
        assert distance(lora, result["base"][name]) < TOLERANCE
    else:
        assert distance(lora, result["base"][name]) > 100 * TOLERANCE


@engines
@pytest.mark.parametrize("adapted", ["even", "odd"])
def test_mixed_batch(
    kind: str, ranks: int, adapted: str, lora_answers: Answers
) -> None:
    """With the adapter for every other request each gets its own numbers."""
    result = lora_answers(kind, ranks)
    for index, name in enumerate(NAMES):
        own = "lora" if index % 2 == (adapted == "odd") else "base"
        found, expected = result[adapted][name], result[own][name]
        assert found["token_ids"] == expected["token_ids"], (name, own)
        assert distance(found, expected) < TOLERANCE, (name, own)
