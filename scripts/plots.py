# SPDX-License-Identifier: Apache-2.0
"""The plots of `make report`: what there is to draw of a device, and how.

What there is and where it goes is known without matplotlib, which only `save` needs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.results import (
    AXES,
    BACKENDS,
    ENGINE_FORMS,
    LAYER_FORMS,
    TAIL,
    TOWER_FORMS,
    TOWERS,
    Device,
    Record,
    Run,
    Spread,
    by,
    first_token,
    known,
    memory,
    model,
    of_bench,
    powers,
    rated,
    split,
    spread,
    upper,
)

# Opaque, so that it can be read in a dark page, too.
PAPER, INK = "#f6f6f6", "#222222"
# One color a form in all plots, the release's grey.
COLORS = {
    "unpatched": "#666666",
    "Triton ranges": "#666666",
    "FA4 mask_mod": "#9c755f",
    "FA2 chosen": "#59a14f",
    "FA3 chosen": "#4e79a7",
    "FA4 chosen": "#e15759",
    "release": "#666666",
    "hf-sdpa": "#9c755f",
    "hf-flash": "#b6992d",
    "eager": "#4e79a7",
    "patched": "#4e79a7",
    "compiled": "#e15759",
    "captured": "#59a14f",
    "fp8": "#f28e2b",
}
OTHERS = (
    *("#b07aa1", "#ff9d9a", "#76b7b2", "#d37295"),
    *("#8cd17d", "#a0cbe8", "#d4a6c8", "#86bcb6"),
)
# One a form where several may be at the same place.
MARKERS = ("o", "s", "^", "D", "v", "p")
# What one batch shows of all forms, where it was measured.
SHOWN = ("8 x 280", "8 x 280 mixed", "1 x 280")
# What a bar is, see `spread`.
RANGE = "median and quartiles\n(range of fewer than five samples)"
# Of panels beside each other.
COLUMNS = 2


@dataclass(frozen=True)
class Figure:
    """A plot that there are records for.

    Args:
        section: the level of the records, where it belongs.
        file: its name.
        title: what it shows, with the device.
        size: in inches.
        draw: draws it on an empty matplotlib figure.
    """

    section: str
    file: str
    title: str
    size: tuple[float, float]
    draw: Callable[[Any], None]


def figures(device: Device) -> list[Figure]:
    """Return the plots that a device has records for."""
    found: list[Figure] = []

    def add(
        names: Sequence[str],
        title: str,
        size: tuple[float, float],
        draw: Callable[[Any], None],
    ) -> None:
        words = "".join(c if c.isalnum() else " " for c in " ".join(names).lower())
        file = "-".join([device.stem, *dict.fromkeys(words.split())]) + ".png"
        level = names[0].split()[0]
        found.append(Figure(level, file, f"{title}, {device.name}", size, draw))

    if layer := _layer_forms(device.records("layer")):
        size = (9, 1.6 + 0.5 * len(split(layer, "case")))
        add(["layer"], "One attention layer", size, partial(_layer, layer))
    for run, (kind,), records in device.groups("tower", "kind"):
        job = run.head["job"]
        towers = f"Vision tower of {TOWERS.get(kind, kind)}{run.title}"
        batches = split(records, "batch")
        there = known(TOWER_FORMS, records)
        forms = [form for form in there if form not in BACKENDS]
        # Mostly backends are in the other plot.
        if 2 * len(forms) > len(there):
            height = 1.4 + 0.8 * len(batches)
            add([job, kind], towers, (8, height), partial(_tower, records, forms))
        shown = next((name for name in SHOWN if (name,) in batches), None)
        of_shown = batches[shown,] if shown else []
        if len(of_shown) > 1 and any(record.get("error") for record in of_shown):
            forms = known(TOWER_FORMS, of_shown)
            title, height = f"{towers}, {shown}", 1.4 + 0.3 * len(forms)
            draw = partial(_forms, of_shown, forms)
            add([job, kind, "forms"], title, (9, height), draw)
    if steps := _step_parts(device):
        cases = sum(len(parts) for parts in steps.values())
        size = (8, 1.6 + 0.7 * cases + 0.3 * len(steps))
        add(["step"], "One step of the engine", size, partial(_step, steps))
    if serving := _ratios(device):
        rows = max(len(ratios) for ratios in serving.values())
        lines = math.ceil(len(serving) / COLUMNS)
        size = (9, 1.3 + lines * (0.5 + 0.24 * rows))
        title = "Throughput and latency against the release"
        add(["serving"], title, size, partial(_serving, serving))
    for run, (kind, layers, load), records in device.groups(
        "rates", "kind", "layers", "workload"
    ):
        if rated(records) and len(split(records, "rate")) > 1:
            title = f"{_name(run, kind, layers)}: {load}, at rising rates"
            draw = partial(_rates, records)
            add([run.head["job"], kind, load], title, (9, 4.8), draw)
    for run, (axis, kind, layers), records in device.groups(
        "scaling", "axis", "kind", "layers"
    ):
        along, is_tower = AXES[axis]
        title = f"Language model of {model(kind, layers)},"
        if is_tower:
            title = f"Vision tower of {TOWERS.get(kind, kind)}"
        draw = partial(_scaling, axis, records)
        add([run.head["job"], kind, axis], f"{title} by {along}", (9, 4.8), draw)
    return found


def save(figure: Figure, folder: Path) -> None:
    """Draw a plot into a folder: the same results give the same file.

    Args:
        figure: which.
        folder: made if it is not there.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    # A person's own settings must not show.
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        canvas = Canvas(figsize=figure.size, facecolor=PAPER, layout="constrained")
        figure.draw(canvas)
        for axes in canvas.axes:
            axes.set_facecolor(PAPER)
            axes.grid(which="major", alpha=0.35)
            axes.set_axisbelow(True)
        canvas.suptitle(figure.title, fontsize="medium", color=INK)
        # No date or version is in it.
        canvas.savefig(folder / figure.file, dpi=110, metadata={"Software": None})


