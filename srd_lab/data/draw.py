"""Which images a study looks at: drawn by the seed; where they have to be classified correctly, by the network too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from srd_lab.data import Loaded, load_batches
from srd_lab.errors import BadValue, SrdLabWarning
from srd_lab.logits import class_logits
from srd_lab.runtime import Batcher, generator
from srd_lab.types import Dataset, Sample

SCREENED_AT_ONCE = 16


@dataclass(frozen=True)
class Pair:
    """An image to attack and the image whose explanation it shall take on, as indices of the data set."""

    original: int
    goal: int


def draw_pairs(
    dataset: Dataset,
    model: nn.Module,
    count: int,
    seed: int,
    device: torch.device,
    workers: int | None = None,
) -> tuple[list[Pair], dict[str, str]]:
    """``count`` random pairs of correctly classified images of different classes; no image is used twice.

    model : takes images (N, 3, H, W) on ``device``.
    seed : with the data and the model, decides the pairs.
    workers : processes that decode ahead; None or 0 = none.

    Returns the pairs, and the files met that could not be read, name -> reason.

    Raises BadValue if the data cannot give so many, and Unavailable where memory does not suffice for one image.
    """
    order = torch.randperm(len(dataset), generator=generator(seed, "pairs")).tolist()
    waiting: list[int] = []
    pairs: list[Pair] = []
    skipped: dict[str, str] = {}
    batcher = Batcher(SCREENED_AT_ONCE)
    parts = (order[first : first + SCREENED_AT_ONCE] for first in range(0, len(order), SCREENED_AT_ONCE))
    for loaded in load_batches(dataset, parts, workers or 0):
        skipped |= loaded.skipped
        for index in _correct(loaded, model, device, batcher):
            partner = next((i for i in waiting if dataset.labels[i] != dataset.labels[index]), None)
            if partner is None:
                waiting.append(index)
                continue
            waiting.remove(partner)
            pairs.append(Pair(partner, index))
            if len(pairs) == count:
                return pairs, skipped
    found = (
        f"{count} pairs were asked for, but the {len(dataset)} images give only {len(pairs)} pairs of correctly "
        "classified images of different classes"
    )
    if not pairs:
        right = (
            "are all of one class"
            if waiting
            else "are none: do the labels and --weights belong together (folders are numbered by their names in order)?"
        )
        raise BadValue(f"{found}; those classified correctly {right}")
    raise BadValue(f"{found}; ask for fewer with --pairs")


def _correct(loaded: Loaded, model: nn.Module, device: torch.device, batcher: Batcher) -> list[int]:
    def predict(some: Sequence[Sample]) -> list[int]:
        with torch.no_grad():
            logits = class_logits(model(torch.stack([sample.image for sample in some]).to(device)))
            return logits.argmax(1).tolist()

    predicted = [label for part in batcher.run(predict, loaded.samples) for label in part]
    found = zip(loaded.indices, loaded.samples, predicted, strict=True)
    return [index for index, sample, label in found if sample.label == label]


def draw_images(dataset: Dataset, count: int | str, seed: int) -> list[int]:
    """A random subset of ``count`` indices, sorted; all of them if ``count`` is "all" or there are not more.

    count : >= 1, or "all". With the same seed, a smaller subset is part of a larger one.

    Warns where there are fewer than ``count``. Raises BadValue for a count below 1.

    Example
    -------
    >>> from srd_lab.data import load_data
    >>> data = load_data("scenes")
    >>> len(draw_images(data, 3, seed=0)), len(draw_images(data, "all", seed=0))
    (3, 2000)
    """
    count = len(dataset) if isinstance(count, str) else count
    if count < 1:
        raise BadValue(f"{count} images cannot be drawn; expected 1 or more")
    if count > len(dataset):
        warnings.warn(
            f"{count} images were asked for, and the data have {len(dataset)}: all are taken",
            SrdLabWarning,
            stacklevel=2,
        )
    order = torch.randperm(len(dataset), generator=generator(seed, "images"))
    return sorted(order[:count].tolist())
