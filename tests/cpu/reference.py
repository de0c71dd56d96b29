# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's numbers for what an engine was asked and answered."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from scripts import demo

# Of log probabilities, in float32 throughout.
TOLERANCE = 2e-4


class Reference:
    """A checkpoint by Hugging Face; images attend both ways if it says so."""

    def __init__(self, checkpoint: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoProcessor
        from transformers import Gemma4ForConditionalGeneration as Model

        self.model = Model.from_pretrained(checkpoint, dtype=torch.float32).to(device)
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}
        self._features: dict[tuple[str, bool], list[torch.Tensor]] = {}

    def features(self, example: demo.Example) -> list[torch.Tensor]:
        """One float32 tensor [soft tokens, text hidden] an image or frame."""
        key = example.name, example.video is None
        if key not in self._features:
            self._features[key] = demo.reference_features(
                self.model, self.processor, example
            )
        return self._features[key]

    def logprobs(self, example: demo.Example, token_ids: list[int]) -> torch.Tensor:
        """Log probabilities [len(token_ids) - 1, vocabulary] of the next token.

        Examples are told apart by their names.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        key = (example.name, *token_ids)
        if key in self._known:
            return self._known[key]
        parts = {}
        if example.images:
            parts["image"] = dataclasses.replace(example, video=None)
        if example.video is not None:
            parts["video"] = example
        encoded = {
            modality: BaseModelOutputWithPooling(
                pooler_output=tuple(self.features(part))
            )
            for modality, part in parts.items()
        }
        ids = torch.tensor([token_ids], device=self.model.device)
        # What the processor gives for a prompt: images and video frames attend both
        # ways in checkpoints that say so.
        types = (ids == self.model.config.image_token_id).long()
        types += 2 * (ids == self.model.config.video_token_id).long()
        inputs: dict[str, torch.Tensor] = {}
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            # In place of what forward() would compute: it does not hand on a video's
            # frame count, and takes features itself only since Transformers 5.18.
            for modality, output in encoded.items():
                name = f"get_{modality}_features"
                patched = mock.patch.object(self.model.model, name, return_value=output)
                stack.enter_context(patched)
                name = "pixel_values" if modality == "image" else "pixel_values_videos"
                inputs[name] = torch.empty(0)
            logits = self.model(
                input_ids=ids, mm_token_type_ids=types, use_cache=False, **inputs
            ).logits
        return self._known.setdefault(key, logits[0, :-1].float().log_softmax(-1))

    def chosen(self, example: demo.Example, token_ids: list[int]) -> torch.Tensor:
        """Log probabilities [len(token_ids) - 1] of the tokens that follow."""
        expected = self.logprobs(example, token_ids)
        following = torch.tensor(token_ids, device=expected.device)[1:, None]
        return expected.gather(1, following)[:, 0]

    def check(self, example: demo.Example, record: dict[str, Any]) -> None:
        """Compare an answer, and its prompt's log probabilities where it has them."""
        prompt, tokens = record["prompt_token_ids"], record["token_ids"]
        expected = self.logprobs(example, prompt + tokens)[len(prompt) - 1 :]
        # Given the same tokens so far the best next one is the same, so the
        # reference would have chosen these, one after the other.
        assert expected.argmax(-1).tolist() == tokens, example.name
        found = torch.tensor(record.get("prompt_logprobs", [])[1:] + record["logprobs"])
        torch.testing.assert_close(
            found,
            self.chosen(example, prompt + tokens)[-len(found) :],
            rtol=0,
            atol=TOLERANCE,
            msg=lambda message: f"{example.name}: {message}",
        )
