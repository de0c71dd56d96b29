# SPDX-License-Identifier: Apache-2.0
"""Verifying a toy series, and each thing that can be wrong with one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import BRANCH, MESSAGE, ROOT, TAG, TREE, Toy, make_toy
from test_build import MORE, make_theirs
from test_lint import CONFIG, HOOK

sys.path.insert(0, str(ROOT))

from scripts import verify
from scripts.console import Failure
from scripts.git import Clone

TITLES = ("Name eleven", "Name fifty", "A new file", "Without tests")
# Each test says that it was run.
TEST = """\
# SPDX-License-Identifier: Apache-2.0
import os

{imports}

with open(os.environ["RAN"], "a") as ran:
    ran.write("{name}\\n")


def test_{name}():
    assert {claim}
"""
TINY = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
names = ("vision_config", "boi_token_id", "eoi_token_id", "image_token_id", "dtype")
text = ", ".join(f'"{name}": 1' for name in names)
(folder / "config.json").write_text("{" + text + "}")
"""
IMAGE = """
import pathlib
class new:
    def __init__(self, mode, size): pass
    def save(self, path): pathlib.Path(path).touch()
"""


def a_test(name: str, imports: str, claim: str) -> str:
    return TEST.format(name=name, imports=imports, claim=claim)


@dataclass
class Project:
    """A toy project with a series, and what its tests left."""

    toy: Toy
    python: Path
    ran: Path

    def commit(self, title: str, **files: str) -> None:
        """Commit files: a__b is a/b.py."""
        for name, text in files.items():
            path = self.toy.own / (name.replace("__", "/", 1) + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if name.startswith("tests__"):
                ruff = Path(sys.executable).with_name("ruff")
                subprocess.run([ruff, "format", "-q", path], check=True)
            self.toy.git("add", str(path))
        self.toy.git("commit", "-q", "-m", MESSAGE.format(title=title))

    def text(self, name: str) -> str:
        return (self.toy.own / name).read_text()

    def env(self, **env: str) -> dict[str, str]:
        return {"PYTHON": str(self.python), "RAN": str(self.ran)} | env

    def verify(self, good: bool = True, **env: str) -> str:
        """Verify; return what was said."""
        self.ran.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "scripts.verify"],
            cwd=self.toy.root,
            env=self.toy.environ(**self.env(**env)),
            capture_output=True,
            text=True,
        )
        said = done.stderr + done.stdout
        # Those of checks are indented.
        assert "\nTraceback" not in said, said
        assert (done.returncode == 0) == good, said
        return said

    def counted(self) -> dict[str, int]:
        """Return how often each test file was run."""
        return Counter(self.ran.read_text().split() if self.ran.exists() else [])

    def table(self) -> dict[str, dict[str, str]]:
        """Return the rows of the report by patch."""
        report = self.toy.root / "build" / "reports" / f"verify-{TAG}.log"
        lines = report.read_text().splitlines()
        heads = [
            found.start() for found in re.finditer(r"(?<=  )\S|(?<=^ )\S", lines[0])
        ]
        rows = {}
        for line in lines[1:]:
            if re.match(r" \d{4} ", line):
                cells = [
                    [
                        row[start:end].strip()
                        for start, end in zip(heads, [*heads[1:], None], strict=True)
                    ]
                    for row in (lines[0], line)
                ]
                rows[cells[1][0]] = dict(zip(*cells, strict=True))
        return rows

    def edit(self, number: int, old: str, new: str) -> None:
        """Change the file of a patch."""
        path = next(self.toy.patches.glob(f"{number:04}-*"))
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    base = tmp_path_factory.mktemp("verify")
    toy = make_toy(base)
    more = {
        ".pre-commit-config.yaml": CONFIG,
        "tools/bad.py": HOOK,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "vllm/user.py": "from vllm.b import b1\n\nx = b1\n",
        "vllm/device.py": "import vllm.b\nimport no_such_device\n",
    }
    python = make_theirs(toy, base, TREE | MORE | more)
    site = next(python.parent.parent.glob("lib/python3*/site-packages"))
    own = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "tools.pth").write_text(own + "\n")
    (site / "PIL").mkdir()
    (site / "PIL" / "Image.py").write_text(IMAGE)
    (toy.root / "scripts" / "tiny_gemma4.py").write_text(TINY)
    project = Project(toy, python, base / "ran")
    toy.run("apply")
    project.commit(
        TITLES[0],
        vllm__a=project.text("vllm/a.py").replace("a11 = 11\n", "a11 = 99\n"),
        tests__test_a=a_test("a", "from vllm.a import a11", "a11 == 99"),
    )
    project.commit(
        TITLES[1],
        vllm__b=project.text("vllm/b.py").replace("b50 = 50\n", "b50 = 51\n"),
        tests__test_b=a_test("b", "from vllm.b import b50", "b50 == 51"),
    )
    project.commit(
        TITLES[2],
        vllm__new="# SPDX-License-Identifier: Apache-2.0\nx = 1\n",
        tests__test_new=a_test("new", "import vllm.a\nimport vllm.new", "vllm.new.x"),
    )
    project.commit(
        TITLES[3], vllm__b=project.text("vllm/b.py").replace("b2 = 2\n", "b2 = 20\n")
    )
    toy.run("export")
    shutil.copytree(toy.patches, base / "patches")
    return project


