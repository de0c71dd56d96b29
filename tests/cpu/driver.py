# SPDX-License-Identifier: Apache-2.0
"""Answer a fixed set of requests with one engine and write down all numbers.

Run as a script, in an environment of its own making, so that the same requests can
be put to the patched and to the unpatched tree: ``driver.py CHECKPOINT OUT``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scripts import demo

TOKENS = 12


def examples() -> list[demo.Example]:
    """The demo's requests, a video of full length and the largest image."""
    return [
        *demo.examples(),
        demo.Example(
            "long video", "frames", video=demo.moving_picture(32, 240, 320, seed=5)
        ),
        demo.Example(
            "large image", "image", [demo.picture(900, 1000, seed=6)], None, 1120
        ),
    ]


def _logprobs(rows: Any, token_ids: Any) -> list[float]:
    """The log probability of each token; the first prompt token has none (NaN)."""
    return [
        row[token].logprob if row is not None else float("nan")
        for row, token in zip(rows, token_ids, strict=True)
    ]


def record(output: Any) -> dict[str, Any]:
    """What there is to compare of one ``RequestOutput``."""
    answer = output.outputs[0]
    found = {
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(answer.token_ids),
        "logprobs": _logprobs(answer.logprobs, answer.token_ids),
        "cached_tokens": output.num_cached_tokens,
    }
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = _logprobs(
            output.prompt_logprobs, output.prompt_token_ids
        )
    return found


def main() -> None:
    """Write ``OUT.json`` and, with the model in this process, ``OUT.npz``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="arguments of LLM, in JSON"
    )
    parser.add_argument("--tree", help="import vLLM from here, not from where it is")
    args = parser.parse_args()
    if args.tree is not None:
        # Before what the environment puts first; spawned processes inherit it.
        sys.path.insert(0, args.tree)

    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(**demo.engine_arguments(args.checkpoint, **args.engine))
    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    calls = demo.record_features(llm) if in_process else []
    scored = SamplingParams(
        temperature=0.0,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
    )
    plain = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0
    )
    names = [example.name for example in examples()]
    requests = [example.request() for example in examples()]

    # All at once and first, before anything is cached.
    together = llm.generate(requests, scored, use_tqdm=False)
    features: dict[str, np.ndarray] = {}
    alone, again = {}, {}
    for name, request in zip(names, requests, strict=True):
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        calls.clear()
        alone[name] = record(llm.generate(request, scored, use_tqdm=False)[0])
        items = [item.numpy() for call in calls for item in call]
        if items:
            features[name] = np.concatenate(items)
        # Once to fill the prefix cache with what is asked a second time.
        llm.generate(request, plain, use_tqdm=False)
        again[name] = record(llm.generate(request, plain, use_tqdm=False)[0])
    config = llm.llm_engine.vllm_config.model_config.multimodal_config
    result = {
        "tree": str(Path(vllm.__file__).parents[1]),
        "mm_encoder_tp_mode": config.mm_encoder_tp_mode,
        "together": dict(zip(names, map(record, together), strict=True)),
        "alone": alone,
        "again": again,
    }
    if in_process:
        np.savez(args.out.with_suffix(".npz"), **features)
    args.out.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
