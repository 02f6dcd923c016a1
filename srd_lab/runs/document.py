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

    def text(self) -> str:
        """As the terminal has it."""
        return "\n\n".join(map(str, [self.title, *self.blocks]))

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
                f"<tr>{''.join(f'<td>{html.escape(cell.strip())}</td>' for cell in row)}</tr>"
                for row in one.rows
            )
            return (
                f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            )

        def paragraph(said: str) -> str:
            return f"<p>{'<br>'.join(map(html.escape, _lines(said)))}</p>"

        return self._written(f"<h2>{html.escape(self.title)}</h2>", table, paragraph)

    def latex(self) -> str:
        """Tables for ``\\usepackage{booktabs}``; paragraphs stand as comments."""

        def table(one: Table) -> str:
            lines = [" & ".join(map(_latex, row)) + r" \\" for row in one.rows]
            body = "\n".join([" & ".join(map(_latex, one.header)) + r" \\", r"\midrule", *lines])
            return f"\\begin{{tabular}}{{l{'r' * (len(one.header) - 1)}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}"

        return self._written(f"% {self.title}", table, lambda said: "% " + said.replace("\n", "\n% "))

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


def _lines(said: str) -> list[str]:
    """The lines of a paragraph, less the line ends that only keep it narrow: those within a sentence or list."""
    lines: list[str] = []
    for line in said.strip("\n").splitlines():
        if lines and line and not line.startswith(" ") and not lines[-1].rstrip().endswith((".", ":", ";")):
            lines[-1] = f"{lines[-1].rstrip()} {line}"
        else:
            lines.append(line)
    return lines


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
