"""The evaluation study: every method by every metric, batch by batch, stored, compared and shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from apop.experiment import draw_images
from srd_lab import options as cli
from srd_lab import render
from srd_lab.catalogue import METHODS, METRICS
from srd_lab.data import Loaded, load_batches, skipped_report
from srd_lab.evaluation.experiment import Arrays, Experiment, refusals
from srd_lab.evaluation.tables import Comparison, comparisons, ranks, score_table
from srd_lab.metrics.summary import summarise
from srd_lab.registry import EXPLAINERS
from srd_lab.runtime import Batcher, pick_device
from srd_lab.tracking import Run
from srd_lab.types import Sample, SrdLabError

PICTURES = 6
COLUMNS = 5  # of a printed table
MASKS = {
    "scenes": "outlines",
    "imagenet-s": "outlines",
    "voc": "outlines or boxes",
    "imagenet": "bounding boxes",
}
LEGEND = """
↑ higher is better, ↓ lower; ¹ best, ² second best; + better, - worse than {reference} (Wilcoxon's signed-rank test on the
same images, p < 0.05 after Holm's correction for {tests} tests). Maps divided by their largest |value|, stretched to the
image, clamped to [-1, 1]."""


class Evaluation:
    """One run of ``srd-lab evaluate``, from settings to tables and figures."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.watch = cli.Stopwatch()
        self.device = pick_device(settings["device"])
        name = settings["model"]
        self.model, self.dataset = cli.subject(settings, name, [name], self.device)
        self.indices = draw_images(self.dataset, settings["images"], settings["seed"])
        first = next(iter(load_batches(self.dataset, [self.indices[:1]], 0)))
        asked = tuple(METHODS) if "all" in settings["methods"] else settings["methods"]
        self.metrics = tuple(METRICS) if "all" in settings["metrics"] else settings["metrics"]
        sample = first.samples[0] if first.samples else self.dataset[self.indices[-1]]
        self.refused = refusals(self.model, sample, asked, self.device)
        methods = tuple(method for method in asked if method not in self.refused)
        if not methods:
            raise SrdLabError(f"no method goes with {name}: {next(iter(self.refused.values()))}")
        self.experiment = Experiment(methods, self.metrics, settings["target"])
        settings["batch_size"] = settings["batch_size"] or _batch_size(sample.image.shape[-1])
        source = settings["data"].partition(":")[0]
        self.title = (
            f"{name} on {source}, {len(self.indices)} of {len(self.dataset)} images, "
            f"{'their own' if settings['target'] == 'label' else 'the predicted'} class explained"
        )
        self.masks = MASKS.get(source, "")

    def run(self, run: Run) -> None:
        """Evaluate every method and report."""
        table = self.evaluate(run)
        self.report(run, table)

    def evaluate(self, run: Run) -> Arrays:
        """Scores of all images, with maps of the first ``PICTURES``."""
        size = self.settings["batch_size"]
        parts = [self.indices[first : first + size] for first in range(0, len(self.indices), size)]
        paths = [f"batches/{part[0]:05d}-{part[-1]:05d}.npz" for part in parts]
        done = cli.finished_batches(run, self.settings)
        to_do = [part for part, path in zip(parts, paths, strict=True) if path not in done]
        arriving, batcher = load_batches(self.dataset, to_do, self.settings["workers"]), Batcher(size)
        found: list[Arrays] = []
        pictures = 0
        with cli.progress(
            len(self.indices) * len(self.experiment.methods), self.settings["model"]
        ) as advance:
            for part, path in zip(parts, paths, strict=True):
                if path in done:
                    advance(len(part) * len(self.experiment.methods))
                else:
                    batch = self._batch(next(arriving), batcher, advance, PICTURES - pictures)
                    run.save_arrays(path, batch)
                found.append(run.load_arrays(path))
                pictures += len(found[-1]["images"])
        self.skipped = {str(n): str(why) for arrays in found for n, why in arrays["skipped"]}
        found = [arrays for arrays in found if len(arrays["name"])]
        if not found:
            raise SrdLabError(f"not one image is left; {skipped_report(self.skipped)}")
        return {key: np.concatenate([arrays[key] for arrays in found]) for key in found[0]}

    def _batch(
        self, loaded: Loaded, batcher: Batcher, advance: Callable[[int], None], pictures: int
    ) -> Arrays:
        def evaluate(some: Sequence[tuple[int, Sample]]) -> Arrays:
            indices, samples = zip(*some, strict=True)
            return self.experiment.run(self.model, samples, indices, self.device, advance)

        parts = batcher.run(evaluate, list(zip(loaded.indices, loaded.samples, strict=True)))
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
        kept = {
            key: values[: max(0, pictures)] if values.ndim > 1 else values for key, values in joined.items()
        }
        skipped = np.array(list(loaded.skipped.items()), "U").reshape(-1, 2)
        blank: Arrays = {"name": np.array([], "U"), "images": np.zeros((0, 3, 1, 1))}
        return {**blank, **kept, "skipped": skipped}

    # what is stored ------------------------------------------------------------------------------------
    def scores(self, table: Arrays) -> dict[str, dict[str, np.ndarray]]:
        """method -> metric -> (N,)."""
        return {m: {k: table[f"{m}/{k}"] for k in self.metrics} for m in self.experiment.methods}

    def report(self, run: Run, table: Arrays) -> None:
        """Print and store what compares the methods."""
        scores, seed = self.scores(table), self.settings["seed"]
        against = comparisons(scores, self.settings["reference"], seed)
        for method in scores:
            with run.child(method, asdict(EXPLAINERS[method])) as child:  # type: ignore[call-overload]
                child.log_metrics(self._metrics(table, scores[method], method))
        run.save_text("images.csv", cli.csv_text(self._rows(table)))
        if against:
            run.save_text("comparisons.csv", cli.csv_text([vars(c) for c in against]))
        self.figures(run, table)
        text = self.text(table, scores, against)
        run.save_text("summary.txt", text + "\n")
        run.log_metrics({"seconds": self.watch.seconds()})
        click.echo(text)

    def _metrics(self, table: Arrays, own: dict[str, np.ndarray], method: str) -> dict[str, float]:
        found: dict[str, float] = {"seconds_per_image": float(table[f"{method}/seconds"].mean())}
        for metric, values in own.items():
            s = summarise(values, self.settings["seed"])
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

    def figures(self, run: Run, table: Arrays) -> None:
        """Ranks, and the sheet of pictures."""
        scores = self.scores(table)
        run.save_figure("ranks.png", render.rank_chart(_titled(ranks(scores)), self.title))
        names = self.dataset.classes
        rows = [
            render.SheetRow(
                names[int(table["label"][i])],
                image,
                {METHODS[m].title: table[f"{m}/map"][i] for m in self.experiment.methods},
            )
            for i, image in enumerate(table["images"])
        ]
        run.save_figure("pictures.png", render.method_sheet(rows, self.title))

    def text(
        self, table: Arrays, scores: dict[str, dict[str, np.ndarray]], against: Sequence[Comparison]
    ) -> str:
        """The report."""
        seed = self.settings["seed"]
        right = float((table["label"] == table["predicted"]).mean())
        parts = [f"{self.title}; accuracy {right:.3f}. Mean [95 % interval]"]
        for first in range(0, len(self.metrics), COLUMNS):
            some = self.metrics[first : first + COLUMNS]
            parts.append(cli.text_table(*score_table(scores, some, against, seed)))
        legend = LEGEND.format(
            reference=self.settings["reference"],
            tests=sum(np.isfinite(c.p) for c in against),
        )
        parts.append(
            legend.strip()
            if against
            else legend.strip().replace(re.findall(r"; \+.*?tests\)", legend, re.S)[0], "")
        )
        parts.append("Cost:\n\n" + cli.text_table(*_cost_table(table, self.experiment.methods)))
        parts += self._notes(table, scores)
        return "\n\n".join(parts)

    def _notes(self, table: Arrays, scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
        notes = [f"Masks: {self.masks}." if self.masks else "No masks: localisation is not scored."]
        unscored = {
            f"{METHODS[m].title} by {METRICS[k].title}": int((~np.isfinite(v)).sum())
            for m, own in scores.items()
            for k, v in own.items()
        }
        some = {what: n for what, n in unscored.items() if n}
        if some and self.masks:
            listed = [f"{what} {n}" for what, n in list(some.items())[:8]] + (
                ["..."] if len(some) > 8 else []
            )
            notes.append(f"Not scored, of {len(table['name'])} images: {', '.join(listed)}.")
        notes += [
            f"{METHODS[m].title} does not go with this network: {why}" for m, why in self.refused.items()
        ]
        return [*notes, skipped_report(self.skipped)] if self.skipped else notes


def _titled(place: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        METRICS[metric].title: {METHODS[m].title: rank for m, rank in own.items()}
        for metric, own in place.items()
    }


def _cost_table(table: Arrays, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    forward = float(table["forward/seconds"].mean())
    lines = []
    for method in methods:
        seconds = float(table[f"{method}/seconds"].mean())
        lines.append([method, f"{1000 * seconds:.1f}", f"{seconds / forward:.1f}"])
    return ["method", "ms per image", "forward passes"], lines


def _batch_size(side: int) -> int:
    """Images at once: 25 of 64 x 64, 4 of 224 x 224."""
    return max(1, min(25, 4 * 224 * 224 // side**2))
