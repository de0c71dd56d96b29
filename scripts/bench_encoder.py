# SPDX-License-Identifier: Apache-2.0
"""An engine of one form of the vision tower, and the batches that it encodes.

A whole engine: a vision tower of real width over a tiny language model. What it hands
to its encoder for a request is recorded, and given to it again and again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scripts import demo
from scripts.bench_peers import save, timed

BACKENDS = {  # forms by attention backend: its name, and FlashAttention's version
    "sdpa": ("TORCH_SDPA", None),
    "triton": ("TRITON_ATTN", None),
    "fa2": ("FLASH_ATTN", 2),
    "fa3": ("FLASH_ATTN", 3),
    "fa4": ("FLASH_ATTN", 4),
    "flashinfer": ("FLASHINFER", None),
}
FORMS = {  # of the patched tree
    "eager": "as vLLM runs it if it is told nothing",
    "compiled": "compile_mm_encoder",
    "captured": "compile_mm_encoder and cudagraph_mm_encoder",
    "fp8": "compiled, linear layers in FP8, a scale a channel and token",
    "tp2": "compiled, weights shared by two GPUs",
    "data2": "compiled, images shared by two GPUs",
} | dict.fromkeys(BACKENDS, "compiled, with that attention")
# What each backend of the tower calls, by module, at least once a layer.
KERNEL_CALLS = {
    "TORCH_SDPA": ("vllm.v1.attention.ops.vit_attn_wrappers", "apply_sdpa"),
    "TRITON_ATTN": (
        "vllm.v1.attention.ops.triton_prefill_attention",
        "context_attention_fwd",
    ),
    "FLASH_ATTN": ("vllm.v1.attention.backends.fa_utils", "flash_attn_varlen_func"),
    "FLASHINFER": ("flashinfer.prefill", "cudnn_batch_prefill_with_kv_cache"),
}
# Of a GPU, by their names. Inductor's say all that they are fused of, which may be what
# a GEMM needs.
KERNELS = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "attention": "flash|fmha|attention|_attn|^_fwd_kernel",
        "GEMM": "^(?!triton_).*(gemm|nvjet|xmma|cutlass|cublas)|^triton_tem_",
        "element-wise": "triton|elementwise|norm|reduce|gelu|rotary|cat|clamp|copy",
    }.items()
}
# Width and height that the processor makes so many patches of: 17 x 16, 40 x 6, 20 x 14
# and 33 x 33 cells of nine for 280 and 1120 soft tokens, 7 x 10 for the 70 of a frame.
_PATCHES = {
    2448: (816, 768),
    2160: (1968, 336),
    2520: (960, 672),
    9801: (1600, 1600),
    630: (336, 480),
}
_MIXED = [(768, 768), (1600, 400), (300, 900), (640, 480)] * 2
_VIDEO = "32 x 70 video"
BATCHES: dict[str, list[tuple[int, int]]] = {  # items x soft tokens of each at most
    "1 x 280": [_PATCHES[2448]],
    "8 x 280 mixed": _MIXED,
    "8 x 280": [_PATCHES[2160]] * 8,
    # Without rows of padding, for which the release needs a mask.
    "8 x 280 full": [_PATCHES[2520]] * 8,
    "32 x 280": [_PATCHES[2160]] * 32,
    _VIDEO: [],
    "1 x 1120": [_PATCHES[9801]],
}
SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # on a GPU, on a CPU
    "images": ((1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4)),
    "soft_tokens": ((70, 140, 280, 560, 1120), (70, 140, 280)),
}
# Four by three, by soft tokens at most, in the sizes that the processor leaves alone:
# 9 x 7, 13 x 10, 19 x 14, 27 x 20 and 38 x 28 cells.
_SCALED = {
    70: (432, 336),
    140: (624, 480),
    280: (912, 672),
    560: (1296, 960),
    1120: (1824, 1344),
}


def example(name: str) -> demo.Example:
    """The batch of that name, or "images 64", "soft_tokens 560": a point of an axis."""
    axis, _, x = name.partition(" ")
    if axis in SCALES:
        count = int(x) if axis == "images" else 1
        soft_tokens = int(x) if axis == "soft_tokens" else 280
        images = _different(count, _SCALED[soft_tokens], seed=count)
        return demo.Example(name, "", images, max_soft_tokens=soft_tokens)
    if name == _VIDEO:
        return demo.Example(
            name, "", video=demo.moving_picture(32, *_PATCHES[630], seed=8)
        )
    seed = 100 * list(BATCHES).index(name)
    images = [demo.picture(*size, seed + i) for i, size in enumerate(BATCHES[name])]
    soft_tokens = int(name.split()[2])
    return demo.Example(name, "", images, max_soft_tokens=soft_tokens)


def _different(count: int, size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Pictures, none like another: copies of a few, each with a block of its own."""
    width, height = size
    random = np.random.default_rng(seed)
    few = [demo.picture(width, height, seed + i) for i in range(min(count, 4))]
    images = [few[i % len(few)].copy() for i in range(count)]
    for image in images:
        top, left = random.integers(0, height - 96), random.integers(0, width - 96)
        block = random.integers(0, 256, (96, 96, 3))
        image[top : top + 96, left : left + 96] = block
    return images


def images_of(name: str) -> int:
    """How many images ``example`` has; a video counts as one."""
    axis, _, x = name.partition(" ")
    return int(x) if axis == "images" else max(len(BATCHES.get(name, [])), 1)


def quantize(checkpoint: Path) -> Path:
    """Write a copy of ``checkpoint`` with FP8 linear layers in the tower's encoder.

    In the format of compressed-tensors: vLLM itself quantizes only towers whose sizes
    are multiples of 64, and 26B's MLP has 4304.
    """
    import torch
    from safetensors.torch import load_file, save_file

    target = checkpoint.with_name(f"{checkpoint.name}-fp8")
    written = shutil.ignore_patterns("model.safetensors", "config.json")
    shutil.copytree(checkpoint, target, ignore=written, dirs_exist_ok=True)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in list(tensors):
        if not re.search(r"vision_tower\.encoder\..*_proj\.linear\.weight$", name):
            continue
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": [r"re:.*vision_tower\.encoder\..*_proj"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def checked_items(items: int, most: int) -> list[int]:
    """The items whose features are compared: all, or ``most`` of them, evenly."""
    return sorted({round(at) for at in np.linspace(0, items - 1, min(items, most))})


class Encoder:
    """Records what a vLLM worker hands to its encoder, to give it again and again.

    Args:
        worker: The worker, with its model.
        form: One of ``FORMS``.

    Raises:
        RuntimeError: A layer has another attention backend than the form says.
    """

    def __init__(self, worker: Any, form: str) -> None:
        self.model, self.form = worker.get_model(), form
        self.owner, self.method = self.model, "embed_multimodal"
        if form == "captured":
            from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

            self.owner, self.method = EncoderCudaGraphManager, "execute"
        self.calls: list[functools.partial[Any]] = []
        self.compiled = self._compilations()
        # The release's has no such layers.
        self.layers = self.model.vision_tower.encoder.layers
        parts = [getattr(layer.self_attn, "attn", None) for layer in self.layers]
        found = {(p.attn_backend.name, p._fa_version) for p in parts if p is not None}
        self.attention = found.pop() if len(found) == 1 else None
        if found or self.attention != BACKENDS.get(form, self.attention):
            raise RuntimeError(
                f"the tower's attention is {self.attention or parts}, not as in {form}"
            )

    def is_quantized(self) -> bool:
        size: int = self.layers[0].mlp.down_proj.weight.dtype.itemsize
        return size == 1

    @staticmethod
    def _compilations() -> int:
        from vllm.compilation.counter import compilation_counter

        seen: int = compilation_counter.num_graphs_seen
        return seen

    def start(self) -> None:
        """Record from now on."""
        self.calls, self.no_graph = [], False
        encode = getattr(self.owner, self.method)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(functools.partial(encode, *args, **kwargs))
            # The manager itself is the first argument.
            before = args[0].graph_misses if self.form == "captured" else 0
            result = encode(*args, **kwargs)
            if self.form == "captured":
                self.no_graph = args[0].graph_misses > before
            return result

        self.patch = mock.patch.object(self.owner, self.method, record)
        self.patch.start()

    def stop(self, out: str, inputs: str, most: int) -> dict[str, Any]:
        """Record no more, encode the batch again and save its features.

        Args:
            out: The file for them, float32 [soft tokens, text width] an item.
            inputs: The file for what ``checked_items`` were made of; none if empty.
            most: How many items are checked.

        Returns:
            ``lengths``, the soft tokens of each item; ``digest`` of all inputs;
            ``attention``, the backend and version of the patched tree's layers. Or
            why it is ``skipped``.

        Raises:
            RuntimeError: There was not one call of the encoder, or its layers called
                another attention kernel than their backend's.
        """
        import torch

        self.patch.stop()
        if self.no_graph:
            return {"skipped": "no CUDA graph has room for an item of this batch"}
        if len(self.calls) != 1:
            raise RuntimeError(f"the batch was encoded in {len(self.calls)} calls")
        given = self.calls[0].keywords or self.calls[0].args[-1]
        video = "pixel_values_videos" in given
        suffix = "_videos" if video else ""
        pixels = list(given[f"pixel_values{suffix}"])
        positions = list(given[f"pixel_position_ids{suffix}"])
        counts = given["video_frame_counts"].tolist() if video else [1] * len(pixels)
        with self._watched(), torch.inference_mode():
            features = self.calls[0]()
        digest, lengths = 0, []
        for tensor in (*pixels, *positions):
            data = tensor.cpu().contiguous().view(torch.uint8).numpy()
            digest = zlib.crc32(data, digest)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            lengths = save(features, out)
        if inputs:
            frames = np.split(np.arange(len(pixels)), np.cumsum(counts)[:-1])
            items = checked_items(len(counts), most)
            rows = [row for item in items for row in frames[item]]
            saved = {
                "pixels": [pixels[row].cpu().clone() for row in rows],
                "positions": [positions[row].cpu().clone() for row in rows],
                "counts": [counts[item] for item in items],
            }
            torch.save(saved, inputs)
        attention = " ".join(str(part) for part in self.attention or () if part)
        return {"lengths": lengths, "digest": digest, "attention": attention}

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Raise RuntimeError unless all layers call the kernel that they should."""
        if self.attention is None or self.form == "captured":  # a graph calls nothing
            yield
            return
        backend, version = self.attention
        module, name = KERNEL_CALLS[backend]
        owner = importlib.import_module(module)
        kernel, versions = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            versions.append(kwargs.get("fa_version"))
            return kernel(*args, **kwargs)

        with mock.patch.object(owner, name, call):
            yield
        # With images spread over ranks one may have none.
        missing = not versions and self.form != "data2"
        if missing or len(versions) % len(self.layers) or set(versions) - {version}:
            raise RuntimeError(
                f"{len(self.layers)} layers of {version} called {name} like this:"
                f" {versions}"
            )

    def run(self) -> dict[str, float]:
        """Encode the batch once; see ``timed``. RuntimeError if that compiled it."""
        found = timed(self.calls[0])
        if recompiled := self._compilations() - self.compiled:
            raise RuntimeError(f"{recompiled} graphs were compiled after start-up")
        return found

    def profile(self) -> dict[str, Any]:
        """Where the GPU's time goes in one run, in microseconds.

        ``kinds`` are sums of kernels, with the time between them; ``kernels`` the ones
        that took longest, with their calls.
        """
        import torch

        profiler = torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            self.run()
        kinds: dict[str, float] = dict.fromkeys((*KERNELS, "other", "gaps"), 0.0)
        kernels: dict[str, list[float]] = {}
        spans = []
        for event in profile.events():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            start, end = event.time_range.start, event.time_range.end
            spans.append((start, end))
            found = (
                kind for kind, known in KERNELS.items() if known.search(event.name)
            )
            kinds[next(found, "other")] += end - start
            kernels.setdefault(event.name, []).append(end - start)
        whole = max(end for _, end in spans) - min(start for start, _ in spans)
        kinds["gaps"] = whole - sum(end - start for start, end in spans)
        slowest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:14]
        top = [(name[:90], len(times), sum(times)) for name, times in slowest]
        return {"kinds": kinds, "kernels": top}


def _attach(worker: Any, form: str) -> None:
    worker.bench = Encoder(worker, form)


def _ask(worker: Any, method: str, *arguments: Any) -> Any:
    return getattr(worker.bench, method)(*arguments)


class Engine:
    """The engine of one tree, in this process.

    Args:
        checkpoint: Its directory.
        dtype: Of weights and activations.
        form: One of ``FORMS``; ``eager`` for the release.
        images: How many images a request has at most.

    Raises:
        RuntimeError: The form cannot run here, or something else than it does.
    """

    def __init__(self, checkpoint: Path, dtype: str, form: str, images: int) -> None:
        import torch
        from vllm import LLM

        # All of a request's images are to be encoded in one step.
        tokens = max(8192, 320 * images)
        backend, version = BACKENDS.get(form, (None, None))
        if backend is not None:
            self._check_attention(backend, version)
        arguments = demo.engine_arguments(
            checkpoint,
            dtype=dtype,
            max_model_len=tokens,
            max_num_batched_tokens=tokens,
            limit_mm_per_prompt={"image": images, "video": 1, "audio": 0},
            mm_encoder_attn_backend=backend,
            # What is known is not encoded again.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            # The other engines use the memory, too, so free memory says nothing. A
            # token's keys and values take 6 layers x 2 x 2 heads of 64; twice that,
            # as the kinds of layers have pages of one size.
            kv_cache_memory_bytes=2 * tokens * 6 * 2 * 2 * 64 * 4,
            # It is for compiling the tower.
            skip_mm_profiling=form == "eager",
        )
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = 0.05
            # Nothing of the tiny language model is worth a warm-up.
            arguments["attention_config"] = {
                "backend": "TRITON_ATTN",
                "flash_attn_version": version,
            }
            arguments["kernel_config"] = {"enable_flashinfer_autotune": False}
        if form != "eager":
            arguments["enforce_eager"] = False
            arguments["compilation_config"] = {
                "cudagraph_mode": "NONE",
                "compile_mm_encoder": True,
                "cudagraph_mm_encoder": form == "captured",
            }
        if form in ("tp2", "data2"):
            arguments["tensor_parallel_size"] = 2
            mode = "data" if form == "data2" else "weights"
            arguments["mm_encoder_tp_mode"] = mode
        self.llm = LLM(**arguments)
        self.llm.collective_rpc(_attach, args=(form,))
        if form == "fp8" and not all(self.ask("is_quantized")):
            raise RuntimeError("vLLM left this tower unquantized")

    @staticmethod
    def _check_attention(backend: str, version: int | None) -> None:
        """Raise RuntimeError if there is none here, before an engine is made."""
        from vllm.platforms import current_platform

        known = [b.name for b in current_platform.get_supported_vit_attn_backends()]
        if backend not in known:
            raise RuntimeError(f"vLLM has {', '.join(known)} for vision towers here")
        if version is not None:
            from vllm.vllm_flash_attn import flash_attn_interface

            # vLLM itself would take another one.
            if no := flash_attn_interface.fa_version_unsupported_reason(version):
                raise RuntimeError(no)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        results: list[Any] = self.llm.collective_rpc(_ask, args=(method, *arguments))
        return results

    def prepare(self, name: str, out: str, inputs: str, most: int) -> dict[str, Any]:
        """Have the engine encode ``example(name)``; see ``Encoder.stop``."""
        from vllm import SamplingParams

        batch = example(name)
        self.ask("start")
        sampling = SamplingParams(max_tokens=1)
        self.llm.generate(batch.request(), sampling, use_tqdm=False)
        about: dict[str, Any] = self.ask("stop", out, inputs, most)[0]
        if "skipped" in about:
            return about
        if len(about["lengths"]) != max(len(batch.images), 1):
            raise RuntimeError(f"{len(about['lengths'])} items were encoded for {name}")
        return about

    def run(self) -> dict[str, float]:
        """As the slowest rank, and the one that takes the most memory."""
        results = self.ask("run")
        return {key: max(result[key] for result in results) for key in results[0]}

    def profile(self) -> Any:
        return self.ask("profile")[0]
