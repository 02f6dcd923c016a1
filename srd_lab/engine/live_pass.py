"""One modified backward pass: a rule stands in for the derivative of every activation while the pass is live.

The rule is live for exactly one backward pass. Differentiating a map differentiates the forward chain too, and that
must use the true derivatives: a rule that stayed live would give second derivatives of the wrong sign.

What has no rule is refused when the live pass reaches it, and only then: what lies behind the start, feeds a gate
alone or makes attention weights may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srd_lab.engine import rules
from srd_lab.engine.geometry import Convolution
from srd_lab.errors import Refused


@dataclass(frozen=True)
class Leaks:
    """Relevance of all images together that was not passed on.

    by_cause : its sums (). size : the sum () of its absolute values.
    """

    by_cause: Mapping[str, Tensor] = field(default_factory=dict)
    size: Tensor | float = 0.0

    @property
    def total(self) -> Tensor | float:
        """The sum over all causes."""
        return sum(self.by_cause.values(), 0.0)

    def plus(self, cause: str, relevance: Tensor) -> Leaks:
        """With ``relevance``, of any shape, as well."""
        relevance = relevance.detach()
        amount = self.by_cause.get(cause, 0) + relevance.sum()
        return Leaks({**self.by_cause, cause: amount}, self.size + relevance.abs().sum())


class LivePass:
    """Whether the rule is live, and the relevance it left at each call. Has no graph between passes.

    rule : what stands in for the derivative of an activation while the pass is on.
    on : whether the pass that runs now is a live one. relevance : by activation call, what arrived there, (N, ...).
    leaks : what the last live pass could not pass on.
    """

    def __init__(self, rule: rules.Rule) -> None:
        self.rule = rule
        self.on = False
        self.relevance: dict[int, Tensor] = {}
        self.leaks = Leaks()

    def begin(self) -> None:
        """A live pass is about to run; of earlier ones nothing is kept."""
        self.on, self.relevance, self.leaks = True, {}, Leaks()

    def leak(self, cause: str, relevance: Tensor) -> None:
        """Count all of ``relevance``, of any shape, as leaked."""
        self.leaks = self.leaks.plus(cause, relevance)


class Gate(torch.autograd.Function):
    """Forward: the activation's output v, of pre-activation u. Backward: the rule while live, the true derivative otherwise.

    index : of the activation call, under which its relevance is reported.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, live_pass: LivePass, index: int) -> Tensor:
        ctx.live_pass, ctx.index = live_pass, index
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, v)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        live_pass: LivePass = ctx.live_pass
        if not live_pass.on or grads[0] is None:
            return None, grads[0], None, None
        u, v = ctx.saved_tensors
        to_u, through_v, relevance, leaked = live_pass.rule(u, v, grads[0])
        if relevance is not None:
            live_pass.relevance[ctx.index] = relevance
        if leaked is not None:
            live_pass.leak("dead fields", leaked)
        return to_u, through_v, None, None


class ShareBias(torch.autograd.Function):
    """Forward: y as it is. Backward while live: the bias's share goes to the input x of its layer as well.

    conv : geometry of the receptive fields; None is one position.
    axis : the channels of y; x and a bias that is not a plain vector have theirs along dimension 1.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None, axis: int, live_pass: LivePass
    ) -> Tensor:
        ctx.live_pass, ctx.conv, ctx.axis = live_pass, conv, axis
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bias)
        ctx.mark_dirty(y)  # a view of y would forbid the in-place activation that often follows
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, share = grads[0], None
        if ctx.live_pass.on and g is not None:
            x, bias = ctx.saved_tensors
            relevance = rules.bias_relevance(bias, g.movedim(ctx.axis, 1))
            share, leaked = rules.share_bias(x, relevance, ctx.conv)
            ctx.live_pass.leak("dead fields", leaked)
        return g, share, None, None, None, None


class LiveConstant(torch.autograd.Function):
    """A factor that counts as a constant while the rule is live, and as itself otherwise."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, live_pass: LivePass) -> Tensor:
        ctx.live_pass = live_pass
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None if ctx.live_pass.on else grads[0]), None


class Halve(torch.autograd.Function):
    """One factor of a product of two maps: half of the signal while the rule is live, all of it otherwise."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, live_pass: LivePass) -> Tensor:
        ctx.live_pass = live_pass
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0] / 2 if ctx.live_pass.on else grads[0]), None


class Refuse(torch.autograd.Function):
    """Forward: y. Backward: an SrdLabError, ``complaint``, if a signal arrives while the rule is live."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, live_pass: LivePass, complaint: str) -> Tensor:
        ctx.live_pass, ctx.complaint = live_pass, complaint
        ctx.set_materialize_grads(False)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0]
        if not ctx.live_pass.on or g is None:
            return g, None, None
        if g.any():
            raise Refused(ctx.complaint)
        return None, None, None  # a signal of zeros is none: autograd fills them in


class Absorb(torch.autograd.Function):
    """Forward: y. Backward while live: the relevance of the constant part of y is counted as leaked."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, constant: Tensor, live_pass: LivePass) -> Tensor:
        ctx.live_pass, ctx.constant = live_pass, constant
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0]
        if ctx.live_pass.on:  # an infinite constant is a mask, and has no relevance
            ctx.live_pass.leak("constants", torch.where(g == 0, 0, ctx.constant * g))
        return g, None, None
