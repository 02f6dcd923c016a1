"""Smooth ReLUs and clips, each one activation call to an interceptor, and calls that write in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


class _WriteBack(torch.autograd.Function):
    """Give ``x`` the value ``v`` in place; the gradient goes to ``v`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.part_of_another = x._is_view()
        return x.copy_(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Nothing at all for a view would be read as nothing for the whole tensor that it is a part of.
        return torch.zeros_like(grads[0]) if ctx.part_of_another else None, grads[0]


def in_place(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` overwritten by ``function(x)``, of its shape; what ``function`` saved for its derivative stays intact."""
    return _WriteBack.apply(x, function(x.clone()))


def smooth_relu(
    x: Tensor, slope: float, beta: float, inplace: bool = False, stands_for: str = "relu"
) -> Tensor:
    """Softplus surrogate of a (leaky) ReLU (Dombrowski et al. 2019): one activation call, named as the original, to an
    interceptor.

    slope : of the negative side, 0 for a ReLU. beta : sharpness, > 0. inplace : overwrite ``x``.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            smooth_relu, (x,), x, slope, beta, inplace=inplace, stands_for=stands_for
        )
    if inplace:
        return in_place(x, lambda u: smooth_relu(u, slope, beta))
    soft = F.softplus(x, beta)
    return soft if slope == 0 else slope * x + (1 - slope) * soft


def smooth_clip(
    x: Tensor, low: float, high: float, beta: float, inplace: bool = False, stands_for: str = "hardtanh"
) -> Tensor:
    """Softplus surrogate of hardtanh and ReLU6: smooth bends at ``low`` and at ``high``; see :func:`smooth_relu`."""
    if has_torch_function_unary(x):
        return handle_torch_function(
            smooth_clip, (x,), x, low, high, beta, inplace=inplace, stands_for=stands_for
        )
    if inplace:
        return in_place(x, lambda u: smooth_clip(u, low, high, beta))
    return low + F.softplus(x - low, beta) - F.softplus(x - high, beta)
