# SPDX-License-Identifier: Apache-2.0
"""`make report`: docs/benchmarks.md and its plots, from what `make bench` has kept.

Every number there comes from the results, or is one that a pull request of vLLM
reports; the texts between them have none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from scripts import console, pins, plots
from scripts.bench import JOBS, Job, benchmarks, read
from scripts.console import ROOT, Failure, show
from scripts.not_better import not_better
from scripts.pull_request import pull_request
from scripts.results import (
    AXES,
    CLEAR,
    ENGINE_FORMS,
    ENGINE_NAMES,
    LAYER_FORMS,
    LAYERS,
    MODELS,
    TAIL,
    TOWER_FORMS,
    TOWERS,
    UNIFIED,
    Device,
    Record,
    Run,
    Spread,
    by,
    counted,
    first_token,
    kept,
    known,
    latest,
    longest_pause,
    measured,
    memory,
    model,
    number,
    of_bench,
    powers,
    prose,
    rated,
    sampled,
    split,
    spread,
    table,
)

RESULTS = ROOT / "docs" / "benchmarks"
# What greedy tokens are held against where nothing else is said.
REFERENCE = "triton"
# What marks that.
OLDER = " †"
# The profiler takes time, too: if kernels and gaps take so many times as long as
# without it, the gaps are its own.
PROFILED = 1.2
# A ratio about one that has no wider range says that there is no difference.
SURE = 0.1
# Of a step of the engine.
PARTS = ("text", "images", "tower", "images and tower")
# Of a layer's second call, besides the one that is chosen.
CALLS = ("correction", "split", "one_call")


def commands(device: Device, runs: Sequence[Run]) -> list[str]:
    """Return what a reader types for what follows, and what was other than said."""
    usual = device.usual
    stamps = ["" if run.stamp == usual.stamp else f"  # {run.stamp}" for run in runs]
    lines = [
        *(f"    {run.command}{stamp}" for run, stamp in zip(runs, stamps, strict=True)),
        "",
    ]
    machines: dict[str, list[str]] = {}
    for run in runs:
        machines.setdefault(run.machine, []).append(run.head["job"])
    for machine, jobs in machines.items():
        if machine != usual.machine:
            which = "Measured on " if len(machines) == 1 else f"Of {', '.join(jobs)}: "
            lines += [f"{which}{machine}.", ""]
    return lines


def figures(device: Device, level: str) -> list[str]:
    """Return a level's plots."""
    found = [one for one in plots.figures(device) if one.section == level]
    lines = [f"![{one.title}]({device.folder}/{one.file})" for one in found]
    return [line for one in lines for line in (one, "")]


def skipped(runs: Iterable[Run], names: Mapping[str, str]) -> list[str]:
    """Return what could not run, and why."""
    found: dict[str, None] = {}
    for record in (record for run in runs for record in run.records):
        if "skipped" in record:
            keys = ("batch", "case", "workload", "axis", "x")
            what = " ".join(str(record[key]) for key in keys if key in record)
            form = names.get(record["tree"], record["tree"])
            where = f"{form}, {what}" if what else form
            found[f"* {where}: {record['skipped']}"] = None
    return ["Not run here:", "", *found, ""] if found else []


def attention(records: Iterable[Record]) -> list[str]:
    """Return which backends each tree has taken, where records say so."""
    found = {r["tree"]: "; ".join(r["attention"]) for r in records if "attention" in r}
    lines = [
        f"* {(ENGINE_NAMES | ENGINE_FORMS).get(tree, tree)}: {text}"
        for tree, text in found.items()
    ]
    if not lines:
        return []
    # The release has such a backend for models with images alone.
    both = "TRITON_FLASH_ATTN" in "".join(found.values())
    return [
        *("Attention of the language model:", "", *lines, ""),
        *(
            prose("""
                TRITON_FLASH_ATTN is FlashAttention for batches of text and Triton for
                those with images. With images the release and the release on Triton
                are the same kernels: that their tokens agree says nothing.
            """)
            if both
            else []
        ),
    ]


def jobs_of(device: Device) -> tuple[Job, ...]:
    """Return what `make bench` runs on such a device."""
    return JOBS["cuda" if "gpu" in device.newest.head["machine"] else "cpu"]


def missing(device: Device) -> list[str]:
    """Return the jobs that have no results on a device."""
    return [job.name for job in jobs_of(device) if job.name not in device.jobs]


def earlier(device: Device) -> list[str]:
    """Return the jobs that other code of their benchmark ran than is there now."""
    return [
        job
        for job, run in device.jobs.items()
        if run.head.get("benchmarks") != benchmarks(run.head["command"][0])
    ]


def otherwise(device: Device) -> list[str]:
    """Return the jobs that had other options than `make bench` gives them now."""
    given = {job.name: list(job.command) for job in jobs_of(device)}
    return [
        job
        for job, run in device.jobs.items()
        if run.head["command"] != given.get(job, run.head["command"])
    ]