@pytest.fixture
def project(made: Project) -> Project:
    """The series as it was first, and nothing verified."""
    toy = made.toy
    toy.git("reset", "-q", "--hard", f"refs/gemma4/first/{TAG}") if toy.git(
        "for-each-ref", f"refs/gemma4/first/{TAG}"
    ) else toy.git("update-ref", f"refs/gemma4/first/{TAG}", "HEAD")
    shutil.rmtree(toy.patches)
    shutil.copytree(toy.root.parent / "patches", toy.patches)
    shutil.rmtree(toy.root / "build" / f"verify-{TAG}", ignore_errors=True)
    shutil.rmtree(toy.root / ".git", ignore_errors=True)
    shutil.copy(ROOT / "scripts" / "verify.py", toy.root / "scripts")
    return made


def test_good(project: Project) -> None:
    toy = project.toy
    (toy.own / "vllm/a.py").write_text("mine\n")
    (toy.own / "theirs.txt").write_text("mine\n")
    before = (toy.git("for-each-ref"), toy.head(), toy.git("status", "--porcelain"))
    said = project.verify()
    rows = project.table()
    assert list(rows) == ["0001", "0002", "0003", "0004"]
    for row in rows.values():
        assert (row["lint"], row["upstream"]) == ("good", "Pending")
    assert [row["lines"] for row in rows.values()] == ["2", "2", "2", "2"]
    assert [row["import"] for row in rows.values()] == ["good"] * 4
    assert rows["0001"]["its tests"] == "1 passed"
    assert rows["0001"]["earlier tests"] == "none"
    assert [row["without it"] for row in rows.values()] == ["fails"] * 3 + ["NO TESTS"]
    # Only what loads a changed module is run again: b after 0004.
    assert rows["0002"]["earlier tests"] == "1 passed; 1 of 1 files carried"
    assert rows["0003"]["earlier tests"] == "2 passed; 2 of 2 files carried"
    assert rows["0004"]["earlier tests"] == "3 passed; 2 of 3 files carried"
    assert project.counted() == {"a": 2, "b": 3, "new": 1}
    assert said.splitlines()[-1].startswith("4 patches, 20 checks, 0 failed, 1 without")
    assert "passed in" not in said
    after = (toy.git("for-each-ref"), toy.head(), toy.git("status", "--porcelain"))
    assert after == before and (toy.own / "vllm/a.py").read_text() == "mine\n"

    # Nothing is done twice, and FULL=1 does what was carried over.
    project.verify()
    assert project.counted() == {}
    assert project.table() == rows
    project.verify(FULL="1")
    assert project.counted() == {"a": 3, "b": 1, "new": 1}
    assert "carried" not in str(project.table())


