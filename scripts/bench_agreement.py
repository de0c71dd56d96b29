# SPDX-License-Identifier: Apache-2.0
"""Count the greedy tokens that engines have in common, of one tree and of both.

Each engine compiles for itself, and need not end up with the code of another one of the
same tree: that two trees do not answer alike says something only where two engines of
one tree do. Those that compile nothing tell whether the trees do the same. Each answers
again, so that what differs from run to run shows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts import bench_engine, real_gemma4, worker

# By name, the tree, and the level of ``bench_engine`` whose engines are like it: those
# that serve are compiled.
ENGINES = {
    "release": ("release", "serving"),
    "release-again": ("release", "serving"),
    "patched": ("patched", "serving"),
    "patched-again": ("patched", "serving"),
    "release-eager": ("release", "step"),
    "patched-eager": ("patched", "step"),
}
WORKLOADS = ("4,096 in, 16 out", "256 in, 256 out")


def bench_agreement(
    engines: Mapping[str, worker.Process], shrink: int
) -> Iterator[dict[str, Any]]:
    """Let all engines answer the same prompts, and compare each with each.

    Args:
        engines: By name.
        shrink: What lengths and numbers of prompts are divided by.

    Raises:
        RuntimeError: An engine repeats one token, whatever it is asked.
    """
    known = bench_engine.workloads(shrink)
    for workload in WORKLOADS:
        bench, options = known[workload]
        runs: dict[str, list[list[list[int]]]] = {}
        for name, engine in engines.items():
            # The first is a warm-up.
            _, *found = (engine("run", bench, options, 0, True) for _ in range(3))
            runs[name] = [run["answered"] for run in found]
            longer = [tokens for tokens in runs[name][0] if len(tokens) > 1]
            alike = sum(len(set(tokens)) == 1 for tokens in longer)
            if 2 * alike > len(longer):
                raise RuntimeError(f"{name} repeats one token: its answers say nothing")
        for one, other in itertools.combinations_with_replacement(engines, 2):
            same = bench_engine.agreement(runs[one][0], runs[other][one == other])
            yield {"workload": workload, "engine": one, "with": other, **same}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its lines; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_agreement", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=sorted(real_gemma4.TEXTS), default="e2b")
    help = "of the language model at most (default: 12, on CPU 1); fewer if no more fit"
    parser.add_argument("--layers", type=int, help=help)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    args = parser.parse_args(argv)

    import torch

    from scripts import unpatched

    cuda = torch.cuda.is_available()
    layers = args.layers or (12 if cuda else 1)
    device = "cpu"
    try:
        if cuda:
            gpu = torch.cuda.get_device_properties(0)
            device, memory = gpu.name, gpu.total_memory / 1e9
            room = bench_engine.fitting(args.kind, layers, len(ENGINES), memory)
            if args.layers and room < layers:
                raise RuntimeError(f"{room} layers fit, not {layers}")
            layers = room
        checkpoint = str(bench_engine.write_model(args.kind, layers, cuda))
        given = ["--checkpoint", checkpoint, "--context", str(bench_engine.STEP_TOKENS)]
        kv_gib = bench_engine.kv_gib(args.kind, layers)
        given += ["--kv", str(kv_gib)]
        about = {"kind": args.kind, "layers": layers, "dtype": "bfloat16"}
        about |= {"device": device, "kv_gib": kv_gib}
        release = str(unpatched.unpatched_tree())
        arguments = {}
        for name, (form, level) in ENGINES.items():
            arguments[name] = [level, *given, "--form", form]
            if form == "release":
                arguments[name] += ["--tree", release]
        with worker.engines("scripts.bench_engine", arguments) as engines:
            attention = {name: engine("layers") for name, engine in engines.items()}
            print(f"\n{args.kind}, {layers} layers\n", flush=True)
            for record in bench_agreement(engines, 1 if cuda else 64):
                record |= about
                record["attention"] = attention[record["engine"]]
                what = f"{record['workload']}: {record['engine']} | {record['with']}"
                print(
                    f"{what:<60} {record['first']} of {record['requests']} first,"
                    f" {record['equal']} of {record['tokens']} tokens",
                    flush=True,
                )
                worker.keep(args.json, record)
    except (OSError, RuntimeError) as error:
        print(f"bench_agreement: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
