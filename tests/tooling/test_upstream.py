# SPDX-License-Identifier: Apache-2.0
"""Branches to submit, on a person's toy clone of main."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from conftest import MESSAGE, TREE, Toy, copied, instead, make_toy, saboteur

from scripts.git import EMAIL, NAME

WHO = "Ada <ada@example.invalid>"
TEMPLATE = """<!-- lint off -->

## Overview

<!-- Summarize. -->

## Claims

<!-- Bullets. -->

## Validation

## Details

---

- [ ] AI assistance was used.
"""
MEASURED = (
    "Measured on v1.0.0 with the whole series; to be run again on this branch.\n\n"
)
BRANCHES = {
    "1": "gemma4-0001-help",
    "2": "gemma4-0002-name-ten",
    "3": "gemma4-0003-help-b",
    "4": "gemma4-0004-rename-ten",
}


@pytest.fixture(scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("upstream")
    toy = make_toy(base)
    toy.run("apply")
    toy.change("vllm/helper.py", "", "def assist():\n    pass\n", "Help")
    toy.change("vllm/a.py", "a10 = 10\n", "a10 = 'ten'\n", "Name ten")
    toy.change("vllm/b.py", "b50 = 50\n", "b50 = assist()\n", "Help b")
    toy.change("vllm/a.py", "a10 = 'ten'\n", "a10 = 'TEN'\n", "Rename ten")
    said = MESSAGE.replace("Test Plan", "# kept\n\nTest Plan")
    said = said.format(title="Rename ten")
    toy.git("commit", "-q", "--amend", "--cleanup=verbatim", "-m", said)
    toy.run("export")
    for path in toy.patches.glob("*.patch"):
        # As this project's patches are: by no one by name.
        text = re.sub("(?m)^From: .*", f"From: {NAME} <{EMAIL}>", path.read_text())
        path.write_text(text)
    main = base / "théir main's"
    files = TREE | {".github/PULL_REQUEST_TEMPLATE.md": TEMPLATE}
    toy.repository(main, files, "upstream")
    toy.change("vllm/a.py", "a0 = 0\n", "a0 = 1\n", "later", at=main)
    toy.git("config", "user.name", "Ada", at=main)
    toy.git("config", "user.email", "ada@example.invalid", at=main)
    return base


@pytest.fixture
def project(_base: Path, tmp_path: Path) -> Toy:
    return copied(_base, tmp_path)


@pytest.fixture
def main(project: Toy) -> Path:
    """A person's clone of upstream's main, in the middle of their own work."""
    path = project.root.parent / "théir main's"
    project.git("switch", "-q", "-c", "mine", at=path)
    (path / "vllm/b.py").write_text("unfinished\n")
    (path / "data.txt").write_text("staged\n")
    project.git("add", "data.txt", at=path)
    (path / "vllm/helper.py").write_text("untracked\n")
    return path


def state(toy: Toy, at: Path) -> dict[str, Any]:
    """All of a clone that is a person's."""
    return {
        "refs": toy.git("for-each-ref", at=at),
        "head": (at / ".git/HEAD").read_text(),
        "index": toy.git("ls-files", "-s", at=at),
        "config": (at / ".git/config").read_text(),
        "worktrees": toy.git("worktree", "list", at=at),
        "files": {
            str(path): path.read_bytes()
            for path in at.rglob("*")
            if path.is_file() and ".git" not in path.relative_to(at).parts
        },
    }


def make(toy: Toy, at: Path, patch: str, **env: Any) -> CompletedProcess[str]:
    """Make a branch; nothing else of the clone may change."""
    before = state(toy, at)
    done = toy.run("upstream", VLLM=str(at), PATCH=patch, **env)
    after = state(toy, at)
    new = [r for r in after["refs"].splitlines() if r not in before["refs"]]
    assert len(new) == 1 and new[0].endswith(f"\trefs/heads/{BRANCHES[patch]}")
    assert after | {"refs": 0} == before | {"refs": 0}
    return done


