"""What every explanation method must do: per image, differentiable as a whole, equal to an independent oracle, without
side effects, and with clear refusals.

By default LRP is tried on two of torchvision's networks; `-m peers` tries four.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import sqrt
from typing import Any

import captum.attr
import pytest
import reference as ref
import skimage.filters
import torch
import torch.nn.functional as F
from small_transformers import SmallViT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srd_lab import catalogue
from srd_lab.data import batch, load_data
from srd_lab.engine.image_trace import ImageTrace
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput, BadValue, NoGradient, Refused, SrdLabError
from srd_lab.methods.averaged import IntegratedGradients, SmoothGrad
from srd_lab.methods.gradient import Deconvnet, Gradient, GradInput, GuidedBackprop
from srd_lab.methods.lrp import LRPZPlus
from srd_lab.methods.srd import SRD
from srd_lab.models import Classifier, load_model
from srd_lab.registry import EXPLAINERS, METRICS, explain, make_explainer
from srd_lab.runtime import generator
from srd_lab.types import Explainer

METHODS = tuple(EXPLAINERS)
OF_CNNS = catalogue.for_any_network()
LOW, HIGH = ([n for n, m in catalogue.METHODS.items() if m.resolution == size] for size in ("low", "high"))
CONTROLS = ("random", "sobel")
CLASSLESS = (*CONTROLS, "attention_rollout")
DIFFERENTIABLE = [name for name in METHODS if name != "random"]
QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 5},
    "smoothgrad": {"samples": 3},
    **{name: {"level": 0} for name in HIGH},  # the toy networks have no activation at 1/8 of their image
}


def method(name: str, **options: Any) -> Explainer:
    return make_explainer(name, **{**QUICK.get(name, {}), **options})


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixed(nn.Module):
    """A shared in-place ReLU, a residual addition in place, batch norm, a pool, and functional ReLUs."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8, classes)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-0.2, 0.2)
            self.bn.running_var.uniform_(0.3, 1)
            self.bn.bias.uniform_(-0.2, 0.2)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.conv2(self.relu(self.conv1(x)))
        y += x
        y = self.pool(self.relu(y))
        y = F.relu(self.last(y))
        return self.fc(y.mean((2, 3)))


def toy(name: str) -> nn.Module:
    """A network that a method explains, with maps of half of its image's size."""
    return Mixed() if name in OF_CNNS else SmallViT(patch=2)


def normalised(network: nn.Module) -> nn.Module:
    return Classifier(network, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double()


def mixed(name: str = "srd", beta: float | None = None) -> nn.Module:
    """One network for all tests of a method that leave it as it is, or its surrogate: what is tried once with every model is
    not tried again with every method."""
    return _shared("srd" if name in OF_CNNS else name, beta)


@cache
def _shared(name: str, beta: float | None) -> nn.Module:
    return SmoothModel(_shared(name, None), beta) if beta else normalised(toy(name))


def chain(inplace: bool = False) -> nn.Sequential:
    """Module ReLUs only, none called twice: what captum can do."""
    torch.manual_seed(2)
    layers = [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3),
        nn.ReLU(inplace),
    ]
    head = [nn.Flatten(), nn.Linear(6 * 4, 7), nn.ReLU(inplace), nn.Linear(7, 4)]
    return nn.Sequential(*layers, *head).double().eval().requires_grad_(False)


