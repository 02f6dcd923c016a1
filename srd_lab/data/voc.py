"""The segmentation images of PASCAL VOC (Everingham et al.), as its development kit lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from srd_lab.data.pictures import Picture, PictureFolder, SkippedFile, complaint, decode_mask
from srd_lab.errors import BadData

if TYPE_CHECKING:
    from PIL import Image

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
PLACES = ("", "VOC2012", "VOC2007", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007")
LIST = "ImageSets/Segmentation/val.txt"
VOID = 255


class Voc(PictureFolder):
    """The images of ``voc:DIR`` in ``ImageSets/Segmentation/val.txt``; DIR is VOC2007, VOC2012 or the kit around.

    The label is the class that covers the most pixels (0..19, alphabetical), and the mask holds these; the void
    rim of objects is outside. All masks are read at the start, for the labels. An image whose mask cannot be
    read or shows no object has label -1 there, and is skipped on access.

    Arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def __init__(self, folder: str | Path, size: int = 224, **options: Any) -> None:
        super().__init__(folder, size, **options)
        self.pictures = [Picture(p.file, self._label(p), p.name) for p in self.pictures]
        self.labels = torch.tensor([picture.label for picture in self.pictures])

    def _find(self) -> list[Picture]:
        self.classes = list(CLASSES)
        self.root = next(
            (self.folder / place for place in PLACES if (self.folder / place / LIST).is_file()), None
        )
        if self.root is None:
            raise BadData(
                f"{self.folder} holds no {LIST}; give voc:DIR, where DIR is the folder VOC2012, VOC2007 or VOCdevkit"
            )
        try:
            names = (self.root / LIST).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise BadData(
                f"{self.root / LIST} cannot be read ({complaint(error)}); expected a name in every line"
            ) from None
        if not names:
            raise BadData(f"{self.root / LIST} is empty; expected the name of an image in every line")
        return [Picture(self.root / "JPEGImages" / f"{name}.jpg", -1, name) for name in names]

    def _classes(self, picture: Picture) -> np.ndarray:
        """The class of every stored pixel plus 1, 0 for background, 255 for void; SkippedFile where unknown."""
        mask = decode_mask(
            picture.file.parents[1] / "SegmentationClass" / f"{picture.name}.png", picture.name
        )
        if mask.mode not in ("P", "L"):
            raise SkippedFile(picture.name, f"its mask has no palette but is {mask.mode}")
        pixels = np.asarray(mask)
        if ((pixels > len(CLASSES)) & (pixels != VOID)).any():
            raise SkippedFile(picture.name, f"its mask has values above {len(CLASSES)} that are not {VOID}")
        return pixels

    def _label(self, picture: Picture) -> int:
        try:
            areas = np.bincount(self._classes(picture).ravel(), minlength=VOID + 1)[1:VOID]
        except SkippedFile:
            return -1
        return int(areas.argmax()) if areas.any() else -1

    def _mask(self, picture: Picture, size: tuple[int, int]) -> Image.Image:
        from PIL import Image

        pixels = self._classes(picture)
        if picture.label < 0:
            raise SkippedFile(picture.name, "its mask shows no object")
        return Image.fromarray((pixels == picture.label + 1).astype(np.uint8))
