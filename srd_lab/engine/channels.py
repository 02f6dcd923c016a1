"""Which axis of a tensor its channels lie along.

A pointwise feature vector runs along channels, and maps come as (N, C, H, W), tokens as (N, S, D), and ConvNeXt and
Swin keep (N, H, W, C) for a while. Layers say where channels are (a convolution: axis 1; a linear layer, attention, a
layer norm over one axis: the last), and from there the axis is followed through whatever moves it.

Where nothing is known, it is axis 1 of four dimensions, and the last axis otherwise.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.affine import CASTS, COPIES, RESHAPES, SCALES, SHIFTS, exchanged, spelled
from srd_lab.engine.letters import WRITTEN_IN_LETTERS, in_letters
from srd_lab.engine.record import Records
from srd_lab.engine.spellings import Function

T = torch.Tensor
_ENTRY_BY_ENTRY = SHIFTS | SCALES | COPIES | CASTS
_LAYER_NORMS = spelled("layer_norm rms_norm")
_REDUCTIONS = spelled("sum mean amax amin")
_NEW_AXES = spelled("stack unsqueeze")
_STACKS = spelled("stack")
_PRODUCTS_OF_MATRICES = {torch.matmul, T.matmul, torch.bmm, T.bmm}


class Channels:
    """The channel axes of the tensors of one forward pass.

    Example
    -------
    >>> channels, tokens = Channels(Records()), torch.zeros(2, 17, 96)
    >>> channels.of(tokens), channels.of(channels.put(tokens, 1))
    (2, 1)
    """

    def __init__(self, records: Records) -> None:
        self._records = records

    def of(self, t: Tensor) -> int:
        """The channel axis of ``t``, >= 0."""
        axis = self._records[t].channels
        return _default(t.dim()) if axis is None else axis

    def are_unknown(self, t: Tensor) -> bool:
        """Whether nothing tells where the channels of ``t`` lie: of more than four axes there is no usual one."""
        return t.dim() > 4 and self._records[t].channels is None and self._records[t].laid is None

    def put(self, t: Tensor, axis: int) -> Tensor:
        """``t``, whose channels are known to lie along ``axis``."""
        self._records.note(t, channels=axis % t.dim())
        return t

    def follow(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        axis: int,
        out: Any,
    ) -> None:
        """``out`` is ``function(*args, **kwargs)``, and its operand ``x`` had its channels along ``axis``."""
        if isinstance(out, tuple | list):
            for i, part in enumerate(out):
                self.follow(lambda *a, i=i, **k: function(*a, **k)[i], args, kwargs, x, axis, part)
        elif isinstance(out, Tensor) and out is not x and out.dim() and x.dim():
            if x.dim() > 4 and self._records[x].channels is None:
                return
            if self._records[x].lone:
                found = _dim(args, kwargs) if function in _NEW_AXES else None
                if found is None and out.dim() == x.dim():
                    self._records.note(out, lone=True)
            elif out.dim() == x.dim() - 1 and _takes_off(function, args, kwargs, x, axis, out):
                self._records.note(out, lone=True)
                return
            else:
                found = _followed(function, args, kwargs, x, axis, out)
                if function in _LAYER_NORMS and _over_one(args, kwargs):
                    found = out.dim() - 1
            if found is not None:
                self.put(out, found)
            if function in RESHAPES:
                self._reshaped(x, axis, out, found)
            elif function in _ENTRY_BY_ENTRY and out.shape == x.shape:
                self._records.note(out, laid=self._records[x].laid)

    def laid(self, t: Tensor) -> tuple[torch.Size, int] | None:
        """Shape and channel axis of the map that ``t`` was before its channels were merged with other axes, or split; None
        for what has an axis of channels."""
        return self._records[t].laid

    def _reshaped(self, x: Tensor, axis: int, out: Tensor, found: int | None) -> None:
        """``out`` is ``x``, with channels along ``axis``, in another shape; ``found`` is where they are taken to lie."""
        shape, own = self._records[x].laid or (x.shape, axis)
        if out.shape == shape:
            self._records.note(out, channels=own, laid=None)
        elif self._records[x].laid or (
            x.dim() > 1 and _behind_reshape(tuple(x.shape), axis, tuple(out.shape)) is None
        ):
            self._records.note(out, laid=(shape, own))


def _takes_off(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int, out: Tensor
) -> bool:
    """Whether ``out`` is ``x`` with the channels summed up, or one of its channels."""
    if function in _REDUCTIONS:
        return _dim(args, kwargs) in (axis, axis - x.dim())
    strides = _probed(function, args, kwargs, x, axis) if memory_of(out) is memory_of(x) else None
    return strides is not None and not any(strides)


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis that a call names, if it is one."""
    named = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if isinstance(named, list | tuple) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, int) and not isinstance(named, bool) else None


