# SPDX-License-Identifier: Apache-2.0
"""`make rebase`: the series on another release, patch by patch.

The patches are cherry-picked in a worktree of the checkout, so that nothing that a
person has in the checkout itself is in the way or at risk. What is done so far is
written down after each patch, and git's own state tells the rest, so that a run that
was killed goes on where it stopped.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from scripts import console, fetch, git, pins, series
from scripts.apply import (
    EPOCH,
    OWN,
    applied_ref,
    base_ref,
    contents,
    export_command,
    import_base,
    open_clone,
    open_own,
    recover,
    refuse_loose,
    refuse_taken,
    refuse_unexported,
    refuse_unready,
    replaced_ref,
    switch,
    unfinished,
)
from scripts.console import BUILD, Failure, say, show
from scripts.git import Clone, GitError
from scripts.pins import Release

# How the merges are made, whatever the person's settings say.
MERGE = {
    "commit.cleanup": "verbatim",
    "merge.conflictStyle": "diff3",
    "merge.directoryRenames": "conflict",
    "merge.renames": "true",
    "merge.renameLimit": "20000",
}
# In the project's own checkout a conflict that was mended once is not asked again.
REMEMBER = {"rerere.enabled": "true", "rerere.autoUpdate": "true"}
STAGED = "What was staged alone"
GO_ON = console.make("rebase CONTINUE=1")
DROP = console.make("rebase CONTINUE=1 DROP=1")
GIVE_UP = console.make("rebase ABORT=1")


@dataclass(frozen=True)
class Target:
    """Where a series goes: a release, or a commit of some clone."""

    name: str
    commit: str

    @property
    def branch(self) -> str:
        """The branch that gets the series."""
        return f"gemma4/{self.name}"

    @property
    def applied(self) -> str:
        """See `apply.applied_ref`."""
        return f"refs/gemma4/applied/{self.name}"


@dataclass
class Step:
    """What came of one patch; `tip` is the last commit with it."""

    outcome: str
    tip: str
    note: str = ""


@dataclass
class State:
    """A rebase under way, as it is kept in the checkout's git folder.

    `stopped` names the files that a person was asked to mend for the next patch.
    """

    release: str
    name: str
    branch: str
    before: str
    old: str
    onto: str
    tree: str
    commits: list[str]
    patches: list[str]
    done: list[Step] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    @property
    def tip(self) -> str:
        """The last commit made."""
        return self.done[-1].tip if self.done else self.onto

    @property
    def next(self) -> str:
        """The patch to do next, empty if there is none."""
        return (self.patches[len(self.done) :] or [""])[0]


def checkout() -> Clone:
    """Return the checkout: the clone that `VLLM=` names, else the project's own."""
    if given := console.option("VLLM"):
        return git.find(Path(given))
    return open_clone(pins.load(console.option("RELEASE")))[0]


def base(clone: Clone, release: Release) -> str:
    """Return the commit of a release, made from its sdist where it is not whole.

    A shallow clone may not have the commit and a partial one not its files.

    Args:
        clone: where.
        release: which.

    Raises:
        Failure: it is not there and cannot be fetched.
    """
    if clone.path == OWN:
        return open_own(release)[1]
    own = base_ref(release.tag)
    if made := clone.resolve(own):
        return made
    for name in (f"refs/tags/{release.tag}", release.commit):
        found = clone.resolve(name)
        if found.startswith(release.commit) and not _missing(clone, found):
            return found
    import_base(clone, release, own)
    return clone.resolve(own)


def _missing(clone: Clone, commit: str) -> bool:
    """Return whether objects of a commit's tree are not in the clone."""
    try:
        listed = clone(
            *("rev-list", "--objects", "--missing=print", "--no-object-names"),
            commit + "^{tree}",
        )
    except GitError:
        return True
    return "?" in listed


def target(clone: Clone) -> Target:
    """Return where `TO=` or `TO_DIR=` say that the series goes.

    Args:
        clone: the checkout, which gets the commit if it has not it.

    Raises:
        Failure: neither or both are given, or they name nothing.
    """
    to, folder = console.option("TO"), console.option("TO_DIR")
    if bool(to) == bool(folder):
        raise Failure(
            "both TO= and TO_DIR= are given" if to else "where to is not said",
            f"give TO= one of {', '.join(pins.tags())}, or TO_DIR= a clone of vLLM",
        )
    if to:
        release = pins.load(to, "TO")
        return Target(release.tag, base(clone, release))
    theirs = git.find(Path(folder), "TO_DIR")
    commit = theirs.resolve("HEAD")
    if not commit:
        raise Failure(f"TO_DIR={theirs.path} has no commit", "check one out there")
    if theirs.dirty():
        say(f"note: uncommitted changes in {theirs.path} are not looked at")
    name = commit[:12]
    if clone.resolve(commit) and not _missing(clone, commit):
        return Target(name, commit)
    return Target(name, _copy(clone, theirs, commit))


