"""The evaluation study: every method by every metric, batch by batch, stored, compared and shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from srd_lab import registry, render
from srd_lab.catalogue import METHODS, METRICS, metric_of
from srd_lab.data import skipped_report
from srd_lab.data.draw import draw_images
from srd_lab.errors import BadValue, Refused
from srd_lab.evaluation.experiment import Experiment
from srd_lab.evaluation.settings import EvaluationSettings
from srd_lab.evaluation.tables import Comparison, comparisons, ranks, score_table
from srd_lab.metrics.faithfulness import Fidelity
from srd_lab.metrics.summary import few_note, summarise, unsettled_note
from srd_lab.parts import spoken
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.inputs import data_and_network, labelled, preprocessing_for, weights_sums
from srd_lab.runs.label import drawn_from
from srd_lab.runs.outcome import Outcome, over_images, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.settings import explainer_params
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Advance, Arrays, Item, Work, joined, skipped_in
from srd_lab.runtime import Batcher, pick_device

PICTURES = 6
SHOWN = 2 * PICTURES  # images that are stored with their maps, as some may be skipped
COLUMNS = 5  # of a printed table
MASKS = {
    "scenes": "outlines",
    "imagenet-s": "outlines",
    "voc": "outlines or boxes",
    "imagenet": "bounding boxes",
}
LEGEND = """↑ higher is better, ↓ lower; ¹ best, ² second best{compared}.
Maps divided by their largest |value|, stretched to the image, clamped to [-1, 1]."""
COMPARED = """; + better, - worse than {reference} (Wilcoxon's signed-rank
test on the same images, p < 0.05 after Holm's correction for {tests})"""


@dataclass(frozen=True)
class EvaluationWork(Work):
    """Every method by every metric, which ``experiment`` has."""

    experiment: Experiment

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """See :class:`srd_lab.runs.work.Work`; arrays as :meth:`srd_lab.evaluation.experiment.Experiment.run` names
        them, with maps of the first images alone, as those of all would pile up."""
        arrays = self.experiment.run(self.model, some, self.device, advance)
        shown = sum(item.number < SHOWN for item in some)
        return {key: values[:shown] if values.ndim > 1 else values for key, values in arrays.items()}


class Evaluation:
    """One run of ``srd-lab evaluate``, from settings to tables and figures.

    Raises BadValue for a method that is not known and for a reference that is not among the methods, and Refused where
    no method goes with the network; else the errors are those of :func:`srd_lab.runs.inputs.data_for` and
    :func:`srd_lab.runs.inputs.network_for`.
    """

    def __init__(self, settings: EvaluationSettings, models: Sequence[str] = ()) -> None:
        """models : all that the settings' weights are for, where the model is one of several."""
        self.settings = settings
        self.device = pick_device(settings.device, float64=True)
        name = settings.model
        models = models or [name]
        self.dataset, self.model = data_and_network(settings, name, models, self.device)
        known, self.dataset = self.dataset, labelled(self.dataset, self.model, self.device)
        self.has_labels = known is self.dataset
        self.weights_sha256 = weights_sums(settings, models, {name: self.model})
        self.indices = draw_images(self.dataset, settings.images, settings.seed)
        self.drawn = drawn_from(settings, self.dataset, self.indices)
        asked = tuple(METHODS) if "all" in settings.methods else settings.methods
        explainers = {method: registry.make_explainer(method) for method in asked}
        self.metrics = tuple(METRICS) if "all" in settings.metrics else settings.metrics
        for kind, names in (("method", asked), ("metric", self.metrics)):
            if not names:
                raise BadValue(f"there is no {kind} to evaluate; name one or more, or 'all'")
        side = preprocessing_for(settings, name).size
        self.refused = registry.refusals(self.model, torch.rand(1, 3, side, side).to(self.device), explainers)
        methods = tuple(method for method in asked if method not in self.refused)
        if not methods:
            raise Refused(f"no method goes with {name}: {next(iter(self.refused.values()))}")
        if settings.reference != "srd" and settings.reference not in methods:
            raise BadValue(
                f"the reference {settings.reference} is not among the methods ({', '.join(methods)}); "
                "add it with --methods"
            )
        known = {metric: registry.make_metric(metric) for metric in self.metrics}
        known |= {"fidelity": Fidelity(baseline=settings.baseline)}
        self.experiment = Experiment(
            {method: _seeded(explainers[method], settings.seed) for method in methods},
            {metric: _seeded(known[metric], settings.seed) for metric in self.metrics},
            settings.target,
        )
        self.batcher = Batcher(settings.batch_size or _images_at_once(side))
        source = settings.source
        self.title = (
            f"{spoken(name)} on {settings.shown_source}, {len(self.indices)} of {len(self.dataset)} images, "
            f"{'their own' if settings.target == 'label' and self.has_labels else 'the predicted'} class explained"
        )
        self.masks = MASKS.get(source, "")

    def stages(self, run: Run) -> Iterator[Stage]:
        """All of the work in one stretch."""
        yield Stage(
            run,
            self.dataset,
            self.indices,
            EvaluationWork(self.model, self.device, self.experiment),
            self.batcher,
            label=self.settings.model,
            steps=len(self.experiment.methods),
        )

    def run(self, run: Run) -> None:
        """Evaluate every method and report."""
        self.report(run, self.evaluate(run))

    def evaluate(self, run: Run) -> Arrays:
        """Scores of all images, as :meth:`Experiment.run` names them; maps of the first ``PICTURES`` alone, as those of all
        would pile up. Errors are those of :func:`srd_lab.runs.batches.in_batches`."""
        (stage,) = self.stages(run)
        table = joined(list(in_batches(stage, self.settings)))
        self.skipped = skipped_in(table)
        self.masked = int(np.sum(table["masked"]))
        return table

    # what is stored ------------------------------------------------------------------------------------
    def scores(self, table: Arrays) -> dict[str, dict[str, np.ndarray]]:
        """method -> metric -> scores (N,), NaN = not scored, of what :meth:`evaluate` gave."""
        return {m: {k: table[f"{m}/{k}"] for k in self.metrics} for m in self.experiment.methods}

    def report(self, run: Run, table: Arrays) -> None:
        """Print and store what compares the methods: a child run for each, tables, figures and the summary."""
        self.twins = twins(table, self.experiment.methods, self.metrics, self.settings.reference)
        scores, seed = self.scores(table), self.settings.seed
        scores = {method: own for method, own in scores.items() if method not in self.twins}
        against = comparisons(scores, self.settings.reference, seed)
        for method in scores:
            params = {"method": method, **explainer_params(self.experiment.methods[method])}
            with run.child(method, params) as child:
                child.log_metrics(self._metrics(table, scores[method], method))
                child.log_traces(over_images(scores[method]))
        run.save_text("images.csv", csv_text(self._rows(table)))
        if against:
            run.save_text("comparisons.csv", csv_text([vars(c) for c in against]))
        self.figures(run, table, scores)
        images = [str(name) for name in table["name"]]
        document = self.document(table, scores, against)
        first = self.settings.reference if self.settings.reference in scores else ""
        publish(run, Outcome(document, float(table["seconds"]), images, scores, first))

    def _metrics(self, table: Arrays, own: dict[str, np.ndarray], method: str) -> dict[str, float]:
        found: dict[str, float] = {"seconds_per_image": float(table[f"{method}/seconds"].mean())}
        for metric, values in own.items():
            s = summarise(values, self.settings.seed)
            found |= {metric: s.mean, f"{metric}_low": s.low, f"{metric}_high": s.high}
        return found

    def _rows(self, table: Arrays) -> list[dict[str, Any]]:
        about = ("index", "name", "label", "predicted")
        return [
            {key: table[key][i] for key in about}
            | {"method": method}
            | {metric: table[f"{method}/{metric}"][i] for metric in self.metrics}
            for method in self.experiment.methods
            for i in range(len(table["name"]))
        ]

    def figures(self, run: Run, table: Arrays, scores: dict[str, dict[str, np.ndarray]]) -> None:
        """Store the chart of ranks, and the sheet of pictures; scores : of the methods that they show."""
        if place := ranks(scores):
            run.save_figure(
                "ranks.png",
                render.rank_chart({metric_of(m).title: own for m, own in place.items()}, self.title),
            )
        names, images = (
            self.dataset.classes,
            table["images"][:PICTURES],
        )  # more where memory ran out in between
        masks = table.get("mask", ())  # not in batches of older versions
        outlines = masks[:PICTURES] if len(masks) >= len(images) else [None] * len(images)
        rows = [
            render.SheetRow(
                _row_label(str(table["name"][i]), names[int(table["label"][i])]),
                image,
                {_column(m): table[f"{m}/map"][i] for m in scores},
                outlines[i],
            )
            for i, image in enumerate(images)
        ]
        some = any(row.outline is not None and np.any(row.outline) for row in rows)
        outlined = f"the object's {self.masks or 'mask'}" if some else ""
        if rows:  # none where the first files could not be read
            run.save_figure("pictures.png", render.method_sheet(rows, self.title, outlined))

    def document(
        self, table: Arrays, scores: dict[str, dict[str, np.ndarray]], against: Sequence[Comparison]
    ) -> Document:
        """The report: scores, comparisons, cost and notes."""
        seed = self.settings.seed
        right = float((table["label"] == table["predicted"]).mean())
        accuracy = f"; accuracy {right:.3f}" if self.has_labels else ""
        parts: list[Block] = []
        for first in range(0, len(self.metrics), COLUMNS):
            some = self.metrics[first : first + COLUMNS]
            parts.append(Table(*score_table(scores, some, against, seed)))
        tests = sum(np.isfinite(c.p) for c in against)
        number = f"{tests} test{'' if tests == 1 else 's'}"
        held = COMPARED.format(reference=self.settings.reference, tests=number) if tests else ""
        parts.append(LEGEND.format(compared=held))
        parts += ["Cost:", Table(*_cost_table(table, tuple(scores)))]
        parts += self._notes(table, scores)
        parts += filter(None, [unsettled_note([c.n for c in against], [c.p_corrected for c in against])])
        return Document(f"{self.title}{accuracy}. Mean [95 % interval]", parts)

    def _notes(self, table: Arrays, scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
        count = len(table["name"])
        notes = ["No masks: localisation is not scored."]
        if self.masked:
            notes = [
                f"Localisation is scored against the objects' {self.masks or 'masks'}"
                f"{f', on {self.masked} images' if self.masked < count else ''}."
            ]
        if "fidelity" in self.metrics:
            notes.append(f"Fidelity sets pixels to the baseline {self.settings.baseline}.")
        lacking: dict[str, list[str]] = {}
        for metric in self.metrics:
            lacking.setdefault(_unscored({m: scores[m][metric] for m in scores}), []).append(
                metric_of(metric).title
            )
        lacking.pop("", None)
        if lacking:
            said = "; ".join(f"{', '.join(titles)}: {of}" for of, titles in lacking.items())
            notes.append(f"Not scored, of {count} images: {said}.")
        if self.settings.reference not in scores and len(scores) > 1:
            notes.append(f"No comparisons: {self.settings.reference} is not among the methods.")
        notes += [
            f"{other} is left out: its maps and scores are those of {method} here."
            for other, method in self.twins.items()
        ]
        notes += [f"{m} does not go with this network: {why}" for m, why in self.refused.items()]
        notes += [skipped_report(self.skipped)] if self.skipped else []
        return [*notes, *filter(None, [few_note(len(table["name"]), "images")])]


def twins(table: Arrays, methods: Iterable[str], metrics: Sequence[str], reference: str) -> dict[str, str]:
    """Method -> another one that gives the same maps of all images that were kept, and the same scores of all images.

    table : as :meth:`Evaluation.evaluate` gives it. methods, metrics : names. reference : never counts as the second.

    So two methods that read the same layer of a network are counted once, in ranks and in corrections.
    """
    found: dict[str, str] = {}
    first = sorted(methods, key=lambda method: method != reference)
    for k, method in enumerate(first):
        for other in first[:k]:
            keys = ("map", *metrics)
            if other not in found and all(
                np.array_equal(table[f"{method}/{key}"], table[f"{other}/{key}"], equal_nan=True)
                for key in keys
            ):
                found[method] = other
                break
    return found


def _column(method: str) -> str:
    """A method's name above its maps; that a control's colours say nothing of the class."""
    known = METHODS.get(method)
    return f"{method} (control)" if known and known.paper == "control" else method


def _row_label(file: str, class_: str) -> str:
    """An image's file, without folders, and its class under it."""
    return f"{file.rpartition('/')[2]}\n{class_.split(',')[0]}"


def _seeded(scorer: Any, seed: int) -> Any:
    """A metric or method that draws, drawing by ``seed``."""
    return replace(scorer, seed=seed) if hasattr(scorer, "seed") else scorer


def _unscored(own: dict[str, np.ndarray]) -> str:
    """How many images each method's scores lack: ``3 (all methods)``, ``2 (lrp_zplus)``; empty where none."""
    lacking: dict[int, list[str]] = {}
    for method, values in own.items():
        lacking.setdefault(int((~np.isfinite(values)).sum()), []).append(method)
    lacking.pop(0, None)
    return ", ".join(
        f"{n} ({'all methods' if len(names) == len(own) > 1 else ', '.join(names)})"
        for n, names in lacking.items()
    )


def _cost_table(table: Arrays, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    forward = float(table["forward/seconds"].mean())
    lines = []
    for method in methods:
        seconds = float(table[f"{method}/seconds"].mean())
        lines.append([method, f"{1000 * seconds:.1f}", f"{seconds / forward:.1f}"])
    return ["method", "ms per image", "forward passes"], lines


def _images_at_once(side: int) -> int:
    """25 of 64 x 64, 4 of 224 x 224."""
    return max(1, min(25, 4 * 224 * 224 // side**2))
