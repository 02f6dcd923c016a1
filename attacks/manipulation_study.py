"""The published attack (Eq. 10): every method attacked on the same pairs, batch by batch, scored, stored and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attacks.budget import Budget
from attacks.experiment import (
    at_equal_perturbation,
    attack_batch,
    attack_explainer,
    common_reach,
    perturbation_curves,
    rows,
)
from attacks.flags import HALF
from attacks.manipulation import SCORES, Manipulation
from attacks.objective import Eq10
from attacks.pair_study import PairStudy
from attacks.settings import ManipulationSettings
from srd_lab import render
from srd_lab.catalogue import FIGURE_4
from srd_lab.data import skipped_report
from srd_lab.errors import BadData
from srd_lab.metrics.summary import few_note, summarise
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.outcome import Outcome, over_images, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.settings import explainer_params
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Advance, Arrays, Item, Work, joined, skipped_in
from srd_lab.types import Explainer

PICTURES = 6
LEGEND = """
ssim, pcc: to the original's map (1 = unmoved); noise: the same after random noise of equal MSE;
surrogate: as the attacker sees it; target: to the map aimed at, before -> after; kept: predictions that held;
mse: normalised units; linf: largest change of a pixel (0..255); beta: the surrogate's at the last step."""
EQUAL = """
At equal perturbation: every pair as far as every method brought it (by mse, {mse:.1e} on average; by linf, {linf:.1f}),
mean [95 % interval]
"""
STALLED = (
    "used less than half of the budget: the attack stalled, and their scores are no sign of robustness "
    "(--beta-start 30 or 100 may help; --attack standard does not depend on it)"
)
NOT_FINITE = (
    "ended early: the attack's gradient was not finite (smaller --beta-end helps; Manipulation(beta_end=...))"
)


EQUAL_KINDS = [(score, over) for over in ("mse", "linf") for score in ("ssim", "pcc")]


@dataclass(frozen=True)
class ManipulationWork(Work):
    """The published attack on one method.

    how : the attack. seed : of the control's noise.
    """

    how: Manipulation
    seed: int

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """See :class:`srd_lab.runs.work.Work` and, for the arrays, :func:`attacks.experiment.attack_batch`."""
        originals, goals = zip(*(item.samples for item in some), strict=True)
        numbers = [item.number for item in some]
        return attack_batch(self.how, self.model, numbers, originals, goals, self.seed, self.device, advance)


