"""How far an attack may go: a perturbation budget, the exact projection into it, and its 8-bit images.

A budget is the intersection of up to three sets around an image x, each optional but the last:

- the L-infinity box ``|x' - x| <= linf / 255`` per pixel,
- the L2 ball, as the root mean square of the change: ``rms`` in units of 0..255, or ``mse`` (mean square) in the units of
  the normalised image, the way Dombrowski et al. (2019) and the SRD paper state it,
- the valid pixels ``0 <= x' <= 1``.

The nearest point of the intersection is ``clamp(x + t (x' - x))`` with the largest t that keeps the norm: clamping once to
the ball and once to the box is not that point. The square of the norm is concave and piecewise linear in t^2, so Newton's
method from below ends after finitely many steps and never leaves the budget.

Example
-------
>>> budget = Budget.named("l2", 2.0)      # RMS 2/255
>>> near = budget.project(1 - x, x)
>>> (255 * (near - x).square().mean((1, 2, 3)).sqrt()).round(decimals=2)
tensor([2., 2.])
>>> quantised = 255 * budget.quantise(near, x)    # the nearest image of 8 bits that stays within it
>>> torch.allclose(quantised, quantised.round(), atol=1e-3)
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from attacks.settings import DEFAULT_SIZES
from srd_lab.errors import BadValue

NORMS = ("legacy", "l2", "linf")
LEGACY_MSE, LEGACY_LINF = 1e-3, 8.0


def default_size(norm: str) -> float:
    """The size of a budget that none is given for, in its own units; the published one is a factor of 1.

    norm : one of ``NORMS``.
    """
    return DEFAULT_SIZES.get(norm, 1.0)


_NEWTON = 1000  # it ends by itself, after one step for each pixel size at the most
_NEWTON_UNSEEN = 16  # steps on a device, where nobody looks whether it has ended; 7 is the most that was seen
_MARGIN = 1e-6  # relative; single precision must not carry the norm over the bound


@dataclass(frozen=True)
class Budget:
    """The perturbation budget.

    linf : largest change of a pixel, in units of 0..255; None = only the pixel range bounds it.
    rms : largest root mean square of the change, in units of 0..255.
    mse : largest mean square of the change in normalised units; at most one of ``rms`` and ``mse``.
    stop_mse : an image ends its attack once the mean square of its change (normalised) reaches this, as the published
        attack does; the change is not projected onto it.

    Its methods take the original images x and the changed ones x_adv, (N, C, H, W) in [0, 1], and scale, (1, C, 1, 1): what
    one unit of pixel value is in normalised units (:func:`srd_lab.normalise.normalisation_scale`), which ``mse`` needs.

    Raises BadValue for bounds that are not in (0, 255] (``mse``, ``stop_mse``: not > 0), contradict each other or are
    all missing.
    """

    linf: float | None = LEGACY_LINF
    rms: float | None = None
    mse: float | None = None
    stop_mse: float | None = None

    def __post_init__(self) -> None:
        for name in ("linf", "rms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 255:
                raise BadValue(f"the budget's {name} must lie in (0, 255] (units of 0..255), got {value}")
        for name in ("mse", "stop_mse"):
            value = getattr(self, name)
            if value is not None and not 0 < value < torch.inf:
                raise BadValue(f"the budget needs {name} > 0 and finite (normalised units), got {value}")
        if self.rms is not None and self.mse is not None:
            raise BadValue("a budget has rms or mse, not both; leave one out")
        if self.linf is None and self.rms is None and self.mse is None:
            raise BadValue("a budget needs a bound: give linf, rms or mse")

    @classmethod
    def named(cls, norm: str, size: float | None = None) -> Self:
        """A budget of one of the norms.

        norm : "l2": RMS of ``size`` / 255; "linf": largest change ``size`` / 255; "legacy": MSE 1e-3 (normalised) and 8/255.
        size : in (0, 255], in units of 0..255; for "legacy" a factor of both (1 = as published). None is 2, 8 and 1.

        Raises BadValue for another norm or size.

        Example
        -------
        >>> str(Budget.named("linf")), str(Budget.named("legacy", 2.0))
        ('L-inf 8/255', 'L-inf 16/255 and MSE 0.004 (normalised)')
        """
        if norm not in NORMS:
            raise BadValue(f"the norm {norm!r} is not known; expected one of {', '.join(NORMS)}")
        if size is not None and not 0 < size <= 255:
            raise BadValue(f"the budget must lie in (0, 255] (units of 0..255), got {size}")
        if norm == "legacy":
            factor = 1.0 if size is None else size
            return cls(linf=min(255.0, LEGACY_LINF * factor), mse=LEGACY_MSE * factor**2)
        value = DEFAULT_SIZES[norm] if size is None else size
        return cls(linf=None, rms=value) if norm == "l2" else cls(linf=value)

    def __str__(self) -> str:
        parts = [] if self.linf is None else [f"L-inf {self.linf:g}/255"]
        parts += [] if self.rms is None else [f"RMS {self.rms:g}/255"]
        parts += [] if self.mse is None else [f"MSE {self.mse:g} (normalised)"]
        return " and ".join(parts)

    # geometry ------------------------------------------------------------------------------------------
    @property
    def has_l2(self) -> bool:
        """Whether the root mean square of the change is bounded."""
        return self.rms is not None or self.mse is not None

    def weights(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """What one unit of pixel value counts in the L2 norm, (1, C, 1, 1) or (1, 1, 1, 1): 255, or ``scale`` for ``mse``.

        scale : (1, C, 1, 1), see :func:`srd_lab.normalise.normalisation_scale`; BadValue if it is needed and None.
        """
        if self.mse is None:
            return x.new_full((1, 1, 1, 1), 255.0)
        if scale is None:
            raise BadValue("a budget in normalised units needs the scale of the normalisation")
        return scale

    @property
    def largest_rms(self) -> float:
        """The bound on the root mean square, in the units of :meth:`weights`; infinite without one."""
        if self.rms is not None:
            return self.rms
        return torch.inf if self.mse is None else self.mse**0.5

    def radius(self, x: Tensor, scale: Tensor | None) -> float:
        """Euclidean radius of the L2 ball in the units of :meth:`weights`; without one, that of the box's corners."""
        count = x[0].numel() ** 0.5
        return (self.largest_rms if self.has_l2 else float(self.linf or 0)) * count

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest images, (N, C, H, W) each, within the L-infinity bound around x and [0, 1].

        In the tensors' own arithmetic ``|bound - x|`` never exceeds ``linf / 255``.
        """
        if self.linf is None:
            return torch.zeros_like(x), torch.ones_like(x)
        limit = x.new_full((), self.linf / 255)
        low, high = x - limit, x + limit
        low = torch.where(x - low > limit, torch.nextafter(low, x), low)
        high = torch.where(high - x > limit, torch.nextafter(high, x), high)
        return low.clamp(0, 1), high.clamp(0, 1)

    def project(self, x_adv: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The nearest image to ``x_adv`` (N, C, H, W) within the budget around ``x``, by the budget's own norm.

        scale : (1, C, 1, 1), what one unit of pixel value is in normalised units. Raises BadValue where ``mse`` lacks it.
        """
        low, high = self.box(x)
        if not self.has_l2:
            return x_adv.clamp(low, high)
        weights, change = self.weights(x, scale), x_adv - x
        share = _largest_share(change * weights, (low - x) * weights, (high - x) * weights, self.largest_rms)
        return (x + share[:, None, None, None] * change).clamp(low, high)

    def rms_of(self, x_adv: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Root mean square (N,) of the change, in the units of the budget: 0..255, or normalised for ``mse``."""
        return ((x_adv - x) * self.weights(x, scale)).square().mean((1, 2, 3)).sqrt()

    def used(self, x_adv: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Share (N,) of the budget that the change uses: of the RMS, or without such a bound mean |change| over linf, of the
        pixels that the valid range did not keep where they are."""
        if self.has_l2:
            return self.rms_of(x_adv, x, scale) / self.largest_rms
        change, kept = (x_adv - x).abs(), (x_adv == x) & ((x == 0) | (x == 1))
        count = (~kept).sum((1, 2, 3)).clamp_min(1)
        return 255 * change.sum((1, 2, 3)) / count / float(self.linf or 1)

    def spent(self, x_adv: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """Whether (N,) bool the mean square of the change has reached ``stop_mse``; never without one."""
        if self.stop_mse is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return mean_square(x_adv, x, scale) >= self.stop_mse

    def violation(self, x_adv: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """By what factor (N,) the change exceeds the budget; at most 1 within it (to rounding), infinite outside [0, 1]."""
        worst = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if self.linf is not None:
            worst = worst.maximum(255 * (x_adv - x).abs().amax((1, 2, 3)) / self.linf)
        if self.has_l2:
            worst = worst.maximum(self.rms_of(x_adv, x, scale) / self.largest_rms)
        outside = (x_adv < 0).flatten(1).any(1) | (x_adv > 1).flatten(1).any(1)
        return worst.masked_fill(outside, torch.inf)

    def quantise(self, x_adv: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """``x_adv`` as an image of 8 bits within the budget; ``x`` must be one already (see :func:`to_8_bits`).

        The change is rounded to whole levels, and where that leaves the L2 ball it is made a little smaller first.
        """
        levels = (x * 255).round()
        change = self.project(x_adv, x, scale) * 255 - levels
        limit = torch.inf if self.linf is None else float(int(self.linf + 1e-6))
        if not self.has_l2:
            return (levels + change.round().clamp(-limit, limit)) / 255
        weights = self.weights(x, scale) / 255
        low, high = x.new_zeros(len(x)), x.new_ones(len(x))

        def rounded(share: Tensor) -> Tensor:
            return (share[:, None, None, None] * change).round().clamp(-limit, limit)

        def fits(share: Tensor) -> Tensor:
            size = (rounded(share) * weights).square().mean((1, 2, 3)).sqrt()
            return size <= self.largest_rms * (1 - _MARGIN)

        whole = fits(high)
        for _ in range(25):
            middle = (low + high) / 2
            inside = fits(middle)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return (levels + rounded(torch.where(whole, torch.ones_like(low), low))) / 255


def _largest_share(change: Tensor, low: Tensor, high: Tensor, largest_rms: float) -> Tensor:
    """The largest t (N,) in [0, 1] for which the RMS of ``clamp(t * change, low, high)`` is at most ``largest_rms``."""
    count = change[0].numel()
    allowed = count * (largest_rms * (1 - _MARGIN)) ** 2
    size = change.square().flatten(1)
    cap = torch.where(change < 0, low, high).square().flatten(1)
    square = (allowed / size.sum(1).clamp_min(torch.finfo(size.dtype).tiny)).clamp(max=1)
    seen = change.device.type == "cpu"  # where a look costs nothing
    for _ in range(_NEWTON if seen else _NEWTON_UNSEEN):  # from below: an early end is within the budget
        clipped = square[:, None] * size >= cap
        free = size.masked_fill(clipped, 0).sum(1)
        rest = allowed - torch.where(clipped, cap, 0).sum(1)
        following = torch.where(free > 0, rest / free.clamp_min(torch.finfo(size.dtype).tiny), 1)
        following = following.clamp(max=1).maximum(square)
        if seen and torch.equal(following, square):
            break
        square = following
    return square.sqrt()


def mean_square(x_adv: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Mean square (N,) of the change from x to x_adv, both (N, C, H, W), in normalised units.

    scale : (1, C, 1, 1), what one unit of pixel value is there.
    """
    return ((x_adv - x) * scale).square().mean((1, 2, 3))


def to_8_bits(x: Tensor) -> Tensor:
    """Images x (N, C, H, W) in [0, 1] rounded to multiples of 1/255."""
    return (x * 255).round() / 255
