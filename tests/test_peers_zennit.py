"""Relevance and modified gradients against zennit, on networks of modules without an addition: all that it sees without
a rewritten forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from srd_lab.models import Classifier
from srd_lab.registry import make_explainer
from srd_lab.runtime import generator

zennit = pytest.importorskip("zennit", reason="needs zennit: pip install -e '.[dev]'")

from zennit.attribution import Gradient, SmoothGrad  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.composites import (  # noqa: E402
    COMPOSITES,
    LayerMapComposite,
    SpecialFirstLayerMapComposite,
    layer_map_base,
)
from zennit.rules import Epsilon, Gamma, ZBox, ZPlus  # noqa: E402
from zennit.torchvision import ResNetCanonizer  # noqa: E402
from zennit.types import Convolution, Linear  # noqa: E402

TARGETS = torch.tensor([1, 3])
TINY = 1e-12  # what zennit adds to every denominator
CHAINS = pytest.mark.parametrize("batch_norm", [False, True], ids=["chain", "batch_norm"])


def chain(batch_norm: bool) -> nn.Sequential:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 6, 1), (6, 8, 2), (8, 8, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(8 * 16, 9), nn.ReLU(), nn.Linear(9, 5)]
    model = nn.Sequential(*(m for m in [*layers, *head] if batch_norm or not isinstance(m, nn.BatchNorm2d)))
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.3, 1)
        norm.weight.data.uniform_(-1, 1)
        norm.bias.data.uniform_(-0.2, 0.2)
        norm.eps = 1e-30  # zennit's folded norm still divides by sqrt(1 + eps), 5e-6 per layer
    return model.double().eval()


def pixels() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def canonisers(model: nn.Module) -> list[Any]:
    return [SequentialMergeBatchNorm()] if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else []


def theirs(
    model: nn.Module, composite: Any, x: Tensor, start: str = "logit", layer: nn.Module | None = None
) -> Tensor:
    """zennit's attribution (N, C, H, W) to the input, or to what ``layer`` puts out."""
    held: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: Tensor) -> None:
        out.retain_grad()
        held.append(out)

    def top(logits: Tensor) -> Tensor:
        one = torch.zeros_like(logits).scatter(1, TARGETS[:, None], 1)
        return one if start == "one" else one * logits

    handle = layer.register_forward_hook(keep) if layer else None
    with composite.context(model) as modified:
        leaf = x.clone().requires_grad_()
        logits = modified(leaf)
        logits.backward(top(logits.detach()))
    if handle is None:
        return leaf.grad
    handle.remove()
    return held[0].grad


def equal(got: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@CHAINS
@pytest.mark.parametrize(
    ("name", "composite"), [("guided_backprop", "guided_backprop"), ("deconvnet", "deconvnet")]
)
def test_modified_gradients(batch_norm: bool, name: str, composite: str) -> None:
    model, x = chain(batch_norm), pixels() - 0.5
    expected = theirs(model, COMPOSITES[composite](), x, "one")
    for channels, reduced in (("sum", expected.sum(1)), ("abs_sum", expected.abs().sum(1))):
        equal(make_explainer(name, channels=channels).explain(model, x, TARGETS), reduced)


@CHAINS
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_lrp_epsilon(batch_norm: bool, epsilon: float) -> None:
    """Batch norm: zennit too folds it into the convolution, as a canoniser does."""
    model, x = chain(batch_norm), pixels() - 0.5
    rule = LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon))], canonizers=canonisers(model))
    ours = make_explainer("lrp_epsilon", epsilon=epsilon).explain(model, x, TARGETS)
    equal(ours, theirs(model, rule, x).sum(1))


def boxed(rule: Any, model: nn.Module, low: Any = 0.0, high: Any = 1.0) -> Any:
    """z^B at the first layer and ``rule`` above."""
    first = [(Convolution, ZBox(low, high, TINY, zero_params=["bias"]))]
    return SpecialFirstLayerMapComposite(
        [*layer_map_base(TINY), (Linear, rule)], first, canonizers=canonisers(model)
    )


@CHAINS
def test_lrp_zplus(batch_norm: bool) -> None:
    model, x = chain(batch_norm), pixels()
    rule = boxed(ZPlus(TINY, zero_params=["bias"]), model)  # by default theirs counts positive biases in
    equal(make_explainer("lrp_zplus").explain(model, x, TARGETS), theirs(model, rule, x).sum(1))


