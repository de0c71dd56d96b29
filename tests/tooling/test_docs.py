# SPDX-License-Identifier: Apache-2.0
"""What the documents say of the code."""

import re

import pytest
from conftest import ROOT

READING = ROOT / "docs" / "reading.md"
PICTURE = re.compile(r"(?s)## How a request flows.*?```text\n(.*?)```")


def picture() -> str:
    found = PICTURE.search(READING.read_text())
    assert found
    return found[1]


def lines(number: str) -> str:
    """Return what a patch adds, and what is around it."""
    (path,) = (ROOT / "patches" / "v0.32.0").glob(f"{number}-*.patch")
    diff = path.read_text().partition("\ndiff --git ")[2]
    return "\n".join(line for line in diff.split("\n") if line[:1] in "+ @")


@pytest.mark.parametrize("name", re.findall(r"`(\w+)`", picture()))
def test_name_in_the_picture(name: str) -> None:
    """Each is in the code of a patch, or around it."""
    numbers = sorted(path.name[:4] for path in (ROOT / "patches/v0.32.0").glob("*.p*"))
    assert any(re.search(rf"\b{name}\b", lines(number)) for number in numbers)


@pytest.mark.parametrize(
    ("name", "number"), re.findall(r"`(\w+)` +(\d{4})\b", picture())
)
def test_patch_of_a_name(name: str, number: str) -> None:
    """And in that of the patch that stands beside it."""
    assert re.search(rf"\b{name}\b", lines(number))


def test_every_patch_is_in_the_picture() -> None:
    numbers = {path.name[:4] for path in (ROOT / "patches/v0.32.0").glob("*.patch")}
    assert set(re.findall(r"\b\d{4}\b", picture())) == numbers
