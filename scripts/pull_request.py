# SPDX-License-Identifier: Apache-2.0
"""What the first pull request on this reports, to stand beside what is measured.

https://github.com/vllm-project/vllm/pull/42175, as of May 2026: FlashAttention 4 in all
layers against Triton, on H100 with two of them for 31B. Its tables are per cent of
throughput, where more is better, and of latency, where less is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scripts.results import (
    ALIKE,
    MODELS,
    Device,
    Record,
    Spread,
    by,
    model,
    of_bench,
    prose,
    split,
    spread,
    table,
)

URL = "https://github.com/vllm-project/vllm/pull/42175"
PROMPTS = "100 of 4,096 tokens and 5 of 8,192"
KINDS = ("e2b", "e4b", "26b", "31b")


@dataclass(frozen=True)
class Claim:
    """A row of its tables.

    Args:
        name: what it calls it.
        workload: the same here, as scripts/bench_engine.py calls it.
        values: per cent that FlashAttention 4 gives more, or takes more, than Triton;
            of each of `KINDS`, None where it says nothing.
    """

    name: str
    workload: str
    values: tuple[int | None, ...]


THROUGHPUT = (
    Claim("Prefill (4K input)", "4,096 in, 16 out", (40, 24, 25, 33)),
    Claim("Long context (8K)", "8,192 in, 128 out", (41, 28, 27, 28)),
    Claim("Very long context (15-16K)", "15,872 in, 128 out", (70, 47, 36, None)),
    Claim("Mixed (1K/1K)", "1,024 in, 1,024 out", (5, 5, 1, 4)),
    Claim("High batch (256 in/out)", "256 in, 256 out", (2, 5, 1, 5)),
)
LATENCY = (
    Claim("Prefill TTFT", "first token of 4,096", (-31, -22, -24, -22)),
    Claim("Long ctx decode (8K)", "8,192 in, 128 out, alone", (-27, -19, -20, -16)),
    Claim("Decode b=1", "128 in, 128 out, alone", (4, -1, 3, 1)),
    Claim("Decode b=8", "128 in, 128 out, 8 at once", (1, 1, 1, -1)),
)
# The records of a workload in one run, by form.
Forms = Mapping[str, Record]
# Ours that stand beside them.
FORMS = ("patched", "release")
# The same of FlashAttention 4 in all layers over 3 and 4 mixed, and of the second call
# for images over text alone and in batches with images.
ALL_OVER_MIXED = 8
TEXT_COSTS = 0
IMAGES_COST = 3


def pull_request(device: Device) -> list[str]:
    """The tables of the first pull request on this, beside the same here."""
    records = device.records("serving")
    kinds = [kind for kind in KINDS if any(r["kind"] == kind for r in records)]
    # Elsewhere a workload is a smaller one of the same name.
    if not kinds or "gpu" not in device.newest.head["machine"]:
        return []
    forms: dict[tuple[str, str], list[Forms]] = {}
    for _, key, found in device.groups("serving", "kind", "workload"):
        forms.setdefault((key[0], key[1]), []).append(by(found, "tree"))
    lines = [
        "## Beside the first pull request on this",
        "",
        *prose(f"""
            [vLLM's 42175]({URL}) has FlashAttention 4 in all layers, with a second call
            for images, and compares it with Triton. These are its tables, per cent over
            Triton, and beside them the same from *Serving* above, over the release on
            Triton: *patched* and *release* are what the two trees take by default. In
            italics is what is no difference: quartiles that meet, or less than
            {ALIKE["engine"] - 1:.0%}.
        """),
        *prose(f"""
            Why numbers may differ: theirs are of H100 GPUs, two of them for 31B, of all
            layers and real weights. Ours are of as many layers as the tables above say,
            where attention has the same share in a layer, and what is done once a step,
            as the output layer and sampling, weighs more. Their Triton is that of
            another vLLM, of May 2026. Prompts are random on both sides: its commands
            have {PROMPTS}, ours as many as *Serving* says. The less time a prompt
            takes, as with the small models, the more of a workload's time is of its
            answers, for which FlashAttention took less time than Triton there if the
            context was long, and takes more here: see what is *alone* below. Which of
            the two has changed since was not measured.
        """),
    ]
    for title, rows, more in (
        ("Throughput, where more is better", THROUGHPUT, True),
        ("Latency, where less is better", LATENCY, False),
    ):
        heads = ["benchmark", "workload here"]
        for kind in KINDS:
            heads.append(f"{MODELS[kind]}, theirs")
            if kind in kinds:
                heads += [f"{MODELS[kind]}, {form}" for form in FORMS]
        cells, higher, lower, unlike = [], 0, 0, []
        for claim in rows:
            row = [claim.name, claim.workload]
            for kind, theirs in zip(KINDS, claim.values, strict=True):
                row.append("-" if theirs is None else f"{theirs:+}%")
                if kind not in kinds:
                    continue
                of = forms.get((kind, claim.workload), [])
                row += [_over(of, form, "triton") for form in FORMS]
                both = _both(of, "patched", "triton")
                if theirs is None or both is None or both[0].like(both[1], "engine"):
                    continue
                ours = 100 * (both[0].median / both[1].median - 1)
                better = ours > theirs if more else ours < theirs
                higher, lower = higher + better, lower + (not better)
                if ours * theirs < 0 and _loses(of, more):
                    unlike.append(f"{claim.name} of {MODELS[kind]}")
            cells.append(row)
        lines += [f"{title}:", "", *table(heads, cells)]
        if higher + lower:
            lines += [
                *prose(f"""
                    Of {higher + lower} differences, the patched tree's over Triton are
                    better here than theirs in {higher} and worse in {lower}. It is the
                    release's FlashAttention that does this, which for text is the
                    patched tree's as well: of what that
                    {"gives" if more else "takes"} over the release,
                    {_text(forms, rows)}. Both run the same kernels for text: what there
                    is of a difference says how much two engines may differ.
                """),
            ]
        if unlike:
            lines += prose(f"""
                What they gain is lost here: {", ".join(unlike)}. There answers to few
                prompts are most of the time, and FlashAttention takes longer for them
                than Triton, in the release as much as in the patched tree.
            """)
    return [*lines, *_mixed(kinds, forms), *_second_call(device)]


def _loses(of: Sequence[Forms], more: bool) -> bool:
    """Return whether the release's FlashAttention does so, too, against Triton.

    Args:
        of: what a workload took.
        more: whether more is better.
    """
    both = _both(of, "release", "triton")
    if both is None or both[0].like(both[1], "engine"):
        return False
    return (both[0].median > both[1].median) != more


def _text(
    forms: Mapping[tuple[str, str], Sequence[Forms]], rows: Iterable[Claim]
) -> str:
    """Return what text differs by in the patched tree, of all models here.

    Both trees run the same kernels for it: so much may two engines differ.
    """
    names = {claim.workload for claim in rows}
    pairs = [
        pair
        for (_, workload), runs in forms.items()
        if workload in names and (pair := _both(runs, "patched", "release"))
    ]
    unlike = [(a, b) for a, b in pairs if not a.like(b, "engine")]
    over = [100 * (a.median / b.median - 1) for a, b in unlike]
    said = f"{len(pairs) - len(over)} of {len(pairs)} are no difference"
    if len(over) == 1:
        said += f", the other is {over[0]:+.1f}%"
    elif over:
        said += f", the others are {min(over):+.1f}% to {max(over):+.1f}%"
    return said


def _both(
    runs: Sequence[Forms], ours: str, theirs: str
) -> tuple[Spread, Spread] | None:
    """Return what two forms have taken in the first run that has both."""
    for forms in runs:
        if ours in forms and theirs in forms:
            records = forms[ours], forms[theirs]
            # Of vLLM's benchmarks, or of a step.
            if "bench" in records[0]:
                return of_bench(records[0])[0], of_bench(records[1])[0]
            return spread(records[0]), spread(records[1])
    return None


def _over(runs: Sequence[Forms], ours: str, theirs: str) -> str:
    """Return how many per cent a form has over another one, in a cell."""
    found = _both(runs, ours, theirs)
    if found is None:
        return "-"
    text = f"{100 * (found[0].median / found[1].median - 1):+.1f}%"
    return f"*{text}*" if found[0].like(found[1], "engine") else text


def _mixed(
    kinds: Sequence[str], forms: Mapping[tuple[str, str], Sequence[Forms]]
) -> list[str]:
    """The default over FlashAttention of two versions."""
    benches = {
        workload: "throughput" if record["bench"] == "throughput" else "time"
        for (_, workload), runs in forms.items()
        for of in runs
        for record in of.values()
    }
    pairs = {
        key: pair
        for key, runs in forms.items()
        if key[0] in kinds and (pair := _both(runs, "patched", "fa3"))
    }
    if not pairs:
        return []
    there = [kind for kind in kinds if any(key[0] == kind for key in pairs)]
    rows = [
        [
            *(workload, what),
            *(_over(forms.get((k, workload), []), "patched", "fa3") for k in there),
        ]
        for workload, what in benches.items()
        if any(key[1] == workload for key in pairs)
    ]
    better = [
        100 * (a.median / b.median if is_more else b.median / a.median) - 100
        for (_, workload), (a, b) in pairs.items()
        for is_more in [benches[workload] == "throughput"]
        if not a.like(b, "engine")
    ]
    found = f"{len(pairs) - len(better)} of {len(pairs)} are no difference"
    if better:
        found += (
            f"; FA4 in all layers is better in {sum(b > 0 for b in better)} and worse "
            f"in {sum(b < 0 for b in better)}, by {min(better):+.1f}% to "
            f"{max(better):+.1f}%"
        )
    others = [MODELS[kind] for kind in kinds if kind not in there]
    if others:
        found += f". The mixed form was not measured of {' and '.join(others)}"
    default = {
        layer
        for runs in forms.values()
        for of in runs
        for layer in of.get("patched", {}).get("attention", ())
    }
    said = f" The default here is {'; '.join(sorted(default))}." if default else ""
    return [
        *prose(f"""
            It says that FA4 in all layers beats FA3 and FA4 mixed by about
            {ALL_OVER_MIXED}%.{said} That over FA3 for the heads that it has and FA4 for
            the others, per cent:
        """),
        *table(["workload", "of", *(MODELS[kind] for kind in there)], rows),
        *prose(f"{found}."),
    ]


def _second_call(device: Device) -> list[str]:
    """What images cost a step of the language model."""
    rows = []
    for _, (kind, layers, case), records in device.groups(
        "step", "kind", "layers", "case"
    ):
        trees = {
            tree: by(own, "variant") for (tree,), own in split(records, "tree").items()
        }
        text = {tree: parts["text"] for tree, parts in trees.items() if "text" in parts}
        cells = [
            _over([text], "patched", "release"),
            *(
                _over([trees.get(tree, {})], "images", "text")
                for tree in ("release", "patched", "fa3")
            ),
        ]
        if set(cells) != {"-"}:
            rows.append([model(kind, layers), case, *cells])
    if not rows:
        return []
    return [
        *prose(f"""
            It says that its second call costs {TEXT_COSTS}% of text and about
            {IMAGES_COST}% of batches with images. That call merges two results whose
            keys overlap, which counts some twice; the one here counts each once. The
            same of a step of the language model, without the tower: text in the patched
            tree over text in the release, and images over as many tokens of text. These
            are other tokens, which in 26B go to other experts: some of the difference
            is theirs.
        """),
        *table(
            [
                *("model", "batch", "text, patched over release"),
                *("images over text, release", "patched", "patched, FA3 and FA4"),
            ],
            rows,
        ),
    ]
