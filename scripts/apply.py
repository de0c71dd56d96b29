# SPDX-License-Identifier: Apache-2.0
"""`make apply`: the series as commits on a branch of a vLLM checkout."""

import contextlib
import hashlib
import os
import shlex
import subprocess
import tarfile
from pathlib import Path

from scripts import console, fetch, git, pins, series
from scripts.console import BUILD, Failure, say, show
from scripts.git import Clone, GitError
from scripts.pins import Release

OWN = BUILD / "vllm"
EPOCH = "1767225600 +0000"


def open_clone(release: Release) -> tuple[Clone, str]:
    """Return the checkout to work on and the commit of the release in it.

    Args:
        release: which release.

    Returns:
        The clone that `VLLM=` names, else the project's own, which is made if it
        is not there.

    Raises:
        Failure: there is none, or it has not the release.
    """
    if given := console.option("VLLM"):
        clone = git.find(Path(given))
        made = clone.resolve(base_ref(release.tag))
        if made and clone.contains("refs/heads/" + release.branch, made):
            return clone, made
        for name in (f"refs/tags/{release.tag}", release.commit):
            base = clone.resolve(name)
            if base.startswith(release.commit):
                return clone, base
        if made:
            return clone, made
        tag = clone.resolve(f"refs/tags/{release.tag}")
        if tag:
            raise Failure(
                f"{release.tag} in {clone.path} is {tag[:9]}, not vLLM's "
                f"{release.commit}",
                "get vLLM's own tag with `git fetch --force UPSTREAM tag "
                f"{release.tag}`",
            )
        raise Failure(
            f"{clone.path} has no vLLM {release.tag} (commit {release.commit})",
            f"get it there with `git fetch UPSTREAM tag {release.tag}`",
        )
    return open_own(release)


def base_ref(name: str) -> str:
    """Return the ref of a base that `make rebase` made where a clone has not it all."""
    return f"refs/gemma4/base/{name}"


def open_own(release: Release) -> tuple[Clone, str]:
    """Return the project's own checkout, made if it is not there; see `open_clone`."""
    ref = f"refs/tags/{release.tag}"
    if (OWN / ".git").is_dir():
        clone = Clone(OWN)
        base = clone.resolve(ref)
        if not base:
            import_base(clone, release, ref)
            base = clone.resolve(ref)
    else:
        if OWN.exists():
            raise Failure(f"{show(OWN)} is no git checkout", "move it away")
        fetch.need_space(BUILD, 6 * release.sdist.size)
        with console.scratch() as folder:
            made = folder / "vllm"
            made.mkdir()
            # Neither templates nor the person's settings may reach this one.
            subprocess.run(
                ["git", "init", "-q", "--template=", "--object-format=sha1", made],
                check=True,
                env=git.environment(GIT_CONFIG_GLOBAL=os.devnull),
            )
            clone = Clone(made)
            for name, value in {
                "core.autocrlf": "false",
                "core.eol": "lf",
                "core.fileMode": "true",
                "core.logAllRefUpdates": "true",
                "advice.detachedHead": "false",
            }.items():
                clone("config", name, value)
            import_base(clone, release, ref)
            clone("checkout", "-q", "--detach", ref)
            made.rename(OWN)
        clone = Clone(OWN)
        base = clone.resolve(ref)
    if release.base and base != release.base:
        raise Failure(
            f"{release.tag} in {show(OWN)} is {base[:9]}, not the pinned "
            f"{release.base[:9]}",
            f"save your work and remove {show(OWN)}",
        )
    return clone, base


def import_base(clone: Clone, release: Release, ref: str) -> None:
    """Make the commit of a release from its sdist.

    git reads the archive as a stream, so that no file system, mask or setting
    has a say in the commit's hash.

    Args:
        clone: where.
        release: which release.
        ref: what names the commit.

    Raises:
        Failure: there is no sdist or no space.
    """
    path = fetch.fetch(release.sdist)
    say(f"making the base commit of {release.tag} from {path.name}")
    stem = f"{release.sdist.project}-{release.version}/"
    skip = tuple(stem + name for name in release.generated)
    message = f"vLLM {release.tag}\n\nFrom {path.name}\nsha256 {release.sdist.sha256}\n"
    with subprocess.Popen(
        clone.command("fast-import", "--quiet", "--done"),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=git.environment(),
    ) as importer:
        out = importer.stdin
        assert out is not None
        # Where git ends before, it says why.
        with contextlib.suppress(BrokenPipeError), out, tarfile.open(path) as archive:
            out.write(
                f"feature done\ncommit {ref}\n"
                f"author {git.NAME} <{git.EMAIL}> {EPOCH}\n"
                f"committer {git.NAME} <{git.EMAIL}> {EPOCH}\n"
                f"data {len(message.encode())}\n{message}\ndeleteall\n".encode()
            )
            for member in archive:
                if not member.isfile() or not member.name.startswith(stem):
                    continue
                if member.name in skip or member.name.startswith(
                    tuple(name + "/" for name in skip)
                ):
                    continue
                mode = "755" if member.mode & 0o100 else "644"
                name = member.name.removeprefix(stem)
                body = archive.extractfile(member)
                assert body is not None
                out.write(f"M {mode} inline {name}\ndata {member.size}\n".encode())
                out.write(body.read() + b"\n")
            out.write(b"done\n")
        assert importer.stderr is not None
        said = importer.stderr.read().decode(errors="replace")
    if importer.returncode:
        raise Failure(
            f"git could not make the base commit ({said.strip()[:200]})",
            "free space if there is none, and run this again",
        )