class ManipulationStudy(PairStudy):
    """One run of the published attack, from settings to tables and figures; errors are those of :class:`PairStudy`."""

    settings: ManipulationSettings

    def __init__(self, settings: ManipulationSettings) -> None:
        super().__init__(settings, FIGURE_4 if "all" in settings.methods else settings.methods)
        self.shown: dict[str, list[render.PictureRow]] = {}  # the first pairs of every method
        self.title = f"{self.where}, {len(self.pairs)} pairs"

    def stages(self, run: Run) -> Iterator[Stage]:
        """A stretch of work for every method."""
        pairs = [(pair.original, pair.goal) for pair in self.pairs]
        for name, (method, start) in self.variants.items():
            how = self.manipulation(method, start)
            child = run.child(name, {"method": method, **explainer_params(how.explainer)})
            work = ManipulationWork(self.model, self.device, how, self.settings.seed)
            yield Stage(child, self.dataset, pairs, work, self.batcher, label=name, steps=how.steps)

    def run(self, run: Run) -> None:
        """Attack every method and report.

        Raises BadData for an image that could be read when the pairs were drawn, but not now, and the errors of
        :meth:`Manipulation.run` and :func:`srd_lab.runs.batches.in_batches`.
        """
        tables = {}
        for stage in self.stages(run):
            with stage.run as child:
                tables[stage.label] = self._attacked(stage)
                self._log(stage.label, child, tables[stage.label])
        self.report(run, tables)

    def _attacked(self, stage: Stage) -> Arrays:
        parts: list[Arrays] = []
        shown: list[Arrays] = []
        for arrays in in_batches(stage, self.settings):
            if sum(len(part["pair"]) for part in shown) < PICTURES:
                shown.append(arrays)
            # scores and curves; images and maps of every batch would pile up
            parts.append({key: values for key, values in arrays.items() if values.ndim <= 2})
        table = joined(parts)
        if lost := skipped_in(table):
            raise BadData(f"could be read when the pairs were drawn, but not now: {skipped_report(lost)}")
        self.shown[stage.label] = self._pictures(joined(shown))
        return table

    def manipulation(self, method: str, start: str) -> Manipulation:
        """The attack on one method as the settings have it; start : of SRD."""
        return manipulation_of(attack_explainer(method, start), self.settings)

    # what is stored ------------------------------------------------------------------------------------
    def _log(self, name: str, child: Run, table: Arrays) -> None:
        child.save_text("pairs.csv", csv_text(rows(table)))
        child.log_metrics({**metrics_of(table, self.settings.seed), "seconds": float(table["seconds"])})
        loss = _nanmean(table["loss"])
        child.log_traces({"over_steps/loss": (range(1, len(loss) + 1), loss)})
        child.log_traces(over_images({f"eq10_{name}": table[name] for name in ("pcc", "ssim")}))
        child.save_figure("pictures.png", render.picture_grid(self.shown[name]))

    def _pictures(self, table: Arrays) -> list[render.PictureRow]:
        name = self.dataset.classes
        return [
            render.PictureRow(
                label=f"pair {table['pair'][i]}: {name[table['label'][i]]} → {name[table['goal_label'][i]]}",
                original=table["images"][i],
                adversarial=table["adversarial"][i],
                map_original=table["map_original"][i],
                map_adversarial=table["map_adversarial"][i],
                map_target=table["map_target"][i],
                target=table["goal_images"][i],
                scores=f"SSIM {table['ssim'][i]:.2f}, PCC {table['pcc'][i]:.2f}\n"
                f"to target: SSIM {table['ssim_target'][i]:.2f}, PCC {table['pcc_target'][i]:.2f}",
            )
            for i in range(min(PICTURES, len(table["pair"])))
        ]

    def report(self, run: Run, tables: dict[str, Arrays]) -> None:
        """Print and store what compares the methods; tables : method -> arrays over the pairs."""
        self.figures(run, tables)
        publish(run, self.outcome(self.document(tables), tables))

    def outcome(self, document: Document, tables: dict[str, Arrays]) -> Outcome:
        """A report with the scores of every pair, by the names that they have beside a worst case."""
        images = [str(name) for name in next(iter(tables.values()))["original"]]
        scores = {
            method: {f"eq10_{name}": table[name] for name in ("pcc", "ssim", "pcc_target", "ssim_target")}
            | {f"noise_{name}": table[f"{name}_noise"] for name in ("pcc", "ssim")}
            for method, table in tables.items()
        }
        return Outcome(document, seconds(tables), images, scores)

    def figures(self, run: Run, tables: dict[str, Arrays]) -> None:
        """Store the box plots, and the scores over the perturbation reached."""
        scores = {m: {"ssim": t["ssim"], "pcc": t["pcc"]} for m, t in tables.items()}
        control = {m: {"ssim": t["ssim_noise"], "pcc": t["pcc_noise"]} for m, t in tables.items()}
        run.save_figure("scores.png", render.box_plots(scores, control, self.title))
        for over in ("mse", "linf"):
            c = perturbation_curves(tables, over)
            figure = render.perturbation(over, c.reached, c.pairs, c.bands, self.title)
            run.save_figure(f"scores_over_{over}.png", figure)

    def document(self, tables: dict[str, Arrays]) -> Document:
        """The report."""
        seed = self.settings.seed
        title = f"{self.title}; original map against the map after the attack, mean [95 % interval]"
        parts: list[Block] = [Table(*summary_table(tables, seed))]
        if len(tables) > 1:
            reach = {over: common_reach(tables, over) for over in ("mse", "linf")}
            parts.append(EQUAL.format(**{over: _mean(values) for over, values in reach.items()}))
            parts.append(Table(*equal_table(tables, seed)))
        stalled = _stalled(tables, self.settings.stop_mse)
        notes = [*_ended_early(tables), *stalled, *_left_out(tables), few_note(len(self.pairs), "pairs")]
        return Document(title, [*parts, *notes, *self.left_out(), LEGEND])


def manipulation_of(explainer: Explainer, s: ManipulationSettings) -> Manipulation:
    """The published attack on ``explainer`` as the settings have it. Raises BadValue for settings out of range."""
    return Manipulation(
        explainer,
        steps=s.steps,
        lr=s.lr,
        objective=Eq10(output_term=s.output_term),
        budget=Budget(s.bound),
        stop_mse=s.stop_mse,
        beta_start=s.beta_start,
        beta_end=s.beta_end,
    )


