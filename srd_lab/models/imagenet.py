"""torchvision's classifiers: its networks, the recipe they were trained by, and the files on its server."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from srd_lab.models.classifier import Statistics, last_parameter
from srd_lab.types import SrdLabError


class ImageNet:
    """1,000 classes: torchvision's networks as they are, with its IMAGENET1K_V1 weights and the recipe of these."""

    def names(self) -> tuple[str, ...]:
        return torchvision_names()

    def size(self, name: str) -> int:
        return int(_recipe(name).crop_size[0])

    def statistics(self, name: str) -> Statistics:
        recipe = _recipe(name)  # ImageNet's for all but efficientnet_v2_l
        return tuple(recipe.mean), tuple(recipe.std)

    def file(self, name: str) -> Path | None:
        return _cached_file(name)

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        return torchvision_network(name)


class FineTuned(ImageNet):
    """The same networks with as many classes as the last layer in the user's weights file has."""

    def file(self, name: str) -> None:
        return None

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        network = torchvision_network(name)
        last, value = last_parameter(network)
        classes = len(state[last]) if last in state and state[last].dim() else 0
        return network if classes in (0, len(value)) else torchvision_network(name, classes)


@cache
def torchvision_names() -> tuple[str, ...]:
    """Every classifier that torchvision lists."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_network(name: str, classes: int = 1000) -> nn.Module:
    """torchvision's network, untrained, without auxiliary heads, for inputs normalised as all the others'."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision's weights of these two want (x - 0.5) / 0.5, which transform_input makes of ImageNet's.
        options = {"init_weights": False, "aux_logits": False, "transform_input": True}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


def _recipe(name: str) -> Any:
    """The preprocessing of torchvision's IMAGENET1K_V1 weights, of which nothing is downloaded."""
    entries = list(torchvision.models.get_model_weights(name))
    # The two networks without V1 have their weights for 224 pixels last.
    return next((entry for entry in entries if entry.name == "IMAGENET1K_V1"), entries[-1]).transforms()


def _cached_file(name: str) -> Path:
    """torchvision's IMAGENET1K_V1 weights in its own cache, brought there from its server if need be.

    Raises SrdLabError where there are no such weights, or they can be had neither from the cache nor from the server.
    """
    entries = torchvision.models.get_model_weights(name).__members__
    if "IMAGENET1K_V1" not in entries:
        raise SrdLabError(
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrdLabError(
            f"torchvision's {file.name} is not in {file.parent} and cannot be downloaded ({reason}); "
            "put the file there, or give it with --weights FILE"
        ) from None
    return file
