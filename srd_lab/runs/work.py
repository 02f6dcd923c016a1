"""What a study does with a batch of images: a value that can be sent to another process, and what it makes of them."""

from __future__ import annotations

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from srd_lab.data import Loaded
from srd_lab.runtime import Batcher
from srd_lab.types import Sample

Arrays = dict[str, np.ndarray]
Advance = Callable[[int], None]
ADDED = ("files", "skipped", "seconds")


@dataclass(frozen=True)
class Item:
    """One thing to work on.

    number : its place in the study, from 0.
    indices, samples : of one sample, or of several that belong together, in the data set.
    """

    number: int
    indices: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def index(self) -> int:
        """The index of its first sample."""
        return self.indices[0]

    @property
    def sample(self) -> Sample:
        """Its first sample."""
        return self.samples[0]


@dataclass(frozen=True)
class Work(ABC):
    """What is done with the items of a batch; a subclass has what it needs for that as fields.

    model : the network, on ``device``.
    """

    model: nn.Module
    device: torch.device

    @abstractmethod
    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """Arrays of these items, whose first axis is the item; ``advance`` is told the steps that were done.

        The arrays of an item must not depend on what else is in its batch. An array whose name ends in ``.npz`` is the
        content of a file, uint8 (B,), which is stored with the run under that name.
        """

    def on(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, model=self.model.to(device), device=device)


@dataclass(frozen=True)
class Part:
    """A batch of a study, not loaded yet.

    first : number of its first item. groups : of each item the indices of its samples. files : names of all samples.
    """

    first: int
    groups: tuple[tuple[int, ...], ...]
    files: tuple[str, ...]

    @property
    def last(self) -> int:
        """One past the number of its last item."""
        return self.first + len(self.groups)

    @property
    def indices(self) -> list[int]:
        """Of all samples."""
        return [index for group in self.groups for index in group]

    def items(self, loaded: Loaded) -> list[Item]:
        """The items of which every file could be read."""
        samples = dict(zip(loaded.indices, loaded.samples, strict=True))
        return [
            Item(number, group, tuple(samples[index] for index in group))
            for number, group in enumerate(self.groups, self.first)
            if all(index in samples for index in group)
        ]


def worked(
    work: Callable[[Sequence[Item], Advance], Arrays],
    part: Part,
    load: Callable[[], Loaded],
    batcher: Batcher,
    advance: Advance,
) -> Arrays:
    """The arrays of a batch, with what every batch has: ``files``, ``skipped`` and ``seconds``.

    load : gives the samples of the batch.
    """
    began = time.perf_counter()
    loaded = load()
    arrays = joined(batcher.run(lambda some: work(some, advance), part.items(loaded)))
    return arrays | {
        "files": np.array(part.files),
        "skipped": np.array(list(loaded.skipped.items()), "U").reshape(-1, 2),
        "seconds": np.array(time.perf_counter() - began),
    }


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of consecutive batches as one: concatenated along the first axis.

    Arrays (N, S) of different lengths S are filled up with NaN, and single numbers (the seconds) are added up.

    Example
    -------
    >>> parts = [{"x": np.ones((1, 2)), "seconds": np.array(1.0)}, {"x": np.ones((1, 1)), "seconds": np.array(2.0)}]
    >>> {name: array.tolist() for name, array in joined(parts).items()}
    {'x': [[1.0, 1.0], [1.0, nan]], 'seconds': 3.0}
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _joined([part[name] for part in parts if name in part]) for name in names}


def npz(arrays: Arrays) -> np.ndarray:
    """The content of a compressed npz file of these arrays, uint8 (B,)."""
    content = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(content, **named)
    return np.frombuffer(content.getvalue(), np.uint8)


def skipped_in(arrays: Arrays) -> dict[str, str]:
    """Name -> reason of the files of a batch, or of several joined, that could not be used."""
    return {str(name): str(reason) for name, reason in arrays["skipped"]}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].ndim == 0:
        return np.sum(parts)
    if parts[0].ndim != 2:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    fill = [((0, 0), (0, width - part.shape[1])) for part in parts]
    return np.concatenate(
        [np.pad(p, f, constant_values=np.nan) if f[1][1] else p for p, f in zip(parts, fill, strict=True)]
    )
