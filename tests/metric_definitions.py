"""Every metric once more, one image, one pixel and one draw at a time, in pixels instead of normalised units: slow, literal,
and sharing nothing with :mod:`srd_lab.metrics` but the seeds. At the end, the toys that tests try them on. For tests only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter1d
from scipy.stats import pearsonr
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from srd_lab.metrics.explained import Explained, Images
from srd_lab.models import Classifier
from srd_lab.registry import EXPLAINERS, METRICS
from srd_lab.runtime import derived_seed, generator
from srd_lab.types import Explainer

Array = np.ndarray


class Subject:
    """Image ``i`` of a batch, its network and method, with nothing remembered."""

    def __init__(self, explained: Explained, i: int) -> None:
        images = explained.images
        self.model, self.explainer, self.key = images.model, explained.explainer, images.keys[i]
        self.x, self.target = images.x[i].double().numpy(), int(images.target[i])
        self.mask = None if images.masks is None else images.masks[i].numpy()
        self.mean, self.std = np.zeros((len(self.x), 1, 1)), np.ones((len(self.x), 1, 1))
        if isinstance(self.model, Classifier):  # where 0 and 1 of normalised units are, in pixels
            self.mean = self.model.normalise.mean[0].double().numpy()
            self.std = self.model.normalise.std[0].double().numpy()
        self.map = self.explain(self.x)

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[1], self.x.shape[2]

    def explain(self, x: Array, model: nn.Module | None = None) -> Array:
        raw = self.explainer.explain(model or self.model, torch.from_numpy(x)[None], self.target)
        return prepared(raw[0].double().numpy(), self.size)

    def logits(self, x: Array) -> Array:
        with torch.no_grad():
            return self.model(torch.from_numpy(x.copy())[None])[0].double().numpy()

    def drop(self, x: Array) -> float:
        """How far the logit falls when the image becomes x."""
        return float(self.logits(self.x)[self.target] - self.logits(x)[self.target])

    def probability(self, x: Array) -> float:
        odds = np.exp(self.logits(x) - self.logits(x).max())
        return float(odds[self.target] / odds.sum())

    def random(self, seed: int, *names: int | str) -> torch.Generator:
        return generator(seed, *names, self.key)


def prepared(raw: Array, size: tuple[int, int]) -> Array:
    """Divided by the largest absolute value, stretched by linear interpolation between the centres of pixels."""
    if not np.isfinite(raw).all():
        return np.full(size, np.nan)
    raw = raw / (np.abs(raw).max() or 1)
    result = np.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            total = 0.0
            for r, down in _between(row, size[0], raw.shape[0]):
                for c, across in _between(column, size[1], raw.shape[1]):
                    total += down * across * raw[r, c]
            result[row, column] = min(1.0, max(-1.0, total))
    return result


def _between(place: int, large: int, small: int) -> list[tuple[int, float]]:
    at = min(max((place + 0.5) * small / large - 0.5, 0), small - 1)
    first = int(at)
    return [(first, 1 - (at - first)), (min(first + 1, small - 1), at - first)]


# --- localisation and complexity ---------------------------------------------------------------------------------


def pointing_game(metric: Any, s: Subject) -> float:
    if s.mask is None or not s.mask.any() or not s.map.max() > 0:
        return np.nan
    distance = distance_transform_edt(~s.mask)
    places = [(r, c) for r, c in np.ndindex(s.size) if s.map[r, c] == s.map.max()]
    hits = [distance[place] <= metric.margin * min(s.size) / 224 for place in places]
    return sum(hits) / len(hits)


def attribution_localization(metric: Any, s: Subject) -> float:
    if s.mask is None or not s.mask.any() or not s.map.max() > 0:
        return np.nan
    inside = total = 0.0
    for place in np.ndindex(s.size):
        if s.map[place] > 0:
            total += s.map[place]
            inside += s.map[place] if s.mask[place] else 0
    return inside / total


def sparseness(metric: Any, s: Subject) -> float:
    v = sorted(np.abs(s.map).ravel().tolist())
    d, total = len(v), sum(v)
    return 1 - 2 * sum(v[k - 1] / total * (d - k + 0.5) / d for k in range(1, d + 1)) if total else np.nan


def roughness(metric: Any, s: Subject) -> float:
    (height, width), m = s.size, s.map
    edges = [(m[r, c], m[r + 1, c]) for r in range(height - 1) for c in range(width)]
    edges += [(m[r, c], m[r, c + 1]) for r in range(height) for c in range(width - 1)]
    variance = sum((v - m.mean()) ** 2 for v in m.ravel()) / (m.size - 1)
    return sum((a - b) ** 2 for a, b in edges) / (2 * len(edges)) / variance if variance > 1e-20 else np.nan


# --- faithfulness ------------------------------------------------------------------------------------------------


def fidelity(metric: Any, s: Subject) -> float:
    rng = np.random.default_rng(derived_seed(metric.seed, "fidelity", s.key))
    sums, drops = [], []
    least = ((s.x - s.mean) / s.std).min()
    colour = {"black": 0, "white": 1, "mean": s.mean[:, 0, 0], "minimum": (s.mean + least * s.std)[:, 0, 0]}
    for _ in range(metric.draws):
        x, attribution = s.x.copy(), 0.0
        for place in rng.choice(s.map.size, metric.pixels, replace=False, shuffle=False):
            row, column = divmod(int(place), s.size[1])
            x[:, row, column] = colour[metric.baseline]
            attribution += s.map[row, column]
        sums.append(attribution)
        drops.append(s.drop(x))
    return float(pearsonr(sums, drops).statistic)


def infidelity(metric: Any, s: Subject) -> float:
    noise = torch.randn(metric.draws, *s.size, generator=s.random(metric.seed, "infidelity")).double().numpy()
    products, drops = [], []
    for drawn in metric.noise * noise:
        products.append(sum(drawn[place] * s.map[place] for place in np.ndindex(s.size)))
        drops.append(s.drop(s.x - drawn * s.std))
    best = np.linalg.lstsq(np.array(products)[:, None], np.array(drops))[0][0]
    return float(np.mean([(best * p - d) ** 2 for p, d in zip(products, drops, strict=True)]))


def _in_turn(values: Sequence[float], ties: torch.Generator) -> list[int]:
    """Places of the values, the largest first; what is equal to five digits in random order."""
    drawn = torch.randperm(len(values), generator=ties).tolist()
    return sorted(drawn, key=lambda place: -round(values[place] * 1e5))


def _curve(
    metric: Any, s: Subject, groups: list[list[tuple[int, int]]], before: Array, after: Array
) -> list[float]:
    """Probabilities while groups of pixels are exchanged, first all groups that fit into 1 / steps of them."""
    found = []
    for k in range(metric.steps + 1):
        x = before.copy()
        for group in groups[: k * len(groups) // metric.steps]:
            for row, column in group:
                x[:, row, column] = after[:, row, column]
        found.append(s.probability(x))
    return found


def _pixel_by_pixel(metric: Any, s: Subject, before: Array, after: Array) -> float:
    order = _in_turn(s.map.ravel().tolist(), s.random(metric.seed, "ties"))
    curve = _curve(metric, s, [[divmod(place, s.size[1])] for place in order], before, after)
    return float(sum((a + b) / 2 for a, b in pairwise(curve)) / metric.steps)


def deletion(metric: Any, s: Subject) -> float:
    return _pixel_by_pixel(metric, s, s.x, np.broadcast_to(s.mean, s.x.shape))


def insertion(metric: Any, s: Subject) -> float:
    sigma = max(1e-6, metric.blur * min(s.size) / 224)
    reach = min(int(3 * sigma + 0.5), min(s.size) - 1)
    blurred = s.x
    for axis in (1, 2):
        blurred = gaussian_filter1d(blurred, sigma, axis, mode="mirror", radius=reach)
    return _pixel_by_pixel(metric, s, blurred, s.x)


def _regions(metric: Any, s: Subject, sign: int) -> float:
    height, width = s.size
    regions: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in np.ndindex(s.size):
        region = row * min(metric.grid, height) // height, column * min(metric.grid, width) // width
        regions.setdefault(region, []).append((row, column))
    inside = [regions[region] for region in sorted(regions)]
    means = [sign * sum(s.map[place] for place in places) / len(places) for places in inside]
    groups = [inside[place] for place in _in_turn(means, s.random(metric.seed, "ties"))]
    noise = torch.rand(s.x.shape, generator=s.random(metric.seed, "regions")).double().numpy()
    curve = _curve(metric, s, groups, s.x, noise)
    return sum(curve[0] - p for p in curve) / len(curve)


def morf(metric: Any, s: Subject) -> float:
    return _regions(metric, s, 1)


def lerf(metric: Any, s: Subject) -> float:
    return _regions(metric, s, -1)


# --- robustness --------------------------------------------------------------------------------------------------


def _noises(metric: Any, s: Subject) -> list[Array]:
    """In normalised units."""
    generators = [s.random(metric.seed, "stability", k) for k in range(metric.draws)]
    return [metric.noise * torch.randn(s.x.shape, generator=g).double().numpy() for g in generators]


def stability(metric: Any, s: Subject) -> float:
    changes = [
        np.sqrt(((s.explain(s.x + n * s.std) - s.map) ** 2).sum() / (n**2).sum()) for n in _noises(metric, s)
    ]
    return float(max(changes))


def ssim(metric: Any, s: Subject) -> float:
    after = [np.abs(s.explain(s.x + n * s.std)) for n in _noises(metric, s)]
    return float(np.mean([structural_similarity(np.abs(s.map), a, data_range=1) for a in after]))


def pcc(metric: Any, s: Subject) -> float:
    after = [np.abs(s.explain(s.x + n * s.std)) for n in _noises(metric, s)]
    return float(np.mean([pearsonr(np.abs(s.map).ravel(), a.ravel()).statistic for a in after]))


def max_sensitivity(metric: Any, s: Subject) -> float:
    largest = 0.0
    for k in range(metric.draws):
        drawn = torch.rand(s.x.shape, generator=s.random(metric.seed, "max_sensitivity", k)).double().numpy()
        moved = s.explain(s.x + (2 * drawn - 1) * metric.radius * s.std) - s.map
        largest = max(largest, np.sqrt((moved**2).sum()) / np.sqrt((s.map**2).sum()))
    return float(largest)


def randomization(metric: Any, s: Subject) -> float:
    layers = [name for name, module in s.model.named_modules() if hasattr(module, "reset_parameters")]
    stages = len(layers) if metric.stages is None else min(metric.stages, len(layers))
    found = []
    for stage in range(1, stages + 1):
        model = copy.deepcopy(s.model)
        for name in layers[len(layers) - int(np.ceil(len(layers) * stage / stages)) :]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derived_seed(metric.seed, "randomization", name))
                model.get_submodule(name).reset_parameters()  # type: ignore[operator]
        after = np.abs(s.explain(s.x, model))
        found.append(structural_similarity(np.abs(s.map), after, data_range=1))
    return float(np.mean(found))


_TABLE_2 = (pointing_game, attribution_localization, sparseness, fidelity, stability)
_FAITHFUL = (insertion, deletion, morf, lerf, infidelity)
_OTHERS = (max_sensitivity, randomization, roughness)
BY_NAME: dict[str, Callable[[Any, Subject], float]] = {
    function.__name__: function for function in (*_TABLE_2, ssim, pcc, *_FAITHFUL, *_OTHERS)
}


# --- what they are tried on --------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "fidelity": {"pixels": 20, "draws": 9, "seed": 3},
    "stability": {"draws": 3, "seed": 1},
    "ssim": {"draws": 2},
    "pcc": {"draws": 2},
    "insertion": {"steps": 7, "blur": 30.0},
    "deletion": {"steps": 6, "seed": 5},
    "morf": {"steps": 7, "grid": 4},
    "lerf": {"steps": 5},
    "infidelity": {"draws": 7, "seed": 2},
    "max_sensitivity": {"draws": 3},
    "randomization": {"stages": 2},
}
PIECES = {name: replace(metric, **SMALL.get(name, {})) for name, metric in METRICS.items()}  # type: ignore[type-var]


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(channels: int = 3) -> nn.Sequential:
    """Of any size of image; its probabilities are far from 0 and 1, and far apart."""
    torch.manual_seed(4)
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).double().eval()
    with torch.no_grad():
        model[-1].weight.mul_(12)
    return model.requires_grad_(False)


def normalised(model: nn.Module) -> nn.Module:
    return Classifier(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double()


class Linear(nn.Module):
    """Logits that are linear in the pixels, with nothing to trace."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels * height * width, 3).double().requires_grad_(False)
        self.fc.weight.copy_(torch.randn(3, self.fc.in_features, generator=generator(0, "linear")))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Made:
    """A method whose maps are what ``make`` says of the images."""

    make: Callable[[Tensor], Tensor]

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        return self.make(x)

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.make(x), model(x.clone())  # a model may change its input in place


LEVELS = Made(
    lambda x: (4 * x.mean(1)).round() - 2
)  # a handful of values, negative ones and zeros among them
METHODS: dict[str, Explainer] = {
    name: EXPLAINERS[name] for name in ("grad_input", "gradcam", "srd", "sobel")
} | {"levels": LEVELS}


def batch(
    model: nn.Module, size: tuple[int, int], count: int = 3, channels: int = 3, seed: int = 0
) -> Images:
    x = pixels(count, channels, *size, seed=seed)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    masks[0, size[0] // 8 :, : max(1, size[1] // 2)] = True  # touches the border
    masks[-1, size[0] // 2, size[1] // 3] = True
    target = torch.arange(count).flip(0) % 3
    return Images(model, x, target, [f"image {seed}", *range(7, 6 + count)], masks)


def given_maps(images: Images, raw: Tensor) -> Explained:
    """The images with these maps, whatever becomes of images and network."""
    return Explained.by(Made(lambda x: raw), images)
