"""The targeted manipulation: change an image a little so that its explanation becomes that of another image.

Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (NeurIPS 2019), as section 4.3 of the
SRD paper uses it. Adam on the normalised image; the gradient of the loss is taken on a surrogate whose ReLUs are
softplus(beta), beta growing from step to step, and the result is judged on the original network. The explained
class of the attacked image stays what it was.

Example
-------
::

    attack = Manipulation(make_explainer("srd", start="ones"), steps=150)
    result = attack.run(model, x, goal_images)
    result.adversarial, result.scores["ssim"], result.prediction_kept
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attacks.attack import Attack, Outcome, check_pixels
from attacks.budget import LEGACY_MSE, Budget, mean_square
from attacks.objective import Eq10
from attacks.optimiser import Adam
from attacks.scores import as_read, ssim_for
from attacks.surrogate import Surrogate
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput
from srd_lab.metrics.similarity import PCC
from srd_lab.types import Explainer

SCORES = ("ssim", "pcc", "ssim_target", "pcc_target")


@dataclass(frozen=True)
class AttackResult:
    """What the attack did to N images; maps are raw, (N, h, w), on the original network.

    adversarial, best : (N, C, H, W) pixels: the last iterate, and the judged iterate nearest to the goal map among
        those that kept the prediction (the last one where none did).
    map_original, map_adversarial, map_best, map_target : maps before, after (last and best), and of the goal image.
    logits_original, logits_adversarial : (N, K).
    target : (N,) the explained class.
    steps : (N,) steps taken; beta : (N,) the surrogate's beta at the last of them.
    diverged : (N,) bool, whether an image ended early because the attack's gradient was not finite; all else is of
        the iterate before that, which is the last one.
    mse : (N,) mean squared change in normalised units; linf : (N,) largest change of a pixel, in units of 0..255.
    mse_best : the same as ``mse`` for ``best``.
    prediction_kept : (N,) bool, whether the original network still predicts the same class.
    scores, scores_best : similarity (N,) by name: ``ssim``, ``pcc`` to the original's map (robustness) and
        ``ssim_target``, ``pcc_target`` to the goal's map (success of the attack), of maps divided by their maximum.
    scores_start : ``ssim_target``, ``pcc_target`` before the attack.
    scores_surrogate : ``ssim``, ``pcc`` as the attacker sees them: both maps on the surrogate of the last step.
    loss : (N, steps) on the surrogate, NaN after an image stopped.
    curve : what was measured on the original network along the way, (N, J) by name: ``step``, ``mse``, ``linf``
        and the scores; NaN after an image stopped.
    """

    adversarial: Tensor
    best: Tensor
    map_original: Tensor
    map_adversarial: Tensor
    map_best: Tensor
    map_target: Tensor
    logits_original: Tensor
    logits_adversarial: Tensor
    target: Tensor
    steps: Tensor
    beta: Tensor
    diverged: Tensor
    mse: Tensor
    linf: Tensor
    mse_best: Tensor
    prediction_kept: Tensor
    scores: dict[str, Tensor]
    scores_best: dict[str, Tensor]
    scores_start: dict[str, Tensor]
    scores_surrogate: dict[str, Tensor]
    loss: Tensor
    curve: dict[str, Tensor]


@dataclass(frozen=True)
class Manipulation:
    """Targeted manipulation of one explanation method: the attack ``eq10``.

    explainer : the method, with a map that has a gradient in the image.
    steps : largest number of Adam steps, > 0; lr : their size, in normalised units, > 0.
    objective : its weights and output term. budget : that the change is projected into; by default 8/255 per pixel.
    stop_mse : an image stops once its mean squared change (normalised units) reaches this, > 0.
    beta_start, beta_end : > 0; the surrogate's beta is ``beta_start * (beta_end / beta_start) ** (i / steps)`` at step i.
    judge_every : steps between two looks at the original network; None looks about 10 times.

    Raises BadValue for values out of range.
    """

    explainer: Explainer
    steps: int = 100
    lr: float = 1e-3
    objective: Eq10 = field(default_factory=Eq10)
    budget: Budget = field(default_factory=Budget)
    stop_mse: float = LEGACY_MSE
    beta_start: float = 10.0
    beta_end: float = 100.0
    judge_every: int | None = None

    def __post_init__(self) -> None:
        _ = self.attack  # refuses what makes no sense

    @property
    def attack(self) -> Attack:
        """The same as objective x optimiser x budget x surrogate."""
        return Attack(
            self.explainer,
            objective=self.objective,
            optimiser=Adam(self.lr),
            budget=replace(self.budget, stop_mse=self.stop_mse),
            surrogate=Surrogate(self.beta_start, self.beta_end),
            steps=self.steps,
            start=0.0,
            judge_every=self.judge_every,
        )

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        goal_images: Tensor,
        target: Tensor | int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> AttackResult:
        """Attack images x (N, C, H, W) in [0, 1] towards the maps of ``goal_images`` (same shape).

        model : the original network.
        target : (N,) the class explained for x, None = predicted; a goal image is explained for its own predicted class.
        on_step : called with the steps done, and with those left over when an image stops early, N * ``steps`` in all.

        Images are independent of each other; one whose gradient is not finite stops where it stands.

        Raises BadInput for images that are no pixels or of different shapes, and the errors of :meth:`Attack.run`.
        """
        check_pixels(model, x, goal_images)
        if x.shape != goal_images.shape:
            raise BadInput(
                f"every image needs one goal image of its shape, got {tuple(x.shape)} and {tuple(goal_images.shape)}"
            )
        goal, _ = self.explainer.explain_with_logits(model, goal_images.detach())
        outcome = self.attack.run(model, x, target, goal=goal, on_step=on_step)
        return self._result(model, x.detach(), goal, outcome)

    def _result(self, model: nn.Module, x: Tensor, goal: Tensor, outcome: Outcome) -> AttackResult:
        target, scale, reference = outcome.target, outcome.scale, outcome.reference
        none_kept = outcome.worst["goal_error"].isinf()[:, None, None, None]
        best = torch.where(none_kept, outcome.adversarial, outcome.images["goal_error"])
        map_last, logits = self.explainer.explain_with_logits(model, outcome.adversarial, target)
        map_best, _ = self.explainer.explain_with_logits(model, best, target)

        def scores(raw: Tensor) -> dict[str, Tensor]:
            return similarity(raw, reference.map, goal, reference.size)

        return AttackResult(
            adversarial=outcome.adversarial,
            best=best,
            map_original=reference.map,
            map_adversarial=map_last,
            map_best=map_best,
            map_target=goal,
            logits_original=reference.logits,
            logits_adversarial=logits,
            target=target,
            steps=outcome.steps,
            beta=x.new_tensor([self._beta(step) for step in outcome.steps.tolist()]),
            diverged=outcome.diverged,
            mse=mean_square(outcome.adversarial, x, scale),
            linf=255 * (outcome.adversarial - x).abs().amax((1, 2, 3)),
            mse_best=mean_square(best, x, scale),
            prediction_kept=logits.argmax(1) == reference.logits.argmax(1),
            scores=scores(map_last),
            scores_best=scores(map_best),
            scores_start={name: score for name, score in scores(reference.map).items() if name in SCORES[2:]},
            scores_surrogate=self._on_surrogate(model, x, goal, outcome),
            loss=outcome.loss,
            curve=outcome.curve,
        )

    def _beta(self, steps_taken: int) -> float:
        """Beta of the last step."""
        return self.attack.surrogate.beta_at(max(steps_taken - 1, 0), self.steps)

    def _on_surrogate(self, model: nn.Module, x: Tensor, goal: Tensor, outcome: Outcome) -> dict[str, Tensor]:
        """How far the maps have moved on the surrogate of every image's last step."""
        found = {name: x.new_full((len(x),), torch.nan) for name in SCORES[:2]}
        for steps in outcome.steps.unique().tolist():
            some = (outcome.steps == steps).nonzero()[:, 0]
            surrogate, target = SmoothModel(model, self._beta(steps)), outcome.target[some]
            before, after = (
                self.explainer.explain_with_logits(surrogate, images[some], target)[0]
                for images in (x, outcome.adversarial)
            )
            scores = similarity(after, before, goal[some], outcome.reference.size)
            for name, values in found.items():
                values[some] = scores[name].to(values)
        return found


