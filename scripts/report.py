# SPDX-License-Identifier: Apache-2.0
"""`make report`: docs/benchmarks.md and its plots, from what `make bench` has kept.

Every number there comes from the results; the texts between them have none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import console
from scripts.bench import read
from scripts.console import ROOT, Failure, show

RESULTS = ROOT / "docs" / "benchmarks"

Record = dict[str, Any]

# What a reader sees for the names in records.
TREES = {
    "unpatched": "release",
    "eager": "patched",
    "compiled": "compiled",
    "captured": "captured",
    "fp8": "compiled, FP8",
    "tp2": "two GPUs, weights shared",
    "data2": "two GPUs, images shared",
}
WIDTHS = {"26b": "26B-A4B", "31b": "31B", "e2b": "E2B"}
TOWERS = {"26b": "26B-A4B and 31B", "e2b": "E2B and E4B"}


@dataclass(frozen=True)
class Run:
    """The results of one job: what it ran on and how, and its records."""

    head: Record
    records: list[Record]

    @property
    def command(self) -> str:
        """For a person to type."""
        words = [f'"{word}"' if " " in word else word for word in self.head["command"]]
        return "PYTHONPATH=. $(make -s python) -m " + " ".join(words)


def device(head: Record) -> str:
    """Return the GPU's name, or the processor's with its cores."""
    machine = head["machine"]
    return str(machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores")


def latest(lines: list[Record]) -> dict[str, dict[str, Run]]:
    """Return the last run of each job, by device and job.

    Of each device, only runs of the release and tree that were measured last: numbers
    of different ones do not belong in one text.

    Args:
        lines: those of all files of results.

    Raises:
        Failure: records come without a line that says what they were made on.
    """
    found: dict[str, dict[str, Run]] = {}
    current: Run | None = None
    for line in lines:
        if "command" in line:
            current = Run(line, [])
            found.setdefault(device(line), {})[line["job"]] = current
        elif current is None or line.get("job") != current.head["job"]:
            raise Failure(
                f"records of {line.get('job')} do not say what they were made on",
                "remove them, and `make bench` makes new ones",
            )
        else:
            current.records.append(line)
    for name, jobs in found.items():
        newest = max((run.head for run in jobs.values()), key=lambda head: head["time"])
        found[name] = {
            job: run
            for job, run in jobs.items()
            if all(run.head[key] == newest[key] for key in ("release", "tree"))
        }
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def span(record: Record) -> str:
    """Return a median of seconds with its quartiles, in milliseconds."""
    low, high = record["quartiles"]
    return f"{1e3 * record['median']:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"


def runs_of(runs: dict[str, Run], level: str) -> list[Run]:
    """Return the runs of a level."""
    return [run for name, run in runs.items() if name.split()[0] == level]


def commands(runs: list[Run]) -> list[str]:
    """Return what a reader types for a section."""
    return ["", *(f"    {run.command}" for run in runs), ""]


def layer(runs: dict[str, Run]) -> list[str]:
    """One attention layer."""
    found = runs_of(runs, "layer")
    if not found:
        return []
    cases: dict[str, dict[str, Record]] = {}
    for run in found:
        for record in run.records:
            cases.setdefault(record["case"], {})[record["variant"]] = record
    versions = [
        name.split()[0]
        for name in dict.fromkeys(n for case in cases.values() for n in case)
        if name.endswith(" chosen")
    ]
    heads = ["case"]
    for version in versions:
        heads += [f"{version} causal", f"{version} with images", "over causal"]
    heads += ["`mask_mod` (release)", "Triton (release)", "relative error at most"]
    rows = []
    for name, variants in cases.items():
        row = [name]
        for version in versions:
            floor = variants.get(f"{version} floor")
            chosen = variants.get(f"{version} chosen")
            row += [microseconds(floor), microseconds(chosen)]
            row.append(f"{chosen['x_floor']:.2f}" if chosen else "-")
        row.append(microseconds(variants.get("FA4 mask_mod")))
        row.append(microseconds(variants.get("Triton ranges")))
        errors = [
            record[rows_of]
            for name, record in variants.items()
            if name.endswith(" chosen")
            for rows_of in ("ranges", "rest")
            if rows_of in record
        ]
        rows.append([*row, f"{max(errors):.1e}" if errors else "-"])
    return [
        "## One attention layer",
        "",
        "A prefill's GPU time, microseconds: medians, all forms by turns in one"
        " process. Causal attention of the same version is what a batch costs without"
        " images; errors are against dense attention in float32.",
        *commands(found),
        *table(heads, rows),
        "",
    ]


def microseconds(record: Record | None) -> str:
    """Return a median that is in microseconds."""
    return "-" if record is None else f"{record['median']:,.0f}"


def tower(runs: dict[str, Run]) -> list[str]:
    """The vision tower."""
    found = [*runs_of(runs, "tower"), *runs_of(runs, "pair")]
    if not found:
        return []
    lines = [
        "## The vision tower",
        "",
        "Milliseconds with pooling and projection; medians with quartiles, all forms by"
        " turns in one run. Differences are those of the features from the release's:"
        " the largest, and the root of the mean square over that of the features.",
        *commands(found),
    ]
    records = [record for run in found for record in run.records]
    for kind in dict.fromkeys(record["kind"] for record in records):
        of_kind = [record for record in records if record["kind"] == kind]
        forms = [form for form in TREES if any(r["tree"] == form for r in of_kind)]
        batches: dict[str, dict[str, Record]] = {}
        for record in of_kind:
            batches.setdefault(record["batch"], {})[record["tree"]] = record
        about = of_kind[0]
        lines += [
            f"### {TOWERS.get(kind, kind)}: {about['layers']} layers, {about['dtype']}",
            "",
            *table(
                ["batch", *(TREES[form] for form in forms)],
                [
                    [name, *(span(b[f]) if f in b else "-" for f in forms)]
                    for name, b in batches.items()
                ],
            ),
            "",
            "Times as fast as the release, memory above what was used before in MiB,"
            " and differences:",
            "",
            *table(
                ["batch", *(TREES[form] for form in forms)],
                [
                    [name, *(versus(b, form) for form in forms)]
                    for name, b in batches.items()
                ],
            ),
            "",
        ]
    return lines


def versus(batch: dict[str, Record], form: str) -> str:
    """Return what a form of the tower gives beside the release, in a cell."""
    if form not in batch:
        return "-"
    record, parts = batch[form], []
    if form != "unpatched" and "unpatched" in batch:
        parts.append(f"{batch['unpatched']['median'] / record['median']:.2f}x")
    parts.append(f"{record['mib']:,.0f} MiB")
    if form != "unpatched" and "unpatched" in batch:
        relative = record.get("relative")
        share = "" if relative is None else f" ({relative:.1%})"
        parts.append(f"{record['difference']:.1e}{share}")
    return ", ".join(parts)


def step(runs: dict[str, Run]) -> list[str]:
    """One step of the engine."""
    found = runs_of(runs, "step")
    if not found:
        return []
    cases: dict[tuple[str, str], dict[tuple[str, str], Record]] = {}
    for run in found:
        for record in run.records:
            case = cases.setdefault((record["kind"], record["case"]), {})
            case[record["tree"], record["variant"]] = record
    rows = []
    for (kind, name), case in cases.items():
        row = [WIDTHS.get(kind, kind), name]
        for tree in ("unpatched", "patched"):
            for variant in ("text", "images", "tower", "images and tower"):
                cell = case.get((tree, variant))
                row.append("-" if cell is None else f"{cell['median']:.0f}")
        rows.append(row)
    parts = ("text", "with images", "tower", "all")
    heads = ["widths", "batch", *(f"release: {part}" for part in parts)]
    heads += [f"patched: {part}" for part in parts]
    return [
        "## One step of the engine",
        "",
        "A prefill of as many layers as the commands say, dummy weights, milliseconds:"
        " the language model on text alone and with images, the tower, and both. All is"
        " compiled but the release's tower, which cannot be.",
        *commands(found),
        *table(heads, rows),
        "",
    ]


def serving(runs: dict[str, Run]) -> list[str]:
    """vLLM's own throughput and latency benchmarks."""
    found = runs_of(runs, "serving")
    if not found:
        return []
    lines = [
        "## Serving",
        "",
        "vLLM's benchmarks of throughput, in tokens a second, and of latency, in"
        " milliseconds; medians with quartiles. Triton is that attention backend on the"
        " patched tree.",
        *commands(found),
    ]
    for run in found:
        forms = list(dict.fromkeys(record["tree"] for record in run.records))
        loads: dict[str, dict[str, Record]] = {}
        for record in run.records:
            loads.setdefault(record["workload"], {})[record["tree"]] = record
        about = run.records[0]
        rows = []
        for name, load in loads.items():
            bench = next(iter(load.values()))["bench"]
            unit = "tok/s" if bench == "throughput" else "ms"
            rows.append([name, unit, *(rate(load.get(form)) for form in forms)])
        lines += [
            f"### {WIDTHS.get(about['kind'], about['kind'])}: {about['layers']} layers",
            "",
            *table(["workload", "unit", *forms], rows),
            "",
        ]
    return lines


