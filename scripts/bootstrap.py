# SPDX-License-Identifier: Apache-2.0
"""Make build/tools, the environment of everything else here.

`bootstrap.py report` makes build/report, which has what draws plots besides. The
standard library alone, for nothing else is there yet.
"""

import sys

try:
    # This takes most of its time, where there is nothing to make.
    import errno
    import fcntl
    import hashlib
    import json
    import shutil
    import signal
    import subprocess
    from pathlib import Path
except KeyboardInterrupt:
    print("interrupted: run the same command again", file=sys.stderr)
    sys.exit(130)

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"


def main(name: str = "tools") -> int:
    """Make the environment if it is not there or pyproject.toml changed.

    Args:
        name: its folder, and the group of pyproject.toml that it has beside "tools".

    Returns:
        The exit status.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        have = ".".join(map(str, sys.version_info[:3]))
        print(
            f"error: {sys.executable} is Python {have}, 3.11 or newer is needed: "
            "give make PYTHON3=path",
            file=sys.stderr,
        )
        return 1
    import tomllib

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    packages = [*groups["tools"], *(groups[name] if name != "tools" else ())]
    folder, log = BUILD / name, BUILD / f"{name}.log"
    wanted = json.dumps([packages, sys.version, str(folder)])
    key = hashlib.sha256(wanted.encode()).hexdigest()
    if _fresh(folder, key):
        return 0
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f".{name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if _fresh(folder, key):
            return 0
        print(f"making build/{name} (once, about half a minute)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        python = folder / "bin" / "python"
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "-q", "--no-input", *packages],
        ):
            with log.open("wb") as out:
                done = subprocess.run(command, stdout=out, stderr=out)
            if done.returncode:
                sys.stderr.write(log.read_text(errors="replace"))
                print(
                    f"error: build/{name} could not be made: see above, "
                    "mend it and run this again",
                    file=sys.stderr,
                )
                return 1
        (folder / "stamp").write_text(key)
    return 0


def _fresh(folder: Path, key: str) -> bool:
    stamp = folder / "stamp"
    return (
        stamp.exists()
        and stamp.read_text() == key
        and (folder / "bin" / "python").exists()
    )


if __name__ == "__main__":
    # What was started must end, too: it writes to the folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        what = Path(error.filename or BUILD)
        if error.errno == errno.ENOSPC:
            line = f"no space left for {what}: free some and run this again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            line = (
                f"{what} cannot be read or written: check its owner, or work in a "
                "copy of the project"
            )
        elif what.is_symlink() and not what.exists():
            line = (
                f"{what} is a link to {what.readlink()}, which is not there: make that "
                "folder, or remove the link"
            )
        else:
            line = f"{what}: {error.strerror}: mend that and run this again"
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
