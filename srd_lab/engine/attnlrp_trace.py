"""A forward pass for LRP that also explains why attention looks where it looks (Achtibat et al. 2024).

Products of two maps pass half of the relevance to each factor, and a softmax its gradient times its input: both are ordinary
derivatives of the live pass, but for a factor. What the other rules hold constant, attention weights, is a map here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.affine import exchanged, spelled
from srd_lab.engine.live_pass import Halve
from srd_lab.engine.spellings import Function, tensors_in
from srd_lab.engine.srd_trace import SRDTrace

_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS_OF_TWO = {
    *(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
    *(
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        torch.bmm,
        Tensor.bmm,
        torch.mm,
        Tensor.mm,
    ),
    *spelled("einsum"),
}


class AttnLRPTrace(SRDTrace):
    """A forward pass whose live pass goes through queries, keys and gates that are products of two maps."""

    def attention(self, weights: Tensor) -> Tensor:
        return weights

    def factors(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self._halved(one), self._halved(other)

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            moving = self.maps_in(args, kwargs)
            if function in _SOFTMAXES:
                return function(*args, **kwargs)
            if function in _PRODUCTS_OF_TWO and len(moving) == len(tensors_in(args, kwargs)) == 2:
                args, kwargs = exchanged(args, kwargs, {id(t): self._halved(t) for t in moving})
                return function(*args, **kwargs)
        return super().on_maps(function, args, kwargs)

    def _halved(self, t: Tensor) -> Tensor:
        return Halve.apply(t, self.live_pass) if t.requires_grad else t
