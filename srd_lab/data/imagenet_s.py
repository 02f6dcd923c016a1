"""ImageNet-S (Gao et al. 2022, https://arxiv.org/abs/2106.03149): ImageNet's validation images with exact masks.

``DIR/validation/nXXXXXXXX/NAME.JPEG`` has its mask in ``DIR/validation-segmentation/nXXXXXXXX/NAME.png``, as the
authors' scripts lay them out for each of the variants with 50, 300 and 919 categories. A pixel of a mask is of
category R + 256 G: 0 is everything else, 1000 is to be ignored, and 1, 2, ... are the wnids of the variant,
sorted. The folder tells an image's category: in one image of eight it is not ImageNet's own label, but what the
authors annotated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from srd_lab.data.imagenet import class_names, pictures_by_wnid, wnid_folders, wnids
from srd_lab.data.pictures import Picture, PictureFolder, SkippedFile, decode_mask
from srd_lab.errors import BadData

if TYPE_CHECKING:
    from PIL import Image

IMAGES, MASKS = "validation", "validation-segmentation"
VARIANTS = (50, 300, 919)
CATEGORIES = "ImageNetS_categories_im*.txt"
IGNORED = 1000


class ImageNetS(PictureFolder):
    """The images of ``imagenet-s:DIR`` with ImageNet's class indices; the mask holds the image's own category.

    Ignored pixels are outside of the mask. In a part of a variant the categories cannot be counted: there the
    authors' list of its wnids (``ImageNetS_categories_im50.txt``, say) must lie in DIR. An image without a
    readable mask of its own size is skipped.

    Arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def _find(self) -> list[Picture]:
        home = self.folder / IMAGES
        for folder in (home, self.folder / MASKS):
            if not folder.is_dir():
                raise BadData(
                    f"{folder} is not a folder; give imagenet-s:DIR, where DIR holds {IMAGES} and {MASKS}"
                )
        folders = wnid_folders(home)
        pictures = pictures_by_wnid(home, folders, self.left_out)
        self.categories = self._categories([folder.name for folder in folders])
        self.classes = class_names()
        return pictures

    def _categories(self, present: list[str]) -> list[str]:
        """The wnids of categories 1, 2, ..."""
        lists = sorted(self.folder.glob(CATEGORIES))
        if lists:
            listed = sorted(
                set(re.findall(r"n\d{8}", lists[0].read_text(encoding="utf-8", errors="replace")))
            )
            unlisted = sorted(set(present) - set(listed))
            if unlisted:
                raise BadData(
                    f"{lists[0]} does not list {unlisted[0]}, of which there are images; bring the variant's list"
                )
            return listed
        if len(present) not in VARIANTS:
            raise BadData(
                f"{self.folder / IMAGES} holds {len(present)} class folders, and not the {VARIANTS[0]}, {VARIANTS[1]} "
                f"or {VARIANTS[2]} of a variant; put the variant's {CATEGORIES} into {self.folder}"
            )
        return present

    def _mask(self, picture: Picture, size: tuple[int, int]) -> Image.Image:
        from PIL import Image

        wnid = wnids()[picture.label]
        file = self.folder / MASKS / wnid / f"{picture.file.stem}.png"
        mask = decode_mask(file, picture.name)
        if mask.mode not in ("RGB", "RGBA"):
            raise SkippedFile(picture.name, f"its mask {file.name} is not RGB but {mask.mode}")
        colours = np.asarray(mask).astype(np.uint16)
        category = colours[..., 0] + 256 * colours[..., 1]
        unknown = category[(category > len(self.categories)) & (category != IGNORED)]
        if unknown.size:
            raise SkippedFile(
                picture.name, f"its mask has category {unknown[0]}, of {len(self.categories)} in this variant"
            )
        return Image.fromarray((category == 1 + self.categories.index(wnid)).astype(np.uint8))