def rate(record: Record | None) -> str:
    """Return a median with its quartiles in the unit of its benchmark."""
    if record is None:
        return "-"
    scale = 1 if record["bench"] == "throughput" else 1e3
    values = (record["median"], *record["quartiles"])
    middle, low, high = (f"{scale * value:,.0f}" for value in values)
    return f"{middle} ({low} to {high})"


def host(runs: dict[str, Run]) -> list[str]:
    """The host's part of a step."""
    found = runs_of(runs, "host")
    if not found:
        return []
    rows = [
        [record["case"], record["variant"], f"{record['median']:,.1f}"]
        for run in found
        for record in run.records
    ]
    return [
        "## The host",
        "",
        "Finding ranges, cutting them into segments and building attention metadata,"
        " microseconds on the host.",
        *commands(found),
        *table(["batch", "what", "median"], rows),
        "",
    ]


def not_better(runs: dict[str, Run]) -> list[str]:
    """Where the release, or another form of the series, is faster."""
    found = []
    levels = ("tower", "layer", "serving")
    for run in [run for level in levels for run in runs_of(runs, level)]:
        rows: dict[str, dict[str, Record]] = {}
        for record in run.records:
            name = record.get("batch") or record.get("workload") or record["case"]
            if "kind" in record:
                name = f"{TOWERS.get(record['kind'], record['kind'])}, {name}"
            form = record.get("tree") or record["variant"]
            rows.setdefault(name, {})[form] = record
        for name, forms in rows.items():
            for ours, theirs in (
                *((form, "unpatched") for form in ("eager", "compiled", "captured")),
                ("captured", "compiled"),
                ("compiled", "eager"),
                ("FA4 chosen", "FA4 mask_mod"),
                ("FA4 chosen", "Triton ranges"),
                ("FA3 chosen", "Triton ranges"),
                ("patched", "release"),
            ):
                if ours not in forms or theirs not in forms:
                    continue
                names = [TREES.get(form, form) for form in (ours, theirs)]
                for what, key in (("takes", "median"), ("needs memory", "mib")):
                    if not forms[theirs].get(key) or key not in forms[ours]:
                        continue
                    ratio = forms[ours][key] / forms[theirs][key]
                    if forms[ours].get("unit") == "tokens_per_second":
                        ratio = 1 / ratio
                    # Less is what two runs of the same differ by.
                    if ratio > 1.03:
                        times = f"{ratio:.2f}x {names[1]}"
                        found.append(f"* {name}: {names[0]} {what} {times}")
    return ["## What is not better", "", *(found or ["Nothing was found."]), ""]


