"""One modified backward pass: a rule stands in for the derivative of every activation while the pass is live.

The rule is live for exactly one backward pass. Differentiating a map differentiates the forward chain too, and that
must use the true derivatives: a rule that stayed live would give second derivatives of the wrong sign.

What has no rule is refused when the live pass reaches it, and only then: what lies behind the start, feeds a gate
alone or makes attention weights may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab import rules
from srd_lab.affine import CASTS, GATES, PRODUCTS, exchanged, is_affine, overwrites
from srd_lab.calls import (
    LAYERS,
    MAX_POOLS,
    Call,
    Convolution,
    Function,
    function_name,
    in_place,
    recognise,
    tensors_in,
)
from srd_lab.checks import refuse_checkpoint
from srd_lab.intercept import Interceptor, SmoothModel
from srd_lab.models.classifier import Classifier
from srd_lab.notes import TensorNotes
from srd_lab.types import SrdLabError

_NO_GATE = "is used for more than multiplying a map by it"


class Switch:
    """Whether the rule is live, and the relevance it left at each call. Holds no graph between passes.

    lost : relevance that live passes could hand to nobody, by cause; None where nobody keeps account.
    """

    def __init__(self, rule: rules.Rule) -> None:
        self.rule = rule
        self.live = False
        self.relevance: dict[int, Tensor] = {}
        self.lost: dict[str, Tensor] | None = None

    def lose(self, cause: str, relevance: Callable[[], Tensor]) -> None:
        """Put down all of ``relevance()`` as lost, if anybody keeps account."""
        if self.lost is not None:
            self.lost[cause] = self.lost.get(cause, 0) + relevance().detach().sum()


class _Gate(torch.autograd.Function):
    """Forward: the activation's output v. Backward: the rule while live, the true derivative otherwise."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, switch: Switch, index: int) -> Tensor:
        ctx.switch, ctx.index = switch, index
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, v)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        switch: Switch = ctx.switch
        if not switch.live or grads[0] is None:
            return None, grads[0], None, None
        u, v = ctx.saved_tensors
        to_u, through_v, r = switch.rule(u, v, grads[0])
        if r is not None and to_u is not None:
            switch.relevance[ctx.index] = r
            switch.lose("dead fields", lambda: r[(to_u == 0).all(1)])
        return to_u, through_v, None, None


class _ShareBias(torch.autograd.Function):
    """Forward: y as it is. Backward while live: the bias's share goes to the input x of its layer as well.

    axis : the channels of y; x and a bias that is not a plain vector have theirs along dimension 1.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None, axis: int, switch: Switch
    ) -> Tensor:
        ctx.switch, ctx.conv, ctx.axis = switch, conv, axis
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bias)
        ctx.mark_dirty(y)  # a view of y would forbid the in-place activation that often follows
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, share = grads[0], None
        if ctx.switch.live and g is not None:
            x, bias = ctx.saved_tensors
            carried = rules.carried_by(bias, g.movedim(ctx.axis, 1))
            share = rules.share_bias(x, carried, ctx.conv)
            ctx.switch.lose("dead fields", lambda: carried[rules.dead_fields(x, ctx.conv)])
        return g, share, None, None, None, None


class _Hold(torch.autograd.Function):
    """A factor that counts as a constant while the rule is live, and as itself otherwise."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, switch: Switch) -> Tensor:
        ctx.switch = switch
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None if ctx.switch.live else grads[0]), None


class _Refuse(torch.autograd.Function):
    """Forward: y. Backward: an error if a signal arrives while the rule is live."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, switch: Switch, complaint: str) -> Tensor:
        ctx.switch, ctx.complaint = switch, complaint
        ctx.set_materialize_grads(False)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0]
        if not ctx.switch.live or g is None:
            return g, None, None
        if g.any():
            raise SrdLabError(ctx.complaint)
        return None, None, None  # a signal of zeros is none: autograd fills them in


class _Absorb(torch.autograd.Function):
    """Forward: y. Backward while live: what the constant part of y earns is put down as lost."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, constant: Tensor, switch: Switch) -> Tensor:
        ctx.switch, ctx.constant = switch, constant
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0]
        if ctx.switch.live:  # an infinite constant is a mask, and earns nothing
            ctx.switch.lose("constants", lambda: torch.where(g == 0, 0, ctx.constant * g))
        return g, None, None


