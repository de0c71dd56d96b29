# SPDX-License-Identifier: Apache-2.0
"""`make upstream`: a patch of the series as a branch on a clone's main.

The branch is made in a clone of the clone, and the last step fetches it: until then
nothing of the person's has changed, and then only a branch is new.
"""

import ast
import contextlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import console, git, pins, series
from scripts.apply import count, open_own
from scripts.console import BUILD, ROOT, Failure, say, show
from scripts.git import Clone, GitError, Scratch
from scripts.lint import SECTIONS, Patch, column, load
from scripts.pins import Release
from scripts.rebase import MERGE

OUT = BUILD / "upstream"
TEMPLATE = ".github/PULL_REQUEST_TEMPLATE.md"
PLAIN = "## Purpose\n\n## Test Plan\n\n## Test Result\n"


@dataclass
class Names:
    """Names in Python files: those they define for others, and those they use."""

    defined: set[str]
    used: set[str]


def names(sources: list[str]) -> Names:
    """Find the names that tie files together.

    Args:
        sources: Python files.

    Returns:
        Functions, classes, arguments, attributes and module variables; and every
        name, attribute, keyword and import. Local variables are of no one else.
    """
    found = Names(set(), set())
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            # The latter: bytes that are no text.
            continue
        for holder in ast.walk(tree):
            if isinstance(holder, ast.Module | ast.ClassDef):
                for part in holder.body:
                    found.defined |= set(_assigned(part))
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found.defined.add(node.name)
                case ast.arg():
                    found.defined.add(node.arg)
                case ast.Attribute(ctx=ast.Store()):
                    found.defined.add(node.attr)
                case ast.Attribute():
                    found.used.add(node.attr)
                case ast.Name(ctx=ast.Load()):
                    found.used.add(node.id)
                case ast.keyword(arg=str(name)):
                    found.used.add(name)
                case ast.alias():
                    found.used |= set(node.name.split("."))
                case ast.ImportFrom(module=str(name)):
                    found.used |= set(name.split("."))
                case ast.Constant(value=str(text)) if re.fullmatch(r"[\w.]+", text):
                    # As patches of tests and getattr name things.
                    found.used |= set(text.split("."))
    return found


