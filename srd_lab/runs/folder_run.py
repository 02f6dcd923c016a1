"""A run without tracking: everything in a folder."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from srd_lab.errors import BadRun, BadValue
from srd_lab.runs.files import FolderFiles
from srd_lab.runs.label import Drawn
from srd_lab.runs.run import NOT_FINITE, Params, Run, Traces, metric_name

ABOUT = "run.json"
_TRACES = "traces.csv"


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
        if again and (self._folder / ABOUT).exists():
            self._read()
        self._about["status"] = "RUNNING"
        self.add_params(params)

    def _read(self) -> None:
        """Take over what an earlier session has stored."""
        about = about_folder(self._folder)
        if "run" in about:
            raise BadRun(
                f"{self._folder} holds copies of what run {about['run']} has stored; resume that one"
            )
        if (made_by := about.get("command")) != (command := self._about["command"]):
            raise BadRun(f"run {self._folder} was made by {made_by!r}, not by {command!r}")
        try:
            self.params, self._metrics = dict(about["params"]), dict(about["metrics"])
            self._not_finite, self._before = set(about[NOT_FINITE]), str(about["status"])
            self._about["name"] = about["name"]
            self._traces = {
                (name, step): value
                for name, curve in read_traces(self._folder).items()
                for step, value in zip(*curve, strict=True)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise BadRun(
                f"what {self._folder} holds of a run is damaged ({error!r}); start a new run"
            ) from None

    def note(self, markdown: str) -> None:
        """Nothing: there is no page, and the files say it."""

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._about["tags"] = self._about.get("tags", {}) | dict(tags)
        self._write_about()

    def _log_drawn(self, drawn: Drawn) -> None:
        self._about["data"] = asdict(drawn)
        self._write_about()

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
        self.save_text(_TRACES, table.getvalue())
        self._write_about()

    def _write_about(self) -> None:
        content = {"params": self.params, "metrics": self._metrics, NOT_FINITE: sorted(self._not_finite)}
        self.save_text(ABOUT, json.dumps(self._about | content, indent=1) + "\n")

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


def read_traces(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The curves that a run has left in a folder, name -> (steps, values); none where it has left none.

    Raises ValueError or KeyError where they are damaged.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    file = folder / _TRACES
    if file.is_file():
        for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
            steps, values = found.setdefault(row["name"], ([], []))
            steps.append(int(row["step"]))
            values.append(float(row["value"]))
    return found


def open_folder(command: str, name: str, params: Params, out: Path | None, resume: str | None) -> FolderRun:
    if resume is None:
        refuse_taken(out, advice=f"give another --out, or go on with it: --resume {out}")
        return FolderRun(command, name, params, out)
    folder = Path(resume)
    if not (folder / ABOUT).is_file():
        raise BadRun(
            f"there is no {folder / ABOUT}; --no-track --resume takes the folder that a run without tracking had as --out"
        )
    if out is not None and out.resolve() != folder.resolve():
        raise BadValue(f"a run without tracking goes on in its own folder, {folder}; leave --out out")
    run = FolderRun(command, name, params, folder, again=True)
    run.tidy()
    return run


def refuse_taken(
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
    taken = [name for name in (ABOUT, "summary.txt", "batches") if (out / name).exists()]
    if taken:
        raise BadValue(f"{out} holds another run's {taken[0]}; {advice}")


def _holds(out: Path, run_id: str) -> bool:
    """Whether the files in a folder are copies of those of a run."""
    try:
        return about_folder(out).get("run") == run_id
    except BadRun:
        return False


def about_folder(folder: Path) -> dict[str, Any]:
    """What a folder says of the run whose files it holds; BadRun if it says nothing."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRun(f"{folder / ABOUT} is damaged ({error})") from None
    if not isinstance(about, dict):
        raise BadRun(f"{folder / ABOUT} is damaged (it is no object)")
    return about
