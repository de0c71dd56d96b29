# SPDX-License-Identifier: Apache-2.0
"""`make lint`: this project's files, and the series by vLLM's own rules."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts import console, pins, plots, report, results, series
from scripts.apply import (
    OWN,
    applied_ref,
    export_command,
    open_clone,
    unexported,
)
from scripts.bench import read
from scripts.console import BUILD, ROOT, Failure, say, show
from scripts.git import Clone, GitError, borrower, find
from scripts.pins import Release

WIDTH = 88
TITLE = 72
# vLLM's reviewers call more than this, outside of tests and docs, complex.
BIG = 250
SECTIONS = ("Purpose:", "Test Plan:", "Test Result:")
# OpenEmbedded's words; those that say where or why need it in brackets.
STATUS = re.compile(
    r"Pending( \[.+\])?|(Submitted|Backport|Denied|Inappropriate) \[.+\]"
)
# What is in no wheel, and what reviewers do not count.
UNSHIPPED = re.compile(r"(tests|docs|examples|benchmarks|\.buildkite)/|.*\.md$")
# What stands for a pre-commit `types` name: the hooks that run here use no other.
TYPES = {"python": ".py", "pyi": ".pyi", "rust": ".rs", "proto": ".proto"}

# What makes a number one that is measured: its unit. Times over something are "2.5x" or
# "2.5 times", while "8 x 280" is a batch.
UNITS = (
    r"(?:(?:n|u|m|micro|milli)?s(?:econds?)?|min(?:utes?)?|hours?|tok/s|req/s|times|%"
    r"|[kKMGT]i?B(?:/s)?|[GT]?FLOP(?:/s)?)(?![\w/])"
)
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
# Numbers share the unit that follows the last of them: "20.1 (18.0 to 22.5) ms".
MEASURED = re.compile(
    rf"(?<![\w.,])({NUMBER})(?=((?:\)? \(?(?:to |and |or )?{NUMBER})*\)?"
    rf" ?(?P<unit>{UNITS}))|(?P<times>x)(?!\w))"
)
HEAD = re.compile(rf"(?<![\w'/-]){UNITS}")
EXCEPTION = "<!-- not measured: "


@dataclass
class Patch:
    """A patch file taken apart."""

    subject: str = ""
    body: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    added: list[tuple[str, int, str]] = field(default_factory=list)
    lines: int = 0

    @property
    def title(self) -> str:
        """The subject without git's "[PATCH]"."""
        return self.subject.removeprefix("[PATCH] ")

    @property
    def status(self) -> str:
        """What the message says of upstream, empty if it says nothing."""
        said = (row for row in self.body if row.startswith("Upstream-Status:"))
        return next(said, "").partition(":")[2].strip()


def load(path: Path) -> Patch:
    """Take the patch of a file apart, whatever its bytes are; see `parse`."""
    return parse(path.read_bytes().decode(errors="replace"))


