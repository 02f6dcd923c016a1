"""Runs beside each other: means with intervals, a panel per score."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from srd_lab.render.style import COLOURS, GREY, blank, key, style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND = re.compile(r"^(?:worst|noise|eq10)[ _]")
_ACROSS = 3  # panels in a row
_LABEL = 28  # characters of a line of a label
_TITLE = 24  # and of a panel's title


def score_intervals(
    scores: Mapping[str, Mapping[str, tuple[float, float, float]]], reference: str, title: str = ""
) -> Figure:
    """A panel per score, a line per subject: a point for the mean, a bar for its 95 % interval.

    Panels of one kind of score, such as ``worst PCC`` and ``noise PCC``, have the same axis, so that
    equal lengths are equal differences.

    scores : score -> subject -> (mean, low, high); low and high may be NaN. reference : the subject whose mean is drawn
        through as a dashed line. title : of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    subjects = list(next(iter(scores.values())))
    across = min(_ACROSS, len(scores))
    down = -(-len(scores) // across)
    labels = [textwrap.fill(name, _LABEL) for name in subjects]
    lines = sum(label.count("\n") + 1 for label in labels)
    with style():
        figure = blank((2.2 + 2.2 * across, 0.8 + down * (0.75 + 0.2 * lines)))
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        for axes in grid.flat[len(scores) :]:
            axes.set_visible(False)
        for axes, (score, own) in zip(grid.flat, scores.items(), strict=False):
            axes.axvline(own[reference][0], color=GREY, linestyle="--", linewidth=0.8)
            for i, name in enumerate(subjects):
                mean, low, high = own[name]
                colour = COLOURS[i % len(COLOURS)]
                if np.isfinite([low, high]).all():
                    axes.plot([low, high], [i, i], color=colour, linewidth=2, alpha=0.6)
                axes.plot(mean, i, "o", color=colour, markersize=5)
            axes.set_title(textwrap.fill(score, _TITLE), parse_math=False)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(x=0.08)
            axes.set_ylim(len(subjects) - 0.5, -0.5)
            axes.set_yticks(range(len(subjects)), labels)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.25, linewidth=0.5)
        _align(dict(zip(scores, grid.flat, strict=False)))
        title_of(figure, title)
        key(figure, f"Point: mean; line: its 95 % bootstrap interval; dashed: the mean of {reference}.")
    return figure


def _align(panels: Mapping[str, Axes]) -> None:
    """Give the panels of one kind of score the limits of all of them."""
    kinds: dict[str, list[Axes]] = {}
    for score, axes in panels.items():
        kinds.setdefault(_KIND.sub("", score), []).append(axes)
    for alike in kinds.values():
        ends = np.array([axes.get_xlim() for axes in alike])
        low, high = ends[:, 0].min(), ends[:, 1].max()
        for axes in alike:
            axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
