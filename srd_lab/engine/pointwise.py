"""Activations that a model writes out: ``u * sigmoid(u)``, ``0.5 * u * (1 + erf(u / sqrt(2)))``, ``u * relu6(u + 3) / 6``.

Each is a map times a gate that is made of the same map value by value, and so one function of one number, as SiLU, GELU and
hard-swish are: it has to be treated as an activation, and not as a map with a factor that counts as constant.

What was made of a map value by value is followed for a few calls, and can be made again of other values of that map.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from srd_lab.engine.affine import COPIES, DIVISIONS, SHIFTS, exchanged, overwrites, spelled
from srd_lab.engine.record import Records, original_of
from srd_lab.engine.spellings import Function, recognise, tensors_in

_TIMES = spelled("mul multiply __mul__ __rmul__ __imul__")
_CASTS = spelled("to type type_as float double half bfloat16") | COPIES
_SCALES = _TIMES | DIVISIONS | _CASTS | spelled("neg negative positive __neg__ __pos__")
_SQUASHES = spelled(  # these make a gate of a map
    "sigmoid expit hardsigmoid logsigmoid log_sigmoid tanh erf erfc ndtr exp expm1 relu6 hardtanh clamp clip",
)
_BENDS = spelled(
    "exp expm1 erf erfc ndtr logit log log1p pow __pow__ __rpow__ square __rdiv__ __rtruediv__ sqrt rsqrt reciprocal",
)
_POINTWISE = (
    _SCALES
    | SHIFTS
    | _SQUASHES
    | _BENDS
    | spelled(
        "relu leaky_relu elu selu celu silu gelu mish hardswish softplus softsign abs absolute __abs__ clamp_min clamp_max",
        "threshold maximum minimum",
    )
)
_COMPLETING = _TIMES | DIVISIONS
_MOST = 12  # calls that are followed back


@dataclass(frozen=True)
class Pointwise:
    """How a tensor was made of another one, its source, value by value.

    source, place : the source, and what tells it, as it was then, from all other tensors: two equal views are one source.
    function : makes the tensor again of the source's values.
    scaled : it is the source times a constant. squashed : a function that makes gates had a part in it.
    kinked : so had an activation call.
    bent : so had one that is neither affine nor an activation: a root, a power, the map times itself.
    written_out : so had an activation that is written out.
    calls : how many calls that took.
    """

    source: weakref.ref[Tensor]
    place: tuple[Any, ...]
    function: Callable[[Tensor], Tensor]
    scaled: bool
    squashed: bool
    kinked: bool
    bent: bool
    written_out: bool
    calls: int

    def is_of(self, other: Pointwise) -> bool:
        """Whether both are made of the same source."""
        return self.place == other.place and (self.known is not None or other.known is not None)

    @property
    def known(self) -> Tensor | None:
        """The source, unless it was given up or changed in place."""
        source = self.source()
        return source if source is not None and _place(source) == self.place else None


@dataclass(frozen=True)
class SelfGated:
    """An activation that is written out: ``function`` of the map ``source``.

    written : what the call overwrites, or None. made : how what it puts out is made of the source.
    """

    source: Tensor
    function: Callable[[Tensor], Tensor]
    written: Tensor | None
    made: Pointwise


class PointwiseCalls:
    """Follows what a running model makes of its maps value by value.

    records : of the tensors of the pass.
    """

    def __init__(self, records: Records) -> None:
        self._records = records

    def made_by(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Pointwise, ...]:
        """How the result of a call that is about to be made will have been made of maps; empty if not value by value."""
        if function not in _POINTWISE or not (moving := self._moving(args, kwargs)):
            return ()
        shape = moving[0].shape
        if any(t.shape != shape for t in moving):
            return ()
        by_operand = [self._of(t) for t in moving]
        found = []
        for first in by_operand[0]:
            same = [next((p for p in ways if p is first or p.is_of(first)), None) for ways in by_operand]
            if first.calls < _MOST and all(p is not None for p in same):
                found.append(_composed(function, args, kwargs, moving, [p for p in same if p is not None]))
        return tuple(found)

    def self_gated(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SelfGated | None:
        """The activation that a call completes: a multiple of a map times, or over, a gate made of it value by value."""
        if function not in _COMPLETING:
            return None
        if not args:
            args, kwargs = (kwargs.get("input"), kwargs.get("other")), {}
        if len(args) != 2 or kwargs:
            return None
        if not all(isinstance(t, Tensor) and t.requires_grad for t in args) or args[0].shape != args[1].shape:
            return None
        ways = [self._of(t) for t in args]
        for one, other in ((0, 1), (1, 0)) if function in _TIMES else ((0, 1),):
            for a in ways[one]:
                for b in ways[other]:
                    if not (a.scaled and b.squashed and a.is_of(b)):
                        continue
                    u = a.known
                    if u is None or u.shape != args[0].shape or u.dtype != args[one].dtype:
                        continue
                    pair = [a, b] if one == 0 else [b, a]
                    made = _composed(function, args, kwargs, list(args), pair)
                    written = args[0] if overwrites(function, kwargs) else None
                    return SelfGated(u, made.function, written, replace(made, written_out=True))
        return None

    def bends(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], *, roots: bool = True
    ) -> bool:
        """Whether a call adds up what was made of one map value by value, and bent: ``u - u * sigmoid(-u)``, which is SiLU.

        roots : whether roots, powers and activations count too: ``y + sqrt(y * y)`` is a ReLU, ``relu(u) - relu(-u) / 4`` a
            leaky one.
        """
        if function not in SHIFTS or len(moving := self._moving(args, kwargs)) < 2:
            return False
        first, *others = (self._of(t) for t in moving)
        pairs = [(a, b) for a in first for ways in others for b in ways if a.is_of(b)]
        return any(one.written_out or (roots and (one.bent or one.kinked)) for pair in pairs for one in pair)

    def _moving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The operands that are made of the image; none where one of them is cut off from it."""
        tensors = tensors_in(args, kwargs)
        if any(self._records[t].detached or self._records[t].compared for t in tensors):
            return []
        return [
            t for t in tensors if t.requires_grad and not t.is_leaf and self._records[t].role != "constant"
        ]

    def _of(self, t: Tensor) -> tuple[Pointwise, ...]:
        """How ``t`` was made, of itself first."""
        known = self._records[t].pointwise
        if not self._records.is_map(t):
            return known
        original = original_of(t)
        itself = Pointwise(
            weakref.ref(original), _place(original), _same, True, False, False, False, False, 0
        )
        return (itself, *known)


