# SPDX-License-Identifier: Apache-2.0
"""git without the person's settings, hooks and variables in the way."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

from scripts.console import ROOT, Failure, show

NAME = "vllm-gemma4 authors"
EMAIL = "vllm-gemma4@users.noreply.invalid"

# What a person's settings could change in a command that works on their clone.
# Settings of the working tree (line ends, excludes) stay theirs.
OVERRIDES = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.quotePath": "false",
    "color.ui": "false",
    "commit.gpgSign": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "submodule.recurse": "false",
    "advice.detachedHead": "false",
    "am.threeWay": "false",
    "am.keepcr": "false",
    "apply.whitespace": "nowarn",
    "apply.ignoreWhitespace": "no",
    "mailinfo.scissors": "false",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "status.showUntrackedFiles": "normal",
    "status.renames": "false",
    "rerere.enabled": "false",
}

# Left under way by a person: none of these is ours to end.
UNDER_WAY = {
    "rebase-merge": "rebase",
    "rebase-apply/applying": "git am",
    "rebase-apply": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "BISECT_LOG": "bisect",
    # Of several commits, between two of them.
    "sequencer": "cherry-pick or revert",
}


DENIED = re.compile(
    "insufficient permission|[Pp]ermission denied|Read-only file system|"
    "unable to (create|write)|No space left"
)


class GitError(Exception):
    """A git command that failed; the text is what it printed.

    Args:
        said: the text.
        at: where it worked.
    """

    def __init__(self, said: str, at: Path) -> None:
        super().__init__(said)
        self.at = at

    @property
    def files(self) -> list[str]:
        """The files that are in the way, as git lists them."""
        lines = str(self).split("\n")
        return [line.strip() for line in lines if line.startswith("\t")]

    @property
    def denied(self) -> str:
        """The line that says that something cannot be written, empty if none does."""
        lines = str(self).split("\n")
        return next((line for line in lines if DENIED.search(line)), "")

    def failure(self) -> Failure:
        """Return what to tell a person where nobody knows more than git."""
        line = self.denied or str(self).split("\n")[0]
        said = re.sub(r"^(fatal|error): ", "", line)
        if self.denied:
            return Failure(
                f"{show(self.at)} cannot be written ({said})",
                "check its owner and the space left",
            )
        return Failure(
            f"git failed in {show(self.at)} ({said})", "mend that and run this again"
        )


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for git, less what would change what it does."""
    keep = (
        *("GIT_SSL", "GIT_SSH", "GIT_ASKPASS", "GIT_PROXY", "GIT_TRACE"),
        *("GIT_EXEC_PATH", "GIT_CONFIG_GLOBAL"),
    )
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith(keep)
    }
    env |= {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_COMMITTER_NAME": NAME,
        "GIT_COMMITTER_EMAIL": EMAIL,
    }
    return env | extra


def _call(
    command: list[str], data: bytes | None, env: dict[str, str], at: Path
) -> bytes:
    done = subprocess.run(command, input=data, capture_output=True, env=env)
    if done.returncode:
        raise GitError(
            (done.stderr + done.stdout).decode(errors="replace").strip()
            or f"git ended with {done.returncode}",
            at,
        )
    return done.stdout


class Clone:
    """A repository with a working tree: the project's own or a person's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dir = Path(self("rev-parse", "--absolute-git-dir"))

    def __call__(self, *args: str, data: bytes | None = None, **env: str) -> str:
        """Run git here.

        Args:
            args: its arguments.
            data: its standard input.
            env: more variables for it.

        Returns:
            What it printed, less the last line end.

        Raises:
            GitError: its exit status is not 0.
        """
        out = _call(self.command(*args), data, environment(**env), self.path)
        return out.decode(errors="surrogateescape").rstrip("\n")

    @property
    def common(self) -> Path:
        """The folder of what all worktrees of the clone share."""
        return Path(self("rev-parse", "--path-format=absolute", "--git-common-dir"))

    @property
    def head(self) -> str:
        """The ref that is checked out, the commit where HEAD is detached."""
        try:
            return self("symbolic-ref", "-q", "HEAD")
        except GitError:
            return self.resolve("HEAD")

    @property
    def key(self) -> str:
        """What tells this clone from others in names of files."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]

    def raw(self, commit: str) -> bytes:
        """Return a commit object as git stores it."""
        said = self("cat-file", "commit", commit)
        return said.encode(errors="surrogateescape")

    def command(self, *args: str) -> list[str]:
        """Return the whole command line for git here."""
        settings = [f"{name}={value}" for name, value in OVERRIDES.items()]
        settings.append(f"safe.directory={self.path}")
        flags = [part for setting in settings for part in ("-c", setting)]
        return ["git", "-C", str(self.path), *flags, *args]

    def resolve(self, name: str) -> str:
        """Return the commit that a name means, empty if there is none."""
        try:
            return self(
                "rev-parse", "-q", "--verify", "--end-of-options", name + "^{commit}"
            )
        except GitError:
            return ""

    def files(self, commit: str) -> dict[str, str]:
        """Return the files of a commit, each with its mode and the hash of its blob."""
        rows = self("ls-tree", "-r", "-z", commit).split("\0")
        parts = (row.split("\t", 1) for row in rows if row)
        return {name: f"{said[:6]} {said.split()[2]}" for said, name in parts}

    def read(self, blob: str) -> bytes:
        """Return what a blob holds."""
        command = self.command("cat-file", "blob", blob)
        return _call(command, None, environment(), self.path)

    def keep(self, commit: str, ref: str) -> str:
        """Keep a commit under a ref, or under the first like it that has no other.

        Returns:
            The ref's name.
        """
        names = itertools.chain([ref], (f"{ref}.{n}" for n in itertools.count(2)))
        name = next(n for n in names if self.resolve(n) in ("", commit))
        self("update-ref", name, commit)
        return name

    def contains(self, tip: str, commit: str) -> bool:
        """Return whether a commit is among those that led to another."""
        try:
            self("merge-base", "--is-ancestor", commit, tip)
        except GitError:
            return False
        return True

    def dirty(self) -> list[str]:
        """Return the tracked files that differ from HEAD."""
        listed = self("status", "--porcelain", "-z", "--untracked-files=no")
        return [entry[3:] for entry in listed.split("\0") if entry]

    def unlike(self, commit: str) -> set[str]:
        """Return the files of which the index has something else than a commit."""
        listed = self("diff-index", "--cached", "--name-only", "-z", commit)
        return set(listed.split("\0")) - {""}

    def untracked(self) -> set[str]:
        """Return the files that git does not track, ignored ones too."""
        return set(self("ls-files", "--others", "-z").split("\0")) - {""}

    def whole(self) -> None:
        """Check out all files in a new worktree, of a sparse clone as well."""
        kind = ("--type=bool", "--default=false")
        if self("config", *kind, "--get", "core.sparseCheckout") == "true":
            self("sparse-checkout", "disable")

    def under_way(self) -> str:
        """Return what a person has begun and not ended, such as "rebase"."""
        for name, what in UNDER_WAY.items():
            if (self.dir / name).exists():
                return what
        return ""

    def objects(self) -> Path:
        """Return the folder of the objects."""
        return (self.path / self("rev-parse", "--git-path", "objects")).resolve()


