"""The standard evaluation's attack: an ensemble without parameters to tune, worst case per image.

| member | letter | objective | restarts (full) |
|---|---|---|---|
| ``dissimilarity`` | U | Pearson correlation with the original map | 3 |
| ``combined`` | S | SSIM + PCC + mass on the top 10 % | 1, on every surrogate |
| ``top_k`` | K | mass on the original's top 10 % | 1 |
| ``target`` | T | correlation with a goal map | 1 for each of 3 goals |
| ``mass_centre`` | C | distance of the centres of mass | 1 |
| ``polish`` | P | PCC, SSIM, top 10 %, each from the worst image that the others found | 3 runs of half the iterations |
| ``black_box`` | B | map and class only (:mod:`attacks.black_box`) | 1 |
| ``transfer`` | X | the other methods' adversarial images | none |

``quick``: 40 iterations, one restart, one goal, 500 queries. ``full``: 100 iterations, 5,000 queries. Reported beside
them and never counted: noise of the same norm and a single step. What is scored are images of 8 bits within the budget
whose predicted class is the original's. The goals are the map of another image, and the own map mirrored and turned by
180 degrees.

Example
-------
>>> ensemble = Ensemble(("dissimilarity", "combined", "top_k"), "quick", Budget.named("legacy"))
>>> found = ensemble.run(model, explainer, x, surrogate=probe(explainer, model, x, ensemble.budget).best)
>>> found.worst["pcc"], found.member["pcc"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attacks.attack import Attack, Best, NoGradient, Outcome
from attacks.black_box import BlackBox
from attacks.budget import Budget, to_8_bits
from attacks.manipulation import noise_at_equal_mse
from attacks.objective import (
    Combined,
    Dissimilarity,
    KeepClass,
    MassCentre,
    Objective,
    Reference,
    Structure,
    Target,
    TopK,
)
from attacks.optimiser import PGD
from attacks.scores import SCORES, similarity
from attacks.surrogate import SURROGATES, Surrogate
from srd_lab.backprop import normalisation_scale
from srd_lab.checks import check_target
from srd_lab.runtime import Batcher, generator
from srd_lab.types import Explainer, SrdLabError

OBJECTIVES: dict[str, Objective] = {
    "dissimilarity": Dissimilarity(),
    "combined": Combined(),
    "top_k": TopK(),
    "target": Target(),
    "mass_centre": MassCentre(),
}
WHITE_BOX = (*OBJECTIVES, "polish")
MEMBERS = (*WHITE_BOX, "black_box", "transfer")
LETTERS = dict(zip(MEMBERS, "USKTCPBX", strict=True))
# Small steps from the best of larger ones: alone they find less, and large steps from there throw the start away.
POLISHED: dict[str, Objective] = {"pcc": Dissimilarity(), "ssim": Structure(), "top_k": TopK()}
POLISH = PGD(first=0.5, last=0.03)
NEAR = 0.03  # of the mean score: surrogates that are no better than this
CONTROLS = ("noise", "one_step")  # reported, never counted


@dataclass(frozen=True)
class Mode:
    """How much work: iterations of a white-box member, restarts of ``dissimilarity``, goal maps of ``target``, queries."""

    steps: int
    restarts: int
    goals: int
    queries: int


MODES = {"quick": Mode(40, 1, 1, 500), "full": Mode(100, 3, 3, 5000)}


@dataclass(frozen=True)
class Found:
    """What an ensemble found for N images; every adversarial image is of 8 bits and keeps the predicted class.

    worst : lowest score (N,) of every kind, over the members that count; 1 where no member lowered it.
    images : the images (N, C, H, W) that have it; by : (N,) which member found it (index into ``names``, -1 = none).
    names : the members that ran. members : member -> score -> (N,); also the controls.
    used : (N,) smallest share of the budget that a white-box member's last iterate uses; stuck : (N,) largest share of steps
        without any gradient; diverged : (N,) whether a gradient was not finite; gain : (N,) how much the strongest
        white-box member still gained in its last fifth (mean of PCC, SSIM and top-10 %). NaN without such members.
    reference : original maps and logits; target : (N,).
    """

    names: tuple[str, ...]
    worst: dict[str, Tensor]
    images: dict[str, Tensor]
    by: dict[str, Tensor]
    members: dict[str, dict[str, Tensor]]
    used: Tensor
    stuck: Tensor
    diverged: Tensor
    gain: Tensor
    reference: Reference
    target: Tensor


@dataclass(frozen=True)
class Ensemble:
    """Members of the standard evaluation on one budget.

    members : names of :data:`MEMBERS` (``transfer`` needs other methods' images, and is added by the study).
    mode : "quick" or "full"; steps, queries : override the mode's.
    seed : decides everything that is drawn, together with each image's key.
    """

    members: tuple[str, ...] = MEMBERS[:-1]
    mode: str = "quick"
    budget: Budget = field(default_factory=lambda: Budget.named("legacy"))
    seed: int = 0
    steps: int | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SrdLabError(f"the mode {self.mode!r} is not known; expected one of {', '.join(MODES)}")
        if unknown := [name for name in self.members if name not in MEMBERS]:
            raise SrdLabError(f"there is no attack {unknown[0]!r}; choose of {', '.join(MEMBERS)}")

    @property
    def white_box(self) -> tuple[str, ...]:
        return tuple(name for name in self.members if name in WHITE_BOX)

    @property
    def how(self) -> Mode:
        mode = MODES[self.mode]
        return Mode(self.steps or mode.steps, mode.restarts, mode.goals, self.queries or mode.queries)

    def cost(self, white: bool = True) -> int:
        """Steps and queries per image, as ``on_step`` counts them."""
        how, total = self.how, 0
        for name in self.white_box if white else ():
            runs = (
                len(POLISHED) * max(1, how.steps // 2)
                if name == "polish"
                else how.steps * len(self._runs(name, Surrogate()))
            )
            total += runs
        return total + (how.queries if "black_box" in self.members else 0)

    def run(
        self,
        model: nn.Module,
        explainer: Explainer,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        surrogate: Surrogate | None = None,
        goal: Tensor | None = None,
        keys: Sequence[int | str] | None = None,
        draws: int = 1,
        on_step: Callable[[int], None] | None = None,
    ) -> Found:
        """Attack images x (N, C, H, W), rounded to 8 bits first.

        surrogate : what the white-box members differentiate; None = the method has no gradient, and they do not run.
        goal : maps (N, h, w) that ``target`` aims at first; None = the mirrored own map.
        keys : what seeds the draws of every image; default 0..N-1.
        draws : gradients averaged per step, for a method that draws at random.
        """
        x = to_8_bits(x.detach())
        keys = list(range(len(x)) if keys is None else keys)
        judge = _Judge(self.budget, model, explainer, x, target)
        tick = on_step or (lambda steps: None)
        outcomes: list[Outcome] = []
        for name in self.white_box if surrogate else ():
            for attack, aim, start in self._attacks(
                name, explainer, surrogate or Surrogate(), judge, goal, draws
            ):
                seeds = [f"{key}/{name}/{attack.seed}" for key in keys]
                try:
                    outcome = attack.run(
                        model, x, judge.target, goal=aim, keys=seeds, init=start, on_step=tick
                    )
                except NoGradient:
                    if attack.surrogate == surrogate:
                        raise
                    tick(len(x) * attack.steps)
                    continue  # one of the other surrogates that full mode tries
                judge.add(name, outcome.images)
                if attack.surrogate == surrogate:
                    outcomes.append(outcome)
        if "black_box" in self.members:
            search = BlackBox(explainer, self.budget, self.how.queries, seed=self.seed)
            judge.add("black_box", search.run(model, x, judge.target, keys=keys, on_step=tick).images)
        self._controls(judge, explainer, model, surrogate, keys, goal)
        return judge.found(
            tuple(n for n in self.members if n in judge.members), *_diagnosis(self.budget, x, outcomes)
        )

    def _runs(self, name: str, surrogate: Surrogate) -> list[tuple[int, Surrogate]]:
        """Restart and surrogate of every run of a member."""
        full = self.mode == "full"
        if name == "combined" and full:
            others = [Surrogate.named(other) for other in SURROGATES if Surrogate.named(other) != surrogate]
            return [(0, surrogate), *((0, other) for other in others)]
        count = {"dissimilarity": self.how.restarts, "target": self.how.goals}.get(name, 1)
        return [(restart, surrogate) for restart in range(count)]

    def _attacks(
        self,
        name: str,
        explainer: Explainer,
        surrogate: Surrogate,
        judge: _Judge,
        goal: Tensor | None,
        draws: int,
    ) -> Iterator[tuple[Attack, Tensor | None, Tensor | None]]:
        """The runs of a member: attack, goal map, and where it starts (None = at random)."""
        own = judge.reference.map
        goals = [own.flip(-1) if goal is None else goal, own.flip(-1), own.flip(-1, -2)]
        first = Attack(explainer, budget=self.budget, draws=draws, seed=self.seed)
        if name == "polish":
            for score, objective in POLISHED.items():
                attack = replace(
                    first,
                    objective=KeepClass(objective),
                    optimiser=POLISH,
                    surrogate=surrogate,
                    steps=max(1, self.how.steps // 2),
                    judge_every=_looks(surrogate, draws),
                )
                yield attack, None, judge.best.images[score].clone()
            return
        for restart, way in self._runs(name, surrogate):
            attack = replace(
                first,
                objective=KeepClass(OBJECTIVES[name]),
                surrogate=way,
                steps=self.how.steps,
                judge_every=_looks(way, draws),
                seed=self.seed + restart,
            )
            yield attack, goals[restart] if name == "target" else None, None

    def _controls(
        self,
        judge: _Judge,
        explainer: Explainer,
        model: nn.Module,
        surrogate: Surrogate | None,
        keys: Sequence[int | str],
        goal: Tensor | None,
    ) -> None:
        drawn = [torch.randn(judge.x.shape[1:], generator=generator(self.seed, "noise", key)) for key in keys]
        judge.add_control(
            "noise", noise_of_norm(judge.x, self.budget, judge.scale, torch.stack(drawn).to(judge.x))
        )
        if surrogate:
            step = Attack(
                *(explainer, KeepClass(Combined()), PGD(2.0, 2.0), self.budget, surrogate, 1), seed=self.seed
            )
            seeds = [f"{key}/one_step" for key in keys]
            judge.add_control("one_step", step.run(model, judge.x, judge.target, keys=seeds).adversarial)


def _looks(surrogate: Surrogate, draws: int) -> int | None:
    """Steps between two looks at the original network: on it every step, for free; else every second one."""
    return None if surrogate.is_original and draws == 1 else 2


class _Judge:
    """Scores images of 8 bits on the original network, and keeps the worst of every kind."""

    def __init__(
        self, budget: Budget, model: nn.Module, explainer: Explainer, x: Tensor, target: Tensor | int | None
    ) -> None:
        self.budget, self.model, self.explainer, self.x = budget, model, explainer, x
        self.scale = normalisation_scale(model, x)
        map0, logits0 = explainer.explain_with_logits(model, x, target)
        self.target = check_target(target, logits0)
        self.reference = Reference(map0.detach(), logits0.detach(), (x.shape[2], x.shape[3]))
        self.best = Best(x, SCORES)
        self.by = {name: torch.full_like(self.target, -1) for name in SCORES}
        self.members: dict[str, dict[str, Tensor]] = {}

    def add(self, member: str, images: Mapping[str, Tensor]) -> None:
        """Count these images for a member: each is brought to 8 bits within the budget and judged anew."""
        own = Best(self.x, SCORES)
        seen: list[Tensor] = []
        for image in images.values():
            if any(torch.equal(image, other) for other in seen):
                continue
            seen.append(image)
            self._offer(self.budget.quantise(image, self.x, self.scale), own)
        known = self.members.setdefault(
            member, {name: torch.ones_like(value) for name, value in own.values.items()}
        )
        for name in SCORES:
            known[name] = known[name].minimum(own.values[name])
            lower = own.values[name] < self.best.values[name]
            self.by[name][lower] = list(self.members).index(member)
            self.best.values[name][lower] = own.values[name][lower]
            self.best.images[name][lower] = own.images[name][lower]

    def add_control(self, name: str, images: Tensor) -> None:
        """Score images that do not count."""
        own = Best(self.x, SCORES)
        self._offer(self.budget.quantise(images, self.x, self.scale), own)
        self.members[name] = own.values

    def _offer(self, images: Tensor, best: Best) -> None:
        raw, logits = self.explainer.explain_with_logits(self.model, images, self.target)
        kept = logits.argmax(1) == self.reference.logits.argmax(1)
        everyone = torch.arange(len(images), device=images.device)
        best.offer(everyone, images, self.reference.scores(raw), kept)

    def found(
        self, names: tuple[str, ...], used: Tensor, stuck: Tensor, diverged: Tensor, gain: Tensor
    ) -> Found:
        order = list(self.members)
        place = torch.tensor(
            [names.index(n) if n in names else -1 for n in order] + [-1], device=self.x.device
        )
        by = {name: place[index] for name, index in self.by.items()}
        return Found(
            names=names,
            worst=self.best.values,
            images=self.best.images,
            by=by,
            members=self.members,
            used=used,
            stuck=stuck,
            diverged=diverged,
            gain=gain,
            reference=self.reference,
            target=self.target,
        )


def transferred(
    budget: Budget,
    model: nn.Module,
    explainer: Explainer,
    x: Tensor,
    target: Tensor,
    others: Sequence[Tensor],
) -> tuple[Best, Reference]:
    """The member ``transfer``: the lowest scores (N,) that other methods' adversarial images (each (N, C, H, W)) reach
    here, and what they are held against."""
    judge = _Judge(budget, model, explainer, to_8_bits(x), target)
    for images in others:
        judge.add("transfer", {"all": images})
    return judge.best, judge.reference


def noise_of_norm(x: Tensor, budget: Budget, scale: Tensor, noise: Tensor) -> Tensor:
    """Images x plus noise (N, C, H, W), scaled to use the whole budget: the same norm as the attack, but no aim."""
    if budget.has_l2:
        weights = budget.weights(x, scale)
        allowed = x.new_full((len(x),), budget.largest_rms**2)
        return noise_at_equal_mse(x, allowed, weights, Budget(linf=budget.linf or 255.0), noise)
    return budget.project(x + noise.sign() * (budget.linf or 0) / 255, x, scale)


def _diagnosis(
    budget: Budget, x: Tensor, outcomes: Sequence[Outcome]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """used, stuck, diverged and gain of :class:`Found`."""
    if not outcomes:
        nothing = x.new_full((len(x),), torch.nan)
        return nothing, nothing, torch.zeros(len(x), dtype=torch.bool, device=x.device), nothing
    ends = [(budget.quantise(outcome.adversarial, x, outcome.scale), outcome.scale) for outcome in outcomes]
    used = torch.stack([budget.used(images, x, scale) for images, scale in ends]).amin(0)
    stuck = torch.stack([o.stuck for o in outcomes]).amax(0)
    diverged = torch.stack([o.diverged for o in outcomes]).any(0)
    last = torch.stack(
        [_progress(o) for o in outcomes]
    )  # (runs, 2, N): mean score at four fifths, and in the end
    strongest = last[:, 1].argmin(0)
    gain = (last[:, 0] - last[:, 1]).gather(0, strongest[None])[0]
    return used, stuck, diverged, gain


def _progress(outcome: Outcome) -> Tensor:
    """Mean of PCC, SSIM and top-10 % (2, N), the lowest so far at four fifths of the steps, and in the end."""
    curve = outcome.curve
    kept = curve["kept"] == 1
    value = torch.stack([curve[name] for name in SCORES[:3]]).mean(0)
    value = torch.where(kept, value, 1.0)
    early = curve["step"] <= 0.8 * outcome.loss.shape[1]
    return torch.stack([torch.where(early, value, 1.0).amin(1), value.amin(1)])


@dataclass(frozen=True)
class Probe:
    """Which surrogate predicts the real change best: the one whose short attack lowers the scores on the network most.

    scores : surrogate -> mean of PCC, SSIM and top-10 % that it reached; best : None where no attack is possible, and
        ``why`` says why. likeness : PCC of the map on the best surrogate and on the network itself (1 without a surrogate).
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
    """Try every surrogate on images x with a short attack of so many steps, by ``batcher`` some images at a time."""
    first, logits = explainer.explain_with_logits(model, x, target)
    classes = check_target(target, logits)
    again = explainer.explain(model, x, classes)
    random = not torch.equal(first, again)
    scores: dict[str, float] = {}
    why = "its gradient is zero on every surrogate"
    for name in SURROGATES:
        # without the hinge: its slope is none of the map
        attack = Attack(
            explainer, Combined(), budget=budget, surrogate=Surrogate.named(name), steps=steps, seed=seed
        )
        try:
            reached = _reached(attack, model, x, classes, batcher or Batcher(len(x)))
        except SrdLabError as error:
            why = str(error)
            continue
        if reached is not None:
            scores[name] = reached
    if not scores:
        return Probe(None, scores, why, random=random)
    # Where the network itself does about as well, it is taken: looking at it costs nothing then.
    best = Surrogate.named(next(name for name in scores if scores[name] <= min(scores.values()) + NEAR))
    likeness = similarity(
        explainer.explain(best.at(model, 0, 1), x, classes), first, (x.shape[2], x.shape[3])
    )
    return Probe(best, scores, "", float(likeness["pcc"].mean()), random)
