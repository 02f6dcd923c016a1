"""A forward pass with a gate at every activation call, and what the live pass refuses by name when it arrives there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.engine import rules
from srd_lab.engine.affine import (
    CASTS,
    GATES,
    KINKS,
    LIKE,
    NORMS,
    PRODUCTS,
    RECURRENT,
    SELECTIONS,
    SHAPED,
    brings_constants,
    constant_part,
    exchanged,
    fills,
    is_affine,
    overwrites,
)
from srd_lab.engine.geometry import Convolution, MaxPool
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.live_pass import Absorb, Gate, LiveConstant, LivePass, Refuse, ShareBias
from srd_lab.engine.preconditions import check_traceable, refuse_checkpoint
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import LAYERS, Call, Function, function_name, is_foreign, tensors_in
from srd_lab.errors import Refused

_NO_GATE = "is used for more than multiplying a map by it"


class Gated(ImageTrace):
    """Runs a model with a gate at every activation call; ``live()`` turns the rule on for one backward pass.

    rule : what stands in for the derivative of an activation, see :mod:`srd_lab.engine.rules`.

    What is an activation in all but its spelling (``torch.maximum``, a comparison that chooses) has no gate, and is
    refused if the live pass arrives there.
    """

    follows_channels = False
    follows_curves = True
    sees_all = True
    refuses_roots = False  # and powers, wherever relevance arrives at them

    def __init__(self, model: nn.Module, rule: rules.Rule) -> None:
        super().__init__(model)
        self.live_pass = LivePass(rule)

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sources = tensors_in(args[:1] if func in SHAPED else args, kwargs)
        of_image = any(self.records[t].detached or self.is_map(t) for t in sources)
        out = super().intercept(func, args, kwargs)
        for t in tensors_in((out,)):
            if of_image and not t.requires_grad and func not in LIKE:
                self.records.note(t, detached=True)
        return out

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        check_traceable(call.name, x)
        return super().activate(call, x, inplace) if inplace else self.activation(call, x.clone()).clone()

    def activation(self, call: Call, u: Tensor) -> Tensor:
        return self.gate(call, u, call.function(u))

    def convolution(self, conv: Convolution) -> Tensor:
        refuse_checkpoint(self.where())
        if conv.x.dim() != 4:
            raise Refused(
                f"{self.where()} convolves a single image {tuple(conv.x.shape)}, for which there is no rule; give it a "
                "batch (N, C, H, W), with x[None] say"
            )
        return conv.apply(conv.x, conv.weight, conv.bias)

    def max_pool(self, pool: MaxPool) -> Any:
        out = super().max_pool(pool)
        if not self.pools_constants(pool):
            return out
        why = "chooses between a map and a constant, as an activation does"
        if isinstance(out, Tensor):
            return self._guarded(out, torch.max_pool2d, why)
        return (self._guarded(out[0], torch.max_pool2d, why), *out[1:])

    def pools_constants(self, pool: MaxPool) -> bool:
        """Whether a pool may take a constant that was put beside a map for the map's largest value: not behind a ReLU."""
        return self.records[pool.x].filled and bool((pool.x.detach() < 0).any())

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        """The activation's output ``v`` behind a gate; ``u`` is its pre-activation, both of one shape."""
        return Gate.apply(u, v, self.live_pass, call.index)

    @contextmanager
    def live(self) -> Iterator[dict[int, Tensor]]:
        """Within: the rule is live, for one backward pass, which fills the dictionary of relevance by activation call."""
        self.live_pass.begin()
        try:
            yield self.live_pass.relevance
        finally:
            self.live_pass.on, self.live_pass.relevance = False, {}

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in(args, kwargs)
        known = [self.records[t] for t in tensors]
        compared = any(of.compared for of in known)
        if is_foreign(function) and self.maps_in(args, kwargs):
            return self.refused(function, args, kwargs, "is no operator of torch's own")
        maps = self.maps_in(args[:1] if function in SHAPED else args, kwargs)
        # which map is the largest, say, times a map
        compared |= function in PRODUCTS and any(
            of.detached and not t.is_floating_point() for t, of in zip(tensors, known, strict=True)
        )
        filled = any(of.filled for of in known)
        if compared:
            why = "chooses by a comparison of maps"
        elif filled and function in SELECTIONS:
            why = "chooses between a map and a constant, as an activation does"
        elif self._pointwise.bends(function, args, kwargs, roots=not self.refuses_roots):
            why = "is an activation by another name"
        else:
            why = self._not_constant(args, kwargs)
        filled |= bool(maps) and fills(function, args, kwargs, maps)
        if why and maps and torch.is_grad_enabled():
            out = self.refused(function, args, kwargs, why)
        else:
            out = super().other(function, args, kwargs)
        detached = any(of.detached for of in known)
        chooses = compared or (detached and function in KINKS)
        chooses |= (bool(maps or detached) or self.gate_in(args, kwargs)) and _compares(function, out)
        written = args[:1] if function is Tensor.__setitem__ or overwrites(function, kwargs) else ()
        for t in tensors_in((out, *written)):
            if filled:
                self.records.note(t, filled=True)
            if t.requires_grad:
                continue  # guarded, where it is not affine
            if chooses:
                self.records.note(t, compared=True)
            elif detached or (maps and function not in LIKE):
                self.records.note(t, detached=True)
        return out

    def _not_constant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why operands that ask for no gradient cannot be taken for constants; empty where they can."""
        return ""

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        maps = self.maps_in(args, kwargs)
        if function in KINKS:
            return self.refused(function, args, kwargs, "is an activation by another name")
        if function in RECURRENT:
            return self.refused(function, args, kwargs, "has activations inside")
        out = super().on_maps(function, args, kwargs)
        if function in NORMS and isinstance(out, Tensor) and out.numel() == maps[0].numel():
            return self.refused(function, args, kwargs, "is an activation by another name")
        return out

    def refused(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        """The call as it is, and an SrdLabError that says ``why`` for any live pass that arrives there."""

        def guarded(t: Any) -> Any:
            if isinstance(t, tuple | list):
                parts = [guarded(part) for part in t]
                return t._make(parts) if hasattr(t, "_make") else type(t)(parts)
            return self._guarded(t, function, why) if isinstance(t, Tensor) else t

        if function is not Tensor.__setitem__ and not overwrites(function, kwargs):
            return guarded(function(*args, **kwargs))
        if not isinstance(args[0], Tensor):
            raise Refused(self._complaint(function, why))

        def changed(t: Tensor) -> Any:
            out = function(t, *args[1:], **kwargs)
            return guarded(t if out is None else out)

        return in_place(args[0], changed)

    def _guarded(self, t: Tensor, function: Function, why: str) -> Tensor:
        if not t.requires_grad:
            return t
        return Refuse.apply(t, self.live_pass, self._complaint(function, why))

    def _complaint(self, function: Function, why: str) -> str:
        return (
            f"{function_name(function)} in {self.where()} {why}, and there is no rule for it; "
            "choose another network, or a method that needs gradients only"
        )


class Decomposed(Gated):
    """A gated pass whose rule accounts for everything: what lies between two activations must be affine.

    Gates (a sigmoid or softmax times a map) are constants of the live pass; a live pass that meets anything else
    which is not affine refuses it by name.
    """

    follows_channels = True
    follows_curves = False  # they are refused where relevance arrives
    refuses_roots = True

    def __init__(self, model: nn.Module, rule: rules.Rule) -> None:
        super().__init__(model, rule)
        self._convolutions: list[
            tuple[Tensor, int, Any, Convolution]
        ] = []  # what they put out, its version then, and its node in autograd's graph

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(t.requires_grad and self.records[t].unseen for t in tensors_in(args, kwargs)):
            raise Refused(
                f"{self.where()} runs an autograd function of its own, which cannot be seen through; write it with torch's "
                "functions, or choose a method that needs gradients only"
            )
        return super().intercept(func, args, kwargs)

    def _dispatch(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in LAYERS:
            weights = {name: value for name, value in kwargs.items() if name != "input"}
            if self.maps_in(args[1:], weights):
                return self.refused(func, args, kwargs, "has weights that are made of the image")
        return super()._dispatch(func, args, kwargs)

    def put_out(self, y: Tensor, conv: Convolution, node: Any = None) -> None:
        """Note that ``y`` (N, C, h, w) is what ``conv`` puts out, times a constant for each channel, and plus one.

        node : in autograd's graph, of what ``y`` is a view of; None = its own.
        """
        self.records.note(y, convolution=conv)
        self._convolutions.append((y.detach(), y._version, node or y.grad_fn, conv))

    def convolution_of(self, x: Tensor) -> Convolution | None:
        """The convolution that puts out ``x``, or the same values: what lies between does nothing; None if there is none."""
        known = self.records[x].convolution
        if known is not None or x.dim() != 4 or self.records[x].overwritten:
            return known and self.unchanged(known)
        for y, version, node, conv in self._convolutions:
            alike = y.shape == x.shape and y._version == version
            if not (alike and torch.equal(y[:, :, :1, :1], x[:, :, :1, :1]) and torch.equal(y, x)):
                continue
            if _leads_straight(x.grad_fn, node):
                return self.unchanged(conv)
        return None

    def unchanged(self, conv: Convolution) -> Convolution:
        """The convolution; refused where it would make something else now than it made of the model's image."""
        if conv.overwritten:
            raise Refused(
                f"something writes into what a convolution has read before {self.where()} reads what it made, which this "
                "method cannot follow; write that out of place, or use another method on this network"
            )
        return conv

    def release(self) -> None:
        super().release()
        self._convolutions.clear()

    def _not_constant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        apart = any(t.is_floating_point() and self.records[t].detached for t in tensors_in(args, kwargs))
        return "takes a detached part of the image for a constant" if apart else ""

    def live_constant(self, t: Tensor) -> Tensor:
        """``t`` as a factor that the live pass takes for a constant."""
        return LiveConstant.apply(t, self.live_pass) if t.requires_grad else t

    def share_bias(
        self, y: Tensor, x: Tensor, bias: Tensor, conv: Convolution | None = None, axis: int = 1
    ) -> Tensor:
        """``y``, whose layer added ``bias`` to what it made of its input ``x``; both with channels along ``axis``.

        ``bias`` is a vector of channels, or of the shape of ``y`` with channels along dimension 1.
        """
        if not x.requires_grad:
            return y
        return ShareBias.apply(y, x.movedim(axis, 1), bias, conv, axis, self.live_pass)

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return self._unseen(function(*args, **kwargs))
        if function in GATES:
            return self.as_factor(self.refused(function, args, kwargs, _NO_GATE), True)
        if not is_affine(function, args, kwargs, self.maps_in(args, kwargs)):
            return self.refused(function, args, kwargs, "is neither affine nor an activation")
        if function in PRODUCTS:
            overwritten = args[0] if overwrites(function, kwargs) else None
            gates = [t for t in tensors_in(args, kwargs) if self.records[t].role == "gate"]
            constants = {id(t): self.live_constant(t) for t in gates if t is not overwritten}
            args, kwargs = exchanged(args, kwargs, constants)
        return function(*args, **kwargs)

    def count_constants(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Tensor], out: Any
    ) -> Any:
        """``out`` of a call on maps, its constant part counted as leaked: a class token put in front, say."""
        if not isinstance(out, Tensor) or not out.requires_grad or overwrites(function, kwargs):
            return out
        if not brings_constants(function, args, kwargs, maps):
            return out
        constant = constant_part(function, args, kwargs, maps)
        return self.absorb(out, constant) if constant.any() else out

    def absorb(self, out: Tensor, constant: Tensor) -> Tensor:
        """``out``, of which ``constant`` came from no map: its relevance in the live pass is counted as leaked."""
        return Absorb.apply(out, constant, self.live_pass)

    def factors(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps that attention is about to multiply."""
        return one, other

    def attention(self, weights: Tensor) -> Tensor:
        """The weights of an attention, which the live pass takes for constants."""
        return self.live_constant(weights)

    def as_gate(self, t: Tensor, function: Function) -> Tensor:
        """``t``, which ``function`` made, for multiplying maps by it and nothing else."""
        return self.as_factor(self._guarded(t, function, _NO_GATE), True)

    def _unseen(self, out: Any) -> Any:
        """``out``, made with gradients off: if it asks for them later, an autograd function made it."""
        for t in tensors_in((out,)):
            self.records.note(t, unseen=True)
        return out


def _leads_straight(node: Any, to: Any) -> bool:
    """Whether a way leads from one node of autograd's graph back to another, and no activation or pool lies on it."""
    waiting, seen = [node], set[Any]()
    while waiting:
        here = waiting.pop()
        if here is to:
            return True
        if here is None or here in seen or any(name in here.name() for name in ("Gate", "Pool")):
            continue
        seen.add(here)
        waiting.extend(following for following, _ in here.next_functions)
    return False


def _compares(function: Function, out: Any) -> bool:
    """Whether a call on maps made truth values of them, or whole numbers by a cast."""
    if not isinstance(out, Tensor) or out.is_floating_point() or out.is_complex():
        return False
    return out.dtype == torch.bool or function in CASTS
