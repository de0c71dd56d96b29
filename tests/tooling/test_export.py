# SPDX-License-Identifier: Apache-2.0
"""Exporting: the same bytes everywhere, and nothing lost."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import BRANCH, MESSAGE, TAG, Toy


def test_round_trip(filled: Toy) -> None:
    before = filled.files()
    assert len(before) == 3
    filled.reset()
    filled.run("apply")
    assert "0 written, 0 removed" in filled.run("export").stderr
    assert filled.files() == before


def test_hostile_settings(filled: Toy, hostile: dict[str, Any]) -> None:
    before = filled.files()
    filled.reset()
    filled.run("apply", **hostile)
    config = Path(hostile["GIT_CONFIG_GLOBAL"]).read_text()
    with (filled.own / ".git/config").open("a") as stream:
        stream.write(config)
    (filled.own / ".git/info").mkdir(exist_ok=True)
    (filled.own / ".git/info/attributes").write_text("*.py diff=python -text\n")
    filled.run("export", **hostile)
    assert filled.files() == before


def test_form(filled: Toy) -> None:
    text = filled.files()["0002-Model-W-rter.patch"].decode()
    assert text.startswith(f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: P <p@")
    assert "Subject: [PATCH] [Model] Wörter\n" in text
    assert "\n-- \n" not in text and "b50 = 'é'" in text and text.endswith("\n")
    index = next(line for line in text.splitlines() if line.startswith("index "))
    assert len(index) == len("index ") + 40 + 2 + 40 + len(" 100644")
    assert "| 2 +-" not in text


def test_rename_and_binary(filled: Toy) -> None:
    filled.git("mv", "vllm/b.py", "vllm/c.py")
    (filled.own / "vllm/x.bin").write_bytes(bytes(range(256)))
    (filled.own / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (filled.own / "no-newline.txt").write_bytes(b"end")
    filled.git("add", "-A")
    filled.git("commit", "-q", "-m", MESSAGE.format(title="Many kinds"))
    filled.run("export")
    before, tree = filled.files(), filled.git("rev-parse", "HEAD^{tree}")
    assert b"rename from" not in before["0004-Model-Many-kinds.patch"]
    filled.reset()
    filled.run("apply")
    assert filled.git("rev-parse", "HEAD^{tree}") == tree
    filled.run("export")
    assert filled.files() == before


def test_author_and_date_are_kept(filled: Toy) -> None:
    filled.git(
        *("commit", "-q", "--amend", "--no-edit", "--author=Ä B <a@example.invalid>"),
        "--date=2026-02-03T04:05:06+0530",
    )
    filled.run("export")
    filled.reset()
    filled.run("apply")
    said = filled.git("log", "-1", "--format=%an %ae %aI %cI")
    date = "2026-02-03T04:05:06+05:30"
    assert said == f"Ä B a@example.invalid {date} {date}"


def test_reworded_reordered_and_dropped(filled: Toy) -> None:
    tips = filled.git("rev-list", "--reverse", f"{TAG}..{BRANCH}").split()
    filled.git("reset", "-q", "--hard", TAG)
    filled.git("cherry-pick", tips[2], tips[0])
    done = filled.run("export")
    assert sorted(filled.files()) == [
        "0001-Model-A-new-file.patch",
        "0002-Model-Name-ten.patch",
    ]
    assert "2 written, 3 removed" in done.stderr
    # What was exported is what is applied: nothing to refuse.
    assert "already applied: 2 patches" in filled.run("apply").stderr


def test_other_files_of_the_folder_stay(filled: Toy) -> None:
    (filled.patches / "README").write_text("kept\n")
    (filled.patches / "notes" / "more").mkdir(parents=True)
    (filled.patches / "notes" / "more" / "a").write_text("kept too\n")
    (filled.patches / "link").symlink_to("notes")
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More")
    filled.run("export")
    assert (filled.patches / "README").read_text() == "kept\n"
    assert (filled.patches / "notes" / "more" / "a").read_text() == "kept too\n"
    assert os.readlink(filled.patches / "link") == "notes"
    assert len(list(filled.patches.glob("*.patch"))) == 4
    assert os.listdir(filled.patches.parent) == [TAG]


def test_no_commits_do_not_delete_patches(filled: Toy) -> None:
    filled.git("reset", "-q", "--hard", TAG)
    before = filled.files()
    assert "has no commits but patches/v1.0.0 has patches" in filled.fails("export")
    assert filled.files() == before


def test_nothing_to_export(toy: Toy) -> None:
    toy.run("apply")
    assert "0 patches" in toy.run("export").stderr


@pytest.mark.parametrize("kind", ["fixup", "squash"])
def test_fixup_is_refused(filled: Toy, kind: str) -> None:
    (filled.own / "vllm/a.py").write_text("z\n")
    filled.git("commit", "-qam", f"{kind}! [Model] Name ten")
    line = filled.fails("export")
    assert "not folded in yet" in line and "rebase -i --autosquash v1.0.0" in line


def test_merge_is_refused(filled: Toy) -> None:
    filled.git("switch", "-qc", "side", f"{BRANCH}~1")
    filled.change("run.sh", "", "x\n", "side")
    filled.git("switch", "-q", BRANCH)
    filled.git("merge", "-q", "--no-edit", "side")
    before = filled.files()
    assert "has a merge" in filled.fails("export")
    assert filled.files() == before


def test_dirty_is_refused(filled: Toy) -> None:
    (filled.own / "vllm/a.py").write_text("mine\n")
    assert "uncommitted changes in vllm/a.py" in filled.fails("export")


def test_an_edited_patch_is_not_written_over(filled: Toy) -> None:
    path = sorted(filled.patches.glob("*.patch"))[0]
    text = path.read_text().replace("Subject: [PATCH] ", "Subject: [PATCH] By hand ")
    path.write_text(text)
    line = filled.fails("export")
    assert f"was edited since {BRANCH} was made of it: `make apply` takes" in line
    assert path.read_text() == text
    filled.run("apply")
    # In the form that export gives it.
    filled.run("export")
    (first,) = filled.patches.glob("0001-*")
    assert "Subject: [PATCH] By hand " in first.read_text()
    # What is gone comes back.
    first.unlink()
    for path in filled.patches.glob("*.patch"):
        path.unlink()
    filled.run("export")
    assert first.exists() and len(filled.files()) == 3


def test_files_that_are_removed(filled: Toy) -> None:
    names = sorted(filled.files())
    filled.git("reset", "-q", "--hard", f"{BRANCH}~3")
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More")
    said = filled.run("export").stderr
    lines = [line for line in said.splitlines() if line.startswith("removed ")]
    assert lines == [f"removed patches/{TAG}/{name}" for name in names]


def test_two_with_one_number(filled: Toy) -> None:
    """What one command says to do is not what the other refuses."""
    filled.run("apply")
    path = sorted(filled.patches.glob("*.patch"))[-1]
    other = path.with_name("0003-Another.patch")
    other.write_text(path.read_text().replace("new.py", "newer.py"))
    assert "was edited" in filled.fails("export")
    line = filled.fails("apply")
    assert line.endswith(": keep one, or give the other a number that none has")
    other.rename(other.with_name("0007-Another.patch"))
    filled.run("apply")
    filled.run("export")
    names = sorted(filled.files())
    assert names[2:] == [path.name, path.name.replace("0003", "0004")]


@pytest.mark.parametrize("how", ["edited", "pulled", "broken"])
def test_edited_patches_are_kept(filled: Toy, how: str) -> None:
    """Where there is a commit to write as well."""
    filled.run("apply")
    path = sorted(filled.patches.glob("*.patch"))[-1]
    text = path.read_text()
    if how == "pulled":
        path = path.with_name("0004-Another.patch")
    new = {"pulled": ("new.py", "newer.py"), "broken": ("+x = 1", "?x = 1")}
    text = text.replace(*new.get(how, ("Purpose: see", "Purpose: by hand, see")))
    path.write_text(text)
    edited = filled.files()
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "More")
    done = filled.run("export")
    assert f"what was edited there is kept in build/patches/{TAG}-1\n" in done.stderr
    kept = filled.root / "build" / "patches" / f"{TAG}-1"
    assert {one.name: one.read_bytes() for one in kept.iterdir()} == edited
    assert "0004-Model-More.patch" in filled.files()
    # And the next time beside it.
    path.write_text(text)
    filled.change("vllm/a.py", "a2 = 2\n", "a2 = 22\n", "Yet more")
    assert f"kept in build/patches/{TAG}-2\n" in filled.run("export").stderr
    assert {one.name: one.read_bytes() for one in kept.iterdir()} == edited
    assert "kept in" not in filled.run("export").stderr


def test_under_way_is_refused(filled: Toy) -> None:
    with pytest.raises(AssertionError):
        filled.git("rebase", "--exec", "false", TAG)
    assert "a rebase is under way" in filled.fails("export")


def test_elsewhere_is_refused(filled: Toy, clone: Path) -> None:
    filled.git("switch", "-qc", "elsewhere")
    assert "is at elsewhere, not on gemma4/v1.0.0" in filled.fails("export")
    line = filled.fails("export", VLLM=str(clone))
    assert f"`git -C {shlex.quote(str(clone))} switch {BRANCH}`" in line


def test_not_on_the_release_is_refused(filled: Toy) -> None:
    filled.git("checkout", "-q", "--orphan", "new")
    filled.git("commit", "-qm", "unrelated")
    filled.git("branch", "-f", BRANCH, "new")
    filled.git("switch", "-q", BRANCH)
    assert "does not start from v1.0.0" in filled.fails("export")


@pytest.mark.parametrize("line", ["---", "diff --git a/x b/x", "Index: x"])
def test_message_that_would_be_cut_is_refused(filled: Toy, line: str) -> None:
    filled.git("commit", "-q", "--amend", "-m", f"Title\n\nbody\n\n{line}\n\nmore")
    before = filled.files()
    assert 'of "' not in filled.fails("export")
    assert "would not survive as a patch" in filled.fails("export")
    assert filled.files() == before


def test_hash_lines_and_long_subjects_survive(filled: Toy) -> None:
    title = "[Model] " + "long words " * 15 + "ünd end"
    filled.git(
        *("commit", "-q", "--amend", "--cleanup=verbatim"),
        *("-m", f"{title}\n\n# kept\n\nFrom here on\n>From there\n"),
    )
    said = filled.git("log", "-1", "--format=%B")
    filled.run("export")
    filled.reset()
    filled.run("apply")
    assert filled.git("log", "-1", "--format=%B") == said


def test_killed_between_the_renames(filled: Toy) -> None:
    before = filled.files()
    shutil.copytree(filled.patches, filled.patches.with_name(f".{TAG}.new"))
    filled.patches.rename(filled.patches.with_name(f".{TAG}.old"))
    filled.run("export")
    assert filled.files() == before
    assert os.listdir(filled.patches.parent) == [TAG]


def test_clone(filled: Toy, clone: Path) -> None:
    filled.run("apply", VLLM=str(clone))
    filled.change("vllm/a.py", "a1 = 1\n", "a1 = 11\n", "From a clone", at=clone)
    filled.run("export", VLLM=str(clone))
    assert "0004-Model-From-a-clone.patch" in filled.files()


def test_clean_in_git(filled: Toy) -> None:
    """Apply, then export: git of the project itself sees no change."""
    shutil.copy(Path(__file__).parents[2] / ".gitattributes", filled.root)
    filled.git("init", "-q", at=filled.root)
    filled.git("config", "core.autocrlf", "true", at=filled.root)
    filled.git("add", "patches", ".gitattributes", at=filled.root)
    filled.git("commit", "-qm", "patches", at=filled.root)
    other = filled.root.with_name("other")
    filled.git(
        "clone", "-q", "-c", "core.autocrlf=true", ".", str(other), at=filled.root
    )
    for path in filled.patches.iterdir():
        assert (other / "patches" / TAG / path.name).read_bytes() == path.read_bytes()
    filled.reset()
    filled.run("apply")
    filled.run("export")
    assert filled.git("status", "--porcelain", "patches", at=filled.root) == ""
    assert os.listdir(filled.patches.parent) == [TAG]