def similarity(raw: Tensor, original: Tensor, goal: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """SSIM and PCC (N,) in [-1, 1] of raw maps (N, h, w) to the original's and the goal's, as they are read.

    size : (H, W) of the images. Names are ``ssim``, ``pcc``, ``ssim_target`` and ``pcc_target``.
    """
    shown, reference, target = (as_read(m, size) for m in (raw, original, goal))
    ssim, pcc = ssim_for(size), PCC()
    return {
        "ssim": ssim.score(shown, reference),
        "pcc": pcc.score(shown, reference),
        "ssim_target": ssim.score(shown, target),
        "pcc_target": pcc.score(shown, target),
    }


def noise_at_equal_mse(x: Tensor, mse: Tensor, scale: Tensor, budget: Budget, noise: Tensor) -> Tensor:
    """Images x (N, C, H, W) plus noise scaled, within the budget, to the mean squared change ``mse`` (N,) in normalised
    units.

    The control of the attack: the same distance, but no aim.

    scale : (1, C, 1, 1) of the normalisation. noise : (N, C, H, W) in normalised units.
    """
    low, high = torch.zeros_like(mse), torch.full_like(mse, 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        noisy = budget.project(x + middle[:, None, None, None] * noise / scale, x, scale)
        reached = ((noisy - x) * scale).square().mean((1, 2, 3)) >= mse
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return budget.project(x + high[:, None, None, None] * noise / scale, x, scale)
