"""How an attack moves: an optimiser makes one step of all images from their gradients, and projects it into the budget.

- :class:`PGD`: projected gradient descent, its step shaped by the budget's norm (L2: the gradient divided by its length;
  L-infinity: its sign), with momentum and a step that shrinks from twice the budget's radius (as in Croce & Hein 2020) on a
  cosine. Gradients are scaled per image, so that a spike cannot stall an image for good.
- :class:`Adam`: the published attack's (Kingma & Ba 2015), on the normalised image.

An optimiser is a frozen dataclass whose ``begin`` gives the moves of one attack: an object that keeps what it has to
remember of every image.

Example
-------
::

    moves = PGD().begin(x, budget, scale, steps=40)
    x_adv[some] = moves.move(some, x_adv[some], slope, loss, step)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Protocol

import torch
from torch import Tensor

from attacks.budget import Budget
from srd_lab.errors import BadValue

BETAS = (0.9, 0.999)  # Adam's defaults, as in both papers' code
EPSILON = 1e-8


class Moves(Protocol):
    """The steps of one attack on N images."""

    def move(self, some: Tensor, x_adv: Tensor, slope: Tensor, loss: Tensor, step: int) -> Tensor:
        """The next iterates (n, C, H, W), within the budget.

        some : (n,) indices of the images that move. x_adv : (n, C, H, W), where they are.
        slope : (n, C, H, W) of the loss, in pixels. loss : (n,). step : counted from 0.
        """
        ...


class Optimiser(Protocol):
    """A frozen dataclass whose fields are its parameters."""

    def begin(self, x: Tensor, budget: Budget, scale: Tensor, steps: int) -> Moves:
        """The moves of an attack.

        x : images (N, C, H, W) in [0, 1]. budget : that every move stays within. steps : of the attack, >= 1.
        scale : (1, C, 1, 1), what one unit of pixel value is in normalised units.
        """
        ...


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent.

    first, last : step in parts of the budget's radius, > 0, on a cosine from the first step to the last. A first step of
        twice the radius, as APGD's, reaches any point of the ball, and was measured to be stronger than small ones.
    momentum : share of the direction that is kept, in [0, 1).

    Raises BadValue for values out of range.
    """

    first: float = 2.0
    last: float = 0.1
    momentum: float = 0.75

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if not getattr(self, name) > 0:
                raise BadValue(f"PGD needs {name} > 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise BadValue(f"PGD needs a momentum in [0, 1), got {self.momentum}")

    def begin(self, x: Tensor, budget: Budget, scale: Tensor, steps: int) -> Moves:
        """See :meth:`Optimiser.begin`."""
        return _PGDMoves(self, x, budget, scale, steps, torch.zeros_like(x))


@dataclass(frozen=True)
class _PGDMoves:
    how: PGD
    x: Tensor
    budget: Budget
    scale: Tensor
    steps: int
    velocity: Tensor

    def move(self, some: Tensor, x_adv: Tensor, slope: Tensor, loss: Tensor, step: int) -> Tensor:
        x, how = self.x[some], self.how
        weights = self.budget.weights(x, self.scale)
        velocity = how.momentum * self.velocity[some] + unit(slope / weights)
        self.velocity[some] = velocity
        size = how.last + (how.first - how.last) * (1 + cos(pi * step / self.steps)) / 2
        if self.budget.has_l2:
            change = unit(velocity) * self.budget.radius(x, self.scale) / weights
        else:
            change = velocity.sign() * (self.budget.linf or 0) / 255
        return self.budget.project(x_adv - size * change, x, self.scale)


@dataclass(frozen=True)
class Adam:
    """Adam on the normalised image, each image with moments of its own.

    lr : step size in normalised units, > 0; BadValue for another.
    """

    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise BadValue(f"the attack needs lr > 0, got {self.lr}")

    def begin(self, x: Tensor, budget: Budget, scale: Tensor, steps: int) -> Moves:
        """See :meth:`Optimiser.begin`."""
        return _AdamMoves(self.lr, x, budget, scale, torch.zeros_like(x), torch.zeros_like(x))


@dataclass(frozen=True)
class _AdamMoves:
    lr: float
    x: Tensor
    budget: Budget
    scale: Tensor
    first: Tensor
    second: Tensor

    def move(self, some: Tensor, x_adv: Tensor, slope: Tensor, loss: Tensor, step: int) -> Tensor:
        slope = slope / self.scale  # in normalised units
        self.first[some] = BETAS[0] * self.first[some] + (1 - BETAS[0]) * slope
        self.second[some] = BETAS[1] * self.second[some] + (1 - BETAS[1]) * slope.square()
        mean = self.first[some] / (1 - BETAS[0] ** (step + 1))
        square = self.second[some] / (1 - BETAS[1] ** (step + 1))
        direction = mean / (square.sqrt() + EPSILON)
        return self.budget.project(x_adv - self.lr * direction / self.scale, self.x[some], self.scale)


def unit(t: Tensor) -> Tensor:
    """Images divided by their Euclidean length; zero stays zero, and huge or tiny ones do not overflow.

    t : (N, C, H, W).

    Example
    -------
    >>> unit(torch.tensor([3e30, 4e30]).view(1, 1, 1, 2)).flatten()
    tensor([0.6000, 0.8000])
    """
    top = t.abs().amax((1, 2, 3), keepdim=True)
    t = t / top.masked_fill(top == 0, 1)
    norm = t.flatten(1).norm(dim=1)[:, None, None, None]
    return t / norm.masked_fill(norm == 0, 1)