def refused(toy: Toy, at: Path, patch: str = "3", **env: Any) -> str:
    before = state(toy, at)
    line = toy.fails("upstream", VLLM=str(at), PATCH=patch, **env)
    assert state(toy, at) == before
    return line


def titles(toy: Toy, at: Path, branch: str, of: str = "%s") -> list[str]:
    return toy.git("log", f"--format={of}", f"main..{branch}", at=at).splitlines()


def test_what_it_needs(project: Toy, main: Path) -> None:
    """By a name that another one brings, and by lines that another one wrote."""
    done = make(project, main, "3")
    assert titles(project, main, BRANCHES["3"]) == ["[Model] Help b", "[Model] Help"]
    assert "it needs 0001-Model-Help.patch: submit that first" in done.stderr
    make(project, main, "4")
    assert titles(project, main, BRANCHES["4"]) == [
        "[Model] Rename ten",
        "[Model] Name ten",
    ]
    text = project.git("show", f"{BRANCHES['4']}:vllm/a.py", at=main)
    assert "a0 = 1\n" in text and "a10 = 'TEN'\n" in text
    make(project, main, "2")
    assert titles(project, main, BRANCHES["2"]) == ["[Model] Name ten"]


def test_more_than_names_tell(project: Toy, main: Path) -> None:
    make(project, main, "4", WITH="0001 2")
    assert len(titles(project, main, BRANCHES["4"])) == 3
    assert "WITH=9 is none of the series" in refused(project, main, WITH="9")


def test_what_it_comes_after(project: Toy, main: Path) -> None:
    """By a table of the docs, which some series have none of."""
    line = "which it shows its worth behind"
    assert line not in make(project, main, "4").stderr
    page = project.root / "docs" / "maintaining.md"
    page.parent.mkdir()
    page.write_text(
        "| column | after |\n|---|---|\n| seconds | what it took |\n\n"
        "| | needs | after | upstream |\n|---|---|---|---|\n"
        "| 0003 | 0001 | | not submitted |\n| 0004 | | 0001 0003 | not submitted |\n"
    )
    for given, said in (
        ("", "0001-Model-Help.patch, 0003-Model-Help-b.patch, {}: WITH='0001 0003'"),
        ("1", "0003-Model-Help-b.patch, {}: WITH='0001 0003'"),
        ("3", ""),
        ("0003 0001", ""),
    ):
        project.git("branch", "-qD", BRANCHES["4"], at=main)
        told = make(project, main, "4", WITH=given).stderr
        assert (line in told) == bool(said), told
        assert f"\nit comes after {said.format(line)}\n" in told or not said, told
    assert line not in make(project, main, "3").stderr


def test_commit(project: Toy, main: Path) -> None:
    make(project, main, "3")
    branch = BRANCHES["3"]
    assert titles(project, main, branch, "%an <%ae>/%cn <%ce>") == [f"{WHO}/{WHO}"] * 2
    said = project.git("log", "-1", "--format=%B", branch, at=main)
    assert said == (
        "[Model] Help b\n\nPurpose: see what happens.\n\nTest Plan: run it.\n\n"
        f"Test Result: it ran.\n\nSigned-off-by: {WHO}"
    )
    assert project.git("merge-base", "main", branch, at=main) == project.git(
        "rev-parse", "main", at=main
    )
    assert project.git("fsck", "--connectivity-only", at=main) is not None
    # The clone needs nothing of the project's.
    shutil.rmtree(project.own)
    assert "assist()" in project.git("show", f"{branch}:vllm/b.py", at=main)


def test_author_who_is_someone(project: Toy, main: Path) -> None:
    (path,) = project.patches.glob("0001-*")
    text = path.read_text()
    path.write_text(re.sub("(?m)^From: .*", "From: Eve <eve@example.invalid>", text))
    make(project, main, "1")
    (authors,) = titles(project, main, BRANCHES["1"], "%an/%cn")
    assert authors == "Eve/Ada"


