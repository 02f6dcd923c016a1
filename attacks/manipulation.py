"""The targeted manipulation: change an image a little so that its explanation becomes that of another image.

Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (NeurIPS 2019), as section 4.3 of the
SRD paper uses it. Adam on the normalised image; the gradient of the loss is taken on a surrogate whose ReLUs are
softplus(beta), beta growing from step to step, and the result is judged on the original network. The explained
class of the attacked image stays what it was.

Example
-------
>>> attack = Manipulation(make_explainer("srd", start="ones"), steps=150)
>>> result = attack.run(model, x, goal_images)
>>> result.adversarial, result.scores["ssim"], result.prediction_kept
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attacks.objective import Budget, Objective
from srd_lab import maps
from srd_lab.backprop import normalisation_scale
from srd_lab.checks import check_input, check_target
from srd_lab.intercept import SmoothModel
from srd_lab.metrics.similarity import PCC, SSIM
from srd_lab.types import Explainer, SrdLabError

BETAS = (0.9, 0.999)  # Adam's defaults, as in both papers' code
EPSILON = 1e-8
SCORES = ("ssim", "pcc", "ssim_target", "pcc_target")


@dataclass(frozen=True)
class AttackResult:
    """What the attack did to N images; maps are raw, (N, H, W), on the original network.

    adversarial, best : (N, C, H, W) pixels: the last iterate, and the judged iterate nearest to the goal map among
        those that kept the prediction (the last one where none did).
    map_original, map_adversarial, map_best, map_target : maps before, after (last and best), and of the goal image.
    logits_original, logits_adversarial : (N, K).
    target : (N,) the explained class.
    steps : (N,) steps taken; beta : (N,) the surrogate's beta at the last of them.
    diverged : (N,) bool, whether an image ended early because the attack's gradient was not finite; all else is of
        the iterate before that, which is the last one.
    mse : (N,) mean squared change in normalised units; linf : (N,) largest change of a pixel, in units of 0..255.
    mse_best : the same for ``best``.
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
    """Targeted manipulation of one explanation method.

    steps : largest number of Adam steps; lr : their size, in normalised units.
    stop_mse : an image stops once its mean squared change (normalised units) reaches this.
    beta_start, beta_end : the surrogate's beta is ``beta_start * (beta_end / beta_start) ** (i / steps)`` at step i.
    judge_every : steps between two looks at the original network; None looks about 10 times.
    """

    explainer: Explainer
    steps: int = 150
    lr: float = 1e-3
    objective: Objective = field(default_factory=Objective)
    budget: Budget = field(default_factory=Budget)
    stop_mse: float = 1e-3
    beta_start: float = 10.0
    beta_end: float = 100.0
    judge_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "stop_mse", "beta_start", "beta_end"):
            if not getattr(self, name) > 0:
                raise SrdLabError(f"the attack needs {name} > 0, got {getattr(self, name)}")

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        goal_images: Tensor,
        target: Tensor | int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> AttackResult:
        """Attack images x (N, C, H, W) in [0, 1] towards the maps of ``goal_images`` (same shape).

        ``target`` (N,) is the class explained for x, None = predicted; a goal image is explained for its own
        predicted class. Images are independent of each other; one whose gradient is not finite stops where it
        stands. ``on_step`` is called with the steps left over when an image stops early as well, so that it adds
        up to N * steps.
        """
        check_input(x, model)
        check_input(goal_images, model)
        if x.shape != goal_images.shape:
            raise SrdLabError(
                f"every image needs one goal image of its shape, got {tuple(x.shape)} and {tuple(goal_images.shape)}"
            )
        x, goal_images = x.detach(), goal_images.detach()
        low, high = (float(v) for v in torch.stack([x, goal_images]).aminmax())
        if low < 0 or high > 1:
            raise SrdLabError(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]")
        return _Attack(self, model, x, goal_images, target).run(on_step or (lambda steps: None))