def test_changes_invalidate_what_they_must(project: Project) -> None:
    project.verify()
    project.edit(1, "Purpose: see what happens.", "Purpose: say it in other words.")
    project.verify()
    assert project.counted() == {}
    project.edit(2, "+b50 = 51", "+b50 = 52")
    project.edit(2, "b50 == 51", "b50 == 52")
    project.edit(4, " b50 = 51", " b50 = 52") if "b50" in next(
        project.toy.patches.glob("0004-*")
    ).read_text() else None
    project.verify()
    # With 0002, without it, and after 0004.
    assert project.counted() == {"b": 3}
    hook = project.toy.root / "scripts" / "verify_hook.py"
    text = hook.read_text()
    hook.write_text(text + "# Another.\n")
    said = project.verify(PATCH="0001")
    assert said.splitlines()[-1].startswith("1 patch, ")
    hook.write_text(text)
    assert project.counted() == {"a": 2}


def test_parallel(project: Project) -> None:
    project.verify(JOBS="3")
    assert project.counted() == {"a": 2, "b": 3, "new": 1}


def test_two_cores_a_tree(project: Project) -> None:
    """Of those that it may use, whatever the machine has."""
    script = project.toy.root / "scripts" / "console.py"
    text = script.read_text()
    script.write_text(text + "\n\ndef cores() -> int:\n    return 6\n")
    project.verify(PATCH="1")
    script.write_text(text)
    trees = (project.toy.root / "build" / f"verify-{TAG}").glob("tree-*.lock")
    assert len(list(trees)) == 3


@pytest.mark.parametrize("name", ["gemma-4-E2B", "diffusiongemma", "cherry", "RGB"])
def test_other_stand_ins(project: Project, name: str) -> None:
    """What a test may have seen of them it has seen of the old ones."""
    project.verify(PATCH="1")
    redirect = project.toy.root / "build" / "tiny" / "redirect.json"
    before = redirect.stat().st_mtime_ns
    script = project.toy.root / "scripts" / "test.py"
    text = script.read_text()
    assert name in text
    script.write_text(text.replace(name, name + "A"))
    project.verify(PATCH="1")
    script.write_text(text)
    assert project.counted() == {"a": 2}
    assert redirect.stat().st_mtime_ns != before


def test_mode_is_seen(filled: Toy) -> None:
    """Of a module, and of what is no Python."""
    clone = Clone(filled.own)
    was = verify.State(clone, "HEAD")
    for file, names in (("vllm/a.py", ["vllm.a"]), ("data.txt", [])):
        filled.git("update-index", "--chmod=+x", file)
        filled.git("commit", "-qm", file)
        now = verify.State(clone, "HEAD")
        assert now.seen(names) != was.seen(names)
        was = now


def test_tests_that_pass_without_the_patch(project: Project) -> None:
    text = project.text("vllm/a.py").replace("a3 = 3\n", "a3 = 30\n")
    more = a_test("idle", "from vllm.a import a4", "a4 == 4")
    project.commit("Idle", vllm__a=text, tests__test_idle=more)
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5")
    assert project.table()["0005"]["without it"] == "PASSES"
    assert "FAILED 0005: its tests do not fail without it" in said
    # A failure of a test that also fails, or is skipped, with the patch is no proof.
    skipping = more.replace("import os\n", "import os\n\nimport pytest\n").replace(
        "def test_idle", "@pytest.mark.skipif(a4 == 4, reason='no')\ndef test_idle"
    )
    project.toy.git("reset", "-q", "--hard", "HEAD~")
    project.commit("Idle", vllm__a=text, tests__test_idle=skipping)
    project.toy.run("export")
    project.verify(PATCH="5")
    assert project.table()["0005"]["its tests"] == "1 skipped"
    assert project.table()["0005"]["without it"] == "skipped here"


NEEDS_GPU = """

@pytest.mark.parametrize("x", ["a::b", "c"])
class Test:
    @pytest.mark.skipif(True, reason="needs a GPU")
    def test_on_gpu(self, x):
        assert {claim}
"""


