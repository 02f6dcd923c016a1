"""Who does the work of a study's batches: this process, or the machines of a Ray cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from srd_lab.data import load_batches
from srd_lab.data.loading import useful_workers
from srd_lab.errors import BadValue, SrdLabWarning
from srd_lab.runs.settings import Settings
from srd_lab.runs.work import Advance, Arrays, Item, Part, worked
from srd_lab.runtime import Batcher
from srd_lab.types import Dataset


class Executor(Protocol):
    """Does the work of batches. What it gives must not depend on who does it, or how often one was tried."""

    def run(
        self,
        work: Callable[[Sequence[Item], Advance], Arrays],
        dataset: Dataset,
        parts: Sequence[Part],
        batcher: Batcher,
        advance: Advance,
    ) -> Generator[Arrays, None, None]:
        """The arrays of every batch, in order.

        work : see :class:`srd_lab.runs.work.Work`. batcher : how many items at once. advance : is told the steps of the
        batch that is worked on, if that is known.

        Raises Unavailable where memory does not suffice for one item; errors of the work are passed on.
        """
        ...


class Local:
    """This process; others decode images ahead.

    workers : so many, 0 = none; None = by data and cores.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(
        self,
        work: Callable[[Sequence[Item], Advance], Arrays],
        dataset: Dataset,
        parts: Sequence[Part],
        batcher: Batcher,
        advance: Advance,
    ) -> Generator[Arrays, None, None]:
        """See :class:`Executor`."""
        asked, useful = self.workers or 0, useful_workers(len(parts))
        if parts and asked > useful:
            warnings.warn(
                f"{useful} worker{' decodes' if useful == 1 else 's decode'}, and not {asked}: there is no work for more",
                SrdLabWarning,
                stacklevel=3,
            )
        arriving = load_batches(dataset, [part.indices for part in parts], self.workers)
        for part in parts:
            yield worked(work, part, partial(next, arriving), batcher, advance)


def executor_of(settings: Settings) -> Executor:
    """The executor that the settings name. Raises Unavailable where Ray is not installed or its cluster not to be had."""
    if settings.executor == "local":
        return Local(settings.workers)
    from srd_lab.runs.on_ray import OnRay

    return OnRay.of(settings)


@contextmanager
def connected(executor: str, ray_address: str | None) -> Iterator[None]:
    """Within: the cluster that work goes to is there; afterwards it is left, and ended if it was started for this.

    Raises Unavailable as :func:`executor_of` does, and BadValue for an address that nobody goes to.
    """
    if executor == "local":
        if ray_address:
            raise BadValue("--ray-address says where a Ray cluster is; add --executor ray, or leave it out")
        yield
        return
    from srd_lab.runs import on_ray

    ours = on_ray.connect(ray_address)
    try:
        yield
    finally:
        if ours:
            on_ray.close()
