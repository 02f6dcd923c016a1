"""LRP epsilon and gamma and excitation backprop against dense matrices, and against captum where that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import captum.attr
import pytest
import reference as ref
import reference_lrp as literal
import torch
from test_methods import bounds, chain, normalised, pixels
from torch import Tensor, nn

from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue, Refused, SrdLabError, SrdLabWarning
from srd_lab.methods.gradient import GradInput
from srd_lab.methods.lrp import ExcitationBackprop, LRPEpsilon, LRPGamma, LRPZPlus

STYLES = ("modules", "shared_inplace", "functional")
TARGETS = (2, 0)
# z^B is of one layer, and theirs of all affine layers on the image at once
ONE_LAYER_ON_THE_IMAGE = [name for name in ref.toy_graphs() if name not in ("conv_conv", "pooled_input")]


def toy(name: str, head: Any, kind: str = "relu") -> tuple[ref.Graph, Tensor]:
    graph = ref.with_activation(ref.with_head(ref.toy_graphs()[name], head), kind, beta=5.0)
    return graph, torch.stack([ref.toy_input(graph, i) for i in range(2)])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert b.abs().max() > 1e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ref.toy_graphs())
@pytest.mark.parametrize(
    ("head", "kind", "eps"),
    [("gap", "relu", 0.5), ("mlp", "relu", 0.01), ("gap", "silu", 0.1), ("mlp", "elu", 0.1)],
)
def test_epsilon_equals_the_definition(name: str, head: Any, kind: str, eps: float) -> None:
    graph, x = toy(name, head, kind)
    expected = [literal.epsilon(graph, a, k, eps)["input"].sum(0) for a, k in zip(x, TARGETS, strict=True)]
    size = float(torch.stack(expected).abs().max())
    for style in STYLES:
        got = LRPEpsilon(epsilon=eps).explain(ref.as_module(graph, style), x, torch.tensor(TARGETS))
        close(got / size, torch.stack(expected) / size)


class Chain(nn.Module):
    """The chain without a module that flattens, for which captum has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = chain()[:5], chain()[6:]

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.front(x).flatten(1))


@pytest.mark.parametrize("inplace", [False, True])
def test_epsilon_equals_captum_on_a_plain_chain(inplace: bool) -> None:
    """And, on a network of ReLUs, input times gradient, where epsilon is nothing."""
    x, target = pixels(2, 3, 8, 8) - 0.5, torch.tensor([2, 0])
    expected = captum.attr.LRP(Chain().eval()).attribute(x.clone().requires_grad_(), target).detach()
    got = LRPEpsilon(epsilon=1e-12).explain(chain(inplace), x, target)
    close(got, expected.sum(1), 1e-6)
    close(got, GradInput().explain(chain(inplace), x, target), 1e-6)
    close(
        LRPEpsilon(epsilon=1e-12, channels="abs_sum").explain(chain(), x, target), expected.abs().sum(1), 1e-6
    )


@pytest.mark.parametrize("name", ONE_LAYER_ON_THE_IMAGE)
@pytest.mark.parametrize(
    ("head", "kind", "gamma"), [("gap", "relu", 0.25), ("mlp", "relu", 3.0), ("mlp", "softplus", 0.0)]
)
def test_gamma_equals_the_definition(name: str, head: Any, kind: str, gamma: float) -> None:
    graph, x = toy(name, head, kind)
    low, high = bounds(graph)
    expected = [
        literal.gamma(graph, a, k, low, high, gamma)["input"].sum(0) for a, k in zip(x, TARGETS, strict=True)
    ]
    size = float(torch.stack(expected).abs().max())  # divided by sums of both signs, relevance can be large
    for style in STYLES:
        method = LRPGamma(low=-5, high=6, gamma=gamma)
        got = method.explain(ref.as_module(graph, style), x, torch.tensor(TARGETS))
        close(got / size, torch.stack(expected) / size, 1e-7)


def test_much_gamma_is_z_plus_with_biases() -> None:
    graph, x = toy("vgg_nobias", "gap")
    last = graph.steps[-1]
    assert isinstance(last, ref.Linear)
    graph = ref.Graph(graph.input_shape, (*graph.steps[:-1], replace(last, bias=None)))
    model = ref.as_module(graph)
    much = LRPGamma(low=-5, high=6, gamma=1e9).explain(model, x, 2)
    close(much, LRPZPlus(low=-5, high=6).explain(model, x, 2), 1e-6)


@pytest.mark.parametrize("name", ONE_LAYER_ON_THE_IMAGE)
@pytest.mark.parametrize(
    ("head", "kind", "contrastive"),
    [("gap", "relu", False), ("mlp", "relu", True), ("mlp", "softplus", False)],
)
def test_excitation_equals_the_definition(name: str, head: Any, kind: str, contrastive: bool) -> None:
    graph, x = toy(name, head, kind)
    low, high = bounds(graph)
    expected = [
        literal.excitation(graph, a, k, low, high, contrastive) for a, k in zip(x, TARGETS, strict=True)
    ]
    maps = [layer for layer in graph.activations if expected[0][layer].dim() == 3]
    for style in STYLES:
        model = ref.as_module(graph, style)
        for level in ("input", *maps) if style == "shared_inplace" else ("input", maps[-1]):
            at = level if level == "input" else graph.activations.index(level)
            method = ExcitationBackprop(low=-5, high=6, level=at, contrastive=contrastive)
            literally = torch.stack([found[level].sum(0) for found in expected])
            if contrastive:
                literally = literally.clamp_min(0)
            torch.testing.assert_close(
                method.explain(model, x, torch.tensor(TARGETS)), literally, rtol=1e-9, atol=1e-11
            )
    for level in maps:
        named = ExcitationBackprop(low=-5, high=6, level=level, contrastive=contrastive)
        at = ExcitationBackprop(low=-5, high=6, level=graph.activations.index(level), contrastive=contrastive)
        model = ref.as_module(graph)
        assert torch.equal(named.explain(model, x, 2), at.explain(model, x, 2))


