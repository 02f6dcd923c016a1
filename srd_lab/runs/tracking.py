"""Where a run's settings, numbers and files go: an MLflow store, or a plain folder.

::

    with open_run("attack", "srd, 100 pairs", {"steps": 200, **environment()}) as run:
        with run.child("srd", {"method": "srd"}) as part:
            part.save_arrays("parts/000.npz", {"ssim": ssim})
            part.log_metrics({"ssim": float(ssim.mean())})
        print(run.where)
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import numpy as np

from srd_lab.errors import BadRun, BadValue, OtherWork, SrdLabError, first_line
from srd_lab.runs.addresses import local_folder, store_uri
from srd_lab.runs.files import Files, FolderFiles, ServerFiles
from srd_lab.runs.store import EXPERIMENT, Store, open_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run as StoredRun

_LONGEST_PARAM = 6000
_NOT_FINITE = "not_finite"
_ABOUT = "run.json"
_AS_BEFORE = "as before"

Params = Mapping[str, object]
Traces = Mapping[str, tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]]
Names = list[str]  # a method of Run is called ``list``


class Run(ABC):
    """One run of a command, or (``child``) one method's share of it; a context manager.

    It ends FINISHED, KILLED on a KeyboardInterrupt, as it was before on OtherWork, FAILED on any other exception (which goes
    on), and takes children that are still open along.

    id : what ``--resume`` takes: the store's id, without tracking the folder; "" where nothing is kept.
    where : one line: how to see the run.
    params : what is stored; on resume the settings to go on with.

    Methods raise StoreTrouble where the store or the folder cannot be used, and BadValue for a ``path`` that is no relative
    one inside the run.
    """

    id: str
    where: str
    params: dict[str, str]

    def __init__(self, files: Files) -> None:
        self._files = files
        self._children: list[Run] = []
        self._open = True
        self._before = "RUNNING"  # its status when it was opened
        self.params = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("FINISHED")
            return
        with contextlib.suppress(SrdLabError):  # a store that just broke must not hide the first error
            if isinstance(error, OtherWork):
                self._close(_AS_BEFORE)
            else:
                self._close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _close(self, status: str) -> None:
        for child in self._children:
            child._close(status)
        if self._open:
            self._open = False
            self._end(status)

    def add_params(self, params: Params) -> None:
        """Store what is not stored yet, as text. Raises BadRun where a value differs from the stored one."""
        texts = {key: _param_text(value) for key, value in params.items()}
        for key, text in texts.items():
            if self.params.get(key, text) != text:
                raise BadRun(
                    f"run {self.id} was made with {key} = {self.params[key]}, not {text}; "
                    "leave the setting out, or start a new run"
                )
        new = {key: text for key, text in texts.items() if key not in self.params}
        self.params |= new
        self._add_params(new)

    def child(self, name: str, params: Params | None = None) -> Run:
        """The part called ``name``: found if this run has one (so on resume), else made.

        Raises BadRun if it was made with other values for ``params``.
        """
        part = self._child(name, params or {})
        self._children.append(part)
        return part

    @abstractmethod
    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Store final numbers, name -> value; one that is not finite is left out and named in the tag ``not_finite``.

        Names are stored as :func:`metric_name` writes them.
        """

    @abstractmethod
    def log_traces(self, traces: Traces) -> None:
        """Store curves, name -> (steps (S,), values (S,)); storing the same again changes nothing.

        Points that are not finite are left out and the curve is named in the tag ``not_finite``.
        """

    @abstractmethod
    def _add_params(self, new: dict[str, str]) -> None: ...

    @abstractmethod
    def _child(self, name: str, params: Params) -> Run: ...

    @abstractmethod
    def _end(self, status: str) -> None: ...

    def _status(self, status: str) -> str:
        """The status to end with: one that is as it was before may not be that of a run at work."""
        if status != _AS_BEFORE:
            return status
        return self._before if self._before != "RUNNING" else "FAILED"

    def save_text(self, path: str, text: str) -> None:
        """Store a text as file ``path`` (relative, forward slashes), replacing what was there."""
        self._files.write(_checked(path), text.encode())

    def save_bytes(self, path: str, content: bytes) -> None:
        """Store ``content`` as file ``path`` (relative, forward slashes), replacing what was there."""
        self._files.write(_checked(path), content)

    def save_arrays(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays, name -> array, as the compressed npz file ``path``, replacing what was there.

        Raises BadValue for arrays of Python objects.
        """
        if objects := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise BadValue(f"{path}: {objects[0]!r} holds Python objects; give numbers or strings")
        buffer = io.BytesIO()
        named: dict[str, Any] = dict(arrays)
        np.savez_compressed(buffer, **named)
        self._files.write(_checked(path), buffer.getvalue())

    def save_figure(self, path: str, figure: Figure) -> None:
        """Draw a matplotlib figure as file ``path``, in the format of its suffix (png, pdf, svg)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=PurePosixPath(path).suffix.lstrip(".") or "png")
        self._files.write(_checked(path), buffer.getvalue())

    def load_text(self, path: str) -> str:
        """What :meth:`save_text` stored. Raises BadRun if there is no such file."""
        return self._files.read(_checked(path)).decode()

    def load_arrays(self, path: str) -> dict[str, np.ndarray]:
        """What :meth:`save_arrays` stored. Raises BadRun if there is no such file, or it is damaged."""
        content = self._files.read(_checked(path))
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return dict(arrays)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file fails in any way
            raise BadRun(
                f"file {path} of run {self.id} is damaged ({first_line(error)}); remove it"
            ) from None

    def put_aside(self, path: str) -> str:
        """Rename file ``path``, which is damaged or none of ours, so that it is neither read nor lost; its new name."""
        return self._files.put_aside(_checked(path))

    def tidy(self) -> None:
        """Remove what writers that were killed left behind."""
        self._files.tidy()

    def list(self, folder: str = "") -> Names:
        """Paths of the files directly in ``folder``, sorted; empty if there is no such folder."""
        return self._files.names(_checked(folder) if folder else "")


