# SPDX-License-Identifier: Apache-2.0
"""The rules for patches, one by one."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TREE, Toy

sys.path.insert(0, str(ROOT))

from scripts import lint, report, results

GOOD = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: P <p@example.invalid>
Date: Fri, 1 May 2026 00:00:00 +0000
Subject: [PATCH] [Model][Multimodal] Say what it does

Purpose: it says why, in
two lines.

Test Plan: run this.

Test Result: it passed.

Upstream-Status: Pending
---
diff --git a/vllm/a.py b/vllm/a.py
index 1111111..2222222 100644
--- a/vllm/a.py
+++ b/vllm/a.py
@@ -10,3 +10,4 @@ def f():
 one
-two
+three
+--four
 five
diff --git a/vllm/new.py b/vllm/new.py
new file mode 100644
index 0000000..2222222
--- /dev/null
+++ b/vllm/new.py
@@ -0,0 +1,2 @@
+# SPDX-License-Identifier: Apache-2.0
+x = 1
"""


def findings(text: str) -> list[str]:
    patch = lint.parse(text)
    return [*lint.header(patch), *lint.text(patch)]


def test_good() -> None:
    assert findings(GOOD) == []
    patch = lint.parse(GOOD)
    assert patch.files == ["vllm/a.py", "vllm/new.py"]
    assert ("vllm/a.py", 12, "--four") in patch.added
    assert patch.lines == 5


LONG = "x" * 30 + " y" * 30


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[Model][Multimodal] ", "", "the subject is not"),
        ("[Model][Multimodal] ", "model: ", "the subject is not"),
        ("Say what it does", "Say what it does " * 4, "columns, more than 72"),
        ("Say what it does", "Say\n what " + "it does " * 9, "columns, more than 72"),
        ("Purpose:", "Why:", "has no `Purpose:`"),
        ("Test Plan:", "Plan:", "has no `Test Plan:`"),
        ("Test Result:", "Result:", "has no `Test Result:`"),
        ("Test Plan: run this.", "Test Plan:", "`Test Plan:` is empty"),
        ("Test Result: it passed.", "Test Result:\n", "`Test Result:` is empty"),
        ("Test Plan: run this.\n\n", "", "has no `Test Plan:`"),
        (
            "Test Plan: run this.\n\nTest Result: it passed.",
            "Test Result: it passed.\n\nTest Plan: run this.",
            "`Test Result:` is not in the order",
        ),
        ("Upstream-Status: Pending\n", "", "has 0 `Upstream-Status:`"),
        ("Status: Pending", "Status: Maybe", "is none of Pending"),
        ("Status: Pending", "Status: Submitted", "is none of Pending"),
        ("Status: Pending", "Status: Backport", "is none of Pending"),
        ("Pending\n", "Pending\n\nMore words.\n", "not in the message's last"),
        ("Pending\n", "Pending\nSigned-off-by: P <p@x>\n", "has a Signed-off-by"),
        ("two lines.", LONG, "a line of the message has 90 columns"),
        ("+three", "+three ", "vllm/a.py:11: trailing whitespace"),
        ("+three", "+three\r", "vllm/a.py:11: CRLF"),
        ("+three", "+  \tthree", "vllm/a.py:11: space before tab"),
        ("+three", "+three\t3", "vllm/a.py:11: tab"),
        ("+three", "+" + LONG, "vllm/a.py:11: 90 columns"),
        ("+# SPDX-License-Identifier: Apache-2.0", "+y", "vllm/new.py:1: no SPDX"),
    ],
)
def test_rule(old: str, new: str, said: str) -> None:
    assert old in GOOD
    assert any(said in line for line in findings(GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    "status",
    [
        "Pending [to be sent with the tower]",
        "Submitted [vllm-project/vllm#1]",
        "Backport [0.33.0]",
        "Inappropriate [only for this release]",
    ],
)
def test_status(status: str) -> None:
    assert findings(GOOD.replace("Pending", status)) == []


def test_size_counts_neither_tests_nor_docs() -> None:
    moved = GOOD.replace("vllm/new.py", "tests/new.py").replace("vllm/a.py", "docs/a")
    assert lint.parse(moved).lines == 0


def test_numbering() -> None:
    names = [Path("0001-a.patch"), Path("0003-b.patch")]
    assert list(lint.numbering(names)) == ["0003-b.patch: the number should be 0002"]
    assert list(lint.numbering(names[:1])) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it takes 20.1 (18.0 to 1,022.5) ms", "1: 20.1 ms, 1: 18.0 ms, 1: 1022.5 ms"),
        ("\n\n3.4 GiB and 790 TFLOP/s", "3: 3.4 GiB, 3: 790 TFLOP/s"),
        ("2.5x, or 3 times, by +4% to 5%", "1: 2.5 x, 1: 3 times, 1: 4 %, 1: 5 %"),
        ("as 8 x 280, 3 times", "1: 3 times"),
        ("as 8 x 280, 4 images, in vLLM 0.32.0 and 3.11", ""),
        ("of 5 minutes <!-- not measured: a limit -->", ""),
        (
            "| batch | release, ms | gain |\n|---|---|---|\n"
            "| 8 x 280 | 20 (18 to 22) | 2% |\n| 9 | 6% | 5 |\n\n| a |\n|---|\n| 7 |\n",
            "3: 2 %, 3: 20 ms, 3: 18 ms, 3: 22 ms, 4: 6 %",
        ),
        ("| seconds |\n|---|\n| 5 |", "3: 5 seconds"),
        ("| what's Triton's |\n|---|\n| 5 |", ""),
    ],
)
def test_numbers(text: str, found: str) -> None:
    lines = [f"{at}: {number} {unit}" for at, number, unit in lint.numbers(text)]
    assert ", ".join(lines) == found


