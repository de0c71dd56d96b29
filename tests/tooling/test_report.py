# SPDX-License-Identifier: Apache-2.0
"""`make report`: its text has the numbers of the results, and no others."""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from scripts import bench, not_better, plots, report, results
from scripts.bench import benchmarks
from scripts.console import ROOT, Failure

Record = dict[str, Any]
MACHINE = {"gpu": "a GPU", "cores": 2, "cpu": "a CPU", "versions": {"torch": "2.0"}}
CPU = {"cores": 2, "cpu": "a CPU", "versions": {"torch": "2.0"}}


def head(job: str, **more: Any) -> Record:
    return {
        "job": job,
        "command": ["scripts.bench", job.split()[0], "--batch", "1 x 280"],
        "release": "v1.0.0",
        "commit": "c" * 40,
        "tree": "t",
        "machine": MACHINE,
        "time": "2026-01-02T03:04:05Z",
    } | more


def timed(median: float, **more: Any) -> Record:
    quartiles = [median * 0.9, median * 1.1]
    return {"median": median, "quartiles": quartiles, "samples": [median] * 5} | more


def layer(case: str, variant: str, median: float, **more: Any) -> Record:
    tenths = [median * 0.98, median * 1.02]
    return {
        "case": case,
        "variant": variant,
        "median": median,
        "p10_p90": tenths,
    } | more


def tower(batch: str, tree: str, median: float, **more: Any) -> Record:
    about = {"kind": "26b", "layers": 27, "dtype": "bfloat16", "device": "a GPU"}
    sizes = {"items": 1, "soft_tokens": 280, "mib": 1234.4, "peak_mib": 2000.0}
    errors = {"error": 0.0123, "max_error": 0.456}
    return (
        about | {"batch": batch, "tree": tree} | timed(median) | sizes | errors | more
    )


def same(first: int, equal: int) -> Record:
    return {"requests": 64, "first": first, "tokens": 1024, "equal": equal}


def step(tree: str, *medians: float, **more: Any) -> list[Record]:
    return [
        {"kind": "31b", "layers": 12, "case": "8 x 1,900, 3 images each", "tree": tree}
        | {"variant": variant, "agreement": same(60, 60)}
        | {"attention": [f"window 1024: {tree.upper()}"]}
        | timed(median)
        | more
        for variant, median in zip(report.PARTS, medians, strict=True)
    ]


def serving(workload: str, bench: str, **medians: float) -> list[Record]:
    unit = "tokens_per_second" if bench == "throughput" else "seconds"
    return [
        {"kind": "31b", "layers": 12, "workload": workload, "bench": bench}
        | {"tree": tree, "unit": unit, "prompts": 7, "agreement": same(63, 1000)}
        | {"median": median, "quartiles": [median * 0.99, median * 1.01]}
        for tree, median in medians.items()
    ]


def alike(engine: str, other: str, *counts: int) -> Record:
    names = ("requests", "first", "tokens", "equal")
    return {
        **{"kind": "e2b", "layers": 35, "workload": "256 in, 256 out"},
        **{"engine": engine, "with": other},
        **dict(zip(names, counts, strict=True)),
    }


OF_RATES = {"first": 7, "requests": 8, "equal": 400, "tokens": 512, "with": "release"}


def rate(tree: str, offered: float | None, wait: float, **more: Any) -> Record:
    waits = [wait / 1e3 * share for share in (0.5, 0.75, 1.0, 1.25, 1.5)]
    return {
        **{"kind": "26b", "layers": 12, "tree": tree, "workload": "chat, 1 image"},
        **{"rate": offered, "seconds": 20.0, "completed": 32, "failed": 0},
        **{"request_throughput": offered or 9.0, "output_throughput": 500.0},
        **{"median_ttft_ms": wait, "p99_ttft_ms": 3 * wait, "median_tpot_ms": 7.0},
        **{"p99_tpot_ms": 8.0, "median_e2el_ms": 600.0, "p99_e2el_ms": 900.0},
        **{"ttfts": waits, "latencies": [wait + 0.6 for wait in waits]},
        **{"starts": [100.0, 101.0, 102.0, 103.0, 104.0]},
        **({} if offered is None else {"saturated": False}),
    } | more


def scaling(axis: str, tree: str, points: Iterable[tuple[float, float, float]]) -> Any:
    return [
        {"axis": axis, "x": x, "kind": "26b", "layers": 27, "dtype": "bfloat16"}
        | {"tree": tree, "mib": mib}
        | timed(median)
        | ({"error": 0.0321} if axis == "soft_tokens" else {})
        for x, median, mib in points
    ]