@pytest.mark.parametrize(
    "how", ["new", "changed", "whole", "one runs", "helper", "decorator"]
)
def test_tests_that_are_skipped_here(project: Project, how: str) -> None:
    """Those of the patch; that others of its file pass is no proof of it."""
    plain = project.text("tests/test_a.py").replace(
        "import os\n", "import os\n\nimport pytest\n"
    )
    skipping = plain + NEEDS_GPU.format(claim="a11")
    text = project.text("vllm/a.py")
    later = {
        "new": skipping,
        "changed": skipping.replace("assert a11\n", "assert a11 == 99\n"),
        "whole": plain + '\n\npytest.skip("no Triton", allow_module_level=True)\n'
        "\n\ndef test_more():\n    pass\n",
        "one runs": skipping + "\n\ndef test_here():\n    assert a11\n",
        "helper": skipping + "\n\ndef helper():\n    pass\n",
        "decorator": skipping.replace('reason="needs', 'reason="wants'),
    }[how]
    if how in ("changed", "helper", "decorator"):
        project.commit("Before", tests__test_a=skipping, vllm__a=text + "a60 = 60\n")
    project.commit("After", tests__test_a=later, vllm__a=text + "a61 = 61\n")
    project.toy.run("export")
    last = "0006" if how in ("changed", "helper", "decorator") else "0005"
    excused = how not in ("one runs", "helper")
    said = project.verify(good=excused, PATCH=last)
    wanted = "skipped here" if excused else "PASSES"
    assert project.table()[last]["without it"] == wanted
    assert (", 1 skipped here" in said) == excused
    if excused:
        reasons = {"whole": "no Triton", "decorator": "wants a GPU"}
        reason = reasons.get(how, "needs a GPU")
        assert f"SKIPPED {last}: its tests are skipped here: {reason}\n" in said
        # None was run without it.
        assert project.counted()["a"] == 1


def test_refactor(project: Project) -> None:
    more = project.text("tests/test_b.py").replace("b50 == 51", "b50 > 50")
    project.commit("Move", vllm__b=project.text("vllm/b.py") + "\n", tests__test_b=more)
    message = MESSAGE.format(title="Move").replace("[Model]", "[Refactor]")
    project.toy.git("commit", "-q", "--amend", "-m", message)
    project.toy.run("export")
    project.verify(good=False, PATCH="5")  # The blank line at the end does not lint.
    assert project.table()["0005"]["without it"] == "a refactor: not asked"
    assert project.table()["0005"]["lint"] == "FAILS"


def test_later_patch_breaks_an_earlier_test(project: Project) -> None:
    text = project.text("vllm/a.py")
    project.commit("Break", vllm__a=text.replace("a11 = 99", "a11 = 98"))
    project.commit("Mend", vllm__a=text)
    project.toy.run("export")
    said = project.verify(good=False)
    assert "FAILED 0005 test tests/test_a.py" in said and "assert 98 == 99" in said
    assert "FAILED 0006" not in said
    assert "1 failed" in project.table()["0005"]["earlier tests"]
    # What failed is asked again, and only that.
    project.verify(good=False)
    assert project.counted() == {"a": 1}


def test_lint_of_a_patch_that_a_later_one_mends(project: Project) -> None:
    text = project.text("vllm/b.py")
    project.commit("Bad", vllm__b="import os\n" + text)
    project.commit("Mend", vllm__b=text)
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5-")
    rows = project.table()
    assert (rows["0005"]["lint"], rows["0006"]["lint"]) == ("FAILS", "good")
    assert "F401" in said and "FAILED 0005 lint" in said


def test_import_of_what_uses_a_changed_module(project: Project) -> None:
    text = project.text("vllm/b.py").replace("b1 = 1\n", "b100 = 1\n")
    project.commit("Rename", vllm__b=text)
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5")
    assert "FAILED 0005 import" in said and "vllm.user: ImportError" in said
    # device never imports here.
    assert "  vllm.device\n" not in said and "  vllm.user\n" in said


def test_tree_that_does_not_import(project: Project) -> None:
    project.commit("Break all", vllm____init__="import nothing_there\n")
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5")
    assert "FAILED 0005 import (vLLM does not import)" in said, said
    assert "No module named 'nothing_there'" in said