def _copy(clone: Clone, theirs: Clone, commit: str) -> str:
    """Make a commit of another clone's files, without its history."""
    ref = base_ref(commit[:12])
    if made := clone.resolve(ref):
        return made
    say(f"copying the files of {commit[:12]} from {theirs.path}")
    tree = theirs("rev-parse", commit + "^{tree}")
    env = git.environment()
    with subprocess.Popen(
        theirs.command(
            "pack-objects", "--revs", "--stdout", "-q", "--delta-base-offset"
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    ) as packer:
        assert packer.stdin and packer.stderr
        packer.stdin.write(tree.encode() + b"\n")
        packer.stdin.close()
        indexer = subprocess.run(
            clone.command("index-pack", "--stdin"),
            stdin=packer.stdout,
            capture_output=True,
            env=env,
        )
        # Or it would wait for ever where the reader died.
        assert packer.stdout
        packer.stdout.close()
        said = packer.stderr.read() or indexer.stderr
    if packer.returncode or indexer.returncode:
        line = said.decode(errors="replace").strip().split("\n")[0]
        raise Failure(
            f"{commit[:12]} could not be copied from {theirs.path} ({line})",
            "look at that clone with `git fsck`",
        )
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", git.NAME), ("EMAIL", git.EMAIL), ("DATE", EPOCH))
    }
    made = clone("commit-tree", tree, data=f"vLLM {commit}\n".encode(), **who)
    clone("update-ref", ref, made)
    return made


def _file(clone: Clone) -> Path:
    return clone.dir / "gemma4-rebase.json"


def _series(clone: Clone) -> str:
    """Return the ref that keeps the commits of a rebase; worktrees share refs."""
    return f"refs/gemma4/rebase-{clone.key}"


def load(clone: Clone) -> State | None:
    """Return the rebase that is under way in a checkout, if one is."""
    path = _file(clone)
    if not path.exists():
        return None
    said = json.loads(path.read_text())
    return State(**said | {"done": [Step(**step) for step in said["done"]]})


def _save(clone: Clone, state: State) -> None:
    console.write(_file(clone), json.dumps(asdict(state), indent=1))


def derive(clone: Clone, release: Release, old: str) -> tuple[list[Path], list[str]]:
    """Return a release's patches and the commits that they make on its base.

    Args:
        clone: where.
        release: which series.
        old: the release's commit.

    Raises:
        Failure: there are none, or one does not apply.
    """
    files = series.patches(release.patches)
    if not files:
        raise Failure(
            f"{show(release.patches)} has no patches", "there is nothing to do"
        )
    try:
        with console.scratch() as folder:
            return files, series.derive(clone, old, files, folder)
    except series.Conflict as halt:
        raise Failure(
            str(halt).split(": the checkout")[0] + f" on {release.tag} itself",
            f"mend it with `{console.make('apply CONTINUE=1')}` and "
            f"`{console.make('export')}` first",
        ) from None


def _begin(clone: Clone, release: Release) -> State:
    to = target(clone)
    old = base(clone, release)
    if to.commit == old:
        raise Failure(
            f"the series of {release.tag} is on {to.name} already",
            "give another TO= or TO_DIR=",
        )
    files, commits = derive(clone, release, old)
    now = clone.resolve("refs/heads/" + release.branch)
    if now and contents(clone, old, now) != contents(clone, old, commits[-1]):
        hint = f"write them with `{export_command(clone, release.tag)}`, or"
        refuse_unexported(clone, release.branch, old, applied_ref(release), hint)
    if to.name in pins.tags():
        hint = f"write them with `{export_command(clone, to.name)}`, or"
    else:
        # Nothing remembers that they were written.
        hint = f"write them with `{_format(clone, to)}`, then"
    refuse_unexported(clone, to.branch, to.commit, to.applied, hint)
    fetch.need_space(BUILD, 1 << 29)
    name = f"rebase-{to.name}"
    if console.option("VLLM"):
        name += f"-{clone.key}"
    state = State(
        release=release.tag,
        name=to.name,
        branch=to.branch,
        before=clone.resolve("refs/heads/" + to.branch),
        old=old,
        onto=to.commit,
        tree=str(BUILD / name),
        commits=commits,
        patches=[path.name for path in files],
    )
    if Path(state.tree).exists():
        raise Failure(f"{show(BUILD / name)} is in the way", "move it away")
    refuse_taken(clone, state.branch)
    _forget(state)
    clone("update-ref", _series(clone), commits[-1])
    _save(clone, state)
    return state


