# SPDX-License-Identifier: Apache-2.0
"""Make a LoRA of the vision tower and answer requests with it, with and without.

Run as a script, in a process of its own: ``lora_driver.py CHECKPOINT OUT RANKS``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from scripts import demo

RANK = 4
TOKENS = 8
TOWER_LAYERS = tuple(
    f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
)


def examples() -> list[demo.Example]:
    """Text, one image, two images and two videos, all of unlike sizes and small."""
    requests = demo.examples()
    for request in requests:
        request.max_soft_tokens = 70 if request.images else None
        request.video = request.video if request.video is None else request.video[:2]
    return [
        *requests,
        demo.Example(
            "other video", "then the", video=demo.moving_picture(3, 200, 280, seed=7)
        ),
    ]


def make_adapter(checkpoint: Path, adapter: Path, merged: Path) -> list[str]:
    """Write a PEFT adapter, and the checkpoint with that adapter in its weights.

    Args:
        checkpoint: A tiny checkpoint, which is left as it is.
        adapter: The directory to make for the adapter.
        merged: The directory to make for the merged checkpoint.

    Returns:
        The layers that it adapts, as the checkpoint names them: the seven
        projections of each of the tower's layers, and the connector.
    """
    import torch
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(0)
    weights = load_file(checkpoint / "model.safetensors")
    tensors, layers = {}, []
    for name in sorted(weights):
        layer, _, leaf = name.rpartition(".")
        in_tower = ".vision_tower.encoder.layers." in name and layer.endswith(".linear")
        if leaf != "weight" or not (
            in_tower or layer.endswith("embed_vision.embedding_projection")
        ):
            continue
        rows, columns = weights[name].shape
        a = torch.randn(RANK, columns, generator=random) * columns**-0.5
        b = torch.randn(rows, RANK, generator=random) * 0.1
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a
        tensors[f"base_model.model.{layer}.lora_B.weight"] = b
        weights[name] += b @ a
        layers.append(layer)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "r": RANK,
        "lora_alpha": RANK,  # hence a scale of one
        "target_modules": [*TOWER_LAYERS, "linear", "embedding_projection"],
    }
    adapter.mkdir(parents=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(checkpoint, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return layers


def _record(output: Any) -> dict[str, Any]:
    tokens = list(output.prompt_token_ids)
    rows = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
    return {
        "token_ids": list(output.outputs[0].token_ids),
        "prompt_logprobs": [row[token].logprob for row, token in rows],
    }


def _answer(llm: Any, adapters: list[Any] | None = None) -> dict[str, Any]:
    """Answer all examples, each with the adapter in its place or with none."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, prompt_logprobs=0
    )
    records = {}
    llm.llm_engine.reset_encoder_cache()
    # An encoder step that has both images and videos takes one's adapter for the
    # other's, in the release as well: the mapping follows the order of the items,
    # the encoder that of the modalities. So they go one after the other.
    for videos in (False, True):
        chosen = [
            (index, example)
            for index, example in enumerate(examples())
            if (example.video is not None) == videos
        ]
        outputs = llm.generate(
            [example.request() for _, example in chosen],
            sampling,
            lora_request=adapters and [adapters[index] for index, _ in chosen],
            use_tqdm=False,
        )
        for (_, example), output in zip(chosen, outputs, strict=True):
            records[example.name] = _record(output)
    return records


def main() -> None:
    """Write ``OUT.json``; the adapter goes to ``OUT``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("ranks", type=int)
    args = parser.parse_args()
    adapter, merged = args.out / "adapter", args.out / "merged"
    layers = make_adapter(args.checkpoint, adapter, merged)

    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        **demo.engine_arguments(
            args.checkpoint,
            tensor_parallel_size=args.ranks,
            enable_lora=True,
            enable_tower_connector_lora=True,
            max_lora_rank=2 * RANK,
            # The release's LoRA on CPU takes the last slot where a token has no
            # adapter. There has to be one that stays empty.
            max_loras=2,
            mm_processor_cache_gb=0,
            enable_prefix_caching=False,
        )
    )
    lora = LoRARequest("tower", 1, str(adapter))
    count = len(examples())
    result: dict[str, Any] = {
        "layers": layers,
        "base": _answer(llm),
        "lora": _answer(llm, [lora] * count),
        # The adapter for every other request, so in each call for some.
        "even": _answer(llm, [None if i % 2 else lora for i in range(count)]),
        "odd": _answer(llm, [lora if i % 2 else None for i in range(count)]),
    }
    del llm
    llm = LLM(
        **demo.engine_arguments(
            merged,
            tensor_parallel_size=args.ranks,
            mm_processor_cache_gb=0,
            enable_prefix_caching=False,
        )
    )
    result["merged"] = _answer(llm)
    args.out.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
