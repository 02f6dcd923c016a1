"""Progress, and tables as text and CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar of ``total`` steps on stderr, silent where that is not a terminal; gives ``advance(n)``."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of left-aligned first and right-aligned other columns, every row with as many cells as the header.

    Example
    -------
    >>> print(text_table(["method", "pcc"], [["srd", "0.9"]]))
    method  pcc
    ------  ---
    srd     0.9
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV, the keys of the first in the first line.

    Example
    -------
    >>> print(csv_text([{"name": "a,b", "pcc": 0.5}]), end="")
    name,pcc
    "a,b",0.5
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
