# SPDX-License-Identifier: Apache-2.0
"""Messages, the one lock and the way every command ends."""

import errno
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from scripts import INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"

# stdout is kept for answers (`make python`), all else goes to stderr.
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


class Failure(Exception):
    """What went wrong and what to do next; printed as one line.

    Args:
        what: the cause.
        then: the next step for the person.
    """

    def __init__(self, what: str, then: str) -> None:
        super().__init__(" ".join(f"{what}: {then}".split("\n")))


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    err.print(text)


def show(path: Path) -> str:
    """Return a path as a person would type it from the project's folder."""
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return str(path)


@contextmanager
def lock(folder: Path = BUILD) -> Iterator[None]:
    """Hold the project's build folder, and clear what a killed run left there.

    Args:
        folder: another one, which a long command holds instead.

    Raises:
        Failure: another command holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    guard = FileLock(folder / ".lock", timeout=0)
    try:
        guard.acquire()
    except Timeout:
        raise Failure(
            f"another make command is at work in {show(folder)}/",
            "wait for it to end and run this again",
        ) from None
    try:
        for stale in folder.glob(".tmp-*"):
            remove(stale)
        yield
    finally:
        guard.release()


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder under `build/` that is gone afterwards.

    The lock must be held, so that what a killed run left is cleared.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=BUILD) as made:
        yield Path(made)


def free(folder: Path, name: str) -> Path:
    """Return a path in a folder that is not there yet, for what is to be kept.

    Args:
        folder: which.
        name: what it is called, with `{}` for a number.
    """
    paths = (folder / name.format(number) for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def logged(command: list[str], log: Path, doing: str) -> None:
    """Run a command with its output in a file, shown only where it fails.

    Args:
        command: what to run.
        log: the file, appended to.
        doing: the command in a person's words.

    Raises:
        Failure: the command's exit status is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        start = out.tell()
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        with log.open("rb") as out:
            out.seek(start)
            tail = out.read().decode(errors="replace").splitlines()[-15:]
        for line in tail:
            err.print("  " + line)
        raise Failure(
            f"{doing} failed with exit status {done.returncode}",
            f"the last lines are above, all of them in {show(log)}",
        )


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    if signum == signal.SIGHUP:
        # A shell sends it again, while what was started is ended.
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _dangling(name: str) -> Path | None:
    path = Path(name).absolute()
    parts = (path, *path.parents)
    return next(
        (part for part in parts if part.is_symlink() and not part.exists()), None
    )


def run(main: Callable[..., None]) -> None:
    """Run a command line and turn what a person can mend into one line.

    Args:
        main: the command; its parameters become options.
    """
    from scripts.git import GitError  # which needs this module itself

    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        # A lost connection is an interrupt.
        signal.signal(signal.SIGHUP, _interrupt)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        # typer makes an exit status of an interrupt.
        if app(standalone_mode=False) == 130:
            raise KeyboardInterrupt
    except Failure as failure:
        _end(f"error: {failure}", 1)
    except GitError as error:
        _end(f"error: {error.failure()}", 1)
    except KeyboardInterrupt:
        _end(INTERRUPTED, 130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            what = error.filename or "files"
            line = f"no space left for {what}: free some and run this again"
            _end(f"error: {line}", 1)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            name = error.filename2 or error.filename
            _end(f"error: {name} cannot be read or written: check its owner", 1)
        if isinstance(error.filename, str) and (link := _dangling(error.filename)):
            _end(
                f"error: {show(link)} is a link to {link.readlink()}, which is not "
                "there: make that folder, or remove the link",
                1,
            )
        raise
    except Exception as error:
        if hasattr(error, "format_message"):
            _end(f"error: {error.format_message()}: see `make`", 2)
        raise


def _end(line: str, status: int) -> NoReturn:
    err.print(line)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)


def option(name: str) -> str:
    """Return a variable of the Makefile's command line, empty if not given."""
    return os.environ.get(name, "").strip()


def make(words: str) -> str:
    """Return a command for a person to type, for the same clone and release.

    Args:
        words: what comes after make.
    """
    for name in ("RELEASE", "VLLM"):
        if (value := option(name)) and f"{name}=" not in words:
            words += f" {name}={shlex.quote(value)}"
    return f"make {words}"


def enabled(name: str) -> bool:
    """Return whether a variable of the Makefile's command line is set to yes.

    Raises:
        Failure: it is set to neither yes nor no.
    """
    said = option(name).lower()
    if said not in ("", "0", "no", "false", "1", "yes", "true"):
        raise Failure(
            f"{name}={option(name)} is neither yes nor no",
            f"give {name}=1, or leave it out",
        )
    return said in ("1", "yes", "true")


def cores() -> int:
    """Return how many cores this process may use."""
    # macOS cannot say.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def some(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def write(path: Path, text: str) -> None:
    """Put a text in the place of a file: a run that is killed leaves the old one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
