"""A report in every form says the same, and comes back from JSON as it was."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_lab.errors import BadRun
from srd_lab.runs.document import Document, Table

CELLS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=8)
TABLE = Table(
    ["method", "pcc", "pcc"], [["srd | 1", "0.9 [0.8, 1.0]¹ ", "<b>"], ["lrp_zplus", "50 %", "a & b"]]
)
REPORT = Document("Two methods_x", [TABLE, "", "a line that goes\non.\nsecond <line>", TABLE])


class _Cells(HTMLParser):
    """The text of every cell, row by row, and of every paragraph."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = "" if tag == self.open else self.open

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1] += data


def test_text_is_title_tables_and_paragraphs_with_a_blank_line_between() -> None:
    assert REPORT.text() == f"Two methods_x\n\n{TABLE}\n\na line that goes\non.\nsecond <line>\n\n{TABLE}"


def test_a_narrow_text_has_every_cell_and_no_long_line() -> None:
    header = ["rank", "method", *(f"score {k}" for k in range(9)), "flags"]
    rows = [[str(k), f"method{k}", *["0.398 [0.198, 0.592]"] * 9, "2"] for k in (1, 2)]
    said = "word " * 60 + "\n  indented: " + "more " * 40
    text = Document("A title " * 20, [Table(header, rows), said]).text(100)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.398 [0.198, 0.592]") == 18
    parts = [line.split() for line in text.splitlines() if line.startswith("rank")]
    assert all(part[:2] == ["rank", "method"] for part in parts)
    assert parts[-1][-1] == "flags"
    assert len(parts) > 1
    assert REPORT.text(100) == REPORT.text()  # what is narrow stays as it is


def test_html_breaks_a_cell_before_the_interval_alone() -> None:
    page = Document("t", [Table(["m"], [["0.9 [0.8, 1.0]"]])]).html()
    assert '<td>0.9 <span class="whole">[0.8, 1.0]</span></td>' in page


def test_latex_says_what_it_needs() -> None:
    assert REPORT.latex().startswith("% needs \\usepackage{booktabs} in the preamble\n% Two methods_x\n")


def test_html_shows_every_cell_and_runs_nothing() -> None:
    page = REPORT.html()
    expected = [list(TABLE.header), *([cell.strip() for cell in row] for row in TABLE.rows)]
    assert _Cells(page).rows == expected * 2
    assert "a line that goes on.<br>second &lt;line&gt;" in page
    assert "<b>" not in page


def test_markdown_escapes_what_would_end_a_cell_or_be_markup() -> None:
    lines = REPORT.markdown().splitlines()
    assert lines[0] == r"### Two methods\_x"
    assert lines[4] == r"| srd \| 1 | 0.9 \[0.8, 1.0\]¹ | \<b\> |"
    assert lines[5] == r"| lrp\_zplus | 50 % | a & b |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines if line.startswith("|"))


def test_latex_escapes_its_special_characters() -> None:
    said = REPORT.latex()
    assert r"lrp\_zplus & 50 \% & a \& b \\" in said
    assert r"\textless{}b\textgreater{}" in said
    assert "% second <line>" in said
    assert said.count(r"\toprule") == 2


@settings(max_examples=50, deadline=None)
@given(CELLS, st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=3), CELLS)
def test_json_gives_back_what_was_written(title: str, rows: list[list[str]], said: str) -> None:
    document = Document(title, [Table(["a", "b"], rows), said])
    assert Document.from_json(document.to_json()) == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"title": "a"}',
        '{"title": "a", "blocks": [1]}',
        '{"title": "a", "blocks": [{"header": ["x"], "rows": [["1", "2"]]}]}',
        '{"title": "a", "blocks": [{"header": ["x"], "rows": [[1]]}]}',
    ],
)
def test_a_damaged_report_is_one_line(text: str) -> None:
    with pytest.raises(BadRun, match="the stored report is damaged"):
        Document.from_json(text)
