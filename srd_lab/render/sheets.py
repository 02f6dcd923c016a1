"""Contact sheets: images beside the maps that several methods or networks make of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from srd_lab.render.overlays import draw_edges
from srd_lab.render.pictures import axes_at, pixels, signed
from srd_lab.render.style import blank, shortened, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from srd_lab.render.pictures import Picture

ROWS = 30  # of a page: more are too tall to be opened and printed
_MAPS: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
_LABEL, _LINES = 18, 3  # characters of a line of a row's label, and lines of each of its parts
_NAME = 60  # characters of a column's name
_SCALE = "every map by its own scale; full colour: what half a percent of its pixels exceed"


@dataclass(frozen=True)
class SheetRow:
    """One image in a ``map_sheet`` or ``method_sheet``, and its maps.

    label : text beside the row; every line of it is shortened in the middle where it is long.
    image : (3, H, W) pixels in [0, 1]. maps : (H, W), raw and signed, by what made them.
    outline : bool (H, W), whose border is drawn on the image; None = none.
    """

    label: str
    image: Picture
    maps: Mapping[str, Picture]
    outline: Picture | None = None


def sheet_pages(rows: Sequence[SheetRow], most: int = ROWS) -> list[Sequence[SheetRow]]:
    """Rows (at least one) for one sheet each: as few and as equal as they can be with at most ``most`` on each."""
    pages = -(-len(rows) // most)
    ends = [round(k * len(rows) / pages) for k in range(pages + 1)]
    return [rows[first:last] for first, last in pairwise(ends)]


def map_sheet(blocks: Mapping[str, Sequence[SheetRow]], title: str = "") -> Figure:
    """A block of columns per network, a row per image: the image, then each of its maps, red > 0 > blue.

    blocks : network -> rows, whose maps have the same names within a block. title : of the figure.

    Maps are shown as :func:`signed`.
    """
    count = max(len(rows) for rows in blocks.values())
    columns: list[_Column] = []
    for block, rows in blocks.items():
        for j, name in enumerate(("image", *rows[0].maps)):
            cells = [_image(row) if j == 0 else _Cell(row.maps[name]) for row in rows]
            columns.append(_Column(f"{block}: image" if j == 0 else name, cells))
    longest = next(rows for rows in blocks.values() if len(rows) == count)
    return _sheet(columns, [row.label.rpartition("/")[2] for row in longest], title, "")


def method_sheet(rows: Sequence[SheetRow], title: str = "", outlined: str = "") -> Figure:
    """A row per image, a column per method: the image, then its maps, red > 0 > blue.

    rows : at least one, with a map at least; one without a map that others have stays white there. title : of the figure.
    outlined : what the rows' outlines are, in words; "" = there are none.

    Maps are shown as :func:`signed`.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.maps))
    columns = [_Column("image", [_image(row) for row in rows])]
    for name in names:
        columns.append(_Column(name, [_Cell(row.maps[name]) if name in row.maps else None for row in rows]))
    return _sheet(columns, [row.label for row in rows], title, outlined)


@dataclass(frozen=True)
class _Cell:
    shown: Picture
    is_image: bool = False
    outline: Picture | None = None


@dataclass(frozen=True)
class _Column:
    name: str
    cells: Sequence[_Cell | None]


def _image(row: SheetRow) -> _Cell:
    return _Cell(row.image, True, row.outline)


def _sheet(columns: Sequence[_Column], labels: Sequence[str], title: str, outlined: str) -> Figure:
    """Cells at fixed places: labels on the left, slanted names above, the title over them, the scale below."""
    names = [shortened(column.name, _NAME) for column in columns]
    cell = float(np.clip(6.5 / len(columns), 0.82, 1.7))
    texts = ["\n".join(_fitted(line) for line in label.splitlines()) for label in labels]
    left = 0.2 + 0.068 * max(len(line) for text in texts for line in [*text.splitlines(), ""])
    right = max(0.15, *(0.052 * len(n) - (len(names) - j - 0.35) * cell + 0.2 for j, n in enumerate(names)))
    width = max(3.4, left + cell * len(columns) + right)
    heads = textwrap.wrap(title, int(12.5 * width))
    stacked = [_stacked(name, int((cell - 0.1) / 0.068)) for name in names]
    upright = all(stacked)
    rows = max(len(lines) for lines in stacked)
    top = 0.14 + 0.19 * len(heads) + (0.06 + 0.14 * rows if upright else 0.22 + 0.042 * max(map(len, names)))
    below = _captions(width, outlined)
    bottom = 0.5 + 0.14 * len(below)
    lines = [0.125 * len(text.splitlines()) for text in texts]
    steps = np.maximum(cell, lines)  # a row is as high as its label
    size = (width, top + float(steps.sum()) + bottom)
    ups = size[1] - top - np.cumsum(steps)
    with style():
        figure = blank(size, layout="none")
        for up, step, text in zip(ups, steps, texts, strict=True):
            _write(
                figure, left - 0.07, up + step - cell / 2, text,
                ha="right", va="center", fontsize=7, multialignment="right",
            )  # fmt: skip
        for i, up in enumerate(ups + steps - cell):
            for j, column in enumerate(columns):
                if i < len(column.cells) and (shown := column.cells[i]) is not None:
                    _show(figure, shown, left + j * cell, up, cell - 0.04)
        for j, name in enumerate(["\n".join(lines) for lines in stacked] if upright else names):
            x = left + (j + (0.5 if upright else 0.35)) * cell
            how = {"ha": "center"} if upright else {"ha": "left", "rotation": 35}
            _write(figure, x, size[1] - top + 0.06, name, va="bottom", **how)
        for k, line in enumerate(heads):
            _write(figure, 0.1, size[1] - 0.1 - 0.19 * k, line, fontsize=9, va="top")
        _scale(figure, below)
    return figure


def _stacked(name: str, most: int) -> list[str]:
    """A column's name in at most three lines of ``most`` letters each; none where it does not fit."""
    lines = textwrap.wrap(name, max(1, most), break_long_words=False)
    return lines if len(lines) <= 3 and max(map(len, lines), default=0) <= most else []


def _show(figure: Figure, cell: _Cell, x: float, y: float, side: float) -> None:
    """An image or a map in a square of this side, in its own proportions; inches from the lower left corner."""
    axes = axes_at(figure, x, y, side, side)
    if cell.is_image:
        axes.imshow(pixels(cell.shown), interpolation="nearest")
        if cell.outline is not None:
            draw_edges(axes, cell.outline)
    else:
        axes.imshow(signed(cell.shown), interpolation="nearest", **_MAPS)


def _scale(figure: Figure, captions: Sequence[str]) -> None:
    """The colours of the maps in words, and lines below them."""
    across = figure.get_size_inches()[0]
    axes = axes_at(figure, across / 2 - 0.6, 0.14 + 0.14 * len(captions), 1.2, 0.1)
    axes.imshow(np.linspace(-1, 1, 256)[None], aspect="auto", **_MAPS)
    for x, end, side in ((-0.66, "against the class", "right"), (0.66, "for the class", "left")):
        _write(figure, across / 2 + x, 0.19 + 0.14 * len(captions), end, ha=side, va="center", fontsize=7)
    for k, line in enumerate(reversed(captions)):
        _write(figure, across / 2, 0.06 + 0.14 * k, line, ha="center", va="bottom", fontsize=7)


def _captions(width: float, outlined: str) -> list[str]:
    lines = [_SCALE, f"line on the images: {outlined}"] if outlined else [_SCALE]
    return [part for line in lines for part in textwrap.wrap(line, int(15 * width))]


def _fitted(line: str) -> str:
    short = shortened(" ".join(line.split()), _LABEL * _LINES)
    wrapped = textwrap.wrap(short, _LABEL)
    # broken at spaces it may take a line more: then it is broken anywhere
    return "\n".join(wrapped if len(wrapped) <= _LINES else re.findall(f".{{1,{_LABEL}}}", short))


def _write(figure: Figure, x: float, y: float, text: str, **how: Any) -> None:
    """A text at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    figure.text(x / across, y / up, text, parse_math=False, **how)
