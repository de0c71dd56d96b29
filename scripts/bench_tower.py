# SPDX-License-Identifier: Apache-2.0
"""Time and check Gemma4's vision tower: the release, the patched tree and its peers.

The release and each form of the patched tree have an engine in a process of its own
(``bench_encoder``), the same weights in all. They encode every batch by turns, in the
one process and the others. Hugging Face's tower takes what the release's encoder got:
as peers that are timed, and in float32 as what all features are compared with
(``bench_peers``). ``--scale`` follows axes instead.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scripts import demo, worker
from scripts.bench_encoder import (
    BATCHES,
    FORMS,
    SCALES,
    Engine,
    checked_items,
    images_of,
    quantize,
)
from scripts.bench_peers import PEERS, REFERENCE, Peer
from scripts.real_gemma4 import TOWERS
from scripts.worker import ROOT, Process

CACHE = ROOT / "build" / "cache"
# The language model is not timed; what it has would be compiled with the tower.
TEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 131072,
}
KINDS = ("26b", "e2b")
# What a run takes, if nothing else is said; the release is always there.
GPU_FORMS = (*PEERS, "eager", "compiled", "captured")
CPU_FORMS = ("hf-sdpa", "eager")
SCALE_FORMS = ("eager", "compiled")
NEED_GPUS = dict.fromkeys(("hf-flash", "captured", "fp8", "fa2", "fa3", "fa4"), 1)
NEED_GPUS |= {"flashinfer": 1, "tp2": 2, "data2": 2}
SLOW_ON_CPU = ("8 x 280", "8 x 280 full", "32 x 280")
# Of a point of an axis so many items are compared with the reference.
SCALE_CHECKED = 4
# What a run is nothing without.
REQUIRED = ("unpatched", REFERENCE, "eager")


class Group:
    """The processes that are measured by turns.

    Args:
        processes: By form. ``unpatched`` is the release, ``REFERENCE`` is not timed.
    """

    def __init__(self, processes: dict[str, Process]) -> None:
        self.processes = processes
        self.ended: dict[str, dict[str, Any]] = {}

    @property
    def engines(self) -> list[str]:
        """The forms that are not Hugging Face's."""
        others = (*PEERS, REFERENCE)
        return [name for name in self.processes if name not in others]

    def ask(self, name: str, *request: Any) -> dict[str, Any]:
        """Ask one; ``skipped`` says why if that ended it.

        Raises:
            RuntimeError: It ended, and is one of ``REQUIRED``.
        """
        try:
            if name in self.ended:
                return self.ended[name]
            answer: dict[str, Any] = self.processes[name](*request)
        except RuntimeError as error:
            if name in REQUIRED:
                raise
            self.processes.pop(name).stop()
            answer = {"skipped": reason(str(error))}
            self.ended[name] = {"skipped": f"ended before: {answer['skipped']}"}
        return answer

    def prepare(self, batch: str, folder: Path, most: int) -> dict[str, dict[str, Any]]:
        """Have all encode a batch; return what they say, by form.

        Features go to ``folder``; ``most`` is how many items are checked.
        """
        inputs = str(folder / "inputs.pt")

        def encode(name: str) -> dict[str, Any]:
            out = str(folder / f"{name}.npz")
            saved = inputs if name == "unpatched" else ""
            return self.ask(name, "prepare", batch, out, saved, most)

        def follow(name: str) -> dict[str, Any]:
            return self.ask(name, "prepare", inputs, str(folder / f"{name}.npz"))

        names, engines = list(self.processes), self.engines
        peers = [name for name in names if name not in engines]
        with ThreadPoolExecutor(worker.at_once()) as pool:
            answers = dict(zip(engines, pool.map(encode, engines), strict=True))
            answers |= zip(peers, pool.map(follow, peers), strict=True)
        before = {k: v for k, v in self.ended.items() if k not in answers}
        return {name: answers[name] for name in names} | before

    def turns(
        self, names: Sequence[str], least: int, most: int, seconds: float
    ) -> dict[str, list[dict[str, float]]]:
        """Run each ``most`` times, or ``least`` times and for so many seconds."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(most):
            left = [
                name
                for name in names
                if name not in self.ended
                and (turn < least or sum(r["seconds"] for r in runs[name]) < seconds)
            ]
            # Who goes first alternates, too.
            for name in left if turn % 2 == 0 else left[::-1]:
                time.sleep(0.02)
                runs[name].append(self.ask(name, "run"))
        return runs


def reason(text: str) -> str:
    """What ended a process, in a line."""
    return text.rpartition("its log is above: ")[2].splitlines()[0][:200]


def load(path: Path) -> list[np.ndarray]:
    """The features that ``bench_peers.save`` wrote."""
    with np.load(path) as saved:
        return [saved[f"arr_{i}"] for i in range(len(saved.files))]


def errors(
    features: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> dict[str, float]:
    """How far features are from the reference's.

    Args:
        features: [soft tokens, text width] an item.
        reference: The same items.

    Returns:
        ``error``, the root of the mean square of the difference over that of the
        reference, and ``max_error``, the largest difference.

    Raises:
        RuntimeError: Shapes differ, or something is not a number or all zero.
    """
    shapes = [[item.shape for item in items] for items in (features, reference)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"features are {shapes[0]}, the reference {shapes[1]}")
    found, wanted = (
        np.concatenate(x).astype(np.float64) for x in (features, reference)
    )
    difference = found - wanted
    if not np.isfinite(difference).all() or not wanted.any():
        raise RuntimeError("features are not finite, or the reference is zero")
    ratio = np.mean(difference**2) / np.mean(wanted**2)
    return {"error": float(ratio**0.5), "max_error": float(np.abs(difference).max())}


def measure(
    group: Group,
    batch: str,
    folder: Path,
    *,
    least: int,
    most: int,
    seconds: float,
    checked: int,
) -> list[dict[str, Any]]:
    """Measure a batch by turns; return one record for each form.

    Args:
        group: The processes.
        batch: What ``example`` takes.
        folder: For their features.
        least: How often each form runs, at least.
        most: And at most.
        seconds: After so many a form does not run again.
        checked: How many items are compared with the reference.

    Returns:
        By ``tree``: ``items`` and ``soft_tokens`` of the batch and how many
        ``checked_items``, ``median``, ``quartiles`` and ``samples`` of the seconds, the
        most ``mib`` and ``peak_mib`` of a run, ``error`` and ``max_error``, and of the
        patched tree its ``attention``; or why it was ``skipped``.

    Raises:
        RuntimeError: Forms had other inputs than the release, or one of ``REQUIRED``
            has features that are not to be compared.
    """
    answers = group.prepare(batch, folder, checked)
    truth = answers.pop(REFERENCE)
    if "skipped" in truth:
        raise RuntimeError(f"there is no reference for {batch}: {truth['skipped']}")
    records = [
        {"tree": name, "skipped": answer["skipped"]}
        for name, answer in answers.items()
        if "skipped" in answer
    ]
    release, reference = answers["unpatched"], load(folder / f"{REFERENCE}.npz")
    lengths = release["lengths"]
    items = checked_items(len(lengths), checked)
    names = [name for name in answers if "skipped" not in answers[name]]
    for name in names:
        for what in ("lengths", "digest"):
            if (found := answers[name].get(what, release[what])) != release[what]:
                raise RuntimeError(
                    f"{batch}: {what} of {name} {found}, not {release[what]}"
                )
    for name, runs in group.turns(names, least, most, seconds).items():
        if died := [run["skipped"] for run in runs if "skipped" in run]:
            records.append({"tree": name, "skipped": died[0]})
            continue
        features = load(folder / f"{name}.npz")
        try:
            off = errors([features[item] for item in items], reference)
        except RuntimeError as error:
            if name in REQUIRED:
                raise
            # What the others measured is not lost with it.
            records.append({"tree": name, "skipped": str(error)})
            continue
        record = {
            "tree": name,
            "items": len(lengths),
            "soft_tokens": sum(lengths),
            "checked_items": len(items),
            **worker.spread([run["seconds"] for run in runs]),
            "mib": max(run["mib"] for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
            **off,
        }
        if attention := answers[name].get("attention"):
            record["attention"] = attention
        records.append(record)
    return records


def scaled(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record of ``measure`` as one of the level of scaling."""
    axis, _, x = name.partition(" ")
    return {"axis": axis, "x": int(x)} | record


