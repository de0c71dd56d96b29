# SPDX-License-Identifier: Apache-2.0
"""Bringing a series to another release, and each way in which that can go wrong."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import BRANCH, MESSAGE, TAG, TREE, Toy, instead, release, saboteur

NEW = "v1.1.0"
NEW_BRANCH = f"gemma4/{NEW}"
FIRST = "0001-Model-Name-ten.patch"
SECOND = "0002-Model-W-rter.patch"
THIRD = "0003-Model-A-new-file.patch"


def edited(**files: tuple[str, str] | str | None) -> dict[str, str]:
    """Return upstream's next tree: `a=(old, new)` edits vllm/a.py, None removes it."""
    tree = dict(TREE)
    tree["vllm/later.py"] = "later = True\n"
    for stem, change in files.items():
        name = f"vllm/{stem}.py"
        if change is None:
            del tree[name]
        elif isinstance(change, str):
            tree[name] = change
        else:
            assert change[0] in tree[name]
            tree[name] = tree[name].replace(*change)
    return tree


def upstream(toy: Toy, **files: tuple[str, str] | str | None) -> None:
    release(toy, NEW, edited(**files))


CONFLICT: dict[str, Any] = {"a": ("a10 = 10\n", "a10 = 'upstream'\n")}


def tree(toy: Toy) -> Path:
    return toy.root / "build" / f"rebase-{NEW}"


def outcomes(said: str) -> dict[str, str]:
    """Return the summary: patch to outcome and note."""
    rows = [line.split(maxsplit=1) for line in said.splitlines() if line[:2] == "  "]
    return {row[0]: " ".join(row[1].split()) for row in rows if row[0][:2] == "00"}


def printed(toy: Toy, said: str) -> str:
    """Run the commands to read a conflict with; return what they show."""
    commands = [line for line in said.splitlines() if line.startswith("  git -C")]
    shown = [
        subprocess.run(
            command, shell=True, cwd=toy.root, capture_output=True, text=True
        ).stdout
        for command in commands
    ]
    assert len(shown) == 2 and all(shown)
    return "".join(shown)


def mend(toy: Toy, name: str = "vllm/a.py", text: str = "a10 = 'both'\n") -> None:
    """Settle a conflict as a person would."""
    path = tree(toy) / name
    out, skip = [], False
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("<<<<<<<"):
            skip = True
            out.append(text)
        if not skip:
            out.append(line)
        if line.startswith(">>>>>>>"):
            skip = False
    path.write_text("".join(out))
    toy.git("add", name, at=tree(toy))


def whole(toy: Toy) -> None:
    """Nothing of a rebase is left, and the branch is a line on the new release."""
    assert not tree(toy).exists()
    assert not (toy.own / ".git/gemma4-rebase.json").exists()
    assert not list((toy.own / ".git").glob("worktrees/*"))
    assert toy.git("merge-base", NEW, NEW_BRANCH) == toy.git("rev-parse", NEW)
    assert toy.git("status", "--porcelain") == ""


def test_clean(filled: Toy) -> None:
    upstream(filled, a=("a0 = 0\n", "a0 = 0\nmore = 1\n"))
    old = filled.git("rev-parse", BRANCH)
    done = filled.run("rebase", TO=NEW)
    assert outcomes(done.stderr) == {FIRST: "clean", SECOND: "clean", THIRD: "clean"}
    assert "3 clean" in done.stderr
    whole(filled)
    assert filled.git("branch", "--show-current") == NEW_BRANCH
    assert filled.git("rev-parse", BRANCH) == old
    text = (filled.own / "vllm/a.py").read_text()
    assert "more = 1" in text and "a10 = 'ten'" in text
    filled.run("export", RELEASE=NEW)
    folder = filled.root / "patches" / NEW
    assert sorted(path.name for path in folder.iterdir()) == [FIRST, SECOND, THIRD]
    assert "already applied: 3 patches" in filled.run("apply", RELEASE=NEW).stderr
    # And back: the old series is as it was.
    filled.run("apply")
    assert filled.head() == old


def test_merged(filled: Toy) -> None:
    upstream(filled, a=("a12 = 12\n", "a12 = 'upstream'\n"))
    done = filled.run("rebase", TO=NEW)
    assert outcomes(done.stderr) == {FIRST: "merged", SECOND: "clean", THIRD: "clean"}
    text = (filled.own / "vllm/a.py").read_text()
    assert "a10 = 'ten'\n" in text and "a12 = 'upstream'\n" in text
    report = (filled.root / f"build/reports/rebase-{NEW}.txt").read_text()
    assert "[Model] Name ten" in report and "a12 = 'upstream'" in report


def test_author_date_and_message_are_kept(filled: Toy) -> None:
    filled.git(
        *(
            "commit",
            "-q",
            "--amend",
            "--cleanup=verbatim",
            "--author=Ä B <a@x.invalid>",
        ),
        *("--date=2026-02-03T04:05:06+0530", "-m", "[Model] Ünd\n\n# kept\n\nend\n"),
    )
    filled.run("export")
    upstream(filled)
    filled.run("rebase", TO=NEW)
    said = filled.git("log", "-1", "--format=%an %aI %cI%n%B")
    date = "2026-02-03T04:05:06+05:30"
    assert said == f"Ä B {date} {date}\n[Model] Ünd\n\n# kept\n\nend"


