# SPDX-License-Identifier: Apache-2.0
"""Time Gemma4's vision tower, unpatched against patched, in one run.

Each tree has a process of its own with a whole engine: a vision tower of real width
cut to a few layers over a tiny language model, the same weights in both. What the
engine hands to its model for a request is recorded and given to the model's
``embed_multimodal`` again and again, by turns in the one process and the other.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from scripts import demo

ROOT = Path(__file__).resolve().parent.parent

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
_MIXED = [(768, 768), (1600, 400), (300, 900), (640, 480)] * 2


def batches() -> dict[str, demo.Example]:
    """The batches by name: items x soft tokens of each at most."""
    mixed = [demo.picture(*size, seed=i) for i, size in enumerate(_MIXED)]
    return {
        "1 x 280": demo.Example("1 x 280", "", [demo.picture(768, 768, seed=9)]),
        "8 x 280 mixed": demo.Example("8 x 280 mixed", "", mixed),
        "32 x 70 video": demo.Example(
            "32 x 70 video", "", video=demo.moving_picture(32, 640, 480, seed=8)
        ),
        "1 x 1120": demo.Example(
            "1 x 1120", "", [demo.picture(1600, 1600, seed=7)], None, 1120
        ),
    }


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


class Worker:
    """The engine of one tree, in this process."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        import torch
        from vllm import LLM

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        arguments = demo.engine_arguments(
            checkpoint,
            dtype=dtype,
            max_num_batched_tokens=8192,
            limit_mm_per_prompt={"image": 8, "video": 1, "audio": 0},
        )
        if self.cuda:
            arguments["gpu_memory_utilization"] = 0.3
        self.llm = LLM(**arguments)
        self.model: Any = None
        self.calls: list[dict[str, Any]] = []
        self.llm.apply_model(lambda model: setattr(self, "model", model))

    def prepare(self, batch: str, out: str) -> dict[str, Any]:
        """Record the engine's calls for ``batch``; save its features to ``out``."""
        from vllm import SamplingParams

        calls: list[dict[str, Any]] = []
        features: list[Any] = []
        embed = self.model.embed_multimodal

        def record(**kwargs: Any) -> Any:
            calls.append(kwargs)
            result = embed(**kwargs)
            features.extend(item.float().cpu() for item in result)
            return result

        self.model.embed_multimodal = record
        request = batches()[batch].request()
        self.llm.generate(request, SamplingParams(max_tokens=1), use_tqdm=False)
        del self.model.embed_multimodal
        self.calls = calls
        np.save(out, self.torch.cat(features).numpy())
        return {"calls": len(calls), "items": len(features)}

    def run(self) -> dict[str, float]:
        """Encode the batch once: seconds, and MiB of memory above what was used."""
        torch = self.torch
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        else:
            peak = _peak_rss()
            before = peak()
        with torch.inference_mode():
            start = time.perf_counter()
            results = [self.model.embed_multimodal(**kwargs) for kwargs in self.calls]
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        del results
        most = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else peak()
        return {"seconds": seconds, "mib": most - before, "peak_mib": most}


