"""Fig. 4: all methods attacked on the same pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attacks.experiment import Arrays, at_equal_perturbation
from attacks.manipulation_study import ManipulationStudy
from attacks.settings import ManipulationSettings
from srd_lab import render
from srd_lab.catalogue import FIGURE_4
from srd_lab.reproduce.paper import Finding, data_deviations, paired_claim, paper, report, store_findings
from srd_lab.runs.outcome import publish
from srd_lab.runs.tracking import Run

SRD = "srd_ones"
PUBLISHED = ManipulationSettings()
OF_THE_PAPER = ("lr", "output_term", "bound", "stop_mse", "beta_start", "beta_end")
UNANSWERED = (
    "SRD or what it is compared with is missing from this run, so the paper's claim cannot be tested."
)


class Figure4(ManipulationStudy):
    """The paper's comparison, and what it leaves out: equal perturbation, controls, both starts of SRD.

    Settings in ``OF_THE_PAPER`` are replaced by the published ones. Errors are those of
    :class:`attacks.manipulation_study.ManipulationStudy`.
    """

    def __init__(self, settings: ManipulationSettings) -> None:
        fixed = {name: getattr(PUBLISHED, name) for name in OF_THE_PAPER}
        super().__init__(replace(settings, **fixed, starts=("ones", "contrastive")))

    def report(self, run: Run, tables: dict[str, Arrays]) -> None:
        """Print and store tables, findings and deviations."""
        self.figures(run, tables)
        run.save_figure("fig4.png", render.manipulation_figure(self.shown, _scores(tables), self.title))
        said, findings = self.document(tables), self.findings(tables)
        store_findings(run, findings)
        title = f"Fig. 4 of the paper: {said.title}"
        document = report(title, said.blocks, findings, self.deviations(), UNANSWERED)
        publish(run, self.outcome(document, tables))

    def findings(self, tables: dict[str, Arrays]) -> list[Finding]:
        """The claim that SRD (from ones) stands above every other method: at the stop, and at equal perturbation.

        tables : method -> arrays over the pairs. None where SRD is not among the methods.
        """
        if SRD not in tables:
            return []
        seed, others = self.settings.seed, [name for name in tables if not name.startswith("srd")]
        equal = {score: at_equal_perturbation(tables, score) for score in ("ssim", "pcc")}
        found = []
        for score in ("ssim", "pcc"):
            word = score.upper()
            for other in others:
                pair = tables[SRD][score], tables[other][score]
                found.append(paired_claim(f"{word} of srd - {other}, at the stop", *pair, seed))
            for other in others:
                pair = equal[score][SRD], equal[score][other]
                found.append(paired_claim(f"{word} of srd - {other}, at equal mse", *pair, seed))
        return found

    def deviations(self) -> list[str]:
        """How this differs from section 4.3, a line each."""
        said, s = paper()["settings"]["fig4"], self.settings
        lines = data_deviations(s, "fig4", [s.model])
        if s.model != said["network"]:
            lines.append(f"network: {s.model}, not {said['network']}")
        if len(self.pairs) != said["pairs"]:
            lines.append(f"pairs: {len(self.pairs)}, not {said['pairs']}")
        lines.append(
            "pairs: of different classes, all correctly classified, no image used twice; the paper says random"
        )
        left = [m for m in FIGURE_4 if m not in {method for method, _ in self.variants.values()}]
        if left:
            lines.append(f"left out: {', '.join(left)}")
        lines.append(f"output term: {s.output_term}; Eq. 10 prints logits, which paralyse the attack")
        lines.append(f"at most {s.steps} steps; the paper does not say how many")
        return lines + self.left_out()


def _scores(tables: dict[str, Arrays]) -> dict[str, dict[str, Any]]:
    return {name: {"ssim": table["ssim"], "pcc": table["pcc"]} for name, table in tables.items()}
