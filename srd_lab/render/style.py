"""What all figures have in common: colours, style, blank pages, titles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX"
GREY = "#555555"
SLANTED: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}  # labels below an axis
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DPI = 150


def title_of(figure: Figure, title: str) -> None:
    """Put ``title`` over the figure, wrapped to its width; the figure grows by what is more than a line."""
    lines = textwrap.wrap(title, max(12, int(13 * figure.get_figwidth())))
    figure.suptitle("\n".join(lines), fontsize=9, parse_math=False)
    _grow(figure, 0.16 * max(0, len(lines) - 1))


def key(
    figure: Figure | SubFigure,
    caption: str,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
    columns: int = 3,
) -> None:
    """Put below a figure what its marks mean: a line in words, and the legend.

    The figure grows by what is more than one line of each.

    caption : wrapped to the figure's width. handles, labels : (N,) of the legend; () = words alone.
    columns : of the legend at most; fewer where the labels, which are shortened, would leave the figure.
    """
    inches = figure.bbox.width / figure.dpi
    names = [shortened(label, int(10 * inches)) for label in labels]
    longest = max(map(len, names), default=0)
    across = max(1, min(columns, int(14 * inches // (longest + 6))))  # 6: the mark before each
    lines = textwrap.wrap(caption, max(12, int(15 * inches)))
    legend = figure.legend(
        *(handles, names),
        title="\n".join(lines),
        title_fontproperties={"size": 7},
        loc="outside lower center",
        ncols=across,
        frameon=False,
    )
    legend.get_title().set(multialignment="center", color=GREY, parse_math=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _grow(figure, 0.13 * max(0, len(lines) - 1) + 0.17 * max(0, -(-len(names) // across) - 1))


def _grow(figure: Figure | SubFigure, inches: float) -> None:
    whole: Any = figure.figure
    whole.set_figheight(whole.get_figheight() + inches)


def shortened(text: str, most: int) -> str:
    """``text``, or its beginning and end around an ellipsis where it is longer than ``most`` characters (>= 3).

    Example
    -------
    >>> shortened("ILSVRC2012_val_00000293.JPEG", 16)
    'ILSVRC2…293.JPEG'
    """
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[: most - end - 1]}…{text[-end:]}"


def blank(size: tuple[float, float], layout: Any = "constrained") -> Figure:
    """An empty figure.

    size : width and height in inches. layout : matplotlib's layout engine; "none" for axes that are placed by hand.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=_DPI, layout=layout)


@contextmanager
def style() -> Iterator[None]:
    """Within: matplotlib's settings are those of this project's figures."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield
