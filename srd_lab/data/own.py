"""Data sets of one's own: any ``torch.utils.data.Dataset`` of pairs or dicts, in Python or by name.

``load_data("mine.py:photos?split=val")`` calls ``photos(split="val")`` in ``mine.py``, which gives an object with
``__len__`` and ``__getitem__``. Its items are ``(image, label)``, ``{"image": ..., "label": ..., "mask": ...}`` or
:class:`srd_lab.types.Sample`. An image is a Pillow image, which is resized and cropped as the network wants it, or pixels of
the size that they are to have: a tensor (3, H, W) of floats in [0, 1] or of uint8, or an array (H, W, 3) of uint8. A mask
(H, W) is True on the object. A label of -1 stands for none.

Labels are taken from an attribute ``labels`` or ``targets`` where there is one, else every item is read once; names from
``classes``, or ``names`` of the files.

Example
-------
::

    # mine.py
    def photos(split="val"):
        return torchvision.datasets.Flowers102("flowers", split)

    # srd-lab evaluate --model mine.py:net --data mine.py:photos
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srd_lab.data.pictures import SkippedFile, fit, spread
from srd_lab.errors import BadData, SrdLabError, first_line
from srd_lab.parts import make
from srd_lab.types import Sample


class OwnData:
    """A data set of the user's, item by item as a :class:`srd_lab.types.Sample`.

    name : what it is called in messages.
    source : as above; None = what ``name`` stands for, ``mine.py:photos`` say, which is made anew in every process that
        reads.
    size, crop, interpolation : of Pillow images, see :class:`srd_lab.types.Preprocessing`.
    limit : so many of the items, evenly spread; None = all.

    Raises BadData for what is no data set, is empty, or has labels that are no class indices; on access for an item that is
    none of the kinds above, and SkippedFile where reading it fails.
    """

    def __init__(
        self,
        name: str,
        source: Any = None,
        size: int = 224,
        *,
        crop: float = 0.875,
        interpolation: str = "bilinear",
        limit: int | None = None,
    ) -> None:
        self._again = None if source is not None else (name, size, crop, interpolation, limit)
        source = make(name) if source is None else source
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise BadData(
                f"{name} gives a {type(source).__name__}; expected a data set with __len__ and __getitem__"
            )
        if len(source) == 0:
            raise BadData(f"{name} is empty")
        self.source, self.size, self._called = source, size, name
        self.crop, self.interpolation = crop, interpolation
        self._indices = list(spread(range(len(source)), limit))
        self.classes = [str(label) for label in getattr(source, "classes", ())]
        self.labels = self._labels()

    def __len__(self) -> int:
        return len(self._indices)

    def __reduce__(self) -> Any:
        """Another process knows no module that was read from a file."""
        return super().__reduce__() if self._again is None else (_made_again, self._again)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._called!r}, size={self.size}, length={len(self)})"

    def name(self, index: int) -> str:
        """What the source calls the item, else ``NAME/INDEX``."""
        place = self._indices[operator.index(index)]
        names = getattr(self.source, "names", None)
        return str(names[place]) if names is not None else f"{self._called.partition('?')[0]}/{place}"

    def __getitem__(self, index: int) -> Sample:
        item, name = self._item(self._indices[operator.index(index)]), self.name(index)
        if isinstance(item, Sample):
            image, label, mask = item.image, item.label, item.mask
        elif isinstance(item, Mapping) and "image" in item:
            image, label, mask = item["image"], item.get("label", -1), item.get("mask")
        elif isinstance(item, tuple | list) and len(item) == 2:
            (image, label), mask = item, None
        else:
            raise BadData(
                f"{name} is a {type(item).__name__}; expected (image, label), a dict with image and label, or a Sample"
            )
        pixels = self._pixels(image, name)
        return Sample(pixels, _index(label, name), self._masked(mask, image, pixels, name), name)

    def _item(self, place: int) -> Any:
        try:
            return self.source[place]
        except (SrdLabError, MemoryError):
            raise
        except Exception as error:
            name = f"{self._called.partition('?')[0]}/{place}"
            raise SkippedFile(name, f"it fails: {first_line(error)} ({type(error).__name__})") from error

    def _labels(self) -> Tensor:
        known = getattr(self.source, "labels", None)
        known = getattr(self.source, "targets", None) if known is None else known
        if known is not None and len(known) == len(self.source):
            found = [_index(known[place], f"label {place} of {self._called}") for place in self._indices]
        else:
            found = []
            for index in range(len(self)):
                try:
                    found.append(self[index].label)
                except SkippedFile:  # it is named when it is wanted
                    found.append(-1)
        return torch.tensor(found)

    def _pixels(self, image: Any, name: str) -> Tensor:
        if hasattr(image, "convert"):  # Pillow's
            square = fit(image.convert("RGB"), self.size, crop=self.crop, interpolation=self.interpolation)
            return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div_(255)
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
            image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
            shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
            raise BadData(
                f"{name} has an image {shape}; expected a Pillow image, or pixels (3, H, W) or (H, W, 3)"
            )
        if tuple(image.shape[1:]) != (self.size, self.size):
            raise BadData(
                f"{name} has {image.shape[2]} x {image.shape[1]} pixels where {self.size} x {self.size} are wanted; "
                "give --size, or let the data set give Pillow images, which are resized"
            )
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if not (pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1):
            low, high = float(pixels.min()), float(pixels.max())
            raise BadData(
                f"{name} has values in [{low:.3g}, {high:.3g}]; expected pixels in [0, 1], not normalised"
            )
        return pixels.contiguous()

    def _masked(self, mask: Any, image: Any, pixels: Tensor, name: str) -> Tensor | None:
        if mask is None:
            return None
        if hasattr(mask, "convert") and hasattr(image, "convert"):
            return torch.from_numpy(np.array(fit(mask, self.size, crop=self.crop, mask=True)) > 0)
        found = torch.as_tensor(np.asarray(mask)) > 0
        if found.shape != pixels.shape[1:]:
            raise BadData(f"{name} has a mask {tuple(found.shape)}, the image {tuple(pixels.shape[1:])}")
        return found


def _made_again(name: str, size: int, crop: float, interpolation: str, limit: int | None) -> OwnData:
    return OwnData(name, size=size, crop=crop, interpolation=interpolation, limit=limit)


def _index(label: Any, name: str) -> int:
    try:
        plain: Any = label.item() if isinstance(label, Tensor | np.generic) else label
        index = operator.index(plain)
    except (TypeError, ValueError, RuntimeError):
        raise BadData(f"{name}: the label {label!r:.40} is no class index") from None
    if not -1 <= index < 10**7:
        raise BadData(f"{name}: the label {index} is no class index")
    return index