def show(name: str, record: dict[str, Any], release: float) -> None:
    """Print a record in a line of the table; ``release`` is its median there."""
    line = f"{name:<15} {record['tree']:<10}"
    if "skipped" in record:
        print(f"{line} skipped: {record['skipped']}", flush=True)
        return
    low, high = (1e3 * value for value in record["quartiles"])
    print(
        f"{line} {1e3 * record['median']:>10.1f} {low:>9.1f}-{high:<9.1f}"
        f" {record['mib']:>7.0f} {record['error']:>8.1e} {record['max_error']:>8.1e}"
        f" {release / record['median']:>6.2f}x",
        flush=True,
    )
    if "kinds" in record:
        layers = record["layers"]
        texts = [f"{kind} {us / layers:.1f}" for kind, us in record["kinds"].items()]
        print("    us a layer: " + ", ".join(texts))
        for kernel, calls, us in record["kernels"]:
            print(f"      {us / layers:>8.1f} {calls:>5} {kernel}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_tower", description=__doc__.splitlines()[0]
    )

    def words(text: str) -> list[str]:
        return text.split(",")

    add = parser.add_argument
    add("--kind", choices=KINDS, default="26b")
    add("--layers", type=int, help="default: 1 on CPU, all on CUDA")
    add("--batch", choices=list(BATCHES), action="append")
    help = f"follow these instead of batches, of {', '.join(SCALES)}"
    add("--scale", type=words, default=[], help=help)
    add("--points", type=words, help="of --scale, separated by commas")
    add(
        "--repeat", type=int, help="most runs of a form (default: 3 on CPU, 21 on CUDA)"
    )
    help = "a form and batch; there are five runs in any case, three of --scale"
    add("--seconds", type=float, default=1.5, help=help)
    add("--dtype", choices=("float32", "bfloat16"))
    known = "; ".join(f"{name}: {what}" for name, what in (PEERS | FORMS).items())
    add("--forms", type=words, help=f"besides the release ({known})")
    help = "also print where a GPU's time goes, a layer"
    add("--profile", action="store_true", help=help)
    add("--json", type=Path, help="append the records to this file")
    add("--patched", type=Path, help="instead of the importable tree")
    for hidden in ("--checkpoint", "--tree", "--images"):
        add(hidden, help=argparse.SUPPRESS)
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _serve(args: argparse.Namespace) -> None:
    form, checkpoint = args.forms[0], Path(args.checkpoint)
    if form in (*PEERS, REFERENCE):
        make: Callable[[], Any] = functools.partial(Peer, checkpoint, args.dtype, form)
    else:
        given = (checkpoint, args.dtype, form, int(args.images))
        make = functools.partial(Engine, *given)
    try:
        worker.serve(make, args.tree)
    except Exception:
        # Not by PyTorch's hook, which puts a rank before the line that says what it
        # was; and an engine's threads might go on.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _arguments(
    checkpoint: Path,
    dtype: str,
    forms: Sequence[str],
    images: int,
    patched: Path | None,
) -> dict[str, list[str]]:
    """What each form's process is started with."""
    from scripts import unpatched

    release, found = unpatched.unpatched_tree(), {}
    for name in ("unpatched", *forms, REFERENCE):
        own = quantize(checkpoint) if name == "fp8" else checkpoint
        form = "eager" if name == "unpatched" else name
        found[name] = ["--checkpoint", str(own), "--dtype", dtype]
        found[name] += ["--forms", form, "--images", str(images)]
        tree = patched if name in FORMS else release
        if tree is not None:
            found[name] += ["--tree", str(tree)]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = _parser()
    args = parser.parse_args(argv)
    if args.serve:
        _serve(args)
        return 0

    import torch

    from scripts import tiny_gemma4

    gpus = torch.cuda.device_count()
    forms = args.forms or (GPU_FORMS if gpus else CPU_FORMS)
    if args.scale:
        forms = args.forms or SCALE_FORMS
    if unknown := set(forms) - (FORMS | PEERS).keys():
        parser.error(f"no form {', '.join(sorted(unknown))}")
    if unknown := set(args.scale) - SCALES.keys():
        parser.error(f"no axis {', '.join(sorted(unknown))}")
    # They would be timed with the items that are checked only.
    if args.scale and (args.batch or set(forms) & PEERS.keys()):
        parser.error("--scale has batches of its own, and no peers")
    names = [
        f"{axis} {x}"
        for axis in args.scale
        for x in args.points or SCALES[axis][0 if gpus else 1]
    ]
    names = names or args.batch
    names = names or [name for name in BATCHES if gpus or name not in SLOW_ON_CPU]
    dtype = args.dtype or ("bfloat16" if gpus else "float32")
    most = args.repeat or (21 if gpus else 3)
    turns = {"least": min(3 if args.scale else 5, most), "most": most}
    turns["checked"] = SCALE_CHECKED if args.scale else sys.maxsize
    tower = dict(TOWERS[args.kind])
    layers = args.layers or (tower["num_hidden_layers"] if gpus else 1)
    device = torch.cuda.get_device_name() if gpus else "cpu"
    about = {"kind": args.kind, "layers": layers, "dtype": dtype, "device": device}

    def keep(name: str, records: list[dict[str, Any]]) -> None:
        times = {r["tree"]: r["median"] for r in records if "median" in r}
        for record in records:
            show(name, record, times.get("unpatched", 0.0))
        worker.keep(args.json, *records)

    failures = {
        form: f"takes {need} GPU{'s' if need > 1 else ''}, there are {gpus or 'none'}"
        for form in forms
        if (need := NEED_GPUS.get(form, 0)) > gpus
    }
    started_forms = [form for form in forms if form not in failures]
    try:
        print("building the checkpoint ...", flush=True)
        with demo.quiet():
            checkpoint = tiny_gemma4.build(
                CACHE
                / f"encoder{tiny_gemma4.RECIPE_VERSION}-{args.kind}-{layers}-{dtype}",
                args.kind,
                dtype=dtype,
                text=TEXT,
                vision=tower | {"num_hidden_layers": layers},
            )
        arguments = _arguments(
            checkpoint, dtype, started_forms, max(map(images_of, names)), args.patched
        )
        ended: dict[str, str] = {}
        with (
            worker.engines("scripts.bench_tower", arguments, ended) as processes,
            tempfile.TemporaryDirectory() as to,
        ):
            if missing := [name for name in REQUIRED if name not in processes]:
                raise RuntimeError(f"{missing[0]}: {ended[missing[0]]}")
            failures |= {name: reason(text) for name, text in ended.items()}
            group = Group(processes)
            memory = "GPU memory" if gpus else "resident"
            print(
                f"\n{args.kind}, {layers} layers, {dtype}, at most {most} runs each;"
                f" {memory} in MiB above what was used\n"
            )
            print(
                f"{'batch':<15} {'tree':<10} {'median ms':>10} {'quartiles':>19}"
                f" {'MiB':>7} {'error':>8} {'largest':>8} {'gain':>7}"
            )
            skipped = [
                axis | {"kind": args.kind, "tree": form, "skipped": failures[form]}
                for axis in [{"axis": axis} for axis in args.scale] or [{}]
                for form in forms
                if form in failures
            ]
            keep("", skipped)
            for name in names:
                records = measure(group, name, Path(to), seconds=args.seconds, **turns)
                for i, record in enumerate(records):
                    form = record["tree"]
                    if args.profile and gpus and form in group.engines:
                        # How it ended is said of the next batch.
                        profile = group.ask(form, "profile")
                        record |= {} if "skipped" in profile else profile
                    at = {"batch": name} | record
                    records[i] = about | (scaled(record, name) if args.scale else at)
                keep(name, records)
    except (OSError, RuntimeError) as error:
        print(f"bench_tower: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
