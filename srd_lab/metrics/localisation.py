"""Does an explanation point at the object? Pointing game and attribution localisation.

Masks are the data's: the object's outline where there is one, else the filled bounding boxes. An image without a mask, or
with an empty one, is not scored, and neither is a map that is not finite or nowhere positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.catalogue import metric
from srd_lab.errors import BadValue
from srd_lab.metrics.explained import Explained, unscorable
from srd_lab.metrics.similarity import float64


@metric(
    "pointing_game",
    title="Pointing game",
    paper="Zhang et al. 2018",
    better="higher",
    scores="localisation",
    tested="definition, quantus",
)
@dataclass(frozen=True)
class PointingGame:
    """Whether the map is largest on the object (Zhang et al. 2018; SRD, Eq. 24): 1 or 0, higher is better.

    margin : the mask is grown by that many pixels of an image of 224 x 224, in proportion for others, so that coarse
        maps are not at a disadvantage (SRD, appendix E).

    Where several pixels share the maximum, the score is the part of them that lies on the object.
    """

    margin: float = 15.0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise BadValue(f"pointing_game needs margin >= 0, got {self.margin}")

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [0, 1]; NaN for all where the images have no masks."""
        images, masks = explained.images, explained.images.masks
        if masks is None:
            return _not_scored(explained.maps)
        return self._on(explained.maps, masks, images.once(self, lambda: self.grow(masks)))

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Hits (N,) float64 in [0, 1] of maps (N, H, W) on masks (N, H, W) bool, which are grown first."""
        return self._on(maps, masks, self.grow(masks))

    def grow(self, masks: Tensor) -> Tensor:
        """Masks (N, H, W) bool with every pixel within ``margin`` (Euclidean) of the given ones.

        masks : (N, H, W) bool.
        """
        reach = self.margin * min(masks.shape[1:]) / 224
        if reach < 1:
            return masks
        side = torch.arange(-int(reach), int(reach) + 1, device=masks.device)
        disc = ((side[:, None] ** 2 + side**2) <= reach**2).float()[None, None]
        return F.conv2d(masks[:, None].float(), disc, padding=int(reach))[:, 0] > 0.5

    def _on(self, maps: Tensor, masks: Tensor, grown: Tensor) -> Tensor:
        top = maps.amax((1, 2), keepdim=True)
        largest = maps == top
        hit = (largest & grown).sum((1, 2)).double() / largest.sum((1, 2))
        return hit.masked_fill(~(top[:, 0, 0] > 0) | _unscorable(maps, masks), torch.nan)


@metric(
    "attribution_localization",
    title="Attribution localization",
    paper="Kohlbrenner et al. 2020",
    better="higher",
    scores="localisation",
    tested="definition, quantus",
)
@dataclass(frozen=True)
class AttributionLocalization:
    """Positive attribution on the object over all positive attribution (Kohlbrenner et al. 2020; SRD, Eq. 25), in
    [0, 1], higher is better; the object's size is not taken into account, and a uniform map scores its share of the image.
    """

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64 in [0, 1]; NaN for all where the images have no masks."""
        masks = explained.images.masks
        return _not_scored(explained.maps) if masks is None else self.score(explained.maps, masks)

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Share (N,) float64 in [0, 1] of the positive part of maps (N, H, W) on masks (N, H, W) bool.

        Example
        -------
        >>> half = torch.tensor([[True, False]]).expand(1, 2, 2)
        >>> AttributionLocalization().score(torch.ones(1, 2, 2), half)
        tensor([0.5000], dtype=torch.float64)
        """
        positive = float64(maps).clamp_min(0)
        share = (positive * masks).sum((1, 2)) / positive.sum((1, 2))
        return share.masked_fill(_unscorable(maps, masks), torch.nan)


def _unscorable(maps: Tensor, masks: Tensor) -> Tensor:
    return unscorable(maps) | ~masks.flatten(1).any(1)


def _not_scored(maps: Tensor) -> Tensor:
    return float64(maps).new_full((len(maps),), torch.nan)
