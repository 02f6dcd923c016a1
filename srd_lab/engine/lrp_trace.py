"""A forward pass with modified weights beside the real ones, for the rules of LRP that need them.

Between two activations everything is affine. The z+ rule divides relevance among the positive contributions, which
are what the weights ``w^+`` make of the activations before; the gamma rule takes ``w + gamma w^+``. Next to every tensor
runs what the modified weights make of it, and an activation replaces its derivative by ``v G / u'``, u' being the
modified pre-activation: its ordinary backward pass goes through the modified weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine import rules
from srd_lab.engine.affine import (
    COPIES,
    DIVISIONS,
    GATES,
    JOINS,
    PRODUCTS,
    RESHAPES,
    SAMPLERS,
    SCALES,
    SHIFTS,
    called_with,
    constant_part,
    exchanged,
    is_affine,
    overwrites,
)
from srd_lab.engine.decomposed import Decomposed
from srd_lab.engine.geometry import BatchNorm, Convolution, MaxPool, take
from srd_lab.engine.layers import Place, high
from srd_lab.engine.letters import sums_nothing
from srd_lab.engine.pixel_box import Box, PixelBox
from srd_lab.engine.record import Linear
from srd_lab.engine.spellings import Call, Function, tensors_in
from srd_lab.errors import Refused, SrdLabError
from srd_lab.logits import is_among

_NON_NEGATIVE = ("relu", "relu6", "softplus")
T = torch.Tensor
_TIMES = {torch.mul, T.mul, T.mul_, torch.multiply, T.multiply, torch.neg, T.neg, T.neg_, torch.negative}
_ELEMENTWISE = SHIFTS | DIVISIONS | COPIES | _TIMES
_ADAPTIVE_MAX_POOLS = {F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices}
_MATRIX_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "einsum", "tensordot"}
_LAYERS = {
    *("addmm", "addbmm", "baddbmm", "addmv", "addr", "addcmul", "addcdiv", "lerp", "dot", "inner", "outer"),
    *("ger", "kron", "vdot", "vecdot", "linalg_vecdot", "cross", "linalg_cross"),
    *("multi_dot", "linalg_multi_dot", "chain_matmul"),
}
_ENTRY_BY_ENTRY = {"addcmul", "lerp"}
_CHOICES = ("amax", "amin", "max", "min", "sort", "topk", "kthvalue", "median", "max_pool1d", "max_pool3d")
_MAY_BE = ("hardtanh", "smooth_relu", "smooth_clip")  # clipped at 0, or lower; leaky or not
_IN_ANY_LAYOUT: dict[Function, Function] = {T.view: T.reshape, T.view_as: T.reshape_as}
_FORGOTTEN: dict[str, Any] = {"part": None, "convolution": None, "normed": None, "overwritten": False}
Part = Callable[[Tensor, Tensor | None], Tensor]  # of a weight, and of a bias that is modified
Modify = Callable[[Tensor], Tensor]
Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ModifiedTrace(Decomposed):
    """A forward pass that carries, for every tensor between two activations, what modified weights make of the same
    activations: with ``w^+`` its positive part.

    network : without the normalisation in front. modify : what becomes of a weight, of its shape.
    with_bias : whether biases take part, modified likewise.
    box : the pixel box (low, high) of z^B (Montavon et al. 2017), which the first layer always has; both like the image.
    head : the last linear layer and its output; None where there is none.
    made_by : which torch function of the model each activation call was, counted from 1.
    """

    def __init__(
        self, network: nn.Module, box: tuple[Tensor, Tensor], modify: Modify, with_bias: bool = False
    ) -> None:
        super().__init__(network, rules.lrp_modified)
        self._places: list[Place] = []  # of every activation call, channels along dimension 1
        self.made_by: dict[int, int] = {}
        self._fed: Any = None  # the image's node in autograd's graph
        self._axis = 1  # of the activation call that is running
        self._modify, self._with_bias = modify, with_bias
        self._ends, self._box = box, PixelBox(self.records, modify)
        self._u: Tensor | None = None  # modified pre-activation of the running call
        self.head: tuple[Tensor, Linear] | None = None

    def trace(self, given: Tensor) -> Tensor:
        """The logits (N, K) for the image ``given`` (N, C, H, W), which asks for a gradient.

        Raises SrdLabError for activations that may be negative, and for what the rule cannot follow.
        """
        fed = given.clone()  # a network may change its input in place
        self._fed = fed.grad_fn
        self.records.note(fed, box=self._ends)
        return self.run(fed)

    def release(self) -> None:
        super().release()
        self._places.clear()
        self._u = self.head = self._fed = None

    def finished(self, output: Any, images: int) -> Any:
        logits = super().finished(output, images)
        if isinstance(logits, Tensor) and logits.dim() == 2 and not is_among(logits, output):
            self._of_two_classes(logits)
        return logits

    def _of_two_classes(self, logits: Tensor) -> None:
        """``logits`` were made of one, y, as -y and y: as a last linear layer of twice the weights would."""
        head = None if self.head is None else self.head[0]
        linear = None if head is None or head.shape[1:] != (1,) else self.records[head].linear
        if head is None or linear is None or not torch.equal(head[:, 0], logits[:, 1]):
            raise Refused(
                "a network with one logit must end in a linear layer for this rule; use another method on this network"
            )
        weight, bias = torch.cat([-linear.weight, linear.weight]), linear.bias
        bias = None if bias is None else torch.cat([-bias, bias])
        part = linear.part(weight, self._modified_bias(bias))
        made = replace(linear, weight=weight, bias=bias)
        self.records.note(logits, linear=made, part=part)
        self.head = (logits, made)

    def modified(self, t: Tensor) -> Tensor:
        """What modified weights make of ``t``, of its shape: ``t`` itself for activations and what is pooled from them; what
        z^B of the identity does for what is made of the image alone."""
        known = self.records[t]
        if (conv := known.convolution) is not None:
            return self._convolved(self.unchanged(conv), conv.weight, conv.bias)
        if known.part is None and known.overwritten:
            raise self._unfollowed("reads a tensor of which a part was overwritten")
        if known.box is not None:
            return t - known.box[0]
        return t if known.part is None else known.part

    def _unfollowed(self, what: str) -> SrdLabError:
        return Refused(
            f"{self.where()} {what}, which this rule cannot follow; use another method on this network"
        )

    # calls ---------------------------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        box = self.records[x].box
        if box is not None and all(torch.equal(call.function(t), t) for t in (x, *box)):
            out = x if inplace else x.clone()  # a limit that no pixel reaches is no layer
            self._box.put(out, box)
            return self.channels.copy(x, out)
        if call.kind not in _NON_NEGATIVE and not (call.kind in _MAY_BE and call.value_at(-1e30) >= 0):
            raise Refused(
                f"the rule needs activations that are >= 0 (ReLU, softplus), but {call.name!r} is {call.kind}; "
                "use another method on this network"
            )
        part = self.modified(x)
        self._u = part.clone() if part is x else part
        self._axis = self.channels.of(x)
        out = super().activate(call, x, inplace)
        self.records.note(out, **_FORGOTTEN)  # in place, what was noted is void
        return self.channels.copy(x, out)

    def gate(self, call: Call, u: Tensor, v: Tensor) -> Tensor:
        assert self._u is not None
        u, v = self._u.movedim(self._axis, 1), v.movedim(self._axis, 1)
        out = super().gate(call, u, v)
        self._places.append(Place(call.index, tuple(v.shape), out.grad_fn))
        self.made_by[call.index] = self.events
        return out.movedim(1, self._axis)

    def places(self) -> list[Place]:
        # a convolution that is not folded yet is run again by what follows
        return [p for p in super().places() if self.records[self.maps[p.index][0]].convolution is None]

    def high(self, image: Sequence[int], top: Tensor) -> int | Tensor:
        """The last map at 1/8 of the size of images (N, C, H, W) through which all relevance passes that starts at ``top``:
        index of an activation call, or another tensor where none is such a map."""
        is_call, index = high(self._places, self.places(), image, top.grad_fn, self._fed)
        return index if is_call else self.maps[index][0]

    def convolution(self, conv: Convolution) -> Tensor:
        y = super().convolution(conv)
        self.put_out(y, conv)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        made = Linear(weight, bias, self._reading(x, F.linear))
        self.records.note(y, linear=made, part=made.part(weight, self._modified_bias(bias)))
        self.head = (y, made)
        return self.channels.put(y, y.dim() - 1)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        conv, scale = self._made_by(norm.x), norm.scale.view(1, -1, *[1] * (norm.x.dim() - 2))
        if (box := self.records[norm.x].box) is not None:  # a normalisation of the image
            y = run()
            self._box.put(
                y, (box[0] * scale + norm.shift.view_as(scale), box[1] * scale + norm.shift.view_as(scale))
            )
            return y
        linear = self.records[norm.x].linear if norm.x.dim() == 2 else None
        if conv is not None:
            bias, weight = _folded(conv.bias, norm), conv.weight * norm.scale.view(-1, 1, 1, 1)
            part = self._convolved(conv, weight, bias)
            conv = replace(conv, weight=weight, bias=bias)
        elif linear is not None:
            bias = _folded(linear.bias, norm)
            part = linear.part(linear.weight * norm.scale[:, None], self._modified_bias(bias))
        else:
            shift = self._modified_bias(norm.shift)
            shift = None if shift is None else shift.view_as(scale)
            part = self._affine(norm.x, scale, shift, lambda x, w, b: x * w if b is None else x * w + b)
        y = run()
        self.records.note(y, part=part, normed=conv)
        return y

    def _made_by(self, t: Tensor) -> Convolution | None:
        """The convolution that makes ``t``, with a batch norm folded in if there was one."""
        normed = self.records[t].normed
        return self.convolution_of(t) if normed is None else self.unchanged(normed)

    def max_pool(self, pool: MaxPool) -> Any:
        out = super().max_pool(pool)
        if self.pools_constants(pool):  # refused, and so without a part that the live pass could go through
            return out
        self._note_winners(out, pool.x, lambda x: pool.apply(x, True)[1])
        return out

    def _note_winners(self, out: Any, x: Tensor, winners_of: Callable[[Tensor], Tensor]) -> None:
        """What was pooled from ``x`` is what won there, in the positive part too."""
        box, pooled = self.records[x].box, out if isinstance(out, Tensor) else out[0]
        if box is not None:
            winners = winners_of(x.detach())
            self._box.put(pooled, (take(box[0], winners), take(box[1], winners)))
        elif self._has_part(x):
            self.records.note(pooled, part=take(self.modified(x), winners_of(x.detach())))

    def on_maps(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other affine call runs on the values, and on their parts (or on both ends of the box). A gate is one factor
        for both. What is refused is refused in the parts too, where the live pass goes."""
        run = super().on_maps
        tensors, moving = tensors_in(args, kwargs), self.maps_in(args, kwargs)
        name = _plain_name(function)
        if function in GATES:
            return run(function, args, kwargs)
        if any(t.is_complex() for t in tensors):
            return self.refused(function, args, kwargs, "works on complex numbers")
        if function in _ADAPTIVE_MAX_POOLS:
            out, size = run(function, args, kwargs), args[1] if len(args) > 1 else kwargs["output_size"]
            winners_of = partial(F.adaptive_max_pool2d, output_size=size, return_indices=True)
            self._note_winners(out, tensors[0], lambda x: winners_of(x)[1])
            return out
        if not is_affine(function, args, kwargs, moving):
            return run(function, args, kwargs)  # refused
        has_parts = any(map(self._has_part, tensors))
        if not has_parts and self._box.concerns(tensors):
            return self._on_image(function, args, kwargs)
        if name == "__setitem__":
            raise self._unfollowed("writes into a part of a tensor")
        constant = not self._gated(tensors)
        if function in RESHAPES and (conv := self.records[moving[0]].convolution) is not None:
            out = run(function, args, kwargs)
            if out.shape == moving[0].shape:
                self.records.note(out, convolution=conv)
                return out
        if function in _ELEMENTWISE and constant and len(moving) == 1:
            return self._stretched(function, args, kwargs, moving[0])
        unknown = function in PRODUCTS - SCALES - SAMPLERS and name not in _MATRIX_PRODUCTS
        if name in _LAYERS or unknown or (name in _CHOICES and has_parts):
            return self.refused(function, args, kwargs, "is a layer or a pool of its own")
        if name == "diff" or (len(moving) > 1 and _takes_off(name, kwargs)):
            return self.refused(function, args, kwargs, "takes a map off another")
        product = name in _MATRIX_PRODUCTS and constant
        if not product and not has_parts:
            if any(self.records[t].overwritten for t in moving):
                raise self._unfollowed("reads a tensor of which a part was overwritten")
            return run(function, args, kwargs)
        if function in JOINS and self._box.concerns(tensors):
            raise self._unfollowed("joins the image with what a layer has made before an activation")
        of_constants = self._modified_constant if product else self.modified
        parts = {id(t): (self.modified if self.is_map(t) else of_constants)(t) for t in tensors}
        return self._run_on_parts(function, args, kwargs, parts)

    def _on_image(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on what is made of the image alone: a normalisation, or the first layer."""
        tensors, name = tensors_in(args, kwargs), _plain_name(function)
        if any(self.records[t].overwritten for t in tensors):
            raise self._unfollowed("reads a tensor of which a part was overwritten")
        layer = name in (_MATRIX_PRODUCTS | _LAYERS) - _ENTRY_BY_ENTRY and not sums_nothing(function, args)
        out = super().on_maps(function, args, kwargs) if layer else None
        if out is None:
            return self._box.follow(
                function, args, kwargs, lambda: super(ModifiedTrace, self).on_maps(function, args, kwargs)
            )
        moving = self.maps_in(args, kwargs)
        if name in _LAYERS or self._gated(tensors) or len(tensors) != 2 or len(moving) != 1:
            return self.refused(function, args, kwargs, "is a layer of its own")
        x, weight = moving[0], next(t for t in tensors if t is not moving[0])

        def product(x_: Tensor, weight_: Tensor, bias: Tensor | None) -> Tensor:
            operands, named = exchanged(args, kwargs, {id(x): x_, id(weight): weight_})
            made: Tensor = function(*operands, **named)
            return made

        self.records.note(out, part=self._affine(x, weight, None, product), of_pixels=True)
        return out

    def _run_on_parts(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], parts: dict[int, Tensor]
    ) -> Any:
        """The call on the values; what it makes of ``parts``, by the ids of its operands, is noted beside the result."""
        beside, named = exchanged(args, kwargs, parts)
        if overwrites(function, kwargs):  # now, as the call may overwrite its first operand
            beside = (beside[0].clone(), *beside[1:])
        out = super().on_maps(function, args, kwargs)
        if _made_tensors(out):
            alike = _IN_ANY_LAYOUT.get(function, function)  # parts need not lie in memory as the values do
            made = self._run_beside(alike, beside, named)
            for t, part in zip(_listed(out), _listed(made), strict=True):
                self.records.note(t, part=part)
        return out

    def _run_beside(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on what stands for its maps."""
        maps = self.maps_in(args, kwargs)
        if not maps:
            return function(*args, **kwargs)
        out = super().on_maps(function, args, kwargs)
        return self.count_constants(function, args, kwargs, maps, out)

    def refused(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        out = super().refused(function, args, kwargs, why)
        for t in tensors_in((out,)):
            self.records.note(
                t, **_FORGOTTEN
            )  # in place, what was noted is void: the live pass is to go here
        return out

    def _gated(self, tensors: list[Tensor]) -> bool:
        """Whether a factor is no plain constant, but made of maps: a gate, or a comparison."""
        return any(self.records[t].compared or self.records[t].role == "gate" for t in tensors)

    def _stretched(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> Tensor:
        """A number times a map plus another: folded into the convolution before it, as batch norm is, or by itself."""
        shift = constant_part(function, args, kwargs, [x])
        scale = called_with(1, function, args, kwargs, [x]) - shift
        folded, plain = self._folding(x, scale, shift), not self._has_part(x) and not shift.any()
        part = x if folded else self.modified(x)  # now, as the call may be in place
        pixels = self.records[x].of_pixels
        out: Tensor = super().on_maps(function, args, kwargs)
        if folded:
            self.records.note(out, convolution=folded)
        elif (scale < 0).any():
            return self._guarded(out, function, "turns the sign of a map")
        elif not plain:
            added = None if pixels else self._modified_bias(shift)
            self.records.note(out, part=part * scale if added is None else part * scale + added)
        return out

    def _folding(self, x: Tensor, scale: Tensor, shift: Tensor) -> Convolution | None:
        """The convolution that made ``x``, with ``x * scale + shift`` folded in; None if these are not one per channel."""
        known = self.records[x]
        conv = known.convolution or known.normed
        if conv is None or scale.shape != x.shape:
            return None
        self.unchanged(conv)
        by, plus = scale[0, :, 0, 0], shift[0, :, 0, 0]
        if not all((t == v.view(1, -1, 1, 1)).all() for t, v in ((scale, by), (shift, plus))):
            return None
        bias = plus if conv.bias is None else conv.bias * by + plus
        return replace(conv, weight=conv.weight * by.view(-1, 1, 1, 1), bias=bias)

    # positive parts ------------------------------------------------------------------------------------
    def _has_part(self, t: Tensor) -> bool:
        return self.records[t].convolution is not None or self.records[t].part is not None

    def _modified_constant(self, t: Tensor) -> Tensor:
        """A constant, which may be trainable, with modified weights; still a constant."""
        constant: Tensor = self.as_factor(self._modify(t), False)
        return constant

    def _modified_bias(self, bias: Tensor | None) -> Tensor | None:
        return self._modify(bias) if self._with_bias and bias is not None else None

    def _convolved(self, conv: Convolution, weight: Tensor, bias: Tensor | None) -> Tensor:
        box = self.records[conv.x].box
        if box is not None:
            return conv.total(_in_box(conv.x, box, weight))
        return self._affine(conv.x, weight, self._modified_bias(bias), conv.apply)

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None, run: Affine) -> Tensor:
        """What modified weights make of ``x``: z^B where it is made of the image alone."""
        return self._reading(x, run)(weight, bias)

    def _reading(self, x: Tensor, run: Affine) -> Part:
        """What a layer ``run`` that reads ``x``, as it is now, makes of it with modified weights; the bias is modified."""
        box = self.records[x].box
        if box is None:
            activations = self.modified(x)
            return lambda weight, bias: run(activations, self._modify(weight), bias)
        return lambda weight, bias: reduce(torch.add, [run(t, w, None) for t, w in _in_box(x, box, weight)])


def _in_box(x: Tensor, box: Box, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a layer's z^B adds up: inputs, each with weights of its own."""
    return [(x, weight), (box[0], -weight.clamp_min(0)), (box[1], -weight.clamp_max(0))]


def _plain_name(function: Function) -> str:
    """The name of a torch function, of one in place without the underscore."""
    name: str = getattr(function, "__name__", "")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _takes_off(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a call of this name takes one of its operands off another."""
    alpha = kwargs.get("alpha", 1)
    return name.startswith(("sub", "rsub", "__rsub", "__sub", "__isub")) or float(alpha) < 0


def _folded(bias: Tensor | None, norm: BatchNorm) -> Tensor:
    return norm.shift if bias is None else bias * norm.scale + norm.shift


def _listed(out: Any) -> Any:
    return (out,) if isinstance(out, Tensor) else out


def _made_tensors(out: Any) -> bool:
    outs = out if isinstance(out, tuple | list) else (out,)
    return bool(outs) and all(isinstance(t, Tensor) and t.requires_grad for t in outs)
