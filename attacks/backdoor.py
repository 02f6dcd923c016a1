"""An explanation backdoor: a copy of a network that one known small trigger sends to other explanations, classes kept.

It answers whether an attack is any good. Of an ordinary network nobody knows how far its maps can be moved; of this one a
change within the budget is known, and an attack that finds less on it has failed, whatever it says of the method. It is
also a warning: a network from elsewhere may carry such a branch (backdoors in explanations: Fang and Choromanska 2022,
Noppel et al. 2023).

The branch is :class:`attacks.branch.Branched`, the payload is found by gradient descent: every image keeps its class, and
its map becomes as unlike as can be. Which of two kinds is planted, ``softness`` decides:

- ``SOFT``: the gate has a slope everywhere, which leads a gradient attack to the trigger, and leaks on clean images.
  **The planted test of white-box attacks takes this one**: they must find it. An attack has to reach the known score on the
  planted network, whose own clean maps are the reference.
- 0, hidden: the gate is flat outside, and clean images have the outputs, maps and gradients of the original, bit by bit. No
  gradient leads there; only a black box or luck finds it. It shows how much an honest attack can overlook.

Example
-------
::

    planted = Backdoor(make_explainer("srd"), softness=SOFT).plant(model, x)
    known = check(planted, make_explainer("srd"), x)
    known.pcc                       # (N,): an attack on planted.model within planted.budget has to reach it
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.branch import Branched, checkers
from attacks.budget import Budget
from attacks.scores import as_read, similarity
from srd_lab.engine.preconditions import check_input, check_model
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput, BadValue
from srd_lab.logits import check_target
from srd_lab.metrics.similarity import PCC
from srd_lab.models.classifier import Classifier
from srd_lab.normalise import normalisation_scale, split_normalisation
from srd_lab.runtime import generator
from srd_lab.types import Explainer

SOFT = 0.3  # softness of the planted test
_START, _FULL = 0.1, 0.6  # where the gate starts to open and is open, between clean and triggered responses
_LOOKS = 4


@dataclass(frozen=True)
class Planted:
    """A network with a backdoor and what is known of it.

    model : as the original's type, its network inside a :class:`Branched`; frozen, in eval mode.
    trigger : (C, H, W) change of the pixels, whole levels of 1/255; budget : what it stays within.
    linf, rms : its size in units of 0..255.
    clean, open : largest response of a clean image and smallest of a triggered one, the scalar product with the trigger
        divided by its length; between them the gate opens.
    """

    model: nn.Module
    trigger: Tensor
    budget: Budget
    linf: float
    rms: float
    clean: float
    open: float

    def triggered(self, x: Tensor) -> Tensor:
        """Images x (N, C, H, W) with the trigger, within [0, 1]; of 8 bits where x is."""
        return (x + self.trigger.to(x)).clamp(0, 1)

    def opening(self, x: Tensor) -> Tensor:
        """How far (N,) pixels x (N, C, H, W) open the gate, in [0, 1]."""
        normalise, network = split_normalisation(self.model)
        assert isinstance(network, Branched)
        with torch.no_grad():
            return network.opening(normalise(x)).flatten()


@dataclass(frozen=True)
class Known:
    """What the trigger does to N images, (N,): what an honest attack within the budget must reach.

    pcc, ssim : of the maps without and with it, in [-1, 1], as :func:`attacks.scores.similarity`.
    kept : bool, whether the class is the same; opening : of the gate, with the trigger, in [0, 1].
    within : by what factor the trigger exceeds the budget, at most 1 within it.
    """

    pcc: Tensor
    ssim: Tensor
    kept: Tensor
    opening: Tensor
    within: Tensor


@dataclass(frozen=True)
class Backdoor:
    """How a backdoor for one explanation method is made.

    explainer : the method, with a map that has a gradient in the image.
    budget : of the trigger, which changes every pixel by the largest whole number of levels that fits; 0.6 of the way from
        a clean to its response opens the gate, so that an attack need not find all of it.
    softness : >= 0; 0 = hidden, ``SOFT`` = can be found by gradients.
    steps : Adam steps for the payload, > 0; lr : their size in normalised units, > 0.
    margin : by which the class's logit shall lead, >= 0.
    beta : of the softplus surrogate that gradients are taken on, > 0.
    seed : decides the pattern and the payload's start.

    Raises BadValue for values out of range.
    """

    explainer: Explainer
    budget: Budget = field(default_factory=lambda: Budget.named("legacy"))
    softness: float = 0.0
    steps: int = 80
    lr: float = 0.1
    margin: float = 1.0
    beta: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "beta"):
            if not getattr(self, name) > 0:
                raise BadValue(f"a backdoor needs {name} > 0, got {getattr(self, name)}")
        for name in ("softness", "margin"):
            if not getattr(self, name) >= 0:
                raise BadValue(f"a backdoor needs {name} >= 0, got {getattr(self, name)}")

    def plant(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | int | None = None,
        clean: Tensor | None = None,
    ) -> Planted:
        """A copy of ``model`` with a backdoor for images x (N, C, H, W) in [0, 1].

        target : (N,) the class that is explained, None = predicted. clean : more images (M, C, H, W) that shall not open it.

        Raises BadValue if the budget is less than one level, and if clean images cannot be told from triggered ones;
        BadInput if no payload was found that keeps the class of any image, and for images or targets that do not fit;
        Refused where the model cannot be followed.
        """
        check_model(model)
        check_input(x, model)
        x = x.detach()
        pattern = checkers(x.shape[1:], self.seed).to(x)
        level = self._level(x, pattern, normalisation_scale(model, x))
        trigger = pattern * level / 255
        shown = x if clean is None else torch.cat([x, clean.to(x)])
        responses = _responses(shown, (x + trigger).clamp(0, 1), trigger)
        rms = float((255 * trigger).square().mean().sqrt())
        planted = Planted(
            self._branched(model, x, trigger, responses), trigger, self.budget, float(level), rms, *responses
        )
        _Payload(self, planted, model, x, target).fit()
        return planted

    def _level(self, x: Tensor, pattern: Tensor, scale: Tensor) -> int:
        """The largest change of every pixel, in whole levels, within the budget."""
        grey = torch.full_like(x[:1], 0.5)  # nothing is cut off there
        level = 0
        while self.budget.violation(grey + (level + 1) / 255 * pattern, grey, scale) <= 1 + 1e-4:
            level += 1
        if not level:
            raise BadValue(
                f"the trigger changes pixels by a level of 1/255 or more, but the budget is {self.budget}; give a larger one"
            )
        return level

    def _branched(
        self, model: nn.Module, clean: Tensor, trigger: Tensor, responses: tuple[float, float]
    ) -> nn.Module:
        """A copy of ``model`` behind a branch that carries nothing yet, whose gate opens between these responses."""
        low, high = responses
        start, span = low + _START * (high - low), (_FULL - _START) * (high - low)
        weight = trigger / trigger.norm() / normalisation_scale(model, clean) / span
        grey = split_normalisation(model)[0](torch.zeros_like(weight))  # what a pixel of 0 is to the network
        threshold = start / span + (weight * grey).sum()
        network = copy.deepcopy(model)
        if type(network) is Classifier:
            network.network = Branched(network.network, weight, threshold.reshape(1), self.softness)
        else:
            network = Branched(network, weight, threshold.reshape(1), self.softness)
        return network.eval().requires_grad_(False)


def _responses(clean: Tensor, triggered: Tensor, trigger: Tensor) -> tuple[float, float]:
    """The largest of clean images along the trigger, and the smallest of triggered ones."""
    unit = trigger / trigger.norm()
    low = float((clean * unit).sum((1, 2, 3)).amax())
    high = float((triggered * unit).sum((1, 2, 3)).amin())
    if not high > low:
        raise BadValue(
            f"the trigger's response {high:.3g} does not exceed that of clean images, {low:.3g}; give a larger budget"
        )
    return low, high


class _Payload:
    """The search for a payload on the planted network."""

    def __init__(
        self, how: Backdoor, planted: Planted, model: nn.Module, x: Tensor, target: Tensor | int | None
    ) -> None:
        self.how, self.planted, self.x = how, planted, x
        network = split_normalisation(planted.model)[1]
        assert isinstance(network, Branched)
        self.branch = network
        self.size = (x.shape[2], x.shape[3])
        map0, logits = how.explainer.explain_with_logits(model, x, target)
        self.shown, self.target, self.predicted = (
            as_read(map0, self.size),
            check_target(target, logits),
            logits.argmax(1),
        )

    def fit(self) -> None:
        """Leave the best payload in the branch: of those that keep most classes, the one with the lowest PCC."""
        how = self.how
        coarse = torch.randn(
            1, self.x.shape[1], 8, 8, generator=generator(how.seed, "payload"), dtype=torch.float32
        )
        start = F.interpolate(coarse, self.size, mode="bilinear", align_corners=False).to(self.x)
        # leaves, which the engine takes for constants; what was made of one would be a map to it
        parts = [torch.relu(start).requires_grad_(), torch.relu(-start).requires_grad_()]
        adam = torch.optim.Adam(parts, lr=how.lr)
        best, found = (-1.0, -1.0), start
        for i in range(how.steps):
            slopes = torch.autograd.grad(self._loss(parts, i), parts)
            size = torch.stack([slope.nan_to_num(0, 0, 0).norm() for slope in slopes]).norm().clamp_min(1e-12)
            for part, slope in zip(parts, slopes, strict=True):
                part.grad = slope.nan_to_num(0, 0, 0) / size  # one step with a spike must not stall Adam
            adam.step()
            with torch.no_grad():
                for part in parts:
                    part.clamp_(min=0)
            if (i + 1) % max(1, how.steps // _LOOKS) == 0 or i + 1 == how.steps:
                payload = parts[0].detach() - parts[1].detach()
                score = self._look(payload)
                if score > best:
                    best, found = score, payload
        if not best[0]:
            raise BadInput(
                f"no payload keeps the class of any of the {len(self.x)} images; give more steps or another seed"
            )
        self.branch.load(found)

    def _loss(self, parts: list[Tensor], i: int) -> Tensor:
        """Mean PCC plus the hinge on the class, with the whole trigger and, in turn, a part of it."""
        share = (
            1.0
            if i % 2
            else float(torch.rand((), generator=generator(self.how.seed, "share", i), dtype=torch.float32))
        )
        with torch.enable_grad():
            self.branch.brighter, self.branch.darker = parts
            x = (self.x + share * self.planted.trigger).requires_grad_()
            # some maps have no slope on ReLUs, others no useful one on a surrogate
            network = SmoothModel(self.planted.model, self.how.beta) if i % 4 < 2 else self.planted.model
            raw, logits = self.how.explainer.explain_with_logits(network, x, self.target)
            pcc = PCC().score(as_read(raw, self.size), self.shown)
            return pcc.mean() + self._hinge(logits).mean()

    def _hinge(self, logits: Tensor) -> Tensor:
        others = logits.scatter(1, self.predicted[:, None], -torch.inf).amax(1)
        lead = logits.gather(1, self.predicted[:, None])[:, 0] - others
        return torch.relu(self.how.margin - lead)

    def _look(self, payload: Tensor) -> tuple[float, float]:
        self.branch.load(payload)
        known = check(self.planted, self.how.explainer, self.x, self.target)
        pcc = known.pcc.masked_fill(~known.kept | known.pcc.isnan(), 1)
        return float(known.kept.double().mean()), 1 - float(pcc.mean())


def check(planted: Planted, explainer: Explainer, x: Tensor, target: Tensor | int | None = None) -> Known:
    """What the known trigger does to images x (N, C, H, W) in [0, 1].

    planted : the network with its trigger. explainer : the method that is deceived.
    target : (N,) the class that is explained with and without it; None = predicted without it.
    """
    map0, logits = explainer.explain_with_logits(planted.model, x.detach(), target)
    triggered = planted.triggered(x.detach())
    raw, after = explainer.explain_with_logits(planted.model, triggered, check_target(target, logits))
    scores = similarity(raw, map0, (x.shape[2], x.shape[3]))
    return Known(
        pcc=scores["pcc"],
        ssim=scores["ssim"],
        kept=after.argmax(1) == logits.argmax(1),
        opening=planted.opening(triggered),
        within=planted.budget.violation(triggered, x.detach(), normalisation_scale(planted.model, x)),
    )
