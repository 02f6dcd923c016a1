"""How alike two maps are: structural similarity (SSIM) and Pearson correlation (PCC).

Scores are per image, shape (N,), in [-1, 1], higher is more alike; computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.errors import BadInput, BadValue


@dataclass(frozen=True)
class SSIM:
    """Structural similarity (Wang et al. 2004) as ``skimage.metrics.structural_similarity`` computes it by default:
    a uniform window, sample covariance, the mean over windows that lie inside the map.

    window : odd side of the window in pixels, at most the map's side; a window of one pixel has no structure, and
        the score is that of luminance alone.
    data_range : span of possible values; 1 for maps divided by their maximum.

    Constant and zero maps have a defined score (the constants of the formula see to it).
    """

    window: int = 7
    data_range: float = 1.0

    def score(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity (N,) float64 in [-1, 1] of maps a and b, both (N, H, W).

        Raises BadInput for other shapes, and BadValue for a window that is even, below 1 or larger than the maps.
        """
        _check(a, b)
        if self.window < 1 or self.window % 2 == 0 or self.window > min(a.shape[1:]):
            raise BadValue(
                f"SSIM window must be odd and at most the map's side {min(a.shape[1:])}, got {self.window}"
            )
        a, b = float64(a)[:, None], float64(b)[:, None]
        stacked = torch.cat([a, b, a * a, b * b, a * b], 1)
        mean_a, mean_b, aa, bb, ab = F.avg_pool2d(stacked, self.window, stride=1).unbind(1)
        unbiased = self.window**2 / max(1, self.window**2 - 1)
        var_a, var_b = unbiased * (aa - mean_a**2), unbiased * (bb - mean_b**2)
        covariance = unbiased * (ab - mean_a * mean_b)
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        structure = (2 * covariance + c2) / (var_a + var_b + c2)
        return (luminance * structure).mean((1, 2))


@dataclass(frozen=True)
class PCC:
    """Pearson correlation over pixels, as ``scipy.stats.pearsonr``.

    A constant map has no correlation: the score is 0, or 1 where both maps are equal.
    """

    def score(self, a: Tensor, b: Tensor) -> Tensor:
        """Correlation (N,) float64 in [-1, 1] of maps a and b, both (N, H, W). Raises BadInput for other shapes.

        Example
        -------
        >>> map_ = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> PCC().score(map_, -map_).round(decimals=6)
        tensor([-1.], dtype=torch.float64)
        """
        _check(a, b)
        a, b = float64(a).flatten(1), float64(b).flatten(1)
        equal = (a == b).all(1)
        constant = (a == a[:, :1]).all(1) | (b == b[:, :1]).all(1)
        a, b = _unit(a - a.mean(1, keepdim=True)), _unit(b - b.mean(1, keepdim=True))
        r = (a * b).sum(1).clamp(-1, 1)
        return torch.where(constant, 0.0, r).masked_fill(equal, 1.0)


def float64(t: Tensor) -> Tensor:
    """``t`` in float64; on the CPU if it is on MPS, which does not have that type."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _unit(t: Tensor) -> Tensor:
    """Rows of length 1; scaled by the largest entry first, so that tiny maps do not underflow."""
    top = t.abs().amax(1, keepdim=True)
    t = t / top.masked_fill(top == 0, 1)
    norm = t.norm(dim=1, keepdim=True)
    return t / norm.masked_fill(norm == 0, 1)


def _check(a: Tensor, b: Tensor) -> None:
    if a.dim() != 3 or a.shape != b.shape:
        raise BadInput(
            f"two batches of maps (N, H, W) of one shape are compared, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
