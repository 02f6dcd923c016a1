"""What the paper says (``paper.json``, with its source), and findings to hold against it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from srd_lab.metrics.summary import FEW, interval_text, summarise
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.report import csv_text
from srd_lab.runs.settings import Settings, weights_of
from srd_lab.runs.tracking import Run

HEADER = ("", "paper", "measured [95 % interval]", "n", "paper's value")


@cache
def paper() -> dict[str, Any]:
    """What the paper prints, but for ``assumed``.

    ``source``; ``settings`` by experiment (``apop`` for Tables 1 and 3 and Fig. 6, ``fig4``, ``fig7``, ``table2``,
    ``table4``); ``assumed``, what it does not say and we suppose; ``table1``, ``table3`` (network -> ... -> accuracy);
    ``table2`` (network -> method -> metric -> value); ``table4`` (``fidelity``: method -> activation -> value; ``accuracy``:
    activation -> value); ``claims`` (figure -> text).
    """
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Finding:
    """One thing that the paper says, and what was measured.

    what : in words; paper : its value, or the claim (``> 0``).
    measured, low, high : value and 95 % interval over n images or pairs.
    verdict : ``inside`` or ``outside`` for a value; ``holds``, ``does not hold`` or ``open`` (the interval holds the limit)
        for a claim; ``too few`` images for either.
    """

    what: str
    paper: str
    measured: float
    low: float
    high: float
    n: int
    verdict: str

    def cells(self) -> list[str]:
        """A line of the table."""
        measured = interval_text(self.measured, self.low, self.high)
        return [self.what, self.paper, measured, str(self.n), self.verdict]


def against_value(what: str, value: float, measured: float, low: float, high: float, n: int) -> Finding:
    """Whether the paper's ``value`` lies in the measured interval [low, high]; "too few" where one of these is NaN.

    Example
    -------
    >>> against_value("accuracy", 0.7, 0.71, 0.69, 0.73, 100).verdict
    'inside'
    """
    verdict = "inside" if low <= value <= high else "outside"
    if np.isnan([value, measured, low, high]).any():
        verdict = "too few"
    return Finding(what, f"{value:g}", measured, low, high, n, verdict)


def against_claim(what: str, limit: float, measured: float, low: float, high: float, n: int) -> Finding:
    """Whether something is larger than ``limit``: open while the measured interval [low, high] holds it, "too few" for NaN.

    Example
    -------
    >>> against_claim("difference", 0.0, 0.1, -0.1, 0.3, 100).verdict
    'open'
    """
    verdict = "holds" if low > limit else "does not hold" if high < limit else "open"
    if np.isnan([measured, low, high]).any():
        verdict = "too few"
    return Finding(what, f"> {limit:g}", measured, low, high, n, verdict)


def paired_claim(what: str, larger: np.ndarray, smaller: np.ndarray, seed: int) -> Finding:
    """The claim that ``larger`` - ``smaller``, both (N,) over the same images, is positive on average.

    seed : of the bootstrap. The verdict is "too few" below 10 images.
    """
    s = summarise(larger - smaller, seed)
    finding = against_claim(what, 0, s.mean, s.low, s.high, s.n)
    return finding if s.n >= FEW else replace(finding, verdict="too few")


UNANSWERED = "The paper has no value and no claim for what was measured here."


def report(
    title: str,
    tables: Sequence[Block],
    findings: Sequence[Finding],
    deviations: Sequence[str],
    unanswered: str = UNANSWERED,
) -> Document:
    """The whole output of a reproduction.

    tables : and what is said of them. deviations : from the paper's setting, a line each.
    unanswered : stands where there are no findings.
    """
    parts = [*tables]
    if findings:
        parts.append("Beside the paper:")
        parts.append(Table(HEADER, [finding.cells() for finding in findings]))
    else:
        parts.append(unanswered)
    parts.append(
        "Deviations from the paper's setting:\n" + "\n".join(f"- {d}" for d in deviations or ["none"])
    )
    parts.append(f"Paper: {paper()['source']}")
    return Document(title, parts)


def store_findings(run: Run, findings: Sequence[Finding]) -> None:
    """Store the findings as a table for a spreadsheet, and how many of each verdict there are as metrics."""
    if findings:
        run.save_text("findings.csv", csv_text([vars(finding) for finding in findings]))
        counts = Counter(finding.verdict for finding in findings)
        run.log_metrics({f"findings/{verdict}": float(count) for verdict, count in counts.items()})


def data_deviations(
    settings: Settings, experiment: str, models: Sequence[str], count: int | None = None
) -> list[str]:
    """How data, weights and networks differ from what the paper says, a line each.

    experiment : a key of ``settings`` in :func:`paper`. models : names of the networks that were used.
    count : how many images were used, where the paper used all of a set; None = not looked at.

    Raises BadValue for weights that are given to no network, see :func:`srd_lab.runs.settings.weights_of`.
    """
    said, assumed = paper()["settings"][experiment], paper()["assumed"]
    source = settings.source
    lines = []
    if said["data"] is None:
        lines.append(f"data: {source}; the paper does not say what its images are from")
    elif source == "imagenet-s":
        lines.append(f"data: imagenet-s, not {said['data']}: fewer images, one in eight under another class")
    elif source != "imagenet":
        lines.append(f"data: {source}, not {said['data']}; networks made for it")
    elif count and count < assumed["images"]:
        lines.append(f"images: {count:,} of the {assumed['images']:,} of {said['data']}, if they are from it")
    elif count and count > assumed["images"]:
        lines.append(f"images: {count:,}, more than the {assumed['images']:,} of {said['data']}: another set")
    lines.append(assumed["why"])
    files = weights_of(settings.weights, models)
    lines += [
        f"weights of {name}: {file.name}, not {assumed['weights']}, which we assume the paper has"
        for name, file in files.items()
        if file
    ]
    unknown = [name for name in models if name not in paper()["table3"]]
    if unknown:
        lines.append(f"networks that the paper does not have: {', '.join(unknown)}")
    return lines