def metric_name(name: str) -> str:
    """A name that MLflow takes.

    Example
    -------
    >>> metric_name("smoothed(srd,0.1,64)/pcc")
    'smoothed-srd-0.1-64/pcc'
    """
    return re.sub(r"[^\w. :/-]+", "-", name.replace(")", ""), flags=re.ASCII)


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
        self._before = str(stored.info.status)
        self._metrics = dict(stored.data.metrics)  # what is stored already is not stored again on resume
        self._not_finite = set(filter(None, stored.data.tags.get(_NOT_FINITE, "").split(", ")))

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
            self._store.set_tag(self.id, _NOT_FINITE, ", ".join(sorted(self._not_finite)))

    def _child(self, name: str, params: Params) -> Run:
        found = self._store.find_child(self.id, name)
        stored = found or self._store.create_run(name, parent=self.id)
        return _started(MlflowRun(self._store, stored, self.where), params)

    def _end(self, status: str) -> None:
        self._store.set_status(self.id, self._status(status))
        if self.copy_to is not None and status == "FINISHED":
            self._copy(self.copy_to)

    def _copy(self, folder: Path) -> None:
        """Put all files of this run and of its parts there, and its numbers, as a run without tracking does."""
        copy = FolderFiles(folder)
        for path in self._files.everything():
            copy.write(path, self._files.read(path))
        about = {"run": self.id, "params": self.params, "metrics": self._metrics}
        copy.write(
            _ABOUT,
            (json.dumps(about | {_NOT_FINITE: sorted(self._not_finite)}, indent=1) + "\n").encode(),
        )
        for child in self._children:
            if isinstance(child, MlflowRun):
                child._copy(folder / quote(child.name, safe=" ,+=()"))


