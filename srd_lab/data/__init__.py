"""Where images come from: ``load_data("scenes")``, ``load_data("imagenet:DIR")``; one file per source."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srd_lab.types import Dataset, SrdLabError

__all__ = ["SOURCES", "batch", "load_data"]

SOURCES = ("scenes", "imagenet:DIR")


def load_data(
    spec: str = "scenes",
    split: str = "test",
    *,
    seed: int = 0,
    size: int | None = None,
    limit: int | None = None,
) -> Dataset:
    """The data set that ``spec`` names, one of ``SOURCES``.

    split, seed : of ``scenes`` (train, val or test); a folder of images has neither.
    size : side of the images in pixels; 224 for ImageNet unless given, always 64 for ``scenes``.
    limit : so many images at most: the first of ``scenes``, whose classes go round; evenly spread ones of a
        folder.

    Raises SrdLabError for an unknown source, split or size, and for a folder that cannot be used.
    """
    source, _, folder = spec.partition(":")
    if spec == "scenes":
        return _scenes(split, seed, size, limit)
    if source == "imagenet" and folder:
        from srd_lab.data.imagenet import ImageNetFolder

        return ImageNetFolder(folder, 224 if size is None else size, limit=limit)
    raise SrdLabError(f"there is no data set {spec!r}; choose one of {', '.join(SOURCES)}")


def _scenes(split: str, seed: int, size: int | None, limit: int | None) -> Dataset:
    from srd_lab.data.scenes import LENGTHS, SIZE, Scenes

    if size not in (None, SIZE):
        raise SrdLabError(
            f"scenes are {SIZE} x {SIZE} pixels, size {size} is not to be had; leave the size out"
        )
    if limit is not None and split in LENGTHS:
        limit = min(limit, LENGTHS[split])
    return Scenes(split, seed=seed, length=limit)


def batch(dataset: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) float32 in [0, 1] and labels (N,) int64 of these samples; at least one.

    Raises SrdLabError when there are no indices.
    """
    samples = [dataset[int(index)] for index in indices]
    if not samples:
        raise SrdLabError("a batch needs at least one image; give one index or more")
    return torch.stack([sample.image for sample in samples]), torch.tensor(
        [sample.label for sample in samples]
    )
