# SPDX-License-Identifier: Apache-2.0
"""Make build/tools, the environment of everything else here.

The standard library alone, for nothing else is there yet.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "build" / "tools"
LOG = ROOT / "build" / "tools.log"


def main() -> int:
    """Make the environment if it is not there or pyproject.toml changed.

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
    wanted = json.dumps([groups["tools"], sys.version, str(TOOLS)])
    key = hashlib.sha256(wanted.encode()).hexdigest()
    stamp = TOOLS / "stamp"
    if _fresh(stamp, key):
        return 0
    TOOLS.parent.mkdir(exist_ok=True)
    with (TOOLS.parent / ".tools.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if _fresh(stamp, key):
            return 0
        print("making build/tools (once, about half a minute)", file=sys.stderr)
        shutil.rmtree(TOOLS, ignore_errors=True)
        python = TOOLS / "bin" / "python"
        for command in (
            [sys.executable, "-m", "venv", str(TOOLS)],
            [str(python), "-m", "pip", "install", "-q", "--no-input", *groups["tools"]],
        ):
            with LOG.open("wb") as log:
                done = subprocess.run(command, stdout=log, stderr=log)
            if done.returncode:
                sys.stderr.write(LOG.read_text(errors="replace"))
                print(
                    "error: build/tools could not be made: see above, "
                    "mend it and run this again",
                    file=sys.stderr,
                )
                return 1
        stamp.write_text(key)
    return 0


def _fresh(stamp: Path, key: str) -> bool:
    return (
        stamp.exists()
        and stamp.read_text() == key
        and (TOOLS / "bin" / "python").exists()
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)
