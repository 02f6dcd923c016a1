"""Image files that a table names, and a folder of them without any labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_lab.data.boxes import Box, Size, rasterise, read_table
from srd_lab.data.pictures import Picture, PictureFolder, folders_in, images_in, kinds
from srd_lab.errors import BadData

if TYPE_CHECKING:
    from PIL import Image

CORNERS = ("x0", "y0", "x1", "y1")


class Pictures(PictureFolder):
    """The images of ``pictures:DIR``, in DIR and below, without labels: the predicted class is explained.

    Images are what Pillow can open; ``name`` is the path below DIR. Arguments and errors are those of
    :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def _find(self) -> list[Picture]:
        root = self.folder
        if not root.is_dir():
            raise BadData(f"{root} is not a folder; give pictures:DIR, where DIR holds image files")
        self.classes = []
        files = [file for folder in folders_in(root) for file in images_in(folder, root, self.left_out)]
        if not files:
            raise BadData(f"{root} holds no images; expected files such as {kinds()}")
        return [Picture(file, -1, file.relative_to(root).as_posix()) for file in files]


class Table(PictureFolder):
    """The images of ``table:FILE``, a CSV file with the columns ``path`` (below the file's folder) and, as far as there are
    any, ``label`` and ``x0, y0, x1, y1``, the corners of a box in stored pixels, both ends included; an image with several
    boxes has a line for each.

    Labels are class indices, or names, which are numbered in their sorted order; without the column the predicted class is
    explained. Arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def __init__(self, file: str | Path, size: int = 224, **options: Any) -> None:
        self.file = Path(file).expanduser()
        self._boxes: dict[str, list[Box]] = {}
        super().__init__(self.file.parent, size, **options)

    def _find(self) -> list[Picture]:
        if not self.file.is_file():
            raise BadData(f"there is no table {self.file}; give table:FILE, a CSV file with a column path")
        rows = read_table(self.file)
        if not rows or not rows[0].get("path"):
            raise BadData(
                f"{self.file} has no column path with a file in its first line; expected path,label,x0,y0,x1,y1"
            )
        labels: dict[str, str] = {}
        for line, row in enumerate(rows, 2):
            path, label = row.get("path") or "", row.get("label") or ""
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise BadData(f"{self.file}, line {line}: {path!r:.80} is no path below the table's folder")
            if labels.setdefault(path, label) != label:
                raise BadData(
                    f"{self.file}, line {line}: {path!r:.80} has two labels, {labels[path]!r:.40} and {label!r:.40}"
                )
            if any(row.get(corner) for corner in CORNERS):
                self._boxes.setdefault(path, []).append(self._box(row, line))
        indices = self._indices(list(labels.values()))
        return [Picture(self.folder / path, index, path) for path, index in zip(labels, indices, strict=True)]

    def _box(self, row: dict[str, str], line: int) -> Box:
        try:
            x0, y0, x1, y1 = (float(row[corner]) for corner in CORNERS)
        except (KeyError, TypeError, ValueError):
            x0, y0, x1, y1 = 0.0, 0.0, -1.0, -1.0
        if not (0 <= x0 <= x1 < 1e6 and 0 <= y0 <= y1 < 1e6):
            raise BadData(f"{self.file}, line {line}: the corners x0, y0, x1, y1 are no box")
        return x0, y0, x1 + 1, y1 + 1

    def _indices(self, labels: list[str]) -> list[int]:
        """Class indices of these labels; on the way ``self.classes``, none where they are not known."""
        self.classes = []
        if not any(labels):
            return [-1] * len(labels)
        if not all(labels):
            raise BadData(
                f"{self.file}: some files have a label and {labels.count('')} have none; give all or none"
            )
        if all(label.isdecimal() and len(label) < 7 for label in labels):
            return [int(label) for label in labels]
        self.classes = sorted(set(labels))
        return [self.classes.index(label) for label in labels]

    def _mask(self, picture: Picture, size: Size) -> Image.Image | None:
        return rasterise(self._boxes.get(picture.name, []), size)
