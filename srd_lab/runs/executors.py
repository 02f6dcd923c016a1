"""Who does the work of a study's batches: this process, or the machines of a Ray cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Protocol

from srd_lab.data import load_batches
from srd_lab.data.loading import useful_workers
from srd_lab.errors import SrdLabWarning
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
    """The executor that the settings name."""
    return Local(settings.workers)
