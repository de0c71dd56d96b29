# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's vision tower beside vLLM's: as a peer in time, and as the truth.

A peer takes what an engine's encoder got in one call of ``get_image_features``, the
frames of a video as images, which every Transformers takes. ``hf-sdpa`` runs PyTorch's
attention, as Transformers does if it is told nothing. ``hf-flash`` runs FlashAttention:
the flash-attn package has no wheel for this PyTorch, so Transformers' own unpadding is
put around the forward kernel that vLLM ships, in the version that vLLM takes for this
head size and GPU. ``reference`` is float32 without TF32, one image or frame at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEERS = {
    "hf-sdpa": "Hugging Face's tower with SDPA",
    "hf-flash": "Hugging Face's tower with FlashAttention",
}
REFERENCE = "reference"
# Names of attention that no library has.
_FLASH, _BY_HEAD = "varlen", "eager_by_head"


def _peak_rss() -> Callable[[], float]:
    """Start over counting this process's peak memory; return a reader in MiB."""
    with contextlib.suppress(AttributeError, OSError):
        # What the last run freed and the allocator kept would hide this one's need.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not every container lets one
        Path("/proc/self/clear_refs").write_text("5")

    def read() -> float:
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024

    return read


def timed(encode: Callable[[], Any]) -> dict[str, float]:
    """Call ``encode`` once in inference mode.

    Returns:
        ``seconds``, ``mib`` of memory above what was used before, and ``peak_mib``, the
        most that was used: allocated on a GPU, resident on a CPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        distributed = torch.distributed
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.barrier()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        peak = _peak_rss()
        before = peak()
    with torch.inference_mode():
        start = time.perf_counter()
        results = encode()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    del results
    most = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak()
    return {"seconds": seconds, "mib": most - before, "peak_mib": most}


def save(features: list[Any], out: str) -> list[int]:
    """Write tensors [soft tokens, width], one an item, as float32; return lengths."""
    np.savez(out, *(item.float().cpu().numpy() for item in features))
    return [len(item) for item in features]


def flash_attention(
    varlen: Callable[..., Any],
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Transformers' attention by FlashAttention, without rows of padding.

    Args:
        varlen: vLLM's ``flash_attn_varlen_func``, its version chosen.
        module: The attention layer; it is not causal.
        query: [batch, heads, rows, head size], as are ``key`` and ``value``.
        key: See ``query``.
        value: See ``query``.
        attention_mask: bool [batch, rows], true where a row is no padding; None where
            none is.
        scaling: Of the scores.

    Returns:
        [batch, rows, heads, head size], zero in padding, and None for the weights.
    """
    import torch
    from transformers.modeling_flash_attention_utils import (
        _pad_input,
        _unpad_input,
        _upad_input,
    )

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch, rows = query.shape[:2]
    if attention_mask is None:
        packed = [x.flatten(0, 1) for x in (query, key, value)]
        ends = range(0, (batch + 1) * rows, rows)
        starts = torch.tensor(ends, dtype=torch.int32, device=query.device)
        longest = rows
    else:
        # As Transformers itself does it: in every layer, with a sync.
        *packed, indices, (starts, _), (longest, _) = _upad_input(
            query, key, value, attention_mask, rows, _unpad_input
        )
    output = varlen(
        *packed,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=False,
    )
    if attention_mask is None:
        return output.view(batch, rows, *output.shape[1:]), None
    return _pad_input(output, indices, batch, rows), None


def _vllm_varlen(head_size: int) -> Callable[..., Any]:
    """vLLM's FlashAttention for heads of this size; RuntimeError if there is none."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("FlashAttention takes a GPU")
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        raise RuntimeError(f"vLLM has no FlashAttention for heads of {head_size} here")
    # The package of version 3 does not split keys unless it is told to.
    more = {"num_splits": 1} if version == 3 else {}
    return functools.partial(flash_attn_varlen_func, fa_version=version, **more)


def _attend_by_head(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """Hugging Face's eager attention, head by head.

    All heads' scores of one image of 10,080 patches would take 6.5 GB.
    """
    import torch
    from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

    heads = zip(*(x.split(1, dim=1) for x in (query, key, value)), strict=True)
    parts = [
        eager_attention_forward(module, *head, mask, **kwargs)[0] for head in heads
    ]
    return torch.cat(parts, dim=2), None


def register_attention(varlen: Callable[..., Any] | None = None) -> None:
    """Make the two kinds of attention above known to Transformers.

    Args:
        varlen: What FlashAttention calls; None where it is not asked for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, flash_attention_mask

    AttentionInterface.register(_BY_HEAD, _attend_by_head)
    AttentionMaskInterface.register(_BY_HEAD, eager_mask)
    if varlen is not None:
        attention = functools.partial(flash_attention, varlen)
        AttentionInterface.register(_FLASH, attention)
        AttentionMaskInterface.register(_FLASH, flash_attention_mask)


