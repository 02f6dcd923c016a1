"""What every method does before and after its own work."""

from __future__ import annotations

import torch
from torch import Tensor


def traced(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor to start a trace from, and whether the map must be differentiable in ``x``.

    ``x`` itself where it asks for a gradient, otherwise a leaf that shares its memory.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    return (x if differentiable else x.detach().requires_grad_()), differentiable