def seconds(tables: dict[str, Arrays]) -> float:
    """How long all batches took, those of earlier sessions too."""
    return float(sum(table["seconds"] for table in tables.values()))


def _stalled(tables: dict[str, Arrays], stop_mse: float) -> list[str]:
    """A line per method with pairs that hardly moved: their maps stayed, which says nothing of the method."""
    counts = {m: int(((t["mse"] / stop_mse) ** 0.5 < HALF).sum()) for m, t in tables.items()}
    return [f"{m}: {k} of {len(tables[m]['mse'])} pairs {STALLED}" for m, k in counts.items() if k]


def _ended_early(tables: dict[str, Arrays]) -> list[str]:
    """A line per method with pairs that ended for a gradient that was not finite."""
    counts = {method: int(table["diverged"].sum()) for method, table in tables.items()}
    return [f"{m}: {k} pair{'' if k == 1 else 's'} {NOT_FINITE}" for m, k in counts.items() if k]


def _left_out(tables: dict[str, Arrays]) -> list[str]:
    """A line per score at equal perturbation that some pairs do not have with every method."""
    count = len(next(iter(tables.values()))["pair"])
    lines = []
    for score, over in EQUAL_KINDS if len(tables) > 1 else ():
        scores = next(iter(at_equal_perturbation(tables, score, over).values()))
        if (n := int(np.isfinite(scores).sum())) < count:
            lines.append(
                f"{score} at equal {over}: {n} of {count} pairs, which have a score with every method"
            )
    return lines


def metrics_of(table: Arrays, seed: int) -> dict[str, float]:
    """What is logged of one method: means with intervals of the scores, means of all else.

    table : arrays over the pairs. seed : of the bootstrap intervals.
    """
    metrics: dict[str, float] = {}
    for name in SCORES:
        summary = summarise(table[name], seed)
        metrics |= {
            f"eq10_{name}": summary.mean,
            f"eq10_{name}_median": summary.median,
            f"eq10_{name}_low": summary.low,
            f"eq10_{name}_high": summary.high,
            f"noise_{name}": float(table[f"{name}_noise"].mean()),
            f"eq10_{name}_best": float(table[f"{name}_best"].mean()),
        }
    surrogate = (f"{name}_surrogate" for name in SCORES[:2])
    before = (f"{name}_before" for name in SCORES[2:])
    for name in (*surrogate, *before, "prediction_kept", "mse", "linf", "steps", "beta", "diverged"):
        known_as = f"eq10_{name}" if name.startswith(SCORES[:2]) else name
        metrics[known_as] = float(table[name].mean())
    return metrics


def summary_table(tables: dict[str, Arrays], seed: int) -> tuple[list[str], list[list[str]]]:
    """Header and one line of text per method."""
    header = ["method"]
    header += [column for score in ("ssim", "pcc") for column in (score, "noise", "surrogate")]
    header += ["ssim target", "pcc target", "kept", "mse", "linf", "steps", "beta"]
    lines = []
    for method, table in tables.items():
        mean = {name: table[name].mean() for name in table if table[name].dtype.kind in "bfi"}
        cells = [method]
        for name in ("ssim", "pcc"):
            cells += [str(summarise(table[name], seed)), f"{mean[f'{name}_noise']:.3f}"]
            cells += [f"{mean[f'{name}_surrogate']:.3f}"]
        cells += [f"{mean[f'{name}_before']:.3f} -> {mean[name]:.3f}" for name in SCORES[2:]]
        cells += [f"{mean['prediction_kept']:.0%}", f"{mean['mse']:.1e}", f"{mean['linf']:.1f}"]
        cells += [f"{mean['steps']:.0f}", f"{mean['beta']:.0f}"]
        lines.append(cells)
    return header, lines


def equal_table(tables: dict[str, Arrays], seed: int) -> tuple[list[str], list[list[str]]]:
    """Header and one line of text per method: scores of every pair at the perturbation that all methods reached."""
    found = [at_equal_perturbation(tables, score, over) for score, over in EQUAL_KINDS]
    header = ["method", *(f"{score} at equal {over}" for score, over in EQUAL_KINDS)]
    return header, [[m, *(str(summarise(scores[m], seed)) for scores in found)] for m in tables]


def _mean(values: np.ndarray) -> float:
    """Of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def _nanmean(loss: np.ndarray) -> np.ndarray:
    """Mean over the images still under attack at each step, as far as any is."""
    running = np.isfinite(loss).any(0)
    return np.nanmean(loss[:, running], axis=0)
