# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what engines have in common: it asks all, and compares each pair."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_agreement, bench_engine, unpatched, worker
from scripts.bench_agreement import WORKLOADS

Tokens = list[list[int]]


class FakeEngine:
    """Answers what it is told, run by run, and notes what it was asked."""

    def __init__(self, *answers: Tokens) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, *request: Any) -> Any:
        self.asked.append(request)
        return {"answered": self.answers.pop(0)}


def test_each_engine_is_held_against_each_and_itself() -> None:
    # Of two workloads, a warm-up and two runs each.
    cold: Tokens = [[8, 9]]
    engines: Any = {
        "one": FakeEngine(cold, [[1, 2]], [[1, 3]], cold, [[5, 6]], [[5, 6]]),
        "other": FakeEngine(cold, [[1, 3]], [[9, 8]], cold, [[7, 6]], [[7, 6]]),
    }
    counts = [
        (r["workload"], r["engine"], r["with"], r["first"], r["equal"])
        for r in bench_agreement.bench_agreement(engines, 1)
    ]
    first, second = WORKLOADS
    assert counts == [
        (first, "one", "one", 1, 1),
        (first, "one", "other", 1, 1),
        (first, "other", "other", 0, 0),
        (second, "one", "one", 1, 2),
        (second, "one", "other", 0, 0),
        (second, "other", "other", 1, 2),
    ]
    known = bench_engine.workloads(1)
    for engine in engines.values():
        # The same prompts in each run, greedily.
        assert engine.asked == [
            ("run", *known[workload], 0, True) for workload in WORKLOADS for _ in "123"
        ]


def test_answers_that_repeat_a_token_say_nothing() -> None:
    repeating = FakeEngine(*[[[4, 4], [4, 4], [4, 5]]] * 3)
    engines: Any = {"one": repeating}
    with pytest.raises(RuntimeError, match="one repeats one token"):
        list(bench_agreement.bench_agreement(engines, 1))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Engines that answer at once, without a GPU; returns what they are given."""
    found: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def engines(module: str, arguments: dict[str, list[str]]) -> Iterator[Any]:
        assert module == "scripts.bench_engine"
        found.update(arguments)

        def answer(method: str, *_: Any) -> Any:
            return ["window 512"] if method == "layers" else {"answered": [[1, 2]]}

        yield dict.fromkeys(arguments, answer)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # `main` sets them for all that follows.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setattr(worker, "engines", engines)
    monkeypatch.setattr(unpatched, "unpatched_tree", lambda: tmp_path / "release")
    monkeypatch.setattr(
        bench_engine,
        "write_model",
        lambda kind, layers, _: tmp_path / f"{kind}-{layers}",
    )
    return found


def test_what_engines_are_asked_for(
    started: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert bench_agreement.main(["--layers", "2", "--json", str(out)]) == 0
    model, release = str(tmp_path / "e2b-2"), str(tmp_path / "release")
    common = ["--checkpoint", model, "--context", "16384"]
    common += ["--kv", str(bench_engine.kv_gib("e2b", 2))]
    of_release = [*common, "--form", "release", "--tree", release]
    assert started["release"] == started["release-again"] == ["serving", *of_release]
    # Those of a step are not compiled, see `Engine`.
    assert started["release-eager"] == ["step", *of_release]
    patched = [*common, "--form", "patched"]
    assert started["patched"] == started["patched-again"] == ["serving", *patched]
    assert started["patched-eager"] == ["step", *patched]
    # Names are part of paths, in which the compiler cannot have spaces.
    assert not any(" " in name for name in started)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == len(WORKLOADS) * 21
    for record in records:
        assert (record["kind"], record["layers"], record["first"]) == ("e2b", 2, 1)
        assert record["attention"] == ["window 512"]


def test_engine_that_dies(
    started: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def engines(*_: Any) -> Any:
        raise RuntimeError("an engine died")

    monkeypatch.setattr(worker, "engines", engines)
    assert bench_agreement.main([]) == 1
    assert capsys.readouterr().err == "bench_agreement: an engine died\n"
