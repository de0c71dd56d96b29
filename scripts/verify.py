# SPDX-License-Identifier: Apache-2.0
"""`make verify`: each patch on its own, with only those before it."""

import ast
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from scripts import build, console, lint, pins, series
from scripts import test as runner
from scripts.apply import count, open_clone
from scripts.build import Host
from scripts.console import BUILD, ROOT, Failure, err, say, show
from scripts.git import Clone, GitError
from scripts.pins import Release

HOOK = "vllm_gemma4_verify"
# What every process of a check runs.
HOOKS = ("scripts/runtime_hook.py", "scripts/verify_hook.py")
# Longer than any check takes; one that hangs must end.
LIMIT = 1200
# Results kept of one check: a series that is worked on makes new ones all the time.
KEEP = 40
# Files that no test reads.
UNREAD = re.compile(r"(docs|\.github|\.buildkite)/|.*\.md$")
# vLLM's own tag for a patch that changes nothing that a test could see.
NEUTRAL = "[Refactor]"

LINT = """
import sys, pathlib
from scripts import lint
found = list(lint.upstream(pathlib.Path(sys.argv[1]), sys.argv[2:]))
print(*found, sep="\\n")
sys.exit(bool(found))
"""
IMPORT = """
import importlib, json, sys
import vllm
print(vllm.__file__)
found = {}
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
        found[name] = ""
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"
        print(name, found[name], sep=": ")
json.dump(found, open(sys.argv[1], "w"))
"""


@dataclass
class Step:
    """A patch and the trees around it, `tree` being that after it.

    `stripped` is the tree before it with only its tests. Of the test files that are
    there after it, `own` are those that it touches, `earlier` those of the patches
    before it.
    """

    number: int
    patch: lint.Patch
    before: str
    after: str
    stripped: str
    own: list[str]
    earlier: list[str]
    tree: str

    @property
    def name(self) -> str:
        return f"{self.number:04}"


class State:
    """What a commit holds.

    Args:
        clone: where it is.
        commit: which.
    """

    def __init__(self, clone: Clone, commit: str) -> None:
        self.files = clone.files(commit)
        self.tree = clone("rev-parse", commit + "^{tree}")
        names = sorted(self.files)
        rest = [n for n in names if not n.endswith(".py") and not UNREAD.match(n)]
        self.rest = _hash(*((name, self.files[name]) for name in rest))

    def seen(self, names: Iterable[str]) -> str:
        """Return a hash of what a check saw of this tree.

        Args:
            names: the modules that it looked for, there or not, and the files.
                What is no Python is always part of it, for nothing notes who
                reads it; "*" stands for everything.
        """
        if "*" in names:
            return self.tree
        parts = []
        for name in sorted(names):
            stem = name.replace(".", "/")
            module = [stem + ".py", stem + "/__init__.py"]
            files = [name] if name.endswith(".py") else module
            parts += [self.files.get(file, "") for file in files]
        return _hash(self.rest, *parts)


@dataclass
class Result:
    """What came of a check, and what that depends on."""

    tree: str
    names: list[str] = field(default_factory=list)
    seen: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    # Why tests were skipped.
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""
    log: str = ""
    # What is not worth keeping is found out again by the next run.
    keep: bool = False

    def tests(self, outcome: str) -> list[str]:
        """Return the tests with an outcome."""
        return [name for name, came in self.outcomes.items() if came == outcome]

    @property
    def good(self) -> bool:
        """Whether something ran and nothing failed."""
        return not self.why and bool(self.outcomes) and not self.tests("failed")


