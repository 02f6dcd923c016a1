"""The APOP study: every network over the same images, batch by batch, counted, stored and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from apop.experiment import SETTINGS, Experiment, Hits, Interval
from apop.passes import record
from apop.pattern import ActivationPattern
from apop.settings import SurveySettings
from srd_lab import render
from srd_lab.data import skipped_report
from srd_lab.data.draw import draw_images
from srd_lab.normalise import split_normalisation
from srd_lab.parts import spoken
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.inputs import checked_networks, data_and_network, preprocessing_for
from srd_lab.runs.label import drawn_from
from srd_lab.runs.outcome import Outcome, over_images, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Advance, Arrays, Item, Work, joined, npz, skipped_in
from srd_lab.runtime import Batcher, pick_device
from srd_lab.types import Dataset

TOP_5 = 5


@dataclass(frozen=True)
class SurveyWork(Work):
    """Hits of every image.

    experiment : what is done with each. layers : names of the activation calls that it binarises.
    save_patterns : whether activation patterns are stored, too.
    """

    experiment: Experiment
    layers: tuple[str, ...]
    save_patterns: bool

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """See :class:`srd_lab.runs.work.Work`; arrays as :meth:`apop.experiment.Hits.to_arrays` names them."""
        patterns: list[ActivationPattern] = []
        samples, indices = [item.sample for item in some], [item.index for item in some]
        hits = self.experiment.run(self.model, samples, indices, self.device, advance, patterns.append)
        arrays = hits.to_arrays()
        if self.save_patterns:
            name = f"patterns/{some[0].number:05d}-{some[-1].number:05d}.npz"
            arrays[name] = npz(patterns[0].to_arrays())
        return arrays


class Survey:
    """One run of ``srd-lab apop``, from settings to tables and figures.

    Raises BadValue for an input that is not known, and Refused where a network is no ReLU network; else the errors are
    those of :func:`srd_lab.runs.inputs.checked_networks`.
    """

    def __init__(self, settings: SurveySettings) -> None:
        self.settings = settings
        self.models = list(dict.fromkeys(settings.models))
        self.device = pick_device(settings.device)
        self.experiment = Experiment(settings.inputs, settings.binarize, settings.seed)
        self.dataset: Dataset
        self.dataset, self.weights_sha256 = checked_networks(settings, self.models, self._pattern)
        self.indices = draw_images(self.dataset, settings.images, settings.seed)
        self.drawn = drawn_from(settings, self.dataset, self.indices)
        self.seconds = 0.0
        source = settings.shown_source
        self.about = f"{source}, {len(self.indices)} of {len(self.dataset)} images"

    def stages(self, run: Run) -> Iterator[Stage]:
        """A stretch of work for every network. Raises Refused for a network that is unfit."""
        for name in self.models:
            dataset, model = data_and_network(self.settings, name, self.models, self.device)
            pattern = self._pattern(name, model)
            if self.settings.save_patterns:
                one, count = pattern.packed_bytes, len(self.indices)
                click.echo(
                    f"patterns: {_size(one)} per image, {_size(one * count)} for {count} images before compression",
                    err=True,
                )
            batcher = Batcher(
                self.settings.batch_size or images_at_once(preprocessing_for(self.settings, name).size)
            )
            layers = tuple(pattern.masks) if self.experiment.binarized else ()
            yield Stage(
                run.child(name, {"model": name}),
                dataset,
                self.indices,
                SurveyWork(model, self.device, self.experiment, layers, self.settings.save_patterns),
                batcher,
                label=name,
                steps=self.experiment.passes(len(pattern.masks)),
            )

    def run(self, run: Run) -> None:
        """Survey every model and report; errors are those of :func:`srd_lab.runs.batches.in_batches`."""
        results = {}
        for stage in self.stages(run):
            with stage.run as child:
                table = joined(list(in_batches(stage, self.settings)))
                assert isinstance(stage.work, SurveyWork)
                hits = Hits.from_arrays(table, stage.work.layers, skipped_in(table))
                self._log(stage.label, child, hits, float(table["seconds"]))
            results[stage.label] = hits
        self.report(run, results)

    def _pattern(self, name: str, model: nn.Module) -> ActivationPattern:
        """Of one empty image: what the network's calls are. Refuses an unfit network."""
        side, parameter = preprocessing_for(self.settings, name).size, next(model.parameters())
        _, network = split_normalisation(model)
        return record(network, torch.zeros(1, 3, side, side, device=parameter.device))[1]

    # what is stored ------------------------------------------------------------------------------------
    def _log(self, name: str, child: Run, hits: Hits, seconds: float) -> None:
        self.seconds += seconds
        child.save_text("images.csv", csv_text(hits.rows()))
        child.save_text("summary.csv", csv_text(_summary(hits)))
        metrics = {
            _score(key) or key: hits.interval(key).accuracy
            for key in hits.right
            if not key.startswith("binarized_top5")
        }
        child.log_metrics({**metrics, "seconds": seconds})
        child.log_traces(over_images(_scores(hits)))
        if hits.layers:
            accuracies = [interval.accuracy for interval in hits.curve()]
            child.log_traces({"over_layers/binarized_top1": (range(1, len(accuracies) + 1), accuracies)})
        self._draw(name, child, hits)

    def _draw(self, name: str, child: Run, hits: Hits) -> None:
        title = f"{spoken(name)} on {self.about}"
        original, chance = hits.interval("top1/original").accuracy, 1 / len(self.dataset.classes)
        bars = {
            (kind, setting): _with_ends(hits.interval(f"top1/{kind}/{setting}"))
            for kind in self.experiment.inputs
            for setting in SETTINGS
        }
        if bars:
            child.save_figure("apop.png", render.apop_bars(bars, original, chance, title))
        if hits.layers:
            curve = hits.curve()
            accuracies, ends = [each.accuracy for each in curve], [(each.low, each.high) for each in curve]
            figure = render.binarisation_curve(hits.layers, accuracies, original, chance, title, ends)
            child.save_figure("binarisation.png", figure)

    def report(self, run: Run, results: dict[str, Hits]) -> None:
        """Print and store what compares the networks; results : network -> its hits."""
        classes = len(self.dataset.classes)
        chance = f"Guessing: {1 / classes:.3f} top-1, {min(TOP_5, classes) / classes:.3f} top-5."
        blocks: list[Block] = [Table(*table_3(results, self.experiment)), chance]
        for name, hits in results.items():
            blocks += _curve(name, hits) if hits.layers else []
        if skipped := next(iter(results.values())).skipped:
            blocks.append(skipped_report(skipped))
        title = f"APOP on {self.about}: accuracy [95 % Wilson interval]"
        publish(run, self.outcome(Document(title, blocks), results))

    def outcome(self, document: Document, results: dict[str, Hits]) -> Outcome:
        """A report with the hits of every image; results : network -> its hits."""
        images = [str(name) for name in next(iter(results.values())).name]
        scores = {name: _scores(hits) for name, hits in results.items()}
        return Outcome(document, self.seconds, images, scores)


def table_3(results: dict[str, Hits], experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the paper's Table 3: a line per model and input, the original's accuracy in the first.

    results : network -> its hits. experiment : that they came from.
    """
    header = ["Model", "Input"]
    header += [f"{top} {what}" for top in ("Top-1", "Top-5") for what in ("Ori.", "APOP", "APOP & relu")]
    lines = []
    for model, hits in results.items():
        for i, kind in enumerate(experiment.inputs):
            cells = [spoken(model) if i == 0 else "", kind]
            for top in ("top1", "top5"):
                cells.append(str(hits.interval(f"{top}/original")) if i == 0 else "")
                cells += [str(hits.interval(f"{top}/{kind}/{s}")) for s in ("apop", "apop_relu")]
            lines.append(cells)
    return header, lines


def _with_ends(interval: Interval) -> tuple[float, float, float]:
    return interval.accuracy, interval.low, interval.high


def _scores(hits: Hits) -> dict[str, np.ndarray]:
    """What other runs are held against: ``top1``, ``top5``, ``INPUT_apop_top1``, ...; 1 = a hit."""
    scores = {_score(condition): right for condition, right in hits.right.items()}
    return {name: right.astype(float) for name, right in scores.items() if name}


def _score(condition: str) -> str:
    """A condition of :class:`Hits` as a score: ``top1/zeros/apop`` is ``zeros_apop_top1``; "" for layers."""
    top, *of = condition.split("/")
    return "_".join([*(part for part in of if part != "original"), top]) if top in ("top1", "top5") else ""


def _curve(model: str, hits: Hits) -> list[Block]:
    """Fig. 6 as a table: a line per activation call."""
    original = hits.interval("top1/original").accuracy
    lines = [
        [layer, f"{one.accuracy:.3f}", f"[{one.low:.3f}, {one.high:.3f}]", f"{five.accuracy:.3f}"]
        for layer, one, five in zip(hits.layers, hits.curve(), hits.curve(TOP_5), strict=True)
    ]
    title = (
        f"{spoken(model)}: one activation call binarised, all else as it is (untouched: {original:.3f} top-1)"
    )
    return [title, Table(["Activation call", "Top-1", "95 % interval", "Top-5"], lines)]


def _summary(hits: Hits) -> list[dict[str, Any]]:
    """A row per condition: accuracy and its 95 % Wilson interval."""
    intervals = {condition: hits.interval(condition) for condition in hits.right}
    return [
        {"condition": name, "accuracy": each.accuracy, "low": each.low, "high": each.high, "images": each.n}
        for name, each in intervals.items()
    ]


def images_at_once(side: int) -> int:
    """Images in a batch, at a side in pixels: 50 of 64 x 64, 8 of 224 x 224."""
    return max(1, min(50, 8 * 224 * 224 // side**2))


def _size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
