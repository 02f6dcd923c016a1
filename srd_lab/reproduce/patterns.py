"""Table 1, Table 3 and Fig. 6: prediction from activation patterns, and with binarised activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from statistics import median
from typing import Any, ClassVar

from apop.experiment import Hits
from apop.settings import SurveySettings
from apop.study import Survey, table_3
from srd_lab import render
from srd_lab.data import skipped_report
from srd_lab.reproduce.paper import (
    Finding,
    against_claim,
    against_value,
    data_deviations,
    paper,
    report,
    store_findings,
)
from srd_lab.runs.document import Block, Table
from srd_lab.runs.outcome import publish
from srd_lab.runs.tracking import Run

WORDS = {"original": "original", "apop": "APOP", "apop_relu": "APOP & relu", "top1": "top-1", "top5": "top-5"}
INTERVAL = "In brackets: the 95 % Wilson interval."
VERDICTS = ("holds", "open", "does not hold")


class _Reproduction(Survey, ABC):
    """A survey of all images that ends beside the paper's numbers."""

    NAME = ""
    FIXED: ClassVar[dict[str, Any]] = {}

    def __init__(self, settings: SurveySettings) -> None:
        super().__init__(replace(settings, **self.FIXED, save_patterns=False))

    def report(self, run: Run, results: dict[str, Hits]) -> None:
        """Print and store table, findings and deviations."""
        findings = [finding for name, hits in results.items() for finding in self.findings(name, hits)]
        count = len(next(iter(results.values())).index)
        deviations = data_deviations(self.settings, "apop", self.models, count)
        if skipped := next(iter(results.values())).skipped:
            deviations.append(skipped_report(skipped))
        self.figure(run, results)
        store_findings(run, findings)
        document = report(self.title(), self.tables(results), findings, deviations)
        publish(run, self.outcome(document, results))

    def title(self) -> str:
        """What was done, in a line."""
        return f"{self.NAME} of the paper on {self.about}"

    @abstractmethod
    def tables(self, results: dict[str, Hits]) -> list[Block]:
        """The experiment's own tables."""

    @abstractmethod
    def findings(self, name: str, hits: Hits) -> list[Finding]:
        """What the paper says of network ``name``."""

    def figure(self, run: Run, results: dict[str, Hits]) -> None:
        """Store the figure in the paper's layout, where it has one."""


class Table3(_Reproduction):
    """Accuracy of every network with zeros, ones or noise replayed under the pattern of the image.

    Errors are those of :class:`apop.study.Survey`.
    """

    NAME = "Table 3"
    FIXED: ClassVar[dict[str, Any]] = {"inputs": ("zeros", "ones", "normal"), "binarize": False}

    def tables(self, results: dict[str, Hits]) -> list[Block]:
        return [Table(*table_3(results, self.experiment)), INTERVAL]

    def findings(self, name: str, hits: Hits) -> list[Finding]:
        published = paper()["table3"].get(name, {})
        found = []
        for kind, settings in published.items():
            if kind == "original":
                settings = {"original": settings}
            for setting, values in settings.items():
                for top, value in values.items():
                    condition = f"{top}/original" if kind == "original" else f"{top}/{kind}/{setting}"
                    words = "original" if kind == "original" else f"{kind}, {WORDS[setting]}"
                    found.append(_accuracy(f"{name}: {words}, {WORDS[top]}", value, hits, condition))
        return found


class Table1(_Reproduction):
    """Accuracy of every network, and of its activation pattern alone (zeros).

    Errors are those of :class:`apop.study.Survey`.
    """

    NAME = "Table 1"
    FIXED: ClassVar[dict[str, Any]] = {"inputs": ("zeros",), "binarize": False}
    CONDITIONS: ClassVar[dict[str, str]] = {"original": "original", "apop": "zeros/apop"}

    def tables(self, results: dict[str, Hits]) -> list[Block]:
        header = ["Model", "Top-1 Ori.", "Top-1 APOP", "Top-5 Ori.", "Top-5 APOP"]
        lines = []
        for name, hits in results.items():
            each = [hits.interval(f"{top}/{c}") for top in ("top1", "top5") for c in self.CONDITIONS.values()]
            lines.append([name, *map(str, each)])
        return [Table(header, lines), INTERVAL]

    def findings(self, name: str, hits: Hits) -> list[Finding]:
        """Against the values of Table 3, which are the same before they were cut to three digits."""
        published = paper()["table3"].get(name)
        if not published:
            return []
        values = {"original": published["original"], "apop": published["zeros"]["apop"]}
        return [
            _accuracy(f"{name}: {WORDS[what]}, {WORDS[top]}", values[what][top], hits, f"{top}/{condition}")
            for top in ("top1", "top5")
            for what, condition in self.CONDITIONS.items()
        ]


class Figure6(_Reproduction):
    """Accuracy with each activation call binarised in turn.

    Errors are those of :class:`apop.study.Survey`.
    """

    NAME = "Fig. 6"
    FIXED: ClassVar[dict[str, Any]] = {"inputs": (), "binarize": True}

    def tables(self, results: dict[str, Hits]) -> list[Block]:
        header = ["Model", "original", "calls", "lowest", "at", "median", *VERDICTS]
        lines = []
        for name, hits in results.items():
            curve = hits.curve()
            values = [each.accuracy for each in curve]
            lowest = values.index(min(values))
            verdicts = [finding.verdict for finding in self.findings(name, hits)]
            counts = [str(verdicts.count(verdict)) for verdict in VERDICTS]
            original = hits.interval("top1/original").accuracy
            numbers = [f"{original:.3f}", str(len(curve)), f"{min(values):.3f}", hits.layers[lowest]]
            lines.append([name, *numbers, f"{median(values):.3f}", *counts])
        title = (
            "One activation call binarised, top-1; for how many calls the claim, above chance, holds or not:"
        )
        return [title, Table(header, lines)]

    def findings(self, name: str, hits: Hits) -> list[Finding]:
        """The claim is about all layers: every call above guessing."""
        return [
            against_claim(f"{name}: {layer} binarised, top-1", self._chance(), i.accuracy, i.low, i.high, i.n)
            for layer, i in zip(hits.layers, hits.curve(), strict=True)
        ]

    def figure(self, run: Run, results: dict[str, Hits]) -> None:
        panels = {
            name: ([i.accuracy for i in hits.curve()], hits.interval("top1/original").accuracy)
            for name, hits in results.items()
        }
        run.save_figure("fig6.png", render.binarisation_panels(panels, self._chance(), self.title()))

    def _chance(self) -> float:
        return 1 / len(self.dataset.classes)


def _accuracy(what: str, value: float, hits: Hits, condition: str) -> Finding:
    i = hits.interval(condition)
    return against_value(what, value, i.accuracy, i.low, i.high, i.n)