def jobs() -> dict[str, list[Record]]:
    """Every level, with every field."""
    return {
        "layer A": [
            layer("A one", "FA3 floor", 100.0, x_floor=1.0, ranges=0.36),
            layer("A one", "FA3 chosen", 111.0, ranges=2e-3, rest=3e-3, mib=4.0),
            layer("A one", "FA4 floor", 101.0, ranges=1.4),
            layer(
                "A one", "FA4 chosen", 222.0, ranges=2e-3, rest=1e-3, form="one_call"
            ),
            layer("A one", "FA4 split", 160.0, ranges=2e-3, rest=1e-3),
            layer("A one", "FA4 one_call", 222.0, ranges=2e-3, rest=1e-3),
            layer("A one", "FA4 mask_mod", 133.0, ranges=1e-3, rest=1e-3),
            layer("A one", "Triton ranges", 4444.0),
        ],
        "tower 26b": [
            *(tower("1 x 280", "unpatched", 0.1), tower("1 x 280", "eager", 0.02)),
            tower("8 x 280", "unpatched", 0.8),
            tower("8 x 280", "hf-sdpa", 0.7),
            tower("8 x 280", "eager", 0.2, mib=617.2),
            tower("8 x 280", "compiled", 0.25, kinds={"GEMM": 2700.0, "gaps": 54.0}),
            tower("8 x 280", "fa4", 0.1, error=0.5, attention="FLASH_ATTN 4"),
            {"kind": "26b", "tree": "flashinfer", "skipped": "no heads of 72"},
        ],
        "step 31b": [
            *step("release", 60.0, 90.0, 40.0, 130.0),
            *step("patched", 60.6, 61.2, 10.0, 71.2),
        ],
        "serving 31b": [
            *serving(
                "4,096 in, 16 out",
                "throughput",
                **{"release": 2e3, "triton": 1e3, "patched": 3e3, "fa3": 1.5e3},
            ),
            *serving(
                "first token of 4,096", "latency", release=0.2, triton=0.2, patched=0.1
            ),
        ],
        "agreement e2b": [
            alike("release", "release", 64, 64, 1024, 1000),
            alike("release", "release-again", 64, 60, 1024, 300),
            alike("release", "patched-eager", 64, 40, 1024, 101),
            alike("release-eager", "patched-eager", 64, 64, 1024, 1024)
            | {"attention": ["window 512: FLASH"]},
        ],
        "rates 26b": [
            rate("release", 1.0, 40.0),
            rate("patched", 1.0, 20.0),
            rate("release", 2.0, 400.0, saturated=True),
            rate("patched", 2.0, 25.0),
            rate("release", None, 4000.0, output_throughput=700.0),
            rate("patched", None, 2000.0, output_throughput=1400.0, failed=3)
            | {"agreement": OF_RATES, "completed": 61},
        ],
        "scaling images": [
            *scaling(
                "images", "unpatched", [(1, 0.5, 8), (2, 0.5, 8), (4, 2, 8), (8, 8, 8)]
            ),
            *scaling(
                "images", "eager", [(1, 0.5, 8), (2, 1, 16), (4, 2, 32), (8, 4, 64)]
            ),
            {"axis": "images", "x": 16, "tree": "unpatched", "skipped": "no memory"},
        ],
        "scaling soft_tokens": scaling(
            "soft_tokens", "eager", [(70, 0.1, 1), (280, 0.2, 2), (1120, 0.9, 3)]
        ),
        "scaling context": scaling(
            "context", "patched", [(1024, 0.1, 0), (2048, 0.3, 0)]
        ),
        "scaling image_share": scaling(
            "image_share", "patched", [(0.0, 0.5, 10), (0.5, 0.6, 12), (0.9, 0.7, 14)]
        ),
        "host": [layer("256 decodes", "find, patched", 71.0)],
    }


def lines_of(found: dict[str, list[Record]], **more: Any) -> list[Record]:
    return [
        line
        for job, records in found.items()
        for line in (head(job, **more), *({"job": job} | record for record in records))
    ]


def text_of(lines: Iterable[Record]) -> str:
    return report.write(results.latest(lines, "benchmarks"))


ROWS = """
vLLM v1.0.0, 2026-01-02, commit ccccccccc; 2 cores of a CPU; torch 2.0.
    PYTHONPATH=. $(make -s python) -m scripts.bench layer --batch "1 x 280"

| tower of 26B-A4B and 31B, 8 x 280 | 800 (720 to 880) ms | 200 (180 to 220) ms | \
4.00 times as fast |
| tower of 26B-A4B and 31B, 8 x 280: memory | 1,234 MiB | 617 MiB | \
0.50 times as much |
| tower of 26B-A4B and 31B, 8 x 280, compiled | 800 (720 to 880) ms | \
250 (225 to 275) ms | 3.20 times as fast |
| step of 31B, 12 of 60 layers, with its tower, 8 x 1,900, 3 images each | \
130 (117 to 143) ms | 71.2 (64.1 to 78.3) ms | 1.83 times as fast, \
about 1.55 times with all 60 layers |
| 26B-A4B, 12 of 30 layers, chat, 1 image, 32 at once | 700 tok/s of answers | \
1,400 tok/s of answers | \
2.00 times as much |
| 26B-A4B, 12 of 30 layers, chat, 1 image: highest rate kept | 1 req/s | 2 req/s | - |
| 26B-A4B, 12 of 30 layers, chat, 1 image: first token at 1 req/s | \
40.0 (30.0 to 50.0) ms | 20.0 (15.0 to 25.0) ms | 2.00 times as fast |

| A one | FA3 | 111 (109 to 113) | 100 | 1.11 | 40.04 | 2.0e-03 | 3.0e-03 | \
4.00 |
| A one | FA4 | 222 (218 to 226) | 101 | 2.20 | 20.02 | 2.0e-03 | 1.0e-03 | - |
| A one | FA4 with `mask_mod` (release) | 133 (130 to 136) | 101 | 1.32 | 33.41 | \
1.0e-03 | 1.0e-03 | - |
| A one | Triton (release) | 4,444 (4,355 to 4,533) | - | - | 1.00 | - | - | - |
| A one | FA4 | one call | - | 160 (157 to 163) | 222 (218 to 226) | 2.0e-03 |

### 26B-A4B and 31B: 27 layers, bfloat16
| 1 x 280 | 280 | release | - | 100 (90.0 to 110) | 1.00 | 1,234 | 1.2e-02 | 4.6e-01 |
| 1 x 280 | 280 | patched | - | 20.0 (18.0 to 22.0) | 5.00 | 1,234 | 1.2e-02 | 4.6e-01 |
| 8 x 280 | 280 | Transformers, SDPA | - | 700 (630 to 770) | 1.14 | 1,234 | 1.2e-02 | \
4.6e-01 |
| 8 x 280 | 280 | compiled, FA4 | FLASH_ATTN 4 | 100 (90.0 to 110) | 8.00 | 1,234 \
| 5.0e-01 | 4.6e-01 |
| 8 x 280 | compiled | 100 | 2.00 |
* compiled, FlashInfer: no heads of 72

| 8 x 1,900, 3 images each | release | 60.0 (54.0 to 66.0) | 90.0 (81.0 to 99.0) | \
40.0 (36.0 to 44.0) | 130 (117 to 143) | 60 of 64 | 60 of 64 |
* patched: window 1024: PATCHED

| 4,096 in, 16 out | 7 | release | 2,000 (1,980 to 2,020) tok/s | - | - | 63 of 64 \
| 1,000 of 1,024 |
| 4,096 in, 16 out | 7 | patched, FA3 and FA4 | 1,500 (1,485 to 1,515) tok/s | - | \
0.75 (0.74 to 0.77) | 63 of 64 | 1,000 of 1,024 |
| first token of 4,096 | 7 | patched | 100 (99.0 to 101) ms | - | \
2.00 (1.96 to 2.04) | 63 of 64 | 1,000 of 1,024 |

### E2B: 35 layers
| engine | release | release, another | patched, eager | release, eager |
* release, eager: window 512: FLASH
| release | 64 of 64, 1,000 of 1,024 | 60 of 64, 300 of 1,024 | 40 of 64, 101 of 1,024 \
|  |
| release, another |  |  |  |  |
| release, eager |  |  | 64 of 64, 1,024 of 1,024 |  |
Where nothing is compiled, the trees give the same tokens, all of them.

Load: chat, 1 image. The highest rate kept: release 1 req/s, patched 2 req/s.
| 2 | release | 2.00 | 500 | 400 (300 to 500) | - | 7.00 | - | 600 | 600 | 0 of 32 \
| - | - |
| all at once | patched | 9.00 | 1,400 | 2,000 (1,500 to 2,500) | 6,000 | 7.00 | 8.00 \
| 600 | 1,000 | 3 of 64 | 7 of 8 (release) | 400 of 512 |

### Images in a batch: tower of 26B-A4B and 31B, 27 layers
| 8 | release | 8,000 (7,200 to 8,800) | 8.00 |
* release: time grows with the square (exponent 2.00 of 2 points), how memory grows is \
not known of so few points
* patched: time grows linearly (exponent 1.00 of 2 points), memory grows linearly \
(exponent 1.00 of 2 points)
* patched: time grows linearly (exponent 1.08 of 2 points), memory grows less than \
linearly (exponent 0.29 of 2 points)
* release, images 16: no memory
| 70 | patched | 100 (90.0 to 110) | 1.00 | 3.2e-02 |
| 50% | patched | 600 (540 to 660) | 12.0 | 1.20 |
* patched: 50% to 90% of images take 1.20 to 1.40 times as long as text alone, and at \
most 1.40 times as much memory

| Prefill (4K input) | 4,096 in, 16 out | +40% | +24% | +25% | +33% | +200.0% | \
+100.0% |
| Prefill TTFT | first token of 4,096 | -31% | -22% | -24% | -22% | -50.0% | \
*+0.0%* |
Of 1 differences, the patched tree's over Triton are better here than theirs in 1 and \
worse in 0. It is the release's FlashAttention that does this, which for text is the \
patched tree's as well: of what that gives over the release, 0 of 1 are no difference, \
the other is +50.0%. Both run the same kernels for text: what there is of \
a difference says how much two engines may differ.
| 4,096 in, 16 out | throughput | +100.0% |
0 of 1 are no difference; FA4 in all layers is better in 1 and worse in 0, by +100.0% \
to +100.0%.
| 31B, 12 of 60 layers | 8 x 1,900, 3 images each | *+1.0%* | +50.0% | *+1.0%* | - |

| 256 decodes | find, patched | 71.0 (69.6 to 72.4) |

* One attention layer: FA4 takes longer than FA4 with `mask_mod` (release): \
A one (1.67x)
* One attention layer: FA4 takes longer than FA4 as split: A one (1.39x)
* Tower of 26B-A4B and 31B: compiled takes longer than patched: 8 x 280 (1.25x)
* Tower of 26B-A4B and 31B: compiled needs more memory than patched: 8 x 280 (2.00x)
* Tower of 26B-A4B and 31B: compiled takes longer than compiled, FA4: 8 x 280 (2.50x)
"""


