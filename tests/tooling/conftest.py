# SPDX-License-Identifier: Apache-2.0
"""A toy project on a toy vLLM: the same scripts, seconds instead of minutes."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# What a shell starts in the background ignores interrupts, and so would all that the
# tests start and interrupt; nohup has it ignore that the terminal is closed.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[2]
TAG = "v1.0.0"
BRANCH = f"gemma4/{TAG}"
TREE = {
    "vllm/__init__.py": "",
    "vllm/a.py": "".join(f"a{n} = {n}\n" for n in range(60)),
    "vllm/b.py": "".join(f"b{n} = {n}\n" for n in range(60)),
    "tests/test_a.py": "def test_a():\n    pass\n",
    ".gitignore": "*.so\n/vllm/_version.py\n__pycache__/\n",
    "run.sh": "#!/bin/sh\n",
    "data.txt": "".join(
        hashlib.sha256(b"%d" % n).hexdigest() + "\n" for n in range(3000)
    ),
}
GENERATED = {"PKG-INFO": "Name: vllm\n", "vllm/_version.py": "version = '1.0.0'\n"}
# What is spoilt in a process calls `end` at the call that makes `left` zero.
COUNTED = """
def spoil(owner, name):
    real = getattr(owner, name)
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            end(name)
        return real(*args, **more)
    setattr(owner, name, call)
"""
MESSAGE = """[Model] {title}

Purpose: see what happens.

Test Plan: run it.

Test Result: it ran.

Upstream-Status: Pending
"""
# Settings that people have and that no result may depend on.
HOSTILE = """
[user]
    useConfigOnly = true
[commit]
    gpgsign = true
    cleanup = strip
[gpg]
    program = /bin/false
[core]
    hooksPath = {hooks}
    abbrev = 5
    quotePath = true
    editor = false
[color]
    ui = always
[diff]
    noprefix = true
    mnemonicPrefix = true
    renames = copies
    algorithm = histogram
    context = 9
    interHunkContext = 9
    indentHeuristic = false
    external = /bin/false
[format]
    signature = me
    signOff = true
    numbered = true
    attach = true
    thread = shallow
    coverLetter = true
    from = me@example.invalid
    subjectPrefix = RFC
    suffix = .txt
    useAutoBase = true
    noprefix = true
    encodeEmailHeaders = true
    pretty = oneline
    filenameMaxLength = 20
[am]
    threeWay = true
    keepcr = true
[apply]
    whitespace = error
[mailinfo]
    scissors = true
[i18n]
    commitEncoding = latin1
    logOutputEncoding = latin1
[log]
    showSignature = true
[status]
    short = true
    showUntrackedFiles = no
[merge]
    conflictStyle = diff3
[init]
    templateDir = {hooks}
    defaultBranch = trunk
[fetch]
    fsckObjects = true
[log]
    date = relative