def _over_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer norm is over one axis, the last."""
    return len(kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1]) == 1


def places(t: Tensor, axis: int) -> tuple[int, ...]:
    """Sizes of the axes of ``t`` that are positions: neither the batch nor channels, which lie along ``axis``."""
    return tuple(size for i, size in enumerate(t.shape) if i not in (0, axis))


def has_extent(t: Tensor, axis: int) -> bool:
    """Whether ``t``, with channels along ``axis``, has more than one position."""
    return max(places(t, axis), default=1) > 1


def _default(dims: int) -> int:
    return 1 if dims == 4 else max(dims - 1, 0)


def _followed(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int, out: Tensor
) -> int | None:
    found: int | None = axis if out.dim() == x.dim() else None
    if function in _PRODUCTS_OF_MATRICES:
        # rows of the first factor are rows of the product; what is summed over makes new channels on the other side
        first = x is (args[0] if args else None)
        summed, kept = (x.dim() - 1, x.dim() - 2) if first else (x.dim() - 2, x.dim() - 1)
        along_rows = (axis == kept) if first else (axis == summed)
        found = out.dim() - (2 if along_rows and out.dim() > 1 else 1)
    elif function in WRITTEN_IN_LETTERS:
        found = _behind_letters(function, args, kwargs, x, axis)
    elif function in _STACKS and out.dim() == x.dim() + 1:
        new = _dim(args, kwargs)
        found = None if new is None else axis + (new % out.dim() <= axis)
    elif function is F.unfold:  # (N, C k k, positions)
        found = out.dim() - 2
    elif function in RESHAPES:
        found = _behind_reshape(tuple(x.shape), axis, tuple(out.shape))
    elif memory_of(out) is memory_of(x):
        found = _behind_view(function, args, kwargs, x, axis, out)
    if found is not None:
        return found
    if max(x.dim(), out.dim()) > 4:  # no guess: what it becomes later on must not be taken for known
        return None
    return out.dim() - 1 if axis == x.dim() - 1 else _default(out.dim())


def memory_of(t: Tensor) -> Tensor:
    """The tensor whose memory ``t`` shows: itself, unless it is a view."""
    return t if t._base is None else t._base


def _behind_reshape(old: tuple[int, ...], axis: int, new: tuple[int, ...]) -> int | None:
    """The axis of the same size with as many elements behind it, which does not depend on the number of images. Channels
    merged with the images are along none: with one image they would seem to be the first."""
    behind = prod(old[axis + 1 :])
    fitting = [j for j, size in enumerate(new) if size == old[axis] and prod(new[j + 1 :]) == behind]
    return next((j for j in fitting if j > 0 or axis == 0), None)


def _behind_letters(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int
) -> int | None:
    """Where the letter of the channels went; if it is summed over, the one letter that the other operands bring."""
    if (written := in_letters(function, args, kwargs)) is None:
        return None
    operands, letters, result = written
    mine = next(row for row, t in zip(letters, operands, strict=True) if t is x)
    if mine[axis] in result:
        return result.index(mine[axis])
    brought = [letter for letter in result if letter not in mine]
    return result.index(brought[0]) if len(brought) == 1 else None


def _behind_view(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int, out: Tensor
) -> int | None:
    """The same view of a tensor that has a stride along its channels only shows where they went."""
    moved = [i for i, stride in enumerate(_probed(function, args, kwargs, x, axis) or ()) if stride]
    long = [i for i in moved if out.shape[i] > 1]  # a new axis has a stride, too
    return (long or moved)[-1] if moved else None


def _probed(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int
) -> tuple[int, ...] | None:
    """The strides of a view of what has a stride along ``axis`` only; None where they cannot be told."""
    strides = [int(i == axis) for i in range(x.dim())]
    probe = torch.empty(1, device="meta").as_strided(x.shape, strides)
    try:
        args, kwargs = exchanged(args, kwargs, {id(x): probe})
        found: tuple[int, ...] = function(*args, **kwargs).stride()
    except (RuntimeError, TypeError):  # axes that this probe cannot merge, or complex numbers
        return None
    return found