class Store:
    """Results on disk; a check is not run again while what it saw is the same.

    Args:
        folder: where.
        keys: for each kind of check, a hash of what runs it.
        full: take only results of the very same tree.
    """

    def __init__(self, folder: Path, keys: dict[str, str], full: bool) -> None:
        self.folder, self.keys, self.full = folder, keys, full
        self.kept: dict[str, list[Result]] = {}
        self.guard = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, what: str) -> Path:
        key = self.keys[what.split()[0]]
        return self.folder / f"{_hash(key, what)[:32]}.json"

    def _load(self, what: str) -> list[Result]:
        if what not in self.kept:
            found: list[Result] = []
            # What cannot be read is run again.
            with contextlib.suppress(OSError, ValueError, TypeError):
                rows = json.loads(self._file(what).read_text())
                found = [Result(**row) for row in rows]
            self.kept[what] = found
        return self.kept[what]

    def find(self, what: str, state: State) -> Result | None:
        """Return what came of a check on a tree that was the same to it."""
        with self.guard:
            known = self._load(what)
            for one in known:
                if one.tree == state.tree:
                    return one
            if self.full:
                return None
            return next((r for r in known if r.seen == state.seen(r.names)), None)

    def add(self, what: str, result: Result) -> None:
        """Keep a result, for this run alone unless it says otherwise."""
        with self.guard:
            known = self._load(what)
            known[:] = [r for r in known if r.tree != result.tree][: KEEP - 1]
            known.insert(0, result)
            rows = [asdict(r) for r in known if r.keep]
            console.write(self._file(what), json.dumps(rows))

    def guess(self, what: str) -> float | None:
        """Return how long a check took last, None if it never ran."""
        with self.guard:
            return next((r.seconds for r in self._load(what)), None)


class Slot:
    """A tree to run checks in, one at a time.

    Args:
        clone: where the commits are.
        base: the release's commit.
        path: where the tree is.
        wheel: the `vllm` folder with the compiled files.
    """

    def __init__(self, clone: Clone, base: str, path: Path, wheel: Path) -> None:
        self.clone, self.base, self.path, self.wheel = clone, base, path, wheel
        path.parent.mkdir(parents=True, exist_ok=True)
        # Checks inherit it, so that no tree is changed under one whose parent was
        # killed.
        self.lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.last = time.time()

    def put(self, commit: str) -> Path:
        """Bring the tree to a commit, with the compiled files; return its path."""
        # Python knows a file again by its size and the second of its last change. The
        # clock of files is a little behind.
        time.sleep(max(0, int(self.last) + 1.05 - time.time()))
        own = lint.checkout(self.clone, commit, self.path)
        keep = ("__pycache__", ".mypy_cache", ".ruff_cache")
        own("clean", "-q", "-ffdx", *(f"--exclude={name}" for name in keep))
        for cache in list(self.path.rglob("__pycache__")):
            # What is only a cache would be a package.
            folder = cache.parent
            while folder.exists() and {*os.listdir(folder)} <= {"__pycache__"}:
                console.remove(folder)
                folder = folder.parent
        for name in build.compiled(own, self.base, self.wheel):
            link = self.path / name
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.wheel / name.removeprefix("vllm/"))
        self.last = time.time()
        return self.path


class Stopped(Exception):
    """The run is ending: nothing more is started."""


@dataclass(eq=False)
class Check:
    """One thing to find out about a patch.

    Args:
        step: the patch.
        kind: "lint", "import", "test" or "without".
        file: the test file of a "test".
        needs: what must be done before.
    """

    step: Step
    kind: str
    file: str = ""
    needs: list["Check"] = field(default_factory=list)
    result: Result | None = None
    # Of "without": what to show of it, and why.
    shown: str = ""
    why: str = ""

    @property
    def what(self) -> str:
        """What it is called in the store: the same for all patches where it can be."""
        if self.kind == "test":
            return f"test {self.file}"
        return f"{self.kind} {' '.join(sorted(self.step.patch.files))}"

    @property
    def title(self) -> str:
        return f"{self.step.name} {self.kind} {self.file}".strip()


