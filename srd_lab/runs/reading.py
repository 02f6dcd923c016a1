"""Runs that were stored: found by id, by the beginning of one, or by their folder, and listed.

Example
-------
::

    for run in list_runs(limit=5):
        print(run.short, run.name, run.metrics)
    find_run("25b2778d").load_text("summary.txt")
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from srd_lab.errors import BadRun, StoreTrouble
from srd_lab.runs.addresses import database_of, existing_store, local_folder, shown
from srd_lab.runs.document import Document
from srd_lab.runs.files import Files, FolderFiles, ServerFiles
from srd_lab.runs.folder_run import ABOUT, about_folder
from srd_lab.runs.outcome import REPORT, SCORES, content, read_scores
from srd_lab.runs.sqlite_store import EXPERIMENT
from srd_lab.runs.store import COMMAND, Store, open_to_read

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import Run as FoundRun

_PAGE = 1000


@dataclass(frozen=True)
class StoredRun:
    """A run, or a part of one, as it was stored.

    id : of the store; of a run without tracking its folder. name, command, status : as they were stored.
    started : when it began; None = not known. params, metrics, tags : name -> value.
    files : what it has stored. find_parts : gives its parts.
    """

    id: str
    name: str
    command: str
    status: str
    started: datetime | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Files
    find_parts: Callable[[], Sequence[StoredRun]]

    @property
    def short(self) -> str:
        """Eight digits of the id, which name it among others; of a run without tracking the folder."""
        return self.id[:8] if re.fullmatch(r"[0-9a-f]{32}", self.id) else self.id

    @cached_property
    def parts(self) -> list[StoredRun]:
        """Its parts, in the order in which they were made."""
        return list(self.find_parts())

    @cached_property
    def top_files(self) -> list[str]:
        """The names of its files that lie in no folder."""
        return self.files.names("")

    def load_text(self, path: str) -> str:
        """A text file. Raises BadRun if there is none."""
        return self.files.read(path).decode("utf-8", "replace")

    def document(self) -> Document:
        """Its report. Raises BadRun where it has none."""
        if REPORT not in self.top_files:
            ended = "it has not finished" if self.status != "FINISHED" else "an older version made it"
            raise BadRun(f"run {self.short} has no report: {ended}")
        return Document.from_json(self.load_text(REPORT))

    def scores(self) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
        """Names of the images (N,), and subject -> score -> (N,). Raises BadRun where it has none."""
        if SCORES not in self.top_files:
            self.document()  # says why there is none
            raise BadRun(f"run {self.short} ({self.command}) has no scores of single images")
        images, scores = read_scores(self.load_text(SCORES))
        return images, {subject: _as_named_now(own) for subject, own in scores.items()}


def _as_named_now(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores (N,) of the published attack alone, which older versions called ``pcc``, by the names of today."""
    if "pcc_target" not in own:
        return own
    return {f"eq10_{name}" if name.startswith(("pcc", "ssim")) else name: v for name, v in own.items()}


def list_runs(tracking_uri: str | None = None, command: str = "", limit: int = 20) -> list[StoredRun]:
    """Runs, the newest first, without their parts.

    tracking_uri : see :func:`srd_lab.runs.addresses.store_uri`. command : only those of this one, such as ``attack``.
    limit : how many at most.

    Raises BadRun where there is no store, and StoreTrouble where it cannot be used.
    """
    return _search(_opened(tracking_uri), command, limit)


def find_run(reference: str, tracking_uri: str | None = None) -> StoredRun:
    """The run with this id, with the only id that begins so, or in this folder.

    Raises BadRun where there is none, or are several.
    """
    folder = Path(reference)
    if (folder / ABOUT).is_file():
        return _of_folder(folder)
    if not re.fullmatch(r"[0-9a-f]{4,32}", reference):
        raise BadRun(
            f"{reference!r} is no run; give an id or the beginning of one (`srd-lab runs` lists them), or the folder of a "
            "run without tracking"
        )
    store = _opened(tracking_uri)
    found = [run for run in _search(store, "", None) if run.id.startswith(reference)]
    if not found:
        raise BadRun(f"no run {reference} in {shown(store.uri)}; `srd-lab runs` lists them")
    if len(found) > 1:
        raise BadRun(f"several runs begin with {reference}: {', '.join(run.id[:12] for run in found)}")
    return found[0]


