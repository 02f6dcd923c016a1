"""Networks drawn at random, every method: no NaN, nothing changed, an image's map its own, and relevance conserved."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS
from torch import Tensor, nn

from srd_lab.catalogue import for_any_network
from srd_lab.errors import Refused
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer

SEEDS = range(24)
WIDTH = 6
NON_NEGATIVE = (
    "lrp_zplus",
    "lrp_gamma",
    "excitation_backprop",
    "contrastive_excitation",
)  # what they ask of activations
Act = Callable[[], nn.Module]
ACTIVATIONS: tuple[Act, ...] = (
    *(nn.ReLU, nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, lambda: nn.LeakyReLU(0.1)),
    *(nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Softplus, nn.Tanh),
)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 3, 1), nn.Conv2d(3, WIDTH, 1)

    def forward(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))


class WrittenOut(nn.Module):
    """SiLU, as many models have it."""

    def forward(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(y)


class Branches(nn.Module):
    """What joins a map and a branch of it."""

    def __init__(self, branch: nn.Module, join: str) -> None:
        super().__init__()
        self.branch, self.join = branch, join
        self.after = nn.Conv2d(2 * WIDTH, WIDTH, 1) if join == "cat" else nn.Identity()

    def forward(self, y: Tensor) -> Tensor:
        made = self.branch(y)
        if made.shape != y.shape:
            y = F.adaptive_avg_pool2d(y, made.shape[2:])
        joined = torch.cat([y, made], 1) if self.join == "cat" else y + made
        return self.after(joined)


class Drawn(nn.Module):
    """A network of a few blocks drawn by the seed; behind a normalisation of its own for every other seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.normalises = seed % 2 == 1
        act = draw.choice(ACTIVATIONS)
        self.features = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), act())
        for _ in range(draw.randint(2, 5)):
            self.features.append(_block(draw, act))
        self.head = nn.Linear(WIDTH, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                nn.init.normal_(module.bias, 0, 0.3)
        self.double().eval().requires_grad_(draw.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features((x - 0.45) / 0.25 if self.normalises else x)
        return self.head(y.mean((2, 3)))


def _block(draw: random.Random, act: Act) -> nn.Module:
    kind = draw.choice(
        ("conv", "bottleneck", "depthwise", "dilated", "sum", "cat", "gate", "pool", "group", "written")
    )
    norm = draw.choice((nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), lambda n: nn.Identity()))(WIDTH)
    bias = draw.random() < 0.5
    conv = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=bias), norm, act())
    match kind:
        case "bottleneck":
            return nn.Sequential(
                nn.Conv2d(WIDTH, 3, 1), act(), nn.Conv2d(3, WIDTH, 1, bias=bias), norm, act()
            )
        case "depthwise":
            return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=bias), norm, act())
        case "dilated":
            return nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, stride=2, bias=bias), norm, act()
            )
        case "sum" | "cat":
            return nn.Sequential(Branches(conv, kind), act())
        case "gate":
            return nn.Sequential(conv, Gate())
        case "pool":
            return draw.choice((nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, 1)))
        case "group":
            return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2), nn.ChannelShuffle(2), act())
        case "written":
            return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), WrittenOut())
    return conv


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 14, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{f"{name} trains": module.training for name, module in model.named_modules()},
        **{f"{name} asks": p.requires_grad for name, p in model.named_parameters()},
        **{f"{name} grad": p.grad for name, p in model.named_parameters()},
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_every_method_on_a_network_drawn_at_random(seed: int, x: Tensor) -> None:
    model = Drawn(seed)
    before, given = state_of(model), x.clone()
    explained = []
    for name in for_any_network():
        method = make_explainer(name, **OPTIONS.get(name, {}))
        try:
            together = method.explain(model, x, 1)
        except Refused:
            if name in NON_NEGATIVE:
                continue
            raise
        explained.append(name)
        assert together.isfinite().all(), name
        if name not in ("random", "smoothgrad"):  # what is drawn is drawn for a batch
            each = torch.cat([method.explain(model, image[None], 1) for image in x])
            torch.testing.assert_close(
                together, each, rtol=1e-8, atol=1e-10, msg=lambda said, name=name: f"{name}: {said}"
            )
    assert len(explained) >= 19
    after = state_of(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key
    assert torch.equal(x, given)


@pytest.mark.parametrize("seed", SEEDS)
def test_srd_conserves_on_a_network_drawn_at_random(seed: int, x: Tensor) -> None:
    model, method = Drawn(seed), SRD(start="ones")
    leaks, arrived = method.leaks(model, x), method.conserved(model, x)
    assert float(leaks["other"].abs().max()) < 1e-9
    torch.testing.assert_close(arrived + torch.stack(list(leaks.values())).sum(0), torch.ones(3).double())
