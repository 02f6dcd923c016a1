"""Fig. 7: SRD with neurons instead of vectors, with post-activation vectors, and as it is; looked at and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apop.study import images_at_once
from srd_lab import render
from srd_lab.data import skipped_report
from srd_lab.data.draw import draw_images
from srd_lab.methods.srd import SRD
from srd_lab.metrics.complexity import Roughness, Sparseness
from srd_lab.metrics.summary import few_note, summarise
from srd_lab.reproduce.paper import Finding, data_deviations, paired_claim, report, store_findings
from srd_lab.reproduce.settings import AblationSettings
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.document import Block, Table
from srd_lab.runs.inputs import checked_networks, data_and_network, preprocessing_for
from srd_lab.runs.label import drawn_from
from srd_lab.runs.outcome import Outcome, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.settings import options_of
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Advance, Arrays, Item, Work, joined, skipped_in
from srd_lab.runtime import Batcher, pick_device

VARIANTS = {
    "scalar": SRD(unit="scalar"),
    "vector, post": SRD(values="post"),
    "vector, pre (SRD)": SRD(),
}
SCALAR, POST, OURS = VARIANTS
FIGURES = ("sparseness", "roughness", "roughness_abs")
PICTURES = 4
SHOWN = 2 * PICTURES  # images that are stored with their maps, as some may be skipped
LEGEND = """
sparseness: Gini index of |map| (0 = even, towards 1 = few pixels); roughness: Geary's C of the signed map, and of |map|
as a heat map shows it (0 = smooth, 1 = white noise)."""


@dataclass(frozen=True)
class AblationWork(Work):
    """The three variants, measured; maps of the first images, as those of all would pile up."""

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """See :class:`srd_lab.runs.work.Work`."""
        x = torch.stack([item.sample.image for item in some]).to(self.device)
        shown = sum(item.number < SHOWN for item in some)
        arrays: Arrays = {
            "name": np.array([item.sample.name for item in some]),
            "images": x[:shown].cpu().numpy(),
        }
        for variant, method in VARIANTS.items():
            raw, _ = method.explain_with_logits(self.model, x)
            scores = Sparseness().score(raw), Roughness().score(raw), Roughness().score(raw.abs())
            arrays |= {f"{variant}/{f}": s.cpu().numpy() for f, s in zip(FIGURES, scores, strict=True)}
            arrays[f"{variant}/map"] = raw[:shown].cpu().numpy()
        advance(len(some))
        return arrays


class Figure7:
    """One run of ``srd-lab reproduce fig7``: the three variants on the same images, for the predicted class.

    Errors are those of :func:`srd_lab.runs.inputs.checked_networks`.
    """

    def __init__(self, settings: AblationSettings) -> None:
        self.settings = settings
        self.models = list(dict.fromkeys(settings.models))
        self.device = pick_device(settings.device)
        self.dataset, self.weights_sha256 = checked_networks(settings, self.models)
        self.indices = draw_images(self.dataset, settings.images, settings.seed)
        self.drawn = drawn_from(settings, self.dataset, self.indices)
        self.seconds = 0.0

    def stages(self, run: Run) -> Iterator[Stage]:
        """A stretch of work for every network."""
        for name in self.models:
            dataset, model = data_and_network(self.settings, name, self.models, self.device)
            batcher = Batcher(
                self.settings.batch_size or images_at_once(preprocessing_for(self.settings, name).size)
            )
            child = run.child(name, {"model": name, **_options()})
            yield Stage(child, dataset, self.indices, AblationWork(model, self.device), batcher, label=name)

    def run(self, run: Run) -> None:
        """Measure every network and report; errors are those of :func:`srd_lab.runs.batches.in_batches`."""
        results, sheets = {}, {}
        for stage in self.stages(run):
            with stage.run:
                results[stage.label], sheets[stage.label] = self._measured(stage)
        self._report(run, results, sheets)

    def _measured(self, stage: Stage) -> tuple[dict[str, Arrays], list[render.SheetRow]]:
        sheet: list[render.SheetRow] = []
        found: list[Arrays] = []
        for arrays in in_batches(stage, self.settings):
            sheet += _sheet_rows(arrays)[: PICTURES - len(sheet)]
            found.append({key: values for key, values in arrays.items() if values.ndim <= 2})
        table = joined(found)
        self.skipped = skipped_in(table)
        self.names = [str(image) for image in table["name"]]
        self.seconds += float(table["seconds"])
        measured = {variant: {f: table[f"{variant}/{f}"] for f in FIGURES} for variant in VARIANTS}
        rows = [
            {"name": str(image)} | {f"{v}: {f}": float(measured[v][f][i]) for v in VARIANTS for f in FIGURES}
            for i, image in enumerate(table["name"])
        ]
        stage.run.save_text("images.csv", csv_text(rows))
        stage.run.log_metrics(
            {f"{f}/{_plain(v)}": float(np.nanmean(measured[v][f])) for v in VARIANTS for f in FIGURES}
        )
        return measured, sheet

    def _report(
        self, run: Run, results: dict[str, dict[str, Arrays]], sheets: dict[str, list[render.SheetRow]]
    ) -> None:
        seed, source = self.settings.seed, self.settings.source
        title = f"Fig. 7 of the paper on {source}, {len(self.indices)} of {len(self.dataset)} images, predicted class"
        header = ["Model", "variant", "sparseness", "roughness", "roughness of |map|"]
        lines = []
        for name, measured in results.items():
            for i, variant in enumerate(VARIANTS):
                cells = [str(summarise(measured[variant][f], seed)) for f in FIGURES]
                lines.append([name if i == 0 else "", variant, *cells])
        count = len(next(iter(results.values()))[OURS]["sparseness"])
        deviations = data_deviations(self.settings, "fig7", self.models)
        if self.skipped:
            deviations.append(skipped_report(self.skipped))
        deviations.append(
            f"the paper shows two pictures and gives no figures; here are {count:,} images, and how noise is "
            "measured is our choice"
        )
        findings = [f for name, measured in results.items() for f in self._findings(name, measured)]
        tables: list[Block] = [Table(header, lines), LEGEND, few_note(count, "images")]
        if all(sheets.values()):  # none where the first files could not be read
            run.save_figure("fig7.png", render.map_sheet(sheets, title))
        store_findings(run, findings)
        scores = {
            f"{name}, {variant}": dict(own)
            for name, measured in results.items()
            for variant, own in measured.items()
        }
        document = report(title, tables, findings, deviations)
        publish(run, Outcome(document, self.seconds, self.names, scores))

    def _findings(self, name: str, measured: dict[str, Arrays]) -> list[Finding]:
        seed = self.settings.seed
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


def _plain(variant: str) -> str:
    """The variant's name as MLflow takes it."""
    return variant.translate(str.maketrans("", "", ",()"))


def _options() -> dict[str, Any]:
    """The hyper-parameters of all variants."""
    return {
        f"{_plain(v)}/{name}": value for v, how in VARIANTS.items() for name, value in options_of(how).items()
    }
