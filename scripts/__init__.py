# SPDX-License-Identifier: Apache-2.0
"""What the Makefile calls, one module a verb."""

import sys
from types import TracebackType


def _hook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say what `console.run` would, of an interrupt while modules are imported."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    # With a process group torch's hook, which calls this one, has its own stderr.
    print(INTERRUPTED, file=sys.__stderr__)
    raise SystemExit(130)


INTERRUPTED = "interrupted: nothing is lost, run the same command again"
sys.excepthook = _hook
