"""Scores as tables: means with intervals, ranks, and paired comparisons with one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, wilcoxon

from srd_lab.catalogue import metric_of
from srd_lab.metrics.summary import LEVEL, holm, images_needed, summarise

Scores = Mapping[
    str, Mapping[str, np.ndarray]
]  # method -> metric -> one score per image (N,), NaN = not scored
EXACT = 50  # pairs up to which the signed-rank test is exact, where nothing ties
FEWEST = images_needed(1)  # pairs with which a signed-rank test can reach the level at all


@dataclass(frozen=True)
class Comparison:
    """A method held against the reference on the same images.

    difference, low, high : mean of score - reference's score and its 95 % interval, over n images that both score.
    p : of Wilcoxon's signed-rank test, two-sided; p_corrected : after Holm's correction for all tests of the table. NaN
        where there are too few images.
    verdict : ``better``, ``worse`` or ``open``, by the corrected p (below 0.05 is not open) and the metric's direction.
    """

    method: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    p: float
    p_corrected: float
    verdict: str


def comparisons(scores: Scores, reference: str, seed: int) -> list[Comparison]:
    """Every other method against ``reference``, by every metric; none where the reference has no scores.

    seed : of the bootstrap intervals.
    """
    if reference not in scores:
        return []
    rows = [
        (method, metric, _paired(scores[method][metric], scores[reference][metric]))
        for method in scores
        if method != reference
        for metric in scores[method]
    ]
    raw = np.array([signed_rank(difference) for *_, difference in rows])
    corrected = holm(raw)
    found = []
    for (method, metric, difference), p, after in zip(rows, raw, corrected, strict=True):
        s = summarise(difference, seed)
        found.append(
            Comparison(
                method, metric, s.mean, s.low, s.high, s.n, p, after, _verdict(metric, difference, after)
            )
        )
    return found


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = a - b
    return difference[np.isfinite(difference)]


def signed_rank(difference: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences (N,); 1 where nothing differs, NaN for fewer than
    ``FEWEST``. Exact for up to ``EXACT`` of them without ties, else by the normal approximation, with Pratt's zeros.

    Example
    -------
    >>> signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    0.03125
    """
    if len(difference) < FEWEST:
        return np.nan
    if not difference.any():
        return 1.0
    size = np.abs(difference)
    if len(difference) <= EXACT and size.all() and len(np.unique(size)) == len(size):
        return float(wilcoxon(difference, method="exact").pvalue)
    # Pratt's zeros take part in the ranking, so that many ties do not count as certainty.
    return float(wilcoxon(difference, zero_method="pratt", method="approx").pvalue)


def _verdict(metric: str, difference: np.ndarray, p: float) -> str:
    if not p < LEVEL:
        return "open"
    ranks = rankdata(np.abs(difference)) * np.sign(difference)  # what the test looked at, not the mean
    return "better" if (ranks.sum() > 0) == (metric_of(metric).better == "higher") else "worse"


def means(scores: Scores) -> dict[str, dict[str, float]]:
    """metric -> method -> mean score over the images that have one, of the methods that score any."""
    found: dict[str, dict[str, float]] = {}
    for method, own in scores.items():
        for metric, values in own.items():
            if np.isfinite(values).any():
                found.setdefault(metric, {})[method] = float(np.nanmean(values))
    return found


def ranks(scores: Scores) -> dict[str, dict[str, float]]:
    """metric -> method -> rank of the mean, 1 is best; equal means share their ranks."""
    found = {}
    for metric, own in means(scores).items():
        sign = -1 if metric_of(metric).better == "higher" else 1
        found[metric] = dict(
            zip(own, rankdata([sign * value for value in own.values()]).tolist(), strict=True)
        )
    return found


def score_table(
    scores: Scores, metrics: Sequence[str], against: Sequence[Comparison], seed: int
) -> tuple[list[str], list[list[str]]]:
    """Header and a line per method: mean [95 % interval], the best marked 1 and the second best 2, + or - where a method
    is better or worse than the reference.

    metrics : the columns. against : of :func:`comparisons`. seed : of the bootstrap intervals.
    """
    place, signs = ranks(scores), {"better": "+", "worse": "-", "open": ""}
    marks = {(c.method, c.metric): signs[c.verdict] for c in against}
    header = ["method"]
    known = [metric_of(m) for m in metrics]
    header += [f"{m.title} {'↑' if m.better == 'higher' else '↓'}" for m in known]
    lines = []
    for method, own in scores.items():
        cells = [method]
        for metric in metrics:
            s = summarise(own[metric], seed)
            others = [rank for name, rank in place.get(metric, {}).items() if name != method]
            rank = place.get(metric, {}).get(method, 0)
            best = {1.0: "¹", 2.0: "²"}.get(rank, " ") if rank not in others else " "
            mark = marks.get((method, metric), "")
            cells.append(f"{s}{best}{mark:1}" if s.n else "–  ")
        lines.append(cells)
    return header, lines
