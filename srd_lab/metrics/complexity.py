"""What a single map is like: how sparse (Gini index) and how rough (Geary's contiguity ratio).

Scores are per image, shape (N,), computed in float64; NaN means that a map cannot be scored, and summaries leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srd_lab.catalogue import metric
from srd_lab.errors import BadInput
from srd_lab.metrics.explained import Explained
from srd_lab.metrics.similarity import float64


@metric(
    "sparseness",
    title="Sparseness",
    paper="Chalasani et al. 2020",
    better="higher",
    scores="complexity",
    tested="definition, quantus",
)
@dataclass(frozen=True)
class Sparseness:
    """Gini index of |map| (Chalasani et al. 2020; SRD, Eq. 26, as Quantus has it), over the d pixels sorted upwards:

        1 - 2 sum_k v_k / |v|_1 (d - k + 1/2) / d  =  sum_k v_k (2 k - d - 1) / (d |v|_1)

    In [0, 1 - 1/d]: 0 where all pixels are equal, 1 - 1/d where all is in one. Sign, scale and place do not matter.
    Zero maps and maps with NaN or infinite pixels score NaN.
    """

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 of the prepared maps; see :meth:`score`."""
        return self.score(explained.maps)

    def score(self, maps: Tensor) -> Tensor:
        """Sparseness (N,) float64 of maps (N, H, W), signed or not, in [0, 1 - 1/d]; NaN where a map cannot be scored.

        Raises BadInput for another shape.

        Example
        -------
        >>> Sparseness().score(torch.eye(4)[None])    # 4 equal pixels of 16
        tensor([0.7500], dtype=torch.float64)
        """
        v = _ascending(_pixels(maps).flatten(1).abs())
        # tiny maps would underflow; NaN, which is sorted last, and 0 / 0 spread to the whole map
        v = v / v[:, -1:]
        d = v.shape[1]
        rank = torch.arange(1, d + 1, dtype=v.dtype, device=v.device)
        return ((v * (2 * rank - d - 1)).sum(1) / (d * v.sum(1))).clamp(min=0)


@metric(
    "roughness",
    title="Roughness",
    paper="Geary 1954",
    better="lower",
    scores="complexity",
    tested="definition",
)
@dataclass(frozen=True)
class Roughness:
    """Geary's contiguity ratio C (Geary 1954), von Neumann's ratio on a grid: squared steps over variance,

        C = (d - 1) / (2 E) sum_edges (m_i - m_j)^2 / sum_i (m_i - mean)^2,

    over the E edges between pixels that are neighbours in a row or column. 0 is perfectly smooth; 1 is noise, as the
    mean over all rearrangements of a map's own d pixels is 1 exactly; a checkerboard, the roughest map, has about 2.

    The map is taken as it is, signed, and a m + b scores as m; give |map| for the roughness of a heat map. Compare
    methods at one resolution: a coarse map stretched to more pixels is smooth.
    Constant maps, zero ones among them, and maps with NaN or infinite pixels score NaN.
    """

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 of the prepared maps; see :meth:`score`."""
        return self.score(explained.maps)

    def score(self, maps: Tensor) -> Tensor:
        """Roughness (N,) float64 of maps (N, H, W), >= 0; NaN where a map cannot be scored.

        Raises BadInput for another shape.

        Example
        -------
        >>> board = torch.arange(8).view(1, 8, 1) + torch.arange(8)
        >>> Roughness().score(board % 2)    # a checkerboard
        tensor([1.9688], dtype=torch.float64)
        """
        m = _pixels(maps)
        height, width = m.shape[1:]
        # their mean may differ from their pixels in the last digit
        constant = (m == m[:, :1, :1]).all(2).all(1)
        m = m / m.abs().amax((1, 2), keepdim=True)  # tiny maps would underflow when squared
        variation = (m - m.mean((1, 2), keepdim=True)).square().sum((1, 2))
        steps = m.diff(dim=1).square().sum((1, 2)) + m.diff(dim=2).square().sum((1, 2))
        edges = (height - 1) * width + height * (width - 1)
        ratio = (height * width - 1) / max(1, 2 * edges) * steps / variation
        return ratio.masked_fill(constant, torch.nan)


def _ascending(rows: Tensor) -> Tensor:
    """Every row sorted; on the CPU by numpy, which takes a tenth of torch's time."""
    if rows.device.type == "cpu" and not rows.requires_grad:
        return torch.from_numpy(np.sort(rows.numpy(), 1))
    return rows.sort(1).values


def _pixels(maps: Tensor) -> Tensor:
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise BadInput(
            f"a batch of maps (N, H, W) is scored, got shape {tuple(maps.shape)}; add a batch axis with maps[None]"
        )
    return float64(maps)
