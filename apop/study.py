"""The APOP study: every network over the same images, batch by batch, counted, stored and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from apop.experiment import SETTINGS, Experiment, Hits, Interval, draw_images
from apop.pattern import ActivationPattern, record
from srd_lab import options as cli
from srd_lab import render
from srd_lab.data import Loaded, load_batches, load_data, skipped_report
from srd_lab.models import Classifier, input_size
from srd_lab.runtime import Batcher, pick_device
from srd_lab.tracking import Run
from srd_lab.types import Dataset, Sample

TOP_5 = 5


class Survey:
    """One run of ``srd-lab apop``, from settings to tables and figures."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.watch = cli.Stopwatch()
        self.models = list(dict.fromkeys(settings["models"]))
        cli.weights_of(settings["weights"], self.models)
        self.device = pick_device(settings["device"])
        self.experiment = Experiment(settings["inputs"], settings["binarize"], settings["seed"])
        size, *_ = (input_size(name, settings["data"]) for name in self.models)
        self.dataset: Dataset = load_data(
            settings["data"], seed=settings["seed"], size=size, non_rgb=settings["non_rgb"]
        )
        self.indices = draw_images(self.dataset, settings["images"], settings["seed"])
        settings["batch_size"] = settings["batch_size"] or _batch_size(size)
        source = settings["data"].partition(":")[0]
        self.about = f"{source}, {len(self.indices)} of {len(self.dataset)} images"

    def run(self, run: Run) -> None:
        """Survey every model and report."""
        results = {}
        for name in self.models:
            with run.child(name, {"model": name}) as child:
                results[name] = self._model(name, child)
        self.report(run, results)

    def _model(self, name: str, child: Run) -> Hits:
        watch = cli.Stopwatch()
        model, dataset = cli.subject(self.settings, name, self.models, self.device)
        size = self.settings["batch_size"]
        parts = [self.indices[first : first + size] for first in range(0, len(self.indices), size)]
        paths = [f"{i * size:05d}-{i * size + len(part) - 1:05d}.npz" for i, part in enumerate(parts)]
        done = cli.finished_batches(child, self.settings)
        to_do = [part for part, path in zip(parts, paths, strict=True) if f"batches/{path}" not in done]
        arriving = load_batches(dataset, to_do, self.settings["workers"])
        batcher, passes = Batcher(size), self._passes(name, model)
        hits = []
        with cli.progress(len(self.indices) * passes, name) as advance:
            for part, path in zip(parts, paths, strict=True):
                if f"batches/{path}" in done:
                    hits.append(Hits.from_arrays(child.load_arrays(f"batches/{path}")))
                    advance(len(part) * passes)
                    continue
                hits.append(self._batch(model, next(arriving), path, child, batcher, advance))
        joined = Hits.join(hits)
        self._log(name, child, joined, watch.seconds())
        return joined

    def _passes(self, name: str, model: Classifier) -> int:
        """Forward passes per image; refuses an unfit model and says what patterns will take before the work starts."""
        side = input_size(name, self.settings["data"])
        _, pattern = record(model, torch.zeros(1, 3, side, side, device=self.device))
        if self.settings["save_patterns"]:
            one, count = pattern.packed_bytes, len(self.indices)
            click.echo(
                f"patterns: {_size(one)} per image, {_size(one * count)} for {count} images before compression",
                err=True,
            )
        return self.experiment.passes(len(pattern.masks))

    def _batch(
        self,
        model: Classifier,
        loaded: Loaded,
        path: str,
        child: Run,
        batcher: Batcher,
        advance: Callable[[int], None],
    ) -> Hits:
        def survey(some: Sequence[tuple[int, Sample]]) -> Hits:
            patterns: list[ActivationPattern] = []
            indices, samples = zip(*some, strict=True)
            hits = self.experiment.run(model, samples, indices, self.device, advance, patterns.append)
            if self.settings["save_patterns"]:
                first, last = (self.indices.index(index) for index in (indices[0], indices[-1]))
                child.save_arrays(f"patterns/{first:05d}-{last:05d}.npz", patterns[0].to_arrays())
            return hits

        parts = batcher.run(survey, list(zip(loaded.indices, loaded.samples, strict=True)))
        hits = Hits.join([*parts, Hits.nothing(loaded.skipped)]) if parts else Hits.nothing(loaded.skipped)
        child.save_arrays(f"batches/{path}", hits.to_arrays())
        return hits

    # what is stored ------------------------------------------------------------------------------------
    def _log(self, name: str, child: Run, hits: Hits, seconds: float) -> None:
        child.save_text("images.csv", cli.csv_text(hits.rows()))
        child.save_text("summary.csv", cli.csv_text(_summary(hits)))
        metrics = {
            key: hits.interval(key).accuracy for key in hits.right if not key.startswith("binarized_top5")
        }
        child.log_metrics({**metrics, "seconds": seconds})
        self._draw(name, child, hits)

    def _draw(self, name: str, child: Run, hits: Hits) -> None:
        title = f"{name} on {self.about}"
        original, chance = hits.interval("top1/original").accuracy, 1 / len(self.dataset.classes)
        bars = {
            (kind, setting): hits.interval(f"top1/{kind}/{setting}").accuracy
            for kind in self.experiment.inputs
            for setting in SETTINGS
        }
        if bars:
            child.save_figure("apop.png", render.apop_bars(bars, original, chance, title))
        if hits.layers:
            curve = [interval.accuracy for interval in hits.curve()]
            figure = render.binarisation_curve(hits.layers, curve, original, chance, title)
            child.save_figure("binarisation.png", figure)

    def report(self, run: Run, results: dict[str, Hits]) -> None:
        """Print and store what compares the networks."""
        classes = len(self.dataset.classes)
        chance = f"Guessing: {1 / classes:.3f} top-1, {min(TOP_5, classes) / classes:.3f} top-5."
        text = "\n".join(
            [
                f"APOP on {self.about}: accuracy ±half the 95 % Wilson interval",
                "",
                cli.text_table(*table_3(results, self.experiment)),
                "",
                chance,
                *(line for name, hits in results.items() if hits.layers for line in _curve(name, hits)),
            ]
        )
        if skipped := next(iter(results.values())).skipped:
            text += f"\n\n{skipped_report(skipped)}"
        run.save_text("summary.txt", text + "\n")
        run.log_metrics({"seconds": self.watch.seconds()})
        click.echo(text)


