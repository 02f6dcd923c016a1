"""Bounding boxes of ImageNet's objects, from its XML annotations or from a table, as masks of stored pixels.

Corners are those of the first and the last pixel inside, counted from 0, in an image of the size that the box
was drawn on. Where the image at hand has another size, the box is scaled with it, and holds the pixels whose
centre lies inside.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from srd_lab.data.pictures import Picture, SkippedFile, complaint
from srd_lab.errors import BadData, SrdLabWarning

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Size = tuple[int, int]  # width, height

FARTHEST = 1e9  # pixels
CORNERS = ("x0", "y0", "x1", "y1")
XML_PLACES = ("Annotations/CLS-LOC/val", "ILSVRC/Annotations/CLS-LOC/val", "Annotations", "boxes")


def boxes_of(root: Path, given: str | Path | None, wnids: tuple[str, ...]) -> XmlBoxes | TableBoxes | None:
    """The boxes for the images in ``root``: a file or folder ``given``, else what lies there; None without any.

    wnids : the WordNet number of every class index.

    Looked for are ``boxes.csv``, then the folders ``XML_PLACES``, in ``root`` and then beside it.

    Raises BadData where what is given is not there, or a table cannot be used.
    """
    if given is None and (root / "boxes.csv").is_dir():
        raise BadData(f"{root / 'boxes.csv'} is a folder; expected a table, so name or move it otherwise")
    if given is not None:
        place = Path(given).expanduser()
        if not place.exists():
            raise BadData(f"there are no boxes at {place}; give a folder of XML files or a boxes.csv")
        return XmlBoxes(place, wnids) if place.is_dir() else TableBoxes(place)
    if (root / "boxes.csv").is_file():
        return TableBoxes(root / "boxes.csv")
    places = [home / place for home in (root, root.parent) for place in XML_PLACES]
    return next((XmlBoxes(place, wnids) for place in places if place.is_dir()), None)


def rasterise(boxes: Iterable[Box], size: Size) -> Image.Image | None:
    """The union of boxes, given by their edges, as a mask (mode L, 255 inside) of this size (width, height); None for
    no boxes.

    Example
    -------
    >>> np.array(rasterise([(1, 0, 3, 1)], (4, 2))).tolist()
    [[0, 255, 255, 0], [0, 0, 0, 0]]
    """
    from PIL import Image

    boxes = list(boxes)
    if not boxes:
        return None
    mask = np.zeros(size[::-1], dtype=np.uint8)
    for box in boxes:
        x0, y0, x1, y1 = (max(0, math.ceil(edge - 0.5)) for edge in box)
        mask[y0:y1, x0:x1] = 255
    return Image.fromarray(mask)


def _edges(box: Box, drawn_on: Size, size: Size) -> Box:
    """The edges, in an image of ``size``, of a box with these corners on an image of another size."""
    x0, y0, x1, y1 = box
    across, down = size[0] / drawn_on[0], size[1] / drawn_on[1]
    return x0 * across, y0 * down, (x1 + 1) * across, (y1 + 1) * down


def _corner(text: str) -> float:
    """The number in ``text``; ValueError for one that is no place in an image."""
    if not math.isfinite(number := float(text)) or abs(number) > FARTHEST:
        raise ValueError(f"a corner at {text[:20]}{'...' * (len(text) > 20)}")
    return number


def warn_of_strangers(boxes: XmlBoxes | TableBoxes, pictures: Iterable[Picture]) -> None:
    """Warn where boxes are there, but not for one of the pictures: they have other names, or are of other images."""
    pictures = list(pictures)
    if any(boxes.has(picture) for picture in pictures):
        return
    named = ", ".join(picture.name for picture in pictures[:3])
    warnings.warn(
        f"the boxes in {boxes.place} are of none of the {len(pictures)} images ({named}{', ...' * (len(pictures) > 3)}), so "
        "that no image has a mask; name the images as they are named here",
        SrdLabWarning,
        stacklevel=4,
    )


class XmlBoxes:
    """``folder/NAME.xml`` or ``folder/nXXXXXXXX/NAME.xml`` for NAME.JPEG, as ImageNet distributes them.

    Called with a picture and its stored size (width, height), it gives the edges of its boxes in stored pixels. An object
    counts where it bears the wnid of the image's label. No file means no box; one that cannot be read raises SkippedFile.

    folder : of the annotations. wnids : the WordNet number of every class index.
    """

    def __init__(self, folder: Path, wnids: tuple[str, ...]) -> None:
        self.folder = self.place = folder
        self.wnids = wnids

    def __call__(self, picture: Picture, size: Size) -> list[Box]:
        wnid, file = self.wnids[picture.label], self._file(picture)
        if file is None:
            return []
        try:
            root = ElementTree.parse(file).getroot()
            drawn_on = int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0"))
            if min(drawn_on) < 0:
                raise ValueError(f"an image of {drawn_on[0]} x {drawn_on[1]} pixels")
            boxes = [
                tuple(_corner(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
                for thing in root.iter("object")
                for box in thing.iter("bndbox")
                if thing.findtext("name", "").strip() == wnid
            ]
        except Exception as error:  # damaged XML fails in many ways
            raise SkippedFile(
                picture.name, f"its boxes {file.name} cannot be read: {complaint(error)}"
            ) from None
        return [_edges(box, drawn_on if all(drawn_on) else size, size) for box in boxes]  # type: ignore[arg-type]

    def _file(self, picture: Picture) -> Path | None:
        wnid, name = self.wnids[picture.label], f"{picture.file.stem}.xml"
        return next((f for f in (self.folder / name, self.folder / wnid / name) if f.is_file()), None)

    def has(self, picture: Picture) -> bool:
        """Whether there is a file for this picture."""
        return self._file(picture) is not None


class TableBoxes:
    """A CSV table with the column ``file`` (as a sample's name), a line per box, and its corners.

    Of these columns, the first that are there: ``x0,y0,x1,y1`` in stored pixels; ``x0_orig,...`` on the original,
    whose ``orig_width`` and ``orig_height`` stand in ``labels.csv`` beside the table; ``x0_227,...`` on a version
    of that side (227 or any other), for images that are stored so.

    Called with a picture and its stored size (width, height), it gives the edges of its boxes in stored pixels.

    Raises BadData for a table that cannot be read, has none of these columns or names no image in a line, and SkippedFile
    when called for an image whose line has no corners, or none that are numbers.
    """

    def __init__(self, file: Path) -> None:
        self.file = self.place = file
        self.rows: dict[str, list[dict[str, str]]] = {}
        for row in read_table(file):
            self.rows.setdefault(row.get("file") or "", []).append(row)
        if "" in self.rows or not self.rows:
            raise BadData(f"{file} names no image in some line; expected columns file, x0, y0, x1, y1")
        columns = next(iter(self.rows.values()))[0]
        if not any(
            column.startswith(f"{CORNERS[0]}_") or column == CORNERS[0] for column in columns if column
        ):
            raise BadData(f"{file} has no corners of boxes; expected columns file, x0, y0, x1, y1")
        labels = file.with_name("labels.csv")
        sizes = read_table(labels) if labels.is_file() else []
        self.originals: Mapping[str, tuple[str, str]] = {
            row["file"]: (row["orig_width"], row["orig_height"])
            for row in sizes
            if row.get("file") and row.get("orig_width") and row.get("orig_height")
        }

    def __call__(self, picture: Picture, size: Size) -> list[Box]:
        return [self._box(row, picture.name, size) for row in self.rows.get(picture.name, [])]

    def _box(self, row: dict[str, str], name: str, size: Size) -> Box:
        original = self.originals.get(name)
        try:
            for suffix, drawn_on in (
                ("", size),
                ("_orig", original),
                (f"_{size[0]}", size if size[0] == size[1] else None),
            ):
                if drawn_on and all(row.get(corner + suffix) for corner in CORNERS):
                    x0, y0, x1, y1 = (_corner(row[corner + suffix]) for corner in CORNERS)
                    width, height = int(drawn_on[0]), int(drawn_on[1])
                    if min(width, height) < 1:
                        raise ValueError(f"an original of {width} x {height} pixels")
                    return _edges((x0, y0, x1, y1), (width, height), size)
        except ValueError as error:
            raise SkippedFile(
                name, f"its box in {self.file.name} cannot be used: {complaint(error)}"
            ) from None
        raise SkippedFile(
            name,
            f"{self.file.name} has no box of it for an image of {size[0]} x {size[1]} pixels",
            "expected columns x0, y0, x1, y1, or x0_orig, ... and the original's size in labels.csv",
        )

    def has(self, picture: Picture) -> bool:
        """Whether there is a line for this picture."""
        return picture.name in self.rows


def read_table(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV file under the names in its first line. Raises BadData where it cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise BadData(f"{file} cannot be read as a table ({complaint(error)}); expected CSV") from None
