"""What the attack minimises, and how far it may go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srd_lab import maps
from srd_lab.types import SrdLabError

OUTPUT_TERMS = ("probabilities", "logits")


@dataclass(frozen=True)
class Objective:
    """Eq. 10: ``map_weight * MSE(map, goal map) + output_weight * MSE(output, original output)`` per image.

    Both are means, over maps that are |.| -> divided by their sum (for which Dombrowski et al. chose the weights).
    output_term : "probabilities" (softmax, Dombrowski's code) or "logits" (as Eq. 10 prints it; with these weights
        the logits term outweighs the map term so far that the attack hardly leaves its start).
    """

    map_weight: float = 1e11
    output_weight: float = 1e6
    output_term: str = "probabilities"

    def __post_init__(self) -> None:
        if self.output_term not in OUTPUT_TERMS:
            raise SrdLabError(
                f"output term {self.output_term!r} is not known; expected one of {', '.join(OUTPUT_TERMS)}"
            )

    def __call__(self, raw_map: Tensor, goal: Tensor, logits: Tensor, logits0: Tensor) -> Tensor:
        """Loss (N,) of raw maps (N, H, W) against ``goal`` maps that sum to one, and of logits (N, K)."""
        map_error = (maps.sum_to_one(raw_map) - goal).square().mean((1, 2))
        return self.map_weight * map_error + self.output_weight * self._output_error(logits, logits0)

    def _output_error(self, logits: Tensor, logits0: Tensor) -> Tensor:
        if self.output_term == "probabilities":
            logits, logits0 = logits.softmax(1), logits0.softmax(1)
        return (logits - logits0).square().mean(1)


@dataclass(frozen=True)
class Budget:
    """The perturbation budget: ``bound`` is the largest change of a pixel, in units of 0..255."""

    bound: float = 8.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise SrdLabError(f"the bound must be > 0 (in units of 0..255), got {self.bound}")

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest image to ``x_adv`` within the bound of ``x`` and within [0, 1].

        Exact: in the tensors' own arithmetic ``|result - x|`` never exceeds ``bound / 255``.
        """
        limit = torch.as_tensor(self.bound / 255, dtype=x.dtype, device=x.device)
        low, high = x - limit, x + limit
        low = torch.where(x - low > limit, torch.nextafter(low, x), low)
        high = torch.where(high - x > limit, torch.nextafter(high, x), high)
        return x_adv.clamp(low, high).clamp(0, 1)
