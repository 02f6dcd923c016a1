"""What the robustness study prints and stores: tables, comparisons, curves, a heat map and a sheet of the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attacks.budget import default_size
from attacks.ensemble import LETTERS
from attacks.flags import HALF
from attacks.scores import SCORES
from attacks.settings import RobustnessSettings
from attacks.statistics import Difference, against, area, breaking_budget, explanation_rate
from attacks.subject import Subject
from attacks.thresholds import TAU
from srd_lab import render
from srd_lab.metrics.summary import few_note, summarise, unsettled_note
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.outcome import Outcome, over_images, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.tracking import Run

PICTURES = 6
LEGEND = """
Worst case per image over the attacks {members}, on images of 8 bits that keep the predicted class; mean [95 % interval].
pcc, ssim, top-10 %: to the original's map (1 = unmoved); local: a neighbouring pixel counts too; rer: the share of images
whose worst pcc stays >= {tau:.2f}; noise: pcc after noise of the same norm; by: the attack that found most of the lowest
pcc; used: of the budget, by the gradient attack and image that used least.{eq10}"""
EQ10 = """
eq10: the published attack (Eq. 10) on the same images, beside and not counted; it aims at another map and may stall."""


class Report:
    """Tables and figures of one run of the study.

    title : of all of them. classes : names of the data's classes, by index.
    """

    def __init__(self, settings: RobustnessSettings, title: str, classes: Sequence[str]) -> None:
        self.settings, self.title, self.classes = settings, title, classes
        self.seed = settings.seed
        self.eq10 = "eq10" in settings.attacks

    # one method ----------------------------------------------------------------------------------------
    def score(self, subject: Subject) -> dict[str, float]:
        """The figures of one method as they are logged, name -> value."""
        table = subject.table
        found: dict[str, float] = {}
        for name in SCORES:
            s, rate = (
                summarise(table[f"worst/{name}"], self.seed),
                explanation_rate(table[f"worst/{name}"], name),
            )
            spread = float(table[f"repeats/{name}"].mean(0).std()) if subject.experiment.seeds > 1 else 0.0
            found |= {
                f"worst_{name}": s.mean,
                f"worst_{name}_low": s.low,
                f"worst_{name}_high": s.high,
                f"rer_{name}": float(rate.mean()),
                f"noise_{name}": float(table[f"control/noise/{name}"].mean()),
                f"seed_spread_{name}": spread,
            }
        if "eq10/pcc" in table:
            found |= {f"eq10_{n}": float(table[f"eq10/{n}"].mean()) for n in (*SCORES, "kept", "mse", "used")}
        found |= {
            f"more_{n.removeprefix('more/')}": float(v.mean())
            for n, v in table.items()
            if n.startswith("more/")
        }
        found |= {"budget_used_least": float(table["used"].min()), "flags": float(len(subject.flags))}
        if subject.curve:
            found |= {
                "curve_area_pcc": area(subject.curve),
                "breaking_budget": breaking_budget(subject.curve),
            }
        return found | {"seconds": float(table["seconds"])}

    def one(self, subject: Subject) -> None:
        """Store figures, table and pictures of one method in its child run."""
        child, table = subject.child, subject.table
        child.log_metrics(self.score(subject))
        child.log_traces(over_images({f"worst_{name}": table[f"worst/{name}"] for name in SCORES[:2]}))
        if len(subject.curve) > 1:
            size = self.settings.budget or default_size(self.settings.norm)
            percent = [round(100 * budget / size) for budget in subject.curve]
            means = [float(scores.mean()) for scores in subject.curve.values()]
            child.log_traces({"over_budget_percent/worst_pcc": (percent, means)})
        child.save_text("images.csv", csv_text(_rows(table)))
        child.save_text("flags.txt", "".join(f"{name}: {said}\n" for name, said in subject.flags.items()))
        child.save_figure("worst.png", render.picture_grid(self._pictures(subject)))

    def _pictures(self, subject: Subject) -> list[render.PictureRow]:
        table = subject.table
        order = np.argsort(table["worst/pcc"], kind="stable")[:PICTURES]
        numbers = table["pair"][order]
        parts = {n: subject.final(numbers, n) for n in ("images", "image/pcc", "map0", "map1")}
        return [
            render.PictureRow(
                label=f"{self.classes[int(table['label'][i])]}, by {table['by/pcc'][i]}",
                original=parts["images"][k] / 255,
                adversarial=parts["image/pcc"][k] / 255,
                map_original=parts["map0"][k],
                map_adversarial=parts["map1"][k],
                scores=f"PCC {table['worst/pcc'][i]:.2f}\nSSIM {table['worst/ssim'][i]:.2f}",
            )
            for k, i in enumerate(order)
        ]

    # all methods ---------------------------------------------------------------------------------------
    def all(self, run: Run, subjects: Sequence[Subject], left_out: Sequence[str]) -> None:
        """Print and store what compares the methods; left_out : lines on methods and files."""
        worst = {s.name: s.table["worst/pcc"] for s in subjects}
        differences = [
            *against({s.name: s.table["worst/pcc"] for s in subjects}, "pcc", self.seed),
            *against({s.name: s.table["worst/ssim"] for s in subjects}, "ssim", self.seed),
        ]
        if differences:
            run.save_text("comparisons.csv", csv_text([vars(d) for d in differences]))
        run.save_figure("members.png", render.member_heat(*_heat(subjects), self.title))
        if any(s.curve for s in subjects):
            curves = {s.name: self._lowest(s.curve) for s in subjects if len(s.curve) > 1}
            run.save_figure("robustness.png", render.budget_curves(curves, self.settings.norm, self.title))
        if any(s.sides for s in subjects):
            self._certificates(run, subjects)
        scores = {
            m: {"pcc": w, "ssim": s.table["worst/ssim"]}
            for (m, w), s in zip(worst.items(), subjects, strict=True)
        }
        noise = {s.name: {k: s.table[f"control/noise/{k}"] for k in ("pcc", "ssim")} for s in subjects}
        run.save_figure("scores.png", render.box_plots(scores, noise, self.title))
        seconds = sum(float(s.table["seconds"]) for s in subjects)
        images = [str(name) for name in subjects[0].table["original"]]
        scored = {s.name: _scores(s.table) for s in subjects}
        document, first = self.document(subjects, differences, left_out), _ranked(subjects)[0].name
        publish(run, Outcome(document, seconds, images, scored, first))

    def _lowest(self, curve: Mapping[float, np.ndarray]) -> dict[float, tuple[float, float, float]]:
        """Budget -> mean worst PCC and its interval; what a smaller budget reaches counts for a larger one too."""
        sizes = sorted(curve)
        lowest = np.minimum.accumulate(np.stack([curve[size] for size in sizes]), axis=0)
        found = [summarise(scores, self.seed) for scores in lowest]
        return {size: (s.mean, s.low, s.high) for size, s in zip(sizes, found, strict=True)}

    def _certificates(self, run: Run, subjects: Sequence[Subject]) -> None:
        """One figure with both sides: what an attack leaves, and what is certified."""
        sides = {s.name: s.sides for s in subjects if s.sides}
        attacked = {name: (found.sizes, found.attacked.mean(0)) for name, found in sides.items()}
        certified = {name: (found.radii, found.certified.mean(0)) for name, found in sides.items()}
        values = int(np.prod(subjects[0].stored(np.array([0]), "images").shape[1:]))
        title = f"{self.title.rpartition(',')[0]}, maps smoothed with sigma {self.settings.sigma:g}"
        run.save_figure("certificate.png", render.certificate_plot(attacked, certified, values, title=title))

    def document(
        self, subjects: Sequence[Subject], differences: Sequence[Difference], left_out: Sequence[str]
    ) -> Document:
        """The report; arguments as in :meth:`all`, and the comparisons of the methods."""
        title = f"{self.title}; worst case over the {self.settings.mode} ensemble, mean [95 % interval]"
        parts: list[Block] = [Table(*self._table(_ranked(subjects)))]
        ran = [m for m in LETTERS if any(f"member/{m}/pcc" in s.table for s in subjects)]
        members = ", ".join(f"{m} ({LETTERS[m]})" for m in ran)
        legend = LEGEND.format(members=members, tau=TAU["pcc"], eq10=EQ10 if self.eq10 else "")
        if checks := next((s.checks for s in subjects if s.checks), {}):
            names = [f"{m} ({LETTERS[m]})" for m in LETTERS if f"member/{m}/pcc" in checks]
            count = len(next(iter(checks.values())))
            legend += f"\nchecked on {count} images, not counted: {', '.join(names)}."
        parts.append(legend)
        if differences:
            parts += self._compared(differences)
        flagged = [f"  {s.name}: {name}: {said}" for s in subjects for name, said in s.flags.items()]
        if flagged:
            parts.append("Flags (a figure with a flag is unreliable):\n" + "\n".join(flagged))
        stalled = {
            s.name: int((s.table["eq10/used"] < HALF).sum()) for s in subjects if "eq10/used" in s.table
        }
        if some := ", ".join(f"{count} of {name}" for name, count in stalled.items() if count):
            parts.append(
                f"eq10 stalled below half of the budget (images: {some}): no sign of robustness there."
            )
        gated = [f"  {s.name}: {s.gates.why}" for s in subjects if s.gates and not s.gates.ranked]
        if gated:
            parts.append("Not ranked (gates):\n" + "\n".join(gated))
        notes = [few_note(len(subjects[0].table["pair"]), "images"), *left_out]
        return Document(title, [*parts, *notes])

    def _table(self, subjects: Sequence[Subject]) -> tuple[list[str], list[list[str]]]:
        gates = any(s.gates for s in subjects)
        header = [
            *(["rank"] if gates else []),
            "method",
            "pcc",
            "ssim",
            "top-10 %",
            "local",
            "rer",
            "noise",
            "by",
            "used",
        ]
        header += ["eq10 pcc", "eq10 ssim"] if self.eq10 else []
        lines, rank = [], 0
        for subject in subjects:
            rank += _is_ranked(subject)
            place = [str(rank) if _is_ranked(subject) else "-"] if gates else []
            lines.append([*place, subject.name, *self._cells(subject.table), str(len(subject.flags) or "-")])
        return [*header, "flags"], lines

    def _cells(self, table: Mapping[str, np.ndarray]) -> list[str]:
        names, counts = np.unique(table["by/pcc"], return_counts=True)
        used = table["used"][np.isfinite(table["used"])]
        cells = [str(summarise(table[f"worst/{name}"], self.seed)) for name in ("pcc", "ssim")]
        cells += [f"{table[f'worst/{name}'].mean():.3f}" for name in ("top_k", "local_top_k")]
        cells += [
            f"{explanation_rate(table['worst/pcc'], 'pcc').mean():.0%}",
            f"{table['control/noise/pcc'].mean():.3f}",
        ]
        cells += [LETTERS.get(str(names[counts.argmax()]), "-"), f"{used.min():.2f}" if len(used) else "-"]
        if self.eq10:
            cells += [
                f"{table[f'eq10/{k}'].mean():.3f}" if f"eq10/{k}" in table else "-" for k in ("pcc", "ssim")
            ]
        return cells

    def _compared(self, differences: Sequence[Difference]) -> list[Block]:
        rows = [
            [
                d.method,
                d.score,
                f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                f"{d.p_corrected:.3g}",
                d.verdict,
            ]
            for d in differences
        ]
        title = (
            f"Against {differences[0].reference} on the same images (paired bootstrap, Holm's correction):"
        )
        one = [
            d for d in differences if d.score == differences[0].score
        ]  # each score has a correction of its own
        by = " by one score" if len(one) < len(differences) else ""
        note = unsettled_note([d.n for d in one], [d.p_corrected for d in differences], by)
        return [title, Table(["method", "score", "difference", "p", "verdict"], rows), note]


def _is_ranked(subject: Subject) -> bool:
    return bool(subject.gates and subject.gates.ranked and not subject.flags.keys() & UNRANKING)


UNRANKING = {
    "diverged",
    "violated",
    "degenerate",
    "masked",
    "no_gradient",
    "wrong_gradient",
    "unlimited",
    "unused_budget",
    "zero_gradient",
    "planted",
}


def _ranked(subjects: Sequence[Subject]) -> list[Subject]:
    """Ranked ones first, by their worst PCC; without gates in the order in which they were asked for."""
    if not any(s.gates for s in subjects):
        return list(subjects)
    return sorted(subjects, key=lambda s: (not _is_ranked(s), -float(s.table["worst/pcc"].mean())))


def _heat(subjects: Sequence[Subject]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Mean PCC by method and attack, and the attacks in order; a star marks those that were only checked."""
    heat = {
        s.name: {
            f"{m}{star}": float(table[f"member/{m}/pcc"].mean())
            for table, star in ((s.table, ""), (s.checks, "*"))
            for m in LETTERS
            if f"member/{m}/pcc" in table
        }
        for s in subjects
    }
    known = {name for own in heat.values() for name in own}
    return heat, [f"{m}{star}" for star in ("", "*") for m in LETTERS if f"{m}{star}" in known]


def _scores(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What other runs are held against, score -> (N,)."""
    found = {f"worst_{name}": table[f"worst/{name}"] for name in SCORES}
    found |= {f"noise_{name}": table[f"control/noise/{name}"] for name in SCORES[:2]}
    return found | {f"eq10_{name}": table[f"eq10/{name}"] for name in SCORES[:2] if f"eq10/{name}" in table}


def _rows(table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per image."""
    names = [n for n, v in table.items() if v.ndim == 1 and n not in ("files", "seconds")]
    return [{n: table[n][i].item() for n in names} for i in range(len(table["pair"]))]
