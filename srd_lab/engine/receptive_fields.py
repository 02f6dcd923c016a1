"""Where in the image the cells of a map read, by their gradient.

The coordinates that :mod:`srd_lab.engine.coordinate_calls` follows are those of what has a place: of ``y + y @ P`` that is
``y``, however little it weighs beside ``y @ P``, which may be a mirror. So a layer whose map is laid over the image is asked
once more, by autograd alone: the middle of the pixels that a cell depends on has to move with the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.engine.interceptor import Watch
from srd_lab.engine.spellings import Function
from srd_lab.errors import SrdLabError

_CELLS = (1 / 6, 1 / 2, 5 / 6)  # of the map's height and width
_MOVES = 0.08  # of the image (standard deviation); what cells that read nearly all of it read moves by half of that
_ALIKE = 0.5  # correlation; of trained networks it is .9 and more from four cells a side on
_FEW = 3  # cells a side; up to these chance makes .07 to 1, and a map has to run backwards to be refused:
_BACKWARDS = -0.25
_SHIFT = 0.2  # of the image, or
_STRIDE = 0.6  # of the distance of two cells; strides alone make 0.5


def reads_elsewhere(
    model: nn.Module, x: Tensor, event: int, laid: Callable[[Tensor], Tensor], events: int
) -> bool:
    """Whether the pixels that the cells of a map depend on run against the map: mirrored, transposed or moved.

    x : images (N, C, H, W). event : the torch function of the model whose output is asked; laid : lays that as a map
        (..., h, w).
    events : how many torch functions the model calls for x.

    Asked are nine cells, by their squared gradient, on two images where the model calls as many functions for two. A map of
    one cell, and one that does not depend on the image, does not.
    """
    for some in dict.fromkeys((min(2, len(x)), len(x))):
        trace = _Asked(model, event, laid)
        try:
            with torch.enable_grad():
                trace.run(x[:some].detach().clone().requires_grad_())
        except Exception as error:  # it calls others for two, whose shapes are others
            if isinstance(error, SrdLabError) or some == len(x):
                raise
            continue
        if trace.events == events:
            break
    if not trace.claims:
        return False
    claims, found = torch.tensor(trace.claims, dtype=torch.float64), torch.stack(trace.found).cpu()
    return _runs_otherwise(claims, found, trace.sides)


class _Asked(Watch):
    """Runs a model and asks the cells of what its torch function number ``event`` puts out what they depend on, at once: the
    model may overwrite it.

    sides : height and width of the map. claims : places of cells (row, column) as shares of these. found : (2,) of what they
    read, as shares of the image.
    """

    needs_activations = False

    def __init__(self, model: nn.Module, event: int, laid: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.event, self.laid = event, laid
        self.sides = (1, 1)
        self.claims: list[tuple[float, float]] = []
        self.found: list[Tensor] = []

    def run(self, x: Tensor) -> Any:
        self._fed = x
        return super().run(x.clone())

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.events
        out = super().intercept(func, args, kwargs)
        if before < self.event == self.events and isinstance(out, Tensor) and out.requires_grad:
            self._ask(self.laid(out))
        return out

    def _ask(self, maps: Tensor) -> None:
        self.sides = maps.shape[-2], maps.shape[-1]
        rows, columns = (sorted({int(part * side) for part in _CELLS}) for side in self.sides)
        drawn = torch.Generator(maps.device).manual_seed(0)
        signs = torch.randint(0, 2, maps.shape[:-2], generator=drawn, device=maps.device).to(maps) * 2 - 1
        for row, column in product(rows, columns):
            cell = (maps[..., row, column] * signs).sum()
            (g,) = torch.autograd.grad(cell, self._fed, retain_graph=True, allow_unused=True)
            if g is not None and g.any() and g.isfinite().all():
                self.claims.append(((row + 0.5) / self.sides[0], (column + 0.5) / self.sides[1]))
                self.found.append(_middle(g.detach()))


def _middle(g: Tensor) -> Tensor:
    """The middle (2,) of squared gradients (N, C, H, W), as shares of height and width."""
    weight = (g.double() / g.abs().amax()).square().sum((0, 1))
    across = [
        (torch.arange(side, device=g.device, dtype=torch.float64) + 0.5) / side for side in weight.shape
    ]
    return torch.stack([(weight.sum(1 - k) * along).sum() for k, along in enumerate(across)]) / weight.sum()


def _runs_otherwise(claims: Tensor, found: Tensor, sides: tuple[int, int]) -> bool:
    """Whether places (K, 2) that were found move from cell to cell, and not with those that cells claim (K, 2).

    sides : height and width of the map.
    """
    claimed, moved = claims - claims.mean(0), found - found.mean(0)
    sizes = claimed.square().mean(0).sqrt(), moved.square().mean(0).sqrt()
    likeness = (claimed * moved).mean(0) / (sizes[0] * sizes[1])
    asked = (sizes[0] > 0) & (sizes[1] > _MOVES)
    least = torch.where(torch.tensor(sides) > _FEW, _ALIKE, _BACKWARDS)
    near = (_STRIDE / torch.tensor(sides)).clamp_min(_SHIFT)
    away = (found - claims).mean(0).abs() > near
    return bool((asked & ((likeness < least) | away)).any())