def test_conflict(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    old = filled.head()
    done = filled.run("rebase", ok=False, TO=NEW)
    line = done.stderr.splitlines()[-1]
    assert f"{FIRST} conflicts with {NEW} in vllm/a.py" in line
    assert "make rebase CONTINUE=1" in line and "ABORT=1" in line
    assert "vllm/a.py: 1 lines added, 1 removed" in done.stderr
    # What it says to run shows upstream's change, and the patch's.
    shown = printed(filled, done.stderr)
    assert "+a10 = 'upstream'" in shown and "+a10 = 'ten'" in shown
    diffs = filled.root / f"build/reports/rebase-{NEW}-0001.diff"
    assert f"is in build/reports/{diffs.name};" in done.stderr
    text = diffs.read_text()
    assert text.index("+a10 = 'upstream'") < text.index("+a10 = 'ten'")
    assert "||||||| " in (tree(filled) / "vllm/a.py").read_text()
    # The checkout is free for other work.
    assert filled.head() == old
    assert filled.git("branch", "--list", NEW_BRANCH) == ""
    assert filled.git("status", "--porcelain") == ""

    assert f"is under way, stopped at {FIRST}" in filled.fails("rebase", TO=NEW)
    assert "vllm/a.py" in filled.fails("rebase", CONTINUE="1")
    filled.git("add", "vllm/a.py", at=tree(filled))
    line = filled.fails("rebase", CONTINUE="1")
    assert "vllm/a.py" in line and "has a conflict marker in line" in line
    mend(filled)
    (tree(filled) / "vllm/b.py").write_text("not added\n")
    assert "vllm/b.py" in filled.fails("rebase", CONTINUE="1")
    filled.git("restore", "vllm/b.py", at=tree(filled))

    done = filled.run("rebase", CONTINUE="1")
    said = outcomes(done.stderr)
    assert said == {FIRST: "conflict vllm/a.py", SECOND: "clean", THIRD: "clean"}
    whole(filled)
    assert "a10 = 'both'\n" in (filled.own / "vllm/a.py").read_text()
    filled.run("export", RELEASE=NEW)
    assert filled.files().keys() == {FIRST, SECOND, THIRD}
    text = (filled.root / "patches" / NEW / FIRST).read_text()
    assert "-a10 = 'upstream'\n+a10 = 'both'\n" in text and "Purpose: see" in text


def test_conflict_is_remembered(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    mend(filled)
    filled.run("rebase", CONTINUE="1")
    first = filled.git("rev-parse", f"{NEW_BRANCH}^{{tree}}")
    filled.git("switch", "-q", BRANCH)
    filled.git("branch", "-D", NEW_BRANCH)
    line = filled.fails("rebase", TO=NEW)
    assert "in vllm/a.py, mended as the last time" in line
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr)[FIRST] == "conflict vllm/a.py"
    assert filled.git("rev-parse", f"{NEW_BRANCH}^{{tree}}") == first


def test_person_commits_and_splits(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    mend(filled)
    filled.git("cherry-pick", "--continue", at=tree(filled))
    filled.change("run.sh", "", "echo\n", "Split off", at=tree(filled))
    (tree(filled) / "run.sh").write_text("not committed\n")
    assert "uncommitted changes in run.sh" in filled.fails("rebase", CONTINUE="1")
    assert (tree(filled) / "run.sh").read_text() == "not committed\n"
    filled.git("restore", "run.sh", at=tree(filled))
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr)[FIRST] == "conflict vllm/a.py; 2 commits"
    log = filled.git("log", "--format=%s", f"{NEW}..{NEW_BRANCH}").splitlines()
    assert log == [
        *("[Model] A new file", "[Model] Wörter"),
        *("[Model] Split off", "[Model] Name ten"),
    ]


@pytest.mark.parametrize("how", ["added", "committed"])
def test_file_that_is_not_added(filled: Toy, how: str) -> None:
    """It goes with the worktree, so it is asked for first."""
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    mend(filled)
    if how == "committed":
        filled.git("cherry-pick", "--continue", at=tree(filled))
    loose = tree(filled) / "vllm" / "a new.py"
    loose.write_text("mine\n")
    assert "vllm/a new.py" in filled.fails("rebase", CONTINUE="1")
    assert loose.read_text() == "mine\n"
    filled.git("add", str(loose), at=tree(filled))
    if how == "committed":
        assert "vllm/a new.py" in filled.fails("rebase", CONTINUE="1")
        filled.git("commit", "-q", "--amend", "--no-edit", at=tree(filled))
    filled.run("rebase", CONTINUE="1")
    whole(filled)
    assert filled.git("show", f"{NEW_BRANCH}:vllm/a new.py") == "mine"


def test_file_in_the_way_of_a_pick(filled: Toy, tmp_path: Path) -> None:
    upstream(filled)
    mine = tree(filled) / "vllm" / "new.py"
    path = instead(tmp_path, "cherry-pick", f'echo mine > "{mine}"')
    line = filled.fails("rebase", TO=NEW, PATH=path)
    assert f"{THIRD} could not be picked" in line
    assert f"are in the way in build/rebase-{NEW}: vllm/new.py: move them away" in line
    assert THIRD in filled.fails("rebase", CONTINUE="1")
    assert mine.read_text() == "mine\n"
    mine.unlink()
    filled.run("rebase", CONTINUE="1")
    whole(filled)


@pytest.mark.parametrize("how", ["--skip", "--abort"])
def test_person_skips(filled: Toy, how: str) -> None:
    """The two leave the same, so the patch is picked again."""
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    filled.git("cherry-pick", how, at=tree(filled))
    done = filled.run("rebase", ok=False, CONTINUE="1")
    assert f"has nothing of {FIRST}: picking it again" in done.stderr
    line = done.stderr.splitlines()[-1]
    assert f"{FIRST} conflicts with {NEW} in vllm/a.py" in line
    assert "(or `make rebase CONTINUE=1 DROP=1`, which drops the patch" in line
    mend(filled)
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr)[FIRST] == "conflict vllm/a.py"


@pytest.mark.parametrize("how", ["as it is", "--skip", "half mended"])
def test_person_drops(filled: Toy, how: str) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    if how == "--skip":
        filled.git("cherry-pick", how, at=tree(filled))
    if how == "half mended":
        mend(filled)
    done = filled.run("rebase", CONTINUE="1", DROP="1")
    said = outcomes(done.stderr)
    assert said == {FIRST: "dropped by you", SECOND: "clean", THIRD: "clean"}
    whole(filled)
    assert "'upstream'" in (filled.own / "vllm/a.py").read_text()
    kept = f"refs/gemma4/aborted/{NEW}"
    assert (f"is kept as {kept}\n" in done.stderr) == (how == "half mended")
    if how == "half mended":
        assert "a10 = 'both'" in filled.git("show", f"{kept}:vllm/a.py")


def test_drop_where_nothing_waits_for_it(filled: Toy, tmp_path: Path) -> None:
    upstream(filled, b=("b50 = 50\n", "b50 = 'upstream'\n"))
    assert "DROP= is given without CONTINUE=" in filled.fails(
        "rebase", TO=NEW, DROP="1"
    )
    stopped_short(filled, tmp_path)
    line = filled.fails("rebase", CONTINUE="1", DROP="1")
    assert "no patch has stopped: `make rebase CONTINUE=1` first" in line
    assert SECOND in filled.fails("rebase", CONTINUE="1")
    mend(filled, "vllm/b.py", "b50 = 'both'\n")
    filled.git("cherry-pick", "--continue", at=tree(filled))
    line = filled.fails("rebase", CONTINUE="1", DROP="1")
    assert f"has commits for {SECOND}, so DROP=1 does not drop it" in line
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr)[SECOND] == "conflict vllm/b.py"