def test_an_agreement_names_once_what_it_is_with() -> None:
    wrong = {"requests": 8, "first": 1, "tokens": 8, "equal": 1, "nats": 1.25}
    right = {"requests": 8, "first": 7, "tokens": 8, "equal": 7, "nats": 0.5}
    for other, behind in (("release", " (release)"), (report.REFERENCE, "")):
        found = right | {"with": other, "causal": wrong | {"with": other}}
        assert report.agreement(found) == [
            f"7 of 8, 0.500 nats; causal images 1 of 8{behind}",
            "7 of 8",
        ]


def test_text() -> None:
    found = text_of(lines_of(jobs())).splitlines()
    for line in filter(None, ROWS.splitlines()):
        assert line in found


def test_words_have_no_numbers() -> None:
    """What is between the records' numbers is the same for all records."""
    for module in (report, not_better):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        specs = {
            id(part)
            for value in ast.walk(tree)
            if isinstance(value, ast.FormattedValue) and value.format_spec
            for part in ast.walk(value.format_spec)
        }
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if id(node) not in specs
        ]
        assert len(texts) > 100
        # Names such as FA4 and float32 have theirs.
        assert [text for text in texts if re.search(r"(?<!\w)\d", text)] == []


@pytest.mark.parametrize("job", jobs())
def test_every_level_alone(job: str) -> None:
    text = text_of(lines_of({job: jobs()[job]}))
    titles = {
        "layer": "One attention layer",
        "tower": "The vision tower",
        "step": "One step of the engine",
        "serving": "Serving",
        "agreement": "What engines have in common",
        "rates": "Rising request rates",
        "scaling": "How it grows",
        "host": "The host",
    }
    found = [title for title in titles.values() if f"\n## {title}\n" in text]
    assert found == [titles[job.split()[0]]]
    assert f"-m scripts.bench {job.split()[0]}" in text


def test_engines_have_names() -> None:
    """The module that starts them imports what is not here."""
    code = (ROOT / "scripts" / "bench_agreement.py").read_text()
    [engines] = [
        ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENGINES"
    ]
    assert list(engines) != [] and engines.keys() == results.ENGINE_NAMES.keys()


def test_eager_trees_that_differ() -> None:
    found = jobs()["agreement e2b"]
    found[-1]["equal"] -= 1
    text = text_of(lines_of({"agreement e2b": found}))
    assert "Where nothing is compiled, the trees give unlike tokens." in text


