"""Where images come from: ``load_data("scenes")``, ``load_data("imagenet:DIR")``; one file per source.

A source gives a :class:`srd_lab.types.Dataset`; its name and class stand in :data:`srd_lab.parts.FOLDERS`. It imports the
modules at the top of ``srd_lab`` and nothing else of this project: no networks, which are handed over where classes have to
be predicted. Begin with :func:`load_data` and :mod:`srd_lab.data.pictures`; how to add a source is in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_lab.data.loading import Loaded, load_batches
from srd_lab.data.pictures import NON_RGB, SkippedFile, skipped_report
from srd_lab.errors import BadInput, BadValue, meant
from srd_lab.parts import FOLDERS, is_place, living
from srd_lab.types import Dataset

__all__ = [
    "NON_RGB",
    "SOURCES",
    "Loaded",
    "SkippedFile",
    "batch",
    "load_batches",
    "load_data",
    "skipped_report",
]

SOURCES = (
    "scenes",
    *(f"{source}:{place}" for source, (place, _) in FOLDERS.items()),
    "cifar10:PATH",
    "cifar100:PATH",
    "package.module:factory",
    "path/file.py:factory",
)

_KINDS = [source.partition(":")[0] for source in SOURCES[:-2]]


def load_data(
    spec: str = "scenes",
    split: str = "test",
    *,
    seed: int = 0,
    size: int | None = None,
    crop: float = 0.875,
    interpolation: str = "bilinear",
    limit: int | None = None,
    non_rgb: str = "skip",
    boxes: str | Path | None = None,
) -> Dataset:
    """The data set that ``spec`` names, one of ``SOURCES``; what it accepts stands at the top of its module.

    split : of ``scenes`` (train, val or test), CIFAR (train or test) and ``hf-dataset`` (its own); a folder has but one.
    seed : of ``scenes``, >= 0.
    size : side of the images in pixels; 224 unless given, always 64 for ``scenes`` and 32 for CIFAR.
    crop, interpolation : how the files of folders are resized, see :class:`srd_lab.types.Preprocessing`.
    limit : so many images at most, >= 1: the first of ``scenes``, whose classes go round; evenly spread ones of all else.
        None = all.
    non_rgb : what becomes of files that are not 8-bit RGB: "skip" raises SkippedFile on access, "convert" makes
        RGB of them.
    boxes : for ``imagenet``, the folder of XML annotations or the table of bounding boxes that give the masks,
        where they do not lie in DIR or beside it.

    Files in class folders that Pillow cannot open are left out, and a warning counts and names them.

    Raises BadValue for an unknown source, split, size or option, and BadData for files that cannot be used; on access
    SkippedFile, a kind of BadData, for a single file that cannot.

    Example
    -------
    >>> data = load_data("scenes", limit=20)
    >>> len(data), data[3].label, data.name(3), tuple(data[3].image.shape)
    (20, 3, 'scenes/test/3', (3, 64, 64))
    """
    source, _, place = spec.partition(":")
    if boxes is not None and source != "imagenet":
        raise BadValue(f"boxes go with imagenet:DIR, not with {spec}; leave them out")
    if spec == "scenes":
        return _scenes(split, seed, size, limit)
    if source in ("cifar10", "cifar100") and place:
        return _cifar(source, place, split, size, limit, non_rgb)
    side = 224 if size is None else size
    files: dict[str, Any] = {"crop": crop, "interpolation": interpolation, "limit": limit, "non_rgb": non_rgb}
    if source in FOLDERS and place:
        module, _, kind = FOLDERS[source][1].partition(":")
        files |= (
            {"boxes": boxes} if source == "imagenet" else {"split": split} if source == "hf-dataset" else {}
        )
        made: Dataset = getattr(import_module(f"srd_lab.data.{module}"), kind)(place, side, **files)
        return made
    if source == "live" and hasattr(found := living(spec), "name") and hasattr(found, "classes"):
        ready: Dataset = found  # one of this package's kind
        return ready
    _refuse_misspelt(spec, source)
    if source == "live" or is_place(spec.partition("?")[0]):
        from srd_lab.data.own import OwnData

        own = living(spec) if source == "live" else None
        return OwnData(spec, own, side, crop=crop, interpolation=interpolation, limit=limit)
    raise BadValue(f"there is no data set {spec!r}; choose one of {', '.join(SOURCES)}")


def _refuse_misspelt(spec: str, source: str) -> None:
    """Refuse (BadValue) a source that looks like a known one, where no module is called so either."""
    if "." in source or source in _KINDS or not (near := meant(source, _KINDS)):
        return
    if not Path(f"{source}.py").exists() and find_spec(source) is None:
        raise BadValue(f"there is no data set {spec!r} and no module {source}{near}")


def check_place(spec: str) -> None:
    """Raises what :func:`load_data` raises where ``spec`` is no source, or names a file or folder that is not there; reads
    none that is."""
    source, _, place = spec.partition(":")
    if spec == "scenes" or source in ("hf-dataset", "wds", "live"):
        return
    _refuse_misspelt(spec, source)
    if is_place(spec.partition("?")[0]):
        return
    if source not in (*FOLDERS, "cifar10", "cifar100") or not place or not Path(place).exists():
        load_data(spec)


def _cifar(kind: str, path: str, split: str, size: int | None, limit: int | None, non_rgb: str) -> Dataset:
    from srd_lab.data.cifar import SIZE, Cifar

    if size not in (None, SIZE):
        raise BadValue(f"{kind} has {SIZE} x {SIZE} pixels, size {size} is not to be had; leave the size out")
    return Cifar(path, kind, split, limit=limit, non_rgb=non_rgb)


def _scenes(split: str, seed: int, size: int | None, limit: int | None) -> Dataset:
    from srd_lab.data.scenes import LENGTHS, SIZE, Scenes

    if size not in (None, SIZE):
        raise BadValue(f"scenes are {SIZE} x {SIZE} pixels, size {size} is not to be had; leave the size out")
    if limit is not None and split in LENGTHS:
        limit = min(limit, LENGTHS[split])
    return Scenes(split, seed=seed, length=limit)


def batch(dataset: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) float32 in [0, 1] and labels (N,) int64 of the samples with these indices.

    dataset : images of one size. indices : of samples, from 0.

    Raises BadInput when there are no indices, and SkippedFile for a file that cannot be used.

    Example
    -------
    >>> images, labels = batch(load_data("scenes"), [0, 12])
    >>> images.shape, labels
    (torch.Size([2, 3, 64, 64]), tensor([0, 2]))
    """
    samples = [dataset[int(index)] for index in indices]
    if not samples:
        raise BadInput("a batch needs at least one image; give one index or more")
    return torch.stack([sample.image for sample in samples]), torch.tensor(
        [sample.label for sample in samples]
    )
