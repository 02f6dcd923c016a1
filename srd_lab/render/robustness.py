"""Figures of the robustness study: what every attack reached, and the worst case over the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from srd_lab.render.style import COLOURS, GREY, MARKERS, SLANTED, blank, key, shortened, style, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = 40  # letters of a method's name
_UNITS = {
    "l2": "budget: root mean square of the change (0..255)",
    "linf": "budget: largest change of a pixel (0..255)",
    "legacy": "budget: a multiple of MSE 1e-3 (normalised) and 8/255",
}


def member_heat(
    reached: Mapping[str, Mapping[str, float]], attacks: Sequence[str], title: str = ""
) -> Figure:
    """A row per method, a column per attack, a cell for the mean PCC that it left; dark = broken.

    reached : method -> attack -> mean PCC in [-1, 1]; a method may lack one.
    attacks : the columns; those whose name ends with a star ran on few images. title : of the figure.
    """
    grid = np.array([[own.get(name, np.nan) for name in attacks] for own in reached.values()])
    with style():
        names = [shortened(name, _NAME) for name in reached]
        width = max(4.2, 1.4 + 0.06 * max(map(len, names)) + 0.55 * len(attacks))
        figure = blank((width, 1.8 + 0.05 * max(map(len, attacks)) + 0.28 * len(reached)))
        axes = figure.subplots()
        axes.imshow(grid, cmap="YlGnBu_r", vmin=-0.5, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if value < 0.25 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(len(reached)), names)
        axes.set_xticks(range(len(attacks)), attacks, **SLANTED)
        starred = "; * on the first images only" if any(name.endswith("*") for name in attacks) else ""
        axes.set_xlabel("attack")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        title_of(figure, title)
        key(figure, f"Number: mean PCC that the attack leaves (1 = unmoved), darker is less{starred}.")
    return figure


def budget_curves(
    curves: Mapping[str, Mapping[float, tuple[float, float, float]]], norm: str, title: str = ""
) -> Figure:
    """Worst PCC over the budget, a line per method: the mean over images, and a band of its 95 % interval.

    curves : method -> budget -> (mean, low, high), ascending; low and high may be NaN: no band.
    norm : "l2", "linf" or "legacy", what the budget bounds. title : of the figure.
    """
    with style():
        figure = blank((5.6, 4.2))
        axes = figure.subplots()
        for i, (method, curve) in enumerate(curves.items()):
            mean, low, high = np.transpose(list(curve.values()))
            colour = COLOURS[i % len(COLOURS)]
            axes.fill_between(list(curve), low, high, color=colour, alpha=0.15, linewidth=0)
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(list(curve), mean, color=colour, marker=marker, markersize=4, label=method)
        axes.set_xscale("log", base=2)
        ticks = sorted({size for curve in curves.values() for size in curve})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(_UNITS[norm])
        axes.set_ylabel("worst PCC (1 = unmoved)")
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set_ylim(top=1.02)
        title_of(figure, title)
        caption = "Line: mean of the images' worst cases; band: its 95 % interval."
        key(figure, caption, *axes.get_legend_handles_labels())
    return figure