def test_person_begins_something_else(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    filled.git("cherry-pick", "--skip", at=tree(filled))
    with pytest.raises(AssertionError):
        filled.git("merge", BRANCH, "--allow-unrelated-histories", at=tree(filled))
    assert "a merge is under way" in filled.fails("rebase", CONTINUE="1")
    filled.git("merge", "--abort", at=tree(filled))
    filled.git("checkout", "-q", TAG, at=tree(filled))
    assert "no line from" in filled.fails("rebase", CONTINUE="1")


@pytest.mark.parametrize("how", [{"ABORT": "1"}, {"CONTINUE": "1"}])
def test_person_rebases_in_the_worktree(filled: Toy, how: dict[str, Any]) -> None:
    """Their other commits are in nothing but that rebase."""
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    mend(filled)
    filled.git("-c", "core.editor=true", "cherry-pick", "--continue", at=tree(filled))
    for n in (1, 2):
        (tree(filled) / "vllm/b.py").write_text(f"mine = {n}\n")
        filled.git("commit", "-qam", f"mine {n}", at=tree(filled))
    mine = filled.head(tree(filled))
    edit = "sequence.editor=sed -i 's/^pick/edit/'"
    filled.git("-c", edit, "rebase", "-i", "HEAD~2", at=tree(filled))
    assert filled.head(tree(filled)) != mine
    line = filled.fails("rebase", **how)
    assert f"a rebase is under way in build/rebase-{NEW}: end it, then" in line
    filled.git("rebase", "--abort", at=tree(filled))
    filled.run("rebase", ABORT="1")
    kept = f"refs/gemma4/aborted/{NEW}"
    assert filled.git("rev-parse", kept) == mine


def test_worktree_removed_by_hand(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    shutil.rmtree(tree(filled))
    assert "conflicts with" in filled.fails("rebase", CONTINUE="1")
    mend(filled)
    filled.run("rebase", CONTINUE="1")
    whole(filled)


def test_worktree_cut_off(filled: Toy) -> None:
    """What a person mended there is not git's any more, but theirs."""
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    mend(filled)
    (tree(filled) / ".git").unlink()
    mended = tree(filled) / "vllm/a.py"
    assert "is no worktree of build/vllm any more" in filled.fails(
        "rebase", CONTINUE="1"
    )
    assert "left alone" in filled.run("rebase", ABORT="1").stderr
    assert "a10 = 'both'\n" in mended.read_text()
    assert "is in the way" in filled.fails("rebase", TO=NEW)


# What upstream did with the change itself.


def test_merged_upstream_verbatim(filled: Toy) -> None:
    upstream(filled, b=("b50 = 50\n", "b50 = 'é'\n"))
    done = filled.run("status", TO=NEW)
    rows = {row.split()[0]: row.split()[-1] for row in done.stdout.splitlines()}
    assert rows == {"patch": NEW, FIRST: "-", SECOND: "taken", THIRD: "-"}
    done = filled.run("rebase", TO=NEW)
    assert outcomes(done.stderr) == {
        FIRST: "clean",
        SECOND: f"dropped {NEW} has it",
        THIRD: "clean",
    }
    assert "2 clean, 1 dropped" in done.stderr
    filled.run("export", RELEASE=NEW)
    names = sorted(path.name for path in (filled.root / "patches" / NEW).iterdir())
    assert names == [FIRST, THIRD.replace("0003", "0002")]


def test_merged_upstream_differently(filled: Toy) -> None:
    filled.change("vllm/a.py", "a30 = 30\n", "a30 = 'x'\n", "Two places")
    path = filled.own / "vllm/b.py"
    path.write_text(path.read_text().replace("b5 = 5\n", "b5 = 'x'\n"))
    filled.git("commit", "-qa", "--amend", "--no-edit")
    filled.run("export")
    # Upstream took one of the two, and the other in its own way.
    upstream(
        filled, a=("a30 = 30\n", "a30 = 'x'\n"), b=("b5 = 5\n", "b5 = 'upstream'\n")
    )
    rows = filled.run("status", TO=NEW).stdout.splitlines()
    assert rows[-1].endswith("  1 of 2 hunks (vllm/a.py)")
    done = filled.run("rebase", ok=False, TO=NEW)
    assert "0004-Model-Two-places.patch conflicts" in done.stderr.splitlines()[-1]
    # Upstream's way is taken: nothing of the patch is left.
    filled.git("checkout", "--ours", "vllm/b.py", at=tree(filled))
    filled.git("add", "vllm/b.py", at=tree(filled))
    done = filled.run("rebase", CONTINUE="1")
    note = "dropped nothing of it is left"
    assert outcomes(done.stderr)["0004-Model-Two-places.patch"] == note


def test_all_merged_upstream(filled: Toy) -> None:
    series: dict[str, Any] = {
        "a": ("a10 = 10\n", "a10 = 'ten'\n"),
        "b": ("b50 = 50\n", "b50 = 'é'\n"),
        "new": "# SPDX\nx = 1\n",
    }
    upstream(filled, **series)
    done = filled.run("rebase", TO=NEW)
    assert "3 dropped" in done.stderr
    assert filled.git("rev-parse", NEW_BRANCH) == filled.git("rev-parse", NEW)


def test_renamed_upstream(filled: Toy) -> None:
    upstream(filled, b=None, c=TREE["vllm/b.py"].replace("b0 = 0\n", "b0 = 'c'\n"))
    done = filled.run("rebase", TO=NEW)
    assert outcomes(done.stderr)[SECOND] == "merged"
    text = (filled.own / "vllm/c.py").read_text()
    assert "b50 = 'é'\n" in text and not (filled.own / "vllm/b.py").exists()


def test_renamed_upstream_with_a_conflict(filled: Toy) -> None:
    moved = TREE["vllm/b.py"].replace("b50 = 50\n", "b50 = 'c'\n")
    upstream(filled, b=None, c=moved)
    done = filled.run("rebase", ok=False, TO=NEW)
    assert "vllm/c.py: it was vllm/b.py; 1 lines added, 1 removed" in done.stderr
    shown = printed(filled, done.stderr)
    assert "rename from vllm/b.py\nrename to vllm/c.py" in shown
    assert "-b50 = 50\n+b50 = 'c'\n" in shown and "-b50 = 50\n+b50 = 'é'\n" in shown
    mend(filled, "vllm/c.py", "b50 = 'both'\n")
    filled.run("rebase", CONTINUE="1")
    assert "b50 = 'both'\n" in (filled.own / "vllm/c.py").read_text()


def test_removed_upstream(filled: Toy) -> None:
    upstream(filled, b=None)
    done = filled.run("rebase", ok=False, TO=NEW)
    assert "vllm/b.py: it is gone there" in done.stderr
    filled.git("rm", "-q", "vllm/b.py", at=tree(filled))
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr)[SECOND] == "dropped nothing of it is left"


def test_added_upstream(filled: Toy) -> None:
    upstream(filled, new="# upstream's\n")
    done = filled.run("rebase", ok=False, TO=NEW)
    assert "vllm/new.py: it is new there" in done.stderr


@pytest.mark.parametrize("when", ["", "interrupted"])
def test_folder_renamed_upstream(filled: Toy, tmp_path: Path, when: str) -> None:
    release(filled, "v1.0.1", TREE | {"vllm/sub/old.py": "old = 1\n" * 9})
    release(filled, NEW, TREE | {"vllm/other/old.py": "old = 1\n" * 9})
    filled.run("rebase", TO="v1.0.1")
    filled.change("vllm/sub/new.py", "", "new = 1\n", "In a folder")
    filled.run("export", RELEASE="v1.0.1")
    env: dict[str, Any] = {"TO": NEW, "RELEASE": "v1.0.1"}
    if when:
        # Killed as soon as git has stopped.
        git = shutil.which("git")
        path = instead(
            tmp_path,
            "cherry-pick",
            f'"{git}" "$@" || {{ kill -9 $PPID; exit 1; }}; exit 0',
        )
        assert filled.run("rebase", ok=None, PATH=path, **env).returncode == -9
    done = filled.run("rebase", ok=False, **env)
    assert "  vllm/other/new.py: neither release has it\n" in done.stderr
    assert "    CONFLICT (file location): vllm/sub/new.py added in" in done.stderr
    assert "nothing: the patches before" not in done.stderr
    text = (filled.root / f"build/reports/rebase-{NEW}-0004.diff").read_text()
    assert "+++ b/vllm/sub/new.py\n" in text and "+new = 1\n" in text
    filled.git("add", "-A", at=tree(filled))
    filled.run("rebase", CONTINUE="1", RELEASE="v1.0.1")
    assert (filled.own / "vllm/other/new.py").read_text() == "new = 1\n"


@pytest.mark.parametrize("name", ["vllm/b.py", "vllm/new.py"])
def test_conflict_with_an_earlier_patch(filled: Toy, tmp_path: Path, name: str) -> None:
    """Upstream did nothing to the file, but an earlier patch is not there."""
    old, new = ("'é'", "'ü'") if name == "vllm/b.py" else ("x = 1", "x = 2")
    filled.change(name, old, new, "On top")
    filled.run("export")
    upstream(filled)
    # Its change is lost, as where a person has mended a conflict away.
    stopped_short(filled, tmp_path)
    at = tree(filled)
    state = filled.own / ".git/gemma4-rebase.json"
    said = json.loads(state.read_text())
    tip = filled.head(at)
    said["done"] += [{"outcome": "dropped", "tip": tip, "note": ""}] * 2
    state.write_text(json.dumps(said))
    done = filled.run("rebase", ok=False, TO=NEW)
    if name == "vllm/b.py":
        said = "nothing: the patches before this one conflict with it"
        assert f"  {name}: {said}\n" in done.stderr
    else:
        assert f"  {name}: neither release has it\n" in done.stderr
        assert f"    CONFLICT (modify/delete): {name} deleted in HEAD" in done.stderr


# Patches that are none.


def given(toy: Toy, tmp_path: Path, verb: str) -> dict[str, Any]:
    """What a verb needs to get as far as the patches."""
    if verb == "wheel":
        wheel = f'[releases."{TAG}".cpu.wheels.x86_64]\nfile = "x"\nsha256 = "x"\n'
        with (toy.root / "pins.toml").open("a") as pins:
            pins.write(f'[releases."{TAG}".cpu]\nproject = "x"\ntorch = "1"\n{wheel}')
        return {"DEVICE": "cpu", "MACHINE": "x86_64"}
    if verb == "install":
        (tmp_path / "RECORD").touch()
        python = tmp_path / "python"
        vllm = ["vllm", "1.0.0", str(tmp_path), str(tmp_path), False]
        found = json.dumps([False, [vllm]])
        python.write_text(f"#!/bin/sh\necho '{found}'\n")
        python.chmod(0o755)
        return {"PYTHON": str(python)}
    if verb == "upstream":
        toy.repository(tmp_path / "main", TREE, "upstream")
        for name, value in (("name", "Ada"), ("email", "ada@example.invalid")):
            toy.git("config", f"user.{name}", value, at=tmp_path / "main")
        return {"VLLM": str(tmp_path / "main"), "PATCH": "3"}
    return {"TO": NEW}


@pytest.mark.parametrize(
    "verb",
    ["apply", "rebase", "status", "verify", "wheel", "install", "upstream"],
)
@pytest.mark.parametrize(
    "fault", ["corrupt", "crlf", "crlf body", "crlf new", "cut", "misfit"]
)
def test_bad_patch(filled: Toy, tmp_path: Path, verb: str, fault: str) -> None:
    upstream(filled)
    filled.run("apply")
    tip = filled.head()
    name = THIRD if fault == "crlf new" else SECOND
    path = filled.patches / name
    text = path.read_bytes()
    head, mark, diff = text.partition(b"\ndiff --git ")
    mangled = head + mark + diff.replace(b"\n", b"\r\n")
    path.write_bytes(
        {
            "corrupt": text.replace(b"-b50 = 50\n", b"?b50 = 50\n"),
            "crlf": text.replace(b"\n", b"\r\n"),
            "crlf body": mangled,
            "crlf new": mangled,
            "cut": text.partition(b"+b50")[0],
            "misfit": text.replace(b"-b50 = 50\n", b"-b50 = 51\n"),
        }[fault]
    )
    line = filled.fails(verb, **given(filled, tmp_path, verb))
    assert name in line
    says = {"crl": "has CRLF", "mis": "does not apply to vllm/b.py, hunk 1 of 1"}
    assert says.get(fault[:3], "is corrupt (line ") in line
    assert filled.head() == tip and filled.git("status", "--porcelain") == ""
    assert (
        not tree(filled).exists() and filled.git("branch", "--list", NEW_BRANCH) == ""
    )


# What is in the way.


def test_nowhere_to_go(filled: Toy) -> None:
    upstream(filled)
    assert f"give TO= one of {TAG}, {NEW}" in filled.fails("rebase")
    filled.reset()
    assert "TO=v9 is unknown" in filled.fails("rebase", TO="v9")
    assert not filled.own.exists()
    assert "is on v1.0.0 already" in filled.fails("rebase", TO=TAG)
    assert "both TO= and TO_DIR=" in filled.fails("rebase", TO=NEW, TO_DIR="x")
    assert "TO_DIR=/nowhere is no folder" in filled.fails("rebase", TO_DIR="/nowhere")
    assert "no rebase is under way" in filled.fails("rebase", CONTINUE="1")
    assert "no rebase is under way" in filled.fails("rebase", ABORT="1")
    assert "has no patches" in filled.fails("rebase", RELEASE=NEW, TO=TAG)


@pytest.mark.parametrize("said", ["y", "on", "2"])
def test_neither_yes_nor_no(filled: Toy, said: str) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    for name in ("ABORT", "CONTINUE"):
        line = filled.fails("rebase", **{name: said})
        assert f"{name}={said} is neither yes nor no: give {name}=1" in line
    mend(filled)
    line = filled.fails("rebase", CONTINUE="1", ABORT="1")
    assert "both CONTINUE= and ABORT= are given" in line
    filled.run("rebase", CONTINUE="Yes", ABORT="No")


def test_commits_that_are_not_exported(filled: Toy) -> None:
    upstream(filled)
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "Mine")
    tip = filled.head()
    line = filled.fails("rebase", TO=NEW)
    assert "has commits that patches/ has not: write them with `make export`" in line
    assert filled.head() == tip


