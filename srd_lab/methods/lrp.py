"""Layer-wise relevance propagation with the z+ rule (Montavon et al. 2017), z^B at the input; bias ignored.

Between two activation layers everything is affine, so a pre-activation is ``u_j = sum_i w_ij x_i`` over activation
outputs x_i >= 0, and relevance goes to positive contributions only:
``R_i = sum_j x_i w_ij^+ / (sum_k x_k w_kj^+) R_j``. Batch norm after a convolution is folded into w before the sign
is taken; additions and concatenations are part of the affine map, so a residual network needs no canonisation.
At the input, with pixels in a box [l, h]: ``R_i = sum_j (x_i w_ij - l_i w_ij^+ - h_i w_ij^-) / (sum_k same) R_j``.

As one backward pass: next to every pre-activation u runs its positive part u+ (the same layers with w+), and an
activation replaces its derivative by ``v G / u+``, which then takes the ordinary backward pass through u+.

Example
-------
>>> LRPZPlus().explain(model, x)    # (N, H, W); sums to the target logit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab import maps, rules
from srd_lab.backprop import (
    GATES,
    Decomposed,
    TensorNotes,
    exchanged,
    overwrites,
    split_normalisation,
    tensors_in,
    traced,
)
from srd_lab.calls import BatchNorm, Call, Convolution, Function, MaxPool, take
from srd_lab.checks import check_input, check_target
from srd_lab.types import SrdLabError

_NON_NEGATIVE = ("relu", "relu6", "softplus", "smooth_relu", "smooth_clip")


@dataclass(frozen=True)
class LRPZPlus:
    """LRP z+ with z^B at the first layer.

    low, high : the pixel box; it is normalised as the image is.
    channels : how the colour channels become one number; "sum" adds up their shares.
    """

    low: float = 0.0
    high: float = 1.0
    channels: str = "sum"

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Relevance per pixel (N, H, W), summing to the target logit up to dead receptive fields.
        See :class:`srd_lab.types.Explainer`."""
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The map and the model's output, from one forward pass."""
        check_input(x, model)
        leaf, differentiable = traced(x)
        normalise, network = split_normalisation(model)
        with torch.enable_grad():
            box = [
                normalise(torch.full_like(x, end)).detach().requires_grad_() for end in (self.low, self.high)
            ]
            given = normalise(leaf)
            trace = _LRPTrace(network, *box)
            logits = trace.trace(given)
            classes = check_target(target, logits)[:, None]
            relevance = torch.zeros_like(logits).scatter(1, classes, logits.gather(1, classes))
            top = trace.plus(logits)
            with trace.live():
                slopes = torch.autograd.grad(
                    top,
                    (given, *box),
                    rules.divide(relevance, top),
                    create_graph=differentiable,
                    allow_unused=True,
                )
            shares = [t * g for t, g in zip((given, *box), slopes, strict=True) if g is not None]
            attribution = torch.stack(shares).sum(0) if shares else torch.zeros_like(given)
        trace.release()
        map_ = maps.reduce_channels(attribution, self.channels)
        return (map_, logits) if differentiable else (map_.detach(), logits.detach())


def _z_plus(u_plus: Tensor, v: Tensor, g: Tensor) -> rules.Passed:
    r = v * g
    return rules.Passed(rules.divide(r, u_plus), None, r.sum(1))


class _LRPTrace(Decomposed):
    """A forward pass that carries, for every tensor between two activations, its positive part alongside."""

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor) -> None:
        super().__init__(network, _z_plus)
        self._ends = (low, high)
        self._parts: TensorNotes[Tensor] = TensorNotes()
        # a batch norm may follow: fold first, then take the sign
        self._unfolded: TensorNotes[Convolution] = TensorNotes()
        # bounds of tensors that are made of the image alone
        self._boxes: TensorNotes[tuple[Tensor, Tensor]] = TensorNotes()
        self._u_plus: Tensor | None = None

    def trace(self, given: Tensor) -> Tensor:
        fed = given.clone()  # a network may change its input in place
        self._boxes.put(fed, self._ends)
        return self.run(fed)  # type: ignore[no-any-return]

    def release(self) -> None:
        """Let go of every tensor, so that the graph dies with whoever still needs it."""
        for notes in (self._parts, self._unfolded, self._boxes):
            notes.clear()
        self._u_plus = None

    def plus(self, t: Tensor) -> Tensor:
        """The positive part of t; an activation's output, and what is pooled from it, is its own."""
        conv = self._unfolded.get(t)
        if conv is not None:
            return self._convolved(conv, conv.weight)
        part = self._parts.get(t)
        return t if part is None else part

    # calls ---------------------------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        clipped = call.kind == "hardtanh" and call.value_at(-1e30) >= 0  # how nn.ReLU6 calls itself
        if call.kind not in _NON_NEGATIVE and not clipped:
            raise SrdLabError(
                f"lrp_zplus needs activations that are >= 0 (ReLU, softplus), but {call.name!r} is {call.kind}; "
                "use another method on this network"
            )
        plus = self.plus(x)
        self._u_plus = plus.clone() if plus is x else plus
        return super().activate(call, x, inplace)

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        return super().gate(call, self._u_plus, v)  # type: ignore[arg-type]

    def convolution(self, conv: Convolution) -> Tensor:
        y = super().convolution(conv)
        self._unfolded.put(y, conv)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        self._parts.put(y, F.linear(self.plus(x), weight.clamp_min(0)))
        return y

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        conv, scale = self._unfolded.get(norm.x), norm.scale.view(1, -1, *[1] * (norm.x.dim() - 2))
        if conv is not None:
            part = self._convolved(conv, conv.weight * norm.scale.view(-1, 1, 1, 1))
        else:
            part = self._affine(norm.x, scale, lambda x, w: x * w)
        y = run()
        self._parts.put(y, part)
        return y

    def max_pool(self, pool: MaxPool) -> Any:
        out = super().max_pool(pool)
        box = self._boxes.get(pool.x)
        if isinstance(out, Tensor) and (box is not None or self._noted(pool.x)):
            winners = pool.apply(pool.x.detach(), True)[1]
            self._note(out, [take(t, winners) for t in (box or (self.plus(pool.x),))])
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other affine operation does to the positive parts what it does to the values; a gate is one factor for
        both. What is refused is refused in the positive parts too, where the live pass goes."""
        run = super().other
        tensors = tensors_in(args, kwargs)
        if function in GATES or not self.moving(args, kwargs):
            return run(function, args, kwargs)
        if any(self._noted(t) for t in tensors):
            tables = [{id(t): self.plus(t) for t in tensors}]
        elif any(self._boxes.get(t) for t in tensors):
            bounds = {id(t): self._boxes.get(t) or (t, t) for t in tensors}
            tables = [{key: ends[i] for key, ends in bounds.items()} for i in (0, 1)]
        else:
            return run(function, args, kwargs)
        mirrored = [_mirror(function, args, kwargs, table) for table in tables]
        out = run(function, args, kwargs)
        if _made_tensors(out):
            self._note(out, [run(function, *given) for given in mirrored])
        return out

    # positive parts ------------------------------------------------------------------------------------
    def _noted(self, t: Tensor) -> bool:
        return self._unfolded.get(t) is not None or self._parts.get(t) is not None

    def _note(self, out: Any, mirrored: list[Any]) -> None:
        outs = (out,) if isinstance(out, Tensor) else out
        columns = [(m,) if isinstance(m, Tensor) else m for m in mirrored]
        for t, *parts in zip(outs, *columns, strict=True):
            if len(parts) == 1:
                self._parts.put(t, parts[0])
            else:
                self._boxes.put(t, (parts[0], parts[1]))

    def _convolved(self, conv: Convolution, weight: Tensor) -> Tensor:
        return self._affine(conv.x, weight, conv.apply)

    def _affine(self, x: Tensor, weight: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """z+ above, z^B where x is made of the image alone."""
        box = self._boxes.get(x)
        if box is None:
            return run(self.plus(x), weight.clamp_min(0))
        return run(x, weight) - run(box[0], weight.clamp_min(0)) - run(box[1], weight.clamp_max(0))


def _mirror(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], table: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with every tensor exchanged; what it would overwrite is copied first."""
    args, kwargs = exchanged(args, kwargs, table)
    return ((args[0].clone(), *args[1:]) if overwrites(function, kwargs) else args), kwargs


def _made_tensors(out: Any) -> bool:
    outs = out if isinstance(out, tuple | list) else (out,)
    return bool(outs) and all(isinstance(t, Tensor) and t.requires_grad for t in outs)
