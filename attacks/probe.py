"""Which surrogate does a method need? Measured by short attacks, not assumed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.attack import Attack, Outcome
from attacks.budget import Budget
from attacks.objective import Combined
from attacks.scores import SCORES, similarity
from attacks.surrogate import SURROGATES, Surrogate
from srd_lab.engine import rules
from srd_lab.errors import NoGradient, Refused, SrdLabError, Unavailable, first_line
from srd_lab.logits import check_target
from srd_lab.runtime import Batcher
from srd_lab.types import Explainer

NEAR = 0.03  # of the mean score: surrogates that are no better than this
SMOOTH = "softplus_30"  # the surrogate on which a map's gradient is held against its slope
DIRECTIONS = 4
STEPS = (1e-7, 1e-8, 1e-9)  # in pixels of [0, 1]
SETTLED = 0.05


@dataclass(frozen=True)
class Probe:
    """Which surrogate predicts the real change best: the one whose short attack lowers the scores on the network most.

    best : None where no attack is possible. why : the reason for that; else empty.
    scores : surrogate -> mean of PCC, SSIM and top-10 % that it reached, in [-1, 1].
    likeness : PCC of the map on the best surrogate and on the network itself (1 without a surrogate).
    random : whether the map of the same image differs from call to call.
    slope_error : how far the map's gradient is from its slope (:func:`slope_error`); None where that was not asked, or
        cannot be told.
    unchecked : why it cannot be told; else empty.
    """

    best: Surrogate | None
    scores: dict[str, float]
    why: str = ""
    likeness: float = 1.0
    random: bool = False
    slope_error: float | None = None
    unchecked: str = ""


def slope_error(explainer: Explainer, model: nn.Module, x: Tensor, classes: Tensor, seed: int) -> float:
    """How far the gradient of the map is from what small changes of the image do to it: 0 = it is the slope.

    explainer : the method. model : what is differentiated. x : images (N, C, H, W) in [0, 1].
    classes : (N,) what is explained. seed : of the sum and of the directions.

    A random sum of the map, along random directions: the slope s by autograd against that by central differences, d, in
    float64; the median of |s - d| / (|s| + |d|) over images and directions. Where no two neighbouring steps give the same
    difference, the map jumps (a pool changes its winner), and that direction says nothing.

    A map of which a part is detached, such as a gradient taken for a constant times the image, has a gradient that is not
    its slope, and whoever follows it is blind to the rest.

    Raises Unavailable, with the reason, where this cannot be told: network or method do not take float64, float64 does not
    fit into memory, the map has no gradient, or most directions say nothing.
    """
    chance = torch.Generator().manual_seed(seed)
    apart: list[Tensor] = []
    try:
        model = copy.deepcopy(model).double()
        for k in range(len(x)):  # one at a time, for memory
            apart += _slope_errors(explainer, model, x[k : k + 1].double(), classes[k : k + 1], chance)
    except (RuntimeError, TypeError, MemoryError, SrdLabError) as error:
        raise Unavailable(f"in float64: {first_line(error)}") from error
    said = torch.cat(apart)
    if said.isfinite().double().mean() < 0.5:
        raise Unavailable("the map jumps however small the change of the image")
    return float(said.nanmedian())


def _slope_errors(
    explainer: Explainer, model: nn.Module, x: Tensor, classes: Tensor, chance: torch.Generator
) -> list[Tensor]:
    """|s - d| / (|s| + |d|) of one image (1, C, H, W) along each direction, (1,); NaN where it says nothing."""

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=chance, dtype=torch.float64).to(like.device)

    leaf = x.clone().requires_grad_()
    raw, _ = explainer.explain_with_logits(model, leaf, classes)
    if raw.dtype != torch.float64 or not raw.requires_grad:
        raise Unavailable("the map is not of that type" if raw.requires_grad else "the map has no gradient")
    weight = drawn(raw)
    (gradient,) = torch.autograd.grad((raw * weight).sum(), leaf)

    def at(change: Tensor) -> Tensor:
        found, _ = explainer.explain_with_logits(model, x + change, classes)
        return (found.detach() * weight).flatten(1).sum(1)

    apart = []
    for way in [drawn(x) for _ in range(DIRECTIONS)]:
        slope = (gradient * way).flatten(1).sum(1)
        differences = [(at(step * way) - at(-step * way)) / (2 * step) for step in STEPS]
        error = torch.full_like(slope, torch.nan)
        for coarse, fine in itertools.pairwise(differences):
            error = torch.where(_apart(coarse, fine) < SETTLED, _apart(slope, fine), error)
        apart.append(error)
    return apart


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / (|a| + |b|) of each, 0 where both are 0."""
    return rules.divide((a - b).abs(), a.abs() + b.abs())


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

    explainer : the method. model : the original network.
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
    apart, few = None, slice(2)
    unchecked = "" if SMOOTH in scores or random else f"it has no gradient on {SMOOTH}"
    if SMOOTH in scores and not random:  # on ReLUs the missing part has no slope either
        try:
            apart = slope_error(
                explainer, Surrogate.named(SMOOTH).at(model, 0, 1), x[few], classes[few], seed
            )
        except Unavailable as error:
            unchecked = str(error)
    return Probe(best, scores, "", float(likeness["pcc"].mean()), random, apart, unchecked)