class Tree(Clone):
    """The worktree that the patches are picked in.

    Args:
        path: where it is.
        own: whether it is of the project's own checkout.
    """

    def __init__(self, path: Path, own: bool) -> None:
        self.settings = MERGE | (REMEMBER if own else {})
        super().__init__(path)

    def command(self, *args: str) -> list[str]:
        """See `Clone.command`."""
        flags = [
            part for pair in self.settings.items() for part in ("-c", "=".join(pair))
        ]
        return super().command(*flags, *args)

    def unmerged(self) -> list[str]:
        """Return the files with conflicts."""
        listed = self("diff", "--name-only", "--diff-filter=U", "-z")
        return [name for name in listed.split("\0") if name]

    def loose(self) -> str:
        """Return a file that no commit of what is staged would have."""
        listed = self("diff", "--name-only", "-z")
        return listed.partition("\0")[0] or self.others()

    def others(self) -> str:
        """Return a file that git does not know, empty if there is none."""
        listed = self("ls-files", "--others", "--exclude-standard", "-z")
        return listed.partition("\0")[0]

    def new(self, *args: str, **env: Any) -> set[tuple[str, str]]:
        """Return what `git diff HEAD` lists, names with modes and hashes.

        Not what is missing: a run that was killed leaves that, too.
        """
        listed = self(
            *("diff", "--raw", "--no-abbrev", "--no-renames", "--diff-filter=d", "-z"),
            *("HEAD", *args),
            **env,
        ).split("\0")
        return set(zip(listed[1::2], listed[::2], strict=False))

    def trees(self) -> tuple[str, str]:
        """Return what is staged and all that is here, each as a tree.

        The index does not move, so a run that is killed here can be run again.
        """
        with console.scratch() as folder:
            index = folder / "index"
            env: dict[str, Any] = {"GIT_INDEX_FILE": str(index)}
            # With what it knows of the files, git need not read them all.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(self.dir / "index", index)
            # What conflicts is in no tree.
            if files := self.unmerged():
                self("add", "-A", "--", *files, GIT_LITERAL_PATHSPECS="1", **env)
            staged = self("write-tree", **env)
            self("add", "-A", **env)
            return staged, self("write-tree", **env)

    def snapshot(self, message: str) -> str:
        """Return a commit of all that is here, HEAD itself if that is all.

        What is staged and nowhere else is its second parent, as in git's stash.
        """
        who: dict[str, Any] = {"GIT_AUTHOR_NAME": git.NAME}
        who |= {"GIT_AUTHOR_EMAIL": git.EMAIL}
        staged, here = self.trees()
        more = list[str]()
        if not self.new(staged) <= self.new(here):
            made = self("commit-tree", staged, "-p", "HEAD", "-m", STAGED, **who)
            more = ["-p", made]
        elif not self.new(here):
            return self.resolve("HEAD")
        return self("commit-tree", here, "-p", "HEAD", *more, "-m", message, **who)

    @contextlib.contextmanager
    def trial(self, commit: str) -> Iterator["Trial"]:
        """Pick a commit on HEAD into an empty folder; nothing here changes."""
        with console.scratch() as folder:
            index, files = str(folder / "index"), folder / "files"
            files.mkdir()
            self("read-tree", "HEAD", GIT_INDEX_FILE=index)
            said = ""
            try:
                self(
                    *("-c", "rerere.enabled=false", "cherry-pick", "-n", commit),
                    GIT_INDEX_FILE=index,
                    GIT_WORK_TREE=str(files),
                )
            except GitError as error:
                said = str(error)
            staged = self.new("--cached", GIT_INDEX_FILE=index)
            yield Trial(files, staged, said)

    def picking(self) -> bool:
        """Return whether a cherry-pick stopped."""
        return bool(self.resolve("CHERRY_PICK_HEAD"))

    def staged(self) -> bool:
        """Return whether the index differs from HEAD."""
        return bool(self("diff", "--cached", "--name-only", "HEAD"))

    def commit(self, source: str) -> None:
        """Commit what is staged with another commit's message, author and date."""
        self(
            *("commit", "-q", "--no-verify", "--cleanup=verbatim", "-C", source),
            GIT_COMMITTER_DATE=self.date(source),
        )

    def date(self, commit: str) -> str:
        """Return when a commit was authored; so dated, its heirs do not vary."""
        return self("log", "-1", "--format=%aI", commit)


@dataclass
class Trial:
    """What a pick writes: where, what of it is staged, and what git says."""

    folder: Path
    staged: set[tuple[str, str]]
    said: str

    @property
    def names(self) -> set[str]:
        """The names that it changes."""
        return {name for name, _ in self.staged}

    def made(self, tree: Tree) -> bool:
        """Return whether all that git knows there is of it."""
        staged, here = (tree.new(made) for made in tree.trees())
        # A file that git does not know stays.
        known = {name for name, _ in here}.intersection(tree.dirty())
        return staged <= self.staged | here and all(
            self.wrote(tree, name) for name in known
        )

    def wrote(self, tree: Tree, name: str) -> bool:
        """Return whether a file is as the pick, or HEAD, has it, perhaps cut off."""
        path, whole = tree.path / name, self.folder / name
        if path.is_symlink() or path.is_dir():
            return False
        found = path.read_bytes()
        if name in self.names:
            return whole.is_file() and git.begins(whole.read_bytes(), found)
        try:
            return git.begins(tree.read(f"HEAD:{name}"), found)
        except GitError:
            return False


def _keep(clone: Clone, state: State, commit: str) -> str:
    """Keep a commit of a rebase's worktree; return what to say of where."""
    name = f"refs/gemma4/aborted/{state.name}"
    if clone.dir != clone.common:
        # One of several worktrees.
        name += f"-{clone.key}"
    name = clone.keep(commit, name)
    staged = f"{name}^2"
    if clone.resolve(staged) and clone("log", "-1", "--format=%s", staged) == STAGED:
        name += f" (what was staged alone: {staged})"
    return name


def _keep_changes(clone: Clone, tree: Tree, state: State) -> None:
    """Keep what is in the worktree and in no commit of the rebase, and say where."""
    made = tree.snapshot(f"What was changed during the rebase to {state.name}")
    if made != state.tip:
        kept = _keep(clone, state, made)
        say(f"what was changed in {show(tree.path)} is kept as {kept}")


def _open(clone: Clone, state: State) -> Tree | None:
    """Return the worktree of a rebase, None if it is not there."""
    path = Path(state.tree)
    # Without its .git it would be taken for a part of the project around it.
    if not (path / ".git").is_file():
        return None
    try:
        tree = Tree(path, own=not console.option("VLLM"))
        if tree.common == clone.common and tree.resolve("HEAD"):
            return tree
    except GitError:
        pass
    return None


def _seen(state: State) -> bool:
    """Return whether the folder of the worktree may have a person's files in it."""
    return Path(state.tree).exists() and bool(state.done or state.stopped)


def _tree(clone: Clone, state: State) -> Tree:
    """Return the worktree of a rebase, made if it is not there."""
    if tree := _open(clone, state):
        return tree
    path = Path(state.tree)
    if _seen(state):
        raise Failure(
            f"{show(path)} is no worktree of {show(clone.path)} any more",
            f"move it away, then `{GO_ON}` begins {state.next} again",
        )
    say(f"making {show(path)}, a worktree of {show(clone.path)}")
    # What there is of it is what a killed run left.
    _remove(clone, path)
    clone("worktree", "add", "-f", "-f", "-q", "--detach", str(path), state.tip)
    state.stopped = []
    _save(clone, state)
    tree = Tree(path, own=not console.option("VLLM"))
    tree.whole()
    return tree


def _remove(clone: Clone, path: Path) -> None:
    # With a part of the folder left git would not forget it.
    console.remove(path)
    with contextlib.suppress(GitError):
        clone("worktree", "remove", "-f", "-f", str(path))


def _kind(tree: Tree, old: str, new: str) -> str:
    """Say whether a patch is the same but for its line numbers."""
    ids = []
    for commit in (old, new):
        diff = tree("diff-tree", "-p", "--full-index", "--no-renames", commit)
        said = tree(
            "patch-id", "--stable", data=diff.encode(errors="surrogateescape") + b"\n"
        )
        ids.append(said.split()[0])
    return "clean" if ids[0] == ids[1] else "merged"


def _record(clone: Clone, state: State, outcome: str, tip: str, note: str = "") -> None:
    at, many = len(state.done) + 1, len(state.commits)
    say(f"[{at}/{many}] {state.next}: {outcome}{note and f' ({note})'}")
    state.done.append(Step(outcome, tip, note))
    state.stopped = []
    _save(clone, state)