def parse(text: str) -> Patch:
    """Take a patch apart.

    Args:
        text: the file, line ends as they are.

    Returns:
        Its subject, message, files, added lines as (file, line, text) and the
        number of lines changed outside of tests and docs.
    """
    patch = Patch()
    head, _, rest = text.partition("\n\n")
    found = re.search(r"(?m)^Subject: (.*(?:\n[ \t].*)*)", head)
    patch.subject = re.sub(r"\n[ \t]", " ", found[1]) if found else ""
    message, mark, diff = rest.partition("\ndiff --git ")
    patch.body = message.removesuffix("---").removesuffix("---\n").split("\n")
    name, line, old, new = "", 0, 0, 0
    for row in (mark + diff).split("\n"):
        if old <= 0 and new <= 0:
            if start := re.match(r"diff --git a/.* b/(.*)$", row):
                name = start[1]
                patch.files.append(name)
            elif hunk := re.match(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", row):
                old, new = int(hunk[1] or 1), int(hunk[3] or 1)
                line = int(hunk[2])
            continue
        aside = UNSHIPPED.match(name)
        if row.startswith("+"):
            patch.added.append((name, line, row[1:]))
            patch.lines += not aside
            new, line = new - 1, line + 1
        elif row.startswith("-"):
            patch.lines += not aside
            old -= 1
        elif not row.startswith("\\"):
            old, new, line = old - 1, new - 1, line + 1
    return patch


def header(patch: Patch) -> Iterator[str]:
    """Find what a patch's header lacks.

    Args:
        patch: the patch.

    Yields:
        One line a finding.
    """
    titled = re.fullmatch(r"\[PATCH\] ((?:\[[A-Z][^\]]*\])+ \S.*)", patch.subject)
    if not titled:
        yield "the subject is not `[PATCH] [Tag] Title`, such as [Model][Bugfix]"
    elif len(titled[1]) > TITLE:
        yield f"the title has {len(titled[1])} columns, more than {TITLE}"
    at = -1
    for section in SECTIONS:
        places = [n for n, row in enumerate(patch.body) if row.startswith(section)]
        if not places:
            yield f"the message has no `{section}`"
            continue
        if places[0] < at:
            yield f"`{section}` is not in the order {' '.join(SECTIONS)}"
        at = places[0]
        said = patch.body[at].removeprefix(section)
        for row in patch.body[at + 1 :]:
            if row.startswith((*SECTIONS, "Upstream-Status:")):
                break
            said += row
        if not said.strip():
            yield f"`{section}` is empty"
    said_status = [row for row in patch.body if row.startswith("Upstream-Status:")]
    last = [row for row in patch.body if row.strip()][-1:]
    if len(said_status) != 1:
        yield f"the message has {len(said_status)} `Upstream-Status:` lines, not one"
    else:
        if not STATUS.fullmatch(said_status[0].partition(":")[2].strip()):
            yield (
                "`Upstream-Status:` is none of Pending, Submitted [where], "
                "Backport [version], Denied [why], Inappropriate [why]"
            )
        if not re.match(r"[A-Z][A-Za-z-]+: ", last[0]):
            yield "`Upstream-Status:` is not in the message's last paragraph"
    for row in patch.body:
        if re.match(r"signed-off-by:", row, re.IGNORECASE):
            yield "it has a Signed-off-by: whoever submits the patch signs it off"
        if len(row) > WIDTH and " " in row.strip() and "://" not in row:
            yield f"a line of the message has {len(row)} columns: {row[:40]}..."


def column(page: str, head: str) -> Iterator[tuple[str, str]]:
    """Read a column of a document's tables of patches.

    Args:
        page: a document whose rows begin with a patch's number.
        head: the column's.

    Yields:
        A patch's number and what its row has there.
    """
    at = -1
    for row in page.splitlines():
        if not row.startswith("|"):
            at = -1
            continue
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if head in cells:
            at = cells.index(head)
        elif 0 <= at < len(cells) and re.fullmatch(r"\d{4}", cells[0]):
            yield cells[0], cells[at]


def standing(page: str, patches: dict[str, Patch]) -> Iterator[str]:
    """Find rows of a table of patches that say another upstream status than they do.

    Args:
        page: a document, see `column`. The column is headed "upstream"; a pending
            patch is "not submitted" there.
        patches: the series by number.

    Yields:
        One line a finding.
    """
    for number, said in column(page, "upstream"):
        if not (patch := patches.get(number)):
            continue
        wanted = patch.status.replace("Pending", "not submitted")
        if said != wanted:
            yield f"{number} is `{said}`, the patch says `{wanted}`"


def text(patch: Patch) -> Iterator[str]:
    """Find what is wrong with the lines that a patch adds.

    Args:
        patch: the patch.

    Yields:
        One line a finding.
    """
    for name, number, row in patch.added:
        where = f"{name}:{number}:"
        if row.endswith("\r"):
            yield f"{where} CRLF line end"
        elif row != row.rstrip():
            yield f"{where} trailing whitespace"
        if re.match(r"\t* +\t", row):
            yield f"{where} space before tab"
        if not name.endswith((".py", ".pyi")):
            continue
        if "\t" in row:
            yield f"{where} tab"
        if len(row) > WIDTH and "://" not in row and "noqa" not in row:
            yield f"{where} {len(row)} columns, more than {WIDTH}"
    for name in dict.fromkeys(patch.files):
        rows = [row for row in patch.added if row[0] == name]
        if (
            name.endswith(".py")
            and rows
            and rows[0][1] == 1
            and "SPDX" not in rows[0][2]
        ):
            yield f"{name}:1: no SPDX header"


def numbering(files: list[Path]) -> Iterator[str]:
    """Find gaps in the numbers of a series.

    Yields:
        One line a finding.
    """
    for wanted, path in enumerate(files, 1):
        if not path.name.startswith(f"{wanted:04}-"):
            yield f"{path.name}: the number should be {wanted:04}"
            return


def numbers(text: str) -> Iterator[tuple[int, str, str]]:
    """Find the measured numbers of a text: those with a unit.

    A cell of a table has the unit of its column's head, where it has none itself. A
    line that ends with a comment `not measured: why` has none.

    Args:
        text: in Markdown.

    Yields:
        Lines from 1, numbers without commas and their units.
    """
    heads: list[str] = []
    for at, line in enumerate(text.splitlines(), 1):
        cells = line.strip().strip("|").split("|") if line.startswith("|") else []
        units = [found[0] if (found := HEAD.search(head)) else "" for head in heads]
        if EXCEPTION not in line:
            for found in MEASURED.finditer(line):
                yield at, found[1].replace(",", ""), found["unit"] or found["times"]
            for cell, unit in zip(cells, units, strict=False):
                if unit and not MEASURED.search(cell):
                    for number in re.findall(rf"(?<![\w.,]){NUMBER}", cell):
                        yield at, number.replace(",", ""), unit
        heads = heads or cells if cells else []


def measured(root: Path) -> Iterator[str]:
    """Find numbers in README.md and docs/ that no benchmark has given.

    One that stands in the report for something else is not found, nor are words.

    Yields:
        One line a finding.
    """
    page = root / "docs" / "benchmarks.md"
    text = page.read_text() if page.exists() else ""
    known = {(number, unit) for _, number, unit in numbers(text)}
    for path in (root / "README.md", *sorted(root.glob("docs/*.md"))):
        if not path.exists():
            continue
        for at, number, unit in numbers(path.read_text()):
            if (number, unit) not in known:
                yield (
                    f"{path.relative_to(root)}:{at}: {number} {unit} is not in "
                    f"docs/benchmarks.md: say what is, or why with {EXCEPTION}... -->"
                )


def benchmarks(folder: Path) -> Iterator[str]:
    """Find where a report is not the one that its results give.

    Args:
        folder: of the results and plots; the text has its name.

    Yields:
        One line a finding.
    """
    page = folder.with_suffix(".md")
    name = f"{folder.parent.name}/{page.name}"
    try:
        lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read(file)]
        devices = results.latest(lines, folder.name)
    except Failure as failure:
        yield str(failure)
        return
    if not devices:
        if page.exists():
            yield f"{name}: there are no results that it could be of"
        return
    if not page.exists() or page.read_text() != report.write(devices):
        yield f"{name}: not what its results give: run `make report`"
    wanted = {plot.file for device in devices for plot in plots.figures(device)}
    there = {path.name for path in folder.glob("*.png")}
    for file in sorted(wanted - there):
        yield f"{name}: there is no {folder.name}/{file}: run `make report`"
    for file in sorted(there - wanted):
        yield f"{name}: does not show {folder.name}/{file}: remove it"


