"""What is done to a raw map before it is looked at or scored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.errors import BadValue

CHANNELS = ("sum", "abs_sum", "max_abs")


def reduce_channels(attribution: Tensor, how: str) -> Tensor:
    """One number per pixel, (N, H, W), of an attribution (N, C, H, W).

    how : "sum" keeps the sign, "abs_sum" is the l1 norm over channels, "max_abs" the largest absolute value (Simonyan et
        al. 2014). Raises BadValue for another.
    """
    if how == "sum":
        return attribution.sum(1)
    if how == "abs_sum":
        return attribution.abs().sum(1)
    if how == "max_abs":
        return attribution.abs().amax(1)
    raise BadValue(f"channels={how!r} is not known; expected one of {', '.join(CHANNELS)}")


def sum_to_one(maps: Tensor) -> Tensor:
    """|map| of raw maps (N, H, W), divided by its sum per image; a zero map stays zero (Dombrowski et al. 2019)."""
    maps = maps.abs()
    total = maps.sum((1, 2), keepdim=True)
    return maps / total.masked_fill(total == 0, 1)


def max_to_one(maps: Tensor) -> Tensor:
    """|map| of raw maps (N, H, W), divided by its maximum per image, in [0, 1]; a zero map stays zero."""
    maps = maps.abs()
    top = maps.amax((1, 2), keepdim=True)
    return maps / top.masked_fill(top == 0, 1)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) at ``size`` (rows, columns), bilinear, as the paper shows its low and high maps."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def prepared(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """A raw map (N, h, w) as the SRD paper scores it: divided by its largest absolute value, stretched to ``size``,
    clamped to [-1, 1]. A zero map stays zero; one that is not finite becomes NaN all over."""
    top = raw.abs().amax((1, 2), keepdim=True)
    finite = torch.isfinite(raw).flatten(1).all(1)[:, None, None]
    scaled = (raw / top.masked_fill(top == 0, 1)).masked_fill(~finite, torch.nan)
    return upsample(scaled, size).clamp(-1, 1)
