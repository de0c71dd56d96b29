# SPDX-License-Identifier: Apache-2.0
"""Count the greedy tokens that engines have in common, of one tree and of both.

What an engine compiles depends on what was fastest when it started, and so does how its
sums are rounded: two engines of one tree need not answer alike, and that two trees do
not says nothing of them. Engines that compile nothing tell whether the trees do the
same. Each answers twice, so that what differs from run to run shows.
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
    """Let all engines answer the same prompts twice, and compare each with each.

    Args:
        engines: By name.
        shrink: What lengths and numbers of prompts are divided by.
    """
    known = bench_engine.workloads(shrink)
    for workload in WORKLOADS:
        bench, options = known[workload]
        runs: dict[str, list[list[list[int]]]] = {}
        for name, engine in engines.items():
            found = [engine("run", bench, options, 0, True) for _ in range(2)]
            runs[name] = [run["answered"] for run in found]
        for one, other in itertools.combinations_with_replacement(engines, 2):
            same = bench_engine.agreement(runs[one][0], runs[other][one == other])
            yield {"workload": workload, "engine": one, "with": other} | same


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
    try:
        if cuda:
            memory = torch.cuda.get_device_properties(0).total_memory / 1e9
            layers = bench_engine.fitting(args.kind, layers, len(ENGINES), memory)
        checkpoint = str(bench_engine.write_model(args.kind, layers, cuda))
        given = ["--checkpoint", checkpoint, "--context", str(bench_engine.STEP_TOKENS)]
        given += ["--kv", str(bench_engine.kv_gib(args.kind, layers))]
        arguments = {}
        for name, (form, level) in ENGINES.items():
            arguments[name] = [level, *given, "--form", form]
            if form == "release":
                arguments[name] += ["--tree", str(unpatched.unpatched_tree())]
        with worker.engines("scripts.bench_engine", arguments) as engines:
            print(f"\n{args.kind}, {layers} layers\n", flush=True)
            for record in bench_agreement(engines, 1 if cuda else 64):
                record |= {"kind": args.kind, "layers": layers}
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