def _colors(names: Mapping[str, str], forms: Sequence[str]) -> dict[str, str]:
    """Return a color for each form, the same whatever others there are."""
    others = [form for form in dict.fromkeys([*names, *forms]) if form not in COLORS]
    return COLORS | {f: OTHERS[n % len(OTHERS)] for n, f in enumerate(others)}


def _marks(forms: Sequence[str], form: str, color: str) -> dict[str, Any]:
    """Return a form's marks: hollow, and smaller than those that they may be on."""
    n = forms.index(form)
    return {
        "marker": MARKERS[n % len(MARKERS)],
        "markersize": 4 + 2 * (len(forms) - 1 - n),
        "markerfacecolor": "none",
        "color": color,
    }


def _bars(found: Sequence[Spread]) -> list[list[float]]:
    """Return how far each range reaches below and above its median."""
    return [[s.median - s.low for s in found], [s.high - s.median for s in found]]


def _places(forms: Sequence[str], form: str, row: int, width: float = 0.8) -> float:
    """Return where a form's mark is around a row."""
    return row + (forms.index(form) - (len(forms) - 1) / 2) * width / len(forms)


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _marked(
    axes: Any,
    forms: Sequence[str],
    form: str,
    found: Mapping[int, Spread],
    color: str,
    width: float = 0.8,
) -> Any:
    """Draw a form's medians and ranges by row; return what its legend shows."""
    return axes.errorbar(
        [one.median for one in found.values()],
        [_places(forms, form, row, width) for row in found],
        xerr=_bars([*found.values()]),
        fmt="o",
        markersize=4,
        color=color,
    )


def _legend(
    figure: Any, drawn: Mapping[str, Any], place: str = "outside lower center"
) -> None:
    handles = list(drawn.values())
    figure.legend(handles, list(drawn), loc=place, ncols=4, fontsize="small")


def _logarithmic(axis: Any, ticks: Sequence[float] = ()) -> None:
    """Make an axis logarithmic, with numbers as people write them.

    Args:
        axis: of an `Axes`.
        ticks: where they are, by default at some of each power of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_minor_locator(NullLocator())
    if ticks:
        axis.set_ticks(list(ticks))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Return a number, of contexts in units of 1,024."""
    thousands, rest = divmod(value, 1024)
    return f"{value:g}" if rest or not value else f"{thousands:g}K"


def _layer_forms(records: Sequence[Record]) -> list[Record]:
    """Return what a layer takes by itself, and the same of causal attention."""
    calls = ("chosen", "mask_mod", "ranges", "floor")
    return [r for r in records if r["variant"].partition(" ")[2] in calls]


def _layer(records: Sequence[Record], figure: Any) -> None:
    axes = figure.subplots()
    cases = split(records, "case")
    names = [name for (name,) in cases]
    there = {record["variant"] for record in records}
    forms = [form for form in LAYER_FORMS if form in there]
    colors = _colors(LAYER_FORMS, forms)
    for form in forms:
        of_form = by((r for r in records if r["variant"] == form), "case")
        found = {names.index(name): spread(one) for name, one in of_form.items()}
        marks = _marked(axes, forms, form, found, colors[form])
        marks.set_label(LAYER_FORMS[form].replace("`", ""))
    floors = [
        (min(times), row)
        for row, found in enumerate(cases.values())
        if (times := [r["median"] for r in found if r["variant"].endswith(" floor")])
    ]
    if floors:
        style = {"markersize": 22, "color": INK, "label": "causal, the fastest"}
        axes.plot(*zip(*floors, strict=True), "|", **style)
    _logarithmic(axes.xaxis)
    axes.set_xlabel("microseconds: median, and from the lowest to the highest tenth")
    axes.set_ylabel("batch")
    _rows(axes, names)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")


def _tower(records: Sequence[Record], forms: Sequence[str], figure: Any) -> None:
    axes, colors = figure.subplots(), _colors(TOWER_FORMS, forms)
    batches = [name for (name,) in split(records, "batch")]
    for form in forms:
        of_form = by((r for r in records if r["tree"] == form), "batch")
        found = {batches.index(b): spread(one, 1e3) for b, one in of_form.items()}
        marks = _marked(axes, forms, form, found, colors[form])
        marks.set_label(TOWER_FORMS.get(form, form))
    _logarithmic(axes.xaxis)
    axes.set_xlabel(f"milliseconds, {RANGE}")
    axes.set_ylabel("batch")
    _rows(axes, batches)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")


def _forms(records: Sequence[Record], forms: Sequence[str], figure: Any) -> None:
    """One batch in all forms: time, and error beside it."""
    time, error = figure.subplots(1, 2, sharey=True)
    of_form, colors = by(records, "tree"), _colors(TOWER_FORMS, forms)
    for row, form in enumerate(forms):
        found = spread(of_form[form], 1e3)
        time.errorbar(
            [found.median], [row], xerr=_bars([found]), fmt="o", color=colors[form]
        )
        if of_form[form].get("error"):
            error.plot([of_form[form]["error"]], [row], "o", color=colors[form])
    _logarithmic(time.xaxis)
    time.set_xlabel(f"milliseconds, {RANGE}")
    _logarithmic(error.xaxis)
    error.set_xlabel("error relative to float32")
    _rows(time, [TOWER_FORMS.get(form, form) for form in forms])


def _name(run: Run, kind: str, layers: int | None) -> str:
    """Return a model with its layers, and what else its job is called."""
    return f"{model(kind, layers)}:{run.title}" if run.title else model(kind, layers)


Parts = dict[str, dict[str, dict[str, Record]]]


def _step_parts(device: Device) -> Parts:
    """Return the records of a step's variants by model, case and tree."""
    found: Parts = {}
    for run, (kind, layers, case, tree), records in device.groups(
        "step", "kind", "layers", "case", "tree"
    ):
        cases = found.setdefault(_name(run, kind, layers), {})
        cases.setdefault(case, {})[tree] = by(records, "variant")
    return found


