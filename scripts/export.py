# SPDX-License-Identifier: Apache-2.0
"""`make export`: a checkout's commits as the series in patches/."""

from pathlib import Path

from scripts import console, git, pins, series
from scripts.apply import (
    applied_ref,
    contents,
    count,
    halted_ref,
    open_clone,
    refuse_unready,
)
from scripts.console import ROOT, Failure, say, show
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
            f"`git -C {where} switch {release.branch}`, or `make apply` first",
        )
    tip = clone.resolve("HEAD")
    if tip == clone.resolve(halted_ref(release)):
        raise Failure(
            f"{release.branch} ends before the patch that did not apply",
            f"mend that in {show(release.patches)} and run "
            f"`{console.make('apply')}`, or go on from there",
        )
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
            "run `make apply`, or delete the patches by hand if that is meant",
        )
    with console.scratch() as folder:
        made = folder / "made"
        for name in ("write", "check", "made"):
            (folder / name).mkdir()
        files = series.write(clone, listed, folder / "write", made)
        _check(clone, base, listed, files, folder / "check")
        before = {path.name: path.read_bytes() for path in target.glob("*.patch")}
        after = {path.name: path.read_bytes() for path in files}
        if listed and clone.resolve(applied_ref(release)) == listed[-1]:
            _refuse_edited(target, before, after)
        if before != after:
            _replace(target, made, old)
    clone("update-ref", applied_ref(release), clone.resolve("HEAD"))
    clone("update-ref", "-d", halted_ref(release))
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


def _refuse_edited(
    target: Path, before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    """Refuse to write over what was edited by hand and is nowhere else.

    Args:
        target: the folder of the patches.
        before: what it has.
        after: what the commits give, all of which were applied or exported before.

    Raises:
        Failure: a patch has uncommitted changes.
    """
    try:
        changed = git.find(ROOT).dirty()
    except Failure:
        return
    for name in before:
        path = (target / name).relative_to(ROOT)
        if before[name] != after.get(name) and str(path) in changed:
            raise Failure(
                f"{show(target / name)} was edited since it was applied",
                f"`{console.make('apply')}` takes that in; `git checkout` undoes it",
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