"""


def sdist(path: Path, tree: dict[str, str], version: str = "1.0.0") -> str:
    """Write a toy sdist; return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in tree.items():
            entry = tarfile.TarInfo(f"vllm-{version}/{name}")
            entry.size = len(text.encode())
            entry.mode = 0o775 if name.endswith(".sh") else 0o664
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Toy:
    """A toy project in a folder of its own."""

    root: Path
    home: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> Path:
        return self.root / "build" / "vllm"

    @property
    def patches(self) -> Path:
        return self.root / "patches" / TAG

    def run(
        self, verb: str, *, ok: bool | None = True, **env: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb; with ok=False it must fail in one line without a traceback."""
        done = subprocess.run(
            [sys.executable, "-m", f"scripts.{verb}"],
            cwd=self.root,
            env=self.environ(**env),
            capture_output=True,
            text=True,
        )
        said = done.stderr + done.stdout
        assert "Traceback" not in said, said
        if ok is True:
            assert done.returncode == 0, said
        elif ok is False:
            assert done.returncode != 0, said
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, said
        return done

    def fails(self, verb: str, **env: str) -> str:
        """Run a verb that must fail; return its one line."""
        done = self.run(verb, ok=False, **env)
        return done.stderr.splitlines()[-1]

    def environ(self, **env: str) -> dict[str, Any]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("GIT_", "PIP_")) and name not in OURS
        }
        return inherited | {"HOME": str(self.home)} | self.env | env

    def git(self, *args: str, at: Path | None = None) -> str:
        """Run git as a person with plain settings would."""
        done = subprocess.run(
            [
                *("git", "-c", "user.name=P", "-c", "user.email=p@example.invalid"),
                *("-C", str(at or self.own), *args),
            ],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
                "GIT_CONFIG_GLOBAL": os.devnull,
                "HOME": str(self.home),
                "GIT_EDITOR": "true",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout.strip()

    def change(
        self, name: str, old: str, new: str, title: str, at: Path | None = None
    ) -> None:
        """Commit a change as a person would."""
        path = (at or self.own) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        path.write_text(text.replace(old, new) if old else text + new)
        self.git("add", name, at=at)
        self.git("commit", "-q", "-m", MESSAGE.format(title=title), at=at)

    def series(self) -> None:
        """Give the project three patches, by the loop a person would use."""
        self.run("apply")
        self.change("vllm/a.py", "a10 = 10\n", "a10 = 'ten'\n", "Name ten")
        self.change("vllm/b.py", "b50 = 50\n", "b50 = 'é'\n", "Wörter")
        self.change("vllm/new.py", "", "# SPDX\nx = 1\n", "A new file")
        self.run("export")

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.patches.iterdir()}

    def partial(self, at: Path, path: Path, *args: str) -> Path:
        """Clone a repository without the files that are not checked out."""
        for name in ("allowFilter", "allowAnySHA1InWant"):
            self.git("config", f"uploadpack.{name}", "true", at=at)
        self.git(
            *("clone", "-q", "--filter=blob:none", *args, f"file://{at}", str(path)),
            at=at,
        )
        return path

    def head(self, at: Path | None = None) -> str:
        return self.git("rev-parse", "HEAD", at=at)

    def repository(self, path: Path, files: dict[str, str], title: str) -> None:
        """Make a repository of one commit at a folder that is not there yet."""
        path.mkdir()
        self.git("init", "-q", "-b", "main", at=path)
        for name, text in files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text)
        self.git("add", "-A", at=path)
        self.git("commit", "-q", "-m", title, at=path)

    @contextlib.contextmanager
    def at_work(self, folder: Path | None = None) -> Iterator[None]:
        """Another make command of this project, or of one that locks the folder."""
        holder = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "import pathlib, sys, time; from scripts import console\n"
                "with console.lock(pathlib.Path(sys.argv[1])):\n"
                "    print(1, flush=True); time.sleep(60)",
                str(folder or self.root / "build"),
            ],
            cwd=self.root,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()
            time.sleep(0.1)

    def reset(self) -> None:
        """Forget the checkout."""
        shutil.rmtree(self.own)


def release(toy: Toy, tag: str, tree: dict[str, str], commit: str = "0000000") -> None:
    """Add a release to a toy's pins and its sdist to the cache."""
    version = tag.removeprefix("v")
    path = toy.root / "build" / "cache" / f"vllm-{version}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = sdist(path, tree | GENERATED, version)
    with (toy.root / "pins.toml").open("a") as pins:
        pins.write(
            textwrap.dedent(f"""\

                [releases."{tag}"]
                version = "{version}"
                commit = "{commit}"
                base = ""
                generated = ["PKG-INFO", "vllm/_version.py"]
                [releases."{tag}".sdist]
                project = "vllm"
                file = "{path.name}"
                sha256 = "{digest}"
                size = {path.stat().st_size}
                """)
        )


OURS = {
    *("RELEASE", "VLLM", "PYTHON", "DEVICE", "CONTINUE", "ARGS", "STAGE"),
    *("FULL", "JOBS", "MINUTES", "PARTIAL", "PATCH", "SINCE"),
    *("ABORT", "DROP", "TO", "TO_DIR"),
    *("UNDO", "BUMP", "MACHINE", "ONTO", "WITH", "LEVEL", "RESULTS"),
    *("MAKEFLAGS", "MFLAGS", "MAKELEVEL"),
}


def make_toy(base: Path) -> Toy:
    root, home = base / "project dïr", base / "home"
    (root / "build" / "cache").mkdir(parents=True)
    home.mkdir()
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "patches" / TAG).mkdir(parents=True)
    (root / "pins.toml").write_text(f'default = "{TAG}"\n')
    toy = Toy(root, home)
    release(toy, TAG, TREE)
    return toy


