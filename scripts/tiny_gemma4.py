# SPDX-License-Identifier: Apache-2.0
"""Complete tiny random-weight Gemma4 checkpoints, made in code without a network.

The two layouts that Google ships are covered: ``26b`` and ``31b`` (standardized
vision features, image tokens that see each other both ways, keys that serve as
values in the full layers) and ``e2b`` (clipped linears, per-layer embeddings, shared
KV layers, an audio tower). Weights are saved by Hugging Face's own classes, so both
Hugging Face and vLLM load the very same files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = ("26b", "31b", "e2b")
SOFT_TOKENS = (70, 140, 280, 560, 1120)
RECIPE_FILE = "tiny_gemma4.json"
VOCAB_SIZE = 512
# Bump when the same arguments give other files, so that caches are rebuilt.
RECIPE_VERSION = 2

_NAMED_TOKENS = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
}
_VIDEO_TOKEN = "<|video|>"

_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}
{% if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{- item['text'] | trim -}}
{%- elif item['type'] in ['image', 'image_url'] -%}{{- '<|image|>' -}}
{%- elif item['type'] in ['audio', 'input_audio'] -%}{{- '<|audio|>' -}}
{%- elif item['type'] == 'video' -%}{{- '<|video|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>' }}
{% endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model' }}
{% endif -%}
"""


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-fallback BPE with a few merges, ``VOCAB_SIZE`` entries in all."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\u2581", "\n", *map(chr, range(33, 127))]
    merges = [
        ("t", "h"), ("th", "e"), ("i", "n"), ("in", "g"), ("a", "n"), ("an", "d"),
        ("i", "m"), ("im", "a"), ("ima", "g"), ("imag", "e"), ("u", "s"), ("us", "e"),
        ("use", "r"), ("m", "o"), ("mo", "d"), ("mod", "e"), ("mode", "l"), ("o", "u"),
    ]  # fmt: skip
    tokens += ["".join(pair) for pair in merges]
    # The real multimodal ids are the last ones of the vocabulary, too.
    special = [*_NAMED_TOKENS.values(), _VIDEO_TOKEN]
    unused = VOCAB_SIZE - len(tokens) - len(special)
    tokens += [f"<unused{i}>" for i in range(unused)] + special
    return {token: i for i, token in enumerate(tokens)}, merges


def save_processor(
    path: Path, soft_tokens: int, unified: bool = False
) -> dict[str, int]:
    """Write tokenizer, processor and chat template.

    Args:
        path: The directory.
        soft_tokens: Most tokens of an image.
        unified: For the checkpoints without a tower.

    Returns:
        Ids by token.
    """
    from transformers import GemmaTokenizer
    from transformers.models import gemma4, gemma4_unified

    parts = {
        name: getattr(gemma4_unified, f"Gemma4Unified{name}")
        if unified
        else getattr(gemma4, f"Gemma4{name}")
        for name in (
            "AudioFeatureExtractor",
            "ImageProcessor",
            "Processor",
            "VideoProcessor",
        )
    }
    vocabulary, merges = _vocabulary()
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        padding_side="left",
        model_max_length=131072,
        extra_special_tokens=dict(_NAMED_TOKENS),
    )
    processor = parts["Processor"](
        feature_extractor=parts["AudioFeatureExtractor"](),
        image_processor=parts["ImageProcessor"](
            max_soft_tokens=soft_tokens, do_normalize=False
        ),
        tokenizer=tokenizer,
        video_processor=parts["VideoProcessor"](),
        chat_template=_CHAT_TEMPLATE,
        image_seq_length=soft_tokens,
    )
    processor.save_pretrained(path)
    # vLLM reads the tokenizer on its own and decides about <bos> by its template.
    processor.tokenizer.chat_template = _CHAT_TEMPLATE
    processor.tokenizer.save_pretrained(path)
    if len(processor.tokenizer) != VOCAB_SIZE:
        raise AssertionError(f"tokenizer has {len(processor.tokenizer)} entries")
    return vocabulary