def test_another_vllm_is_seen(project: Project, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    child = (
        "import subprocess\nimport sys\n\nCODE = "
        f'"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vllm"\n'
        'subprocess.run([sys.executable, "-c", CODE], check=True, cwd="/")'
    )
    project.commit("Other", tests__test_other=a_test("other", child, "os"))
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5")
    assert f"a process imported {tmp_path}/vllm/__init__.py" in said


def test_children_run_the_tree(project: Project) -> None:
    child = (
        "import subprocess\nimport sys\n\n"
        'CODE = "import vllm.new, vllm; print(vllm.__file__)"\n'
        "SAID = subprocess.run(\n"
        '    [sys.executable, "-c", CODE], cwd="/", capture_output=True, text=True\n'
        ").stdout"
    )
    claim = f'SAID.startswith("{project.toy.root}/build/verify-{TAG}/tree-0/vllm/")'
    project.commit("Child", tests__test_child=a_test("child", child, claim))
    project.commit("Later", vllm__new=project.text("vllm/new.py") + "y = 1\n")
    project.toy.run("export")
    project.verify(good=False, PATCH="5-")  # It passes without 0005 as well.
    rows = project.table()
    assert rows["0005"]["its tests"] == "1 passed"
    # What only a child imports counts.
    assert project.counted()["child"] == 3
    assert "of 4 files" in rows["0006"]["earlier tests"]


def test_hang(project: Project) -> None:
    script = project.toy.root / "scripts" / "verify.py"
    script.write_text(script.read_text().replace("LIMIT = 1200", "LIMIT = 5"))
    hang = "import time\n\ntime.sleep(60)"
    project.commit("Hang", tests__test_hang=a_test("hang", hang, "1"))
    project.toy.run("export")
    said = project.verify(good=False, PATCH="5")
    assert "FAILED 0005 test tests/test_hang.py (it took more than 5 s)" in said


def test_time_that_is_over(project: Project) -> None:
    script = project.toy.root / "scripts" / "verify.py"
    script.write_text(script.read_text().replace("60 * minutes", "2 * minutes"))
    said = project.verify(good=False, MINUTES="1")
    assert "checks not reached: run it again to go on" in said
    assert re.search("(?m)^NOT REACHED 0004: .*tests/test_a.py", said)
    assert "not reached" in str(project.table())
    done = project.counted()
    project.verify()
    assert Counter(done) + Counter(project.counted()) == {"a": 2, "b": 3, "new": 1}


def test_part_in_the_time_there_is(project: Project) -> None:
    """What is not reached is no failure, what fails is."""
    script = project.toy.root / "scripts" / "verify.py"
    text = script.read_text()
    script.write_text(text.replace("60 * minutes", "0 * minutes"))
    said = project.verify(MINUTES="1", PARTIAL="1")
    assert (
        "NOT REACHED 0002: lint, import, tests/test_b.py, without, tests/test_a.py"
        in (said)
    )
    script.write_text(text)
    project.edit(1, "a11 == 99", "a11 == 98")
    project.verify(good=False, PATCH="1", PARTIAL="1")


def test_own_tests_come_first(project: Project) -> None:
    project.verify(FULL="1", JOBS="1")
    ran = project.ran.read_text().split()
    # With and without each patch, and then after those that follow it.
    assert ran == ["a", "a", "b", "b", "new", "a", "a", "b", "a", "b", "new"]


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
)
def test_interrupt(project: Project, sent: signal.Signals, tmp_path: Path) -> None:
    pid, wait = tmp_path / "pid", tmp_path / "wait"
    slow = (
        "import time\n\n"
        f'open("{pid}", "w").write(str(os.getpid()))\n'
        f'while os.path.exists("{wait}-" + os.path.basename(os.getcwd())):\n'
        "    time.sleep(0.1)"
    )
    text = project.text("vllm/a.py").replace("a3 = 3\n", "a3 = 30\n")
    claim = a_test("slow", slow, "__import__('vllm.a').a.a3 == 30")
    project.commit("Slow", vllm__a=text, tests__test_slow=claim)
    project.toy.run("export")
    before = project.toy.git("for-each-ref")
    held = wait.with_name("wait-tree-0")
    held.touch()
    project.ran.unlink(missing_ok=True)
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.verify"],
        cwd=project.toy.root,
        env=project.toy.environ(**project.env(JOBS="1")),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        for _ in range(1200):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.1)
        running.send_signal(sent)
        if sent != signal.SIGKILL:
            try:
                _, said = running.communicate(timeout=30)
            finally:
                running.kill()  # or leaving waits for it
            assert said.splitlines()[-1].startswith("interrupted: nothing is lost")
            assert running.returncode == 130
    first = int(pid.read_text())
    try:
        assert project.toy.git("for-each-ref") == before
        if sent == signal.SIGKILL:
            # Its test lives on, and the next run takes another tree.
            os.kill(first, 0)
        else:
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            held.unlink()
        done = project.counted()
        assert done["a"] == 2 and done["b"] == 2
        project.verify(JOBS="1")
        again = project.counted()
        # 0004 changes what b loads, 0005 what a and new load.
        assert again == {"a": 1, "b": 1, "new": 1, "slow": 2}
    finally:
        held.unlink(missing_ok=True)


