# SPDX-License-Identifier: Apache-2.0
"""What `make bench` has kept: the runs of each device, and what is read from them."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.console import Failure

Record = dict[str, Any]

# What a reader sees for the names in records: the forms of the tower, those of an
# engine, and the models.
TOWER_FORMS = {
    "unpatched": "release",
    "hf-sdpa": "Transformers, SDPA",
    "hf-flash": "Transformers, FlashAttention",
    "eager": "patched",
    "compiled": "compiled",
    "captured": "captured",
    "fp8": "compiled, FP8",
    "tp2": "two GPUs, weights shared",
    "data2": "two GPUs, images shared",
    "sdpa": "compiled, SDPA",
    "triton": "compiled, Triton",
    "fa2": "compiled, FA2",
    "fa3": "compiled, FA3",
    "fa4": "compiled, FA4",
    "flashinfer": "compiled, FlashInfer",
}
PEERS = ("hf-sdpa", "hf-flash")
BACKENDS = ("sdpa", "triton", "fa2", "fa3", "fa4", "flashinfer")
ENGINE_FORMS = {
    "release": "release",
    "triton": "release, Triton",
    "patched": "patched",
    "fa3": "patched, FA3 and FA4",
}
# What those are called whose answers are compared with one another's.
ENGINE_NAMES = {
    f"{tree}{name}": f"{tree}{label}"
    for name, label in {"": "", "-again": ", another", "-eager": ", eager"}.items()
    for tree in ("release", "patched")
}
LAYER_FORMS = {
    "FA4 mask_mod": "FA4 with `mask_mod` (release)",
    "Triton ranges": "Triton (release)",
} | {
    f"FA{version} {form}": f"FA{version}{name}"
    for version in (2, 3, 4)
    for form, name in {
        "chosen": "",
        "correction": " as correction",
        "split": " as split",
        "one_call": " in one call",
    }.items()
}
MODELS = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b": "26B-A4B", "31b": "31B"}
# The one that has no tower.
UNIFIED = MODELS["12b"]
# How many layers the whole language models have.
LAYERS = {"e2b": 35, "e4b": 42, "12b": 48, "26b": 30, "31b": 60}
TOWERS = {"26b": "26B-A4B and 31B", "e2b": "E2B and E4B"}
# What scaling is along, and whether it is of the tower.
AXES = {
    "images": ("images in a batch", True),
    "soft_tokens": ("soft tokens of an image", True),
    "context": ("tokens of context", False),
    "image_share": ("share of images in the context", False),
}
# So many samples have quartiles; the range of fewer is that of all of them.
FEW = 5
# So many requests have a 99th percentile that is not the largest value by chance.
TAIL = 50
# What medians of one form in two processes, or of few samples, may differ by: of layers
# all forms are in one process.
ALIKE = {"layer": 1.005, "tower": 1.04, "engine": 1.02}
# What is so many times the shortest is more than what is always there.
CLEAR = 1.5
# Up to here the exponent of a power is called so.
GROWTH = (
    (-0.1, "falls"),
    (0.1, "hardly grows"),
    (0.9, "grows less than linearly"),
    (1.1, "grows linearly"),
    (1.9, "grows faster than linearly"),
    (2.1, "grows with the square"),
    (math.inf, "grows faster than the square"),
)


@dataclass(frozen=True)
class Run:
    """The results of one job: what it ran on and how, and its records."""

    head: Record
    records: list[Record]

    @property
    def title(self) -> str:
        """What its job is called besides level and model, after a space."""
        return "".join(f" {word}" for word in self.head["job"].split()[2:])

    @property
    def command(self) -> str:
        """For a person to type."""
        words = [
            f'"{word}"' if set(word) & set(" ;") else word
            for word in self.head["command"]
        ]
        return "PYTHONPATH=. $(make -s python) -m " + " ".join(words)

    @property
    def stamp(self) -> str:
        """The day and the commit of this project that it was made with."""
        return f"{self.head['time'][:10]}, commit {self.head['commit'][:9]}"

    @property
    def machine(self) -> str:
        """What it ran on, with the versions of what is installed there."""
        machine = self.head["machine"]
        gpus = machine.get("gpus", 0)
        parts = [f"{gpus} GPUs, "] if gpus > 1 else []
        parts.append(f"{machine['cores']} cores of {machine.get('cpu', 'a processor')}")
        if "driver" in machine:
            limit = machine["power_limit"]
            parts.append(f"; driver {machine['driver']}, {limit} at most")
        versions = ", ".join(f"{k} {v}" for k, v in sorted(machine["versions"].items()))
        # Of a host with several GPUs.
        beside = f"; beside {self.head['beside']}" if "beside" in self.head else ""
        return "".join(parts) + f"; {versions}{beside}"


@dataclass
class Device:
    """A GPU or processor, and the runs of a release that were made on it.

    Args:
        name: the GPU's, or the processor's with its cores; with the release where
            there are several.
        jobs: the runs by job.
        folder: where its plots are, from the text.
    """

    name: str
    jobs: dict[str, Run]
    folder: str

    @property
    def newest(self) -> Run:
        """The run that was made last."""
        return max(self.jobs.values(), key=lambda run: str(run.head["time"]))

    @property
    def usual(self) -> Run:
        """The last run of the tree that most ran with."""
        trees = Counter(run.head["tree"] for run in self.jobs.values())
        return max(
            self.jobs.values(),
            key=lambda run: (trees[run.head["tree"]], str(run.head["time"])),
        )

    @property
    def older(self) -> list[str]:
        """The jobs that ran with another tree than the newest run."""
        tree = self.newest.head["tree"]
        return [job for job, run in self.jobs.items() if run.head["tree"] != tree]

    @property
    def partial(self) -> list[str]:
        """The jobs that ended before all was measured."""
        return [job for job, run in self.jobs.items() if "partial" in run.head]

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        words = "".join(c if c.isalnum() else " " for c in self.name.lower()).split()
        return "-".join(words)

    def runs(self, level: str) -> list[Run]:
        """Return the runs of a level."""
        return [run for job, run in self.jobs.items() if job.split()[0] == level]

    def records(self, level: str) -> list[Record]:
        """Return what was measured on a level, without what could not run."""
        return measured(r for run in self.runs(level) for r in run.records)

    def groups(
        self, level: str, *keys: str
    ) -> Iterator[tuple[Run, tuple[Any, ...], list[Record]]]:
        """Return a level's records by run and the values of some keys.

        Only what is of one run was measured by turns, and can be compared.
        """
        for run in self.runs(level):
            for values, records in split(measured(run.records), *keys).items():
                yield run, values, records


def latest(lines: Iterable[Record], folder: str) -> list[Device]:
    """Return the last run of each job, by device and release.

    A run that did not end well counts where there is no other.

    Args:
        lines: those of all files of results.
        folder: where the plots are, from the text.

    Raises:
        Failure: records come without a line that says what they were made on.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    current: Run | None = None
    for line in lines:
        if "command" in line:
            current = Run(line, [])
            machine = line["machine"]
            name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
            found.setdefault((name, line["release"]), []).append(current)
        elif current is None or line.get("job") != current.head["job"]:
            raise Failure(
                f"records of {line.get('job')} do not say what they were made on",
                "remove them, and `make bench` makes new ones",
            )
        else:
            current.records.append(line)
    devices = []
    names = [name for name, _ in found]
    for (name, release), runs in found.items():
        if names.count(name) > 1:
            name += f", vLLM {release}"
        # Of two at the same time the last line counts.
        runs.sort(key=lambda run: str(run.head["time"]))
        # In the order in which they were measured first.
        of_job: dict[str, Run] = {}
        for run in runs:
            other = of_job.get(run.head["job"])
            if other is None or "partial" in other.head or "partial" not in run.head:
                of_job[run.head["job"]] = run
        devices.append(Device(name, of_job, folder))
    return devices