def _pick(clone: Clone, tree: Tree, state: State) -> None:
    """Do the next patch, or stop at it for a person."""
    commit = state.commits[len(state.done)]
    try:
        tree("cherry-pick", commit, GIT_COMMITTER_DATE=tree.date(commit))
    except GitError as error:
        files = tree.unmerged()
        if files:
            _stop(clone, tree, state, files, str(error))
        if tree.picking() and not tree.staged():
            tree("cherry-pick", "--quit")
            _record(clone, state, "dropped", state.tip, f"{state.name} has it")
            return
        if error.files:
            raise Failure(
                f"{state.next} could not be picked: files that git does not know are "
                f"in the way in {show(tree.path)}: {', '.join(error.files)}",
                f"move them away, then `{GO_ON}`",
            ) from None
        if not tree.picking():
            line = str(error).split("\n")[0].removeprefix("error: ")
            raise Failure(
                f"{state.next} could not be picked in {show(tree.path)} ({line})",
                "mend that and run this again",
            ) from None
        # What was mended in other files than these is not in it.
        known = r"(?m)^(?:Staged|Resolved) '(.*)' using previous resolution"
        state.stopped = re.findall(known, str(error)) or ["unknown files"]
        _save(clone, state)
        raise Failure(
            f"{state.next} conflicts with {state.name} in {', '.join(state.stopped)}, "
            "mended as the last time",
            f"see `git -C {shlex.quote(show(tree.path))} diff HEAD`, then `{GO_ON}`",
        ) from None
    head = tree.resolve("HEAD")
    _record(clone, state, _kind(tree, commit, head), head)


def _stop(
    clone: Clone, tree: Tree, state: State, files: list[str], said: str
) -> NoReturn:
    """Tell a person what conflicts and what upstream did there."""
    state.stopped = files
    _save(clone, state)
    where = show(tree.path)
    names = [
        _name(clone, state.release, state.old),
        _name(clone, state.name, state.onto),
    ]
    commit = state.commits[len(state.done)]
    own = tree("diff-tree", "-r", "-z", "--no-commit-id", "--name-only", commit)
    say(f"what {state.name} changed in the files that conflict:")
    both = []
    for name in files:
        what, other = _upstream(clone, state, name)
        say(f"  {name}: {what or 'neither release has it'}")
        # With one name alone git shows no rename.
        both += [name, *([other] if other else [])]
        if not what:
            why = _conflicts(said, name)
            for line in why:
                say(f"    {line}")
            # The patch may have it in another folder, which upstream renamed.
            both += [
                one
                for one in filter(None, own.split("\0"))
                if one not in both and any(f"{one} " in line for line in why)
            ]
    quoted = " ".join(map(shlex.quote, both))
    path = _diffs(state.name, state.next[:4])
    path.parent.mkdir(exist_ok=True)
    text = ""
    for whose, *sides in (
        (state.name, state.old, state.onto),
        (state.next, f"{commit}^", commit),
    ):
        diff = tree(
            *("diff", "-M", "--no-ext-diff", "--no-textconv", "--no-color"),
            *("--full-index", "--src-prefix=a/", "--dst-prefix=b/"),
            *(*sides, "--", *both),
        )
        text += f"# what {whose} changes\n{diff}\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    say(f"that, and what the patch changes, is in {show(path)}; to read it in git:")
    say(f"  git -C {shlex.quote(where)} diff -M {' '.join(names)} -- {quoted}")
    say(f"  git -C {shlex.quote(where)} show CHERRY_PICK_HEAD -- {quoted}")
    raise Failure(
        f"{state.next} conflicts with {state.name} in {', '.join(files)}",
        f"mend and `git add` them in {where}, then `{GO_ON}` (or `{DROP}`, which drops "
        f"the patch, or `{GIVE_UP}`)",
    )


def _diffs(name: str, number: str) -> Path:
    """Return the file of what upstream and a patch changed where they conflict."""
    return BUILD / "reports" / f"rebase-{name}-{number}.diff"


def _forget(state: State) -> None:
    """Remove the diffs of conflicts of an earlier rebase to the same place."""
    pattern = _diffs(state.name, "[0-9]" * 4)
    for path in pattern.parent.glob(pattern.name):
        path.unlink()


def _conflicts(said: str, name: str) -> list[str]:
    """Return the lines in which git tells of a conflict in a file."""
    word = re.compile(rf"(?<![^\s]){re.escape(name)}(?=[.,]?(\s|$))")
    lines = (line for line in said.split("\n") if line.startswith("CONFLICT "))
    return [line for line in lines if word.search(line)]


def _name(clone: Clone, tag: str, commit: str) -> str:
    return tag if clone.resolve(f"refs/tags/{tag}") == commit else commit[:12]