def _composed(
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    moving: list[Tensor],
    ways: list[Pointwise],
) -> Pointwise:
    """How the result of a call is made of the source of all ``ways``, by which its operands ``moving`` are."""
    keys = [id(t) for t in moving]
    holes = {key: torch.empty(0) for key in keys}  # the operands themselves are not kept
    args, kwargs = exchanged(args, kwargs, holes)
    writes = overwrites(function, kwargs)

    def made(u: Tensor) -> Tensor:
        values = {id(holes[key]): way.function(u) for key, way in zip(keys, ways, strict=True)}
        filled, named = exchanged(args, kwargs, values)
        out: Tensor = function(*((filled[0].clone(), *filled[1:]) if writes else filled), **named)
        return out

    return Pointwise(
        ways[0].source,
        ways[0].place,
        made,
        scaled=function in _SCALES
        and len(ways) == 1
        and ways[0].scaled
        and not _divides_by(function, args, holes),
        squashed=function in _SQUASHES or any(way.squashed for way in ways),
        kinked=recognise(function, args, kwargs) is not None or any(way.kinked for way in ways),
        bent=function in _BENDS
        or (function in _COMPLETING and len(ways) > 1)
        or any(way.bent for way in ways),
        written_out=any(way.written_out for way in ways),
        calls=1 + max(way.calls for way in ways),
    )


def _divides_by(function: Function, args: tuple[Any, ...], holes: dict[int, Tensor]) -> bool:
    """Whether a call divides by an operand that moves."""
    return function in DIVISIONS and any(t is hole for t in args[1:] for hole in holes.values())


def _place(t: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from all others of a pass; that it names its memory keeps another tensor from having the same."""
    try:
        memory: Any = StorageWeakRef(t.untyped_storage())
    except (RuntimeError, NotImplementedError):  # of vmap, which has none
        memory = id(t)
    return memory, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype, t._version


def _same(u: Tensor) -> Tensor:
    return u
