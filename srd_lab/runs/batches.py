"""A study's work batch by batch: each is stored once it is done, and a resumed run goes on where the last one ended.

::

    @dataclass(frozen=True)
    class Score(Work):
        def __call__(self, some, advance):
            x = torch.stack([item.sample.image for item in some]).to(self.device)
            ...
            advance(len(some))
            return {"name": np.array([item.sample.name for item in some]), "gini": gini}

    stage = Stage(child, dataset, indices, Score(model, device), Batcher(50), label="srd")
    table = joined(list(in_batches(stage, settings)))  # table["gini"] (N,), table["seconds"], skipped_in(table)
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from srd_lab.data import skipped_report
from srd_lab.errors import BadData, BadRun, BadValue, OtherWork, SrdLabWarning
from srd_lab.runs.executors import executor_of
from srd_lab.runs.files import ASIDE
from srd_lab.runs.report import progress
from srd_lab.runs.settings import Settings
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import ADDED, Advance, Arrays, Item, Part, skipped_in
from srd_lab.runtime import Batcher
from srd_lab.types import Dataset

SHARE = "share.json"  # beside the batches of a share: which, of how many items, how many at once
BATCH_NAME = re.compile(r"(\d{5,10})-(\d{5,10})\.npz")


@dataclass(frozen=True)
class Stage:
    """A stretch of a study's work: many items of which all the same is done.

    run : where batches are stored, as ``batches/FIRST-LAST.npz``. Other files there are left alone; a batch that is
        damaged, incomplete or out of place is put aside, which a warning says, and made again.
    dataset : of the samples. items : what is worked on: indices of ``dataset``, or tuples of indices that belong together.
    work : see :class:`srd_lab.runs.work.Work`; an item with a file that cannot be used is left out.
    batcher : how many items at once; free to differ from that of an earlier session.
    label, steps : of the progress bar; steps per item.
    """

    run: Run
    dataset: Dataset
    items: Sequence[int] | Sequence[tuple[int, ...]]
    work: Callable[[Sequence[Item], Advance], Arrays]
    batcher: Batcher
    label: str = ""
    steps: int = 1


def in_batches(stage: Stage, settings: Settings) -> Iterator[Arrays]:
    """The arrays of every batch, in order: those that an interrupted session stored, and fresh ones, which are stored.

    settings : of which count ``resumed`` (whether there may be stored batches), ``share`` (of the batches, the others are
        left out) and what says who does the work (``executor``, ``workers`` and so on).

    To a batch's arrays are added ``files``, the names of all that it was to read; ``skipped`` (K, 2), names and reasons
    of those that could not be used; and ``seconds`` () of work. A batch without any image has these alone.

    Raises OtherWork, a kind of BadRun, where a stored batch is of other files; BadData after the last batch if not one image
    is left; Unavailable where memory does not suffice for one item.
    """
    run = stage.run
    groups = [item if isinstance(item, tuple) else (int(item),) for item in stage.items]
    stored = _stored(run, len(groups)) if settings.resumed else {}
    parts = [_part(stage.dataset, groups, *ends) for ends in _plan_of(stage, settings, stored)]
    skipped: dict[str, str] = {}
    anything = not parts or bool(settings.share)  # another share may have what is left
    bar = _Bar(lambda steps: None, 0)
    with progress(sum(len(part.groups) for part in parts) * stage.steps, stage.label) as move:
        fresh = [part for part in parts if part.first not in stored]
        arriving = executor_of(settings).run(
            stage.work, stage.dataset, fresh, stage.batcher, lambda steps: bar(steps)
        )
        with contextlib.closing(arriving):
            for part in parts:
                bar = _Bar(move, len(part.groups) * stage.steps)
                if part.first in stored:
                    arrays = _found(run, stored[part.first].path, part)
                else:
                    arrays = next(arriving)
                    _store(run, part, arrays)
                bar.fill()
                anything |= bool(set(arrays) - set(ADDED))
                skipped |= skipped_in(arrays)
                yield arrays
    if not anything:
        raise BadData(f"not one image is left; {skipped_report(skipped)}")


def _part(dataset: Dataset, groups: Sequence[tuple[int, ...]], first: int, last: int) -> Part:
    names = tuple(dataset.name(index) for group in groups[first:last] for index in group)
    return Part(first, tuple(groups[first:last]), names)


def _found(run: Run, path: str, part: Part) -> Arrays:
    arrays = run.load_arrays(path)
    if not np.array_equal(arrays.get("files", []), np.array(part.files)):
        raise _other(run, path)
    return arrays


def _store(run: Run, part: Part, arrays: Arrays) -> None:
    """Store a batch, and beside it what it has for files of their own, which is taken out of ``arrays``."""
    for name in [name for name in arrays if name.endswith(".npz")]:
        run.save_bytes(name, arrays.pop(name).tobytes())
    run.save_arrays(f"batches/{part.first:05d}-{part.last - 1:05d}.npz", arrays)


def _plan_of(stage: Stage, settings: Settings, stored: dict[int, _Batch]) -> list[tuple[int, int]]:
    """First and one past the last item of every batch that is to be done or was; of a share the same for all shares."""
    count = len(stage.items)
    if not settings.share:
        return _plan(count, stage.batcher.size, stored)
    about = {"share": settings.share, "items": count, "batch_size": stage.batcher.asked}
    if SHARE in stage.run.list():
        then = json.loads(stage.run.load_text(SHARE))
        if then != about:
            raise OtherWork(
                f"share {stage.run.id} was begun as {then}, and is now to go on as {about}; leave --batch-size out, or "
                "begin it anew in another folder"
            )
    else:
        stage.run.save_text(SHARE, json.dumps(about) + "\n")
    return batches_of_share(settings.share, count, stage.batcher.asked)


def batches_of_share(share: str, count: int, size: int) -> list[tuple[int, int]]:
    """First and one past the last item of the batches of a share of ``count`` items, ``size`` at once.

    Example
    -------
    >>> batches_of_share("2/2", 7, 2)
    [(2, 4), (6, 7)]
    """
    number, of = share_of(share)
    return _plan(count, size, {})[number - 1 :: of]


def share_of(text: str) -> tuple[int, int]:
    """Number, from 1, and count of ``I/N``. Raises BadValue for another text.

    Example
    -------
    >>> share_of("2/8")
    (2, 8)
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise BadValue(f"{text!r} is no share; write I/N, such as 2/8 for the second of eight")
    return int(number), int(count)


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
        name = BATCH_NAME.fullmatch(PurePosixPath(path).name)
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