def _upstream(clone: Clone, state: State, name: str) -> tuple[str, str]:
    """Say in a few words what upstream did to a file between the two bases.

    Returns:
        The words, empty if neither has it, and its other name where it was renamed.
    """
    old, new = (
        clone("ls-tree", commit, "--", name) for commit in (state.old, state.onto)
    )
    if not old and not new:
        return "", ""
    if old == new:
        return "nothing: the patches before this one conflict with it", ""
    if not old or not new:
        listed = clone(
            *("diff", "--numstat", "-z", "-M", "-l20000", "--diff-filter=R"),
            *(state.old, state.onto),
        ).split("\0")
        for stat, was, now in zip(
            listed[::3], listed[1::3], listed[2::3], strict=False
        ):
            if was == name:
                return f"it is {now} there", now
            if now == name:
                return f"it was {was}; {_lines(stat)}", was
        return "it is gone there" if old else "it is new there", ""
    return _lines(clone("diff", "--numstat", state.old, state.onto, "--", name)), ""


def _lines(stat: str) -> str:
    added, gone = stat.split("\t")[:2]
    return f"{added} lines added, {gone} removed"


def _refuse_begun(tree: Tree, then: str) -> None:
    """Refuse a worktree in which a person has begun more than the pick.

    Args:
        tree: the worktree.
        then: what to run when they have ended it.
    """
    if (what := tree.under_way()) not in ("", "cherry-pick"):
        raise Failure(
            f"a {what} is under way in {show(tree.path)}", f"end it, then `{then}`"
        )


def _settle(clone: Clone, tree: Tree, state: State) -> None:
    """Take over what a person, or a run that was killed, left in the worktree."""
    where = show(tree.path)
    if not state.stopped:
        (tree.dir / "index.lock").unlink(missing_ok=True)
        (tree.dir / "HEAD.lock").unlink(missing_ok=True)
    _refuse_begun(tree, GO_ON)
    commit = state.commits[len(state.done)]
    if tree.picking():
        _finish_pick(clone, tree, state, commit)
        return
    head = tree.resolve("HEAD")
    if head == state.tip and not state.stopped:
        _undo(clone, tree, state, commit)
        return
    if left := [*tree.dirty(), tree.loose()][0]:
        raise Failure(
            f"{where} has uncommitted changes in {left}",
            f"commit or restore them, then `{GO_ON}`",
        )
    if head == state.tip:
        # `cherry-pick --abort` leaves the same as `--skip`.
        say(f"{where} has nothing of {state.next}: picking it again")
        return
    made = contents(tree, state.tip, head)
    if made is None:
        raise Failure(
            f"{where} is at {head[:12]}, which is no line from {state.tip[:12]}",
            f"`git -C {shlex.quote(where)} reset --hard {state.tip[:12]}`, or ABORT=1",
        )
    if state.stopped:
        note = ", ".join(state.stopped) + (f"; {len(made)} commits" if made[1:] else "")
        _record(clone, state, "conflict", head, note)
        return
    pick = series.content(clone.raw(commit))
    if [_whose(content) for content in made] != [_whose(pick)]:
        others = [_whose(content)[1] for content in made]
        at = shlex.quote(where)
        raise Failure(
            f"{where} has other commits than {state.next} ({', '.join(others)}), which "
            "was not picked to its end",
            f"keep them with `git -C {at} branch mine`, then `git -C {at} reset --keep "
            f"{state.tip[:12]}` and `{GO_ON}`, or `{GIVE_UP}`, which keeps them too",
        )
    _record(clone, state, _kind(tree, commit, head), head)


def _whose(content: series.Content) -> tuple[str, str]:
    """Return what a pick leaves of a commit: author with date, and subject."""
    return content.author, content.message.split("\n")[0]


def _finish_pick(clone: Clone, tree: Tree, state: State, commit: str) -> None:
    """Commit a pick whose conflicts are mended."""
    where = show(tree.path)
    if (other := tree.resolve("CHERRY_PICK_HEAD")) != commit:
        raise Failure(
            f"a cherry-pick of {other[:12]}, which is not {state.next}, is under way "
            f"in {where}",
            f"end it, then `{GO_ON}`",
        )
    if files := tree.unmerged():
        if not state.stopped:
            with tree.trial(commit) as trial:
                said = trial.said
            _stop(clone, tree, state, files, said)
        raise Failure(
            f"{', '.join(files)} in {where} still conflict",
            f"mend and `git add` them, then `{GO_ON}`",
        )
    if loose := tree.loose():
        raise Failure(
            f"{loose} in {where} has changes that are not added",
            f"`git add` it, or restore or remove it, then `{GO_ON}`",
        )
    try:
        tree("diff", "--cached", "--check", "HEAD")
    except GitError as error:
        left = re.search(r"(?m)^(.*):(\d+): leftover conflict marker", str(error))
        if left:
            raise Failure(
                f"{left[1]} in {where} has a conflict marker in line {left[2]}",
                f"mend and `git add` it, then `{GO_ON}`",
            ) from None
    mended = ", ".join(state.stopped)
    if not tree.staged():
        tree("cherry-pick", "--quit")
        _record(clone, state, "dropped", state.tip, "nothing of it is left")
        return
    tree.commit(commit)
    head = tree.resolve("HEAD")
    kind = "conflict" if mended else _kind(tree, commit, head)
    _record(clone, state, kind, head, mended)


