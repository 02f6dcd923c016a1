"""Pictures and figures: the only room that draws.

Every figure function returns a ``matplotlib.figure.Figure`` that stands alone (no pyplot state, no
display needed); ``figure.savefig(path)`` or ``Run.save_figure`` writes it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    Picture: TypeAlias = np.ndarray | Tensor  # anything on the CPU that np.asarray takes

_COLOUR_MAP = "inferno"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_MARKERS = "osD^vP"
_GREY = "#555555"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SLANTED: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
_DPI = 150
_SCORED = 4  # the column of a picture grid under which the scores stand: the map of the adversarial image
_SETTINGS = {"original": "ordinary pass", "apop": "APOP", "apop_relu": "APOP & ReLU"}


@dataclass(frozen=True)
class PictureRow:
    """One attacked image in a ``picture_grid``.

    original, adversarial, target : (3, H, W) pixels in [0, 1]; target is the image whose map was aimed at.
    map_original, map_adversarial, map_target : (H, W) raw maps, signed or not.
    scores : text below the maps, such as "to original: SSIM 0.31, PCC 0.42".
    """

    label: str
    original: Picture
    adversarial: Picture
    map_original: Picture
    map_adversarial: Picture
    map_target: Picture
    target: Picture | None = None
    scores: str = ""


def heat(saliency: Picture) -> np.ndarray:
    """Colours (H, W, 3) uint8 of a map (H, W) in [0, 1]."""
    from matplotlib import colormaps

    colours = colormaps[_COLOUR_MAP](np.clip(np.asarray(saliency, dtype=np.float64), 0, 1))
    return np.round(255 * colours[..., :3]).astype(np.uint8)


def overlay(image: Picture, saliency: Picture) -> np.ndarray:
    """The map (H, W) in [0, 1] over its image (3, H, W) in [0, 1], greyed: (H, W, 3) uint8."""
    grey = np.clip(np.asarray(image, dtype=np.float64).mean(axis=0), 0, 1)[..., None]
    return np.round(0.4 * 255 * grey + 0.6 * heat(saliency)).astype(np.uint8)


def strength(saliency: Picture) -> np.ndarray:
    """Absolute value of a raw map (H, W) divided by its maximum; zero where the map is zero or not finite."""
    size = np.abs(np.nan_to_num(np.asarray(saliency, dtype=np.float64), nan=0, posinf=0, neginf=0))
    return size / (size.max(initial=0) or 1)


def picture_grid(rows: Sequence[PictureRow]) -> Figure:
    """A row per attacked image: both images, their magnified difference, the three maps, the aim.

    The difference has one factor for the whole grid; every map is shown as ``strength``.
    """
    columns = _columns(rows)
    height, width = np.asarray(rows[0].original).shape[-2:]
    cell = (1.35, 1.35 * height / width)
    lines = max(len(row.scores.splitlines()) for row in rows)
    below = 0.08 + 0.15 * lines
    labels = [_wrapped(row.label, cell[1]) for row in rows]
    left = 0.2 + 0.14 * max(len(label.splitlines()) for label in labels)
    top, bottom, gap = 0.42, 0.5, 0.06
    size = (left + len(columns) * (cell[0] + gap), top + len(rows) * (cell[1] + below) + bottom)
    with _style():
        figure = _blank(size, layout="none")
        for i, row in enumerate(rows):
            y = size[1] - top - (i + 1) * cell[1] - i * below
            _side_label(figure, labels[i], 0.5 * left, y + 0.5 * cell[1])
            for j, (title, pictures) in enumerate(columns.items()):
                axes = _axes_at(figure, left + j * (cell[0] + gap), y, *cell)
                axes.imshow(pictures[i], aspect="auto", interpolation="nearest")
                axes.set_title(title if i == 0 else "", fontsize=8)
                axes.set_xlabel(row.scores if j == _SCORED else "", fontsize=7, labelpad=2)
        _map_scale(figure, left + _SCORED * (cell[0] + gap), 0.3, cell[0] + gap)
    return figure


def _axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes without ticks or frame; inches from the lower left corner."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((x / across, y / up, width / across, height / up), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _side_label(figure: Figure, label: str, x: float, y: float) -> None:
    across, up = figure.get_size_inches()
    centred: dict[str, Any] = {"ha": "center", "va": "center", "multialignment": "center"}
    figure.text(x / across, y / up, label, rotation=90, parse_math=False, **centred)


def _columns(rows: Sequence[PictureRow]) -> dict[str, list[np.ndarray]]:
    """Column title -> one (H, W, 3) picture per row."""
    changes = [np.asarray(row.adversarial, float) - np.asarray(row.original, float) for row in rows]
    factor = _magnification(max(float(np.abs(change).max(initial=0)) for change in changes))
    columns = {
        "original": [_pixels(row.original) for row in rows],
        "adversarial": [_pixels(row.adversarial) for row in rows],
        f"difference × {factor}\n(grey = none)": [_pixels(0.5 + factor * change) for change in changes],
        "map of\noriginal": [heat(strength(row.map_original)) for row in rows],
        "map of\nadversarial": [heat(strength(row.map_adversarial)) for row in rows],
        "target map": [heat(strength(row.map_target)) for row in rows],
    }
    if any(row.target is not None for row in rows):
        blank = np.ones_like(columns["original"][0])
        columns["target image"] = [blank if row.target is None else _pixels(row.target) for row in rows]
    return columns


def _magnification(largest: float) -> int:
    """The largest of 1, 2, 5, 10, ... 1000 that keeps ``largest`` within half the range of a pixel."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    return max((step for step in steps if step * largest <= 0.5), default=1) if largest else 1


