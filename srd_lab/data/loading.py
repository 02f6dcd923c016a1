"""Batches of samples, decoded ahead of their use in processes of their own where that pays.

The samples are the same for any number of workers. Workers send 8-bit pixels through pipes, and not tensors in
shared memory: these would take two file descriptors per sample, and fill the small /dev/shm of a container.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srd_lab.data.pictures import PictureFolder, SkippedFile
from srd_lab.errors import BadValue, SrdLabError, SrdLabWarning
from srd_lab.runtime import is_out_of_memory
from srd_lab.types import Dataset, Sample

MOST_WORKERS = 4
WORTH_WORKERS = 256  # images to decode
WATCHED_EVERY = 1.0  # seconds between two looks of a worker at its parent

_Packed = tuple[np.ndarray, int, np.ndarray | None, str]
_Sent = tuple[list[int], list[_Packed], dict[str, str]]


@dataclass(frozen=True)
class Loaded:
    """One batch: the samples that could be read, their indices, and name -> reason of those that could not."""

    indices: list[int]
    samples: list[Sample]
    skipped: dict[str, str]


def load_batches(
    dataset: Dataset, batches: Iterable[Sequence[int]], workers: int | None = None
) -> Iterator[Loaded]:
    """The samples of these indices, batch by batch, in order.

    workers : processes that decode ahead; 0 decodes here, when asked for. None chooses: many image files are worth
        up to four workers beside an accelerator, and a quarter of the cores else; scenes and CIFAR are not.

    Raises BadValue for a negative number of workers, and the errors of the data set as they are; but SkippedFile leaves
    the sample out of its batch.

    Example
    -------
    ::

        for loaded in load_batches(dataset, [[0, 1], [2, 3]]):
            x = torch.stack([sample.image for sample in loaded.samples])
    """
    if workers is not None and workers < 0:
        raise BadValue(f"there cannot be {workers} workers; give 0 or more")
    plan = [[int(index) for index in indices] for indices in batches]
    if workers is None:
        workers = _worth(dataset, sum(map(len, plan)))
    read, some = _Reader(dataset), min(workers, useful_workers(len(plan)))
    return _by_workers(read, plan, some) if some else map(read.batch, plan)


def useful_workers(batches: int) -> int:
    """How many workers at most have something to do for so many batches; more would be in each other's way."""
    return min(batches, max(_cores(), MOST_WORKERS))


def _worth(dataset: Dataset, images: int) -> int:
    """How many workers these images are worth."""
    if not isinstance(dataset, PictureFolder) or images < WORTH_WORKERS:
        return 0
    cores = _cores()
    # A network on the CPU wants the cores itself: on two, reading images added 5 % to one pass of SqueezeNet here,
    # and 17 % with two workers.
    return min(MOST_WORKERS, cores if torch.accelerator.is_available() else cores // 4)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Reader:
    """Reads batches of a data set; indexed, it gives them as a worker sends them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def batch(self, indices: Sequence[int]) -> Loaded:
        loaded = Loaded([], [], {})
        for index in indices:
            try:
                loaded.samples.append(self.dataset[index])
                loaded.indices.append(index)
            except SkippedFile as error:
                loaded.skipped[error.name] = error.reason
        return loaded

    def __getitem__(self, indices: Sequence[int]) -> _Sent | SrdLabError:
        try:
            loaded = self.batch(indices)
        except SrdLabError as error:
            return error  # raised there, it would arrive wrapped in the worker's traceback
        return loaded.indices, [_packed(sample) for sample in loaded.samples], loaded.skipped


def _packed(sample: Sample) -> _Packed:
    """The sample with arrays for tensors: 8-bit pixels where they are the same, as in every source here."""
    pixels = sample.image.mul(255).round_().to(torch.uint8)
    image = pixels if torch.equal(_unit(pixels), sample.image) else sample.image
    return image.numpy(), sample.label, None if sample.mask is None else sample.mask.numpy(), sample.name


def _unpacked(image: np.ndarray, label: int, mask: np.ndarray | None, name: str) -> Sample:
    pixels = torch.from_numpy(image)
    pixels = _unit(pixels) if pixels.dtype == torch.uint8 else pixels
    return Sample(pixels, label, None if mask is None else torch.from_numpy(mask), name)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255)


def _as_it_is(sent: Any) -> Any:
    return sent


def _by_workers(read: _Reader, plan: list[list[int]], workers: int) -> Iterator[Loaded]:
    from torch.utils.data import DataLoader

    with _deaf_children(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create", UserWarning
        )  # more than cores: as asked
        # Python 3.12 warns of fork beside threads; a worker takes no lock of theirs.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        loader: Any = DataLoader(
            read,  # type: ignore[arg-type]
            batch_size=None,
            sampler=plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the caller's random numbers stay as they are
            # Forked workers start at once and need no guarded main module; elsewhere fork is not safe.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            worker_init_fn=partial(_end_with, os.getpid()),
        )
        arriving = iter(loader)
    done = 0
    try:
        for loaded in arriving:
            if isinstance(loaded, SrdLabError):
                raise loaded
            indices, samples, skipped = loaded
            done += 1
            yield Loaded(indices, [_unpacked(*sample) for sample in samples], skipped)
    except (MemoryError, RuntimeError) as error:
        # the system kills whom it has no memory for
        if not is_out_of_memory(error) and not any(
            said in str(error) for said in ("killed by", "exited unexpectedly")
        ):
            raise
        with suppress(RuntimeError):  # the news of a killed worker comes again while they are ended
            arriving._shutdown_workers()
        warnings.warn(f"{_why(error)}; the rest is decoded without workers", SrdLabWarning, stacklevel=2)
    else:
        return
    finally:
        del arriving  # ends the workers
    yield from map(read.batch, plan[done:])


def _why(error: BaseException) -> str:
    """What became of a worker, in words."""
    crash = next((name for name in ("Segmentation fault", "Bus error", "Aborted") if name in str(error)), "")
    if crash:
        return f"a worker crashed ({crash.lower()}) in what decodes the files"
    return "memory ran out in a worker"


def _end_with(parent: int, worker: int) -> None:
    """Let this worker process end soon after its parent, which may be killed: PyTorch's own watch ends in waiting for a pipe
    to be read that nobody reads any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCHED_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C or a hang-up, which this process answers by ending them."""
    ends = {getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)}
    blocked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends) if blocked else set()
    try:
        yield
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
