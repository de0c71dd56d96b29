# SPDX-License-Identifier: Apache-2.0
"""Gemma4 checkpoints of the real widths, without weights: vLLM makes dummy ones."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts import tiny_gemma4

WINDOW = 1024
# A period of the layers; the E2B checkpoint has four of a window for one without.
LAYER_TYPES = ["sliding_attention"] * 5 + ["full_attention"]
UNLIKE = 1009  # features, see ``varied``

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "num_hidden_layers",
)


def _text(*sizes: int | None, **more: Any) -> dict[str, Any]:
    text = dict(zip(_SIZES, sizes, strict=True))
    return {"head_dim": 256, "global_head_dim": 512, "sliding_window": WINDOW} | (
        text | more
    )


# The language models by kind.
TEXTS: dict[str, dict[str, Any]] = {
    "e2b": _text(
        *(1536, 6144, 8, 1, None, 35),
        sliding_window=512,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "e4b": _text(
        *(2560, 10240, 8, 2, None, 42),
        sliding_window=512,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=18,
        use_double_wide_mlp=False,
    ),
    "12b": _text(3840, 15360, 16, 8, 1, 48),
    "26b": _text(
        *(2816, 2112, 16, 8, 2, 30),
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31b": _text(5376, 21504, 32, 16, 4, 60),
}
_LARGE_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "num_hidden_layers": 27,
}
_SMALL_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "num_hidden_layers": 16,
}
# The vision towers by kind; 12B projects patches without one.
TOWERS: dict[str, dict[str, int]] = {
    "e2b": _SMALL_TOWER,
    "e4b": _SMALL_TOWER,
    "12b": {"mm_embed_dim": 3840},
    "26b": _LARGE_TOWER,
    "31b": _LARGE_TOWER,
}


def period(kind: str) -> int:
    """Return after how many layers a language model's layers repeat."""
    return 5 if kind == "e2b" else len(LAYER_TYPES)


def text(kind: str, layers: int | None = None) -> dict[str, Any]:
    """Return the configuration of a language model.

    Args:
        kind: A key of ``TEXTS``.
        layers: How many there are, if not all. Those that share their keys and values
            with earlier ones are the same part of them.
    """
    found = dict(TEXTS[kind])
    whole = found["num_hidden_layers"]
    layers = layers or whole
    found["num_hidden_layers"] = layers
    found["layer_types"] = (LAYER_TYPES[-period(kind) :] * layers)[:layers]
    if shared := found.get("num_kv_shared_layers"):
        found["num_kv_shared_layers"] = shared * layers // whole
    return found


def gigabytes(kind: str, layers: int, vocabulary: int = 262144) -> float:
    """Return what the weights of ``layers`` layers take in bfloat16, about, in 1e9."""
    sizes = TEXTS[kind]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    per_layer = sizes.get("hidden_size_per_layer_input", 0)
    mlp = 3 * sizes["intermediate_size"]
    if sizes.get("use_double_wide_mlp"):
        shared = sizes["num_kv_shared_layers"] / sizes["num_hidden_layers"]
        mlp *= 1 + shared
    mlp += 3 * sizes.get("num_experts", 0) * sizes.get("moe_intermediate_size", 0)
    attention = 256 * 2 * (heads + sizes["num_key_value_heads"])
    one = hidden * (mlp + attention + 2 * per_layer) + vocabulary * per_layer
    tower = 0.6e9 if "head_dim" in TOWERS[kind] else 0.1e9
    # The embedding and the output layer, see ``write``.
    count: float = layers * one + 2 * hidden * vocabulary + tower
    return 2 * count / 1e9


