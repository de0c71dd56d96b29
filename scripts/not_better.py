# SPDX-License-Identifier: Apache-2.0
"""What is not better: where the release, another library or another form wins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

from scripts.results import (
    ALIKE,
    AXES,
    BACKENDS,
    ENGINE_FORMS,
    FEW,
    LAYER_FORMS,
    PEERS,
    TOWER_FORMS,
    TOWERS,
    Device,
    Record,
    Spread,
    by,
    counted,
    first_token,
    kept,
    longest_pause,
    memory,
    model,
    of_bench,
    prose,
    split,
    spread,
)

# Which form is expected to be the better one: where it is not, a reader is told.
TOWER_PAIRS = (
    *((form, "unpatched") for form in ("eager", "compiled", "captured", "fp8")),
    *((form, peer) for form in ("eager", "compiled") for peer in PEERS),
    *((form, other) for form in BACKENDS for other in ("unpatched", *PEERS)),
    ("compiled", "eager"),
    *((form, "compiled") for form in ("captured", "fp8", "tp2", "data2")),
    *(("compiled", backend) for backend in BACKENDS),
)
ENGINE_PAIRS = (
    *(
        (ours, theirs)
        for ours in ("patched", "fa3")
        for theirs in ("release", "triton")
    ),
    ("patched", "fa3"),
)
# So many requests say whether greedy tokens differ.
LEAST_REQUESTS = 8
# So many MiB more are worth a line.
LEAST_MIB = 16
LAYER_PAIRS = (
    *((f"FA{version} chosen", "FA4 mask_mod") for version in (2, 3, 4)),
    *((f"FA{version} chosen", "Triton ranges") for version in (2, 3, 4)),
    ("FA4 chosen", "FA3 chosen"),
    *(
        (f"FA{version} chosen", f"FA{version} {form}")
        for version in (2, 3, 4)
        for form in ("correction", "split", "one_call")
    ),
)
# By what they are forms of: pairs, ours first and the one that it should not be worse
# than, and what a reader sees for them.
KINDS = {
    "layer": (LAYER_PAIRS, LAYER_FORMS),
    "tower": (TOWER_PAIRS, TOWER_FORMS),
    "engine": (ENGINE_PAIRS, ENGINE_FORMS),
}
# What has no spread is only worse if it is so many times as much: memory and errors,
# which of a layer are kept with two digits. Either of two rates may be off by that.
ABOUT = 1.015
MEMORY, ERROR = 1.03, 1.1
# A server that gives nothing for so many milliseconds keeps a person waiting.
STILL = 2000
MARGINS: tuple[tuple[Callable[[Record], float | None], float, str, str], ...] = (
    (memory, MEMORY, "needs more memory than", " MiB"),
    (lambda record: record.get("error"), ERROR, "is less accurate than", ""),
)


@dataclass(frozen=True)
class Worse:
    """Something that is not better: in what, of which forms, where and by how much."""

    subject: str
    ours: str
    theirs: str
    what: str
    where: str
    how: str


def compare(
    subject: str,
    where: str,
    forms: Mapping[str, Record],
    of: str,
    read: Callable[[Record], tuple[Spread, bool]],
) -> list[Worse]:
    """Find where a form is slower, larger or less accurate than another one.

    Args:
        subject: what was measured.
        where: the batch, workload or case.
        forms: its record of each form.
        of: what they are forms of, a key of `KINDS`.
        read: returns a record's spread, and whether more is better.
    """
    found = []
    pairs, names = KINDS[of]
    for ours, theirs in pairs:
        if ours not in forms or theirs not in forms:
            continue
        # What a layer takes by itself, when it is forced, is the same once more.
        if forms[ours].get("form") and theirs == f"{ours[:3]} {forms[ours]['form']}":
            continue
        label = names.get(ours, ours), names.get(theirs, theirs)
        (mine, more), (other, _) = read(forms[ours]), read(forms[theirs])
        ratio = other.median / mine.median if more else mine.median / other.median
        if ratio > 1 and not mine.like(other, of):
            what = "gives less than" if more else "takes longer than"
            times = 1 / ratio if more else ratio
            how = f"{times:.2f}x{_few(forms[ours], forms[theirs])}"
            found.append(Worse(subject, *label, what, where, how))
        for get, margin, what, unit in MARGINS:
            value, least = (get(forms[form]) for form in (ours, theirs))
            if value is None or least is None or value <= margin * least:
                continue
            if get is memory and value - least < LEAST_MIB:
                continue
            # A backend's is that of the compiled tower.
            if get is memory and ours in BACKENDS:
                continue
            how = (
                f"{value / least:.2f}x"
                if least > 0
                else f"{value:.3g}{unit} against none"
            )
            found.append(Worse(subject, *label, what, where, how))
        same, best = (forms[form].get("agreement") for form in (ours, theirs))
        # With images the release's trees run the kernels that tokens are held against.
        if same and best and theirs not in ("release", "triton") and _fewer(same, best):
            how = f"{same['first']} of {same['requests']}, not {best['first']}"
            what = "gives fewer of Triton's first tokens than"
            found.append(Worse(subject, *label, what, where, how))
    return found


def _few(*records: Record) -> str:
    """Return how many samples records have, if they are few."""
    counts = [count for record in records if (count := counted(record))]
    least = min(counts, default=FEW)
    return f" of {least} samples" if least < FEW else ""


def _fewer(ours: Record, theirs: Record) -> bool:
    """Return whether a share of requests is smaller by more than two deviations.

    Few requests say nothing. One more of either kind keeps a share of all or none from
    having no deviation.
    """
    if min(ours["requests"], theirs["requests"]) < LEAST_REQUESTS:
        return False
    shares: list[float] = [
        (same["first"] + 1) / (same["requests"] + 2) for same in (ours, theirs)
    ]
    variances = [
        share * (1 - share) / (same["requests"] + 2)
        for share, same in zip(shares, (ours, theirs), strict=True)
    ]
    return bool(shares[1] - shares[0] > 2 * sqrt(sum(variances)))


def not_better(device: Device) -> list[str]:
    """Where the release, or another form, is faster, smaller or more accurate."""
    found: list[Worse] = []

    def seconds(record: Record) -> tuple[Spread, bool]:
        return spread(record, 1e3), False

    def plain(record: Record) -> tuple[Spread, bool]:
        return spread(record), False

    def bench(record: Record) -> tuple[Spread, bool]:
        return of_bench(record)[0], record["bench"] == "throughput"

    def wait(record: Record) -> tuple[Spread, bool]:
        return first_token(record), False

    def load(record: Record) -> tuple[Spread, bool]:
        rate = record["request_throughput"]
        return Spread(rate, rate / ABOUT, rate * ABOUT), True

    for _, (case,), records in device.groups("layer", "case"):
        forms = {
            record["variant"]: record
            | {
                "error": max(
                    (record[r] for r in ("ranges", "rest") if r in record), default=None
                ),
            }
            for record in records
        }
        subject = "One attention layer"
        found += compare(subject, case, forms, "layer", plain)
    for _, (kind, batch), records in device.groups("tower", "kind", "batch"):
        subject = f"Tower of {TOWERS.get(kind, kind)}"
        forms = by(records, "tree")
        found += compare(subject, batch, forms, "tower", seconds)
    for _, (kind, layers, case, part), records in device.groups(
        "step", "kind", "layers", "case", "variant"
    ):
        subject = f"Step of {model(kind, layers)}, {part}"
        forms = by(records, "tree")
        found += compare(subject, case, forms, "engine", plain)
    for _, (kind, layers, workload), records in device.groups(
        "serving", "kind", "layers", "workload"
    ):
        subject = f"Serving {model(kind, layers)}"
        forms = by(records, "tree")
        found += compare(subject, workload, forms, "engine", bench)
    for _, (kind, layers, name, rate), records in device.groups(
        "rates", "kind", "layers", "workload", "rate"
    ):
        where = "all at once" if rate is None else f"{rate:g} req/s"
        forms = by(records, "tree")
        for what, of in (("first token", wait), ("requests a second", load)):
            subject = f"{model(kind, layers)}, {name}, {what}"
            found += compare(subject, where, forms, "engine", of)
    for run, (kind, layers, name), records in device.groups(
        "rates", "kind", "layers", "workload"
    ):
        pauses = {
            tree: max(longest_pause(record) for record in own)
            for (tree,), own in split(records, "tree").items()
        }
        best = {tree: kept(own) or 0 for (tree,), own in split(records, "tree").items()}
        subject = f"{model(kind, layers)}, {name}"
        for ours, theirs in ENGINE_PAIRS:
            if ours not in best or theirs not in best:
                continue
            label = ENGINE_FORMS[ours], ENGINE_FORMS[theirs]
            if pauses[ours] > STILL and pauses[ours] > 2 * pauses[theirs]:
                how = " against ".join(
                    f"{pauses[t] / 1e3:.1f} s" for t in (ours, theirs)
                )
                what = "stands still for longer than"
                found.append(Worse(subject, *label, what, run.head["job"], how))
            if best[ours] < best[theirs]:
                how = f"{best[ours]:g} against {best[theirs]:g} req/s"
                what = "keeps a lower rate than"
                found.append(Worse(subject, *label, what, "highest", how))
    for _, (axis, kind, layers, x), records in device.groups(
        "scaling", "axis", "kind", "layers", "x"
    ):
        what, is_tower = AXES[axis]
        subject = TOWERS.get(kind, kind) if is_tower else model(kind, layers)
        subject += f" by {what}"
        forms, of_what = by(records, "tree"), "tower" if is_tower else "engine"
        found += compare(subject, f"{x:,}", forms, of_what, seconds)
    lines: dict[str, list[str]] = {}
    # What is lost to the release comes first, then to others, then to forms of ours.
    rank = {"release": 0, "mask_mod": 0, "Triton": 0, "Transformers": 1}
    found.sort(
        key=lambda one: min((rank[w] for w in rank if w in one.theirs), default=2)
    )
    for one in found:
        key = f"* {one.subject}: {one.ours} {one.what} {one.theirs}"
        lines.setdefault(key, []).append(f"{one.where} ({one.how})")
    return [
        "## What is not better",
        "",
        *prose(f"""
            Where the release, another library or another form of the series takes less
            time and the quartiles do not meet (of a layer the lowest and the highest
            tenth of the samples), takes less memory by more than {MEMORY - 1:.0%} and
            {LEAST_MIB} MiB, or has a smaller error by more than {ERROR - 1:.0%}. The
            release comes first. Ignored are differences that one form has from itself
            in two processes, or by chance in few samples: up to
            {ALIKE["layer"] - 1:.1%} of a layer's time, {ALIKE["tower"] - 1:.0%} of a
            tower's, {ALIKE["engine"] - 1:.0%} of an engine's and
            {ABOUT * ABOUT - 1:.0%} of requests a second, and two standard deviations of
            equal greedy tokens. Where there are few samples it says how many: one
            that the host was slow for may be all of a difference then. Tokens are not
            held against the release's, which with images runs the very kernels that
            they are compared with.
        """),
        *(f"{key}: {', '.join(where)}" for key, where in lines.items()),
        *([] if lines else ["Nothing was found."]),
        "",
    ]
