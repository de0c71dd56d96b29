# SPDX-License-Identifier: Apache-2.0
"""`make bench`: jobs, their results, and what happens to both when things go wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import bench, console
from scripts.bench import Job
from scripts.console import ROOT, Failure
from scripts.git import Clone

JOB = """
import json, os, pathlib, sys, time
name, out = sys.argv[1], pathlib.Path(sys.argv[3])
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs:
    runs.write(name + "\\n")
if name == "empty":
    sys.exit()
with out.open("a") as records:
    for value in (1.5, 2.5):
        records.write(json.dumps({"case": name, "median": value}) + "\\n")
if (here / f"fail-{name}").exists():
    print("a reason")
    sys.exit(3)
if (here / f"hang-{name}").exists():
    time.sleep(600)
"""


class Bench:
    """Three jobs of two levels that take no time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree, self.gpu, self.benchmarks = "tree1", "a GPU", "some"

    @property
    def runs(self) -> list[str]:
        file = self.folder / "runs"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    @property
    def lines(self) -> list[dict[str, Any]]:
        return bench.read(self.folder / "results.jsonl")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    state = Bench(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    jobs = [Job(f"{name} 1", ("job", name), 0.1) for name in ("a", "b", "c")]
    clone = lambda *_: SimpleNamespace(path=tmp_path)  # noqa: E731
    for name, value in {
        "ROOT": tmp_path,
        "RESULTS": tmp_path / "logs" / "results.jsonl",
        "JOBS": {"cuda": jobs, "cpu": jobs[:1]},
        "apply": clone,
        "build": lambda _: SimpleNamespace(python=Path(sys.executable)),
        "device": lambda: "cuda",
        "tree": lambda _: state.tree,
        "machine": lambda *_: {"gpu": state.gpu, "gpus": 1, "versions": {}},
        "benchmarks": lambda _: state.benchmarks,
        "revision": lambda: "commit",
        "busy": lambda: "",
    }.items():
        monkeypatch.setattr(bench, name, value)
    for name in ("LEVEL", "RELEASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESULTS", str(tmp_path / "results.jsonl"))
    return state


def test_results(toy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.bench("cuda")
    assert toy.runs == ["a", "b", "c"]
    head, *records = toy.lines[:3]
    assert head["command"] == ["job", "a"]
    assert {"release", "commit", "machine", "time", "seconds"} <= head.keys()
    assert head["tree"] == "tree1"
    assert [record["median"] for record in records] == [1.5, 2.5]
    assert {record["job"] for record in records} == {"a 1"}
    said = capsys.readouterr()
    assert said.out.strip().endswith("results.jsonl")
    assert "[1/3] a 1, about" in said.err


def test_goes_on_where_it_was(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEVEL", "b")
    bench.bench("cuda")
    monkeypatch.delenv("LEVEL")
    bench.bench("cuda")
    assert toy.runs == ["b", "a", "c"]
    bench.bench("cuda")
    assert toy.runs == []
    assert len(toy.lines) == 9


@pytest.mark.parametrize("what", ["tree", "gpu", "benchmarks"])
def test_results_of_something_else_stay(toy: Bench, what: str) -> None:
    bench.bench("cuda")
    before = toy.lines
    assert len(toy.runs) == 3
    setattr(toy, what, "another")
    bench.bench("cuda")
    assert len(toy.runs) == 3
    assert toy.lines[:9] == before
    assert len(toy.lines) == 18


@pytest.mark.parametrize("how", ["fail", "empty"])
def test_failed_job(
    toy: Bench,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "b"
    if how == "fail":
        (toy.folder / "fail-b").touch()
    else:
        name = "empty"
        jobs = [*bench.JOBS["cuda"]]
        jobs[1] = Job("b 1", ("job", "empty"), 0.1)
        monkeypatch.setattr(bench, "JOBS", {"cuda": jobs})
    with pytest.raises(Failure, match=r"^b 1: not all was measured: .*tries them"):
        bench.bench("cuda")
    assert toy.runs == ["a", name, "c"]
    measured = {line["job"] for line in toy.lines}
    assert measured == {"a 1", "c 1"} | ({"b 1"} if how == "fail" else set())
    said = capsys.readouterr().err
    assert ("a reason" if how == "fail" else "no records") in said
    if how == "fail":
        # What it had measured is kept, but it is tried again.
        assert [line.get("partial") for line in toy.lines if "command" in line] == [
            None,
            "exit status 3",
            None,
        ]
        (toy.folder / "fail-b").unlink()
        bench.bench("cuda")
        assert toy.runs == ["b"]
        assert len(toy.lines) == 12
        bench.bench("cuda")
        assert toy.runs == []


def test_what_has_no_results_comes_first(
    toy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEVEL", "a,b")
    bench.bench("cuda")
    assert toy.runs == ["a", "b"]
    monkeypatch.delenv("LEVEL")
    toy.benchmarks = "changed"
    bench.bench("cuda")
    assert toy.runs == ["c", "a", "b"]


def test_code_that_changes_while_a_job_runs(
    toy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.run

    def edited(*args: Any) -> Any:
        toy.benchmarks = "edited"
        return run(*args)

    monkeypatch.setattr(bench, "run", edited)
    bench.bench("cuda")
    heads = [line for line in toy.lines if "command" in line]
    assert [head["benchmarks"] for head in heads] == ["some"] * 3


def test_code_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for name, text in {
        "bench_a": "from scripts import worker\n",
        "bench_b": "",
        "worker": "from scripts.demo import x\n",
        "demo": "",
        "console": "",
    }.items():
        (tmp_path / "scripts" / f"{name}.py").write_text(text)

    def changed(name: str) -> tuple[bool, bool]:
        before = [bench.benchmarks(f"scripts.bench_{one}") for one in "ab"]
        with (tmp_path / "scripts" / f"{name}.py").open("a") as file:
            file.write("# more\n")
        after = [bench.benchmarks(f"scripts.bench_{one}") for one in "ab"]
        return before[0] != after[0], before[1] != after[1]

    assert changed("demo") == (True, False)
    assert changed("bench_b") == (False, True)
    assert changed("console") == (False, False)


def command_lines() -> Iterator[bytes]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            yield file.read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupt_ends_the_job_and_keeps_results(
    toy: Bench, sent: signal.Signals
) -> None:
    bench.keep(Path(os.environ["RESULTS"]), {"job": "old"}, [{"median": 1}])
    before = toy.lines
    (toy.folder / "hang-a").touch()
    script = toy.folder / "interrupted.py"
    script.write_text(
        "import pathlib, sys\n"
        "from scripts import bench, console\n"
        "bench.ROOT = folder = pathlib.Path(sys.argv[1])\n"
        "job = bench.Job('a 1', ('job', 'a'), 1)\n"
        "python = pathlib.Path(sys.executable)\n"
        "sys.argv[1:] = []\n"
        "def main() -> None:\n"
        "    env = bench.variables('cpu', 'v0.32.0') | {'PYTHONPATH': str(folder)}\n"
        "    bench.run(job, python, env, folder / 'log', folder / 'out')\n"
        "console.run(main)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(toy.folder)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as running:
        out = toy.folder / "out"
        for _ in range(300):
            if out.exists() and len(out.read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
        running.send_signal(sent)
        _, said = running.communicate(timeout=30)
    if sent == signal.SIGINT:
        assert running.returncode == 130
        assert b"interrupted" in said
    else:
        time.sleep(1)
    assert not any(str(out).encode() in line for line in command_lines())
    assert toy.lines == before


def test_no_gpu(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "device", lambda: "cpu")
    with pytest.raises(Failure, match="no NVIDIA GPU: `make bench-cpu`"):
        bench.bench("cuda")
    bench.bench("cpu")
    assert toy.runs == ["a"]


def test_gpu_that_the_environment_does_not_see(
    toy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "machine", lambda *_: {"gpus": 0})
    with pytest.raises(Failure, match="sees no GPU"):
        bench.bench("cuda")
    assert toy.runs == []


def test_gpu_that_is_in_use(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "busy", lambda: "123, python, 4 MiB")
    with pytest.raises(Failure, match="the GPU is in use: 123, python, 4 MiB: run"):
        bench.bench("cuda")
    assert toy.runs == []
    bench.bench("cpu")
    assert toy.runs == ["a"]


@pytest.mark.parametrize(("status", "said"), [(0, "7, python, 1 MiB"), (9, "")])
def test_what_uses_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.busy() == ""
    smi = tmp_path / "nvidia-smi"
    text = f"echo '7, python, 1 MiB'\necho '8, b, 2 MiB'\nexit {status}"
    smi.write_text(f"#!/bin/sh\n{text}\n")
    smi.chmod(0o755)
    assert bench.busy() == said


def test_job_that_hangs(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy.folder / "hang-b").touch()
    monkeypatch.setattr(bench, "TIMES", 0.05)
    with pytest.raises(Failure, match="b 1: not all was measured"):
        bench.bench("cuda")
    assert {line["job"] for line in toy.lines if "partial" not in line} >= {
        "a 1",
        "c 1",
    }
    [head] = [line for line in toy.lines if "partial" in line]
    assert head["job"] == "b 1" and head["partial"].startswith("no end in 0.05 times")


def test_jobs_measure_this_release_beside_this_clone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM", "/a/clone")
    monkeypatch.setenv("RELEASE", "v9")
    monkeypatch.setenv("LEVEL", "a")
    env = bench.variables("cpu", "v1.0.0")
    assert (env["RELEASE"], env["VLLM"]) == ("v1.0.0", "/a/clone")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert "LEVEL" not in env
    assert bench.variables("cuda", "v1.0.0").get("CUDA_VISIBLE_DEVICES") != ""


def test_two_at_once(toy: Bench) -> None:
    with (
        console.lock(bench.RESULTS.parent),
        pytest.raises(Failure, match="another make command is at work"),
    ):
        bench.bench("cuda")
    assert toy.runs == []


def test_checkout_that_changes_meanwhile(
    toy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["tree1", "tree1", "tree2"])
    monkeypatch.setattr(bench, "tree", lambda _: next(names))
    with pytest.raises(Failure, match="changed while b 1 ran"):
        bench.bench("cuda")
    assert {line["job"] for line in toy.lines} == {"a 1"}


def test_file_without_a_last_newline_and_behind_a_link(
    toy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, link = toy.folder / "kept.jsonl", toy.folder / "link.jsonl"
    kept.write_text('{"job": "old", "command": []}')
    link.symlink_to(kept)
    monkeypatch.setenv("RESULTS", str(link))
    bench.bench("cuda")
    assert link.is_symlink()
    lines = bench.read(kept)
    assert lines[0] == {"job": "old", "command": []}
    assert len(lines) == 10


def test_unknown_level(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEVEL", "a,z")
    with pytest.raises(Failure, match="LEVEL=z is unknown: there are a, b, c"):
        bench.bench("cuda")


def test_line_that_is_no_json(toy: Bench) -> None:
    bench.bench("cuda")
    results = Path(os.environ["RESULTS"])
    results.write_text(results.read_text() + '{"job"')
    with pytest.raises(Failure, match=r"line 10 of .* is not JSON"):
        bench.bench("cuda")


def test_tree_has_a_name(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True)

    git("init", "-q")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("vllm/a.py", "tests/a.py"):
        (tmp_path / name).write_text("1\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    git("add", ".")
    git(*author, "commit", "-qm", "one")
    clone = Clone(tmp_path)
    name = bench.tree(clone)
    (tmp_path / "tests/a.py").write_text("2\n")
    assert bench.tree(clone) == name
    git(*author, "commit", "-qam", "two")
    assert bench.tree(clone) == name
    (tmp_path / "vllm/a.py").write_text("2\n")
    with pytest.raises(Failure, match=r"uncommitted changes, such as vllm/a.py"):
        bench.tree(clone)
    git(*author, "commit", "-qam", "three")
    assert bench.tree(clone) != name


def test_results_say_what_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *author, *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    git("init", "-q")
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/a.py", "README.md"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "README.md").write_text("2\n")
    assert bench.revision() == git("rev-parse", "HEAD")
    (tmp_path / "scripts/a.py").write_text("2\n")
    with pytest.raises(Failure, match=r"scripts/a.py has uncommitted changes"):
        bench.revision()


def test_jobs_are_of_benchmarks_that_exist() -> None:
    for jobs in bench.JOBS.values():
        assert len({job.name for job in jobs}) == len(jobs)
        for job in jobs:
            assert (ROOT / f"{job.command[0].replace('.', '/')}.py").exists()


def test_machine_says_what_is_wrong(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no torch >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(Failure, match="does not say what it runs on: no torch"):
        bench.machine(python, {})


FAKE_TORCH = """
class cuda:
    device_count = lambda: 1
    def get_device_properties(index):
        return type("", (), {"name": "G", "total_memory": 1 << 30})
class version:
    cuda = "13.0"
"""


@pytest.mark.parametrize("smi", ["echo 580.1, 700.00 W", "exit 9", ""])
def test_machine_with_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smi: str
) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    if smi:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:/bin"}
    found = bench.machine(Path(sys.executable), env)
    assert (found["gpu"], found["gpu_mib"], found["cuda"]) == ("G", 1024, "13.0")
    known = (found.get("driver"), found.get("power_limit"))
    assert known == (("580.1", "700.00 W") if "580" in smi else (None, None))
