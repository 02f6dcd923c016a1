"""A folder of ImageNet images: one subfolder for each class, named by its WordNet number (``n01440764``)."""

from __future__ import annotations

import operator
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from srd_lab.types import Sample, SrdLabError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet numbers of ILSVRC 2012 in the order of the class indices, which is alphabetical."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii").split())


def class_names() -> list[str]:
    """The 1,000 English names in the order of the class indices, as torchvision's weights carry them."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _class_folders(root: Path) -> dict[Path, int]:
    """The class folders in ``root``, sorted, with their class indices; SrdLabError where it has none."""
    if not root.is_dir():
        raise SrdLabError(
            f"{root} is not a folder; give imagenet:DIR, where DIR holds folders like n01440764"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and re.fullmatch(r"n\d{8}", path.name))
    if not folders:
        raise SrdLabError(
            f"{root} holds no class folders; expected folders named like n01440764, with images in them"
        )
    order = {wnid: index for index, wnid in enumerate(wnids())}
    strange = [folder.name for folder in folders if folder.name not in order]
    if strange:
        raise SrdLabError(
            f"{root / strange[0]} is none of the 1,000 classes of ILSVRC 2012 ({len(strange)} such in all); "
            "move these folders elsewhere"
        )
    return {folder: order[folder.name] for folder in folders}


def _images(root: Path) -> list[tuple[Path, int]]:
    """All images below the class folders with their class indices, sorted by folder, then by file name."""
    found = [
        (file, index)
        for folder, index in _class_folders(root).items()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    ]
    if not found:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise SrdLabError(f"the class folders in {root} hold no images; expected files that end in {kinds}")
    return found


def _decode(file: Path) -> Image.Image:
    """The image upright in RGB; SrdLabError names a file that cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrdLabError(
            f"{file} cannot be read as an image ({reason}); replace or remove the file"
        ) from None


def fit(image: Image.Image, size: int) -> Image.Image:
    """``image`` as a ``size`` x ``size`` square, the usual way for ImageNet.

    The shorter side is resized to ``size * 256 / 224`` (bilinear with antialiasing), then the centre is cut
    out. An image that is square already, with a side between ``size`` and that, is only cropped: it has been
    through a resize before (a set stored at 227 x 227, say), and a second one would blur it.
    """
    from PIL import Image

    shorter = round(size * 256 / 224)
    width, height = image.size
    if width != height or not size <= width <= shorter:
        scale = shorter / min(width, height)
        shape = max(shorter, int(width * scale)), max(shorter, int(height * scale))
        image = image.resize(shape, Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in image.size)  # as torchvision's CenterCrop
    else:
        left = top = (width - size) // 2  # as Caffe, whose convention such sets follow
    return image.crop((left, top, left + size, top + size))


class ImageNetFolder:
    """The images of ``folder/nXXXXXXXX/*.JPEG`` as (3, size, size) in steps of 1/255, without masks.

    The class index comes from the name of the subfolder, so that any part of the 1,000 classes will do;
    other files and folders beside them are passed over. Images are in the order of folder, then file name;
    ``fit`` says how they are resized. ``name`` is ``nXXXXXXXX/file.JPEG``. With ``limit``, so many of the
    images, evenly spread over all.

    Raises SrdLabError for what is no such folder, and on access for a file that cannot be decoded.
    """

    def __init__(self, folder: str | Path, size: int = 224, *, limit: int | None = None) -> None:
        if size < 1 or (limit is not None and limit < 1):
            raise SrdLabError(f"image size {size} and limit {limit} must be 1 or more")
        self.folder, self.size = Path(folder).expanduser(), size
        images = _images(self.folder)
        if limit is not None and limit < len(images):
            images = [images[k * len(images) // limit] for k in range(limit)]
        self.files = [file for file, _ in images]
        self.classes = class_names()
        self.labels: Tensor = torch.tensor([index for _, index in images])

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"ImageNetFolder({str(self.folder)!r}, size={self.size}, length={len(self)})"

    def __getitem__(self, index: int) -> Sample:
        index = operator.index(index)
        file = self.files[index]
        pixels = np.asarray(fit(_decode(file), self.size), dtype=np.float32) / np.float32(255)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return Sample(image, int(self.labels[index]), None, f"{file.parent.name}/{file.name}")
