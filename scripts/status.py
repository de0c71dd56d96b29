# SPDX-License-Identifier: Apache-2.0
"""`make status`: which patches a release has already."""

import re
from dataclasses import dataclass
from pathlib import Path

from scripts import console, pins, rebase
from scripts.apply import open_own
from scripts.console import Failure, say
from scripts.git import Clone, GitError, Scratch
from scripts.lint import load


@dataclass(frozen=True)
class Taken:
    """How much of a patch a release has: hunks by file, and all of them."""

    here: dict[str, int]
    hunks: int

    def __str__(self) -> str:
        have = sum(self.here.values())
        if have == self.hunks:
            return "taken"
        if not have:
            return "-"
        return f"{have} of {self.hunks} hunks ({', '.join(self.here)})"


def hunks(diff: bytes) -> list[tuple[str, bytes]]:
    """Return a diff's hunks, each as (file, a diff of its own).

    A change without hunks, such as that of a mode or a binary file, is one.

    Args:
        diff: what `git diff-tree -p` printed.
    """
    found = []
    for part in re.split(rb"(?m)^(?=diff --git )", diff)[1:]:
        head, *rest = re.split(rb"(?m)^(?=@@ -)", part)
        line = head.split(b"\n")[0].decode(errors="surrogateescape")
        name = line.rpartition(" b/")[2].rstrip('"')
        found += [(name, head + hunk) for hunk in rest] or [(name, head)]
    return found


def taken(clone: Clone, commits: list[str], onto: str, folder: Path) -> list[Taken]:
    """Return how much of each patch of a series a commit has.

    A hunk is there if it can be taken away. The last patch is asked first and what
    is found is taken away, so that the patches before it are seen as they were.

    Args:
        clone: where the commits are.
        commits: the series.
        onto: the commit to ask.
        folder: an empty folder to work in.
    """
    git = Scratch(clone, folder)
    git("read-tree", onto)
    answers = []
    for commit in reversed(commits):
        diff = git(
            "diff-tree", "-p", "--full-index", "--binary", "--no-renames", commit
        )
        parts = hunks(diff)
        here: dict[str, int] = {}
        if _take_away(git, diff):
            for name, _ in parts:
                here[name] = here.get(name, 0) + 1
        else:
            # A hunk's line numbers count on those before it: the last one first.
            for name, part in reversed(parts):
                if _take_away(git, part):
                    here[name] = here.get(name, 0) + 1
        answers.append(Taken(dict(sorted(here.items())), len(parts)))
    return answers[::-1]


def _take_away(git: Scratch, diff: bytes) -> bool:
    # Of a file's mode git only warns.
    modes = re.findall(rb"(?m)^diff --git .* b/(.*)\nold mode .*\nnew mode (.*)$", diff)
    for name, mode in modes:
        if not git("ls-files", "--stage", "--", name.decode()).startswith(mode):
            return False
    try:
        git("apply", "--cached", "--reverse", "--whitespace=nowarn", data=diff)
    except GitError:
        return False
    return True


def status() -> None:
    """Print what each other release, or the one that `TO=` names, has.

    Raises:
        Failure: there is nothing to ask.
    """
    release = pins.load(console.option("RELEASE"))
    clone = rebase.checkout()
    if state := rebase.load(clone):
        at = f"stopped at {state.next}" if state.stopped else "to be run again"
        say(f"a rebase to {state.name} is under way, {at}")
    # Not in a person's clone: a base that it has not whole would be written there.
    clone, old = open_own(release)
    if console.option("TO") or console.option("TO_DIR"):
        targets = [rebase.target(clone)]
    else:
        known = pins.tags()
        targets = [
            rebase.Target(tag, rebase.base(clone, pins.load(tag)))
            for tag in known[known.index(release.tag) + 1 :]
        ]
    if not targets:
        raise Failure(
            f"pins.toml has no release after {release.tag}",
            "give TO_DIR= a clone of vLLM at the commit to ask",
        )
    files, commits = rebase.derive(clone, release, old)
    rows = [[path.name] for path in files]
    for path, row in zip(files, rows, strict=True):
        row.append(load(path).status)
    for to in targets:
        with console.scratch() as folder:
            answers = taken(clone, commits, to.commit, folder)
        for row, answer in zip(rows, answers, strict=True):
            row.append(str(answer))
    heads = ["patch", "upstream status", *(f"in {to.name}" for to in targets)]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def main() -> None:
    """Show the status."""
    with console.lock():
        status()


if __name__ == "__main__":
    console.run(main)