def _joined(features: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """Features of images as those of items, which have ``counts`` of them."""
    import torch

    images = iter(features)
    return [torch.cat([next(images) for _ in range(count)]) for count in counts]


class Peer:
    """Hugging Face's model of a checkpoint, in this process.

    Args:
        checkpoint: Its directory.
        dtype: Of the weights and activations; the reference's is float32.
        form: A key of ``PEERS``, or ``REFERENCE``.

    Raises:
        RuntimeError: There is no FlashAttention here, or the tower has another
            attention than this form's.
    """

    def __init__(self, checkpoint: Path, dtype: str, form: str) -> None:
        import torch
        from transformers import Gemma4ForConditionalGeneration

        self.form = form
        names = {"hf-sdpa": "sdpa", "hf-flash": _FLASH, REFERENCE: _BY_HEAD}
        varlen = None
        if form == "hf-flash":
            from transformers import AutoConfig

            vision = AutoConfig.from_pretrained(checkpoint).vision_config
            varlen = _vllm_varlen(vision.head_dim)
        register_attention(varlen)
        torch.set_float32_matmul_precision("highest")
        model = Gemma4ForConditionalGeneration.from_pretrained(
            checkpoint,
            dtype="float32" if form == REFERENCE else dtype,
            attn_implementation={"vision_config": names[form]},
        )
        self.model = model.model.eval().to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        tower = self.model.vision_tower
        layers = [layer.self_attn for layer in tower.encoder.layers]
        found = {layer.config._attn_implementation for layer in layers}
        if found != {names[form]}:
            raise RuntimeError(f"the tower's attention is {found}, not {names[form]}")
        self.encode: Callable[[], list[Any]] = list

    def prepare(self, inputs: str, out: str) -> dict[str, Any]:
        """Encode what an engine's encoder got; save the features.

        Args:
            inputs: The file that ``bench_encoder.Encoder`` wrote.
            out: The file for the features, float32 [soft tokens, text width] an item.

        Returns:
            ``lengths``, the soft tokens of each item; or, if the batch is too large,
            ``skipped``, which says so.
        """
        import torch

        given = torch.load(inputs)
        encode = self._one_by_one if self.form == REFERENCE else self._at_once
        try:
            self.encode = encode(given["pixels"], given["positions"], given["counts"])
            with torch.inference_mode():
                return {"lengths": save(self.encode(), out)}
        except torch.OutOfMemoryError as error:
            self.encode = list
            return {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        finally:
            # What failed, or is not timed, leaves the memory to others.
            if self.form == REFERENCE or self.encode is list:
                torch.cuda.empty_cache()

    def _to_device(self, pixels: list[Any], positions: list[Any]) -> tuple[Any, Any]:
        """[images, rows, pixels of a patch] and [images, rows, 2] of the processor."""
        import torch

        model = self.model
        return (
            torch.stack(pixels).to(model.device, model.dtype),
            torch.stack(positions).to(model.device),
        )

    def _at_once(
        self, pixels: list[Any], positions: list[Any], counts: list[int]
    ) -> Callable[[], list[Any]]:
        images = self._to_device(pixels, positions)

        def encode() -> list[Any]:
            return _joined(self.model.get_image_features(*images).pooler_output, counts)

        return encode

    def _one_by_one(
        self, pixels: list[Any], positions: list[Any], counts: list[int]
    ) -> Callable[[], list[Any]]:
        def encode() -> list[Any]:
            rows = [
                self.model.get_image_features(*self._to_device([p], [at]))
                for p, at in zip(pixels, positions, strict=True)
            ]
            return _joined([row.pooler_output[0] for row in rows], counts)

        return encode

    def run(self) -> dict[str, float]:
        """Encode the batch once; see ``timed``."""
        return timed(self.encode)