def config(
    kind: str,
    ids: Mapping[str, int],
    soft_tokens: int,
    dtype: str,
    overrides: Mapping[str, Mapping[str, Any]],
) -> Any:
    """Return the configuration of a kind.

    Args:
        kind: One of ``KINDS``, or ``"12b"``: the layout of 31B without a tower.
        ids: By token, as ``save_processor`` returns them.
        soft_tokens: Most tokens of an image.
        dtype: Of the weights.
        overrides: Values that replace those of a section, by its name.
    """
    from transformers import Gemma4Config, Gemma4UnifiedConfig

    small = kind == "e2b"
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": None if small else 2,
        "attention_k_eq_v": not small,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None if small else "vision",
        "hidden_size_per_layer_input": 16 if small else 0,
        "num_kv_shared_layers": 3 if small else 0,
        "use_double_wide_mlp": small,
        "dtype": dtype,
    }
    if small:
        # Both kinds of layer before the shared ones and among them.
        layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        text["layer_types"] = layers
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "standardize": not small,
        "use_clipped_linears": small,
        "default_output_length": soft_tokens,
        # As the real checkpoints spell it.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "dtype": dtype,
    }
    audio: dict[str, Any] | None = None
    if small:
        audio = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 8],
            "output_proj_dims": 96,
            "dtype": dtype,
        } | dict(overrides.get("audio", {}))
    unified = kind == "12b"
    if unified:
        for name in ("vocab_size_per_layer_input", "hidden_size_per_layer_input"):
            del text[name]
        vision = {"num_soft_tokens": soft_tokens, "mm_embed_dim": text["hidden_size"]}
    return (Gemma4UnifiedConfig if unified else Gemma4Config)(
        text_config=text | dict(overrides.get("text", {})),
        vision_config=vision | dict(overrides.get("vision", {})),
        audio_config=audio,
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids[_VIDEO_TOKEN],
        boa_token_id=ids["<|audio>"],
        eoa_token_id=ids["<audio|>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
        eos_token_id=[ids["<eos>"], ids["<turn|>"]],
        vision_soft_tokens_per_image=soft_tokens,
        architectures=[f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        dtype=dtype,
    )


def _fill(model: Any, seed: int) -> None:
    """Fill every parameter and buffer of ``model`` in place, each by its own name.

    No norm is one, no bias zero and no clip bound infinite, so that a weight which
    is left out or taken for another one shows in the numbers. Values are drawn in
    float32 by name, hence the same whatever the order or number of the layers.
    """
    import torch

    for name, tensor in model.state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

        def uniform(low: float, high: float) -> torch.Tensor:
            values = torch.rand(tensor.shape, generator=random)  # noqa: B023
            return low + (high - low) * values

        def normal(std: float) -> torch.Tensor:
            return std * torch.randn(tensor.shape, generator=random)  # noqa: B023

        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("input_min", "input_max", "output_min", "output_max"):
            # About one value in ten is clipped: some layers see smaller ones.
            narrow = {"o_proj": 0.2, "down_proj": 0.5}.get(name.split(".")[-2], 1.0)
            value = uniform(1.0, 2.0) * narrow
            value = -value if leaf.endswith("min") else value
        elif leaf == "layer_scalar":
            value = uniform(0.8, 1.1)
        elif leaf == "std_bias":
            value = normal(2.0)
        elif leaf == "std_scale":
            value = uniform(0.05, 0.2)
        elif leaf == "per_dim_scale":
            value = normal(0.1)
        elif leaf in ("scale", "per_expert_scale"):  # the router's
            value = uniform(0.5, 1.5)
        elif leaf == "position_embedding_table":
            value = normal(0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            # Attention is not scaled by the head size; this keeps it soft.
            value = uniform(0.35, 0.75) * min(1.0, 64 / tensor.numel()) ** 0.25
        elif name.endswith("language_model.norm.weight"):
            value = uniform(8.0, 16.0)  # spreads the logits: no choice by a hair
        elif "norm" in name.split(".")[-2]:
            value = uniform(0.5, 1.5)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            # The model multiplies by the root of the width. Smaller than what the
            # layers add, or the tied output layer would repeat the last token.
            value = normal(0.25 * tensor.shape[-1] ** -0.5)
        elif name.endswith("embed_tokens_per_layer.weight"):
            width = model.config.text_config.hidden_size_per_layer_input
            value = normal(width**-0.5)
        elif tensor.ndim >= 2:
            value = normal(math.prod(tensor.shape[1:]) ** -0.5)
            if leaf in ("gate_up_proj", "down_proj"):  # experts, stacked first
                value = normal(tensor.shape[-1] ** -0.5)
        elif leaf == "bias":
            value = normal(0.1)
        else:
            raise AssertionError(f"no rule for {name} {tuple(tensor.shape)}")
        tensor.copy_(value)
    model.tie_weights()


def build(
    path: str | os.PathLike[str],
    kind: str,
    *,
    soft_tokens: int = 280,
    dtype: str = "float32",
    seed: int = 0,
    **overrides: Mapping[str, Any],
) -> Path:
    """Write a tiny Gemma4 checkpoint to ``path`` and return it.

    The directory appears complete or not at all. One that is already there and was
    built by the same arguments is returned untouched.

    Args:
        path: The directory to make. Its parents are made, too.
        kind: ``"26b"``, ``"31b"`` (the same layout, dense) or ``"e2b"``.
        soft_tokens: Most tokens of an image: 70, 140, 280, 560 or 1120.
        dtype: Of the saved weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        seed: Other weights for another seed; the same ones for the same seed.
        **overrides: ``text=``, ``vision=`` and ``audio=``: values that replace those
            of the section of that name in the configuration, for example
            ``vision={"head_dim": 72, "hidden_size": 144}`` or, for a mixture of
            experts, ``text={"enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 64}``.

    Raises:
        ValueError: An argument is not one of those above.
        FileExistsError: Something else is at ``path``.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if soft_tokens not in SOFT_TOKENS:
        raise ValueError(f"soft_tokens is {soft_tokens}, must be one of {SOFT_TOKENS}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}, must be float32, bfloat16 or float16")
    if unknown := overrides.keys() - {"text", "vision", "audio"}:
        raise ValueError(f"no section {', '.join(sorted(unknown))} to override")
    path = Path(path)
    recipe = {
        "version": RECIPE_VERSION,
        "kind": kind,
        "soft_tokens": soft_tokens,
        "dtype": dtype,
        "seed": seed,
        "overrides": {name: dict(values) for name, values in overrides.items()},
    }
    # Read back, as JSON knows no tuples.
    recipe = json.loads(json.dumps(recipe))
    if path.exists():
        known = path / RECIPE_FILE
        if known.is_file() and json.loads(known.read_text()) == recipe:
            return path
        raise FileExistsError(
            f"{path} exists and is no {kind} checkpoint of these arguments: remove it"
        )

    from transformers import Gemma4ForConditionalGeneration, GenerationConfig

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        ids = save_processor(partial, soft_tokens)
        values = config(kind, ids, soft_tokens, dtype, overrides)
        with torch.no_grad():
            model = Gemma4ForConditionalGeneration(values)
            _fill(model, seed)
            model.to(getattr(torch, dtype))
        model.generation_config = GenerationConfig(
            bos_token_id=ids["<bos>"],
            eos_token_id=[ids["<eos>"], ids["<turn|>"]],
            pad_token_id=ids["<pad>"],
            do_sample=True,
            temperature=1.0,
            top_k=64,
            top_p=0.95,
        )
        model.save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)
        (partial / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(path)
        except OSError:
            # Another process was faster: its files are the same as these.
            known = path / RECIPE_FILE
            if not known.is_file() or json.loads(known.read_text()) != recipe:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def main(argv: list[str] | None = None) -> int:
    """Build one checkpoint from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tiny_gemma4",
        description="Make a tiny random-weight Gemma4 checkpoint, without a network.",
    )
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--soft-tokens", type=int, choices=SOFT_TOKENS, default=280)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        path = build(
            args.out,
            args.kind,
            soft_tokens=args.soft_tokens,
            dtype=args.dtype,
            seed=args.seed,
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"tiny_gemma4: {error}\n")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
