"""Any folder with a subfolder of images per class."""

from __future__ import annotations

import warnings

from srd_lab.data.pictures import Picture, PictureFolder, folders_in, images_in, is_hidden, kinds
from srd_lab.errors import BadData, SrdLabWarning


class ImageFolder(PictureFolder):
    """The images of ``imagefolder:DIR``: the classes are the sorted names of its subfolders, without masks.

    Images are what Pillow can open, whatever their extension, and may lie deeper in their subfolder; ``name`` is
    the path below DIR. Hidden folders, what a system or an archiver left behind (``__MACOSX``) and folders without
    images are no classes, and a warning names the latter, since they take no index. Folders that are named by wnid
    are numbered here like any others, 0, 1, 2, ...: for the indices of ImageNet, which its networks need, use
    ``imagenet:DIR``.

    Arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def _find(self) -> list[Picture]:
        root = self.folder
        if not root.is_dir():
            raise BadData(f"{root} is not a folder; give imagefolder:DIR, where DIR holds a folder per class")
        homes = sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
        found = {
            home.name: [
                file for folder in folders_in(home) for file in images_in(folder, root, self.left_out)
            ]
            for home in homes
        }
        self.classes = [name for name, files in found.items() if files]
        if not self.classes:
            raise BadData(
                f"{root} holds no folders with images; expected CLASS/image files such as {kinds()}"
            )
        stray = images_in(
            root, root, {}
        )  # beside class folders other files may lie, such as a list of classes
        self.left_out |= dict.fromkeys((file.name for file in stray), "in no class folder")
        if empty := [name for name, files in found.items() if not files]:
            named = ", ".join(empty[:5] + ["..."] * (len(empty) > 5))
            warnings.warn(
                f"folders without images are no classes and take no index ({len(empty)} of {len(found)}): {named}",
                SrdLabWarning,
                stacklevel=4,
            )
        return [
            Picture(file, label, file.relative_to(root).as_posix())
            for label, name in enumerate(self.classes)
            for file in found[name]
        ]