def test_two_at_once(project: Project) -> None:
    from filelock import FileLock

    folder = project.toy.root / "build" / f"verify-{TAG}"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        line = project.toy.fails("verify", **project.env())
    assert "another make command is at work" in line


def test_since(project: Project) -> None:
    toy = project.toy
    (toy.root / ".gitignore").write_text("/build/\n__pycache__/\n")
    toy.git("init", "-q", "-b", "main", at=toy.root)
    toy.git("add", "-A", at=toy.root)
    toy.git("commit", "-qm", "one", at=toy.root)
    assert "no patch to verify" in project.verify(SINCE="main")
    project.edit(3, "Purpose: see what happens.", "Purpose: say it in other words.")
    assert "no patch to verify" in project.verify(SINCE="main")
    project.edit(3, "+x = 1", "+x = 3")
    project.verify(SINCE="main")
    # 0004 makes a tree that was not there either.
    assert list(project.table()) == ["0003", "0004"]
    project.verify(SINCE="main", PATCH="-".join(("1", "3")))
    assert list(project.table()) == ["0003"]
    pins = toy.root / "pins.toml"
    text = pins.read_text()
    # As `make wheel BUMP=1` writes it.
    pins.write_text(f'{text}[releases."{TAG}".wheel]\nnumber = 2\nseries = "x"\n')
    project.verify(SINCE="main")
    assert list(project.table()) == ["0003", "0004"]
    pins.write_text(text.replace('TOY_SETTING = "1"', 'TOY_SETTING = "2"'))
    said = project.verify(SINCE="main", PATCH="1")
    pins.write_text(text)
    assert "pins.toml differs from main's: all patches" in said
    for kind in ("cuda", "cpu"):
        (toy.root / f"scripts/constraints-{TAG}-{kind}.txt").write_text("a==1\n")
        said = project.verify(SINCE="main", PATCH="1")
        assert ("differs from main's" in said) == (kind == "cpu")
    # A release can run on an older one's wheel, with the packages of that.
    pins.write_text(text.replace('torch = "1"\n', 'torch = "1"\nversion = "0.9.0"\n'))
    toy.git("add", "-A", at=toy.root)
    toy.git("commit", "-qm", "two", at=toy.root)
    for tag in (TAG, "v0.9.0"):
        (toy.root / f"scripts/constraints-{tag}-cpu.txt").write_text("a==2\n")
        ended = toy.run("verify", ok=None, **project.env(SINCE="main", PATCH="1"))
        wanted = "scripts/constraints-v0.9.0-cpu.txt differs from main's: all patches"
        assert (wanted in ended.stderr) == (tag == "v0.9.0"), ended.stderr
        assert ("no patch to verify" in ended.stderr) == (tag == TAG), ended.stderr
    pins.write_text(text)
    line = toy.fails("verify", **project.env(SINCE="nowhere"))
    assert "SINCE=nowhere is no revision of this project" in line


def test_since_of_a_reordered_series(project: Project) -> None:
    toy = project.toy
    toy.git("init", "-q", "-b", "main", at=toy.root)
    (toy.root / ".gitignore").write_text("/build/\n__pycache__/\n")
    toy.git("add", "-A", at=toy.root)
    toy.git("commit", "-qm", "one", at=toy.root)
    tips = toy.git("rev-list", "--reverse", f"{TAG}..{BRANCH}").split()
    toy.git("reset", "-q", "--hard", tips[0])
    toy.git("cherry-pick", tips[2], tips[1], tips[3])
    toy.run("export")
    project.verify(SINCE="main")
    # After the three the tree is what it was, so 0004 is as it was.
    assert list(project.table()) == ["0002", "0003"]


