"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files of their archives, packed or not, or from an .npz.

The archives ``cifar-10-python.tar.gz`` and ``cifar-100-python.tar.gz`` hold pickles, which can run any code when
they are loaded. Here they run none: all that they may name is replaced by stand-ins (``_STAND_INS``), and what
names anything else is refused.

An .npz holds 8-bit pixels (N, 32, 32, 3), (N, 3, 32, 32) or (N, 3072), the latter as in the archives: all red
ones, then green, then blue. The arrays are called ``test_images`` and ``test_labels``, ``x_test`` and ``y_test``
and so on, and ``train`` likewise; ``images`` and ``labels`` in a file of one split, which its name may tell
(``train_jpeg.npz``). In place of images there may be ``jpeg``, files back to back, and ``offsets`` (N + 1): image i
is ``jpeg[offsets[i]:offsets[i + 1]]``. ``classes`` are the names, where given.
"""

from __future__ import annotations

import io
import operator
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from srd_lab.data.pictures import NON_RGB, SkippedFile, complaint, decode, spread
from srd_lab.errors import BadData, BadValue
from srd_lab.types import Sample

SIZE = 32
SPLITS = ("train", "test")
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """How an archive is laid out.

    count : number of classes.
    folders : where the files may lie below the given path.
    batches : split -> its files, which end in .bin in the binary version.
    meta, text : the file of class names in the Python and in the binary version.
    labels, names : the keys of labels and class names in the Python version.
    head : bytes before the pixels of a record in the binary version, of which the last is the label.
    """

    count: int
    folders: tuple[str, ...]
    batches: Mapping[str, tuple[str, ...]]
    meta: str
    text: str
    labels: str
    names: str
    head: int

    def default_classes(self) -> list[str]:
        """The names of CIFAR-10; numbers where the names of CIFAR-100 are not at hand."""
        return list(CIFAR10_CLASSES) if self.count == 10 else [str(k) for k in range(self.count)]


KINDS = {
    "cifar10": Kind(
        count=10,
        folders=("", "cifar-10-batches-py", "cifar-10-batches-bin"),
        batches={"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        text="batches.meta.txt",
        labels="labels",
        names="label_names",
        head=1,
    ),
    "cifar100": Kind(
        count=100,
        folders=("", "cifar-100-python", "cifar-100-binary"),
        batches={"train": ("train",), "test": ("test",)},
        meta="meta",
        text="fine_label_names.txt",
        labels="fine_labels",
        names="fine_label_names",
        head=2,
    ),
}


class _Images(Protocol):
    """N images of (3, 32, 32)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pixels: ...


@dataclass(frozen=True)
class _Contents:
    """Images, labels (N,), and the names of the classes."""

    images: _Images
    labels: np.ndarray
    classes: list[str]


# --- pickles that run nothing -----------------------------------------------------------------------------


class _Array:
    """In place of a NumPy array: keeps its state, from which ``pixels`` are read here."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> Pixels:
        _, shape, kind, columns_first, raw = self.state
        if kind.code != "u1" or columns_first:
            raise ValueError("its data are not rows of 8-bit pixels")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """In place of a NumPy dtype: keeps its code."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """In place of ``codecs.encode``, by which Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of CIFAR")
        return _STAND_INS[module, name]