def test_text(project: Toy, main: Path) -> None:
    done = make(project, main, "3")
    place = project.root / "build" / "upstream" / BRANCHES["3"]
    assert (place / "body.md").read_text() == (
        '<!-- lint off -->\n\n## Overview\n\nHelp b. It comes after "[Model] Help".'
        f"\n\n## Claims\n\n- Help b\n\n## Validation\n\nrun it.\n\n{MEASURED}it ran."
        "\n\n## Details\n\nsee what happens.\n\n---\n\n- [ ] AI assistance was used.\n"
    )
    for word in ("pre-commit run --from-ref main", "gh pr list", "gh pr create", "AI"):
        assert word in done.stdout
    assert "--title '[Model] Help b'" in done.stdout
    assert "git push" in done.stdout
    assert "Put your own results in the place of those that are there" in done.stdout
    assert "\n# v1.0.0 with the whole series.\n$EDITOR " in done.stdout


def test_text_that_was_edited_is_kept(project: Toy, main: Path) -> None:
    place = project.root / "build" / "upstream" / BRANCHES["3"]
    for number in (1, 2):
        make(project, main, "3")
        text = (place / "body.md").read_text()
        (place / "body.md").write_text(f"{text}mine {number}\n")
        project.git("branch", "-qD", BRANCHES["3"], at=main)
    done = make(project, main, "3")
    assert "body.md was another one: it is body-2.md there now" in done.stderr
    assert (place / "body.md").read_text() == text
    for number in (1, 2):
        assert (place / f"body-{number}.md").read_text() == f"{text}mine {number}\n"


def test_text_without_a_template(project: Toy, main: Path) -> None:
    project.git("stash", "-q", at=main)
    project.git("rm", "-q", ".github/PULL_REQUEST_TEMPLATE.md", at=main)
    project.git("commit", "-q", "-m", "no template", at=main)
    make(project, main, "2", ONTO="mine")
    place = project.root / "build" / "upstream" / BRANCHES["2"]
    assert (place / "body.md").read_text() == (
        "## Purpose\n\nsee what happens.\n\n## Test Plan\n\nrun it.\n\n"
        f"## Test Result\n\n{MEASURED}it ran.\n"
    )


def test_prose_and_commands() -> None:
    from scripts.upstream import _markdown

    said = _markdown(
        [
            *("One line", "and another.", "- a bullet", "  goes on", "- next", ""),
            *("pytest tests/a.py \\", "    tests/b.py", "pytest c", "By hand.", ""),
            *("a table   1", "of two    2"),
        ]
    )
    assert said == (
        "One line and another.\n- a bullet goes on\n- next\n\n"
        "```bash\npytest tests/a.py \\\n    tests/b.py\npytest c\n```\n\nBy hand.\n\n"
        "```text\na table   1\nof two    2\n```"
    )


def test_hostile_settings(project: Toy, main: Path, hostile: dict[str, Any]) -> None:
    make(project, main, "4")
    tree = project.git("rev-parse", BRANCHES["4"] + "^{tree}", at=main)
    project.git("branch", "-q", "-D", BRANCHES["4"], at=main)
    make(project, main, "4", **hostile)
    assert project.git("rev-parse", BRANCHES["4"] + "^{tree}", at=main) == tree
    assert titles(project, main, BRANCHES["4"], "%an <%ae>") == [WHO] * 2
    assert "# kept" in titles(project, main, BRANCHES["4"], "%B")


def test_bytes_that_are_no_text(project: Toy, main: Path) -> None:
    for name in ("vllm/latin.py", "vllm/a.py"):
        with (project.own / name).open("ab") as stream:
            stream.write(b"# \xff\n")
        project.git("add", name)
    project.git("commit", "-q", "-m", MESSAGE.format(title="Latin"))
    project.run("export")
    project.run("upstream", VLLM=str(main), PATCH="5")
    data = subprocess.run(
        ["git", "-C", main, "show", "gemma4-0005-latin:vllm/latin.py"],
        capture_output=True,
        check=True,
    ).stdout
    assert data == b"# \xff\n"


