# SPDX-License-Identifier: Apache-2.0
"""Processes that a benchmark asks by turns: each has an engine of one tree."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def serve(make: Callable[[], Any], tree: str | None) -> None:
    """Answer requests from stdin on what was stdout, one JSON value a line.

    A request is a method of the engine and its arguments. The first answer, without
    one, says where vLLM was imported from.

    Args:
        make: Makes the engine.
        tree: What vLLM is imported from, if not what the environment has.

    Raises:
        RuntimeError: vLLM came from elsewhere.
    """
    if tree is not None:
        # Before what the environment puts first.
        sys.path.insert(0, tree)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries print is no answer
    engine = make()
    import vllm

    where = Path(vllm.__file__).parents[1]
    if tree is not None and where.resolve() != Path(tree).resolve():
        raise RuntimeError(f"vLLM was imported from {where}, not from {tree}")
    print(json.dumps(str(where)), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        result = getattr(engine, method)(*arguments)
        print(json.dumps(result), file=answers, flush=True)


class Process:
    """Another process that runs ``serve``, and its log."""

    def __init__(
        self, log: IO[bytes], module: str, name: str, arguments: Sequence[str]
    ) -> None:
        self.log = log
        path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        given = [*arguments, "--tree", str(ROOT)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", *arguments],
            # vLLM looks at its models in a process that finds it here.
            cwd=given[given.index("--tree") + 1],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
                # Two engines of a tree would write the same files at once.
                "VLLM_CACHE_ROOT": str(ROOT / "build" / "cache" / f"vllm-{name}"),
                # One process waits while the other works: it must not spin.
                "OMP_WAIT_POLICY": "passive",
                "KMP_BLOCKTIME": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def answer(self) -> Any:
        """Return the next answer.

        Raises:
            RuntimeError: The process ended; the end of its log goes to stderr.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = self.log.read()[-50000:].decode(errors="replace")
            sys.stderr.write(said[-5000:])
            # In a process below this one the first exception says most, in this one the
            # last: what follows are those of its callers.
            kind = r"[\w.]*(?:Error|Exception): (.+)$"
            errors = re.findall(rf"(?m)^\(\w+ pid=\d+\) ERROR .*?\] {kind}", said)[:1]
            errors = errors or re.findall(rf"(?m)^(?:\(.*?\) )?{kind}", said)
            reason = errors[-1] if errors else f"exit status {self.process.returncode}"
            raise RuntimeError(f"an engine died, its log is above: {reason}")
        return json.loads(line)

    def __call__(self, *request: Any) -> Any:
        """Ask, and return the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End it and what it started, whatever they do."""
        import psutil

        started: list[Any] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def keep(out: Path | None, *records: Mapping[str, Any]) -> None:
    """Append records to a file of JSON lines, if there is one.

    Each as soon as it is there: what comes later can fail.
    """
    if out is not None:
        with out.open("a") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)


def at_once() -> int:
    """How many processes may load or prepare at a time: two cores each."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@contextlib.contextmanager
def engines(
    module: str,
    arguments: Mapping[str, Sequence[str]],
    failures: dict[str, str] | None = None,
) -> Iterator[dict[str, Process]]:
    """Start processes by name, each with its arguments; end them afterwards.

    As many at a time as have two cores each: their loading would fight for fewer.

    Args:
        module: Runs ``serve`` where ``--serve`` is given.
        arguments: More of its arguments, by name.
        failures: Where it is given, a process that ends at its start is left out and
            this says why, by its name.

    Raises:
        RuntimeError: One ended, and ``failures`` is not given.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Process | None:
            log = stack.enter_context(tempfile.TemporaryFile())
            print(f"starting the {name} engine ...", flush=True)
            process = Process(log, module, name, arguments[name])
            stack.callback(process.stop)
            try:
                where = process.answer()
            except RuntimeError as error:
                if failures is None:
                    raise
                failures[name] = str(error)
                return None
            seconds = time.perf_counter() - begin
            print(f"{name}: vLLM from {where}, {seconds:.0f} s", flush=True)
            return process

        with ThreadPoolExecutor(at_once()) as pool:
            started = dict(zip(arguments, pool.map(start, arguments), strict=True))
        yield {name: process for name, process in started.items() if process}


Name = TypeVar("Name", bound=Hashable)


def turns(
    names: Iterable[Name], least: int, most: int = 0, seconds: float = math.inf
) -> Iterator[list[Name]]:
    """Yield the order of each turn, every second one the other way round.

    A GPU's clock falls as it gets hot: nothing has a time to itself, none is always
    the first nor always behind the same one. There are ``most`` turns, or ``least`` if
    ``seconds`` have passed.
    """
    order = list(names)
    begin = time.perf_counter()
    for turn in range(max(least, most)):
        if turn >= least and time.perf_counter() - begin > seconds:
            return
        first = turn // 2 % max(len(order), 1)
        turned = order[first:] + order[:first]
        yield turned[:: -1 if turn % 2 else 1]


def by_turns(
    calls: Mapping[Name, Callable[[], Any]],
    least: int,
    most: int = 0,
    seconds: float = math.inf,
) -> dict[Name, list[Any]]:
    """Call each in ``turns`` and return what they returned, by name."""
    found: dict[Name, list[Any]] = {name: [] for name in calls}
    for names in turns(calls, least, most, seconds):
        for name in names:
            found[name].append(calls[name]())
    return found


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """The median and quartiles of samples, with them."""
    low, median, high = (float(x) for x in np.percentile(samples, [25, 50, 75]))
    return {"median": median, "quartiles": [low, high], "samples": list(samples)}
