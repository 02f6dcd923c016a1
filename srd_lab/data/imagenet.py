"""ImageNet as it lies on disk: folders named by WordNet number (``n01440764``), or one flat validation folder.

The images are looked for in DIR, then in the places ``PLACES`` below it. In a flat folder the labels come from
a file beside the images, in DIR or beside DIR, or in the ``data`` folder of the development kit there; of these,
the first that is found:

``labels.csv``
    columns ``file``, and ``wnid`` or ``class_index`` or both.
``LOC_val_solution.csv``
    Kaggle's: ``ImageId``, and ``PredictionString``, which starts with the wnid.
``val.txt``, ``val_annotations.txt``
    ``file wnid`` or ``file class_index`` in every line.
``ILSVRC2012_validation_ground_truth.txt``
    one number for each of the 50,000 images, in an order of its own, which only ``meta.mat`` beside it explains.

A class index is 0..999 in the alphabetical order of the wnids, everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_lab.data.boxes import boxes_of, rasterise, read_table, warn_of_strangers
from srd_lab.data.pictures import Picture, PictureFolder, complaint, images_in, kinds
from srd_lab.errors import BadData

if TYPE_CHECKING:
    from PIL import Image

PLACES = ("", "val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val")
DEVKITS = ("", "data", "ILSVRC2012_devkit_t12/data")


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet numbers of ILSVRC 2012 in the order of the class indices, which is alphabetical."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii").split())


@cache
def index_of() -> dict[str, int]:
    """The class index of every wnid."""
    return {wnid: index for index, wnid in enumerate(wnids())}


def class_names() -> list[str]:
    """The 1,000 English names in the order of the class indices, as torchvision's weights carry them."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


# --- folders by wnid --------------------------------------------------------------------------------------


def wnid_folders(home: Path) -> list[Path]:
    """The class folders directly in ``home``, sorted, maybe none. Raises BadData for one that is none of the 1,000."""
    folders = sorted(path for path in home.iterdir() if re.fullmatch(r"n\d{8}", path.name) and path.is_dir())
    strange = [folder.name for folder in folders if folder.name not in index_of()]
    if strange:
        raise BadData(
            f"{home / strange[0]} is none of the 1,000 classes of ILSVRC 2012 ({len(strange)} such in all); "
            "move these folders elsewhere"
        )
    return folders


def pictures_by_wnid(home: Path, folders: Iterable[Path], left_out: dict[str, str]) -> list[Picture]:
    """The images in class folders, by folder, then file name, with the class indices of ImageNet.

    home : what paths of files that are left out are relative to. folders : named by wnid.
    left_out : is given the files that are no images, see :func:`srd_lab.data.pictures.images_in`.

    Raises BadData where there is no image at all.
    """
    found = [
        Picture(file, index_of()[folder.name], f"{folder.name}/{file.name}")
        for folder in folders
        for file in images_in(folder, home, left_out)
    ]
    if not found:
        raise BadData(f"the class folders in {home} hold no images; expected files such as {kinds()}")
    return found


def _check(pictures: Iterable[Picture], home: Path, root: Path) -> None:
    """Refuses a ``labels.csv`` beside the class folders that says otherwise than they do."""
    file = next((place / "labels.csv" for place in (home, root) if (place / "labels.csv").is_file()), None)
    if file is None:
        return
    labels = _collect(file, _table(file))
    for picture in pictures:
        label = _look_up(labels, picture.file, picture.name)
        if label not in (None, picture.label):
            raise BadData(
                f"{picture.name} lies in the folder of class {picture.label}, but {file} gives it class {label}; "
                "mend the one that is wrong"
            )


# --- label files: pairs of an image and its class, which is a wnid or an index ----------------------------

Pairs = Iterator[tuple[str, str]]


def _table(file: Path) -> Pairs:
    for row in read_table(file):
        for column in ("wnid", "class_index"):
            if row.get("file") and row.get(column):
                yield row["file"], row[column]


def _kaggle(file: Path) -> Pairs:
    for row in read_table(file):
        if row.get("ImageId") and row.get("PredictionString"):
            yield row["ImageId"], row["PredictionString"].split()[0]


def _lines(file: Path) -> Pairs:
    for line in _read(file).splitlines():
        name, found, *_ = [*line.split(), "", ""]
        if name:
            yield name, found


def _ground_truth(file: Path) -> Pairs:
    wnid_of = _synsets(file.with_name("meta.mat"))
    for number, line in enumerate(_read(file).split(), start=1):
        yield f"ILSVRC2012_val_{number:08d}", wnid_of.get(line, f"number {line}")


