"""The APOP experiment (Table 3 and Fig. 6 of the SRD paper): images in, hits per image out, batch by batch.

Every result is one bool per image, so that accuracies, intervals, tables and resumed runs all come from the same
arrays, and memory holds one batch of images only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apop.passes import binarize, record, replay
from apop.pattern import ActivationPattern
from srd_lab.conditions import together
from srd_lab.errors import BadInput, BadValue, BadWeights
from srd_lab.metrics.summary import interval_text
from srd_lab.normalise import split_normalisation
from srd_lab.runtime import generator
from srd_lab.types import Sample

INPUTS = ("zeros", "ones", "normal")

SETTINGS = {"apop": False, "apop_relu": True}  # whether ReLU follows the mask

TOP = (1, 5)


@dataclass(frozen=True)
class Interval:
    """An accuracy of n images in [0, 1], and its 95 % Wilson score interval [low, high]."""

    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return interval_text(self.accuracy, self.low, self.high)


@dataclass(frozen=True, eq=False)
class Hits:
    """Which of N images were classified correctly under each condition.

    index, name, label : (N,) place in the data set, what it calls the image, class index.
    layers : names of the network's activation calls, in order, where each was binarised in turn; else none.
    right : condition -> bool (N,). Conditions are named as the metrics: ``top1/original``, ``top5/original``,
        ``top1/zeros/apop``, ``top1/zeros/apop_relu``, ..., ``binarized/<layer>`` and ``binarized_top5/<layer>``
        with ``<layer>`` as ``metric_name`` spells it.
    skipped : name -> reason of the files that could not be read and are not among the N.
    """

    index: np.ndarray
    name: np.ndarray
    label: np.ndarray
    layers: tuple[str, ...]
    right: dict[str, np.ndarray]
    skipped: dict[str, str] = field(default_factory=dict)

    def interval(self, condition: str) -> Interval:
        """The accuracy under a condition, a key of ``right``."""
        return wilson(self.right[condition])

    def curve(self, top: int = 1) -> list[Interval]:
        """Accuracy with each activation call binarised, in call order; top : 1 or 5, how many classes count as right."""
        prefix = "binarized" if top == 1 else f"binarized_top{top}"
        return [self.interval(f"{prefix}/{metric_name(layer)}") for layer in self.layers]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Flat arrays whose first axis is the image; layers and skipped files are not among them."""
        about = {"index": self.index, "name": self.name, "label": self.label}
        return {**about, **{f"right/{key}": value for key, value in self.right.items()}}

    @staticmethod
    def from_arrays(
        arrays: Mapping[str, np.ndarray], layers: tuple[str, ...] = (), skipped: dict[str, str] | None = None
    ) -> Hits:
        """What :meth:`to_arrays` gave, of one batch or of several joined; layers, skipped : see the class."""
        right = {key.removeprefix("right/"): arrays[key] for key in arrays if key.startswith("right/")}
        return Hits(arrays["index"], arrays["name"], arrays["label"], layers, right, skipped or {})

    def rows(self) -> list[dict[str, Any]]:
        """A row per image, hits as 0 and 1."""
        return [
            {
                "index": int(self.index[i]),
                "name": str(self.name[i]),
                "label": int(self.label[i]),
                **{key: int(right[i]) for key, right in self.right.items()},
            }
            for i in range(len(self.index))
        ]


