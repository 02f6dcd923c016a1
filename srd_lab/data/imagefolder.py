"""Any folder with a subfolder of images per class."""

from __future__ import annotations

from srd_lab.data.pictures import EXTENSIONS, Picture, PictureFolder, images_in
from srd_lab.errors import SrdLabError


class ImageFolder(PictureFolder):
    """The images of ``imagefolder:DIR``: the classes are the sorted names of its subfolders, without masks.

    Images may lie deeper in their subfolder; ``name`` is the path below DIR. A subfolder without images keeps
    its class index. Folders that are named by wnid are numbered here like any others, 0, 1, 2, ...: for the
    indices of ImageNet, which its networks need, use ``imagenet:DIR``.
    """

    def _find(self) -> list[Picture]:
        root = self.folder
        if not root.is_dir():
            raise SrdLabError(
                f"{root} is not a folder; give imagefolder:DIR, where DIR holds a folder per class"
            )
        homes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = [home.name for home in homes]
        found = [
            Picture(file, label, file.relative_to(root).as_posix())
            for label, home in enumerate(homes)
            for folder in sorted([home, *(path for path in home.rglob("*") if path.is_dir())])
            for file in images_in(folder)
        ]
        if not found:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise SrdLabError(
                f"{root} holds no folders with images; expected CLASS/image files that end in {kinds}"
            )
        return found