def serve(checkpoint: Path, dtype: str, tree: str | None) -> None:
    """Answer requests from stdin, one JSON object a line, on what was stdout."""
    if tree is not None:
        # Before what the environment puts first.
        sys.path.insert(0, tree)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries print is no answer
    worker = Worker(checkpoint, dtype)
    import vllm

    print(json.dumps(str(Path(vllm.__file__).parents[1])), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        result = getattr(worker, method)(*arguments)
        print(json.dumps(result), file=answers, flush=True)


class Process:
    """A worker process and its log."""

    def __init__(
        self, log: IO[bytes], checkpoint: Path, dtype: str, tree: Path | None
    ) -> None:
        self.log = log
        command = [sys.executable, "-m", "scripts.bench_tower", "--serve"]
        command += ["--checkpoint", str(checkpoint), "--dtype", dtype]
        if tree is not None:
            command += ["--tree", str(tree)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
                # One process waits while the other works: it must not spin.
                "OMP_WAIT_POLICY": "passive",
                "KMP_BLOCKTIME": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            sys.stderr.write(self.log.read()[-5000:].decode(errors="replace"))
            raise RuntimeError("an engine died, its log is above")
        return json.loads(line)

    def __call__(self, *request: str) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def _processes(
    checkpoint: Path, dtype: str, trees: dict[str, Path | None]
) -> Iterator[dict[str, Process]]:
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, tree in trees.items():
            log = stack.enter_context(tempfile.TemporaryFile())
            print(f"starting the {name} engine ...", flush=True)
            processes[name] = Process(log, checkpoint, dtype, tree)
            stack.callback(processes[name].stop)
            # One after the other: their loading would fight for the cores.
            print(f"{name}: vLLM from {processes[name].answer()}", flush=True)
        yield processes


def measure(
    processes: dict[str, Process], batch: str, repeat: int, directory: Path
) -> list[dict[str, Any]]:
    """Measure one batch by turns; return one record for each tree.

    A record has the times in seconds, their median and quartiles, the largest
    memory of a run in MiB above what was used before it, and the largest difference
    of the features from the unpatched tree's.
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
                "difference": float(np.abs(features - before).max()),
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
        help="runs a tree and batch (default: 3 on CPU, 9 on CUDA)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="append the records to this file")
    parser.add_argument("--patched", type=Path, help="instead of the importable tree")
    for hidden in ("--checkpoint", "--tree"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(Path(args.checkpoint), args.dtype, args.tree)
        return 0

    import torch

    from scripts import tiny_gemma4, unpatched

    cuda = torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    repeat = args.repeat or (9 if cuda else 3)
    tower = dict(TOWERS[args.kind])
    if args.layers is not None or not cuda:
        tower["num_hidden_layers"] = args.layers or 1
    name = f"bench-{args.kind}-{tower['num_hidden_layers']}-{dtype}"
    try:
        trees = {"unpatched": unpatched.unpatched_tree(), "patched": args.patched}
        print("building the checkpoint ...", flush=True)
        with demo.quiet():
            checkpoint = tiny_gemma4.build(
                ROOT / "build" / "cache" / name,
                args.kind,
                dtype=dtype,
                text={"num_hidden_layers": 6},
                vision=tower,
            )
        with (
            _processes(checkpoint, dtype, trees) as processes,
            tempfile.TemporaryDirectory() as directory,
        ):
            kind = "GPU memory" if cuda else "resident"
            print(
                f"\n{args.kind}, {tower['num_hidden_layers']} layers, {dtype},"
                f" {repeat} runs each; {kind} in MiB above what was used\n"
            )
            print(
                f"{'batch':<15} {'tree':<10} {'median ms':>10} {'quartiles':>19}"
                f" {'MiB':>7} {'off by':>8}"
            )
            for batch in args.batch or batches():
                records = measure(processes, batch, repeat, Path(directory))
                for record in records:
                    low, high = (1e3 * value for value in record["quartiles"])
                    print(
                        f"{batch:<15} {record['tree']:<10}"
                        f" {1e3 * record['median']:>10.1f}"
                        f" {low:>9.1f}-{high:<9.1f}"
                        f" {record['mib']:>7.0f} {record['difference']:>8.1e}",
                        flush=True,
                    )
                ratio = records[0]["median"] / records[1]["median"]
                print(f"{batch:<15} {'speedup':<10} {ratio:>9.2f}x", flush=True)
                if args.json is not None:
                    with args.json.open("a") as out:
                        for record in records:
                            record |= {"kind": args.kind, "dtype": dtype}
                            record["layers"] = tower["num_hidden_layers"]
                            record["device"] = (
                                torch.cuda.get_device_name() if cuda else "cpu"
                            )
                            out.write(json.dumps(record) + "\n")
    except (OSError, RuntimeError) as error:
        print(f"bench_tower: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