class FolderRun(Run):
    """A run without tracking: its files in a folder, with ``run.json`` (params, metrics) and ``traces.csv``.

    command, name, params : stored in ``run.json``.
    folder : None = a temporary one that goes when the run ends.
    again : go on with what the folder holds, if it holds a run. Raises BadRun where that is another command's or damaged.
    """

    def __init__(
        self, command: str, name: str, params: Params, folder: Path | None, *, again: bool = False
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(str(folder))
        super().__init__(FolderFiles(self._folder))
        self.id = str(folder or "")
        self.where = f"the files are in {folder}" if folder else "nothing is kept (no tracking, no --out)"
        self._about: dict[str, Any] = {"command": command, "name": name}
        self._metrics: dict[str, float] = {}
        self._traces: dict[tuple[str, int], float] = {}
        self._not_finite: set[str] = set()
        self._again = again
        if again and (self._folder / _ABOUT).exists():
            self._read()
        self._about["status"] = "RUNNING"
        self.add_params(params)

    def _read(self) -> None:
        """Take over what an earlier session has stored."""
        about = _about(self._folder)
        if "run" in about:
            raise BadRun(
                f"{self._folder} holds copies of what run {about['run']} has stored; resume that one"
            )
        if (made_by := about.get("command")) != (command := self._about["command"]):
            raise BadRun(f"run {self._folder} was made by {made_by!r}, not by {command!r}")
        try:
            self.params, self._metrics = dict(about["params"]), dict(about["metrics"])
            self._not_finite, self._before = set(about[_NOT_FINITE]), str(about["status"])
            self._about["name"] = about["name"]
            if "traces.csv" in self.list():
                rows = csv.DictReader(io.StringIO(self.load_text("traces.csv")))
                self._traces = {(row["name"], int(row["step"])): float(row["value"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise BadRun(
                f"what {self._folder} holds of a run is damaged ({error!r}); start a new run"
            ) from None

    def _add_params(self, new: dict[str, str]) -> None:
        self._write_about()

    def log_metrics(self, values: Mapping[str, float]) -> None:
        values = {metric_name(name): float(value) for name, value in values.items()}
        self._metrics |= {name: value for name, value in values.items() if math.isfinite(value)}
        self._not_finite |= {name for name, value in values.items() if not math.isfinite(value)}
        self._write_about()

    def log_traces(self, traces: Traces) -> None:
        for name, (steps, values) in ((metric_name(name), trace) for name, trace in traces.items()):
            for step, value in zip(steps, values, strict=True):
                if math.isfinite(value):
                    self._traces[name, int(step)] = float(value)
                else:
                    self._not_finite.add(name)
        table = io.StringIO()
        rows = ((name, step, value) for (name, step), value in sorted(self._traces.items()))
        csv.writer(table, lineterminator="\n").writerows([("name", "step", "value"), *rows])
        self.save_text("traces.csv", table.getvalue())
        self._write_about()

    def _write_about(self) -> None:
        content = {"params": self.params, "metrics": self._metrics, _NOT_FINITE: sorted(self._not_finite)}
        self.save_text(_ABOUT, json.dumps(self._about | content, indent=1) + "\n")

    def _child(self, name: str, params: Params) -> Run:
        folder = self._folder / quote(name, safe=" ,+=()")
        part = FolderRun(self._about["command"], name, params, folder, again=self._again)
        part.where = self.where
        return part

    def _end(self, status: str) -> None:
        self._about["status"] = self._status(status)
        self._write_about()
        if self._temporary:
            self._temporary.cleanup()


def open_run(
    command: str,
    name: str,
    params: Params,
    *,
    track: bool = True,
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
    out: Path | None = None,
    resume: str | None = None,
) -> Run:
    """Start the run of ``command``, or go on with run ``resume``; use it as a context manager.

    name : of a new run.
    params : on resume those given must equal the stored ones; the others are read from ``run.params``.
    track : False writes to the folder ``out`` (or nowhere) and does not import mlflow; True copies what the run has stored
        there when it ends.
    tracking_uri : wins over MLFLOW_TRACKING_URI, which wins over ``mlflow.db`` in the working directory.
    experiment : the MLflow experiment that the run is in.
    resume : the run to go on with: its id, without tracking its folder; None = a new run.

    Raises StoreTrouble if the store or the folder cannot be used, Unavailable without mlflow, BadRun if ``resume`` is not a
    run of ``command`` or has other params, and BadValue for an ``out`` that another run has taken.
    """
    if not track:
        return _in_folder(command, name, params, out, resume)
    _refuse_taken(out, resume)
    store = open_store(store_uri(tracking_uri), experiment, command)
    stored = store.get_run(resume) if resume else store.create_run(name)
    run = _started(MlflowRun(store, stored, store.where(stored)), params)
    run.tidy()
    run.copy_to = out
    return run


def _in_folder(command: str, name: str, params: Params, out: Path | None, resume: str | None) -> FolderRun:
    if resume is None:
        _refuse_taken(out, advice=f"give another --out, or go on with it: --resume {out}")
        return FolderRun(command, name, params, out)
    folder = Path(resume)
    if not (folder / _ABOUT).is_file():
        raise BadRun(
            f"there is no {folder / _ABOUT}; --no-track --resume takes the folder that a run without tracking had as --out"
        )
    if out is not None and out.resolve() != folder.resolve():
        raise BadValue(f"a run without tracking goes on in its own folder, {folder}; leave --out out")
    run = FolderRun(command, name, params, folder, again=True)
    run.tidy()
    return run


def _refuse_taken(
    out: Path | None,
    resume: str | None = None,
    *,
    advice: str = "give another --out, or move away what is there",
) -> None:
    """Refuse a folder in which another run's files lie than those of run ``resume``."""
    if out is None or (resume and _holds(out, resume)):
        return
    if out.exists() and not out.is_dir():
        raise BadValue(f"{out} is no folder; give another --out")
    taken = [name for name in (_ABOUT, "summary.txt", "batches") if (out / name).exists()]
    if taken:
        raise BadValue(f"{out} holds another run's {taken[0]}; {advice}")


def _holds(out: Path, run_id: str) -> bool:
    """Whether the files in a folder are copies of those of a run."""
    try:
        return _about(out).get("run") == run_id
    except BadRun:
        return False


def _about(folder: Path) -> dict[str, Any]:
    """What a folder says of the run whose files it holds; BadRun if it says nothing."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRun(f"{folder / _ABOUT} is damaged ({error})") from None
    if not isinstance(about, dict):
        raise BadRun(f"{folder / _ABOUT} is damaged (it is no object)")
    return about


def _started(run: MlflowRun, params: Params) -> MlflowRun:
    run.add_params(params)
    run._store.set_status(run.id, "RUNNING")  # it may have ended before and be resumed
    return run


def _param_text(value: object) -> str:
    """``str(value)``; beyond MLflow's limit a digest replaces the end, so that equal still means equal."""
    text = str(value)
    if len(text) <= _LONGEST_PARAM:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()})"
    return text[: _LONGEST_PARAM - len(end)] + end


def _checked(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BadValue(f"{path!r} is not a path inside a run; give one like 'parts/000.npz'")
    return str(parts)
