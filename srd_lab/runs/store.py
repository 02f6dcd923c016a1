"""The MLflow store: opening it (once, however many start at the same time), its runs, its page.

The only importer of mlflow, and lazily: without tracking it need not be installed.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from srd_lab.errors import BadRun, BadValue, StoreTrouble, Unavailable
from srd_lab.runs.environment import git_commit
from srd_lab.runs.guard import guarded

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

DEFAULT_STORE = "sqlite:///mlflow.db"
EXPERIMENT = "srd-lab"
_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000
_COMMAND = "srd_lab.command"


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

    def create_run(self, name: str, parent: str = "") -> StoredRun:
        """A new run called ``name``; parent : id of the run that it is a part of, "" = none."""
        tags = _source_tags(self.command) | ({"mlflow.parentRunId": parent} if parent else {})
        with self.errors():
            return self.client.create_run(self.experiment_id, run_name=name, tags=tags)

    def get_run(self, run_id: str) -> StoredRun:
        """The run with this id. Raises BadRun if it is not there, was deleted, is part of another or of another command."""
        from mlflow.exceptions import MlflowException

        try:
            stored = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise StoreTrouble(_one_line(error, self.uri)) from None
            raise BadRun(f"no run {run_id} in {shown(self.uri)}; `srd-lab ui` lists them") from None
        tags = stored.data.tags
        if stored.info.lifecycle_stage == "deleted":
            raise BadRun(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` undoes it")
        if parent := tags.get("mlflow.parentRunId"):
            raise BadRun(f"run {run_id} is one part of run {parent}; resume that one")
        if (made_by := tags.get(_COMMAND, "another program")) != self.command:
            raise BadRun(f"run {run_id} was made by {made_by!r}, not by {self.command!r}")
        return stored

    def find_child(self, parent: str, name: str) -> StoredRun | None:
        """The oldest part called ``name`` of the run with the id ``parent``; None if there is none."""
        with self.errors():
            found = self.client.search_runs(
                [self.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", order_by=["start_time ASC"]
            )
        return next((run for run in found if run.info.run_name == name), None)

    def set_status(self, run_id: str, status: str) -> None:
        """Set a run's status: RUNNING, or FINISHED, FAILED or KILLED, which also store the time of its end."""
        with self.errors():
            if status == "RUNNING":
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status)

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Set a tag of a run, replacing its value."""
        with self.errors():
            self.client.set_tag(run_id, key, value)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Store parameters, name -> text; MLflow refuses another value for a name that is stored already."""
        from mlflow.entities import Param

        rows = [Param(key, value) for key, value in params.items()]
        with self.errors():
            for start in range(0, len(rows), _PARAMS_PER_CALL):
                self.client.log_batch(run_id, params=rows[start : start + _PARAMS_PER_CALL])

    def log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Store points (name, value, time in ms since 1970, step)."""
        from mlflow.entities import Metric

        rows: list[Metric] = [Metric(*point) for point in points]
        with self.errors():
            for start in range(0, len(rows), _METRICS_PER_CALL):
                self.client.log_batch(run_id, metrics=rows[start : start + _METRICS_PER_CALL])

    def where(self, stored: StoredRun) -> str:
        """One line: how to see the run."""
        if _database(self.uri) is None:
            path = f"experiments/{stored.info.experiment_id}/runs/{stored.info.run_id}"
            uri = shown(self.uri)
            page = f"{uri.rstrip('/')}/#/{path}" if uri.startswith("http") else f"it is in {uri}"
            return f"run {stored.info.run_id}: {page}"
        if self.uri == _absolute(DEFAULT_STORE):
            return f"run {stored.info.run_id}: `srd-lab ui` in this directory shows it"
        return f"run {stored.info.run_id}: `srd-lab ui --tracking-uri {self.uri}` shows it"


def store_uri(tracking_uri: str | None = None) -> str:
    """The store to use: the argument, else MLFLOW_TRACKING_URI, else ``mlflow.db`` right here; an SQLite path is absolute.

    Raises StoreTrouble for an SQLite path with a "%" or "?" in it.
    """
    return _absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def shown(uri: str) -> str:
    """A store's address as it may be printed and kept: without the password in it.

    Example
    -------
    >>> shown("postgresql://me:secret@db.example.org/runs?password=secret")
    'postgresql://me:***@db.example.org/runs?password=***'
    """
    for secret in _secrets(uri):
        uri = uri.replace(secret, "***")
    return uri


def _secrets(uri: str) -> list[str]:
    """What in a store's address must not be told: passwords, as they stand there and as they are meant."""
    own = re.search(r"//[^/?#]*?:([^/?#]*)@", uri)
    named = re.findall(r"[?&](?:password|passwd|pwd|token|secret|[\w-]*key)=([^&#]+)", uri, re.IGNORECASE)
    found = {secret for secret in (own[1] if own else "", *named) if secret}
    return sorted(found | {unquote(secret) for secret in found}, key=len, reverse=True)


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
        raise StoreTrouble(f"MLflow cannot use {path} because of its '%' or '?'; give another --tracking-uri")
    return f"sqlite:///{path}"