def table_3(results: dict[str, Hits], experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the paper's Table 3: a line per model and input, the original's accuracy in the first."""
    header = ["Model", "Input"]
    header += [f"{top} {what}" for top in ("Top-1", "Top-5") for what in ("Ori.", "APOP", "APOP & relu")]
    lines = []
    for model, hits in results.items():
        for i, kind in enumerate(experiment.inputs):
            cells = [model if i == 0 else "", kind]
            for top in ("top1", "top5"):
                cells.append(_cell(hits.interval(f"{top}/original")) if i == 0 else "")
                cells += [_cell(hits.interval(f"{top}/{kind}/{s}")) for s in ("apop", "apop_relu")]
            lines.append(cells)
    return header, lines


def _cell(interval: Interval) -> str:
    return f"{interval.accuracy:.3f} ±{interval.half_width:.3f}"


def _curve(model: str, hits: Hits) -> list[str]:
    """Fig. 6 as text: a line per activation call."""
    original = hits.interval("top1/original").accuracy
    lines = [
        [layer, f"{one.accuracy:.3f}", f"[{one.low:.3f}, {one.high:.3f}]", f"{five.accuracy:.3f}"]
        for layer, one, five in zip(hits.layers, hits.curve(), hits.curve(TOP_5), strict=True)
    ]
    table = cli.text_table(["Activation call", "Top-1", "95 % interval", "Top-5"], lines)
    title = f"{model}: one activation call binarised, all else as it is (untouched: {original:.3f} top-1)"
    return ["", title, "", table]


def _summary(hits: Hits) -> list[dict[str, Any]]:
    """A row per condition: accuracy and its 95 % Wilson interval."""
    intervals = {condition: hits.interval(condition) for condition in hits.right}
    return [
        {"condition": name, "accuracy": each.accuracy, "low": each.low, "high": each.high, "images": each.n}
        for name, each in intervals.items()
    ]


def _batch_size(side: int) -> int:
    """Images at once: 50 of 64 x 64, 8 of 224 x 224; the same on every device, so that a run can go on elsewhere."""
    return max(1, min(50, 8 * 224 * 224 // side**2))


def _size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