def test_numbers_that_no_benchmark_gives(tmp_path: Path) -> None:
    assert list(lint.measured(tmp_path)) == []
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "benchmarks.md").write_text("| a, ms |\n|---|\n| 1,234 (1 to 2) |\n")
    (tmp_path / "README.md").write_text("All in 1234 ms.\nIt takes 12 ms.\n")
    (docs / "a.md").write_text("It has 1,234 MiB.\n")
    said = [
        line.partition(" is not in docs/benchmarks.md")[0]
        for line in lint.measured(tmp_path)
    ]
    assert said == ["README.md:2: 12 ms", "docs/a.md:1: 1234 MiB"]
    # As docs/maintaining.md says, neither what a number is of nor words are seen.
    (docs / "a.md").write_text("A kernel that takes 2 ms is twice as fast.\n")
    assert len(list(lint.measured(tmp_path))) == 1
    (docs / "benchmarks.md").unlink()
    assert len(list(lint.measured(tmp_path))) == 3


RESULT: list[dict[str, Any]] = [
    {
        **{"job": "tower 26b", "command": ["a"], "release": "v1", "commit": "c" * 40},
        **{"tree": "t", "time": "2026-01-02T03:04:05Z"},
        **{"machine": {"cores": 2, "cpu": "a CPU", "versions": {}}},
    },
    {
        **{"job": "tower 26b", "kind": "26b", "layers": 1, "dtype": "float32"},
        **{"batch": "1 x 280", "soft_tokens": 280, "tree": "eager", "median": 0.5},
        "mib": 5,
    },
]


def test_report_that_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "benchmarks"
    page = folder.with_suffix(".md")
    assert list(lint.benchmarks(folder)) == []
    folder.mkdir(parents=True)
    page.write_text("old")
    said = ["docs/benchmarks.md: there are no results that it could be of"]
    assert list(lint.benchmarks(folder)) == said
    lines = "".join(json.dumps(line) + "\n" for line in RESULT)
    (folder / "cpu.jsonl").write_text(lines)
    (folder / "old.png").touch()
    plot = "benchmarks/a-cpu-2-cores-tower-26b.png"
    said = [
        "docs/benchmarks.md: not what its results give: run `make report`",
        f"docs/benchmarks.md: there is no {plot}: run `make report`",
        "docs/benchmarks.md: does not show benchmarks/old.png: remove it",
    ]
    assert list(lint.benchmarks(folder)) == said
    page.unlink()
    assert list(lint.benchmarks(folder)) == said
    (folder / "old.png").unlink()
    (folder.parent / plot).touch()
    page.write_text(report.write(results.latest(RESULT, "benchmarks")))
    assert list(lint.benchmarks(folder)) == []
    (folder / "cpu.jsonl").write_text(lines + "{")
    assert "is not JSON" in next(lint.benchmarks(folder))
    (folder / "cpu.jsonl").write_text(lines.splitlines()[1])
    assert "do not say what they were made on" in next(lint.benchmarks(folder))


