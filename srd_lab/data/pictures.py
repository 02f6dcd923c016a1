"""Image files as square pictures, with a mask that goes the same way, and the files that are left out by name."""

from __future__ import annotations

import operator
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from srd_lab.errors import BadData, BadValue, SrdLabWarning, first_line
from srd_lab.types import Sample

if TYPE_CHECKING:
    from PIL import Image

# What is called so is taken for an image without a look into it, and named if it turns out to be none.
EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
}
# What systems and archivers leave behind, besides names that start with a dot.
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
# What is decoded, whatever a file is called: Pillow knows more, some of which it has other programs draw.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000"),
    *("BMP", "DIB", "PPM", "TGA", "PCX", "SGI", "ICO", "QOI"),
)
MOST_PIXELS = 89_000_000  # of an image as it is stored, and as resizing makes it; Pillow warns above that
NON_RGB = ("skip", "convert")
ORIENTATION = 0x0112  # of EXIF, and what undoes it
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

Item = TypeVar("Item")


class SkippedFile(BadData):
    """A sample that cannot be used, by its ``name``, and the ``reason``; the other samples of its data set can."""

    def __init__(self, name: str, reason: str, cure: str = "replace or remove the file") -> None:
        super().__init__(name, reason, cure)  # the arguments again, so that it crosses between processes
        self.name, self.reason, self.cure = name, reason, cure

    def __str__(self) -> str:
        return f"{self.name} cannot be used: {self.reason}; {self.cure}"


# --- one picture ------------------------------------------------------------------------------------------