@pytest.mark.parametrize("tree", ["release", "patched", "unpatched", "eager"])
def test_one_tree_only(tree: str) -> None:
    found = {
        job: [r for r in records if r.get("tree", tree) == tree and "skipped" not in r]
        for job, records in jobs().items()
    }
    text = text_of(
        lines_of({job: records for job, records in found.items() if records})
    )
    assert "## What one gets" not in text
    assert "| -" in text


def test_nothing_could_run() -> None:
    records = [{"kind": "26b", "tree": "fa2", "skipped": "no FA2"}]
    for level in ("tower", "step", "serving", "rates", "scaling"):
        text = text_of(lines_of({f"{level} 26b": records}))
        assert "no FA2\n" in text
        assert "|" not in text


def test_what_cannot_run_says_where() -> None:
    record = {"kind": "26b", "tree": "fa2", "batch": "1 x 280", "skipped": "no FA2"}
    text = text_of(lines_of({"tower 26b": [*jobs()["tower 26b"], record]}))
    assert "* compiled, FA2, 1 x 280: no FA2" in text.splitlines()


def test_a_cpu_has_no_table_of_the_pull_request() -> None:
    lines = lines_of(jobs())
    assert "## Beside the first pull request on this" in text_of(lines)
    lines = lines_of(jobs(), machine=CPU)
    text = text_of(lines)
    assert "# a CPU, 2 cores" in text
    assert "## Beside the first pull request on this" not in text


def test_pull_request_is_compared_by_the_numbers() -> None:
    def text(kind: str, patched: float, **more: float) -> str:
        medians = {"triton": 1000.0, "patched": patched} | more
        records = serving("4,096 in, 16 out", "throughput", **medians)
        for record in records:
            record["kind"] = kind
        return text_of(lines_of({"serving": records}))

    assert "| +33% | +32.0% | - |" in text("31b", 1320.0)
    assert "theirs in 0 and worse in 1" in text("31b", 1320.0)
    assert "| +33% | +34.0% | - |" in text("31b", 1340.0)
    assert "theirs in 1 and worse in 0" in text("31b", 1340.0)
    records = serving("first token of 4,096", "latency", triton=1.0, patched=0.8)
    assert "theirs in 0 and worse in 1" in text_of(lines_of({"serving": records}))
    records[1] |= {"median": 0.7, "quartiles": [0.7, 0.7]}
    assert "theirs in 1 and worse in 0" in text_of(lines_of({"serving": records}))
    # Within the quartiles, and of a model that is not the last one.
    assert "| +40% | *+0.5%* | - | +24% |" in text("e2b", 1005.0)
    assert "Of 1 differences" not in text("e2b", 1005.0)
    # Of few samples or of two processes.
    assert "| +40% | *+1.9%* | - | +24% |" in text("e2b", 1019.0)
    # What the release on the same kernels does not lose is lost by chance.
    lost = "lost here: Prefill (4K input) of E2B."
    assert lost in text("e2b", 900.0, release=905.0)
    for release in (1000.0, 1100.0):
        assert "lost here" not in text("e2b", 900.0, release=release)
    assert "lost here" not in text("e2b", 1100.0)


def test_last_run_counts() -> None:
    record = {"job": "host", "case": "c", "variant": "v", "median": 5.0}
    later = head("host", time="2026-01-02T04:00:00Z")
    text = text_of([*lines_of(jobs()), later, record])
    assert "| c | v | 5.00 (5.00 to 5.00) |" in text
    assert "256 decodes" not in text
    # The order of files does not matter.
    text = text_of([later, record, *lines_of(jobs())])
    assert "| c | v | 5.00 (5.00 to 5.00) |" in text
    assert "256 decodes" not in text


def test_devices_stay_apart() -> None:
    cpu = head("host", machine=CPU)
    record = {"job": "host", "case": "c", "variant": "v", "median": 5}
    devices = results.latest([*lines_of(jobs()), cpu, record], "benchmarks")
    assert [device.name for device in devices] == ["a GPU", "a CPU, 2 cores"]
    text = report.write(devices)
    assert text.index("# a GPU") < text.index("256 decodes") < text.index("# a CPU, 2")


def test_older_forms_of_the_series_are_named() -> None:
    assert "older form" not in text_of(lines_of(jobs()))
    more: Record = {"tree": "u", "time": "2026-01-03T00:00:00Z"}
    few = {job: jobs()[job] for job in ("layer A", "tower 26b")}
    rest = {job: found for job, found in jobs().items() if job not in few}
    text = text_of([*lines_of(few), *lines_of(rest, **more)])
    made = "Made with an older form of the series than the newest run"
    assert f"\n{made}: layer A, tower 26b.\n" in text
    assert f"| A one{report.OLDER} | FA3 |" in text


def test_what_is_newer_than_the_rest_is_named() -> None:
    newer = head("host", tree="u", time="2026-01-03T00:00:00Z", commit="d" * 40)
    record = {"job": "host", "case": "c", "variant": "v", "median": 5.0}
    text = text_of([*lines_of(jobs()), newer, record])
    assert "| c | v | 5.00 (5.00 to 5.00) |" in text
    made = "Made with the series of commit ddddddddd: host"
    assert f"\n{made}. All else is of an older form of it.\n" in text
    # What is as usual is said once, and marks would be everywhere.
    assert "\nvLLM v1.0.0, 2026-01-02, commit ccccccccc;" in text
    assert "# 2026-01-03, commit ddddddddd" in text
    assert report.OLDER not in text


def test_one_release_a_device() -> None:
    lines = lines_of(jobs())
    other = head("host", release="v0", time="2026-01-03T00:00:00Z")
    record = {"job": "host", "case": "c", "variant": "v", "median": 5.0}
    devices = results.latest([*lines, other, record], "benchmarks")
    names = ["a GPU, vLLM v1.0.0", "a GPU, vLLM v0"]
    assert [device.name for device in devices] == names
    assert [len(device.jobs) for device in devices] == [len(jobs()), 1]
    assert len({device.stem for device in devices}) == 2


def test_a_run_that_did_not_end_well() -> None:
    lines = lines_of(jobs())
    broken = head("host", time="2026-01-03T00:00:00Z", partial="exit status 1")
    [device] = results.latest([*lines, broken], "benchmarks")
    assert device.partial == []
    assert "Ended before" not in report.write([device])
    lines = [line for line in lines if line["job"] != "host"]
    [device] = results.latest([*lines, broken], "benchmarks")
    assert device.partial == ["host"]
    assert "\nEnded before all was measured: host.\n" in report.write([device])