def _unpickle(raw: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3; BadData for what is none, or names what it should not."""
    try:
        found = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    except Exception as error:  # a damaged pickle fails in any way
        raise BadData(
            f"{where} is refused as a pickle ({complaint(error)}); bring the original archive"
        ) from None


# --- archives ---------------------------------------------------------------------------------------------


def _from_archive(path: Path, kind: Kind, split: str) -> _Contents:
    batches = kind.batches[split]
    binary = tuple(f"{name}.bin" for name in batches)
    files = _files(path, kind, {*batches, *binary, kind.meta, kind.text})
    if all(name in files for name in batches):
        parts = [_python_batch(files[name], f"{path}: {name}", kind) for name in batches]
        meta = _unpickle(files[kind.meta], f"{path}: {kind.meta}") if kind.meta in files else {}
        classes = [str(name) for name in meta.get(kind.names, [])]
    elif all(name in files for name in binary):
        parts = [_binary_batch(files[name], f"{path}: {name}", kind) for name in binary]
        classes = files.get(kind.text, b"").decode("utf-8", "replace").split()
    else:
        raise BadData(
            f"{path} does not hold all of {', '.join(batches)}; give the folder, its parent or the .tar.gz of the "
            "archive, or an .npz"
        )
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _Contents(images, labels, classes or kind.default_classes())


def _files(path: Path, kind: Kind, names: set[str]) -> dict[str, bytes]:
    """The contents of the files of these names in a tar archive, or in the one of the folders that has some."""
    try:
        if path.is_dir():
            for folder in (path / name for name in kind.folders):
                found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
                if found:
                    return found
            return {}
        with tarfile.open(path) as archive:
            return {
                name: file.read()  # in the order of the archive: going back in a .gz means to begin again
                for member in archive
                if member.isfile()
                and (name := PurePosixPath(member.name).name) in names
                and (file := archive.extractfile(member))
            }
    except (OSError, EOFError, tarfile.TarError, ValueError, zlib.error) as error:
        raise BadData(
            f"{path} cannot be read as a CIFAR archive ({complaint(error)}); give its folder, its .tar.gz or an .npz"
        ) from None


def _python_batch(raw: bytes, where: str, kind: Kind) -> tuple[Pixels, np.ndarray]:
    batch = _unpickle(raw, where)
    try:
        return _planar(batch["data"].pixels()), np.array(batch[kind.labels], dtype=np.int64)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise BadData(
            f"{where} is no batch of images ({complaint(error)}); expected data (N, 3072) and {kind.labels} (N)"
        ) from None


def _binary_batch(raw: bytes, where: str, kind: Kind) -> tuple[Pixels, np.ndarray]:
    length = kind.head + 3 * SIZE * SIZE
    if not raw or len(raw) % length:
        raise BadData(f"{where} has {len(raw)} bytes; expected records of {length}, so bring the whole file")
    records = np.frombuffer(raw, np.uint8).reshape(-1, length)
    return _planar(records[:, kind.head :]), records[:, kind.head - 1].astype(np.int64)


def _planar(pixels: np.ndarray) -> Pixels:
    """8-bit images of any of the three shapes as (N, 3, 32, 32); ValueError for others."""
    if pixels.dtype == np.uint8:
        if pixels.shape[1:] in ((3 * SIZE * SIZE,), (3, SIZE, SIZE)):
            return pixels.reshape(-1, 3, SIZE, SIZE)
        if pixels.shape[1:] == (SIZE, SIZE, 3):
            return pixels.transpose(0, 3, 1, 2)
    raise ValueError(f"images are {pixels.dtype} {pixels.shape}, not uint8 (N, {SIZE}, {SIZE}, 3)")


# --- npz --------------------------------------------------------------------------------------------------

IMAGES = ("images", "data", "pixels", "x")
LABELS = ("labels", "fine_labels", "targets", "y")


class _Jpegs:
    """JPEG files back to back, decoded on access."""

    def __init__(self, jpeg: np.ndarray, offsets: np.ndarray, non_rgb: str) -> None:
        whole = np.issubdtype(offsets.dtype, np.integer) and offsets.ndim == 1 and len(offsets) > 1
        ascending = whole and bool((offsets[1:] > offsets[:-1]).all())
        if jpeg.dtype != np.uint8 or not ascending or offsets[0] < 0 or offsets[-1] > jpeg.size:
            raise ValueError("offsets do not cut jpeg into files")
        self.jpeg, self.offsets, self.non_rgb = jpeg, offsets, non_rgb

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Pixels:
        file = self.jpeg[self.offsets[index] : self.offsets[index + 1]].tobytes()
        name = f"JPEG {index}"
        image, _ = decode(io.BytesIO(file), name, self.non_rgb)
        if image.size != (SIZE, SIZE):
            raise SkippedFile(name, "{} x {} pixels".format(*image.size))
        return np.asarray(image).transpose(2, 0, 1)


def _from_npz(file: Path, kind: Kind, split: str, non_rgb: str) -> _Contents:
    try:
        # numpy leaves a damaged file open that it has opened itself
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            images, labels = _arrays(arrays, file, split, non_rgb)
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
    except Exception as error:  # a damaged npz fails in any way
        raise BadData(
            f"{file} cannot be used ({complaint(error)}); expected {split}_images and {split}_labels, images and "
            "labels, or jpeg, offsets and labels"
        ) from None
    return _Contents(images, labels.astype(np.int64), classes or kind.default_classes())


def _arrays(
    arrays: Mapping[str, np.ndarray], file: Path, split: str, non_rgb: str
) -> tuple[_Images, np.ndarray]:
    """Images and labels of the split; KeyError or ValueError where there are none that fit."""

    def key(names: Sequence[str]) -> str | None:
        forms = [form.format(split, name) for form in ("{}_{}", "{1}_{0}") for name in names]
        return next((name for name in [*forms, *names] if name in arrays), None)

    images, labels, jpeg, offsets = key(IMAGES), key(LABELS), key(("jpeg",)), key(("offsets",))
    if labels is None or not (images or (jpeg and offsets)):
        raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}")
    other = SPLITS[1 - SPLITS.index(split)]
    if labels in LABELS and other in file.stem and split not in file.stem:
        raise ValueError(f"by its name these are images for {other}, and not for {split}")
    if not np.issubdtype(arrays[labels].dtype, np.integer) or arrays[labels].ndim != 1:
        raise ValueError(f"{labels} are {arrays[labels].dtype} {arrays[labels].shape}, not integers (N)")
    if images:
        return _planar(arrays[images]), arrays[labels]
    return _Jpegs(arrays[str(jpeg)], arrays[str(offsets)], non_rgb), arrays[labels]


# --- the data set -----------------------------------------------------------------------------------------


class Cifar:
    """``cifar10:PATH`` or ``cifar100:PATH`` as (3, 32, 32) in steps of 1/255, without masks.

    path : the folder of an archive or its parent, a .tar.gz, or an .npz. All of it is kept in memory.
    kind : "cifar10" or "cifar100". split : "train" or "test".
    limit : so many of the images, evenly spread over all; None = all.
    non_rgb : "skip" or "convert", for JPEGs in an .npz that are not RGB.

    Raises BadValue for an unknown kind, split, limit or ``non_rgb``, BadData for files that are not what the module says,
    and SkippedFile on access for a JPEG in an .npz that cannot be decoded (or is not RGB, unless ``non_rgb`` is "convert").
    """

    def __init__(
        self,
        path: str | Path,
        kind: str = "cifar10",
        split: str = "test",
        *,
        limit: int | None = None,
        non_rgb: str = "skip",
    ) -> None:
        self.path, self.kind, self.split = Path(path).expanduser(), kind, split
        if kind not in KINDS:
            raise BadValue(f"there is no CIFAR data set {kind!r}; choose one of {', '.join(KINDS)}")
        if split not in SPLITS:
            raise BadValue(f"{kind} has no split {split!r}; choose one of {', '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise BadValue(f"limit {limit} must be 1 or more")
        if non_rgb not in NON_RGB:
            raise BadValue(f"files that are not RGB cannot be {non_rgb!r}; choose {' or '.join(NON_RGB)}")
        if not self.path.exists():
            raise BadData(
                f"there is no {self.path}; give {kind}:PATH of the archive's folder, .tar.gz or an .npz"
            )
        found = (
            _from_npz(self.path, KINDS[kind], split, non_rgb)
            if self.path.suffix == ".npz"
            else _from_archive(self.path, KINDS[kind], split)
        )
        self._images, self.classes = found.images, found.classes
        self._refuse(found)
        self._places = spread(range(len(found.labels)), limit)
        self.labels = torch.from_numpy(found.labels[list(self._places)])

    def _refuse(self, found: _Contents) -> None:
        """Labels that do not go with the images or the classes."""
        if not 0 < len(found.images) == len(found.labels):
            raise BadData(
                f"{self.path} has {len(found.images)} images and {len(found.labels)} labels; expected as many, "
                "so bring a whole file"
            )
        low, high, count = found.labels.min(), found.labels.max(), KINDS[self.kind].count
        if low < 0 or high >= count or len(found.classes) != count:
            raise BadData(
                f"{self.path} has labels {low}..{high} and {len(found.classes)} class names; {self.kind} has {count} "
                "classes, so give a file of it"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Cifar({str(self.path)!r}, {self.kind!r}, {self.split!r}, length={len(self)})"

    def __getitem__(self, index: int) -> Sample:
        index, name = operator.index(index), self.name(index)
        try:
            pixels = self._images[self._places[index]]
        except SkippedFile as error:
            raise SkippedFile(name, error.reason) from None
        image = torch.from_numpy(np.array(pixels, order="C")).float().div_(255)
        return Sample(image, int(self.labels[index]), None, name)

    def name(self, index: int) -> str:
        """The image's place in the files: ``cifar10/test/17``."""
        return f"{self.kind}/{self.split}/{self._places[operator.index(index)]}"
