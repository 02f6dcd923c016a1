"""Attack and certificate of one method on one axis: an upper and a lower bound on what stays of the top 10 %.

Both are of the same map, the mean of the sparsified map over Gaussian draws
(:class:`attacks.certificates.SparsifiedCertificate`). The attack is adaptive: it knows sigma and differentiates through the
mean over a few draws of its own (:class:`Smoothed`), whose map has a slope where the sparsified one has none; what it finds
is judged on the certified map. Certificates hold for every change up to a radius, but reach far less than the budgets of the
evaluation: sigma Phi^-1(1 - c) at most.

Example
-------
::

    sides = both_sides(explainer, model, x, sigma=0.1, draws=1000)
    sides.attacked.mean(0) >= 0, sides.certified.mean(0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.budget import Budget, to_8_bits
from attacks.certificates import SparsifiedCertificate, rms255
from attacks.objective import Dissimilarity, KeepClass, TopK
from attacks.scores import as_read, top_pixels
from attacks.surrogate import Surrogate
from srd_lab.logits import check_target, class_logits
from srd_lab.methods.smoothed import Smoothed
from srd_lab.types import Explainer

RADII = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.12, 0.15)  # L2, pixels in [0, 1]
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # root mean squares of attacks, units of 0..255
ATTACKED_DRAWS = 8
STEPS = 20


@dataclass(frozen=True)
class Sides:
    """Shares of the original's top 10 % that stay, in [0, 1].

    attacked : (N, S) after attacks of root mean square ``sizes`` (S,), units of 0..255: no more can be certified there.
    certified : (N, R) for every change up to root mean square ``radii`` (R,), the same units.
    """

    sizes: np.ndarray
    attacked: np.ndarray
    radii: np.ndarray
    certified: np.ndarray


def both_sides(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    *,
    surrogate: Surrogate | None = None,
    sigma: float = 0.1,
    draws: int = 1000,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Sides:
    """Attack and certify the top 10 % of images x (N, C, H, W) in [0, 1], explained for their predicted class.

    surrogate : that the attack differentiates; None = the network itself.
    sigma : of the draws, in pixels of [0, 1], > 0; draws : of the certificate. Its failure probability is 5 % per image.
    seed : decides all draws; those of the attack are others than those of the certificate.
    on_step : called with N after the certificate, and after each of two attacks for every size.

    Errors are those of :meth:`SparsifiedCertificate.certify` and :meth:`Attack.run`.
    """
    x = to_8_bits(x)
    with torch.no_grad():
        target = check_target(None, class_logits(model(x)))
    certificate = SparsifiedCertificate(explainer, sigma=sigma, draws=draws, seed=seed)
    overlap = certificate.certify(model, x, target, RADII)
    tick = on_step or (lambda steps: None)
    tick(len(x))
    before = top_pixels(as_read(overlap.map, (x.shape[2], x.shape[3])))
    lowest = []
    for size in SIZES:
        stays = torch.ones(len(x), dtype=torch.float64)
        for objective in (Dissimilarity(), TopK()):
            attack = Attack(
                Smoothed(explainer, sigma, ATTACKED_DRAWS, seed=seed + 1),
                KeepClass(objective),
                budget=Budget.named("l2", size),
                surrogate=surrogate or Surrogate(),
                steps=STEPS,
                seed=seed,
            )
            images = attack.run(model, x, target).images["top_k"]
            with torch.no_grad():
                raw, _ = certificate.smoothed.explain_with_logits(model, images, target)
            after = top_pixels(as_read(raw, (x.shape[2], x.shape[3])))
            share = (after & before).double().sum((1, 2)) / before.double().sum((1, 2))
            stays = stays.minimum(share.cpu())
            tick(len(x))
        lowest.append(stays)
    reached = torch.cummin(torch.stack(lowest, 1), 1).values  # a larger budget holds the smaller one's images
    radii = np.array([rms255(radius, x[0].numel()) for radius in RADII])
    return Sides(np.array(SIZES), reached.numpy(), radii, overlap.share.cpu().double().numpy())
