"""How much of a map is left after an attack: four scores, of maps as they are read.

A map is read as ``|map|`` divided by its maximum, stretched to the image where it is coarser. All scores are per image,
(N,), float64, higher = more alike; 1 for a map that did not move.

- ``pcc``: Pearson correlation over pixels. In [-1, 1].
- ``ssim``: structural similarity, windows of 7 x 7 (Wang et al. 2004); it hangs on one pixel, the maximum. In [-1, 1].
- ``top_k``: share of the original's 10 % largest pixels that are among the 10 % largest afterwards (Ghorbani et al. 2019).
  In [0, 1].
- ``local_top_k``: the same, but a pixel also counts where one of its 8 neighbours is among the largest afterwards, so that a
  harmless shift by a pixel is no success of an attack.

Beside these, ``more_scores``: PCC of signed maps, and PCC and top-10 % of maps pooled to at most 28 x 28.

Example
-------
>>> before, after = x[:, 0], x[:, 0].flip(0)
>>> similarity(before, before, (64, 64))["pcc"].round(decimals=6)
tensor([1., 1.], dtype=torch.float64)
>>> sorted(similarity(after, before, (64, 64)))
['local_top_k', 'pcc', 'ssim', 'top_k']
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab import maps
from srd_lab.metrics.similarity import PCC, SSIM, float64

SCORES = ("pcc", "ssim", "top_k", "local_top_k")
MORE_SCORES = ("pcc_signed", "pcc_28", "top_k_28")
SHARE = 0.1  # of pixels that count as the top
POOLED = 28


def as_read(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """|map| divided by its maximum, in [0, 1], of raw maps (N, h, w), stretched to ``size`` (rows, columns);
    differentiable."""
    shown = maps.max_to_one(raw)
    return shown if shown.shape[1:] == size else maps.upsample(shown, size)


def similarity(raw: Tensor, original: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The four scores (N,) of raw maps (N, h, w) against the originals', stretched to ``size``.

    A map with values that are not finite scores NaN.
    """
    return scores_of(as_read(raw, size), as_read(original, size))


def scores_of(shown: Tensor, reference: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
    """The four scores (N,) of maps against a reference, both (N, H, W) and as they are read.

    before : the reference's top pixels (N, H, W) bool, if known. NaN where a map is not finite.
    """
    before, after = top_pixels(reference) if before is None else before, top_pixels(shown)
    found = {
        "pcc": PCC().score(shown, reference),
        "ssim": ssim_for(shown.shape[1:]).score(shown, reference),
        "top_k": _share(after & before, before),
        "local_top_k": _share(_widened(after) & before, before),
    }
    finite = torch.isfinite(shown).flatten(1).all(1) & torch.isfinite(reference).flatten(1).all(1)
    return {name: score.masked_fill(~finite, torch.nan) for name, score in found.items()}


def more_scores(raw: Tensor, original: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """PCC (N,) of the signed maps, and PCC and top-10 % of maps pooled to at most 28 x 28; arguments as in
    :func:`similarity`.

    Names are those of ``MORE_SCORES``. NaN where a map is not finite.
    """
    signed = [m if m.shape[1:] == size else maps.upsample(m, size) for m in (raw, original)]
    side = (min(POOLED, size[0]), min(POOLED, size[1]))
    small, reference = (F.adaptive_avg_pool2d(as_read(m, size), side) for m in (raw, original))
    before = top_pixels(reference)
    finite = torch.isfinite(raw).flatten(1).all(1) & torch.isfinite(original).flatten(1).all(1)
    found = {
        "pcc_signed": PCC().score(*signed),
        "pcc_28": PCC().score(small, reference),
        "top_k_28": _share(top_pixels(small) & before, before),
    }
    return {name: score.masked_fill(~finite, torch.nan) for name, score in found.items()}


def top_pixels(shown: Tensor, share: float = SHARE) -> Tensor:
    """The ``share`` largest pixels of maps (N, H, W), as a mask of their shape; at least one. Among equals the first ones.

    Example
    -------
    >>> top_pixels(torch.tensor([[[3.0, 1.0], [2.0, 3.0]]]), 0.25)
    tensor([[[ True, False],
             [False, False]]])
    """
    flat = shown.detach().flatten(1)
    count = max(1, round(share * flat.shape[1]))
    least = flat.topk(count, dim=1).values[:, -1:]
    above, level = flat > least, flat == least
    left = count - above.sum(1, keepdim=True)
    return (above | (level & (level.cumsum(1) <= left))).view(shown.shape)


def ssim_for(size: tuple[int, ...]) -> SSIM:
    """SSIM with its window of 7, or the largest odd one that fits maps of this size."""
    return SSIM(min(SSIM.window, *(side - 1 + side % 2 for side in size)))


def _widened(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return float64(part).sum((1, 2)) / float64(whole).sum((1, 2))
