# SPDX-License-Identifier: Apache-2.0
"""The patched tree's engine against Hugging Face and the unpatched tree."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import examples

from scripts import demo

pytestmark = pytest.mark.slow

KINDS = ("26b", "e2b")
NAMES = [example.name for example in examples()]
Answers = Callable[[str, str], dict[str, Any]]

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores"
)
# Two workers have an engine process as well: once is enough for it with one.
RUNS = [
    ("26b", "in-process"),
    ("e2b", "in-process"),
    ("26b", "subprocess"),
    pytest.param("26b", "tp2", marks=needs_two_cores),
    pytest.param("e2b", "tp2", marks=needs_two_cores),
]


class Reference:
    """Hugging Face's numbers for what an engine was asked and answered."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoConfig, AutoProcessor
        from transformers import Gemma4ForConditionalGeneration as Model

        config = AutoConfig.from_pretrained(checkpoint)
        # vLLM's CPU attention has no bidirectional image spans in this release: it
        # is causal whatever the checkpoint says, and so is the reference here.
        config.text_config.use_bidirectional_attention = None
        self.model = Model.from_pretrained(
            checkpoint, config=config, dtype=torch.float32
        )
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._features: dict[str, list[torch.Tensor]] = {}

    def features(self, example: demo.Example) -> list[torch.Tensor]:
        """One float32 tensor [soft tokens, text hidden] an image or frame."""
        if example.name not in self._features:
            self._features[example.name] = demo.reference_features(
                self.model, self.processor, example
            )
        return self._features[example.name]

    def logprobs(self, example: demo.Example, token_ids: list[int]) -> torch.Tensor:
        """Log probabilities [len(token_ids) - 1, vocabulary] of the next token."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        key = (NAMES.index(example.name), *token_ids)
        if key in self._known:
            return self._known[key]
        encoded = {}
        if features := self.features(example):
            modality = "image" if example.video is None else "video"
            # Given this way as forward() does not hand on a video's frame count.
            encoded = {
                modality: BaseModelOutputWithPooling(pooler_output=tuple(features))
            }
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([token_ids]),
                mm_encoder_outputs=encoded or None,
                use_cache=False,
            ).logits
        return self._known.setdefault(key, logits[0, :-1].float().log_softmax(-1))


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
        prompt, tokens = record["prompt_token_ids"], record["token_ids"]
        expected = reference(kind).logprobs(example, prompt + tokens)
        # Given the same tokens so far the best next one is the same, so the
        # reference would have chosen these, one after the other.
        assert expected[len(prompt) - 1 :].argmax(-1).tolist() == tokens, example.name
        found = torch.tensor(record["prompt_logprobs"][1:] + record["logprobs"])
        chosen = expected.gather(1, torch.tensor(prompt + tokens)[1:, None])[:, 0]
        torch.testing.assert_close(
            found, chosen, rtol=0, atol=2e-4, msg=lambda m, e=example: f"{e.name}: {m}"
        )


@pytest.mark.parametrize(("kind", "variant"), RUNS)
def test_equals_unpatched(kind: str, variant: str, answers: Answers) -> None:
    """Text is untouched by the patches, images are within 1e-4."""
    unpatched = answers(kind, "unpatched")["alone"]
    for example, record in each(kind, answers(kind, variant)["alone"]):
        before = unpatched[example.name]
        assert record["prompt_token_ids"] == before["prompt_token_ids"], example.name
        assert record["token_ids"] == before["token_ids"], example.name
        # Two workers add up their halves in another order than one does.
        exact = example.name == "text" and variant != "tp2"
        for key in ("prompt_logprobs", "logprobs"):
            np.testing.assert_allclose(
                record[key],
                before[key],
                rtol=0,
                atol=1e-6 if exact else 1e-4,
                err_msg=f"{example.name}: {key}",
            )


@pytest.mark.parametrize("kind", KINDS)
def test_features(
    kind: str, answers: Answers, reference: Callable[[str], Reference]
) -> None:
    """The running engine's features equal Hugging Face's and the unpatched tree's."""
    found = answers(kind, "in-process")["features"]
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
