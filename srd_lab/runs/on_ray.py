"""The work of batches on the machines of a Ray cluster: each batch is a task, and this process alone stores what they give.

Batches come in the order of the plan, whoever does them and however often one is tried: what a batch gives depends on its
images, on how many go at once, on the threads of PyTorch and on the kind of device, and on nothing else. Ray's own retries
are off, so that they can be counted, and so that memory that ran out is answered by fewer images at once.

The network and what is done with it go to the cluster once per stage. A worker process keeps the latest that it was sent.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from srd_lab.data import load_batches
from srd_lab.errors import SrdLabWarning, Unavailable, first_line
from srd_lab.parts import modules_of_the_user
from srd_lab.runs.report import text_table
from srd_lab.runs.settings import Settings
from srd_lab.runs.work import Advance, Arrays, Item, Part, Work, worked
from srd_lab.runtime import Batcher, full_precision, keep_freed_memory, pick_device
from srd_lab.types import Dataset

AHEAD = 4  # batches under way for each that the cluster can work on at once
MOST_TRIES = 5
LOOKS_EVERY = 1.0  # seconds between two looks at what the cluster has
PATIENCE = 5.0  # seconds for a first answer of a cluster

_LATEST: dict[
    str, tuple[Any, Dataset]
] = {}  # in a worker: what it was sent last, by its name in the object store

Said = tuple[type[Warning], str]


@dataclass(frozen=True)
class Place:
    """How a worker process works.

    device : as for :func:`srd_lab.runtime.pick_device`. threads : of PyTorch, >= 1.
    folder : the working directory, and paths : where modules are looked for besides; each where there is one of this name.
    """

    device: str
    threads: int
    folder: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class OnRay:
    """A :class:`srd_lab.runs.executors.Executor`: the Ray cluster that this process is connected with.

    device : that was asked for: ``auto`` and ``cuda`` take the cluster's GPUs where it has some.
    threads : of PyTorch in each worker, and CPUs that Ray counts for it, >= 1. workers_per_gpu : >= 1.
    """

    device: str = "auto"
    threads: int = 1
    workers_per_gpu: int = 1

    @classmethod
    def of(cls, settings: Settings) -> OnRay:
        """As the settings have it. Raises Unavailable as :func:`connect` does."""
        connect(settings.ray_address)
        return cls(settings.device, settings.threads or 1, settings.workers_per_gpu)

    def run(
        self,
        work: Callable[[Sequence[Item], Advance], Arrays],
        dataset: Dataset,
        parts: Sequence[Part],
        batcher: Batcher,
        advance: Advance,
    ) -> Generator[Arrays, None, None]:
        """See :class:`srd_lab.runs.executors.Executor`; ``advance`` is told nothing.

        Raises Unavailable for what cannot be sent to another process, for a cluster that has no place for a batch, and for a
        batch that was tried ``MOST_TRIES`` times.
        """
        if not parts:
            return
        ray = _ray()
        gpus = self._on_gpus()
        if not self._at_once(gpus):
            raise Unavailable(
                f"no machine of the Ray cluster has the {self.threads} CPUs that --threads {self.threads} asks for"
            )
        device = "cuda" if gpus else "cpu" if self.device == "auto" else self.device
        if isinstance(work, Work) and torch.device(device).type != work.device.type:
            warnings.warn(
                f"batches are done on {device}, and what is around them here on {work.device.type}",
                SrdLabWarning,
                stacklevel=3,
            )
        task = ray.remote(
            num_cpus=self.threads,
            num_gpus=1 / self.workers_per_gpu if gpus else 0,
            max_retries=0,
            max_calls=0,  # else a worker with a GPU ends after each task, and the network is sent anew
        )(_batch)
        sent = ray.put(_packed(work, dataset))
        place = Place(device, self.threads, os.getcwd(), tuple(sys.path))
        submit = partial(task.options(name="srd-lab batch").remote, [sent], place)
        flight = _Flight(ray, submit, parts, batcher, partial(self._at_once, gpus))
        try:
            yield from flight
        finally:
            flight.end()

    def _on_gpus(self) -> bool:
        """Whether batches are done on GPUs."""
        wanted, there = self.device.partition(":")[0] in ("auto", "cuda"), any(node.gpus for node in nodes())
        if wanted and not there and self.device != "auto":
            raise Unavailable(f"the Ray cluster has no GPU for --device {self.device}; give cpu or auto")
        return wanted and there

    def _at_once(self, gpus: bool) -> int:
        """How many batches the cluster can work on at once."""
        return sum(node.batches(self.threads, self.workers_per_gpu if gpus else None) for node in nodes())


# --- the cluster ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, which is there. cpus, gpus : that Ray counts. memory : in bytes."""

    address: str
    cpus: float
    gpus: float
    memory: float
    alive: bool

    def batches(self, threads: int, workers_per_gpu: int | None) -> int:
        """How many it can work on at once; without GPUs for None."""
        if not self.alive:
            return 0
        by_cpus = int(self.cpus // threads)
        return by_cpus if workers_per_gpu is None else min(by_cpus, int(self.gpus * workers_per_gpu))


def nodes(*, dead: bool = False) -> list[Node]:
    """The machines of the cluster; with ``dead`` also those that are gone."""
    found = []
    for about in _ray().nodes():
        has = about.get("Resources", {})
        cpus, gpus, memory = (float(has.get(name, 0)) for name in ("CPU", "GPU", "memory"))
        found.append(Node(str(about["NodeManagerAddress"]), cpus, gpus, memory, bool(about["Alive"])))
    return [node for node in found if node.alive or dead]


def connect(address: str | None) -> bool:
    """Connect this process with a cluster, unless it is connected with one; whether it was not.

    address : HOST:PORT, ``auto`` for the one on this machine; None = that of RAY_ADDRESS, else a cluster of this machine
        alone is started, which :func:`close` ends.

    Raises Unavailable without Ray, and for a cluster that cannot be reached.
    """
    ray = _ray()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        with _own_signals(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="ray")  # on its own future
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unreachable(address, first_line(error)) from None
    with suppress(AttributeError):  # private: it prints into the tables what it says of workers that died
        ray._private.worker._worker_logs_enabled = False
    return True


def close() -> None:
    """Leave the cluster that :func:`connect` found, and end it if it was started there."""
    _ray().shutdown()


def cluster_text() -> str:
    """What the cluster offers that this process is connected with, as a table."""
    found = sorted(nodes(dead=True), key=lambda node: (not node.alive, node.address))
    rows = [
        [
            *(node.address, f"{node.cpus:g}", f"{node.gpus:g}", f"{node.memory / 1e9:.1f} GB"),
            "yes" if node.alive else "no",
        ]
        for node in found
    ]
    table = text_table(["node", "CPUs", "GPUs", "memory", "alive"], rows)
    cpu = sum(node.batches(1, None) for node in found)
    gpu = sum(node.batches(1, 1) for node in found)
    said = f"{gpu} batches at once, one per GPU (--workers-per-gpu), or " if gpu else ""
    return f"{table}\n\n{said}{cpu} batches at once on CPUs, of one thread each (--threads)"


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise Unavailable(f"--executor ray needs Ray ({first_line(error)}); install srd-lab[ray]") from None
    return ray


def _check_reachable(address: str) -> None:
    """Refuse at once what Ray would wait for minutes for."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, first_line(error)) from None


def _unreachable(address: str, why: str) -> Unavailable:
    return Unavailable(
        f"the Ray cluster {address} cannot be reached ({why}); start one with ray start --head, or join it with "
        "ray start --address=HOST:PORT"
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Within: Ray sets handlers of signals, in the place of which those from before come back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


# --- what is sent ---------------------------------------------------------------------------------------


def _packed(work: Any, dataset: Dataset) -> bytes:
    """Work and data for another process, where the user's own modules may not be there.

    As bytes: what Ray would send of arrays cannot be written to.
    """
    from ray import cloudpickle

    if isinstance(work, Work) and work.device.type != "cpu":  # a worker may have no such device
        work = copy.deepcopy(work).on(torch.device("cpu"))
    modules = modules_of_the_user()
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((work, dataset)))
    except (SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:  # a part of the user's fails in any way
        raise Unavailable(
            f"the work cannot be sent to other processes ({first_line(error)}); leave --executor ray out"
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


# --- in a worker ----------------------------------------------------------------------------------------


def _batch(sent: list[Any], place: Place, part: Part, size: int) -> tuple[Arrays, list[Said], int]:
    """The arrays of a batch, what was warned of, and how many images went at once in the end.

    sent : the name in the object store of :func:`_packed`; in a list, as Ray would fetch it for every task. size : how many
    images at once.
    """
    with suppress(OSError):
        os.chdir(place.folder)
    sys.path += [path for path in place.paths if path not in sys.path and os.path.isdir(path)]
    torch.set_num_threads(place.threads)
    full_precision()
    keep_freed_memory()
    work, dataset = _fetched(sent[0], place)
    batcher = Batcher(size)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        arriving = load_batches(dataset, [part.indices], 0)
        arrays = worked(work, part, partial(next, arriving), batcher, lambda steps: None)
    said = [(warning.category, str(warning.message)) for warning in heard]
    return arrays, list(dict.fromkeys(said)), batcher.size


def _fetched(sent: Any, place: Place) -> tuple[Any, Dataset]:
    """Work, on this worker's device, and data: kept from the batch before, or fetched."""
    name = sent.hex()
    if name not in _LATEST:
        _LATEST.clear()
        work, dataset = pickle.loads(_ray().get(sent))
        if isinstance(work, Work):
            work = work.on(pick_device(place.device))
        _LATEST[name] = work, dataset
    return _LATEST[name]


# --- here -----------------------------------------------------------------------------------------------


@dataclass
class _Flight:
    """The batches of a stage on their way; iterated over, their arrays in the order of the plan.

    submit : starts a batch of so many images at once. at_once : how many the cluster can work on now.
    """

    ray: Any
    submit: Callable[[Part, int], Any]
    parts: Sequence[Part]
    batcher: Batcher
    at_once: Callable[[], int]
    running: dict[Any, int] = field(default_factory=dict)  # task -> number of the batch
    done: dict[int, Arrays] = field(default_factory=dict)  # and not asked for yet
    tries: Counter[int] = field(default_factory=Counter)
    sizes: dict[int, int] = field(default_factory=dict)  # of batches that memory ran out for
    why: Counter[str] = field(default_factory=Counter)  # batches are done again
    said: set[Said] = field(default_factory=set)
    looked: float = -LOOKS_EVERY
    ahead: int = 1

    def __iter__(self) -> Iterator[Arrays]:
        following = 0
        for due in range(len(self.parts)):
            while due not in self.done:
                last = min(len(self.parts), due + self._ahead())
                for number in range(following, last):
                    self._start(number)
                following = max(following, last)
                self._wait()
            if due == len(self.parts) - 1:  # who has all batches asks for nothing more
                self._report()
            yield self.done.pop(due)

    def end(self) -> None:
        """Cancel what is under way; workers stay for the next stage."""
        for task in self.running:
            with suppress(Exception):  # the cluster may be what broke
                self.ray.cancel(task)
        self.running.clear()

    def _ahead(self) -> int:
        """How many batches may be under way: as the cluster is now, which machines join and leave."""
        if time.monotonic() - self.looked >= LOOKS_EVERY:
            self.looked, self.ahead = time.monotonic(), AHEAD * max(1, self.at_once())
        return self.ahead

    def _start(self, number: int) -> None:
        size = self.sizes.get(number, self.batcher.size)
        self.tries[number] += 1
        self.running[self.submit(self.parts[number], size)] = number

    def _wait(self) -> None:
        """Until a batch is done, or it is time for another look at the cluster."""
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=LOOKS_EVERY)
        for task in ready:
            number = self.running.pop(task)
            try:
                arrays, said, size = self.ray.get(task)
            except self.ray.exceptions.RayError as error:
                self._failed(number, error)
                continue
            for warning in said:
                self._warn(warning)
            self.batcher.size = min(self.batcher.size, size)
            # copies: what Ray gives lies in its store, all of it for as long as any of it is used
            self.done[number] = {name: np.array(array) for name, array in arrays.items()}

    def _failed(self, number: int, error: Any) -> None:
        """Start a batch anew whose worker was lost; what is an error of the work itself is raised as it was there."""
        kinds = self.ray.exceptions
        if isinstance(error, kinds.RayTaskError) and not isinstance(error.cause, kinds.RayError):
            raise error.cause from error
        cause = error.cause if isinstance(error, kinds.RayTaskError) else error
        if isinstance(cause, kinds.TaskUnschedulableError | kinds.RuntimeEnvSetupError):
            raise Unavailable(f"the Ray cluster cannot start a batch: {first_line(cause)}") from error
        why = _why(kinds, cause)
        part = self.parts[number]
        if self.tries[number] >= MOST_TRIES:
            raise Unavailable(
                f"batch {part.first:05d}-{part.last - 1:05d} was given up after {MOST_TRIES} tries: {why}; Ray's logs on "
                "its machines say more, and a smaller --batch-size takes less memory"
            ) from error
        if isinstance(cause, kinds.OutOfMemoryError):
            self.sizes[number] = max(1, self.sizes.get(number, self.batcher.size) // 2)
        self.why[why] += 1
        self._start(number)

    def _warn(self, said: Said) -> None:
        if said not in self.said:
            self.said.add(said)
            warnings.warn(said[1], said[0], stacklevel=5)

    def _report(self) -> None:
        if self.why:
            reasons = ", ".join(f"{count} as {why}" for why, count in self.why.items())
            warnings.warn(
                f"{sum(self.why.values())} batches were done again: {reasons}", SrdLabWarning, stacklevel=5
            )


def _why(kinds: Any, error: Any) -> str:
    """Why a batch is lost, in words."""
    if isinstance(error, kinds.OutOfMemoryError):
        return "memory ran out on a machine"
    if isinstance(error, kinds.NodeDiedError | kinds.LocalRayletDiedError):
        return "a machine was lost"
    if isinstance(error, kinds.WorkerCrashedError):
        return "a worker died"
    if isinstance(error, kinds.ObjectLostError):
        return "a result was lost with its machine"
    return f"Ray failed ({first_line(error, 80)})"