@dataclass
class Verifier:
    """What runs checks.

    Args:
        clone: where the commits are.
        target: the environment that runs them.
        store: earlier results.
        more: variables for tests.
        logs: the folder for their output.
    """

    clone: Clone
    target: Host
    store: Store
    more: dict[str, str]
    logs: Path
    states: dict[str, State] = field(default_factory=dict)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def state(self, commit: str) -> State:
        """Return what a commit holds."""
        with self.guard:
            if commit not in self.states:
                self.states[commit] = State(self.clone, commit)
            return self.states[commit]

    def known(self, check: Check) -> Result | None:
        """Return an earlier result of a check that still holds."""
        return self.store.find(check.what, self.state(check.step.after))

    def run(self, check: Check, slot: Slot) -> None:
        """Find out, in a tree, what no earlier result says."""
        if check.kind == "without":
            self._without(check, slot)
            return
        check.result = self.known(check)
        if check.result is None:
            if check.kind == "test":
                stem = f"{check.step.name}-{_stem(check.file)}"
                after = check.step.after
                check.result = self._pytest(slot, after, check.file, [], stem)
            else:
                make = self._lint if check.kind == "lint" else self._import
                check.result = make(check, slot)
            check.result.keep = check.result.good
            self.store.add(check.what, check.result)

    def stop(self) -> None:
        """End what is under way, engines that a test started too."""
        with self.guard:
            self.stopped = True
            for one in self.running:
                if one.poll() is None:
                    os.killpg(one.pid, signal.SIGKILL)

    def _wait(
        self, command: list[str], slot: Slot, cwd: Path, env: dict[str, str], log: Path
    ) -> int | None:
        """Run a command in a tree; return its status, None if it took too long."""
        with self.guard:
            if self.stopped:
                raise Stopped
            with log.open("wb") as out:
                one = subprocess.Popen(
                    command,
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    pass_fds=[slot.lock],
                )
            self.running.add(one)
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = one.wait(LIMIT)
        with self.guard:
            self.running.discard(one)
            if self.stopped:
                raise Stopped
            if status is None:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait()
        return status

    def _call(
        self, slot: Slot, commit: str, command: list[str], stem: str
    ) -> tuple[Result, int | None]:
        """Run a command of the environment on a commit and note what it imports."""
        tree = slot.put(commit)
        state = self.state(commit)
        log, notes = self.logs / f"{stem}.log", self.logs / f"{stem}.notes"
        notes.write_text("")
        env = runner.environ() | self.more
        env |= {
            "PYTHONPATH": str(tree),
            "VLLM_GEMMA4_TREE": str(tree),
            "VLLM_GEMMA4_NOTES": str(notes),
        }
        start = time.monotonic()
        status = self._wait(command, slot, tree, env, log)
        result = Result(state.tree, log=str(log))
        result.seconds = time.monotonic() - start
        names = set(notes.read_text().splitlines())
        notes.unlink()
        for name in sorted(names):
            if name.startswith("vllm="):
                names.remove(name)
                names.add("vllm")
                where = name.partition("=")[2]
                if not where.startswith(f"{tree}{os.sep}"):
                    result.why = f"a process imported {where or 'no vLLM'}"
        result.names = sorted(names)
        if status is None:
            result.why = f"it took more than {LIMIT} s"
        elif status < 0:
            result.why = f"it died of {signal.Signals(-status).name}"
        return result, status

    def _lint(self, check: Check, slot: Slot) -> Result:
        step = check.step
        tree = slot.put(step.after)
        there = self.state(step.after).files
        files = [name for name in dict.fromkeys(step.patch.files) if name in there]
        log = self.logs / f"{step.name}-lint.log"
        result = Result(step.tree, ["*"], step.tree, log=str(log))
        start = time.monotonic()
        command = [sys.executable, "-c", LINT, str(tree), *files]
        status = self._wait(command, slot, ROOT, runner.environ(), log)
        result.seconds = time.monotonic() - start
        result.outcomes = {"lint": "failed" if status else "passed"}
        if status is None:
            result.why = f"it took more than {LIMIT} s"
        return result

    def _import(self, check: Check, slot: Slot) -> Result:
        step = check.step
        files = self.state(step.after).files
        modules = [
            _module(name)
            for name in dict.fromkeys(step.patch.files)
            if name.startswith("vllm/") and name.endswith(".py") and name in files
        ]
        modules = list(dict.fromkeys([*modules, *self._importers(step.after, modules)]))
        result, bad = self._modules(slot, step.after, modules, f"{step.name}-import")
        result.outcomes = dict.fromkeys(("vllm", *modules), "passed")
        if bad:
            # Some need a device, or a package, that is not here. All again in the
            # same order, for a module that fails half-way leaves its parts behind.
            stem = f"{step.name}-import-before"
            before, old = self._modules(slot, step.before, modules, stem)
            result.seconds += before.seconds
            result.why = result.why or (before.why and f"before it, {before.why}")
            there = self.state(step.before).files
            for name in bad:
                path = name.replace(".", "/")
                was = {f"{path}.py", f"{path}/__init__.py"} & there.keys()
                result.outcomes[name] = "skipped" if was and name in old else "failed"
            result.names = ["*"]
        result.seen = self.state(step.after).seen(result.names)
        return result

    def _importers(self, commit: str, modules: list[str]) -> list[str]:
        """Return the modules that import from any of these, by what their text says."""
        words = []
        for module in modules:
            package, _, stem = module.rpartition(".")
            at, of = re.escape(module), re.escape(package)
            words += ["-e", f"^ *(from|import) {at}( |$)"]
            words += ["-e", f"^ *from {of} import .*{stem}"]
        if not words:
            return []
        said = ""
        # It fails where it finds nothing.
        with contextlib.suppress(GitError):
            said = self.clone("grep", "-l", "-E", *words, commit, "--", "vllm/*.py")
        names = [line.partition(":")[2] for line in said.splitlines()]
        return [_module(name) for name in names if not name.endswith("/__main__.py")]

    def _modules(
        self, slot: Slot, commit: str, modules: list[str], stem: str
    ) -> tuple[Result, dict[str, str]]:
        """Import modules of a commit; return those that do not with their errors."""
        out = self.logs / f"{stem}.json"
        out.unlink(missing_ok=True)
        command = [str(self.target.python), "-c", IMPORT, str(out), *modules]
        result, status = self._call(slot, commit, command, stem)
        if status or not out.exists():
            result.why = result.why or "vLLM does not import"
            return result, {}
        found: dict[str, str] = json.loads(out.read_text())
        return result, {name: error for name, error in found.items() if error}

    def _pytest(
        self, slot: Slot, commit: str, file: str, more: list[str], stem: str
    ) -> Result:
        report = self.logs / f"{stem}.xml"
        report.unlink(missing_ok=True)
        command = runner.command(self.target.python, report, [file, *more])
        result, status = self._call(slot, commit, command, stem)
        if report.exists():
            for name, outcome, why in runner.outcomes(report):
                # A test that passes and fails when it is torn down is there twice.
                if result.outcomes.get(name) != "failed":
                    result.outcomes[name] = outcome
                if why:
                    result.reasons[name] = why
        if not result.why and status not in (0, 5) and not result.tests("failed"):
            # A conftest that does not import leaves no report.
            result.outcomes[_whole(file)] = "failed"
        folders = Path(file).parents
        conftests = [(folder / "conftest.py").as_posix() for folder in folders]
        result.names = sorted({*result.names, file, *conftests})
        result.seen = self.state(commit).seen(result.names)
        return result

    def _without(self, check: Check, slot: Slot) -> None:
        """See the patch's tests fail on the tree before it."""
        step = check.step
        after = {need.file: need.result for need in check.needs if need.result}
        passed = {file: set(one.tests("passed")) for file, one in after.items()}
        files = [file for file in step.own if passed.get(file)]
        state = self.state(step.stripped)
        skipped = self._skipped(step, after)
        if skipped or not files:
            check.shown = "skipped here"
            check.why = ", ".join(sorted(set(skipped)))
            return
        check.shown = "PASSES"
        for file in sorted(files, key=lambda file: after[file].seconds):
            # The first failure is mostly enough. Only that of a test that passes with
            # the patch counts.
            for more in (["--maxfail=1"], []):
                what = " ".join(["without", file, *more])
                result = self.store.find(what, state)
                if result is None:
                    stem = f"{step.name}-without-{_stem(file)}"
                    result = self._pytest(slot, step.stripped, file, more, stem)
                    self.store.add(what, result)
                check.result = result
                failed = result.tests("failed")
                if result.why:
                    check.shown = result.why
                    break
                if passed[file] & set(failed) or _whole(file) in failed:
                    result.keep = True
                    self.store.add(what, result)
                    check.shown = "fails"
                    return
                if not failed:
                    break

    def _skipped(self, step: Step, after: dict[str, Result]) -> list[str]:
        """Return why the patch's new and changed tests were skipped, if all were."""
        reasons = []
        for file, result in after.items():
            sources = []
            for commit in (step.before, step.after):
                there = file in self.state(commit).files
                name = f"{commit}:{file}"
                sources.append(self.clone("cat-file", "blob", name) if there else "")
            for test in changed_tests(*sources):
                # Of all parameters, and of all classes that have one of that name.
                ends = (f"::{test}", _whole(file))
                of = [n for n in result.outcomes if n.partition("[")[0].endswith(ends)]
                if not of or any(result.outcomes[name] != "skipped" for name in of):
                    return []
                reasons += [result.reasons.get(name, "") for name in of]
        return reasons


