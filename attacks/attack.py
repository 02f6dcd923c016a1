"""One attack on an explanation: objective x optimiser x budget x surrogate, in one loop.

Every step explains the images on the surrogate, differentiates the objective in the pixels and lets the optimiser move each
image within the budget. What an image came to is judged on the original network alone: the best iterate for every score is
kept, among those that kept the predicted class. Images are independent of each other, and what is drawn for an image
depends on the seed and the image's key, not on the batch.

Example
-------
>>> from srd_lab.registry import make_explainer
>>> attack = Attack(make_explainer("gradient"), KeepClass(Combined()), budget=Budget.named("l2", 2.0), steps=3)
>>> outcome = attack.run(model, x)
>>> outcome.worst["pcc"].shape, outcome.images["pcc"].shape    # the lowest correlation reached, and where
(torch.Size([2]), torch.Size([2, 3, 64, 64]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attacks.budget import Budget, mean_square
from attacks.objective import Combined, KeepClass, Objective, Reference, View, goal_error
from attacks.optimiser import PGD, Optimiser, unit
from attacks.scores import SCORES, as_read, ssim_for
from attacks.surrogate import Surrogate
from srd_lab.conditions import together
from srd_lab.engine.preconditions import check_input
from srd_lab.errors import BadInput, BadValue, NoGradient
from srd_lab.logits import check_target
from srd_lab.metrics.similarity import PCC
from srd_lab.normalise import normalisation_scale
from srd_lab.runtime import generator
from srd_lab.types import Explainer, name_of

LOOKS = 10  # at the original network, by an attack on a surrogate
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """What an attack did to N images; maps are raw, (N, h, w), on the original network.

    adversarial : (N, C, H, W) pixels in [0, 1], the last iterate.
    images, worst : by score, the judged iterate with the lowest one among those that kept the predicted class, and that
        score (N,); the image itself and 1 where there was none. With goal maps also by ``goal_error``, infinite where there
        was none.
    reference : original maps, logits and goal maps; target : (N,) the explained class; scale : (1, C, 1, 1) of the
        normalisation.
    steps : (N,) steps taken; loss : (N, steps) on the surrogate, NaN after an image ended.
    diverged : (N,) bool, whether an image ended early because its gradient was not finite.
    stuck : (N,) share of the steps whose gradient was zero, in [0, 1].
    curve : looks at the original network, (N, J) by name: ``step``, ``mse`` (normalised), ``linf`` (0..255), ``kept``
        and the scores; NaN after an image ended.
    """

    adversarial: Tensor
    images: dict[str, Tensor]
    worst: dict[str, Tensor]
    reference: Reference
    target: Tensor
    scale: Tensor
    steps: Tensor
    loss: Tensor
    diverged: Tensor
    stuck: Tensor
    curve: dict[str, Tensor]


@dataclass(frozen=True)
class Attack:
    """An attack by gradients on one explanation method.

    explainer : the method, with a map that has a gradient in the image.
    objective : what is minimised (:mod:`attacks.objective`).
    optimiser : how the image moves (:mod:`attacks.optimiser`).
    budget : how far it may go (:mod:`attacks.budget`).
    surrogate : the network that is differentiated (:mod:`attacks.surrogate`).
    steps : iterations, > 0.
    start : length of the Gaussian random start, in parts of the budget's radius, >= 0; 0 = the image itself.
    draws : gradients that are averaged per step, > 0, for explainers that draw at random themselves.
    judge_every : steps between two looks at the original network; None = every step where that costs nothing, because the
        attack differentiates that network, else about 10 looks.
    seed : decides the random starts, together with each image's key.

    Raises BadValue for values out of range.
    """

    explainer: Explainer
    objective: Objective = field(default_factory=lambda: KeepClass(Combined()))
    optimiser: Optimiser = field(default_factory=PGD)
    budget: Budget = field(default_factory=lambda: Budget.named("legacy"))
    surrogate: Surrogate = field(default_factory=Surrogate)
    steps: int = 40
    start: float = 0.3
    draws: int = 1
    judge_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "draws"):
            if not getattr(self, name) > 0:
                raise BadValue(f"the attack needs {name} > 0, got {getattr(self, name)}")
        if not self.start >= 0:
            raise BadValue(f"the attack needs start >= 0, got {self.start}")

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        goal: Tensor | None = None,
        keys: Sequence[int | str] | None = None,
        init: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Outcome:
        """Attack images x (N, C, H, W) in [0, 1].

        target : (N,) the class that is explained, None = predicted; it stays the same during the attack.
        goal : raw goal maps (N, h, w) for the objectives that aim at one.
        keys : what seeds the random start of every image; default 0..N-1.
        init : images (N, C, H, W) to start from, projected into the budget; None = the random start.
        on_step : called with the steps done, N * ``steps`` in all, those of images that ended early too.

        Raises BadInput for images that are no pixels, targets that are no classes and a missing goal; NoGradient for a
        method whose map has no gradient in the image; Refused where the model cannot be followed.
        """
        check_pixels(model, x)
        return _Run(self, model, x.detach(), target, goal, keys, init).run(on_step or (lambda steps: None))


class _Run:
    """One batch under attack; images drop out of the active set when they end."""

    def __init__(
        self,
        how: Attack,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None,
        goal: Tensor | None,
        keys: Sequence[int | str] | None,
        init: Tensor | None,
    ) -> None:
        self.how, self.model, self.x = how, model, x
        self.scale = normalisation_scale(model, x)
        map0, logits0 = how.explainer.explain_with_logits(model, x, target)
        self.target = check_target(target, logits0)
        self.reference = Reference(map0, logits0, (x.shape[2], x.shape[3]), goal)
        _ = self.reference.top  # known once for all steps
        if init is None:
            self.adversarial = _started(how, x, self.scale, range(len(x)) if keys is None else keys)
        else:
            self.adversarial = how.budget.project(init.detach(), x, self.scale)
        self.best = Best(x, (*SCORES, *(() if goal is None else ("goal_error",))))
        self.moves = how.optimiser.begin(x, how.budget, self.scale, how.steps)
        self.steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.diverged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.stuck = x.new_zeros(len(x))
        self.loss = x.new_full((len(x), how.steps), torch.nan)
        self.looks: list[dict[str, Tensor]] = []

    def run(self, on_step: OnStep) -> Outcome:
        how, active = self.how, torch.arange(len(self.x), device=self.x.device)
        free = how.surrogate.is_original and how.draws == 1 and how.judge_every is None
        every = how.judge_every or max(1, how.steps // LOOKS)
        with together() as looks:
            for i in range(how.steps):
                # a step's one look at the device
                finite, ended = looks.look(*self._step(i, active, judge=free))
                last = i + 1 == how.steps
                if not finite.all():
                    self._look(active[~finite], i)
                    on_step(int((~finite).sum()) * (how.steps - i))
                    active, ended = active[finite], ended[finite]
                    if len(active) == 0:
                        break
                going = not ended.any()
                if last or (not free and (i + 1) % every == 0):
                    self._look(active, i + 1)
                elif not going:
                    self._look(active[ended], i + 1)
                on_step(len(active) + int(ended.sum()) * (how.steps - i - 1))
                active = active if going else active[~ended]
                if len(active) == 0:
                    break
        return self._outcome()

    def _step(self, i: int, active: Tensor, judge: bool) -> tuple[Tensor, Tensor]:
        """Move the images whose gradient is finite; which of the active ones these are, and which of them have ended."""
        x = self.adversarial[active].requires_grad_()
        reference, network = self.reference.of(active), self.how.surrogate.at(self.model, i, self.how.steps)
        slope, total = torch.zeros_like(x), x.new_zeros(len(x))
        for _ in range(self.how.draws):
            with torch.enable_grad():
                raw, logits = self.how.explainer.explain_with_logits(network, x, self.target[active])
                if not raw.requires_grad:
                    raise NoGradient(
                        f"the map of {name_of(self.how.explainer)} has no gradient in the image, so an attack by "
                        "gradients says nothing of it; use the black-box member (--attack black_box, or standard)"
                    )
                loss = self.how.objective(View(raw, logits, reference)).to(x.dtype)
                (once,) = torch.autograd.grad(loss.sum(), x)
            slope, total = slope + once, total + loss.detach()
        if judge:
            self._judge(active, x.detach(), raw.detach(), logits.detach(), i)
        finite = slope.isfinite().flatten(1).all(1)
        self.diverged[active] = ~finite
        self.stuck[active] += (slope == 0).flatten(1).all(1).to(x.dtype) / self.how.steps
        total, moves = total / self.how.draws, finite[:, None, None, None]
        self.loss[active, i] = total.masked_fill(~finite, torch.nan)
        self.steps[active] = torch.where(finite, i + 1, self.steps[active])
        # all are moved, and those without a gradient put back: to choose some, one has to look at the device
        slope = slope.masked_fill(~moves, 0) / self.how.draws
        x = x.detach()
        x = torch.where(moves, self.moves.move(active, x, slope, total, i), x)
        self.adversarial[active] = x
        return finite, finite & self.how.budget.spent(x, self.x[active], self.scale)

    def _look(self, some: Tensor, step: int) -> None:
        """Look at the original network."""
        if len(some) == 0:
            return
        x = self.adversarial[some]
        raw, logits = self.how.explainer.explain_with_logits(self.model, x, self.target[some])
        self._judge(some, x, raw, logits, step)

    def _judge(self, some: Tensor, x: Tensor, raw: Tensor, logits: Tensor, step: int) -> None:
        """Scores along the way, and the best iterates so far."""
        reference = self.reference.of(some)
        kept = logits.argmax(1) == reference.logits.argmax(1)
        found = reference.scores(raw)
        if reference.goal is not None:
            found["goal_error"] = goal_error(raw, reference.goal)
            shown, goal = as_read(raw, reference.size), reference.shown_goal
            found["ssim_target"] = ssim_for(reference.size).score(shown, goal)
            found["pcc_target"] = PCC().score(shown, goal)
        self.best.offer(some, x, found, kept)
        found |= {
            "step": torch.full_like(kept, step, dtype=self.x.dtype),
            "mse": mean_square(x, self.x[some], self.scale),
            "linf": 255 * (x - self.x[some]).abs().amax((1, 2, 3)),
            "kept": kept,
        }
        row = {name: self.x.new_full((len(self.x),), torch.nan) for name in found}
        for name, values in found.items():
            row[name][some] = values.to(self.x)
        self.looks.append(row)

    def _outcome(self) -> Outcome:
        names = self.looks[0] if self.looks else {}
        return Outcome(
            adversarial=self.adversarial,
            images=self.best.images,
            worst=self.best.values,
            reference=self.reference,
            target=self.target,
            scale=self.scale,
            steps=self.steps,
            loss=self.loss,
            diverged=self.diverged,
            stuck=self.stuck,
            curve={name: torch.stack([row[name] for row in self.looks], 1) for name in names},
        )


class Best:
    """The lowest value of every score so far, and the images that have it.

    x : (N, C, H, W), the images before any attack. names : of the scores.

    Attributes, by score: ``values`` (N,), at first 1, or infinite for ``goal_error``; ``images`` (N, C, H, W), at first
    x.
    """

    def __init__(self, x: Tensor, names: Sequence[str]) -> None:
        self.images = {name: x.clone() for name in names}
        worst = {name: torch.inf if name == "goal_error" else 1.0 for name in names}
        self.values = {name: x.new_full((len(x),), value, dtype=x.dtype) for name, value in worst.items()}

    def offer(self, some: Tensor, x: Tensor, found: dict[str, Tensor], kept: Tensor) -> None:
        """Take over what is lower.

        some : (n,) indices of the images that are offered; x : (n, C, H, W) those; found : score -> (n,).
        kept : (n,) bool, whether the class is still the predicted one; the others are passed over.
        """
        for name, best in self.values.items():
            value = found[name].to(best)
            before, images = best[some], self.images[name]
            better = kept & (value < before)
            best[some] = torch.where(better, value, before)
            images[some] = torch.where(better[:, None, None, None], x, images[some])


def check_pixels(model: nn.Module, *batches: Tensor) -> None:
    """Raise BadInput for what is no batch of pixels for this model.

    model : what is to be fed with them. batches : images (N, C, H, W) in [0, 1].
    """
    for x in batches:
        check_input(x, model)
        low, high = (float(v) for v in x.detach().aminmax())
        if low < 0 or high > 1:
            raise BadInput(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]")


def _started(how: Attack, x: Tensor, scale: Tensor, keys: Sequence[int | str]) -> Tensor:
    """Images x moved by Gaussian noise of length ``start`` times the budget's radius, and projected."""
    if how.start == 0:
        return x.clone()
    drawn = [
        torch.randn(x.shape[1:], generator=generator(how.seed, "start", key), dtype=torch.float32)
        for key in keys
    ]
    noise = unit(torch.stack(drawn).to(x)) * how.start * how.budget.radius(x, scale)
    return how.budget.project(x + noise / how.budget.weights(x, scale), x, scale)
