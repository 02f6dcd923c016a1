"""The documentation holds together: pages are found, links lead somewhere, commands that are shown exist.

``scripts/docs`` builds the site and is strict; this is what can be known without building it."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from glob import glob
from pathlib import Path

import click
import pytest

from srd_lab.cli.main import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INDEX = DOCS / "package_index.md"  # what a package index shows
PAGES = sorted(
    file
    for file in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"))
    if "entries" not in file.relative_to(DOCS).parts and file != INDEX
)
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
LINK = re.compile(r"\[[^]]*\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.DOTALL | re.MULTILINE)
FILES = ("photo.png", "photo.jpg", "entry.json", "a/entry.json", "run.toml", "FILE", "names.txt", "net.pth")


def text_of(page: Path) -> str:
    """Markdown; of a notebook that of its cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
    )


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site name them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+)$", FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        numbered = (slug, *(f"{slug}-{n}" for n in range(1, 9)))
        found.add(next(name for name in numbered if name not in found))
    return found


def shown_commands(page: Path) -> Iterator[str]:
    """Every line of a block that calls ``srd-lab``, and every such call within a line."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.removeprefix("$ ").startswith("srd-lab "):
                yield line.removeprefix("$ ")
    yield from re.findall(r"(?<!`)`(srd-lab [a-z][^`]*)`(?!`)", FENCE.sub("", text))


def parse(arguments: list[str]) -> None:
    """Read a command line as the program does, and run nothing."""
    command: click.Command = main
    context = main.make_context("srd-lab", arguments, help_option_names=["-h", "--help"])
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(found.name, rest, parent=context)


def test_every_page_is_in_the_navigation() -> None:
    listed = {
        (DOCS / re.sub(r".*<(.+)>", r"\1", line.strip()))
        for tree in re.findall(
            r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL
        )
        for line in tree.splitlines()
        if line.strip() and not line.startswith(":")
    }
    assert {page.with_suffix("") for page in PAGES} == listed | {DOCS / "index"}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(FENCE.sub("", text_of(page))):
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{page.name}: there is no {path}"
        assert not anchor or anchor in anchors(aim), f"{page.name}: {path or 'it'} has no heading #{anchor}"


@pytest.mark.parametrize(
    "page",
    [DOCS / "quickstart.md", DOCS / "faq.md", *sorted((DOCS / "tasks").glob("*.md"))],
    ids=lambda page: page.stem,
)
def test_commands_that_are_shown_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    commands = list(shown_commands(page))
    assert commands
    for command in commands:
        typed = shlex.split(command, comments=True)[1:]
        words = [name for word in typed for name in (sorted(glob(word)) if "*" in word else [word])]
        try:
            parse(words)
        except click.MissingParameter:  # a command that is only mentioned
            assert len(words) == 1, command
        except click.exceptions.Exit:  # --help, --version
            pass
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {command}: {error.format_message()}")


@pytest.mark.parametrize("name", ["robustness.md", "tasks/is_my_method_robust.md"])
def test_entries_are_where_the_next_commands_look_for_them(name: str) -> None:
    shown = [shlex.split(line, comments=True)[1:] for line in shown_commands(DOCS / name)]
    made = next(
        words[words.index("--out") + 1] for words in shown if words[0] == "robustness" and "--out" in words
    )
    for verb in ("verify", "leaderboard"):
        assert next(words[1] for words in shown if words[0] == verb and len(words) > 1) == made


def test_printed_tables_are_no_wider_than_the_styles_know() -> None:
    widest = max(
        len(line)
        for page in DOCS.rglob("*.md")
        for block in re.findall(r"^```\w*\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if re.fullmatch(r"[- ]*---[- ]*", line)
    )
    assert 145 < widest <= 172


def test_notebooks_are_committed_without_output() -> None:
    cells = [
        cell
        for page in PAGES
        if page.suffix == ".ipynb"
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert cells
    assert not list(itertools.chain.from_iterable(cell["outputs"] for cell in cells))
    assert {cell["execution_count"] for cell in cells} == {None}


def test_completion_in_a_shell_reads_no_method() -> None:
    """The names of methods need PyTorch, which takes seconds: too long for the tab key."""
    option = next(p for p in main.commands["attack"].params if p.name == "methods")
    context = click.Context(main.commands["attack"], resilient_parsing=True)
    assert option.type.convert("no_such_method", option, context) == ("no_such_method",)
    with pytest.raises(click.BadParameter):
        option.type.convert("no_such_method", option, click.Context(main.commands["attack"]))


def test_what_a_package_index_shows_has_no_relative_link() -> None:
    text = INDEX.read_text(encoding="utf-8")
    assert 'readme = "docs/package_index.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([^)]*)\)", text)
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", text))