def _opened(tracking_uri: str | None) -> Store:
    uri = existing_store(tracking_uri)
    try:
        return open_to_read(uri)
    except sqlite3.Error as error:
        raise StoreTrouble(
            f"{database_of(uri)} is not an MLflow store ({error}); see --tracking-uri"
        ) from None


def _search(store: Store, command: str, limit: int | None) -> list[StoredRun]:
    """Runs of this package that are no parts, the newest first."""
    with store.errors():
        experiments = [
            experiment.experiment_id
            for experiment in store.client.search_experiments()
            if experiment.name == EXPERIMENT or experiment.name.startswith(f"{EXPERIMENT} ")
        ]
        found: list[StoredRun] = []
        token = None
        while experiments:
            page = store.client.search_runs(
                experiments, max_results=_PAGE, order_by=["attributes.start_time DESC"], page_token=token
            )
            found += [
                _of_store(store, run)
                for run in page
                if "mlflow.parentRunId" not in run.data.tags
                and run.data.tags.get(COMMAND, "").startswith(command)
            ]
            token = page.token
            if not token or (limit and len(found) >= limit):
                break
    return found[:limit]


def _of_store(store: Store, found: FoundRun) -> StoredRun:
    number, about = found.info.run_id, found.info

    def parts() -> list[StoredRun]:
        with store.errors():
            children = store.client.search_runs(
                [about.experiment_id],
                f"tags.`mlflow.parentRunId` = '{number}'",
                order_by=["attributes.start_time ASC"],
            )
        return [_of_store(store, child) for child in children]

    folder = local_folder(about.artifact_uri)
    return StoredRun(
        number,
        str(about.run_name),
        found.data.tags.get(COMMAND, ""),
        str(about.status),
        datetime.fromtimestamp(about.start_time / 1000) if about.start_time else None,
        dict(found.data.params),
        dict(found.data.metrics),
        dict(found.data.tags),
        FolderFiles(folder) if folder else ServerFiles(store, number),
        parts,
    )


def _of_folder(folder: Path, command: str = "") -> StoredRun:
    about = about_folder(folder)
    try:
        params, metrics = dict(about.get("params", {})), dict(about.get("metrics", {}))
        tags = dict(about.get("tags", {}))
    except (TypeError, ValueError) as error:
        raise BadRun(f"{folder / ABOUT} is damaged ({error!r})") from None
    command = str(about.get("command") or command or _command_typed(folder))
    inside = sorted(path.parent for path in folder.glob(f"*/{ABOUT}"))
    return StoredRun(
        str(folder),
        unquote(str(about.get("name", folder.name))),
        command,
        str(about.get("status", "FINISHED")),
        _time_of(folder / ABOUT, about.get("started")),
        params,
        metrics,
        tags,
        FolderFiles(folder),
        lambda: [_of_folder(part, command) for part in inside],
    )


def _command_typed(folder: Path) -> str:
    """The command of a run of an older version, whose copy says it in ``command.txt`` alone."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words = (folder / "command.txt").read_text(encoding="utf-8").split()[1:]
        return " ".join(takewhile(lambda word: not word.startswith("-"), words))
    return ""


def _time_of(file: Path, started: object) -> datetime | None:
    """When a run began: seconds since 1970 that it has stored, else when its file was written."""
    with contextlib.suppress(OSError, OverflowError, ValueError):
        if isinstance(started, int | float):
            return datetime.fromtimestamp(started)
        return datetime.fromtimestamp(file.stat().st_mtime)
    return None


def as_json(run: StoredRun) -> dict[str, Any]:
    """Everything of a run that is no picture: settings, metrics, report, scores, parts."""
    found: dict[str, Any] = {
        "run": run.id,
        "name": run.name,
        "command": run.command,
        "status": run.status,
        "settings": dict(run.params),
        "metrics": dict(run.metrics),
    }
    found |= content(run.top_files, run.load_text)
    if run.parts:
        found["parts"] = {
            part.name: {"settings": dict(part.params), "metrics": dict(part.metrics)} for part in run.parts
        }
    return found
