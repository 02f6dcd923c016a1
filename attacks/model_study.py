"""The study of manipulated networks: one network per attacked method, and which other methods still tell the truth.

For every attacked method a copy of the network is fine-tuned (:mod:`attacks.model_manipulation`), and so is a control, with
the same images, steps and rate but without the map loss: what fine-tuning alone does to maps is no manipulation. All methods
are then read on held-out images on the original, the manipulated and the control network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.model_compare import Comparison, compare, shown_maps, weights_of
from attacks.model_manipulation import ModelManipulation
from attacks.model_objective import Active, Cases, CentreOfMass, Location, MapObjective, TopK
from attacks.model_tables import LEGEND, Maps, table, verdicts
from attacks.settings import ModelManipulationSettings
from srd_lab import render
from srd_lab.catalogue import FIGURE_4
from srd_lab.data import load_batches, skipped_report
from srd_lab.errors import BadData, BadValue
from srd_lab.metrics.summary import few_note
from srd_lab.normalise import split_normalisation
from srd_lab.registry import make_explainer
from srd_lab.runs.document import Block, Document, Table
from srd_lab.runs.inputs import data_and_network, data_for, labelled, preprocessing_for, weights_sums
from srd_lab.runs.label import drawn_from
from srd_lab.runs.outcome import Outcome, publish
from srd_lab.runs.report import csv_text, progress
from srd_lab.runs.settings import explainer_params
from srd_lab.runs.tracking import Run
from srd_lab.runtime import Batcher, generator, pick_device
from srd_lab.types import Dataset, Sample

OBJECTIVES = ("location", "top-k", "centre-of-mass", "active")
OTHERS = ("gradient", "guided_backprop", "grad_input", "lrp_zplus", "gradcam", "srd")
CONTROL = "control"
PICTURES = 6
_SECONDS = "seconds.txt"  # that training took
_AT_ONCE = 16
_SPLIT = ("scenes", "cifar10", "cifar100")  # data with images to train on apart from the test images


class Pool:
    """Samples of a data set, decoded once and kept.

    classes : names by index. samples : at least one. Attribute ``labels`` : (len,) int64.
    """

    def __init__(self, classes: list[str], samples: list[Sample]) -> None:
        self.classes = classes
        self.samples = samples
        self.labels = torch.tensor([sample.label for sample in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def name(self, index: int) -> str:
        """What the data set calls sample ``index``."""
        return self.samples[index].name

    def batch(self) -> tuple[Tensor, Tensor]:
        """All images (N, 3, H, W) and labels (N,)."""
        return torch.stack([sample.image for sample in self.samples]), self.labels


def pool_of(dataset: Dataset, indices: Sequence[int], workers: int | None) -> Pool:
    """The samples of these indices that can be read; workers : see :func:`srd_lab.data.load_batches`.

    Raises BadData if not one can be read.
    """
    loaded = next(load_batches(dataset, [indices], workers))
    if not loaded.samples:
        raise BadData(f"not one image is left; {skipped_report(loaded.skipped)}")
    return Pool(list(dataset.classes), loaded.samples)


def objective_of(settings: ModelManipulationSettings, side: int) -> MapObjective:
    """What the settings have the maps say; the frame is an eighth of the image's ``side`` in pixels unless given.

    Raises BadValue for an objective that is not known, or with values out of range.
    """
    kind = settings.manipulate_model
    if kind not in OBJECTIVES:
        raise BadValue(f"the objective {kind!r} is not known; expected one of {', '.join(OBJECTIVES)}")
    if kind == "location":
        return Location(settings.frame or max(1, side // 8))
    if kind == "top-k":
        return TopK(settings.top_share)
    return CentreOfMass() if kind == "centre-of-mass" else Active(*settings.swap)


class ModelStudy:
    """One run of ``srd-lab attack --manipulate-model``, from settings to table and pictures.

    Raises BadValue for settings out of range or that leave no image to train on, and Refused for methods that recompute
    their passes; else the errors are those of :func:`srd_lab.runs.inputs.data_for` and
    :func:`srd_lab.runs.inputs.network_for`.
    """

    def __init__(self, settings: ModelManipulationSettings) -> None:
        self.settings = settings
        self.methods = tuple(dict.fromkeys(FIGURE_4 if "all" in settings.methods else settings.methods))
        self.read = tuple(dict.fromkeys((*self.methods, *settings.others)))
        self.device = pick_device(settings.device)
        name = settings.model
        self.dataset, self.model = data_and_network(settings, name, [name], self.device)
        self.dataset = labelled(self.dataset, self.model, self.device)
        self.weights_sha256 = weights_sums(settings, [name], {name: self.model})
        self.objective = objective_of(settings, preprocessing_for(settings, name).size)
        for method in self.methods:
            self.manipulation(method)  # wrong settings show before a run is opened
        self.source, self.training, self.held = self._indices(name)
        self.title = f"{name} on {settings.source}"
        self.drawn = drawn_from(settings, self.dataset, self.held)
        self._before = 0.0  # seconds of training in earlier sessions

    def _indices(self, name: str) -> tuple[Dataset, list[int], list[int]]:
        """The data to train on, and which of it and of the test data are used; no image is in both."""
        s = self.settings
        order = torch.randperm(len(self.dataset), generator=generator(s.seed, "held out")).tolist()
        held, rest = order[: s.pairs], order[s.pairs :]
        if s.source in _SPLIT:
            source = data_for(s, name, "train")
            rest = torch.randperm(len(source), generator=generator(s.seed, "training")).tolist()
            return source, rest[: s.train_images], held
        if not rest:
            raise BadValue(
                f"all {len(order)} images are held out, which leaves none to train on; hold out fewer than {s.pairs}"
            )
        return self.dataset, rest[: s.train_images], held

    def manipulation(self, method: str, weight: float | None = None) -> ModelManipulation:
        """The attack on one method as the settings have it; ``weight=0`` is the control."""
        s = self.settings
        return ModelManipulation(
            make_explainer(method),
            self.objective,
            weight=s.map_weight if weight is None else weight,
            steps=s.train_steps,
            lr=s.train_lr,
            batch=s.train_batch,
            keep=s.keep,
            seed=s.seed,
        )

    def run(self, run: Run) -> None:
        """Manipulate a network per method, read all methods on it, and report; errors are those of
        :meth:`ModelManipulation.run`."""
        began = time.perf_counter()
        workers = self.settings.workers
        held = pool_of(self.dataset, self.held, workers)
        x, labels = (t.to(self.device) for t in held.batch())
        cases = self.objective.cases(x, labels)
        training = _Once(self.source, self.training, workers)
        how = self.manipulation(self.methods[0], 0.0)
        with run.child(CONTROL, self._params(how)) as child:
            control = self._network(child, CONTROL, how, training)
            untouched = {m: self._read(m, control, cases) for m in self.read}
            child.log_metrics({"accuracy": self._accuracy(control, x, labels)})
        blocks: list[Block] = []
        scores: dict[str, dict[str, np.ndarray]] = {}
        for method in self.methods:
            how = self.manipulation(method)
            params = {**self._params(how), "method": method, **explainer_params(how.explainer)}
            with run.child(method, params) as child:
                network = self._network(child, method, how, training)
                found = {m: self._read(m, network, cases) for m in self.read}
                networks = {"original": self.model, "manipulated": network, CONTROL: control}
                accuracies = {name: self._accuracy(net, x, labels) for name, net in networks.items()}
                self._log(child, method, found, untouched, accuracies)
                child.save_figure("pictures.png", self._pictures(method, network, cases, held))
            blocks += self._blocks(method, found, untouched, accuracies, len(cases.images))
            scores |= _scores(method, found, untouched)
        document = Document(f"{self.title}, manipulated", [*blocks, LEGEND.format(what=self.objective.what)])
        images = [f"case {i}" for i in range(len(cases.images))]
        publish(run, Outcome(document, self._before + time.perf_counter() - began, images, scores))

    def _params(self, how: ModelManipulation) -> dict[str, Any]:
        return {"map_weight": how.weight, "objective": str(how.objective)}

    # networks ------------------------------------------------------------------------------------------
    def _network(self, child: Run, name: str, how: ModelManipulation, training: _Once) -> nn.Module:
        """The network of a child run: its stored weights where an earlier session left some, else newly made and stored."""
        if self.settings.resumed and "weights.npz" in child.list():
            if _SECONDS in child.list():
                self._before += float(child.load_text(_SECONDS))
            return _with_weights(self.model, child.load_arrays("weights.npz"))
        began = time.perf_counter()
        with progress(how.steps, name) as advance:
            done = how.run(self.model, training.pool, on_step=advance)
        child.save_text(_SECONDS, f"{time.perf_counter() - began:.3f}\n")
        child.save_arrays("weights.npz", {k: v.numpy() for k, v in weights_of(done.model).items()})
        steps = range(1, how.steps + 1)
        child.log_traces(
            {"over_steps/task": (steps, done.task.numpy()), "over_steps/score": (steps, done.score.numpy())}
        )
        return done.model

    def _accuracy(self, network: nn.Module, x: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            right = [
                network(some).argmax(1) == given
                for some, given in zip(x.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
            ]
        return float(torch.cat(right).double().mean())

    # maps ----------------------------------------------------------------------------------------------
    def _read(self, method: str, network: nn.Module, cases: Cases) -> dict[str, np.ndarray]:
        """The comparison of one method's maps, name -> (N,)."""
        explainer = make_explainer(method)

        def work(some: Sequence[int]) -> Comparison:
            return compare(explainer, self.objective, self.model, network, cases.part(some[0], some[-1] + 1))

        batcher = Batcher(self.settings.batch_size or _AT_ONCE)
        parts = batcher.run(work, range(len(cases.images)))
        return {
            field.name: torch.cat([getattr(part, field.name) for part in parts]).double().cpu().numpy()
            for field in fields(Comparison)
        }

    def _pictures(self, method: str, network: nn.Module, cases: Cases, held: Pool) -> Any:
        some = cases.part(0, PICTURES)
        columns: dict[str, Tensor] = {}
        for name in self.read:
            for when, net in (("before", self.model), ("after", network)):
                columns[f"{name}, {when}"] = shown_maps(make_explainer(name), net, some)[:, 0].cpu()
        rows = [
            render.SheetRow(
                held.classes[int(some.classes[0][i])].split(",")[0],
                some.images[i].cpu(),
                {name: maps[i] for name, maps in columns.items()},
            )
            for i in range(len(some.images))
        ]
        return render.method_sheet(rows, f"{self.title}, manipulated against {method}: {self.objective.what}")

    # what is stored ------------------------------------------------------------------------------------
    def _log(
        self, child: Run, method: str, found: Maps, untouched: Maps, accuracies: Mapping[str, float]
    ) -> None:
        rows = [
            {"method": m, "case": i}
            | {name: float(values[i]) for name, values in found[m].items()}
            | {f"{name}_control": float(untouched[m][name][i]) for name in ("after", "pcc", "ssim")}
            for m in self.read
            for i in range(len(found[m]["after"]))
        ]
        child.save_text("maps.csv", csv_text(rows))
        metrics = {f"accuracy_{name}": value for name, value in accuracies.items()}
        for m, verdict in verdicts(method, found, untouched, self.settings.seed).items():
            metrics |= {f"{m}/{name}": float(values.mean()) for name, values in found[m].items()}
            metrics[f"{m}/gain"] = verdict.gain.mean
        child.log_metrics(metrics)

    def _blocks(
        self, method: str, found: Maps, untouched: Maps, accuracies: Mapping[str, float], count: int
    ) -> list[Block]:
        accuracy = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
        head = f"Manipulated against {method}; accuracy on {len(self.held)} held-out images: {accuracy}"
        found_verdicts = verdicts(method, found, untouched, self.settings.seed)
        note = few_note(count, "images")
        return [head, Table(*table(found, untouched, found_verdicts)), note]


def _scores(attacked: str, found: Maps, untouched: Maps) -> dict[str, dict[str, np.ndarray]]:
    """Per method that was read, what became of its maps in the network manipulated against ``attacked``."""
    return {
        f"{m}, manipulated against {attacked}": {
            "pcc": own["pcc"],
            "ssim": own["ssim"],
            "gain": own["after"] - untouched[m]["after"],
        }
        for m, own in found.items()
    }


class _Once:
    """The images to train on, decoded when a network has to be trained, and then kept."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], workers: int | None) -> None:
        self._given = dataset, indices, workers
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        self._pool = self._pool or pool_of(*self._given)
        return self._pool


def _with_weights(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of ``model`` with the stored weights."""
    network = copy.deepcopy(model)
    state = {name: torch.from_numpy(values) for name, values in arrays.items()}
    split_normalisation(network)[1].load_state_dict(state)
    return network
