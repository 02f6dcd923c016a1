"""The standard evaluation's attack: an ensemble without parameters to tune, worst case per image.

| member | letter | objective | quick | full |
|---|---|---|---|---|
| ``combined`` | S | SSIM + PCC + mass on the top 10 % | counted | on every surrogate |
| ``top_k`` | K | PCC + mass on the original's top 10 % | counted | counted |
| ``dissimilarity`` | U | Pearson correlation with the original map | checked | 3 restarts |
| ``target`` | T | correlation with a goal map | checked, 1 goal | 3 goals |
| ``mass_centre`` | C | distance of the centres of mass | checked | counted |
| ``polish`` | P | PCC, SSIM, top 10 %, each from the worst image that the others found | counted | counted |
| ``black_box`` | B | map and class only (:mod:`attacks.black_box`) | checked, 500 queries | 5,000 queries |
| ``transfer`` | X | the other methods' adversarial images | counted | counted |

A run is of 40 iterations (quick) or 100 (full). What quick mode only checks runs on the first images, is reported, and
raises a flag where it goes lower than what counts: measured, it seldom does, and the time is better spent on ``polish``.
Reported and never counted: noise of the same norm and a single step. What is scored are images of 8 bits within the budget
whose predicted class is the original's. The goals are the map of another image, and the own map mirrored and turned by
180 degrees.

Example
-------
::

    ensemble = Ensemble(("combined", "top_k", "polish"), "quick", Budget.named("legacy"))
    found = ensemble.run(model, explainer, x, surrogate=probe(explainer, model, x, ensemble.budget).best)
    found.worst["pcc"], found.by["pcc"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attacks.attack import Attack, Outcome
from attacks.black_box import BlackBox
from attacks.budget import Budget, to_8_bits
from attacks.judge import Found, Judge, diagnosis, noise_of_norm
from attacks.objective import (
    Combined,
    Dissimilarity,
    KeepClass,
    MassCentre,
    Objective,
    Structure,
    Sum,
    Target,
    TopK,
)
from attacks.optimiser import PGD
from attacks.surrogate import SURROGATES, Surrogate
from srd_lab.errors import BadValue, NoGradient
from srd_lab.runtime import generator
from srd_lab.types import Explainer

OBJECTIVES: dict[str, Objective] = {
    "dissimilarity": Dissimilarity(),
    "combined": Combined(),
    "top_k": Sum((Dissimilarity(), TopK())),
    "target": Target(),
    "mass_centre": MassCentre(),
}
WHITE_BOX = (*OBJECTIVES, "polish")
MEMBERS = (*WHITE_BOX, "black_box", "transfer")
LETTERS = dict(zip(MEMBERS, "USKTCPBX", strict=True))
# Small steps from the best of larger ones: alone they find less, and large steps from there throw the start away.
POLISHED: dict[str, Objective] = {"pcc": Dissimilarity(), "ssim": Structure(), "top_k": TopK()}
POLISH = PGD(first=0.5, last=0.03)


@dataclass(frozen=True)
class Mode:
    """How much work.

    steps : iterations of a run; restarts, goals : runs of ``dissimilarity`` and ``target``; queries : of the black box.
    members : what counts in the standard evaluation; the others are only checked, on some images.
    """

    steps: int
    restarts: int
    goals: int
    queries: int
    members: tuple[str, ...] = MEMBERS

    @property
    def checked(self) -> tuple[str, ...]:
        """The members that do not count in this mode."""
        return tuple(name for name in MEMBERS if name not in self.members)


MODES = {
    "quick": Mode(40, 1, 1, 500, ("combined", "top_k", "polish", "transfer")),
    "full": Mode(100, 3, 3, 5000),
}


@dataclass(frozen=True)
class Ensemble:
    """Members of the standard evaluation on one budget.

    members : names of :data:`MEMBERS` (``transfer`` needs other methods' images, and is added by the study).
    mode : "quick" or "full"; steps, queries : > 0, override the mode's.
    budget : how far the image may go (:mod:`attacks.budget`).
    seed : decides everything that is drawn, together with each image's key.

    Raises BadValue for names that are not known and values out of range.
    """

    members: tuple[str, ...] = ("combined", "top_k", "polish")
    mode: str = "quick"
    budget: Budget = field(default_factory=lambda: Budget.named("legacy"))
    seed: int = 0
    steps: int | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadValue(f"the mode {self.mode!r} is not known; expected one of {', '.join(MODES)}")
        if unknown := [name for name in self.members if name not in MEMBERS]:
            raise BadValue(f"there is no attack {unknown[0]!r}; choose of {', '.join(MEMBERS)}")
        for name in ("steps", "queries"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise BadValue(f"the ensemble needs {name} > 0, got {value}; None takes the mode's")

    @property
    def white_box(self) -> tuple[str, ...]:
        """The members that need a gradient, in the order in which they run."""
        return tuple(name for name in WHITE_BOX if name in self.members)

    @property
    def how(self) -> Mode:
        """The mode, with the ensemble's own steps and queries where it has some."""
        mode = MODES[self.mode]
        return replace(mode, steps=self.steps or mode.steps, queries=self.queries or mode.queries)

    def cost(self, white: bool = True) -> int:
        """Steps and queries per image, as ``on_step`` counts them; white : whether the method has a gradient."""
        how = self.how
        runs = sum(len(self._runs(name, Surrogate())) for name in self.white_box) if white else 0
        return how.steps * runs + (how.queries if "black_box" in self.members else 0)

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
        """Attack images x (N, C, H, W) in [0, 1], rounded to 8 bits first.

        model : the network that is deployed. explainer : the method whose maps are attacked.
        target : (N,) the class that is explained, None = predicted.
        surrogate : what the white-box members differentiate; None = the method has no gradient, and they do not run.
        goal : maps (N, h, w) that ``target`` aims at first; None = the mirrored own map.
        keys : what seeds the draws of every image; default 0..N-1.
        draws : gradients averaged per step, for a method that draws at random.
        on_step : called with steps and queries done, N * :meth:`cost` in all.

        Raises BadInput for images that are no pixels and targets that are no classes; NoGradient for a method whose map
        has no gradient on ``surrogate``; Refused where the model cannot be followed.
        """
        x = to_8_bits(x.detach())
        keys = list(range(len(x)) if keys is None else keys)
        judge = Judge(self.budget, model, explainer, x, target)
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
        self._controls(judge, explainer, model, surrogate, keys)
        return judge.found(
            tuple(n for n in self.members if n in judge.members), *diagnosis(self.budget, x, outcomes)
        )

    def _runs(self, name: str, surrogate: Surrogate) -> list[tuple[int, Surrogate]]:
        """Restart and surrogate of every run of a member."""
        if name == "combined" and self.mode == "full":
            others = [Surrogate.named(other) for other in SURROGATES if Surrogate.named(other) != surrogate]
            return [(0, surrogate), *((0, other) for other in others)]
        runs = {"dissimilarity": self.how.restarts, "target": self.how.goals, "polish": len(POLISHED)}
        return [(restart, surrogate) for restart in range(runs.get(name, 1))]

    def _attacks(
        self,
        name: str,
        explainer: Explainer,
        surrogate: Surrogate,
        judge: Judge,
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
                    steps=self.how.steps,
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
        judge: Judge,
        explainer: Explainer,
        model: nn.Module,
        surrogate: Surrogate | None,
        keys: Sequence[int | str],
    ) -> None:
        drawn = [
            torch.randn(judge.x.shape[1:], generator=generator(self.seed, "noise", key), dtype=torch.float32)
            for key in keys
        ]
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
