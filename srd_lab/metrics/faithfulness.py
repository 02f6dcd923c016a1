"""Does an explanation say what the network does? The image is changed where the map says, and the output watched.

The class is the explained one throughout; noise is in normalised units. Zero maps and maps that are not finite are not
scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.catalogue import BASELINES, metric
from srd_lab.errors import BadValue
from srd_lab.metrics.explained import Explained, Images, check_counts, unscorable
from srd_lab.metrics.similarity import float64
from srd_lab.runtime import derived_seed


@metric(
    "fidelity",
    title="Fidelity",
    paper="Bhatt et al. 2020",
    better="higher",
    scores="faithfulness",
    tested="definition, quantus",
)
@dataclass(frozen=True)
class Fidelity:
    """Correlation, over random sets of pixels, of the attribution of a set and the drop of the logit when it is set to 0
    (Bhatt et al. 2020, faithfulness correlation; SRD, appendix E). In [-1, 1], higher is better.

    pixels : in a set, >= 1 and fewer than the image has. draws : sets, >= 1, the same ones for every method.
    seed : decides the sets, together with each image's key.
    baseline : what 0 is. "black" and "white" are pixels of 0 and 1, "mean" is 0 in normalised units, the mean colour of
        the training set, and "minimum" the smallest normalised value of the image, in all channels: what quantus takes by
        default and calls black. docs/results.md compares them with the values of the SRD paper, which does not say.

    Not scored where all sets have one attribution (a constant map) or one drop. Raises BadValue for values out of range.
    """

    pixels: int = 200
    draws: int = 100
    seed: int = 0
    baseline: str = "black"

    def __post_init__(self) -> None:
        check_counts(self, "pixels", "draws")
        if self.baseline not in BASELINES:
            known = ", ".join(BASELINES)
            raise BadValue(f"fidelity has no baseline {self.baseline!r}; expected one of {known}")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [-1, 1]. Raises BadValue where the images have no more than ``pixels`` pixels."""
        images = explained.images
        sets, drops = images.once(self, lambda: self.drops(images))
        sums = float64(explained.maps).flatten(1).gather(1, sets.flatten(1)).view(sets.shape).sum(2)
        return correlation(sums, drops).masked_fill(_constant(explained.maps), torch.nan)

    def drops(self, images: Images) -> tuple[Tensor, Tensor]:
        """Sets of pixels (N, draws, pixels), flat indices, and how far the logit falls without each, (N, draws) float64.

        images : the batch that is explained.

        Raises BadValue where the images have no more than ``pixels`` pixels.
        """
        places = images.size[0] * images.size[1]
        if self.pixels >= places:
            raise BadValue(
                f"fidelity takes sets of {self.pixels} pixels, but the images have {places}; take fewer"
            )
        sets, drops = [], []
        for i, key in enumerate(images.keys):
            rng = np.random.default_rng(derived_seed(self.seed, "fidelity", key))
            drawn = [rng.choice(places, self.pixels, replace=False, shuffle=False) for _ in range(self.draws)]
            chosen = torch.from_numpy(np.stack(drawn)).to(images.x.device)
            image, colour = images.given[i], self._colour(images, i)

            def without(
                some: range, image: Tensor = image, colour: Tensor = colour, chosen: Tensor = chosen
            ) -> Tensor:
                copies = image.flatten(1).repeat(len(some), 1, 1)
                index = chosen[some.start : some.stop, None].expand(-1, len(image), -1)
                return copies.scatter_(2, index, colour.expand_as(index)).unflatten(2, images.size)

            drops.append(images.drops(i, without, self.draws))
            sets.append(chosen)
        return torch.stack(sets), torch.stack(drops)

    def _colour(self, images: Images, i: int) -> Tensor:
        """What pixels are set to, in normalised units, (C, 1)."""
        image = images.given[i].flatten(1)
        if self.baseline == "minimum":
            return image.amin().expand(len(image), 1)
        if self.baseline == "mean":
            return torch.zeros_like(image[:, :1])
        return images.normalised(torch.full_like(images.x[:1], self.baseline == "white"))[0].flatten(1)[:, :1]