def test_what_was_measured_elsewhere_says_so() -> None:
    lines = lines_of(jobs())
    assert "\nMeasured" not in text_of(lines)
    at = next(at for at, line in enumerate(lines) if line["job"] == "host")
    lines[at] |= {"time": "2026-01-01T00:00:00Z", "commit": "d" * 40}
    lines[at]["machine"] = MACHINE | {"cores": 3}
    text = text_of(lines)
    note = "  # 2026-01-01, commit ddddddddd\n\nMeasured on 3 cores of a CPU; torch"
    assert text.count("commit ddddddddd") == text.count("\nMeasured") == 1
    assert text.index("## The host") < text.index(note)
    lines[at]["machine"] |= {"driver": "580.1", "power_limit": "700.00 W"}
    text = text_of(lines)
    assert "on 3 cores of a CPU; driver 580.1, 700.00 W at most; torch" in text
    lines[at]["beside"] = "another job"
    assert (
        "on 3 cores of a CPU; driver 580.1, 700.00 W at most; torch 2.0; beside "
        in (text_of(lines))
    )


def test_other_code_of_the_benchmarks() -> None:
    found = {name: jobs()["tower 26b"] for name in ("tower 26b", "tower a", "tower b")}
    now = benchmarks("scripts.bench")
    lines = lines_of(found | {"host": jobs()["host"]}, benchmarks=now)
    assert "earlier code" not in text_of(lines)
    for line in lines:
        if line["job"] in ("tower 26b", "host") and "command" in line:
            line |= {"benchmarks": "old", "time": "2026-01-01T00:00:00Z"}
    text = text_of(lines)
    assert now != benchmarks("scripts.bench_tower")
    assert text.count("earlier code") == 1
    assert "\nMade by earlier code of the benchmarks: tower 26b, host.\n" in text


def test_other_options() -> None:
    [job] = [job for job in bench.JOBS["cuda"] if job.name == "serving e2b"]
    found = jobs()["serving 31b"]
    said = "Made with other options than `make bench` gives now: serving e2b.\n"
    for command, differs in ((job.command, False), (job.command[:-1], True)):
        lines = [head("serving e2b", command=list(command)), *found]
        text = text_of({"job": "serving e2b"} | line for line in lines)
        assert (said in text) == differs


def test_what_was_not_measured() -> None:
    def left(machine: Record) -> str:
        text = text_of(lines_of(jobs(), machine=machine))
        found = re.search("(?m)^Not measured here yet: (.*)[.]$", text)
        return found[1] if found else ""

    wanted = [job.name for job in bench.JOBS["cuda"] if job.name not in jobs()]
    assert left(MACHINE) == ", ".join(wanted)
    assert left(CPU) == "tower e2b"


def test_a_wrong_mask_is_beside_the_errors() -> None:
    found = jobs()["layer A"]
    said = "is off there by 0.360 to 1.40.\n"
    assert said in text_of(lines_of({"layer A": found}))
    for record in found:
        if record["variant"].endswith("floor"):
            del record["ranges"]
    assert "is off there" not in text_of(lines_of({"layer A": found}))


def test_layers_are_named() -> None:
    assert results.model("26b", 30) == "26B-A4B, all 30 layers"
    assert results.model("26b", 12) == "26B-A4B, 12 of 30 layers"
    assert results.model("x", 2) == "x, 2 layers"
    assert results.model("31b", None) == "31B"


@pytest.mark.parametrize("order", [1, -1])
def test_the_step_of_the_most_layers_is_in_short(order: int) -> None:
    few = [*step("release", 1, 2, 3, 5.0), *step("patched", 1, 2, 3, 4.0)]
    more = [record | {"layers": 60, "median": 2 * record["median"]} for record in few]
    found = list({"step 31b": few, "step 31b whole": more}.items())[::order]
    text = text_of(lines_of(dict(found)))
    short = text.split("## What one gets")[1].split("\n## ")[0]
    assert "| step of 31B, all 60 layers, with its tower, 8 x 1,900" in short
    assert "| 1.25 times as fast |" in short
    assert "12 of 60" not in short
    [device] = results.latest(lines_of(dict(found)), "benchmarks")
    assert set(plots._step_parts(device)) == {
        "31B, 12 of 60 layers",
        "31B, all 60 layers: whole",
    }


def test_how_many_samples() -> None:
    def said(job: str, *samples: Any) -> list[str]:
        records = [record for record in jobs()[job] if "skipped" not in record]
        for record in records:
            record.pop("samples", None)
        for record, value in zip(records, samples, strict=False):
            record["samples"] = value
        return re.findall(r"(?m)^\d.* each[.]$", text_of(lines_of({job: records})))

    assert said("layer A") == []
    assert said("layer A", [1.0] * 30, [1.0] * 30) == ["30 samples each."]
    assert said("host", [1.0] * 50) == ["50 samples each."]
    assert said("tower 26b", [1.0] * 4, [1.0] * 1021) == ["4 to 1,021 samples each."]
    assert said("step 31b", [1.0] * 2, [1.0] * 9) == ["2 to 9 samples each."]
    assert said("scaling images", [1.0] * 5) == ["5 samples each."]
    assert said("rates 26b") == ["5 requests each."]


def test_gaps_of_the_profiler_are_not_shown() -> None:
    def cells(gaps: float) -> str:
        kinds = {"GEMM": 2700.0, "gaps": gaps}
        text = text_of(lines_of({"tower": [tower("a", "eager", 0.005, kinds=kinds)]}))
        [row] = re.findall(r"(?m)^\| a \| patched \| 100 \| .*$", text)
        return str(row)

    assert cells(2700.0) == "| a | patched | 100 | 100 |"
    assert cells(3305.0) == "| a | patched | 100 | - |"


