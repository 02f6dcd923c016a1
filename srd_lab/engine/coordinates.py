"""The places of a tensor's entries: the row and the column of the image that each lies at, and what can be done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, nan

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where in the image the entries of a tensor lie.

    rows, columns : in pixels from 0, of the shape of the tensor; NaN where an entry has no one place.
    image : height and width of the image, in pixels.
    cell : how far apart, in pixels, two entries may lie and still count as being at the same place.
    """

    rows: Tensor
    columns: Tensor
    image: tuple[int, int]
    cell: float = 1.0

    @classmethod
    def of_image(cls, x: Tensor) -> Coordinates:
        """Those of images x (N, C, H, W)."""
        rows, columns = (torch.arange(float(n), device=x.device) for n in x.shape[2:])
        return cls(rows[:, None].expand(x.shape), columns.expand(x.shape), (x.shape[2], x.shape[3]))

    def each(self, function: Callable[[Tensor], Tensor]) -> Coordinates:
        """Both changed by ``function``."""
        return Coordinates(function(self.rows), function(self.columns), self.image, self.cell)

    def expand(self, shape: torch.Size) -> Coordinates:
        """Those of the tensor that this one is stretched into by broadcasting."""
        return self if self.rows.shape == shape else self.each(lambda t: t.expand(shape))


def agreed(known: Iterable[Coordinates], shape: torch.Size) -> Coordinates:
    """Where all operands of a call lie that have a place; none where two are apart."""
    operands = sorted((of.expand(shape) for of in known), key=lambda of: of.cell)
    found, apart = operands[0], None
    for other in operands[1:]:
        far = _far(found.rows, other.rows, other.cell) | _far(found.columns, other.columns, other.cell)
        apart = far if apart is None else apart | far
        found = first_of(found, other) or found
    if apart is None or not apart.any():
        return found
    rows, columns = (t.masked_fill(apart, nan) for t in (found.rows, found.columns))
    return replace(found, rows=rows, columns=columns)


def _far(a: Tensor, b: Tensor, near: float) -> Tensor:
    return (thin(a) - thin(b)).abs() > near


def first_of(one: Coordinates | None, other: Coordinates | None) -> Coordinates | None:
    """The coordinates of ``one``; where it has none, those of ``other``."""
    if one is None or other is None or one.rows is other.rows:
        return one or other
    if not (thin(one.rows).isnan().any() or thin(one.columns).isnan().any()):
        return one
    rows, columns = (
        torch.where(thin(a).isnan(), thin(b), thin(a)).expand(a.shape)
        for a, b in ((one.rows, other.rows), (one.columns, other.columns))
    )
    return Coordinates(rows, columns, one.image, max(one.cell, other.cell))


def thin(t: Tensor) -> Tensor:
    """``t`` without the copies of its entries along the axes that it was expanded over, which stay with size 1."""
    return t[tuple(slice(None) if stride else slice(0, 1) for stride in t.stride())]


def compact(t: Tensor) -> Tensor:
    """``t`` with an axis along which it has the same entries everywhere as one that it is expanded over."""
    shape, t = t.shape, thin(t)
    for axis, size in enumerate(t.shape):
        first = t.narrow(axis, 0, 1)
        if size > 1 and bool(((t == first) | (t.isnan() & first.isnan())).all()):
            t = first
    return t.expand(shape)


def mean(of: Coordinates, dims: Sequence[int]) -> Coordinates:
    """The mean over some axes, which stay with size 1; none where the entries lie over more than half of the image."""
    if not dims:
        return of
    cell, made = of.cell, []
    summed = {d % of.rows.dim() for d in dims}
    for t, size in zip((of.rows, of.columns), of.image, strict=True):
        shape = [1 if i in summed else n for i, n in enumerate(t.shape)]
        t, axes = thin(t), tuple(summed)
        spread = (t.nan_to_num(-inf).amax(axes, True) - t.nan_to_num(inf).amin(axes, True)).clamp_min(0)
        wide = spread > size / 2
        cell = max(cell, of.cell + float(spread.masked_fill(wide, 0).amax()))
        made.append(t.nanmean(axes, keepdim=True).masked_fill(wide, nan).expand(shape))
    return Coordinates(made[0], made[1], of.image, cell)


def taken(
    of: Coordinates, shape: torch.Size, axes: int, middle: Callable[[Tensor, int, int], Tensor]
) -> Coordinates:
    """The entries in the middle of windows over the last ``axes`` axes; over an axis that becomes one entry, the mean.

    shape : of the output. middle : of the windows, given their numbers, the axis from 0, and the input's size there.
    """
    before = of.rows.shape
    whole = [i - axes for i in range(axes) if shape[i - axes] == 1 < before[i - axes]]
    of = mean(of, whole)

    def middles(t: Tensor) -> Tensor:
        t = thin(t)
        for i in range(axes):
            axis = i - axes
            if t.shape[axis] > 1:
                at = middle(torch.arange(float(shape[axis]), device=t.device), i, before[axis])
                at = at.clamp(0, before[axis] - 1)
                below, above = (t.index_select(axis, side.long()) for side in (at.floor(), at.ceil()))
                t = (below + above) / 2
        return t.expand(shape)

    return of.each(middles)