class Lint:
    """Findings so far."""

    def __init__(self) -> None:
        self.count = 0

    def report(self, line: str) -> None:
        """Print a finding."""
        self.count += 1
        print(line, flush=True)

    def own(self) -> None:
        """Check scripts/, tests/ and docs/."""
        say("lint: ruff and mypy on scripts/ and tests/")
        where = [name for name in ("scripts", "tests") if (ROOT / name).is_dir()]
        tests = sorted((ROOT / "tests").glob("*/conftest.py"))
        folders = ["scripts", *(f"tests/{path.parent.name}" for path in tests)]
        for command in (
            ["ruff", "check", "--quiet", "--output-format=concise", *where],
            ["ruff", "format", "--check", "--quiet", *where],
            # One call a folder: each has a conftest.
            *(["mypy", "--no-error-summary", name] for name in folders),
        ):
            for line in _call(command, ROOT):
                self.report(line)
        say("lint: docs/benchmarks.md and the numbers of the other texts")
        for line in (*benchmarks(report.RESULTS), *measured(ROOT)):
            self.report(line)

    def wheels(self) -> None:
        """Check that pins.toml has each series by the number that its wheel gets."""
        from scripts import wheel  # which needs this module itself

        say("lint: the numbers of the wheels in pins.toml")
        with console.lock():
            for release in map(pins.load, pins.tags()):
                if not any(release.patches.glob("*.patch")):
                    continue
                try:
                    changes = wheel.payload(release)
                except Failure as failure:
                    # Such as a clone that has not this release.
                    tag = release.tag
                    say(f"warning: the number of {tag} is not checked ({failure})")
                    continue
                content = wheel.digest(changes, wheel.titles(release))
                try:
                    wheel.number(release, content, bump=False)
                except Failure as failure:
                    self.report(f"pins.toml: {failure}")

    def series(self, release: Release) -> None:
        """Check the patches."""
        try:
            files = series.patches(release.patches)
        except Failure as failure:
            self.report(str(failure))
            return
        for line in numbering(files):
            self.report(line)
        changed: dict[str, list[str]] = {}
        known: dict[str, Patch] = {}
        for path in files:
            raw = path.read_bytes()
            if series.crlf(raw):
                self.report(f"{path.name}: CRLF line ends")
                continue
            patch = known[path.name[:4]] = parse(raw.decode(errors="replace"))
            for line in (*header(patch), *text(patch)):
                self.report(f"{path.name}: {line}")
            if patch.lines > BIG:
                say(
                    f"warning: {path.name}: {patch.lines} lines outside of tests and "
                    f"docs, more than {BIG}"
                )
            for name in patch.files:
                changed.setdefault(name, []).append(path.name)
        if release == pins.load():
            for name in ("README.md", "docs/maintaining.md"):
                page = ROOT / name
                for line in standing(page.read_text() if page.exists() else "", known):
                    self.report(f"{name}: {line}")
        _unwritten(release)
        if not files:
            say(f"lint: no patches for {release.tag}")
            return
        with console.lock():
            self._tree(release, files, changed)

    def _tree(
        self, release: Release, files: list[Path], changed: dict[str, list[str]]
    ) -> None:
        clone, base = open_clone(release)
        with console.scratch() as folder:
            for name in ("derive", "write", "made"):
                (folder / name).mkdir()
            try:
                commits = series.derive(clone, base, files, folder / "derive")
            except Failure as failure:
                self.report(str(failure).split(": the checkout is as it was")[0])
                return
            made = series.write(clone, commits, folder / "write", folder / "made")
            for path, again in zip(files, made, strict=True):
                if path.name != again.name:
                    self.report(f"{path.name}: the name should be {again.name}")
                elif path.read_bytes() != again.read_bytes():
                    self.report(
                        f"{path.name}: not as `make export` writes it: run "
                        f"`{console.make('apply export')}`"
                    )
        say(f"lint: vLLM's own checks on the files of the series, {len(changed)}")
        tree = checkout(clone, commits[-1], BUILD / f"lint-{release.tag}").path
        there = [name for name in sorted(changed) if (tree / name).is_file()]
        for line in upstream(tree, there):
            found = re.search(r"[\w./-]+/[\w.-]+|[\w-]+\.\w+", line)
            owner = changed.get(found[0]) if found else None
            self.report(f"{', '.join(owner)}: {line}" if owner else line)


