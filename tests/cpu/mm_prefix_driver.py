# SPDX-License-Identifier: Apache-2.0
"""Answer requests whose images lie in all kinds of places, and how it was scheduled.

Run as a script, in a process of its own: ``mm_prefix_driver.py CHECKPOINT OUT ENGINE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from driver import TOKENS, record

from scripts import demo

# As many tokens as the wider of the small images has; a frame has one more.
SMALL_WINDOW = 65
BLOCK_SIZE = 128
# As few as it may have: what four frames take at most, more than an image does.
FEW_TOKENS = 4 * 78
ENGINES: dict[str, dict[str, Any]] = {
    # All requests of a batch in one step.
    "one step": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 16,
    },
    "many steps": {
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": FEW_TOKENS,
        "limit_mm_per_prompt": {"image": 4, "video": {"count": 1, "num_frames": 4}},
    },
}


@dataclasses.dataclass
class Request(demo.Example):
    """An example whose text is the whole prompt, with its placeholders."""

    @property
    def prompt(self) -> str:
        return f"<bos>{self.text}"


def words(tokens: int, seed: int) -> str:
    """Text of about so many tokens."""
    letters = np.random.default_rng(seed).choice(list("bcfjkpqvwxyz "), tokens)
    return "".join(letters)


def requests() -> list[Request]:
    """Every place of an image that the attention can tell from another."""
    image, video = "<|image|>", "<|video|>"
    wide, flat = demo.picture(400, 300, seed=1), demo.picture(640, 200, seed=2)
    tall, small = demo.picture(150, 390, seed=3), demo.picture(200, 280, seed=8)
    frames = demo.moving_picture(4, 320, 180, seed=4)
    return [
        Request("text", words(90, seed=1)),
        Request("one image", f"{words(20, 2)}{image}{words(15, 3)}", [wide]),
        Request("first", f"{image}the image", [tall]),
        Request("last", f"the image{image}", [flat]),
        Request(
            "images",
            f"{words(9, 4)}{image}{image}{words(30, 5)}{image}{words(4, 6)}",
            [tall, wide, flat],
        ),
        Request("small images", f"a{image}{image}b", [small, tall], None, 70),
        Request("video", f"{words(12, 7)}{video}{words(6, 8)}", video=frames),
        Request(
            "video, image", f"{video}{image}{words(6, 9)}", [wide], frames[:2], 140
        ),
        Request("long", f"{words(500, 10)}{image}{words(700, 11)}", [wide]),
    ]


def cached_requests() -> list[tuple[Request, Request]]:
    """Pairs that share the prompt up to the end of an image.

    The first fills the prefix cache. What of it serves the second are whole blocks,
    of which the last ends inside the image.
    """
    wide, flat = demo.picture(400, 300, seed=1), demo.picture(640, 200, seed=2)
    return [
        (
            Request(name, f"{text}<|image|>{words(30, 13)}", [image], None, size),
            Request(name, f"{text}<|image|>{words(40, 14)}", [image], None, size),
        )
        for name, text, image, size in (
            ("hit at the start", words(248, 12), flat, 140),
            ("hit in the middle", words(100, 12), wide, 280),
            ("hit before the end", words(248, 12), wide, 280),
            ("hit before the last", words(245, 12), wide, 280),
        )
    ]


def record_steps(llm: Any) -> list[dict[str, int]]:
    """Record, from now on, how many tokens of which request a step computes.

    The scheduler must be in this process.
    """
    steps: list[dict[str, int]] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        steps.append(dict(output.num_scheduled_tokens))
        return output

    scheduler.schedule = wrapped
    return steps


def main() -> None:
    """Write ``OUT.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("engine", choices=ENGINES)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(**demo.engine_arguments(args.checkpoint, **ENGINES[args.engine]))
    steps = record_steps(llm)
    # Prompts with log probabilities are not read from the prefix cache.
    plain, scored = (
        SamplingParams(
            temperature=0.0,
            max_tokens=TOKENS,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=prompt_logprobs,
        )
        for prompt_logprobs in (None, 0)
    )

    def answer(examples: list[Request], sampling: Any) -> dict[str, Any]:
        steps.clear()
        outputs = llm.generate(
            [example.request() for example in examples], sampling, use_tqdm=False
        )
        # They have their numbers by the order in which they are asked.
        order = sorted({int(name.split("-")[0]) for step in steps for name in step})
        records = {}
        for number, example, output in zip(order, examples, outputs, strict=True):
            chunks = [
                count
                for step in steps
                for name, count in step.items()
                if int(name.split("-")[0]) == number
            ]
            records[example.name] = record(output) | {"chunks": chunks}
        return records

    result: dict[str, dict[str, Any]] = {"alone": {}, "cached": {}, "beside": {}}
    result["together"] = answer(requests(), scored)
    for example in requests():
        llm.reset_prefix_cache()
        result["alone"] |= answer([example], scored)
    if ENGINES[args.engine]["enable_prefix_caching"]:
        # Leaves some room in a step, which is too little for what is left of an image.
        text = Request("text", words(FEW_TOKENS - 30, 15))
        for first, second in cached_requests():
            for name, others in (("cached", []), ("beside", [text])):
                llm.reset_prefix_cache()
                answer([first], plain)
                answers = answer([*others, second], plain)
                result[name][second.name] = answers[second.name]
    args.out.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