def test_own_checks_the_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lint, "_call", lambda *_: [])
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "docs" / "benchmarks")
    found = lint.Lint()
    found.own()
    assert found.count == 0
    (tmp_path / "README.md").write_text("5 ms\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").touch()
    found.own()
    assert found.count == 2


def test_own_stage_compares_the_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one does not: a series that is worked on gets no number."""
    ran: list[str] = []
    for name in ("own", "wheels"):
        monkeypatch.setattr(lint.Lint, name, lambda _, name=name: ran.append(name))
    monkeypatch.setattr(lint.Lint, "series", lambda *_: ran.append("series"))
    for stage in ("own", "patches", ""):
        monkeypatch.setenv("STAGE", stage)
        lint.main()
    assert ran == ["own", "wheels", "series", "own", "wheels", "series"]


HOOK = """
import sys
for name in sys.argv[1:]:
    if "bad" in open(name).read():
        print(f"{name}:1: bad word")
        sys.exit(1)
"""
CONFIG = """
exclude: '^skipped/'
repos:
- repo: local
  hooks:
  - {id: bad, name: bad, language: python, entry: python tools/bad.py, types: [python]}
"""


@pytest.fixture
def upstream(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A toy whose release has hooks of its own."""
    import hashlib

    import conftest

    path = toy.root / "build" / "cache" / "vllm-1.0.0.tar.gz"
    pins = toy.root / "pins.toml"
    was = hashlib.sha256(path.read_bytes()).hexdigest()
    more = {".pre-commit-config.yaml": CONFIG, "tools/bad.py": HOOK}
    pins.write_text(pins.read_text().replace(was, conftest.sdist(path, TREE | more)))
    toy.run("apply")
    toy.change("vllm/a.py", "a10 = 10\n", 'a10 = "ten"\n', "Name ten")
    toy.run("export")
    return toy


def test_series(upstream: Toy) -> None:
    done = upstream.run("lint", STAGE="patches")
    assert done.stdout == "" and "lint: clean" in done.stderr


def said(toy: Toy) -> str:
    done = toy.run("lint", ok=None, STAGE="patches")
    assert done.returncode == 1
    return done.stdout


def test_series_by_upstreams_checks(upstream: Toy) -> None:
    upstream.change("vllm/b.py", "b1 = 1\n", "import os\nb1 = 'bad'\n", "Bad")
    upstream.run("export")
    lines = said(upstream).splitlines()
    assert any(
        line.startswith("0002-Model-Bad.patch: vllm/b.py") and "F401" in line
        for line in lines
    )
    assert "0002-Model-Bad.patch: vllm/b.py:1: bad word" in lines
    assert any("Would reformat: vllm/b.py" in line for line in lines)


def test_release_that_is_unknown(toy: Toy) -> None:
    done = toy.run("lint", ok=False, RELEASE="v9.9.9")
    assert "ruff" not in done.stderr and "v9.9.9" in done.stderr


