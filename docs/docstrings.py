"""Lets the docstrings of this project, which are written to be read in the source, read well on a page.

Three habits of theirs are no reStructuredText: a paragraph of ``name : what it is`` becomes a list of definitions, a title
that is underlined becomes a rubric, and a table between ``|`` becomes a table. What stands in literals stays as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_NAMES = r"\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*"
_FIRST = re.compile(rf"({_NAMES}) : ")
_LATER = re.compile(rf"(?<=[.;)\]] )({_NAMES}) : ")
_LITERAL = re.compile(r"(``.+?``|:[\w:]+:`.+?`|`.+?`_?)", re.DOTALL)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A handler of ``autodoc-process-docstring``: changes ``lines`` in place."""
    known, shown, literal = _names_of(obj), [], False
    for block in _blocks(lines):
        indented = block[0].startswith("  ")
        if indented and not literal and not (shown and shown[-2].endswith("::")):  # a formula
            shown += ["::", ""]
        literal = indented
        shown += [*(block if literal else _shown(block, known)), ""]
    lines[:] = shown


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """The paragraphs."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _shown(block: list[str], known: set[str]) -> list[str]:
    first = block[0]
    if first.startswith((">>>", "===", "..")):  # an example, a table or a directive as it should be
        return block
    if len(block) > 1 and re.fullmatch(r"-{3,}", block[1]):
        return [f".. rubric:: {first}", *(["", *_shown(block[2:], known)] if block[2:] else [])]
    if all((line.startswith("| ") and line.endswith(" |")) or set(line) <= set("-|") for line in block):
        return _table(block)
    if _FIRST.match(first):
        return _definitions(block, known)
    return _escaped("\n".join(block)).split("\n")


def _definitions(block: list[str], known: set[str]) -> list[str]:
    """``name : text`` at the start of a line, and within one where the names are those of parameters."""
    entries: list[tuple[str, str]] = []
    for line in block:
        start = _FIRST.match(line)
        if not start:
            names, text = entries.pop()
            entries.append((names, f"{text} {line.strip()}"))
            continue
        entries.append((start[1], line[start.end() :]))
    shown = [".. container:: names", ""]
    for names, text in entries:
        while later := next((m for m in _LATER.finditer(text) if known.issuperset(_bare(m[1]))), None):
            shown += _definition(names, text[: later.start()])
            names, text = later[1], text[later.end() :]
        shown += _definition(names, text)
    return shown


def _definition(names: str, text: str) -> list[str]:
    return [
        f"    {', '.join(f'``{name}``' for name in names.split(', '))}",
        f"        {_escaped(re.sub(';$', '.', text.strip()))}",
    ]


def _table(block: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block]
    head, body = rows[0], [row for row in rows[1:] if not set("".join(row)) <= set("-: ")]
    shown = [".. list-table::", "    :header-rows: 1", ""]
    for row in (head, *body):
        shown += [f"    {'* -' if k == 0 else '  -'} {_escaped(cell)}" for k, cell in enumerate(row)]
    return shown


def _escaped(text: str) -> str:
    """Outside of literals and roles ``|map|`` is no substitution and ``name_`` no link."""
    parts = _LITERAL.split(text)
    return "".join(
        part if k % 2 else re.sub(r"\||(?<=\w)_(?!\w)", r"\\\g<0>", part) for k, part in enumerate(parts)
    )


def _names_of(obj: Any) -> set[str]:
    """Parameters, or fields and properties of a class."""
    names = {field.name for field in fields(obj)} if is_dataclass(obj) else set()
    if inspect.isclass(obj):
        names |= set(inspect.get_annotations(obj))
        names |= {name for name, _ in inspect.getmembers(obj, lambda member: isinstance(member, property))}
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(obj).parameters)
    return names


def _bare(names: str) -> list[str]:
    return [name.strip("* ") for name in names.split(",")]
