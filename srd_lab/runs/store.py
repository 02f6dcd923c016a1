"""The MLflow store: opening it (once, however many start at the same time) and its runs.

The only importer of mlflow, and lazily: without tracking it need not be installed.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from srd_lab.errors import BadRun, SrdLabError, SrdLabWarning, StoreTrouble, Unavailable
from srd_lab.runs.addresses import DEFAULT_STORE, absolute, database_of, secrets_in, shown
from srd_lab.runs.environment import git_commit
from srd_lab.runs.label import Drawn
from srd_lab.runs.sqlite_store import EXPERIMENT, alone, artifact_folder, follow_move, is_there

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000
COMMAND = "srd_lab.command"  # tag
_LOCKED = "database is locked"
_PATIENCE = 60.0  # seconds
Found = TypeVar("Found")


@dataclass(frozen=True)
class Store:
    """An MLflow store, opened. Its methods raise StoreTrouble where MLflow fails.

    client : MLflow's. uri : of the store, absolute. experiment_id : of the experiment that new runs go to.
    command : that makes them, such as ``attack``; only its own runs are resumed.
    """

    client: MlflowClient
    uri: str
    experiment_id: str
    command: str

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Within: MLflow's errors become StoreTrouble."""
        return _store_errors(self.uri)

    def _patiently(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns; while another process holds a database locked, it is tried again for a minute."""
        began = time.monotonic()
        while True:
            try:
                with self.errors():
                    return work()
            except StoreTrouble as error:
                if _LOCKED not in str(error) or time.monotonic() - began > _PATIENCE:
                    raise
            warnings.warn(
                f"another process has {shown(self.uri)} locked; waiting for a minute at most",
                SrdLabWarning,
                stacklevel=3,
            )
            time.sleep(0.2)

    def create_run(self, name: str, parent: str = "", experiment: str = "") -> StoredRun:
        """A new run called ``name``.

        parent : id of the run that it is a part of, "" = none. experiment : id of its experiment, "" = that of this store.
        """
        tags = _source_tags(self.command) | ({"mlflow.parentRunId": parent} if parent else {})
        where = experiment or self.experiment_id
        return self._patiently(lambda: self.client.create_run(where, run_name=name, tags=tags))

    def get_run(self, run_id: str) -> StoredRun:
        """The run with this id. Raises BadRun if it is not there, was deleted, is part of another or of another command."""
        from mlflow.exceptions import MlflowException

        def found() -> StoredRun | None:
            try:
                return self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

        stored = self._patiently(found)
        if stored is None:
            raise BadRun(f"no run {run_id} in {shown(self.uri)}; `srd-lab ui` lists them")
        tags = stored.data.tags
        if stored.info.lifecycle_stage == "deleted":
            raise BadRun(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` undoes it")
        if parent := tags.get("mlflow.parentRunId"):
            raise BadRun(f"run {run_id} is one part of run {parent}; resume that one")
        if (made_by := tags.get(COMMAND, "another program")) != self.command:
            raise BadRun(f"run {run_id} was made by {made_by!r}, not by {self.command!r}")
        return stored

    def find_child(self, parent: str, name: str, experiment: str) -> StoredRun | None:
        """The oldest part called ``name`` of the run with the id ``parent``, which is in the experiment of this id; None if
        there is none."""
        query = f"tags.`mlflow.parentRunId` = '{parent}'"
        found = self._patiently(
            lambda: self.client.search_runs([experiment], query, order_by=["start_time ASC"])
        )
        return next((run for run in found if run.info.run_name == name), None)

    def set_status(self, run_id: str, status: str) -> None:
        """Set a run's status: RUNNING, or FINISHED, FAILED or KILLED, which also store the time of its end."""
        if status == "RUNNING":
            self._patiently(lambda: self.client.update_run(run_id, status))
        else:
            self._patiently(lambda: self.client.set_terminated(run_id, status))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Set a tag of a run, replacing its value."""
        self._patiently(lambda: self.client.set_tag(run_id, key, value))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set several tags of a run, name -> text; of a long text the first 250 characters."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, value[:250]) for key, value in tags.items()]
        self._patiently(lambda: self.client.log_batch(run_id, tags=rows))

    def log_drawn(self, run_id: str, drawn: Drawn) -> None:
        """Store which images a run uses, as MLflow's data set of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        about = Dataset(
            name=drawn.source[:250],
            digest=drawn.digest,
            source_type="srd-lab",
            source=json.dumps({"data": drawn.source}),
            profile=json.dumps({"images": drawn.images, "of": drawn.of}),
        )
        given = [DatasetInput(about, [InputTag("mlflow.data.context", self.command)])]
        self._patiently(lambda: self.client.log_inputs(run_id, given))

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Store parameters, name -> text; MLflow refuses another value for a name that is stored already."""
        from mlflow.entities import Param

        rows = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(rows), _PARAMS_PER_CALL):
            some = rows[start : start + _PARAMS_PER_CALL]
            self._patiently(partial(self.client.log_batch, run_id, params=some))

    def log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Store points (name, value, time in ms since 1970, step)."""
        from mlflow.entities import Metric

        rows: list[Metric] = [Metric(*point) for point in points]
        for start in range(0, len(rows), _METRICS_PER_CALL):
            some = rows[start : start + _METRICS_PER_CALL]
            self._patiently(partial(self.client.log_batch, run_id, metrics=some))

    def where(self, stored: StoredRun) -> str:
        """One line: how to see the run."""
        if database_of(self.uri) is None:
            path = f"experiments/{stored.info.experiment_id}/runs/{stored.info.run_id}"
            uri = shown(self.uri)
            page = f"{uri.rstrip('/')}/#/{path}" if uri.startswith("http") else f"it is in {uri}"
            return f"run {stored.info.run_id}: {page}"
        if self.uri == absolute(DEFAULT_STORE):
            return f"run {stored.info.run_id}: `srd-lab ui` in this directory shows it"
        return f"run {stored.info.run_id}: `srd-lab ui --tracking-uri {self.uri}` shows it"


