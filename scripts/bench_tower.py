# SPDX-License-Identifier: Apache-2.0
"""Time Gemma4's vision tower, unpatched against patched, in one run.

The release and each form of the patched tree have a process of their own with a whole
engine: a vision tower of real width cut to a few layers over a tiny language model, the
same weights in all. What the engine hands to its encoder for a request is recorded and
given to it again and again, by turns in the one process and the others.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scripts import demo, worker
from scripts.worker import ROOT, Process

TOWERS: dict[str, dict[str, int]] = {
    "26b": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "num_hidden_layers": 27,
    },
    "e2b": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "num_hidden_layers": 16,
    },
}
FORMS = {  # of the patched tree
    "eager": "as vLLM runs it if it is told nothing",
    "compiled": "compile_mm_encoder",
    "captured": "compile_mm_encoder and cudagraph_mm_encoder",
    "fp8": "compiled, linear layers in FP8, a scale a channel and token",
    "tp2": "compiled, weights shared by two GPUs",
    "data2": "compiled, images shared by two GPUs",
}
FORMS_OF_ONE_GPU = ("eager", "compiled", "captured")
KERNELS = {  # of a GPU, by their names
    "attention": re.compile("flash|fmha|attention|_attn", re.IGNORECASE),
    "GEMM": re.compile("gemm|nvjet|xmma|cutlass|cublas", re.IGNORECASE),
    "element-wise": re.compile(
        "triton|elementwise|norm|reduce|gelu|rotary|cat|clamp|copy"
    ),
}
# Width and height that the processor makes so many patches of: 17 x 16, 40 x 6 and
# 33 x 33 cells of nine for 280 and 1120 soft tokens, 7 x 10 for the 70 of a frame.
_PATCHES = {2448: (816, 768), 2160: (1968, 336), 9801: (1600, 1600), 630: (336, 480)}
_MIXED = [(768, 768), (1600, 400), (300, 900), (640, 480)] * 2


def batches() -> dict[str, demo.Example]:
    """The batches by name: items x soft tokens of each at most."""

    def images(*sizes: tuple[int, int], soft_tokens: int | None = None) -> Any:
        # No two alike, in all batches: an engine encodes what it knows only once.
        seed = len(found) * 100
        pictures = [demo.picture(*size, seed=seed + i) for i, size in enumerate(sizes)]
        return pictures, None, soft_tokens

    found: dict[str, Any] = {}
    found["1 x 280"] = images(_PATCHES[2448])
    found["8 x 280 mixed"] = images(*_MIXED)
    found["8 x 280"] = images(*[_PATCHES[2160]] * 8)
    found["32 x 280"] = images(*[_PATCHES[2160]] * 32)
    found["32 x 70 video"] = (), demo.moving_picture(32, *_PATCHES[630], seed=8)
    found["1 x 1120"] = images(_PATCHES[9801], soft_tokens=1120)
    return {name: demo.Example(name, "", *items) for name, items in found.items()}


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


class Encoder:
    """Records what a vLLM worker hands to its encoder, to give it again and again."""

    def __init__(self, worker: Any, form: str) -> None:
        self.model = worker.get_model()
        self.owner, self.method = self.model, "embed_multimodal"
        if form == "captured":
            from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

            self.owner, self.method = EncoderCudaGraphManager, "execute"
        self.calls: list[Callable[[], Any]] = []
        self.features: list[Any] = []
        self.compiled = self._compilations()

    def is_quantized(self) -> bool:
        layer = self.model.vision_tower.encoder.layers[0]
        size: int = layer.mlp.down_proj.weight.dtype.itemsize
        return size == 1

    @staticmethod
    def _compilations() -> int:
        from vllm.compilation.counter import compilation_counter

        seen: int = compilation_counter.num_graphs_seen
        return seen

    def start(self) -> None:
        """Record from now on."""
        self.calls, self.features = [], []
        self.patch = mock.patch.object(self.owner, self.method, self._recorder())
        self.patch.start()

    def _recorder(self) -> Callable[..., Any]:
        encode = getattr(self.owner, self.method)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(functools.partial(encode, *args, **kwargs))
            result = encode(*args, **kwargs)
            if result is None:
                raise RuntimeError("no CUDA graph has room for this batch")
            self.features.extend(item.float().cpu() for item in result)
            return result

        return record

    def stop(self, out: str) -> int:
        """Record no more; save the features to ``out``, return how many items."""
        import torch

        self.patch.stop()
        items = len(self.features)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            np.save(out, torch.cat(self.features).numpy())
        self.features = []
        return items

    def run(self) -> dict[str, float]:
        """Encode the batch once: seconds, and MiB of memory above what was used."""
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            if torch.distributed.get_world_size() > 1:
                torch.distributed.barrier()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        else:
            peak = _peak_rss()
            before = peak()
        with torch.inference_mode():
            start = time.perf_counter()
            results = [call() for call in self.calls]
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        del results
        most = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak()
        recompiled = self._compilations() - self.compiled
        if recompiled:
            raise RuntimeError(f"{recompiled} graphs were compiled after start-up")
        return {"seconds": seconds, "mib": most - before, "peak_mib": most}

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
    """The engine of one tree, in this process."""

    def __init__(self, checkpoint: Path, dtype: str, form: str, images: int) -> None:
        import torch
        from vllm import LLM

        tokens = max(8192, 320 * images)
        arguments = demo.engine_arguments(
            checkpoint,
            dtype=dtype,
            max_model_len=tokens,
            max_num_batched_tokens=tokens,
            limit_mm_per_prompt={"image": images, "video": 1, "audio": 0},
        )
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = 0.2
            # The other engines use the GPU, too, so free memory says nothing.
            arguments["kv_cache_memory_bytes"] = 4 << 30
            # Nothing of the tiny language model is worth a warm-up.
            arguments["attention_config"] = {"backend": "TRITON_ATTN"}
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

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        results: list[Any] = self.llm.collective_rpc(_ask, args=(method, *arguments))
        return results

    def prepare(self, batch: str, out: str) -> dict[str, Any]:
        """Record what is encoded for ``batch``; save its features to ``out``."""
        from vllm import SamplingParams

        example = batches()[batch]
        self.ask("start")
        sampling = SamplingParams(max_tokens=1)
        self.llm.generate(example.request(), sampling, use_tqdm=False)
        items = self.ask("stop", out)[0]
        if items != max(len(example.images), 1):
            raise RuntimeError(f"{items} items were encoded for {batch}")
        return {"items": items}

    def run(self) -> dict[str, float]:
        """As the slowest rank, and the one that takes the most memory."""
        results = self.ask("run")
        return {key: max(result[key] for result in results) for key in results[0]}

    def profile(self) -> Any:
        return self.ask("profile")[0]


def _arguments(
    checkpoint: Path, dtype: str, trees: dict[str, Path | None], images: int
) -> dict[str, list[str]]:
    """What each tree's process is started with."""
    found = {}
    for name, tree in trees.items():
        form = name if name in FORMS else "eager"
        own = quantize(checkpoint) if form == "fp8" else checkpoint
        found[name] = ["--checkpoint", str(own), "--dtype", dtype]
        found[name] += ["--forms", form, "--images", str(images)]
        if tree is not None:
            found[name] += ["--tree", str(tree)]
    return found