def test_chats_are_in_short() -> None:
    def rows(patched: float, **more: Any) -> list[str]:
        records = serving("chat, 1 image", "throughput", release=100.0, patched=patched)
        records[1] |= more
        text = text_of(lines_of({"serving": records}))
        waited = bool(more.get("preempted"))
        assert ("requests waited again" in text) == waited
        assert not waited or "again, in chat, 1 image, patched.\n" in text
        return re.findall(
            r"\| 31B, 12 of 60 layers, chat, 1 image \| .* \| (.*) \|", text
        )

    assert rows(150.0) == ["1.50 (1.47 to 1.53) times as much"]
    # Quartiles are a per cent away: they meet.
    assert rows(101.5) == ["no difference"]
    far = {"quartiles": [80.0, 120.0]}
    assert rows(101.5, **far) == ["not clear: 1.01 (0.792 to 1.21) times as much"]
    assert rows(150.0, preempted=2) == ["1.50 (1.47 to 1.53) times as much"]
    records = serving("1 in, 1 out", "throughput", release=1.0, patched=2.0)
    assert "What one gets" not in text_of(lines_of({"serving": records}))


def test_memory_of_graphs_is_not_known() -> None:
    records = [tower("a", "compiled", 1.0), tower("a", "captured", 1.0, mib=9999)]
    text = text_of(lines_of({"tower": records}))
    assert "| a | 280 | captured | - | 1,000 (900 to 1,100) | - | - | 1.2e-02 |" in text
    assert "needs more memory" not in text
    records = scaling("soft_tokens", "captured", [(1, 1, 7777), (2, 2, 8888)])
    [device] = results.latest(lines_of({"scaling tower": records}), "benchmarks")
    text = report.write([device])
    assert "7,777" not in text and ", memory" not in text
    assert "| 1 | captured | 1,000 (900 to 1,100) | - |" in text


@pytest.mark.parametrize("at", [0, 9])
def test_records_of_unknown_origin(at: int) -> None:
    lines = lines_of(jobs())
    assert "command" in lines[at]
    del lines[at]
    with pytest.raises(Failure, match="do not say what they were made on"):
        results.latest(lines, "benchmarks")


def test_a_rate_is_not_kept_if_less_was_answered_of_more() -> None:
    asked = [rate("patched", offered, 9.0) for offered in (8.0, 16.0, 32.0)]
    assert results.kept(asked) == 32.0
    asked[2] |= {"saturated": True, "request_throughput": 15.1}
    assert results.kept(asked) == 8.0
    assert results.kept([asked[0], rate("patched", None, 9.0)]) == 8.0
    at_once = rate("patched", None, 9.0, request_throughput=7.0)
    assert results.kept([asked[0], at_once]) is None


def test_few_samples_have_no_quartiles() -> None:
    record = timed(2.0, quartiles=[1.5, 2.5], samples=[1.0, 2.0, 3.0, 2.0])
    assert str(results.spread(record)) == "2.00 (1.00 to 3.00)"
    record["samples"].append(2.0)
    assert str(results.spread(record)) == "2.00 (1.50 to 2.50)"
    samples = {"seconds": [1.0, 2.0, 3.0], "tokens": [7]}
    bench = {"bench": "latency", "unit": "seconds", "samples": samples}
    assert str(results.of_bench(timed(2.0) | bench)[0]) == "2,000 (1,000 to 3,000)"


def worse(job: str, records: list[Record]) -> str:
    text = text_of(lines_of({job: records}))
    return text.split("## What is not better")[1]


def test_not_better() -> None:
    nothing = "Nothing was found."
    pair = [tower("a", "unpatched", 1.0), tower("a", "eager", 1.15)]
    # The quartiles meet.
    assert nothing in worse("tower", pair)
    limits = "less memory by more than 3% and 16 MiB, or has a smaller error by more "
    assert limits + "than 10%." in worse("tower", pair)
    pair[1]["median"], pair[1]["quartiles"] = 1.3, [1.2, 1.4]
    assert "26B-A4B and 31B: patched takes longer than release: a (1.30x)" in worse(
        "tower", pair
    )
    pair = [tower("a", "unpatched", 1.0), tower("a", "eager", 0.5, mib=1260)]
    assert nothing in worse("tower", pair)
    small = [layer("A", "FA3 chosen", 1.0, mib=15), layer("A", "Triton ranges", 1.0)]
    small[1]["mib"] = 0
    assert nothing in worse("layer", small)
    small[0]["mib"] = 17
    assert "FA3 needs more memory than Triton (release): A (17" in worse("layer", small)
    pair[1] |= {"mib": 1300, "error": 0.0246}
    found = worse("tower", pair)
    assert "patched needs more memory than release: a (1.05x)" in found
    assert "patched is less accurate than release: a (2.00x)" in found
    pair[0]["mib"] = 0
    assert "release: a (1.3e+03 MiB against none)" in worse("tower", pair)
    loads = serving("l", "throughput", release=100.0, patched=90.0)
    assert (
        "Serving 31B, 12 of 60 layers: patched gives less than release: l (0.90x)"
        in worse("serving", loads)
    )
    loads = serving("l", "latency", release=0.1, patched=0.09)
    assert nothing in worse("serving", loads)
    # The release runs what tokens are held against.
    loads[1]["agreement"] = same(40, 1000)
    assert nothing in worse("serving", loads)
    loads = serving("l", "latency", patched=0.1, fa3=0.1)
    loads[0]["agreement"] = same(40, 1000)
    assert "Triton's first tokens than patched, FA3 and FA4: l (40 of 64, not 63)" in (
        worse("serving", loads)
    )
    loads[0]["agreement"] = same(62, 1000)
    assert nothing in worse("serving", loads)
    # Ranges of few samples, and medians of two processes, differ by chance.
    loads = serving("l", "latency", release=0.1, patched=0.1019)
    for load in loads:
        load["quartiles"] = [load["median"]] * 2
    assert nothing in worse("serving", loads)
    loads[1]["median"], loads[1]["quartiles"] = 0.1021, [0.1021] * 2
    assert "patched takes longer than release: l (1.02x)" in worse("serving", loads)
    loads[1]["samples"] = {"seconds": [0.1021, 0.1021]}
    assert "release: l (1.02x of 2 samples)" in worse("serving", loads)
    loads[1]["samples"] = {"seconds": [0.1021] * 5}
    assert "release: l (1.02x)" in worse("serving", loads)
    # Triton agrees with itself.
    loads = serving("l", "latency", triton=0.1, patched=0.09)
    loads[1]["agreement"] = same(40, 1000)
    assert nothing in worse("serving", loads)
    asked = [rate("release", 1.0, 40.0), rate("patched", 1.0, 90.0)]
    assert "first token: patched takes longer than release: 1 req/s (2.25x)" in worse(
        "rates", asked
    )

    asked = [rate("release", 1.0, 9.0), rate("patched", 1.0, 9.0, saturated=True)]
    found = worse("rates", asked)
    assert (
        "patched keeps a lower rate than release: highest (0 against 1 req/s)" in found
    )
    asked = [rate("release", None, 9.0), rate("patched", None, 9.0)]
    asked[1]["request_throughput"] = 8.8
    assert nothing in worse("rates", asked)
    asked[1]["request_throughput"] = 8.0
    found = worse("rates", asked)
    assert "patched gives less than release: all at once (0.89x)" in found


