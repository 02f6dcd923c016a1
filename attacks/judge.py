"""The judge of an ensemble: scores images of 8 bits on the original network and keeps the worst of every kind per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.attack import Best, Outcome
from attacks.budget import Budget, to_8_bits
from attacks.manipulation import noise_at_equal_mse
from attacks.objective import Reference
from attacks.scores import SCORES
from srd_lab.logits import check_target
from srd_lab.normalise import normalisation_scale
from srd_lab.types import Explainer


@dataclass(frozen=True)
class Found:
    """What an ensemble found for N images; every adversarial image is of 8 bits and keeps the predicted class.

    worst : lowest score (N,) of every kind, over the members that count; 1 where no member lowered it, NaN where the map of
        the original is not finite.
    images : the images (N, C, H, W) that have it; by : (N,) which member found it (index into ``names``, -1 = none).
    names : the members that ran. members : member -> score -> (N,); also the controls.
    used : (N,) smallest share of the budget that a white-box member's last iterate uses; stuck : (N,) largest share of steps
        without any gradient; diverged : (N,) whether a gradient was not finite; gain : (N,) how much the strongest
        white-box member still gained in its last fifth (mean of PCC, SSIM and top-10 %). Without such members NaN, and
        diverged False.
    reference : original maps and logits; target : (N,) the explained class.
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


class Judge:
    """Scores images of 8 bits on the original network, and keeps the worst of every kind.

    budget : within which images count. model : the original network. explainer : the method whose maps are scored.
    x : the originals (N, C, H, W), of 8 bits.
    target : (N,) the class that is explained, None = predicted.

    Attributes: ``best``, of all members; ``members``, member -> score -> (N,); ``by``, score -> (N,) index of the member
    that has the lowest.
    """

    def __init__(
        self, budget: Budget, model: nn.Module, explainer: Explainer, x: Tensor, target: Tensor | int | None
    ) -> None:
        self.budget, self.model, self.explainer, self.x = budget, model, explainer, x
        self.scale = normalisation_scale(model, x)
        map0, logits0 = explainer.explain_with_logits(model, x, target)
        self.target = check_target(target, logits0)
        self.reference = Reference(map0.detach(), logits0.detach(), (x.shape[2], x.shape[3]))
        self.best = self._best()
        self.by = {name: torch.full_like(self.target, -1) for name in SCORES}
        self.members: dict[str, dict[str, Tensor]] = {}

    def add(self, member: str, images: Mapping[str, Tensor]) -> None:
        """Count these images for a member: each is brought to 8 bits within the budget and judged anew.

        images : by any name, each (N, C, H, W); equal ones are judged once.
        """
        own = self._best()
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
        """Score ``images`` (N, C, H, W) that do not count under a ``name``, as those of a member are."""
        own = self._best()
        self._offer(self.budget.quantise(images, self.x, self.scale), own)
        self.members[name] = own.values

    def _best(self) -> Best:
        """The best of nothing yet: 1, and NaN for an image whose map is not finite and so like no other."""
        best = Best(self.x, SCORES)
        undefined = ~self.reference.map.flatten(1).isfinite().all(1)
        for value in best.values.values():
            value[undefined] = torch.nan
        return best

    def _offer(self, images: Tensor, best: Best) -> None:
        raw, logits = self.explainer.explain_with_logits(self.model, images, self.target)
        kept = logits.argmax(1) == self.reference.logits.argmax(1)
        everyone = torch.arange(len(images), device=images.device)
        best.offer(everyone, images, self.reference.scores(raw), kept)

    def found(
        self, names: tuple[str, ...], used: Tensor, stuck: Tensor, diverged: Tensor, gain: Tensor
    ) -> Found:
        """All that was found; names : the members that count; the other arguments are those of :func:`diagnosis`."""
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
    others: Mapping[str, Sequence[Tensor]],
) -> Judge:
    """A judge that has seen other methods' adversarial images: its ``best`` is what all of them reach here, its
    ``members`` what those of each method reach.

    budget, model, explainer : see :class:`Judge`.
    x : the originals (N, C, H, W). target : (N,) the class that is explained.
    others : method -> its images, each (N, C, H, W).
    """
    judge = Judge(budget, model, explainer, to_8_bits(x), target)
    for name, images in others.items():
        judge.add(name, {str(i): image for i, image in enumerate(images)})
    return judge


def noise_of_norm(x: Tensor, budget: Budget, scale: Tensor, noise: Tensor) -> Tensor:
    """Images x (N, C, H, W) plus noise, scaled to use the whole budget: the same norm as the attack, but no aim.

    scale : (1, C, 1, 1) of the normalisation. noise : (N, C, H, W), standard normal; without an L2 bound its signs count.
    """
    if budget.has_l2:
        weights = budget.weights(x, scale)
        allowed = x.new_full((len(x),), budget.largest_rms**2)
        return noise_at_equal_mse(x, allowed, weights, Budget(linf=budget.linf or 255.0), noise)
    return budget.project(x + noise.sign() * (budget.linf or 0) / 255, x, scale)


def diagnosis(
    budget: Budget, x: Tensor, outcomes: Sequence[Outcome]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``used``, ``stuck``, ``diverged`` and ``gain`` of :class:`Found`, each (N,).

    budget : of the attack. x : the originals (N, C, H, W). outcomes : of the white-box members, one at least.
    """
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