@metric(
    "infidelity",
    title="Infidelity",
    paper="Yeh et al. 2019",
    better="lower",
    scores="faithfulness",
    tested="captum",
)
@dataclass(frozen=True)
class Infidelity:
    """How far the map, read as a linear model of the network, is from what noise does to the logit (Yeh et al. 2019):

        min_b mean_I (b <I, map> - (y_c(x) - y_c(x - I)))^2,

    in squared logits, >= 0, lower is better. The best scale b is theirs too: maps have no unit.

    noise : standard deviation of I in normalised units, one number per pixel for all colours. draws : of I, >= 1.
    seed : decides the noise, together with each image's key.
    """

    noise: float = 0.2
    draws: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "draws")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64, >= 0."""
        images = explained.images
        drops = images.once(self, lambda: self.drops(images))
        products = torch.stack(
            [torch.einsum("khw,hw->k", self._noise(images, i).double(), map_) for i, map_ in explained.each()]
        )
        best = (products * drops).sum(1) / products.square().sum(1)
        error = (best[:, None] * products - drops).square().mean(1)
        return error.masked_fill(unscorable(explained.maps), torch.nan)

    def drops(self, images: Images) -> Tensor:
        """How far the logit falls under each noise, (N, draws) float64. images : the batch that is explained."""
        found = []
        for i in range(len(images.x)):
            image, noise = images.given[i], self._noise(images, i)

            def under(some: range, image: Tensor = image, noise: Tensor = noise) -> Tensor:
                return image - noise[some.start : some.stop, None]

            found.append(images.drops(i, under, self.draws))
        return torch.stack(found)

    def _noise(self, images: Images, i: int) -> Tensor:
        """Drawn again when it is needed: that of every image would take a lot of memory."""
        drawn = torch.randn(
            self.draws,
            *images.size,
            generator=images.generator(i, self.seed, "infidelity"),
            dtype=torch.float32,
        )
        return self.noise * drawn.to(images.x)


@dataclass(frozen=True)
class _Curve(ABC):
    """The probability of the class while pixels are exchanged in the order of the map, to five decimals; ties in
    random order.

    steps : points of the curve after the first; seed : of ties and replacements.
    """

    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "steps")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64, each the :meth:`area` of its image's curve."""
        images = explained.images
        scores = [self._area(images, i, map_) for i, map_ in explained.each()]
        return torch.stack(scores).masked_fill(unscorable(explained.maps), torch.nan)

    def _area(self, images: Images, i: int, map_: Tensor) -> Tensor:
        share = self.share(map_, images.generator(i, self.seed, "ties"))
        before, after = self.ends(images, i)

        def exchanged(some: range) -> Tensor:
            done = torch.arange(some.start, some.stop, dtype=share.dtype, device=share.device) / self.steps
            return torch.where((share <= done[:, None, None])[:, None], after, before)

        return self.area(images.probabilities(i, exchanged, self.steps + 1))

    def share(self, value: Tensor, ties: torch.Generator) -> Tensor:
        """Which part of the curve, in (0, 1], is over when each pixel of ``value`` (H, W) is exchanged: the largest first.

        ties : draws the order of equal values. Returns (H, W) float64.
        """
        flat = (value.flatten() * 1e5).round()  # rounding of another batch must not decide the order
        drawn = torch.randperm(len(flat), generator=ties).to(flat.device)
        order = drawn[flat[drawn].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return ((rank.double() + 1) / len(rank)).view(value.shape)

    def area(self, curve: Tensor) -> Tensor:
        """The score of a curve (steps + 1,): its area."""
        return torch.trapezoid(curve, dx=1 / self.steps)

    @abstractmethod
    def ends(self, images: Images, i: int) -> tuple[Tensor, Tensor]:
        """The normalised image (C, H, W) that the curve starts from, and the one that it ends at.

        images : the batch. i : which of its images.
        """


@metric(
    "deletion",
    title="Deletion",
    paper="Petsiuk et al. 2018",
    better="lower",
    scores="faithfulness",
    tested="definition",
)
@dataclass(frozen=True)
class Deletion(_Curve):
    """Area under the probability while pixels become the mean colour, the largest attribution first (Petsiuk et al. 2018,
    RISE). In [0, 1], lower is better.

    steps : points of the curve after the first, >= 1. seed : decides the order of ties, together with each image's key.
    """

    def ends(self, images: Images, i: int) -> tuple[Tensor, Tensor]:
        return images.given[i], torch.zeros_like(images.given[i])


@metric(
    "insertion",
    title="Insertion",
    paper="Petsiuk et al. 2018",
    better="higher",
    scores="faithfulness",
    tested="definition",
)
@dataclass(frozen=True)
class Insertion(_Curve):
    """Area under the probability while pixels of the image are put into a blurred copy, the largest attribution first
    (Petsiuk et al. 2018, RISE). In [0, 1], higher is better.

    steps, seed : see :class:`Deletion`.
    blur : standard deviation in pixels of an image of 224 x 224, in proportion for others.
    """

    blur: float = 10.0

    def ends(self, images: Images, i: int) -> tuple[Tensor, Tensor]:
        blurred = images.once((self.blur, "blurred"), lambda: _blurred(images.given, self.blur))
        return blurred[i], images.given[i]


@metric(
    "morf",
    title="MoRF",
    paper="Samek et al. 2017",
    better="higher",
    scores="faithfulness",
    tested="definition",
)
@dataclass(frozen=True)
class MoRF(_Curve):
    """Area over the perturbation curve, most relevant regions first (Samek et al. 2017): the mean drop of the
    probability while regions become uniform noise. In [-1, 1], higher is better.

    steps : points of the curve after the first, >= 1. seed : decides ties and noise, together with each image's key.
    grid : regions along a side, >= 1, each exchanged as a whole, in the order of their mean attribution.
    """

    grid: int = 14

    def __post_init__(self) -> None:
        check_counts(self, "steps", "grid")

    def share(self, value: Tensor, ties: torch.Generator) -> Tensor:
        region, regions = self._regions(value), prod(min(n, self.grid) for n in value.shape)
        sums = torch.stack([value, torch.ones_like(value)]).flatten(1)
        total, count = sums.new_zeros(2, regions).index_add_(1, region.flatten(), sums)
        return super().share(self.sign * total / count, ties)[region]

    def _regions(self, map_: Tensor) -> Tensor:
        """Which region each pixel of a map (H, W) is in; a side with fewer pixels than regions has one for each."""
        down, right = (torch.arange(n, device=map_.device) * min(n, self.grid) // n for n in map_.shape)
        return down[:, None] * (right[-1] + 1) + right

    sign = 1

    def area(self, curve: Tensor) -> Tensor:
        return (curve[0] - curve).mean()

    def ends(self, images: Images, i: int) -> tuple[Tensor, Tensor]:
        return images.given[i], images.once((self.seed, "uniform"), lambda: self._uniform(images))[i]

    def _uniform(self, images: Images) -> Tensor:
        shape = images.x.shape[1:]
        drawn = [
            torch.rand(shape, generator=images.generator(i, self.seed, "regions"), dtype=torch.float32)
            for i in range(len(images.x))
        ]
        return images.given + (torch.stack(drawn).to(images.x) - images.x) * images.scale


@metric(
    "lerf",
    title="LeRF",
    paper="Samek et al. 2017",
    better="lower",
    scores="faithfulness",
    tested="definition",
)
@dataclass(frozen=True)
class LeRF(MoRF):
    """The same as :class:`MoRF` with the least relevant regions first. In [-1, 1], lower is better."""

    sign = -1


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation (N,) of rows a and b, both (N, K) float64, in [-1, 1]; NaN where one is constant or not finite.

    Example
    -------
    >>> a = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    >>> correlation(a, -a).round(decimals=6)
    tensor([-1.], dtype=torch.float64)
    """
    a, b = (t - t.mean(1, keepdim=True) for t in (a, b))
    constant = (a == a[:, :1]).all(1) | (b == b[:, :1]).all(1)
    a, b = (t / t.abs().amax(1, keepdim=True) for t in (a, b))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1).masked_fill(constant, torch.nan)


def _constant(maps: Tensor) -> Tensor:
    flat = maps.flatten(1)
    return (flat == flat[:, :1]).all(1)


def _blurred(x: Tensor, blur: float) -> Tensor:
    """Gaussian blur of images (N, C, H, W), mirrored at the edges."""
    sigma = max(1e-6, blur * min(x.shape[2:]) / 224)
    reach = min(int(3 * sigma + 0.5), min(x.shape[2:]) - 1)
    places = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1, 1, 1)
    padded = F.pad(x, (reach, reach, reach, reach), "reflect")
    across = F.conv2d(padded, kernel, groups=x.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=x.shape[1])