def test_a_server_that_stands_still_is_named() -> None:
    still = {"latencies": [6.1, 5.1, 4.1, 3.1, 2.1], "ttfts": [6.0, 5.0, 4.0, 3.0, 2.0]}
    asked = [rate("release", 1.0, 9.0), rate("patched", 1.0, 9.0) | still]
    found = worse("rates 26b again", asked)
    longer = "patched stands still for longer than release: rates 26b again (6.0 s "
    assert longer in found
    asked[0] |= still
    assert "stands still" not in worse("rates 26b again", asked)


def test_a_load_that_was_offered_again_has_no_row_of_its_own() -> None:
    found = {"rates 26b again": jobs()["rates 26b"]}
    assert "highest rate kept |" not in text_of(lines_of(found))
    assert "## Rising request rates" in text_of(lines_of(found))


def test_only_runs_of_their_own_are_compared() -> None:
    """Jobs may have the same forms with other layers, at another time."""
    more = [
        tower("8 x 280", "unpatched", 8.0),
        tower("8 x 280", "eager", 4.0),
        *(tower("8 x 280", name, 0.1) for name in results.BACKENDS),
    ]
    loads = serving("4,096 in, 16 out", "throughput", triton=100.0, release=100.0)
    for load in loads:
        load["layers"] = 30
    found = jobs() | {"tower 26b backends": more, "serving 31b more": loads}
    [device] = results.latest(lines_of(found), "benchmarks")
    lines = report.write([device]).splitlines()
    for line in filter(None, ROWS.splitlines()):
        assert line in lines
    assert "### 26B-A4B and 31B backends: 27 layers, bfloat16" in lines
    assert "### 31B more: 30 layers" in lines
    files = [figure.file for figure in plots.figures(device)]
    assert len(files) == len(set(files)) == 11
    assert "a-gpu-tower-26b-backends-forms.png" in files


def test_rates() -> None:
    def kept(*records: Record) -> float | None:
        return results.kept(records)

    slow = {"saturated": True}
    assert kept(rate("a", 1, 9), rate("a", None, 9)) == 1
    assert kept(rate("a", 4, 9), rate("a", 1, 9), rate("a", 2, 9, **slow)) == 1
    assert kept(rate("a", 1, 9, **slow), rate("a", 2, 9)) is None
    text = text_of(
        lines_of({"rates 26b": [rate("release", 1, 9, **slow), rate("patched", 1, 9)]})
    )
    assert "The highest rate kept: release none, patched 1 req/s." in text
    assert "highest rate kept |" not in text
    assert "first token at 1 req/s |" in text


def test_first_token() -> None:
    found = results.first_token(rate("a", 1.0, 40.0))
    assert (found.low, found.median, found.high) == (30.0, 40.0, 50.0)
    # Requests that failed have no token.
    found = results.first_token(rate("a", 1.0, 40.0, ttfts=[0.0, 0.0, 0.04]))
    assert (found.low, found.median, found.high) == (40.0, 40.0, 40.0)


def test_longest_pause() -> None:
    def pause(*requests: tuple[float, float, float]) -> float:
        starts, waits, latencies = zip(*requests, strict=True)
        times = {"starts": starts, "ttfts": waits, "latencies": latencies}
        return results.longest_pause(rate("a", 1.0, 40.0) | times)

    # Until the first token, from that to the last; not from one request to the next.
    assert pause((50, 0.25, 0.75)) == 500
    assert pause((50, 0.5, 0.75), (90, 0.25, 0.5)) == 500
    # Others' tokens count, in any order; that one more comes does not.
    assert pause((50, 0.5, 4), (51, 1, 2), (52.5, 1, 1.25)) == 1500
    assert pause((52.5, 1, 1.25), (51, 1, 2), (50, 0.5, 4)) == 1500
    assert pause((50, 1, 9), (58, 0.5, 0.5)) == 7500
    # Failed requests wait for nothing.
    assert pause((50, 0.5, 4), (52, 0, 0)) == 3500
    assert pause((50, 0, 0)) == 0