SECTIONS: tuple[Callable[[dict[str, Run]], list[str]], ...] = (
    layer,
    tower,
    step,
    serving,
    host,
    not_better,
)


def write(runs: dict[str, dict[str, Run]], plots: dict[str, list[str]]) -> str:
    """Return the whole text.

    Args:
        runs: by device and job.
        plots: names of files of plots, by device.
    """
    lines = [
        "# Benchmarks",
        "",
        "The release as it is and with the series, on the same inputs and weights."
        " `make bench` measures, `make report` wrote this from what it kept.",
        "",
    ]
    for name, jobs in runs.items():
        head = max((run.head for run in jobs.values()), key=lambda head: head["time"])
        machine = head["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in sorted(machine["versions"].items()))
        cores = f"{machine['cores']} cores of {machine.get('cpu', 'a processor')}"
        lines += [
            f"# {name}",
            "",
            f"vLLM {head['release']}, {head['time'][:10]}, commit {head['commit'][:9]};"
            f" {cores}; {versions}.",
            "",
            *(f"![{plot}]({plot})\n" for plot in plots.get(name, [])),
        ]
        for section in SECTIONS:
            lines += section(jobs)
    return "\n".join(lines).rstrip() + "\n"


def plot(name: str, jobs: dict[str, Run], folder: Path) -> list[str]:
    """Draw a device's plots.

    Args:
        name: the device.
        jobs: its runs.
        folder: where the files go.

    Returns:
        The files' names.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    stem = "".join(c if c.isalnum() else "-" for c in name.lower())
    # Opaque: a page may be dark or light.
    style = {"figure.facecolor": "#f6f6f6", "axes.facecolor": "#f6f6f6"}
    for run in runs_of(jobs, "tower"):
        kind = run.records[0]["kind"]
        forms = [f for f in TREES if any(r["tree"] == f for r in run.records)]
        batches = list(dict.fromkeys(record["batch"] for record in run.records))
        with plt.rc_context(style):
            figure, axes = plt.subplots(figsize=(8, 1 + 0.7 * len(batches)))
            height = 0.8 / len(forms)
            for nth, form in enumerate(forms):
                records = {r["batch"]: r for r in run.records if r["tree"] == form}
                found = [(y, records[b]) for y, b in enumerate(batches) if b in records]
                medians = [1e3 * record["median"] for _, record in found]
                low, high = (
                    [1e3 * abs(r["quartiles"][i] - r["median"]) for _, r in found]
                    for i in (0, 1)
                )
                places = [y + (nth - (len(forms) - 1) / 2) * height for y, _ in found]
                label, spread = TREES[form], (low, high)
                axes.errorbar(medians, places, xerr=spread, fmt="o", label=label)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(axis="x", which="both", alpha=0.3)
            axes.set_xlabel("milliseconds, median and quartiles")
            axes.set_yticks(range(len(batches)), batches)
            axes.invert_yaxis()
            axes.set_title(f"Vision tower of {TOWERS.get(kind, kind)}, {name}")
            axes.legend(fontsize="small")
            figure.tight_layout()
            file = folder / f"{stem}-tower-{kind}.png"
            folder.mkdir(parents=True, exist_ok=True)
            # No date or version: the same results give the same file.
            figure.savefig(file, dpi=110, metadata={"Software": None})
            plt.close(figure)
        made.append(file.name)
    return made


def main() -> None:
    """Write the report of RESULTS=, by default of docs/benchmarks/."""
    given = console.option("RESULTS")
    if given:
        files, folder = [Path(given)], Path(given).with_suffix("")
    else:
        files, folder = sorted(RESULTS.glob("*.jsonl")), RESULTS
    lines = [line for file in files for line in read(file)]
    if not lines:
        raise Failure(
            f"there are no results in {show(files[0] if given else RESULTS)}",
            "`make bench` or `make bench-cpu` makes some and says what to give here",
        )
    runs = latest(lines)
    plots = {
        name: [f"{folder.name}/{file}" for file in plot(name, jobs, folder)]
        for name, jobs in runs.items()
    }
    text = folder.with_suffix(".md")
    console.write(text, write(runs, plots))
    print(show(text))


if __name__ == "__main__":
    console.run(main)
