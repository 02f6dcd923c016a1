"""torchvision's classifiers: its networks, the recipe they were trained by, and the files on its server.

A VGG may also have a head of its own in place of torchvision's classifier, as ``scripts/train_head.py`` makes one:
averages of the last map, hidden layers, classes. The file's shapes say which.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from srd_lab.errors import BadWeights, Unavailable, first_line
from srd_lab.models.classifier import last_parameter
from srd_lab.types import Preprocessing


class ImageNet:
    """1,000 classes: torchvision's networks as they are, with its IMAGENET1K_V1 weights and the recipe of these.

    Methods are those of :class:`srd_lab.models.classifier.Family`.
    """

    def names(self) -> tuple[str, ...]:
        """Every classifier that torchvision lists."""
        return torchvision_names()

    def preprocessing(self, name: str) -> Preprocessing:
        """That with which torchvision's weights are tested."""
        recipe = _recipe(name)
        return Preprocessing(
            int(recipe.crop_size[0]),
            tuple(recipe.mean),  # ImageNet's for all but efficientnet_v2_l
            tuple(recipe.std),
            recipe.crop_size[0] / recipe.resize_size[0],
            recipe.interpolation.value,
        )

    def file(self, name: str) -> Path | None:
        """torchvision's weights in its cache, downloaded if need be.

        Raises BadWeights where torchvision has none of this network, and Unavailable where the download fails.
        """
        return _cached_file(name)

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        """torchvision's untrained network of 1,000 classes; a VGG with the head that ``state`` has.

        Raises BadWeights for a VGG's ``state`` with a head of no known shape.
        """
        head = vgg_head(name, state)
        return vgg_network(name, replace(head, classes=1000)) if head else torchvision_network(name)


class FineTuned(ImageNet):
    """The same networks with as many classes as the last layer in the user's weights file has.

    Methods are those of :class:`srd_lab.models.classifier.Family`; there are no weights to take by default.
    """

    def file(self, name: str) -> None:
        return None

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        """torchvision's untrained network with as many classes as the last layer in ``state``; a VGG with the head there.

        Raises BadWeights for a VGG's ``state`` with a head of no known shape.
        """
        if head := vgg_head(name, state):
            return vgg_network(name, head)
        network = torchvision_network(name)
        last, value = last_parameter(network)
        classes = len(state[last]) if last in state and state[last].dim() else 0
        return network if classes in (0, len(value)) else torchvision_network(name, classes)


class AnyClasses(FineTuned):
    """The same, with torchvision's weights where there is no file: for data whose classes are not known beforehand.

    Methods are those of :class:`srd_lab.models.classifier.Family`.
    """

    def file(self, name: str) -> Path | None:  # type: ignore[override]
        """As for ImageNet."""
        return _cached_file(name)


@cache
def torchvision_names() -> tuple[str, ...]:
    """The names of every classifier that torchvision lists."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_network(name: str, classes: int = 1000) -> nn.Module:
    """torchvision's network, untrained, without auxiliary heads, with so many classes, for inputs normalised as all the
    others'."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision's weights of these two want (x - 0.5) / 0.5, which transform_input makes of ImageNet's.
        options = {"init_weights": False, "aux_logits": False, "transform_input": True}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


VGG_CHANNELS = 512  # of the last map, in all of torchvision's VGGs
VGG_POOLS = {VGG_CHANNELS * side**2: side for side in (1, 7)}  # inputs of a head -> side of the pooled map


@dataclass(frozen=True)
class Head:
    """What makes classes of a VGG's last map.

    pool : the map is averaged to ``pool`` x ``pool``, 1 or 7: 512 inputs, or the 25,088 of torchvision's classifier.
    hidden : widths of the hidden layers, each with a ReLU and dropout behind it.
    classes : rows of the last layer.
    """

    pool: int
    hidden: tuple[int, ...]
    classes: int = 1000

    def classifier(self) -> nn.Sequential:
        """The untrained layers, numbered as torchvision numbers its own: linear ones are 0, 3, 6, ..."""
        layers: list[nn.Module] = []
        inputs = VGG_CHANNELS * self.pool**2
        for width in self.hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Dropout()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, self.classes))


def vgg_head(name: str, state: Mapping[str, Tensor]) -> Head | None:
    """The head in a VGG's ``state``; None for other networks, and where ``state`` is not of a VGG at all.

    Raises BadWeights where a VGG's convolutions come without a classifier, or with one of no known shape.
    """
    if not name.startswith("vgg") or "features.0.weight" not in state:
        return None
    found = [re.fullmatch(r"classifier\.(\d+)\.weight", key) for key in state]
    places = sorted(int(match[1]) for match in found if match)
    if not places:
        raise BadWeights(
            f"these weights of {name} have no classifier; give a whole file, or train a head: scripts/train_head.py"
        )
    shapes = [tuple(state[f"classifier.{place}.weight"].shape) for place in places]
    regular = places == list(range(0, 3 * len(places), 3))
    if not regular or any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] not in VGG_POOLS:
        layers = ", ".join(f"{place}: {shape}" for place, shape in zip(places, shapes, strict=True))
        raise BadWeights(
            f"these weights of {name} have a classifier of no known shape ({layers}); expected linear layers "
            f"0, 3, 6, ..., the first one with {' or '.join(map(str, VGG_POOLS))} inputs"
        )
    *hidden, classes = (shape[0] for shape in shapes)
    return Head(VGG_POOLS[shapes[0][1]], tuple(hidden), classes)


def vgg_network(name: str, head: Head) -> nn.Module:
    """torchvision's VGG ``name``, untrained, with ``head``; torchvision's own where that has the same shape."""
    if (head.pool, head.hidden) == (7, (4096, 4096)):
        return torchvision_network(name, head.classes)
    with torch.device("meta"):  # torchvision's classifier would be half a gigabyte for nothing
        network: Any = torchvision_network(name)
    network.avgpool = nn.AdaptiveAvgPool2d(head.pool)
    network.classifier = head.classifier()
    for module in network.features.to_empty(device="cpu"):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def _recipe(name: str) -> Any:
    """The preprocessing of torchvision's IMAGENET1K_V1 weights, of which nothing is downloaded."""
    entries = list(torchvision.models.get_model_weights(name))
    # The two networks without V1 have their weights for 224 pixels last.
    return next((entry for entry in entries if entry.name == "IMAGENET1K_V1"), entries[-1]).transforms()


def _cached_file(name: str) -> Path:
    """torchvision's IMAGENET1K_V1 weights in its own cache, brought there from its server if need be.

    Raises BadWeights where there are no such weights, and Unavailable where neither the cache nor the server has them.
    """
    entries = torchvision.models.get_model_weights(name).__members__
    if "IMAGENET1K_V1" not in entries:
        raise BadWeights(
            f"torchvision has no IMAGENET1K_V1 weights for {name}; give your own with --weights FILE"
        )
    url = entries["IMAGENET1K_V1"].url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if file.is_file():
        return file
    digits = re.search(r"-([0-9a-f]{8,})\.", file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(file), hash_prefix=digits[1] if digits else None, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError, HTTPException) as error:
        reason = first_line(error)
        raise Unavailable(
            f"torchvision's {file.name} is not in {file.parent} and cannot be downloaded ({reason}); "
            "put the file there, or give it with --weights FILE"
        ) from None
    return file
