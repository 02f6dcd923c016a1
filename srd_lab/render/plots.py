"""Plots of scores and accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from srd_lab.render.pictures import PictureRow, heat, pixels, strength
from srd_lab.render.style import COLOURS, GREY, MARKERS, blank, style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SLANTED: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
_PERTURBATIONS = {
    "mse": "MSE of the image (normalised units)",
    "linf": "largest change of a pixel (0..255)",
}
_SETTINGS = {"original": "ordinary pass", "apop": "APOP", "apop_relu": "APOP & ReLU"}


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
        figure = blank((max(5.2, 1.4 + 1.3 * len(scores)), 3.2))
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            shift = 0.19 if control else 0.0
            _boxes(axes, [scores[method][metric] for method in scores], -shift, pale=False)
            if control:
                _boxes(axes, [control[method][metric] for method in scores], shift, pale=True)
            _method_ticks(axes, list(scores))
            _score_axis(axes, metric)
        if control:
            _box_legend(figure)
        title_of(figure, title)
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


def _box_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=GREY, alpha=0.5), Patch(facecolor=GREY, alpha=0.15)]
    labels = ["attack", "control: random noise of equal MSE"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _method_ticks(axes: Axes, methods: Sequence[str]) -> None:
    axes.set_xticks(range(len(methods)), [name.replace("_", "_\n") for name in methods])
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


def apop_bars(
    table: Mapping[tuple[str, str], float], original: float, chance: float, title: str = ""
) -> Figure:
    """Accuracy per input (a group) and setting (a bar).

    table : (input, setting) -> accuracy in [0, 1]; settings "original", "apop", "apop_relu".
    original, chance : accuracies in [0, 1] of the untouched network on the real images, and of guessing.
    title : of the figure.
    """
    inputs = list(dict.fromkeys(key[0] for key in table))
    settings = list(dict.fromkeys(key[1] for key in table))
    width = 0.8 / len(settings)
    with style():
        figure = blank((max(4.2, 1.6 + 1.2 * len(inputs)), 3.2))
        axes = figure.subplots()
        for k, setting in enumerate(settings):
            there = [i for i, name in enumerate(inputs) if (name, setting) in table]
            heights = [table[inputs[i], setting] for i in there]
            places = [i + (k - (len(settings) - 1) / 2) * width for i in there]
            label = _SETTINGS.get(setting, setting)
            bars = axes.bar(places, heights, 0.92 * width, color=COLOURS[k % len(COLOURS)], label=label)
            axes.bar_label(bars, [f"{100 * height:.1f}" for height in heights], fontsize=7, padding=1)
        axes.set_xticks(range(len(inputs)), inputs)
        axes.set_xlabel("input of the replay")
        _accuracy_axis(axes, original, chance)
        _finish(figure, title)
    return figure


def binarisation_curve(
    names: Sequence[str], accuracy: Sequence[float], original: float, chance: float, title: str = ""
) -> Figure:
    """Accuracy in [0, 1] when one activation call gives 1 where it is positive, else 0; each call in turn.

    names, accuracy : (L,) in call order.
    original, chance : accuracies in [0, 1] of the untouched network, and of guessing. title : of the figure.
    """
    with style():
        figure = blank((min(9.0, max(4.6, 1.5 + 0.28 * len(names))), 3.4))
        axes = figure.subplots()
        calls = range(1, len(names) + 1)
        (line,) = axes.plot(calls, accuracy, color=COLOURS[0], label="this call binarised")
        line.set(marker="o", markersize=3.5)
        if len(names) <= 24:
            axes.set_xticks(calls, names, fontsize=7, **_SLANTED)
        axes.set_xlabel("activation call, in order")
        axes.set_xlim(0.4, len(names) + 0.6)
        _accuracy_axis(axes, original, chance)
        _finish(figure, title)
    return figure


def binarisation_panels(
    panels: Mapping[str, tuple[Sequence[float], float]], chance: float, title: str = ""
) -> Figure:
    """:func:`binarisation_curve` of several networks side by side.

    panels : network -> (accuracy per activation call, accuracy of the untouched network), in [0, 1].
    chance : accuracy of guessing. title : of the figure.
    """
    with style():
        figure = blank((1.0 + 2.6 * len(panels), 3.2))
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, (accuracy, original)) in zip(row, panels.items(), strict=True):
            calls = range(1, len(accuracy) + 1)
            (line,) = axes.plot(calls, accuracy, color=COLOURS[0], label="this call binarised")
            line.set(marker="o", markersize=3)
            axes.axhline(original, color=GREY, linewidth=1, label="real activations", zorder=0)
            axes.axhline(
                chance, color=GREY, linewidth=1, linestyle="--", label=f"chance ({chance:.1%})", zorder=0
            )
            axes.set(title=name, xlabel="activation call, in order", ylim=(0, 1.02))
        row[0].set_ylabel("top-1 accuracy")
        _finish(figure, title)
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
        figure = blank((1.2 + 3.4 * len(panels), 4.0))
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
        _finish(figure, title)
    return figure


def _finish(figure: Figure, title: str) -> None:
    title_of(figure, title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


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
        figure = blank((1.5 + 1.25 * len(methods), 7.4))
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
        grid[0, 0].set_title(f"image\n({methods[0]})", fontsize=7)
        for j, method in enumerate(methods, 1):
            row = shown[method][0]
            for axes, raw in zip(
                grid[:, j], (row.map_original, row.map_adversarial, row.map_target), strict=True
            ):
                if raw is not None:
                    axes.imshow(heat(strength(raw)), interpolation="nearest")
            grid[0, j].set_title(method.replace("_", " "), fontsize=7, wrap=True)
            grid[1, j].set_xlabel(row.scores.splitlines()[0].replace(", ", "\n"), fontsize=6)
        panels = below.subplots(1, 2)
        for axes, score in zip(panels, ("ssim", "pcc"), strict=True):
            _boxes(axes, [scores[method][score] for method in methods], 0.0, pale=False)
            _method_ticks(axes, methods)
            axes.tick_params(axis="x", labelsize=6, rotation=25)
            _score_axis(axes, score)
        title_of(figure, title)
    return figure


def rank_chart(ranks: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """A row per method, a column per metric, a cell for its rank; the best methods on top by their mean rank.

    ranks : metric -> method -> rank, 1 = best; a method may lack one. title : of the figure.
    """
    methods = list(dict.fromkeys(method for own in ranks.values() for method in own))
    grid = np.array([[own.get(method, np.nan) for own in ranks.values()] for method in methods])
    mean = np.nanmean(grid, axis=1)
    order = np.argsort(mean, kind="stable")
    with style():
        figure = blank((2.2 + 0.5 * (len(ranks) + 1), 1.6 + 0.24 * len(methods)))
        axes = figure.subplots()
        shown = np.column_stack([mean[order], grid[order]])
        axes.imshow(shown, cmap="YlGnBu_r", vmin=1, vmax=len(methods), aspect="auto")
        for (i, j), rank in np.ndenumerate(shown):
            if np.isfinite(rank):
                colour = "white" if rank < 0.45 * len(methods) else "black"
                text = f"{rank:.1f}" if j == 0 else f"{rank:g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.axvline(0.5, color="white", linewidth=3)
        axes.set_yticks(range(len(methods)), [methods[i] for i in order])
        axes.set_xticks(range(len(ranks) + 1), ["mean rank", *ranks], **_SLANTED)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        title_of(figure, title)
    return figure
