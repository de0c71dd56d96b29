# SPDX-License-Identifier: Apache-2.0
"""The patched tree's engine against Hugging Face and the unpatched tree."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import examples
from reference import TOLERANCE, Reference

from scripts import demo

pytestmark = pytest.mark.slow

KINDS = ("26b", "e2b")
BIDIRECTIONAL = ("26b",)
NAMES = [example.name for example in examples()]
Answers = Callable[[str, str], dict[str, Any]]

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores"
)
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="compiling the tower for CPU takes a C++ compiler",
)
# Two workers have an engine process as well: once is enough for it with one.
RUNS = [
    ("26b", "in-process"),
    ("e2b", "in-process"),
    ("26b", "subprocess"),
    pytest.param("26b", "tp2", marks=needs_two_cores),
    pytest.param("e2b", "tp2", marks=needs_two_cores),
    pytest.param("26b", "tp2 data", marks=needs_two_cores),
    pytest.param("26b", "compiled", marks=needs_compiler),
    pytest.param("e2b", "compiled", marks=needs_compiler),
]


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    return functools.cache(lambda kind: Reference(checkpoint(kind)))


def each(kind: str, answered: dict[str, Any]) -> Iterator[tuple[demo.Example, Any]]:
    for example in examples():
        yield example, answered[example.name]


@pytest.mark.parametrize(("kind", "variant"), RUNS)
def test_equals_hugging_face(
    kind: str,
    variant: str,
    answers: Answers,
    reference: Callable[[str], Reference],
) -> None:
    """Greedy tokens are the same, log probabilities are within 2e-4."""
    for example, record in each(kind, answers(kind, variant)["alone"]):
        reference(kind).check(example, record)


@pytest.mark.parametrize(("kind", "variant"), RUNS)
def test_equals_unpatched(kind: str, variant: str, answers: Answers) -> None:
    """Text is untouched by the patches, images are within 1e-4 where causal."""
    unpatched = answers(kind, "unpatched")["alone"]
    for example, record in each(kind, answers(kind, variant)["alone"]):
        before = unpatched[example.name]
        assert record["prompt_token_ids"] == before["prompt_token_ids"], example.name
        if kind in BIDIRECTIONAL and example.name != "text":
            continue  # as the next test has it
        assert record["token_ids"] == before["token_ids"], example.name
        # Two workers add up their halves in another order than one does, and compiled
        # code adds up otherwise, too.
        exact = example.name == "text" and variant in ("in-process", "subprocess")
        for key in ("prompt_logprobs", "logprobs"):
            np.testing.assert_allclose(
                record[key],
                before[key],
                rtol=0,
                atol=1e-6 if exact else 1e-4,
                err_msg=f"{example.name}: {key}",
            )


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_unpatched_is_causal(
    kind: str, answers: Answers, reference: Callable[[str], Reference]
) -> None:
    """Without the patches each image and video differs from Hugging Face clearly.

    So the comparison with Hugging Face is one of bidirectional attention.
    """
    for example, before in each(kind, answers(kind, "unpatched")["alone"]):
        expected = reference(kind).chosen(example, before["prompt_token_ids"])
        found = torch.tensor(before["prompt_logprobs"][1:])
        difference = (found - expected).abs().max()
        if example.name == "text":
            assert difference < TOLERANCE
        else:
            assert difference > 0.5, example.name


@pytest.mark.parametrize(
    "variant",
    ["in-process", pytest.param("compiled", marks=needs_compiler)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_features(
    kind: str,
    variant: str,
    answers: Answers,
    reference: Callable[[str], Reference],
) -> None:
    """The running engine's features equal Hugging Face's and the unpatched tree's."""
    found = answers(kind, variant)["features"]
    unpatched = answers(kind, "unpatched")["features"]
    assert list(found) == NAMES[1:]
    for example in examples()[1:]:
        expected = torch.cat(reference(kind).features(example)).numpy()
        assert 3 < np.abs(expected).max() < 6  # what the tolerance is relative to
        np.testing.assert_allclose(
            found[example.name], expected, rtol=0, atol=1e-3, err_msg=example.name
        )
        np.testing.assert_allclose(
            found[example.name],
            unpatched[example.name],
            rtol=0,
            atol=1e-3,
            err_msg=example.name,
        )


@pytest.mark.parametrize(("kind", "variant"), RUNS)
def test_batch_equals_one_by_one(kind: str, variant: str, answers: Answers) -> None:
    """Text, images and videos in one call answer as each would alone."""
    result = answers(kind, variant)
    for example, record in each(kind, result["alone"]):
        together = result["together"][example.name]
        assert together["token_ids"] == record["token_ids"], example.name
        for key in ("prompt_logprobs", "logprobs"):
            np.testing.assert_allclose(
                together[key],
                record[key],
                rtol=0,
                atol=1e-4,
                err_msg=f"{example.name}: {key}",
            )
            assert np.isfinite(together[key][1:]).all(), example.name


@pytest.mark.parametrize(("kind", "variant"), RUNS)
def test_prefix_cache(kind: str, variant: str, answers: Answers) -> None:
    """A prompt answered from the prefix cache gets the same tokens."""
    result = answers(kind, variant)
    for example, record in each(kind, result["again"]):
        if len(record["prompt_token_ids"]) > 256:
            assert record["cached_tokens"] >= 128, example.name
        assert record["token_ids"] == result["alone"][example.name]["token_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_cover_what_they_should(kind: str, answers: Answers) -> None:
    """The long video has 32 frames of full size, the large image over 1000 tokens."""
    features = answers(kind, "in-process")["features"]
    prompts = {
        example.name: record["prompt_token_ids"]
        for example, record in each(kind, answers(kind, "in-process")["alone"])
    }
    assert len(features["long video"]) >= 32 * 60
    assert 1000 < len(features["large image"]) <= 1120
    # Chunked prefill splits prompts longer than what one step takes in all.
    assert sum(map(len, prompts.values())) > 4096
