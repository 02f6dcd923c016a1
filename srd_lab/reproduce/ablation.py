"""Fig. 7: SRD with neurons instead of vectors, with post-activation vectors, and as it is; looked at and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import torch

from apop.experiment import draw_images
from srd_lab import options as cli
from srd_lab import render
from srd_lab.data import Loaded, load_batches, skipped_report
from srd_lab.methods.srd import SRD
from srd_lab.metrics.complexity import Roughness, Sparseness
from srd_lab.metrics.summary import summarise
from srd_lab.models import input_size
from srd_lab.reproduce.paper import Finding, data_deviations, findings_csv, paired_claim, report
from srd_lab.runtime import Batcher, pick_device
from srd_lab.tracking import Run
from srd_lab.types import Sample, SrdLabError

VARIANTS = {
    "scalar": SRD(unit="scalar"),
    "vector, post": SRD(values="post"),
    "vector, pre (SRD)": SRD(),
}
SCALAR, POST, OURS = VARIANTS
FIGURES = ("sparseness", "roughness", "roughness_abs")
PICTURES = 4
LEGEND = """
sparseness: Gini index of |map| (0 = even, towards 1 = few pixels); roughness: Geary's C of the signed map, and of |map|
as a heat map shows it (0 = smooth, 1 = white noise)."""
Arrays = dict[str, np.ndarray]


class Figure7:
    """One run of ``srd-lab reproduce fig7``: the three variants on the same images, for the predicted class."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.watch = cli.Stopwatch()
        self.models = list(dict.fromkeys(settings["models"]))
        self.device = pick_device(settings["device"])
        cli.weights_of(settings["weights"], self.models)
        side, *_ = (input_size(name, settings["data"]) for name in self.models)
        _, self.dataset = cli.subject(settings, self.models[0], self.models, self.device)
        self.indices = draw_images(self.dataset, settings["images"], settings["seed"])
        settings["batch_size"] = settings["batch_size"] or max(1, min(50, 8 * 224 * 224 // side**2))

    def run(self, run: Run) -> None:
        """Measure every network and report."""
        results, sheets = {}, {}
        for name in self.models:
            with run.child(name, {"model": name}) as child:
                results[name], sheets[name] = self._model(name, child)
        self._report(run, results, sheets)

    def _model(self, name: str, child: Run) -> tuple[dict[str, Arrays], list[render.SheetRow]]:
        model, dataset = cli.subject(self.settings, name, self.models, self.device)
        size = self.settings["batch_size"]
        parts = [self.indices[first : first + size] for first in range(0, len(self.indices), size)]
        paths = [f"batches/{part[0]:05d}-{part[-1]:05d}.npz" for part in parts]
        done = cli.finished_batches(child, self.settings)
        arriving = load_batches(
            dataset,
            [p for p, path in zip(parts, paths, strict=True) if path not in done],
            self.settings["workers"],
        )
        batcher, found = Batcher(size), []
        sheet: list[render.SheetRow] = []
        with cli.progress(len(self.indices), name) as advance:
            for part, path in zip(parts, paths, strict=True):
                if path not in done:
                    child.save_arrays(
                        path, self._batch(model, next(arriving), batcher, PICTURES - len(sheet))
                    )
                found.append(child.load_arrays(path))
                sheet += _sheet_rows(found[-1])
                advance(len(part))
        self.skipped = {str(n): str(why) for arrays in found for n, why in arrays["skipped"]}
        found = [arrays for arrays in found if len(arrays["name"])]
        if not found:
            raise SrdLabError(f"not one image is left; {skipped_report(self.skipped)}")
        measured = {
            variant: {f: np.concatenate([arrays[f"{variant}/{f}"] for arrays in found]) for f in FIGURES}
            for variant in VARIANTS
        }
        names = np.concatenate([a["name"] for a in found])
        rows = [
            {"name": str(image)} | {f"{v}: {f}": float(measured[v][f][i]) for v in VARIANTS for f in FIGURES}
            for i, image in enumerate(names)
        ]
        child.save_text("images.csv", cli.csv_text(rows))
        child.log_metrics(
            {f"{f}/{v}".replace(",", "").replace("(", "").replace(")", ""): float(np.nanmean(measured[v][f]))
             for v in VARIANTS for f in FIGURES}
        )  # fmt: skip
        return measured, sheet

    def _batch(self, model: Any, loaded: Loaded, batcher: Batcher, pictures: int) -> Arrays:
        """Scores of every image; the first ``pictures`` with their maps, as those of all would pile up."""

        def measure(some: Sequence[Sample]) -> Arrays:
            x = torch.stack([sample.image for sample in some]).to(self.device)
            arrays: Arrays = {"images": x.cpu().numpy(), "name": np.array([sample.name for sample in some])}
            for variant, method in VARIANTS.items():
                raw = method.explain(model, x)
                scores = Sparseness().score(raw), Roughness().score(raw), Roughness().score(raw.abs())
                arrays |= {f"{variant}/{f}": s.cpu().numpy() for f, s in zip(FIGURES, scores, strict=True)}
                arrays[f"{variant}/map"] = raw.cpu().numpy()
            return arrays

        parts = batcher.run(measure, loaded.samples)
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
        joined = {key: values[:pictures] if values.ndim > 1 else values for key, values in joined.items()}
        skipped = np.array(list(loaded.skipped.items()), "U").reshape(-1, 2)
        return {"name": np.array([], "U"), **joined, "skipped": skipped}

    def _report(
        self, run: Run, results: dict[str, dict[str, Arrays]], sheets: dict[str, list[render.SheetRow]]
    ) -> None:
        seed, source = self.settings["seed"], self.settings["data"].partition(":")[0]
        title = f"Fig. 7 of the paper on {source}, {len(self.indices)} of {len(self.dataset)} images, predicted class"
        header = ["Model", "variant", "sparseness", "roughness", "roughness of |map|"]
        lines = []
        for name, measured in results.items():
            for i, variant in enumerate(VARIANTS):
                cells = [_interval(measured[variant][f], seed) for f in FIGURES]
                lines.append([name if i == 0 else "", variant, *cells])
        count = len(next(iter(results.values()))[OURS]["sparseness"])
        deviations = data_deviations(self.settings, count, self.models)
        if self.skipped:
            deviations.append(skipped_report(self.skipped))
        deviations.append(
            "the paper shows two pictures and gives no figures; how noise is measured is our choice"
        )
        findings = [f for name, measured in results.items() for f in self._findings(name, measured)]
        text = report(title, [cli.text_table(header, lines) + "\n" + LEGEND], findings, deviations)
        run.save_figure("fig7.png", render.map_sheet(sheets, title))
        run.save_text("summary.txt", text + "\n")
        run.save_text("findings.csv", findings_csv(findings))
        run.log_metrics({"seconds": self.watch.seconds()})
        click.echo(text)

    def _findings(self, name: str, measured: dict[str, Arrays]) -> list[Finding]:
        seed = self.settings["seed"]
        pairs = {
            f"{name}: roughness of {SCALAR} - SRD": ("roughness", SCALAR),
            f"{name}: roughness of |{SCALAR}| - |SRD|": ("roughness_abs", SCALAR),
            f"{name}: sparseness of {POST} - SRD": ("sparseness", POST),
        }
        return [
            paired_claim(what, measured[variant][figure], measured[OURS][figure], seed)
            for what, (figure, variant) in pairs.items()
        ]


def _sheet_rows(arrays: Arrays) -> list[render.SheetRow]:
    """The images of a batch that are stored with their maps."""
    return [
        render.SheetRow(str(arrays["name"][i]), image, {v: arrays[f"{v}/map"][i] for v in VARIANTS})
        for i, image in enumerate(arrays.get("images", ()))
    ]


def _interval(values: np.ndarray, seed: int) -> str:
    s = summarise(values, seed)
    return f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]"
