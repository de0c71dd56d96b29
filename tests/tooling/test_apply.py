# SPDX-License-Identifier: Apache-2.0
"""Applying, and each way in which it can go wrong."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import BRANCH, TAG, Toy, instead, saboteur

ATTEMPTS = list(range(1, 60, 5))


def status(toy: Toy, at: Path | None = None) -> str:
    return toy.git("status", "--porcelain", at=at)


def test_one_commit_a_patch(filled: Toy) -> None:
    filled.reset()
    done = filled.run("apply")
    assert "applied 3 patches" in done.stderr
    log = filled.git("log", "--format=%s", f"{TAG}..{BRANCH}").splitlines()
    assert log == ["[Model] A new file", "[Model] Wörter", "[Model] Name ten"]
    assert status(filled) == ""
    assert (filled.own / "vllm/new.py").read_text() == "# SPDX\nx = 1\n"


def test_base_is_upstreams_tree(filled: Toy) -> None:
    names = filled.git("ls-tree", "-r", TAG).splitlines()
    assert len(names) == 7
    assert not any("PKG-INFO" in name or "_version" in name for name in names)
    assert next(n for n in names if n.startswith("100755")).endswith("run.sh")


def test_same_hashes_with_hostile_settings(
    filled: Toy, hostile: dict[str, Any]
) -> None:
    filled.reset()
    filled.run("apply")
    first = filled.head()
    filled.reset()
    filled.run("apply", **hostile)
    assert filled.head() == first
    assert status(filled) == ""


def test_twice(filled: Toy) -> None:
    filled.reset()
    filled.run("apply")
    first = filled.head()
    assert "already applied: 3 patches" in filled.run("apply").stderr
    assert filled.head() == first


def test_empty_series(toy: Toy) -> None:
    assert "applied 0 patches" in toy.run("apply").stderr
    assert "already applied" in toy.run("apply").stderr


def test_unknown_release(toy: Toy) -> None:
    assert "RELEASE=v9 is unknown: pins.toml has v1.0.0" in toy.fails(
        "apply", RELEASE="v9"
    )


def test_drifted_base(toy: Toy) -> None:
    pins = toy.root / "pins.toml"
    pins.write_text(pins.read_text().replace('base = ""', f'base = "{"1" * 40}"'))
    assert "not the pinned 111111111" in toy.fails("apply")


def test_git_that_ends_before_it_has_all(toy: Toy, tmp_path: Path) -> None:
    path = instead(tmp_path, "fast-import", 'echo "fatal: no room" >&2; exit 1')
    line = toy.fails("apply", PATH=path)
    assert "git could not make the base commit (fatal: no room)" in line
    assert not toy.own.exists()
    toy.run("apply")


def test_changed_series_moves_the_branch(filled: Toy) -> None:
    filled.run("apply")
    last = sorted(filled.patches.glob("*.patch"))[-1]
    last.write_text(last.read_text().replace("+x = 1", "+x = 2"))
    filled.run("apply")
    assert (filled.own / "vllm/new.py").read_text() == "# SPDX\nx = 2\n"
    assert status(filled) == ""


def test_extra_commit_is_kept(filled: Toy) -> None:
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "Mine")
    tip = filled.head()
    line = filled.fails("apply")
    assert "has commits that patches/ has not" in line and "make export" in line
    assert filled.head() == tip


def test_amended_commit_is_kept(filled: Toy) -> None:
    filled.git("commit", "-q", "--amend", "-m", "reworded")
    tip = filled.head()
    assert "has commits that patches/ has not" in filled.fails("apply")
    assert filled.head() == tip


@pytest.mark.parametrize("continued", ["", "1"])
def test_commits_of_a_detached_head_are_kept(filled: Toy, continued: str) -> None:
    tip = filled.head()
    filled.git("switch", "-q", "--detach", TAG)
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "Mine")
    mine = filled.head()
    if continued:
        break_first(filled)
    line = filled.fails("apply", CONTINUE=continued)
    assert f"is at {mine[:12]}, which no branch or tag has: keep it with" in line
    assert "`git -C build/vllm branch NAME`" in line
    assert filled.head() == mine and filled.git("rev-parse", BRANCH) == tip
    filled.git("branch", "mine")
    filled.run("apply", ok=not continued, CONTINUE=continued)


def test_a_detached_head_of_the_series(filled: Toy) -> None:
    filled.reset()
    filled.run("apply")
    tip = filled.head()
    filled.git("switch", "-q", "--detach")
    filled.git("branch", "-D", BRANCH)
    filled.git("update-ref", "-d", f"refs/gemma4/applied/{TAG}")
    filled.run("apply")
    assert filled.head() == tip


def test_uncommitted_changes_are_kept(filled: Toy) -> None:
    (filled.own / "vllm/a.py").write_text("mine\n")
    sorted(filled.patches.glob("*.patch"))[-1].unlink()
    line = filled.fails("apply")
    assert "uncommitted changes in vllm/a.py: commit or stash them" in line
    assert (filled.own / "vllm/a.py").read_text() == "mine\n"


def test_under_way_between_two_commits(filled: Toy) -> None:
    """Then git has no commit that it picks."""
    filled.git("switch", "-q", "--detach", TAG)
    filled.change("vllm/a.py", "a10 = 10\n", "a10 = 'X'\n", "in the way")
    with pytest.raises(AssertionError):
        filled.git("cherry-pick", f"{TAG}..{BRANCH}")
    filled.git("checkout", "-q", "--theirs", "vllm/a.py")
    filled.git("commit", "-qam", "mended")
    mine = filled.head()
    line = filled.fails("apply")
    assert "a cherry-pick or revert is under way in build/vllm: end it with" in line
    assert filled.head() == mine


@pytest.mark.parametrize("what", ["rebase", "am", "merge", "cherry-pick", "bisect"])
def test_under_way(filled: Toy, what: str) -> None:
    filled.git("switch", "-q", "--detach", TAG)
    filled.change("vllm/a.py", "a10 = 10\n", "a10 = 'X'\n", "in the way")
    first = sorted(filled.patches.glob("*.patch"))[0]
    begin = {
        "rebase": ["rebase", BRANCH],
        "am": ["am", str(first)],
        "merge": ["merge", BRANCH],
        "cherry-pick": ["cherry-pick", f"{BRANCH}~2"],
        "bisect": ["bisect", "start"],
    }[what]
    if what == "bisect":
        filled.git(*begin)
    else:
        with pytest.raises(AssertionError):
            filled.git(*begin)
    before = status(filled)
    assert f"{what} is under way" in filled.fails("apply")
    break_first(filled)
    assert f"{what} is under way" in filled.fails("apply")
    assert status(filled) == before


def break_first(toy: Toy) -> None:
    """Make the second patch not fit, in its second hunk."""
    path = sorted(toy.patches.glob("*.patch"))[1]
    text = path.read_text()
    hunk = " b2 = 2\n-b50 = 50\n"
    text = text.replace("-b50 = 50\n", "-b50 = 51\n")
    assert hunk not in text
    path.write_text(text)


def test_conflict(filled: Toy) -> None:
    filled.git("switch", "-q", "--detach", TAG)
    filled.git("branch", "-D", BRANCH)
    before = filled.head()
    break_first(filled)
    line = filled.fails("apply", RELEASE=TAG)
    assert "0002-Model-W-rter.patch does not apply to vllm/b.py, hunk 1 of 1" in line
    assert f"`make apply CONTINUE=1 RELEASE={TAG}` stops there" in line
    assert filled.head() == before and status(filled) == ""
    assert filled.git("branch", "--list", BRANCH) == ""


def test_conflict_names_the_hunk(filled: Toy) -> None:
    filled.git("switch", "-q", "--detach", f"{BRANCH}~3")
    filled.git("branch", "-f", BRANCH, "HEAD")
    filled.git("switch", "-q", BRANCH)
    text = (filled.own / "vllm/a.py").read_text()
    for n in (5, 30, 55):
        text = text.replace(f"a{n} = {n}\n", f"a{n} = -{n}\n")
    (filled.own / "vllm/a.py").write_text(text)
    filled.git("commit", "-qam", "[Model] Three hunks")
    filled.run("export")
    path = next(filled.patches.glob("*.patch"))
    path.write_text(path.read_text().replace("-a30 = 30\n", "-a30 = 31\n"))
    filled.reset()
    assert "vllm/a.py, hunk 2 of 3 (line 28)" in filled.fails("apply")


def test_conflict_with_a_missing_file(filled: Toy) -> None:
    path = sorted(filled.patches.glob("*.patch"))[0]
    path.write_text(path.read_text().replace("vllm/a.py", "vllm/gone.py"))
    filled.reset()
    assert "vllm/gone.py: does not exist" in filled.fails("apply")


def test_continue(filled: Toy) -> None:
    filled.reset()
    filled.run("apply")
    sorted(filled.patches.glob("*.patch"))[0].unlink()
    # Now the branch is what patches/ had before, and is moved back for this.
    break_first_again = sorted(filled.patches.glob("*.patch"))[0]
    break_first_again.write_text(
        break_first_again.read_text().replace("-b50 = 50\n", "-b50 = 51\n")
    )
    for old, new in (("0002-", "0001-"), ("0003-", "0002-")):
        path = next(filled.patches.glob(f"{old}*"))
        path.rename(path.with_name(path.name.replace(old, new)))
    line = filled.fails("apply", CONTINUE="1")
    assert "git am --continue" in line and "0001-" in line
    assert (filled.own / ".git/rebase-apply").is_dir()
    assert (filled.own / "vllm/b.py.rej").exists() or "<<<<" in (
        filled.own / "vllm/b.py"
    ).read_text()
    # A person mends it and goes on.
    path = filled.own / "vllm/b.py"
    path.write_text(path.read_text().replace("b50 = 50\n", "b50 = 'mended'\n"))
    (filled.own / "vllm/b.py.rej").unlink(missing_ok=True)
    filled.git("add", "vllm/b.py")
    filled.git("am", "--continue")
    filled.run("export")
    assert b"mended" in filled.files()["0001-Model-W-rter.patch"]
    assert "already applied: 2 patches" in filled.run("apply").stderr


def test_a_stop_that_is_given_up_is_not_exported(filled: Toy) -> None:
    broken = sorted(filled.patches.glob("*.patch"))[1]
    good = broken.read_text()
    broken.write_text(good.replace("-b50 = 50\n", "-b50 = 51\n"))
    assert broken.read_text() != good
    assert "git am --continue" in filled.fails("apply", CONTINUE="1")
    filled.git("am", "--abort")
    filled.git("reset", "-q", "--hard")
    before = filled.files()
    assert "edited since gemma4/v1.0.0 was made of it" in filled.fails("export")
    assert filled.files() == before
    broken.write_text(good)
    filled.run("apply")
    filled.run("export")
    assert len(filled.files()) == len(before) and broken.read_text() == good


@pytest.mark.parametrize("where", ["branch", "release", "new"])
@pytest.mark.parametrize("merges", [True, False])
def test_a_stop_can_be_given_up(filled: Toy, where: str, merges: bool) -> None:
    for name, old, new in (("a", "a10 = 'ten'", "a10 = 11"), ("b", "b9", "c9")):
        path = filled.own / f"vllm/{name}.py"
        path.write_text(path.read_text().replace(old, new))
    (filled.own / "a new.py").touch()
    filled.git("add", "-A")
    filled.git("commit", "-qm", "[Model] Three files")
    filled.run("export")
    good = filled.files()
    first, *_, last = sorted(filled.patches.glob("*.patch"))
    first.write_text(first.read_text().replace("+a10 = 'ten'", "+a10 = 'zehn'"))
    if not merges:
        text = last.read_text()
        last.write_text(re.sub("(?m)^index [1-9a-f]{9}", f"index {'1' * 9}", text))
    if where == "release":
        filled.git("switch", "-q", "--detach", TAG)
    if where == "new":
        on_release(filled)
    (filled.own / "notes").write_text("mine\n")
    head = (filled.own / ".git/HEAD").read_text()
    refs = filled.git("for-each-ref", "refs/heads", "refs/gemma4/applied")
    done = filled.run("apply", ok=False, CONTINUE="1")
    assert (filled.own / "vllm/a.py.rej").exists() != merges
    assert "a git am is under way in build/vllm" in filled.fails("apply")
    (line,) = (one for one in done.stderr.splitlines() if one.startswith("to give"))
    back = line.removeprefix("to give up: ")
    subprocess.run(["sh", "-ec", back], cwd=filled.root, check=True)
    assert status(filled) == "?? notes"
    assert (filled.own / ".git/HEAD").read_text() == head
    if where != "new":
        now = filled.git("for-each-ref", "refs/heads", "refs/gemma4/applied")
        assert now == refs
    before = filled.files()
    filled.fails("export")
    assert filled.files() == before
    for name, data in good.items():
        (filled.patches / name).write_bytes(data)
    filled.run("apply")
    assert status(filled) == "?? notes"


def test_what_a_branch_was_is_kept(filled: Toy) -> None:
    before = filled.files()
    kept = f"refs/gemma4/replaced/{TAG}"

    def replaced() -> str:
        """Export what is there, and apply what patches/ was before."""
        assert "replaced" not in filled.run("export").stderr
        for path in filled.patches.glob("*.patch"):
            path.unlink()
        for name, data in before.items():
            (filled.patches / name).write_bytes(data)
        return filled.run("apply").stderr.splitlines()[-1]

    filled.change("vllm/a.py", "a40 = 40\n", "a40 = 'more'\n", "More")
    one = filled.head()
    assert replaced() == f"what was there before is {kept}"
    filled.change("vllm/a.py", "a40 = 40\n", "a40 = 'yet more'\n", "More")
    two = filled.head()
    assert replaced() == f"what was there before is {kept}.2"
    filled.git("reset", "-q", "--hard", one)
    assert replaced() == f"what was there before is {kept}"
    refs = filled.git("for-each-ref", "--format=%(objectname)", f"{kept}*")
    assert refs.split() == [one, two] and filled.head() not in (one, two)


def test_what_a_branch_was_is_kept_at_a_stop(filled: Toy) -> None:
    filled.run("apply")
    tip = filled.head()
    break_first(filled)
    done = filled.run("apply", ok=False, CONTINUE="1")
    assert f"what was there before is refs/gemma4/replaced/{TAG}\n" in done.stderr
    assert filled.git("rev-parse", f"refs/gemma4/replaced/{TAG}") == tip


def test_continue_with_a_three_way_merge(filled: Toy) -> None:
    # The last patch fits by the blobs that it names, not by its lines.
    filled.change("vllm/a.py", "a40 = 40\n", "a40 = 'before'\n", "Before")
    filled.change("vllm/a.py", "a42 = 42\n", "a42 = 'after'\n", "After")
    filled.run("export")
    next(filled.patches.glob("0004-*")).unlink()
    last = next(filled.patches.glob("0005-*"))
    last.rename(last.with_name(last.name.replace("0005", "0004")))
    tip = filled.head()
    assert "0004-Model-After.patch does not apply" in filled.fails("apply")
    assert filled.head() == tip
    done = filled.run("apply", CONTINUE="1")
    assert "a three-way merge made all of it fit" in done.stderr
    filled.run("export")
    assert len(filled.files()) == 4
    text = (filled.own / "vllm/a.py").read_text()
    assert "'after'" in text and "'before'" not in text


def test_no_patch_file(filled: Toy) -> None:
    (filled.patches / "0004-x.patch").write_text("hello\n")
    assert "0004-x.patch" in filled.fails("apply")


def test_two_with_one_number(filled: Toy) -> None:
    (filled.patches / "0003-x.patch").write_text("hello\n")
    assert "have one number" in filled.fails("apply")


def test_crlf_patch(filled: Toy) -> None:
    path = sorted(filled.patches.glob("*.patch"))[0]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    filled.reset()
    assert "CRLF" in filled.fails("apply")


def test_checkout_that_is_none(toy: Toy) -> None:
    toy.own.mkdir()
    assert "build/vllm is no git checkout" in toy.fails("apply")


# A clone of the person's own.


def test_clone(filled: Toy, clone: Path) -> None:
    (clone / "notes.txt").write_text("mine\n")
    main = filled.head(clone)
    done = filled.run("apply", VLLM=str(clone))
    assert "applied 3 patches" in done.stderr
    assert filled.git("merge-base", BRANCH, "main", at=clone) == filled.git(
        "rev-parse", TAG, at=clone
    )
    assert filled.git("rev-parse", "main", at=clone) == main
    assert status(filled, clone) == "?? notes.txt"
    assert "already applied" in filled.run("apply", VLLM=str(clone)).stderr


def test_clone_with_hostile_settings(
    filled: Toy, clone: Path, hostile: dict[str, Any]
) -> None:
    config = Path(hostile["GIT_CONFIG_GLOBAL"]).read_text()
    with (clone / ".git/config").open("a") as stream:
        stream.write(config)
    shutil.copytree(clone.parent / "hooks", clone / ".git/hooks", dirs_exist_ok=True)
    (clone / ".git/info").mkdir(exist_ok=True)
    (clone / ".git/info/attributes").write_text("*.py -diff\n*.py text eol=crlf\n")
    before = filled.files()
    filled.run("apply", VLLM=str(clone), **hostile)
    filled.run("export", VLLM=str(clone), **hostile)
    assert filled.files() == before


def test_clone_same_hashes(filled: Toy, clone: Path) -> None:
    other = clone.with_name("other")
    shutil.copytree(clone, other)
    for path in (clone, other):
        filled.run("apply", VLLM=str(path))
    assert filled.head(clone) == filled.head(other)


def test_clone_is_a_worktree(filled: Toy, clone: Path) -> None:
    linked = clone.with_name("linked")
    filled.git("worktree", "add", "-q", "--detach", str(linked), at=clone)
    filled.run("apply", VLLM=str(linked))
    assert filled.git("branch", "--show-current", at=linked) == BRANCH


def test_branch_of_another_worktree(filled: Toy, clone: Path) -> None:
    """Its files would be those of another commit than its branch."""
    linked = clone.with_name("linked ünd")
    filled.git("worktree", "add", "-q", "--detach", str(linked), at=clone)
    filled.run("apply", VLLM=str(linked))
    tip = filled.head(linked)
    last = sorted(filled.patches.glob("*.patch"))[-1]
    last.write_text(last.read_text().replace("+x = 1", "+x = 2"))
    line = filled.fails("apply", VLLM=str(clone))
    assert f"{BRANCH} is checked out in {linked}: give VLLM=" in line
    assert filled.head(linked) == tip and status(filled, linked) == ""
    # Where the folder is gone nothing can be.
    linked.rename(clone.with_name("away"))
    filled.run("apply", VLLM=str(clone))


def test_branch_named_as_the_folder_of_ours(filled: Toy, clone: Path) -> None:
    before = filled.head(clone)
    filled.git("branch", "gemma4", at=clone)
    line = filled.fails("apply", VLLM=str(clone))
    assert f"git allows no {BRANCH} beside the branch gemma4: `git -C" in line
    assert (filled.head(clone), status(filled, clone)) == (before, "")
    filled.git("branch", "-m", "gemma4", "gemma4-mine", at=clone)
    filled.run("apply", VLLM=str(clone))


def test_shallow_clone(filled: Toy, clone: Path) -> None:
    shallow = clone.with_name("shallow")
    filled.git(
        *("clone", "-q", "--depth=1", "-b", TAG, f"file://{clone}", str(shallow)),
        at=clone,
    )
    filled.run("apply", VLLM=str(shallow))
    filled.run("export", VLLM=str(shallow))


def test_partial_clone(filled: Toy, clone: Path) -> None:
    """It has files of the release only when it asks its server for them."""
    filled.change("run.sh", "", "echo\n", "later", at=clone)
    partial = filled.partial(clone, clone.with_name("partial ü"))
    filled.run("apply", VLLM=str(partial))
    assert "already applied" in filled.run("apply", VLLM=str(partial)).stderr
    assert (partial / "vllm/new.py").exists() and status(filled, partial) == ""
    before = filled.files()
    assert "0 written" in filled.run("export", VLLM=str(partial)).stderr
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More", at=partial)
    assert "1 written" in filled.run("export", VLLM=str(partial)).stderr
    assert filled.files().items() > before.items()


def test_dirty_clone(filled: Toy, clone: Path) -> None:
    (clone / "vllm/b.py").write_text("mine\n")
    head = filled.head(clone)
    assert "uncommitted changes in vllm/b.py" in filled.fails("apply", VLLM=str(clone))
    assert (clone / "vllm/b.py").read_text() == "mine\n"
    assert filled.head(clone) == head
    assert filled.git("branch", "--list", BRANCH, at=clone) == ""


@pytest.mark.parametrize("ignored", [False, True])
def test_untracked_file_in_the_way(filled: Toy, clone: Path, ignored: bool) -> None:
    if ignored:
        (clone / ".git/info").mkdir(exist_ok=True)
        (clone / ".git/info/exclude").write_text("new.py\n")
    (clone / "vllm/new.py").write_text("mine\n")
    line = filled.fails("apply", VLLM=str(clone))
    assert "untracked files" in line and "vllm/new.py" in line
    assert (clone / "vllm/new.py").read_text() == "mine\n"
    assert filled.git("branch", "--list", BRANCH, at=clone) == ""


@pytest.mark.parametrize("flag", ["skip-worktree", "assume-unchanged"])
def test_changes_that_git_does_not_see(filled: Toy, clone: Path, flag: str) -> None:
    (clone / "vllm/b.py").write_text("mine\n")
    filled.git("update-index", f"--{flag}", "vllm/b.py", at=clone)
    line = filled.fails("apply", VLLM=str(clone))
    assert "vllm/b.py in" in line and f"--no-{flag}" in line
    assert (clone / "vllm/b.py").read_text() == "mine\n"
    filled.git("update-index", f"--no-{flag}", "vllm/b.py", at=clone)
    assert "uncommitted changes in vllm/b.py" in filled.fails("apply", VLLM=str(clone))


def test_clone_without_the_release(filled: Toy, clone: Path) -> None:
    filled.git("tag", "-d", TAG, at=clone)
    pins = filled.root / "pins.toml"
    text = pins.read_text()
    short = filled.git("rev-parse", "--short=9", "main~1", at=clone)
    # The commit itself is there: its tag is not needed.
    filled.run("apply", VLLM=str(clone))
    pins.write_text(text.replace(short, "123456789"))
    assert "git fetch UPSTREAM tag v1.0.0" in filled.fails("apply", VLLM=str(clone))


def test_clone_with_a_base_that_was_made(filled: Toy, clone: Path) -> None:
    base = f"refs/gemma4/base/{TAG}"
    filled.git("fetch", "-q", str(filled.own), f"{TAG}:{base}", at=clone)
    pins = filled.root / "pins.toml"
    short = filled.git("rev-parse", "--short=9", TAG, at=clone)
    pins.write_text(pins.read_text().replace(short, "123456789"))
    for name in ("old", "older"):
        filled.run("apply", VLLM=str(clone))
        assert filled.git("merge-base", base, BRANCH, at=clone)
        filled.git("branch", "-m", BRANCH, f"{BRANCH}-{name}", at=clone)
        if name == "old":
            filled.git("tag", "-d", TAG, at=clone)


def test_clone_with_another_tag(filled: Toy, clone: Path) -> None:
    filled.git("tag", "-f", TAG, "main", at=clone)
    pins = filled.root / "pins.toml"
    short = filled.git("rev-parse", "--short=9", "main~1", at=clone)
    pins.write_text(pins.read_text().replace(short, "123456789"))
    assert "not vLLM's 123456789" in filled.fails("apply", VLLM=str(clone))


@pytest.mark.parametrize("what", ["absent", "plain", "inside", "bare", "other"])
def test_no_clone(filled: Toy, clone: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "inside":
        path = clone / "vllm"
    elif what != "absent":
        path.mkdir()
    if what == "bare":
        filled.git("init", "-q", "--bare", at=path)
    if what == "other":
        filled.git("init", "-q", at=path)
    filled.fails("apply", VLLM=str(path))


def test_folder_of_this_project(filled: Toy) -> None:
    filled.git("init", "-q", at=filled.root)
    line = filled.fails("apply", VLLM="patches")
    assert "patches is inside of this project: give VLLM= the top folder" in line


def test_continue_that_is_neither(filled: Toy) -> None:
    line = filled.fails("apply", CONTINUE="maybe")
    assert "CONTINUE=maybe is neither yes nor no" in line


def test_index_lock_of_another_git(filled: Toy, clone: Path) -> None:
    (clone / ".git/index.lock").touch()
    assert "another git is at work" in filled.fails("apply", VLLM=str(clone))
    assert (clone / ".git/index.lock").exists()


# Interrupts.


@pytest.mark.parametrize("kill", ["KILL", "TERM", "INT"])
def test_interrupted_anywhere(filled: Toy, tmp_path: Path, kill: str) -> None:
    filled.reset()
    filled.run("apply")
    wanted = filled.head()
    for nth in ATTEMPTS:
        filled.reset()
        folder = saboteur(tmp_path, nth, kill, '"$git" "$@"' if nth % 2 else ":")
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = filled.run("apply", ok=None, PATH=path)
        if not (folder / "hit").exists():
            break
        assert done.returncode != 0
        if kill != "KILL":
            assert done.stderr.splitlines()[-1].startswith("interrupted: "), nth
        filled.run("apply")
        assert filled.head() == wanted, nth
        assert status(filled) == "", nth
        assert not list((filled.root / "build").glob(".tmp-*"))
    else:
        raise AssertionError("more calls of git than attempts")
    assert nth > 20


def killed(toy: Toy, tmp_path: Path, at: Path, **env: Any) -> None:
    """Apply, and be killed when some files are changed."""
    path = instead(
        tmp_path,
        "--no-overwrite-ignore",
        f'cd "{at}"; touch .git/index.lock; printf "# SP" > vllm/new.py; '
        "rm vllm/a.py vllm/b.py; kill -9 $PPID; exit 1",
    )
    done = toy.run("apply", ok=None, PATH=path, **env)
    assert done.returncode == -signal.SIGKILL
    assert not (at / "vllm/a.py").exists()


def on_release(toy: Toy) -> Path:
    """Bring the project's checkout to the release, without the series."""
    toy.git("switch", "-q", "--detach", TAG)
    toy.git("branch", "-D", BRANCH)
    return toy.own


@pytest.mark.parametrize("where", ["own", "clone"])
def test_killed_while_files_change(
    filled: Toy, clone: Path, tmp_path: Path, where: str
) -> None:
    at = clone if where == "clone" else on_release(filled)
    env: dict[str, Any] = {"VLLM": str(clone)} if where == "clone" else {}
    killed(filled, tmp_path, at, **env)
    # A change made since must not be lost.
    (at / "vllm/b.py").write_text("mine\n")
    assert "vllm/b.py" in filled.fails("apply", **env)
    assert (at / "vllm/b.py").read_text() == "mine\n"
    (at / "vllm/b.py").unlink()
    (at / "vllm/b.py").symlink_to("mine")
    assert "vllm/b.py" in filled.fails("apply", **env)
    (at / "vllm/b.py").unlink()
    filled.run("apply", **env)
    assert status(filled, at) == ""
    assert filled.git("branch", "--show-current", at=at) == BRANCH


@pytest.mark.parametrize("what", ["staged", "new", "gone", "unmerged", "cherry-pick"])
def test_what_was_staged_after_a_kill_is_kept(
    filled: Toy, tmp_path: Path, what: str
) -> None:
    at = on_release(filled)
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 2\n", "two")
    filled.change("vllm/a.py", "a1 = 2\n", "a1 = 3\n", "three")
    three = filled.head()
    filled.git("switch", "-q", "--detach", TAG)
    killed(filled, tmp_path, at)
    (at / ".git/index.lock").unlink()
    filled.git("reset", "-q", "--hard")
    name = {"new": "vllm/mine.py", "gone": "run.sh"}.get(what, "vllm/a.py")
    path = at / name
    if what == "staged":
        was = path.read_text()
        path.write_text("mine\n")
        filled.git("add", name)
        path.write_text(was)
    elif what == "new":
        path.write_text("mine\n")
        filled.git("add", name)
        path.unlink()
    elif what == "gone":
        filled.git("rm", "-q", "--cached", name)
    else:
        flag = ["-n"] if what == "unmerged" else []
        with pytest.raises(AssertionError):
            filled.git("cherry-pick", *flag, three)
    index, before = filled.git("ls-files", "-s"), status(filled)
    line = filled.fails("apply")
    assert (what if what == "cherry-pick" else name) in line
    assert (filled.git("ls-files", "-s"), status(filled)) == (index, before)
    # What the line says helps.
    if what == "cherry-pick":
        filled.git("cherry-pick", "--abort")
    else:
        if what == "unmerged":
            filled.git("add", name)
        filled.git("stash")
    filled.run("apply")


@pytest.mark.parametrize("where", ["there", "elsewhere"])
def test_cleaned_after_a_kill(filled: Toy, tmp_path: Path, where: str) -> None:
    at = on_release(filled)
    killed(filled, tmp_path, at)
    (at / ".git/index.lock").unlink()
    filled.git("reset", "-q", "--hard")
    path = at / "vllm/new.py"
    assert path.exists()
    path.write_text("mine\n")
    if where == "elsewhere":
        filled.git("switch", "-q", "-c", "mine")
        filled.change("vllm/a.py", "a1 = 1\n", "a1 = 2\n", "mine")
        (at / "vllm/b.py").write_text("mine\n")
        line = filled.fails("apply")
        assert "uncommitted changes in vllm/b.py: commit or stash" in line
        filled.git("checkout", "-q", "vllm/b.py")
    line = filled.fails("apply")
    assert "untracked files" in line and "vllm/new.py" in line
    assert path.read_text() == "mine\n"
    assert not (at / ".git/gemma4-switch").exists()
    path.unlink()
    assert "putting" not in filled.run("apply").stderr


FULL = "echo \"fatal: Unable to create '.git/index.lock': No space\" >&2; exit 128"


@pytest.mark.parametrize("end", [FULL, "kill -INT $$", "kill -KILL $$"])
@pytest.mark.parametrize("back", [True, False])
def test_a_switch_that_fails_half_way(
    filled: Toy, tmp_path: Path, end: str, back: bool
) -> None:
    at = on_release(filled)
    before = filled.head()
    path = instead(
        tmp_path,
        # Where putting back fails too.
        "--no-overwrite-ignore"
        if back
        else '--no-overwrite-ignore "*|*" read-tree --reset',
        f'cd "{at}"; {"touch .git/index.lock; " * ("KILL" in end)}'
        f'printf "# SP" > vllm/new.py; rm -f vllm/a.py vllm/b.py; {end}',
    )
    line = filled.fails("apply", PATH=path)
    assert "another git" not in line
    assert ("No space): mend that and" if end == FULL else "ended with -") in line
    if back:
        assert (filled.head(), status(filled)) == (before, "")
        assert (at / ".git/HEAD").read_text() == before + "\n"
        assert not (at / ".git/gemma4-switch").exists()
    else:
        assert "which puts its files back" in line
    assert filled.git("branch", "--list", BRANCH) == ""
    assert ("putting them back" in filled.run("apply").stderr) != back
    assert status(filled) == ""


def test_modes_are_put_back(filled: Toy, tmp_path: Path) -> None:
    at = on_release(filled)
    (at / "data.txt").chmod(0o755)
    filled.git("commit", "-qam", "mine")
    filled.git("switch", "-q", "-c", "mine")
    path = instead(
        tmp_path,
        "--no-overwrite-ignore",
        f'cd "{at}"; chmod 644 data.txt; {FULL}',
    )
    assert "could not switch" in filled.fails("apply", PATH=path)
    assert (status(filled), filled.git("branch", "--show-current")) == ("", "mine")
    assert not (at / ".git/gemma4-switch").exists()


@pytest.mark.parametrize("verb", ["apply", "export"])
def test_kill_with_line_ends_of_windows(filled: Toy, tmp_path: Path, verb: str) -> None:
    at = on_release(filled)
    filled.git("config", "core.autocrlf", "true")
    filled.git("rm", "-q", "--cached", "-r", ".")
    filled.git("reset", "-q", "--hard")
    assert b"\r\n" in (at / "vllm/a.py").read_bytes()
    killed(filled, tmp_path, at)
    (at / "vllm/b.py").write_bytes(b"b0 = 0\r\nb1 = 1\r")
    done = filled.run(verb, ok=verb == "apply")
    assert "putting them back" in done.stderr
    assert status(filled) == ""


def test_files_that_could_not_be_switched(filled: Toy, tmp_path: Path) -> None:
    at = on_release(filled)
    real = shutil.which("git")
    path = instead(
        tmp_path,
        "--no-overwrite-ignore",
        f'"{real}" "$@"; cd "{at}"; for f in vllm/a.py vllm/b.py; do '
        f'"{real}" show {TAG}:$f > $f; done; exit 0',
    )
    line = filled.fails("apply", PATH=path)
    assert "git could not switch vllm/a.py and 1 more in build/vllm: see that" in line
    done = filled.run("apply")
    assert "putting them back" in done.stderr and "already applied" in done.stderr
    assert status(filled) == "" and filled.git("branch", "--show-current") == BRANCH


def test_two_at_once(filled: Toy) -> None:
    with filled.at_work():
        assert "another make command is at work" in filled.fails("apply")
    filled.run("apply")


@pytest.mark.parametrize("verb", ["apply", "export"])
def test_two_projects_on_one_clone(filled: Toy, clone: Path, verb: str) -> None:
    filled.run("apply", VLLM=str(clone))
    with filled.at_work(clone / ".git/gemma4"):
        line = filled.fails(verb, VLLM=str(clone))
    assert "another make command is at work in" in line
    assert f"{clone}/.git/gemma4/" in line
    filled.run(verb, VLLM=str(clone))