def test_one_finding(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.write_text(path.read_text() + "-- \n2.39\n")
    done = upstream.run("lint", ok=None, STAGE="patches")
    assert done.stderr.endswith("lint: 1 finding\n")


def test_series_by_typos(upstream: Toy) -> None:
    upstream.change("vllm/b.py", "b1 = 1\n", "b1 = 1  # teh\n", "Words")
    upstream.run("export")
    assert "`teh`" in said(upstream)


def test_nothing_for_typos(tmp_path: Path, toy: Toy) -> None:
    """A patch that only removes files is not asked about all others."""
    tree = tmp_path / "tree"
    more = {".pre-commit-config.yaml": CONFIG, "vllm/b.py": "b1 = 1  # teh\n"}
    toy.repository(tree, more, "release")
    assert list(lint.upstream(tree, [])) == []
    assert "`teh`" in next(lint.upstream(tree, ["vllm/b.py"]))


def test_series_edited_by_hand(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.write_text(path.read_text() + "-- \n2.39\n")
    assert "not as `make export` writes it: run `make apply export`" in said(upstream)


def test_series_misnamed(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.rename(path.with_name("0001-other.patch"))
    assert "the name should be 0001-Model-Name-ten.patch" in said(upstream)


def test_upstream_status_in_the_documents(upstream: Toy) -> None:
    page = upstream.root / "README.md"
    head = "| | what it does | upstream |\n|---|---|---|\n"
    page.write_text(head + "| 0001 | names ten | not submitted |\n")
    assert upstream.run("lint", STAGE="patches").stdout == ""
    path = next(upstream.patches.glob("*.patch"))
    sent = path.read_text().replace("Status: Pending", "Status: Submitted [#1]")
    path.write_text(sent)
    assert said(upstream) == (
        "README.md: 0001 is `not submitted`, the patch says `Submitted [#1]`\n"
    )
    page.write_text(head + "| 0001 | names ten | Submitted [#1] |\n")
    assert upstream.run("lint", STAGE="patches").stdout == ""


def test_series_in_a_partial_clone(upstream: Toy, tmp_path: Path) -> None:
    source, partial = tmp_path / "source", tmp_path / "partial"
    more = {".pre-commit-config.yaml": CONFIG, "tools/bad.py": HOOK}
    upstream.repository(source, TREE | more, "release")
    pins = upstream.root / "pins.toml"
    pins.write_text(pins.read_text().replace("0000000", upstream.head(source)[:9]))
    for name in (*TREE, "tools/bad.py"):
        upstream.change(name, "", "\n", "later", at=source)
    upstream.partial(source, partial)
    upstream.run("lint", STAGE="patches", VLLM=str(partial))
    # And where the folder of the first time is still there.
    upstream.change("vllm/b.py", "b1 = 1\n", "b1 = 'bad'\n", "Bad")
    upstream.run("export")
    done = upstream.run("lint", ok=None, STAGE="patches", VLLM=str(partial))
    assert "0002-Model-Bad.patch: vllm/b.py:1: bad word" in done.stdout


def test_series_that_does_not_apply(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.write_text(path.read_text().replace("-a10 = 10", "-a10 = 11"))
    assert "does not apply to vllm/a.py, hunk 1 of 1" in said(upstream)


@pytest.mark.parametrize(
    ("pattern", "new", "line"),
    [
        (b"Name ten", b"N\xe4me ten", "is not UTF-8: save it as such, or get it"),
        (b"see what", b"s\xe9e what", "is not UTF-8: save it as such, or get it"),
        (b"(?m)^From: .*$", b"From: <>", "makes no commit (empty ident name (for <>)"),
        (
            b"(?m)^Date: .*$",
            b"Date: yesterday-ish",
            "makes no commit (invalid date format: yesterday-ish): mend its From: or",
        ),
    ],
)
def test_head_that_git_does_not_take(
    upstream: Toy, pattern: bytes, new: bytes, line: str
) -> None:
    path = next(upstream.patches.glob("*.patch"))
    changed, count = re.subn(pattern, new, path.read_bytes(), count=1)
    path.write_bytes(changed)
    assert count
    wanted = f"{path.relative_to(upstream.root)} {line}"
    assert wanted in said(upstream)
    assert wanted in upstream.fails("apply")
    assert "was edited since" in upstream.fails("export")


def test_two_with_one_number(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.with_name("0001-twice.patch").write_bytes(path.read_bytes())
    assert "have one number" in said(upstream)


def test_crlf(upstream: Toy) -> None:
    path = next(upstream.patches.glob("*.patch"))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert "CRLF line ends" in said(upstream)


def test_big_patch_is_a_warning(upstream: Toy) -> None:
    rows = "# SPDX-License-Identifier: Apache-2.0\n" + "x = 1\n" * 260
    upstream.change("vllm/new.py", "", rows, "Big")
    upstream.run("export")
    done = upstream.run("lint", STAGE="patches")
    assert "261 lines outside of tests and docs" in done.stderr


def test_what_is_not_in_patches_is_a_warning(upstream: Toy) -> None:
    assert "warning" not in upstream.run("lint", STAGE="patches").stderr
    upstream.change("vllm/b.py", "b1 = 1\n", "b1 = 'bad'\n", "Not written")
    done = upstream.run("lint", STAGE="patches")
    assert "gemma4/v1.0.0 in build/vllm has commits that are not checked" in done.stderr
    assert "`make export` first" in done.stderr
    # Nor is there anything to check.
    for path in upstream.patches.iterdir():
        path.unlink()
    done = upstream.run("lint", STAGE="patches")
    assert "has commits that are not checked" in done.stderr
    assert "no patches for v1.0.0" in done.stderr