def test_shallow_clone(project: Project, tmp_path: Path) -> None:
    toy, pins = project.toy, project.toy.root / "pins.toml"
    shallow = tmp_path / "théir clone's"
    source = f"file://{toy.own}"
    toy.git("clone", "-q", "--depth=1", "-b", TAG, source, str(shallow))
    text = pins.read_text()
    pins.write_text(text.replace("0000000", toy.git("rev-parse", "--short=9", TAG)))
    try:
        project.verify(VLLM=str(shallow), PATCH="1-2")
    finally:
        pins.write_text(text)
    rows = project.table().values()
    assert [row["without it"] for row in rows] == ["fails", "fails"]
    assert (shallow / ".git" / "shallow").exists()


def test_patch_that_does_not_apply(project: Project) -> None:
    project.edit(2, "-b50 = 50", "-b50 = 49")
    line = project.toy.fails("verify", **project.env())
    assert "does not apply to vllm/b.py" in line


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", {1, 2, 3, 4}),
        ("0002", {2}),
        ("2-3", {2, 3}),
        ("0003-", {3, 4}),
        ("1,4", {1, 4}),
        ("1 3-4", {1, 3, 4}),
    ],
)
def test_select(text: str, chosen: set[int]) -> None:
    assert verify.select(text, 4) == chosen


@pytest.mark.parametrize("text", ["x", "0005", "0", "3-2", "-3", "0001-name.patch"])
def test_select_refuses(text: str) -> None:
    with pytest.raises(Failure, match=re.escape(f"PATCH={text} is")):
        verify.select(text, 4)


@pytest.mark.parametrize("name", ["JOBS", "MINUTES"])
def test_numbers(project: Project, name: str) -> None:
    for text in ("two", "0"):
        line = project.toy.fails("verify", **project.env(**{name: text}))
        said = f"{name}={text} is no number from 1 up: give one, or leave it out"
        assert said in line


@pytest.mark.parametrize("name", ["JOBS", "MINUTES", "FULL", "PARTIAL", "DEVICE"])
def test_what_is_wrong_is_said_first(toy: Toy, name: str) -> None:
    line = toy.fails("verify", **{name: "x"})
    assert line.startswith(f"error: {name}=x is ")
    assert not toy.own.exists()


def test_hook_refuses_without_a_tree(project: Project) -> None:
    project.verify(PATCH="1")
    python = next(project.toy.root.glob("build/env-*-verify/bin/python"))
    done = subprocess.run(
        [python, "-c", "import vllm"], capture_output=True, text=True, cwd="/"
    )
    assert "names no tree for make verify" in done.stderr


def test_caches_of_changed_files_are_not_taken(project: Project) -> None:
    """Python takes a file of the same size and second for the same."""
    toy = project.toy
    first, second, third = toy.git("rev-list", "--reverse", f"{TAG}..{BRANCH}").split()[
        :3
    ]
    wheel = next(project.python.parent.parent.glob("lib/python3*/site-packages/vllm"))
    folder = toy.root / "build" / f"verify-{TAG}"
    clone = Clone(toy.own)
    slot = verify.Slot(clone, clone.resolve(TAG), folder / "tree-0", wheel)
    code = "import vllm.a, vllm.b; print(vllm.a.a11, vllm.b.b50)"

    def ask(commit: str) -> str:
        tree = slot.put(commit)
        command = [sys.executable, "-c", code]
        env = {"PATH": os.environ["PATH"]}
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True
        )
        return done.stdout.strip()

    base = clone.resolve(TAG)
    said = [ask(commit) for commit in (second, base, second, first, base)]
    assert said == ["99 51", "11 50", "99 51", "99 50", "11 50"]
    assert (slot.path / "vllm" / "_C.abi3.so").read_text() == "compiled"
    # A folder that is a cache alone would be a package.
    deep = slot.path / "vllm" / "deep" / "er"
    for folder in (deep, deep.parent):
        (folder / "__pycache__").mkdir(parents=True)
    slot.put(third)
    assert not deep.parent.exists() and (slot.path / "vllm" / "__pycache__").exists()
    os.close(slot.lock)
