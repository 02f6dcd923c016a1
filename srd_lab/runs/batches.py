"""A study's work batch by batch: each is stored once it is done, and a resumed run goes on where the last one ended.

::

    def score(some, advance):
        x = torch.stack([item.sample.image for item in some])
        ...
        advance(len(some))
        return {"name": np.array([item.sample.name for item in some]), "gini": gini}

    parts = in_batches(child, dataset, indices, settings, score, Batcher(50), label="srd")
    table = joined(list(parts))  # table["gini"] (N,), table["seconds"], skipped_in(table)
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from srd_lab.data import Loaded, load_batches, skipped_report
from srd_lab.data.loading import useful_workers
from srd_lab.errors import BadData, BadRun, OtherWork, SrdLabWarning
from srd_lab.runs.files import ASIDE
from srd_lab.runs.report import progress
from srd_lab.runs.settings import Settings
from srd_lab.runs.tracking import Run
from srd_lab.runtime import Batcher
from srd_lab.types import Dataset, Sample

Arrays = dict[str, np.ndarray]
Advance = Callable[[int], None]
ADDED = ("files", "skipped", "seconds")
_NAME = re.compile(r"(\d{5,10})-(\d{5,10})\.npz")


@dataclass(frozen=True)
class Item:
    """One thing to work on.

    number : its place in the study, from 0.
    indices, samples : of one sample, or of several that belong together, in the data set.
    """

    number: int
    indices: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def index(self) -> int:
        """The index of its first sample."""
        return self.indices[0]

    @property
    def sample(self) -> Sample:
        """Its first sample."""
        return self.samples[0]


def in_batches(
    run: Run,
    dataset: Dataset,
    items: Sequence[int] | Sequence[tuple[int, ...]],
    settings: Settings,
    work: Callable[[Sequence[Item], Advance], Arrays],
    batcher: Batcher,
    *,
    label: str = "",
    steps: int = 1,
) -> Iterator[Arrays]:
    """The arrays of every batch, in order: those that an interrupted session stored, and fresh ones, which are stored.

    run : where batches are stored, as ``batches/FIRST-LAST.npz``. Other files there are left alone; a batch that is
        damaged, incomplete or out of place is put aside, which a warning says, and made again.
    items : what is worked on: indices of ``dataset``, or tuples of indices that belong together.
    settings : of which ``resumed`` (whether there may be stored batches) and ``workers`` (that decode ahead) count.
    work : makes arrays of some items, whose first axis is the item, and tells ``advance`` the steps that it did;
        an item with a file that cannot be used is left out. The result must not depend on what else is in a batch.
    batcher : how many items at once; free to differ from that of the earlier session.
    label, steps : of the progress bar; steps per item.

    To a batch's arrays are added ``files``, the names of all that it was to read; ``skipped`` (K, 2), names and reasons
    of those that could not be used; and ``seconds`` () of work. A batch without any image has these alone.

    Raises OtherWork, a kind of BadRun, where a stored batch is of other files; BadData after the last batch if not one image
    is left; Unavailable where memory does not suffice for one item.
    """
    groups = [item if isinstance(item, tuple) else (int(item),) for item in items]
    stored = _stored(run, len(groups)) if settings.resumed else {}
    plan = _plan(len(groups), batcher.size, stored)
    to_read = [
        [index for group in groups[first:last] for index in group]
        for first, last in plan
        if first not in stored
    ]
    asked, useful = settings.workers or 0, useful_workers(len(to_read))
    if to_read and asked > useful:
        warnings.warn(
            f"{useful} worker{' decodes' if useful == 1 else 's decode'}, and not {asked}: there is no work for more",
            SrdLabWarning,
            stacklevel=2,
        )
    arriving = load_batches(dataset, to_read, settings.workers)
    skipped: dict[str, str] = {}
    anything = False
    with progress(len(groups) * steps, label) as move:
        for first, last in plan:
            part, bar = groups[first:last], _Bar(move, len(groups[first:last]) * steps)
            files = np.array([dataset.name(index) for group in part for index in group])
            if first in stored:
                arrays = run.load_arrays(stored[first].path)
                if not np.array_equal(arrays.get("files", []), files):
                    raise _other(run, stored[first].path)
            else:
                began = time.perf_counter()
                loaded = next(arriving)
                arrays = _worked(work, bar, batcher, _items(first, part, loaded))
                arrays |= {
                    "files": files,
                    "skipped": np.array(list(loaded.skipped.items()), "U").reshape(-1, 2),
                    "seconds": np.array(time.perf_counter() - began),
                }
                run.save_arrays(f"batches/{first:05d}-{last - 1:05d}.npz", arrays)
            bar.fill()
            anything |= bool(set(arrays) - set(ADDED))
            skipped |= skipped_in(arrays)
            yield arrays
    if not anything:
        raise BadData(f"not one image is left; {skipped_report(skipped)}")


def _worked(
    work: Callable[[Sequence[Item], Advance], Arrays], bar: Advance, batcher: Batcher, items: list[Item]
) -> Arrays:
    return joined(batcher.run(lambda some: work(some, bar), items))


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of consecutive batches as one: concatenated along the first axis.

    Arrays (N, S) of different lengths S are filled up with NaN, and single numbers (the seconds) are added up.

    Example
    -------
    >>> parts = [{"x": np.ones((1, 2)), "seconds": np.array(1.0)}, {"x": np.ones((1, 1)), "seconds": np.array(2.0)}]
    >>> {name: array.tolist() for name, array in joined(parts).items()}
    {'x': [[1.0, 1.0], [1.0, nan]], 'seconds': 3.0}
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _joined([part[name] for part in parts if name in part]) for name in names}


def skipped_in(arrays: Arrays) -> dict[str, str]:
    """Name -> reason of the files of a batch, or of several joined, that could not be used."""
    return {str(name): str(reason) for name, reason in arrays["skipped"]}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].ndim == 0:
        return np.sum(parts)
    if parts[0].ndim != 2:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    fill = [((0, 0), (0, width - part.shape[1])) for part in parts]
    return np.concatenate(
        [np.pad(p, f, constant_values=np.nan) if f[1][1] else p for p, f in zip(parts, fill, strict=True)]
    )


@dataclass(frozen=True)
class _Batch:
    """A stored batch: its path, one past its last item, and the names of its arrays."""

    path: str
    last: int
    arrays: frozenset[str]


def _stored(run: Run, count: int) -> dict[int, _Batch]:
    """The stored batches of ``count`` items by their first item; those that are of no use are put aside.

    Raises OtherWork for one of more items.
    """
    run.tidy()
    found: dict[int, _Batch] = {}
    done, paths = 0, run.list("batches")
    for path in paths:
        name = _NAME.fullmatch(PurePosixPath(path).name)
        if name is None:  # somebody else's
            continue
        first, last = int(name[1]), int(name[2]) + 1
        try:
            arrays = run.load_arrays(path)
        except BadRun as error:
            _put_aside(run, path, str(error))
            continue
        if not done <= first < last:
            if f"{path}{ASIDE}" not in paths:  # a server keeps what was put aside under its old name, too
                _put_aside(run, path, "its numbers are not in order")
        elif not set(ADDED) <= set(arrays) or len(arrays["files"]) < last - first:
            _put_aside(run, path, "it is incomplete")
        elif last > count:
            raise _other(run, path)
        else:
            found[first], done = _Batch(path, last, frozenset(arrays)), last
    usual = Counter(batch.arrays for batch in found.values() if batch.arrays > set(ADDED)).most_common(1)
    for first, batch in list(found.items()):
        if batch.arrays > set(ADDED) and batch.arrays < usual[0][0]:
            _put_aside(run, batch.path, f"it lacks {', '.join(sorted(usual[0][0] - batch.arrays))}")
            del found[first]
    return found


def _put_aside(run: Run, path: str, why: str) -> None:
    aside = run.put_aside(path)
    warnings.warn(f"{path} is made again, and is now called {aside}: {why}", SrdLabWarning, stacklevel=4)


def _plan(count: int, size: int, stored: dict[int, _Batch]) -> list[tuple[int, int]]:
    """First and one past the last item of every batch: the stored ones, and between them parts of at most ``size``."""
    plan, first = [], 0
    while first < count:
        if first in stored:
            last = stored[first].last
        else:
            last = min([first + size, count, *(start for start in stored if start > first)])
        plan.append((first, last))
        first = last
    return plan


def _items(first: int, part: Sequence[tuple[int, ...]], loaded: Loaded) -> list[Item]:
    """The items of which every file could be read."""
    samples = dict(zip(loaded.indices, loaded.samples, strict=True))
    return [
        Item(number, group, tuple(samples[index] for index in group))
        for number, group in enumerate(part, first)
        if all(index in samples for index in group)
    ]


def _other(run: Run, path: str) -> OtherWork:
    return OtherWork(f"run {run.id} was made with other images in batch {path}; start a new run")


class _Bar:
    """A batch's share of a progress bar: never more than that, also where work is done twice for lack of memory."""

    def __init__(self, move: Advance, steps: int) -> None:
        self._move, self._left = move, steps

    def __call__(self, steps: int) -> None:
        done = min(steps, self._left)
        self._left -= done
        self._move(done)

    def fill(self) -> None:
        """All of it: the batch is done, or was before, or some of it was skipped."""
        self(self._left)