def refuse_under_way(clone: Clone) -> None:
    """Refuse a checkout in which a rebase or the like is under way."""
    if what := clone.under_way():
        raise Failure(
            f"a {what} is under way in {show(clone.path)}",
            "end it with --continue or --abort",
        )


def refuse_unready(clone: Clone) -> None:
    """Refuse a checkout that a person is in the middle of changing.

    Raises:
        Failure: a rebase or the like is under way, or files are changed.
    """
    refuse_under_way(clone)
    if dirty := clone.dirty():
        raise Failure(
            f"{show(clone.path)} has uncommitted changes in {console.some(dirty)}",
            "commit or stash them",
        )


def refuse_taken(clone: Clone, branch: str) -> None:
    """Refuse to make or move a branch that git has other plans for.

    Raises:
        Failure: another worktree has it checked out, which would be left with files
            of another commit, or its name is in the way of one that is there.
    """
    path = shlex.quote(show(clone.path))
    for entry in clone("worktree", "list", "--porcelain").split("\n\n"):
        head, *lines = entry.split("\n")
        there = Path(head.removeprefix("worktree "))
        if f"branch refs/heads/{branch}" not in lines or not there.exists():
            continue
        if not there.samefile(clone.path):
            raise Failure(
                f"{branch} is checked out in {show(there)}",
                f"give VLLM={shlex.quote(str(there))}, or leave it there with "
                f"`git -C {shlex.quote(str(there))} switch --detach`",
            )
    above = branch.partition("/")[0]
    if clone.resolve(f"refs/heads/{above}"):
        raise Failure(
            f"git allows no {branch} beside the branch {above}",
            f"`git -C {path} branch -m {above} {above}-mine`",
        )


def refuse_loose(clone: Clone, goal: str) -> None:
    """Refuse to leave commits that only a detached HEAD has.

    Args:
        clone: where.
        goal: the commit to go to.

    Raises:
        Failure: no ref has them, nor that commit.
    """
    head = clone.head
    if (
        head.startswith("refs/")
        or clone("for-each-ref", "--count=1", "--contains", head)
        or clone.contains(goal, head)
    ):
        return
    raise Failure(
        f"{show(clone.path)} is at {head[:12]}, which no branch or tag has",
        f"keep it with `git -C {shlex.quote(show(clone.path))} branch NAME`",
    )


def contents(clone: Clone, base: str, tip: str) -> list[series.Content] | None:
    """Return what the commits from base to tip say, None if they are no line."""
    parents = clone(
        "rev-list", "--reverse", "--topo-order", "--parents", f"{base}..{tip}"
    )
    rows = [row.split() for row in parents.splitlines()]
    before = base
    for row in rows:
        if row[1:] != [before]:
            return None
        before = row[0]
    if before != tip:
        return None
    return [series.content(clone.raw(row[0])) for row in rows]


def applied_ref(release: Release) -> str:
    """Return the ref that remembers the branch's tip as patches/ has it."""
    return f"refs/gemma4/applied/{release.tag}"


def replaced_ref(name: str) -> str:
    """Return the ref that keeps what the branch of a release was at before."""
    return f"refs/gemma4/replaced/{name}"


def unfinished(clone: Clone) -> Path:
    """Return the file that is there while the working tree is switched."""
    return clone.dir / "gemma4-switch"