def measured(records: Iterable[Record]) -> list[Record]:
    """Return records without those that say why there is nothing."""
    return [record for record in records if "skipped" not in record]


def split(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Return records by their values of some keys, in the order they came in."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return found


def by(records: Iterable[Record], key: str) -> dict[Any, Record]:
    """Return the last record of each value of a key."""
    return {record[key]: record for record in records}


def model(kind: str, layers: int | None) -> str:
    """Return what a language model is called, with how many layers it had."""
    name, whole = MODELS.get(kind, kind), LAYERS.get(kind)
    if layers is None:
        return name
    if layers == whole:
        return f"{name}, all {whole} layers"
    return (
        f"{name}, {layers} of {whole} layers" if whole else f"{name}, {layers} layers"
    )


def memory(record: Record) -> float | None:
    """Return the mebibytes that a form needed, None if they are not known.

    A graph's are taken when it is captured, and not seen when it is measured.
    """
    return None if record.get("tree") == "captured" else record.get("mib")


def counted(record: Record) -> int | None:
    """Return how many samples a record has, None if it has not kept them."""
    for key in ("samples", "ttfts"):
        samples = record.get(key)
        # Of vLLM's own benchmarks they are by what was measured.
        if isinstance(samples, dict):
            samples = next(iter(samples.values()), None)
        if isinstance(samples, list):
            return len(samples)
    return None


def sampled(records: Iterable[Record], what: str = "samples") -> list[str]:
    """Return a line that says how many samples records have, where they have some.

    Args:
        records: of a table.
        what: the samples are.
    """
    found = {count for record in records if (count := counted(record)) is not None}
    if not found:
        return []
    least, most = min(found), max(found)
    text = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return [f"{text} {what} each.", ""]


def known(names: Mapping[str, str], records: Iterable[Record]) -> list[str]:
    """Return the trees that records have: first those with a name, in its order."""
    there = dict.fromkeys(record["tree"] for record in records)
    return [*(n for n in names if n in there), *(n for n in there if n not in names)]


def number(value: float) -> str:
    """Return a measured number with three digits, or all before the point."""
    size = abs(value)
    if not size:
        return "0"
    places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{places}f}"


@dataclass(frozen=True)
class Spread:
    """A median and the range of its samples: quartiles if there are some."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = number(self.low), number(self.high)
        return f"{number(self.median)} ({low} to {high})"

    def over(self, other: "Spread") -> "Spread":
        """Return the ratio, from the closest to the farthest of both ranges."""
        return Spread(
            self.median / other.median, self.low / other.high, self.high / other.low
        )

    def like(self, other: "Spread", what: str) -> bool:
        """Return whether nothing says that two are unlike.

        Their ranges have a value in common, or their medians are about the same.

        Args:
            other: of the same quantity.
            what: it is of, a key of `ALIKE`.
        """
        meet = self.low <= other.high and other.low <= self.high
        medians = sorted((self.median, other.median))
        return meet or medians[1] < ALIKE[what] * medians[0]


def spread(record: Record, scale: float = 1) -> Spread:
    """Return a record's median and quartiles, or what else it has of its samples.

    Args:
        record: of a time or a rate.
        scale: what its values are multiplied by.
    """
    median = record["median"]
    low, high = record.get("quartiles") or record.get("p10_p90") or (median, median)
    samples = record.get("samples")
    if isinstance(samples, dict):  # of vLLM's own benchmarks
        samples = samples.get(record["unit"])
    if samples and len(samples) < FEW:
        low, high = min(samples), max(samples)
    return Spread(scale * median, scale * low, scale * high)


def of_bench(record: Record) -> tuple[Spread, str]:
    """Return the result of one of vLLM's own benchmarks, and its unit.

    Tokens are those of prompts and answers.
    """
    if record["bench"] == "throughput":
        return spread(record), "tok/s"
    return spread(record, 1e3), "ms"


def first_token(record: Record) -> Spread:
    """Return the time to the first token of a load, in milliseconds."""
    # A request that failed has none.
    times = [time for time in record["ttfts"] if time > 0]
    median = record["median_ttft_ms"]
    if len(times) < 2:  # which has no quartiles
        return Spread(median, median, median)
    low, _, high = statistics.quantiles(times, method="inclusive")
    return Spread(median, 1e3 * low, 1e3 * high)


def longest_pause(record: Record) -> float:
    """Return the longest time in which nothing came of requests under way.

    That is no first token and no last one of any of them; when those between came is
    not kept. Of few requests it is about how long one decodes. Of many it shows what
    medians hide: a server that stands still, as one that compiles a kernel does.

    Args:
        record: of a rate, with ``starts``, ``ttfts`` and ``latencies`` in seconds.

    Returns:
        Milliseconds, 0 if no request was answered.
    """
    events: list[tuple[float, int]] = []
    for start, wait, latency in zip(
        record["starts"], record["ttfts"], record["latencies"], strict=True
    ):
        if wait > 0:  # A request that failed has no first token.
            events += [(start, 1), (start + wait, 0), (start + latency, -1)]
    longest, last, under_way = 0.0, 0.0, 0
    for time, change in sorted(events):
        if under_way and change < 1:
            longest = max(longest, time - last)
        if not under_way or change < 1:
            last = time
        under_way += change
    return 1e3 * longest


def rated(records: Iterable[Record]) -> list[Record]:
    """Return the records of a rate, lowest first, without that of all at once."""
    found = [record for record in records if record["rate"] is not None]
    return sorted(found, key=lambda record: float(record["rate"]))


def kept(records: Iterable[Record]) -> float | None:
    """Return the highest rate that does not saturate a tree, None if the lowest does.

    Higher ones do not count once one does. Nor does one that is more than the tree has
    answered when it was offered more: in a short run a queue may not show.

    Args:
        records: of one tree and load.
    """
    best, records = None, list(records)
    for record in rated(records):
        beyond = [
            other["request_throughput"]
            for other in records
            if other["rate"] is None or other["rate"] > record["rate"]
        ]
        if record["saturated"] or max(beyond, default=math.inf) < record["rate"]:
            break
        best = float(record["rate"])
    return best


@dataclass(frozen=True)
class Power:
    """y = factor * x ** exponent, of so many points.

    `error` is the standard error of the exponent, None of three points or fewer.
    """

    factor: float
    exponent: float
    points: int
    error: float | None = None

    def __call__(self, x: float) -> float:
        """Return y."""
        return float(self.factor * x**self.exponent)

    @property
    def text(self) -> str:
        """The exponent, how sure it is and of how many points."""
        sure = "" if self.error is None else f" ± {self.error:.2f}"
        return f"exponent {self.exponent:.2f}{sure} of {self.points} points"

    @property
    def words(self) -> str:
        """How y grows with x."""
        return next(text for most, text in GROWTH if self.exponent <= most)


def upper(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that tell how y grows: large x, y above what always is.

    Args:
        points: x and y, without those where no power can go through.
    """
    found = sorted((x, y) for x, y in points if x > 0 and y > 0)
    least = CLEAR * min((y for _, y in found), default=0)
    return [(x, y) for x, y in found[len(found) // 2 :] if y >= least]


def fit(points: Iterable[tuple[float, float]]) -> Power | None:
    """Fit a power to the upper half of points, by least squares of the logarithms.

    Args:
        points: x and y.

    Returns:
        The power, or None where there are not two points.
    """
    logs = [(math.log(x), math.log(y)) for x, y in upper(points)]
    if len({x for x, _ in logs}) < 2:
        return None
    slope, start = statistics.linear_regression(*zip(*logs, strict=True))
    error = None
    if len(logs) > 3:
        middle = statistics.fmean(x for x, _ in logs)
        rest = sum((y - start - slope * x) ** 2 for x, y in logs) / (len(logs) - 2)
        error = math.sqrt(rest / sum((x - middle) ** 2 for x, _ in logs))
    return Power(math.exp(start), slope, len(logs), error)


def powers(records: Iterable[Record]) -> dict[str, Power | None]:
    """Return how time and memory grow along an axis, where a power can say it.

    Args:
        records: of one tree and axis.

    Returns:
        A power of seconds and one of mebibytes, None of too few points.
    """
    parts: dict[str, list[tuple[float, float]]] = {"time": [], "memory": []}
    for record in records:
        # A share is no size.
        if record["axis"] == "image_share":
            continue
        parts["time"].append((record["x"], record["median"]))
        # The peak of several steps is that of one of them.
        if record.get("steps", 1) == 1 and (mib := memory(record)) is not None:
            parts["memory"].append((record["x"], mib))
    return {part: fit(points) for part, points in parts.items() if points}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown, and the empty line after it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def prose(text: str) -> list[str]:
    """Return a paragraph in one line, and the empty line after it."""
    return [" ".join(text.split()), ""]