def test_nothing_is_pushed(project: Toy, main: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote.git"
    project.git("clone", "-q", "--bare", str(main), str(remote), at=main)
    project.git("remote", "add", "origin", str(remote), at=main)
    project.git("config", "push.default", "matching", at=main)
    before = project.git("for-each-ref", at=remote)
    make(project, main, "3")
    assert project.git("for-each-ref", at=remote) == before


def test_branch_that_is_there(project: Toy, main: Path) -> None:
    project.git("branch", BRANCHES["3"], "mine", at=main)
    assert f"has a branch {BRANCHES['3']} already" in refused(project, main)


def test_no_identity(project: Toy, main: Path) -> None:
    project.git("config", "--unset", "user.email", at=main)
    line = refused(project, main, GIT_CONFIG_GLOBAL=os.devnull)
    assert "git has no user.email, and a sign-off needs it" in line


def test_shallow(project: Toy, main: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    project.git("clone", "-q", "--depth=1", f"file://{main}", str(shallow), at=main)
    assert "is a shallow clone" in refused(project, shallow)


def test_partial(project: Toy, main: Path, tmp_path: Path) -> None:
    """A clone that has not even the files of its own main yet."""
    partial = project.partial(main, tmp_path / "partial", "-n", "--branch=main")
    for name, value in (("name", "Ada"), ("email", "ada@example.invalid")):
        project.git("config", f"user.{name}", value, at=partial)
    project.run("upstream", VLLM=str(partial), PATCH="4")
    assert "'TEN'" in project.git("show", f"{BRANCHES['4']}:vllm/a.py", at=partial)


def test_no_such_thing(project: Toy, main: Path, tmp_path: Path) -> None:
    assert "PATCH= is none of the series: it has 0001" in refused(project, main, "")
    assert "PATCH=0005 is none" in refused(project, main, "0005")
    assert "has no trunk" in refused(project, main, ONTO="trunk")
    assert "VLLM= is missing" in project.fails("upstream", PATCH="3")
    assert "is no folder" in project.fails(
        "upstream", PATCH="3", VLLM=str(tmp_path / "none")
    )


def drift(toy: Toy, main: Path, text: str) -> None:
    """Let main change what the second patch does."""
    toy.git("stash", "-q", "-u", at=main)
    toy.git("switch", "-q", "main", at=main)
    toy.change("vllm/a.py", "a10 = 10\n", text, "In between", at=main)
    toy.git("switch", "-q", "mine", at=main)
    toy.git("stash", "pop", "-q", "--index", at=main)


def test_conflict(project: Toy, main: Path) -> None:
    drift(project, main, "a10 = 11\n")
    line = refused(project, main, "4")
    assert "0002-Model-Name-ten.patch conflicts with main" in line
    assert "in vllm/a.py: nothing has changed; CONTINUE=1" in line


def test_conflict_to_mend(project: Toy, main: Path) -> None:
    drift(project, main, "a10 = 11\n")
    before = state(project, main)
    line = project.fails("upstream", VLLM=str(main), PATCH="4", CONTINUE="1")
    tree = project.root / "build" / "upstream" / BRANCHES["4"] / "tree"
    assert f"build/upstream/{BRANCHES['4']}/tree" in line
    assert "git cherry-pick --continue" in line
    after = state(project, main)
    assert {key: after[key] for key in ("head", "index", "files")} == {
        key: before[key] for key in ("head", "index", "files")
    }
    assert (tree / "../body.md").exists()
    for text in ("a10 = 'ten'\n", "a10 = 'TEN'\n"):
        path = tree / "vllm/a.py"
        found = path.read_text()
        path.write_text(re.sub(r"(?s)<<<<<<<.*>>>>>>> [^\n]*\n", text, found))
        project.git("add", "vllm/a.py", at=tree)
        project.git("-c", "core.editor=true", "cherry-pick", "--continue", at=tree)
        if "<<<<" not in path.read_text():
            break
    assert titles(project, main, BRANCHES["4"]) == [
        "[Model] Rename ten",
        "[Model] Name ten",
    ]
    project.git("branch", "-m", BRANCHES["4"], "theirs", at=main)
    line = refused(project, main, "4", CONTINUE="1")
    assert "is there from an earlier run" in line and "worktree remove" in line


def test_upstream_has_it(project: Toy, main: Path) -> None:
    drift(project, main, "a10 = 'ten'\n")
    line = refused(project, main, "2")
    assert "main of" in line and "has 0002-Model-Name-ten.patch already" in line
    done = make(project, main, "4")
    assert "main has 0002-Model-Name-ten.patch already" in done.stderr
    assert titles(project, main, BRANCHES["4"]) == ["[Model] Rename ten"]


@pytest.mark.parametrize("kill", ["KILL", "INT"])
def test_interrupted_anywhere(
    project: Toy, main: Path, tmp_path: Path, kill: str
) -> None:
    before = state(project, main)
    for nth in range(3, 400, 9):
        folder = saboteur(tmp_path, nth, kill, '"$git" "$@"' if nth % 2 else ":")
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        project.run("upstream", ok=None, PATH=path, VLLM=str(main), PATCH="4")
        if not (folder / "hit").exists():
            break
        if BRANCHES["4"] in project.git("branch", "--list", at=main):
            # Killed by the last of all: the branch is whole.
            assert len(titles(project, main, BRANCHES["4"])) == 2
            project.git("branch", "-q", "-D", BRANCHES["4"], at=main)
        assert state(project, main) == before, nth
    else:
        raise AssertionError("more calls of git than attempts")
    assert nth > 50
    assert len(titles(project, main, BRANCHES["4"])) == 2


def test_interrupted_at_a_conflict(project: Toy, main: Path, tmp_path: Path) -> None:
    """While it is left to a person."""
    drift(project, main, "a10 = 11\n")
    before = state(project, main)
    env: dict[str, Any] = {"VLLM": str(main), "PATCH": "4", "CONTINUE": "1"}

    def leave(nth: int, first: str) -> Path:
        folder = saboteur(tmp_path, nth, "INT", first)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        project.run("upstream", ok=None, PATH=path, **env)
        return folder

    last = (leave(1 << 20, ":") / "n").read_text().count("\n")
    tree = project.root / "build" / "upstream" / BRANCHES["4"] / "tree"
    project.git("worktree", "remove", "-f", str(tree), at=main)
    project.git("branch", "-q", "-D", BRANCHES["4"], at=main)
    left = f"refs/gemma4/upstream/{BRANCHES['4']}"
    project.git("update-ref", "-d", left, at=main)
    assert state(project, main) == before
    for nth in range(last, last - 9, -1):
        for first in (":", '"$git" "$@"'):
            assert (leave(nth, first) / "hit").exists()
            assert state(project, main) == before, (nth, first)
            assert not tree.exists(), (nth, first)
    assert "conflicts with main" in project.fails("upstream", **env)
    assert tree.exists()


@pytest.mark.parametrize("word", ["fetch", "worktree"])
def test_killed_at_a_conflict(
    project: Toy, main: Path, tmp_path: Path, word: str
) -> None:
    drift(project, main, "a10 = 11\n")
    before = state(project, main)
    env: dict[str, Any] = {"VLLM": str(main), "PATCH": "4", "CONTINUE": "1"}
    path = instead(tmp_path, word, "kill -9 $PPID; sleep 1; exit 1")
    done = project.run("upstream", ok=None, PATH=path, **env)
    assert done.returncode == -signal.SIGKILL
    assert state(project, main) | {"refs": 0} == before | {"refs": 0}
    assert project.git("branch", "--list", "gemma4*", at=main) == ""
    assert "conflicts with main" in project.fails("upstream", **env)
    refs = project.git("for-each-ref", "--format=%(refname)", "refs/gemma4", at=main)
    assert refs == f"refs/gemma4/upstream/{BRANCHES['4']}"
