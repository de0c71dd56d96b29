# SPDX-License-Identifier: Apache-2.0
"""Processes that a benchmark asks by turns: each has an engine of one tree."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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

    def __init__(self, log: IO[bytes], module: str, arguments: Sequence[str]) -> None:
        self.log = log
        path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
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
            sys.stderr.write(self.log.read()[-5000:].decode(errors="replace"))
            raise RuntimeError("an engine died, its log is above")
        return json.loads(line)

    def __call__(self, *request: Any) -> Any:
        """Ask, and return the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def engines(
    module: str, arguments: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Process]]:
    """Start processes by name, each with its arguments; end them afterwards.

    One after the other: their loading would fight for the cores.

    Args:
        module: Runs ``serve`` where ``--serve`` is given.
        arguments: More of its arguments, by name.

    Raises:
        RuntimeError: One ended.
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, given in arguments.items():
            log = stack.enter_context(tempfile.TemporaryFile())
            print(f"starting the {name} engine ...", flush=True)
            begin = time.perf_counter()
            processes[name] = Process(log, module, given)
            stack.callback(processes[name].stop)
            where = processes[name].answer()
            seconds = time.perf_counter() - begin
            print(f"{name}: vLLM from {where}, {seconds:.0f} s", flush=True)
        yield processes