def active_run() -> tuple[Store, StoredRun]:
    """The MLflow run that is active in this process, and its store. Raises Unavailable without mlflow, and BadRun without
    such a run."""
    try:
        import mlflow
    except ImportError:
        raise Unavailable("mlflow is not installed; `pip install mlflow`") from None
    active = mlflow.active_run()
    if active is None:
        raise BadRun("no MLflow run is active; log inside `with mlflow.start_run():`")
    client, uri = mlflow.MlflowClient(), mlflow.get_tracking_uri()
    store = Store(client, uri, active.info.experiment_id, "api")
    with store.errors():
        return store, client.get_run(active.info.run_id)


def open_store(uri: str, experiment: str, command: str) -> Store:
    """Connect to a store; a fresh SQLite store is made by one process while the others wait, for two minutes at most.

    uri : as :func:`store_uri` gives it. experiment : where new runs go; made if it is not there.
    command : see :class:`Store`.

    Raises Unavailable where mlflow is not installed, and StoreTrouble where the store cannot be used, or its experiment was
    deleted.
    """
    quiet_mlflow()
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise Unavailable("mlflow is not installed; `pip install mlflow`, or use --no-track") from None
    file = database_of(uri)
    with alone(file) if file else contextlib.nullcontext(), _store_errors(uri), _impatient():
        location = artifact_folder(file, experiment) if file else None
        if file and not is_there(file):
            _make(file, experiment, location)
        client = MlflowClient(tracking_uri=uri)
        store = Store(client, uri, _experiment_id(client, experiment, location), command)
        if file:
            follow_move(file)
    return store


def open_to_read(uri: str) -> Store:
    """Connect to a store that is there, for reading alone; arguments and errors as in :func:`open_store`."""
    quiet_mlflow()
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise Unavailable(
            "mlflow is not installed; `pip install mlflow`, or give the folder of a run"
        ) from None
    file = database_of(uri)
    with _store_errors(uri), _impatient():
        if file and not is_there(file):
            raise StoreTrouble(f"{file} is empty; give another --tracking-uri")
        if file:
            follow_move(file)
        return Store(MlflowClient(tracking_uri=uri), uri, "", "")


def experiment_of(command: str) -> str:
    """The experiment that the runs of a command are in: scores of another kind would stand in the same columns.

    Example
    -------
    >>> experiment_of("reproduce table1")
    'srd-lab reproduce'
    """
    return f"{EXPERIMENT} {command.partition(' ')[0]}"


def _make(file: Path, experiment: str, location: str | None) -> None:
    """Make a store beside its place and move it there whole: who is killed meanwhile leaves no half of one."""
    from mlflow import MlflowClient

    part = file.with_name(f".{file.name}.part")
    for leftover in file.parent.glob(f"{part.name}*"):
        leftover.unlink()
    _experiment_id(MlflowClient(tracking_uri=f"sqlite:///{part.as_posix()}"), experiment, location)
    part.replace(file)


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
        raise StoreTrouble(
            f"experiment {name!r} was deleted; "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        )
    return str(found.experiment_id)


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
    try:
        yield
    except (SrdLabError, MemoryError):
        raise
    except Exception as error:  # MLflow lets through what databases, files and networks raise
        raise StoreTrouble(f"the MLflow store {shown(uri)} cannot be used: {_one_line(error, uri)}") from None


def _one_line(error: Exception, uri: str = "") -> str:
    text = " ".join(str(error).split())
    for secret in secrets_in(uri):
        text = text.replace(secret, "***")
    if network := re.search(r"\[Errno -?\d+\] ([\w ,]+)", text):
        return network[1]
    if schema := re.search(r"database schema \(found version (\w+)", text):
        return (
            f"another version of MLflow made it (schema {schema[1]}); if an older one, back it up and run "
            f"`mlflow db upgrade {shown(uri)}`; if a newer one, `pip install -U mlflow`, or give another --tracking-uri"
        )
    if sql := re.search(r"\(sqlite3\.\w+\) ([^\[(]+)", text):  # without the statement and its parameters
        return sql[1].strip()
    return text if len(text) <= 400 else text[:400] + "..."


def quiet_mlflow() -> None:
    """No calls home, no hints, no chatter; what the user has set in the environment stays."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs tracebacks of what it raises anyway
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def _source_tags(command: str) -> dict[str, str]:
    tags = {COMMAND: command, "mlflow.source.name": f"srd-lab {command}", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags
