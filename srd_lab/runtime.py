"""Device, memory and randomness: decided once, here."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from srd_lab.errors import Unavailable

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # the CPU's allocator
    "Cannot allocate memory",  # the system
    "not enough memory",  # the CPU's allocator on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


def pick_device(name: str | None = None, *, float64: bool = False) -> torch.device:
    """``None`` or "auto" picks CUDA, then MPS, then the CPU; any other name must be usable.

    float64 : it has to compute in float64, which MPS does not.
    """
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() and not float64 else "cpu")
    try:
        device = torch.device(str(name))
        torch.empty(1, dtype=torch.float64 if float64 else None, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch goes on for pages
        raise Unavailable(f"device {name!r} cannot be used here ({why}); try --device cpu") from None
    return device


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on the seed and the keys alone, not on what was drawn before.

    CPU on purpose: the numbers are the same whatever device the work runs on.
    """
    return torch.Generator().manual_seed(derived_seed(seed, *keys))


def derived_seed(seed: int, *keys: int | str) -> int:
    """A seed below 2^63 that depends on the seed and the keys alone."""
    text = "/".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def keep_freed_memory() -> None:
    """Let the C allocator hand freed memory out again instead of back to the system, where it can be told so (glibc).

    For a process that is ours alone: fresh pages for every large tensor cost a sixth of an SRD attack's time at
    224 px (VGG16).
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        allocator(mmap_max, 0)
        allocator(trim_threshold, 2**31 - 1)


def full_precision() -> None:
    """Convolutions on CUDA in float32 as it stands: PyTorch would round their factors to 10 bits (TF32)."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def fast_layout(network: nn.Module, images: Tensor) -> torch.memory_format:
    """The memory format in which forward passes of images (N, C, H, W) take least time: channels last on the CPU, where
    convolutions are a third faster with it, unless the network calls view() on a map, which it forbids."""
    if images.device.type != "cpu" or torch.is_grad_enabled():
        return torch.contiguous_format
    try:
        network(images[:1].clone(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


class Batcher:
    """Runs work on at most ``size`` items at once; where memory runs out, on half as many, for good.

    For work whose result does not depend on what else is in its batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """The results of ``work`` on consecutive parts of ``items``."""
        results: list[Result] = []
        first = 0
        while first < len(items):
            part = items[first : first + self.size]
            done = self._tried(work, part)
            if done is None:
                self._halve(len(part))
                continue
            results.append(done[0])
            first += len(part)
        return results

    def _tried(self, work: Callable[[Sequence[Item]], Result], part: Sequence[Item]) -> tuple[Result] | None:
        try:
            return (work(part),)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None  # what the failed work held goes with the traceback, before the next try

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise Unavailable(
                "not even one image fits into memory; take a smaller network or image, or another --device"
            )
        self.size = tried // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device: most allocators say so in words only."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in _NO_MEMORY
    )
