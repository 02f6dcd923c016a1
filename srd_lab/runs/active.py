"""Logging into the MLflow run that the user has started."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from srd_lab.runs.folder_run import ABOUT, read_traces
from srd_lab.runs.store import active_run
from srd_lab.runs.tracking import MlflowRun, metric_name


def log_to_active(folder: Path, prefix: str = "") -> str:
    """Log what a run without tracking has left in ``folder`` into the MLflow run that is active here; its id.

    prefix : in front of every name, as a folder. Names of parameters, metrics and files are those of a tracked run; what
        belongs to a part has the part's name in front.

    Raises Unavailable without mlflow, BadRun where no run is active or a parameter has another value there already, and
    StoreTrouble.
    """
    run = MlflowRun(*active_run(), "")
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for file in sorted(folder.rglob(ABOUT)):
        about = json.loads(file.read_text(encoding="utf-8"))
        parts = (prefix, "" if file.parent == folder else about["name"])
        params |= {metric_name(_joined(*parts, name)): value for name, value in about["params"].items()}
        metrics |= {_joined(*parts, name): value for name, value in about["metrics"].items()}
        curves |= {_joined(*parts, name): curve for name, curve in read_traces(file.parent).items()}
    run.add_params(params)  # first: where one is refused, nothing is left behind
    run.log_metrics(metrics)
    run.log_traces(curves)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        run.save_bytes(str(PurePosixPath(prefix, file.relative_to(folder).as_posix())), file.read_bytes())
    return run.id


def _joined(*names: Any) -> str:
    return "/".join(filter(None, names))
