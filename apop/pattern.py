"""Which neurons were on: the activation pattern of a batch, in memory and in a file."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srd_lab.errors import BadData, BadValue, StoreTrouble, first_line

VERSION = 1
RELU, MAX_POOL = "relu", "max_pool"


@dataclass(frozen=True, eq=False)
class Entry:
    """What one call left behind.

    name : of the call, as in ``srd_lab.engine.spellings.Call``; kind : ``relu`` or ``max_pool``.
    shape : of the call's input.
    values : ReLU: bool, of that shape, True where the output is > 0. Max pool: int64 (N, C, h, w), the flat index
        (row * W + column) of each winner.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, eq=False)
class ActivationPattern:
    """The on/off pattern of a batch.

    entries : one per ReLU or max pool call, in call order.
    """

    entries: tuple[Entry, ...]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of every ReLU call by its name, bool (N, ...)."""
        return {entry.name: entry.values for entry in self.entries if entry.kind == RELU}

    @property
    def winners(self) -> dict[str, Tensor]:
        """The winners of every max pool call by its name, int64 (N, C, h, w)."""
        return {entry.name: entry.values for entry in self.entries if entry.kind == MAX_POOL}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the arrays in a saved file, before compression, of all images together."""
        bits = sum(-(-mask.numel() // 8) for mask in self.masks.values())
        pools = (entry for entry in self.entries if entry.kind == MAX_POOL)
        return bits + sum(entry.values.numel() * _index_type(entry.shape).itemsize for entry in pools)

    def select(self, rows: Sequence[int]) -> ActivationPattern:
        """The pattern of some images of the batch.

        rows : their indices in the batch, at least one.

        Raises BadValue if one is not there.
        """
        size = min(entry.shape[0] for entry in self.entries)
        if any(not 0 <= row < size for row in rows) or not rows:
            raise BadValue(f"the pattern holds images 0..{size - 1}, got {list(rows)}")
        index = torch.tensor(list(rows))
        return ActivationPattern(
            tuple(
                Entry(e.name, e.kind, (len(index), *e.shape[1:]), e.values[index.to(e.values.device)])
                for e in self.entries
            )
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for an npz file: ``about`` (JSON: version and calls), and ``0``, ``1``, ... for the calls.

        A mask is flattened and packed to bits; winners take the smallest unsigned type that
        holds the size of their input.
        """
        calls = [{"name": e.name, "kind": e.kind, "shape": e.shape} for e in self.entries]
        about = json.dumps({"format": "srd-lab activation pattern", "version": VERSION, "calls": calls})
        arrays = {str(i): _packed(entry) for i, entry in enumerate(self.entries)}
        return {"about": np.array(about), **arrays}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> ActivationPattern:
        """The pattern that ``to_arrays`` wrote.

        arrays : what it gave. Raises ValueError or KeyError where these are others.
        """
        about = json.loads(str(arrays["about"]))
        if about["version"] != VERSION:
            raise ValueError(f"it is of version {about['version']}, this program reads version {VERSION}")
        return ActivationPattern(
            tuple(
                _unpacked(call["name"], call["kind"], tuple(call["shape"]), arrays[str(i)])
                for i, call in enumerate(about["calls"])
            )
        )

    def save(self, path: str | Path) -> None:
        """Write the compressed npz file ``path``, replacing what was there. Raises StoreTrouble if that cannot be done."""
        arrays: dict[str, Any] = self.to_arrays()
        part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(path)
        except OSError as error:
            raise StoreTrouble(f"cannot write the pattern to {path}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> ActivationPattern:
        """The pattern in file ``path``, on the CPU. Raises BadData for a missing, damaged or other file."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return ActivationPattern.from_arrays(arrays)
        except FileNotFoundError:
            raise BadData(f"there is no pattern file {path}; make one with ActivationPattern.save") from None
        except (
            *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError),
            *(zipfile.BadZipFile, zlib.error, NotImplementedError),
        ) as error:
            reason = first_line(error)
            raise BadData(
                f"{path} is not an activation pattern, or is damaged ({reason}); record and save it again"
            ) from None


def _index_type(shape: tuple[int, ...]) -> np.dtype[Any]:
    return np.min_scalar_type(shape[-1] * shape[-2] - 1)


def _packed(entry: Entry) -> np.ndarray:
    values = entry.values.cpu().numpy()
    return np.packbits(values) if entry.kind == RELU else values.astype(_index_type(entry.shape))


def _unpacked(name: str, kind: str, shape: tuple[int, ...], array: np.ndarray) -> Entry:
    if kind == RELU:
        count = int(np.prod(shape))
        if array.dtype != np.uint8 or array.shape != (-(-count // 8),):
            raise ValueError(f"the mask of {name} does not have {count} bits")
        values = np.unpackbits(array, count=count).reshape(shape).view(bool)
        return Entry(name, kind, shape, torch.from_numpy(values))
    if kind != MAX_POOL:
        raise ValueError(f"call {name} is of the unknown kind {kind}")
    if array.dtype.kind != "u" or array.shape[:2] != shape[:2] or array.max() >= shape[2] * shape[3]:
        raise ValueError(f"the winners of {name} do not fit its input {shape}")
    return Entry(name, kind, shape, torch.from_numpy(array.astype(np.int64)))
