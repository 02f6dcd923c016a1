"""SRD on torchvision's networks against `tests/graph_oracle.py`, which knows them as lists of elementary operations only.

The package finds the activations, biases and folds of a network by watching it run; the oracle reads them off the exported
graph. Both compute in double precision, so they agree to rounding: a share that one of them forgets, a fold that it misses
or a derivative that it holds back stands out by many powers of ten. The attack needs the map's derivative by the image, so
that is compared too.

Weights are random. Every bias, shift and running statistic gets a value of its own: an untrained network has zeros and ones
there, and zeros have no share that one could get wrong. Images are the smallest that leave several positions at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import graph_oracle
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from srd_lab.methods.srd import SRD

TOLERANCE = 1e-10
SIDE = 64  # 2 x 2 positions at the end of most


def vgg(build: Callable[..., nn.Module]) -> nn.Module:
    """VGG without its pooling to 7 x 7, which does nothing at its own 224 pixels, and with one linear layer."""
    model = build(init_weights=False)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512 * 2 * 2, 10)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg11_bn": lambda: vgg(models.vgg11_bn),
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "googlenet": lambda: models.googlenet(init_weights=False, aux_logits=False),
    "densenet": lambda: models.DenseNet(
        block_config=(2, 3, 3, 2)
    ),  # densenet121 repeats its layers more often
    "squeezenet1_1": models.squeezenet1_1,
    "mobilenet_v2": models.mobilenet_v2,
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


@pytest.fixture(scope="module", params=NETWORKS)
def maps(request: pytest.FixtureRequest) -> Maps:
    torch.manual_seed(0)
    model = NETWORKS[request.param]().double().eval()
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
