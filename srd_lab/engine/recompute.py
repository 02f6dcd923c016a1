"""A function that is run again backwards, instead of keeping its graph until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, differentiable in every tensor that asks for it, more than once.

    function : of these tensors alone; it runs again for every backward pass, so that memory is that of one run.

    Not ``torch.utils.checkpoint``: what it runs again would not be seen by interception.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    return _Recompute.apply(function, *tensors)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*_leaves(tensors, ctx.needs_input_grad[1:])).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        asked = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()  # this gradient is to be differentiated in its turn
        tensors = ctx.saved_tensors if again else _leaves(ctx.saved_tensors, asked)
        wanted = [t for t, needs in zip(tensors, asked, strict=True) if needs]
        with torch.enable_grad():
            out = ctx.function(*tensors)
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=again, allow_unused=True))
        return None, *(next(found) if needs else None for needs in asked)


def _leaves(tensors: tuple[Tensor, ...], asked: tuple[bool, ...]) -> list[Tensor]:
    return [t.detach().requires_grad_(needs) for t, needs in zip(tensors, asked, strict=True)]
