"""Which surrogate does a method need? Measured by short attacks, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.attack import Attack, Outcome
from attacks.budget import Budget
from attacks.objective import Combined
from attacks.scores import SCORES, similarity
from attacks.surrogate import SURROGATES, Surrogate
from srd_lab.errors import NoGradient, Refused
from srd_lab.logits import check_target
from srd_lab.runtime import Batcher
from srd_lab.types import Explainer

NEAR = 0.03  # of the mean score: surrogates that are no better than this


@dataclass(frozen=True)
class Probe:
    """Which surrogate predicts the real change best: the one whose short attack lowers the scores on the network most.

    best : None where no attack is possible. why : the reason for that; else empty.
    scores : surrogate -> mean of PCC, SSIM and top-10 % that it reached, in [-1, 1].
    likeness : PCC of the map on the best surrogate and on the network itself (1 without a surrogate).
    random : whether the map of the same image differs from call to call.
    """

    best: Surrogate | None
    scores: dict[str, float]
    why: str = ""
    likeness: float = 1.0
    random: bool = False


def _reached(attack: Attack, model: nn.Module, x: Tensor, classes: Tensor, batcher: Batcher) -> float | None:
    """Mean of PCC, SSIM and top-10 % after the attack; None where no step had a gradient."""

    def work(some: Sequence[int]) -> Outcome:
        keys = [f"{i}/probe" for i in some]
        return attack.run(model, x[list(some)], classes[list(some)], keys=keys)

    outcomes = batcher.run(work, range(len(x)))
    if all(bool((outcome.stuck > 1 - 1e-4).all()) for outcome in outcomes):
        return None
    worst = {score: torch.cat([outcome.worst[score] for outcome in outcomes]) for score in SCORES[:3]}
    return float(torch.stack(list(worst.values())).mean())


def probe(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    budget: Budget,
    target: Tensor | int | None = None,
    *,
    steps: int = 8,
    seed: int = 0,
    batcher: Batcher | None = None,
) -> Probe:
    """Try every surrogate with a short attack.

    x : images (N, C, H, W) in [0, 1]. budget : of the attacks. target : (N,) the class that is explained, None = predicted.
    steps : of each attack. seed : decides its random starts. batcher : how many images at once; None = all.

    Refused and NoGradient from an attack count as a surrogate that will not do; other errors are passed on.
    """
    first, logits = explainer.explain_with_logits(model, x, target)
    classes = check_target(target, logits)
    again, _ = explainer.explain_with_logits(model, x, classes)
    random = not torch.equal(first.nan_to_num(), again.nan_to_num())
    scores: dict[str, float] = {}
    why = "its gradient is zero on every surrogate"
    for name in SURROGATES:
        # without the hinge: its slope is none of the map
        attack = Attack(
            explainer, Combined(), budget=budget, surrogate=Surrogate.named(name), steps=steps, seed=seed
        )
        try:
            reached = _reached(attack, model, x, classes, batcher or Batcher(len(x)))
        except (Refused, NoGradient) as error:
            why = str(error)
            continue
        if reached is not None:
            scores[name] = reached
    if not scores:
        return Probe(None, scores, why, random=random)
    # Where the network itself does about as well, it is taken: looking at it costs nothing then.
    best = Surrogate.named(next(name for name in scores if scores[name] <= min(scores.values()) + NEAR))
    raw, _ = explainer.explain_with_logits(best.at(model, 0, 1), x, classes)
    likeness = similarity(raw, first, (x.shape[2], x.shape[3]))
    return Probe(best, scores, "", float(likeness["pcc"].mean()), random)
