# SPDX-License-Identifier: Apache-2.0
"""Put a vLLM checkout first for every process of an interpreter.

`make build` copies this file into the environment's site-packages with a
`.pth` that imports it, and writes `vllm_gemma4_runtime.json` beside it. It runs at
each start of the interpreter, so it imports next to nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

SETTINGS = os.path.join(os.path.dirname(__file__), "vllm_gemma4_runtime.json")


class _Finder:
    """Find a few modules elsewhere than the path says."""

    def __init__(self, modules: dict[str, str], schemas: bool) -> None:
        self.modules = modules
        self.schemas = schemas

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        file = self.modules.get(fullname)
        if file and os.path.exists(file):
            return importlib.util.spec_from_file_location(fullname, file)
        if self.schemas and fullname == "torchvision.extension":
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec and spec.loader:
                spec.loader = _Schemas(spec.loader)  # type: ignore[assignment]
            return spec
        return None


class _Schemas:
    """Give CPU torch the operators that a CUDA torchvision cannot load.

    torchvision registers fake kernels for them when it is imported and dies if
    they are unknown. Its Python transforms need neither.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module._has_ops():
            return
        import torch

        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )


def install() -> None:
    """Do what the settings beside this file say."""
    with open(SETTINGS, encoding="utf-8") as stream:
        settings = json.load(stream)
    for name, value in settings["env"].items():
        os.environ.setdefault(name, value)
    if settings["layers"]:
        import site

        for layer in settings["layers"]:
            site.addsitedir(layer)
    for name in settings["hide"]:
        # What is there but does not load must look as if it was not there.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if checkout := settings["checkout"]:
        if checkout in sys.path:
            sys.path.remove(checkout)
        sys.path.insert(0, checkout)
    finder = _Finder(settings["modules"], settings["schemas"])
    sys.meta_path.insert(0, finder)


install()
