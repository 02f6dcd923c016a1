"""What a study found: the report that it prints, and the scores of every image that other runs are held against."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np

from srd_lab.catalogue import METRICS
from srd_lab.errors import BadRun
from srd_lab.render.score_page import score_page
from srd_lab.runs.document import Document
from srd_lab.runs.label import HEADLINES
from srd_lab.runs.report import csv_text
from srd_lab.runs.tracking import Run, Traces

REPORT, SUMMARY, MARKDOWN, SCORES = "report.json", "summary.txt", "summary.md", "scores.csv"
POINTS = "scores.html"  # the same to point at
_INTERVAL = re.compile(r"[,.;]? ?\b[Mm]ean \[95 % interval\]")
NARROW = 80  # characters of a line of the summary, which MLflow's page does not wrap
_POINTS = 50  # of a curve over the images
_CURVES = 2  # scores of a subject whose curves the run itself has; its part has those of all

Scores = Mapping[str, Mapping[str, np.ndarray]]  # subject -> score -> (N,), NaN = not scored


@dataclass(frozen=True)
class Outcome:
    """What a study ends with.

    document : the report. seconds : that its batches took, in all sessions.
    images : (N,) names of what was scored, each once.
    scores : subject (a method, or a network) -> score -> (N,). first : the subject that stands for the run in lists: the
        best of those that are ranked, or the one that was asked for first; "" = the first of the scores.
    """

    document: Document
    seconds: float
    images: Sequence[str] = ()
    scores: Scores = field(default_factory=dict)
    first: str = ""


def publish(run: Run, outcome: Outcome) -> None:
    """Print a study's report, and store it with the scores and their means.

    The means are metrics of the run, ``SUBJECT/SCORE``; where there is one subject also ``SCORE``, so that runs of one
    method each stand side by side in a chart. Curves ``SUBJECT/over_images/SCORE`` are those of its first two scores. The
    tag ``headline`` says the score that stands for the run.
    """
    document = outcome.document
    run.save_text(REPORT, document.to_json())
    if outcome.scores:
        run.save_text(SCORES, scores_text(outcome.images, outcome.scores))
        title = _INTERVAL.sub("", document.title)  # there are points and means on the page
        names = dict.fromkeys(name for own in outcome.scores.values() for name in own)
        about = {name: _direction(name) for name in names}
        run.save_text(POINTS, score_page(outcome.images, outcome.scores, title, about))
    run.save_text(MARKDOWN, document.markdown() + "\n")
    run.note(_spaced(document.markdown()))
    run.save_text(SUMMARY, document.text(NARROW) + "\n")
    means = {
        f"{subject}/{name}": _mean(values)
        for subject, own in outcome.scores.items()
        for name, values in own.items()
    }
    if len(outcome.scores) == 1:
        means |= {name.rpartition("/")[2]: mean for name, mean in means.items()}
    run.log_metrics(means | {"seconds": outcome.seconds})
    for subject, own in outcome.scores.items():
        shown = {name: own[name] for name in list(own)[:_CURVES]}
        run.log_traces({f"{subject}/{name}": curve for name, curve in over_images(shown).items()})
    if said := _headline(outcome):
        run.tag({"headline": said})
    click.echo(document.text())


def _spaced(markdown: str) -> str:
    """Markdown with spaces between the columns of its tables, which MLflow's page sets without any."""
    rows = (line.startswith("| ") and not line.startswith("| ---") for line in markdown.splitlines())
    lines = zip(markdown.splitlines(), rows, strict=True)
    return "\n".join(line.replace(" | ", "&nbsp;&nbsp; | &nbsp;") if row else line for line, row in lines)


def _direction(score: str) -> str:
    """What the values of a score mean, in a few words; empty where that is not known."""
    if score in METRICS:
        return f"{METRICS[score].better} is better"
    if re.match(r"(worst|noise|eq10)_", score):
        return "1 = the target's map" if score.endswith("_target") else "1 = the map has not moved"
    return "1 = right, 0 = wrong" if score.endswith(("top1", "top5")) else ""


def _headline(outcome: Outcome) -> str:
    """``srd worst_pcc 0.398``, and of how many subjects it is one; empty where there are no scores."""
    if not outcome.scores:
        return ""
    subject = outcome.first or next(iter(outcome.scores))
    own = outcome.scores[subject]
    score = next((name for name in (*HEADLINES, *own) if name in own), "")
    others = len(outcome.scores) - 1
    more = f" (and {others} other{'s' if others > 1 else ''})" if others else ""
    return f"{subject} {score} {_mean(own[score]):.3f}{more}" if score else ""


def over_images(scores: Mapping[str, np.ndarray]) -> Traces:
    """Curves ``over_images/SCORE``: the mean of the first images (N,), by their number, at 50 points at most."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, values in scores.items():
        known = np.isfinite(values)
        count, total = known.cumsum(), np.where(known, values, 0.0).cumsum()
        at = np.unique(np.linspace(0, len(values) - 1, min(_POINTS, len(values))).round().astype(int))
        at = at[count[at] > 0]
        found[f"over_images/{name}"] = at + 1, total[at] / count[at]
    return found


def scores_text(images: Sequence[str], scores: Scores) -> str:
    """``scores.csv``: a row per subject and image, a column per score; a score that there is not is empty."""
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    rows = [
        {"subject": subject, "image": str(image)}
        | {name: _cell(own[name][i]) if name in own else "" for name in names}
        for subject, own in scores.items()
        for i, image in enumerate(images)
    ]
    return csv_text(rows)


def read_scores(text: str) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """The images' names (N,), and subject -> score -> (N,), of a ``scores.csv``.

    Raises BadRun where it is none, or its subjects are not of the same images.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
        names = [name for name in (rows[0] if rows else {}) if name not in ("subject", "image")]
        by_subject: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            by_subject.setdefault(row["subject"], []).append(row)
        images = [[row["image"] for row in own] for own in by_subject.values()]
        if any(own != images[0] for own in images):
            raise ValueError("methods of different images")
        found = {
            subject: {
                name: np.array([float(row[name] or "nan") for row in own])
                for name in names
                if any(row[name] for row in own)
            }
            for subject, own in by_subject.items()
        }
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise BadRun(f"{SCORES} is damaged ({error!r})") from None
    return images[0] if images else [], found


def content(names: Sequence[str], load: Callable[[str], str]) -> dict[str, Any]:
    """Report, images and scores of a run, as JSON has them; what there is not is left out.

    names : of the run's files. load : gives the text of one.
    """
    found: dict[str, Any] = {}
    if REPORT in names:
        found["report"] = json.loads(Document.from_json(load(REPORT)).to_json())
    if SCORES in names:
        images, scores = read_scores(load(SCORES))
        found["images"] = images
        found["scores"] = {
            subject: {
                name: [float(v) if np.isfinite(v) else None for v in values] for name, values in own.items()
            }
            for subject, own in scores.items()
        }
    return found


def _cell(value: float) -> str:
    return repr(float(value)) if np.isfinite(value) else ""


def _mean(values: np.ndarray) -> float:
    with warnings.catch_warnings():  # a score that no image has is NaN, which is stored as such
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(np.asarray(values, float)))
