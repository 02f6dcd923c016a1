"""What all networks are wrapped in, and what has to be known of a family of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from srd_lab.errors import BadWeights
from srd_lab.types import Colour, Dataset, Preprocessing


class Family(Protocol):
    """The networks for one kind of data, by name."""

    def names(self) -> tuple[str, ...]:
        """The names of its networks."""
        ...

    def preprocessing(self, name: str) -> Preprocessing:
        """What the network needs of an image."""
        ...

    def file(self, name: str) -> Path | None:
        """The weights to take when the user gives none; None where the user has to.

        Raises BadWeights where there are none of this network, and Unavailable where they cannot be downloaded.
        """
        ...

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        """The untrained network ``name`` that ``state``, as :func:`srd_lab.models.files.read_state` gives it, is for.

        Raises BadWeights where ``state`` belongs to no such network.
        """
        ...


class Normalise(nn.Module):
    """(x - mean) / std per channel, for pixels x (N, 3, H, W) in [0, 1].

    mean, std : three numbers each, in units of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, of the shape of x (N, 3, H, W)."""
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Pixels (N, 3, H, W) in [0, 1] to logits (N, classes): ``normalise``, then ``network``.

    network : normalised images to logits. mean, std : see :class:`Normalise`.
    classes : how many the logits are for; None = as many as the last layer has rows.

    Attribute ``weights_sha256``: of the tensors that a factory gave; empty where a file has them.
    """

    weights_sha256 = ""

    def __init__(self, network: nn.Module, mean: Colour, std: Colour, classes: int | None = None) -> None:
        super().__init__()
        self.normalise: nn.Module = Normalise(mean, std)
        self.network = network
        self._classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of pixels x (N, 3, H, W) in [0, 1]."""
        return self.network(self.normalise(x))

    @property
    def classes(self) -> int:
        """How many classes the logits are for."""
        return len(last_parameter(self.network)[1]) if self._classes is None else self._classes

    def normalisation_and_network(self) -> tuple[nn.Module, nn.Module]:
        """See :class:`srd_lab.normalise.Normalising`; a subclass with a forward of its own is one whole."""
        if type(self).forward is not Classifier.forward:
            return nn.Identity(), self
        return self.normalise, self.network


def last_parameter(network: nn.Module) -> tuple[str, Tensor]:
    """Name and value of the network's last parameter: one row for each class in all networks of this package."""
    return list(network.named_parameters())[-1]


def check_classes(model: Classifier, data: Dataset) -> None:
    """Raise BadWeights for data with more or fewer classes than the model, whose labels would mean something else there.

    Data without names of classes take the model's numbers for them, and their labels have to be among these.
    """
    if not data.classes:
        if len(data.labels) and int(data.labels.max()) >= model.classes:
            raise BadWeights(
                f"an image has class {int(data.labels.max())}, but the model knows 0..{model.classes - 1}; "
                "give the weights of a network trained on these classes with --weights FILE"
            )
        data.classes[:] = map(str, range(model.classes))
    if len(data.classes) != model.classes:
        raise BadWeights(
            f"the model tells {model.classes} classes apart, but the data has {len(data.classes)}; "
            "give the weights of a network trained on these classes with --weights FILE"
        )