# --- per image -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_images_one_by_one(name: str) -> None:
    model, x = mixed(name), pixels(3, 3, 10, 8)
    target = torch.tensor([3, 0, 1])
    maps, logits = method(name).explain_with_logits(model, x, target)
    assert maps.shape == ((3, 5, 4) if name in LOW else (3, 10, 8))
    torch.testing.assert_close(logits, model(x), rtol=1e-12, atol=1e-12)
    for i in range(3):
        alone = method(name).explain(model, x[i : i + 1], int(target[i]))[0]
        assert alone.abs().max() > 0
        torch.testing.assert_close(maps[i], alone, rtol=1e-11, atol=1e-11 * float(alone.abs().max()))
    chosen = method(name).explain(model, x[[2, 0, 2]], target[[2, 0, 2]])
    torch.testing.assert_close(chosen, maps[[2, 0, 2]], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_no_target_is_the_predicted_class(name: str) -> None:
    model, x = mixed(name), pixels(4, 3, 8, 8)
    predicted = model(x).argmax(1)
    maps = explain(model, x, method=name, **QUICK.get(name, {}))
    assert torch.equal(maps, method(name).explain(model, x, predicted))
    assert torch.equal(maps, method(name).explain(model, x, predicted.to(torch.int32)))
    other = method(name).explain(model, x, (predicted + 1) % 4)
    assert torch.equal(maps, other) == (name in CLASSLESS)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_maps_are_differentiable_only_where_x_is(name: str) -> None:
    model, x = mixed(name), pixels(2, 3, 8, 8)
    plain, logits = method(name).explain_with_logits(model, x)
    assert not plain.requires_grad
    assert not logits.requires_grad
    leaf = x.clone().requires_grad_()
    map_, logits = method(name).explain_with_logits(model, leaf)
    assert map_.requires_grad
    assert logits.requires_grad
    torch.testing.assert_close(map_.detach(), plain)
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(slope, expected)
    with torch.no_grad():
        map_, logits = method(name).explain_with_logits(model, leaf)
    assert not map_.requires_grad
    assert not logits.requires_grad
    torch.testing.assert_close(map_, plain)


# --- differentiable as a whole ----------------------------------------------------------------------------------


def directional(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Autograd's directional derivative of <w, function(x)>, and the relative error of the best central difference."""
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    map_ = function(leaf)
    w = torch.randn(map_.shape, generator=generator, dtype=x.dtype) / map_.detach().abs().mean()
    (slope,) = torch.autograd.grad((w * map_).sum(), leaf)
    derivative = float((slope * v).sum())

    def along(t: float) -> float:
        return float((w * function(x + t * v)).sum())

    steps = [10.0**-k for k in (2, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7)]
    errors = [abs((along(h) - along(-h)) / (2 * h) - derivative) / abs(derivative) for h in steps]
    return derivative, min(errors)


@pytest.mark.parametrize(
    ("name", "options", "smooth"),
    [
        *((name, {}, True) for name in (*catalogue.attackable(), "attention_rollout", "gradient_rollout")),
        ("srd", {"start": "ones"}, True),
        ("srd", {"start": "gradcam"}, True),
        ("srd", {"unit": "scalar", "start": "ones"}, True),
        ("srd", {"values": "post", "start": "ones"}, True),
        ("integrated_gradients", {"images_at_once": 2}, True),
        ("smoothgrad", {"images_at_once": 4}, True),
        *((name, {"images_at_once": 3}, True) for name in ("scorecam", "ablationcam")),
        *(
            (name, {"level": "relu#2"}, True)
            for name in ("gradcam_pp", "xgradcam", "scorecam", "ablationcam")
        ),
        *((name, {"level": "input"}, True) for name in ("excitation_backprop", "contrastive_excitation")),
        *((name, {}, False) for name in (*LOW, *HIGH, "lrp_gamma", "fullgrad", "sobel")),
        ("lrp_epsilon", {"epsilon": 0.1}, False),
        ("srd", {}, False),
        ("srd", {"start": "ones"}, False),
        ("srd", {"level": "relu#2"}, False),
        ("lrp_zplus", {}, False),
        ("grad_input", {}, False),
        ("integrated_gradients", {}, False),
    ],
    ids=str,
)
def test_whole_map_derivatives_equal_finite_differences(
    name: str, options: dict[str, Any], smooth: bool
) -> None:
    """On the ReLU network itself between its kinks, and on the surrogate that the attack differentiates."""
    model = mixed(name, 4.0 if smooth else None)
    x, target = pixels(2, 3, 8, 8), torch.tensor([2, 1])
    derivative, error = directional(lambda a: method(name, **options).explain(model, a, target), x)
    assert abs(derivative) > 1e-6
    assert error < 1e-6


def test_random_maps_refuse_a_gradient() -> None:
    leaf = pixels(2, 3, 8, 8).requires_grad_()
    with pytest.raises(NoGradient, match=r"random maps have no derivative; x must not ask for a gradient"):
        method("random").explain(normalised(Mixed()), leaf)
    with torch.no_grad():
        assert not method("random").explain(normalised(Mixed()), leaf).requires_grad


def test_deconvnet_has_no_derivative() -> None:
    """Where an activation was active plays no part, so that the map stays as it is until a max pool's winners change."""
    model, leaf = mixed(beta=4.0), pixels(2, 3, 8, 8).requires_grad_()
    map_ = method("deconvnet").explain(model, leaf, 1)
    (slope,) = torch.autograd.grad(map_.square().sum(), leaf)
    assert map_.max() > 0
    assert (slope == 0).all()


def test_finite_differences_would_notice_a_wrong_derivative() -> None:
    """The check itself: a share held constant, as the authors' code does, must show."""
    model, x, target = mixed(beta=4.0), pixels(2, 3, 8, 8), torch.tensor([2, 1])

    def detached(a: Tensor) -> Tensor:
        map_ = method("grad_input").explain(model, a, target)
        return map_ + 1e-3 * (map_.detach() * map_)

    assert directional(detached, x)[1] > 1e-5


# --- oracles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network", [Mixed(), chain(), chain(inplace=True)], ids=["mixed", "chain", "in_place"]
)
def test_gradient_methods_equal_captum(network: nn.Module) -> None:
    x, target = pixels(2, 3, 8, 8) - 0.5, torch.tensor([2, 0])
    leaf = x.clone().requires_grad_()
    slope = captum.attr.Saliency(network).attribute(leaf, target, abs=False)
    torch.testing.assert_close(Gradient().explain(network, x, target), slope.abs().sum(1))
    torch.testing.assert_close(Gradient("max_abs").explain(network, x, target), slope.abs().amax(1))
    torch.testing.assert_close(Gradient("sum").explain(network, x, target), slope.sum(1))
    product = captum.attr.InputXGradient(network).attribute(leaf, target)
    torch.testing.assert_close(GradInput().explain(network, x, target), product.detach().sum(1))
    path = captum.attr.IntegratedGradients(network).attribute(
        x, 0, target, n_steps=30, method="riemann_right"
    )
    torch.testing.assert_close(IntegratedGradients().explain(network, x, target), path.sum(1))
    literal = torch.stack(
        [ref.integrated_gradients(network, a, int(k)) for a, k in zip(x, target, strict=True)]
    )
    torch.testing.assert_close(IntegratedGradients().explain(network, x, target), literal.sum(1))


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_guided_backprop_equals_captum_where_captum_works() -> None:
    x, target = pixels(2, 3, 8, 8) - 0.5, torch.tensor([2, 0])
    expected = captum.attr.GuidedBackprop(chain()).attribute(x.clone().requires_grad_(), target)
    for network in (chain(), chain(inplace=True)):
        torch.testing.assert_close(GuidedBackprop().explain(network, x, target), expected.abs().sum(1))


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_deconvnet_equals_captum_and_a_loop_by_hand() -> None:
    x, target = pixels(2, 3, 8, 8) - 0.5, torch.tensor([2, 0])
    expected = captum.attr.Deconvolution(chain()).attribute(x.clone().requires_grad_(), target)
    signal, held = F.one_hot(target, 4).double(), [x]
    for layer in chain():
        held.append(layer(held[-1]))
    for layer, before in zip(reversed(chain()), reversed(held[:-1]), strict=True):
        leaf = before.clone().requires_grad_()
        if isinstance(layer, nn.ReLU):
            signal = signal.clamp_min(0)
        else:
            (signal,) = torch.autograd.grad(layer(leaf), leaf, signal)
    torch.testing.assert_close(signal, expected)
    for network in (chain(), chain(inplace=True), Functional().eval()):
        torch.testing.assert_close(Deconvnet().explain(network, x, target), expected.abs().sum(1))
        torch.testing.assert_close(Deconvnet("sum").explain(network, x, target), expected.sum(1))


def noisy(given: Tensor, k: int, noise: float, seed: int) -> Tensor:
    """One noisy copy of one (normalised) image (C, H, W)."""
    drawn = torch.randn(given.shape, generator=generator(seed, "smoothgrad", k))
    return given + noise * (given.max() - given.min()) * drawn.double()


@pytest.mark.parametrize("at_once", [1, 3, None])
def test_smoothgrad_is_a_mean_over_noisy_images(at_once: int | None) -> None:
    model, x, target = mixed(), pixels(2, 3, 8, 8), torch.tensor([2, 0])
    options = {"samples": 4, "noise": 0.3, "seed": 5}
    expected = []
    for image, c in zip(model.normalise(x), target.tolist(), strict=True):
        slopes = [
            captum.attr.Saliency(model.network).attribute(
                noisy(image, k, 0.3, 5)[None].requires_grad_(), c, abs=False
            )[0]
            for k in range(4)
        ]
        expected.append((sum(slopes) / 4).abs().sum(0))
    got = SmoothGrad(**options, images_at_once=at_once).explain(model, x, target)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert not torch.equal(got, SmoothGrad(**{**options, "seed": 6}).explain(model, x, target))
    silent = SmoothGrad(samples=2, noise=0.0).explain(model, x, target)
    torch.testing.assert_close(silent, Gradient().explain(model, x, target))
    with pytest.raises(BadValue, match=r"smoothgrad needs samples >= 1 and noise >= 0, got 0 and 0.15"):
        SmoothGrad(samples=0)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_noisy_images_in_parts_are_the_same_images(at_once: int) -> None:
    model, x = mixed(beta=5.0), pixels(2, 3, 8, 8)
    found = []
    for parts in (at_once, None):
        leaf = x.clone().requires_grad_()
        map_ = SmoothGrad(samples=4, images_at_once=parts).explain(model, leaf, 1)
        found.append((map_.detach(), torch.autograd.grad(map_.square().sum(), leaf)[0]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = chain()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        return x


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_guided_backprop_sees_functional_activations() -> None:
    """captum and zennit silently return the plain gradient here."""
    x, target = pixels(2, 3, 8, 8) - 0.5, torch.tensor([2, 0])
    network = Functional().eval()
    fooled = captum.attr.GuidedBackprop(network).attribute(x.clone().requires_grad_(), target).abs().sum(1)
    torch.testing.assert_close(fooled, Gradient().explain(network, x, target))
    ours = GuidedBackprop().explain(network, x, target)
    torch.testing.assert_close(ours, GuidedBackprop().explain(chain(), x, target))
    assert (ours - fooled).abs().max() > 0.01 * fooled.max()


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_guided_backprop_changes_activations_and_nothing_else() -> None:
    """Normalisations and gates, for which decompositions have no rule, keep their own derivative."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), Gate(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    x = pixels(2, 3, 8, 8)
    expected = captum.attr.GuidedBackprop(network).attribute(x.clone().requires_grad_(), 1).detach()
    torch.testing.assert_close(GuidedBackprop().explain(network, x, 1), expected.abs().sum(1))


def bounds(graph: ref.Graph) -> tuple[Tensor, Tensor]:
    ones = torch.ones(graph.input_shape, dtype=torch.float64)
    return -5 * ones, 6 * ones


# Left out: nets whose input passes several affine maps before the first activation. There the reference takes the
# sign of the composed map (z^B of one layer), and ours that of each convolution.
@pytest.mark.parametrize("name", [g for g in ref.toy_graphs() if g not in ("conv_conv", "pooled_input")])
@pytest.mark.parametrize(("head", "kind"), [("gap", "relu"), ("mlp", "relu"), ("mlp", "softplus")])
def test_lrp_equals_the_definition(name: str, head: Any, kind: str) -> None:
    graph = ref.with_activation(ref.with_head(ref.toy_graphs()[name], head), kind, beta=5.0)
    x, low, high = torch.stack([ref.toy_input(graph, i) for i in range(2)]), *bounds(graph)
    expected = [ref.lrp_zplus(graph, a, k, low, high)["input"].sum(0) for a, k in zip(x, (2, 0), strict=True)]
    for style in ("modules", "shared_inplace", "functional"):
        got = LRPZPlus(low=-5, high=6).explain(ref.as_module(graph, style), x, torch.tensor([2, 0]))
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["conv_conv", "pooled_input"])
def test_lrp_conserves_through_several_layers_on_the_input(name: str) -> None:
    graph = ref.with_head(ref.toy_graphs()[name], "gap")
    model, x = ref.as_module(graph), torch.stack([ref.toy_input(graph, i) for i in range(2)])
    maps, logits = LRPZPlus(low=-5, high=6).explain_with_logits(model, x, 2)
    torch.testing.assert_close(maps.sum((1, 2)), logits[:, 2])


@cache
def padded(kernel: int | tuple[int, int], by_name: bool) -> nn.Module:
    torch.manual_seed(7)  # no map is zero
    layers: list[nn.Module] = []
    for before, after in ((3, 4), (4, 5), (5, 4)):
        conv = nn.Conv2d(before, after, kernel, padding="same", dilation=1)
        if not by_name:
            (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in conv.kernel_size)
            conv.padding, conv._reversed_padding_repeated_twice = (0, 0), [0] * 4
            layers.append(nn.ZeroPad2d((left, right, top, bottom)))
        layers.append(conv)
        if before != 4:  # two convolutions in a row, and one on the image
            layers.append(nn.ReLU())
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", OF_CNNS)
@pytest.mark.parametrize("kernel", [3, 2, (4, 3)])
def test_padding_by_name_is_padding_by_number(name: str, kernel: int | tuple[int, int]) -> None:
    x = pixels(2, 3, 37, 36)  # each shifts by half a pixel
    maps = [method(name).explain(padded(kernel, by_name), x, 1) for by_name in (True, False)]
    assert maps[0].abs().max() > 0
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "squeezenet1_1"),
        *(pytest.param(name, marks=pytest.mark.peers) for name in ("mobilenet_v2", "densenet121")),
    ],
)
def test_lrp_conserves_on_torchvision_networks(name: str) -> None:
    """Captum is off by 1e9 on residual networks, zennit without canonisers by 200."""
    import torchvision

    torch.manual_seed(5)
    network = torchvision.models.get_model(name, weights=None).double().eval().requires_grad_(False)
    x = pixels(1, 3, 64, 64)
    for model in (normalised(network), nn.Sequential(normalised(nn.Identity()).normalise, network)):
        maps, logits = LRPZPlus().explain_with_logits(model, x)
        target = logits.max(1).values
        assert float(target) != 0
        # What biases make active on their own stays where it is; there are hardly any.
        torch.testing.assert_close(maps.sum((1, 2)), target, rtol=2e-2, atol=0)
        assert float(maps.abs().sum()) < 1.1 * float(target.abs())


@pytest.mark.parametrize("at_once", [1, 3, 4, 6, 1000])
def test_a_long_path_in_parts_is_the_same_path(at_once: int) -> None:
    model, x, target = mixed(beta=5.0), pixels(2, 3, 8, 8), torch.tensor([2, 1])
    maps, slopes = [], []
    for parts in (at_once, None):
        leaf = x.clone().requires_grad_()
        map_ = IntegratedGradients(steps=7, images_at_once=parts).explain(model, leaf, target)
        (slope,) = torch.autograd.grad(map_.square().sum(), leaf)
        maps.append(map_.detach())
        slopes.append(slope)
        plain = IntegratedGradients(steps=7, images_at_once=parts).explain(model, x, target)
        torch.testing.assert_close(plain, maps[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*maps, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


def test_a_path_in_parts_can_be_differentiated_twice() -> None:
    model, leaf = mixed(beta=5.0), pixels(1, 3, 8, 8).requires_grad_()
    curvatures = []
    for at_once in (1, None):
        map_ = IntegratedGradients(steps=4, images_at_once=at_once).explain(model, leaf, 1)
        (slope,) = torch.autograd.grad(map_.square().sum(), leaf, create_graph=True)
        curvatures.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    torch.testing.assert_close(*curvatures, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OF_CNNS)
def test_a_network_that_overwrites_its_input_is_explained_like_one_that_does_not(name: str) -> None:
    maps = []
    for inplace in (True, False):
        model = nn.Sequential(nn.ReLU(inplace), *list(chain(inplace))).eval()
        x = pixels(2, 3, 8, 8) - 0.3
        kept = x.clone()
        has_box = hasattr(method(name), "low")
        options = {"low": -0.5} if has_box else {"encoder": "5"} if hasattr(method(name), "encoder") else {}
        maps.append(method(name, **options).explain(model, x, 0))
        assert torch.equal(x, kept)
    assert maps[0].abs().max() > 0
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("name", OF_CNNS)
def test_adding_in_place_is_adding(name: str) -> None:
    """On an activation's output too, which is its own positive part."""

    class Net(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.inplace = inplace
            self.a, self.b, self.c, self.d = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4, 4))
            self.fc = nn.Linear(4, 3)
            self.double().eval().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            v, w = F.softplus(self.d(x)), self.b(x)
            if self.inplace:
                v += w
                v *= 2
            else:
                v = (v + w) * 2
            return self.fc(F.relu(self.c(F.relu(v))).mean((2, 3)))

    x = pixels(2, 3, 6, 6)
    maps = [method(name).explain(Net(inplace), x, 1) for inplace in (True, False)]
    assert maps[1].abs().max() > 0
    torch.testing.assert_close(*maps)


# --- no side effects ------------------------------------------------------------------------------------------------

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]
PROCESS_WIDE = [
    k for k, v in vars(nn.modules.module).items() if k.startswith("_global_") and isinstance(v, dict)
]


def state_of(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """All that a method might touch, by value."""
    state: dict[str, Any] = {f"{k} value": v.clone() for k, v in model.state_dict().items()}
    for name, p in model.named_parameters():
        state[f"{name} asks"] = p.requires_grad
        state[f"{name} grad"] = None if p.grad is None else p.grad.clone()
        state[f"{name} version"] = p._version
    for name, module in model.named_modules():
        state[f"{name} flags"] = (module.training, getattr(module, "inplace", None), sorted(vars(module)))
        state[f"{name} hooks"] = {hook: dict(getattr(module, hook)) for hook in HOOKS}
    state["process hooks"] = {name: dict(getattr(nn.modules.module, name)) for name in PROCESS_WIDE}
    state["x"] = (x.detach().clone(), x.requires_grad, x.grad, x._version)
    state["grad mode"] = torch.is_grad_enabled()
    state["random"] = torch.get_rng_state()
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


@contextmanager
def untouched(model: nn.Module, x: Tensor) -> Iterator[None]:
    before = state_of(model, x)
    yield
    after = state_of(model, x)
    changed = [key for key in before if not same(before[key], after[key])]
    assert not changed
    assert before.keys() == after.keys()


class Forked(nn.Module):
    """Two branches from a map that modules of their own end, and two that meet before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.side = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3), nn.Conv2d(5, 6, 3)
        self.act, self.last, self.bn, self.fc = nn.ReLU(), nn.ReLU(), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.down, self.mean, self.max = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.gate = nn.Sigmoid()
        with torch.no_grad():
            self.bn.running_mean.uniform_(-0.2, 0.2)
            self.bn.bias.uniform_(-0.2, 0.2)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        y = self.down(self.last(self.bn(self.b(x)) + self.side(x)))
        share = torch.full((), 0.3).neg().abs()  # of another making than y
        return self.fc((self.mean(y) + share * self.max(y)).flatten(1))


@cache
def forked(kind: str, first: int = 0, step: int = 1) -> nn.Module:
    """With a hook of some kind on every ``step``-th module from the ``first``; without any if ``kind`` is empty."""
    model = Forked()
    for child in [*model.children()][first::step] if kind else ():
        getattr(child, kind)(lambda *_: None)
    return model


@pytest.mark.parametrize("name", OF_CNNS)
def test_backward_hooks_of_the_model_change_no_map(name: str) -> None:
    """They put views in the place of what modules are given and return, where gradients are on."""
    x, found = pixels(2, 3, 8, 8), []
    hook, early = "register_full_backward_hook", "register_full_backward_pre_hook"
    for model in (forked(""), forked(hook), forked(early), forked(hook, 0, 2), forked(early, 1, 2)):
        maps = [method(name).explain(model, x, 2)]
        if name in DIFFERENTIABLE and name != "sobel":
            smooth, leaf = SmoothModel(model, 5.0), x.clone().requires_grad_()
            maps.append(method(name).explain(smooth, leaf, 2))
            maps.append(torch.autograd.grad(maps[1].square().sum(), leaf)[0])
        found.append([m.detach() for m in maps])
    assert found[0][0].flatten(1).any(1).all()
    for maps in found[1:]:
        for map_, expected in zip(maps, found[0], strict=True):
            torch.testing.assert_close(map_, expected, rtol=1e-10, atol=1e-12)


class Explodes(nn.Module):
    """Passes its input on, until it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise ZeroDivisionError("in the middle")
        return x


def busy_model() -> tuple[nn.Module, Explodes]:
    """Trainable weights with gradients, hooks of its own, in-place ReLUs and a container left in training mode."""
    network = Mixed().requires_grad_(True)
    bomb = Explodes().eval()
    model = nn.Sequential(normalised(nn.Identity()).normalise, nn.ReLU(inplace=True), network, bomb)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    network.conv1.register_forward_hook(lambda module, inputs, output: None)
    network.last.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    assert model.training
    return model, bomb


@pytest.mark.parametrize("name", OF_CNNS)
@pytest.mark.parametrize("asks", [False, True])
def test_nothing_is_changed(name: str, asks: bool) -> None:
    model, bomb = busy_model()
    x = pixels(2, 3, 8, 8).requires_grad_(asks)
    if name == "random" and asks:
        pytest.skip("refuses")
    options = {"low": -0.5} if hasattr(method(name), "low") else {}
    for grad in (torch.enable_grad, torch.no_grad):
        with grad(), untouched(model, x):
            map_ = method(name, **options).explain(model, x)
            SmoothModel(model, 5.0)(x)
    with untouched(model, x):
        map_ = method(name, **options).explain(SmoothModel(model, 5.0), x)
        if asks:
            torch.autograd.grad(map_.sum(), x)
    for explained in (model, SmoothModel(model, 5.0)):
        with untouched(model, x):
            bomb.armed = True
            with pytest.raises(ZeroDivisionError):
                method(name, **options).explain(explained, x)
            bomb.armed = False
    with untouched(model, x), pytest.raises(BadInput):
        method(name, **options).explain(model, x, 99)


@pytest.mark.parametrize("name", METHODS)
def test_no_graph_outlives_its_map(name: str) -> None:
    """No cycle and no cache keeps an image, an activation or the trace alive; nothing waits for the collector."""
    model = normalised(toy(name))
    alive: list[weakref.ref[Tensor]] = []
    model.network.stem.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        for asks in (False, name != "random", name != "random"):
            x = pixels(2, 3, 8, 8).requires_grad_(asks)
            map_ = method(name).explain(model, x)
            if asks:
                torch.autograd.grad(map_.sum(), x)
            alive.append(weakref.ref(x))
            del x, map_
            assert [r for r in alive if r() is not None] == []
            alive.clear()
    finally:
        gc.enable()


@pytest.mark.parametrize("name", METHODS)
def test_what_was_recorded_is_released_after_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, open_traces = mixed(name), pixels(2, 3, 8, 8), set[int]()
    run, release = ImageTrace.run, ImageTrace.release

    def noted(trace: ImageTrace, fed: Tensor) -> Any:
        open_traces.add(id(trace))
        seen.append(trace)
        return run(trace, fed)

    def released(trace: ImageTrace) -> None:
        open_traces.remove(id(trace))
        release(trace)

    seen: list[ImageTrace] = []
    monkeypatch.setattr(ImageTrace, "run", noted)
    monkeypatch.setattr(ImageTrace, "release", released)
    with pytest.raises(BadInput):
        method(name).explain(model, x, 99)
    assert not open_traces
    assert not any(trace.records._known or trace.maps for trace in seen)


# --- refusals -----------------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.trace(nn.ReLU(), torch.zeros(1, 3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def compiled_in_place() -> nn.Module:
    model = chain()
    model.compile()
    return model


def training(module: type[nn.Module]) -> nn.Module:
    model = nn.Sequential(chain(), nn.Flatten())
    part = nn.BatchNorm1d(4) if module is nn.BatchNorm1d else nn.Dropout(0.5)
    model.append(part.double())
    model.eval()
    part.train()
    return model


class Calls(nn.Module):
    """The chain with one more call in it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.function = chain(), function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 3:
                x = self.function(x)
        return x


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
@pytest.mark.parametrize("name", OF_CNNS)
def test_models_that_cannot_be_followed_are_refused(name: str) -> None:
    x = pixels(2, 3, 8, 8)
    cases: list[tuple[nn.Module, str]] = [
        (Scripted(), r"inner is a scripted module.*pass the eager network"),
        (nn.DataParallel(chain()), r"DataParallel, which runs copies elsewhere; pass its \.module"),
        (torch.compile(chain()), r"compiled module.*pass its \._orig_mod"),
        (compiled_in_place(), r"Sequential was compiled in place"),
        (training(nn.BatchNorm1d), r"batch norm 2 uses the statistics of the batch; call model\.eval\(\)"),
        (training(nn.Dropout), r"dropout 2 is active; call model\.eval\(\)"),
        (Calls(lambda t: F.dropout(t)), r"dropout is active in Calls; call model\.eval\(\)"),
        (Calls(lambda t: F.dropout2d(t, 0.3)), r"dropout is active"),
        (Calls(lambda t: torch.dropout(t, 0.3, True)), r"dropout is active"),
        (Calls(lambda t: F.batch_norm(t, None, None, training=True)), r"statistics of the batch"),
    ]
    for model, message in cases:
        with pytest.raises(Refused, match=message), untouched(model, x):
            method(name).explain(model, x, 1)
    assert method(name).explain(Calls(lambda t: F.dropout(t, training=False)), x, 1).shape[0] == 2


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop"])
def test_methods_with_a_rule_need_activations(name: str) -> None:
    linear = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(Refused, match=r"no activation call was seen in the model; expected ReLU"):
        method(name).explain(linear, pixels(1, 3, 4, 4).float())


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop"])
def test_checkpointed_parts_are_refused(name: str) -> None:
    class Net(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.reentrant, self.layers = reentrant, chain()
            self.part = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU()).double()
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.part, self.layers[0](x), use_reentrant=self.reentrant)
            return self.layers[1:](x)

    for reentrant in (True, False):
        with pytest.raises(Refused, match=r"checkpoint"):
            method(name).explain(Net(reentrant), pixels(1, 3, 8, 8), 1)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_that_make_no_sense_are_refused(name: str) -> None:
    model, x = mixed(name), pixels(2, 3, 8, 8)
    nan, infinite = x.clone(), x.clone()
    nan[1, 0, 0, 0] = torch.nan
    infinite[0, 0, 0, 0] = torch.inf
    cases: list[tuple[Any, str]] = [
        (x[0], r"non-empty batch of images \(N, C, H, W\), got \(3, 8, 8\); add a batch axis"),
        (x[:0], r"non-empty batch.*got \(0, 3, 8, 8\)"),
        (x.numpy(), r"non-empty batch.*got ndarray"),
        ((255 * x).to(torch.uint8), r"float32 or float64, got torch.uint8; scale pixels"),
        (x.half(), r"float32 or float64, got torch.float16"),
        (x.float(), r"the input is torch.float32, but the model's weights are torch.float64"),
        (nan, r"NaN or infinite"),
        (infinite, r"NaN or infinite"),
    ]
    for wrong, message in cases:
        with pytest.raises(BadInput, match=message):
            method(name).explain(model, wrong)
    with torch.inference_mode(), pytest.raises(BadInput, match=r"inference_mode; use torch.no_grad"):
        method(name).explain(model, x)


@pytest.mark.parametrize("name", METHODS)
def test_targets_that_make_no_sense_are_refused(name: str) -> None:
    model, x = mixed(name), pixels(2, 3, 8, 8)
    cases: list[tuple[Any, str]] = [
        (4, r"target out of range: the model has classes 0\.\.3, got \[4, 4\]"),
        (-1, r"target out of range"),
        (torch.tensor([0, 7]), r"target out of range.*\[0, 7\]"),
        (torch.tensor([0.0, 1.0]), r"integer class indices, got torch.float32"),
        (torch.tensor([True, False]), r"integer class indices, got torch.bool"),
        (torch.tensor([0, 1, 2]), r"one target per image, shape \(2,\), got \(3,\)"),
        (torch.tensor([[0], [1]]), r"one target per image"),
    ]
    for wrong, message in cases:
        with pytest.raises(BadInput, match=message):
            method(name).explain(model, x, wrong)


@pytest.mark.parametrize("name", ["srd", "lrp_zplus"])
def test_what_is_not_affine_is_named(name: str) -> None:
    """SRD holds the statistics of a normalisation (tests/test_architectures.py); z+ has no rule for that."""
    x = pixels(2, 3, 8, 8)
    norms = (
        (lambda t: F.layer_norm(t, t.shape[1:]), r"layer_norm in Calls is neither affine nor an activation"),
        (nn.GroupNorm(2, 6).double(), r"group_norm in (function|Calls)"),
        (nn.InstanceNorm2d(6), r"instance_norm"),
    )
    product = (lambda t: t * t.mean((2, 3), keepdim=True), r"mul in Calls is neither affine")
    for function, message in (product, *(norms if name == "lrp_zplus" else ())):
        with pytest.raises(Refused, match=message):
            method(name, **({"encoder": "layers.4"} if name == "srd" else {})).explain(Calls(function), x, 1)


def test_names_and_options_are_refused_by_name() -> None:
    model, x = mixed(), pixels(1, 3, 8, 8)
    with pytest.raises(BadValue, match=r"unknown method 'sdr'; expected one of gradient, guided_backprop"):
        explain(model, x, method="sdr")
    with pytest.raises(BadValue, match=r"gradient has no option steps; it takes channels"):
        explain(model, x, method="gradient", steps=3)
    with pytest.raises(
        SrdLabError, match=r"channels='mean' is not known; expected one of sum, abs_sum, max_abs"
    ):
        explain(model, x, method="gradient", channels="mean")
    with pytest.raises(BadValue, match=r"steps >= 1, got 0"):
        explain(model, x, method="integrated_gradients", steps=0)
    with pytest.raises(Refused, match=r"the rule needs activations that are >= 0.*'1' is tanh"):
        explain(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh(), nn.Flatten()), x.float(), method="lrp_zplus")
    with pytest.raises(Refused, match=r"must be logits \(N, K\), got shape \(1, 2, 8, 8\)"):
        explain(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), x.float(), method="gradient")


@pytest.mark.parametrize("name", METHODS)
def test_explainers_are_described_by_their_fields(name: str) -> None:
    explainer = method(name)
    assert isinstance(explainer, Explainer)
    assert explainer == method(name)
    with pytest.raises(AttributeError):
        explainer.channels = "sum"  # type: ignore[attr-defined]


def test_shapes_of_levels_follow_non_square_images() -> None:
    x = pixels(1, 3, 16, 8)
    assert SRD(level="low").explain(mixed(), x).shape == (1, 8, 4)
    for name in METHODS:
        assert method(name).explain(mixed(name), x).shape == ((1, 8, 4) if name in LOW else (1, 16, 8))


# --- controls, and what is said of all -----------------------------------------------------------------------------------


def test_sobel_is_scikit_images() -> None:
    """But for a factor: theirs is a mean over the two directions, of filters that sum to 1 (ours: to 1/2)."""
    model, x = normalised(Mixed()), pixels(2, 3, 9, 7)
    x[1, :, :4] = 0.5
    maps = method("sobel").explain(model, x)
    for map_, image in zip(maps, x, strict=True):
        expected = skimage.filters.sobel(image.mean(0).numpy(), mode="reflect")
        torch.testing.assert_close(map_, torch.from_numpy(expected) / sqrt(2), rtol=1e-12, atol=1e-12)
    ramp = torch.arange(8.0).double().expand(1, 3, 8, 8)
    assert (
        method("sobel").explain(model, ramp / 8)[0, :, 1:-1] == 1 / 8
    ).all()  # per pixel, the rise per pixel
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(method("sobel").explain(model, leaf).sum(), leaf)
    assert slope.isfinite().all()


def test_random_maps_depend_on_image_and_seed_alone() -> None:
    model, x = normalised(Mixed()), pixels(3, 3, 16, 16)
    x[2] = x[0]
    maps = method("random").explain(model, x)
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps, method("random").explain(normalised(Mixed().requires_grad_()), x, 2))
    assert not torch.equal(maps, method("random", seed=1).explain(model, x))
    assert 0 <= float(maps.min()) < 0.05
    assert 0.95 < float(maps.max()) < 1
    assert abs(float(maps[:2].mean()) - 0.5) < 0.04
    assert abs(float(maps[:2].std()) - 12**-0.5) < 0.02


def test_the_catalogue_lists_what_the_registry_has() -> None:
    assert list(catalogue.METHODS) == list(EXPLAINERS)
    assert list(catalogue.METRICS) == list(METRICS)
    assert tuple(n for n in OF_CNNS if n not in ("deconvnet", "random")) == catalogue.attackable()


@pytest.mark.parametrize("name", OF_CNNS)
def test_maps_are_as_large_as_the_catalogue_says(name: str) -> None:
    scenes = load_model("vgg16")
    x = batch(load_data(), [0])[0]
    short = {"integrated_gradients": {"steps": 1}, "smoothgrad": {"samples": 1}}.get(name, {})
    map_ = explain(scenes, x, method=name, **short)
    side = {"input": 64, "high": 8, "low": 2}[catalogue.METHODS[name].resolution]
    assert map_.shape == (1, side, side)
    assert map_.dtype == torch.float32
    assert map_.isfinite().all()
    assert map_.abs().max() > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_the_catalogue_counts_the_pass_of_controls(name: str) -> None:
    model, forward = Mixed(), []
    model.conv1.register_forward_hook(lambda *_: forward.append(1))
    method(name).explain(model, pixels(1, 3, 8, 8), 1)
    assert len(forward) == int(catalogue.METHODS[name].passes)