def changed_tests(before: str, after: str) -> list[str]:
    """Return the names of the tests that one form of a file has and another has not.

    Args:
        before: a test file, empty if there was none.
        after: what became of it.
    """
    try:
        was, now = (
            [
                (node.name, ast.dump(node))
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name.startswith("test_")
            ]
            for source in (before, after)
        )
    except SyntaxError:
        return []
    return list(dict.fromkeys(name for name, said in now if (name, said) not in was))


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()


def _module(name: str) -> str:
    """Return the module that a file is."""
    return re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")


def _stem(file: str) -> str:
    return re.sub(r"\W+", "-", file)


def _whole(file: str) -> str:
    """Return the name that a junit report gives a file that does not import."""
    return "::" + file.removesuffix(".py").replace("/", ".")


def keys(target: Host, release: Release) -> dict[str, str]:
    """Return, for each kind of check, a hash of what runs it.

    Args:
        target: the environment.
        release: the release.
    """
    settings = target.python.parent.parent
    layers = [*target.layers, str(build.packages(target.python))]
    run = _hash(
        target.kind,
        release.runtimes[target.kind].env,
        release.runtimes[target.kind].modules,
        [_packages(Path(layer)) for layer in layers],
        [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(target.wheel.rglob("*.so"))
        ],
        (settings / "hide.json").read_text(),
        *((ROOT / name).read_text() for name in HOOKS),
        sys.version,
    )
    tiny = (ROOT / "scripts" / "tiny_gemma4.py").read_text()
    how = runner.command(Path("python"), Path("report"), [])
    test = _hash(run, tiny, runner.STAND_INS, how)
    own = next((Path(path) for path in sys.path if path.endswith("-packages")), ROOT)
    return {
        "lint": _hash(_packages(own), (ROOT / "scripts" / "lint.py").read_text()),
        "import": _hash(run, IMPORT),
        "test": test,
        "without": test,
    }


