"""All that is known of the tensors of a running model: one record each.

A record tells facts about the tensor (where its channels lie) and facts about its value (which convolution made it). The
latter are void once the value was changed in place. Backward hooks of modules put views in the place of tensors, which
share the record of the tensor that they are all of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.geometry import Convolution
from srd_lab.engine.spellings import Call

if TYPE_CHECKING:
    from srd_lab.engine.pointwise import Pointwise

_ORIGINALS = WeakTensorKeyDictionary()


def is_one_with(view: Tensor, original: Tensor) -> None:
    """``view`` is all of ``original`` under another name: backward hooks of modules put such views in its place."""
    _ORIGINALS[view] = original


def original_of(t: Tensor) -> Tensor:
    """What ``t`` is one with; ``t`` itself if nothing."""
    while (original := _ORIGINALS.get(t)) is not None:
        t = original
    return t


def _stays(default: Any) -> Any:
    """A fact about the tensor, whatever its value becomes."""
    return field(default=default, metadata={"stays": True})


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model.

    weight, bias : (out, in) and (out,). part : what it makes of its input with a weight to be modified and a modified bias.
    """

    weight: Tensor
    bias: Tensor | None
    part: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Record:
    """What is known of one tensor; None and False where nothing is.

    About the tensor:
    channels : the axis of its channels. lone : it has one channel, whose axis a sum took away.
    laid : shape and channel axis of the map that it was before a reshape merged or split the axis of channels.
    adrift : nothing tells where its channels lie. places : the numbers of the positions, if these moved with its entries.
    ahead : it is the image, or what normalising makes of it.
    seen : an intercepted call made it, or wrote into it.

    About its value:
    role : None for a map; "gate" for what multiplies maps and no more, "constant" for what is made of parameters alone.
    compared : a comparison of maps made it. detached : it is made of maps, and asks for no gradient.
    unseen : it was made with gradients off.
    call : the activation call that made it. event : which torch function of the model did, counted from 1.
    curved : by which bent function it was made of a map, entry by entry, if it has not multiplied a map since.
    filled : constants stand among its values, as behind a pad. pooled : it was pooled from maps.
    pointwise : how it was made of other tensors value by value.
    convolution : the convolution that made it, but for a copy. normed : the one that makes it, with a batch norm folded in,
        where its part is known.
    linear : the linear layer that made it.
    part : what modified weights make of the same activations. of_pixels : by z^B, which leaves biases out.
    box : bounds of a tensor made of the image alone.
    overwritten : it was changed in place after its convolution, part or box was known.
    """

    channels: int | None = _stays(None)
    lone: bool = _stays(False)
    laid: tuple[torch.Size, int] | None = _stays(None)
    adrift: bool = _stays(False)
    places: Tensor | None = field(default=None, metadata={"stays": True})
    ahead: bool = _stays(False)
    seen: bool = _stays(False)
    role: Literal["gate", "constant"] | None = None
    compared: bool = False
    detached: bool = False
    unseen: bool = False
    call: Call | None = None
    event: int | None = None
    curved: str = ""
    filled: bool = False
    pooled: bool = False
    pointwise: tuple[Pointwise, ...] = ()
    convolution: Convolution | None = None
    normed: Convolution | None = None
    linear: Linear | None = None
    part: Tensor | None = None
    of_pixels: bool = False
    box: tuple[Tensor, Tensor] | None = None
    overwritten: bool = False


_NOTHING = Record()
_STAYS = tuple(f.name for f in fields(Record) if f.metadata.get("stays"))


class Records:
    """The records of the tensors of one forward pass; a tensor's goes when the tensor does."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Record]] = {}

    def __getitem__(self, tensor: Tensor) -> Record:
        """What is known of ``tensor`` as it is now."""
        tensor = original_of(tensor)
        found = self._known.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return _NOTHING
        _, version, record = found
        return record if version == tensor._version else _after_change(record)

    def is_map(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is made of the image, and is no gate."""
        return tensor.requires_grad and not tensor.is_leaf and self[tensor].role is None

    def note(self, tensor: Tensor, **facts: Any) -> None:
        """Add facts about ``tensor`` as it is now, by the names of :class:`Record`."""
        record = replace(self[tensor], **facts)
        tensor = original_of(tensor)
        self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, record)

    def clear(self) -> None:
        """Drop every reference to a tensor."""
        self._known.clear()


def _after_change(record: Record) -> Record:
    staying = {name: getattr(record, name) for name in _STAYS}
    known = any(fact is not None for fact in (record.part, record.convolution, record.box))
    return Record(**staying, overwritten=record.overwritten or known)
