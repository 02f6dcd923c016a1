"""What all figures have in common: colours, style, blank pages, titles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX"
GREY = "#555555"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DPI = 150


def title_of(figure: Figure, title: str) -> None:
    """Put ``title`` over the figure, wrapped to its width."""
    figure.suptitle(textwrap.fill(title, int(14 * figure.get_figwidth())), fontsize=9)


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
