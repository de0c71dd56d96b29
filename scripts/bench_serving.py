# SPDX-License-Identifier: Apache-2.0
"""Time vLLM's own throughput and latency benchmarks, release against patched tree.

A language model of real width with dummy weights and a tower of real size; an engine
each for the release, the patched tree and the patched tree on Triton attention, all at
once. They take every workload by turns, each time with prompts that are new to them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scripts import worker
from scripts.worker import ROOT, Process

FORMS = {  # attention backend, and whether the tree is the release's
    "release": ("", True),
    "patched": ("", False),
    "triton": ("TRITON_ATTN", False),
}
MAX_MODEL_LEN = 16384
IMAGE = (672, 960)  # height and width: 280 soft tokens


def _random(inputs: int, outputs: int, prompts: int) -> list[str]:
    lengths = ["--random-input-len", str(inputs), "--random-output-len", str(outputs)]
    return ["--dataset-name", "random", *lengths, "--num-prompts", str(prompts)]


def _images(inputs: int, outputs: int, prompts: int, images: int) -> list[str]:
    lengths = _random(inputs, outputs, prompts)[2:]
    shape = str({(*IMAGE, 1): 1.0})
    return [
        # Without a path, which it does not read, vLLM would take "random".
        *("--backend", "vllm-chat", "--dataset-name", "random-mm", *lengths),
        *("--dataset-path", "none"),
        *("--random-mm-base-items-per-request", str(images)),
        *("--random-mm-bucket-config", shape),
        *("--random-mm-limit-mm-per-prompt", json.dumps({"image": images, "video": 0})),
    ]


def _batch(inputs: int, outputs: int, rows: int) -> list[str]:
    lengths = ["--input-len", str(inputs), "--output-len", str(outputs)]
    few = ["--num-iters", "3", "--num-iters-warmup", "1"]
    return [*lengths, "--batch-size", str(rows), *few]


def workloads(shrink: int) -> dict[str, tuple[str, list[str]]]:
    """The benchmark and its options by workload.

    Args:
        shrink: What lengths and numbers of prompts are divided by.
    """

    def less(count: int) -> int:
        return max(count // shrink, 1)

    def throughput(inputs: int, outputs: int, prompts: int) -> tuple[str, list[str]]:
        lengths = less(inputs), less(outputs), less(prompts)
        return "throughput", _random(*lengths)

    def latency(inputs: int, outputs: int, rows: int) -> tuple[str, list[str]]:
        return "latency", _batch(less(inputs), less(outputs), rows)

    def images(prompts: int, each: int) -> tuple[str, list[str]]:
        return "throughput", _images(less(256), less(64), less(prompts), each)

    return {
        "4,096 in, 16 out": throughput(4096, 16, 64),
        "8,192 in, 128 out": throughput(8192, 128, 32),
        "15,872 in, 128 out": throughput(15872, 128, 16),
        "1,024 in, 1,024 out": throughput(1024, 1024, 64),
        "256 in, 256 out": throughput(256, 256, 256),
        "chat, 1 image": images(64, 1),
        "chat, 4 images": images(32, 4),
        "first token of 4,096": latency(4096, 1, 1),
        "8,192 in, 128 out, alone": latency(8192, 128, 1),
        "128 in, 128 out, alone": latency(128, 128, 1),
        "128 in, 128 out, 8 at once": latency(128, 128, 8),
    }


def _vary_features(model: Any) -> None:
    """Let images differ: random weights make like features of all patches.

    All tokens of an image would go to the same experts.
    """
    import torch

    embed = model.embed_multimodal

    def embed_multimodal(**kwargs: Any) -> Any:
        return [torch.randn_like(item) for item in embed(**kwargs)]

    model.embed_multimodal = embed_multimodal


class Engine:
    """An engine on which vLLM's benchmarks run, which make one of their own else."""

    def __init__(self, checkpoint: str, backend: str) -> None:
        import torch

        self.options = [
            *("--model", checkpoint, "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"),
            *("--limit-mm-per-prompt", json.dumps({"image": 4, "audio": 0})),
            "--disable-detokenize",
        ]
        if torch.cuda.is_available():
            # The other engines use the GPU, too: free memory says nothing.
            self.options += ["--kv-cache-memory-bytes", str(16 << 30)]
            self.options += ["--gpu-memory-utilization", "0.3"]
        if backend:
            self.options += ["--attention-backend", backend]
        self.llm: Any = None
        self.run("latency", _batch(16, 1, 1), 0)

    def _from_engine_args(self, arguments: Any) -> Any:
        import torch
        from vllm import LLM

        from scripts.bench_mm_prefix import fill

        if self.llm is None:
            self.llm = LLM(**vars(arguments))
            with torch.inference_mode():
                self.llm.apply_model(fill)
            self.llm.apply_model(_vary_features)
        return self.llm

    def run(self, bench: str, options: list[str], seed: int) -> dict[str, float]:
        """Run a benchmark once: seconds, and tokens a second of throughput."""
        import importlib

        import vllm
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        module = importlib.import_module(f"vllm.benchmarks.{bench}")
        parser = FlexibleArgumentParser()
        module.add_cli_args(parser)
        make = mock.patch.object(vllm.LLM, "from_engine_args", self._from_engine_args)
        with tempfile.TemporaryDirectory() as folder, make:
            out = f"{folder}/out.json"
            given = [*options, *self.options, "--seed", str(seed), "--output-json", out]
            np.random.seed(seed)
            args = parser.parse_args(given)
            module.main(args)
            found = json.loads(Path(out).read_text())
        if bench == "latency":
            return {"seconds": float(np.median(found["latencies"]))}
        if "random-mm" in options:
            images = args.num_prompts * args.random_mm_base_items_per_request
            # An image of this size has more than 200.
            if found["total_num_tokens"] < 200 * images:
                raise RuntimeError(f"there were no {images} images in the prompts")
        names = ("elapsed_time", "tokens_per_second", "total_num_tokens")
        seconds, rate, tokens = (found[name] for name in names)
        return {"seconds": seconds, "tokens_per_second": rate, "tokens": tokens}


