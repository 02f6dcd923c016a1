"""Device, dtype and randomness: decided once, here."""

from __future__ import annotations

import ctypes
import hashlib
import sys

import torch

from srd_lab.types import SrdLabError


def pick_device(name: str | None = None) -> torch.device:
    """``None`` or "auto" picks CUDA, then MPS, then the CPU; any other name must be usable."""
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SrdLabError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on the seed and the keys alone, not on what was drawn before.

    CPU on purpose: the numbers are the same whatever device the work runs on.
    """
    text = "/".join(str(part) for part in (seed, *keys))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(state)


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
