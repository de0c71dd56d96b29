# SPDX-License-Identifier: Apache-2.0
"""The supported vLLM releases, read from pins.toml."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version

from scripts import console
from scripts.console import ROOT, Failure


@dataclass(frozen=True)
class File:
    """A file of a package index, known by its hash."""

    project: str
    name: str
    sha256: str
    size: int = 0


@dataclass(frozen=True)
class Runtime:
    """What a release runs on: `kind` is "cpu" or "cuda".

    `version` is that of the wheel: an older one where the release has none, and
    `packages` what the release needs that such a wheel does not ask for.
    """

    kind: str
    project: str
    version: str
    torch: str
    torchvision: str
    wheels: dict[str, File]
    modules: tuple[str, ...]
    packages: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """One release of vLLM and where its series lives."""

    tag: str
    version: str
    commit: str
    base: str
    generated: tuple[str, ...]
    sdist: File
    runtimes: dict[str, Runtime]
    # The N of the wheel's +gemma4.N, and the digest of the series that it stands for.
    number: int = 0
    series: str = ""

    @property
    def patches(self) -> Path:
        """The folder of the series."""
        return ROOT / "patches" / self.tag

    @property
    def branch(self) -> str:
        """The branch of a checkout that holds the series."""
        return f"gemma4/{self.tag}"


def _read() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pins.toml").read_text(encoding="utf-8"))


def command(words: str, tag: str) -> str:
    """Return a make command for a release, which names it where it must.

    Args:
        words: what comes after make.
        tag: which release.
    """
    if tag != load().tag or console.option("RELEASE"):
        words += f" RELEASE={tag}"
    return console.make(words)


def tags() -> list[str]:
    """Return the releases that pins.toml names, the oldest first."""
    return sorted(_read()["releases"], key=Version)


def load(tag: str = "", given: str = "RELEASE") -> Release:
    """Read a release.

    Args:
        tag: such as "v0.32.0"; empty for the default one.
        given: the variable that names it.

    Returns:
        The release.

    Raises:
        Failure: pins.toml does not name it.
    """
    pins = _read()
    tag = tag or pins["default"]
    known = pins["releases"]
    if tag not in known:
        raise Failure(
            f"{given}={tag} is unknown", f"pins.toml has {', '.join(sorted(known))}"
        )
    pin = known[tag]
    sdist = pin["sdist"]
    return Release(
        tag=tag,
        version=pin["version"],
        commit=pin["commit"],
        base=pin["base"],
        generated=tuple(pin["generated"]),
        sdist=File(sdist["project"], sdist["file"], sdist["sha256"], sdist["size"]),
        runtimes={
            kind: Runtime(
                kind=kind,
                project=pin[kind]["project"],
                version=pin[kind].get("version", pin["version"]),
                torch=pin[kind]["torch"],
                torchvision=pin[kind].get("torchvision", ""),
                wheels={
                    machine: File(pin[kind]["project"], wheel["file"], wheel["sha256"])
                    for machine, wheel in pin[kind]["wheels"].items()
                },
                modules=tuple(pin[kind].get("modules", ())),
                packages=tuple(pin[kind].get("packages", ())),
                env=pin[kind].get("env", {}),
            )
            for kind in ("cpu", "cuda")
            if kind in pin
        },
        number=pin.get("wheel", {}).get("number", 0),
        series=pin.get("wheel", {}).get("series", ""),
    )
