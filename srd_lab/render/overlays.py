"""A map over its photograph, which stays visible: coloured by strength, or with lines around the strongest part."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from srd_lab.errors import BadValue
from srd_lab.render.pictures import axes_at, pixels, signed
from srd_lab.render.style import blank, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srd_lab.render.pictures import Picture

OVERLAYS = ("heat", "contour")
SHARE = 0.5
FOR, AGAINST = (0.86, 0.06, 0.1), (0.08, 0.32, 0.95)  # red and blue, bright enough for dark photographs
_UNSIGNED = "autumn_r"  # from yellow to red
_MOST = 0.8  # of the colour where a map is strongest: the photograph is seen even there
_SIDE = 2.3  # inches of a square photograph
_BLUR = (
    1 / 64
)  # of the longer side: what a contour averages over, so that lines do not run around single pixels


def overlay(
    image: Picture,
    saliency: Picture,
    how: str = "heat",
    share: float = SHARE,
    blur: float | None = None,
) -> np.ndarray:
    """A map over its image, as (H, W, 3) uint8; where the map is 0 or not finite, the image is untouched.

    image : (3, H, W) pixels in [0, 1]. saliency : (H, W) raw map, signed or not, shown as :func:`signed`.
    how : "heat" colours by strength: a map with negative values red (for the class) and blue (against it), another from
        yellow to red; "contour" colours the edge of what :func:`strongest` gives of the map after a Gaussian filter.
    share : of the relevance that the contour encloses, in (0, 1]. blur : standard deviation of that filter in pixels, >= 0,
        without which lines would run around single pixels of a fine map; None = 1/64 of the longer side.

    Raises BadValue for another ``how``, a share out of range, and a map of another size than the image.
    """
    values, picture = _checked(image, saliency, how), 255 * pixels(image)
    colours, alpha = _colours(values), _alpha(values)
    if how == "contour":
        alpha = np.zeros_like(values)
        for part in _parts(saliency, share, blur):
            alpha[part & ~_inner(part)] = 1
        colours = _colours(np.sign(values))
    mixed = picture + alpha[..., None] * (255 * colours - picture)
    return np.round(mixed).astype(np.uint8)


def strongest(saliency: Picture, share: float = SHARE) -> np.ndarray:
    """The pixels, bool (H, W), that hold ``share`` of the relevance: the fewest with the largest |values|, and their equals.

    saliency : (H, W) raw map, signed or not; what is not finite counts as 0. share : in (0, 1]; BadValue for another.

    Example
    -------
    >>> strongest(np.array([[4.0, -3.0, 2.0, 1.0]]), share=0.7).tolist()    # 7 of 10
    [[True, True, False, False]]
    """
    if not 0 < share <= 1:
        raise BadValue(f"the share of the relevance is in (0, 1], got {share}")
    size = np.abs(np.nan_to_num(np.asarray(saliency, dtype=np.float64), nan=0, posinf=0, neginf=0))
    falling = np.sort(size, axis=None)[::-1]
    held = falling.cumsum()
    enough = np.searchsorted(held, share * held[-1] * (1 - 1e-12)) if len(held) else 0
    return (size >= falling[enough]) & (size > 0) if len(held) else np.zeros(size.shape, dtype=bool)


def edges(mask: Picture) -> np.ndarray:
    """Lines along the border of a mask, (K, 2, 2) as (line, end, x and y), in the coordinates of ``imshow``.

    mask : bool (H, W). Every line is one side of a pixel that is inside, with a pixel outside, or none, on its other side.
    """
    inside = np.pad(np.asarray(mask, dtype=bool), 1)
    rows, columns = np.nonzero(inside[1:, :] != inside[:-1, :])  # horizontal sides
    lying = np.stack([columns - 1.5, rows - 0.5, columns - 0.5, rows - 0.5], axis=1)
    rows, columns = np.nonzero(inside[:, 1:] != inside[:, :-1])
    upright = np.stack([columns - 0.5, rows - 1.5, columns - 0.5, rows - 0.5], axis=1)
    return np.concatenate([lying, upright]).reshape(-1, 2, 2)


def draw_edges(axes: Axes, mask: Picture, colour: Any = "white") -> None:
    """Draw the border of a mask, bool (H, W), over an image: thin, with the opposite beside it, so that it is seen on dark
    and on light."""
    from matplotlib.collections import LineCollection

    lines: Any = edges(mask)
    beside = "black" if colour == "white" else "white"
    for own, width in ((beside, 2.0), (colour, 0.9)):
        axes.add_collection(LineCollection(lines, colors=[own], linewidths=width, capstyle="projecting"))


def explanation(
    image: Picture,
    saliency: Picture,
    method: str,
    about: str = "",
    how: str = "heat",
    share: float = SHARE,
) -> Figure:
    """A small figure: the photograph, the map over it, and in words what was explained and what the colours mean.

    image, saliency, how, share : as for :func:`overlay`, whose errors it has. method : its title.
    about : the class that is explained and its probability.
    """
    values = _checked(image, saliency, how)
    height, width = values.shape
    wide = float(np.clip(_SIDE * (width / height) ** 0.5, 0.8, 4.2))
    cell = (wide, float(np.clip(wide * height / width, 0.5, 4.2)))
    across = max(3.6, 2 * cell[0] + 0.4)
    heads = [*textwrap.wrap(method, int(11 * across)), *textwrap.wrap(about, int(12.5 * across))]
    top, bottom = 0.12 + 0.17 * len(heads), 0.72
    size = (across, top + 0.06 + cell[1] + bottom)
    with style():
        figure = blank(size, layout="none")
        for i, line in enumerate(heads):
            figure.text(
                0.5, 1 - (0.09 + 0.17 * i) / size[1], line,
                ha="center", va="top", fontsize=8 if i else 9, parse_math=False,
            )  # fmt: skip
        left = (across - 2 * cell[0] - 0.1) / 2
        for x, shown in ((left, pixels(image)), (left + cell[0] + 0.1, _shown(image, saliency, how, share))):
            axes = axes_at(figure, x, bottom, *cell)
            axes.imshow(shown, interpolation="nearest")
        if how == "contour":
            for part, colour in zip(_parts(saliency, share), (FOR, AGAINST), strict=True):
                draw_edges(axes, part, colour)
        _key(figure, values, how, share)
    return figure


def _shown(image: Picture, saliency: Picture, how: str, share: float) -> np.ndarray:
    """The photograph with colours; lines are drawn over it, as fine as the figure allows."""
    return pixels(image) if how == "contour" else overlay(image, saliency, how, share)


def _key(figure: Figure, values: np.ndarray, how: str, share: float) -> None:
    """What the colours mean: a bar with words at its ends, or words alone."""
    across, up = figure.get_size_inches()
    against = bool((values < 0).any())
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    if not values.any():
        figure.text(0.5, 0.36 / up, "The map is zero everywhere: nothing is marked.", **words)
        return
    if how == "contour":
        blurred = max(1, round(_BLUR * max(values.shape)))
        said = (
            f"Lines enclose the strongest places (map smoothed by {blurred} px): {share:.0%} of the relevance"
        )
        said += "; red: for the class, blue: against it." if against else "."
        figure.text(0.5, 0.36 / up, textwrap.fill(said, int(15 * across)), **words)
        return
    ends = ("against the class", "for the class") if against else ("none", "strongest")
    ramp = np.linspace(-1 if against else 0, 1, 256)[None]
    axes = axes_at(figure, across / 2 - 0.75, 0.42, 1.5, 0.11)
    axes.imshow(overlay(np.full((3, 1, 256), 0.75), ramp), aspect="auto")
    for x, end, side in ((-0.82, ends[0], "right"), (0.82, ends[1], "left")):
        figure.text(0.5 + x / across, 0.475 / up, end, **words | {"ha": side})
    full = "full colour: what half a percent of the pixels exceed; no colour: 0"
    figure.text(0.5, 0.2 / up, full, **words)


def _checked(image: Picture, saliency: Picture, how: str) -> np.ndarray:
    """The map (H, W) in [-1, 1]."""
    if how not in OVERLAYS:
        raise BadValue(f"there is no overlay {how!r}; choose of {', '.join(OVERLAYS)}")
    values, shape = signed(saliency), np.shape(image)
    if len(shape) != 3 or shape[0] != 3 or values.shape != shape[1:]:
        raise BadValue(
            f"expected an image (3, H, W) and a map (H, W) of its size, got {shape} and {values.shape}; "
            "srd_lab.maps.prepared stretches a map"
        )
    return values


def _colours(values: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) in [0, 1] of a map (H, W) in [-1, 1], the same at every strength where it has a sign."""
    from matplotlib import colormaps

    if (values < 0).any():
        return np.where(values[..., None] > 0, FOR, AGAINST)
    return np.asarray(colormaps[_UNSIGNED](values)[..., :3])


def _alpha(values: np.ndarray) -> np.ndarray:
    """How much of the colour is laid over the image, (H, W) in [0, 1]; 0 where the map is."""
    return _MOST * np.abs(values)


def _parts(saliency: Picture, share: float, blur: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What the contour encloses: where it is for the class, and where against it; bool (H, W) each."""
    from scipy.ndimage import gaussian_filter

    raw = np.nan_to_num(np.asarray(saliency, dtype=np.float64), nan=0, posinf=0, neginf=0)
    smooth = gaussian_filter(raw, _BLUR * max(raw.shape) if blur is None else blur) if raw.any() else raw
    inside = strongest(smooth, share)
    return inside & (smooth > 0), inside & (smooth < 0)


def _inner(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) whose four neighbours are in it; beyond the image there are none."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