@dataclass(frozen=True)
class Experiment:
    """What is done with every image.

    inputs : what is replayed in its place, of INPUTS, in normalised space.
    binarized : whether to binarise each activation call in turn.
    seed : decides the normal inputs, for each image by itself.

    Raises BadValue for an input that is not known.
    """

    inputs: tuple[str, ...] = INPUTS
    binarized: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.inputs:
            if name not in INPUTS:
                raise BadValue(f"there is no input {name!r} for a replay; choose of {', '.join(INPUTS)}")

    def passes(self, layers: int) -> int:
        """Forward passes per batch, for a network with so many activation calls.

        Example
        -------
        >>> Experiment().passes(13)    # the image, 3 inputs with and without ReLU, 13 binarised calls
        20
        """
        return 1 + len(SETTINGS) * len(self.inputs) + (layers if self.binarized else 0)

    def run(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        indices: Sequence[int],
        device: torch.device | None = None,
        on_pass: Callable[[int], None] | None = None,
        on_pattern: Callable[[ActivationPattern], None] | None = None,
    ) -> Hits:
        """One batch.

        model : of pixels if it normalises them, see :func:`srd_lab.normalise.split_normalisation`; on ``device``.
        samples, indices : the images, and their places in the data set, which decide their noise.
        device : None = the CPU.
        on_pass : called with the number of images after each forward pass. on_pattern : gets what was recorded.

        Raises BadInput for no samples, Refused where the model is no ReLU network or cannot be followed, and BadWeights
        where it has no class for a label.
        """
        if not samples:
            raise BadInput("a batch needs at least one image; give one sample or more")
        labels = torch.tensor([sample.label for sample in samples])
        normalise, network = split_normalisation(model)
        with torch.no_grad():
            x = normalise(torch.stack([sample.image for sample in samples]).to(device))
        right: dict[str, np.ndarray] = {}
        with together() as looks:
            logits, pattern = record(network, x)
            _check_labels(logits, labels)
            there = labels.to(x.device)

            def note(logits: Tensor, *conditions: str) -> None:
                # a pass's one look at the device
                found = looks.look(*(_hits(logits, there, top) for top in TOP))
                right.update({name: hits.numpy() for name, hits in zip(conditions, found, strict=True)})
                if on_pass:
                    on_pass(len(x))

            note(logits, "top1/original", "top5/original")
            if on_pattern:
                on_pattern(pattern)
            for kind in self.inputs:
                other = replay_input(kind, x, indices, self.seed)
                for setting, relu in SETTINGS.items():
                    logits = replay(network, other, pattern, relu)
                    note(logits, *(f"top{top}/{kind}/{setting}" for top in TOP))
            layers = tuple(pattern.masks) if self.binarized else ()
            for position, layer in enumerate(layers):
                name = metric_name(layer)
                note(binarize(network, x, position), f"binarized/{name}", f"binarized_top5/{name}")
        names = np.array([sample.name for sample in samples])
        return Hits(np.array(indices), names, labels.numpy(), layers, right)


def replay_input(kind: str, x: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """What is put in the place of normalised images x (N, C, H, W), of their shape.

    kind : "zeros", "ones" or "normal" (standard normal).
    indices : (N,) places in the data set; with ``seed``, they alone decide what is drawn.
    """
    if kind == "zeros":
        return torch.zeros_like(x)
    if kind == "ones":
        return torch.ones_like(x)
    return torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, "normal", int(index)), dtype=torch.float32)
            for index in indices
        ]
    ).to(x)


def in_top(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """Whether each label (N,) is among the ``top`` largest logits (N, K): bool (N,).

    Of equal logits the smaller class index counts as the larger, on every device; a logit that is not a number is
    never right.

    Raises BadWeights for a label that is none of the K classes.

    Example
    -------
    >>> in_top(torch.tensor([[0.1, 0.5, 0.4]]), torch.tensor([2]), 2)
    tensor([True])
    """
    _check_labels(logits, labels)
    return _hits(logits, labels.to(logits.device), top)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise BadWeights(
            f"an image has class {int(labels.max())}, but the model knows 0..{classes - 1}; "
            "give a model of the same classes as the data"
        )


def _hits(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """What :func:`in_top` gives, of labels that are classes, on the device of the logits."""
    labels = labels[:, None]
    own = logits.gather(1, labels)
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels
    above = (logits > own) | ((logits == own) & earlier)
    return (above.sum(1) < top) & ~own[:, 0].isnan()


def wilson(right: np.ndarray) -> Interval:
    """Mean of hits (N,) bool with its 95 % Wilson score interval (Wilson 1927), which needs no draws and holds near 0 and
    1.

    Example
    -------
    >>> round(wilson(np.ones(10)).low, 3)
    0.722
    """
    z, n, p = 1.959964, len(right), float(np.mean(right))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - reach), min(1.0, centre + reach), n)


def metric_name(layer: str) -> str:
    """An activation call's name as MLflow takes it; odd characters become _.

    Example
    -------
    >>> metric_name("layer1.0.relu#2")
    'layer1.0.relu.2'
    """
    return re.sub(r"[^\w. :-]", "_", layer.replace("#", "."))
