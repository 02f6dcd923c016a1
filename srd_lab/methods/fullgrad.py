"""FullGrad: the gradient of the input and of every bias (Srinivas & Fleuret 2019).

A network of ReLUs, max pools and affine layers is ``y_c = <d y_c / d x, x> + sum_b <d y_c / d b, b>`` exactly, over the
biases b of all its layers. The map adds up what each term has to say about places:

    psi(d y_c / d x * x) + sum_layers sum_channels psi(d y_c / d b * b),    psi = stretch to the image of |.|

every term stretched to [0, 1] over its channels and places first. The shift of a batch norm is a bias, and an activation
f other than ReLU has the bias f(u) - f'(u) u. Biases of linear layers behind the maps have no
place: they count for completeness only.

Example
-------
>>> FullGrad().explain(model, x)      # (N, H, W), >= 0
>>> FullGrad().terms(model, x, 3)     # (N, 1 + biases): their sums, which add up to the logit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab import maps, rules
from srd_lab.affine import SHIFTS, constant_part, overwrites
from srd_lab.backprop import split_normalisation, traced
from srd_lab.calls import BatchNorm, Call, Convolution, Function, in_place, tensors_in
from srd_lab.checks import check_input, class_logit
from srd_lab.intercept import Watch
from srd_lab.layout import Channels
from srd_lab.notes import TensorNotes
from srd_lab.types import Explainer

_WITHOUT_BIAS = ("relu", "leaky_relu", "prelu")  # f(u) = f'(u) u


@dataclass(frozen=True)
class FullGrad(Explainer):
    """Input and bias gradients, each stretched to [0, 1] and to the image, added up."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Full-gradient saliency (N, H, W), >= 0; the model's output, from one forward pass."""
        products, logits, differentiable = _products(model, x, target)
        size = (x.shape[2], x.shape[3])
        shown = [maps.upsample(_unit_range(p).sum(1), size) for p in products if p.dim() == 4]
        map_ = torch.stack(shown).sum(0)
        return (map_, logits) if differentiable else (map_.detach(), logits.detach())

    def terms(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """What the input and every bias, in call order, add to the target logit: (N, 1 + biases). Their sum is the logit
        for a network of piecewise linear and affine layers, and activations."""
        products, _, differentiable = _products(model, x, target)
        sums = torch.stack([p.flatten(1).sum(1) for p in products], 1)
        return sums if differentiable else sums.detach()


class _Biases(Watch):
    """Notes every tensor that a bias was added to, with the bias and the axis of its channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: list[tuple[Tensor, Tensor, int]] = []
        self.channels = Channels()
        self._of_image: TensorNotes[bool] = TensorNotes(lasting=True)

    def trace(self, fed: Tensor) -> Tensor:
        """The logits; ``fed`` may be changed in place."""
        self._of_image.put(fed, True)
        return self.run(fed)  # type: ignore[no-any-return]

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = tensors_in(args, kwargs)
        out = super().__torch_function__(func, types, args, kwargs)
        if any(self._of_image.get(t) for t in operands):
            for t in tensors_in((out,)):
                self._of_image.put(t, True)
        return out

    def note(self, y: Tensor, x: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """``y``, which was made of ``x`` and holds ``bias``; a copy, as what follows may overwrite it. What is made of
        parameters alone has no bias: it is one."""
        if bias is None or not self._of_image.get(x) or not y.requires_grad:
            return y
        self.found.append((y, bias, axis))
        return self.channels.put(y.clone(), axis)

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        axis = self.channels.of(x)
        return self.channels.put(self._activated(call, x, inplace, axis), axis)

    def _activated(self, call: Call, x: Tensor, inplace: bool, axis: int) -> Tensor:
        if call.kind in _WITHOUT_BIAS or not self._of_image.get(x):
            return super().activate(call, x, inplace)
        u = x.clone()
        v = call.function(u)
        (slope,) = torch.autograd.grad(v.sum(), u, create_graph=True)
        self.found.append((v, v - slope * u, axis))
        return x.copy_(v) if inplace else v.clone()

    def convolution(self, conv: Convolution) -> Tensor:
        y = super().convolution(conv)
        return self.note(y, conv.x, None if conv.bias is None else conv.bias.view(-1, 1, 1), 1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        self.channels.put(y, y.dim() - 1)
        return self.note(y, x, bias, y.dim() - 1)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        return self.note(run(), norm.x, norm.shift.view(-1, *[1] * (norm.x.dim() - 2)), 1)

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving = [t for t in tensors_in(args, kwargs) if self._of_image.get(t)]
        if not moving:
            return super().other(function, args, kwargs)
        x = max(moving, key=Tensor.dim)
        axis = self.channels.of(x)
        if function in SHIFTS and len(moving) == 1:
            bias = constant_part(function, args, kwargs, [x])
            if bias.dim() == x.dim() and _is_vector(bias, axis):
                return self._shifted(function, args, kwargs, x, bias, axis)
        out = super().other(function, args, kwargs)
        self.channels.follow(function, args, kwargs, x, axis, out)
        # here as well, as the padding of a convolution by name is no call of the model's
        for t in tensors_in((out,)):
            self._of_image.put(t, True)
        return out

    def _shifted(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        bias: Tensor,
        axis: int,
    ) -> Tensor:
        """What is added to a map is a bias."""
        if overwrites(function, kwargs):
            return in_place(args[0], lambda u: self.note(function(u, *args[1:], **kwargs), x, bias, axis))
        return self.note(function(*args, **kwargs), x, bias, axis)


def _is_vector(t: Tensor, axis: int) -> bool:
    """Whether ``t`` is one vector along ``axis``, at every position of every image."""
    rows = t.movedim(axis, -1).flatten(0, -2)
    return bool((rows == rows[:1]).all())


def _products(model: nn.Module, x: Tensor, target: Tensor | int | None) -> tuple[list[Tensor], Tensor, bool]:
    """Gradient times value of the (normalised) input and of every bias, channels along dimension 1, the logits, and
    whether they keep their graph."""
    check_input(x, model)
    normalise, network = split_normalisation(model)
    leaf, differentiable = traced(x)
    with torch.enable_grad():
        given = normalise(leaf)
        trace = _Biases(network)
        logits = trace.trace(given.clone())
        score = class_logit(logits, target).sum()
        held = [given, *(y for y, _, _ in trace.found)]
        slopes = torch.autograd.grad(score, held, create_graph=differentiable, allow_unused=True)
        values = [(given, 1), *((bias, axis) for _, bias, axis in trace.found)]
        found = zip(slopes, values, strict=True)
        products = [(g * value).movedim(axis, 1) for g, (value, axis) in found if g is not None]
    return products, logits, differentiable


def _unit_range(product: Tensor) -> Tensor:
    """|product| stretched to [0, 1] per image; 0 where it is the same everywhere."""
    size = product.abs()
    low, high = size.amin((1, 2, 3), keepdim=True), size.amax((1, 2, 3), keepdim=True)
    return rules.divide(size - low, high - low)
