# SPDX-License-Identifier: Apache-2.0
"""`make test`: this project's tests, the patches' and their neighbours upstream."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table

from scripts import console, pins, series
from scripts.apply import apply, open_clone
from scripts.build import Host, build, device
from scripts.console import BUILD, ROOT, Failure, err, say, show
from scripts.pins import Release

STAGES = ("tooling", "vllm", "cpu", "gpu")

# Upstream's tests of what the series touches that run without the model hub. On a
# GPU more of them find something to do.
NEIGHBOURS = (
    "tests/v1/attention/test_group_sliding_window.py",
    "tests/v1/attention/test_mm_prefix.py",
    "tests/v1/attention/test_vit_attn_wrappers.py",
    "tests/models/multimodal/processing/test_gemma4.py",
    "tests/models/multimodal/processing/test_gemma4_unified.py",
    "tests/kernels/attention/test_attention_selector.py",
    "tests/v1/attention/test_attention_backends_selection.py",
    "tests/v1/core/test_prefix_caching.py::test_mm_prefix_caching",
    "tests/v1/worker/test_attn_utils.py",
    "tests/renderers/test_gemma4_chat_template.py",
)
# Images that a neighbour would download.
DRAW = (
    "import sys; from PIL import Image as i; i.new('RGB', (64, 48)).save(sys.argv[1])"
)
IMAGES = ("stop_sign.jpg", "cherry_blossom.jpg")

# A tiny checkpoint stands in for those that upstream's tests name. Of the second only
# its configuration and its processor, which is Gemma4's, are asked for.
REDIRECT = "google/gemma-4-E2B-it"
DIFFUSION = "google/diffusiongemma-26B-A4B-it"
# What all these stand-ins depend on, but for the script of the checkpoint.
STAND_INS = (DRAW, *IMAGES, REDIRECT, DIFFUSION)


@dataclass
class Tally:
    """What a stage's tests came to."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Read a junit report.

    Args:
        report: the file that pytest wrote.

    Yields:
        A test's name, "passed", "failed" or "skipped", and why it was skipped.
    """
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            yield name, "failed", ""
        elif (skipped := case.find("skipped")) is not None:
            why = skipped.get("message", "")
            # Of a file that is skipped whole, only the text says why.
            found = re.search(r"Skipped: (.*)['\"]\)", skipped.text or "")
            if why == "collection skipped" and found:
                why = found[1]
            yield name, "skipped", why
        else:
            yield name, "passed", ""


def add_report(report: Path, tally: Tally) -> None:
    """Add a junit report to a tally.

    Args:
        report: the file that pytest wrote.
        tally: what to add to.
    """
    for name, outcome, _ in outcomes(report):
        setattr(tally, outcome, getattr(tally, outcome) + 1)
        if outcome == "failed":
            tally.failures.append(name)


def touched(files: list[Path]) -> list[str]:
    """Return the test files that patches add or change."""
    names: dict[str, None] = {}
    for path in files:
        text = path.read_bytes().decode(errors="replace")
        for name in re.findall(r"(?m)^diff --git a/.* b/(tests/.*)$", text):
            if re.fullmatch(r"test_.*\.py", name.rpartition("/")[2]):
                names[name] = None
    return list(names)


def command(python: Path, report: Path, what: list[str]) -> list[str]:
    """Return the command line that runs tests and writes a junit report of them."""
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-q")
    return [str(python), *pytest, f"--junitxml={report}", *what]


def arguments() -> list[str]:
    """Return what `ARGS=` adds to pytest's command line.

    Raises:
        Failure: its quotes do not match.
    """
    try:
        return shlex.split(console.option("ARGS"))
    except ValueError as error:
        raise Failure(f"ARGS={console.option('ARGS')} ({error})", "mend it") from None


def environ() -> dict[str, str]:
    """Return the variables that tests run with."""
    return {k: v for k, v in os.environ.items() if k not in _OWN}


def pytest(
    tally: Tally,
    python: Path,
    cwd: Path,
    what: list[str],
    env: dict[str, str] | None = None,
    flags: tuple[str, ...] = (),
) -> None:
    """Run pytest and add what came of it.

    Its output is shown only where something failed.

    Args:
        tally: what to add to.
        python: the interpreter.
        cwd: where to run it.
        what: files or tests.
        env: more variables for it.
        flags: more of its command line.
    """
    reports = BUILD / "reports"
    reports.mkdir(exist_ok=True)
    stem = re.sub(r"\W+", "-", what[0] if len(what) == 1 else f"{tally.name}-all")
    report, log = reports / f"{stem}.xml", reports / f"{stem}.log"
    report.unlink(missing_ok=True)
    say(f"  {what[0] if len(what) == 1 else f'{len(what)} files'}")
    start = time.monotonic()
    with (
        log.open("w") as out,
        subprocess.Popen(
            command(python, report, [*what, *flags, *arguments()]),
            cwd=cwd,
            env=environ() | (env or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as running,
    ):
        try:
            status = running.wait()
        except BaseException:
            # Engines that a test started must not outlive an interrupt.
            os.killpg(running.pid, signal.SIGKILL)
            raise
    tally.seconds += time.monotonic() - start
    if report.exists():
        add_report(report, tally)
    # 5: nothing collected, which ARGS="-k ..." makes of most files.
    if status not in (0, 5):
        sys.stderr.write(log.read_text(errors="replace"))
        if status != 1 or not report.exists():
            tally.failed += 1
            tally.failures.append(f"pytest ended with {status}, see {show(log)}")


# Variables of make's command line: a test that runs make must not inherit them.
_OWN = {
    *("RELEASE", "VLLM", "PYTHON", "DEVICE", "CONTINUE", "ARGS", "STAGE"),
    *("FULL", "JOBS", "MINUTES", "PARTIAL", "PATCH", "SINCE"),
    *("ABORT", "DROP", "TO", "TO_DIR"),
    *("UNDO", "BUMP", "MACHINE", "ONTO", "WITH", "LEVEL", "RESULTS"),
    *("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONPATH"),
}


def checkpoint(target: Host) -> dict[str, str]:
    """Return variables that lead upstream's tests to a tiny checkpoint.

    Args:
        target: the environment that builds it.

    Raises:
        Failure: it could not be built.
    """
    path = BUILD / "tiny" / "e2b-280"
    source = (ROOT / "scripts" / "tiny_gemma4.py").read_text()
    made_of = "\n".join((source, *STAND_INS))
    stamp = path.with_name(path.name + ".py")
    redirect = path.with_name("redirect.json")
    if not stamp.exists() or stamp.read_text() != made_of:
        console.remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        console.logged(
            [
                *("env", f"PYTHONPATH={ROOT}", str(target.python)),
                *("-m", "scripts.tiny_gemma4", str(path)),
                *("--kind", "e2b", "--soft-tokens", "280"),
            ],
            BUILD / "tiny.log",
            "building a tiny checkpoint",
        )
        assets = path.with_name("vllm_public_assets")
        assets.mkdir(exist_ok=True)
        for name in IMAGES:
            console.logged(
                [
                    *(str(target.python), "-c", DRAW),
                    str(assets / name),
                ],
                BUILD / "tiny.log",
                "drawing an image",
            )
        names = {REDIRECT: str(path), DIFFUSION: str(_diffusion(path))}
        redirect.write_text(json.dumps(names))
        stamp.write_text(made_of)
    return {
        "VLLM_MODEL_REDIRECT_PATH": str(redirect),
        "VLLM_ASSETS_CACHE": str(path.parent),
        "HF_HUB_OFFLINE": "1",
    }


def _diffusion(source: Path) -> Path:
    """Make a checkpoint of DiffusionGemma without weights from one of Gemma4."""
    path = source.with_name("diffusion")
    console.remove(path)
    others = shutil.ignore_patterns("*.safetensors*", "config.json")
    shutil.copytree(source, path, ignore=others)
    config = json.loads((source / "config.json").read_text())
    kept = ("vision_config", "boi_token_id", "eoi_token_id", "image_token_id", "dtype")
    made = {name: config[name] for name in kept} | {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "text_config": {"model_type": "diffusion_gemma_text"},
    }
    (path / "config.json").write_text(json.dumps(made))
    return path


def stage(name: str, release: Release, target: Host | None) -> Tally:
    """Run one stage.

    Args:
        name: which of STAGES.
        release: the release.
        target: the environment of the stages that need vLLM.

    Returns:
        What came of it.
    """
    tally = Tally(name)
    folder = ROOT / "tests" / name
    if name == "tooling":
        # Most of their time is of one process that waits for another. The tests of a
        # file stay together, as they share what it sets up.
        flags = (
            *("-n", str(min(console.cores(), 8)), "--dist", "loadfile"),
            *("--max-worker-restart", "0"),
        )
        pytest(tally, Path(sys.executable), ROOT, ["tests/tooling"], flags=flags)
        return tally
    assert target is not None
    if name == "vllm":
        with console.lock():
            clone, _ = open_clone(release)
        env = checkpoint(target)
        ours = touched(series.patches(release.patches))
        # Each in a process of its own: they start engines.
        for test in ours:
            pytest(tally, target.python, clone.path, [test], env)
        others = [test for test in NEIGHBOURS if test.split("::")[0] not in ours]
        pytest(tally, target.python, clone.path, others, env)
        return tally
    if not any(folder.glob("test_*.py")):
        tally.note = "no tests yet"
        return tally
    if name == "gpu" and device() != "cuda":
        tally.skipped += len(list(folder.glob("test_*.py")))
        tally.note = "no NVIDIA GPU here"
        return tally
    pytest(
        tally,
        target.python,
        ROOT,
        [f"tests/{name}"],
        {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RELEASE": release.tag},
    )
    return tally


def main() -> None:
    """Run the tests, or those of the stage that STAGE names."""
    release = pins.load(console.option("RELEASE"))
    wanted = console.option("STAGE")
    if wanted and wanted not in STAGES:
        raise Failure(f"STAGE={wanted} is unknown", f"test has {', '.join(STAGES)}")
    # What is wrong with them is said before anything runs.
    device()
    arguments()
    stages = [wanted] if wanted else list(STAGES)
    tallies = []
    target = None
    for name in stages:
        if name != "tooling" and target is None:
            with console.lock():
                apply(release)
                target = build(release)
        say(f"test: {name}")
        tally = stage(name, release, target)
        tallies.append(tally)
        say(
            f"  {tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped "
            f"in {tally.seconds:.0f} s{tally.note and f' ({tally.note})'}"
        )
    table = Table("stage", "passed", "failed", "skipped", "seconds", "", box=None)
    for tally in tallies:
        counts = (tally.passed, tally.failed, tally.skipped)
        table.add_row(tally.name, *map(str, counts), f"{tally.seconds:.0f}", tally.note)
    err.print(table)
    for tally in tallies:
        for line in tally.failures:
            say(f"FAILED {line}")
    passed, failed, skipped = (
        sum(getattr(tally, name) for tally in tallies)
        for name in ("passed", "failed", "skipped")
    )
    sys.stderr.flush()
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    if failed or not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    console.run(main)
