# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what engines have in common: it asks all, and compares each pair."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_agreement, bench_engine, worker


def test_each_engine_is_held_against_each_and_itself() -> None:
    # Of two workloads, two runs each.
    answers = {
        "one": [[[1, 2]], [[1, 3]], [[5, 6]], [[5, 6]]],
        "other": [[[1, 3]], [[9, 9]], [[7, 6]], [[7, 6]]],
    }
    asked: list[tuple[Any, ...]] = []

    def engine(name: str) -> Any:
        def answer(*request: Any) -> dict[str, Any]:
            asked.append((name, *request))
            return {"answered": answers[name].pop(0)}

        return answer

    engines = {name: engine(name) for name in answers}
    found = list(bench_agreement.bench_agreement(engines, 1))
    counts = [
        (r["workload"], r["engine"], r["with"], r["first"], r["equal"]) for r in found
    ]
    first, second = bench_agreement.WORKLOADS
    assert counts == [
        (first, "one", "one", 1, 1),
        (first, "one", "other", 1, 1),
        (first, "other", "other", 0, 0),
        (second, "one", "one", 1, 2),
        (second, "one", "other", 0, 0),
        (second, "other", "other", 1, 2),
    ]
    # All the same prompts, greedily.
    assert len(asked) == 8
    assert {request[-2:] for request in asked} == {(0, True)}


def test_what_is_asked_of_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def engines(module: str, arguments: dict[str, list[str]]) -> Iterator[Any]:
        assert module == "scripts.bench_engine"
        started.update(arguments)
        answers = {"answered": [[1, 2]]}
        yield dict.fromkeys(arguments, lambda *_: answers)

    monkeypatch.setattr(worker, "engines", engines)
    monkeypatch.setattr(
        bench_engine,
        "write_model",
        lambda kind, layers, _: tmp_path / f"{kind}{layers}",
    )
    out = tmp_path / "out.jsonl"
    assert bench_agreement.main(["--layers", "1", "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = {record["engine"] for record in records}
    assert names == set(bench_agreement.ENGINES) == set(started)
    assert {(record["kind"], record["layers"]) for record in records} == {("e2b", 1)}
    for name, arguments in started.items():
        # Those that serve are compiled, see `Engine`.
        level = "step" if name.endswith("eager") else "serving"
        assert arguments[0] == level
        # The patched tree is what the environment has.
        assert ("--tree" in arguments) == name.startswith("release")
        # It is part of a path, which the compiler cannot have spaces in.
        assert " " not in name