def agreement(found: Record | None) -> list[str]:
    """Return two cells: first tokens, and tokens before the first difference."""
    if not found:
        return ["-", "-"]
    first = f"{found['first']:,} of {found['requests']:,}"
    if found.get("nats") is not None:
        first += f", {found['nats']:.3f} nats"
    if causal := found.get("causal"):
        # Its nats would be of the few tokens that such unlike answers share.
        first += f"; causal images {causal['first']:,} of {causal['requests']:,}"
    if found.get("with", REFERENCE) != REFERENCE:
        first += f" ({found['with']})"
    return [
        first,
        f"{found['equal']:,} of {found['tokens']:,}",
    ]


def power(value: float | None) -> str:
    """Return an error in a cell."""
    return "-" if value is None else f"{value:.1e}"


def size(value: float | None) -> str:
    """Return mebibytes in a cell."""
    return "-" if value is None else number(value)


def summary(device: Device) -> list[str]:
    """What a reader gets: the release against the patched tree."""
    rows: dict[str, list[str]] = {}
    shorts = (_towers_in_short, _steps_in_short, _serving_in_short, _rates_in_short)
    for find in shorts:
        for row in find(device):
            # If several jobs measure the same, the first one counts.
            rows.setdefault(row[0], row)
    if not rows:
        return []
    return [
        "## What one gets",
        "",
        *prose("""
            Medians with quartiles; all of it with the commands is below. The tower is
            not compiled unless it says so, which the release's cannot be, and has the
            FlashAttention that a tower alone gets; the one of a whole Gemma4 on Hopper
            has FA4's, as *compiled, FA4* of *The vision tower* has. Images of the
            tower's rows are padded, as most are, for which the release takes a slower
            kernel; those of the steps are not, and the tower's time there is under *One
            step of the engine*. Where the language model has fewer layers than the
            whole one, the tower weighs more, and so does what it gains: *about* is what
            a step would gain if all layers took as long as those there. A load at a
            rate is one run, and its ranges are of requests; see *Rising request rates*.
        """),
        *table(["", "release", "patched", "gain"], rows.values()),
        *_legend(rows.values()),
    ]


def _mark(device: Device, run: Run) -> str:
    """What follows a name where it was measured with an older form of the series.

    Where most was, the page says that instead.
    """
    is_older = run.head["job"] in device.older
    return OLDER if is_older and run.head["tree"] != device.usual.head["tree"] else ""


