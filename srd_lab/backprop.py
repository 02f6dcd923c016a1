"""One modified backward pass: a rule stands in for the derivative of every activation while the pass is live.

The rule is live for exactly one backward pass. Differentiating a map differentiates the forward chain too, and that
must use the true derivatives: a rule that stayed live would give second derivatives of the wrong sign.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab import rules
from srd_lab.calls import Call, Convolution, function_name
from srd_lab.checks import refuse_checkpoint
from srd_lab.intercept import Interceptor, SmoothModel
from srd_lab.types import SrdLabError

Note = TypeVar("Note")
T = torch.Tensor
_GATES = {torch.sigmoid, T.sigmoid, F.sigmoid, F.hardsigmoid, F.softmax, torch.softmax, T.softmax}
_NOT_AFFINE = {
    # layers
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.conv1d, F.conv3d),
    *(F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm, F.normalize),
    *(F.bilinear, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    # activations without a name in srd_lab.calls
    *(F.softsign, F.hardshrink, F.softshrink, F.tanhshrink, F.glu, F.rrelu, F.rrelu_, F.logsigmoid),
    *(F.threshold, F.threshold_, torch.threshold, torch.rrelu, torch.rrelu_),  # type: ignore[attr-defined]
    *(torch.clamp, T.clamp, torch.clamp_, T.clamp_, torch.clip, T.clip, torch.clip_, T.clip_),
    *(torch.clamp_max, T.clamp_max, T.clamp_min, torch.clamp_min, T.clamp_max_, T.clamp_min_),
    *(torch.sigmoid_, T.sigmoid_, torch.maximum, T.maximum, torch.minimum, T.minimum),
    # elementwise functions
    *(torch.abs, T.abs, T.abs_, torch.exp, T.exp, T.exp_, torch.log, T.log, torch.sqrt, T.sqrt, torch.rsqrt, T.rsqrt),
    *(torch.square, T.square, torch.pow, T.pow, T.pow_, T.__pow__, T.__rpow__, torch.sin, T.sin, torch.cos, T.cos),
    *(torch.reciprocal, T.reciprocal, T.__rdiv__),
}  # fmt: skip
_PRODUCTS = {
    *(torch.mul, T.mul, T.mul_, torch.div, T.div, T.div_, torch.true_divide, T.true_divide),
    *(torch.matmul, T.matmul, torch.bmm, T.bmm, torch.einsum),
}


class Switch:
    """Whether the rule is live, and the relevance it left at each call. Holds no graph between passes."""

    def __init__(self, rule: rules.Rule) -> None:
        self.rule = rule
        self.live = False
        self.relevance: dict[int, Tensor] = {}


class _Gate(torch.autograd.Function):
    """Forward: the activation's output v. Backward: the rule while live, the true derivative otherwise."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, switch: Switch, index: int) -> Tensor:
        ctx.switch, ctx.index = switch, index
        ctx.save_for_backward(u, v)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        switch: Switch = ctx.switch
        if not switch.live:
            return None, grads[0], None, None
        u, v = ctx.saved_tensors
        passed = switch.rule(u, v, grads[0])
        if passed.relevance is not None:
            switch.relevance[ctx.index] = passed.relevance
        return passed.to_u, passed.through_v, None, None


class _ShareBias(torch.autograd.Function):
    """Forward: y as it is. Backward while live: the bias's share goes to the input x of its layer as well."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None, switch: Switch
    ) -> Tensor:
        ctx.switch, ctx.conv = switch, conv
        ctx.save_for_backward(x, bias)
        ctx.mark_dirty(y)  # a view of y would forbid the in-place activation that often follows
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0]
        share = None
        if ctx.switch.live:
            x, bias = ctx.saved_tensors
            share = rules.share_bias(x, bias, g, ctx.conv)
        return g, share, None, None, None


class _Hold(torch.autograd.Function):
    """A multiplicative gate: constant while the rule is live, itself otherwise."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, switch: Switch) -> Tensor:
        ctx.switch = switch
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None if ctx.switch.live else grads[0]), None


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
        return super().activate(call, x, inplace) if inplace else self.activation(call, x.clone()).clone()

    def activation(self, call: Call, u: Tensor) -> Tensor:
        return self.gate(call, u, call.function(u))

    def convolution(self, conv: Convolution) -> Tensor:
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

    Gates (a sigmoid times a map) are constants of the live pass; anything else that is not affine is refused.
    """

    def __init__(self, model: nn.Module, rule: rules.Rule) -> None:
        super().__init__(model, rule)
        self._held: TensorNotes[bool] = TensorNotes()
        # With weights that ask for gradients too, a product of map and weight looks like one of two maps.
        self._frozen = not any(p.requires_grad for p in model.parameters())

    def share_bias(self, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None) -> Tensor:
        """``y``, whose layer added ``bias`` to what it made of its input ``x``."""
        if not x.requires_grad:
            return y
        return _ShareBias.apply(y, x, bias, conv, self.switch)  # type: ignore[no-untyped-call,no-any-return]

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        if not any(t.requires_grad for t in tensors_in(out)):
            return out
        if function in _GATES:
            out = _Hold.apply(out, self.switch)  # type: ignore[no-untyped-call]
            self._held.put(out, True)
            return out
        maps = [t for t in tensors_in(args) if t.requires_grad]
        moving = [t for t in maps if not self._held.get(t)]
        if self.accountable(out) and (
            function in _NOT_AFFINE or (function in _PRODUCTS and self._frozen and len(moving) > 1)
        ):
            self.refuse(function)
        if maps and not moving and isinstance(out, Tensor):
            self._held.put(out, True)
        return out

    def accountable(self, out: Any) -> bool:
        """Whether relevance passes through what makes ``out``."""
        return True

    def refuse(self, function: Callable[..., Any]) -> None:
        """Say which operation cannot be decomposed, and where."""
        raise SrdLabError(
            f"{function_name(function)} in {self.where()} is neither affine nor an activation, and there is no rule "
            "for it; choose another network, or a method that needs gradients only"
        )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among a call's arguments or results, one level of lists deep."""
    leaves = value if isinstance(value, tuple | list) else (value,)
    flat = [t for leaf in leaves for t in (leaf if isinstance(leaf, tuple | list) else (leaf,))]
    return [t for t in flat if isinstance(t, Tensor)]


class TensorNotes(Generic[Note]):
    """Notes about tensor objects, void once the tensor is gone or was changed in place."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Note]] = {}

    def put(self, tensor: Tensor, note: Note) -> None:
        self._notes[id(tensor)] = (weakref.ref(tensor), tensor._version, note)

    def get(self, tensor: Tensor) -> Note | None:
        found = self._notes.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != tensor._version:
            return None
        return found[2]

    def clear(self) -> None:
        self._notes.clear()


def traced(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor to start a trace from, and whether the map must be differentiable in ``x``.

    ``x`` itself where it asks for a gradient, otherwise a leaf that shares its memory.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    return (x if differentiable else x.detach().requires_grad_()), differentiable


def split_normalisation(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The normalisation in front of a network, and the network.

    Models of :func:`srd_lab.load_model` name them; any other model is taken to be a bare network.
    """
    if isinstance(model, SmoothModel):
        normalise, network = split_normalisation(model.model)
        return normalise, SmoothModel(network, model.beta)
    first, rest = getattr(model, "normalise", None), getattr(model, "network", None)
    if isinstance(first, nn.Module) and isinstance(rest, nn.Module):
        return first, rest
    return nn.Identity(), model