# geometry has a depthwise channel whose weights are all negative, which nothing excites
@pytest.mark.parametrize("name", [name for name in ref.SEQUENTIAL if name != "geometry"])
def test_excitation_is_a_probability_at_every_layer(name: str) -> None:
    graph, x = toy(name, "gap", "softplus")  # softplus leaves no field dead
    model = ref.as_module(graph)
    for level in ("input", *range(len(graph.activations))):
        map_ = ExcitationBackprop(low=-5, high=6, level=level).explain(model, x, torch.tensor(TARGETS))
        close(map_.sum((1, 2)), torch.ones(2).double())
        assert level == "input" or (map_ >= 0).all()
        assert (map_ >= -1e-12).all()


def test_contrast_tells_classes_apart() -> None:
    """What only the other class excites is gone; without contrast it stays."""
    layers = [
        nn.Conv2d(3, 2, 1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ]
    network = nn.Sequential(*layers)
    network = network.double().eval().requires_grad_(False)
    network[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[..., None, None])
    network[4].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    x = torch.zeros(1, 3, 2, 2).double()
    x[0, 0, :, 0] = 1.0
    x[0, 1, :, 1] = 1.0
    for c in (0, 1):
        expected = torch.zeros(1, 2, 2).double()
        expected[0, :, c] = 0.5
        assert torch.equal(ExcitationBackprop(level="1", contrastive=True).explain(network, x, c), expected)
        assert torch.equal(ExcitationBackprop(level="1").explain(network, x, c), expected)
    network[4].weight.abs_()
    assert torch.equal(
        ExcitationBackprop(level="1").explain(network, x, 0), torch.full((1, 2, 2), 0.25).double()
    )


def test_contrast_needs_a_linear_layer_at_the_end() -> None:
    network = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    )
    method = ExcitationBackprop(level="1", contrastive=True)
    with pytest.raises(
        SrdLabError, match=r"needs a network that ends in a linear layer; use contrastive=False"
    ):
        method.explain(network, pixels(1, 3, 6, 6), 1)
    assert ExcitationBackprop(level="1").explain(network, pixels(1, 3, 6, 6)).sum() > 0


def test_rules_refuse_by_name() -> None:
    x = pixels(1, 3, 8, 8)
    with pytest.raises(BadValue, match=r"lrp_gamma needs gamma >= 0, got -1"):
        LRPGamma(gamma=-1)
    with pytest.raises(BadValue, match=r"LRP needs epsilon > 0, got 0"):
        LRPEpsilon(epsilon=0)
    leaky = chain()
    leaky[4] = nn.LeakyReLU(0.1)
    for model in (leaky, SmoothModel(leaky, 5.0), normalised(leaky)):
        for method in (LRPZPlus(), LRPGamma(), ExcitationBackprop(level=0)):
            with pytest.raises(
                SrdLabError, match=r"activations that are >= 0 \(ReLU, softplus\), but '.*4' is"
            ):
                method.explain(model, x, 1)
        assert LRPEpsilon().explain(model, x, 1).abs().max() > 0
    for clipped, fine in ((nn.ReLU6(), True), (nn.Hardtanh(0.0, 2.0), True), (nn.Hardtanh(-0.5, 2.0), False)):
        leaky[4] = clipped
        for model in (leaky, SmoothModel(leaky, 5.0)):
            if fine:
                assert LRPZPlus().explain(model, x, 1).abs().max() > 0
            else:
                with pytest.raises(Refused, match=r"activations that are >= 0"):
                    LRPZPlus().explain(model, x, 1)
    with pytest.warns(
        SrdLabWarning, match=r"has 1/8 of the input's size, \(1, 1\); the nearest has \(2, 2\)"
    ):
        assert ExcitationBackprop().explain(chain(), x, 1).shape == (len(x), 2, 2)
    with pytest.raises(Refused, match=r"no map of relevance is at '7'; choose another level"):
        ExcitationBackprop(level="7").explain(chain(), x, 1)


@pytest.mark.parametrize("beta", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("kind", [LRPZPlus, LRPGamma])
def test_what_a_surrogate_leaves_of_dead_fields_does_not_overflow(kind: type, beta: float) -> None:
    """In float32, softplus(-3) is 1e-14 to 0; a bias makes the next layer active all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        nn.Linear(4, 3),
    )
    net.eval().requires_grad_(False)
    net[0].bias[:] = -3.0
    net[2].bias[:] = 0.5
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    map_ = kind().explain(SmoothModel(net, beta), x, 1)
    (slope,) = torch.autograd.grad(map_.abs().sum(), x)
    assert torch.isfinite(map_).all()
    assert torch.isfinite(slope).all()