def _step(steps: Parts, figure: Any) -> None:
    """The language model and the tower on top of each other."""
    heights = [len(cases) for cases in steps.values()]
    panels = figure.subplots(len(steps), squeeze=False, height_ratios=heights)[:, 0]
    drawn: dict[str, Any] = {}
    for axes, (name, cases) in zip(panels, steps.items(), strict=True):
        there = [{"tree": tree} for trees in cases.values() for tree in trees]
        forms = known(ENGINE_FORMS, there)
        colors = _colors(ENGINE_FORMS, forms)
        for row, trees in enumerate(cases.values()):
            for form, parts in trees.items():
                place = _places(forms, form, row)
                shape = {"height": 0.8 / len(forms) * 0.9, "color": colors[form]}
                whole = parts.get("images and tower") or parts.get("images")
                if whole is None:
                    continue
                found, tower = spread(whole), parts.get("tower")
                label = ENGINE_FORMS.get(form, form)
                middle = parts["images"]["median"] if "images" in parts else 0
                drawn[label] = axes.barh(place, middle or found.median, **shape)
                if tower is not None and "images and tower" in parts:
                    drawn[f"{label}: tower"] = axes.barh(
                        place,
                        found.median - middle,
                        left=middle,
                        alpha=0.45,
                        hatch="//",
                        edgecolor=PAPER,
                        **shape,
                    )
                bars = _bars([found])
                axes.errorbar([found.median], [place], xerr=bars, fmt="none", color=INK)
        _rows(axes, list(cases))
        axes.set_title(name, fontsize="medium")
    panels[-1].set_xlabel(f"milliseconds for language model and tower, {RANGE}")
    _legend(figure, drawn)


Ratios = dict[str, dict[str, dict[str, Spread]]]


def _ratios(device: Device) -> Ratios:
    """Return how many times better than the release: by model, workload and tree."""
    found: Ratios = {}
    for run, (kind, layers, load), records in device.groups(
        "serving", "kind", "layers", "workload"
    ):
        of_tree = by(records, "tree")
        if "release" not in of_tree or len(of_tree) < 2:
            continue
        rows = found.setdefault(_name(run, kind, layers), {})
        release, _ = of_bench(of_tree["release"])
        for tree in known(ENGINE_FORMS, records):
            own, unit = of_bench(of_tree[tree])
            if tree != "release":
                ratio = own.over(release) if unit == "tok/s" else release.over(own)
                rows.setdefault(load, {})[tree] = ratio
    return found


def _serving(models: Ratios, figure: Any) -> None:
    loads = list(dict.fromkeys(load for rows in models.values() for load in rows))
    lines = math.ceil(len(models) / COLUMNS)
    # In a part of its own, or its legend would be on the figure's title.
    figure = figure.subfigures()
    panels = figure.subplots(
        lines, min(COLUMNS, len(models)), squeeze=False, sharex=True, sharey=True
    ).flatten()
    drawn: dict[str, Any] = {}
    for axes, (name, rows) in zip(panels, models.items(), strict=False):
        there = [{"tree": tree} for trees in rows.values() for tree in trees]
        forms = known(ENGINE_FORMS, there)
        colors = _colors(ENGINE_FORMS, forms)
        for form in forms:
            found = {loads.index(n): of[form] for n, of in rows.items() if form in of}
            marks = _marked(axes, forms, form, found, colors[form], 0.6)
            drawn[ENGINE_FORMS.get(form, form)] = marks
        axes.axvline(1, color=COLORS["release"], linewidth=1)
        axes.tick_params(labelbottom=True)
        axes.set_title(name, fontsize="medium")
    _rows(panels[0], loads)
    for axes in panels[len(models) :]:
        axes.remove()
    figure.supxlabel(
        "times as good as the release (1): ratio of medians, and from the closest to\n"
        "the farthest of both ranges (quartiles; all of fewer than five samples)",
        fontsize="medium",
    )
    _legend(figure, drawn, "outside upper center")