def test_new_branch_with_commits(filled: Toy) -> None:
    upstream(filled)
    filled.run("apply", RELEASE=NEW)
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "Mine")
    tip = filled.head()
    line = filled.fails("rebase", TO=NEW)
    assert f"{NEW_BRANCH} in build/vllm has commits" in line
    assert f"write them with `make export RELEASE={NEW}`, or" in line
    assert filled.git("rev-parse", NEW_BRANCH) == tip
    filled.git("switch", "-q", BRANCH)
    command = filled.fails("rebase", TO=NEW).split("`")[1]
    switch = f"git -C build/vllm switch {NEW_BRANCH}"
    assert command == f"{switch} && make export RELEASE={NEW}"
    subprocess.run(switch, shell=True, cwd=filled.root, check=True)
    filled.run("export", RELEASE=NEW)
    filled.run("rebase", TO=NEW)


def test_new_branch_that_moves_meanwhile(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    filled.git("switch", "-q", "-c", NEW_BRANCH, NEW)
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "Mine")
    tip = filled.head()
    mend(filled)
    line = filled.fails("rebase", CONTINUE="1")
    assert f"{NEW_BRANCH} in build/vllm has moved" in line
    assert filled.git("rev-parse", NEW_BRANCH) == tip
    hint = line.split("`")[1]
    subprocess.run(hint, shell=True, cwd=filled.root, check=True)
    filled.run("rebase", CONTINUE="1")
    whole(filled)
    assert filled.git("rev-parse", f"{NEW_BRANCH}-mine") == tip


def test_exported_branch_is_made_anew(filled: Toy) -> None:
    upstream(filled)
    assert "replaced" not in filled.run("rebase", TO=NEW).stderr
    filled.run("export", RELEASE=NEW)
    tip = filled.head()
    filled.git("switch", "-q", BRANCH)
    filled.git("reset", "-q", "--hard", "HEAD~1")
    for number in (1, 2):
        old, new = f"a{number} = {number}\n", f"a{number} = 11\n"
        filled.change("vllm/a.py", old, new, f"More {number}")
    filled.run("export")
    done = filled.run("rebase", TO=NEW)
    kept = f"refs/gemma4/replaced/{NEW}"
    assert f"what {NEW_BRANCH} was at before is {kept}\n" in done.stderr
    assert filled.git("rev-parse", kept) == tip
    done = filled.run("export", RELEASE=NEW)
    # What patches/ had, and the branch has no more, is known: nobody edited it.
    assert "4 patches" in done.stderr and "kept in" not in done.stderr
    # Nor is anything lost where nothing is new.
    filled.git("switch", "-q", BRANCH)
    assert "replaced" not in filled.run("rebase", TO=NEW).stderr


def test_uncommitted_changes_do_not_matter(filled: Toy) -> None:
    upstream(filled)
    (filled.own / "vllm/a.py").write_text("mine\n")
    (filled.own / "notes.txt").write_text("mine\n")
    done = filled.run("rebase", TO=NEW)
    assert "the checkout stays where it is" in done.stderr
    assert (filled.own / "vllm/a.py").read_text() == "mine\n"
    assert filled.git("branch", "--show-current") == BRANCH
    assert filled.git("status", "--porcelain") == "M vllm/a.py\n?? notes.txt"
    filled.git("restore", "vllm/a.py")
    filled.git("switch", "-q", NEW_BRANCH)
    assert "3 patches" in filled.run("export", RELEASE=NEW).stderr


def test_commits_of_a_detached_head_do_not_matter(filled: Toy) -> None:
    upstream(filled)
    filled.git("switch", "-q", "--detach", TAG)
    filled.git("commit", "-q", "--allow-empty", "-m", "mine")
    mine = filled.git("rev-parse", "HEAD")
    said = filled.run("rebase", TO=NEW).stderr
    assert f"stays where it is (build/vllm is at {mine[:12]}, which no branch" in said
    assert filled.git("rev-parse", "HEAD") == mine
    filled.git("branch", "mine")
    filled.git("switch", "-q", NEW_BRANCH)


def test_switch_that_stops_half_way(filled: Toy, tmp_path: Path) -> None:
    upstream(filled, a=("a12 = 12\n", "a12 = 'upstream'\n"))
    file = filled.own / "vllm/a.py"
    half = instead(tmp_path, "checkout", f'echo half > "{file}"; exit 128')
    said = filled.fails("rebase", TO=NEW, PATH=half)
    assert "run this again, which puts its files back" in said
    # What is there is not what the switch wrote: a person decides.
    assert "vllm/a.py" in filled.fails("rebase", CONTINUE="1")
    filled.git("restore", "vllm/a.py")
    filled.run("rebase", CONTINUE="1")
    whole(filled)
    assert filled.git("branch", "--show-current") == NEW_BRANCH


def test_something_under_way_does_not_matter(filled: Toy) -> None:
    upstream(filled)
    filled.git("bisect", "start")
    filled.run("rebase", TO=NEW)
    assert (filled.own / ".git/BISECT_LOG").exists()


def test_hostile_settings(filled: Toy, hostile: dict[str, Any]) -> None:
    upstream(filled, a=("a12 = 12\n", "a12 = 'upstream'\n"))
    filled.run("rebase", TO=NEW)
    wanted = filled.git("rev-parse", NEW_BRANCH)
    filled.git("switch", "-q", BRANCH)
    filled.git("branch", "-D", NEW_BRANCH)
    config = Path(hostile["GIT_CONFIG_GLOBAL"]).read_text()
    with (filled.own / ".git/config").open("a") as stream:
        stream.write(config + "[merge]\n renames = false\n")
    filled.run("rebase", TO=NEW, **hostile)
    assert filled.git("rev-parse", NEW_BRANCH) == wanted