def measure(
    processes: dict[str, Process], batch: str, repeat: int, directory: Path
) -> list[dict[str, Any]]:
    """Measure one batch by turns; return one record for each tree.

    A record has the times in seconds, their median and quartiles, the largest
    memory of a run in MiB above what was used before it, and of the features'
    difference from the unpatched tree's the largest and, by the root of the mean
    square, that relative to the features.
    """
    prepared = {}
    for name, process in processes.items():
        prepared[name] = process("prepare", batch, str(directory / f"{name}.npy"))
        process("run")
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for turn in range(repeat):
        # Who goes first alternates, too.
        names = list(processes) if turn % 2 == 0 else list(processes)[::-1]
        for name in names:
            time.sleep(0.05)
            samples[name].append(processes[name]("run"))
    before = np.load(directory / "unpatched.npy")
    records = []
    for name, runs in samples.items():
        seconds = sorted(run["seconds"] for run in runs)
        low, median, high = np.percentile(seconds, [25, 50, 75])
        features = np.load(directory / f"{name}.npy")
        difference = features - before
        records.append(
            {
                "batch": batch,
                "tree": name,
                **prepared[name],
                "soft_tokens": len(features),
                "median": float(median),
                "quartiles": [float(low), float(high)],
                "mib": max(run["mib"] for run in runs),
                "peak_mib": max(run["peak_mib"] for run in runs),
                "difference": float(np.abs(difference).max()),
                "relative": float(np.sqrt(np.mean(difference**2) / np.mean(before**2))),
                "seconds": [run["seconds"] for run in runs],
            }
        )
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_tower", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=sorted(TOWERS), default="26b")
    parser.add_argument("--layers", type=int, help="default: 1 on CPU, all on CUDA")
    parser.add_argument("--batch", choices=sorted(batches()), action="append")
    parser.add_argument(
        "--repeat",
        type=int,
        help="runs a tree and batch (default: 3 on CPU, 21 on CUDA)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    known_forms = "; ".join(f"{name}: {what}" for name, what in FORMS.items())
    help = f"of the patched tree, default: eager, on CUDA two more ({known_forms})"
    parser.add_argument("--forms", type=lambda text: text.split(","), help=help)
    help = "also print where a GPU's time goes, a layer"
    parser.add_argument("--profile", action="store_true", help=help)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    parser.add_argument("--patched", type=Path, help="instead of the importable tree")
    for hidden in ("--checkpoint", "--tree", "--images"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        # By its name, so that the workers of several GPUs find it.
        from scripts import bench_tower

        images = int(args.images)
        form = args.forms[0]
        given = (Path(args.checkpoint), args.dtype, form, images)
        worker.serve(functools.partial(bench_tower.Engine, *given), args.tree)
        return 0
    if unknown := set(args.forms or ()) - FORMS.keys():
        parser.error(f"no form {', '.join(sorted(unknown))}")

    import torch

    from scripts import tiny_gemma4, unpatched

    cuda = torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    repeat = args.repeat or (21 if cuda else 3)
    known = batches()
    chosen = args.batch or [
        name for name in known if cuda or name not in ("8 x 280", "32 x 280")
    ]
    images = max(len(known[name].images) for name in chosen)
    layers = args.layers or (TOWERS[args.kind]["num_hidden_layers"] if cuda else 1)
    tower = TOWERS[args.kind] | {"num_hidden_layers": layers}
    name = f"bench{tiny_gemma4.RECIPE_VERSION}-{args.kind}-{layers}-{dtype}"
    try:
        forms = args.forms or (FORMS_OF_ONE_GPU if cuda else ["eager"])
        trees: dict[str, Path | None] = {"unpatched": unpatched.unpatched_tree()}
        trees |= dict.fromkeys(forms, args.patched)
        print("building the checkpoint ...", flush=True)
        with demo.quiet():
            checkpoint = tiny_gemma4.build(
                ROOT / "build" / "cache" / name,
                args.kind,
                dtype=dtype,
                text={"num_hidden_layers": 6, "max_position_embeddings": 16384},
                vision=tower,
            )
        with (
            worker.engines(
                "scripts.bench_tower", _arguments(checkpoint, dtype, trees, images)
            ) as processes,
            tempfile.TemporaryDirectory() as directory,
        ):
            kind = "GPU memory" if cuda else "resident"
            device = torch.cuda.get_device_name() if cuda else "cpu"
            print(
                f"\n{args.kind}, {layers} layers, {dtype},"
                f" {repeat} runs each; {kind} in MiB above what was used\n"
            )
            print(
                f"{'batch':<15} {'tree':<10} {'median ms':>10} {'quartiles':>19}"
                f" {'MiB':>7} {'off by':>8} {'or':>6} {'gain':>7}"
            )
            for batch in chosen:
                records = measure(processes, batch, repeat, Path(directory))
                for record in records:
                    low, high = (1e3 * value for value in record["quartiles"])
                    print(
                        f"{batch:<15} {record['tree']:<10}"
                        f" {1e3 * record['median']:>10.1f}"
                        f" {low:>9.1f}-{high:<9.1f}"
                        f" {record['mib']:>7.0f} {record['difference']:>8.1e}"
                        f" {record['relative']:>6.2%}"
                        f" {records[0]['median'] / record['median']:>6.2f}x",
                        flush=True,
                    )
                    if args.profile and cuda:
                        record |= processes[record["tree"]]("profile")
                        kinds = record["kinds"].items()
                        texts = [f"{kind} {us / layers:.1f}" for kind, us in kinds]
                        print("    us a layer: " + ", ".join(texts))
                        for name, calls, us in record["kernels"]:
                            print(f"      {us / layers:>8.1f} {calls:>5} {name}")
                if args.json is not None:
                    with args.json.open("a") as out:
                        for record in records:
                            record |= {"kind": args.kind, "dtype": dtype}
                            record |= {"layers": layers, "device": device}
                            out.write(json.dumps(record) + "\n")
    except (OSError, RuntimeError) as error:
        print(f"bench_tower: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