def copied(base: Path, tmp_path: Path) -> Toy:
    """Copy what a toy was made in."""
    shutil.copytree(base, tmp_path / "copy", symlinks=True)
    return Toy(tmp_path / "copy" / "project dïr", tmp_path / "copy" / "home")


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A project without patches."""
    return make_toy(tmp_path)


@pytest.fixture(scope="session")
def _filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("filled")
    made = make_toy(base)
    made.series()
    return base


@pytest.fixture
def filled(_filled: Path, tmp_path: Path) -> Toy:
    """A project with three patches, applied."""
    return copied(_filled, tmp_path)


@pytest.fixture
def clone(filled: Toy, tmp_path: Path) -> Path:
    """A person's own clone of the toy upstream, at a later commit."""
    path = tmp_path / "théir clone's"
    filled.repository(path, TREE, "release")
    filled.git("tag", TAG, at=path)
    pins = filled.root / "pins.toml"
    pins.write_text(pins.read_text().replace("0000000", filled.head(path)[:9]))
    filled.change("vllm/a.py", "a0 = 0\n", "a0 = 1\n", "later", at=path)
    return path


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, Any]:
    """Settings, hooks and variables that must not matter."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in (
        *("applypatch-msg", "pre-applypatch", "post-applypatch", "pre-commit"),
        *("commit-msg", "prepare-commit-msg", "post-commit", "post-checkout"),
        *("reference-transaction", "post-index-change"),
    ):
        hook = hooks / name
        hook.write_text("#!/bin/sh\necho a hook ran >&2\nexit 1\n")
        hook.chmod(0o755)
    config = tmp_path / "hostile.config"
    config.write_text(HOSTILE.format(hooks=hooks))
    return {
        "GIT_CONFIG_GLOBAL": str(config),
        "GIT_DIR": "/nowhere",
        "GIT_WORK_TREE": "/nowhere",
        "GIT_INDEX_FILE": "/nowhere/index",
        "GIT_AUTHOR_NAME": "Someone Else",
        "GIT_COMMITTER_DATE": "2001-01-01T00:00:00Z",
        "GIT_DIFF_OPTS": "--unified=0",
        "GIT_EXTERNAL_DIFF": "/bin/false",
        "TZ": "Asia/Kolkata",
        "LANG": "de_DE.UTF-8",
    }


@dataclass
class Index:
    """A package index on this machine, which can be told to misbehave."""

    url: str
    body: bytes
    mode: str = "good"
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def index(toy: Toy) -> Iterator[Index]:
    """An index that serves the toy's sdist, which is out of the cache then."""
    cached = toy.root / "build" / "cache" / "vllm-1.0.0.tar.gz"
    state = Index("", cached.read_bytes())
    cached.unlink()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.headers.get("Range") or self.path)
            if self.path == "/simple/vllm/":
                page = b"<a href='/files/vllm-1.0.0.tar.gz'>vllm-1.0.0.tar.gz</a>"
                if state.mode == "absent":
                    page = b""
                plain = state.mode == "plain"
                self.reply(200, page, "text/plain" if plain else "text/html")
            elif self.path.startswith("/files/"):
                body, status = state.body, 200
                if state.mode == "wrong":
                    body = b"x" * len(body)
                if (span := self.headers.get("Range")) and state.mode != "wrong":
                    body, status = body[int(span[6:].rstrip("-")) :], 206
                self.reply(status, body, "application/gzip", state.mode == "cut")
            else:
                self.reply(404, b"", "text/plain")

        def reply(self, status: int, body: bytes, kind: str, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/simple"
    toy.env["PIP_INDEX_URL"] = state.url
    yield state
    server.shutdown()
    server.server_close()


def instead(tmp_path: Path, word: str, script: str) -> str:
    """Put a git in the way that does something at each call with a word.

    Args:
        tmp_path: Where to make its folder.
        word: One of the call's arguments.
        script: What the shell does, and then goes on to the call.

    Returns:
        What to give as PATH.
    """
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "git").write_text(
        f'#!/bin/bash\ncase " $* " in *" {word} "*) {script};; esac\n'
        f'exec "{shutil.which("git")}" "$@"\n'
    )
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def saboteur(tmp_path: Path, nth: int, kill: str, first: str) -> Path:
    """Put a git in the way that ends its caller at the nth call.

    Args:
        tmp_path: Where to make the returned folder, for PATH. A file ``hit`` in it
            says that there was an nth call.
        nth: Counted from 1.
        kill: The signal's name.
        first: What the shell does before it, ``"$git" "$@"`` being the call.
    """
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("n", "hit"):
        (folder / name).unlink(missing_ok=True)
    script = folder / "git"
    script.write_text(
        f'#!/bin/bash\ngit="{shutil.which("git")}"\necho >> "{folder}/n"\n'
        f'if [ "$(wc -l < "{folder}/n")" -eq {nth} ]; then\n'
        f'  touch "{folder}/hit"; {first}; kill -{kill} $PPID; sleep 1; exit 1\nfi\n'
        'exec "$git" "$@"\n'
    )
    script.chmod(0o755)
    return folder