def test_diffs_under_hostile_settings(filled: Toy, hostile: dict[str, Any]) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    diffs = filled.root / f"build/reports/rebase-{NEW}-0001.diff"
    wanted = diffs.read_bytes()
    filled.run("rebase", ABORT="1")
    config = Path(hostile["GIT_CONFIG_GLOBAL"]).read_text()
    with (filled.own / ".git/config").open("a") as stream:
        # How many lines are around a change is a matter of taste.
        stream.write(config + "[diff]\n context = 3\n interHunkContext = 0\n")
    assert "conflicts with" in filled.fails("rebase", TO=NEW, **hostile)
    assert diffs.read_bytes() == wanted


# Giving up.


@pytest.mark.parametrize("how", ["stopped", "half mended", "removed"])
def test_abort(filled: Toy, how: str) -> None:
    upstream(filled, b=("b50 = 50\n", "b50 = 'upstream'\n"))
    before = filled.git("for-each-ref", "refs/heads"), filled.head()
    filled.fails("rebase", TO=NEW)
    if how == "half mended":
        (tree(filled) / "vllm/b.py").write_text("half\n")
        (tree(filled) / "notes.txt").write_text("mine\n")
    if how == "removed":
        shutil.rmtree(tree(filled))
    done = filled.run("rebase", ABORT="1")
    kept = f"refs/gemma4/aborted/{NEW}"
    assert f"is kept as {kept}" in done.stderr
    assert not list(filled.root.glob("build/reports/*.diff"))
    assert (filled.git("for-each-ref", "refs/heads"), filled.head()) == before
    assert not tree(filled).exists() and filled.git("status", "--porcelain") == ""
    assert "a10 = 'ten'" in filled.git("show", f"{kept}:vllm/a.py")
    if how == "half mended":
        assert filled.git("show", f"{kept}:vllm/b.py") == "half"
        assert filled.git("show", f"{kept}:notes.txt") == "mine"
    assert SECOND in filled.fails("rebase", TO=NEW)


def test_abort_leaves_what_an_earlier_one_kept(filled: Toy) -> None:
    upstream(filled, b=("b50 = 50\n", "b50 = 'upstream'\n"))
    kept = f"refs/gemma4/aborted/{NEW}"
    names = [kept, f"{kept}.2", f"{kept}.3"]
    for name in names:
        filled.fails("rebase", TO=NEW)
        (tree(filled) / "notes.txt").write_text(name)
        said = filled.run("rebase", ABORT="1").stderr
        assert said.rstrip().endswith(f"is kept as {name}")
    for name in names:
        assert filled.git("show", f"{name}:notes.txt") == name


@pytest.mark.parametrize("name", ["vllm/b.py", "notes.txt"])
@pytest.mark.parametrize("how", ["drop", "abort", "killed", "end"])
def test_what_is_only_staged_is_kept(
    filled: Toy, tmp_path: Path, how: str, name: str
) -> None:
    """A file that was restored after it was added, and one that was removed."""
    at = tree(filled)
    if how == "end":
        upstream(filled)
        script = f'cd "{at}" && echo mine > {name} && "$git" add {name}'
        script += f' && ("$git" show HEAD:{name} > {name} || rm {name}) 2> /dev/null'
        script = f'git="{shutil.which("git")}"; ({script})'
        path = instead(tmp_path, "range-diff", script)
        done = filled.run("rebase", TO=NEW, PATH=path)
    else:
        if how == "killed":
            upstream(filled)
            stopped_short(filled, tmp_path)
        else:
            upstream(filled, b=("b50 = 50\n", "b50 = 'upstream'\n"))
            filled.fails("rebase", TO=NEW)
        (at / name).write_text("mine\n")
        filled.git("add", name, at=at)
        if name in TREE:
            (at / name).write_text(filled.git("show", f"HEAD:{name}", at=at) + "\n")
        else:
            (at / name).unlink()
        env: dict[str, Any] = {
            "drop": {"CONTINUE": "1", "DROP": "1"},
            "abort": {"ABORT": "1"},
            "killed": {"TO": NEW},
        }[how]
        done = filled.run("rebase", **env)
    kept = f"refs/gemma4/aborted/{NEW}"
    said = f"is kept as {kept} (what was staged alone: {kept}^2)\n"
    assert done.stderr.count(said) == 1
    assert filled.git("show", f"{kept}^2:{name}") == "mine"
    assert not at.exists()