class _Attack:
    """One batch under attack; images drop out of the active set when they stop."""

    def __init__(
        self, how: Manipulation, model: nn.Module, x: Tensor, goal_images: Tensor, target: Tensor | int | None
    ) -> None:
        self.how, self.model, self.x = how, model, x
        self.scale = normalisation_scale(model, x)
        self.size = (x.shape[2], x.shape[3])
        self.map0, self.logits0 = how.explainer.explain_with_logits(model, x, target)
        self.target = check_target(target, self.logits0)
        self.map_target = how.explainer.explain(model, goal_images)
        self.goal = maps.sum_to_one(self.map_target)
        self.adversarial, self.best = x.clone(), x.clone()
        self.best_error = torch.full_like(x[:, 0, 0, 0], torch.inf)
        self.steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.diverged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.moments = (torch.zeros_like(x), torch.zeros_like(x))
        self.loss = x.new_full((len(x), how.steps), torch.nan)
        self.judged: list[dict[str, Tensor]] = []
        self.surrogate = {name: torch.full_like(self.best_error, torch.nan) for name in SCORES[:2]}

    def run(self, on_step: Callable[[int], None]) -> AttackResult:
        active = torch.arange(len(self.x), device=self.x.device)
        every = self.how.judge_every or max(1, self.how.steps // 10)
        for i in range(self.how.steps):
            finite = self._step(i, active)
            if not finite.all():
                self._leave(active[~finite], i)
                on_step(int((~finite).sum()) * (self.how.steps - i))
                active = active[finite]
                if len(active) == 0:
                    break
            stopped = self._mse(active) >= self.how.stop_mse
            if (i + 1) % every == 0 or i + 1 == self.how.steps:
                self._judge(active, i + 1)
            elif stopped.any():
                self._judge(active[stopped], i + 1)
            on_step(len(active) + int(stopped.sum()) * (self.how.steps - i - 1))
            self._judge_surrogate(active if i + 1 == self.how.steps else active[stopped], i)
            active = active[~stopped]
            if len(active) == 0:
                break
        return self._result()

    def _beta(self, step: int) -> float:
        how = self.how
        return float(how.beta_start * (how.beta_end / how.beta_start) ** (step / how.steps))

    def _leave(self, some: Tensor, i: int) -> None:
        """Images that cannot take step i end where they stand, on the surrogate of the step before."""
        self.diverged[some] = True
        self._judge(some, i)
        self._judge_surrogate(some, max(i - 1, 0))

    def _step(self, i: int, active: Tensor) -> Tensor:
        """Move the images whose gradient is finite; which of them these are."""
        surrogate = SmoothModel(self.model, self._beta(i))
        x = self.adversarial[active].requires_grad_()
        with torch.enable_grad():
            raw, logits = self.how.explainer.explain_with_logits(surrogate, x, self.target[active])
            loss = self.how.objective(raw, self.goal[active], logits, self.logits0[active])
            (slope,) = torch.autograd.grad(loss.sum(), x)
        finite = slope.isfinite().flatten(1).all(1)
        moving = active[finite]
        self.loss[moving, i] = loss.detach()[finite]
        direction = self._adam(slope[finite] / self.scale, moving, i + 1)
        moved = x.detach()[finite] - self.how.lr * direction / self.scale
        self.adversarial[moving] = self.how.budget.project(moved, self.x[moving])
        self.steps[moving] = i + 1
        return finite

    def _adam(self, slope: Tensor, active: Tensor, step: int) -> Tensor:
        """Adam's direction for a gradient in normalised units; every image has its own moments."""
        first, second = self.moments
        first[active] = BETAS[0] * first[active] + (1 - BETAS[0]) * slope
        second[active] = BETAS[1] * second[active] + (1 - BETAS[1]) * slope.square()
        mean, square = first[active] / (1 - BETAS[0] ** step), second[active] / (1 - BETAS[1] ** step)
        return mean / (square.sqrt() + EPSILON)

    def _mse(self, some: Tensor) -> Tensor:
        return ((self.adversarial[some] - self.x[some]) * self.scale).square().mean((1, 2, 3))

    def _judge(self, some: Tensor, step: int) -> None:
        """Look at the original network: scores along the way, and the best iterate so far."""
        x = self.adversarial[some]
        raw, logits = self.how.explainer.explain_with_logits(self.model, x, self.target[some])
        row = {name: self.x.new_full((len(self.x),), torch.nan) for name in ("step", "mse", "linf", *SCORES)}
        row["step"][some] = float(step)
        row["mse"][some] = self._mse(some)
        row["linf"][some] = 255 * (x - self.x[some]).abs().amax((1, 2, 3))
        for name, score in self._similarity(raw, some).items():
            row[name][some] = score.to(self.x)
        self.judged.append(row)
        error = (maps.sum_to_one(raw) - self.goal[some]).square().mean((1, 2))
        kept = logits.argmax(1) == self.logits0[some].argmax(1)
        better = kept & (error < self.best_error[some])
        self.best[some[better]] = x[better]
        self.best_error[some[better]] = error[better]

    def _judge_surrogate(self, some: Tensor, i: int) -> None:
        """How far the maps of images that end at step i have moved on the surrogate of that step."""
        if len(some) == 0:
            return
        surrogate, explain = SmoothModel(self.model, self._beta(i)), self.how.explainer.explain
        before, after = (explain(surrogate, x[some], self.target[some]) for x in (self.x, self.adversarial))
        scores = similarity(after, before, self.map_target[some], self.size)
        for name, values in self.surrogate.items():
            values[some] = scores[name].to(values)

    def _similarity(self, raw: Tensor, some: Tensor) -> dict[str, Tensor]:
        return similarity(raw, self.map0[some], self.map_target[some], self.size)

    def _result(self) -> AttackResult:
        none_kept = self.best_error.isinf()
        best = torch.where(none_kept[:, None, None, None], self.adversarial, self.best)
        explain = self.how.explainer.explain_with_logits
        map_last, logits = explain(self.model, self.adversarial, self.target)
        map_best, _ = explain(self.model, best, self.target)
        everyone = torch.arange(len(self.x), device=self.x.device)
        start = self._similarity(self.map0, everyone)
        return AttackResult(
            adversarial=self.adversarial,
            best=best,
            map_original=self.map0,
            map_adversarial=map_last,
            map_best=map_best,
            map_target=self.map_target,
            logits_original=self.logits0,
            logits_adversarial=logits,
            target=self.target,
            steps=self.steps,
            beta=self.x.new_tensor([self._beta(max(int(step) - 1, 0)) for step in self.steps]),
            diverged=self.diverged,
            mse=self._mse(everyone),
            linf=255 * (self.adversarial - self.x).abs().amax((1, 2, 3)),
            mse_best=((best - self.x) * self.scale).square().mean((1, 2, 3)),
            prediction_kept=logits.argmax(1) == self.logits0.argmax(1),
            scores=self._similarity(map_last, everyone),
            scores_best=self._similarity(map_best, everyone),
            scores_start={name: start[name] for name in SCORES[2:]},
            scores_surrogate=self.surrogate,
            loss=self.loss,
            curve={name: torch.stack([row[name] for row in self.judged], 1) for name in self.judged[0]},
        )


def similarity(raw: Tensor, original: Tensor, goal: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """SSIM and PCC (N,) of raw maps (N, h, w) to the original's and the goal's, each |.|, divided by its maximum and
    stretched to ``size`` where it is smaller."""
    shown, reference, target = (
        maps.upsample(m, size) if m.shape[1:] != size else m
        for m in map(maps.max_to_one, (raw, original, goal))
    )
    window = min(SSIM.window, *(side - 1 + side % 2 for side in size))
    ssim, pcc = SSIM(window), PCC()
    return {
        "ssim": ssim.score(shown, reference),
        "pcc": pcc.score(shown, reference),
        "ssim_target": ssim.score(shown, target),
        "pcc_target": pcc.score(shown, target),
    }


def noise_at_equal_mse(x: Tensor, mse: Tensor, scale: Tensor, budget: Budget, noise: Tensor) -> Tensor:
    """Images x (N, C, H, W) plus noise scaled, within the budget, to the mean squared change ``mse`` (N,).

    The control of the attack: the same distance, but no aim. ``noise`` (N, C, H, W) is in normalised units.
    """
    low, high = torch.zeros_like(mse), torch.full_like(mse, 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        noisy = budget.project(x + middle[:, None, None, None] * noise / scale, x)
        reached = ((noisy - x) * scale).square().mean((1, 2, 3)) >= mse
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return budget.project(x + high[:, None, None, None] * noise / scale, x)
