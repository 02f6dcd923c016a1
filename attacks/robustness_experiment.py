"""The standard evaluation on one batch: every image attacked by an ensemble, scored, and the controls beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from attacks.budget import LEGACY_MSE, to_8_bits
from attacks.ensemble import Ensemble
from attacks.experiment import Arrays
from attacks.flags import constant
from attacks.judge import Found, transferred
from attacks.manipulation import Manipulation
from attacks.objective import Reference
from attacks.probe import Probe
from attacks.scores import SCORES, more_scores, similarity
from srd_lab.normalise import normalisation_scale
from srd_lab.runs.work import Item
from srd_lab.types import Explainer

SEED_STEP = 1000  # between the seeds of repeated evaluations
DRAWS = 20  # gradients averaged for a method that draws at random


@dataclass(frozen=True)
class Experiment:
    """One method under an ensemble.

    explainer : the method.
    ensemble : what attacks it, and counts.
    eq10 : the published attack, run beside it and not counted; None = not run.
    probe : the surrogate to differentiate, and what is known of the method's gradients.
    seeds : how often the whole is repeated with other random starts, >= 1; the scores are means over the repeats.
    """

    explainer: Explainer
    ensemble: Ensemble
    eq10: Manipulation | None
    probe: Probe
    seeds: int = 1

    def steps(self) -> int:
        """Steps per image, as ``advance`` counts them."""
        own = self.ensemble.cost(self.probe.best is not None) * self.seeds
        return own + (self.eq10.steps if self.eq10 else 0)

    def run(
        self, model: nn.Module, items: Sequence[Item], device: torch.device, advance: Callable[[int], None]
    ) -> Arrays:
        """Arrays whose first axis is the image; see :mod:`attacks.flags` for their names.

        model : on ``device``. items : of two samples each, the image and the one whose map is a goal.
        advance : called with the steps done, :meth:`steps` for every image in all.

        Errors are those of :meth:`Ensemble.run` and :meth:`Manipulation.run`.
        """
        originals, goals = zip(*(item.samples for item in items), strict=True)
        x, goal_images = (
            to_8_bits(torch.stack([s.image for s in some])).to(device) for some in (originals, goals)
        )
        names = [sample.name for sample in originals]
        goal, _ = self.explainer.explain_with_logits(model, goal_images)
        founds = [
            replace(self.ensemble, seed=self.ensemble.seed + SEED_STEP * k).run(
                model,
                self.explainer,
                x,
                surrogate=self.probe.best,
                goal=goal,
                keys=names,
                draws=DRAWS if self.probe.random else 1,
                on_step=advance,
            )
            for k in range(self.seeds)
        ]
        arrays: Arrays = {
            "pair": np.array([item.number for item in items]),
            "index": np.array([item.index for item in items]),
            "original": np.array(names),
            "label": np.array([sample.label for sample in originals]),
            "images": levels(x),
            **_scores(founds),
            **_first(self, model, x, founds[0]),
        }
        if self.eq10:
            arrays |= self._eq10(model, x, goal_images, founds[0].target, advance)
        return arrays

    def _eq10(
        self, model: nn.Module, x: Tensor, goals: Tensor, target: Tensor, advance: Callable[[int], None]
    ) -> Arrays:
        assert self.eq10 is not None
        result = self.eq10.run(model, x, goals, target, on_step=advance)
        found = similarity(result.map_adversarial, result.map_original, (x.shape[2], x.shape[3]))
        found |= {"kept": result.prediction_kept, "mse": result.mse, "steps": result.steps}
        found["used"] = (result.mse / (self.eq10.stop_mse or LEGACY_MSE)).sqrt()
        return {f"eq10/{name}": value.cpu().numpy() for name, value in found.items()}


def _scores(founds: Sequence[Found]) -> Arrays:
    """Means over the repeats, and how far these lie apart."""
    arrays: Arrays = {}
    for score in SCORES:
        each = torch.stack([found.worst[score] for found in founds])
        arrays[f"worst/{score}"] = each.mean(0).cpu().numpy()
        arrays[f"repeats/{score}"] = each.T.cpu().numpy()
        for member in founds[0].members:
            kind = "member" if member in founds[0].names else "control"
            values = torch.stack([found.members[member][score] for found in founds]).mean(0)
            arrays[f"{kind}/{member}/{score}"] = values.cpu().numpy()
    return arrays


def _first(how: Experiment, model: nn.Module, x: Tensor, found: Found) -> Arrays:
    """What is kept of the first repeat: the worst images of 8 bits and what they came from."""
    arrays: Arrays = {
        "target": found.target.cpu().numpy(),
        "used": found.used.cpu().numpy(),
        "stuck": found.stuck.cpu().numpy(),
        "diverged": found.diverged.cpu().numpy(),
        "gain": found.gain.cpu().numpy(),
        "constant": constant(found.reference.map).cpu().numpy(),
        "map0": found.reference.map.cpu().numpy(),
    }
    for score in SCORES:
        arrays[f"image/{score}"] = levels(found.images[score])
        arrays[f"by/{score}"] = np.array(
            [found.names[i] if i >= 0 else "none" for i in found.by[score].tolist()]
        )
    return arrays | _judged(how, model, x, found.target, found.reference, arrays)


def _judged(
    how: Experiment, model: nn.Module, x: Tensor, target: Tensor, reference: Reference, arrays: Arrays
) -> Arrays:
    """The stored images once more: budget, class, and for the lowest PCC the map and more scores."""
    scale, budget, found = normalisation_scale(model, x), how.ensemble.budget, {}
    factors, kept = [], []
    for score in SCORES:
        image = images_of(arrays[f"image/{score}"], x.device)
        raw, logits = how.explainer.explain_with_logits(model, image, target)
        factors.append(budget.violation(image, x, scale))
        kept.append(logits.argmax(1) == reference.logits.argmax(1))
        if score == "pcc":
            found["map1"] = raw.detach().cpu().numpy()
            more = more_scores(raw, reference.map, reference.size)
            found |= {f"more/{name}": value.cpu().numpy() for name, value in more.items()}
    found["violation"] = torch.stack(factors).amax(0).cpu().numpy()
    found["kept"] = torch.stack(kept).all(0).cpu().numpy()
    return found


def transfer(
    how: Experiment,
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    others: Mapping[str, Sequence[Tensor]],
    own: Arrays,
) -> Arrays:
    """The arrays ``own`` of some images with the member ``transfer`` added, and ``source/METHOD/SCORE``: what the images of
    one other method reach by themselves.

    x : the originals (N, C, H, W), of 8 bits. target : (N,) the class that is explained.
    others : method -> its images, each (N, C, H, W).
    """
    judge = transferred(how.ensemble.budget, model, how.explainer, x, target, others)
    best, reference = judge.best, judge.reference
    changed = dict(own)
    for score in SCORES:
        value = best.values[score].cpu().numpy()
        changed[f"member/transfer/{score}"] = value
        changed |= {f"source/{name}/{score}": judge.members[name][score].cpu().numpy() for name in others}
        better = value < own[f"repeats/{score}"][:, 0]
        image = np.where(better[:, None, None, None], levels(best.images[score]), own[f"image/{score}"])
        changed[f"image/{score}"] = image
        changed[f"by/{score}"] = np.where(better, "transfer", own[f"by/{score}"])
        repeats = np.minimum(own[f"repeats/{score}"], value[:, None])
        changed[f"repeats/{score}"], changed[f"worst/{score}"] = repeats, repeats.mean(1)
    return changed | _judged(how, model, x, target, reference, changed)


def levels(x: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] of 8 bits as uint8."""
    return (x * 255).round().to(torch.uint8).cpu().numpy()


def images_of(levels_: np.ndarray, device: torch.device) -> Tensor:
    """The reverse of :func:`levels`: float32 pixels in [0, 1] on ``device``."""
    return torch.from_numpy(levels_).to(device).float() / 255