def recover(clone: Clone) -> None:
    """Mend a switch of the working tree that ended half-way.

    Only what the switch took away or was writing is put back.

    Raises:
        Failure: there is something else, which a person has begun or changed since.
    """
    marker = unfinished(clone)
    if not marker.exists():
        return
    text = marker.read_text().split()
    known = [clone.resolve(commit) for commit in text]
    # HEAD moves last, so what it names is what the files must be.
    if len(text) != 2 or "" in known or clone.resolve("HEAD") not in known:
        # A person has gone elsewhere since.
        marker.unlink()
        return
    refuse_under_way(clone)
    old, new, head = (clone.files(commit) for commit in [*text, "HEAD"])
    touched = [n for n in old.keys() | new.keys() if old.get(n) != new.get(n)]
    ours = [n for n in touched if _ours(clone, n, old.get(n), new.get(n))]
    if not clone.dirty():
        # Cleaned since, but for what git does not track.
        for name in set(ours) - head.keys():
            (clone.path / name).unlink(missing_ok=True)
        marker.unlink()
        return
    # In the index as neither commit has it.
    first, second = (clone.unlike(commit) for commit in text)
    if other := first & second | set(touched) - set(ours):
        raise Failure(
            f"{min(other)} in {show(clone.path)} was changed after an interrupted "
            "apply",
            "`git stash` it or move it away, and run this again",
        )
    say("a switch of the files did not end: putting them back")
    (clone.dir / "index.lock").unlink(missing_ok=True)
    (clone.dir / "HEAD.lock").unlink(missing_ok=True)
    for name in touched:
        (clone.path / name).unlink(missing_ok=True)
    clone("read-tree", "--reset", "HEAD")
    back = b"".join(os.fsencode(name) + b"\0" for name in touched if name in head)
    clone("checkout-index", "-f", "-q", "-u", "-z", "--stdin", data=back)
    marker.unlink()


def _ours(clone: Clone, name: str, *entries: str | None) -> bool:
    """Return whether a file is gone or what one of two commits has, perhaps cut off."""
    path = clone.path / name
    if path.is_symlink():
        data = os.fsencode(path.readlink())
    elif path.is_file():
        data = path.read_bytes()
    else:
        return not path.exists()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    blobs = [entry.split()[1] for entry in entries if entry]
    return blob in blobs or any(git.begins(clone.read(one), data) for one in blobs)


def switch(clone: Clone, branch: str, tip: str) -> None:
    """Make `tip` the branch and check it out, or leave all as it was.

    Args:
        clone: a clean one.
        branch: its name.
        tip: the commit.

    Raises:
        Failure: git could not; what cannot be put back now `recover` puts back later.
    """
    marker = unfinished(clone)
    before = clone.resolve("HEAD")
    if before:
        marker.write_text(f"{before} {tip}\n")
    try:
        clone(
            "checkout", "-q", "--no-overwrite-ignore", "--no-track", "-B", branch, tip
        )
    except GitError as error:
        lock = clone.dir / "index.lock"
        if error.files:
            marker.unlink(missing_ok=True)
            files = ", ".join(error.files)
            if "untracked" not in str(error).split("\n")[0]:
                raise Failure(
                    f"{files} in {show(clone.path)} have changes that git was told not "
                    "to see",
                    "`git update-index --no-skip-worktree` (or --no-assume-unchanged) "
                    "them, then commit or stash them",
                ) from None
            raise Failure(
                f"untracked files in {show(clone.path)} are in the way: {files}",
                "move them away",
            ) from None
        if "index.lock': File exists" in str(error) and lock.exists():
            marker.unlink(missing_ok=True)
            raise Failure(
                f"another git is at work in {show(clone.path)}",
                f"end it, or remove {show(lock)} if none is",
            ) from None
        then = "mend that and run this again"
        try:
            recover(clone)
        except (Failure, GitError, OSError):
            then += ", which puts its files back"
        line = error.denied or str(error).split("\n")[0]
        raise Failure(
            f"git could not switch {show(clone.path)} to {branch} ({line})", then
        ) from None
    # git only warns of what it may not write.
    if left := clone.dirty():
        raise Failure(
            f"git could not switch {console.some(left)} in {show(clone.path)}",
            "see that they can be written and run this again",
        )
    marker.unlink(missing_ok=True)


def _continue(clone: Clone, halt: series.Conflict, back: list[str]) -> None:
    """Go on at a patch that does not apply, or stop there for a person to.

    Args:
        clone: where.
        halt: the patch.
        back: what brings the branch and HEAD back after `git am --abort`.
    """
    paths = [str(path) for path in halt.rest]
    try:
        clone("am", "-q", "-3", "--keep-non-patch", "--no-scissors", *paths)
    except GitError:
        if not clone("diff", "--name-only", "--diff-filter=U"):
            # Not even a three-way merge: leave what fits and .rej files.
            stuck = clone.dir / "rebase-apply" / "patch"
            before = clone.untracked()
            with contextlib.suppress(GitError):
                clone("apply", "--reject", "--whitespace=nowarn", str(stuck))
            if made := sorted(clone.untracked() - before):
                back.insert(0, f"rm -f -- {shlex.join(made)}")
        where = shlex.quote(show(clone.path))
        say(f"to give up: {' && '.join([f'cd {where}', 'git am --abort', *back])}")
        raise Failure(
            str(halt).split(" does not apply", 1)[0]
            + f" needs you: conflicts or .rej files are in {show(clone.path)}",
            "mend and `git add` them, `git am --continue`, then "
            f"`{console.make('export')}`",
        ) from None
    export = console.make("export")
    say(f"a three-way merge made all of it fit: `{export}` writes that to patches/")


