"""Shards of webdataset: tar files in which an image and its class stand side by side.

``wds:photos/train-{000..009}.tar`` (braces and ``*``; in quotes, as a shell would expand them). Files that follow each other
and are called alike up to the first dot are one item: ``0017.jpg`` and ``0017.cls``, which holds a class index as text.
Without any ``.cls`` the predicted class is explained. ``?image=EXT&label=EXT`` names other extensions, ``seg.png`` say.

Shards are read by the standard library, and not by the webdataset package: that reads them from end to end, while every
study here draws images by index; and its addresses may be commands (``pipe:``), while these are files. The headers are read
once, and an image where it lies.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from srd_lab.data.pictures import EXTENSIONS, Picture, PictureFolder, SkippedFile, is_hidden
from srd_lab.errors import BadData, BadValue, first_line
from srd_lab.parts import split_options

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class _Member(Picture):
    """An image in a tar file, its first byte there, and how many it has."""

    start: int
    length: int


class Shards(PictureFolder):
    """The images of ``wds:PATTERN``; ``name`` is that of the shard and the item's in it.

    pattern : as above. Other arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`; items without
    an image or with a class that is no index are left out by name, as is the rest of a shard that is damaged.
    """

    def __init__(self, pattern: str, size: int = 224, **options: Any) -> None:
        place, given = split_options(pattern)
        if unknown := [name for name in given if name not in ("image", "label")]:
            raise BadValue(f"wds:{pattern} has no option {unknown[0]!r}; expected image=EXT or label=EXT")
        self.shards = shards_of(place)
        self._image = str(given.get("image", "")).lstrip(".").lower()
        self._label = str(given.get("label", "cls")).lstrip(".").lower()
        super().__init__(os.path.commonpath([shard.parent for shard in self.shards]), size, **options)

    def _find(self) -> list[Picture]:
        self.classes = []
        found = [item for shard in self.shards for item in self._items(shard)]
        if not found:
            left_out = [f"{name} ({why})" for name, why in self.left_out.items()]
            raise BadData(
                f"{', '.join(map(str, self.shards[:3]))}: no images; expected items such as 0.jpg and 0.cls"
                + (f"; left out: {left_out[0]}" if left_out else "")
            )
        labelled = sum(label is not None for _, label in found)
        pictures: list[Picture] = []
        for member, label in found:
            if label is None and labelled:
                self.left_out[member.name] = f"it has no .{self._label}"
            else:
                pictures.append(member if label is None else replace(member, label=label))
        return pictures

    def _items(self, shard: Path) -> Iterator[tuple[_Member, int | None]]:
        """The images of a shard with their classes, None where an item has none."""
        home = shard.relative_to(self.folder).as_posix()
        item: dict[str, tarfile.TarInfo] = {}
        key = ""
        with shard.open("rb") as stream:
            for member in self._members(shard, stream, home):
                own, _, extension = member.name.rpartition("/")[2].partition(".")
                own = member.name[: len(member.name) - len(extension) - 1] if extension else member.name
                if own != key or extension.lower() in item:
                    yield from self._item(f"{home}/{key}", shard, stream, item)
                    key, item = own, {}
                item[extension.lower()] = member
            yield from self._item(f"{home}/{key}", shard, stream, item)

    def _members(self, shard: Path, stream: IO[bytes], home: str) -> Iterator[tarfile.TarInfo]:
        """The files in a shard, in their order, as far as it can be read."""
        try:
            end = shard.stat().st_size
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                    hidden = any(map(is_hidden, member.name.split("/")))
                    if member.isreg() and not member.issparse() and not hidden:
                        if member.offset_data + member.size > end:
                            raise tarfile.ReadError("its end is missing")
                        yield member
                stream.seek(tar.offset)
                if stream.read(1 << 16).strip(b"\0"):  # where tarfile stops without a word
                    raise tarfile.ReadError(f"what follows byte {tar.offset} cannot be read")
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            packed = (
                ", or it is compressed: unpack it, shard.tar.gz say, to shard.tar" if _packed(shard) else ""
            )
            self.left_out[home] = f"damaged, or no tar file: {first_line(error)}{packed}"

    def _item(
        self, name: str, shard: Path, stream: IO[bytes], files: dict[str, tarfile.TarInfo]
    ) -> Iterator[tuple[_Member, int | None]]:
        """One item, if it has an image; what else it lacks is said."""
        images = [e for e in files if (e == self._image if self._image else f".{e}" in EXTENSIONS)]
        if len(images) > 1:
            raise BadData(
                f"{name} has several images, .{' and .'.join(images)}; say which: ?image={images[0]}"
            )
        if not images:
            if files:
                self.left_out[name] = f"it has no image, but .{', .'.join(files)}"
            return
        image, label = files[images[0]], None
        if (written := files.get(self._label)) is not None:
            here = stream.tell()
            stream.seek(written.offset_data)
            text = stream.read(min(written.size, 32)).decode("ascii", "replace").strip()
            stream.seek(here)
            if not text.isdecimal() or len(text) > 6:
                self.left_out[name] = f"its .{self._label} is no class index: {text!r}"
                return
            label = int(text)
        yield _Member(shard, -1, name, image.offset_data, image.size), label

    def _open(self, picture: Picture) -> IO[bytes]:
        assert isinstance(picture, _Member)
        try:
            with picture.file.open("rb") as stream:
                stream.seek(picture.start)
                return io.BytesIO(stream.read(picture.length))
        except OSError as error:
            raise SkippedFile(picture.name, f"its shard cannot be read: {error.strerror}") from None


def _packed(shard: Path) -> bool:
    with shard.open("rb") as stream:
        return stream.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def shards_of(pattern: str) -> list[Path]:
    """The files of a pattern, in its order; those of a ``*`` sorted.

    Raises BadData where one is not there.

    Example
    -------
    >>> shards_of("wherever/{a,b}-{08..10}.tar")
    Traceback (most recent call last):
    ...
    srd_lab.errors.BadData: there is no shard wherever/a-08.tar; expected files, as in wds:train-{000..009}.tar
    """
    found: list[Path] = []
    for text in _expanded(str(Path(pattern).expanduser()) if pattern else ""):
        files = sorted(map(Path, glob.glob(text))) if "*" in text else [Path(text)]
        missing = not files or not files[0].is_file()
        if missing or len(found) > MOST_SHARDS:
            what = (
                f"there is no shard {text}"
                if missing
                else f"{pattern} stands for more than {MOST_SHARDS} files"
            )
            raise BadData(f"{what}; expected files, as in wds:train-{{000..009}}.tar")
        found += files
    return [file.absolute() for file in found]


def _expanded(pattern: str) -> Iterator[str]:
    """What a shell makes of braces: ``a{1,2}`` gives a1 and a2, ``{08..10}`` 08, 09 and 10."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(braces[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        words: Any = (f"{n:0{width}d}" for n in range(first, last + 1))
    else:
        words = braces[1].split(",")
    for word in words:
        yield from _expanded(pattern[: braces.start()] + word + pattern[braces.end() :])
