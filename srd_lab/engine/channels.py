"""Which axis of a tensor its channels lie along.

A pointwise feature vector runs along channels, and maps come as (N, C, H, W), tokens as (N, S, D), and ConvNeXt and
Swin keep (N, H, W, C) for a while. Layers say where channels are (a convolution: axis 1; a linear layer, attention, a
layer norm over one axis: the last), and from there the axis is followed through whatever moves it. Where no rule says how a
call moves it, the call is made with the numbers of the positions: the axis along which these stay the same is that of the
channels. What even that does not tell is not known, and a vector that would run along it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.affine import CASTS, COPIES, RESHAPES, ROWS_BY_MATRIX, SCALES, SHIFTS, exchanged, spelled
from srd_lab.engine.coordinates import compact
from srd_lab.engine.letters import WRITTEN_IN_LETTERS, in_letters
from srd_lab.engine.record import Records
from srd_lab.engine.spellings import Function

T = torch.Tensor
_ENTRY_BY_ENTRY = SHIFTS | SCALES | COPIES | CASTS
_LAYER_NORMS = spelled("layer_norm rms_norm")
_REDUCTIONS = spelled("sum mean amax amin max min median nanmedian logsumexp")
_NEW_AXES = spelled("stack unsqueeze")
_STACKS = spelled("stack")
_SUMS = spelled("mv tensordot inner kron linear addmv addbmm multi_dot chain_matmul bilinear")
_REARRANGING = RESHAPES | spelled(  # without looking at the values
    "rot90 flip fliplr flipud roll gather take take_along_dim index_select __getitem__ repeat repeat_interleave tile",
)
_WITHIN_AXES = spelled("flip fliplr flipud roll")
_PRODUCTS_OF_MATRICES = spelled("matmul __matmul__ __rmatmul__ bmm mm addmm baddbmm")


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
        """Whether nothing tells where the channels of ``t`` lie."""
        return self._adrift(t) and self._records[t].laid is None

    def _adrift(self, t: Tensor) -> bool:
        known = self._records[t]
        return known.channels is None and (known.adrift or t.dim() > 4)

    def put(self, t: Tensor, axis: int) -> Tensor:
        """``t``, whose channels are known to lie along ``axis``."""
        self._records.note(t, channels=axis % t.dim(), adrift=False, places=None)
        return t

    def copy(self, x: Tensor, out: Tensor) -> Tensor:
        """``out``, whose entries lie where those of ``x`` do."""
        known = self._records[x]
        self._records.note(
            out,
            **{name: getattr(known, name) for name in ("channels", "lone", "laid", "adrift", "places")},
        )
        return out

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
        parts = out if isinstance(out, tuple | list) else [out]
        for i, part in enumerate(parts):
            if isinstance(part, Tensor) and part is not x and part.dim() and x.dim():
                picked = None if part is out else i
                self._follow(_Moved(function, args, kwargs, x, axis, part, picked))

    def _follow(self, moved: _Moved) -> None:
        function, x, out = moved.function, moved.x, moved.out
        before = self._records[x]
        if before.lone:
            found = moved.dim() if function in _NEW_AXES else None
            if found is not None:
                self.put(out, found)
            elif out.dim() == x.dim():
                self._records.note(out, lone=True)
            return
        adrift = self._adrift(x)
        if not adrift and out.dim() == x.dim() - 1 and moved.takes_off():
            self._records.note(out, lone=True)
            return
        found = None if adrift else moved.axis_of_out()
        if moved.is_linear_layer() or (function in _LAYER_NORMS and moved.over_one()):
            found = out.dim() - 1
        places = None
        if found is None:
            places = before.places if adrift else _numbered(x.shape, moved.axis, x.device)
            places = None if places is None else moved.places_of_out(places)
            found = None if places is None else moved.axis_by(places)
        if found is None:
            self._records.note(out, channels=None, adrift=True, places=places)
        else:
            self.put(out, found)
        if function in RESHAPES:
            self._reshaped(moved, found)
        elif function in _ENTRY_BY_ENTRY and out.shape == x.shape:
            self.copy(x, out)

    def laid(self, t: Tensor) -> tuple[torch.Size, int] | None:
        """Shape and channel axis of the map that ``t`` was before its channels were merged with other axes, or split; None
        for what has an axis of channels."""
        return self._records[t].laid

    def _reshaped(self, moved: _Moved, found: int | None) -> None:
        """The map in another shape; ``found`` is where its channels are taken to lie."""
        x, out = moved.x, moved.out
        shape, own = self._records[x].laid or (x.shape, moved.axis)
        if out.shape == shape:
            self.put(out, own)
            self._records.note(out, laid=None)
        elif self._records[x].laid or (
            x.dim() > 1 and _behind_reshape(tuple(x.shape), moved.axis, tuple(out.shape)) is None
        ):
            self._records.note(out, laid=(shape, own))


@dataclass(frozen=True)
class _Moved:
    """A call that makes ``out`` of a map ``x`` with channels along ``axis``; of several outputs, number ``picked``."""

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    axis: int
    out: Tensor
    picked: int | None

    def run_with(self, other: Tensor) -> Tensor:
        """The call made with ``other`` in the place of ``x``."""
        args, kwargs = exchanged(self.args, self.kwargs, {id(self.x): other})
        made = self.function(*args, **kwargs)
        out: Tensor = made if self.picked is None else made[self.picked]
        return out

    def is_view(self) -> bool:
        return memory_of(self.out) is memory_of(self.x)

    def rearranges(self) -> bool:
        """Whether the call puts entries elsewhere, and no more."""
        return self.function in _REARRANGING or self.is_view()

    def stretches(self) -> bool:
        """Whether a constant that is broadcast with ``x`` gives it more entries: in new places, or of new channels."""
        return self.function in SHIFTS | SCALES and self.out.numel() > self.x.numel()

    def dim(self) -> int | None:
        """The axis that the call names, if it is one."""
        named = self._dims()
        return named[0] if named is not None and len(named) == 1 else None

    def _dims(self) -> list[int] | None:
        """The axes that the call names."""
        named = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else 0)
        named = list(named) if isinstance(named, list | tuple) else [named]
        return named if all(isinstance(d, int) and not isinstance(d, bool) for d in named) else None

    def gone(self) -> list[int]:
        """The axes that the call sums up, or takes the largest value along."""
        named = (self._dims() or []) if self.function in _REDUCTIONS else []
        return [d % self.x.dim() for d in named]

    def places_of_out(self, places: Tensor) -> Tensor | None:
        """The numbers of the positions in ``out``, ``places`` being those in ``x``; of several, the first. None where a call
        does more than move entries."""
        if self.rearranges():  # a view needs them to lie in memory as x does
            like = torch.empty_like(self.x, dtype=places.dtype).copy_(places)
            try:
                return compact(self.run_with(like))
            except (RuntimeError, TypeError):  # a view of complex numbers, say
                return None
        if self.stretches():
            return places.expand(self.out.shape)
        if gone := self.gone():
            return compact(places.amin(gone, keepdim=self.out.dim() == self.x.dim()))
        return None

    def axis_by(self, places: Tensor) -> int | None:
        """The one axis along which all entries have the same position, ``places`` being the numbers of these in ``out``."""
        same = [i for i, size in enumerate(places.shape) if size > 1 and not places.stride(i)]
        along = [i for i in same if i]
        # merged with the images by a reshape, channels are along no axis, for one image either
        along = along if along or self.function in RESHAPES else same
        return along[0] if len(along) == 1 else None

    def over_one(self) -> bool:
        """Whether a layer norm is over one axis, the last."""
        over = self.kwargs["normalized_shape"] if "normalized_shape" in self.kwargs else self.args[1]
        return len(over) == 1

    def is_linear_layer(self) -> bool:
        """Whether the call multiplies the rows of ``x`` by a matrix of constants."""
        by = self.args[1] if len(self.args) == 2 and self.function in ROWS_BY_MATRIX else None
        return isinstance(by, Tensor) and by is not self.x and by.dim() == 2 and self.x.dim() > 1

    def takes_off(self) -> bool:
        """Whether ``out`` is ``x`` with the channels summed up, or one of its channels."""
        if self.function in _REDUCTIONS:
            return self.dim() in (self.axis, self.axis - self.x.dim())
        if self.function in _PRODUCTS_OF_MATRICES:  # by a vector
            return self.axis == self.x.dim() - (1 if self.x is self.args[0] else 2)
        strides = self._strides() if self.is_view() else None
        return strides is not None and not any(strides)

    def axis_of_out(self) -> int | None:
        """Where the channels lie in ``out``, if a rule tells."""
        function, x, axis, out = self.function, self.x, self.axis, self.out
        if function in _PRODUCTS_OF_MATRICES:
            # what the channels are summed over makes new ones, on the side where they were
            if out.dim() >= x.dim():
                return axis - x.dim() + out.dim()
            return axis - (axis > x.dim() - 2)  # by a vector: the last axis went, or the last but one
        if function in WRITTEN_IN_LETTERS:
            return self._behind_letters()
        if function in _STACKS:
            new = self.dim()
            return None if new is None else axis + (new % out.dim() <= axis)
        if function is F.unfold:  # (N, C k k, positions)
            return out.dim() - 2
        if function is F.fold:
            return out.dim() - 3
        if function in RESHAPES:
            return _behind_reshape(tuple(x.shape), axis, tuple(out.shape))
        if self.is_view():
            return self._behind_view()
        if function in _REDUCTIONS and out.dim() < x.dim():
            gone = self.gone()
            return axis - sum(d < axis for d in gone) if gone and axis not in gone else None
        if function in _REARRANGING and (x.dim() != out.dim() or function not in _WITHIN_AXES):
            return None
        if function in _ENTRY_BY_ENTRY:
            return None if self.stretches() else axis + out.dim() - x.dim()
        return axis if out.dim() == x.dim() and function not in _SUMS else None

    def _behind_letters(self) -> int | None:
        """Where the letter of the channels went; if it is summed over, the one letter that the other operands bring."""
        if (written := in_letters(self.function, self.args, self.kwargs)) is None:
            return None
        operands, letters, result = written
        mine = next(row for row, t in zip(letters, operands, strict=True) if t is self.x)
        if mine[self.axis] in result:
            return result.index(mine[self.axis])
        brought = [letter for letter in result if letter not in mine]
        return result.index(brought[0]) if len(brought) == 1 else None

    def _behind_view(self) -> int | None:
        """The same view of a tensor that has a stride along its channels only shows where they went."""
        moved = [i for i, stride in enumerate(self._strides() or ()) if stride]
        long = [i for i in moved if self.out.shape[i] > 1]  # a new axis has a stride, too
        return (long or moved)[-1] if moved else None

    def _strides(self) -> tuple[int, ...] | None:
        """The strides of a view of what has a stride along its channels only; None where they cannot be told."""
        strides = [int(i == self.axis) for i in range(self.x.dim())]
        probe = torch.empty(1, device="meta").as_strided(self.x.shape, strides)
        try:
            return self.run_with(probe).stride()
        except (RuntimeError, TypeError):  # axes that this probe cannot merge, or complex numbers
            return None


def _numbered(shape: torch.Size, axis: int, device: torch.device) -> Tensor:
    """The numbers of the positions, the same for all channels, which lie along ``axis``."""
    others = [1 if i == axis else size for i, size in enumerate(shape)]
    return torch.arange(prod(others), device=device, dtype=torch.float64).view(others).expand(shape)


def places(t: Tensor, axis: int) -> tuple[int, ...]:
    """Sizes of the axes of ``t`` that are positions: neither the batch nor channels, which lie along ``axis``."""
    return tuple(size for i, size in enumerate(t.shape) if i not in (0, axis))


def has_extent(t: Tensor, axis: int) -> bool:
    """Whether ``t``, with channels along ``axis``, has more than one position."""
    return max(places(t, axis), default=1) > 1


def _default(dims: int) -> int:
    return 1 if dims == 4 else max(dims - 1, 0)


def memory_of(t: Tensor) -> Tensor:
    """The tensor whose memory ``t`` shows: itself, unless it is a view."""
    return t if t._base is None else t._base


def _behind_reshape(old: tuple[int, ...], axis: int, new: tuple[int, ...]) -> int | None:
    """The axis of the same size with as many elements behind it, which does not depend on the number of images. Channels
    merged with the images are along none: with one image they would seem to be the first."""
    behind = prod(old[axis + 1 :])
    fitting = [j for j, size in enumerate(new) if size == old[axis] and prod(new[j + 1 :]) == behind]
    return next((j for j in fitting if j > 0 or axis == 0), None)