def test_what_git_ignores_is_kept(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    ends: list[dict[str, Any]] = [{"ABORT": "1"}, {"CONTINUE": "1", "DROP": "1"}]
    for number, env in enumerate(ends, 1):
        filled.fails("rebase", TO=NEW)
        (tree(filled) / "vllm/mine.so").write_text("mine\n")
        filled.repository(tree(filled) / "other", {"c.py": "mine\n"}, "theirs")
        (tree(filled) / "vllm/linked.so").symlink_to("/nowhere")
        (tree(filled) / "vllm/__pycache__").mkdir()
        (tree(filled) / "vllm/__pycache__/a.pyc").write_text("")
        said = filled.run("rebase", **env).stderr
        to = f"build/rebase-{NEW}-ignored-{number}"
        some = "vllm/mine.so and 1 more, which git does not keep, is in"
        assert f"{some} {to} now\n" in said
        assert filled.git("show", "HEAD:c.py", at=filled.root / to / "other") == "mine"
        shutil.rmtree(filled.root / to / "other")
        kept = [path for path in (filled.root / to).rglob("*") if path.is_file()]
        assert kept == [filled.root / to / "vllm/mine.so"]
    whole(filled)


# Clones of all kinds.


@pytest.fixture
def theirs(filled: Toy, clone: Path) -> Path:
    """A person's clone that has both releases, the newer one in conflict."""
    for name, text in edited(**CONFLICT).items():
        (clone / name).write_text(text)
    filled.git("add", "-A", at=clone)
    filled.git("commit", "-qm", "release", at=clone)
    filled.git("tag", NEW, at=clone)
    short = filled.git("rev-parse", "--short=9", "HEAD", at=clone)
    release(filled, NEW, edited(**CONFLICT), short)
    return clone


def go_through(toy: Toy, at: Path, **env: str) -> str:
    """Rebase in a person's clone, over the conflict; return the branch's tip."""
    where: dict[str, Any] = {"VLLM": str(at)} | env
    before = toy.git("for-each-ref", "refs/heads", "refs/tags", at=at)
    toy.fails("rebase", TO=NEW, **where)
    assert toy.git("for-each-ref", "refs/heads", "refs/tags", at=at) == before
    made = next((toy.root / "build").glob(f"rebase-{NEW}-*"))
    made.rename(tree(toy))
    mend(toy)
    tree(toy).rename(made)
    toy.run("rebase", CONTINUE="1", **where)
    assert not made.exists() and toy.git("status", "--porcelain", at=at) == ""
    text = (at / "vllm/a.py").read_text()
    assert "a10 = 'both'\n" in text and (at / "vllm/new.py").exists()
    return toy.git("rev-parse", NEW_BRANCH, at=at)


def test_clone(filled: Toy, theirs: Path) -> None:
    tip = go_through(filled, theirs)
    base = filled.git("merge-base", NEW, tip, at=theirs)
    assert base == filled.git("rev-parse", NEW, at=theirs)
    # What a person mends is remembered in the project's own checkout only.
    assert not (theirs / ".git/rr-cache").exists()
    filled.run("export", VLLM=str(theirs), RELEASE=NEW)
    assert len(list((filled.root / "patches" / NEW).iterdir())) == 3


def test_sparse_clone(filled: Toy, theirs: Path) -> None:
    filled.git("sparse-checkout", "set", "tests", at=theirs)
    assert not (theirs / "vllm").exists()
    filled.fails("rebase", TO=NEW, VLLM=str(theirs))
    made = next((filled.root / "build").glob(f"rebase-{NEW}-*"))
    made.rename(tree(filled))
    mend(filled)
    tree(filled).rename(made)
    filled.run("rebase", CONTINUE="1", VLLM=str(theirs))
    assert filled.git("sparse-checkout", "list", at=theirs) == "tests"
    text = filled.git("show", f"{NEW_BRANCH}:vllm/a.py", at=theirs)
    assert "a10 = 'both'\n" in text and not (theirs / "vllm").exists()


def test_new_branch_of_another_worktree(filled: Toy, theirs: Path) -> None:
    where: dict[str, Any] = {"VLLM": str(theirs)}
    linked = theirs.with_name("linked")
    filled.git("worktree", "add", "-qb", NEW_BRANCH, str(linked), NEW, at=theirs)
    line = filled.fails("rebase", TO=NEW, **where)
    assert f"{NEW_BRANCH} is checked out in {linked}" in line
    filled.git("switch", "-q", "--detach", at=linked)
    go_through(filled, theirs)


def export_and_again(toy: Toy, at: Path) -> None:
    """What a rebase made its bases of, other commands take as well."""
    where: dict[str, Any] = {"VLLM": str(at), "RELEASE": NEW}
    assert "3 written" in toy.run("export", **where).stderr
    assert "already applied: 3 patches" in toy.run("apply", **where).stderr
    line = toy.fails("rebase", TO=NEW, **where)
    assert f"the series of {NEW} is on {NEW} already" in line
    toy.change("vllm/b.py", "b1 = 1\n", "b1 = 11\n", "More", at=at)
    assert "1 written" in toy.run("export", **where).stderr


def test_clone_that_is_dirty(filled: Toy, theirs: Path) -> None:
    (theirs / "vllm/b.py").write_text("mine\n")
    line = filled.fails("rebase", TO=NEW, VLLM=str(theirs))
    assert f"`make rebase ABORT=1 VLLM={shlex.quote(str(theirs))}`" in line
    filled.run("rebase", ABORT="1", VLLM=str(theirs))
    assert (theirs / "vllm/b.py").read_text() == "mine\n"
    assert filled.git("worktree", "list", at=theirs).count("\n") == 0


@pytest.mark.parametrize("has", [TAG, NEW])
def test_shallow_clone(filled: Toy, theirs: Path, has: str) -> None:
    """It has one release only: the other one is made from its sdist."""
    shallow = theirs.with_name("shallow ü")
    filled.git(
        *("clone", "-q", "--depth=1", "-b", has, f"file://{theirs}", str(shallow)),
        at=theirs,
    )
    cut = (shallow / ".git/shallow").read_text()
    go_through(filled, shallow)
    export_and_again(filled, shallow)
    assert (shallow / ".git/shallow").read_text() == cut


@pytest.mark.parametrize("has", [TAG, NEW])
def test_clone_without_blobs(filled: Toy, theirs: Path, has: str) -> None:
    """It has one release's files only, and where it came from is gone."""
    partial = filled.partial(theirs, theirs.with_name("partial"), "-b", has)
    other = TAG if has == NEW else NEW
    missing = filled.git(
        "rev-list", "--objects", "--missing=print", other, at=partial
    ).count("?")
    assert missing
    theirs.rename(theirs.with_name("gone"))
    go_through(filled, partial)
    export_and_again(filled, partial)


def test_clone_that_gets_the_release_later(filled: Toy, theirs: Path) -> None:
    """The branch stays on the base that it was made on."""
    shallow = theirs.with_name("shallow")
    filled.git(
        *("clone", "-q", "--depth=1", "-b", TAG, f"file://{theirs}", str(shallow)),
        at=theirs,
    )
    go_through(filled, shallow)
    base = filled.git("rev-parse", f"refs/gemma4/base/{NEW}", at=shallow)
    filled.git("fetch", "-q", "--depth=1", "origin", "tag", NEW, at=shallow)
    export_and_again(filled, shallow)
    filled.fails("rebase", TO=NEW, VLLM=str(shallow))
    (made,) = (filled.root / "build").glob(f"rebase-{NEW}-*")
    assert filled.head(made) == base != filled.git("rev-parse", NEW, at=shallow)


def confined() -> list[str]:
    """Return a prefix under which even root minds a file's mode."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root minds no file's mode")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.mark.parametrize(
    "verb", ["apply", "rebase", "status", "export", "verify", "upstream"]
)
def test_read_only_clone(filled: Toy, theirs: Path, verb: str) -> None:
    if verb in ("export", "verify"):
        # What a series makes is there: what fails comes after it.
        filled.change("tests/test_a.py", "pass", "...", "A test")
        filled.run("export")
        filled.run("apply", VLLM=str(theirs))
    for name, value in (("name", "Ada"), ("email", "ada@example.invalid")):
        filled.git("config", f"user.{name}", value, at=theirs)
    folders = [path for path in theirs.rglob("*") if path.is_dir()]
    for path in (theirs, *folders):
        path.chmod(0o555)
    try:
        done = subprocess.run(
            [*confined(), sys.executable, "-m", f"scripts.{verb}"],
            cwd=filled.root,
            env=filled.environ(VLLM=str(theirs), TO=NEW, PATCH="2"),
            capture_output=True,
            text=True,
        )
    finally:
        for path in (theirs, *folders):
            path.chmod(0o755)
    assert "Traceback" not in done.stderr
    if verb == "status":
        # It asks the project's own checkout.
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and "théir clone's" in last
        # The first is of Python, the other of git.
        ours = verb in ("apply", "rebase")
        assert f"cannot be {'read or ' if ours else ''}written" in last
    assert filled.git("status", "--porcelain", at=theirs) == ""
    assert not list((filled.root / "build").glob("rebase-*"))


def test_git_that_fails(filled: Toy, tmp_path: Path) -> None:
    """Where nobody expected it to."""
    upstream(filled)
    filled.run("status")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(
        '#!/bin/sh\ncase "$1" in read-tree) echo "fatal: no" >&2; exit 1;; esac\n'
        f'exec "{shutil.which("git")}" "$@"\n'
    )
    (folder / "git").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    said = "error: git failed in build/vllm (no): mend that and run this again"
    for verb in ("apply", "lint", "status"):
        assert filled.fails(verb, PATH=path, STAGE="patches", TO=NEW) == said


@pytest.mark.parametrize("how", ["whole", "shallow", "own", "dirty"])
def test_to_a_commit_of_a_clone(filled: Toy, theirs: Path, how: str) -> None:
    filled.change("vllm/b.py", "b0 = 0\n", "b0 = 'newer'\n", "later", at=theirs)
    commit = filled.head(theirs)
    env: dict[str, Any] = {"TO_DIR": str(theirs)}
    if how == "shallow":
        shallow = theirs.with_name("shallow")
        filled.git("clone", "-q", "--depth=1", f"file://{theirs}", str(shallow))
        env["TO_DIR"] = str(shallow)
    if how == "own":
        env["VLLM"] = str(theirs)
    if how == "dirty":
        (theirs / "vllm/b.py").write_text("mine\n")
    line = filled.fails("rebase", **env)
    assert f"conflicts with {commit[:12]} in vllm/a.py" in line
    made = next((filled.root / "build").glob("rebase-*"))
    made.rename(tree(filled))
    mend(filled)
    tree(filled).rename(made)
    if how != "whole":
        env.pop("TO_DIR")
    done = filled.run("rebase", CONTINUE="1", **env)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("next: git -C ")
    subprocess.run(last[6:], shell=True, cwd=filled.root, check=True)
    written = sorted((filled.root / "build" / "patches" / commit[:12]).iterdir())
    assert [path.name[:5] for path in written] == ["0001-", "0002-", "0003-"]
    assert "+a10 = 'both'" in written[0].read_text()
    if how != "own":
        # To go there again, it is to be written and then moved away.
        line = filled.fails("rebase", **env | {"TO_DIR": str(theirs)})
        assert f"write them with `{last[6:]}`, then drop them with" in line
    at = theirs if how == "own" else filled.own
    text = filled.git("show", f"gemma4/{commit[:12]}:vllm/b.py", at=at)
    assert "'newer'" in text and "'é'" in text
    if how != "own":
        # No history came along, and theirs is as it was.
        log = filled.git("log", "--format=%s", f"gemma4/{commit[:12]}").splitlines()
        assert log[-1] == f"vLLM {commit}" and len(log) == 4
        assert filled.head(theirs) == commit
        assert filled.git("branch", "--list", "gemma4/*", at=theirs) == ""


# Interrupts.


@pytest.mark.parametrize("verb", ["begin", "continue", "abort"])
@pytest.mark.parametrize("kill", ["KILL", "TERM"])
def test_interrupted_anywhere(
    filled: Toy, tmp_path: Path, kill: str, verb: str
) -> None:
    upstream(filled, **CONFLICT)
    filled.run("status")
    before = filled.git("for-each-ref", "refs/heads"), filled.head()

    def begin() -> None:
        filled.fails("rebase", TO=NEW)

    begin()
    mend(filled)
    filled.run("rebase", CONTINUE="1")
    wanted = filled.git("rev-parse", f"{NEW_BRANCH}^{{tree}}")
    shutil.rmtree(filled.own / ".git/rr-cache")
    pristine = tmp_path / "pristine"
    filled.git("switch", "-q", BRANCH)
    filled.git("branch", "-D", NEW_BRANCH)
    if verb != "begin":
        begin()
        mend(filled)
    shutil.copytree(filled.root / "build", pristine, symlinks=True)
    env: dict[str, Any] = {
        "begin": {"TO": NEW},
        "continue": {"CONTINUE": "1"},
        "abort": {"ABORT": "1"},
    }[verb]
    nth, hits = 1, 0
    while True:
        shutil.rmtree(filled.root / "build")
        shutil.copytree(pristine, filled.root / "build", symlinks=True)
        # Before the call, after it, and while it runs.
        first = {
            0: ":",
            1: '"$git" "$@" >/dev/null 2>&1',
            2: '"$git" "$@" >/dev/null 2>&1 & sleep 0.002; kill -9 $!; wait',
        }[nth % 3]
        folder = saboteur(tmp_path, nth, kill, first)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = filled.run("rebase", ok=None, PATH=path, **env)
        if not (folder / "hit").exists():
            break
        hits += 1
        assert done.returncode != 0
        if verb == "abort":
            state = filled.own / ".git/gemma4-rebase.json"
            if state.exists():
                filled.run("rebase", ABORT="1")
            now = filled.git("for-each-ref", "refs/heads"), filled.head()
            assert now == before, nth
            assert not tree(filled).exists(), nth
        else:
            again = filled.run("rebase", ok=None, **env)
            state = filled.own / ".git/gemma4-rebase.json"
            if state.exists():
                assert "conflict" in again.stderr or "under way" in again.stderr, nth
                if filled.git("ls-files", "--unmerged", at=tree(filled)):
                    mend(filled)
                filled.run("rebase", CONTINUE="1")
            assert filled.git("rev-parse", f"{NEW_BRANCH}^{{tree}}") == wanted, nth
            log = filled.git("log", "--format=%s", f"{NEW}..{NEW_BRANCH}")
            assert len(log.splitlines()) == 3, nth
            whole(filled)
        assert filled.git("status", "--porcelain") == "", nth
        nth += 3 if hits < 4 else 5
    assert hits >= (3 if verb == "abort" else 6), hits


def stopped_short(toy: Toy, tmp_path: Path, script: str = ":") -> None:
    """Kill a rebase as it picks the second patch."""
    n = tmp_path / "n"
    path = instead(
        tmp_path,
        "cherry-pick",
        f'echo >> "{n}"; if [ $(wc -l < "{n}") = 2 ]; then {script}; '
        "kill -9 $PPID; exit 1; fi",
    )
    assert toy.run("rebase", ok=None, TO=NEW, PATH=path).returncode == -9
    assert toy.git("log", "-1", "--format=%s", at=tree(toy)) == "[Model] Name ten"


def test_own_commit_after_an_interrupt(filled: Toy, tmp_path: Path) -> None:
    """It is not the pick, so the patch is not done."""
    upstream(filled)
    stopped_short(filled, tmp_path)
    tip = filled.head(tree(filled))
    filled.change("run.sh", "", "echo\n", "Mine", at=tree(filled))
    mine = filled.head(tree(filled))
    for env in ({"TO": NEW}, {"CONTINUE": "1"}):
        line = filled.fails("rebase", **env)
        assert f"has other commits than {SECOND} ([Model] Mine)" in line
        assert "ABORT=1" in line and filled.head(tree(filled)) == mine
    for hint in line.split("`")[1:4:2]:
        subprocess.run(hint, shell=True, cwd=filled.root, check=True)
    assert filled.head(tree(filled)) == tip
    done = filled.run("rebase", CONTINUE="1")
    assert outcomes(done.stderr) == {FIRST: "clean", SECOND: "clean", THIRD: "clean"}
    whole(filled)
    assert filled.git("rev-parse", "mine") == mine


@pytest.mark.parametrize("more", ["", "on top", "amended"])
def test_pick_that_was_done_at_an_interrupt(
    filled: Toy, tmp_path: Path, more: str
) -> None:
    upstream(filled)
    stopped_short(filled, tmp_path)
    filled.git("cherry-pick", f"{BRANCH}~1", at=tree(filled))
    if more == "on top":
        filled.change("run.sh", "", "echo\n", "Mine", at=tree(filled))
        line = filled.fails("rebase", TO=NEW)
        assert f"than {SECOND} ([Model] Wörter, [Model] Mine)" in line
        return
    if more == "amended":
        (tree(filled) / "run.sh").write_text("mine\n")
        assert "uncommitted changes in run.sh" in filled.fails("rebase", TO=NEW)
        filled.git("commit", "-qa", "--amend", "--no-edit", at=tree(filled))
    done = filled.run("rebase", TO=NEW)
    kind = "merged" if more else "clean"
    assert outcomes(done.stderr) == {FIRST: "clean", SECOND: kind, THIRD: "clean"}
    log = filled.git("log", "--format=%s", f"{NEW}..{NEW_BRANCH}").splitlines()
    assert log == ["[Model] A new file", "[Model] Wörter", "[Model] Name ten"]


@pytest.mark.parametrize("name", ["run.sh", "vllm/b.py", "notes.txt"])
def test_edit_after_an_interrupt(filled: Toy, tmp_path: Path, name: str) -> None:
    """A file that the patch does not change, one that it does, and a new one."""
    upstream(filled)
    stopped_short(filled, tmp_path)
    (tree(filled) / name).write_text("mine\n")
    done = filled.run("rebase", TO=NEW)
    kept = f"refs/gemma4/aborted/{NEW}"
    said = f"what was changed in build/rebase-{NEW} is kept as {kept}\n"
    assert done.stderr.count(said) == 1
    assert filled.git("show", f"{kept}:{name}") == "mine"
    assert outcomes(done.stderr) == {FIRST: "clean", SECOND: "clean", THIRD: "clean"}
    whole(filled)
    assert "mine" not in filled.git("log", "-p", f"{NEW}..{NEW_BRANCH}")


@pytest.mark.parametrize("at", ["b", "cut", "gone", "staged"])
def test_what_an_interrupted_pick_left_is_not_kept(
    filled: Toy, tmp_path: Path, at: str
) -> None:
    upstream(filled, b=("b40 = 40\n", "b40 = 'upstream'\n"))
    stopped_short(filled, tmp_path)
    path = tree(filled) / "vllm/b.py"
    text = path.read_text().replace("b50 = 50\n", "b50 = 'é'\n")
    if at == "gone":
        path.unlink()
    else:
        path.write_text(text[:200] if at == "cut" else text)
    if at == "staged":
        filled.git("add", "-A", at=tree(filled))
    assert "is kept as" not in filled.run("rebase", TO=NEW).stderr
    whole(filled)
    assert "'é'" in (filled.own / "vllm/b.py").read_text()


@pytest.mark.parametrize("env", [{"TO": NEW}, {"CONTINUE": "1"}, {"ABORT": "1"}])
@pytest.mark.parametrize("mine", [False, True])
def test_worktree_that_is_half_checked_out(
    filled: Toy, tmp_path: Path, env: dict[str, Any], mine: bool
) -> None:
    """What is missing, or cut off, is nobody's."""
    upstream(filled)
    at = tree(filled)
    script = (
        f'"{shutil.which("git")}" "$@"; cd "{at}"; index=$(git rev-parse --git-path '
        'index); mv "$index" "$index.lock"; rm vllm/b.py run.sh; kill -9 $PPID; exit 1'
    )
    path = instead(tmp_path, "add", script)
    assert filled.run("rebase", ok=None, TO=NEW, PATH=path).returncode == -9
    if "ABORT" not in env:
        whole_file = (at / "data.txt").read_text()
        (at / "data.txt").write_text(whole_file[:1000])
    if mine:
        (at / "vllm/a.py").write_text("mine\n")
    done = filled.run("rebase", **env)
    kept = f"refs/gemma4/aborted/{NEW}"
    assert done.stderr.count("is kept as") == mine
    if mine:
        assert f"is kept as {kept}\n" in done.stderr
        assert filled.git("show", f"{kept}:vllm/a.py") == "mine"
    if "ABORT" not in env:
        whole(filled)


@pytest.mark.parametrize("gone", [".git", ""])
def test_worktree_that_is_half_removed(filled: Toy, tmp_path: Path, gone: str) -> None:
    """Or the next rebase would have another of that name beside it."""
    upstream(filled)
    script = f'rm -r "{tree(filled)}/{gone}"; kill -9 $PPID'
    path = instead(tmp_path, "range-diff", script)
    assert filled.run("rebase", ok=None, TO=NEW, PATH=path).returncode == -9
    filled.run("rebase", CONTINUE="1")
    whole(filled)


def test_file_in_the_way_that_is_committed(filled: Toy, tmp_path: Path) -> None:
    upstream(filled)
    mine = tree(filled) / "vllm" / "new.py"
    path = instead(tmp_path, "cherry-pick", f'echo mine > "{mine}"')
    assert f"{THIRD} could not be picked" in filled.fails("rebase", TO=NEW, PATH=path)
    filled.git("add", "vllm/new.py", at=tree(filled))
    filled.git("commit", "-qm", "Mine", at=tree(filled))
    assert f"other commits than {THIRD} (Mine)" in filled.fails("rebase", CONTINUE="1")
    filled.git("reset", "-q", "--soft", "HEAD~1", at=tree(filled))
    assert "is kept as" in filled.run("rebase", CONTINUE="1").stderr
    whole(filled)
    assert filled.git("show", f"refs/gemma4/aborted/{NEW}:vllm/new.py") == "mine"
    assert "x = 1" in (filled.own / "vllm/new.py").read_text()


def test_another_cherry_pick(filled: Toy) -> None:
    upstream(filled, **CONFLICT)
    filled.fails("rebase", TO=NEW)
    filled.git("cherry-pick", "--skip", at=tree(filled))
    filled.git("update-ref", "CHERRY_PICK_HEAD", BRANCH, at=tree(filled))
    line = filled.fails("rebase", CONTINUE="1")
    assert f"which is not {FIRST}, is under way" in line


def test_two_at_once(filled: Toy) -> None:
    upstream(filled)
    with filled.at_work():
        line = filled.fails("rebase", TO=NEW)
        assert "another make command is at work" in line
    filled.run("rebase", TO=NEW)


@pytest.mark.parametrize("other", ["project", "worktree"])
def test_two_at_once_on_one_clone(
    filled: Toy, theirs: Path, tmp_path: Path, other: str
) -> None:
    """Two projects that know nothing of one another, or two worktrees."""
    shutil.copytree(filled.root, tmp_path / "second", symlinks=True)
    second, at = Toy(tmp_path / "second", filled.home), theirs
    if other == "worktree":
        at = tmp_path / "linked"
        filled.git("worktree", "add", "-q", "--detach", str(at), TAG, at=theirs)
    hit, go = tmp_path / "hit", tmp_path / "go"
    # The first one waits in its first pick.
    wait = f'touch "{hit}"; while [ ! -e "{go}" ]; do sleep 0.05; done'
    path = instead(tmp_path, "cherry-pick", wait)
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.rebase"],
        cwd=filled.root,
        env=filled.environ(PATH=path, TO=NEW, VLLM=str(theirs)),
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        try:
            for _ in range(600):
                if hit.exists():
                    break
                time.sleep(0.05)
            line = second.fails("rebase", TO=NEW, VLLM=str(at))
        finally:
            go.touch()
        _, said = first.communicate()
    assert "another make command is at work in" in line and ".git/gemma4/" in line
    assert f"{FIRST} conflicts with {NEW} in vllm/a.py" in said
    if other == "project":
        line = second.fails("rebase", TO=NEW, VLLM=str(at))
        assert f"a rebase to {NEW} is under way, stopped at {FIRST}" in line
        return
    # Each worktree has a rebase of its own, and what one keeps is not the other's.
    second.fails("rebase", TO=NEW, VLLM=str(at))
    refs = "refs/gemma4/rebase-*"
    assert len(filled.git("for-each-ref", refs, at=theirs).splitlines()) == 2
    second.run("rebase", ABORT="1", VLLM=str(at))
    assert len(filled.git("for-each-ref", refs, at=theirs).splitlines()) == 1
    (made,) = (filled.root / "build").glob(f"rebase-{NEW}-*")
    made.rename(tree(filled))
    mend(filled)
    tree(filled).rename(made)
    filled.run("rebase", CONTINUE="1", VLLM=str(theirs))
    assert "a10 = 'both'\n" in (theirs / "vllm/a.py").read_text()
    assert filled.git("for-each-ref", refs, at=theirs) == ""


def test_two_one_after_the_other(filled: Toy, tmp_path: Path) -> None:
    upstream(filled, **CONFLICT)
    release(filled, "v1.2.0", edited())
    filled.fails("rebase", TO=NEW)
    line = filled.fails("rebase", TO="v1.2.0")
    assert f"a rebase to {NEW} is under way" in line and "ABORT=1" in line
    assert f"a rebase to {NEW} is under way, stopped at" in filled.run("status").stderr
    # Whatever is asked, it is asked of another one.
    filled.repository(tmp_path / "other", TREE, "upstream")
    mend(filled)
    for to in ({"TO": "v1.2.0"}, {"TO_DIR": str(tmp_path / "other")}):
        for what in ("CONTINUE", "ABORT"):
            line = filled.fails("rebase", **to, **{what: "1"})
            assert f"a rebase to {NEW} is under way: end it with" in line
    filled.run("rebase", CONTINUE="1", TO=NEW)


# Status.


def test_status(filled: Toy) -> None:
    upstream(filled, a=("a10 = 10\n", "a10 = 'ten'\n"))
    release(filled, "v1.2.0", edited(new="# SPDX\nx = 1\n"))
    lines = filled.run("status").stdout.splitlines()
    assert lines[0].split() == [
        "patch",
        "upstream",
        "status",
        "in",
        NEW,
        "in",
        "v1.2.0",
    ]
    assert [line.split() for line in lines[1:]] == [
        [FIRST, "Pending", "taken", "-"],
        [SECOND, "Pending", "-", "-"],
        [THIRD, "Pending", "-", "taken"],
    ]
    assert "no release after v1.2.0" in filled.fails("status", RELEASE="v1.2.0")


def test_status_of_patches_on_one_another(filled: Toy) -> None:
    """A later patch changes what an earlier one wrote: both are found."""
    filled.change("vllm/a.py", "a10 = 'ten'\n", "a10 = 'zehn'\n", "Say it in German")
    filled.run("export")
    upstream(filled, a=("a10 = 10\n", "a10 = 'zehn'\n"))
    rows = [line.split()[-1] for line in filled.run("status").stdout.splitlines()]
    assert rows == [NEW, "taken", "-", "-", "taken"]


def test_status_of_a_mode(filled: Toy) -> None:
    (filled.own / "vllm/a.py").chmod(0o755)
    filled.git("commit", "-aqm", MESSAGE.format(title="Let it run"))
    filled.run("export")
    upstream(filled)
    rows = [line.split()[-1] for line in filled.run("status").stdout.splitlines()]
    assert rows == [NEW, "-", "-", "-", "-"]


def test_status_changes_nothing(filled: Toy) -> None:
    upstream(filled)
    filled.run("status")
    refs = filled.git("for-each-ref")
    head = filled.head()
    filled.run("status")
    assert (filled.git("for-each-ref"), filled.head()) == (refs, head)
    assert filled.git("status", "--porcelain") == ""