def export_command(clone: Clone, tag: str) -> str:
    """Return the command that writes the commits of a release's branch to patches/.

    Args:
        clone: where the branch is.
        tag: which release.
    """
    words = pins.command("export", tag)
    branch = pins.load(tag).branch
    if clone.head == f"refs/heads/{branch}":
        return words
    where = shlex.quote(show(clone.path))
    return f"git -C {where} switch {branch} && {words}"


def unexported(clone: Clone, branch: str, base: str, recorded: str) -> bool:
    """Return whether a branch has work that patches/ has not."""
    now = clone.resolve("refs/heads/" + branch)
    return now not in ("", clone.resolve(recorded), base)


def refuse_unexported(
    clone: Clone, branch: str, base: str, recorded: str, hint: str
) -> None:
    """Refuse a branch with work that is nowhere else.

    Args:
        clone: where.
        branch: its name; it need not exist.
        base: the commit it starts from.
        recorded: the ref that remembers what of it is in patches/.
        hint: how to write them, followed by how to drop them.

    Raises:
        Failure: it has commits that patches/ has not.
    """
    if unexported(clone, branch, base, recorded):
        raise Failure(
            f"{branch} in {show(clone.path)} has commits that patches/ has not",
            f"{hint} drop them with `git -C "
            f"{shlex.quote(show(clone.path))} branch -m {branch} {branch}-old`",
        )


def count(patches: int) -> str:
    """Return a number of patches in words."""
    return f"{patches} patch" if patches == 1 else f"{patches} patches"


def apply(release: Release) -> Clone:
    """Bring a checkout to the series.

    Args:
        release: which series.

    Returns:
        The checkout.

    Raises:
        Failure: it cannot, and the checkout is as it was.
    """
    go_on = console.enabled("CONTINUE")
    clone, base = open_clone(release)
    # Another project, or another worktree of the clone, has another build/.
    with console.lock(clone.common / "gemma4"):
        _apply(clone, base, release, go_on)
    return clone


def _apply(clone: Clone, base: str, release: Release, go_on: bool) -> None:
    recover(clone)
    refuse_under_way(clone)
    files = series.patches(release.patches)
    where = f"{show(clone.path)} ({release.branch})"
    many = count(len(files))
    halt = None
    try:
        with console.scratch() as folder:
            commits = series.derive(clone, base, files, folder)
    except series.Conflict as conflict:
        if not go_on:
            raise
        commits, halt = conflict.good, conflict
    tip = commits[-1] if commits else base
    head = "refs/heads/" + release.branch
    now = clone.resolve(head)
    wanted = contents(clone, base, tip)
    at = clone.head
    on_branch = at == head
    same = now and not halt and contents(clone, base, now) == wanted
    if same and on_branch:
        clone("update-ref", applied_ref(release), now)
        changed = " (with uncommitted changes)" if clone.dirty() else ""
        say(f"already applied: {many} in {where}{changed}")
        return
    refuse_unready(clone)
    if not same:
        refuse_unexported(
            clone,
            release.branch,
            base,
            applied_ref(release),
            f"write them with `{export_command(clone, release.tag)}`, or",
        )
    goal, kept = now if same else tip, ""
    refuse_taken(clone, release.branch)
    refuse_loose(clone, goal)
    if now not in ("", base, goal):
        kept = clone.keep(now, replaced_ref(release.tag))
    switch(clone, release.branch, goal)
    clone("update-ref", applied_ref(release), goal)
    if not halt:
        say(f"applied {many} to {where}, {tip[:12]}")
    if kept:
        say(f"what was there before is {kept}")
    if halt:
        was = now or goal
        back = [
            f"git reset -q --hard {was[:12]}",
            f"git update-ref {applied_ref(release)} {was[:12]}",
        ]
        if not on_branch:
            name = at.removeprefix("refs/heads/")
            back.append(f"git checkout -q {shlex.quote(name)}")
        _continue(clone, halt, back)


def main() -> None:
    """Apply the series."""
    with console.lock():
        apply(pins.load(console.option("RELEASE")))


if __name__ == "__main__":
    console.run(main)
