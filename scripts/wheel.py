# SPDX-License-Identifier: Apache-2.0
"""`make wheel`: the official wheel with the series in it.

What the series does not change keeps its compressed bytes, and what it changes is
stored: nothing is compressed, so no zlib has a say in the result. (`wheel pack` would
unpack a gigabyte and compress it anew.)
"""

import base64
import csv
import hashlib
import io
import platform
import re
import shutil
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import tomlkit
from packaging.utils import parse_wheel_filename

from scripts import console, fetch, pins, series
from scripts.apply import open_clone
from scripts.build import device
from scripts.console import BUILD, ROOT, Failure, say, show
from scripts.git import Scratch
from scripts.lint import UNSHIPPED, load
from scripts.pins import File, Release

OUT = BUILD / "wheels"
VERSION_FILE = "vllm/_version.py"


@dataclass(frozen=True)
class Change:
    """A file that the series changes; None is what does not exist."""

    name: str
    old: bytes | None
    new: bytes | None


def payload(release: Release) -> list[Change]:
    """Return what the series changes in an installed vLLM.

    Args:
        release: whose series.

    Raises:
        Failure: the series does not apply, or changes more than `vllm/` and what a
            wheel has not.
    """
    clone, base = open_clone(release)
    files = series.patches(release.patches)
    if not files:
        raise Failure(f"{show(release.patches)} has no patches", "see `make export`")
    with console.scratch() as folder:
        for name in ("derive", "read"):
            (folder / name).mkdir()
        tip = series.derive(clone, base, files, folder / "derive")[-1]
        git = Scratch(clone, folder / "read")
        listed = git("diff-tree", "-r", "-z", "--no-renames", "--no-abbrev", base, tip)
        fields = listed.decode().split("\0")[:-1]
        changes = []
        for row, name in zip(fields[::2], fields[1::2], strict=True):
            if not name.startswith("vllm/"):
                if UNSHIPPED.match(name):
                    continue
                raise Failure(
                    f"the series changes {name}, which only a build can put in a wheel",
                    "build vLLM from the checkout instead",
                )
            both = [
                None if blob == "0" * 40 else git("cat-file", "blob", blob)
                for blob in row.split()[2:4]
            ]
            changes.append(Change(name, *both))
    return changes


def digest(changes: list[Change], titles: Sequence[str] = ()) -> str:
    """Return what tells one series from another.

    Args:
        changes: what it does.
        titles: its patches, for a wheel: PATCHES lists them.
    """
    said = sorted((change.name, hash_of(change.new)) for change in changes)
    return hashlib.sha256(repr([*said, *titles]).encode()).hexdigest()


def row_hash(data: bytes) -> str:
    """Return a file's hash as RECORD has it."""
    found = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + found.decode().rstrip("=")


def hash_of(data: bytes | None) -> str | None:
    """Return `row_hash`, None of None."""
    return None if data is None else row_hash(data)


def read_record(data: bytes) -> list[list[str]]:
    """Return RECORD's rows: path, hash, size."""
    return [row for row in csv.reader(io.StringIO(data.decode())) if row]


