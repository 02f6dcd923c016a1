"""Which token lies over which patch of the image.

A vision transformer keeps its map as a row of tokens (N, T, C): one for every patch, beside class and register tokens, which
lie nowhere. The coordinates that :mod:`srd_lab.engine.coordinates` follows from the image through the patch embedding tell
them apart, so that neither the number of such tokens nor the shape of the grid is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srd_lab.engine.coordinates import Coordinates, thin

_PART = 16  # of a pixel, that two places of one row may be apart by rounding


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Where T tokens lie.

    cells : (h, w) int64, the number of the token that lies over each cell of the image.
    """

    cells: Tensor

    def lay(self, t: Tensor, axis: int) -> Tensor:
        """Tokens (N, T, C) or (N, C, T), channels along ``axis``, as a map (N, C, h, w), less those that lie nowhere."""
        laid = t.movedim(axis, 1).index_select(2, self.cells.flatten())
        return laid.unflatten(2, self.cells.shape)

    def lay_numbers(self, t: Tensor) -> Tensor:
        """One number per token (N, T) as a map (N, h, w)."""
        return self.lay(t.unsqueeze(1), 1).squeeze(1)

    def lies(self, tokens: int) -> Tensor:
        """Which of so many tokens, (T,) bool, lie over the image."""
        lies = torch.zeros(tokens, dtype=torch.bool, device=self.cells.device)
        return lies.index_fill(0, self.cells.flatten(), True)


def grid_of(of: Coordinates, axis: int) -> TokenGrid | None:
    """The grid of a tensor of three dimensions with channels along ``axis`` (1 or 2) by the coordinates of its entries.

    None unless the tokens that have a place are the cells of one grid, each once. What lies elsewhere in another image or
    channel has none.
    """
    rows, columns = (_per_token(t, axis) for t in (of.rows, of.columns))
    lies = (~(rows.isnan() | columns.isnan())).nonzero()[:, 0]
    if len(lies) < 2:
        return None
    (heights, row), (widths, column) = (
        (t[lies] * _PART).round().unique(return_inverse=True) for t in (rows, columns)
    )
    h, w = len(heights), len(widths)
    cell = row * w + column
    if len(lies) != h * w or len(cell.unique()) != h * w:
        return None
    return TokenGrid(lies[cell.argsort()].view(h, w))


def laid_over(of: Coordinates, grid: TokenGrid, axis: int) -> Coordinates:
    """The coordinates (N, 1, h, w) of tokens that are laid on their grid."""
    rows, columns = (grid.lay(t, axis)[:, :1] for t in (of.rows, of.columns))
    return replace(of, rows=rows, columns=columns)


def grid_of_queries(of: Coordinates) -> TokenGrid | None:
    """The grid of what attends, by the coordinates of the attention (N, heads, T, S), or of what it puts out."""
    return grid_of(of.each(lambda t: t[:, 0]), 2)


def _per_token(t: Tensor, axis: int) -> Tensor:
    """The place (T,) of every token along one axis; NaN where it differs between images or channels."""
    tokens = t.shape[3 - axis]
    each = thin(t).movedim(3 - axis, 0).flatten(1)
    first = each[:, :1]
    same = ((each == first) | (each.isnan() & first.isnan())).all(1)
    return first[:, 0].masked_fill(~same, torch.nan).expand(tokens)
