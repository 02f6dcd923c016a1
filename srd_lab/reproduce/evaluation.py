"""Table 2: seventeen methods by five metrics. Table 4: fidelity under six activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import click
import numpy as np
from scipy.stats import spearmanr

from srd_lab.catalogue import METRICS, TABLE_2, TABLE_2_METRICS, TABLE_4
from srd_lab.data import skipped_report
from srd_lab.errors import BadValue
from srd_lab.evaluation.study import Evaluation
from srd_lab.metrics.summary import Summary, summarise
from srd_lab.reproduce.paper import UNANSWERED, Finding, against_value, paper, report, store_findings
from srd_lab.reproduce.settings import TableSettings
from srd_lab.runs.batches import Stage
from srd_lab.runs.document import Block, Table
from srd_lab.runs.outcome import Outcome, publish
from srd_lab.runs.settings import weights_of
from srd_lab.runs.tracking import Run
from srd_lab.runtime import pick_device

ACTIVATIONS = ("relu", "elu", "leaky_relu", "silu", "gelu", "tanh")
LEGEND = (
    "Mean ± half the 95 % interval; in brackets the paper's value, with = where it lies inside the interval."
)
Scores = dict[str, dict[str, np.ndarray]]  # method -> metric -> (N,)


class _Table(ABC):
    """One run: an :class:`Evaluation` for every network, and its scores beside the paper's."""

    key: str
    name: str
    methods: Sequence[str]
    metrics: Sequence[str]

    def __init__(self, settings: TableSettings) -> None:
        self.models = list(dict.fromkeys(settings.models))
        if not self.models:
            raise BadValue(
                f"{self.name} has no network for this data; give --data cifar100:PATH, and --model NAME "
                "--weights NAME=FILE for each"
            )
        weights_of(settings.weights, self.models)
        asked = self.methods if "all" in settings.methods else settings.methods
        self.asked = [method for method in self.methods if method in asked]
        self.settings = replace(
            settings, methods=tuple(self.asked), metrics=tuple(self.metrics), target="label", reference="srd"
        )
        self.device = pick_device(settings.device, float64=True)
        self.evaluations = {name: Evaluation(self.settings.of(name), self.models) for name in self.models}
        self.weights_sha256 = tuple(s for e in self.evaluations.values() for s in e.weights_sha256)
        self.drawn = self.evaluations[self.models[0]].drawn

    def stages(self, run: Run) -> Iterator[Stage]:
        """A stretch of work for every network."""
        for name, evaluation in self.evaluations.items():
            yield from evaluation.stages(run.child(name, {"model": name}))

    def run(self, run: Run) -> None:
        """Evaluate every network and report; errors are those of :meth:`Evaluation.evaluate`."""
        scores: dict[str, Scores] = {}
        accuracy, seconds = {}, 0.0
        for name, evaluation in self.evaluations.items():
            with run.child(name, {"model": name}) as child:
                table = evaluation.evaluate(child)
                evaluation.report(child, table)
                scores[name] = evaluation.scores(table)
                accuracy[name] = float((table["label"] == table["predicted"]).mean())
                seconds += float(table["seconds"])
                click.echo("")
        found = [f for name, own in scores.items() for f in self.findings(name, own)]
        store_findings(run, found)
        inside = sum(finding.verdict == "inside" for finding in found)
        judged = sum(finding.verdict in ("inside", "outside") for finding in found)
        said = UNANSWERED
        if judged:
            said = f"{inside} of the paper's {judged} values lie inside the measured 95 % intervals (findings.csv has each)."
        elif found:
            said = "Too few images for intervals to hold the paper's values against."
        tables = self.tables(scores, accuracy)
        document = report(self.title(), tables, [], self.deviations(), said)
        publish(run, Outcome(document, seconds))

    def title(self) -> str:
        """What was done, in a line."""
        source = self.settings.source
        first = next(iter(self.evaluations.values()))
        return f"{self.name} of the paper on {source}, {len(first.indices)} images"

    def findings(self, name: str, scores: Scores) -> list[Finding]:
        """The paper's value of every cell that it has, against the interval measured.

        name : of the network. scores : its own.
        """
        found = []
        for method, own in scores.items():
            for metric, values in own.items():
                value, s = self.printed(name, method, metric), summarise(values, self.settings.seed)
                if value is not None and s.n:
                    what = f"{name}: {metric} of {method}"
                    found.append(against_value(what, value, s.mean, s.low, s.high, s.n))
        return found

    def cell(self, name: str, method: str, metric: str, values: np.ndarray) -> str:
        """Mean, half an interval, the paper's value, of scores ``values`` (N,); a dash where none is finite."""
        s, value = summarise(values, self.settings.seed), self.printed(name, method, metric)
        if not s.n:
            return "–"
        half = "–" if np.isnan(s.low) else f"{(s.high - s.low) / 2:.3f}"
        return f"{s.mean:.3f} ±{half} {_beside(s, value)}"

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the paper has this network."""

    @abstractmethod
    def printed(self, name: str, method: str, metric: str) -> float | None:
        """The paper's value; None where it has none."""

    @abstractmethod
    def tables(self, scores: dict[str, Scores], accuracy: Mapping[str, float]) -> list[Block]:
        """The experiment's own tables.

        scores : network -> method -> metric -> (N,). accuracy : network -> share of images classified correctly.
        """
        ...

    def deviations(self) -> list[str]:
        """How this is not what the paper did, a line each."""
        said, source = paper()["settings"][self.key], self.settings.source
        first = next(iter(self.evaluations.values()))
        lines = []
        if source != said["source"]:
            masks = f" with {first.masks}" if first.masks else ""
            lines.append(f"data: {source}{masks}, not {said['data']}")
        if len(first.indices) != said["images"]:
            lines.append(f"images: {len(first.indices):,}, not {said['images']:,}")
        files = weights_of(self.settings.weights, self.models)
        lines += [
            f"weights of {name}: {file.name}; the paper's are not stated"
            for name, file in files.items()
            if file
        ]
        if unknown := [name for name in self.models if not self.has(name)]:
            lines.append(f"networks that the paper does not have: {', '.join(unknown)}")
        if left_out := [method for method in self.methods if method not in self.asked]:
            lines.append(f"methods left out: {', '.join(left_out)}")
        for name, evaluation in self.evaluations.items():
            lines += [f"{name}: without {method}: {why}" for method, why in evaluation.refused.items()]
        if first.skipped:
            lines.append(skipped_report(first.skipped))
        return [
            *lines,
            f"the 0 that fidelity sets pixels to: {self.settings.baseline} here, not stated in the paper",
            "numbers of draws, the space of noise, and the explained class: not stated in the paper",
        ]


