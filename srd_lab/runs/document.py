"""What a study reports: paragraphs and tables, as text for a terminal, Markdown, HTML, LaTeX or JSON.

Example
-------
>>> said = Document("Two methods", [Table(["method", "pcc"], [["srd", "0.9"]]), "pcc: 1 = unmoved."])
>>> print(said.text())
Two methods
<BLANKLINE>
method  pcc
------  ---
srd     0.9
<BLANKLINE>
pcc: 1 = unmoved.
>>> Document.from_json(said.to_json()) == said
True
"""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from srd_lab.errors import BadRun
from srd_lab.runs.report import text_table

_LATEX = {c: f"\\{c}" for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≥": r"$\ge$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "–": "--",
    "¹": r"$^1$",
    "²": r"$^2$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_IN_BRACKETS = re.compile(r"\[[^\]]*\]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")


@dataclass(frozen=True)
class Table:
    """Cells of text.

    header : of the columns. rows : each with as many cells as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return text_table(self.header, self.rows)

    def narrow(self, width: int) -> list[Table]:
        """The table in parts of at most ``width`` characters, as far as their columns allow it.

        Every part begins with the columns that name the rows: up to the one called "method" or "subject", else the first.
        """
        sizes = [max(len(row[i]) for row in (self.header, *self.rows)) + 2 for i in range(len(self.header))]
        if sum(sizes) - 2 <= width:
            return [self]
        named = next((i for i, name in enumerate(self.header[:3]) if name in ("method", "subject")), 0) + 1
        parts, left = [list[int]()], width - sum(sizes[:named]) + 2
        for i in range(named, len(sizes)):
            if parts[-1] and sizes[i] > left:
                parts, left = [*parts, []], width - sum(sizes[:named]) + 2
            parts[-1].append(i)
            left -= sizes[i]
        return [self._of([*range(named), *part]) for part in parts]

    def _of(self, columns: Sequence[int]) -> Table:
        return Table([self.header[i] for i in columns], [[row[i] for i in columns] for row in self.rows])


Block = str | Table


@dataclass(frozen=True)
class Document:
    """A report.

    title : one line, what was measured on what. blocks : paragraphs and tables, in order; empty ones are left out.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = [block.strip("\n") if isinstance(block, str) else block for block in self.blocks]
        object.__setattr__(self, "blocks", [block for block in kept if block])

    def text(self, width: int = 0) -> str:
        """As the terminal has it.

        width : characters of a line: longer ones are broken, and the columns of a wider table stand in parts below each
            other, each with the names of the rows. A cell alone may be wider. 0 = as wide as it is.
        """
        if not width:
            return "\n\n".join(map(str, [self.title, *self.blocks]))
        parts = [self.title, *self.blocks]
        return "\n\n".join(
            _filled(part, width) if isinstance(part, str) else "\n\n".join(map(str, part.narrow(width)))
            for part in parts
        )

    def markdown(self) -> str:
        """With tables of GitHub's kind."""

        def table(one: Table) -> str:
            rule = ["---", *["---:"] * (len(one.header) - 1)]
            return "\n".join(
                f"| {' | '.join(line)} |" for line in [_escaped(one.header), rule, *map(_escaped, one.rows)]
            )

        return self._written(
            f"### {_markdown(self.title)}", table, lambda said: "  \n".join(map(_markdown, _lines(said)))
        )

    def html(self) -> str:
        """A part of a page, from ``<h2>`` on."""

        def table(one: Table) -> str:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in one.header)
            body = "".join(
                f"<tr>{''.join(f'<td>{_breakable(cell.strip())}</td>' for cell in row)}</tr>"
                for row in one.rows
            )
            return (
                f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            )

        def paragraph(said: str) -> str:
            return f"<p>{'<br>'.join(map(html.escape, _lines(said)))}</p>"

        return self._written(f"<h2>{html.escape(self.title)}</h2>", table, paragraph)

    def latex(self) -> str:
        """Tables for ``\\usepackage{booktabs}``, which the first line says; paragraphs stand as comments."""

        def table(one: Table) -> str:
            lines = [" & ".join(map(_latex, row)) + r" \\" for row in one.rows]
            body = "\n".join([" & ".join(map(_latex, one.header)) + r" \\", r"\midrule", *lines])
            return f"\\begin{{tabular}}{{l{'r' * (len(one.header) - 1)}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}"

        needs = "% needs \\usepackage{booktabs} in the preamble\n"
        return self._written(f"{needs}% {self.title}", table, lambda said: "% " + said.replace("\n", "\n% "))

    def to_json(self) -> str:
        """To be read by :meth:`from_json`."""
        blocks = [block if isinstance(block, str) else asdict(block) for block in self.blocks]
        return json.dumps({"title": self.title, "blocks": blocks}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Document:
        """What :meth:`to_json` has written. Raises BadRun for anything else."""
        try:
            found = json.loads(text)
            blocks = [block if isinstance(block, str) else _table_of(block) for block in found["blocks"]]
            return cls(str(found["title"]), blocks)
        except (ValueError, KeyError, TypeError) as error:
            raise BadRun(f"the stored report is damaged ({error!r})") from None

    def _written(self, title: str, table: Callable[[Table], str], paragraph: Callable[[str], str]) -> str:
        parts = [paragraph(block) if isinstance(block, str) else table(block) for block in self.blocks]
        return "\n\n".join([title, *parts])


def _filled(said: str, width: int) -> str:
    """A paragraph with its longer lines broken at spaces; what goes on is indented like the line, and a little more."""
    lines: list[str] = []
    wide = max(map(len, said.splitlines()), default=0) > width
    for line in _lines(said) if wide else said.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        more = indent + ("  " if indent else "")
        wrapper = textwrap.TextWrapper(
            width, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
        )
        lines += wrapper.wrap(line) or [""]
    return "\n".join(lines)


def _lines(said: str) -> list[str]:
    """The lines of a paragraph, less the line ends that only keep it narrow: those within a sentence or list."""
    lines: list[str] = []
    for line in said.strip("\n").splitlines():
        if lines and line and not line.startswith(" ") and not lines[-1].rstrip().endswith((".", ":", ";")):
            lines[-1] = f"{lines[-1].rstrip()} {line}"
        else:
            lines.append(line)
    return lines


def _breakable(cell: str) -> str:
    """A cell as HTML in which ``0.398 [0.198, 0.592]`` is broken before the bracket alone."""
    return _IN_BRACKETS.sub(r'<span class="whole">\g<0></span>', html.escape(cell))


def _table_of(found: dict[str, Any]) -> Table:
    header, rows = found["header"], found["rows"]
    if not all(isinstance(cell, str) for row in [header, *rows] for cell in row):
        raise ValueError("a cell that is no text")
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row of another length")
    return Table(header, rows)


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _escaped(cells: Sequence[str]) -> list[str]:
    return [_markdown(cell.strip()) for cell in cells]


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(c, c) for c in cell.strip())