LABEL_FILES: dict[str, Callable[[Path], Pairs]] = {
    "labels.csv": _table,
    "LOC_val_solution.csv": _kaggle,
    "val.txt": _lines,
    "val_annotations.txt": _lines,
    "ILSVRC2012_validation_ground_truth.txt": _ground_truth,
}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadData(f"{file} cannot be read ({complaint(error)}); expected lines of text") from None


def _synsets(meta: Path) -> dict[str, str]:
    """The wnid of every number that the ground truth of the development kit uses."""
    from scipy.io import loadmat

    if not meta.is_file():
        raise BadData(
            f"the labels are numbers of the development kit, which {meta} would explain, but it is not there; "
            "bring it from the same kit, or a labels.csv with file and wnid"
        )
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # SciPy's reader lets through whatever it stumbles over
        raise BadData(
            f"{meta} cannot be read ({complaint(error)}); bring the meta.mat of the ILSVRC 2012 development kit"
        ) from None


def _collect(file: Path, pairs: Pairs) -> dict[str, int]:
    """The class index of every image that ``file`` names; BadData for what is no class, or two at once."""
    labels: dict[str, int] = {}
    for name, found in pairs:
        label = int(found) if found.isdecimal() and len(found) < 10 else index_of().get(found, -1)
        if not 0 <= label < len(wnids()):
            raise BadData(
                f"{file} gives {name} the class {found[:20]!r}; expected a wnid of ILSVRC 2012, or an index in 0..999"
            )
        if labels.setdefault(name, label) != label:
            raise BadData(f"{file} gives {name} two classes, {labels[name]} and {label}; mend it")
    return labels


def _look_up(labels: dict[str, int], file: Path, name: str) -> int | None:
    """The label of an image, which a label file may name with its folder, without, or without its extension."""
    return next((labels[key] for key in (name, file.name, file.stem) if key in labels), None)


# --- one flat folder --------------------------------------------------------------------------------------


def _flat_pictures(home: Path, root: Path, files: list[Path]) -> list[Picture]:
    source = _label_file(home, root)
    labels = _collect(source, LABEL_FILES[source.name](source))
    found = [(file, _look_up(labels, file, file.name)) for file in files]
    bare = [file.name for file, label in found if label is None]
    if bare:
        raise BadData(f"{source} has no label for {bare[0]} ({len(bare)} such images); complete it")
    return [Picture(file, label, file.name) for file, label in found if label is not None]


def _label_file(home: Path, root: Path) -> Path:
    places = [place / kit for place in (home, root, root.parent) for kit in DEVKITS]
    for name in LABEL_FILES:
        for place in places:
            if (place / name).is_file():
                return place / name
    raise BadData(f"{home} holds images but no labels; put one of {', '.join(LABEL_FILES)} beside them")


class ImageNetFolder(PictureFolder):
    """The images of ``imagenet:DIR`` with ImageNet's class indices and, where there are boxes, masks.

    In class folders the label comes from the name of the folder, so that any part of the 1,000 classes will do;
    files and folders beside them are passed over, but for a ``labels.csv`` that contradicts them, which
    is refused. Images are in the order of folder, then file name; ``name`` is ``nXXXXXXXX/file.JPEG``, in a flat
    folder ``file.JPEG``.

    boxes : a folder of XML annotations or a table, if it is not where ``boxes.boxes_of`` finds it; the mask is the union of
        an image's boxes, None where it has none.

    The other arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int = 224,
        *,
        boxes: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(folder, size, **options)
        self.boxes = boxes_of(self.folder, boxes, wnids())
        if self.boxes is not None:
            warn_of_strangers(self.boxes, self.pictures)

    def _find(self) -> list[Picture]:
        root = self.folder
        if not root.is_dir():
            raise BadData(
                f"{root} is not a folder; give imagenet:DIR, where DIR holds folders like n01440764"
            )
        self.classes = class_names()
        homes = [root / place for place in PLACES if (root / place).is_dir()]
        for home in homes:
            if folders := wnid_folders(home):
                pictures = pictures_by_wnid(home, folders, self.left_out)
                _check(pictures, home, root)
                return pictures
        for home in homes:
            if files := images_in(home, home, {}):  # beside them lie label files
                return _flat_pictures(home, root, files)
        raise BadData(
            f"{root} holds no class folders; expected folders named like n01440764, or images with a label file"
        )

    def _mask(self, picture: Picture, size: tuple[int, int]) -> Image.Image | None:
        return rasterise(self.boxes(picture, size), size) if self.boxes else None
