"""The default data set: textured objects over photographs, drawn on demand, with exact masks.

Ten silhouettes (``CLASSES``), each filled with stripes, checks, dots, a gradient or a photograph, lie at any
place, size and angle over a crop of one of the photographs inside the scikit-image wheel, among up to four
smaller distractors (blobs, bars and halves of shapes) which are no class. Light, colour, contrast and noise
vary. Nothing is downloaded, nothing is stored: image ``index`` follows from ``(seed, split, index)`` alone.

The splits share neither random streams nor background pixels: each photograph is cut into three vertical
bands (``BANDS``), the left half for ``train``, the next quarter for ``val`` and the right quarter for
``test``, before anything is cropped, scaled or used as a texture.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srd_lab.errors import BadData, BadValue
from srd_lab.types import Sample

SIZE = 64
LENGTHS = {"train": 20_000, "val": 2_000, "test": 2_000}
BANDS = {"train": (0.0, 0.5), "val": (0.5, 0.75), "test": (0.75, 1.0)}
STREAMS = {"train": 0, "val": 1, "test": 2}

# Of the stereo pair of the motorcycle only one eye: the other shows the same things further left,
# which would carry pixels of one split's band into the next.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)

Array = NDArray[np.floating[Any]]  # float32 throughout
Pixels = NDArray[np.uint8]
Distance = Callable[[Array, Array, float], Array]  # (u, v, radius) in pixels -> signed distance in pixels


# --- silhouettes: signed distances, negative inside, every shape inside the circle of its radius ----------


def _norm(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)


def _disc(u: Array, v: Array, r: float) -> Array:
    return _norm(u, v) - 0.86 * r


def _ring(u: Array, v: Array, r: float) -> Array:
    return np.abs(_norm(u, v) - 0.75 * r) - 0.22 * r


def _crescent(u: Array, v: Array, r: float) -> Array:
    return np.maximum(_norm(u, v) - 0.97 * r, 0.8 * r - _norm(u - 0.45 * r, v))


def _polygon_distance(u: Array, v: Array, corners: Array) -> Array:
    """Signed distance of the points ``u, v`` (h, w) to the polygon ``corners`` (E, 2), even-odd rule."""
    a = corners[:, :, None, None]
    b = np.roll(corners, -1, axis=0)[:, :, None, None]
    ex, ey = (b - a)[:, 0], (b - a)[:, 1]
    wx, wy = u - a[:, 0], v - a[:, 1]
    along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
    nearest = np.sqrt(((wx - along * ex) ** 2 + (wy - along * ey) ** 2).min(axis=0))
    spans = (wy >= 0) != (v >= b[:, 1])
    crossings = spans & ((wx * ey < wy * ex) == (ey > 0))
    return np.where(np.logical_xor.reduce(crossings, axis=0), -nearest, nearest)


def _polygon(*corners: tuple[float, float]) -> Distance:
    """The silhouette with these corners, in units of the radius."""
    unit = np.array(corners, dtype=np.float32)
    return lambda u, v, r: _polygon_distance(u, v, unit * np.float32(r))


def _star_corners() -> Iterator[tuple[float, float]]:
    for k in range(10):
        radius = 0.44 if k % 2 else 1.0
        yield radius * math.sin(k * math.pi / 5), -radius * math.cos(k * math.pi / 5)


def _heart_corners(count: int = 40) -> Iterator[tuple[float, float]]:
    """The usual heart curve, its notch up and its middle at the origin."""
    for k in range(count):
        t = 2 * math.pi * k / count
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        yield 16 * math.sin(t) ** 3 / 17.5, -(height + 1) / 17.5


_ARM, _END = 0.27, 0.92

SHAPES: dict[str, Distance] = {
    "disc": _disc,
    "ring": _ring,
    "square": _polygon((-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)),
    "triangle": _polygon((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    "star": _polygon(*_star_corners()),
    "cross": _polygon(
        *[(-_ARM, -_END), (_ARM, -_END), (_ARM, -_ARM), (_END, -_ARM), (_END, _ARM), (_ARM, _ARM)],
        *[(_ARM, _END), (-_ARM, _END), (-_ARM, _ARM), (-_END, _ARM), (-_END, -_ARM), (-_ARM, -_ARM)],
    ),
    "crescent": _crescent,
    "heart": _polygon(*_heart_corners()),
    "arrow": _polygon(
        (0, -1), (0.75, -0.15), (0.28, -0.15), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.15), (-0.75, -0.15)
    ),
    "hourglass": _polygon((-0.62, -0.78), (0.62, -0.78), (0.1, 0), (0.62, 0.78), (-0.62, 0.78), (-0.1, 0)),
}
CLASSES = list(SHAPES)


# --- distractors: nothing that could pass for a class -----------------------------------------------------


def _blob(u: Array, v: Array, r: float) -> Array:
    angle = np.arctan2(v, u)
    return _norm(u, v) - r * (0.62 + 0.28 * np.cos(2 * angle) + 0.1 * np.cos(3 * angle + 1))


def _bar(u: Array, v: Array, r: float) -> Array:
    return np.maximum(np.abs(u) - 0.95 * r, np.abs(v) - 0.28 * r)


def _half(shape: Distance) -> Distance:
    return lambda u, v, r: np.maximum(shape(u, v, r), -u)


DISTRACTORS: tuple[Distance, ...] = (
    _blob,
    _bar,
    _half(_disc),
    _half(_ring),
    _half(SHAPES["star"]),
    _half(SHAPES["cross"]),
    _half(SHAPES["heart"]),
)


# --- photographs ------------------------------------------------------------------------------------------


def _read_photograph(name: str) -> Pixels:
    """The photograph as (H, W, 3) uint8, from the files inside the scikit-image package."""
    import skimage
    from PIL import Image

    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise BadData(
            f"the photograph {name} is not in the installed scikit-image, whose wheel should hold it; "
            "reinstall it: pip install --force-reinstall scikit-image"
        )
    with Image.open(path) as photograph:
        return np.asarray(photograph.convert("RGB"))


def _pyramid(band: Pixels) -> Iterator[Pixels]:
    """``band`` (H, W, 3) at up to three scales, the finest at most 640 pixels high, none under 72 pixels."""
    from PIL import Image

    height, width = band.shape[:2]
    finest = min(1.0, 640 / height)
    for factor in (finest, finest / 1.6, finest / 2.5):
        shape = round(width * factor), round(height * factor)
        if min(shape) >= SIZE + 8:
            yield np.asarray(Image.fromarray(band).resize(shape, Image.Resampling.BILINEAR))


@lru_cache(maxsize=len(BANDS))
def _backgrounds(split: str) -> tuple[tuple[Pixels, ...], ...]:
    """For each photograph, the band of the split at several scales."""
    start, stop = BANDS[split]
    sources = []
    for name in PHOTOGRAPHS:
        photograph = _read_photograph(name)
        width = photograph.shape[1]
        sources.append(tuple(_pyramid(photograph[:, round(start * width) : round(stop * width)])))
    return tuple(sources)


def _crop(rng: np.random.Generator, split: str) -> Array:
    """A random (SIZE, SIZE, 3) piece of a random photograph of the split, mirrored or not, in [0, 1]."""
    sources = _backgrounds(split)
    scales = sources[rng.integers(len(sources))]
    scale = scales[rng.integers(len(scales))]
    top, left = rng.integers(scale.shape[0] - SIZE + 1), rng.integers(scale.shape[1] - SIZE + 1)
    piece = scale[top : top + SIZE, left : left + SIZE]
    return piece[:, :: 1 if rng.random() < 0.5 else -1].astype(np.float32) / np.float32(255)


# --- materials: what fills a silhouette -------------------------------------------------------------------


def _stripes(u: Array, v: Array, period: float) -> Array:
    return np.clip(0.5 + period / 3 * np.sin(u * (2 * math.pi / period)), 0, 1)


def _checks(u: Array, v: Array, period: float) -> Array:
    waves = np.sin(u * (math.pi / period)) * np.sin(v * (math.pi / period))
    return np.clip(0.5 + period / 2 * waves, 0, 1)


def _dots(u: Array, v: Array, period: float) -> Array:
    x, y = u / period - np.round(u / period), v / period - np.round(v / period)
    return np.clip(0.5 + period * (0.33 - _norm(x, y)), 0, 1)


def _gradient(u: Array, v: Array, period: float) -> Array:
    return np.clip(0.5 + u / (4 * period), 0, 1)


PATTERNS = (_stripes, _checks, _dots, _gradient)


def _colours(rng: np.random.Generator, around: Array) -> tuple[Array, Array]:
    """Two colours (3,) that stand out from the mean of the pixels ``around`` (h, w, 3)."""
    candidates = rng.random((10, 3), dtype=np.float32)
    distance = np.linalg.norm(candidates - around.mean(axis=(0, 1)), axis=1)
    # Capped: all that stand out are equal, and the first is taken, or every object would be garish.
    best = np.argsort(-np.minimum(distance, 0.5), kind="stable")
    return candidates[best[0]], candidates[best[1]]


def _material(
    rng: np.random.Generator, split: str, u: Array, v: Array, radius: float, around: Array
) -> Array:
    """The colours (h, w, 3) of a pattern or a photograph, in the object's own coordinates ``u, v`` (h, w)."""
    first, second = _colours(rng, around)
    kind = rng.integers(len(PATTERNS) + 1)
    period, angle = rng.uniform(4, 8), rng.uniform(0, math.pi)
    if kind == len(PATTERNS):
        piece = _crop(rng, split)[: u.shape[0], : u.shape[1]]
        return np.clip(first + 0.8 * (piece - piece.mean(axis=(0, 1))), 0, 1)
    along, across = _turn(u, v, angle)
    mix = PATTERNS[kind](along, across, period * radius / 18 if kind == 3 else period)[..., None]
    return first + mix * (second - first)