def begins(whole: bytes, found: bytes) -> bool:
    """Return whether a file is what git was writing, perhaps cut off.

    Args:
        whole: what it was to hold, as git stores it.
        found: what it holds, maybe with the line ends of Windows.
    """
    plain = found.replace(b"\r\n", b"\n").removesuffix(b"\r")
    return whole.startswith((found, plain))


def borrower(folder: Path, *lenders: Clone) -> Clone:
    """Make a repository without files that has the objects of others.

    Nothing that is made in it reaches them.

    Args:
        folder: where, not there yet.
        lenders: the others. What the first has not, as it is a partial clone, is
            asked of the server that it has the rest from.
    """
    lenders[0]("init", "-q", "--template=", "--object-format=sha1", str(folder))
    made = Clone(folder)
    for name in ("info", "objects/info"):
        (made.dir / name).mkdir(parents=True, exist_ok=True)
    stores = "".join(f"{lender.objects()}\n" for lender in lenders)
    (made.dir / "objects/info/alternates").write_text(stores)
    lazy = r"^(extensions\.partialclone|remote\..*\.(promisor|url|partialclonefilter))$"
    try:
        rows = lenders[0]("config", "--get-regexp", lazy).splitlines()
    except GitError:
        rows = []
    if any(".promisor true" in row for row in rows):
        made("config", "core.repositoryFormatVersion", "1")
        for row in rows:
            made("config", *row.split(" ", 1))
    return made


class Scratch:
    """A bare repository on a clone's objects that has no settings at all.

    Commits and patches made here do not depend on the settings, attributes or
    index of anyone, and nothing but new objects reaches the clone.

    Args:
        clone: whose objects.
        folder: an empty folder for it.
    """

    def __init__(self, clone: Clone, folder: Path) -> None:
        self.clone, self.folder = clone, folder
        self.env = environment(
            GIT_CONFIG_GLOBAL=os.devnull,
            GIT_CONFIG_SYSTEM=os.devnull,
            GIT_CONFIG_NOSYSTEM="1",
            GIT_ATTR_NOSYSTEM="1",
            GIT_DIR=str(folder / "git"),
            GIT_INDEX_FILE=str(folder / "index"),
            HOME=str(folder),
            XDG_CONFIG_HOME=str(folder),
        )
        self("init", "-q", "--bare", "--template=", "--object-format=sha1")
        self.env["GIT_OBJECT_DIRECTORY"] = str(clone.objects())
        shallow = clone.path / clone("rev-parse", "--git-path", "shallow")
        if shallow.exists():
            shutil.copy(shallow, folder / "git" / "shallow")

    def __call__(self, *args: str, data: bytes | None = None, **env: str) -> bytes:
        """Run git here; see `Clone.__call__`.

        Returns:
            What it printed, as it is.
        """
        return _call(["git", *args], data, self.env | env, self.clone.path)


def find(path: Path, given: str = "VLLM") -> Clone:
    """Return a person's clone.

    Args:
        path: its top folder.
        given: the variable that names it.

    Raises:
        Failure: it is none.
    """
    path = path.expanduser().resolve()
    ask = f"give {given}= the top folder of a vLLM clone"
    if not path.is_dir():
        raise Failure(f"{given}={path} is no folder", ask)
    try:
        clone = Clone(path)
        top = clone("rev-parse", "--show-toplevel")
    except GitError as error:
        raise Failure(f"{given}={path} is no git checkout", ask) from error
    if Path(top).resolve() != path:
        whose = "this project" if Path(top).resolve() == ROOT else show(Path(top))
        raise Failure(f"{given}={path} is inside of {whose}", ask)
    return clone
