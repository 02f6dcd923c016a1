"""Notes about the tensors of a running model, and which of them are one."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Note = TypeVar("Note")
_ORIGINALS = WeakTensorKeyDictionary()


def is_one_with(view: Tensor, original: Tensor) -> None:
    """``view`` is all of ``original`` under another name: backward hooks of modules put such views in its place."""
    _ORIGINALS[view] = original


def original_of(t: Tensor) -> Tensor:
    """What ``t`` is one with; ``t`` itself if nothing."""
    while (original := _ORIGINALS.get(t)) is not None:
        t = original
    return t


class TensorNotes(Generic[Note]):
    """Notes about tensor objects, void once the tensor is gone or (unless ``lasting``) was changed in place.

    What was noted about a tensor holds for those that are one with it.
    """

    def __init__(self, lasting: bool = False) -> None:
        self._lasting = lasting
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Note]] = {}

    def put(self, tensor: Tensor, note: Note) -> None:
        tensor = original_of(tensor)
        self._notes[id(tensor)] = (weakref.ref(tensor), tensor._version, note)

    def get(self, tensor: Tensor) -> Note | None:
        tensor = original_of(tensor)
        found = self._notes.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        return found[2] if self._lasting or found[1] == tensor._version else None

    def stale(self, tensor: Tensor) -> bool:
        """Whether a note was made void by a change in place."""
        tensor = original_of(tensor)
        found = self._notes.get(id(tensor))
        return found is not None and found[0]() is tensor and found[1] != tensor._version

    def drop(self, tensor: Tensor) -> None:
        """Forget what was noted."""
        self._notes.pop(id(original_of(tensor)), None)

    def clear(self) -> None:
        self._notes.clear()
