"""A black-box attack: it asks for nothing but the map and the predicted class.

For methods without a useful gradient (deconvnet, attributions made by another library, masks, anybody's own explainer),
and as a check of the others: where a search without gradients beats gradient attacks, the gradients are masked.

First random search with squares (Andriushchenko et al. 2020): a square window of the change gets random signs, is
projected into the budget and stays where it lowers the score. Then natural evolution strategies (Wierstra et al. 2014,
Ilyas et al. 2018): the slope is estimated from pairs of opposite, spatially smooth Gaussian steps, followed by a
projected step along it. What is minimised is the mean of PCC, SSIM and top-10 %; a change after which another
class is predicted is never accepted.

Example
-------
::

    BlackBox(explainer, Budget.named("l2", 2.0), queries=500).run(model, x).values["pcc"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.attack import Best, OnStep, check_pixels
from attacks.budget import Budget
from attacks.objective import Reference
from attacks.optimiser import unit
from attacks.scores import SCORES
from srd_lab.errors import BadValue
from srd_lab.logits import check_target
from srd_lab.normalise import normalisation_scale
from srd_lab.runtime import generator
from srd_lab.types import Explainer

LOWERED = ("pcc", "ssim", "top_k")


@dataclass(frozen=True)
class BlackBox:
    """Random search, then evolution strategies.

    explainer : any method.
    budget : how far the image may go (:mod:`attacks.budget`).
    queries : explanations per image, >= 1.
    squares : share of the queries that go to random search, in [0, 1].
    pairs : opposite steps per estimate of the slope, >= 1. smooth : side in pixels of the squares that share a step's
        value, >= 1.
    sigma, step : length of the trial steps and of the step taken, in parts of the budget's radius, > 0.
    seed : decides what is drawn, together with each image's key.

    Raises BadValue for ``queries``, ``pairs`` or ``smooth`` below 1, and for the other numbers out of range.
    """

    explainer: Explainer
    budget: Budget = field(default_factory=lambda: Budget.named("legacy"))
    queries: int = 500
    squares: float = 0.6
    pairs: int = 10
    smooth: int = 4
    sigma: float = 0.1
    step: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("queries", "pairs", "smooth"):
            if getattr(self, name) < 1:
                raise BadValue(f"the black-box attack needs {name} >= 1, got {getattr(self, name)}")
        for name in ("sigma", "step"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadValue(f"the black-box attack needs a finite {name} > 0, got {getattr(self, name)}")
        if not 0 <= self.squares <= 1:
            raise BadValue(f"the black-box attack needs squares in [0, 1], got {self.squares}")

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        keys: Sequence[int | str] | None = None,
        on_step: OnStep | None = None,
    ) -> Best:
        """The lowest score of every kind that was found for images x (N, C, H, W) in [0, 1], and the images that have it.

        model : the network, of which explanations and logits are seen and nothing else.
        target : (N,) the class that is explained, None = predicted.
        keys : what seeds the draws of every image; default 0..N-1.
        on_step : called with the queries done, N * ``queries`` in all.

        Raises BadInput for images that are no pixels and targets that are no classes, and Refused as the explainer does.
        """
        check_pixels(model, x)
        search = _Search(self, model, x.detach(), target, list(range(len(x)) if keys is None else keys))
        with torch.no_grad():
            search.run(on_step or (lambda steps: None))
        return search.best


class _Search:
    def __init__(
        self, how: BlackBox, model: nn.Module, x: Tensor, target: Tensor | int | None, keys: list[int | str]
    ) -> None:
        self.how, self.model, self.x = how, model, x
        self.scale = normalisation_scale(model, x)
        map0, logits0 = how.explainer.explain_with_logits(model, x, target)
        self.target = check_target(target, logits0)
        self.reference = Reference(map0.detach(), logits0.detach(), (x.shape[2], x.shape[3]))
        self.chance = [generator(how.seed, "black_box", key) for key in keys]
        self.best = Best(x, SCORES)
        self.current, self.loss = x.clone(), x.new_full((len(x),), torch.inf)

    def run(self, on_step: Callable[[int], None]) -> None:
        how = self.how
        self.current = self._project(self.x + self._stripes())
        self.loss = self._ask(self.current)
        asked, first = 1, max(1, int(how.queries * how.squares))
        while asked < first:
            self._try_square(asked / first)
            asked += 1
            on_step(len(self.x))
        while asked + 2 * how.pairs + 1 <= how.queries:
            self._climb()
            asked += 2 * how.pairs + 1
            on_step(len(self.x) * (2 * how.pairs + 1))
        on_step(len(self.x) * (how.queries - asked + 1))

    def _ask(self, x: Tensor) -> Tensor:
        """The loss (N,) of these images, infinite where another class is predicted; every answer is remembered."""
        raw, logits = self.how.explainer.explain_with_logits(self.model, x, self.target)
        found = self.reference.scores(raw.detach())
        kept = logits.argmax(1) == self.reference.logits.argmax(1)
        self.best.offer(torch.arange(len(x), device=x.device), x, found, kept)
        loss = torch.stack([found[name] for name in LOWERED]).mean(0).to(x)
        return loss.masked_fill(~kept | loss.isnan(), torch.inf)

    def _keep(self, x: Tensor) -> None:
        loss = self._ask(x)
        better = loss < self.loss
        self.current[better], self.loss[better] = x[better], loss[better]

    def _project(self, x: Tensor) -> Tensor:
        return self.how.budget.project(x, self.x, self.scale)

    def _amplitude(self) -> Tensor:
        """How much a square changes a pixel, (1, C, 1, 1): the box, or twice the root mean square allowed."""
        budget = self.how.budget
        if budget.linf is not None:
            return self.x.new_full((1, 1, 1, 1), budget.linf / 255)
        return 2 * budget.largest_rms / budget.weights(self.x, self.scale)

    def _draw(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([make(chance) for chance in self.chance]).to(self.x)

    def _stripes(self) -> Tensor:
        """Vertical stripes of random signs, as square attack begins."""
        _, channels, _, width = self.x.shape
        return self._draw(lambda c: _signs(c, channels, 1, width)) * self._amplitude()

    def _try_square(self, share: float) -> None:
        _, channels, height, width = self.x.shape
        side = max(1, round((0.3 * (1 - share) ** 2 + 0.001) ** 0.5 * min(height, width)))
        changed = (self.current - self.x).clone()
        amplitude = self._amplitude()[0]
        for i, chance in enumerate(self.chance):
            row = int(torch.randint(height - side + 1, (1,), generator=chance))
            column = int(torch.randint(width - side + 1, (1,), generator=chance))
            window = changed[i, :, row : row + side, column : column + side]
            window.copy_((_signs(chance, channels, 1, 1).to(self.x) * amplitude).expand_as(window))
        self._keep(self._project(self.x + changed))

    def _climb(self) -> None:
        how, (_, channels, height, width) = self.how, self.x.shape
        weights, radius = how.budget.weights(self.x, self.scale), how.budget.radius(self.x, self.scale)
        coarse = (channels, -(-height // how.smooth), -(-width // how.smooth))
        slope = torch.zeros_like(self.x)
        for _ in range(how.pairs):
            drawn = self._draw(lambda c: torch.randn(coarse, generator=c, dtype=torch.float32))
            way = unit(F.interpolate(drawn, size=(height, width), mode="nearest"))
            trial = how.sigma * radius * way / weights
            ahead, behind = (self._ask(self._project(self.current + sign * trial)) for sign in (1, -1))
            rise = (ahead - behind).nan_to_num(0, 1, -1)  # another class at both: no information
            slope += rise[:, None, None, None] * way
        self._keep(self._project(self.current - how.step * radius * unit(slope) / weights))


def _signs(chance: torch.Generator, *shape: int) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=chance) - 1
