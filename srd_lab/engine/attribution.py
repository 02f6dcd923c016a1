"""What every method does before and after its own work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srd_lab.errors import SrdLabError, SrdLabWarning

ON_LEAK = ("error", "warn")


def traced(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor to start a trace from, and whether the map must be differentiable in ``x``.

    ``x`` itself where it asks for a gradient, otherwise a leaf that shares its memory.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    return (x if differentiable else x.detach().requires_grad_()), differentiable


def slope_of(
    outputs: Tensor | list[Tensor],
    x: Tensor,
    signals: Tensor | list[Tensor] | None = None,
    *,
    differentiable: bool,
    retain: bool = False,
) -> Tensor:
    """The gradient of ``outputs`` (their sum, or weighted by ``signals``) by ``x``.

    differentiable : whether it keeps its graph; retain : whether the graph of the outputs is needed again.

    Raises SrdLabError where no gradient leads from the outputs to ``x``.
    """
    tops = outputs if isinstance(outputs, list) else [outputs]
    weights = signals if isinstance(signals, list) or signals is None else [signals]
    if weights is None:
        tops = [top.sum() for top in tops]
    slope: Tensor | None = None
    if any(top.requires_grad for top in tops):
        (slope,) = torch.autograd.grad(
            tops,
            x,
            weights,
            create_graph=differentiable,
            retain_graph=differentiable or retain,
            allow_unused=True,
        )
    if slope is None:
        raise no_gradient()
    return slope


def no_gradient() -> SrdLabError:
    """The refusal of a model that cuts autograd's graph."""
    return SrdLabError(
        "no gradient leads from the model's output back to the image: it is detached on the way, runs under no_grad, or is "
        "quantised; pass the network without that, or choose a method that needs no gradient (`random`, `sobel`)"
    )


def row_of(value: Any, i: int, n: int) -> Any:
    """Image ``i``'s entry where ``value`` holds one for each of ``n`` images."""
    each = isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[i : i + 1] if each and len(value) == n else value


def check_conserved(
    started: Tensor, arrived: Tensor, leaks: Mapping[str, Tensor], on_leak: str, eps: float
) -> None:
    """Refuse a map that holds less or more relevance than it should: an operation was taken for what it is not.

    started, arrived : relevance of a batch, of any shapes. leaks : by cause, what is known to have gone to nobody.
    on_leak : "error" or "warn". eps : relative rounding of the coarsest numbers on the way.

    Raises SrdLabError, or warns, where their difference is more than rounding: 1e4 times eps, 2 % at most. What is not
    finite shows by itself, and passes.
    """
    started, arrived = started.detach(), arrived.detach()
    total, size = started.sum(), started.abs().sum() + arrived.abs().sum()
    unexplained = total - arrived.sum() - sum(leaks.values())
    if not unexplained.abs() > min(1e4 * eps, 0.02) * size:
        return
    share = float(unexplained / started.abs().sum())
    said = (
        f"{share:.1%} of the relevance that started did not arrive, for no known reason: the model does something that the "
        "rule does not fit; use another method on it, and please report the model"
    )
    if on_leak == "error":
        raise SrdLabError(said)
    warnings.warn(said, SrdLabWarning, stacklevel=2)
