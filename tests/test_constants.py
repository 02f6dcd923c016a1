"""What comes of parameters alone is a constant, through whatever layers: whether weights are trained changes no map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS
from torch import Tensor, nn

from srd_lab.catalogue import for_any_network
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer


class Net(nn.Module):
    """A network in which ``step`` joins a map (N, 6, 8, 8) and what it makes of parameters."""

    def __init__(self, step: Callable[[Net, Tensor], Tensor], trainable: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.fc = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 4),
        )
        self.grid, self.query = nn.Parameter(torch.rand(1, 4, 8, 8)), nn.Parameter(torch.rand(1, 6))
        self.point, self.line, self.norm = nn.Conv2d(4, 6, 1), nn.Linear(6, 6), nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.bias)
        self.fc.weight.data[1].abs_()  # so that something speaks for class 1, and its logit is positive
        self.fc.bias.data.fill_(1)
        self.step = step
        self.double().eval().requires_grad_(trainable)

    @property
    def made(self) -> Tensor:
        return self.point(self.grid)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.d(self.step(self, F.relu(self.c(x)))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


STEPS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a positional encoding by a convolution": lambda s, y: y + s.made,
    "its ReLU": lambda s, y: y + F.relu(s.made),
    "its ReLU in place": lambda s, y: y + F.relu(s.made, inplace=True),
    "its batch norm": lambda s, y: y + s.norm(s.made),
    "its max pool": lambda s, y: y + F.interpolate(F.max_pool2d(s.made, 2), scale_factor=2),
    "its softmax": lambda s, y: y + torch.softmax(s.made, 1),
    "a learned query through a linear layer": lambda s, y: y + s.line(s.query)[..., None, None],
    "the same as a factor": lambda s, y: y * s.line(s.query).abs()[..., None, None],
    "weights through a function": lambda s, y: F.conv2d(y, torch.tanh(s.d.weight), s.d.bias * 2, padding=1),
}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", for_any_network())
def test_a_map_does_not_ask_whether_weights_are_trained(name: str, step: str, x: Tensor) -> None:
    method = make_explainer(name, **OPTIONS.get(name, {}))
    trained, frozen = (method.explain(Net(STEPS[step], trainable), x, 1) for trainable in (True, False))
    assert frozen.any()
    torch.testing.assert_close(trained.detach(), frozen)


@pytest.mark.parametrize("step", STEPS)
def test_relevance_is_accounted_for(step: str, x: Tensor) -> None:
    net = Net(STEPS[step], trainable=True)
    leaks = SRD(start="ones").leaks(net, x)
    assert leaks["other"].abs().max() < 1e-12
    torch.testing.assert_close(
        SRD(start="ones").conserved(net, x).detach() + sum(leaks.values()), torch.ones(2).double()
    )


@pytest.mark.parametrize("step", STEPS)
def test_full_gradients_do_not_ask_either(step: str, x: Tensor) -> None:
    trained, frozen = (FullGrad().terms(Net(STEPS[step], trainable), x, 1) for trainable in (True, False))
    torch.testing.assert_close(trained.detach(), frozen)
