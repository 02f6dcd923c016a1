"""SRD on torchvision's networks against `tests/graph_oracle.py`, which knows them as lists of elementary operations only.

The package finds the activations, biases and folds of a network by watching it run; the oracle reads them off the exported
graph. Both compute in double precision, so they agree to rounding: a share that one of them forgets, a fold that it misses
or a derivative that it holds back stands out by many powers of ten. The attack needs the map's derivative by the image, so
that is compared too.

Weights are random. Every bias, shift and running statistic gets a value of its own: an untrained network has zeros and ones
there, and zeros have no share that one could get wrong. Images are the smallest that leave several positions at the end.

By default the networks have each block of a family once or twice; `-m peers` compares them as they are published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import graph_oracle
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import make_layers

from srd_lab.methods.srd import SRD

TOLERANCE = 1e-10
SIDE = 64  # 2 x 2 positions at the end of most


def vgg(features: nn.Module) -> nn.Module:
    """VGG without its pooling to 7 x 7, which does nothing at its own 224 pixels, and with one linear layer."""
    model = models.VGG(features, init_weights=False)
    width = next(m.num_features for m in reversed(features) if isinstance(m, nn.BatchNorm2d))
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(width * 2 * 2, 10)
    return model


def googlenet(blocks: bool = True) -> nn.Module:
    """``blocks``: all of them; else without those that repeat one with the same number of channels."""
    model = models.googlenet(init_weights=False, aux_logits=False)
    if not blocks:
        model.inception4b = model.inception4c = model.inception5a = nn.Identity()
    return model


def mobilenet_setting(*rows: tuple[int, int, int, int, int]) -> list[MBConvConfig]:
    """Rows of kernel, stride and channels in and out, with six times as many within; the first row once as many."""
    return [MBConvConfig(1 if i == 0 else 6, *row) for i, row in enumerate(rows)]


# torchvision's blocks and joins, each at least once, in networks of a few
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: vgg(make_layers([16, "M", 24, "M", 32, 32, "M", 48, "M", 48, "M"], batch_norm=True)),
    "resnet18": models.resnet18,
    "resnet of bottlenecks": lambda: models.ResNet(Bottleneck, [2, 1, 1, 1], width_per_group=16),
    "googlenet": lambda: googlenet(blocks=False),
    "densenet": lambda: models.DenseNet(block_config=(2, 3, 3, 2)),
    "squeezenet1_1": models.squeezenet1_1,
    "mobilenet_v2": lambda: models.MobileNetV2(
        inverted_residual_setting=[[1, 8, 1, 1], [6, 12, 2, 2], [6, 16, 1, 2], [6, 24, 1, 2], [6, 32, 1, 2]]
    ),
    "shufflenet_v2": lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256]),
    "efficientnet": lambda: models.EfficientNet(
        mobilenet_setting(
            (3, 1, 16, 8, 1), (3, 2, 8, 12, 2), (5, 2, 12, 16, 1), (3, 2, 16, 24, 1), (5, 2, 24, 32, 1)
        ),
        dropout=0.2,
        last_channel=64,
    ),
    "convnext": lambda: models.ConvNeXt(
        [CNBlockConfig(*row) for row in ((16, 24, 2), (24, 32, 1), (32, 40, 1), (40, None, 1))]
    ),
}
# as they are published
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "vgg11_bn": lambda: vgg(models.vgg11_bn(init_weights=False).features),
    "resnet50": models.resnet50,
    "googlenet, whole": googlenet,
    "densenet121": models.densenet121,
    "mobilenet_v2, whole": models.mobilenet_v2,
    "shufflenet_v2_x0_5": models.shufflenet_v2_x0_5,
    "efficientnet_b0": models.efficientnet_b0,
    "convnext_tiny": models.convnext_tiny,
}


def fill(model: nn.Module) -> None:
    """Gives what starts at zero or one, or nearly, values of its own: all vectors, and ConvNeXt's layer scales."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("running_var", "layer_scale")) or (name.endswith("weight") and tensor.dim() == 1):
            nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            nn.init.normal_(tensor, 0, 0.2, generator=generator)


def normal(*size: int, seed: int) -> Tensor:
    """Seeded normal numbers in double precision."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, by the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


class Maps(NamedTuple):
    """One map twice, still attached to the images."""

    images: Tensor
    package: Tensor
    oracle: Tensor


@pytest.fixture(
    scope="module", params=[*NETWORKS, *(pytest.param(name, marks=pytest.mark.peers) for name in WHOLE)]
)
def maps(request: pytest.FixtureRequest) -> Maps:
    torch.manual_seed(0)
    model = (NETWORKS | WHOLE)[request.param]().double().eval()
    fill(model)
    images = normal(2, 3, SIDE, SIDE, seed=1)
    images[0, :, :40, :40] = 0  # dead fields: biases there have nobody to go to
    graph = graph_oracle.export(model, images)
    images.requires_grad_()
    return Maps(images, SRD(start="ones").explain(model, images), graph_oracle.srd_map(graph, images))


def test_map(maps: Maps) -> None:
    assert maps.package.shape == (2, SIDE, SIDE)
    assert difference(maps.package, maps.oracle) < TOLERANCE


def test_gradient_by_the_image(maps: Maps) -> None:
    weights = normal(2, SIDE, SIDE, seed=2)
    package, oracle = (
        torch.autograd.grad((result * weights).sum(), maps.images)[0]
        for result in (maps.package, maps.oracle)
    )
    assert difference(package, oracle) < TOLERANCE
