"""Where a run's settings, numbers and files go: an MLflow store, or a plain folder.

The only importer of mlflow, and lazily: without tracking it need not be installed. ::

    with open_run("attack", "srd, 100 pairs", {"steps": 200, **environment()}) as run:
        with run.child("srd", {"method": "srd"}) as part:
            part.save_arrays("parts/000.npz", {"ssim": ssim})
            part.log_metrics({"ssim": float(ssim.mean())})
        print(run.where)
"""

from __future__ import annotations

import contextlib
import csv
import functools
import getpass
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

import numpy as np

from srd_lab.types import SrdLabError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as StoredRun

DEFAULT_STORE = "sqlite:///mlflow.db"
EXPERIMENT = "srd-lab"

_PACKAGES = ("torch", "torchvision", "numpy", "scikit-image", "scipy", "mlflow", "srd-lab")
_LONGEST_PARAM = 6000
_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000
_COMMAND = "srd_lab.command"
_NOT_FINITE = "not_finite"

Params = Mapping[str, object]
Traces = Mapping[str, tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]]
Names = list[str]  # a method of Run is called ``list``


# --- files of a run -----------------------------------------------------------------------------------


class Files(Protocol):
    """Named contents; names are relative, with forward slashes."""

    def write(self, path: str, content: bytes) -> None: ...

    def read(self, path: str) -> bytes: ...

    def names(self, folder: str) -> list[str]: ...


@dataclass(frozen=True)
class FolderFiles:
    """Files below ``folder``. A write is seen whole or not at all, even if the process is killed."""

    folder: Path

    def write(self, path: str, content: bytes) -> None:
        place = self.folder / path
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(place)
        except OSError as error:
            raise SrdLabError(f"cannot write {place}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    def read(self, path: str) -> bytes:
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise SrdLabError(f"cannot read {self.folder / path}: {error.strerror}") from None

    def names(self, folder: str) -> list[str]:
        found = (self.folder / folder).glob("[!.]*")
        return sorted(item.relative_to(self.folder).as_posix() for item in found if item.is_file())


@dataclass(frozen=True)
class ServerFiles:
    """The artifacts of a run whose store is a server or a cloud bucket."""

    store: Store
    run_id: str

    def write(self, path: str, content: bytes) -> None:
        target = PurePosixPath(path)
        with tempfile.TemporaryDirectory() as folder, self.store.errors():
            local = Path(folder, target.name)
            local.write_bytes(content)
            parent = None if target.parent == PurePosixPath() else str(target.parent)
            self.store.client.log_artifact(self.run_id, str(local), parent)

    def read(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, self.store.errors():
            return Path(self.store.client.download_artifacts(self.run_id, path, folder)).read_bytes()

    def names(self, folder: str) -> list[str]:
        with self.store.errors():
            found = self.store.client.list_artifacts(self.run_id, folder or None)
        return sorted(item.path for item in found if not item.is_dir)


# --- runs ---------------------------------------------------------------------------------------------


class Run(ABC):
    """One run of a command, or (``child``) one method's share of it; a context manager.

    It ends FINISHED, KILLED on a KeyboardInterrupt, FAILED on any other exception (which goes on), and
    takes children that are still open along.

    id : the store's id; "" without tracking.
    where : one line: how to see the run.
    params : what is stored; on resume the settings to go on with.
    """

    id: str
    where: str
    params: dict[str, str]

    def __init__(self, files: Files) -> None:
        self._files = files
        self._children: list[Run] = []
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("FINISHED")
            return
        with contextlib.suppress(SrdLabError):  # a store that just broke must not hide the first error
            self._close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _close(self, status: str) -> None:
        for child in self._children:
            child._close(status)
        if self._open:
            self._open = False
            self._end(status)

    def child(self, name: str, params: Params | None = None) -> Run:
        """The part called ``name``: found if this run has one (so on resume), else made.

        Raises SrdLabError if it was made with other values for ``params``.
        """
        part = self._child(name, params or {})
        self._children.append(part)
        return part

    @abstractmethod
    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Store final numbers; one that is not finite is left out and named in the tag ``not_finite``."""

    @abstractmethod
    def log_traces(self, traces: Traces) -> None:
        """Store curves, name -> (steps (S,), values (S,)); storing the same again changes nothing.

        Points that are not finite are left out and the curve is named in the tag ``not_finite``.
        """

    @abstractmethod
    def _child(self, name: str, params: Params) -> Run: ...

    @abstractmethod
    def _end(self, status: str) -> None: ...

    def save_text(self, path: str, text: str) -> None:
        """Store a text as file ``path`` (relative, forward slashes), replacing what was there."""
        self._files.write(_checked(path), text.encode())

    def save_arrays(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays as the compressed npz file ``path``, replacing what was there."""
        if objects := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise SrdLabError(f"{path}: {objects[0]!r} holds Python objects; give numbers or strings")
        buffer = io.BytesIO()
        named: dict[str, Any] = dict(arrays)
        np.savez_compressed(buffer, **named)
        self._files.write(_checked(path), buffer.getvalue())

    def save_figure(self, path: str, figure: Figure) -> None:
        """Draw a matplotlib figure as file ``path`` in the format of its suffix (png, pdf, svg)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=PurePosixPath(path).suffix.lstrip(".") or "png")
        self._files.write(_checked(path), buffer.getvalue())

    def load_text(self, path: str) -> str:
        """What ``save_text`` stored. Raises SrdLabError if there is no such file."""
        return self._files.read(_checked(path)).decode()

    def load_arrays(self, path: str) -> dict[str, np.ndarray]:
        """What ``save_arrays`` stored. Raises SrdLabError if there is no such file or it is damaged."""
        content = self._files.read(_checked(path))
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise SrdLabError(f"file {path} of run {self.id} is damaged ({error}); remove it") from None

    def list(self, folder: str = "") -> Names:
        """Paths of the files directly in ``folder``, sorted; empty if there is no such folder."""
        return self._files.names(_checked(folder) if folder else "")


class MlflowRun(Run):
    """A run in an MLflow store."""

    def __init__(self, store: Store, stored: StoredRun, where: str) -> None:
        self.id = stored.info.run_id
        folder = _local_folder(stored.info.artifact_uri)
        super().__init__(FolderFiles(folder) if folder else ServerFiles(store, self.id))
        self.where = where
        self.params = dict(stored.data.params)
        self._store = store
        self._start = stored.info.start_time
        self._not_finite = set(filter(None, stored.data.tags.get(_NOT_FINITE, "").split(", ")))

    def add_params(self, params: Params) -> None:
        """Store what is not stored yet; raises SrdLabError where a value differs from the stored one."""
        texts = {key: _param_text(value) for key, value in params.items()}
        for key, text in texts.items():
            if self.params.get(key, text) != text:
                raise SrdLabError(
                    f"run {self.id} was made with {key} = {self.params[key]}, not {text}; "
                    "leave the setting out, or start a new run"
                )
        new = {key: text for key, text in texts.items() if key not in self.params}
        self._store.log_params(self.id, new)
        self.params |= new

    def log_metrics(self, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [(name, float(value), now, 0) for name, value in values.items()]
        self._log(points)

    def log_traces(self, traces: Traces) -> None:
        # MLflow drops a point that repeats one in key, step, value and time: hence no clock here.
        self._log(
            [
                (name, float(value), self._start + int(step), int(step))
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
        self._store.set_status(self.id, status)


class FolderRun(Run):
    """A run without tracking: its files in a folder, with ``run.json`` (params, metrics) and ``traces.csv``.

    Without a folder the files live in a temporary one that goes when the run ends.
    """

    def __init__(self, command: str, name: str, params: Params, folder: Path | None) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(str(folder))
        super().__init__(FolderFiles(self._folder))
        self.id = ""
        self.where = f"the files are in {folder}" if folder else "nothing is kept (no tracking, no --out)"
        self.params = {key: _param_text(value) for key, value in params.items()}
        self._about: dict[str, Any] = {"command": command, "name": name, "status": "RUNNING"}
        self._metrics: dict[str, float] = {}
        self._traces: dict[tuple[str, int], float] = {}
        self._not_finite: set[str] = set()
        self._write_about()

    def log_metrics(self, values: Mapping[str, float]) -> None:
        self._metrics |= {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._not_finite |= {name for name, value in values.items() if not math.isfinite(value)}
        self._write_about()

    def log_traces(self, traces: Traces) -> None:
        for name, (steps, values) in traces.items():
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
        self.save_text("run.json", json.dumps(self._about | content, indent=1) + "\n")

    def _child(self, name: str, params: Params) -> Run:
        folder = self._folder / quote(name, safe=" ,+=()")
        part = FolderRun(self._about["command"], name, params, folder)
        part.where = self.where
        return part

    def _end(self, status: str) -> None:
        self._about["status"] = status
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

    track : False writes to the folder ``out`` (or nowhere) and does not import mlflow.
    tracking_uri : wins over MLFLOW_TRACKING_URI, which wins over ``mlflow.db`` in the working directory.
    params : on resume those given must equal the stored ones; the others are read from ``run.params``.

    Raises SrdLabError if the store cannot be used, or ``resume`` is not a run of ``command`` in it.
    """
    if not track:
        if resume:
            raise SrdLabError("only a tracked run can be resumed; leave --no-track or --resume out")
        return FolderRun(command, name, params, out)
    store = _open_store(store_uri(tracking_uri), experiment, command)
    stored = store.get_run(resume) if resume else store.create_run(name)
    return _started(MlflowRun(store, stored, store.where(stored)), params)


def _started(run: MlflowRun, params: Params) -> MlflowRun:
    run.add_params(params)
    run._store.set_status(run.id, "RUNNING")  # it may have ended before and be resumed
    return run


# --- the MLflow store ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """An MLflow client, the experiment that new runs go to, and the command that makes them."""

    client: MlflowClient
    uri: str
    experiment_id: str
    command: str

    def errors(self) -> contextlib.AbstractContextManager[None]:
        return _store_errors(self.uri)

    def create_run(self, name: str, parent: str = "") -> StoredRun:
        tags = _source_tags(self.command) | ({"mlflow.parentRunId": parent} if parent else {})
        with self.errors():
            return self.client.create_run(self.experiment_id, run_name=name, tags=tags)

    def get_run(self, run_id: str) -> StoredRun:
        from mlflow.exceptions import MlflowException

        try:
            stored = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise SrdLabError(_one_line(error)) from None
            raise SrdLabError(f"no run {run_id} in {self.uri}; `srd-lab ui` lists them") from None
        tags = stored.data.tags
        if stored.info.lifecycle_stage == "deleted":
            raise SrdLabError(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` undoes it")
        if parent := tags.get("mlflow.parentRunId"):
            raise SrdLabError(f"run {run_id} is one part of run {parent}; resume that one")
        if (made_by := tags.get(_COMMAND, "another program")) != self.command:
            raise SrdLabError(f"run {run_id} was made by {made_by!r}, not by {self.command!r}")
        return stored

    def find_child(self, parent: str, name: str) -> StoredRun | None:
        with self.errors():
            found = self.client.search_runs(
                [self.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", order_by=["start_time ASC"]
            )
        return next((run for run in found if run.info.run_name == name), None)

    def set_status(self, run_id: str, status: str) -> None:
        with self.errors():
            if status == "RUNNING":
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status)

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        with self.errors():
            self.client.set_tag(run_id, key, value)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, value) for key, value in params.items()]
        with self.errors():
            for start in range(0, len(rows), _PARAMS_PER_CALL):
                self.client.log_batch(run_id, params=rows[start : start + _PARAMS_PER_CALL])

    def log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        rows: list[Metric] = [Metric(*point) for point in points]
        with self.errors():
            for start in range(0, len(rows), _METRICS_PER_CALL):
                self.client.log_batch(run_id, metrics=rows[start : start + _METRICS_PER_CALL])

    def where(self, stored: StoredRun) -> str:
        if _database(self.uri) is None:
            path = f"experiments/{stored.info.experiment_id}/runs/{stored.info.run_id}"
            page = (
                f"{self.uri.rstrip('/')}/#/{path}" if self.uri.startswith("http") else f"it is in {self.uri}"
            )
            return f"run {stored.info.run_id}: {page}"
        if self.uri == _absolute(DEFAULT_STORE):
            return f"run {stored.info.run_id}: `srd-lab ui` in this directory shows it"
        return f"run {stored.info.run_id}: `srd-lab ui --tracking-uri {self.uri}` shows it"


def store_uri(tracking_uri: str | None = None) -> str:
    """The store to use: the argument, else MLFLOW_TRACKING_URI, else ``mlflow.db`` right here."""
    return _absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def _database(uri: str) -> Path | None:
    """The file behind an SQLite URI; None for any other store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(unquote(found[1])) if found else None


def _absolute(uri: str) -> str:
    # MLflow keeps one engine per URI: a relative one would outlive a change of directory.
    file = _database(uri)
    if file is None:
        return uri
    path = (Path.cwd() / file).as_posix()
    if "%" in path or "?" in path:  # read as an escape by some versions of MLflow and SQLAlchemy only
        raise SrdLabError(f"MLflow cannot use {path} because of its '%' or '?'; give another --tracking-uri")
    return f"sqlite:///{path}"


def _local_folder(uri: str) -> Path | None:
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(uri).path))
    return None if scheme else Path(uri)


def _open_store(uri: str, experiment: str, command: str) -> Store:
    """Connect; a fresh SQLite store is made by one process while the others wait."""
    _quiet_mlflow()
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise SrdLabError("mlflow is not installed; `pip install mlflow`, or use --no-track") from None
    file = _database(uri)
    with _alone(file) if file else contextlib.nullcontext(), _store_errors(uri), _impatient():
        client = MlflowClient(tracking_uri=uri)
        location = _artifact_folder(file, experiment) if file else None
        store = Store(client, uri, _experiment_id(client, experiment, location), command)
    if file:
        _follow_move(file, experiment)
    return store


def _artifact_folder(file: Path, experiment: str) -> str:
    return str(file.parent / "mlruns" / quote(experiment, safe=" "))


def _experiment_id(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            found = client.get_experiment(client.create_experiment(name, location))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # on a server another process can be first
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        raise SrdLabError(
            f"experiment {name!r} was deleted; "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the store's lock; raises SrdLabError if ``file`` cannot be a store."""
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=120):
            fresh = not file.exists()
            with contextlib.closing(sqlite3.connect(file)) as database:
                database.execute("PRAGMA schema_version")
            try:
                yield
            except BaseException:
                if fresh:  # half a schema could never be opened again
                    file.unlink(missing_ok=True)
                raise
    except Timeout:
        raise SrdLabError(f"another process has held {file} locked for two minutes; is it stuck?") from None
    except (OSError, sqlite3.Error) as error:
        raise SrdLabError(f"{file} cannot be used as an MLflow store ({error}); see --tracking-uri") from None


def _follow_move(file: Path, experiment: str) -> str:
    """Point the store at the artifacts beside it after its directory was moved or copied.

    MLflow records absolute paths; without this the runs of a renamed project lose their files and new
    ones are written under the old name. Gives the experiment's id, "" if the store has no such experiment.
    """
    folder = _artifact_folder(file, experiment)
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
        query = "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?"
        found = database.execute(query, (experiment,)).fetchone()
        if found is None:
            return ""
        number, old = found
        beside = Path(old).parts[-2:] == Path(folder).parts[-2:]  # else somebody chose another place
        if old != folder and beside and Path(folder).is_dir():
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE experiment_id = ? AND substr({column}, 1, ?) = ?",
                    (folder, len(old) + 1, number, len(old), old),
                )
        return str(number)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """At first contact a server that is not there is told at once, not after MLflow's minutes of retries."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextlib.contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise SrdLabError(f"the MLflow store {uri} cannot be used: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if network := re.search(r"\[Errno -?\d+\] ([\w ,]+)", text):
        return network[1]
    return text if len(text) <= 400 else text[:400] + "..."


def _quiet_mlflow() -> None:
    """No calls home, no hints, no chatter; what the user has set in the environment stays."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def _source_tags(command: str) -> dict[str, str]:
    tags = {_COMMAND: command, "mlflow.source.name": f"srd-lab {command}", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


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
        raise SrdLabError(f"{path!r} is not a path inside a run; give one like 'parts/000.npz'")
    return str(parts)


# --- what else belongs in the record ------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions, git commit, platform and thread count, as run parameters."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if commit := _git_commit():
        found["git_commit"] = commit
    if torch := sys.modules.get("torch"):
        found["torch_threads"] = str(torch.get_num_threads())
    return found


def device_name(device: object) -> str:
    """The name of a torch device's hardware, such as "NVIDIA H200" for ``cuda:0``."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(str(device))
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


@functools.cache
def _git_commit() -> str:
    """Commit of the checkout that this package is in, "-dirty" if edited; "" if it is in none."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():  # an installed copy may lie inside somebody else's checkout
        return ""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def launch_ui(tracking_uri: str | None = None, port: int = 5000, host: str = "127.0.0.1") -> None:
    """Serve MLflow's web page on the store until Ctrl-C.

    Raises SrdLabError if there is no store, the port is taken, or the page stops by itself.
    """
    uri = store_uri(tracking_uri)
    if uri.startswith("http"):
        raise SrdLabError(f"{uri} is a server already: open it in a browser")
    file = _database(uri)
    if file and not file.is_file():
        raise SrdLabError(f"no runs yet: {file} does not exist; run a command first, or give --tracking-uri")
    _require_free(host, port)
    _quiet_mlflow()
    print(f"{uri} will be shown at {_page(host, port, file)} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    options = ["--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=warning"]
    calm = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the page would outlive its command
    server = subprocess.Popen(command + options, env=os.environ | calm)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    if status:
        raise SrdLabError(f"`mlflow ui` stopped with exit status {status}; what it said stands above")


def _page(host: str, port: int, file: Path | None) -> str:
    """The address of the runs; MLflow's own start page shows tools for language models first."""
    try:
        number = _follow_move(file, EXPERIMENT) if file else ""
    except sqlite3.Error as error:
        raise SrdLabError(f"{file} is not an MLflow store ({error}); see --tracking-uri") from None
    path = f"/#/experiments/{number}/runs?workflowType=machine_learning" if number else ""
    return f"http://{host}:{port}{path}"


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise SrdLabError(f"cannot listen on {host}:{port} ({reason}); give another --port") from None