def checkout(clone: Clone, tip: str, tree: Path) -> Clone:
    """Return a commit's files in a tree apart from the one people work in.

    Args:
        clone: where the commit is.
        tip: the commit.
        tree: where the tree is, made if it is not there.
    """
    try:
        own = Clone(tree)
        own("checkout", "-q", "-f", "--detach", tip)
    except GitError:
        console.remove(tree)
        # `git clone` takes no commit that no ref leads to from a shallow clone.
        own = borrower(tree, clone)
        own("checkout", "-q", "-f", "--detach", tip)
    own("clean", "-q", "-f", "-d")
    return own


def _call(command: list[str], cwd: Path) -> list[str]:
    """Run a check; return its lines if it fails."""
    tools = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for name in ("PYTHONPATH", "MYPYPATH", "VLLM", "PYTHON"):
        env.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    if not done.returncode:
        return []
    plain = re.sub("\x1b\\[[0-9;]*m", "", done.stdout + done.stderr)
    said = [
        line.rstrip()
        for line in plain.splitlines()
        if line.strip() and not line.startswith(("$ ", "Success: ", "Found "))
    ]
    return said or [f"{shlex.join(command[:3])} failed with {done.returncode}"]


def upstream(tree: Path, files: list[str]) -> Iterator[str]:
    """Run vLLM's ruff, typos and its hooks that need nothing but Python.

    Args:
        tree: a checkout of vLLM that may be changed.
        files: those of it to check.

    Yields:
        One line a finding.
    """
    config = yaml.safe_load((tree / ".pre-commit-config.yaml").read_text())
    python = [name for name in files if name.endswith((".py", ".pyi"))]
    for repo in config["repos"]:
        for project in ("ruff", "typos"):
            if repo["repo"].endswith((f"/{project}", f"/{project}-pre-commit")):
                ours = importlib.metadata.version(project)
                if repo["rev"] != f"v{ours}":
                    yield f"pyproject.toml: {project} {ours}, vLLM has {repo['rev']}"
    if python:
        yield from _call(
            ["ruff", "check", "--quiet", "--output-format=concise", *python], tree
        )
        yield from _call(["ruff", "format", "--check", "--quiet", *python], tree)
    if files:
        # Without any it would take them all.
        yield from _call(["typos", "--force-exclude", "--format=brief", *files], tree)
    excluded = re.compile(config.get("exclude", "^$"))
    hooks: list[dict[str, Any]] = [
        hook
        for repo in config["repos"]
        if repo["repo"] == "local"
        for hook in repo["hooks"]
        if hook["entry"].startswith("python tools/")
    ]
    own = Clone(tree)
    for hook in hooks:
        ends = tuple(TYPES[t] for t in hook.get("types_or", hook.get("types", ())))
        named = [
            name
            for name in files
            if re.search(hook.get("files", ""), name)
            and not re.search(hook.get("exclude", "^$"), name)
            and not excluded.search(name)
            and (not ends or name.endswith(ends))
        ]
        if not named:
            continue
        command = [sys.executable, *shlex.split(hook["entry"])[1:]]
        if hook.get("pass_filenames", True):
            command += named
        for line in _call(command, tree):
            yield line.removeprefix("❌ ").removeprefix("Error: ")
        for name in own.dirty():
            yield f"{name}: {hook['id']} would change it"
        own("checkout", "-q", "-f", ".")


def _unwritten(release: Release) -> None:
    """Warn of commits that are not checked, as `patches/` has not got them."""
    given = console.option("VLLM")
    path = Path(given) if given else OWN
    if not (path / ".git").exists():
        return
    clone = find(path)
    base = clone.resolve(f"refs/tags/{release.tag}")
    if unexported(clone, release.branch, base, applied_ref(release)):
        say(
            f"warning: {release.branch} in {show(clone.path)} has commits that are not "
            "checked, as patches/ has not got them: "
            f"`{export_command(clone, release.tag)}` first"
        )


def main() -> None:
    """Check everything, or what STAGE names: own or patches."""
    stage = console.option("STAGE") or "all"
    if stage not in ("all", "own", "patches"):
        raise Failure(f"STAGE={stage} is unknown", "lint has own and patches")
    release = pins.load(console.option("RELEASE"))
    lint = Lint()
    if stage in ("all", "own"):
        lint.own()
        lint.wheels()
    if stage in ("all", "patches"):
        lint.series(release)
    if lint.count:
        say(f"lint: {lint.count} finding{'s' if lint.count > 1 else ''}")
        raise SystemExit(1)
    say("lint: clean")


if __name__ == "__main__":
    console.run(main)
