# SPDX-License-Identifier: Apache-2.0
"""A series of patches as commits, and commits as a series of patches."""

import re
from dataclasses import dataclass
from pathlib import Path

from scripts import console
from scripts.console import Failure, show
from scripts.git import EMAIL, NAME, Clone, GitError, Scratch

# Everything that a git version or a setting could choose otherwise.
FORMAT = (
    "--zero-commit",
    "--no-signature",
    "--full-index",
    "--no-stat",
    "--no-renames",
    "--no-numbered",
    "--no-attach",
    "--no-thread",
    "--no-to",
    "--no-cc",
    "--no-from",
    "--no-base",
    "--no-notes",
    "--no-add-header",
    "--no-encode-email-headers",
    "--subject-prefix=PATCH",
    "--suffix=.patch",
    "--filename-max-length=64",
    "--binary",
    "--unified=3",
    "--inter-hunk-context=0",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--no-relative",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--ignore-submodules=none",
)


@dataclass(frozen=True)
class Content:
    """What a commit says, less who committed it and when."""

    tree: str
    author: str
    message: str


class Conflict(Failure):
    """A patch that does not apply.

    Args:
        patch: its file.
        why: the file and hunk.
        good: the commits of the patches before it.
        rest: this patch and those after it.
    """

    def __init__(
        self, patch: Path, why: str, good: list[str], rest: list[Path]
    ) -> None:
        super().__init__(
            f"{show(patch)} does not apply to {why}",
            f"the checkout is as it was; `{console.make('apply CONTINUE=1')}` stops "
            "there for `git am --continue`",
        )
        self.good, self.rest = good, rest


def patches(folder: Path) -> list[Path]:
    """Return the files of a series in order.

    Args:
        folder: where they are.

    Raises:
        Failure: two have one number, or one has none.
    """
    found = sorted(folder.glob("*.patch"))
    seen: dict[str, Path] = {}
    for path in found:
        number = re.match(r"(\d{4})-", path.name)
        if not number:
            raise Failure(
                f"{show(path)} has no number", "name it as `make export` would"
            )
        other = seen.setdefault(number[1], path)
        if other is not path:
            raise Failure(
                f"{show(path)} and {other.name} have one number",
                "keep one, or give the other a number that none has",
            )
    return found


def content(raw: bytes) -> Content:
    """Return the content of a commit object."""
    head, _, message = raw.decode(errors="surrogateescape").partition("\n\n")
    fields = dict(line.partition(" ")[::2] for line in head.split("\n"))
    return Content(fields["tree"], fields["author"], message.strip("\n"))


def crlf(mail: bytes) -> bool:
    """Return whether a patch has line ends that git would not have written.

    Args:
        mail: the file. Lines that it adds to files may have them.
    """
    message, _, diff = mail.partition(b"\ndiff --git ")
    heads = rb"(?m)^(diff --git |index |@@ -)[^\n]*\r$"
    return b"\r\n" in message or bool(re.search(heads, b"diff --git " + diff))


def derive(clone: Clone, base: str, files: list[Path], folder: Path) -> list[str]:
    """Make the commits of a series: the same on every machine for one base.

    Only objects are written: no branch, index or file of the clone is touched.

    Args:
        clone: where.
        base: the commit to start from.
        files: the patches in order.
        folder: an empty folder to work in.

    Returns:
        One commit a patch.

    Raises:
        Conflict: a patch does not apply.
        Failure: a file is no patch.
    """
    _fetch_lazy(clone, base, files)
    git = Scratch(clone, folder)
    git("read-tree", base)
    commits: list[str] = []
    for at, path in enumerate(files):
        mail = path.read_bytes()
        if crlf(mail):
            raise Failure(
                f"{show(path)} has CRLF line ends",
                "get it again with core.autocrlf off",
            )
        message, diff = folder / "message", folder / "diff"
        try:
            info = git(
                "mailinfo",
                *("-b", "--no-scissors", "--encoding=UTF-8"),
                str(message),
                str(diff),
                data=mail,
            ).decode()
            # What it does to files may be in any encoding.
            said = message.read_bytes().decode()
        except GitError as error:
            raise Failure(
                f"{show(path)} is no patch ({_line(str(error))})", "see `make export`"
            ) from None
        except UnicodeDecodeError:
            raise Failure(
                f"{show(path)} is not UTF-8",
                "save it as such, or get it again with `git checkout`",
            ) from None
        fields = dict(re.findall(r"(?m)^(\w+): (.*)$", info))
        if missing := {"Author", "Email", "Subject", "Date"} - fields.keys():
            raise Failure(
                f"{show(path)} has no {sorted(missing)[0].lower()}",
                "give it one, as `git format-patch` would",
            )
        if not diff.read_bytes().strip():
            raise Failure(f"{show(path)} changes nothing", "remove it")
        try:
            git("apply", "--cached", "--whitespace=nowarn", str(diff))
        except GitError as error:
            corrupt = re.search(r"corrupt patch at (?:line |.*:)(\d+)", str(error))
            if corrupt:
                raise Failure(
                    f"{show(path)} is corrupt (line {corrupt[1]} of its diff)",
                    "mend it, or get it again with `git checkout`",
                ) from None
            if error.denied:
                raise
            why = _hunk(str(error), diff.read_bytes().decode(errors="replace"))
            raise Conflict(path, why, commits, files[at:]) from None
        text = git("stripspace", data=f"{fields['Subject']}\n\n{said}".encode())
        # A partial clone has only what is asked for.
        tree = git("write-tree", "--missing-ok").decode().strip()
        try:
            commit = git(
                *("commit-tree", tree, "-p", commits[-1] if commits else base),
                data=text,
                GIT_AUTHOR_NAME=fields["Author"],
                GIT_AUTHOR_EMAIL=fields["Email"],
                GIT_AUTHOR_DATE=fields["Date"],
                GIT_COMMITTER_NAME=NAME,
                GIT_COMMITTER_EMAIL=EMAIL,
                GIT_COMMITTER_DATE=fields["Date"],
            )
        except GitError as error:
            if error.denied:
                raise
            raise Failure(
                f"{show(path)} makes no commit ({_line(str(error))})",
                "mend its From: or Date:, as `git format-patch` would write them",
            ) from None
        commits.append(commit.decode().strip())
    return commits


