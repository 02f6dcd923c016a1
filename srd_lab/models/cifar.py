"""The residual networks for CIFAR of He et al. 2016 (Deep residual learning, section 4.2), which torchvision lacks.

A 3x3 stem, three groups of n blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels: 6 n + 2 layers. The names of the
layers are those of the weights files that go round (``layer2.0.conv1.weight``, ``linear.bias``).

``resnet18_3x3`` and ``resnet50_3x3`` are torchvision's with a 3x3 stem and no pool behind it, as CIFAR wants. Any of these
has variants with another activation (Table 4 of the SRD paper): ``resnet20_elu``, ``resnet50_3x3_gelu``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.models.imagenet import torchvision_names, torchvision_network
from srd_lab.types import Preprocessing

RESIDUAL = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
SMALL_STEM = ("resnet18_3x3", "resnet50_3x3")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
CIFAR_NETWORKS = tuple(
    f"{name}{suffix}"
    for name in (*RESIDUAL, *SMALL_STEM)
    for suffix in ("", *(f"_{kind}" for kind in ACTIVATIONS))
)
# The files that go round were trained with ImageNet's: with these, and not with CIFAR's own, the first batch norm's
# statistics are those of the images. By accuracy alone (within 0.2 points) one could not tell.
CIFAR_PREPROCESSING = Preprocessing(32)


@dataclass(frozen=True)
class Cifar:
    """The family for 32 x 32 pixels: the networks of this module, and torchvision's as they are for ImageNet.

    classes : rows of the last layer, 10 or 100.

    Methods are those of :class:`srd_lab.models.classifier.Family`; there are no weights to take by default.
    """

    classes: int

    def names(self) -> tuple[str, ...]:
        """``CIFAR_NETWORKS``, then torchvision's."""
        return *CIFAR_NETWORKS, *torchvision_names()

    def preprocessing(self, name: str) -> Preprocessing:
        """``CIFAR_PREPROCESSING`` for all, which normalises as on ImageNet."""
        return CIFAR_PREPROCESSING

    def file(self, name: str) -> None:
        return None

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        """The untrained network, with as many classes as the data; ``state`` does not matter."""
        return cifar_network(name, self.classes)


def cifar_network(name: str, classes: int) -> nn.Module:
    """The untrained network ``name`` for 32 x 32 pixels, of ``CIFAR_NETWORKS`` or torchvision, with so many classes."""
    if name not in CIFAR_NETWORKS:
        return torchvision_network(name, classes)
    base = next(base for base in (*SMALL_STEM, *reversed(RESIDUAL)) if f"{name}_".startswith(f"{base}_"))
    if base in RESIDUAL:
        network: nn.Module = CifarResNet(int(base.removeprefix("resnet")), classes)
    else:
        network = torchvision_network(base.removesuffix("_3x3"), classes)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    kind = name[len(base) + 1 :]
    return with_activation(network, ACTIVATIONS[kind]) if kind else network


def with_activation(network: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """``network`` itself, after every ReLU module in it was exchanged for one that ``make`` gives."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, make())
    return network


class CifarResNet(nn.Module):
    """Residual network of ``depth`` = 6 n + 2 layers, normalised images (N, 3, 32, 32) to logits (N, classes)."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _group(16, 16, n, stride=1)
        self.layer2 = _group(16, 32, n, stride=2)
        self.layer3 = _group(32, 64, n, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of normalised images x (N, 3, 32, 32)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), f of two 3x3 convolutions.

    before, width : channels of x and of the output. stride : of the first convolution, 1 or 2.

    The shortcut has no parameters (option A of the paper): where the resolution halves it takes every second pixel, and
    new channels are zeros, half of them before the old ones and half behind.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.new = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, width, H / stride, W / stride), >= 0."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return self.relu(out + x)


def _group(before: int, width: int, n: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(n - 1)))