def _rates(records: Sequence[Record], figure: Any) -> None:
    achieved, first = figure.subplots(1, 2)
    forms = known(ENGINE_FORMS, records)
    colors = _colors(ENGINE_FORMS, forms)
    offered = [record["rate"] for record in rated(records)]
    at_once = [record for record in records if record["rate"] is None]
    # All at once is no rate: it is apart, where the next one would be.
    places = {rate: rate for rate in offered}
    names = [f"{rate:g}" for rate in places]
    if at_once:
        places[None] = 2 * offered[-1]
        names.append("all at\nonce")
    [line] = achieved.plot(offered, offered, color=INK, linewidth=0.8, linestyle=":")
    drawn = {"as offered": line}
    for form in forms:
        label, marks = ENGINE_FORMS.get(form, form), _marks(forms, form, colors[form])
        # Beside each other, or the ranges would be on each other.
        shift = 1.2 ** _places(forms, form, 0)
        for found in (rated(records), at_once):
            own = [record for record in found if record["tree"] == form]
            where = [places[record["rate"]] for record in own]
            answers = [record["request_throughput"] for record in own]
            [line] = achieved.plot(where, answers, **marks)
            drawn.setdefault(label, line)
            waits = [first_token(record) for record in own]
            first.errorbar(
                [shift * x for x in where],
                [wait.median for wait in waits],
                yerr=_bars(waits),
                **marks,
            )
            tails = [
                (shift * x, record["p99_ttft_ms"])
                for x, record in zip(where, own, strict=True)
                if record["completed"] >= TAIL
            ]
            if tails:
                style = {"markersize": 4, "linewidth": 1, "color": colors[form]}
                [line] = first.plot(*zip(*tails, strict=True), "x--", **style)
                drawn.setdefault(f"{label}, 99th percentile", line)
    achieved.set_ylabel("achieved, requests a second")
    first.set_ylabel(
        "time to first token, milliseconds\n(median and quartiles of requests)"
    )
    first.set_title(
        f"99th percentile: only of {TAIL} requests or more", fontsize="small"
    )
    for axes in (achieved, first):
        _logarithmic(axes.yaxis)
        _logarithmic(axes.xaxis)
        axes.set_xticks(list(places.values()), names)
        axes.set_xlabel("offered, requests a second")
    _legend(figure, drawn)


def _scaling(axis: str, records: Sequence[Record], figure: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    names = TOWER_FORMS if AXES[axis][1] else ENGINE_FORMS
    forms = known(names, records)
    colors, is_share = _colors(names, forms), axis == "image_share"
    # On a CPU an engine's memory is not known.
    has_memory = any(memory(record) for record in records)
    panels = figure.subplots(1, 1 + has_memory, squeeze=False)[0]
    for n, form in enumerate(forms):
        own = sorted((r for r in records if r["tree"] == form), key=lambda r: r["x"])
        grows, marks = powers(own), _marks(forms, form, colors[form])
        # Lines on each other show by turns.
        dashes = (4 * n, (6, max(0, 4 * len(forms) - 6)))
        times = [(record["x"], spread(record, 1e3)) for record in own]
        sizes = [(r["x"], Spread(m, m, m)) for r in own if (m := memory(r))]
        for axes, part, points, scale in zip(
            panels, ("time", "memory"), (times, sizes), (1e3, 1), strict=False
        ):
            medians = [(x, found.median) for x, found in points]
            label = names.get(form, form)
            power = grows.get(part)
            # Two points are on a line whatever they are.
            if power and power.points > 2:
                label += f"; line: {power.text}"
                ends = [x for x, _ in upper(medians)]
                values = [scale * power(x) for x in ends]
                line = {"linestyle": dashes, "linewidth": 1}
                axes.plot(ends, values, color=colors[form], **line)
            axes.errorbar(
                [x for x, _ in medians],
                [median for _, median in medians],
                yerr=_bars([found for _, found in points]),
                linestyle=dashes if is_share else "none",
                label=label,
                **marks,
            )
    places = sorted({record["x"] for record in records})
    labels = (f"milliseconds, {RANGE}", "MiB above what was used, peak")
    for axes, label in zip(panels, labels, strict=False):
        axes.set_ylabel(label)
        axes.set_xlabel(AXES[axis][0])
        if is_share:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            axes.set_xticks(places)
            axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
        else:
            _logarithmic(axes.xaxis, places)
            _logarithmic(axes.yaxis)
        # Above, where no points are.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
