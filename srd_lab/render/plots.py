"""Plots of scores."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from srd_lab.render.pictures import PictureRow, heat, pixels, strength
from srd_lab.render.style import COLOURS, GREY, MARKERS, SLANTED, blank, key, shortened, style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_UPRIGHT = 11  # letters of a line that stand below one box
_NAME = 32  # letters of a name below an axis
_PERTURBATIONS = {
    "mse": "MSE of the image (normalised units)",
    "linf": "largest change of a pixel (0..255)",
}


def box_plots(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    control: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    title: str = "",
) -> Figure:
    """A panel per metric, a box with its points per method; beside it, paler, the control.

    scores, control : method -> metric ("ssim", "pcc") -> one value per pair (P,); NaN is left out. control=None draws none.
    title : of the figure.
    """
    metrics = list(next(iter(scores.values())))
    with style():
        figure = blank((max(5.2, 1.4 + 1.4 * len(scores)), 3.6 if _fit_upright(list(scores)) else 4.6))
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            shift = 0.19 if control else 0.0
            _boxes(axes, [scores[method][metric] for method in scores], -shift, pale=False)
            if control:
                _boxes(axes, [control[method][metric] for method in scores], shift, pale=True)
            _method_ticks(axes, list(scores))
            _score_axis(axes, metric)
        title_of(figure, title)
        _box_key(figure, bool(control))
    return figure


def _boxes(axes: Axes, groups: Sequence[np.ndarray], shift: float, *, pale: bool) -> None:
    """Boxes around x = 0, 1, ... shifted; whiskers reach the farthest point within 1.5 box heights."""
    jitter = np.random.default_rng(0)
    for i, group in enumerate(groups):
        values = np.asarray(group, dtype=np.float64)
        values = values[np.isfinite(values)]
        colour = COLOURS[i % len(COLOURS)]
        spread = 0.09 * jitter.uniform(-1, 1, len(values))
        axes.scatter(i + shift + spread, values, s=4, color=colour, alpha=0.25 if pale else 0.6, linewidths=0)
        line = {"color": GREY if pale else "black", "linewidth": 0.8}
        axes.boxplot(
            [values], positions=[i + shift], widths=0.3, showfliers=False, patch_artist=True,
            boxprops={**line, "facecolor": colour, "alpha": 0.12 if pale else 0.4},
            medianprops=line | {"linewidth": 1.4}, whiskerprops=line, capprops=line, manage_ticks=False,
        )  # fmt: skip


def _box_key(figure: Figure | SubFigure, with_control: bool) -> None:
    caption = "Point: one image or pair; box: the middle half; line in it: median; whiskers: farthest within 1.5 boxes."
    if with_control:
        caption += " Full colour, left: attack; pale, right: control, random noise of the same size."
    key(figure, caption)


def _fit_upright(methods: Sequence[str]) -> bool:
    return max(len(line) for name in methods for line in _broken(name).split("\n")) <= _UPRIGHT


def _broken(method: str) -> str:
    return method.replace("_", "_\n")


def _method_ticks(axes: Axes, methods: Sequence[str]) -> None:
    """Names below the axis: upright in lines that end at underscores, or slanted where these are too long for that."""
    if _fit_upright(methods):
        axes.set_xticks(range(len(methods)), [_broken(name) for name in methods])
    else:
        axes.set_xticks(range(len(methods)), [shortened(name, _NAME) for name in methods], **SLANTED)
    axes.set_xlim(-0.6, len(methods) - 0.4)


def _score_axis(axes: Axes, name: str) -> None:
    from matplotlib.ticker import MultipleLocator

    lowest = min(axes.dataLim.y0, 0.0) if np.isfinite(axes.dataLim.y0) else 0.0
    axes.set_ylim(np.floor(10 * lowest) / 10 - 0.02, 1.02)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.set_ylabel(name.replace("_", ", ").replace("ssim", "SSIM").replace("pcc", "PCC"))
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    if lowest < 0:
        axes.axhline(0, color=GREY, linewidth=0.6)


def perturbation(
    over: str,
    reached: np.ndarray,
    pairs: np.ndarray,
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]],
    title: str = "",
) -> Figure:
    """Similarity over the size of the perturbation, a panel per score: median and interquartile band per method.

    over : ``mse`` (normalised units) or ``linf`` (units of 0..255).
    reached, pairs : (S,) values of ``over``, and how many pairs stand behind each (shown below).
    panels : score -> method -> (median, lower, upper), each (S,). title : of the figure.
    """
    with style():
        figure = blank((1.2 + 3.4 * len(panels), 4.3))
        rows = figure.subplots(2, len(panels), sharex="col", squeeze=False, height_ratios=(5, 1))
        for axes, below, (score, bands) in zip(*rows, panels.items(), strict=True):
            for i, (method, (median, low, high)) in enumerate(bands.items()):
                colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
                axes.fill_between(reached, low, high, color=colour, alpha=0.12, linewidth=0)
                (line,) = axes.plot(reached, median, color=colour, label=method)
                line.set(marker=marker, markersize=4, markevery=max(1, len(median) // 8))
            _score_axis(axes, score)
            below.step(reached, pairs, where="post", color=GREY)
            below.set_ylim(0, 1.15 * pairs.max(initial=1))
            below.set_ylabel("pairs")
            below.set_xlabel(_PERTURBATIONS[over])
        title_of(figure, title)
        caption = "Line: median of the pairs; band: their middle half; below: how many pairs came so far."
        key(figure, caption, *figure.axes[0].get_legend_handles_labels())
    return figure


def manipulation_figure(
    shown: Mapping[str, Sequence[PictureRow]],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    title: str = "",
) -> Figure:
    """Fig. 4 of the paper: above, one pair through every method; below, boxes of SSIM and of PCC.

    shown : method -> its attacked pairs, of which the first is drawn.
    scores : method -> score ("ssim", "pcc") -> (P,). title : of the figure.
    """
    methods = list(shown)
    with style():
        figure = blank((max(4.6, 1.5 + 1.25 * len(methods)), 7.8))
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        above, below = parts
        bare: dict[str, Any] = {"xticks": [], "yticks": []}
        grid = above.subplots(3, 1 + len(methods), squeeze=False, subplot_kw=bare)
        for axes in grid.flat:
            axes.spines[:].set_visible(False)
        first = shown[methods[0]][0]
        for axes, image in zip(grid[:, 0], (first.original, first.adversarial, first.target), strict=True):
            if image is not None:
                axes.imshow(pixels(image), interpolation="nearest")
        for axes, name in zip(grid[:, 0], ("original", "manipulated", "target"), strict=True):
            axes.set_ylabel(name)
        grid[0, 0].set_title(f"image\n({_title(methods[0])})", fontsize=7, parse_math=False)
        for j, method in enumerate(methods, 1):
            row = shown[method][0]
            for axes, raw in zip(
                grid[:, j], (row.map_original, row.map_adversarial, row.map_target), strict=True
            ):
                if raw is not None:
                    axes.imshow(heat(strength(raw)), interpolation="nearest")
            grid[0, j].set_title(_title(method), fontsize=7, parse_math=False)
            grid[1, j].set_xlabel(row.scores.splitlines()[0].replace(", ", "\n"), fontsize=6)
        panels = below.subplots(1, 2)
        for axes, score in zip(panels, ("ssim", "pcc"), strict=True):
            _boxes(axes, [scores[method][score] for method in methods], 0.0, pale=False)
            axes.set_xticks(range(len(methods)), [shortened(name, _NAME) for name in methods], **SLANTED)
            axes.tick_params(axis="x", labelsize=7)
            axes.set_xlim(-0.6, len(methods) - 0.4)
            _score_axis(axes, score)
        title_of(figure, title)
        _box_key(below, with_control=False)
    return figure


def _title(method: str) -> str:
    """A method's name above a map: at most three short lines."""
    return "\n".join(textwrap.wrap(shortened(method, 40).replace("_", " "), 16)[:3])


