# SPDX-License-Identifier: Apache-2.0
"""`make export`: a checkout's commits as the series in patches/."""

from pathlib import Path

from scripts import console, pins, series
from scripts.apply import applied_ref, contents, count, open_clone, refuse_unready
from scripts.console import Failure, say, show
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
    where = show(clone.path)
    refuse_unready(clone)
    head = (clone.dir / "HEAD").read_text().strip().removeprefix("ref: refs/heads/")
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
    target = release.patches
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        # A run was killed between the two renames below.
        old.rename(target)
    console.remove(old)
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
            if clone.resolve(applied_ref(release)) == clone.resolve("HEAD"):
                _refuse_unapplied(clone, base, release, listed, folder / "there")
            _replace(target, made, old)
    clone("update-ref", applied_ref(release), clone.resolve("HEAD"))
    changed = [name for name in after if after[name] != before.get(name)]
    gone = [name for name in before if name not in after]
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


def _refuse_unapplied(
    clone: Clone, base: str, release: Release, listed: list[str], folder: Path
) -> None:
    """Refuse to write over patches that say what no commit does.

    Args:
        clone: where commits are made.
        base: the release's commit.
        release: the release.
        listed: the commits, all of which were applied or exported before: there is
            nothing to write, only something to lose.
        folder: an empty folder to work in.

    Raises:
        Failure: patches/ was edited, or `make apply` stopped at one of them.
    """
    try:
        files = series.patches(release.patches)
        there = series.derive(clone, base, files, folder)
    except Failure:
        is_known = False
    else:
        said = [series.content(clone.raw(commit)) for commit in listed]
        is_known = all(series.content(clone.raw(one)) in said for one in there)
    if not is_known:
        raise Failure(
            f"{show(release.patches)} was edited since {release.branch} was made of it",
            f"`{console.make('apply')}` takes that in",
        )


def _replace(target: Path, made: Path, old: Path) -> None:
    """Put a folder in the place of another; a kill leaves one of the two."""
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        if path.suffix != ".patch":
            (made / path.name).write_bytes(path.read_bytes())
    try:
        target.rename(old)
        made.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    console.remove(old)


def main() -> None:
    """Export the checkout's commits."""
    with console.lock():
        export(pins.load(console.option("RELEASE")))


if __name__ == "__main__":
    console.run(main)
