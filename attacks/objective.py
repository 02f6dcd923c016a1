"""What an attack minimises: one small object per aim, each a loss per image of the map and the output.

An objective is called with a :class:`View` and gives (N,) numbers that fall as the attacker comes nearer to the aim. The
members of the standard evaluation minimise one of the first six, or a sum of two, with :class:`KeepClass`, which adds 0
as long as the predicted class holds with a margin. :class:`Eq10` is the published attack, with its own output term.

- :class:`Dissimilarity`: Pearson correlation with the original map.
- :class:`Structure`: SSIM with it.
- :class:`Combined`: SSIM + PCC + share of the mass on the original's top 10 %, all at once.
- :class:`TopK`: that share alone (Ghorbani et al. 2019).
- :class:`MassCentre`: minus the distance of the centres of mass (Ghorbani et al. 2019); its slope at the image itself is
  zero, so it needs a random start.
- :class:`Target`: minus the correlation with a goal map.
- :class:`Eq10`: Eq. 10 of the SRD paper (Dombrowski et al. 2019).

Example: an objective of one's own
----------------------------------
::

    @dataclass(frozen=True)
    class TopHalf:
        '''Minus the share of the map that lies in the upper half of the image.'''
        def __call__(self, view: View) -> Tensor:
            shown = view.shown
            return -shown[:, : shown.shape[1] // 2].sum((1, 2)) / shown.sum((1, 2))
    Attack(explainer, KeepClass(TopHalf())).run(model, x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attacks.scores import SHARE, as_read, scores_of, ssim_for, top_pixels
from srd_lab import maps
from srd_lab.errors import BadInput, BadValue
from srd_lab.metrics.similarity import PCC

OUTPUT_TERMS = ("probabilities", "logits")


@dataclass(frozen=True)
class Reference:
    """What does not change during an attack on N images.

    map : raw maps (N, h, w) of the images on the original network; logits : (N, K) there; size : (H, W) of the images.
    goal : raw goal maps (N, h, w), or None.
    """

    map: Tensor
    logits: Tensor
    size: tuple[int, int]
    goal: Tensor | None = None
    _known: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def of(self, some: Tensor) -> Reference:
        """The reference of some of the images. some : their indices (n,) int64."""
        part = Reference(
            self.map[some], self.logits[some], self.size, None if self.goal is None else self.goal[some]
        )
        part._known.update({name: known[some] for name, known in self._known.items()})
        return part

    @property
    def shown(self) -> Tensor:
        """The original maps as they are read (:func:`attacks.scores.as_read`), (N, H, W)."""
        return self._once("shown", lambda: as_read(self.map, self.size))

    @property
    def top(self) -> Tensor:
        """The largest 10 % of their pixels, as a mask (N, H, W) bool."""
        return self._once("top", lambda: top_pixels(self.shown))

    @property
    def shown_goal(self) -> Tensor:
        """The goal maps as they are read, (N, H, W). Raises BadInput where there are none."""
        goal = self.goal
        if goal is None:
            raise BadInput("this objective aims at a goal map; give the attack goal maps or goal images")
        return self._once("goal", lambda: as_read(goal, self.size))

    def scores(self, raw: Tensor) -> dict[str, Tensor]:
        """The four scores (N,) of raw maps (N, h, w), see :mod:`attacks.scores`."""
        return scores_of(as_read(raw, self.size), self.shown, self.top)

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]


@dataclass(frozen=True)
class View:
    """What an objective sees of N images, as they are now.

    map, logits : raw maps (N, h, w) and logits (N, K) on the surrogate. reference : of the original images.
    """

    map: Tensor
    logits: Tensor
    reference: Reference

    @property
    def shown(self) -> Tensor:
        """The maps as they are read, (N, H, W)."""
        return as_read(self.map, self.reference.size)


class Objective(Protocol):
    """A frozen dataclass whose fields are its parameters."""

    def __call__(self, view: View) -> Tensor:
        """Loss (N,) of every image by itself; lower is nearer to the attacker's aim."""
        ...


@dataclass(frozen=True)
class Dissimilarity:
    """Pearson correlation of the map with the original one, in [-1, 1]."""

    def __call__(self, view: View) -> Tensor:
        return PCC().score(view.shown, view.reference.shown)


@dataclass(frozen=True)
class Structure:
    """Structural similarity (SSIM) of the map with the original one, in [-1, 1]."""

    def __call__(self, view: View) -> Tensor:
        return ssim_for(view.reference.size).score(view.shown, view.reference.shown)


@dataclass(frozen=True)
class TopK:
    """Share of the map's mass that stays on the largest pixels of the original map, in [0, 1] (Ghorbani et al. 2019).

    share : of all pixels, in (0, 1); BadValue for another.
    """

    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadValue(f"the share of pixels must lie in (0, 1), got {self.share}")

    def __call__(self, view: View) -> Tensor:
        return _mass_on(view.shown, top_pixels(view.reference.shown, self.share))


@dataclass(frozen=True)
class Combined:
    """SSIM + PCC + the share of mass on the original's top 10 %, in [-2, 3]."""

    def __call__(self, view: View) -> Tensor:
        shown, before = view.shown, view.reference.shown
        likeness = ssim_for(view.reference.size).score(shown, before) + PCC().score(shown, before)
        return likeness + _mass_on(shown, view.reference.top)


@dataclass(frozen=True)
class Sum:
    """The sum of several objectives, each with weight 1.

    parts : at least one.
    """

    parts: tuple[Objective, ...]

    def __call__(self, view: View) -> Tensor:
        return torch.stack([part(view) for part in self.parts]).sum(0)


@dataclass(frozen=True)
class MassCentre:
    """Minus the distance of the centres of mass, in parts of the image's diagonal, in [-1, 0] (Ghorbani et al. 2019)."""

    def __call__(self, view: View) -> Tensor:
        change = _centre(view.shown) - _centre(view.reference.shown)
        return -(change.square().sum(1) + 1e-12).sqrt()


@dataclass(frozen=True)
class Target:
    """Minus the Pearson correlation with the goal map, in [-1, 1]. Called without a goal map, it raises BadInput."""

    def __call__(self, view: View) -> Tensor:
        return -PCC().score(view.shown, view.reference.shown_goal)


@dataclass(frozen=True)
class KeepClass:
    """``objective`` plus a hinge that holds the predicted class.

    objective : what is minimised.
    margin : the hinge is 0 while the class's lead over the next one is at least this share of what it was.
    weight : what the hinge grows by from there, for each unit that (lead / what it was) is below ``margin``.
    """

    objective: Objective
    margin: float = 0.1
    weight: float = 10.0

    def __call__(self, view: View) -> Tensor:
        predicted = view.reference.logits.argmax(1)
        loss = self.objective(view)
        if view.logits.shape[1] == 1:
            return loss  # there is no other class
        before = margins(view.reference.logits, predicted).clamp_min(1e-3)
        return loss + self.weight * torch.relu(self.margin - margins(view.logits, predicted) / before)


@dataclass(frozen=True)
class Eq10:
    """Eq. 10: ``map_weight * MSE(map, goal map) + output_weight * MSE(output, original output)`` per image.

    Both are means, over maps that are |.| -> divided by their sum (for which Dombrowski et al. chose the weights).

    map_weight, output_weight : of the two terms.
    output_term : "probabilities" (softmax, Dombrowski's code) or "logits" (as Eq. 10 prints it; with these weights
        the logits term outweighs the map term so far that the attack hardly leaves its start); BadValue for another.
    """

    map_weight: float = 1e11
    output_weight: float = 1e6
    output_term: str = "probabilities"

    def __post_init__(self) -> None:
        if self.output_term not in OUTPUT_TERMS:
            raise BadValue(
                f"output term {self.output_term!r} is not known; expected one of {', '.join(OUTPUT_TERMS)}"
            )

    def __call__(self, view: View) -> Tensor:
        """Loss (N,), >= 0; the goal map is the reference's. Raises BadInput where there is none."""
        if view.reference.goal is None:
            raise BadInput("Eq. 10 aims at a goal map; give the attack goal maps or goal images")
        return self.map_weight * goal_error(view.map, view.reference.goal) + self.output_weight * (
            self._output_error(view.logits, view.reference.logits)
        )

    def _output_error(self, logits: Tensor, logits0: Tensor) -> Tensor:
        if self.output_term == "probabilities":
            logits, logits0 = logits.softmax(1), logits0.softmax(1)
        return (logits - logits0).square().mean(1)


def goal_error(raw: Tensor, goal: Tensor) -> Tensor:
    """Mean squared difference (N,) of two maps, each |.| divided by its sum: the map term of Eq. 10.

    raw, goal : maps (N, h, w), signed or not.
    """
    return (maps.sum_to_one(raw) - maps.sum_to_one(goal)).square().mean((1, 2))


def margins(logits: Tensor, predicted: Tensor) -> Tensor:
    """The logit of one class less the largest of all others, (N,); infinite where there is one class only.

    logits : (N, classes). predicted : the class of each image, (N,) int64.

    Example
    -------
    >>> margins(torch.tensor([[1.0, 4.0, 2.5]]), torch.tensor([1]))
    tensor([1.5000])
    """
    own = logits.gather(1, predicted[:, None])[:, 0]
    others = logits.scatter(1, predicted[:, None], -torch.inf)
    return own - others.amax(1)


def _mass_on(shown: Tensor, pixels: Tensor) -> Tensor:
    total = shown.sum((1, 2))
    return (shown * pixels).sum((1, 2)) / total.masked_fill(total == 0, 1)


def _centre(shown: Tensor) -> Tensor:
    """Centre of mass (N, 2), in parts of the diagonal; a zero map has its centre at 0."""
    height, width = shown.shape[1:]
    rows, columns = (torch.arange(n, dtype=shown.dtype, device=shown.device) for n in (height, width))
    total = shown.sum((1, 2))
    total = total.masked_fill(total == 0, 1)
    found = torch.stack([(shown.sum(2) * rows).sum(1), (shown.sum(1) * columns).sum(1)], 1)
    return found / total[:, None] / (height**2 + width**2) ** 0.5