def _drop(clone: Clone, tree: Tree, state: State) -> None:
    """Leave out the patch that a person was asked to mend."""
    where = shlex.quote(show(tree.path))
    if not state.stopped:
        raise Failure("DROP= is given, but no patch has stopped", f"`{GO_ON}` first")
    if tree.resolve("HEAD") != state.tip:
        raise Failure(
            f"{where} has commits for {state.next}, so DROP=1 does not drop it",
            f"`git -C {where} reset --keep {state.tip[:12]}` first, or `{GO_ON}`",
        )
    commit = state.commits[len(state.done)]
    with tree.trial(commit) as trial:
        if not trial.made(tree):
            _keep_changes(clone, tree, state)
    tree("reset", "-q", "--hard", state.tip)
    _record(clone, state, "dropped", state.tip, "by you")


def _undo(clone: Clone, tree: Tree, state: State, commit: str) -> None:
    """Take away what a killed pick wrote before git knew of it, and nothing else."""
    if not tree.dirty() and not tree.others():
        return
    with tree.trial(commit) as trial:
        there = tree.files("HEAD")
        for name in trial.names - there.keys():
            path = tree.path / name
            if path.exists() and trial.wrote(tree, name):
                path.unlink()
        if not trial.made(tree):
            _keep_changes(clone, tree, state)
    tree("reset", "-q", "--hard", state.tip)


def _finish(clone: Clone, state: State) -> None:
    """Give the branch the commits, remove the worktree and tell what came of it."""
    head = "refs/heads/" + state.branch
    now = clone.resolve(head)
    if now not in (state.before, state.tip):
        raise Failure(
            f"{state.branch} in {show(clone.path)} has moved meanwhile",
            f"`git -C {shlex.quote(show(clone.path))} branch -m {state.branch} "
            f"{state.branch}-mine`, then `{GO_ON}`",
        )
    report = BUILD / "reports" / f"rebase-{state.name}.txt"
    report.parent.mkdir(exist_ok=True)
    old, new = f"{state.old}..{state.commits[-1]}", f"{state.onto}..{state.tip}"
    text = "no patch is left"
    if state.tip != state.onto:
        text = clone("range-diff", "--no-color", "--creation-factor=90", old, new)
    report.write_bytes(text.encode(errors="surrogateescape") + b"\n")
    recover(clone)
    kept = ""
    if now and now not in (state.onto, state.tip):
        kept = clone.keep(now, replaced_ref(state.name))
    then = console.make(f"export RELEASE={state.name}")
    on_branch = clone.head == head
    refuse_taken(clone, state.branch)
    try:
        refuse_unready(clone)
        refuse_loose(clone, state.tip)
        switch(clone, state.branch, state.tip)
    except Failure as failure:
        # The next run ends a switch that stopped half-way.
        if on_branch or unfinished(clone).exists():
            raise
        clone("branch", "-q", "-f", "--no-track", state.branch, state.tip)
        say(f"the checkout stays where it is ({str(failure).split(': ')[0]})")
        where = shlex.quote(show(clone.path))
        then = f"git -C {where} switch {state.branch} && {then}"
    if kept:
        say(f"what {state.branch} was at before is {kept}")
    if tree := _open(clone, state):
        _keep_changes(clone, tree, state)
    _end(clone, state)
    width = max(map(len, state.patches))
    for name, step in zip(state.patches, state.done, strict=True):
        say(f"  {name:{width}}  {step.outcome:8}  {step.note}".rstrip())
    outcomes = [step.outcome for step in state.done]
    said = ", ".join(
        f"{outcomes.count(kind)} {kind}"
        for kind in ("clean", "merged", "conflict", "dropped")
        if kind in outcomes
    )
    say(f"{state.branch} in {show(clone.path)} has the series: {said}")
    say(f"old and new patches compared: {show(report)}")
    if state.name in pins.tags():
        say(f"next: {then}, which writes patches/{state.name}/")
    else:
        say(f"next: {_format(clone, Target(state.name, state.onto))}")


def _format(clone: Clone, to: Target) -> str:
    """Return the command that writes a series on a commit that is no release."""
    out = shlex.quote(show(BUILD / "patches" / to.name))
    return (
        f"git -C {shlex.quote(show(clone.path))} format-patch -o "
        f'"$PWD"/{out} {to.commit[:12]}..{to.branch}'
    )


def _spare(tree: Tree) -> None:
    """Move out of a worktree what git cannot keep: ignored files and repositories."""
    others = ("ls-files", "--others", "-z")
    names = [
        name
        for name in tree(*others, "--ignored", "--exclude-standard").split("\0")
        if name and "__pycache__" not in name and not (tree.path / name).is_symlink()
    ]
    # Of a repository git lists the folder, all else by files.
    names += [name for name in tree(*others).split("\0") if name.endswith("/")]
    names = list(dict.fromkeys(names))
    if not names:
        return
    to = console.free(BUILD, f"{tree.path.name}-ignored-{{}}")
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (tree.path / name).rename(to / name)
    say(f"{console.some(names)}, which git does not keep, is in {show(to)} now")


def _end(clone: Clone, state: State) -> None:
    """Remove the worktree and the notes."""
    if state.tree:
        if tree := _open(clone, state):
            _spare(tree)
        _remove(clone, Path(state.tree))
    clone("update-ref", "-d", _series(clone))
    _file(clone).unlink(missing_ok=True)


def abort(clone: Clone, state: State) -> None:
    """Give a rebase up.

    What was made so far, committed or not, is kept under a ref.

    Args:
        clone: the checkout.
        state: the rebase.
    """
    tip = state.tip
    if tree := _open(clone, state):
        _refuse_begun(tree, GIVE_UP)
        (tree.dir / "index.lock").unlink(missing_ok=True)
        message = f"What was there when the rebase to {state.name} was given up"
        tip = tree.snapshot(message)
    kept = _keep(clone, state, tip) if tip != state.onto else ""
    if not tree and _seen(state):
        say(f"{show(Path(state.tree))} is no worktree any more and is left alone")
        state.tree = ""
    _end(clone, state)
    _forget(state)
    more = f"; what was done is kept as {kept}" if kept else ""
    say(f"gave up the rebase to {state.name}: all is as it was{more}")


def _wanted() -> str:
    """Return the name of what `TO=` or `TO_DIR=` say, empty if they say nothing."""
    if to := console.option("TO"):
        return pins.load(to, "TO").tag
    if folder := console.option("TO_DIR"):
        return git.find(Path(folder), "TO_DIR").resolve("HEAD")[:12]
    return ""


def rebase(clone: Clone) -> None:
    """Begin, go on with or give up a rebase, as the variables say.

    Args:
        clone: the checkout, which no other rebase is at work in.

    Raises:
        Failure: a person is needed; nothing is lost.
    """
    go_on, give_up = console.enabled("CONTINUE"), console.enabled("ABORT")
    if go_on and give_up:
        raise Failure("both CONTINUE= and ABORT= are given", "give one of them")
    drop = console.enabled("DROP")
    if drop and not go_on:
        raise Failure("DROP= is given without CONTINUE=", f"give both: `{DROP}`")
    release = pins.load(console.option("RELEASE"))
    state = load(clone)
    if (go_on or give_up) and not state:
        raise Failure(
            f"no rebase is under way in {show(clone.path)}",
            f"begin one with `{console.make('rebase TO=')}`",
        )
    if state:
        if _wanted() not in ("", state.name):
            raise Failure(
                f"a rebase to {state.name} is under way",
                f"end it with `{GO_ON}` or give it up with `{GIVE_UP}`",
            )
        if give_up:
            abort(clone, state)
            return
        if state.stopped and not go_on:
            raise Failure(
                f"a rebase to {state.name} is under way, stopped at {state.next}",
                f"go on with `{GO_ON}` or give it up with `{GIVE_UP}`",
            )
        if drop:
            _drop(clone, _tree(clone, state), state)
        elif state.next:
            _settle(clone, _tree(clone, state), state)
    else:
        state = _begin(clone, release)
    if state.next:
        tree = _tree(clone, state)
        while state.next:
            _pick(clone, tree, state)
    _finish(clone, state)


def main() -> None:
    """Rebase the series."""
    # Before the checkout is made.
    pins.load(console.option("TO"), "TO")
    with console.lock():
        clone = checkout()
        # Another project, or another worktree of the clone, has another build/.
        with console.lock(clone.common / "gemma4"):
            rebase(clone)


if __name__ == "__main__":
    console.run(main)