def write(
    path: str | Path,
    kind: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any] | None = None,
) -> str:
    """Write a Gemma4 checkpoint without weights.

    Args:
        path: The directory, made if it is not there.
        kind: Decides the layout: ``"e2b"`` and ``"e4b"`` have clipped linears and
            embeddings a layer, ``"12b"`` no tower.
        text: Values of the language model's configuration.
        vision: Those of the tower's; without any the tower is tiny.

    Returns:
        ``path``.
    """
    layout = {"e4b": "e2b", "12b": "12b"}.get(kind, kind)
    ids = tiny_gemma4.save_processor(Path(path), 280, unified=layout == "12b")
    sections = {
        "text": {
            # As much as the real ones have.
            "max_position_embeddings": 262144,
            **text,
        },
        "vision": vision or {},
    }
    config = tiny_gemma4.config(layout, ids, 280, "bfloat16", sections)
    # Not as the real ones: with random weights every token would be followed by itself,
    # or two by one another, whatever attention makes of them. vLLM copies the outer one
    # to the text's.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.save_pretrained(path)
    return str(path)


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer for random texts to a new folder; return that.

    It has one token a character. Random tokens of the model's own tokenizer, bytes and
    unused ones, make a text that has up to three times as many when it is read.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    # In this order, as a text has them, the model's tokenizer merges none.
    ids = {chr(code): i for i, code in enumerate(range(33, 127))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def fill(model: Any) -> None:
    """Replace dummy weights, all but zero, by some that keep values of order one.

    Else most layers see zeros, and all tokens go to the same experts. A layer changes
    what a token is by a tenth, its attention by three: if it replaced that, as random
    weights do, the least rounding would decide which token is next, and no two kernels
    would agree; and if attention did less, a wrong mask would not show.
    """
    import torch

    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        # By its name: the trees' towers have different ones.
        torch.manual_seed(zlib.crc32(name.encode()))
        with torch.inference_mode():
            if value.ndim >= 2:
                value.normal_(0, value.shape[-1] ** -0.5)
            elif name.endswith(("_min", "_max")):
                # The bounds of clipped linears.
                value.fill_(-10.0 if name.endswith("_min") else 10.0)
            elif name.startswith("language_model.") and ".post_" in name:
                value.fill_(0.3 if ".post_attention" in name else 0.1)
            else:
                # Attention is not scaled by the head size.
                narrow = name.endswith(("q_norm.weight", "k_norm.weight"))
                value.fill_(0.5 if narrow else 1.0)


@functools.lru_cache(maxsize=64)
def _noise(rows: int, width: int, dtype: Any, device: Any) -> Any:
    """Normal values, the same for the same shape."""
    import torch

    random = torch.Generator(device).manual_seed(width)
    return torch.randn((rows, width), dtype=dtype, device=device, generator=random)


def varied(features: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Other features in the place of a tower's, unlike for unlike images.

    Random weights make like features of all patches, and all tokens of an image would
    go to the same experts. These depend on the pixels alone: in every tree they are the
    same ones, whatever else is in the batch.

    Args:
        features: Of images or videos, ``[soft tokens, width]`` each.
        kwargs: What ``embed_multimodal`` was given for them.

    Raises:
        RuntimeError: The videos of a batch have unlike numbers of frames.
    """
    import torch

    items = list(features)
    pixels = kwargs.get("pixel_values", kwargs.get("pixel_values_videos"))
    frames, rest = divmod(len(pixels), len(items))
    if rest:
        raise RuntimeError(f"{len(items)} videos have {len(pixels)} frames")
    # Of whole numbers, so that the order of the sum does not matter.
    sums = [(255 * frame).round().long().sum() for frame in pixels]
    result = []
    for i, item in enumerate(items):
        rows, width = item.shape
        first = sum(sums[i * frames : (i + 1) * frames]) % UNLIKE
        # Their sum stays on the GPU: nothing waits for it.
        index = torch.arange(rows, device=item.device) + first
        result.append(_noise(rows + UNLIKE, width, item.dtype, item.device)[index])
    return result


def vary_features(model: Any) -> None:
    """Let ``embed_multimodal`` of a model return ``varied`` features."""
    embed = model.embed_multimodal
    model.embed_multimodal = lambda **kwargs: varied(embed(**kwargs), kwargs)