class Table2(_Table):
    """All rows and columns of Table 2.

    Raises BadValue where the settings name no network; else the errors are those of :class:`Evaluation`.
    """

    key, name, methods, metrics = "table2", "Table 2", TABLE_2, TABLE_2_METRICS

    def has(self, name: str) -> bool:
        """Whether Table 2 has a network of this name."""
        return name in paper()["table2"]

    def printed(self, name: str, method: str, metric: str) -> float | None:
        """The paper's value of a cell; None where it has none."""
        return paper()["table2"].get(name, {}).get(method, {}).get(metric)

    def tables(self, scores: dict[str, Scores], accuracy: Mapping[str, float]) -> list[Block]:
        """A table per network, and how alike the order of the methods is."""
        blocks: list[Block] = []
        for name, own in scores.items():
            header = [
                name,
                *(
                    f"{METRICS[m].title} {'↑' if METRICS[m].better == 'higher' else '↓'}"
                    for m in self.metrics
                ),
            ]
            lines = [
                [method, *(self.cell(name, method, m, own[method][m]) for m in self.metrics)]
                for method in own
            ]
            lines.append(["rank correlation", *(self._agreement(name, m, own) for m in self.metrics)])
            blocks.append(Table(header, lines))
        return [
            *blocks,
            LEGEND + "\nRank correlation (Spearman) of the methods' order here and in the paper.",
        ]

    def _agreement(self, name: str, metric: str, scores: Scores) -> str:
        pairs = [
            (value, float(np.nanmean(own[metric])))
            for method, own in scores.items()
            if (value := self.printed(name, method, metric)) is not None and np.isfinite(own[metric]).any()
        ]
        return f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f}" if len(pairs) > 2 else "–"


class Table4(_Table):
    """Fidelity of one network with six activations.

    Raises BadValue where the settings name no network; else the errors are those of :class:`Evaluation`.
    """

    key, name, methods, metrics = "table4", "Table 4", TABLE_4, ("fidelity",)

    def has(self, name: str) -> bool:
        """Whether this is the paper's network, a ResNet50 for small images, with any of the activations."""
        return name.removesuffix(f"_{activation_of(name)}") == "resnet50_3x3"

    def printed(self, name: str, method: str, metric: str) -> float | None:
        """The paper's value for the network's activation; None where it has none."""
        return paper()["table4"][metric].get(method, {}).get(activation_of(name))

    def tables(self, scores: dict[str, Scores], accuracy: Mapping[str, float]) -> list[Block]:
        """Methods by networks, and the accuracies."""
        lines = [
            [
                m,
                *(
                    self.cell(name, m, "fidelity", own[m]["fidelity"]) if m in own else "–"
                    for name, own in scores.items()
                ),
            ]
            for m in self.asked
        ]
        said = paper()["table4"]["accuracy"]
        lines.append(
            ["accuracy", *(f"{accuracy[name]:.3f} ({said[activation_of(name)]:.3f})" for name in scores)]
        )
        return [Table(["fidelity ↑", *scores], lines), LEGEND]


def activation_of(name: str) -> str:
    """The activation in a network's name; one that says none has ReLU.

    Example
    -------
    >>> activation_of("resnet20_elu"), activation_of("resnet50_3x3_leaky_relu"), activation_of("resnet20")
    ('elu', 'leaky_relu', 'relu')
    """
    found = [kind for kind in ACTIVATIONS if name.endswith(f"_{kind}")]
    return max(found, key=len, default="relu")  # leaky_relu ends in relu


def _beside(s: Summary, value: float | None) -> str:
    if value is None:
        return ""
    return f"({value:.3f}{'=' if s.low <= value <= s.high else ' '})"