def _packages(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.dist-info"))


def environment(release: Release, clone: Clone) -> Host:
    """Return the environment of the checks: a thin one, which imports any tree.

    Args:
        release: the release.
        clone: the checkout, see `build.host`.
    """
    target = build.environment(release, clone, "-verify")
    build.hook(target, None, release)
    site = build.packages(target.python)
    text = (ROOT / "scripts" / "verify_hook.py").read_text()
    console.write(site / f"{HOOK}.py", text)
    console.write(site / f"{HOOK}.pth", f"import {HOOK}\n")
    return target


def steps(clone: Clone, base: str, files: list[Path], folder: Path) -> list[Step]:
    """Return a series patch by patch.

    Args:
        clone: where its commits are made.
        base: the release's commit.
        files: the patches.
        folder: an empty folder to work in.
    """
    (folder / "derive").mkdir()
    commits = series.derive(clone, base, files, folder / "derive")
    made = []
    touched: dict[str, None] = {}
    for number, (path, before, after) in enumerate(
        zip(files, [base, *commits], commits, strict=False), 1
    ):
        work = folder / str(number)
        work.mkdir()
        stripped = series.graft(clone, before, after, "tests/", work)
        there = clone.files(after)
        own = [name for name in runner.touched([path]) if name in there]
        earlier = [name for name in touched if name in there and name not in own]
        touched |= dict.fromkeys(own)
        patch = lint.load(path)
        tree = clone("rev-parse", after + "^{tree}")
        made.append(Step(number, patch, before, after, stripped, own, earlier, tree))
    return made


def select(text: str, count: int) -> set[int]:
    """Return the numbers of the patches that PATCH= names.

    Args:
        text: such as "0007", "3-5", "3-" or "1,4"; empty for all.
        count: how many there are.

    Raises:
        Failure: it is none of these, or there is no such patch.
    """
    chosen: set[int] = set()
    for part in text.replace(",", " ").split():
        found = re.fullmatch(r"(\d{1,4})(-(\d{0,4}))?", part)
        if not found:
            raise Failure(f"PATCH={text} is unknown", "give such as 0007, 3-5 or 3-")
        first = int(found[1])
        last = int(found[3] or count) if found[2] else first
        if not 1 <= first <= last <= count:
            raise Failure(
                f"PATCH={text} is not in the series", f"it has 0001 to {count:04}"
            )
        chosen |= set(range(first, last + 1))
    return chosen or set(range(1, count + 1))


def unknown(
    clone: Clone, base: str, made: list[Step], release: Release, since: str, work: Path
) -> set[int]:
    """Return the numbers of the patches whose trees an earlier series has not.

    A patch is verified with the tree that it makes of the one before it. So all that
    follow a changed patch are new too, and one whose message or number alone changed
    is not. Where what runs the checks has changed, all are.

    Args:
        clone: where commits are made.
        base: the release's commit.
        made: the series.
        release: the release.
        since: a revision of this project.
        work: an empty folder to work in.

    Raises:
        Failure: there is no such revision.
    """
    every = {step.number for step in made}
    try:
        own = Clone(ROOT)
    except GitError:
        raise Failure(f"{ROOT} is no git checkout", "run it without SINCE=") from None
    commit = own.resolve(since)
    if not commit:
        raise Failure(
            f"SINCE={since} is no revision of this project",
            "give a commit, branch or tag of it",
        )
    for name in sources(release, build.device()):
        now, then = ROOT / name, ""
        with contextlib.suppress(GitError):
            then = own("show", f"{commit}:./{name}")
        said = now.read_text() if now.exists() else ""
        if _said(name, then, release) != _said(name, said, release):
            say(f"{name} differs from {since}'s: all patches")
            return every
    (work / "derive").mkdir()
    where = f"patches/{release.tag}"
    try:
        packed = work / "series.zip"
        own("archive", "-o", str(packed), commit, where)
        shutil.unpack_archive(packed, work)
        old = series.patches(work / where)
        commits = series.derive(clone, base, old, work / "derive")
    except (Failure, GitError):
        say(f"the series of {since} does not apply: all patches")
        return every
    trees = [clone("rev-parse", c + "^{tree}") for c in (base, *commits)]
    known = set(itertools.pairwise(trees))
    steps = itertools.pairwise([trees[0], *(step.tree for step in made)])
    return {
        step.number for step, pair in zip(made, steps, strict=True) if pair not in known
    }


def sources(release: Release, kind: str) -> list[str]:
    """Return the files that the environment of the checks is made from.

    Args:
        release: the release.
        kind: "cpu" or "cuda".
    """
    held = []
    if kind in release.runtimes:
        held.append(build.constraints(release, kind).relative_to(ROOT).as_posix())
    return ["pins.toml", *held, *HOOKS]


def _said(name: str, text: str, release: Release) -> object:
    """Return what a file of `sources` says of a release to checks."""
    if name == "pins.toml":
        pins = tomllib.loads(text).get("releases", {}).get(release.tag, {})
        return {key: said for key, said in pins.items() if key != "wheel"}
    return text.strip()


def checks(made: list[Step]) -> list[Check]:
    """Return what to find out about patches, in their order.

    Args:
        made: the patches.
    """
    listed: list[Check] = []
    last: dict[str, Check] = {}
    for step in made:
        listed += [Check(step, "lint"), Check(step, "import")]
        own = [Check(step, "test", file) for file in step.own]
        listed += own
        last |= {check.file: check for check in own}
        for file in step.earlier:
            # What this one finds out, the next may not have to.
            needs = [last[file]] if file in last else []
            last[file] = Check(step, "test", file, needs)
            listed.append(last[file])
        if own and NEUTRAL not in step.patch.subject:
            listed.append(Check(step, "without", needs=own))
    return listed


def _left(verifier: Verifier, pending: list[Check], jobs: int, mean: float) -> float:
    """Estimate the seconds that checks will take."""
    total = 0.0
    for check in pending:
        if check.kind == "without":
            total += verifier.store.guess(f"without {check.step.own[0]}") or mean
        elif not verifier.known(check):
            total += verifier.store.guess(check.what) or mean
    return total / jobs


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"


def perform(
    verifier: Verifier, listed: list[Check], free: list[Slot], deadline: float
) -> list[Check]:
    """Run checks, as many at a time as there are trees.

    Args:
        verifier: what runs them.
        listed: the checks.
        free: the trees.
        deadline: when to start no more, as of time.monotonic.

    Returns:
        The checks that were not reached.
    """
    jobs = len(free)
    # Each patch's own first, for there may be no time for more.
    pending = sorted(listed, key=lambda check: check.file in check.step.earlier)
    done = set[Check]()
    running: dict[Future[None], tuple[Check, Slot]] = {}
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn())
    begun = time.monotonic()
    with (
        ThreadPoolExecutor(jobs) as pool,
        Progress(
            *columns, TextColumn("{task.description}"), console=err, transient=True
        ) as bar,
    ):
        task = bar.add_task("", total=len(listed))
        try:
            while running or (pending and time.monotonic() < deadline):
                for check in list(pending):
                    if not free or time.monotonic() >= deadline:
                        break
                    if all(need in done for need in check.needs):
                        pending.remove(check)
                        slot = free.pop()
                        running[pool.submit(verifier.run, check, slot)] = (check, slot)
                ended, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in ended:
                    check, slot = running.pop(future)
                    free.append(slot)
                    future.result()
                    done.add(check)
                    mean = (time.monotonic() - begun) * jobs / len(done)
                    left = _left(verifier, pending, jobs, mean)
                    minutes = f"about {_minutes(left)} left"
                    now = ", ".join(check.title for check, _ in running.values())
                    bar.update(task, advance=1, description=f"{minutes} {now}")
                    of = [one for one in listed if one.step is check.step]
                    if done.issuperset(of):
                        found = sum(map(bad, of))
                        came = f"{found} FAILED" if found else "good"
                        came += f", {len(done)} of {len(listed)} checks"
                        say(f"{check.step.name}: {came}, {minutes}")
        except BaseException:
            verifier.stop()
            raise
    return pending


def bad(check: Check) -> bool:
    """Return whether a check that was run found something wrong."""
    if check.kind == "without":
        return check.shown not in ("fails", "skipped here", "")
    return check.result is not None and not check.result.good


def _cell(kind: str, files: list[str], of: list[Check], missed: list[Check]) -> str:
    """Return what the table says of a patch's checks of a kind, of tests on files."""
    group = [c for c in of if c.kind == kind and (kind != "test" or c.file in files)]
    unreached = sum(check in missed for check in group)
    if group and unreached == len(group):
        return "not reached"
    if kind == "without":
        if group:
            return group[0].shown
        return "a refactor: not asked" if files else "NO TESTS"
    if kind != "test":
        return "FAILS" if any(map(bad, group)) else "good"
    results = [check.result for check in group if check.result]
    numbers = {
        name: sum(len(one.tests(name)) for one in results)
        for name in ("passed", "failed", "skipped")
    }
    said = [", ".join(f"{n} {name}" for name, n in numbers.items() if n) or "-"]
    tree = next((check.step.tree for check in group), "")
    if carried := sum(one.tree != tree for one in results):
        said.append(f"{carried} of {len(files)} files carried")
    said += [one.why for one in results if one.why][:1]
    if unreached:
        said.append(f"{unreached} of {len(files)} files not reached")
    return "; ".join(said) if files else "none"


def table(made: list[Step], listed: list[Check], missed: list[Check]) -> Table:
    """Return what came of all patches.

    Args:
        made: the patches.
        listed: the checks.
        missed: those that were not reached.
    """
    heads = ("lines", "lint", "import", "its tests", "earlier tests", "without it")
    rows = Table("patch", *heads, "seconds", "upstream", box=None)
    for step in made:
        of = [check for check in listed if check.step is step]
        kinds = ("lint", "import", "test", "test", "without")
        of_files = (step.own, step.own, step.own, step.earlier, step.own)
        cells = [
            _cell(kind, files, of, missed)
            for kind, files in zip(kinds, of_files, strict=True)
        ]
        seconds = sum(
            c.result.seconds
            for c in of
            if c.result and (c.kind == "without" or c.result.tree == step.tree)
        )
        last = (f"{seconds:.0f}", step.patch.status or "none")
        rows.add_row(step.name, str(step.patch.lines), *cells, *last)
    return rows


def _failure(check: Check) -> Iterator[str]:
    """Yield what to show of a check that found something wrong."""
    result = check.result
    if check.kind == "without" or not result:
        said = f"its tests do not fail without it: {check.shown}"
        yield f"FAILED {check.step.name}: {said}"
        return
    yield f"FAILED {check.title}" + (f" ({result.why})" if result.why else "")
    yield from (f"  {name}" for name in result.tests("failed"))
    log = Path(result.log)
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()
        yield from (f"  | {line}" for line in lines[-60:])
        yield f"  all of it is in {show(log)}"


