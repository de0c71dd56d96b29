# SPDX-License-Identifier: Apache-2.0
"""`make export`: a checkout's commits as the series in patches/."""

import shlex
import shutil
from pathlib import Path

from scripts import console, pins, series
from scripts.apply import (
    applied_ref,
    contents,
    count,
    open_clone,
    recover,
    refuse_unready,
)
from scripts.console import BUILD, Failure, say, show
from scripts.git import Clone
from scripts.pins import Release


def commits(clone: Clone, base: str, release: Release) -> list[str]:
    """Return the commits to export.

    Args:
        clone: a clean checkout on the release's branch.
        base: the release's commit.
        release: the release.

    Raises:
        Failure: they are no line of finished commits on the release.
    """
    where = shlex.quote(show(clone.path))
    refuse_unready(clone)
    head = clone.head.removeprefix("refs/heads/")
    if head != release.branch:
        raise Failure(
            f"{where} is at {head[:40]}, not on {release.branch}",
            f"`git -C {where} switch {release.branch}`, "
            f"or `{console.make('apply')}` first",
        )
    tip = clone.resolve("HEAD")
    said = contents(clone, base, tip)
    if said is None:
        merges = clone("rev-list", "--merges", f"{base}..{tip}").split()
        raise Failure(
            f"{release.branch} has a merge ({merges[0][:12]})"
            if merges
            else f"{release.branch} does not start from {release.tag}",
            f"make it a line with `git rebase {release.tag}`",
        )
    for content in said:
        title = content.message.split("\n")[0]
        if title.startswith(("fixup!", "squash!", "amend!")):
            raise Failure(
                f'"{title}" is not folded in yet',
                f"`git -C {where} rebase -i --autosquash {release.tag}`",
            )
    return clone("rev-list", "--reverse", f"{base}..{tip}").split()


def export(release: Release) -> None:
    """Write the series.

    Args:
        release: which.

    Raises:
        Failure: the checkout is not in a state to export; patches/ is as it was.
    """
    clone, base = open_clone(release)
    with console.lock(clone.common / "gemma4"):
        _export(clone, base, release)


def _export(clone: Clone, base: str, release: Release) -> None:
    recover(clone)
    target = release.patches
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        # A run was killed between the two renames below.
        old.rename(target)
    console.remove(old)
    console.remove(target.with_name(f".{target.name}.new"))
    listed = commits(clone, base, release)
    if not listed and any(target.glob("*.patch")):
        raise Failure(
            f"{release.branch} has no commits but {show(target)} has patches",
            f"run `{console.make('apply')}`, or delete the patches by hand if that is "
            "meant",
        )
    with console.scratch() as folder:
        made = folder / "made"
        for name in ("write", "check", "made", "there"):
            (folder / name).mkdir()
        files = series.write(clone, listed, folder / "write", made)
        _check(clone, base, listed, files, folder / "check")
        before = {path.name: path.read_bytes() for path in target.glob("*.patch")}
        after = {path.name: path.read_bytes() for path in files}
        if before != after:
            applied = clone.resolve(applied_ref(release))
            has_all = _has_all(clone, base, release, applied, folder / "there")
            if not has_all and applied == clone.resolve("HEAD"):
                # All of it was applied or exported before: there is nothing to
                # write, only something to lose.
                raise Failure(
                    f"{show(target)} was edited since {release.branch} was made of it",
                    f"`{console.make('apply')}` takes that in",
                )
            if before and not has_all:
                say(f"what was edited there is kept in {show(_keep(target))}")
            _replace(target, made, old)
    clone("update-ref", applied_ref(release), clone.resolve("HEAD"))
    changed = [name for name in after if after[name] != before.get(name)]
    gone = sorted(before.keys() - after.keys())
    for name in changed:
        say(f"wrote {show(target / name)}")
    for name in gone:
        say(f"removed {show(target / name)}")
    say(
        f"{count(len(after))} in {show(target)}, "
        f"{len(changed)} written, {len(gone)} removed"
    )


def _check(
    clone: Clone, base: str, listed: list[str], files: list[Path], folder: Path
) -> None:
    """Refuse commits that would come back different from their patches."""
    try:
        again = series.derive(clone, base, files, folder)
    except series.Conflict as halt:
        again = halt.good
    for at, commit in enumerate(listed):
        was = series.content(clone.raw(commit))
        now = series.content(clone.raw(again[at])) if at < len(again) else None
        if was != now:
            what = "message" if now and was.tree == now.tree else "change"
            title = was.message.split("\n")[0]
            raise Failure(
                f'the {what} of {commit[:12]} "{title}" would not survive as a patch',
                "look for lines such as `---` or `diff -` in its message",
            )


def _has_all(
    clone: Clone, base: str, release: Release, applied: str, folder: Path
) -> bool:
    """Return whether the commits of a branch say all that patches/ do.

    Args:
        clone: where commits are made.
        base: the release's commit.
        release: the release.
        applied: the branch's tip when patches/ were applied or written last.
        folder: an empty folder to work in.
    """
    try:
        files = series.patches(release.patches)
        there = series.derive(clone, base, files, folder)
    except Failure:
        # Edited, or `make apply` stopped at one of them.
        return False
    said = [
        content
        for tip in (applied, clone.resolve("HEAD"))
        if tip
        for content in contents(clone, base, tip) or ()
    ]
    return all(series.content(clone.raw(one)) in said for one in there)


def _replace(target: Path, made: Path, old: Path) -> None:
    """Put a folder in the place of another; a kill leaves one of the two."""
    target.mkdir(parents=True, exist_ok=True)
    # Beside it, as build/ may be on another disk.
    fresh = target.with_name(f".{target.name}.new")
    shutil.copytree(made, fresh)
    for path in target.iterdir():
        if path.suffix == ".patch":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)
    try:
        target.rename(old)
        fresh.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    console.remove(old)


def _keep(target: Path) -> Path:
    """Copy patches that no commit has to where nothing removes them."""
    kept = console.free(BUILD / "patches", f"{target.name}-{{}}")
    shutil.copytree(target, kept)
    return kept


def main() -> None:
    """Export the checkout's commits."""
    with console.lock():
        export(pins.load(console.option("RELEASE")))


if __name__ == "__main__":
    console.run(main)