def _arguments(checkpoint: str, forms: list[str]) -> dict[str, list[str]]:
    """What each form's process is started with."""
    from scripts import unpatched

    found = {}
    for name in forms:
        backend, is_release = FORMS[name]
        found[name] = ["--checkpoint", checkpoint, f"--backend={backend}"]
        if is_release:
            found[name] += ["--tree", str(unpatched.unpatched_tree())]
    return found


def measure(
    engines: dict[str, Process], bench: str, options: list[str], repeat: int
) -> list[dict[str, Any]]:
    """Run a workload by turns; return one record for each engine.

    A record has the seconds and, of throughput, the tokens a second of each run, and
    the median of what is reported of it.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for turn in range(repeat + 1):
        names = list(engines) if turn % 2 == 0 else list(engines)[::-1]
        for name in names:
            runs[name].append(engines[name]("run", bench, options, turn))
    records = []
    unit = "tokens_per_second" if bench == "throughput" else "seconds"
    for name, found in runs.items():
        # The first was a warm-up.
        samples = {key: [run[key] for run in found[1:]] for key in found[0]}
        low, median, high = np.percentile(samples[unit], [25, 50, 75])
        records.append(
            {
                "tree": name,
                "unit": unit,
                "median": float(median),
                "quartiles": [float(low), float(high)],
                "samples": samples,
            }
        )
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=("26b", "31b"), default="26b")
    help = "of the language model (default: 12)"
    parser.add_argument("--layers", type=int, default=12, help=help)
    help = "some of the workloads, separated by semicolons"
    parser.add_argument("--workloads", type=lambda text: text.split(";"), help=help)
    help = "divide lengths and prompts by this (default: 1, 64 on CPU)"
    parser.add_argument("--shrink", type=int, help=help)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    help = f"of {', '.join(FORMS)} (default: all, on CPU the first two)"
    parser.add_argument("--forms", type=lambda text: text.split(","), help=help)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    for hidden in ("--checkpoint", "--backend", "--tree"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        make = functools.partial(Engine, args.checkpoint, args.backend)
        worker.serve(make, args.tree)
        return 0

    import torch

    from scripts import demo
    from scripts.bench_mm_prefix import LAYER_TYPES, TEXTS, write_checkpoint
    from scripts.bench_tower import TOWERS

    cuda = torch.cuda.is_available()
    known = workloads(args.shrink or (1 if cuda else 64))
    chosen = args.workloads or list(known)
    forms = args.forms or (list(FORMS) if cuda else ["release", "patched"])
    if unknown := (set(chosen) - set(known)) | (set(forms) - set(FORMS)):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    types = (LAYER_TYPES * args.layers)[: args.layers]
    text = {"head_dim": 256, "global_head_dim": 512, **TEXTS[args.kind]}
    text |= {"num_hidden_layers": args.layers, "layer_types": types}
    # The tokenizer's few are among them, and the latency benchmark's 10,000.
    text |= {"vocab_size": 262144 if cuda else 16384}
    about = {"kind": args.kind, "layers": args.layers}
    about["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    folder = ROOT / "build" / "cache" / f"serving-{args.kind}-{args.layers}"
    try:
        with demo.quiet():
            write_checkpoint(str(folder), text, TOWERS["26b"])
        arguments = _arguments(str(folder), forms)
        with worker.engines("scripts.bench_serving", arguments) as engines:
            print(f"\n{args.kind}, {args.layers} layers, {args.repeat} runs each\n")
            print(f"{'workload':<28} {'engine':<10} {'median':>12} {'quartiles':>21}")
            for name in chosen:
                records = measure(engines, *known[name], args.repeat)
                for record in records:
                    record |= {"workload": name, "bench": known[name][0]} | about
                    low, high = record["quartiles"]
                    spread = f"{low:,.2f} to {high:,.2f}"
                    unit = "tok/s" if record["bench"] == "throughput" else "s"
                    print(
                        f"{name:<28} {record['tree']:<10}"
                        f" {record['median']:>12,.2f} {spread:>21} {unit}",
                        flush=True,
                    )
                if args.json is not None:
                    with args.json.open("a") as out:
                        for record in records:
                            out.write(json.dumps(record) + "\n")
    except (OSError, RuntimeError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
