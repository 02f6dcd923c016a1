"""The study behind ``srd-lab attack`` and ``srd-lab robustness``: every method under the same ensemble on the same images,
batch by batch, then the other methods' images, gates, the curve over the budget, flags, entries and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attacks import flags
from attacks.budget import Budget, default_size, to_8_bits
from attacks.certified import Sides, both_sides
from attacks.ensemble import MODES, Ensemble
from attacks.entry import write_entry
from attacks.experiment import attack_explainer
from attacks.gates import GATED, Gates, check_gates
from attacks.judge import Found
from attacks.manipulation_study import manipulation_of
from attacks.pair_study import PairStudy
from attacks.probe import Probe, probe
from attacks.robustness_experiment import DRAWS, Experiment, images_of, transfer
from attacks.robustness_report import Report
from attacks.scores import SCORES
from attacks.settings import RobustnessSettings
from attacks.subject import Subject
from attacks.surrogate import Surrogate
from srd_lab.catalogue import FIGURE_4, attackable
from srd_lab.data import skipped_report
from srd_lab.errors import BadData
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.report import progress
from srd_lab.runs.settings import explainer_params
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Advance, Arrays, Item, Work, joined, skipped_in
from srd_lab.types import Explainer

PROBED = 4  # images that decide which surrogate is differentiated
MOST, LEAST = (
    16,
    4,
)  # images for the checks and for the curve over the budget: a quarter of all, between these
FACTORS = (0.25, 0.5, 2.0)  # of the budget, besides itself
CURVE = ("combined", "polish")  # its members


@dataclass(frozen=True)
class RobustnessWork(Work):
    """One method under an ensemble, which ``experiment`` has."""

    experiment: Experiment

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        """See :class:`srd_lab.runs.work.Work` and, for the arrays, :meth:`attacks.robustness_experiment.Experiment.run`."""
        return self.experiment.run(self.model, some, self.device, advance)


class RobustnessStudy(PairStudy):
    """One run, from settings to tables, figures and entries; errors are those of :class:`PairStudy`."""

    settings: RobustnessSettings

    def __init__(self, settings: RobustnessSettings) -> None:
        super().__init__(settings, [m for name in settings.methods for m in _meant(name)])
        self.members = _members(settings.attacks, settings.mode)
        self.checked = MODES[settings.mode].checked if "standard" in settings.attacks else ()
        self.title = f"{self.where}, {len(self.pairs)} images, {self.ensemble.budget}"
        self.few = few_of(len(self.pairs))

    @cached_property
    def ensemble(self) -> Ensemble:
        """The members that count, less ``transfer``, which needs the other methods first. Raises BadValue for an unknown
        member."""
        s, members = self.settings, tuple(name for name in self.members if name != "transfer")
        return Ensemble(members, s.mode, Budget.named(s.norm, s.budget), s.seed)

    def run(self, run: Run) -> None:
        """Attack every method and report.

        Raises BadData for an image that could be read when the pairs were drawn, but not now, and the errors of
        :meth:`Experiment.run` and :func:`srd_lab.runs.batches.in_batches`.
        """
        subjects = [self._attacked(stage) for stage in self.stages(run)]
        if "transfer" in self.members and len(subjects) > 1:
            for subject in subjects:
                # SRD's other start is one more restart, no other method
                method = self.variants[subject.name][0]
                others = [other for other in subjects if self.variants[other.name][0] != method]
                if others:
                    self._transferred(subject, others)
        for subject in subjects:
            self._examined(subject)
        report = Report(self.settings, self.title, self.dataset.classes)
        for subject in subjects:
            report.one(subject)
            if self.settings.entries:
                write_entry(self, subject, report.score(subject))
        report.all(run, subjects, self.left_out())

    # attacks -------------------------------------------------------------------------------------------
    def stages(self, run: Run) -> Iterator[Stage]:
        """A stretch of work for every method; the surrogate that its attack differentiates is looked for before."""
        pairs = [(pair.original, pair.goal) for pair in self.pairs]
        for name, (method, start) in self.variants.items():
            explainer = attack_explainer(method, start)
            child = run.child(name, {"method": method, **explainer_params(explainer)})
            found = self._probe(child, explainer)
            beside = "eq10" in self.settings.attacks and found.best is not None
            eq10 = manipulation_of(explainer, self.settings) if beside else None
            experiment = Experiment(explainer, self._members_for(found), eq10, found, self.settings.seeds)
            work = RobustnessWork(self.model, self.device, experiment)
            yield Stage(
                *(child, self.dataset, pairs, work, self.batcher), label=name, steps=experiment.steps()
            )

    def _attacked(self, stage: Stage) -> Subject:
        table = joined([_light(arrays) for arrays in in_batches(stage, self.settings)])
        if lost := skipped_in(table):
            raise BadData(f"could be read when the pairs were drawn, but not now: {skipped_report(lost)}")
        assert isinstance(stage.work, RobustnessWork)
        experiment = stage.work.experiment
        return Subject(stage.label, experiment.explainer, stage.run, experiment, table, {}, None, {}, {})

    def _members_for(self, found: Probe) -> Ensemble:
        """The ensemble; a method without a gradient goes to the black box, whatever was asked for."""
        if found.best or "black_box" in self.ensemble.members:
            return self.ensemble
        return replace(self.ensemble, members=(*self.ensemble.members, "black_box"))

    def _probe(self, child: Run, explainer: Explainer) -> Probe:
        if "probe.json" in child.list():
            stored = json.loads(child.load_text("probe.json"))
            best = stored.pop("best")
            return Probe(None if best is None else Surrogate.named(best), **stored)
        found = probe(
            *(explainer, self.model, self._images(PROBED), self.ensemble.budget),
            seed=self.settings.seed,
            batcher=self.batcher,
        )
        content = asdict(found) | {"best": None if found.best is None else str(found.best)}
        child.save_text("probe.json", json.dumps(content, indent=1) + "\n")
        return found

    def _images(self, count: int) -> Tensor:
        some = [self.dataset[pair.original].image for pair in self.pairs[:count]]
        return to_8_bits(torch.stack(some)).to(self.device)

    def _transferred(self, subject: Subject, others: Sequence[Subject]) -> None:
        """Add the member that asks what the other methods' adversarial images do to this one."""
        parts = []
        for path in subject.child.list("batches"):
            done = path.replace("batches", "transferred", 1)
            if done in subject.child.list("transferred"):
                parts.append(_light(subject.child.load_arrays(done)))
                continue
            own = subject.child.load_arrays(path)
            x, target = images_of(own["images"], self.device), torch.from_numpy(own["target"]).to(self.device)
            images = {
                other.name: [
                    images_of(other.stored(own["pair"], f"image/{score}"), self.device)
                    for score in SCORES[:2]
                ]
                for other in others
            }
            arrays = transfer(subject.experiment, self.model, x, target, images, own)
            subject.child.save_arrays(done, arrays)
            parts.append(_light(arrays))
        subject.table = joined(parts)

    # gates, curve, flags -------------------------------------------------------------------------------
    def _examined(self, subject: Subject) -> None:
        subject.checks = self._checks(subject)
        if self.settings.gates:
            subject.gates = self._gates(subject)
        if self.settings.curve:
            subject.curve = self._curve(subject)
        if self.settings.certify:
            subject.sides = self._sides(subject)
        extra = self._extra(subject) if self.settings.gates and subject.experiment.probe.best else {}
        found = subject.experiment.probe
        extra |= flags.not_monotone(self._alike(subject)) if subject.curve else {}
        if subject.checks:
            first = {
                name: subject.table[name][: self.few] for name in subject.table if name.startswith("worst/")
            }
            extra |= flags.checked(first | subject.checks, self.checked)
        subject.flags = flags.raised(subject.table, found, extra)

    def _checks(self, subject: Subject) -> Arrays:
        """The members that do not count in this mode, on the first images; nothing for a method without a gradient."""
        if "checks.npz" in subject.child.list():
            return subject.child.load_arrays("checks.npz")
        best = subject.experiment.probe.best
        if best is None or not self.checked:
            return {}
        ensemble = replace(self.ensemble, members=self.checked)
        founds = self._by_batches(subject, ensemble, self._images(self.few), "checks")
        found = {
            f"member/{name}/{score}": torch.cat([f.members[name][score] for f in founds]).cpu().numpy()
            for name in self.checked
            for score in SCORES
        }
        subject.child.save_arrays("checks.npz", found)
        return found

    def _by_batches(self, subject: Subject, ensemble: Ensemble, x: Tensor, label: str) -> list[Found]:
        """What another ensemble finds on the first images x."""
        keys = [self.dataset.name(pair.original) for pair in self.pairs[: len(x)]]
        probed = subject.experiment.probe
        with progress(len(x) * ensemble.cost(), f"{subject.name}, {label}") as move:

            def work(some: Sequence[int]) -> Found:
                return ensemble.run(
                    *(self.model, subject.explainer, x[list(some)]),
                    surrogate=probed.best,
                    keys=[keys[i] for i in some],
                    draws=DRAWS if probed.random else 1,
                    on_step=move,
                )

            return self.batcher.run(work, range(len(x)))

    def _gates(self, subject: Subject) -> Gates:
        if "gates.json" in subject.child.list():
            return Gates(**json.loads(subject.child.load_text("gates.json")))
        x = self._images(GATED)
        names = [self.dataset.name(pair.original) for pair in self.pairs[: len(x)]]
        found = check_gates(subject.explainer, self.model, x, names, self.settings.seed, self.batcher)
        subject.child.save_text("gates.json", json.dumps(asdict(found), indent=1) + "\n")
        return found

    def _extra(self, subject: Subject) -> dict[str, str]:
        if "extra.json" in subject.child.list():
            return dict(json.loads(subject.child.load_text("extra.json")))
        best = subject.experiment.probe.best
        assert best is not None
        x = self._images(GATED)
        found = flags.unlimited(subject.explainer, self.model, x[:PROBED], best)
        found |= flags.planted_missed(
            *(subject.explainer, self.model, x[:PROBED], x[PROBED:], best, self.ensemble.budget),
            seed=self.settings.seed,
        )
        subject.child.save_text("extra.json", json.dumps(found, indent=1) + "\n")
        return found

    def _alike(self, subject: Subject) -> dict[float, np.ndarray]:
        """The curve with the same members at every budget, as the flag has to compare it."""
        own = [
            subject.table[f"member/{m}/pcc"][: self.few] for m in CURVE if f"member/{m}/pcc" in subject.table
        ]
        size = float(self.settings.budget or default_size(self.settings.norm))
        return subject.curve | {size: np.minimum.reduce(own)} if own else subject.curve

    def _sides(self, subject: Subject) -> Sides:
        """Attack and certificate of the smoothed map, on the first images."""
        if "certificate.npz" in subject.child.list():
            return Sides(**subject.child.load_arrays("certificate.npz"))
        found = both_sides(
            *(subject.explainer, self.model, self._images(PROBED)),
            surrogate=subject.experiment.probe.best,
            sigma=self.settings.sigma,
            draws=self.settings.certify,
            seed=self.settings.seed,
        )
        subject.child.save_arrays("certificate.npz", vars(found))
        return found

    def _curve(self, subject: Subject) -> dict[float, np.ndarray]:
        """Budget (in its own units) -> lowest PCC of the first images, every budget attacked by itself."""
        size = float(self.settings.budget or default_size(self.settings.norm))
        if "curve.npz" in subject.child.list():
            stored = subject.child.load_arrays("curve.npz")
            return dict(zip(stored["size"].tolist(), stored["pcc"], strict=True))
        x = self._images(self.few)
        found = {size: subject.table["worst/pcc"][: len(x)]}
        best = subject.experiment.probe.best
        for factor in FACTORS if best else ():
            if self.settings.norm != "legacy" and size * factor > 255:
                continue
            budget = Budget.named(self.settings.norm, size * factor)
            ensemble = replace(self.ensemble, budget=budget, members=CURVE)
            founds = self._by_batches(subject, ensemble, x, f"budget {size * factor:g}")
            found[size * factor] = torch.cat([f.worst["pcc"] for f in founds]).cpu().numpy()
        found = dict(sorted(found.items()))
        subject.child.save_arrays(
            "curve.npz", {"size": np.array(list(found)), "pcc": np.stack(list(found.values()))}
        )
        return found


def _meant(name: str) -> Sequence[str]:
    """The methods that a name on the command line means."""
    return FIGURE_4 if name == "all" else attackable() if name == "attackable" else (name,)


def few_of(images: int) -> int:
    """On how many images the checks and the curve over the budget are made: a quarter, between 4 and 16."""
    return min(16, max(4, images // 4), images)


def _members(attacks: Sequence[str], mode: str) -> tuple[str, ...]:
    """The members that count: ``standard`` are the mode's; ``eq10`` is none."""
    named = [m for name in attacks for m in (MODES[mode].members if name == "standard" else (name,))]
    return tuple(name for name in dict.fromkeys(named) if name != "eq10")


def _light(arrays: Arrays) -> Arrays:
    """Scores; images and maps of every batch would pile up."""
    return {key: values for key, values in arrays.items() if values.ndim <= 2}