# --- drawing ----------------------------------------------------------------------------------------------


def _turn(u: Array, v: Array, angle: float) -> tuple[Array, Array]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * u + sine * v, cosine * v - sine * u


def _stamp(
    rng: np.random.Generator,
    split: str,
    canvas: Array,
    shape: Distance,
    place: tuple[float, float],
    radius: float,
) -> NDArray[np.bool_]:
    """Draws a filled silhouette into ``canvas`` (SIZE, SIZE, 3), anti-aliased; its mask (SIZE, SIZE)."""
    x, y = place
    rows = slice(max(0, math.floor(y - radius) - 1), min(SIZE, math.ceil(y + radius) + 1))
    columns = slice(max(0, math.floor(x - radius) - 1), min(SIZE, math.ceil(x + radius) + 1))
    dy, dx = np.mgrid[rows, columns].astype(np.float32) + np.float32(0.5)
    u, v = _turn(dx - np.float32(x), dy - np.float32(y), rng.uniform(0, 2 * math.pi))
    distance = shape(u, v, radius)
    cover = np.clip(0.5 - distance, 0, 1)
    view = canvas[rows, columns]
    rim = 1 - rng.uniform(0, 0.5) * np.exp(np.minimum(distance, 0) / (0.15 * radius))
    view += cover[..., None] * (_material(rng, split, u, v, radius, view) * rim[..., None] - view)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[rows, columns] = cover >= 0.5
    return mask


