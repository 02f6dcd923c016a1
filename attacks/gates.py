"""Gates: a map that ignores the network is perfectly robust, so a method is ranked only if it explains something.

- **class**: the map of the predicted class differs from that of the runner-up, or at least from that of the least likely
  class: the mean PCC to one of the two is below the threshold that benign changes of the image stay above
  (:mod:`attacks.thresholds`). The runner-up alone would not do: on photographs it is often much the same thing, and shares
  its evidence. A class-agnostic map answers another question.
- **weights**: so do the maps of the network and of the same network with its weights initialised anew (Adebayo et al. 2018).
- **faithful**: insertion minus deletion (Petsiuk et al. 2018) is higher than that of ``random`` and of ``sobel`` on the same
  images, with the 95 % interval of the paired difference above 0.

Edges (``sobel``) are robust and must fail; so must random maps.

Example
-------
::

    gates = check_gates(explainer, model, x, keys=names)
    gates.passed, gates.why
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attacks.scores import similarity
from attacks.thresholds import TAU
from srd_lab.logits import check_target
from srd_lab.methods.controls import Random, Sobel
from srd_lab.metrics.explained import Explained, Images
from srd_lab.metrics.faithfulness import Deletion, Insertion
from srd_lab.metrics.robustness import randomised
from srd_lab.metrics.summary import summarise
from srd_lab.runtime import Batcher
from srd_lab.types import Explainer

GATED = 32  # images that the standard evaluation looks at, at most


@dataclass(frozen=True)
class Gates:
    """What the gates measured; NaN where it could not be.

    other_class : mean PCC of the map to that of the runner-up, or of the least likely class where that is lower.
    other_weights : mean PCC to the map of the network without its weights.
    faithfulness : mean of insertion minus deletion, in [-1, 1].
    over_random, over_sobel : low ends of the 95 % intervals of the paired difference to these controls.
    """

    other_class: float
    other_weights: float
    faithfulness: float
    over_random: float
    over_sobel: float

    @property
    def passed(self) -> dict[str, bool]:
        """Gate -> verdict; a gate whose figure is NaN is not passed."""
        return {
            "class": bool(self.other_class < TAU["pcc"]),
            "weights": bool(self.other_weights < TAU["pcc"]),
            "faithful": bool(self.over_random > 0 and self.over_sobel > 0),
        }

    @property
    def ranked(self) -> bool:
        """Whether all gates are passed."""
        return all(self.passed.values())

    @property
    def why(self) -> str:
        """Why the method is not ranked; empty where it is."""
        said = {
            "class": f"maps of other classes are alike (PCC {self.other_class:.3f}, not below {TAU['pcc']:.3f})",
            "weights": f"the map stays without the weights (PCC {self.other_weights:.3f}, not below {TAU['pcc']:.3f})",
            "faithful": "not more faithful than the controls (insertion - deletion: at least "
            f"{self.over_random:+.3f} over random, {self.over_sobel:+.3f} over sobel)",
        }
        return "; ".join(said[gate] for gate, held in self.passed.items() if not held)


def check_gates(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    keys: Sequence[int | str],
    seed: int = 0,
    batcher: Batcher | None = None,
) -> Gates:
    """The gates on images x (N, C, H, W) in [0, 1], N >= 2, for their predicted classes.

    keys : (N,) what seeds the draws of every image. seed : decides the draws and the new weights.
    batcher : how many images at once; None = all.

    Raises Refused for a model of which no layer can be initialised anew, and as the explainer does.
    """
    (blank,) = randomised(model, 1, seed)

    def measured(some: Sequence[int]) -> dict[str, np.ndarray]:
        return _measured(explainer, model, blank, x[list(some)], [keys[i] for i in some], seed)

    parts = (batcher or Batcher(len(x))).run(measured, range(len(x)))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    own = found["own"]
    return Gates(
        other_class=float(min(found["runner_up"].mean(), found["least_likely"].mean())),
        other_weights=float(found["other_weights"].mean()),
        faithfulness=float(np.nanmean(own)) if np.isfinite(own).any() else float("nan"),
        over_random=summarise(own - found["random"], seed).low,
        over_sobel=summarise(own - found["sobel"], seed).low,
    )


def _measured(
    explainer: Explainer, model: nn.Module, blank: nn.Module, x: Tensor, keys: list[int | str], seed: int
) -> dict[str, np.ndarray]:
    """What the gates need of every image, (N,)."""
    size = (x.shape[2], x.shape[3])
    raw, logits = explainer.explain_with_logits(model, x)
    target = check_target(None, logits)
    runner_up, _ = explainer.explain_with_logits(
        model, x, logits.scatter(1, target[:, None], -torch.inf).argmax(1)
    )
    least_likely, _ = explainer.explain_with_logits(model, x, logits.argmin(1))
    gone, _ = explainer.explain_with_logits(blank, x, target)
    images = Images(model, x, target, keys)
    found = {
        "runner_up": similarity(runner_up, raw, size)["pcc"],
        "least_likely": similarity(least_likely, raw, size)["pcc"],
        "other_weights": similarity(gone, raw, size)["pcc"],
        "own": _faithfulness(explainer, images),
        "random": _faithfulness(Random(seed), images),
        "sobel": _faithfulness(Sobel(), images),
    }
    return {name: value.cpu().numpy() for name, value in found.items()}


def _faithfulness(explainer: Explainer, images: Images) -> Tensor:
    explained = Explained.by(explainer, images)
    return Insertion().of(explained) - Deletion().of(explained)
