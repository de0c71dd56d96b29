# SPDX-License-Identifier: Apache-2.0
"""Files from the package index that pip is set up to use, by hash."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple
from pypi_simple.errors import NoSuchProjectError, UnsupportedContentTypeError
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from scripts.console import BUILD, Failure, err, say, show
from scripts.pins import File

CACHE = BUILD / "cache"
CHUNK = 1 << 14


def pip_setting(name: str) -> str:
    """Return what pip is told by its variables and files, empty if nothing.

    Args:
        name: an option such as "index-url".
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, str] = dict(
        re.findall(rf"(?m)^(\S+)\.{re.escape(name)}='(.*)'$", listed)
    )
    for scope in (":env:", "download", "install", "global"):
        if scope in found:
            return found[scope]
    return ""


def need_space(folder: Path, size: int) -> None:
    """Refuse to start on a disk that is too small.

    Args:
        folder: where `size` bytes will be written.
        size: how many.

    Raises:
        Failure: they do not fit.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise Failure(
            f"no space in {show(folder)}: {size >> 20} MiB needed, {free >> 20} free",
            "free some and run this again",
        )


def sha256(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(file: File) -> Path:
    """Return a file from the cache, downloaded if it is not there.

    What arrives is kept under another name until its hash is right, and a
    download that was cut off goes on where it stopped.

    Args:
        file: what to get.

    Returns:
        Its path in the cache.

    Raises:
        Failure: no network, no space, cut off, or another hash than pinned.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / file.name
    if path.exists():
        if sha256(path) == file.sha256:
            return path
        say(f"{show(path)} has not the pinned hash: it is fetched again")
        path.unlink()
    by_hand = f"or put {file.name} in {show(CACHE)}/ yourself"
    index = pip_setting("index-url") or PYPI_SIMPLE_ENDPOINT
    host = urlsplit(index).hostname or index
    session = requests.Session()
    if pip_setting("cert"):
        session.verify = pip_setting("cert")
    if pip_setting("proxy"):
        session.proxies = {s: pip_setting("proxy") for s in ("http", "https")}
    part = path.with_name(path.name + ".part")
    try:
        link = _link(file, index, host, session)
        resumed = _download(file, link, part, session)
        if sha256(part) != file.sha256 and resumed:
            # The start was from another download: once more from nothing.
            part.unlink()
            _download(file, link, part, session)
    except (
        requests.RequestException,
        ConnectionError,
        UnsupportedContentTypeError,
    ) as error:
        raise Failure(
            f"{file.name} could not be fetched from {host} ({_short(error)})",
            f"check the network or pip's index-url and run this again, {by_hand}",
        ) from None
    if (got := sha256(part)) != file.sha256:
        part.unlink()
        raise Failure(
            f"{file.name} from {host} has sha256 {got[:12]}..., "
            f"not the pinned {file.sha256[:12]}...; it was thrown away",
            f"run this again or use another index, {by_hand}",
        )
    part.replace(path)
    return path


def _short(error: Exception) -> str:
    text = str(error)
    for cause in ("refused", "timed out", "resolve", "unreachable", "broken"):
        if cause in text.lower():
            return f"{type(error).__name__}: {cause}"
    return f"{type(error).__name__}: {text[:120]}"


def _link(file: File, index: str, host: str, session: requests.Session) -> str:
    with PyPISimple(endpoint=index, session=session) as client:
        try:
            page = client.get_project_page(file.project, timeout=60)
        except NoSuchProjectError:
            page = None
    for package in page.packages if page else ():
        if package.filename == file.name:
            return package.url
    raise Failure(
        f"the index at {host} has no {file.name}",
        f"set pip's index-url to one that has it, or put it in {show(CACHE)}/",
    )


def _download(file: File, url: str, part: Path, session: requests.Session) -> bool:
    """Write `part`; return whether it went on from an earlier try."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, stream=True, headers=headers, timeout=60) as answer:
        if answer.status_code == 416:
            return True
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        length = int(answer.headers.get("Content-Length") or 0)
        need_space(part.parent, length or max(file.size - have, 0))
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        if not err.is_terminal:
            say(f"fetching {file.name} ({(have + length) / 1e6:.1f} MB)")
        with bar, part.open("ab" if have else "wb") as out:
            task = bar.add_task(file.name, total=have + length or None, completed=have)
            # requests raises where less comes than was announced.
            for chunk in answer.iter_content(CHUNK):
                out.write(chunk)
                bar.advance(task, len(chunk))
    return headers.get("Range") is not None and have > 0