def _distract(rng: np.random.Generator, split: str, canvas: Array) -> None:
    for _ in range(rng.integers(1, 5)):
        shape = DISTRACTORS[rng.integers(len(DISTRACTORS))]
        place = rng.uniform(3, SIZE - 3), rng.uniform(3, SIZE - 3)
        _stamp(rng, split, canvas, shape, place, rng.uniform(4, 9))


def _background(rng: np.random.Generator, split: str) -> Array:
    canvas = _crop(rng, split) * rng.uniform(0.75, 1.2, 3).astype(np.float32)
    return np.clip(canvas + np.float32(rng.uniform(-0.1, 0.1)), 0, 1)


def _expose(rng: np.random.Generator, canvas: Array) -> Array:
    """Light from one side, contrast and sensor noise."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = 1 + strength * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
    lit = 0.5 + rng.uniform(0.7, 1.1) * (canvas * light[..., None] - 0.5)
    return lit + rng.uniform(0, 0.035) * rng.standard_normal(canvas.shape, dtype=np.float32)


class Scenes:
    """Pictures of one object each, (3, 64, 64) in steps of 1/255, with the mask of the object.

    split : "train", "val" or "test". seed : decides all pictures, >= 0.
    length : how many; None = 20,000, 2,000 and 2,000.

    Labels go round: ``index % 10``. The object lies wholly inside the picture and on top; its mask holds the pixels that it
    covers by half or more. Any order of access gives the same pictures, and a longer data set starts with
    the shorter one. Between machines a pixel may differ by one step, where their numerical libraries round
    differently.

    Raises BadValue on an unknown split, a negative seed or a length below 1, and BadData on access where scikit-image comes
    without its photographs.
    """

    def __init__(self, split: str = "test", *, seed: int = 0, length: int | None = None) -> None:
        if split not in LENGTHS:
            raise BadValue(f"scenes has no split {split!r}; choose one of {', '.join(LENGTHS)}")
        if seed < 0:
            raise BadValue(f"the seed of scenes is {seed}; give one that is 0 or more")
        if length is not None and length < 1:
            raise BadValue(f"scenes cannot hold {length} images; give a length of 1 or more")
        self.split, self.seed = split, seed
        self.classes = list(CLASSES)
        self.labels = torch.arange(length or LENGTHS[split]) % len(CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Scenes(split={self.split!r}, seed={self.seed}, length={len(self)})"

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[
            operator.index(index)
        ]  # negative ones count from the end; IndexError beyond it
        pixels, mask = self.render(index)
        image = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255).contiguous()
        return Sample(image, index % len(CLASSES), torch.from_numpy(mask), self.name(index))

    def name(self, index: int) -> str:
        """What picture ``index`` is called, ``scenes/test/17``; it is not drawn for that."""
        return f"scenes/{self.split}/{range(len(self))[operator.index(index)]}"

    def render(self, index: int) -> tuple[Pixels, NDArray[np.bool_]]:
        """Picture ``index`` as 8-bit pixels (64, 64, 3), and the mask of its object (64, 64) bool.

        Raises BadData where scikit-image comes without its photographs.
        """
        rng = np.random.default_rng((self.seed, STREAMS[self.split], index))
        canvas = _background(rng, self.split)
        _distract(rng, self.split, canvas)
        radius = rng.uniform(13, 25)
        place = rng.uniform(radius + 1, SIZE - radius - 1), rng.uniform(radius + 1, SIZE - radius - 1)
        mask = _stamp(rng, self.split, canvas, SHAPES[CLASSES[index % len(CLASSES)]], place, radius)
        pixels = np.clip(np.rint(255 * _expose(rng, canvas)), 0, 255).astype(np.uint8)
        return pixels, mask