def graft(clone: Clone, onto: str, commit: str, inside: str, folder: Path) -> str:
    """Make a commit of another one's changes to the files of one folder alone.

    Args:
        clone: where; only objects are written.
        onto: the commit to start from.
        commit: the one that has the changes.
        inside: the folder, such as "tests/".
        folder: an empty folder to work in.

    Returns:
        The commit, `onto` if nothing in the folder differs.
    """
    git = Scratch(clone, folder)
    raw = git("diff-tree", "-r", "-z", "--no-renames", onto, commit, "--", inside)
    parts = raw.split(b"\0")
    if len(parts) < 2:
        return onto
    index = b""
    for said, name in zip(parts[0::2], parts[1::2], strict=False):
        _, mode, _, blob, _ = said.split()
        index += b"%s %s 0\t%s\0" % (mode, blob, name)
    git("read-tree", onto)
    git("update-index", "-z", "--index-info", data=index)
    tree = git("write-tree", "--missing-ok").decode().strip()
    date = git("show", "-s", "--format=%cI", commit).decode().strip()
    made = git(
        *("commit-tree", tree, "-p", onto),
        data=b"Only " + inside.encode() + b" of the next commit\n",
        GIT_AUTHOR_NAME=NAME,
        GIT_AUTHOR_EMAIL=EMAIL,
        GIT_AUTHOR_DATE=date,
        GIT_COMMITTER_DATE=date,
    )
    return made.decode().strip()


def _fetch_lazy(clone: Clone, base: str, files: list[Path]) -> None:
    # A clone made with --filter gets blobs only when its own git asks for them.
    try:
        clone(
            "config",
            "--get-regexp",
            r"^(extensions\.partialclone|remote\..*\.promisor)$",
        )
    except GitError:
        return
    names = {
        name
        for path in files
        for name in re.findall(rb"(?m)^diff --git a/(\S+) b/", path.read_bytes())
    }
    asked = b"".join(b"%s:%s\n" % (base.encode(), name) for name in sorted(names))
    clone("cat-file", "--batch-check", data=asked)


def _line(said: str) -> str:
    return said.split("\n")[0].removeprefix("error: ").removeprefix("fatal: ")


def _hunk(said: str, diff: str) -> str:
    """Say which file and hunk `git apply` stumbled over."""
    failed = re.findall(r"(?m)^error: patch failed: (.*):(\d+)$", said)
    if not failed:
        return _line(said)
    name, line = failed[0]
    of_file = re.split(r"(?m)^diff --git ", diff)
    hunks = next(
        (
            re.findall(r"(?m)^@@ -(\d+)", part)
            for part in of_file
            if f"\n--- a/{name}\n" in part
        ),
        [],
    )
    at = f"hunk {hunks.index(line) + 1} of {len(hunks)} " if line in hunks else ""
    more = f", nor to {', '.join(n for n, _ in failed[1:])}" if failed[1:] else ""
    return f"{name}, {at}(line {line}){more}"


def write(clone: Clone, commits: list[str], folder: Path, out: Path) -> list[Path]:
    """Write commits as patches, the same bytes on every machine.

    Args:
        clone: where they are.
        commits: in order.
        folder: an empty folder to work in.
        out: an empty folder for the files.

    Returns:
        The files.
    """
    git = Scratch(clone, folder)
    files = []
    for number, commit in enumerate(commits, 1):
        named = git(
            "format-patch",
            *FORMAT,
            f"--start-number={number}",
            f"--output-directory={out}",
            "-1",
            commit,
        )
        files.append(Path(named.decode().strip()))
    return files
