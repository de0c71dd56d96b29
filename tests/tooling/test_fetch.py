# SPDX-License-Identifier: Apache-2.0
"""Getting the sdist, and each way in which that can go wrong."""

from pathlib import Path

import pytest
from conftest import Index, Toy

NAME = "vllm-1.0.0.tar.gz"


def cached(toy: Toy) -> Path:
    return toy.root / "build" / "cache" / NAME


def test_fetched_from_the_index_of_pip(toy: Toy, index: Index) -> None:
    done = toy.run("apply")
    assert f"fetching {NAME}" in done.stderr
    assert cached(toy).read_bytes() == index.body
    toy.reset()
    index.asked.clear()
    toy.run("apply")
    assert index.asked == []


def test_index_of_a_pip_config_file(toy: Toy, index: Index) -> None:
    config = toy.home / ".config" / "pip" / "pip.conf"
    config.parent.mkdir(parents=True)
    config.write_text(f"[global]\nindex-url = {toy.env.pop('PIP_INDEX_URL')}\n")
    toy.run("apply", XDG_CONFIG_HOME=str(toy.home / ".config"))


def test_cut_off_and_resumed(toy: Toy, index: Index) -> None:
    index.mode = "cut"
    line = toy.fails("apply")
    assert f"{NAME} could not be fetched from 127.0.0.1" in line
    assert "run this again" in line
    assert not cached(toy).exists() and not toy.own.exists()
    part = cached(toy).with_name(NAME + ".part")
    have = part.stat().st_size
    assert 0 < have <= len(index.body) // 2
    index.mode = "good"
    index.asked.clear()
    toy.run("apply")
    assert f"bytes={have}-" in index.asked
    assert not part.exists()


def test_resumed_on_something_else(toy: Toy, index: Index) -> None:
    cached(toy).with_name(NAME + ".part").write_bytes(b"junk" * 9)
    toy.run("apply")
    assert cached(toy).read_bytes() == index.body


@pytest.mark.parametrize("size", [0, 1_000_000])
def test_resumed_when_all_is_there(toy: Toy, index: Index, size: int) -> None:
    cached(toy).with_name(NAME + ".part").write_bytes(index.body + b"x" * size)
    toy.run("apply")
    assert cached(toy).read_bytes() == index.body


def test_wrong_hash(toy: Toy, index: Index) -> None:
    index.mode = "wrong"
    line = toy.fails("apply")
    assert "not the pinned" in line and "thrown away" in line
    assert list(cached(toy).parent.iterdir()) == []
    index.mode = "good"
    toy.run("apply")


def test_wrong_hash_in_the_cache(toy: Toy, index: Index) -> None:
    cached(toy).write_bytes(b"junk")
    done = toy.run("apply")
    assert "has not the pinned hash" in done.stderr
    assert cached(toy).read_bytes() == index.body


def test_index_without_it(toy: Toy, index: Index) -> None:
    index.mode = "absent"
    assert f"has no {NAME}" in toy.fails("apply")


def test_index_that_answers_in_another_form(toy: Toy, index: Index) -> None:
    index.mode = "plain"
    line = toy.fails("apply")
    assert f"{NAME} could not be fetched from 127.0.0.1" in line
    assert "UnsupportedContentTypeError" in line and "pip's index-url" in line


def test_no_network(toy: Toy, index: Index) -> None:
    toy.env["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"
    line = toy.fails("apply")
    assert "check the network" in line and f"put {NAME} in build/cache/" in line


def test_secrets_of_the_index_are_not_printed(toy: Toy, index: Index) -> None:
    toy.env["PIP_INDEX_URL"] = "http://me:secret@127.0.0.1:9/simple"
    done = toy.run("apply", ok=False)
    assert "secret" not in done.stderr


def first(toy: Toy, code: str) -> None:
    """Let every command run this first."""
    with (toy.root / "scripts" / "__init__.py").open("a") as stream:
        stream.write(code)


def no_space(toy: Toy, after: str) -> None:
    """Let the disk look full."""
    first(
        toy,
        "import shutil, collections\n"
        "shutil.disk_usage = lambda path: collections.namedtuple("
        f"'u', 'total used free')(0, 0, {after})\n",
    )


@pytest.mark.parametrize("where", ["build", "build/cache"])
def test_no_space(toy: Toy, index: Index, where: str) -> None:
    no_space(toy, f"10 if str(path).endswith('{where}') else 1 << 40")
    line = toy.fails("apply")
    assert f"no space in {where}:" in line and "free some and run this again" in line
    assert not toy.own.exists()


def test_disk_full_while_writing(toy: Toy, index: Index) -> None:
    first(
        toy,
        "import errno, pathlib\n"
        "def full(self, *a, _open=pathlib.Path.open, **k):\n"
        "    if self.name.endswith('.part'):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', str(self))\n"
        "    return _open(self, *a, **k)\n"
        "pathlib.Path.open = full\n",
    )
    assert "no space left for" in toy.fails("apply")
