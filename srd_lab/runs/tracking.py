"""Where a run's settings, numbers and files go: an MLflow store, or a plain folder.

::

    with open_run("attack", "srd, 100 pairs", {"steps": 200, **environment()}) as run:
        with run.child("srd", {"method": "srd"}) as part:
            part.save_arrays("parts/000.npz", {"ssim": ssim})
            part.log_metrics({"ssim": float(ssim.mean())})
        print(run.where)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from srd_lab.runs.addresses import local_folder, store_uri
from srd_lab.runs.files import FolderFiles, ServerFiles
from srd_lab.runs.folder_run import ABOUT, FolderRun, open_folder, refuse_taken
from srd_lab.runs.label import Drawn
from srd_lab.runs.run import NOT_FINITE, Params, Run, Traces, metric_name
from srd_lab.runs.store import Store, experiment_of, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun

_LONGEST_NOTE = 8000

__all__ = ["FolderRun", "MlflowRun", "Run", "Traces", "metric_name", "open_run"]


class MlflowRun(Run):
    """A run in an MLflow store.

    store : opened. stored : MLflow's record of the run. where : see :class:`Run`.
    """

    def __init__(self, store: Store, stored: StoredRun, where: str) -> None:
        self.id = stored.info.run_id
        folder = local_folder(stored.info.artifact_uri)
        super().__init__(FolderFiles(folder) if folder else ServerFiles(store, self.id))
        self.name = str(stored.info.run_name)
        self.copy_to: Path | None = None  # where its files go as well when it has finished
        self.where = where
        self.params = dict(stored.data.params)
        self._store = store
        self._start = stored.info.start_time
        self._experiment = str(stored.info.experiment_id)  # that of an older version's run is another
        self._before = str(stored.info.status)
        self._metrics = dict(stored.data.metrics)  # what is stored already is not stored again on resume
        self._command = store.command
        self._tags = {k: v for k, v in stored.data.tags.items() if "." not in k and k != NOT_FINITE}
        self._not_finite = set(filter(None, stored.data.tags.get(NOT_FINITE, "").split(", ")))

    def note(self, markdown: str) -> None:
        self._store.set_tag(self.id, "mlflow.note.content", _shortened(markdown))

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._tags |= tags
        self._store.set_tags(self.id, tags)

    def _log_drawn(self, drawn: Drawn) -> None:
        self._store.log_drawn(self.id, drawn)

    def _add_params(self, new: dict[str, str]) -> None:
        self._store.log_params(self.id, new)

    def log_metrics(self, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [(metric_name(name), float(value), now, 0) for name, value in values.items()]
        new = [point for point in points if self._metrics.get(point[0]) != point[1]]
        self._log(new)
        self._metrics |= {name: value for name, value, *_ in new}

    def log_traces(self, traces: Traces) -> None:
        # MLflow drops a point that repeats one in key, step, value and time: hence no clock here.
        self._log(
            [
                (metric_name(name), float(value), self._start + int(step), int(step))
                for name, (steps, values) in traces.items()
                for step, value in zip(steps, values, strict=True)
            ]
        )

    def _log(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        self._store.log_metrics(self.id, [point for point in points if math.isfinite(point[1])])
        if lost := {point[0] for point in points if not math.isfinite(point[1])} - self._not_finite:
            self._not_finite |= lost
            self._store.set_tag(self.id, NOT_FINITE, ", ".join(sorted(self._not_finite)))

    def _child(self, name: str, params: Params) -> Run:
        found = self._store.find_child(self.id, name, self._experiment)
        stored = found or self._store.create_run(name, self.id, self._experiment)
        return _started(MlflowRun(self._store, stored, self.where), params)

    def _end(self, status: str) -> None:
        self._store.set_status(self.id, self._status(status))
        if self.copy_to is not None and status == "FINISHED":
            self._copy(self.copy_to)

    def _copy(self, folder: Path) -> None:
        """Put all files of this run and its parts there, and name, tags and numbers, as a run without tracking does."""
        copy = FolderFiles(folder)
        for path in self._files.everything():
            copy.write(path, self._files.read(path))
        about: dict[str, Any] = {
            "run": self.id,
            "command": self._command,
            "name": self.name,
            "status": "FINISHED",
        }
        about |= {"started": self._start / 1000, "tags": self._tags}
        about |= {"params": self.params, "metrics": self._metrics}
        copy.write(
            ABOUT,
            (json.dumps(about | {NOT_FINITE: sorted(self._not_finite)}, indent=1) + "\n").encode(),
        )
        for child in self._children:
            if isinstance(child, MlflowRun):
                child._copy(folder / quote(child.name, safe=" ,+=()"))


def open_run(
    command: str,
    name: str,
    params: Params,
    *,
    track: bool = True,
    tracking_uri: str | None = None,
    out: Path | None = None,
    resume: str | None = None,
) -> Run:
    """Start the run of ``command``, or go on with run ``resume``; use it as a context manager.

    name : of a new run.
    params : on resume those given must equal the stored ones; the others are read from ``run.params``.
    track : False writes to the folder ``out`` (or nowhere) and does not import mlflow; True copies what the run has stored
        there when it ends.
    tracking_uri : wins over MLFLOW_TRACKING_URI, which wins over ``mlflow.db`` in the working directory.
    resume : the run to go on with: its id, without tracking its folder; None = a new run.

    Raises StoreTrouble if the store or the folder cannot be used, Unavailable without mlflow, BadRun if ``resume`` is not a
    run of ``command`` or has other params, and BadValue for an ``out`` that another run has taken.
    """
    if not track:
        return open_folder(command, name, params, out, resume)
    refuse_taken(out, resume)
    store = open_store(store_uri(tracking_uri), experiment_of(command), command)
    stored = store.get_run(resume) if resume else store.create_run(name)
    run = _started(MlflowRun(store, stored, store.where(stored)), params)
    run.tidy()
    run.copy_to = out
    return run


def _started(run: MlflowRun, params: Params) -> MlflowRun:
    run.add_params(params)
    run._store.set_status(run.id, "RUNNING")  # it may have ended before and be resumed
    return run


def _shortened(markdown: str) -> str:
    """A description that MLflow takes whole: of a longer one the first blocks."""
    if len(markdown) <= _LONGEST_NOTE:
        return markdown
    kept = markdown[: _LONGEST_NOTE - 60].rpartition("\n\n")[0]
    return f"{kept}\n\n(The rest is in the file summary.txt of this run.)"