def rank_chart(ranks: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """A row per method, a column per metric, a cell for its rank; the best methods on top by their mean rank.

    ranks : metric -> method -> rank, 1 = best; a method may lack one. title : of the figure.
    """
    methods = list(dict.fromkeys(method for own in ranks.values() for method in own))
    grid = np.array([[own.get(method, np.nan) for own in ranks.values()] for method in methods])
    mean = np.nanmean(grid, axis=1)
    order = np.argsort(mean, kind="stable")
    with style():
        names = [shortened(methods[i], _NAME) for i in order]
        width = max(4.2, 1.2 + 0.06 * max(map(len, names)) + 0.5 * (len(ranks) + 1))
        figure = blank((width, 2.2 + 0.24 * len(methods)))
        axes = figure.subplots()
        shown = np.column_stack([mean[order], grid[order]])
        axes.imshow(shown, cmap="YlGnBu_r", vmin=1, vmax=len(methods), aspect="auto")
        for (i, j), rank in np.ndenumerate(shown):
            if np.isfinite(rank):
                colour = "white" if rank - 1 <= 0.45 * (len(methods) - 1) else "black"
                text = f"{rank:.1f}" if j == 0 else f"{rank:g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.axvline(0.5, color="white", linewidth=3)
        axes.set_yticks(range(len(methods)), names)
        metrics = [shortened(metric, _NAME) for metric in ranks]
        axes.set_xticks(range(len(ranks) + 1), ["mean rank", *metrics], **SLANTED)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        title_of(figure, title)
        key(
            figure,
            "Number: rank by the mean score, 1 = best; darker is better. The best mean rank stands on top.",
        )
    return figure