def test_lrp_zplus_of_normalised_images() -> None:
    network, mean, std = chain(False), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    model = Classifier(network, mean, std).double().eval()
    low, high = ((end - torch.tensor([mean]).mT) / torch.tensor([std]).mT for end in (0, 1))
    shape = (1, 3, 1, 1)
    rule = boxed(ZPlus(TINY, zero_params=["bias"]), network, low.view(shape), high.view(shape))
    given = (pixels() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    ours = make_explainer("lrp_zplus").explain(model, pixels(), TARGETS)
    equal(ours, theirs(network, rule, given).sum(1), 1e-5)  # mean and std are float32


@CHAINS
@pytest.mark.parametrize("gamma", [0.25, 2.0])
def test_lrp_gamma(batch_norm: bool, gamma: float) -> None:
    """For logits above 0. Below, zennit's generalised rule favours negative weights at the last layer, and ours, as the
    paper's, positive ones."""
    model, x = chain(batch_norm), pixels()
    model[-1].bias.data += 10
    ours, rule = make_explainer("lrp_gamma", gamma=gamma), boxed(Gamma(gamma, TINY), model)
    equal(ours.explain(model, x, TARGETS), theirs(model, rule, x).sum(1))
    model[-1].bias.data -= 20
    expected = theirs(model, rule, x).sum(1)
    assert (ours.explain(model, x, TARGETS) - expected).abs().max() > 0.01 * expected.abs().max()


@CHAINS
def test_excitation_backprop(batch_norm: bool) -> None:
    model, x = chain(batch_norm), pixels()
    second = [i for i, m in enumerate(model) if isinstance(m, nn.ReLU)][1]  # 8 x 8 places
    rule = LayerMapComposite(
        [(Linear, ZPlus(TINY, zero_params=["bias"]))], canonizers=canonisers(model)
    )  # as their ExcitationBackprop, without biases
    ours = make_explainer("excitation_backprop", level=str(second)).explain(model, x, TARGETS)
    expected = theirs(model, rule, x, "one", model[second]).sum(1)
    equal(ours, expected)
    negated = chain(batch_norm)
    negated[-1].weight.data *= -1
    against = theirs(negated, rule, x, "one", negated[second]).sum(1)
    ours = make_explainer("contrastive_excitation", level=str(second)).explain(model, x, TARGETS)
    equal(ours, torch.relu(expected - against))


@CHAINS
def test_smoothgrad(batch_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of theirs has no noise, so that one sample is the gradient."""
    model, x, drawn = chain(batch_norm), pixels() - 0.5, iter(range(9))

    def ours_again(like: Tensor) -> Tensor:
        return torch.randn(like.shape[1:], generator=generator(0, "smoothgrad", next(drawn))).to(like)

    def one(logits: Tensor) -> Tensor:
        return torch.zeros_like(logits).scatter(1, TARGETS[:, None], 1)

    with monkeypatch.context() as patch, SmoothGrad(model, noise_level=0.2, n_iter=10) as method:
        patch.setattr(torch, "randn_like", ours_again)
        noisy = method(x, one)[1]
    with Gradient(model) as method:
        plain = method(x, one)[1]
    ours = make_explainer("smoothgrad", samples=9, noise=0.2, channels="sum").explain(model, x, TARGETS)
    equal(ours, (10 * noisy - plain).sum(1) / 9)


def resnet() -> nn.Module:
    torch.manual_seed(4)
    model = torchvision.models.resnet18(num_classes=5).double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 1e-30
    return model


def test_epsilon_on_a_residual_network() -> None:
    """zennit needs the network's own canoniser for that: additions become modules, batch norm is folded."""
    model, x = resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rule = LayerMapComposite([*layer_map_base(TINY), (Linear, Epsilon(TINY))], canonizers=[ResNetCanonizer()])
    equal(
        make_explainer("lrp_epsilon", epsilon=TINY).explain(model, x, TARGETS), theirs(model, rule, x).sum(1)
    )


def test_zplus_on_a_residual_network() -> None:
    """zennit splits at an addition by the signed terms first, then each by z+; ours by the positive parts of both at
    once, so that relevance keeps its sign."""
    model, x = resnet(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ours, logits = make_explainer("lrp_zplus").explain_with_logits(model, x, TARGETS)
    rule = boxed(ZPlus(TINY, zero_params=["bias"]), nn.Sequential())
    rule.canonizers = [ResNetCanonizer()]
    expected = theirs(model, rule, x).sum(1)
    score = logits.gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(ours.sum((1, 2)), score)
    assert (ours * score.sign()[:, None, None]).min() >= -1e-9 * ours.abs().max()
    assert (ours - expected).abs().max() > 0.01 * ours.abs().max()
