"""Every method by every metric on one batch of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_lab.errors import BadValue
from srd_lab.logits import class_logits
from srd_lab.metrics.explained import Explained, Images, Metric
from srd_lab.runs.work import Advance, Arrays, Item
from srd_lab.types import Explainer, Sample


@dataclass(frozen=True)
class Experiment:
    """Which methods are scored by which metrics.

    methods, metrics : by the names that the results bear.
    target : the class that is explained: "label" or "predicted".
    of_model : what metrics remember of the network from batch to batch.
    """

    methods: Mapping[str, Explainer]
    metrics: Mapping[str, Metric]
    target: str = "label"
    of_model: dict[Hashable, Any] = field(default_factory=dict, compare=False)

    def run(self, model: nn.Module, items: Sequence[Item], device: torch.device, advance: Advance) -> Arrays:
        """Explain and score one batch.

        model : on ``device``. items : with one sample each, of one size.
        advance : called with the number of images after each method.

        Returns arrays whose first axis is the image: scores (N,) under ``method/metric``, NaN = not scored; seconds (N,)
        under ``method/seconds`` and ``forward/seconds``; maps (N, H, W) in [-1, 1] under ``method/map``; and ``index``,
        ``name``, ``images`` (N, 3, H, W), ``label``, ``predicted``, ``mask`` bool (N, H, W), ``masked`` (N,) whether it is
        not empty.

        An image's scores depend on the image and its index alone, not on the batch.
        """
        samples = [item.sample for item in items]
        x = torch.stack([sample.image for sample in samples]).to(device)
        labels = torch.tensor([sample.label for sample in samples], device=device)
        with torch.no_grad():
            model(x)  # the first pass at a size is slower
            seconds, logits = _timed(lambda: class_logits(model(x)), device)
        predicted = logits.argmax(1)
        target = labels if self.target == "label" else predicted
        indices = [item.index for item in items]
        images = Images(model, x, target, indices, _masks(samples, device), self.of_model)
        arrays: Arrays = {
            "index": np.array(indices),
            "name": np.array([sample.name for sample in samples]),
            "images": x.cpu().numpy(),
            "label": labels.cpu().numpy(),
            "predicted": predicted.cpu().numpy(),
            "mask": _outlines(samples),
            "masked": np.array([sample.mask is not None and bool(sample.mask.any()) for sample in samples]),
            "forward/seconds": np.full(len(x), seconds / len(x)),
        }
        for method, explainer in self.methods.items():
            seconds, explained = _timed(lambda e=explainer: Explained.by(e, images), device)  # type: ignore[misc]
            arrays[f"{method}/seconds"] = np.full(len(x), seconds / len(x))
            arrays[f"{method}/map"] = explained.maps.cpu().numpy()
            for name, metric in self.metrics.items():
                arrays[f"{method}/{name}"] = _scores(name, metric, explained)
            advance(len(x))
        return arrays


def _scores(name: str, metric: Metric, explained: Explained) -> np.ndarray:
    """Scores (N,) of a metric, which may be a user's own: BadValue for anything else."""
    scores, count = metric.of(explained), len(explained.maps)
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise BadValue(
            f"the metric {name} gives {found} for {count} images; expected one number per image, ({count},)"
        )
    return scores.detach().cpu().numpy()


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start, result


def _outlines(samples: Sequence[Sample]) -> np.ndarray:
    """Masks bool (N, H, W), empty where an image has none."""
    masks = _masks(samples, torch.device("cpu"))
    shape = (len(samples), *samples[0].image.shape[1:])
    return np.zeros(shape, dtype=bool) if masks is None else masks.numpy()


def _masks(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """Masks (N, H, W), empty where an image has none; None where none has one."""
    if all(sample.mask is None for sample in samples):
        return None
    blank = torch.zeros(samples[0].image.shape[1:], dtype=torch.bool)
    return torch.stack([blank if sample.mask is None else sample.mask for sample in samples]).to(device)
