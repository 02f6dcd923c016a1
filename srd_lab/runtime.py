"""Device, memory and randomness: decided once, here."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from srd_lab.errors import Unavailable

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # the CPU's allocator
    "cannot allocate memory",  # the system
    "not enough memory",  # the CPU's allocator on Windows
    "could not create a primitive",  # oneDNN
    "could not create a memory",  # oneDNN
    "bad_alloc",  # C++
    "unable to allocate",  # NumPy
    "status_alloc_failed",  # cuBLAS, cuDNN
    "out_of_host_memory",  # Level Zero
    "out_of_device_memory",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


def pick_device(name: str | None = None, *, float64: bool = False) -> torch.device:
    """The device to compute on.

    name : "cuda", "cuda:1", "cpu", ...; None or "auto" picks CUDA, then MPS, then the CPU.
    float64 : whether it has to compute in float64, which MPS does not.

    Raises Unavailable for a named device that cannot be used here.
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

    It is on the CPU so that the numbers are the same whatever device the work runs on.

    Example
    -------
    >>> torch.equal(torch.rand(2, generator=generator(0, "noise", 7)), torch.rand(2, generator=generator(0, "noise", 7)))
    True
    """
    return torch.Generator().manual_seed(derived_seed(seed, *keys))


def derived_seed(seed: int, *keys: int | str) -> int:
    """A seed in [0, 2^63) that depends on the seed and the keys alone."""
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
    """Switch TF32 off for the whole process: on CUDA it rounds the factors of float32 products to 10 bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def fast_layout(network: nn.Module, images: Tensor) -> torch.memory_format:
    """The memory format in which forward passes of images (N, C, H, W) take least time: channels last on the CPU, where
    convolutions are a third faster with it, unless the network calls view() on a map, which fails there. Contiguous on other
    devices, and where gradients are on."""
    if images.device.type != "cpu" or torch.is_grad_enabled():
        return torch.contiguous_format
    try:
        network(images[:1].clone(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


class Batcher:
    """Runs work on at most ``size`` items at once; where memory runs out, on half as many, from then on.

    For work whose result does not depend on what else is in its batch. ``asked`` stays the size that it began with.

    Example
    -------
    >>> Batcher(2).run(sum, [1, 2, 3])
    [3, 3]
    """

    def __init__(self, size: int) -> None:
        self.size = self.asked = size

    def run(self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """The results of ``work`` on consecutive parts of ``items``, in order.

        Raises Unavailable if memory does not suffice for a single item, by the name that it or its ``sample`` has; other
        errors of ``work`` are passed on.
        """
        results: list[Result] = []
        first = 0
        while first < len(items):
            part = items[first : first + self.size]
            done = self._tried(work, part)
            if done is None:
                self._halve(part)
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

    def _halve(self, tried: Sequence[Any]) -> None:
        if len(tried) == 1:
            name = getattr(getattr(tried[0], "sample", tried[0]), "name", "")
            alone = f" ({name})" if isinstance(name, str) and name else ""
            raise Unavailable(
                f"not even one image{alone} fits into memory; take a smaller network or image, or another --device"
            )
        self.size = len(tried) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device: most allocators say so in words only."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in _NO_MEMORY
    )
