"""Pictures: images beside the maps that explain them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from srd_lab.render.style import blank, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    Picture: TypeAlias = np.ndarray | Tensor  # anything on the CPU that np.asarray takes

_COLOUR_MAP = "inferno"
_FRAME = "#bbbbbb"
_SCORED = 4  # the column of a picture grid under which the scores stand: the map of the adversarial image


@dataclass(frozen=True)
class PictureRow:
    """One attacked image in a ``picture_grid``.

    label : text beside the row.
    original, adversarial, target : (3, H, W) pixels in [0, 1]; target is the image whose map was aimed at,
        None where there was no such aim.
    map_original, map_adversarial, map_target : (H, W) raw maps, signed or not.
    scores : text below the maps, such as "to original: SSIM 0.31, PCC 0.42".
    """

    label: str
    original: Picture
    adversarial: Picture
    map_original: Picture
    map_adversarial: Picture
    map_target: Picture | None = None
    target: Picture | None = None
    scores: str = ""


def heat(saliency: Picture) -> np.ndarray:
    """Colours (H, W, 3) uint8 of a map (H, W) in [0, 1]; values outside are cut off.

    Example
    -------
    >>> heat(np.array([[0.0, 1.0]])).tolist()    # from black to light yellow
    [[[0, 0, 4], [252, 255, 164]]]
    """
    from matplotlib import colormaps

    colours = colormaps[_COLOUR_MAP](np.clip(np.asarray(saliency, dtype=np.float64), 0, 1))
    return np.round(255 * colours[..., :3]).astype(np.uint8)


def save_picture(file: IO[bytes], picture: np.ndarray) -> None:
    """Write colours (H, W, 3) uint8 as a PNG into an open file."""
    from PIL import Image

    Image.fromarray(picture).save(file, format="png")


def strength(saliency: Picture) -> np.ndarray:
    """Absolute value of a raw map (H, W) divided by its maximum, in [0, 1]; 0 where a pixel is zero or not finite.

    Example
    -------
    >>> strength(np.array([[-2.0, 1.0, np.nan]])).tolist()
    [[1.0, 0.5, 0.0]]
    """
    size = np.abs(np.nan_to_num(np.asarray(saliency, dtype=np.float64), nan=0, posinf=0, neginf=0))
    return size / (size.max(initial=0) or 1)


def picture_grid(rows: Sequence[PictureRow]) -> Figure:
    """A row per attacked image: both images, their magnified difference, the maps; the aim, if there was one.

    rows : at least one, with images and maps of one size.

    The difference has one factor for the whole grid; every map is shown as :func:`strength`.
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
    with style():
        figure = blank(size, layout="none")
        for i, row in enumerate(rows):
            y = size[1] - top - (i + 1) * cell[1] - i * below
            _side_label(figure, labels[i], 0.5 * left, y + 0.5 * cell[1])
            for j, (title, pictures) in enumerate(columns.items()):
                axes = axes_at(figure, left + j * (cell[0] + gap), y, *cell)
                axes.imshow(pictures[i], aspect="auto", interpolation="nearest")
                axes.set_title(title if i == 0 else "", fontsize=8)
                axes.set_xlabel(row.scores if j == _SCORED else "", fontsize=7, labelpad=2)
        _map_scale(figure, left + (_SCORED - 1) * (cell[0] + gap) + cell[0] / 2, 0.3, cell[0] + gap)
    return figure


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes without ticks, in a thin frame that shows where a white picture ends; inches from the lower left corner."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((x / across, y / up, width / across, height / up), xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=_FRAME, linewidth=0.4)
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
        "original": [pixels(row.original) for row in rows],
        "adversarial": [pixels(row.adversarial) for row in rows],
        f"difference × {factor}\n(grey = none)": [pixels(0.5 + factor * change) for change in changes],
        "map of\noriginal": [heat(strength(row.map_original)) for row in rows],
        "map of\nadversarial": [heat(strength(row.map_adversarial)) for row in rows],
    }
    blank = np.ones_like(columns["original"][0])
    if any(row.map_target is not None for row in rows):
        shown = [blank if row.map_target is None else heat(strength(row.map_target)) for row in rows]
        columns["target map"] = shown
    if any(row.target is not None for row in rows):
        columns["target image"] = [blank if row.target is None else pixels(row.target) for row in rows]
    return columns


def _magnification(largest: float) -> int:
    """The largest of 1, 2, 5, 10, ... 1000 that keeps ``largest`` within half the range of a pixel."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    return max((step for step in steps if step * largest <= 0.5), default=1) if largest else 1


def pixels(image: Picture) -> np.ndarray:
    """An image (3, H, W) as (H, W, 3) float64; values outside of [0, 1] are cut off."""
    return np.clip(np.moveaxis(np.asarray(image, dtype=np.float64), 0, -1), 0, 1)


def _wrapped(label: str, inches: float) -> str:
    return textwrap.fill(label, max(8, int(inches * 15)), break_long_words=False)


def _map_scale(figure: Figure, x: float, y: float, width: float) -> None:
    from matplotlib.cm import ScalarMappable

    axes = axes_at(figure, x, y, width, 0.08)
    colours = ScalarMappable(cmap=_COLOUR_MAP)
    bar: Any = figure.colorbar(colours, cax=axes, orientation="horizontal", ticks=[0, 1])
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=7, pad=2)
    axes.set_xlabel("|map| / its maximum", fontsize=7, labelpad=-6)


def signed(raw: Picture) -> np.ndarray:
    """A raw map (H, W) in [-1, 1]: divided by the absolute value that half a percent of its pixels exceed, and clipped.

    Pixels that are not finite are 0.
    """
    values = np.nan_to_num(np.asarray(raw, dtype=np.float64), nan=0, posinf=0, neginf=0)
    size = np.abs(values)
    return np.clip(values / (np.quantile(size, 0.995) or size.max() or 1), -1, 1)
