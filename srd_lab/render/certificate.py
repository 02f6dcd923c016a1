"""Attack and certificate on one axis: what an attack leaves of a map bounds its robustness from above, what is certified
from below, and the truth lies in between.

Example
-------
::

    figure = certificate_plot({"srd": (rms, worst)}, {"srd": (rms255(radii, values), share)}, values=3 * 224 * 224)
    figure.savefig("certificate.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from srd_lab.errors import BadValue
from srd_lab.render.style import COLOURS, GREY, MARKERS, blank, key, style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]


def certificate_plot(
    attacked: Mapping[str, Curve],
    certified: Mapping[str, Curve],
    values: int,
    score: str = "top-10 % that stays",
    title: str = "",
) -> Figure:
    """Worst score that an attack left, over its budget (lines with markers), and what is certified (areas), per method.

    attacked, certified : method -> (sizes, scores), each (S,), S >= 1: sizes ascending and >= 0, root mean squares of the
        change in units of 0..255 (:func:`attacks.certificates.rms255`), scores in [0, 1]; a method may lack either.
    values : C * H * W of an image, for the second axis: the L2 norm in units of pixels in [0, 1].
    score : what the vertical axis says. title : of the figure.

    The horizontal axis is logarithmic; a size of 0 is drawn at its left end.

    Raises BadValue for curves of another form, for ``values`` below 1, and where no curve has a size above 0.
    """
    for name, curve in (*attacked.items(), *certified.items()):
        _check_curve(name, *curve)
    if values < 1:
        raise BadValue(f"an image has C * H * W >= 1 values, got {values}")
    left, right = _ends([sizes for sizes, _ in (*attacked.values(), *certified.values())])
    methods = list(dict.fromkeys((*attacked, *certified)))
    with style():
        figure = blank((5.6, 3.9))
        axes = figure.subplots()
        axes.set(xscale="log", xlim=(left, right), ylim=(0, 1.02), ylabel=score)
        for i, method in enumerate(methods):
            colour = COLOURS[i % len(COLOURS)]
            if method in certified:
                _certified(axes, *certified[method], left, colour)
            if method in attacked:
                _attacked(axes, *attacked[method], left, colour, MARKERS[i % len(MARKERS)])
        _size_axes(axes, values)
        _legend(figure, methods)
        title_of(figure, title)
    return figure


def _certified(axes: Axes, sizes: np.ndarray, shares: np.ndarray, left: float, colour: str) -> None:
    """An area that falls in steps: what is certified up to a size says nothing of larger ones."""
    x, y = np.maximum(sizes, left), np.asarray(shares, dtype=float)
    x, y = np.r_[left, x, x[-1]], np.r_[y[0], y, 0.0]  # up to the first size, at least what holds there
    axes.fill_between(x, y, step="pre", color=colour, alpha=0.15, linewidth=0)
    axes.step(x, y, where="pre", color=colour, linestyle="--", linewidth=1.2)


def _attacked(
    axes: Axes, sizes: np.ndarray, scores: np.ndarray, left: float, colour: str, marker: str
) -> None:
    (line,) = axes.plot(np.maximum(sizes, left), scores, color=colour, linewidth=1.4)
    line.set(marker=marker, markersize=4, clip_on=False)


def _size_axes(axes: Axes, values: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    factor = np.sqrt(values) / 255
    above = axes.secondary_xaxis("top", functions=(lambda rms: rms * factor, lambda norm: norm / factor))
    axes.set_xlabel("RMS of the change (units of 0..255)")
    above.set_xlabel("its L2 norm (pixels in [0, 1])")
    above.spines["top"].set_visible(True)
    for axis in (axes.xaxis, above.xaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(LogLocator(subs="all"))
        axis.set_minor_formatter("")
        axis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)


def _legend(figure: Figure, methods: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=4)
        for i in range(len(methods))
    ]
    bounds = [
        Line2D([], [], color=GREY, marker="o", markersize=4),
        Patch(facecolor=GREY, alpha=0.2, edgecolor=GREY, linestyle="--"),
    ]
    names = [*methods, "upper bound: left by the attack", "lower bound: certified"]
    key(
        figure,
        "Means over the images; the truth lies between area and line.",
        [*handles, *bounds],
        names,
    )


def _ends(sizes: list[np.ndarray]) -> tuple[float, float]:
    """Ends of the axis: a little beyond the smallest and the largest size that is not 0."""
    positive = np.concatenate([np.asarray(own, dtype=float) for own in sizes] or [np.zeros(0)])
    positive = positive[positive > 0]
    if not len(positive):
        raise BadValue("nothing to draw: expected at least one curve with a size above 0")
    return float(positive.min()) / 1.3, float(positive.max()) * 1.1


def _check_curve(name: str, sizes: np.ndarray, scores: np.ndarray) -> None:
    x, y = np.asarray(sizes, dtype=float), np.asarray(scores, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise BadValue(f"{name}: expected as many sizes as scores, shape (S,), got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and (x >= 0).all() and (np.diff(x) > 0).all()):
        raise BadValue(f"{name}: sizes must be finite, >= 0 and ascending, got {x.tolist()}")
    if not ((y >= 0) & (y <= 1)).all():
        raise BadValue(f"{name}: scores must be in [0, 1], got {y.tolist()}")