def decode(
    source: Path | IO[bytes], name: str, non_rgb: str = "skip", side: int | None = None, crop: float = 0.875
) -> tuple[Image.Image, int]:
    """The image in RGB as it is stored, and its EXIF orientation, which :func:`upright` takes.

    source : a file, or an open one. name : what the sample is called in errors.
    side : in pixels, of the square that :func:`fit` is to make of it with this ``crop``; None for none.
    non_rgb : "skip" refuses all but 8-bit RGB: grey, palette, CMYK, transparency, 16 bits; "convert" makes RGB of these, as
        torchvision does.

    Raises SkippedFile for what cannot be decoded or is refused, and for images of too many pixels.
    """
    try:
        with _opened(source) as image:
            _check_pixels(image.size, side, crop)
            strange = _strangeness(image)
            if strange and non_rgb == "skip":
                raise SkippedFile(name, strange, 'replace the file, or give non_rgb="convert" for all such')
            return _eight_bits(image).convert("RGB"), image.getexif().get(ORIENTATION, 1)
    except (SkippedFile, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders let through whatever they stumble over
        raise SkippedFile(name, f"cannot be decoded: {complaint(error)}") from None


def _opened(source: Path | IO[bytes]) -> Image.Image:
    """The image with its header read; ValueError for what is no regular file, UnidentifiedImageError for no image."""
    from PIL import Image

    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("it is no regular file")  # a pipe would never end
    Image.init()
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def _check_pixels(stored: tuple[int, int], side: int | None, crop: float = 0.875) -> None:
    """ValueError for an image of too many pixels, as it is or once it is resized for a square of this side."""
    if stored[0] * stored[1] > MOST_PIXELS:
        raise ValueError(f"{stored[0]} x {stored[1]} pixels; at most {MOST_PIXELS} in all are read")
    width, height = (side and _resized(stored, side, crop)) or stored
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{stored[0]} x {stored[1]} pixels, of which resizing makes {width} x {height}; at most {MOST_PIXELS} are made"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as 8, which Pillow would cut off at white; other numbers have no known range."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("pixels of floating point, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _strangeness(image: Image.Image) -> str:
    """What keeps an opened image from being 8-bit RGB; empty where nothing does."""
    if image.mode != "RGB":
        return f"not RGB but {image.mode}"
    # Pillow calls 16 bits per channel RGB as well, and drops the lower half.
    return "16 bits per channel" if any(map(_is_deep, getattr(image, "tile", ()))) else ""


def _is_deep(tile: Any) -> bool:
    """Whether a tile of Pillow's (decoder, place, offset, arguments) holds 16 bits per channel."""
    decoder, arguments = tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    if decoder in ("ppm", "ppm_plain"):
        return int(arguments[1]) > 255  # the largest value
    # Only the stored mode counts: numbers behind it are widths and offsets. "BGR;16" is 16 bits per pixel.
    return decoder == "SGI16" or re.search(r";16[A-Z]", str(arguments[0])) is not None


def complaint(error: Exception) -> str:
    """The first line of an error; without the path, which its reader knows."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def decode_mask(file: Path, name: str) -> Image.Image:
    """The image ``file`` in its own mode. Raises SkippedFile, for the sample ``name``, if it cannot be read."""
    try:
        with _opened(file) as mask:
            _check_pixels(mask.size, None)
            mask.load()
            return mask
    except MemoryError:
        raise
    except Exception as error:
        raise SkippedFile(name, f"its mask {file.name} cannot be read: {complaint(error)}") from None


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` turned or mirrored as its EXIF ``orientation`` asks: 2 to 8, anything else leaves it as it is."""
    from PIL import Image

    turn = TURNS.get(orientation)
    return image.transpose(Image.Transpose[turn]) if turn else image


def fit(
    image: Image.Image, size: int, *, crop: float = 0.875, interpolation: str = "bilinear", mask: bool = False
) -> Image.Image:
    """``image`` as a ``size`` x ``size`` square, the usual way for ImageNet.

    size : side in pixels. crop, interpolation : see :class:`srd_lab.types.Preprocessing`.
    mask : whether each pixel takes the value of the one pixel that its centre falls into.

    The shorter side is resized to ``size / crop`` (with antialiasing), then the centre is cut out. An image that is square
    already, with a side between ``size`` and that, is only cropped: it has been through a resize before (a set stored at
    227 x 227, say), and a second one would blur it.
    """
    from PIL import Image

    shape = _resized(image.size, size, crop)
    if shape is not None:
        image = image.resize(shape, Image.Resampling["NEAREST" if mask else interpolation.upper()])
        left, top = (round((side - size) / 2) for side in shape)  # as torchvision's CenterCrop
    else:
        left = top = (image.width - size) // 2  # as Caffe, whose convention such sets follow
    return image.crop((left, top, left + size, top + size))


def _resized(stored: tuple[int, int], size: int, crop: float) -> tuple[int, int] | None:
    """Width and height that :func:`fit` resizes an image of these sides to, for a square of ``size``; None = not at all."""
    shorter, (width, height) = round(size / crop), stored
    if width == height and size <= width <= shorter:
        return None
    scale = shorter / min(stored)
    return max(shorter, int(width * scale)), max(shorter, int(height * scale))


# --- a set of them ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file, its class index, and what its data set calls it."""

    file: Path
    label: int
    name: str


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's making: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def folders_in(home: Path) -> list[Path]:
    """``home`` and all folders below it, sorted, without hidden ones and what lies in them."""
    below = (path for path in home.rglob("*") if path.is_dir())
    return sorted([home, *(path for path in below if not any(map(is_hidden, path.relative_to(home).parts)))])


def images_in(folder: Path, root: Path, left_out: dict[str, str]) -> list[Path]:
    """The image files directly in ``folder``, sorted, without hidden ones.

    left_out : is given the files that are no images, by their path below ``root``, and why.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not is_hidden(entry.name) and not entry.is_dir())
    found = []
    for file in (folder / name for name in names):
        if file.suffix.lower() in EXTENSIONS or _is_image(file):
            found.append(file)
        else:
            left_out[file.relative_to(root).as_posix()] = "no image"
    return found


def _is_image(file: Path) -> bool:
    """Whether Pillow knows the content of ``file``, whatever it is called."""
    try:
        with _opened(file):
            return True
    except Exception:  # as in ``decode``
        return False


def skipped_report(skipped: dict[str, str], shown: int = 5) -> str:
    """One line: ``2 files skipped: a.JPEG (not RGB but L), b.JPEG (cannot be decoded: ...)``.

    skipped : name -> reason. shown : how many are named, the first ones.
    """
    named = [f"{name} ({reason})" for name, reason in list(skipped.items())[:shown]]
    more = ["..."] if len(skipped) > shown else []
    what = f"{len(skipped)} file{'' if len(skipped) == 1 else 's'} skipped"
    return f"{what}: {', '.join(named + more)}" if skipped else what


def spread(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """``limit`` of the items, evenly spread over all; all where there are no more, or for None.

    Example
    -------
    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    if limit is None or limit >= len(items):
        return items
    return [items[k * len(items) // limit] for k in range(limit)]


def kinds() -> str:
    """The usual extensions, for a message."""
    return ", ".join(sorted(EXTENSIONS))


class PictureFolder(ABC):
    """Image files as (3, size, size) in steps of 1/255; a subclass per source says which, and has their masks.

    folder : of the source. size : side in pixels, >= 1. crop, interpolation : how files are resized, see :func:`fit`.
    limit : so many of the files, >= 1, evenly spread over all; None = all.
    non_rgb : "skip" raises SkippedFile on access to files that are not 8-bit RGB, "convert" makes RGB of them.

    EXIF orientation is applied to the image and to its mask, which is given for the pixels as stored. A mask may be all
    False where the crop leaves nothing of the object. Attributes: ``pictures``, the files; ``labels`` (len,) int64, their
    class indices; ``left_out``, files among them that are no images, name -> reason, which a warning says too.

    Raises BadValue for a size, limit or ``non_rgb`` out of range, BadData for what is no such folder, and SkippedFile on
    access for a file that cannot be decoded or is refused.
    """

    classes: list[str]

    def __init__(
        self,
        folder: str | Path,
        size: int = 224,
        *,
        crop: float = 0.875,
        interpolation: str = "bilinear",
        limit: int | None = None,
        non_rgb: str = "skip",
    ) -> None:
        if size < 1 or (limit is not None and limit < 1):
            raise BadValue(f"image size {size} and limit {limit} must be 1 or more")
        if non_rgb not in NON_RGB:
            raise BadValue(f"files that are not RGB cannot be {non_rgb!r}; choose {' or '.join(NON_RGB)}")
        self.folder, self.size, self.non_rgb = Path(folder).expanduser(), size, non_rgb
        self.crop, self.interpolation = crop, interpolation
        self.left_out: dict[str, str] = {}
        self.pictures = spread(self._find(), limit)
        if self.left_out:
            warnings.warn(skipped_report(self.left_out), SrdLabWarning, stacklevel=3)
        self.labels: Tensor = torch.tensor([picture.label for picture in self.pictures])

    @abstractmethod
    def _find(self) -> list[Picture]:
        """All pictures in ``self.folder``, at least one; on the way ``self.classes`` and ``self.left_out``."""

    def _open(self, picture: Picture) -> Path | IO[bytes]:
        """What holds the encoded image: its file, or an open one where it is a part of another."""
        return picture.file

    def _mask(self, picture: Picture, size: tuple[int, int]) -> Image.Image | None:
        """Mask of the object in stored pixels, of this (width, height), mode L, 0 outside; None without any."""
        return None

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, size={self.size}, length={len(self)})"

    def name(self, index: int) -> str:
        """The file's name as the source gives it, without reading the file."""
        return self.pictures[operator.index(index)].name

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[operator.index(index)]
        image, orientation = decode(self._open(picture), picture.name, self.non_rgb, self.size, self.crop)
        mask = self._mask(picture, image.size)
        square = fit(upright(image, orientation), self.size, crop=self.crop, interpolation=self.interpolation)
        pixels = np.array(square)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        if mask is None:
            return Sample(tensor, picture.label, None, picture.name)
        if mask.size != image.size:
            sizes = (f"{width} x {height}" for width, height in (mask.size, image.size))
            raise SkippedFile(picture.name, "its mask has {} pixels, the image {}".format(*sizes))
        covered = np.array(fit(upright(mask, orientation), self.size, crop=self.crop, mask=True)) > 0
        return Sample(tensor, picture.label, torch.from_numpy(covered), picture.name)
