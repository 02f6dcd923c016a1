"""The residual networks for CIFAR of He et al. 2016 (Deep residual learning, section 4.2), which torchvision lacks.

A 3x3 stem, three groups of n blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels: 6 n + 2 layers. The names of the
layers are those of the weights files that go round (``layer2.0.conv1.weight``, ``linear.bias``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.models.classifier import Statistics
from srd_lab.models.imagenet import torchvision_names, torchvision_network

CIFAR_NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
# The files that go round were trained with ImageNet's: with these, and not with CIFAR's own, the first batch norm's
# statistics are those of the images. By accuracy alone (within 0.2 points) one could not tell.
CIFAR_STATISTICS: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Cifar:
    """32 x 32 pixels: the networks below, and torchvision's as they are for ImageNet."""

    classes: int

    def names(self) -> tuple[str, ...]:
        return *CIFAR_NETWORKS, *torchvision_names()

    def size(self, name: str) -> int:
        return 32

    def statistics(self, name: str) -> Statistics:
        return CIFAR_STATISTICS

    def file(self, name: str) -> None:
        return None

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        if name in CIFAR_NETWORKS:
            return CifarResNet(int(name.removeprefix("resnet")), self.classes)
        return torchvision_network(name, self.classes)


class CifarResNet(nn.Module):
    """Residual network of ``depth`` = 6 n + 2 layers, pixels (N, 3, 32, 32) to logits (N, classes)."""

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
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), f of two 3x3 convolutions.

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
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return self.relu(out + x)


def _group(before: int, width: int, n: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(n - 1)))
