# SPDX-License-Identifier: Apache-2.0
"""Answer many mixed requests with one engine and write down tokens and candidates.

Run as a script, in a process of its own for each attention backend:
``soak_driver.py CHECKPOINT OUT.json BACKEND DTYPE [--requests N]``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from scripts import demo

WORDS = ["the", "user", "and", "model", "image", "other", "moving", "use", "in", "out"]


def requests(count: int) -> list[demo.Example]:
    """Text, one to three images and videos, in prompts of up to a thousand tokens.

    Every fourth goes on from one that was answered before: with prefix caching its hit
    ends inside or behind the images, where a windowed layer still holds the keys.
    """
    random = np.random.default_rng(0)
    found: list[demo.Example] = []
    for i in range(count):
        words = " ".join(random.choice(WORDS, random.integers(3, 250)))
        if i % 4 == 3 and i > 63:
            before = found[i - 63]  # never a repetition itself
            tail = " ".join(random.choice(WORDS, 8))
            text = f"{before.text} {tail}"
            again = (before.images, before.video, before.max_soft_tokens)
            found.append(demo.Example(f"{i} again", text, *again))
            continue
        kind = random.choice(["text", "images", "video"], p=[0.3, 0.6, 0.1])
        if kind == "text":
            found.append(demo.Example(f"{i} text", words))
        elif kind == "video":
            frames = int(random.integers(2, 5))
            video = demo.moving_picture(frames, 240, 160, seed=i)
            found.append(demo.Example(f"{i} video", words, video=video))
        else:
            sizes = random.integers(100, 700, (random.integers(1, 4), 2))
            images = [
                demo.picture(int(width), int(height), seed=i * 10 + j)
                for j, (width, height) in enumerate(sizes)
            ]
            soft_tokens = int(random.choice([70, 140, 280]))
            example = demo.Example(f"{i} images", words, images, None, soft_tokens)
            found.append(example)
    return found


def main() -> None:
    """Write OUT.json: for each request its tokens and the candidates at each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("backend")
    parser.add_argument("dtype")
    parser.add_argument("--requests", type=int, default=520)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    from vllm import LLM, SamplingParams

    llm = LLM(
        **demo.engine_arguments(
            args.checkpoint,
            dtype=args.dtype,
            enforce_eager=False,
            # Graphs for decodes, as servers have; nothing is compiled.
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            gpu_memory_utilization=0.3,
            kernel_config={"enable_flashinfer_autotune": False},
            # Other processes may use the GPU, too, so free memory says nothing.
            kv_cache_memory_bytes=4 << 30,
            max_num_seqs=32,
            # Prompts are cut into chunks and meet decodes in a step. No less, or a
            # video would not fit in one.
            max_num_batched_tokens=2560,
            attention_config={"backend": args.backend},
        )
    )
    backends: set[str] = set()

    def note(model: Any) -> None:
        for layer in model.modules():
            if hasattr(layer, "attn_backend") and hasattr(layer, "impl"):
                version = getattr(layer.impl, "vllm_flash_attn_version", "")
                name = layer.attn_backend.get_name()
                backends.add(f"{name}{version} head {layer.head_size}")

    llm.apply_model(note)
    examples = requests(args.requests)
    random = np.random.default_rng(1)
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=int(random.integers(4, 32)),
            ignore_eos=True,
            logprobs=5,
        )
        for _ in examples
    ]
    outputs = llm.generate([e.request() for e in examples], sampling, use_tqdm=False)
    answers = []
    for example, output in zip(examples, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.logprobs is not None
        candidates = [
            {token: entry.logprob for token, entry in row.items()}
            for row in answer.logprobs
        ]
        answers.append(
            {
                "name": example.name,
                "prompt_token_ids": list(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
                "tokens": list(answer.token_ids),
                "candidates": candidates,
            }
        )
    result = {"backends": sorted(backends), "answers": answers}
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
