# SPDX-License-Identifier: Apache-2.0
"""Run one of the trees of `make verify`, and note what is imported of it.

`make verify` copies this file into an environment of its own with a `.pth` that
imports it. It runs in every process of a check, those that a test starts too, so
that no process can take another vLLM without being seen.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

# The tree, and the file for the notes.
TREE = os.environ.get("VLLM_GEMMA4_TREE", "")
NOTES = os.environ.get("VLLM_GEMMA4_NOTES", "")


class _Notes:
    """Find nothing, but note what is looked for in the tree."""

    def __init__(self) -> None:
        self.tops = {name.partition(".")[0] for name in os.listdir(TREE)}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.tops:
            return None
        line = fullname
        if fullname == "vllm":
            spec = importlib.machinery.PathFinder.find_spec(fullname)
            line = f"vllm={spec.origin if spec else ''}"
        note(line)
        return None


class _Refuse:
    """Refuse vLLM where no tree is named, rather than give the wheel's."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> None:
        if fullname == "vllm":
            raise ImportError("VLLM_GEMMA4_TREE names no tree for make verify")


def note(line: str) -> None:
    """Write a line. One write to a file open for appending never mixes with others."""
    file = os.open(NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)


def install() -> None:
    """Put the tree first."""
    if not TREE or not NOTES:
        sys.meta_path.insert(0, _Refuse())
        return
    if TREE in sys.path:
        sys.path.remove(TREE)
    sys.path.insert(0, TREE)
    sys.meta_path.insert(0, _Notes())
    # A script of the tree is run, not imported.
    for word in sys.orig_argv[1:]:
        if word.endswith(".py"):
            script = os.path.realpath(word)
            if script.startswith(TREE + os.sep) and os.path.exists(script):
                note(os.path.relpath(script, TREE))


install()
