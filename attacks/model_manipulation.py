"""The model side of an attack: change the network, not the image, until its explanations say what the attacker wants.

Heo, Joo and Moon, "Fooling neural network interpretations via adversarial model manipulation" (NeurIPS 2019): fine-tune a
copy of the network on

    loss = task loss + weight * map loss,

the task loss being the cross entropy of the labels (or the divergence from the original's outputs), and the map loss that
of one explanation method, whose maps are differentiable in the weights. Batch norms keep their statistics, as in the paper.
Accuracy holds, and a map that looked at the object looks elsewhere: who shows the map has proved nothing.

Here every objective is a score per image that is high where the attacker has what he wants, and the map loss is minus its
mean; what is trained is what is reported. Scores are of maps as they are read, |map| stretched to the image, with p = |map|
divided by its sum, so that ``weight`` means the same for every method. The paper's own losses are squared distances and sums
of raw values:

| objective | score here | in the paper |
|---|---|---|
| ``Location`` | mass of p in a region | squared distance to the region's mask |
| ``TopK`` | mass of p off the pixels that were on top | minus the values on these pixels |
| ``CentreOfMass`` | shift of p's centre towards the farther border | its l1 distance, with a gradient of 0 at the start |
| ``Active`` | likeness to the other class's map before, less that to its own | squared distance to the other class's map |

Maps are explained for the label. A method that recomputes its passes (Score-CAM, Ablation-CAM) has no derivative in the
weights here and is refused.

Example
-------
::

    how = ModelManipulation(make_explainer("gradient"), Location(frame=8))
    done = how.run(load_model("vgg16"), load_data("scenes", split="train"))
    save_weights(done.model, "fooled.pth")            # load_model("vgg16", weights="fooled.pth") reads it
    cases = how.objective.cases(x, labels)
    compare(how.explainer, how.objective, model, done.model, cases).after   # (N,) mass in the frame
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.model_compare import shown_maps
from attacks.model_objective import Cases, MapObjective
from srd_lab.data import Loaded, load_batches, skipped_report
from srd_lab.engine.model_memory import trained
from srd_lab.engine.preconditions import check_model
from srd_lab.errors import BadData, BadInput, BadValue, NoGradient, Refused
from srd_lab.methods.cam_by_passes import AblationCAM, ScoreCAM
from srd_lab.runtime import generator
from srd_lab.types import Dataset, Explainer, name_of

KEEPS = ("labels", "outputs")


@dataclass(frozen=True)
class Manipulated:
    """A manipulated network and how it came about.

    model : with all flags as the original has them.
    task, score : (S,) task loss, and mean score of the objective, on the training batch before every step.
    """

    model: nn.Module
    task: Tensor
    score: Tensor


@dataclass(frozen=True)
class ModelManipulation:
    """Fine-tuning against one explanation method.

    explainer : the method, with a map that has a derivative in the weights.
    objective : what the maps shall say (:mod:`attacks.model_objective`).
    weight : lambda, how much the map loss counts beside the task loss, >= 0; 0 is plain fine-tuning, the control.
    steps : optimiser steps (Adam), > 0; lr : their size, > 0, falling to zero along half a cosine.
    batch : images per step, > 0.
    keep : what shall stay: "labels" (cross entropy, the paper) or "outputs" (divergence from the original's softmax).
    clip : largest norm of a step's gradient, > 0; a division by a small relevance may make it huge.
    seed : decides which images are in which batch.

    Raises BadValue for values out of range, and Refused for methods that recompute their passes.
    """

    explainer: Explainer
    objective: MapObjective
    weight: float = 3.0
    steps: int = 200
    lr: float = 1e-3
    batch: int = 16
    keep: str = "labels"
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch", "clip"):
            if not getattr(self, name) > 0:
                raise BadValue(f"model manipulation needs {name} > 0, got {getattr(self, name)}")
        if not self.weight >= 0:
            raise BadValue(f"model manipulation needs weight >= 0, got {self.weight}")
        if self.keep not in KEEPS:
            raise BadValue(f"keep={self.keep!r} is not known; expected one of {', '.join(KEEPS)}")
        if isinstance(self.explainer, ScoreCAM | AblationCAM):
            raise Refused(
                f"{name_of(self.explainer)} recomputes its passes: its map has no whole derivative in the weights; "
                "choose another method"
            )

    def run(
        self,
        model: nn.Module,
        dataset: Dataset,
        indices: Sequence[int] | None = None,
        *,
        workers: int = 0,
        on_step: Callable[[int], None] | None = None,
    ) -> Manipulated:
        """A manipulated copy of ``model`` (batch norms and dropout in eval mode), which itself stays as it was.

        dataset : images to train on, with labels. indices : of which these, None = all.
        workers : processes that decode ahead. on_step : called with 1 after every step.

        Raises BadInput for no images, and for a batch without a class that the objective asks for; BadData where no
        image is of a class that the objective asks for or none of a batch can be read; NoGradient where the map has no
        derivative in the weights; Refused for a model without weights or that cannot be followed; BadValue where a
        gradient is not finite.
        """
        check_model(model)
        labels = torch.as_tensor(dataset.labels)
        chosen = torch.arange(len(labels)) if indices is None else torch.as_tensor(list(indices))
        if len(chosen) == 0:
            raise BadInput("there are no images to train on; give one index or more")
        training = _Training(self, model)
        with trained(training.copy):
            for step, (task, maps) in enumerate(self._batches(dataset, labels, chosen, workers)):
                training.step(step, _tensors(task, training.like), _tensors(maps, training.like))
                (on_step or (lambda n: None))(1)
        return training.result()

    def _batches(
        self, dataset: Dataset, labels: Tensor, chosen: Tensor, workers: int
    ) -> Iterator[tuple[Loaded, Loaded]]:
        """Per step, images for the task and images for the maps; the same ones unless the objective asks for classes."""
        everything = list(load_plan(chosen, self.batch, self.steps, generator(self.seed, "task")))
        task = load_batches(dataset, everything, workers)
        classes = self.objective.classes
        if not classes:
            yield from ((batch, batch) for batch in task)
            return
        share = max(1, self.batch // (2 * len(classes)))
        plans = []
        for c in classes:
            of_class = chosen[labels[chosen] == c]
            if len(of_class) == 0:
                raise BadData(f"no training image is of class {c}; choose classes that the data has")
            plans.append(load_plan(of_class, share, self.steps, generator(self.seed, "class", c)))
        together = [[i for part in parts for i in part] for parts in zip(*plans, strict=True)]
        yield from zip(task, load_batches(dataset, together, workers), strict=True)


class _Training:
    """The copy under manipulation."""

    def __init__(self, how: ModelManipulation, model: nn.Module) -> None:
        self.how, self.original, self.copy = how, model, copy.deepcopy(model)
        self.weights = [p.requires_grad_() for p in self.copy.parameters() if p.is_floating_point()]
        if not self.weights:
            raise Refused("the model has no weights to change; expected a network with parameters")
        self.like = self.weights[0]
        self.explainer = _in_one_pass(how.explainer)
        self.adam = torch.optim.Adam(self.weights, lr=how.lr)
        self.fall = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, how.steps)
        self.task: list[float] = []
        self.score: list[float] = []

    def step(self, i: int, task: tuple[Tensor, Tensor], maps: tuple[Tensor, Tensor]) -> None:
        how = self.how
        loss = self._task_loss(*task)
        slopes = _slopes(loss, self.weights)
        score = self._score(how.objective.cases(*maps))
        if how.weight:
            for slope, of_map in zip(slopes, self._map_slopes(score, i), strict=True):
                slope.add_(of_map, alpha=-how.weight)
        self._move(slopes, i)
        self.task.append(float(loss.detach()))
        self.score.append(float(score.detach()))

    def _task_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.copy(x)
        if self.how.keep == "labels":
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            wanted = self.original(x).log_softmax(1)
        return F.kl_div(logits.log_softmax(1), wanted, log_target=True, reduction="batchmean")

    def _score(self, cases: Cases) -> Tensor:
        objective = self.how.objective
        now = shown_maps(self.explainer, self.copy, cases, differentiable=bool(self.how.weight))
        before = shown_maps(self.explainer, self.original, cases) if objective.compares else now.detach()
        return objective.score(now, before).mean()

    def _map_slopes(self, score: Tensor, i: int) -> list[Tensor]:
        slopes = _slopes(score, self.weights) if score.requires_grad else []
        if i == 0 and not any(slope.any() for slope in slopes):
            raise NoGradient(
                f"{self.how.objective.what}: of {name_of(self.explainer)} it has no derivative in the weights; "
                "choose another method or objective (maps that are the same for all classes cannot be swapped)"
            )
        return slopes

    def _move(self, slopes: list[Tensor], i: int) -> None:
        size = torch.stack([slope.norm() for slope in slopes]).norm()
        if not torch.isfinite(size):
            raise BadValue(
                f"the gradient of step {i + 1} is not finite; choose a smaller lr or weight, or another method"
            )
        factor = (self.how.clip / size.clamp_min(self.how.clip)).to(self.like)
        for weight, slope in zip(self.weights, slopes, strict=True):
            weight.grad = slope * factor
        self.adam.step()
        self.fall.step()

    def result(self) -> Manipulated:
        for weight, was in zip(self.copy.parameters(), self.original.parameters(), strict=True):
            weight.grad = None
            weight.requires_grad_(was.requires_grad)
        return Manipulated(self.copy, torch.tensor(self.task), torch.tensor(self.score))


def load_plan(indices: Tensor, batch: int, steps: int, chance: torch.Generator) -> Iterator[list[int]]:
    """``steps`` lists of ``batch`` of these indices (M,): shuffled, each as often as any other to within one.

    chance : decides the order.
    """
    rounds = -(-batch * steps // len(indices))
    order = torch.cat([indices[torch.randperm(len(indices), generator=chance)] for _ in range(rounds)])
    yield from order[: batch * steps].view(steps, batch).tolist()


def _tensors(loaded: Loaded, like: Tensor) -> tuple[Tensor, Tensor]:
    if not loaded.samples:
        raise BadData(f"not one image of a training batch could be read: {skipped_report(loaded.skipped)}")
    images = torch.stack([sample.image for sample in loaded.samples]).to(like)
    return images, torch.tensor([sample.label for sample in loaded.samples], device=like.device)


def _slopes(value: Tensor, weights: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def _in_one_pass(explainer: Any) -> Explainer:
    """The same method, all its points in one pass: passes that are recomputed reach the image, not the weights."""
    if "images_at_once" in {field.name for field in fields(explainer)}:
        return replace(explainer, images_at_once=2**62)
    return explainer