def _pixels(image: Picture) -> np.ndarray:
    return np.clip(np.moveaxis(np.asarray(image, dtype=np.float64), 0, -1), 0, 1)


def _wrapped(label: str, inches: float) -> str:
    return textwrap.fill(label, max(8, int(inches * 15)), break_long_words=False)


def _map_scale(figure: Figure, x: float, y: float, width: float) -> None:
    from matplotlib.cm import ScalarMappable

    axes = _axes_at(figure, x, y, width, 0.08)
    colours = ScalarMappable(cmap=_COLOUR_MAP)
    bar: Any = figure.colorbar(colours, cax=axes, orientation="horizontal", ticks=[0, 1])
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=7, pad=2)
    axes.set_xlabel("|map| / its maximum", fontsize=7, labelpad=-6)


def box_plots(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    control: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    title: str = "",
) -> Figure:
    """A panel per metric, a box with its points per method; beside it, paler, the control.

    scores, control : method -> metric ("ssim", "pcc") -> one value per pair (P,); NaN is left out.
    """
    metrics = list(next(iter(scores.values())))
    with _style():
        figure = _blank((max(5.2, 1.4 + 1.3 * len(scores)), 3.2))
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
        _title(figure, title)
    return figure


def _boxes(axes: Axes, groups: Sequence[np.ndarray], shift: float, *, pale: bool) -> None:
    """Boxes around x = 0, 1, ... shifted; whiskers reach the farthest point within 1.5 box heights."""
    jitter = np.random.default_rng(0)
    for i, group in enumerate(groups):
        values = np.asarray(group, dtype=np.float64)
        values = values[np.isfinite(values)]
        colour = _COLOURS[i % len(_COLOURS)]
        spread = 0.09 * jitter.uniform(-1, 1, len(values))
        axes.scatter(i + shift + spread, values, s=4, color=colour, alpha=0.25 if pale else 0.6, linewidths=0)
        line = {"color": _GREY if pale else "black", "linewidth": 0.8}
        axes.boxplot(
            [values], positions=[i + shift], widths=0.3, showfliers=False, patch_artist=True,
            boxprops={**line, "facecolor": colour, "alpha": 0.12 if pale else 0.4},
            medianprops=line | {"linewidth": 1.4}, whiskerprops=line, capprops=line, manage_ticks=False,
        )  # fmt: skip


def _box_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=_GREY, alpha=0.5), Patch(facecolor=_GREY, alpha=0.15)]
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
        axes.axhline(0, color=_GREY, linewidth=0.6)


def apop_bars(
    table: Mapping[tuple[str, str], float], original: float, chance: float, title: str = ""
) -> Figure:
    """Accuracy per input (a group) and setting (a bar).

    table : (input, setting) -> accuracy in [0, 1]; settings "original", "apop", "apop_relu".
    original, chance : accuracies of the untouched network on the real images, and of guessing.
    """
    inputs = list(dict.fromkeys(key[0] for key in table))
    settings = list(dict.fromkeys(key[1] for key in table))
    width = 0.8 / len(settings)
    with _style():
        figure = _blank((max(4.2, 1.6 + 1.2 * len(inputs)), 3.2))
        axes = figure.subplots()
        for k, setting in enumerate(settings):
            there = [i for i, name in enumerate(inputs) if (name, setting) in table]
            heights = [table[inputs[i], setting] for i in there]
            places = [i + (k - (len(settings) - 1) / 2) * width for i in there]
            label = _SETTINGS.get(setting, setting)
            bars = axes.bar(places, heights, 0.92 * width, color=_COLOURS[k % len(_COLOURS)], label=label)
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
    """
    with _style():
        figure = _blank((min(9.0, max(4.6, 1.5 + 0.28 * len(names))), 3.4))
        axes = figure.subplots()
        calls = range(1, len(names) + 1)
        (line,) = axes.plot(calls, accuracy, color=_COLOURS[0], label="this call binarised")
        line.set(marker="o", markersize=3.5)
        if len(names) <= 24:
            axes.set_xticks(calls, names, fontsize=7, **_SLANTED)
        axes.set_xlabel("activation call, in order")
        axes.set_xlim(0.4, len(names) + 0.6)
        _accuracy_axis(axes, original, chance)
        _finish(figure, title)
    return figure


def _accuracy_axis(axes: Axes, original: float, chance: float) -> None:
    from matplotlib.ticker import PercentFormatter

    for height, name, dashes in ((original, "real images", "-"), (chance, "chance", "--")):
        label = f"{name} ({100 * height:.1f} %)"
        axes.axhline(height, color=_GREY, linewidth=1, linestyle=dashes, label=label, zorder=0)
    axes.set_ylim(0, 1.06)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("top-1 accuracy")


def curves(
    traces: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    title: str = "",
    ylabel: str = "SSIM to the map of the original",
) -> Figure:
    """Similarity over the size of the manipulation: median line and interquartile band per method.

    traces : method -> (mse, median, low, high), each (S,).
    """
    with _style():
        figure = _blank((4.6, 3.4))
        axes = figure.subplots()
        for i, (method, (mse, median, low, high)) in enumerate(traces.items()):
            colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
            axes.fill_between(mse, low, high, color=colour, alpha=0.15, linewidth=0)
            every = max(1, len(mse) // 8)
            axes.plot(mse, median, color=colour, marker=marker, markersize=4, markevery=every, label=method)
        if any(np.any(np.asarray(trace[0]) > 0) for trace in traces.values()):
            axes.set_xscale("log", nonpositive="clip")
        axes.set_xlabel("MSE between original and adversarial image")
        _score_axis(axes, ylabel)
        _finish(figure, title)
    return figure


def _finish(figure: Figure, title: str) -> None:
    _title(figure, title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(textwrap.fill(title, int(14 * figure.get_figwidth())), fontsize=9)


def _blank(size: tuple[float, float], layout: Any = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=_DPI, layout=layout)


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield
