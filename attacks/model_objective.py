"""What a manipulated network's maps shall say: the objectives of :mod:`attacks.model_manipulation`.

A score per image, high where the attacker has what he wants. ``now`` and ``before`` are maps as they are read, >= 0, at the
size of the image, (N, M, H, W): of the manipulated and of the original network, one for each class that is asked for. With
p = map / its sum, S the sides, and c(p) = sum_ij (i, j) p_ij:

- ``Location``: sum of p over a region.
- ``TopK``: sum of p over the pixels that were not among the original's largest ones.
- ``CentreOfMass``: mean over both axes of (c(p) - c(p_before)) / S, counted towards the farther border. Heo et al. take
  |c(p) - c(p_before)|, whose gradient at the start, where both are equal, is zero.
- ``Active``: PCC(map_a, before_b) - PCC(map_a, before_a), and with a and b exchanged, averaged: > 0 once the map of a class
  shows the other class rather than its own. Seen on images of both: quarters of an image of a and one of b, across.

Example
-------
>>> before, now = x[:, :1], torch.ones(2, 1, 64, 64)
>>> Location(frame=8).score(now, before)     # (N,) share of the mass within 8 pixels of the border
tensor([0.4375, 0.4375])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.scores import top_pixels
from srd_lab import maps
from srd_lab.errors import BadInput, BadValue
from srd_lab.metrics.similarity import PCC


class Cases(NamedTuple):
    """What is explained: images (N, C, H, W), and M tensors of classes (N,), one for each map that is looked at."""

    images: Tensor
    classes: tuple[Tensor, ...]

    def part(self, first: int, last: int) -> Cases:
        """The cases from ``first`` to before ``last``."""
        return Cases(self.images[first:last], tuple(c[first:last] for c in self.classes))


class MapObjective(Protocol):
    """What the maps shall say.

    what : the score in words, for tables.
    compares : whether the score needs the original's maps.
    classes : classes that its images are made of; () where any image will do.
    """

    @property
    def what(self) -> str:
        """The score in words, for tables."""
        ...

    @property
    def compares(self) -> bool:
        """Whether the score needs the original's maps."""
        ...

    @property
    def classes(self) -> tuple[int, ...]:
        """Classes that its images are made of; () where any image will do."""
        ...

    def cases(self, x: Tensor, labels: Tensor) -> Cases:
        """What is explained of images x (N, C, H, W) with ``labels`` (N,)."""
        ...

    def score(self, now: Tensor, before: Tensor) -> Tensor:
        """Score (N,) of maps (N, M, H, W), differentiable in ``now``; higher suits the attacker."""
        ...


class _Passive:
    """Any image, explained for its label."""

    @property
    def compares(self) -> bool:
        """True: the score needs the original's maps."""
        return True

    @property
    def classes(self) -> tuple[int, ...]:
        """(): any image will do."""
        return ()

    def cases(self, x: Tensor, labels: Tensor) -> Cases:
        """The images as they are."""
        return Cases(x, (labels,))


@dataclass(frozen=True)
class Location(_Passive):
    """The mass lies in a region, whatever the image shows.

    frame : width of the border in pixels, >= 1 and less than half the image's shorter side.
    mask : (H, W) bool, another region instead of the frame; it must hold some pixels, and not all.

    Raises BadValue for another frame or mask.
    """

    frame: int = 8
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is None and self.frame < 1:
            raise BadValue(f"the frame must be 1 pixel wide or more, got {self.frame}")
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.dim() != 2):
            raise BadValue(
                f"the region must be a bool mask (H, W), got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        if self.mask is not None and bool(self.mask.all() | ~self.mask.any()):
            raise BadValue("the region holds all pixels or none; mark some of them")

    @property
    def what(self) -> str:
        """The score in words, for tables."""
        return f"mass within {self.frame} px of the border" if self.mask is None else "mass in the region"

    @property
    def compares(self) -> bool:
        """False: the score needs no other maps."""
        return False

    def region(self, height: int, width: int) -> Tensor:
        """The region as a mask (height, width) bool. Raises BadValue where the frame or the mask does not fit this size."""
        if self.mask is not None:
            if self.mask.shape != (height, width):
                raise BadValue(
                    f"the region is {tuple(self.mask.shape)}, but maps are read at {(height, width)}; give one of that size"
                )
            return self.mask
        if 2 * self.frame >= min(height, width):
            raise BadValue(
                f"a frame of {self.frame} pixels leaves nothing of images of {height} x {width}; take a narrower one"
            )
        inside = torch.zeros(height - 2 * self.frame, width - 2 * self.frame, dtype=torch.bool)
        return F.pad(inside, [self.frame] * 4, value=True)

    def score(self, now: Tensor, before: Tensor) -> Tensor:
        """Share (N,) of the mass in the region, in [0, 1]; 0 of a map that is zero. Errors are those of :meth:`region`."""
        return (_mass(now) * self.region(*now.shape[2:]).to(now)).sum((1, 2))


@dataclass(frozen=True)
class TopK(_Passive):
    """Takes mass off the pixels that the original's map put on top.

    share : of all pixels that count as the top, in (0, 1); BadValue for another.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadValue(f"the share of pixels on top must lie in (0, 1), got {self.share}")

    @property
    def what(self) -> str:
        """The score in words, for tables."""
        return f"mass off the original's top {self.share:.0%}"

    def score(self, now: Tensor, before: Tensor) -> Tensor:
        """Share (N,) of the mass off these pixels, in [0, 1]; 0 of a map that is zero."""
        return (_mass(now) * ~top_pixels(before[:, 0], self.share)).sum((1, 2))


@dataclass(frozen=True)
class CentreOfMass(_Passive):
    """The centre of the map moves away from where it was, towards the farther border in both directions."""

    @property
    def what(self) -> str:
        """The score in words, for tables."""
        return "shift of the centre / side"

    def score(self, now: Tensor, before: Tensor) -> Tensor:
        """Mean shift (N,) over both axes in shares of the side, in [-1, 1]; 0 of a map that is zero."""
        here, there = _centre(now), _centre(before)
        towards = torch.where(there < 0.5, 1.0, -1.0).to(here)
        present = (now.sum((1, 2, 3)) > 0) & (before.sum((1, 2, 3)) > 0)
        return torch.where(present, ((here - there) * towards).mean(1), 0)


@dataclass(frozen=True)
class Active:
    """The maps of classes ``a`` and ``b`` change places, on images that show both.

    a, b : two different class indices, >= 0; BadValue for others.
    """

    a: int = 0
    b: int = 1

    def __post_init__(self) -> None:
        if min(self.a, self.b) < 0 or self.a == self.b:
            raise BadValue(f"two different classes are swapped, 0 or more, got {self.a} and {self.b}")

    @property
    def what(self) -> str:
        """The score in words, for tables."""
        return f"pcc to the other's map - to its own (classes {self.a}, {self.b})"

    @property
    def compares(self) -> bool:
        """True: the score needs the original's maps."""
        return True

    @property
    def classes(self) -> tuple[int, ...]:
        """The two classes that its images are made of."""
        return self.a, self.b

    def cases(self, x: Tensor, labels: Tensor) -> Cases:
        """As many images of both classes as there are pairs of one each among x, (M, C, H, W), explained for either.

        Raises BadInput where one of the classes has no image.
        """
        of_a, of_b = x[labels == self.a], x[labels == self.b]
        count = min(len(of_a), len(of_b))
        if count == 0:
            raise BadInput(
                f"there are {len(of_a)} images of class {self.a} and {len(of_b)} of class {self.b}; give some of both"
            )
        asked = torch.zeros(count, dtype=torch.long, device=x.device)
        return Cases(quartered(of_a[:count], of_b[:count]), (asked + self.a, asked + self.b))

    def score(self, now: Tensor, before: Tensor) -> Tensor:
        """How much more (N,) the maps are like the other class's than like their own, in [-2, 2]."""
        pcc = PCC().score
        gains = [pcc(now[:, i], before[:, 1 - i]) - pcc(now[:, i], before[:, i]) for i in (0, 1)]
        return torch.stack(gains).mean(0)


def quartered(a: Tensor, b: Tensor) -> Tensor:
    """Images (N, C, H, W) whose quarters are small copies of those in ``a`` (upper left, lower right) and ``b``; in every
    second image the other way round, so that no place belongs to a class. a, b : (N, C, H, W).
    """
    turned = (torch.arange(len(a), device=a.device) % 2 == 1)[:, None, None, None]
    first, second = torch.where(turned, b, a), torch.where(turned, a, b)
    height, width = a.shape[2:]
    heights, widths = (height // 2, height - height // 2), (width // 2, width - width // 2)

    def small(image: Tensor, row: int, column: int) -> Tensor:
        return F.interpolate(image, (heights[row], widths[column]), mode="area")

    upper = torch.cat([small(first, 0, 0), small(second, 0, 1)], 3)
    lower = torch.cat([small(second, 1, 0), small(first, 1, 1)], 3)
    return torch.cat([upper, lower], 2)


def _mass(shown: Tensor) -> Tensor:
    """The first map (N, H, W), divided by its sum."""
    return maps.sum_to_one(shown[:, 0])


def _centre(shown: Tensor) -> Tensor:
    """Centre of mass (N, 2) of the first map, row and column in [0, 1]."""
    mass = _mass(shown)
    rows, columns = (
        torch.linspace(0, 1, side, dtype=mass.dtype, device=mass.device) for side in mass.shape[1:]
    )
    return torch.stack([(mass.sum(2) * rows).sum(1), (mass.sum(1) * columns).sum(1)], 1)
