"""Where the network proper begins: behind a normalisation that the model itself makes of its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srd_lab.engine.affine import CASTS, COPIES, DIVISIONS, LIKE, SHIFTS, overwrites, spelled
from srd_lab.engine.record import Records, original_of
from srd_lab.engine.spellings import Function, tensors_in

_NORMALISING = (
    SHIFTS
    | DIVISIONS
    | CASTS
    | COPIES
    | spelled("mul multiply __mul__ __rmul__ __imul__ cat concat concatenate stack copy index_copy")
    | spelled("slice_scatter select_scatter __setitem__ addcmul lerp")
)
_SLICING = spelled("__getitem__ unsqueeze select narrow chunk split unbind")  # of colours, to normalise each


class NetworkInput:
    """Finds what a network is fed with, once it has shifted and scaled its images; a trace tells it what happens.

    records : of the tensors of the pass.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._shape = torch.Size()
        self._ahead = True  # of the first layer
        self._last: Tensor | None = None  # what was normalised last, in the shape of the images
        self._version = 0  # of that tensor then
        self._read: list[
            Tensor
        ] = []  # what the network proper has read of images and what normalising made of them

    def begin(self, fed: Tensor) -> None:
        """The model is about to be fed with the images ``fed`` (N, C, H, W)."""
        self._shape = fed.shape
        self._records.note(fed, ahead=True)

    def clear(self) -> None:
        """Drop every reference to a tensor."""
        self._read.clear()
        self._last = None

    @property
    def found(self) -> Tensor | None:
        """What the network proper was fed with, (N, C, H, W); None where nothing was normalised, or more than once."""
        alone = self._last is not None and all(original_of(t) is self._last for t in self._read)
        return self._last if alone else None

    @property
    def overwritten(self) -> bool:
        """Whether :attr:`found` no longer holds what the network proper was fed with: an activation was in place there."""
        return self._last is not None and self._last._version != self._version

    def reads(self, x: Tensor) -> None:
        """``x`` goes into the network proper."""
        self._ahead = False
        if self._records[x].ahead:
            self._read.append(x)

    def is_ahead(self, maps: list[Tensor]) -> bool:
        """Whether what is done to ``maps`` now may be a normalisation: they are the image, and no layer has run."""
        return self._ahead and all(self._records[t].ahead for t in maps)

    def normalised(self, x: Tensor, y: Tensor) -> bool:
        """Whether a batch norm that made ``y`` of ``x`` is a normalisation of the image; it is noted as one then."""
        if not self.is_ahead([x]) or y.shape != self._shape:
            return False
        self._records.note(y, ahead=True)
        self._note_last(y)
        return True

    def called(self, function: Function, args: tuple[Any, ...], maps: list[Tensor], out: Any) -> None:
        """``function`` was called on ``maps`` and returned ``out``: a shift or scale ahead of the first layer is
        normalisation, also colour by colour."""
        writes = function is Tensor.__setitem__ or overwrites(function, {})
        made = [t for t in (args[0], args[0]._base) if t is not None] if writes else tensors_in((out,))
        if function in LIKE or not made:  # it asks for a shape, say
            return
        slices = function in _SLICING
        normalises = function in _NORMALISING or (slices and all(_keeps_pixels(maps[0], t) for t in made))
        if not normalises or not self.is_ahead(maps):
            self._read += [t for t in maps if self._records[t].ahead]
            return
        for t in made:
            self._records.note(t, ahead=True)
            if t.shape == self._shape and not slices:
                self._note_last(t)

    def _note_last(self, t: Tensor) -> None:
        self._last = original_of(t)
        self._version = self._last._version


def _keeps_pixels(x: Tensor, part: Tensor) -> bool:
    """Whether a slice of ``x`` (..., H, W) has all of its pixels where they were: it is a view along the same two axes."""
    return part._base is not None and (part.shape[-2:], part.stride()[-2:]) == (x.shape[-2:], x.stride()[-2:])