def write_record(rows: list[list[str]]) -> bytes:
    """Return RECORD of rows."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def fitting(
    changes: list[Change], rows: list[list[str]], release: Release, kind: str, what: str
) -> list[Change]:
    """Return those of the changes that a wheel gets.

    Args:
        changes: the series.
        rows: the wheel's RECORD.
        release: the release.
        kind: "cpu" or "cuda".
        what: the wheel's name for a person.

    Raises:
        Failure: a file is neither the release's nor one whose own form is kept.
    """
    hashes = {row[0]: row[1] for row in rows}
    own = release.runtimes[kind].modules if kind in release.runtimes else ()
    made = []
    for change in changes:
        name = change.name
        if name.removesuffix(".py").replace("/", ".") in own:
            say(f"{name} keeps the form of {what}: its kernels were built for it")
            continue
        has = hashes.get(name)
        if has is None and change.old is not None and not name.endswith(".py"):
            continue
        if has != hash_of(change.old):
            raise Failure(
                f"{name} in {what} is not {release.tag}'s",
                f"name it in {kind}.modules of pins.toml if it must stay as it is",
            )
        made.append(change)
    return made


def number(release: Release, content: str, bump: bool) -> int:
    """Return the N of `+gemma4.N`: one number is one content, for good.

    Args:
        release: the release.
        content: the digest of all that its wheel has of its series.
        bump: whether a series without a number gets the next one, in pins.toml.

    Raises:
        Failure: the number in pins.toml is another series'.
    """
    if release.series == content:
        return release.number
    if not bump:
        raise Failure(
            f"+gemma4.{release.number} is another series than {show(release.patches)} "
            "now"
            if release.number
            else f"the series of {release.tag} has no number yet",
            f"`{pins.command('wheel BUMP=1', release.tag)}` writes the next number to "
            "pins.toml",
        )
    path = ROOT / "pins.toml"
    text = tomlkit.parse(path.read_text(encoding="utf-8"))
    table = tomlkit.table()
    table.add("number", release.number + 1)
    table.add("series", content)
    own = text["releases"][release.tag]
    if "wheel" in own:
        own["wheel"].update(table)
    else:
        own.add("wheel", table)
    console.write(path, tomlkit.dumps(text))
    say(f"pins.toml: {release.tag} is at +gemma4.{release.number + 1} now")
    return release.number + 1


class Made:
    """A wheel on its way to another version.

    Args:
        official: the official wheel.
        name: its file name.
        version: the version to make.
    """

    def __init__(self, official: ZipFile, name: str, version: str) -> None:
        self.official = official
        stem, was, *self.rest = name.split("-")
        self.name = "-".join([stem, version, *self.rest])
        self.was, self.version = was, version
        self.old_info = f"{stem}-{was}.dist-info/"
        self.info = f"{stem}-{version}.dist-info/"
        self.data = f"{stem}-{version}.data/"
        self.old_data = f"{stem}-{was}.data/"
        self.tags = sorted(map(str, parse_wheel_filename(name)[3]))
        self.rows = read_record(self.read("RECORD"))

    def renamed(self, name: str) -> str:
        """Return where a file of the official wheel is in this one."""
        for old, new in ((self.old_info, self.info), (self.old_data, self.data)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def read(self, name: str) -> bytes:
        """Return a file of the official metadata."""
        return self.official.read(self.old_info + name)

    def texts(self, changes: list[Change], titles: list[str]) -> dict[str, bytes]:
        """Return all files that are not the official wheel's.

        Args:
            changes: what the series does.
            titles: the patches.
        """
        made = {c.name: c.new for c in changes if c.new is not None}
        made[VERSION_FILE] = self._version()
        metadata = self.read("METADATA")
        if f"\nVersion: {self.was}\n".encode() not in metadata.split(b"\n\n")[0]:
            raise Failure(
                f"METADATA of {self.official.filename} has no `Version: {self.was}`",
                "see which it has, and teach scripts/wheel.py its form",
            )
        metadata = _field(metadata, "Version", self.version)
        made[self.info + "METADATA"] = metadata
        # pip check asks whether these tags suit the machine.
        wheel = re.sub(rb"(?m)^Tag: .*\n", b"", self.read("WHEEL")).rstrip(b"\n")
        tags = "".join(f"\nTag: {tag}" for tag in self.tags)
        made[self.info + "WHEEL"] = wheel + tags.encode() + b"\n"
        files = "".join(
            f"{'added' if c.old is None else 'removed' if c.new is None else 'changed'}"
            f" {c.name}\n"
            for c in changes
        )
        made[self.info + "PATCHES"] = (
            f"vLLM {self.was} with these patches:\n\n"
            + "".join(f"{title}\n" for title in titles)
            + "\nThey changed these files:\n\n"
            + files
        ).encode()
        if not re.search(rb"(?m)^Name: vllm$", metadata.split(b"\n\n")[0]):
            # vLLM asks for its version by the name "vllm", which a CPU wheel of
            # another name has not: its `vllm` command would end with a traceback.
            # And it takes itself for a CPU build by the version.
            called = f"{self.data}purelib/vllm-{self.version}.cpu.dist-info/"
            head = _field(metadata.split(b"\n\n")[0] + b"\n", "Name", "vllm")
            made[called + "METADATA"] = _field(head, "Version", f"{self.version}.cpu")
            stem = self.info.split("-")[0].replace("_", "-")
            made[called + "INSTALLER"] = f"{stem}\n".encode()
        return made

    def _version(self) -> bytes:
        text = self.official.read(VERSION_FILE).decode()
        local = self.version.partition("+")[2]
        numbers = ", ".join(self.was.split("."))
        for old, new in (
            (f"version = '{self.was}'\n", f"version = '{self.version}'\n"),
            (f"= ({numbers})\n", f"= ({numbers}, '{local}')\n"),
        ):
            if text.count(old) != 1:
                raise Failure(
                    f"{VERSION_FILE} of {self.name} has not {old.strip()!r} once",
                    "teach scripts/wheel.py its form",
                )
            text = text.replace(old, new)
        return text.encode()

    def write(self, path: Path, texts: dict[str, bytes], gone: set[str]) -> None:
        """Write the wheel.

        Args:
            path: where.
            texts: the files that are not the official wheel's.
            gone: the files that it has and this has not.
        """
        entries = {e.filename: e for e in self.official.infolist() if not e.is_dir()}
        record = entries.pop(self.old_info + "RECORD")
        was = {self.renamed(name): entry for name, entry in entries.items()}
        names = [name for name in was if name not in gone]
        names += sorted(texts.keys() - set(names))
        # Archives end with their metadata, and that with RECORD.
        names.sort(key=lambda name: name.startswith(self.info))
        official = {self.renamed(row[0]): row for row in self.rows}
        rows = []
        with ZipFile(path, "w") as out:
            for name in names:
                if name in texts:
                    data = texts[name]
                    _store(out, name, data, was.get(name), record)
                    rows.append([name, row_hash(data), str(len(data))])
                else:
                    _copy(self.official, was[name], out, name)
                    rows.append([name, *official[name][1:]])
            name = self.info + "RECORD"
            rows.append([name, "", ""])
            _store(out, name, write_record(rows), record, record)


def _field(metadata: bytes, name: str, value: str) -> bytes:
    """Return metadata with another value of a field of its head."""
    line = f"{name}: {value}".encode()
    return re.sub(rb"(?m)^%s: .*$" % name.encode(), line, metadata, count=1)


def _store(
    out: ZipFile, name: str, data: bytes, like: ZipInfo | None, record: ZipInfo
) -> None:
    entry = ZipInfo(name, record.date_time)
    entry.create_system = 3
    entry.external_attr = like.external_attr if like else (stat.S_IFREG | 0o644) << 16
    out.writestr(entry, data)


def _copy(source: ZipFile, entry: ZipInfo, out: ZipFile, name: str) -> None:
    """Copy a file of one archive to another as it is compressed."""
    there, here = source.fp, out.fp
    assert there and here
    there.seek(entry.header_offset)
    lengths: tuple[int, int] = struct.unpack("<26x2H", there.read(30))
    there.seek(sum(lengths), io.SEEK_CUR)
    made = ZipInfo(name, entry.date_time)
    for field in (
        *("compress_type", "create_system", "external_attr"),
        *("CRC", "compress_size", "file_size"),
    ):
        setattr(made, field, getattr(entry, field))
    made.header_offset = here.tell()
    here.write(made.FileHeader())
    rest = entry.compress_size
    while rest:
        chunk = there.read(min(rest, 1 << 20))
        if not chunk:
            raise Failure(f"{source.filename} ends in {name}", "fetch it again")
        here.write(chunk)
        rest -= len(chunk)
    out.filelist.append(made)
    out.NameToInfo[name] = made
    out.start_dir = here.tell()


def titles(release: Release) -> list[str]:
    """Return each patch of a release as its number and title."""
    return [
        f"{path.name[:4]} {load(path).title}"
        for path in series.patches(release.patches)
    ]


def official(release: Release, kind: str, machine: str) -> File:
    """Return the official wheel for a kind of machine.

    Raises:
        Failure: pins.toml has none.
    """
    runtime = release.runtimes.get(kind)
    wheels = runtime.wheels if runtime else {}
    if runtime and runtime.version != release.version:
        raise Failure(
            f"there is no {kind} wheel of {release.tag}, only {runtime.version}'s",
            f"give another DEVICE=, or make one of v{runtime.version} with RELEASE=",
        )
    if machine not in wheels:
        raise Failure(
            f"pins.toml has no {kind} wheel of {release.tag} for {machine}",
            "give DEVICE=cpu or cuda and MACHINE=x86_64 or aarch64",
        )
    return wheels[machine]


def wheel(release: Release, kind: str, machine: str, bump: bool = False) -> Path:
    """Make the wheel of a patched release.

    Args:
        release: which.
        kind: "cpu" or "cuda".
        machine: such as "x86_64".
        bump: whether a changed series gets the next number.

    Returns:
        The wheel.

    Raises:
        Failure: it cannot be made; none is half there.
    """
    pin = official(release, kind, machine)
    changes = payload(release)
    listed = titles(release)
    own = number(release, digest(changes, listed), bump)
    version = f"{release.version}+gemma4.{own}"
    source = fetch.fetch(pin)
    OUT.mkdir(exist_ok=True)
    fetch.need_space(OUT, source.stat().st_size + (16 << 20))
    say(f"writing {release.version} for {kind} {machine} as {version}")
    with console.scratch() as folder, ZipFile(source) as archive:
        made = Made(archive, pin.name, version)
        fits = fitting(changes, made.rows, release, kind, pin.name)
        gone = {change.name for change in fits if change.new is None}
        part = folder / made.name
        made.write(part, made.texts(fits, listed), gone)
        return Path(shutil.move(part, OUT / made.name))


def main() -> None:
    """Make a wheel and print its path."""
    release = pins.load(console.option("RELEASE"))
    machine = console.option("MACHINE") or platform.machine()
    bump = console.enabled("BUMP")
    with console.lock():
        made = wheel(release, device(), machine, bump)
    print(made)


if __name__ == "__main__":
    console.run(main)