def _legend(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return what that says, if rows have it."""
    if not any(row[0].endswith(OLDER) for row in rows):
        return []
    return prose(f"{OLDER.strip()} measured with an older form of the series.")


def _gain(what: str, unit: str, release: Spread, patched: Spread) -> list[str]:
    """A row of the summary, of something of which less is better."""
    gain = f"{release.median / patched.median:.2f} times as fast"
    return [what, f"{release} {unit}", f"{patched} {unit}", gain]


def _more(what: str, unit: str, release: float, patched: float) -> list[str]:
    """A row of the summary, of something without a spread."""
    cells = [f"{number(value)} {unit}" for value in (release, patched)]
    return [what, *cells, f"{patched / release:.2f} times as much"]


def _towers_in_short(device: Device) -> list[list[str]]:
    rows = []
    for run, (kind,), records in device.groups("tower", "kind"):
        batches = split(records, "batch")
        name = next((name for name in plots.SHOWN if (name,) in batches), None)
        forms = by(batches[name,], "tree") if name else {}
        base = forms.get("unpatched")
        for form, more in (("eager", ""), ("compiled", ", compiled")):
            if base is None or form not in forms:
                continue
            what = f"tower of {TOWERS.get(kind, kind)}, {name}{more}"
            mark = _mark(device, run)
            times = (spread(record, 1e3) for record in (base, forms[form]))
            rows.append(_gain(f"{what}{mark}", "ms", *times))
            sizes = memory(base), memory(forms[form])
            if sizes[0] and sizes[1] is not None:
                rows.append(_more(f"{what}: memory{mark}", "MiB", sizes[0], sizes[1]))
    return rows


def _steps_in_short(device: Device) -> list[list[str]]:
    # Of each model and case the most layers it has.
    most: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for run, (kind, case, layers), records in device.groups(
        "step", "kind", "case", "layers"
    ):
        parts = {part: own for (part,), own in split(records, "variant").items()}
        forms = by(parts.get("images and tower", []), "tree")
        if {"release", "patched"} <= forms.keys():
            what = f"step of {model(kind, layers)}, with its tower, {case}"
            what += _mark(device, run)
            times = (spread(forms[tree]) for tree in ("release", "patched"))
            row = _gain(what, "ms", *times)
            images = by(parts["images"], "tree") if "images" in parts else {}
            whole = LAYERS.get(kind, layers)
            if layers < whole and {"release", "patched"} <= images.keys():
                # Besides the layers there is the tower.
                ratio, of_layers = whole / layers - 1, {}
                for tree in ("release", "patched"):
                    more = images[tree]["median"] * ratio
                    of_layers[tree] = forms[tree]["median"] + more
                gain = of_layers["release"] / of_layers["patched"]
                row[-1] += f", about {gain:.2f} times with all {whole} layers"
            if (kind, case) not in most or layers > most[kind, case][0]:
                most[kind, case] = layers, row
    return [row for _, row in most.values()]


def _serving_in_short(device: Device) -> list[list[str]]:
    rows = []
    for run, (kind, layers, load), records in device.groups(
        "serving", "kind", "layers", "workload"
    ):
        trees = by(records, "tree")
        if not load.startswith("chat") or not {"release", "patched"} <= trees.keys():
            continue
        release, patched = (of_bench(trees[tree])[0] for tree in ("release", "patched"))
        ratio = patched.over(release)
        gain = f"{ratio} times as much"
        if release.like(patched, "engine"):
            sure = ratio.high - ratio.low <= SURE
            gain = "no difference" if sure else f"not clear: {gain}"
        cells = [f"{time} tok/s" for time in (release, patched)]
        what = f"{model(kind, layers)}, {load}{_mark(device, run)}"
        rows.append([what, *cells, gain])
    return rows


def _rates_in_short(device: Device) -> list[list[str]]:
    rows = []
    for run, (kind, layers, load), records in device.groups(
        "rates", "kind", "layers", "workload"
    ):
        if run.title:
            continue  # Once more, of what has a row.
        mark = _mark(device, run)
        trees = [
            by((r for r in records if r["tree"] == tree), "rate")
            for tree in ("release", "patched")
        ]
        what = f"{model(kind, layers)}, {load}"
        shared = [rate for rate in trees[0] if rate in trees[1]]
        if None in shared:
            totals = (tree[None]["output_throughput"] for tree in trees)
            count = trees[0][None]["completed"]
            what_all = f"{what}, {count} at once{mark}"
            rows.append(_more(what_all, "tok/s of answers", *totals))
        if all(trees):
            # A rate that was not offered may have given more than those that were.
            most = (
                max(r["output_throughput"] for r in tree.values()) for tree in trees
            )
            what_most = f"{what}, the load that each does best{mark}"
            rows.append(_more(what_most, "tok/s of answers", *most))
        best = [kept(tree.values()) for tree in trees]
        if best[0] is not None and best[1] is not None:
            cells = [f"{rate:g} req/s" for rate in best]
            # Each is twice the one before: their ratio says little.
            rows.append([f"{what}: highest rate kept{mark}", *cells, "-"])
        if offered := [rate for rate in shared if rate is not None]:
            # The highest that both can take.
            both = [rate for rate in best if rate is not None and rate in offered]
            # Servers that have just started are slower at the first one.
            rate = min(both) if len(both) == len(best) else max(offered)
            waits = (first_token(tree[rate]) for tree in trees)
            name = f"{what}: first token at {rate:g} req/s{mark}"
            rows.append(_gain(name, "ms", *waits))
    return rows


def layer(device: Device) -> list[str]:
    """One attention layer."""
    rows: list[list[str]] = []
    calls: list[list[str]] = []
    for run, (case,), records in device.groups("layer", "case"):
        name, variants = f"{case}{_mark(device, run)}", by(records, "variant")
        for variant, record in variants.items():
            kernel, _, form = variant.partition(" ")
            if form not in ("chosen", "mask_mod", "ranges"):
                continue
            floor = variants.get(f"{kernel} floor")
            over = f"{record['median'] / floor['median']:.2f}" if floor else "-"
            triton = variants.get("Triton ranges")
            gain = f"{triton['median'] / record['median']:.2f}" if triton else "-"
            rows.append(
                [
                    *(name, LAYER_FORMS.get(variant, variant), str(spread(record))),
                    *(number(floor["median"]) if floor else "-", over, gain),
                    *(power(record.get(part)) for part in ("ranges", "rest")),
                    size(record.get("mib")),
                ]
            )
            forced = [variants.get(f"{kernel} {call}") for call in CALLS]
            if form == "chosen" and any(forced):
                cells = ["-" if one is None else str(spread(one)) for one in forced]
                taken = str(record.get("form", "-")).replace("_", " ")
                errors = [
                    one[part]
                    for one in forced
                    if one
                    for part in ("ranges", "rest")
                    if part in one
                ]
                worst = power(max(errors, default=None))
                calls.append([name, kernel, taken, *cells, worst])
    if not rows:
        return []
    wrong = [
        record["ranges"]
        for record in device.records("layer")
        if record["variant"].endswith(" floor") and "ranges" in record
    ]
    lines = [
        "## One attention layer",
        "",
        *prose("""
            The GPU time of a call for a batch of prefills and decodes, all forms by
            turns in one process: medians, with what lies between the lowest and the
            highest tenth of the samples. Heads, window and lengths of a case are in
            `cases` of scripts/bench_mm_prefix.py: G has the heads of the smaller model,
            D and L smaller ones without a window, as models other than Gemma4 have.
            Causal attention by the same kernel is what the batch costs without images;
            it computes half of what an image alone needs, and may be a longer call than
            the two of a split. Which FlashAttention a model gets is vLLM's choice, as
            in the release, which takes Triton for batches with images on Hopper if it
            is told nothing. Errors are relative to dense attention in float32, of the
            rows in images and of the others. MiB is what a call allocates besides its
            output.
        """),
        # Whether a wrong mask would be seen.
        *(
            prose(f"""
                Causal attention, which is wrong in images, is off there by
                {number(min(wrong))} to {number(max(wrong))}.
            """)
            if wrong
            else []
        ),
        *figures(device, "layer"),
        *commands(device, device.runs("layer")),
        *sampled(device.records("layer")),
        *table(
            [
                *("case", "attention", "us", "causal, us", "times causal"),
                "times as fast as Triton",
                *("error in images", "error elsewhere", "MiB"),
            ],
            rows,
        ),
    ]
    if calls:
        heads = ["case", "attention", "takes"]
        heads += [f"{call.replace('_', ' ')}, us" for call in CALLS]
        heads.append("largest error")
        lines += [
            *prose("""
                Each form of the second call when it is forced, and the one that the
                host's estimate takes; [mm_prefix.md](mm_prefix.md#the-forms) says what
                they do. *One call* is of FA4 on Hopper, for layers with a window:
            """),
            *table(heads, calls),
        ]
    return [*lines, *_legend(rows)]


def tower(device: Device) -> list[str]:
    """The vision tower."""
    runs = device.runs("tower")
    if not runs:
        return []
    lines = [
        "## The vision tower",
        "",
        *prose("""
            With pooling and projection, all forms of a table by turns in one run, with
            the same weights and inputs: medians with quartiles. A batch is items x soft
            tokens of each at most; the shape of an image decides how many patches it
            has. Most leave rows of padding, which the release masks; those of a batch
            called *full* and of the video leave none. *Patched* is what vLLM does if it
            is told nothing, but for FlashAttention's version: a whole Gemma4 on Hopper
            takes for its tower the one of its language model, which is that of
            *compiled, FA4*. *Compiled* has `compile_mm_encoder`, *captured*
            `cudagraph_mm_encoder` with it; a named attention backend is that of the
            compiled tower. FP8 is linear layers in compressed-tensors' format with a
            scale a channel and a token. Transformers is that library's own tower on
            what the release's encoder gets, with FlashAttention its own unpadding
            around the kernel that vLLM ships.
        """),
        *prose("""
            Soft tokens are what all images of a batch have come to, a ninth of their
            patches. *Compiled* and the table's *compiled* with the backend that it
            takes are the same twice: what they differ by is chance.
        """),
        *prose("""
            Errors are of the features from those of Transformers' tower in float32 with
            the same weights: the root of the mean square over that of the features, and
            the largest. Differences in half precision are of rounding, the release's
            and Transformers' included.
        """),
        *prose("""
            Memory is the peak above what was used before, on a CPU of resident memory,
            which varies from run to run. A batch of more patches than one call takes
            goes in several, whose activations are not alive at once; how many images
            the release gives to one depends on the GPU's memory. A graph takes its
            memory when it is captured, before that: of *captured* it is not known.
        """),
        *prose("""
            What is behind the differences: a graph also computes what it pads a batch
            by; FP8 quantizes each token in passes of its own; the clip bounds of E2B
            and E4B are passes of their own unless compiled; and one image alone may be
            done before the host has called the next kernel.
        """),
        *figures(device, "tower"),
    ]
    for run in runs:
        for (kind,), records in split(measured(run.records), "kind").items():
            about, model = records[0], f"{TOWERS.get(kind, kind)}{run.title}"
            lines += [
                f"### {model}: {about['layers']} layers, {about['dtype']}",
                "",
                *commands(device, [run]),
                *sampled(records),
                *_batches(records),
                *_profile(records),
            ]
        lines += skipped([run], TOWER_FORMS)
    return lines


def _batches(records: Sequence[Record]) -> list[str]:
    """A row for each batch and form of the tower."""
    rows = []
    for (batch,), of_batch in split(records, "batch").items():
        forms = by(of_batch, "tree")
        base = forms.get("unpatched")
        for form in known(TOWER_FORMS, of_batch):
            record = forms[form]
            backend = record.get("attention") or "-"
            gain = f"{base['median'] / record['median']:.2f}" if base else "-"
            rows.append(
                [
                    *(batch, f"{record['soft_tokens']:,}"),
                    *(TOWER_FORMS.get(form, form), backend),
                    *(str(spread(record, 1e3)), gain, size(memory(record))),
                    *(power(record.get(key)) for key in ("error", "max_error")),
                ]
            )
    heads = ["batch", "soft tokens", "form", "attention", "ms"]
    heads += ["times as fast as the release"]
    return table([*heads, "MiB", "error", "largest error"], rows)


def _profile(records: Sequence[Record]) -> list[str]:
    """Where a GPU's time goes, of the records that have a profile."""
    found = [record for record in records if record.get("kinds")]
    if not found:
        return []
    kinds = list(dict.fromkeys(kind for record in found for kind in record["kinds"]))
    names = ["between kernels" if kind == "gaps" else kind for kind in kinds]
    rows = []
    for record in found:
        each = {k: number(us / record["layers"]) for k, us in record["kinds"].items()}
        if sum(record["kinds"].values()) > PROFILED * 1e6 * record["median"]:
            each["gaps"] = "-"
        form = TOWER_FORMS.get(record["tree"], record["tree"])
        rows.append([record["batch"], form, *(each.get(kind, "-") for kind in kinds)])
    return [
        *prose("""
            Where the time of one run goes, a layer. Where the profiler makes a run much
            longer than it is without, what is between kernels is not known.
        """),
        *table(["batch", "form", *(f"{name}, us" for name in names)], rows),
    ]


def of_models(device: Device, level: str) -> Iterator[tuple[list[str], list[Record]]]:
    """Return a level's records by run, model and layers, with title and command."""
    for run, (kind, layers), records in device.groups(level, "kind", "layers"):
        title = f"### {MODELS.get(kind, kind)}{run.title}: {layers} layers"
        yield [title, "", *commands(device, [run])], records


def step(device: Device) -> list[str]:
    """One step of the engine."""
    lines: list[str] = []
    for title, records in of_models(device, "step"):
        rows = []
        for (case,), of_case in split(records, "case").items():
            trees = split(of_case, "tree")
            for tree in known(ENGINE_FORMS, of_case):
                parts = by(trees[tree,], "variant")
                times = [str(spread(parts[p])) if p in parts else "-" for p in PARTS]
                same = [
                    agreement(parts.get(part, {}).get("agreement"))
                    for part in ("text", "images")
                ]
                rows.append(
                    [
                        *(case, ENGINE_FORMS.get(tree, tree), *times),
                        *(first for first, _ in same),
                    ]
                )
        heads = ["batch", "tree", "text, ms", "with images, ms", "tower, ms"]
        heads += ["images and tower, ms", "first tokens of text", "with images"]
        about = [*title, *sampled(records), *attention(records)]
        lines += [*about, *table(heads, rows)]
    if not lines:
        return skipped(device.runs("step"), ENGINE_FORMS)
    return [
        "## One step of the engine",
        "",
        *prose("""
            A prefill with dummy weights in so many layers of the real widths: medians
            with quartiles. Each time is of one call from an idle GPU until it is idle
            again: of the language model on text alone and with images, whose features
            are random then, and of both, the tower first. Scheduling, preparing images,
            attention's metadata, logits and sampling are not in it. *Release, Triton*
            is the release on that backend, *patched, FA3 and FA4* the patched tree with
            FA3 for the heads that it has. The engines run eager, without compilation
            and graphs. Behind the tokens, nats are the largest difference of log
            probabilities from those on Triton, of the tokens that both have among their
            likeliest: answers that differ much have few in common, or none, so those of
            causal images have no nats.
            *Causal images* says what both are where images attend as text does, which
            is wrong. Rounding tells most where experts are chosen, which are as good as
            tied with random weights: where both were measured, see how the release's
            own text differs from that on Triton.
        """),
        *figures(device, "step"),
        *lines,
        *skipped(device.runs("step"), ENGINE_FORMS),
    ]


def serving(device: Device) -> list[str]:
    """vLLM's own throughput and latency benchmarks."""
    lines: list[str] = []
    for title, records in of_models(device, "serving"):
        rows = []
        for (workload,), of_load in split(records, "workload").items():
            trees = by(of_load, "tree")
            for tree in known(ENGINE_FORMS, of_load):
                found, unit = of_bench(trees[tree])
                gain = "-"
                if "release" in trees:
                    base, _ = of_bench(trees["release"])
                    ratio = found.over(base) if unit == "tok/s" else base.over(found)
                    gain = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
                    gain = "-" if tree == "release" else gain
                rows.append(
                    [
                        *(workload, str(trees[tree].get("prompts", "-"))),
                        *(ENGINE_FORMS.get(tree, tree), f"{found} {unit}"),
                        *(str(counted(trees[tree]) or "-"), gain),
                        *agreement(trees[tree].get("agreement")),
                    ]
                )
        heads = ["workload", "prompts", "tree", "median", "samples"]
        heads += ["times as good as the release", "first tokens", "tokens"]
        lines += [*title, *attention(records), *table(heads, rows)]
        if blank := [
            workload
            for (workload,), of_load in split(records, "workload").items()
            if workload.startswith("chat")
            if not any(record.get("agreement") for record in of_load)
        ]:
            lines += prose(f"Tokens were not compared of {'; '.join(blank)}.")
        waited = {
            f"{r['workload']}, {ENGINE_FORMS.get(r['tree'], r['tree'])}"
            for r in records
            if r.get("preempted")
        }
        if waited:
            lines += prose(f"""
                The KV cache was full, and requests waited again, in
                {"; ".join(sorted(waited))}.
            """)
    if not lines:
        return skipped(device.runs("serving"), ENGINE_FORMS)
    return [
        "## Serving",
        "",
        *prose("""
            vLLM's own benchmarks of throughput, in tokens of prompts and answers a
            second, and of latency: medians with quartiles, all trees by turns. Those of
            a ratio are the least and the most that values of both ranges give. Prompts
            of text are the same in every run, for there is no prefix caching; images
            are new. Lengths of a chat, sizes of its images and video and the engines'
            limits are in `workloads` and `Engine` of scripts/bench_engine.py; the
            engines compile and capture graphs of powers of two. Texts for throughput
            are made of few different tokens, and the language model gets noise for a
            tower's features, which random weights make too much alike. Chats of
            throughput are read and their images prepared in one process of the host,
            which is much of their time.
        """),
        *(
            prose("""
                Tokens of two engines may differ by what each has compiled and by what
                batches requests were in, see *What engines have in common*; those of
                chats by how the towers round as well.
            """)
            if device.runs("agreement")
            else []
        ),
        *prose("""
            Weights are dummies, in so many layers of the real widths as the GPU holds
            of all trees at once; with fewer than the whole model's the tower and the
            host weigh more.
        """),
        *figures(device, "serving"),
        *lines,
        *skipped(device.runs("serving"), ENGINE_FORMS),
    ]


def alike(device: Device) -> list[str]:
    """What engines of one tree and of both have in common."""
    lines: list[str] = []
    for title, records in of_models(device, "agreement"):
        lines += [*title, *attention({**r, "tree": r["engine"]} for r in records)]
        for (workload,), of_load in split(records, "workload").items():
            pairs = {(r["engine"], r["with"]): r for r in of_load}
            names = list(dict.fromkeys(name for pair in pairs for name in pair))
            heads = [ENGINE_NAMES.get(name, name) for name in names]
            # A pair stands once, as it was measured.
            rows = [
                [head, *(_pair(pairs.get((one, to))) for to in names)]
                for head, one in zip(heads, names, strict=True)
            ]
            lines += [f"{workload}:", "", *table(["engine", *heads], rows)]
        eager = [
            r
            for r in records
            if {r["engine"], r["with"]} == {"release-eager", "patched-eager"}
        ]
        if eager:
            same = all(r["equal"] == r["tokens"] for r in eager)
            what = "the same tokens, all of them" if same else "unlike tokens"
            lines += prose(f"Where nothing is compiled, the trees give {what}.")
    if not lines:
        return []
    return [
        "## What engines have in common",
        "",
        *prose("""
            Greedy answers to prompts of text, for which both trees run the same
            kernels: how many requests begin with the same token, and how many tokens
            are the same before the first that is not. *Another* engine is of the same
            tree, started beside the first. Each compiles for itself, as in *Serving*,
            and need not end up with the same code, so that sums are rounded in another
            way: where two engines of one tree do not agree, that two trees do not says
            nothing of them. The eager ones compile nothing and run in the benchmark's
            own process, where batches are the same every time.
        """),
        *prose("""
            Where an engine meets itself are two runs of it: what batches requests are
            in differs from run to run, and after one token that is another the rest of
            an answer is another, too. Compiled and eager engines have least in common:
            with random weights many tokens are as good as tied, and any rounding
            decides.
        """),
        *lines,
    ]


def _pair(found: Record | None) -> str:
    """What two engines have in common, in a cell; the heads say with which."""
    return ", ".join(agreement({**found, "with": REFERENCE})) if found else ""


def rates(device: Device) -> list[str]:
    """A load of chats with images at rising rates."""
    lines: list[str] = []
    for title, records in of_models(device, "rates"):
        lines += [*title, *sampled(records, "requests"), *attention(records)]
        for (load,), of_load in split(records, "workload").items():
            best = []
            for tree in known(ENGINE_FORMS, of_load):
                rate = kept(record for record in of_load if record["tree"] == tree)
                text = "none" if rate is None else f"{rate:g} req/s"
                best.append(f"{ENGINE_FORMS.get(tree, tree)} {text}")
            at_once = [record for record in of_load if record["rate"] is None]
            rows = [
                _rate(record)
                for _, found in split([*rated(of_load), *at_once], "rate").items()
                for tree in known(ENGINE_FORMS, found)
                for record in found
                if record["tree"] == tree
            ]
            heads = ["offered, req/s", "tree", "achieved, req/s", "output, tok/s"]
            heads += ["TTFT, ms", "TTFT p99, ms", "TPOT, ms", "TPOT p99, ms"]
            heads += ["whole request, ms", "longest pause, ms", "failed"]
            heads += ["first tokens", "tokens"]
            lines += [
                f"Load: {load}. The highest rate kept: {', '.join(best)}.",
                "",
                *table(heads, rows),
            ]
    if not lines:
        return skipped(device.runs("rates"), ENGINE_FORMS)
    return [
        "## Rising request rates",
        "",
        *prose("""
            A server of each tree, both on one GPU, asked by `vllm bench serve` one
            after the other: the same requests at the same times, each rate twice the
            one before until both are saturated, and at last all at once. What is
            saturated is not asked for more. Greedy tokens are of requests with images
            that are sent alone, before, whatever the rate. TTFT is the time to the
            first token, median with quartiles; TPOT that of each one after it, median.
            There is one run of each: quartiles are of its requests, and of few requests
            there is no percentile. The longest pause is the longest time in which no
            request that was under way got its first token or its last: of few, about
            how long one decodes; of many, how long the server stood still. Seconds
            of many are of a compiler: FA4 has other kernels for large batches, which a
            server compiles while all requests wait, in those runs in which it first
            meets such a batch then; or before it takes requests, where it warms them
            up.
        """),
        *prose("A rate is kept by a server that it does not saturate:"),
        "* no request fails;",
        "* of the requests that come before the last one by more than the fastest"
        " takes, at least four of five are answered when that one comes;",
        "* the median wait for the first token is at most five times the shortest at"
        " any rate, on the slower of the servers;",
        "* and with more to do the server has answered as many a second (`saturated` in"
        " scripts/bench_rates.py).",
        "",
        *prose("""
            Beyond that a run is too short to say what a server gives in the long run:
            while requests come, their prefills go before the answers of others, and of
            all at once most time is of answers alone. Either may give more, by the time
            that prefills and answers take.
        """),
        *figures(device, "rates"),
        *lines,
        *skipped(device.runs("rates"), ENGINE_FORMS),
    ]


def _rate(record: Record) -> list[str]:
    asked = record["completed"] + record["failed"]
    has_tail = record["completed"] >= TAIL
    return [
        "all at once" if record["rate"] is None else f"{record['rate']:g}",
        ENGINE_FORMS.get(str(record["tree"]), str(record["tree"])),
        *(number(record[f"{what}_throughput"]) for what in ("request", "output")),
        str(first_token(record)),
        *(
            number(record[f"{what}_ms"]) if what[0] != "p" or has_tail else "-"
            for what in ("p99_ttft", "median_tpot", "p99_tpot", "median_e2el")
        ),
        number(longest_pause(record)),
        f"{record['failed']:,} of {asked:,}",
        *agreement(record.get("agreement")),
    ]


def scaling(device: Device) -> list[str]:
    """How time and memory grow."""
    lines: list[str] = []
    for run, (axis, kind, layers), records in device.groups(
        "scaling", "axis", "kind", "layers"
    ):
        what, is_tower = AXES[axis]
        names, models = (TOWER_FORMS, TOWERS) if is_tower else (ENGINE_FORMS, MODELS)
        part = "tower" if is_tower else "a step of the language model"
        of = f"{part} of {models.get(kind, kind)}, {layers} layers"
        lines += [
            f"### {what.capitalize()}: {of}",
            "",
            *commands(device, [run]),
            *sampled(records),
            *_points(records, names),
            *(_shares if axis == "image_share" else _powers)(records, names),
        ]
    skips = skipped(device.runs("scaling"), TOWER_FORMS | ENGINE_FORMS)
    if not lines:
        return skips
    return [
        "## How it grows",
        "",
        *prose(f"""
            Time, median with quartiles, and peak memory above what was used, along one
            axis each. The exponent of x is fitted by least squares of the logarithms to
            the upper half of the points, less those that take less than {CLEAR:g} times
            as long as the shortest: below, what a call costs at any size, such as the
            host's time for its kernels, hides how it grows. One image alone varies
            most, for the host is slower than the GPU: the one that a batch of images
            begins with and the one of as many soft tokens are the same, measured twice.
        """),
        *prose("""
            Many images go through the tower in several calls, whose peak is that of one
            of them: beyond one call memory grows by inputs and features alone. A long
            prompt goes through the engine in several steps: the exponent of memory is
            of prompts of one step, and the KV cache is there before. Steps are of one
            prompt, whose time is that of all of them; a quarter of a context is of
            images. Along their share what counts is the time over that of text
            alone, which stands in a column of its own.
        """),
        *figures(device, "scaling"),
        *lines,
        *skips,
    ]


def _points(records: Sequence[Record], names: Mapping[str, str]) -> list[str]:
    """A table of the points of an axis."""
    axis, forms = records[0]["axis"], known(names, records)
    is_share = axis == "image_share"
    alone = {r["tree"]: r["median"] for r in records if is_share and not r["x"]}
    # What not all axes have.
    more: dict[str, Callable[[Record], str]] = {
        "soft tokens": lambda r: f"{r['soft_tokens']:,}",
        "images": lambda r: f"{r['images']:,}",
        "steps": lambda r: f"{r['steps']:,}",
        "error": lambda r: power(r["error"]),
        "agreement": lambda r: agreement(r["agreement"])[0],
    }
    there = [
        key
        for key in more
        if any(key.replace(" ", "_") in record for record in records)
    ]
    rows = []
    for (x,), of_x in sorted(split(records, "x").items()):
        trees = by(of_x, "tree")
        for form in (form for form in forms if form in trees):
            record = trees[form]
            row = [f"{x:.0%}" if is_share else f"{x:,}", names.get(form, form)]
            row += [str(spread(record, 1e3)), size(memory(record))]
            if is_share:
                base = alone.get(form)
                row.append(f"{record['median'] / base:.2f}" if base else "-")
            row += [
                more[key](record) if key.replace(" ", "_") in record else "-"
                for key in there
            ]
            rows.append(row)
    heads = [AXES[axis][0], "tree", "ms", "MiB"]
    heads += ["times text alone"] if is_share else []
    heads += ["first tokens" if key == "agreement" else key for key in there]
    return table(heads, rows)


def _powers(records: Sequence[Record], names: Mapping[str, str]) -> list[str]:
    """How each tree grows along an axis, in words."""
    lines = []
    for form in known(names, records):
        found = powers(record for record in records if record["tree"] == form)
        said = [
            f"{part} {one.words} ({one.text})"
            if one
            else f"how {part} grows is not known of so few points"
            for part, one in found.items()
        ]
        if said:
            lines.append(f"* {names.get(form, form)}: {', '.join(said)}")
    return [*lines, ""] if lines else []


def _shares(records: Sequence[Record], names: Mapping[str, str]) -> list[str]:
    """What images cost each tree over text alone, in words."""
    lines = []
    for form in known(names, records):
        own = by((record for record in records if record["tree"] == form), "x")
        text = own.pop(0, None)
        if text is None or not own:
            continue
        over = [record["median"] / text["median"] for record in own.values()]
        said = f"take {min(over):.2f} to {max(over):.2f} times as long as text alone"
        sizes = [mib for record in own.values() if (mib := memory(record))]
        if sizes and (base := memory(text)):
            said += f", and at most {max(sizes) / base:.2f} times as much memory"
        label = names.get(form, form)
        lines.append(f"* {label}: {min(own):.0%} to {max(own):.0%} of images {said}")
    return [*lines, ""] if lines else []


def host(device: Device) -> list[str]:
    """The host's part of a step."""
    records = device.records("host")
    if not records:
        return []
    rows = [[r["case"], r["variant"], str(spread(r))] for r in records]
    return [
        "## The host",
        "",
        *prose("""
            Once a step: medians, with what lies between the lowest and the highest
            tenth of the samples. *Find* gives the ranges of images in a batch, *cut*
            their segments, *fill* the array of ranges that the release's kernels read;
            *build* is all of a backend's attention metadata, with *cut* or *fill* in
            it. The release builds it with images on FA4 alone, where FLASH_ATTN is
            asked for; its default builds two backends', which is not timed.
        """),
        *commands(device, device.runs("host")),
        *sampled(records),
        *table(["batch", "what", "us"], rows),
    ]


SECTIONS: tuple[Callable[[Device], list[str]], ...] = (
    summary,
    layer,
    tower,
    step,
    serving,
    alike,
    rates,
    scaling,
    pull_request,
    host,
    not_better,
)


def write(devices: Sequence[Device]) -> str:
    """Return the whole text of what was measured."""
    lines = [
        "# Benchmarks",
        "",
        *prose(f"""
            The release as it is and with the series, on the same inputs and weights; in
            engines on the same weights of the language model only, for the towers'
            parameters have other names. Those of E2B and E4B attend to images as to
            text, those of the others within images in both directions; {UNIFIED} has no
            tower. `make bench` measures, `make report` wrote this from what it kept;
            see [Measuring](maintaining.md#measuring). Commits are of this project: `git
            diff COMMIT -- patches/` shows what has changed in the series since. In the
            place of quartiles, fewer than five samples have the lowest and the highest.
        """),
        *prose("""
            Greedy tokens are held against those of the release on Triton: how many
            requests begin with the same token, and how many tokens are the same before
            the first that is not. Its own are of a second run, which says how much of
            a difference is of batches that differ from run to run. Where it was not
            measured they are held against the release as it is, named in brackets.
            Weights are random, so that two tokens are often as good as tied and
            rounding decides; what follows is another text then. That answers are right
            is for `make test` to say, which holds them against Hugging Face's in
            float32.
        """),
    ]
    for device in devices:
        newest, usual = device.newest, device.usual
        about = f"vLLM {usual.head['release']}, {usual.stamp}; {usual.machine}."
        lines += [f"# {device.name}", "", about, ""]
        if usual.head["tree"] != newest.head["tree"]:
            recent = ", ".join(job for job in device.jobs if job not in device.older)
            text = f"Made with the series of commit {newest.head['commit'][:9]}"
            lines += [f"{text}: {recent}. All else is of an older form of it.", ""]
        elif jobs := ", ".join(device.older):
            text = "Made with an older form of the series than the newest run"
            lines += [f"{text}: {jobs}.", ""]
        if jobs := ", ".join(earlier(device)):
            lines += [f"Made by earlier code of the benchmarks: {jobs}.", ""]
        if jobs := ", ".join(otherwise(device)):
            text = "Made with other options than `make bench` gives now"
            lines += [f"{text}: {jobs}.", ""]
        if jobs := ", ".join(device.partial):
            lines += [f"Ended before all was measured: {jobs}.", ""]
        if jobs := ", ".join(missing(device)):
            lines += [f"Not measured here yet: {jobs}.", ""]
        for section in SECTIONS:
            lines += section(device)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the report of RESULTS=, by default of docs/benchmarks/."""
    # It is of all releases that were measured; one that is unknown is a mistake.
    pins.load(console.option("RELEASE"))
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
    devices = latest(lines, folder.name)
    for device in devices:
        for figure in plots.figures(device):
            plots.save(figure, folder)
    text = folder.with_suffix(".md")
    console.write(text, write(devices))
    print(show(text))


if __name__ == "__main__":
    console.run(main)
