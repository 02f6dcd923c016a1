"""The small networks for ``scenes`` that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from srd_lab.types import Preprocessing

SCENES_NETWORKS = ("vgg16", "vgg16_8x8", "resnet18", "resnet50")
SCENES_PREPROCESSING = Preprocessing(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
WEIGHTS = Path(__file__).parents[1] / "weights"


class Scenes:
    """The family for ``scenes``: ten classes, 64 x 64 pixels.

    Methods are those of :class:`srd_lab.models.classifier.Family`.
    """

    def names(self) -> tuple[str, ...]:
        """``SCENES_NETWORKS``."""
        return SCENES_NETWORKS

    def preprocessing(self, name: str) -> Preprocessing:
        """``SCENES_PREPROCESSING`` for all."""
        return SCENES_PREPROCESSING

    def file(self, name: str) -> Path:
        """The weights that come with the package."""
        return WEIGHTS / f"{name}_scenes.npz"

    def network(self, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        """The untrained network; ``state`` does not matter."""
        return scenes_network(name)


def scenes_network(name: str, *, batch_norm: bool = False) -> nn.Module:
    """The untrained small network ``name``, of SCENES_NETWORKS, for ten classes.

    batch_norm : whether a VGG gets one behind each convolution, as it has in training alone.
    """
    if name == "vgg16":
        return SmallVGG(batch_norm=batch_norm)
    if name == "vgg16_8x8":
        return FineVGG(batch_norm=batch_norm)
    if name == "resnet18":
        return SmallResNet(BasicBlock, (2, 2, 2, 2))
    assert name == "resnet50", name
    return SmallResNet(Bottleneck, (3, 4, 6, 3))


class SmallVGG(nn.Module):
    """VGG16 at an eighth of its width, for 64 x 64 pixels: 13 convolutions of 3x3, five pools, three layers.

    classes : rows of the last layer.
    batch_norm : whether one follows each convolution: only for training, the weights are saved without.
    """

    LAYERS = (8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M")

    def __init__(self, classes: int = 10, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(list(self.LAYERS), batch_norm=batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            *(nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            *(nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            nn.Linear(128, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of normalised images x (N, 3, 64, 64)."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class FineVGG(nn.Module):
    """:class:`SmallVGG` without its last two pools, so that its encoder ends in 8 x 8 positions, and with one linear layer
    on their mean: what a class activation map is of.

    classes : rows of the last layer.
    batch_norm : whether one follows each convolution: only for training, the weights are saved without.
    """

    LAYERS = (8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, 64, 64, 64)

    def __init__(self, classes: int = 10, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(list(self.LAYERS), batch_norm=batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of normalised images x (N, 3, 64, 64)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class SmallResNet(nn.Module):
    """torchvision's ResNet (7x7 stem, pool, four groups of its blocks) at a quarter of its width.

    block : torchvision's. depths : blocks in each group. classes : rows of the last layer.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int], classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        expansion = block.expansion
        self.layer1 = _group(block, 16, 16, depths[0], stride=1)
        self.layer2 = _group(block, 16 * expansion, 32, depths[1], stride=2)
        self.layer3 = _group(block, 32 * expansion, 64, depths[2], stride=2)
        self.layer4 = _group(block, 64 * expansion, 128, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128 * expansion, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of normalised images x (N, 3, 64, 64)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _group(
    block: type[BasicBlock] | type[Bottleneck], before: int, width: int, depth: int, *, stride: int
) -> nn.Sequential:
    """``depth`` blocks; the first one changes resolution and channels, with a projection where it must."""
    after = width * block.expansion
    shortcut = None
    if stride != 1 or before != after:
        shortcut = nn.Sequential(
            nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
        )
    first = block(before, width, stride, shortcut)
    return nn.Sequential(first, *(block(after, width) for _ in range(depth - 1)))