def local_folder(uri: str) -> Path | None:
    """The folder that a URI or a path names; None where it names a server or a bucket.

    Example
    -------
    >>> local_folder("file:///tmp/runs").as_posix(), local_folder("https://example.org")
    ('/tmp/runs', None)
    """
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(uri).path))
    return None if scheme else Path(uri)


def open_store(uri: str, experiment: str, command: str) -> Store:
    """Connect to a store; a fresh SQLite store is made by one process while the others wait, for two minutes at most.

    uri : as :func:`store_uri` gives it. experiment : where new runs go; made if it is not there.
    command : see :class:`Store`.

    Raises Unavailable where mlflow is not installed, and StoreTrouble where the store cannot be used, or its experiment was
    deleted.
    """
    _quiet_mlflow()
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise Unavailable("mlflow is not installed; `pip install mlflow`, or use --no-track") from None
    file = _database(uri)
    with _alone(file) if file else contextlib.nullcontext(), _store_errors(uri), _impatient():
        location = _artifact_folder(file, experiment) if file else None
        if file and not _is_there(file):
            _make(file, experiment, location)
        client = MlflowClient(tracking_uri=uri)
        store = Store(client, uri, _experiment_id(client, experiment, location), command)
    if file:
        _follow_move(file, experiment)
    return store


def _is_there(file: Path) -> bool:
    """Whether ``file`` is an MLflow store; raises StoreTrouble if it is half of one, or something else."""
    if not file.exists() or file.stat().st_size == 0:
        return False
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # MLflow makes its first experiment last
        whole = "experiments" in tables and database.execute("SELECT 1 FROM experiments").fetchone()
    if not whole and tables & {"experiments", "runs", "alembic_version"}:
        raise StoreTrouble(
            f"{file} is half an MLflow store: a process was killed while it made it; it holds no runs, so remove it"
        )
    if not whole:
        raise StoreTrouble(f"{file} is a database, but not one of MLflow; give another --tracking-uri")
    return True


def _make(file: Path, experiment: str, location: str | None) -> None:
    """Make a store beside its place and move it there whole: who is killed meanwhile leaves no half of one."""
    from mlflow import MlflowClient

    part = file.with_name(f".{file.name}.part")
    for leftover in file.parent.glob(f"{part.name}*"):
        leftover.unlink()
    _experiment_id(MlflowClient(tracking_uri=f"sqlite:///{part.as_posix()}"), experiment, location)
    part.replace(file)


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
        raise StoreTrouble(
            f"experiment {name!r} was deleted; "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the store's lock; raises StoreTrouble if ``file`` cannot be a store."""
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=120):
            yield
    except Timeout:
        raise StoreTrouble(f"another process has held {file} locked for two minutes; is it stuck?") from None
    except (OSError, sqlite3.Error) as error:
        raise StoreTrouble(
            f"{file} cannot be used as an MLflow store ({error}); see --tracking-uri"
        ) from None


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
        raise StoreTrouble(f"the MLflow store {shown(uri)} cannot be used: {_one_line(error, uri)}") from None


def _one_line(error: Exception, uri: str = "") -> str:
    text = " ".join(str(error).split())
    for secret in _secrets(uri):
        text = text.replace(secret, "***")
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
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


def launch_ui(tracking_uri: str | None = None, port: int = 5000, host: str = "127.0.0.1") -> None:
    """Serve MLflow's web page on the store until Ctrl-C.

    tracking_uri : see :func:`store_uri`. port, host : where it listens; by default on this machine alone.

    Raises BadValue for an empty host, BadRun if there is no store yet, and StoreTrouble if it is a server already or no
    MLflow store, if the port is taken, or if the page stops by itself.
    """
    uri = store_uri(tracking_uri)
    if not host.strip():
        raise BadValue(
            "--host is empty, which would mean all networks; give 127.0.0.1, or 0.0.0.0 for all of them"
        )
    if uri.startswith("http"):
        raise StoreTrouble(f"{shown(uri)} is a server already: open it in a browser")
    file = _database(uri)
    if file and not file.is_file():
        raise BadRun(f"no runs yet: {file} does not exist; run a command first, or give --tracking-uri")
    _require_free(host, port)
    _quiet_mlflow()
    print(f"{shown(uri)} will be shown at {_page(host, port, file)} (Ctrl-C ends it)", flush=True)
    if not _is_loopback(host):
        print(
            f"Note: everybody who reaches {host} port {port} over the network can read and change these runs.",
            file=sys.stderr,
            flush=True,
        )
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    options = ["--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=warning"]
    calm = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the page would outlive its command
    server = subprocess.Popen(guarded(command + options), env=os.environ | calm)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    if status:
        raise StoreTrouble(f"`mlflow ui` stopped with exit status {status}; what it said stands above")


def _page(host: str, port: int, file: Path | None) -> str:
    """The address of the runs; MLflow's own start page shows tools for language models first."""
    try:
        number = _follow_move(file, EXPERIMENT) if file else ""
    except sqlite3.Error as error:
        raise StoreTrouble(f"{file} is not an MLflow store ({error}); see --tracking-uri") from None
    path = f"/#/experiments/{number}/runs?workflowType=machine_learning" if number else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _require_free(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreTrouble(f"cannot listen on {host}:{port} ({reason}); give another --port") from None
