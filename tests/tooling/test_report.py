# SPDX-License-Identifier: Apache-2.0
"""`make report`: its text has the numbers of the results, and no others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import report
from scripts.console import Failure

MACHINE = {"gpu": "a GPU", "cores": 2, "cpu": "a CPU", "versions": {"torch": "2.0"}}


def head(job: str, **more: Any) -> dict[str, Any]:
    return {
        "job": job,
        "command": ["scripts.bench", job.split()[0], "--batch", "1 x 280"],
        "release": "v1.0.0",
        "commit": "c" * 40,
        "tree": "t",
        "machine": MACHINE,
        "time": "2026-01-02T03:04:05Z",
    } | more


def tower(tree: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "26b",
        "layers": 27,
        "dtype": "bfloat16",
        "batch": "1 x 280",
        "tree": tree,
        "median": median,
        "quartiles": [median * 0.9, median * 1.1],
        "mib": 1234.4,
        "difference": 0.0 if tree == "unpatched" else 0.0123,
        "relative": 0.0 if tree == "unpatched" else 0.0456,
    } | more


def results() -> list[dict[str, Any]]:
    """Each level once."""
    layer = [
        {"case": "A one", "variant": name, "median": median, **more}
        for name, median, more in (
            ("FA3 floor", 100.0, {"x_floor": 1.0}),
            ("FA3 chosen", 111.0, {"x_floor": 1.11, "ranges": 2e-3, "rest": 3e-3}),
            ("FA4 floor", 101.0, {"x_floor": 1.0}),
            ("FA4 chosen", 222.0, {"x_floor": 2.2, "ranges": 2e-3, "rest": 1e-3}),
            ("FA4 mask_mod", 133.0, {"x_floor": 1.3}),
            ("Triton ranges", 4444.0, {"x_floor": 1.0}),
        )
    ]
    step = [
        {"kind": "31b", "case": "1 x 2", "tree": "patched", "variant": name}
        | {"median": median}
        for name, median in (("text", 66.0), ("images", 67.0), ("tower", 8.0))
    ]
    lines: list[dict[str, Any]] = []
    for job, records in {
        "layer A": layer,
        "tower 26b": [
            tower("unpatched", 0.1),
            tower("eager", 0.02),
            tower("compiled", 0.025),
        ],
        "step 31b patched": step,
        "serving 31b": [
            {"kind": "31b", "layers": 12, "workload": name, "bench": bench}
            | {"tree": tree, "median": value, "quartiles": [value, value * 2]}
            for name, bench, value in (
                ("a b", "throughput", 2e3),
                ("c", "latency", 0.2),
            )
            for tree in ("release", "patched")
        ],
        "host": [{"case": "256 decodes", "variant": "find, patched", "median": 71.0}],
    }.items():
        lines += [head(job), *({"job": job} | record for record in records)]
    return lines


def test_text() -> None:
    text = report.write(report.latest(results()), {"a GPU": ["a.png"]})
    for line in (
        "vLLM v1.0.0, 2026-01-02, commit ccccccccc; 2 cores of a CPU; torch 2.0.",
        "![a.png](a.png)",
        '    PYTHONPATH=. $(make -s python) -m scripts.bench layer --batch "1 x 280"',
        "| A one | 100 | 111 | 1.11 | 101 | 222 | 2.20 | 133 | 4,444 | 3.0e-03 |",
        "### 26B-A4B and 31B: 27 layers, bfloat16",
        "| batch | release | patched | compiled |",
        "| 1 x 280 | 100.0 (90.0 to 110.0) | 20.0 (18.0 to 22.0) |"
        " 25.0 (22.5 to 27.5) |",
        "| 1 x 280 | 1,234 MiB | 5.00x, 1,234 MiB, 1.2e-02 (4.6%) |"
        " 4.00x, 1,234 MiB, 1.2e-02 (4.6%) |",
        "| 31B | 1 x 2 | - | - | - | - | 66 | 67 | 8 | - |",
        "### 31B: 12 layers",
        "| a b | tok/s | 2,000 (2,000 to 4,000) | 2,000 (2,000 to 4,000) |",
        "| c | ms | 200 (200 to 400) | 200 (200 to 400) |",
        "| 256 decodes | find, patched | 71.0 |",
        "* A one: FA4 chosen takes 1.67x FA4 mask_mod",
        "* 26B-A4B and 31B, 1 x 280: compiled takes 1.25x patched",
    ):
        assert line in text.splitlines()


def test_words_have_no_numbers() -> None:
    """All levels without a record: what is left is the same for every result."""
    empty = [line for line in results() if "command" in line]
    for line in empty:
        del line["command"][1:]
        line |= {"release": "", "commit": "", "time": "", "machine": {"versions": {}}}
        line["machine"]["cores"] = "some"
    jobs = {run["job"]: report.Run(run, []) for run in empty}
    for name in ("layer A", "tower 26b", "serving 31b"):
        del jobs[name]
    text = report.write({"a GPU": jobs}, {})
    assert "## The host" in text
    assert not re.search(r"\d", text)


def test_last_run_counts() -> None:
    again = [head("host"), {"job": "host", "case": "c", "variant": "v", "median": 5.0}]
    text = report.write(report.latest([*results(), *again]), {})
    assert "| c | v | 5.0 |" in text
    assert "256 decodes" not in text


def test_devices_stay_apart() -> None:
    cpu = head("host", machine=MACHINE | {"gpu": ""})
    lines = [*results(), cpu, {"job": "host", "case": "c", "variant": "v", "median": 5}]
    runs = report.latest(lines)
    assert list(runs) == ["a GPU", "a CPU, 2 cores"]
    text = report.write(runs, {})
    assert text.index("# a GPU") < text.index("256 decodes") < text.index("# a CPU, 2")


def test_one_tree_a_device() -> None:
    newer = head("host", tree="u", time="2026-01-03T00:00:00Z")
    older = head("host", tree="u", time="2026-01-01T00:00:00Z")
    record = {"job": "host", "case": "c", "variant": "v", "median": 5.0}
    assert list(report.latest([*results(), newer, record])["a GPU"]) == ["host"]
    left = report.latest([*results(), older, record])["a GPU"]
    assert list(left) == ["layer A", "tower 26b", "step 31b patched", "serving 31b"]


@pytest.mark.parametrize("at", [0, 7])
def test_records_of_unknown_origin(at: int) -> None:
    lines = results()
    del lines[at]
    with pytest.raises(Failure, match="do not say what they were made on"):
        report.latest(lines)


def test_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path / "none.jsonl"))
    with pytest.raises(Failure, match=r"no results in .*none.jsonl: `make bench`"):
        report.main()
    assert not list(tmp_path.iterdir())


def test_writes_beside_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in results()))
    monkeypatch.setenv("RESULTS", str(file))
    # What draws is in an environment of its own.
    monkeypatch.setattr(report, "plot", lambda *_: ["x.png"])
    report.main()
    text = (tmp_path / "mine.md").read_text()
    assert "![mine/x.png](mine/x.png)" in text
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine.md")