class Gated(Interceptor):
    """Runs a model with a gate at every activation call; ``live()`` turns the rule on for one backward pass."""

    def __init__(self, model: nn.Module, rule: rules.Rule) -> None:
        super().__init__(model)
        self.switch = Switch(rule)

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        if not torch.is_grad_enabled():
            raise SrdLabError(
                f"activation {call.name!r} runs with gradients off (no_grad or reentrant checkpointing inside the model), "
                "so nothing can be traced through it; switch that off"
            )
        refuse_checkpoint(call.name)
        if x.dim() < 2:
            raise SrdLabError(
                f"activation {call.name!r} runs on shape {tuple(x.shape)}; expected images along the first axis and "
                "one more axis at least"
            )
        return super().activate(call, x, inplace) if inplace else self.activation(call, x.clone()).clone()

    def activation(self, call: Call, u: Tensor) -> Tensor:
        return self.gate(call, u, call.function(u))

    def convolution(self, conv: Convolution) -> Tensor:
        refuse_checkpoint(self.where())
        return conv.apply(conv.x, conv.weight, conv.bias)

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        return _Gate.apply(u, v, self.switch, call.index)  # type: ignore[no-untyped-call,no-any-return]

    @contextmanager
    def live(self) -> Iterator[dict[int, Tensor]]:
        """Within: the rule is live; yields the relevance by call index, filled by the backward pass."""
        self.switch.live, self.switch.relevance = True, {}
        try:
            yield self.switch.relevance
        finally:
            self.switch.live, self.switch.relevance = False, {}


class Decomposed(Gated):
    """A gated pass whose rule accounts for everything: what lies between two activations must be affine.

    Gates (a sigmoid or softmax times a map) are constants of the live pass; a live pass that meets anything else
    which is not affine refuses it by name.
    """

    def __init__(self, model: nn.Module, rule: rules.Rule) -> None:
        super().__init__(model, rule)
        # what is no map: gates and what is made of them (True), and what is made of parameters alone (False)
        self._still: TensorNotes[bool] = TensorNotes()
        self._masks: TensorNotes[bool] = TensorNotes()  # what comparisons of maps made
        self._unseen: TensorNotes[bool] = TensorNotes()  # made with gradients off

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(t.requires_grad and self._unseen.get(t) for t in tensors_in(args, kwargs)):
            raise SrdLabError(
                f"{self.where()} runs an autograd function of its own, which cannot be seen through; write it with torch's "
                "functions, or choose a method that needs gradients only"
            )
        given = kwargs or {}
        if torch.is_grad_enabled() and not self.moving(args, given) and _is_layer(func, args, given):
            return self._keep_still(func(*args, **given), self._gates(args, given))
        return super().__torch_function__(func, types, args, kwargs)

    def _dispatch(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in LAYERS:
            weights = {name: value for name, value in kwargs.items() if name != "input"}
            if self.moving(args[1:], weights):
                return self._refused(func, args, kwargs, "has weights that are made of the image")
        return super()._dispatch(func, args, kwargs)

    def moves(self, t: Tensor) -> bool:
        """Whether ``t`` is a map: made of the input, and not held."""
        return t.requires_grad and not t.is_leaf and self._still.get(t) is None

    def _gates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a gate is among the operands."""
        return any(self._still.get(t) for t in tensors_in(args, kwargs))

    def moving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The maps among a call's operands, as often as they occur."""
        return [t for t in tensors_in(args, kwargs) if self.moves(t)]

    def hold(self, t: Tensor) -> Tensor:
        """``t`` as a factor that the live pass takes for a constant."""
        return _Hold.apply(t, self.switch) if t.requires_grad else t  # type: ignore[no-untyped-call,no-any-return]

    def share_bias(
        self, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None = None, axis: int = 1
    ) -> Tensor:
        """``y``, whose layer added ``bias`` to what it made of its input ``x``; both with channels along ``axis``.

        ``bias`` is a vector of channels, or of the shape of ``y`` with channels along dimension 1.
        """
        if not x.requires_grad:
            return y
        return _ShareBias.apply(y, x.movedim(axis, 1), bias, conv, axis, self.switch)  # type: ignore[no-untyped-call,no-any-return]

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving, masked = self.moving(args, kwargs), any(map(self._masks.get, tensors_in(args, kwargs)))
        if not moving:
            out = function(*args, **kwargs)
            return self._keep_still(self._mask(out) if masked else out, self._gates(args, kwargs))
        if not torch.is_grad_enabled():
            return self._hide(function(*args, **kwargs))
        if masked:
            return self._refused(function, args, kwargs, "chooses by a comparison of maps")
        if function in GATES:
            return self._keep_still(self._refused(function, args, kwargs, _NO_GATE), True)
        if not is_affine(function, args, kwargs, moving):
            out = self._refused(function, args, kwargs, "is neither affine nor an activation")
            return self._mask(out) if isinstance(out, Tensor) and out.dtype == torch.bool else out
        if function in PRODUCTS:
            overwritten = args[0] if overwrites(function, kwargs) else None
            factors = [t for t in tensors_in(args, kwargs) if self._still.get(t) and t is not overwritten]
            args, kwargs = exchanged(args, kwargs, {id(t): self.hold(t) for t in factors})
        out = function(*args, **kwargs)
        return self._mask(out) if function in CASTS and not out.is_floating_point() else out

    def absorb(self, out: Tensor, constant: Tensor) -> Tensor:
        """``out``, of which ``constant`` came from no map, and is lost to the live pass."""
        return _Absorb.apply(out, constant, self.switch)  # type: ignore[no-untyped-call,no-any-return]

    def as_gate(self, t: Tensor, function: Function) -> Tensor:
        """``t``, which ``function`` made, for multiplying maps by it and nothing else."""
        return self._keep_still(self._guarded(t, function, _NO_GATE), True)  # type: ignore[no-any-return]

    def _mask(self, out: Any) -> Any:
        """``out``, a comparison of maps or what was made of one."""
        for t in tensors_in((out,)):
            self._masks.put(t, True)
        return out

    def _hide(self, out: Any) -> Any:
        """``out``, made with gradients off: if it asks for them later, an autograd function made it."""
        for t in tensors_in((out,)):
            self._unseen.put(t, True)
        return out

    def _keep_still(self, out: Any, gate: bool) -> Any:
        for t in tensors_in((out,)):
            if t.requires_grad:
                self._still.put(t, gate)
        return out

    def _guarded(self, t: Tensor, function: Function, why: str) -> Tensor:
        if not t.requires_grad:
            return t
        return _Refuse.apply(t, self.switch, self._complaint(function, why))  # type: ignore[no-untyped-call,no-any-return]

    def _complaint(self, function: Function, why: str) -> str:
        return (
            f"{function_name(function)} in {self.where()} {why}, and there is no rule for it; "
            "choose another network, or a method that needs gradients only"
        )

    def _refused(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        """The call as it is, and an error for any live pass that arrives there."""

        def guarded(t: Any) -> Any:
            if isinstance(t, tuple | list):
                parts = [guarded(part) for part in t]
                return t._make(parts) if hasattr(t, "_make") else type(t)(parts)
            return self._guarded(t, function, why) if isinstance(t, Tensor) else t

        if not overwrites(function, kwargs):
            return guarded(function(*args, **kwargs))
        if not isinstance(args[0], Tensor):
            raise SrdLabError(self._complaint(function, why))
        return in_place(args[0], lambda t: guarded(function(t, *args[1:], **kwargs)))


def _is_layer(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one that interception hands to a method of its own."""
    return func in LAYERS or func in MAX_POOLS or recognise(func, args, kwargs) is not None


def traced(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor to start a trace from, and whether the map must be differentiable in ``x``.

    ``x`` itself where it asks for a gradient, otherwise a leaf that shares its memory.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    return (x if differentiable else x.detach().requires_grad_()), differentiable


def split_normalisation(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The normalisation in front of a network, and the network.

    Models of :func:`srd_lab.load_model` have both; any other model is taken to be a bare network. Raises SrdLabError if
    hooks, which what is run in two parts would pass by, are on the whole.
    """
    if isinstance(model, SmoothModel):
        normalise, network = split_normalisation(model.model)
        return normalise, SmoothModel(network, model.beta)
    if type(model) is not Classifier:
        return nn.Identity(), model
    if model._forward_hooks or model._forward_pre_hooks:
        raise SrdLabError(
            "forward hooks are on the whole classifier, whose normalisation and network run one by one; put them on "
            "model.network"
        )
    return model.normalise, model.network


def normalisation_scale(model: nn.Module, x: Tensor) -> Tensor:
    """What one unit of pixel value is in normalised units, (1, C, 1, 1)."""
    normalise, _ = split_normalisation(model)
    zero = torch.zeros_like(x[:1])
    with torch.no_grad():
        return (normalise(zero + 1) - normalise(zero)).mean((2, 3), keepdim=True)