@pytest.mark.parametrize(
    ("points", "exponent", "words"),
    [
        ([(1, 5), (2, 5), (4, 8), (8, 16)], 1.0, "grows linearly"),
        ([(1, 1), (2, 9), (4, 9), (8, 9)], 0.0, "hardly grows"),
        ([(1, 1), (2, 1), (4, 2), (16, 32)], 2.0, "grows with the square"),
        ([(16, 8), (4, 4), (1, 2)], 0.5, "grows less than linearly"),
        ([(4, 8), (1, 1)], None, ""),
        # What a call costs at any size is most of it.
        ([(1, 10), (2, 10), (4, 11), (8, 12)], None, ""),
        (
            [(1, 1), (4, 8), (0, 1), (15, 0), (16, 64)],
            1.5,
            "grows faster than linearly",
        ),
        ([(1, 1), (4, 8), (8, 16), (16, 2)], -3.0, "falls"),
        ([(1, 1), (2, 8), (4, 64)], 3.0, "grows faster than the square"),
    ],
)
def test_fit(
    points: list[tuple[float, float]], exponent: float | None, words: str
) -> None:
    found = results.fit(points)
    assert (found is None) == (exponent is None)
    if found and exponent is not None:
        assert found.exponent == pytest.approx(exponent, abs=1e-9)
        assert f"of {found.points} points" in found.text
        x, y = max(points)
        assert found(x) == pytest.approx(y)
        assert found.words == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0123, "0.012"), (1, "1.00"), (9.999, "10.0"), (99.96, "100"),
        (-12.34, "-12.3"), (1234567.8, "1,234,568"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert results.number(value) == text


def test_plots_are_of_what_there_is() -> None:
    [device] = results.latest(lines_of(jobs()), "benchmarks")
    found = {figure.file: figure.title for figure in plots.figures(device)}
    files = list(found)
    assert files == [
        "a-gpu-layer.png",
        "a-gpu-tower-26b.png",
        "a-gpu-tower-26b-forms.png",
        "a-gpu-step.png",
        "a-gpu-serving.png",
        "a-gpu-rates-26b-chat-1-image.png",
        "a-gpu-scaling-images-26b.png",
        "a-gpu-scaling-soft-tokens-26b.png",
        "a-gpu-scaling-context-26b.png",
        "a-gpu-scaling-image-share-26b.png",
    ]
    part = "26B-A4B, 12 of 30 layers"
    assert found[files[5]] == f"{part}: chat, 1 image, at rising rates, a GPU"
    assert found[files[6]].startswith("Vision tower of 26B-A4B and 31B by images")
    assert found[files[8]].startswith("Language model of 26B-A4B, 27 of 30 layers, by")
    assert list(plots._ratios(device)) == ["31B, 12 of 60 layers"]
    text = report.write([device])
    assert re.findall(r"\]\(benchmarks/(.*png)\)", text) == files
    few = {"serving": serving("a", "latency", patched=1.0)}
    few["rates"] = [rate("patched", None, 5.0)]
    few["tower"] = [{"kind": "26b", "tree": "fa2", "skipped": "no FA2"}]
    [device] = results.latest(lines_of(few), "benchmarks")
    assert plots.figures(device) == []


def test_plots(tmp_path: Path) -> None:
    """Where matplotlib is, in the environment of `make report`."""
    pytest.importorskip("matplotlib")
    [device] = results.latest(lines_of(jobs()), "benchmarks")
    for folder in ("one", "two"):
        for figure in plots.figures(device):
            plots.save(figure, tmp_path / folder)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == len(plots.figures(device))
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


LINES = [(x, float(x), 3.0 * x) for x in (1, 2, 4, 8, 16, 32, 64, 128)]


@pytest.mark.parametrize(
    ("axis", "parts"),
    [
        ("soft_tokens", ["time", "memory"]),
        ("images", ["time", "memory"]),
        ("context", ["time", "memory"]),
        # It is no size.
        ("image_share", []),
    ],
)
def test_what_a_power_can_say(axis: str, parts: list[str]) -> None:
    records = scaling(axis, "patched", LINES)
    found = results.powers(records)
    assert list(found) == parts
    assert all(power and power.words == "grows linearly" for power in found.values())
    # The memory of several steps is that of one of them.
    for record in records:
        record["steps"] = 1 + (record["x"] > 16)
        record["mib"] = record["x"] if record["steps"] == 1 else 1.0
    if "memory" in parts:
        memory = results.powers(records)["memory"]
        assert memory and memory.words == "grows linearly"
    assert results.powers(records[:1]) == dict.fromkeys(parts)


def legends_of(found: dict[str, list[Record]]) -> list[str]:
    """Return what the legends of a plot say, where matplotlib is."""
    canvas = pytest.importorskip("matplotlib.figure").Figure()
    [device] = results.latest(lines_of(found), "benchmarks")
    [figure] = plots.figures(device)
    figure.draw(canvas)
    legends = [*canvas.legends, *(axes.get_legend() for axes in canvas.axes)]
    return [text.get_text() for one in legends if one for text in one.get_texts()]


@pytest.mark.parametrize(
    ("axis", "count", "drawn"),
    [("soft_tokens", 8, 2), ("soft_tokens", 3, 0), ("images", 8, 2), ("context", 8, 2)],
)
def test_no_power_of_few_points_is_drawn(axis: str, count: int, drawn: int) -> None:
    legends = legends_of({"scaling": scaling(axis, "eager", LINES[:count])})
    assert sum("; line: exponent" in text for text in legends) == drawn


def test_one_rate_alone_is_not_drawn() -> None:
    records = [rate(tree, 1.0, 9.0) for tree in ("release", "patched")]
    [device] = results.latest(lines_of({"rates": records}), "benchmarks")
    assert plots.figures(device) == []


@pytest.mark.parametrize("rates", [[1.0, 2.0], [1.0, None]])
def test_the_tail_of_few_requests_is_not_drawn(rates: list[float | None]) -> None:
    records = [rate("patched", offered, 9.0) for offered in rates]
    assert legends_of({"rates": records}) == ["as offered", "patched"]
    records[-1]["completed"] = results.TAIL
    both = ["as offered", "patched", "patched, 99th percentile"]
    assert legends_of({"rates": records}) == both


def test_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path / "none.jsonl"))
    with pytest.raises(Failure, match=r"no results in .*none.jsonl: `make bench`"):
        report.main()
    monkeypatch.setenv("RELEASE", "v9")
    with pytest.raises(Failure, match="RELEASE=v9 is unknown"):
        report.main()
    assert not list(tmp_path.iterdir())


def test_writes_beside_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    lines = lines_of(jobs())
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("RESULTS", str(file))
    # What draws is in an environment of its own.
    saved: list[tuple[str, Path]] = []
    monkeypatch.setattr(plots, "save", lambda one, to: saved.append((one.file, to)))
    report.main()
    text = (tmp_path / "mine.md").read_text()
    assert text == report.write(results.latest(lines, "mine"))
    assert "(mine/a-gpu-step.png)" in text
    assert ("a-gpu-step.png", tmp_path / "mine") in saved
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "mine.md")