def _number(name: str, default: int) -> int:
    text = console.option(name)
    if text and not re.fullmatch(r"[1-9]\d*", text):
        raise Failure(
            f"{name}={text} is no number from 1 up", "give one, or leave it out"
        )
    return int(text or default)


def main() -> None:
    """Verify the series, or what PATCH= and SINCE= name."""
    release = pins.load(console.option("RELEASE"))
    folder = BUILD / f"verify-{release.tag}"
    begun = time.monotonic()
    minutes = _number("MINUTES", 24 * 60)
    jobs = _number("JOBS", 0)
    build.device()  # Says what is wrong with DEVICE=.
    full, partial = console.enabled("FULL"), console.enabled("PARTIAL")
    with console.lock(folder):
        with console.lock():
            clone, base = open_clone(release)
            files = series.patches(release.patches)
            if not files:
                raise Failure(
                    f"there are no patches for {release.tag}", "write some first"
                )
            chosen = select(console.option("PATCH"), len(files))
            with console.scratch() as scratch:
                made = steps(clone, base, files, scratch)
            if since := console.option("SINCE"):
                with console.scratch() as scratch:
                    chosen &= unknown(clone, base, made, release, since, scratch)
            made = [step for step in made if step.number in chosen]
            if not made:
                say("verify: no patch to verify")
                return
            target = environment(release, clone)
            more = runner.checkpoint(target)
        cores = console.cores()
        # A device has memory for one engine, and tests use two cores well.
        jobs = jobs or (1 if target.kind == "cuda" else max(1, cores // 2))
        if jobs > 1:
            more["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
        logs = BUILD / "reports" / folder.name
        logs.mkdir(parents=True, exist_ok=True)
        known = keys(target, release)
        store = Store(folder / "results", known, full)
        verifier = Verifier(clone, target, store, more, logs)
        listed = checks(made)
        free: list[Slot] = []
        for number in itertools.count():
            # What a killed run began may be at work in one.
            with contextlib.suppress(BlockingIOError):
                path = folder / f"tree-{number}"
                free.append(Slot(clone, base, path, target.wheel))
            if len(free) == jobs:
                break
        say(f"verify: {len(made)} of {count(len(files))}, {len(listed)} checks")
        missed = perform(verifier, listed, free, begun + 60 * minutes)
    _report(made, listed, missed, release, partial)


def _report(
    made: list[Step],
    listed: list[Check],
    missed: list[Check],
    release: Release,
    partial: bool,
) -> None:
    """Show and write what came of it, and end with its status."""
    rows = table(made, listed, missed)
    wrong = [check for check in listed if check not in missed and bad(check)]
    lines = [line for check in wrong for line in _failure(check)]
    skipped = [check for check in listed if check.shown == "skipped here"]
    said = "its tests are skipped here"
    lines += [f"SKIPPED {check.step.name}: {said}: {check.why}" for check in skipped]
    report = BUILD / "reports" / f"verify-{release.tag}.log"
    with report.open("w") as out:
        wide = type(err)(file=out, width=200, markup=False, emoji=False)
        wide.print(rows)
        out.writelines(line + "\n" for line in lines)
    err.print(rows)
    for line in lines:
        say(line)
    for step in made:
        if rest := [check.file or check.kind for check in missed if check.step is step]:
            say(f"NOT REACHED {step.name}: {', '.join(rest)}")
    if missed:
        say(f"{len(missed)} checks not reached: run it again to go on")
    none = [step.name for step in made if not step.own]
    note = f", {len(skipped)} skipped here" if skipped else ""
    note += f", {len(none)} without tests" if none else ""
    sys.stderr.flush()
    checks = f"{count(len(made))}, {len(listed) - len(missed)} checks"
    print(f"{checks}, {len(wrong)} failed{note} ({show(report)})", flush=True)
    if wrong or (missed and not partial):
        raise SystemExit(1)


if __name__ == "__main__":
    console.run(main)
