"""A forward pass that tells maps, which are made of the image, from what is made of parameters alone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine.affine import CONVOLUTIONS, CURVES, MATRIX_PRODUCTS, PRODUCTS, SHAPED, overwrites
from srd_lab.engine.channels import Channels
from srd_lab.engine.interceptor import Interceptor, autocast_off
from srd_lab.engine.layers import Place, leads_to
from srd_lab.engine.model_checks import SameOutput
from srd_lab.engine.pointwise import PointwiseCalls, SelfGated
from srd_lab.engine.record import Records
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import (
    LAYERS,
    MAX_POOLS,
    Call,
    Function,
    first_tensor,
    function_name,
    recognise,
    tensors_in,
)
from srd_lab.errors import Refused
from srd_lab.logits import tensor_of

_COARSE = (
    0.25  # what one map costs, as a share of the rounding of its numbers; measured: 0.06 for one of 12 layers
)


class ImageTrace(Interceptor):
    """Knows of every tensor whether it is a map (made of the image), and where its channels lie.

    A map is what asks for a gradient, but for the parameters and what is made of them alone, which are constants. What is
    made of the image and asks for no gradient is noted as detached. Gradients have to be on.

    records : what is known of the tensors of this pass. channels : where the channels of each lie.
    maps : if ``keeps_maps``, every map of four dimensions with its version then.
    rounding : the share of the relevance that rounding may cost: 1.2e-3 in float32, more with every map on the way that is
        kept in coarser numbers, 0.02 at most.
    sees_all : whether maps that no intercepted call made are refused; a method that needs gradients only does without.
    follows_curves : whether a layer that reads a bent function of a map, which no activation call made, is refused.
    follows_channels : whether it follows the channels; a trace whose rule is per neuron does without.
    """

    keeps_maps = False
    follows_channels = True
    follows_curves = False
    sees_all = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.records = Records()
        self.channels = Channels(self.records)
        self._pointwise = PointwiseCalls(self.records)
        self.maps: list[tuple[Tensor, int]] = []
        self.rounding = self._eps = 0.0
        self._image: Any = None  # the image's node in autograd's graph
        self._versions: dict[int, int] = {}  # of what lies in a memory, when it was seen last
        self._lying: dict[int, weakref.ref[Tensor]] = {}  # the last map that lay there

    def run(self, x: Tensor) -> Any:
        self._image = x.grad_fn
        self.records.note(x, seen=True)
        self._eps = torch.finfo(x.dtype).eps
        self.rounding = min(1e4 * self._eps, 0.02)
        same = SameOutput(type(self).__name__, self.model, x)
        try:
            logits = super().run(x)
        finally:
            self._image = None
        same.check(logits)
        return logits

    def finished(self, output: Any, images: int) -> Any:
        if isinstance(given := tensor_of(output), Tensor):
            self._check_seen([given])
        return super().finished(output, images)

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._know_weight(func, args)
        if not self.sees_all:
            return self._called(func, args, kwargs)
        tensors = tensors_in(args, kwargs)
        self._check_seen(tensors)
        self._check_alias(func, args, kwargs)
        curved = self._curved(func, args, kwargs) if self.follows_curves else ""
        out = self._called(func, args, kwargs)
        for t in tensors_in((out,)) if curved else ():
            self.records.note(t, curved=curved)
        for t in (*tensors_in((out,)), *tensors):  # what was written into as well, and what that is a view of
            self._versions[_memory(t)] = t._version
            for made in (t, t._base):
                if made is not None and made.requires_grad:
                    self.records.note(made, seen=True)
            if t.requires_grad and not t.is_leaf:
                self._lying[_memory(t)] = weakref.ref(t)
        return out

    def _check_alias(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what writes into a map through a tensor that is cut off from it."""
        if func is not Tensor.__setitem__ and not overwrites(func, kwargs):
            return
        written = first_tensor(args, kwargs) if args or "input" in kwargs else None
        if not isinstance(written, Tensor) or written.requires_grad:
            return
        of = self._lying.get(_memory(written))
        t = None if of is None else of()
        if t is not None and _memory(t) == _memory(written) and self.is_map(t):
            raise Refused(
                f"{function_name(func)} in {self.where()} writes into a map through a detached view of it, "
                "by .detach() or .data, where it has no gradient; write into the map itself"
            )

    def _know_weight(self, func: Function, args: tuple[Any, ...]) -> None:
        """A weight that was turned for a call of the layer is made of parameters if what it is a view of is."""
        weight = args[1] if func is F.linear and len(args) > 1 else None
        of = weight._base if isinstance(weight, Tensor) and weight.requires_grad else None
        if weight is not None and of is not None and not self.is_map(of):
            self.records.note(weight, seen=True, role=self.records[of].role or "constant")

    def _check_seen(self, tensors: list[Tensor]) -> None:
        """Refuse maps that no intercepted call has made: their activations and biases would have no rule."""
        for t in tensors if self.sees_all else ():
            if t.requires_grad and not t.is_leaf and self._versions.get(_memory(t), t._version) < t._version:
                raise Refused(
                    f"{self.where()} reads a map that was changed in place in a way that cannot be seen (a scripted "
                    "function, a thread); write it with torch's functions"
                )
            if t.requires_grad and t.grad_fn is not None and not self.records[t].seen:
                if leads_to(t.grad_fn, self._image):
                    raise Refused(
                        f"{self.where()} makes a map in a way that cannot be seen (a scripted or traced function, "
                        "torch.vmap, a thread); write it with torch's functions"
                    )
                self.records.note(t, seen=True, role="constant")  # made of parameters, before the model ran

    def _curved(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """By which bent function what a call is about to put out is made of a map; empty for all others.

        Refuses a layer that reads such a map: with the bend it is an activation by another name.
        """
        maps = self.maps_in(args[:1] if func in SHAPED else args, kwargs)
        if not maps or recognise(func, args, kwargs) is not None:
            return ""
        if func in PRODUCTS and len(maps) > 1:
            return ""
        curved = next(filter(None, (self.records[t].curved for t in maps)), "")
        if curved and (func is F.linear or func in MATRIX_PRODUCTS | CONVOLUTIONS):
            raise Refused(
                f"{curved} is an activation by another name: {function_name(func)} in {self.where()} reads what it makes of "
                "a map, and there is no rule for it; write it as one call of torch (F.softplus, F.tanh), or choose a method "
                "that needs gradients only"
            )
        return curved or (f"{function_name(func)} in {self.where()}" if func in CURVES else "")

    def _called(self, func: Function, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        autocast_off()
        if torch.is_grad_enabled() and not self.maps_in(args, given) and _is_layer(func, args, given):
            self.count(func, args, given)
            made = self._pointwise.made_by(func, args, given)
            out = self.as_factor(func(*args, **given), self.gate_in(args, given))
            if made and isinstance(out, Tensor):
                self.records.note(out, pointwise=made)
            return out
        if (written_out := self._pointwise.self_gated(func, args, given)) is not None:
            self.count(func, args, given)
            out = self._self_gated(written_out)
            self.records.note(out, pointwise=(written_out.made,))
        else:
            made = self._pointwise.made_by(func, args, given)  # before the call, which may be in place
            out = super().intercept(func, args, given)
            if made and isinstance(out, Tensor):
                self.records.note(out, pointwise=made)
        if isinstance(out, Tensor) and out.is_floating_point() and self.is_map(out):
            eps = torch.finfo(out.dtype).eps
            if eps > self._eps:
                self.rounding = min(self.rounding + _COARSE * eps, 0.02)
        if isinstance(out, Tensor) and out.dim() in (3, 4):
            self._keep(out)
        return out

    def _keep(self, out: Tensor) -> None:
        """Note which torch function made a map, or tokens; and the map itself."""
        if self.is_map(out):
            self.records.note(out, event=self.events)
            if self.keeps_maps and out.dim() == 4:
                self.maps.append((out, out._version))

    def _self_gated(self, found: SelfGated) -> Tensor:
        """The output of an activation that the model writes out, which is one call here."""
        call = Call(len(self.calls), self._name("self_gated"), "self_gated", found.function, found.function)
        u, written = found.source, found.written
        out = self._activate(call, u, inplace=written is u)
        if written is None or written is u:
            return out
        return self.channels.copy(u, in_place(written, lambda _: out))

    def is_map(self, t: Tensor) -> bool:
        """Whether ``t`` is made of the image, and is no gate."""
        return self.records.is_map(t)

    def maps_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The maps among a call's operands, as often as they occur."""
        return [t for t in tensors_in(args, kwargs) if self.is_map(t)]

    def gate_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a gate is among a call's operands."""
        return any(self.records[t].role == "gate" for t in tensors_in(args, kwargs))

    def as_factor(self, out: Any, gate: bool) -> Any:
        """``out`` of a call, a tensor or a list of them, noted as a gate or as a constant."""
        for t in tensors_in((out,)):
            if t.requires_grad:
                self.records.note(t, role="gate" if gate else "constant")
        return out

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        maps = self.maps_in(args[:1] if function in SHAPED else args, kwargs)
        if not maps:
            return self.as_factor(function(*args, **kwargs), self.gate_in(args, kwargs))
        x = max(maps, key=lambda t: (t.dim(), t.numel()))
        axis = self.channels.of(x) if self.follows_channels else 1
        out = self.on_maps(function, args, kwargs)
        if self.follows_channels:
            self.channels.follow(function, args, kwargs, x, axis, out)
        self.after(function, args, maps, out)
        return out

    def linear_of_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer that makes the queries or keys of an attention in one call of torch."""
        return F.linear(x, weight, bias)

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What becomes of a call on maps that is no activation, layer or pool."""
        return function(*args, **kwargs)

    def after(self, function: Function, args: tuple[Any, ...], maps: list[Tensor], out: Any) -> None:
        """Called after :meth:`on_maps`, when it is known where the channels of ``out`` lie."""

    def release(self) -> None:
        """Drop every reference to a tensor, so that the graph is freed with its last user."""
        self.records.clear()
        self.maps.clear()
        self._versions.clear()
        self._lying.clear()

    def places(self) -> list[Place]:
        """The recorded maps that were not overwritten, by their place among ``maps``."""
        return [
            Place(i, tuple(t.movedim(self.channels.of(t), 1).shape), t.grad_fn)
            for i, (t, version) in enumerate(self.maps)
            if t._version == version
        ]


def _memory(t: Tensor) -> int:
    try:
        return int(t.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of vmap, which has none
        return -id(t)


def _is_layer(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one that interception has a method of its own for."""
    return func in LAYERS or func in MAX_POOLS or recognise(func, args, kwargs) is not None