def _assigned(node: ast.stmt) -> Iterator[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id


def uses(clone: Clone, base: str, commits: list[str]) -> list[set[int]]:
    """Say for each commit which earlier ones define what it begins to use.

    Args:
        clone: where they are.
        base: the commit that they start from.
        commits: a line.
    """
    introduced: dict[str, int] = {}
    wanted: list[set[str]] = []
    before = base
    for number, commit in enumerate(commits):
        listed = clone(
            *("diff-tree", "-r", "-z", "--no-renames", "--name-status"),
            *(before, commit),
        ).split("\0")[:-1]
        rows = [
            (kind, name)
            for kind, name in zip(listed[::2], listed[1::2], strict=True)
            if name.endswith(".py")
        ]
        was = names([_file(clone, before, name) for kind, name in rows if kind != "A"])
        now = names([_file(clone, commit, name) for kind, name in rows if kind != "D"])
        now.defined |= {Path(name).stem for kind, name in rows if kind == "A"}
        for name in now.defined - was.defined:
            introduced.setdefault(name, number)
        # What it defines itself is its own, whoever else has that name.
        wanted.append(now.used - was.used - now.defined)
        before = commit
    known = _words(clone, base)
    return [
        {
            introduced[name]
            for name in wants
            if name not in known and introduced.get(name, number) < number
        }
        for number, wants in enumerate(wanted)
    ]


def _file(clone: Clone, commit: str, name: str) -> str:
    return clone("cat-file", "blob", f"{commit}:{name}")


def _words(clone: Clone, base: str) -> set[str]:
    """Return every word of a commit's Python files."""
    files = clone.files(base).items()
    blobs = [entry.split()[1] for name, entry in files if name.endswith(".py")]
    said = clone("cat-file", "--batch", data="\n".join(blobs).encode())
    return set(re.findall(r"\w+", said))


def needed(
    clone: Clone,
    base: str,
    files: list[Path],
    number: int,
    more: set[int],
    folder: Path,
) -> list[Path]:
    """Return a patch and those before it that it cannot do without.

    All before it will do. From the last to the first, those are left out that no
    other one uses and without which git still applies the rest.

    Args:
        clone: where to try.
        base: the release's commit.
        files: the series.
        number: the patch's place in it, from 0.
        more: places of patches to keep in any case: no name tells that one only
            behaves as it should after another.
        folder: an empty folder to work in.

    Raises:
        Failure: the series does not apply.
    """

    def make(kept: list[int], name: str) -> list[str]:
        (folder / name).mkdir()
        return series.derive(clone, base, [files[at] for at in kept], folder / name)

    kept = list(range(number + 1))
    ties = uses(clone, base, make(kept, "all"))
    for one in reversed(kept[:-1]):
        rest = [at for at in kept if at != one]
        if one in more or any(one in ties[at] for at in rest):
            continue
        try:
            make(rest, f"without-{one}")
        except series.Conflict:
            continue
        kept = rest
    return [files[at] for at in kept]


def identity(clone: Clone) -> tuple[str, str]:
    """Return the name and address that a person commits with.

    Raises:
        Failure: git has none.
    """
    found = []
    for field in ("user.name", "user.email"):
        try:
            found.append(clone("config", field))
        except GitError:
            raise Failure(
                f"git has no {field}, and a sign-off needs it",
                f"`git config --global {field} ...`, with the one you answer for",
            ) from None
    return found[0], found[1]


def onto(clone: Clone) -> tuple[str, str]:
    """Return the branch to build on and its commit.

    Raises:
        Failure: the clone has it not.
    """
    name = console.option("ONTO") or "main"
    commit = clone.resolve(name)
    if not commit:
        raise Failure(
            f"{show(clone.path)} has no {name}", "give ONTO=, such as origin/main"
        )
    return name, commit


def message(patch: Patch, who: str) -> str:
    """Return the commit message to submit: no status of ours, and a sign-off."""
    body = [row for row in patch.body if not row.startswith("Upstream-Status:")]
    text = "\n".join(body).strip()
    last = text.rpartition("\n\n")[2]
    # Trailers that are there are one paragraph with it.
    joint = "\n" if re.fullmatch(r"([A-Z][\w-]+: .+\n?)+", last) else "\n\n"
    if last.startswith(SECTIONS):
        joint = "\n\n"
    return f"{patch.title}\n\n{text}{joint}Signed-off-by: {who}\n"


def parts(patch: Patch) -> dict[str, str]:
    """Return a message's sections by name, in Markdown."""
    made: dict[str, list[str]] = {}
    rows: list[str] = []
    for row in patch.body:
        head = next((name for name in SECTIONS if row.startswith(name)), "")
        if head:
            rows = made.setdefault(head.rstrip(":"), [])
            row = row.removeprefix(head).strip()
        elif row.startswith("Upstream-Status:"):
            break
        rows.append(row)
    return {name: _markdown(rows) for name, rows in made.items()}


COMMAND = re.compile(r"(pytest|python|vllm|[A-Z_]+=\S+) ")


def _markdown(rows: list[str]) -> str:
    """Join wrapped lines, which GitHub would break, and fence what is no prose."""
    made = []
    for block in re.split(r"\n\s*\n", "\n".join(rows).strip()):
        if re.search(r"\S {3,}\S", block):
            made.append(f"```text\n{block}\n```")
            continue
        for code, lines in _runs(block.split("\n")):
            if code:
                made.append("\n".join(["```bash", *lines, "```"]))
            else:
                text = "\n".join(line.strip() for line in lines)
                made.append(re.sub(r"\n(?![-*] )", " ", text))
    return "\n\n".join(made)


def _runs(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """Tell commands, with the lines that they go on in, from prose."""
    runs: list[tuple[bool, list[str]]] = []
    on = False
    for line in lines:
        code = on or bool(COMMAND.match(line))
        on = code and line.endswith("\\")
        if not runs or runs[-1][0] != code:
            runs.append((code, []))
        runs[-1][1].append(line)
    return runs


def body(template: str, title: str, said: dict[str, str], needs: list[str]) -> str:
    """Fill vLLM's pull request template.

    Args:
        template: the file in the clone's main.
        title: the patch's.
        said: its sections, see `parts`.
        needs: the titles of the patches that it needs, which come first.

    Returns:
        The text; what no heading asks for is put before the first.
    """
    purpose = said.get("Purpose", "")
    plan, result = said.get("Test Plan", ""), said.get("Test Result", "")
    plain = re.sub(r"\[[^]]*\]", "", title).strip()
    bullets = "\n".join(re.findall(r"(?m)^[-*] .*$", purpose))
    # The claims have the bullets, where there is a place for claims.
    prose = re.sub(r"(?m)^[-*] .*\n?", "", purpose).strip()
    after = f" It comes after {' and '.join(needs)}." if needs else ""
    fills = {
        "purpose": (purpose + after, ("Purpose",)),
        "test plan": (plan, ("Test Plan",)),
        "test result": (result, ("Test Result",)),
        "overview": (f"{plain}.{after}", ()),
        "claims": (bullets or f"- {plain}", ()),
        "validation": (f"{plan}\n\n{result}", ("Test Plan", "Test Result")),
        "details": (prose if "\n## Claims\n" in template else purpose, ("Purpose",)),
    }
    head, *sections = re.split(r"(?m)^(?=## )", template)
    placed: set[str] = set()
    made = []
    for section in sections:
        name, _, rest = section.partition("\n")
        # A rule and what follows it is no part of the last section.
        _, rule, tail = rest.partition("\n---\n")
        fill = fills.get(name.removeprefix("## ").strip().lower())
        if not fill:
            made.append(section)
            continue
        placed |= set(fill[1])
        made.append(f"{name}\n\n{fill[0].strip()}\n{rule}{tail}\n")
    for name, text in said.items():
        if name not in placed and text:
            made.insert(0, f"## {name}\n\n{text}\n\n")
    return head + "".join(made).rstrip("\n") + "\n"


@dataclass
class Work:
    """What is to be submitted: the commits on the release, the patch's own last."""

    files: list[Path]
    commits: list[str]
    title: str
    branch: str

    @property
    def place(self) -> Path:
        """The folder of its text."""
        return OUT / self.branch

    @property
    def tree(self) -> Path:
        """Where a conflict is left."""
        return self.place / "tree"


def prepare(
    clone: Clone,
    base: str,
    files: list[Path],
    number: int,
    more: set[int],
    who: tuple[str, str],
) -> Work:
    """Make the commits of a patch and of what it needs, signed off.

    Args:
        clone: where to write them.
        base: the release's commit.
        files: the series.
        number: the patch's place in it, from 0.
        more: as in `needed`.
        who: a person's name and address.

    Raises:
        Failure: the series does not apply.
    """
    with console.scratch() as folder:
        for name in ("needed", "derive", "sign"):
            (folder / name).mkdir()
        kept = needed(clone, base, files, number, more, folder / "needed")
        scratch = Scratch(clone, folder / "sign")
        last, commits = base, []
        for path, commit in zip(
            kept, series.derive(clone, base, kept, folder / "derive"), strict=True
        ):
            patch = load(path)
            found = series.content(clone.raw(commit))
            author, _, rest = found.author.rpartition(" <")
            email, when, zone = rest.replace(">", "").split()
            if email == git.EMAIL:
                # Nobody is called that: whoever submits it answers for it.
                author, email = who
            made = scratch(
                *("commit-tree", found.tree, "-p", last),
                data=message(patch, f"{who[0]} <{who[1]}>").encode(),
                GIT_AUTHOR_NAME=author,
                GIT_AUTHOR_EMAIL=email,
                GIT_AUTHOR_DATE=f"{when} {zone}",
                GIT_COMMITTER_NAME=who[0],
                GIT_COMMITTER_EMAIL=who[1],
            )
            last = made.decode().strip()
            commits.append(last)
    stem = re.sub(r"\[[^]]*\]", "", patch.title).strip().lower()
    slug = textwrap.shorten(re.sub(r"[^a-z0-9]+", " ", stem), 36, placeholder="")
    branch = f"gemma4-{files[number].name[:4]} {slug}".strip().replace(" ", "-")
    return Work(kept, commits, patch.title, branch)


def _workshop(folder: Path, clone: Clone, own: Clone, start: str) -> Clone:
    """Make a repository that has both clones' objects and writes to neither.

    No file of it is checked out: a merge writes only what it conflicts in.
    """
    made = git.borrower(folder, clone, own)
    (made.dir / "info/sparse-checkout").write_text("/nothing\n")
    for name, value in {**MERGE, "core.sparseCheckout": "true"}.items():
        made("config", name, value)
    made("checkout", "-q", "--detach", start)
    return made


def _pick(shop: Clone, commit: str, who: tuple[str, str]) -> list[str] | None:
    """Bring a commit to where a clone is.

    Returns:
        The files that conflict, None where the clone has it already.
    """
    try:
        shop(
            *("cherry-pick", commit),
            GIT_COMMITTER_NAME=who[0],
            GIT_COMMITTER_EMAIL=who[1],
        )
    except GitError as error:
        if found := shop("diff", "--name-only", "--diff-filter=U").splitlines():
            return found
        if shop.dirty() or not shop.under_way():
            raise Failure(
                f"git could not pick {commit[:12]} ({str(error).splitlines()[0]})",
                "mend that and run this again",
            ) from None
        shop("cherry-pick", "--skip")
        return None
    return []


def _fetch(clone: Clone, shop: Clone, ref: str) -> None:
    """Bring what a clone is at to another, as a ref that is not there yet."""
    clone(
        *("-c", "fetch.fsckObjects=false", "-c", "fetch.prune=false"),
        *("fetch", "-q", "--no-tags", "--no-write-fetch-head", "--no-prune"),
        *(str(shop.path), re.sub(r"^(\+?)", r"\1HEAD:", ref)),
    )


def _leave(
    clone: Clone, shop: Clone, work: Work, rest: list[str], who: tuple[str, str]
) -> None:
    """Leave a conflict to a person: a worktree of their clone in a cherry-pick."""
    shop("cherry-pick", "--abort")
    left = f"refs/gemma4/upstream/{work.branch}"
    start, branch = f"{left}.start", f"refs/heads/{work.branch}"
    try:
        _fetch(clone, shop, f"+{start}")
        shop("checkout", "-q", "--detach", rest[-1])
        _fetch(clone, shop, f"+{left}")
        # Only now is there anything that a person sees.
        clone(
            *("worktree", "add", "-q", "-b", work.branch, "--no-track"),
            *(str(work.tree), start),
        )
        clone("update-ref", "-d", start)
        tree = Clone(work.tree)
        tree.whole()
        with contextlib.suppress(GitError):
            tree(
                *("cherry-pick", *rest),
                GIT_COMMITTER_NAME=who[0],
                GIT_COMMITTER_EMAIL=who[1],
            )
    except BaseException:
        # So that the same command begins anew.
        with contextlib.suppress(GitError):
            clone("worktree", "remove", "-f", "-f", str(work.tree))
        console.remove(work.tree)
        for ref in (start, left, branch):
            clone("update-ref", "-d", ref)
        raise


def _place(files: list[Path], wanted: str, variable: str) -> int:
    for at, path in enumerate(files):
        if wanted and path.name[:4] == wanted.zfill(4):
            return at
    numbers = " ".join(path.name[:4] for path in files)
    raise Failure(f"{variable}={wanted} is none of the series", f"it has {numbers}")


def upstream(release: Release, given: str, wanted: str) -> None:
    """Make a branch to submit, and the text to submit it with.

    Args:
        release: whose series.
        given: a person's clone of vLLM.
        wanted: the patch's number.

    Raises:
        Failure: it cannot; the clone is as it was.
    """
    files = series.patches(release.patches)
    number = _place(files, wanted, "PATCH")
    more = {_place(files, one, "WITH") for one in console.option("WITH").split()}
    if not given:
        raise Failure("VLLM= is missing", "give your clone of vLLM's main")
    clone = git.find(Path(given))
    if clone("rev-parse", "--is-shallow-repository") == "true":
        raise Failure(
            f"{show(clone.path)} is a shallow clone, without the history to work on",
            f"`git -C {shlex.quote(str(clone.path))} fetch --unshallow`",
        )
    who = identity(clone)
    main, start = onto(clone)
    own, base = open_own(release)
    work = prepare(own, base, files, number, more, who)
    if clone.resolve(f"refs/heads/{work.branch}"):
        raise Failure(
            f"{show(clone.path)} has a branch {work.branch} already",
            f"`git -C {shlex.quote(str(clone.path))} branch -m {work.branch} "
            f"{work.branch}-old`",
        )
    go_on = console.enabled("CONTINUE")
    if go_on and work.tree.exists():
        raise Failure(
            f"{show(work.tree)} is there from an earlier run",
            f"`git -C {shlex.quote(str(clone.path))} worktree remove "
            f"{shlex.quote(str(work.tree))}` when you have what you want of it",
        )
    taken: list[Path] = []
    with console.scratch() as folder:
        shop = _workshop(folder / "clone", clone, own, start)
        try:
            template = shop("cat-file", "blob", f"{start}:{TEMPLATE}")
        except GitError:
            template = PLAIN
        for at, (path, commit) in enumerate(zip(work.files, work.commits, strict=True)):
            stuck = _pick(shop, commit, who)
            if stuck is None:
                taken.append(path)
                say(f"{main} has {path.name} already")
            elif stuck and go_on:
                _write_text(work, template, taken, release)
                _leave(clone, shop, work, work.commits[at:], who)
                raise Failure(
                    f"{path.name} conflicts with {main} in {', '.join(stuck)} in "
                    f"{show(work.tree)}",
                    "mend and `git add` them there, then `git cherry-pick --continue`",
                )
            elif stuck:
                raise Failure(
                    f"{path.name} conflicts with {main} of {show(clone.path)} in "
                    + ", ".join(stuck),
                    "nothing has changed; CONTINUE=1 leaves it in a worktree for "
                    f"`git cherry-pick --continue`{_newer(release)}",
                )
        if work.files[-1] in taken:
            raise Failure(
                f"{main} of {show(clone.path)} has {work.files[-1].name} already",
                "there is nothing to submit",
            )
        _write_text(work, template, taken, release)
        _fetch(clone, shop, f"refs/heads/{work.branch}")
    date = clone("log", "-1", "--format=%cs", start)
    say(
        f"{work.branch} in {show(clone.path)}: "
        f"{count(len(work.files) - len(taken))} on {main} ({start[:9]} of {date}); "
        f"the text is {show(work.place / 'body.md')}"
    )
    for path in work.files[:-1]:
        if path not in taken:
            say(f"it needs {path.name}: submit that first")
    if missing := behind(files, number, work.files):
        both = [path.name[:4] for path in (*(files[at] for at in more), *missing)]
        listed = ", ".join(path.name for path in missing)
        say(
            f"it comes after {listed}, which it shows its worth behind: "
            f"WITH={shlex.quote(' '.join(sorted(both)))}"
        )
    print(_commands(clone, work, main, release))


def behind(files: list[Path], number: int, made: list[Path]) -> list[Path]:
    """Return the patches that one is to come after by the docs and does not.

    Args:
        files: the series.
        number: the patch's place in it, from 0.
        made: the patches of its branch.
    """
    page = ROOT / "docs" / "maintaining.md"
    table = dict(column(page.read_text() if page.exists() else "", "after"))
    wanted = table.get(files[number].name[:4], "").split()
    return [path for path in files if path.name[:4] in wanted and path not in made]


def _newer(release: Release) -> str:
    """Name the last release that has the series, if that is another one."""
    patched = [
        tag for tag in pins.tags() if any(pins.load(tag).patches.glob("*.patch"))
    ]
    return f", or try RELEASE={patched[-1]}" if patched[-1] != release.tag else ""


def _write_text(work: Work, template: str, taken: list[Path], release: Release) -> None:
    patches = [load(path) for path in work.files if path not in taken]
    needs = [f'"{patch.title}"' for patch in patches[:-1]]
    work.place.mkdir(parents=True, exist_ok=True)
    said = parts(patches[-1])
    if result := said.get("Test Result"):
        said["Test Result"] = (
            f"Measured on {release.tag} with the whole series; to be run again on this "
            f"branch.\n\n{result}"
        )
    text = body(template, work.title, said, needs)
    path = work.place / "body.md"
    if path.exists() and path.read_text() != text:
        # A person was to edit it.
        kept = path.rename(console.free(work.place, "body-{}.md"))
        say(f"{show(path)} was another one: it is {kept.name} there now")
    path.write_text(text)


def _commands(clone: Clone, work: Work, main: str, release: Release) -> str:
    """Return what a person runs, in a terminal's words."""
    patch = load(work.files[-1])
    text = shlex.quote(str(work.place / "body.md"))
    words = re.sub(r"\[[^]]*\]", "", work.title).strip()
    tests = [
        name
        for name in patch.files
        if name.startswith("tests/") and Path(name).name.startswith("test_")
    ]
    repository = "--repo vllm-project/vllm"
    return "\n".join(
        [
            "",
            "# vLLM bans who lets an agent submit. A human does, who has read every",
            "# line, has run these and answers for it:",
            f"cd {shlex.quote(str(clone.path))} && git switch {work.branch}",
            f"pre-commit run --from-ref {main} --to-ref {work.branch}",
            *([f"python -m pytest {' '.join(tests)}"] if tests else []),
            "# Is there one already? Then say there what yours does otherwise.",
            f"gh pr list {repository} --state open --search {shlex.quote(words)}",
            f"gh issue list {repository} --search {shlex.quote(words)}",
            "# Say in the text why it duplicates none, what you ran, and that AI",
            "# assisted if it did (also as a trailer, Assisted-by: or the like).",
            "# Put your own results in the place of those that are there: they are of",
            f"# {release.tag} with the whole series.",
            f"$EDITOR {text}",
            f"git push YOUR_FORK {work.branch}",
            f"gh pr create {repository} --base main --head YOU:{work.branch} "
            f"--title {shlex.quote(work.title)} "
            f"--body-file {text}",
        ]
    )


def main() -> None:
    """Make a branch of PATCH and what it needs on VLLM's main."""
    release = pins.load(console.option("RELEASE"))
    with console.lock():
        upstream(release, console.option("VLLM"), console.option("PATCH"))


if __name__ == "__main__":
    console.run(main)
