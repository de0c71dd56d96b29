# SPDX-License-Identifier: Apache-2.0
"""Bidirectional attention within images, wherever they lie, against Hugging Face."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import TOKENS
from mm_prefix_driver import (
    BLOCK_SIZE,
    FEW_TOKENS,
    SMALL_WINDOW,
    cached_requests,
    requests,
)
from reference import Reference

pytestmark = pytest.mark.slow

Answers = Callable[[str], dict[str, Any]]
References = Callable[[str], Reference]
Spans = Callable[[list[int]], list[tuple[int, int]]]

ENGINES = ["one step", "many steps"]


@pytest.fixture(scope="module")
def engine_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """With many steps a checkpoint whose window is smaller than an image."""
    from scripts import tiny_gemma4

    root = tmp_path_factory.mktemp("mm_prefix")

    def build(engine: str) -> Path:
        if engine == "one step":
            return checkpoint("26b")
        text = {"sliding_window": SMALL_WINDOW}
        return tiny_gemma4.build(root / "small-window", "26b", text=text)

    return build


@pytest.fixture(scope="module")
def mm_prefix_answers(
    engine_checkpoint: Callable[[str], Path],
    run_driver: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """What the driver wrote for an engine; it runs once for each."""
    root = tmp_path_factory.mktemp("mm_prefix-answers")

    @functools.cache
    def run(engine: str) -> dict[str, Any]:
        out = root / engine.replace(" ", "-")
        path = engine_checkpoint(engine)
        out = run_driver("mm_prefix_driver.py", path, out, engine)
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


@pytest.fixture(scope="module")
def reference(engine_checkpoint: Callable[[str], Path]) -> References:
    return functools.cache(lambda engine: Reference(engine_checkpoint(engine)))


@pytest.fixture(scope="module")
def spans(reference: References) -> Spans:
    """Find the first and last position of each image and frame of a prompt."""
    config = reference("one step").model.config
    vision = {config.image_token_id, config.video_token_id}

    def find(prompt: list[int]) -> list[tuple[int, int]]:
        found = []
        runs = itertools.groupby(range(len(prompt)), lambda i: prompt[i] in vision)
        for inside, run in runs:
            positions = list(run)
            if inside:
                found.append((positions[0], positions[-1]))
        return found

    return find


def ends_of_steps(record: dict[str, Any]) -> list[int]:
    """Where the steps that computed a prompt ended, but for the last one."""
    prompt = len(record["prompt_token_ids"])
    ends = itertools.accumulate(record["chunks"], initial=record["cached_tokens"])
    return [end for end in ends if record["cached_tokens"] < end < prompt]


def assert_whole(record: dict[str, Any], spans: Spans) -> None:
    """No step ended inside an image."""
    assert max(record["chunks"]) <= FEW_TOKENS
    for end in ends_of_steps(record):
        for first, last in spans(record["prompt_token_ids"]):
            assert not first < end <= last


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("example", requests(), ids=lambda example: example.name)
def test_equals_hugging_face(
    engine: str, example: Any, mm_prefix_answers: Answers, reference: References
) -> None:
    record = mm_prefix_answers(engine)["alone"][example.name]
    assert len(record["token_ids"]) == TOKENS
    reference(engine).check(example, record)


@pytest.mark.parametrize("engine", ["one step", "many steps"])
def test_batch(
    engine: str, mm_prefix_answers: Answers, reference: References, spans: Spans
) -> None:
    """All requests at once answer as each would alone."""
    result = mm_prefix_answers(engine)
    for example in requests():
        together = result["together"][example.name]
        if engine == "many steps":
            assert_whole(together, spans)
        reference(engine).check(example, together)
        for key in ("prompt_logprobs", "logprobs"):
            np.testing.assert_allclose(
                together[key],
                result["alone"][example.name][key],
                rtol=0,
                atol=1e-4,
                err_msg=f"{example.name}: {key}",
            )


@pytest.mark.parametrize(
    "examples", cached_requests(), ids=lambda examples: examples[1].name
)
def test_prefix_cache(
    examples: tuple[Any, Any],
    mm_prefix_answers: Answers,
    reference: References,
    spans: Spans,
) -> None:
    """What is left of an image, by a cache hit inside it, answers as all of it."""
    record = mm_prefix_answers("many steps")["cached"][examples[1].name]
    ((start, end),) = spans(record["prompt_token_ids"])
    hit = record["cached_tokens"]
    assert start < hit <= end
    assert hit % BLOCK_SIZE == 0
    if examples[1].name == "hit at the start":
        assert hit < start + 10
    elif examples[1].name == "hit in the middle":
        assert end - hit > SMALL_WINDOW + 10
    elif examples[1].name == "hit before the end":
        assert hit < end < hit + 10
    else:
        assert hit == end
    reference("many steps").check(examples[1], record)


def test_prefix_cache_in_batch(
    mm_prefix_answers: Answers, reference: References, spans: Spans
) -> None:
    """So does it beside a request that leaves too little room in the step."""
    for _, example in cached_requests():
        record = mm_prefix_answers("many steps")["beside"][example.name]
        assert record["cached_tokens"] > 0
        assert_whole(record, spans)
        reference("many steps").check(example, record)


def test_steps(
    mm_prefix_answers: Answers,
    spans: Spans,
) -> None:
    """Text is split, images are not; with one step nothing is."""
    for record in mm_prefix_answers("one step")["together"].values():
        assert record["chunks"][0] == len(record["prompt_token_ids"])
    result = mm_prefix_answers("many steps")
    records = result["alone"] | result["cached"]
    for record in records.values():
        assert_whole(record, spans)
    # In the text before the image, right before it and twice in the text after it.
    long = records["long"]
    ((first, last),) = spans(long["prompt_token_ids"])
    ends = ends_of_steps(long)
    assert ends[:2] == [FEW_TOKENS, first - 1]
    assert sum(last < end for end in ends) >= 2
    assert len(ends_of_steps(records["images"])) == 2


def test_requests_cover_what_they_should(
    mm_prefix_answers: Answers,
    spans: Spans,
) -> None:
    """Images next to each other, at both ends, as wide as the window and wider."""
    prompts = {
        name: record["prompt_token_ids"]
        for name, record in mm_prefix_answers("many steps")["alone"].items()
    }
    # Around each image there are the tokens for its begin and end.
    assert spans(prompts["first"])[0][0] == 2
    assert spans(prompts["last"])[0][1] == len(prompts["last"]) - 2
    one, two, three = spans(prompts["images"])
    assert two[0] - one[1] == 3
    assert three[0] - two[1] > 20
    assert len({end - start for start, end in (one, two, three)}) == 3
    widths = {
        end + 1 - start for prompt in prompts.values() for start, end in spans(prompt)
    }
    assert {SMALL_WINDOW - 2, SMALL_WINDOW, SMALL_WINDOW + 1} <= widths
    assert max(widths) > 4 * SMALL_WINDOW
    assert len(spans(prompts["video"])) == 4
    assert len(spans(prompts["video, image"])) == 3
