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
from lora_driver import TOWER_LAYERS, examples

pytestmark = pytest.mark.slow

KINDS = ("26b", "e2b")
NAMES = [example.name for example in examples()]
# Of log probabilities, which the merged weights change by over ten times as much.
TOLERANCE = 1e-4
Answers = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def lora_answers(
    checkpoint: Callable[[str], Path],
    run_driver: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """What the driver wrote for a kind; it runs once for each."""
    root = tmp_path_factory.mktemp("lora")

    @functools.cache
    def run(kind: str) -> dict[str, Any]:
        out = run_driver("lora_driver.py", checkpoint(kind), root / kind)
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of the prompt's log probabilities."""
    pair = (np.array(record["prompt_logprobs"]) for record in (one, other))
    return float(np.abs(np.subtract(*pair)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_has_every_layer(kind: str, lora_answers: Answers) -> None:
    """The adapter names the tower's seven projections and the connector."""
    layers = lora_answers(kind)["layers"]
    pattern = r"model\.vision_tower\.encoder\.layers\.\d\.\w+\.(\w+)\.linear"
    found = Counter(
        match[1] for layer in layers if (match := re.fullmatch(pattern, layer))
    )
    assert found == dict.fromkeys(TOWER_LAYERS, 3)
    rest = [layer for layer in layers if not re.fullmatch(pattern, layer)]
    assert rest == ["model.embed_vision.embedding_projection"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_merged_weights(kind: str, name: str, lora_answers: Answers) -> None:
    """With the adapter all numbers are those of the merged checkpoint."""
    result = lora_answers(kind)
    lora, merged = result["lora"][name], result["merged"][name]
    assert lora["token_ids"] == merged["token_ids"]
    assert distance(lora, merged) < TOLERANCE
    if name == "text":
        assert distance(lora, result["base"][name]) < TOLERANCE
    else:
        assert distance(lora, result["base"][name]) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", ["even", "odd"])
def test_mixed_batch(kind: str, adapted: str, lora_answers: Answers) -> None:
    """With the adapter for every other request each gets its own numbers."""
    result = lora_answers(kind)
    for index, name in enumerate(NAMES):
        own = "lora" if index % 2 == (adapted == "odd") else "base"
        found, expected = result[adapted][name], result[own][name]
        assert found["token_ids"] == expected["token_ids"], (name, own)
        assert distance(found, expected) < TOLERANCE, (name, own)
