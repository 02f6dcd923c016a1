"""Runs held against each other: what they share, paired where they are of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import mannwhitneyu

from srd_lab import render
from srd_lab.errors import BadRun, BadValue
from srd_lab.evaluation.tables import signed_rank
from srd_lab.metrics.summary import LEVEL, holm, summarise, unsettled_note
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.environment import SURROUNDINGS
from srd_lab.runs.outcome import Outcome, publish
from srd_lab.runs.reading import StoredRun
from srd_lab.runs.report import csv_text
from srd_lab.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 10_000
# parameters that do not tell apart what was scored
_NOT_TOLD = {"weights", "methods", "models", "model", "data", "reference", "batch_size", *SURROUNDINGS}
LEGEND = """
Differences: this - the reference, mean [95 % bootstrap interval]; {p};
same images: Wilcoxon's signed-rank test of the differences per image; different images: the rank sum test (Mann-Whitney),
whose interval is wider, as what distinguishes the images does not cancel."""

NO_P = "no p, which takes six pairs"


@dataclass(frozen=True)
class Subject:
    """One method (or network) of one run.

    name : unique among those compared. run : that it is of. source : of its images.
    images : (N,) their names. scores : score -> (N,).
    """

    name: str
    run: StoredRun
    source: str
    images: Sequence[str]
    scores: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Held:
    """A subject against the reference by one score.

    mean, reference_mean : over the images that count, n of the subject and reference_n of the reference.
    difference, low, high : of the means, and its 95 % interval. same : whether the images are, and so paired.
    p, p_corrected : NaN with too few images. verdict : ``higher``, ``lower`` or ``open``.
    """

    subject: str
    reference: str
    score: str
    mean: float
    reference_mean: float
    n: int
    reference_n: int
    same: bool
    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    verdict: str


class Comparing:
    """The comparison of stored runs.

    runs : two or more, or one of several methods. reference : the subject that the others are held against; "" = the first.
    scores : which to compare; () = all that every subject has. seed : of the bootstrap.

    Raises BadRun for runs without scores, or that share none, and BadValue for a reference or a score that is not there.
    """

    def __init__(
        self, runs: Sequence[StoredRun], reference: str = "", scores: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.runs, self.seed = runs, seed
        self.subjects = subjects_of(runs)
        if len(self.subjects) < 2:
            raise BadRun(
                f"run {runs[0].short} is of {self.subjects[0].name} alone; give a second run to compare it with"
            )
        names = [subject.name for subject in self.subjects]
        if reference and reference not in names:
            raise BadValue(f"the reference {reference!r} is not among what is compared: {', '.join(names)}")
        self.reference = self.subjects[names.index(reference) if reference else 0]
        shared = [
            name for name in self.reference.scores if all(name in other.scores for other in self.subjects)
        ]
        if missing := [name for name in scores if name not in shared]:
            raise BadValue(
                f"no score {missing[0]!r} in all of the runs; they share {', '.join(shared) or 'none'}"
            )
        if not shared:
            kinds = "; ".join(f"{s.name}: {', '.join(s.scores) or 'none'}" for s in self.subjects)
            raise BadRun(f"the runs have no score in common ({kinds})")
        self.scores = [*scores] or shared
        of = [said for key in ("model", "data") if (said := self._shared(key))]
        counts = {len(subject.images) for subject in self.subjects}
        images = f"{counts.pop()} images" if len(counts) == 1 else ""
        self.name = " · ".join(filter(None, [self._against(), *of, images]))
        where = f" ({', '.join(filter(None, [*of, images]))})" if of or images else ""
        self.title = f"{len(self.subjects)} compared{where}; the reference is {self.reference.name}"

    def _shared(self, key: str) -> str:
        """The network or the data of all runs; "" where they differ or do not say."""
        found = {run.tags.get(key) or run.params.get(key, "") for run in self.runs}
        return found.pop() if len(found) == 1 else ""

    def _against(self) -> str:
        """``srd against gradcam``, or against how many."""
        others = [subject.name for subject in self.subjects if subject is not self.reference]
        return f"{self.reference.name} against {others[0] if len(others) == 1 else f'{len(others)} others'}"

    def held(self) -> list[Held]:
        """Every subject against the reference, by every score."""
        found = [
            _against(subject, self.reference, score, self.seed)
            for subject in self.subjects
            if subject is not self.reference
            for score in self.scores
        ]
        corrected = holm(np.array([one.p for one in found]))
        return [_judged(one, float(p)) for one, p in zip(found, corrected, strict=True)]

    def run(self, run: Run) -> list[Held]:
        """Print and store table, figure and comparisons, which it gives."""
        held = self.held()
        run.save_text("comparisons.csv", csv_text([vars(one) for one in held]))
        values = {s.name: {k: s.scores[k] for k in self.scores} for s in self.subjects}
        run.save_figure("comparison.png", self.figure())
        means = {f"{name}/{k}": float(np.nanmean(v)) for name, own in values.items() for k, v in own.items()}
        run.log_metrics(means)
        publish(run, Outcome(self.document(held), 0.0))
        return held

    def figure(self) -> Figure:
        """Means with intervals, a panel per score."""
        return render.score_intervals(self._intervals(), self.reference.name, self.title)

    def document(self, held: Sequence[Held]) -> Document:
        """The report; held : of :meth:`held`."""
        blocks: list[Block] = [Table(*self._overview())]
        rows = [
            [
                one.score,
                one.subject,
                f"{one.mean:.3f}",
                f"{one.reference_mean:.3f}",
                f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
                "-" if np.isnan(one.p_corrected) else f"{one.p_corrected:.3g}",
                one.verdict,
                f"same {one.n}" if one.same else f"different: {one.n}, {one.reference_n}",
            ]
            for score in self.scores
            for one in held
            if one.score == score
        ]
        header = ["score", "subject", "mean", "reference", "difference", "p", "verdict", "images"]
        blocks.append(Table(header, rows))
        tests = sum(np.isfinite(one.p) for one in held)
        p = (
            f"p: two-sided, after Holm's correction for {tests} test{'' if tests == 1 else 's'}"
            if tests
            else NO_P
        )
        blocks.append(LEGEND.format(p=p))
        if all(one.same for one in held):
            blocks.append(unsettled_note([one.n for one in held], [one.p_corrected for one in held]))
        else:
            blocks.append(
                "Some of the runs are of different images: their differences may be of the images and not of the methods."
            )
        blocks += ["\n".join(self._partly(held)), *self._notes()]
        return Document(self.title, blocks)

    def _partly(self, held: Sequence[Held]) -> list[str]:
        """A line per subject that is compared on some of the images alone; scores of other numbers of images are named."""
        lines = []
        for subject in self.subjects:
            most = max(len(self.reference.images), len(subject.images))
            counts: dict[int, list[str]] = {}
            for one in held:
                if one.subject == subject.name and one.same and one.n < most:
                    counts.setdefault(one.n, []).append(one.score)
            lines += [
                f"{subject.name}{'' if len(counts) == 1 else ' by ' + ', '.join(scores)}: on the {n} images that both have"
                for n, scores in counts.items()
            ]
        return lines

    def _overview(self) -> tuple[list[str], list[list[str]]]:
        rows = [[s.name, s.run.short, s.run.command, s.run.name, str(len(s.images))] for s in self.subjects]
        return ["subject", "run", "command", "of", "images"], rows

    def _intervals(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        found: dict[str, dict[str, tuple[float, float, float]]] = {}
        for score in self.scores:
            for subject in self.subjects:
                s = summarise(subject.scores[score], self.seed)
                found.setdefault(said_score(score), {})[subject.name] = (s.mean, s.low, s.high)
        return found

    def _notes(self) -> list[str]:
        """Settings and surroundings in which the runs differ."""
        shared = set.intersection(*(set(run.params) for run in self.runs))
        values = {name: [run.params[name] for run in self.runs] for name in sorted(shared)}
        differing = [
            f"{name}: {', '.join(run.short + ' ' + (v or '-') for run, v in zip(self.runs, own, strict=True))}"
            for name, own in values.items()
            if len(set(own)) > 1
        ]
        return ["The runs differ in:\n" + "\n".join(f"  {line}" for line in differing)] if differing else []


def said_score(score: str) -> str:
    """A score as figures have it.

    Example
    -------
    >>> said_score("worst_pcc"), said_score("pointing_game")
    ('worst PCC', 'pointing game')
    """
    words = ("PCC" if w == "pcc" else "SSIM" if w == "ssim" else w for w in score.split("_"))
    return " ".join(words)


def subjects_of(runs: Sequence[StoredRun]) -> list[Subject]:
    """What the runs have scored, named apart: by method, then by the settings in which the runs differ, then by run.

    Raises BadRun where a run is named twice, or has no scores.
    """
    for number, count in Counter(run.id for run in runs).items():
        if count > 1:
            raise BadRun(f"run {number} is named {count} times; name each once")
    found = []
    for run in runs:
        images, scores = run.scores()
        found += [Subject(name, run, run.params.get("data", ""), images, own) for name, own in scores.items()]
    counts = Counter(subject.name for subject in found)
    return [_apart(subject, runs) if counts[subject.name] > 1 else subject for subject in found]


def _apart(subject: Subject, runs: Sequence[StoredRun]) -> Subject:
    told = [
        name
        for name in subject.run.params
        if name not in _NOT_TOLD and "." not in name
        if len({run.params.get(name, "") for run in runs}) > 1
    ]
    for key in ("model", "data"):
        if len({run.tags.get(key, "") for run in runs}) > 1:
            told.insert(0, key)
    values = {key: subject.run.tags.get(key) or subject.run.params.get(key) or "-" for key in told[:3]}
    said = ", ".join(f"{key} {value}" for key, value in values.items())
    name = f"{subject.name} ({said or subject.run.short})"
    others = {tuple(run.tags.get(k) or run.params.get(k) or "-" for k in values) for run in runs}
    if said and len(others) < len(runs):
        name = f"{subject.name} ({said}, {subject.run.short})"
    return Subject(name, subject.run, subject.source, subject.images, subject.scores)


def _against(subject: Subject, reference: Subject, score: str, seed: int) -> Held:
    own = dict(zip(subject.images, subject.scores[score], strict=True))
    theirs = dict(zip(reference.images, reference.scores[score], strict=True))
    common = [name for name in own if name in theirs] if subject.source == reference.source else []
    if common:
        a, b = np.array([own[n] for n in common]), np.array([theirs[n] for n in common])
        both = np.isfinite(a) & np.isfinite(b)
        a, b = a[both], b[both]
        s = summarise(a - b, seed)
        middle, low, high, p = s.mean, s.low, s.high, signed_rank(a - b)
    else:
        a, b = (np.array([v for v in values.values() if np.isfinite(v)]) for values in (own, theirs))
        middle, low, high = _difference_of_means(a, b, seed)
        p = float(mannwhitneyu(a, b).pvalue) if min(len(a), len(b)) > 2 else np.nan
    return Held(
        *(subject.name, reference.name, score, _mean(a), _mean(b), len(a), len(b), bool(common)),
        *(middle, low, high, p, np.nan, "open"),
    )


def _judged(one: Held, p: float) -> Held:
    word = "open" if not p < LEVEL else "higher" if one.difference > 0 else "lower"
    return replace(one, p_corrected=p, verdict=word)


def _difference_of_means(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Of independent samples, with its 95 % bootstrap interval; NaN for fewer than two of either."""
    if min(len(a), len(b)) < 2:
        return _mean(a) - _mean(b), np.nan, np.nan
    chance = np.random.default_rng(seed)
    drawn = [v[chance.integers(len(v), size=(RESAMPLES, len(v)))].mean(1) for v in (a, b)]
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    return _mean(a) - _mean(b), float(low), float(high)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan
