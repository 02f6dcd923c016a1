"""What no attack can undo: how much of a smoothed map stays, whatever change of the image up to an L2 radius.

Let ``g`` in [0, 1]^n be a map of the image (:class:`Sparsified`) and ``H(x) = E g(x + sigma z)``, z standard normal. For any
such g, ``Phi^-1(H_i)`` has the Lipschitz constant 1 / sigma in the image (Neyman-Pearson: the g that falls fastest is a
half-space, for which it is exactly that steep). A change of length rho takes ``Phi^-1(H_i)`` down by at most rho / sigma and
``Phi^-1(H_j)`` up by as much, so i stays above j if ``Phi(Phi^-1(H_i) - 2 rho / sigma) > H_j``. One direction can do both to
the full, so nothing less than the 2 will do.

- Overlap of the top K (Levine et al. 2019). ``h`` is the mean of g over q draws; by Hoeffding all n of them lie within
  ``c = sqrt(ln(2 n / alpha) / (2 q))`` of H, with probability 1 - alpha. (In the paper's ``2 n / (1 - eta)``, eta is this
  probability.) Sorted as ``h_[1] >= h_[2] >= ..``, at least i of the K largest of h are among the K largest of H(x') if
  ``Phi(Phi^-1(h_[i] - c) - 2 rho / sigma) - c > h_[2K-i+1]``: were it fewer than i, more than K - i others would be among
  them, so one of rank 2K-i+1 or worse; but all of the first i stay above that one.
- Pixels one by one (Anani et al. 2025). g is 0 or 1; a pixel is certainly 1 (or 0) if a binomial test says that more than
  tau of all copies vote so, else it abstains. The majority then stays for all changes up to ``sigma Phi^-1(tau)``.

Both speak of H at x', which is what infinitely many copies would give, for the class explained at x. A map made of q draws
there is off it by up to c once more, see ``fresh``; and nothing is certain of draws that an attacker knows beforehand.

Example
-------
::

    share, smoothed = SparsifiedCertificate(SRD(), sigma=0.1, draws=1000).certify(model, x, None, [0.05, 0.1])
    votes, radius, share, top = PixelCertificate(SRD(), tau=0.75).certify(model, x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Any, NamedTuple

import torch
from scipy import special
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.engine.preconditions import check_input
from srd_lab.errors import BadInput, BadValue
from srd_lab.methods.smoothed import Smoothed, check_wrapped
from srd_lab.types import Explainer

CORRECTIONS = ("holm", "bonferroni")


@dataclass(frozen=True)
class Sparsified(Explainer):
    """What stands out of an explainer's map, as values in [0, 1] per pixel of the image (H, W).

    explainer : any method.
    share : of pixels of |map| (stretched to the image) that are not 0, in (0, 1).
    ones : of pixels that are 1, in (0, share]; those between rise linearly with |map|, and have a gradient (relaxed).
        None = share: 0 and 1 alone, without a gradient.

    Pixels that tie with the largest one left out are 0, and so is a map that is constant or not finite: nothing stands
    out.

    Raises BadValue for shares out of these ranges.
    """

    explainer: Explainer
    share: float = 0.1
    ones: float | None = None

    def __post_init__(self) -> None:
        check_wrapped(self)
        _check_share("the share of pixels kept", self.share)
        if self.ones is not None and not 0 < self.ones <= self.share:
            raise BadValue(f"the share of ones must be in (0, {self.share}], the share kept, got {self.ones}")

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sparsified map (N, H, W) in [0, 1]; the model's output. Arguments and errors are those of the explainer."""
        raw, logits = self.explainer.explain_with_logits(model, x, target)
        return self.of(raw, (x.shape[2], x.shape[3])), logits

    def of(self, raw: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps ``raw`` (N, h, w) stretched to ``size`` (rows, columns) and sparsified, in [0, 1].

        Example
        -------
        >>> from srd_lab.methods.gradient import Gradient
        >>> Sparsified(Gradient(), share=0.25).of(torch.tensor([[[1.0, -4.0], [3.0, 2.0]]]), (2, 2))
        tensor([[[0., 1.],
                 [0., 0.]]])
        """
        shown = maps.max_to_one(raw)
        shown = shown if shown.shape[1:] == size else maps.upsample(shown, size)
        flat = shown.flatten(
            1
        )  # after a division by its maximum, what is not finite is NaN, or 0: never above ``low``
        kept = top_count(self.share, flat.shape[1])
        full = min(kept, top_count(self.ones or self.share, flat.shape[1]))
        largest = flat.topk(kept + 1).values
        low, high = largest[:, kept, None], largest[:, full - 1, None]
        ramp = torch.where(high > low, (flat - low) / torch.where(high > low, high - low, 1), 1)
        return torch.where(flat > low, ramp.clamp(0, 1), 0).view(shown.shape)


@dataclass(frozen=True)
class Certificate:
    """What both certificates have in common.

    explainer : any method; it is run one image at a time, so that no digit depends on the batch.
    k_share : K, in parts of the image's pixels, in (0, 1).
    sigma : > 0, noise in units of pixels in [0, 1]; draws : copies, >= 1; seed : decides the noise, equal for all images.
    alpha : probability that what is said of an image, all of it together, is wrong, in (0, 1).
    images_at_once : copies in one pass, see :class:`Smoothed`.

    Raises BadValue for values out of these ranges, and from ``certify`` if the draws are too few to certify any map.
    """

    explainer: Explainer
    k_share: float = 0.1
    sigma: float = 0.1
    draws: int = 256
    alpha: float = 0.05
    seed: int = 0
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        _check_share("k_share", self.k_share)
        _check_share("alpha", self.alpha)
        _ = self.smoothed  # refuses what it cannot be made of

    @property
    def smoothed(self) -> Smoothed:
        """The explainer whose map (N, H, W) in [0, 1] is certified: attack this one to compare."""
        return Smoothed(self.sparsified, self.sigma, self.draws, self.seed, "none", self.images_at_once)

    @property
    def sparsified(self) -> Sparsified:
        """The map g whose mean over the draws is certified."""
        return Sparsified(self.explainer, self.k_share)

    def _maps(self, model: nn.Module, x: Tensor, target: Tensor | int | None) -> Tensor:
        check_input(x, model)
        given = [None] * len(x) if target is None else torch.as_tensor(target)
        if isinstance(given, Tensor) and given.shape not in ((), (len(x),)):
            raise BadInput(f"expected one target per image, shape ({len(x)},), got {tuple(given.shape)}")
        own = given.expand(len(x)).split(1) if isinstance(given, Tensor) else given
        with torch.no_grad():
            return torch.cat(
                [
                    self.smoothed.explain_with_logits(model, *one)[0]
                    for one in zip(x.split(1), own, strict=True)
                ]
            )


class Overlap(NamedTuple):
    """share : (N, R) float64, of the K largest pixels of ``map`` those that are certified to stay among the K largest.
    map : (N, H, W) in [0, 1], what is certified."""

    share: Tensor
    map: Tensor


@dataclass(frozen=True)
class SparsifiedCertificate(Certificate):
    """How many of the top K pixels stay there, for all changes up to given radii. Fields beside :class:`Certificate`'s:

    tau, gamma : ``share`` and ``ones`` of :class:`Sparsified`; tau=None = k_share.
    fresh : False: the top K of H(x'). True: of a map made of as many new draws at x'; with 4n for 2n in c, that takes
        ``Phi(Phi^-1(h_[i] - c) - rho / sigma) - c > Phi(Phi^-1(h_[2K-i+1] + c) + rho / sigma) + c``.
    """

    tau: float | None = None
    gamma: float | None = None
    fresh: bool = False

    @property
    def sparsified(self) -> Sparsified:
        """The map g whose mean over the draws is certified."""
        return Sparsified(self.explainer, self.k_share if self.tau is None else self.tau, self.gamma)

    def deviation(self, n: int) -> float:
        """c for n pixels: how far the mean over the draws may be off, for any of them (and at x' as well, if fresh).

        Raises BadValue if the draws are too few to certify anything of so many pixels.
        """
        logarithm, sides = log(2 * n * (1 + self.fresh) / self.alpha), 2 * (1 + self.fresh)
        c = sqrt(logarithm / (2 * self.draws))
        if sides * c >= 1:
            raise _too_few(self.draws, n, ceil(sides**2 * logarithm / 2) + 1)
        return c

    def certify(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None, radii: Sequence[float] | Tensor
    ) -> Overlap:
        """Certify images x (N, C, H, W) in [0, 1] for classes ``target`` (N,), None = predicted.

        model : the network that is explained.
        radii : (R,) L2 norms of the change in units of pixels in [0, 1], >= 0; :func:`rms255` translates them.

        Raises BadInput for images or targets that do not fit, BadValue for radii of another form and for too few draws,
        and Refused as the explainer does.
        """
        check_input(x, model)
        reach, n = _radii(radii) / self.sigma, x[0, 0].numel()
        c, k = self.deviation(n), top_count(self.k_share, n)
        found = self._maps(model, x, target)
        counts = [certified_overlap(h, k, c, reach, c if self.fresh else 0.0) for h in found]
        return Overlap(torch.stack(counts).double() / k, found)


class PixelVotes(NamedTuple):
    """votes : (N, H, W) int8, 1 = certified among the top, 0 = certified not to be, -1 = abstains.
    radius : L2 norm of the change, in units of pixels in [0, 1], up to which all of that holds.
    share : (N,) of all pixels those that do not abstain; top : (N,) pixels certified among the top, in parts of K.
    """

    votes: Tensor
    radius: float
    share: Tensor
    top: Tensor


@dataclass(frozen=True)
class PixelCertificate(Certificate):
    """Which pixels are among the top, or are not, for all changes up to one radius. Fields beside :class:`Certificate`'s:

    tau : share of copies that must vote for it, in (0.5, 1); the radius is sigma Phi^-1(tau).
    correction : over the pixels of an image: "holm", or "bonferroni", which certifies no more.

    Either vote of a pixel is a hypothesis, so the larger one's p-value counts twice. (The published method guesses the
    majority from other draws instead.)
    """

    tau: float = 0.75
    correction: str = "holm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.tau < 1:
            raise BadValue(f"the certificate needs tau in (0.5, 1), a majority, got {self.tau}")
        if self.correction not in CORRECTIONS:
            raise BadValue(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")

    def certify(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> PixelVotes:
        """Certify images x (N, C, H, W) in [0, 1] for classes ``target`` (N,), None = predicted.

        model : the network that is explained.

        Raises BadInput for images or targets that do not fit, BadValue for too few draws, and Refused as the explainer
        does.
        """
        check_input(x, model)
        n = x[0, 0].numel()
        if self.draws < (enough := ceil(log(2 * n / self.alpha) / -log(self.tau))):
            raise _too_few(self.draws, n, enough)
        ones = (self._maps(model, x, target).double() * self.draws).round().long()
        most = torch.maximum(ones, self.draws - ones)
        tested = self.p_values().to(ones.device)[most].flatten(1)
        sure = torch.stack([rejected(p, self.alpha, self.correction) for p in tested]).view_as(ones)
        votes = torch.where(sure, (2 * ones > self.draws).long(), -1).to(torch.int8)
        top = (votes == 1).sum((1, 2)).double() / top_count(self.k_share, n)
        return PixelVotes(votes, self.sigma * float(special.ndtri(self.tau)), sure.double().mean((1, 2)), top)

    def p_values(self) -> Tensor:
        """(draws + 1,) by the number of equal votes: twice the chance of as many or more of Binomial(draws, tau)."""
        votes = torch.arange(1, self.draws + 1, dtype=torch.float64)
        chance = special.betainc(votes.numpy(), (self.draws - votes + 1).numpy(), self.tau)
        return torch.cat([votes.new_ones(1), 2 * torch.from_numpy(chance)]).clamp(max=1)


def certified_overlap(h: Tensor, k: int, c: float, reach: Tensor, again: float = 0.0) -> Tensor:
    """How many of the k largest of h (any shape, in [0, 1]) are certified to stay, (R,) int64 in 0..k.

    c : by how much h may be off; reach : (R,) radii in units of sigma; again : by how much the map at x' may be off H(x').
    """
    ranked = h.flatten().double().sort(descending=True).values
    rivals = torch.arange(2 * k - 1, k - 1, -1, device=h.device)  # ranks 2K-i+1 for i = 1..K, counted from 0
    top, rival = ranked[:k], ranked[rivals.clamp(max=len(ranked) - 1)]
    reach = reach.to(ranked)[:, None]
    low = torch.special.ndtr(torch.special.ndtri((top - c).clamp(min=0)) - reach) - again
    high = torch.special.ndtr(torch.special.ndtri((rival + c).clamp(max=1)) + reach) + again
    return ((low > high) | (rivals >= len(ranked))).sum(1)  # no such rank: too few pixels to lose one to


def rejected(p: Tensor, alpha: float, correction: str = "holm") -> Tensor:
    """Which hypotheses with p-values p (m,) are rejected, (m,) bool; one that is true is, with probability <= alpha.

    correction : "holm" (Holm 1979) or "bonferroni".

    Example
    -------
    >>> rejected(torch.tensor([0.04, 0.01]), 0.05), rejected(torch.tensor([0.04, 0.01]), 0.05, "bonferroni")
    (tensor([True, True]), tensor([False,  True]))
    """
    if correction == "bonferroni":
        return p <= alpha / len(p)
    ordered, order = p.sort()
    passes = ordered <= alpha / torch.arange(len(p), 0, -1, device=p.device)
    return torch.zeros_like(passes).scatter(0, order, passes.long().cumprod(0).bool())


def rms255(radius: Any, values: int) -> Any:
    """An L2 radius in units of pixels in [0, 1] as the root mean square of the change, in units of 0..255.

    radius : number, array or tensor. values : C * H * W of an image. Raises BadValue for values below 1.

    Example
    -------
    >>> rms255(0.1, 100)
    2.55
    """
    if values < 1:
        raise BadValue(f"an image has C * H * W >= 1 values, got {values}")
    return radius * 255 / sqrt(values)


def top_count(share: float, n: int) -> int:
    """How many of n pixels are the top ``share``: at least one, and not all.

    Example
    -------
    >>> top_count(0.1, 64 * 64)
    410
    """
    return max(1, min(n - 1, round(share * n)))


def _radii(radii: Sequence[float] | Tensor) -> Tensor:
    found = torch.as_tensor(radii, dtype=torch.float64)
    if found.dim() != 1 or not len(found) or not ((found >= 0) & found.isfinite()).all():
        raise BadValue(f"radii must be a list of L2 norms >= 0, got {found.tolist()}")
    return found


def _check_share(what: str, share: float) -> None:
    if not 0 < share < 1:
        raise BadValue(f"{what} must be in (0, 1), got {share}")


def _too_few(draws: int, n: int, enough: int) -> BadValue:
    return BadValue(f"{draws} draws can certify nothing of {n} pixels; take draws >= {enough}")
