"""Runs a model as it is, and says how far two of its outputs may be apart that are the same but for rounding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import LIKE, overwrites
from srd_lab.engine.interceptor import Watch
from srd_lab.engine.spellings import Call, Function, tensors_in

_COMMON = 0.03  # of the size of what logits have in common, which is rounded, too
_BYTES = 2.0**-8
_TENSOR_CORES = 2.0**-10  # relative rounding of products there, of float32 numbers too


class RoundingWatch(Watch):
    """Runs a model as it is, and knows how far two of its outputs may be apart that are the same but for rounding.

    eps : relative rounding of the coarsest numbers of what was made of the image. sums : of every run, of the absolute
        values that each activation call puts out, by row.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.eps = 0.0
        self.sums: list[list[Tensor]] = []
        self._of_image = WeakTensorKeyDictionary()

    def run(self, x: Tensor) -> Any:
        self._of_image[x] = True
        self.sums.append([])
        return super().run(x)

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        out = super().activate(call, x, inplace)
        if out.dim() > 1 and out.is_floating_point():
            self.sums[-1].append(out.detach().abs().flatten(1).sum(1, dtype=torch.float64))
        return out

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().intercept(func, args, kwargs)
        if func in LIKE or not any(t in self._of_image for t in tensors_in(args, kwargs)):
            return out
        if type(func).__module__ == "torch._ops" and not str(func).startswith("aten."):
            self.eps = max(self.eps, _BYTES)  # the way to quantised layers, and to what else has few bits
        written = args[:1] if func is Tensor.__setitem__ or overwrites(func, kwargs) else ()
        for t in tensors_in((out, *written)):
            self._of_image[t] = True
            if t.is_floating_point():
                eps = torch.finfo(t.dtype).eps
                self.eps = max(self.eps, eps if t.device.type == "cpu" or eps < 1e-8 else _TENSOR_CORES)
        return out

    @property
    def rounding(self) -> float:
        """As a share of the largest logit: 1e-4 for float32, 1e-9 at least, 0.05 at most."""
        return min(max(1e3 * self.eps, 1e-9), 0.05)


def logits_of(watch: Watch, x: Tensor) -> Tensor | None:
    """The logits (N, K) of the model itself; None where it has none, or cannot be run: whoever runs it next says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, of the run that counts
            out = watch.run(x.clone())
    except Exception:  # whatever the model raises
        return None
    return out if isinstance(out, Tensor) and out.dim() == 2 else None


def far_apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number in either, less what logits (N, K) have in common, which is
    no part of any map; 0 where that is 0 or not finite."""
    size = torch.maximum(one.abs().amax(), other.abs().amax())
    if one.dim() == 2 and one.shape[1] > 1:
        spread = (one.amax(1) - one.amin(1)).amax()
        size = torch.maximum(spread, _COMMON * size)
    share = float((one - other).abs().amax() / size)
    return share if share < float("inf") else 0.0
