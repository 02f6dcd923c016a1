"""How MLflow shows the runs of an experiment: by itself its list has neither scores nor settings.

MLflow keeps what somebody shares of the list (its button "Share") as a tag of the experiment, which an address may name.
Such a view is stored here: as columns the scores and settings that tell the runs of the experiment apart, and their charts.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from srd_lab.runs.chart_view import chart_view
from srd_lab.runs.label import HEADLINES
from srd_lab.runs.sqlite_store import EXPERIMENT

VIEW = "srd-lab"  # the name of the view in addresses
_TAG = f"mlflow.sharedViewState.{VIEW}"
_BESIDE = ("worst_ssim", "eq10_ssim", "randomization", "ssim")  # ... and then these
_SETTINGS = ("methods", "model", "models", "data", "pairs", "images", "attacks", "budget", "mode", "seed")
_SCORES, _TOLD = 5, 4  # columns of scores and of settings at most
_NAME, _HEADLINE = "attributes.`Run Name`", "tags.`headline`"
_WIDE, _MOST = 340, 230  # pixels of the runs' names, and of another column at most

_OF_PARENTS = """FROM {table} AS of JOIN runs USING (run_uuid)
WHERE runs.experiment_id = ? AND runs.lifecycle_stage = 'active' AND NOT EXISTS (
  SELECT 1 FROM tags WHERE tags.run_uuid = runs.run_uuid AND tags.key = 'mlflow.parentRunId')"""


def offer_views(file: Path) -> set[str]:
    """Store the view of every experiment of this package; their ids.

    file : the store, a database of SQLite. Raises sqlite3.Error where it is none.
    """
    offered = set()
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
        query = "SELECT experiment_id FROM experiments WHERE name = ? OR name LIKE ?"
        for (number,) in database.execute(query, (EXPERIMENT, f"{EXPERIMENT} %")).fetchall():
            columns = _columns(database, str(number))
            widths = {name: min(_MOST, max(90, 7 * len(name) - 24)) for name in columns}
            widths = {_NAME: _WIDE} | widths | {_HEADLINE: _MOST}
            state = {"selectedColumns": columns, "columnOrder": list(widths), "columnWidths": widths}
            state |= chart_view(_metrics(database, str(number)), (*HEADLINES, *_BESIDE))
            database.execute(
                "INSERT OR REPLACE INTO experiment_tags (key, value, experiment_id) VALUES (?, ?, ?)",
                (_TAG, json.dumps(state), number),
            )
            offered.add(str(number))
    return offered


def _metrics(database: sqlite3.Connection, experiment: str) -> list[set[str]]:
    """The names of the metrics of every run that has some."""
    query = f"SELECT run_uuid, of.key {_OF_PARENTS.format(table='latest_metrics')}"
    found: dict[str, set[str]] = {}
    for run, key in database.execute(query, (experiment,)):
        found.setdefault(run, set()).add(str(key))
    return list(found.values())


def _columns(database: sqlite3.Connection, experiment: str) -> list[str]:
    """MLflow's names of the columns: scores that most runs have, headline scores first, and the settings that differ."""
    counts = database.execute(
        f"SELECT of.key, COUNT(*) {_OF_PARENTS.format(table='latest_metrics')} GROUP BY of.key", (experiment,)
    ).fetchall()
    places = {name: k for k, name in enumerate((*HEADLINES, *_BESIDE))}
    by_place = sorted(
        (places.get(_score(key), len(places)), -n, key)
        for key, n in counts
        if "over_" not in key and _score(key) != "seconds"
    )
    scores = [key for place, _, key in by_place if place < len(places)] or [key for *_, key in by_place]
    differing = {
        key
        for key, values in database.execute(
            f"SELECT of.key, COUNT(DISTINCT of.value) {_OF_PARENTS.format(table='params')} GROUP BY of.key",
            (experiment,),
        )
        if values > 1
    }
    told = [name for name in _SETTINGS if name in differing]
    shown = [_HEADLINE, *(f"metrics.`{key}`" for key in scores[:_SCORES])]
    return shown + [f"params.`{name}`" for name in told[:_TOLD]]


def _score(key: str) -> str:
    """The score that a metric is of: the last part of its name."""
    return str(key).rpartition("/")[2]
