"""Plots of accuracies: from activation patterns alone, and with activation calls binarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from srd_lab.render.style import COLOURS, GREY, SLANTED, blank, key, shortened, style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SETTINGS = {"original": "ordinary pass", "apop": "APOP", "apop_relu": "APOP & ReLU"}
_NAMED = 24  # activation calls, up to which each has its name
_NAME = 30  # characters of it


def apop_bars(
    table: Mapping[tuple[str, str], tuple[float, float, float]],
    original: float,
    chance: float,
    title: str = "",
) -> Figure:
    """Accuracy per input (a group) and setting (a bar), with its interval; below each bar its height in percent.

    table : (input, setting) -> accuracy and the ends of its 95 % Wilson interval, in [0, 1]; NaN for both ends = none.
        Settings are "original", "apop", "apop_relu".
    original, chance : accuracies in [0, 1] of the untouched network on the real images, and of guessing.
    title : of the figure.
    """
    inputs = list(dict.fromkeys(name for name, _ in table))
    settings = list(dict.fromkeys(setting for _, setting in table))
    width = 0.8 / len(settings)
    with style():
        figure = blank((max(4.2, 1.6 + 0.6 * len(settings) * len(inputs)), 3.4))
        axes = figure.subplots()
        below = axes.get_xaxis_transform()
        for k, setting in enumerate(settings):
            there = [i for i, name in enumerate(inputs) if (name, setting) in table]
            found = np.array([table[inputs[i], setting] for i in there], dtype=float).reshape(-1, 3)
            places = np.array([i + (k - (len(settings) - 1) / 2) * width for i in there])
            label = _SETTINGS.get(setting, setting)
            axes.bar(places, found[:, 0], 0.92 * width, color=COLOURS[k % len(COLOURS)], label=label)
            axes.vlines(places, found[:, 1], found[:, 2], color="black", linewidth=1.2)
            for x, accuracy in zip(places, found[:, 0], strict=True):
                shown: dict[str, Any] = {"ha": "center", "va": "top"}
                axes.text(x, -0.02, f"{100 * accuracy:.1f}", transform=below, fontsize=7, **shown)
        axes.set_xticks(range(len(inputs)), inputs)
        axes.tick_params(axis="x", length=0, pad=14)
        axes.set_xlabel("input of the replay")
        _accuracy_axis(axes, original, chance)
        bars = "Bar and number: accuracy in %"
        lines = "; black line: its 95 % Wilson interval" if np.isfinite(list(table.values())).all() else ""
        _finish(figure, title, f"{bars}{lines}.")
    return figure


def binarisation_curve(
    names: Sequence[str],
    accuracy: Sequence[float],
    original: float,
    chance: float,
    title: str = "",
    ends: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Accuracy in [0, 1] when one activation call gives 1 where it is positive, else 0; each call in turn.

    names, accuracy : (L,) in call order.
    original, chance : accuracies in [0, 1] of the untouched network, and of guessing. title : of the figure.
    ends : (L,) of the 95 % Wilson intervals of the accuracies; () = none are drawn.
    """
    with style():
        shown = [shortened(name, _NAME) for name in names] if len(names) <= _NAMED else []
        slanted = 0.04 * max(map(len, shown), default=0)  # inches that the names take below the axis
        figure = blank((min(9.0, max(4.6, 1.5 + 0.28 * len(names))), 3.2 + slanted))
        axes = figure.subplots()
        calls = range(1, len(names) + 1)
        (line,) = axes.plot(calls, accuracy, color=COLOURS[0], label="this call binarised")
        line.set(marker="o", markersize=3.5)
        if len(ends):
            low, high = np.transpose(ends)
            axes.vlines(calls, low, high, color=COLOURS[0], alpha=0.45, linewidth=2)
        if shown:
            axes.set_xticks(calls, shown, fontsize=7, **SLANTED)
        axes.set_xlabel("activation call, in order")
        axes.set_xlim(0.4, len(names) + 0.6)
        _accuracy_axis(axes, original, chance)
        bars = "; pale bar: its 95 % Wilson interval" if len(ends) else ""
        _finish(figure, title, f"Point: accuracy with this call alone binarised{bars}.")
    return figure


def binarisation_panels(
    panels: Mapping[str, tuple[Sequence[float], float]], chance: float, title: str = ""
) -> Figure:
    """:func:`binarisation_curve` of several networks side by side.

    panels : network -> (accuracy per activation call, accuracy of the untouched network), in [0, 1].
    chance : accuracy of guessing. title : of the figure.
    """
    with style():
        figure = blank((1.0 + 2.6 * len(panels), 3.4))
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, (accuracy, original)) in zip(row, panels.items(), strict=True):
            calls = range(1, len(accuracy) + 1)
            (line,) = axes.plot(calls, accuracy, color=COLOURS[0], label="this call binarised")
            line.set(marker="o", markersize=3)
            axes.axhline(original, color=GREY, linewidth=1, label="real activations", zorder=0)
            axes.axhline(
                chance, color=GREY, linewidth=1, linestyle="--", label=f"chance ({chance:.1%})", zorder=0
            )
            axes.set(title=shortened(name, 28), xlabel="activation call, in order", ylim=(0, 1.02))
        row[0].set_ylabel("top-1 accuracy")
        _finish(figure, title, "Point: accuracy with this call alone binarised.")
    return figure


def _accuracy_axis(axes: Axes, original: float, chance: float) -> None:
    from matplotlib.ticker import PercentFormatter

    for height, name, dashes in ((original, "real images", "-"), (chance, "chance", "--")):
        label = f"{name} ({100 * height:.1f} %)"
        axes.axhline(height, color=GREY, linewidth=1, linestyle=dashes, label=label, zorder=0)
    axes.set_ylim(0, 1.06)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("top-1 accuracy")


def _finish(figure: Figure, title: str, caption: str) -> None:
    title_of(figure, title)
    key(figure, caption, *figure.axes[0].get_legend_handles_labels())
