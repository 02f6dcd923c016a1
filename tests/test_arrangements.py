"""Arrangements of one network that must not matter, or are refused: what is written when, and what lies between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import srd_lab
from srd_lab.engine.model_checks import SameOutput, check_images_apart
from srd_lab.engine.rounding import far_apart
from srd_lab.errors import BadInput, Refused
from srd_lab.registry import make_explainer

Forward = Callable[["Net", Tensor], Tensor]
BY_WEIGHTS = ("lrp_zplus", "lrp_gamma", "excitation_backprop", "contrastive_excitation")
BY_GRADIENT = ("gradient", "grad_input", "integrated_gradients")
GATED = ("guided_backprop", "deconvnet")


class Net(nn.Module):
    """Two convolutions, a batch norm and a linear layer, put together by ``how``."""

    def __init__(self, how: Forward, seed: int = 11) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.e, self.bn, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        nn.init.normal_(self.bn.weight, 1, 0.3)
        nn.init.normal_(self.bn.bias, 0, 0.5)
        nn.init.uniform_(self.fc.weight, -0.2, 0.6)
        self.how: Any = how
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.how(self, x)
        return out

    def head(self, y: Tensor) -> Tensor:
        return self.fc(y.mean((2, 3)))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(4))


def explained(how: Forward | Net, name: str, x: Tensor, **options: Any) -> Tensor:
    """The map of class 2; silent, or an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = how if isinstance(how, Net) else Net(how)
        return make_explainer(name, **options).explain(model, x, 2).detach()


def the_same(one: Tensor, other: Tensor) -> None:
    assert float(one.abs().max()) > 0
    torch.testing.assert_close(one / one.abs().max(), other / one.abs().max(), rtol=0, atol=2e-5)


# --- what is written when -------------------------------------------------------------------------------


def pooled(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(net.c(x)), 2)


def input_scaled(net: Net, x: Tensor) -> Tensor:
    y = pooled(net, x)
    u = net.d(y)
    y *= 0.1
    return net.head(F.relu(u + y))


def input_zeroed(net: Net, x: Tensor) -> Tensor:
    y = pooled(net, x)
    u = net.d(y)
    y.zero_()
    return net.head(F.relu(u))


def image_zeroed(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    u = net.c(x)
    x.zero_()
    return net.head(F.relu(u))


def bias_zeroed(net: Net, x: Tensor) -> Tensor:
    bias = net.d.bias.clone()
    u = F.conv2d(pooled(net, x), net.d.weight, bias, padding=1)
    bias.zero_()
    return net.head(F.relu(u))


@pytest.mark.parametrize("how", [input_scaled, input_zeroed, image_zeroed, bias_zeroed])
@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_what_a_convolution_has_read_may_not_change_before_its_part_is_made(how: Forward, name: str) -> None:
    with pytest.raises(Refused, match="something writes into what a convolution has read before"):
        explained(how, name, images())


@pytest.mark.parametrize("name", ["srd", "lrp_epsilon", *BY_GRADIENT, *GATED])
def test_weights_that_are_written_after_use_are_refused(name: str) -> None:
    def workspace(net: Net, x: Tensor) -> Tensor:
        weight = net.d.weight.clone()
        u = F.relu(F.conv2d(F.relu(net.c(x)), weight, padding=1))
        weight.copy_(net.d.weight * 1.05)
        return net.head(F.relu(F.conv2d(u, weight, padding=1)))

    with pytest.raises(Refused, match="modified by an inplace operation"):
        explained(workspace, name, images())


def test_activations_on_slices_in_place_are_refused_by_name() -> None:
    def slices(net: Net, x: Tensor) -> Tensor:
        u = F.avg_pool2d(net.d(F.relu(net.c(x))), 2)
        u[:, :4].relu_()
        u[:, 4:].relu_()
        return net.head(F.relu(net.e(F.avg_pool2d(u, 1))))

    for name in BY_WEIGHTS:
        with pytest.raises(Refused, match="of which a part was overwritten"):
            explained(slices, name, images())


# --- checkpoints and transforms -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_checkpointed_convolutions_with_frozen_weights(name: str, seed: int) -> None:
    def kept(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.bn(net.d(F.relu(net.c(x))))))

    def again(net: Net, x: Tensor) -> Tensor:
        def block(t: Tensor) -> Tensor:
            return F.relu(net.bn(net.d(t)))

        return net.head(checkpoint(block, F.relu(net.c(x)), use_reentrant=False))

    the_same(explained(Net(kept, seed), name, images()), explained(Net(again, seed), name, images()))


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_convolutions_of_single_images_and_by_vmap(name: str) -> None:
    def together(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(F.relu(net.c(x)))))

    def one_by_one(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(F.relu(torch.stack([net.c(image) for image in x])))))

    plain = explained(together, name, images())
    the_same(plain, explained(one_by_one, name, images()))


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop"])
def test_convolutions_of_single_images_have_no_rule(name: str) -> None:
    def one_by_one(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(F.relu(torch.stack([net.c(image) for image in x])))))

    with pytest.raises(Refused, match="convolves a single image"):
        explained(one_by_one, name, images())


# --- what lies between ----------------------------------------------------------------------------------


def test_a_gate_is_no_batch_norm_for_one_image() -> None:
    def gated(net: Net, x: Tensor) -> Tensor:
        u = net.c(x)
        return net.head(F.relu(net.d(F.relu(net.bn(u * torch.sigmoid(u.mean((2, 3), keepdim=True)))))))

    x = images()
    the_same(explained(gated, "srd", x, start="ones")[:1], explained(gated, "srd", x[:1], start="ones"))


@pytest.mark.parametrize("between", [F.relu, lambda u: F.max_pool2d(u, 1)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("srd", {"start": "ones"}),
        ("srd_high", {"level": 0}),
        ("lrp_zplus", {"low": -3.0}),
        ("lrp_gamma", {"low": -3.0}),
    ],
)
def test_an_activation_that_does_nothing_still_lies_between(
    between: Callable[[Tensor], Tensor], name: str, options: dict[str, Any]
) -> None:
    """All that the first image makes is above 0, and of the second nothing is."""

    def net_of(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(net.bn(between(net.c(x))))))

    net = Net(net_of)
    net.c.weight.abs_()
    assert net.c.bias is not None
    net.c.bias.abs_()
    x = images()
    x[1] *= -3
    the_same(explained(net, name, x, **options)[:1], explained(net, name, x[:1], **options))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vectors_of_stacked_maps(dim: int) -> None:
    def apart(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        return net.head(F.relu(net.d(y)) + F.relu(net.e(y)))

    def stacked(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        return net.head(F.relu(torch.stack([net.d(y), net.e(y)], dim)).sum(dim))

    the_same(
        explained(apart, "srd", images(), start="ones"), explained(stacked, "srd", images(), start="ones")
    )


def turned(u: Tensor) -> Tensor:
    return torch.rot90(u, 1, (1, 2))


def gathered(u: Tensor) -> Tensor:
    """(8, 12) by (12, 8): the channels and rows of every column, exchanged."""
    n, c, h, w = u.shape
    index = torch.arange(c * h).view(c, h).t().reshape(1, c * h, 1).expand(n, c * h, w)
    return u.flatten(1, 2).gather(1, index).view(n, h, c, w)


@pytest.mark.parametrize("move", [turned, gathered])
def test_vectors_of_maps_whose_channels_lie_elsewhere(move: Callable[[Tensor], Tensor]) -> None:
    def before(net: Net, x: Tensor) -> Tensor:
        return net.head(back(F.relu(move(net.d(F.relu(net.c(x)))))))

    def after(net: Net, x: Tensor) -> Tensor:
        return net.head(back(move(F.relu(net.d(F.relu(net.c(x)))))))

    def back(u: Tensor) -> Tensor:
        return u.transpose(1, 2)

    the_same(explained(after, "srd", images()), explained(before, "srd", images()))


@pytest.mark.parametrize("name", ["deconvnet", "guided_backprop", "lrp_zplus", "srd"])
def test_sparse_maps_are_refused(name: str) -> None:
    def sparse(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(F.relu(net.c(x)).to_sparse().to_dense())))

    with pytest.raises(Refused, match=r"to_sparse|to_dense"):
        explained(sparse, name, images())


def test_vectors_of_five_axes_that_nothing_is_known_of() -> None:
    def split(net: Net, x: Tensor) -> Tensor:
        u = net.d(F.relu(net.c(x))).unflatten(1, (2, 4)).transpose(1, 2)
        return net.head(F.relu(u).transpose(1, 2).flatten(1, 2))

    with pytest.raises(
        Refused, match=r"^activation 'relu#2' works on a map of which nothing tells .* there, or a method"
    ):
        explained(split, "srd", images(), start="ones")


# --- bends and biases that no list has ------------------------------------------------------------------


@torch.library.custom_op("srd_lab_tests::clipped", mutates_args=())
def clipped(u: Tensor) -> Tensor:
    return u * (u > 0)


def _saved(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _slope(ctx: Any, g: Tensor) -> Tensor:
    out: Tensor = g * (ctx.saved_tensors[0] > 0)
    return out


clipped.register_autograd(_slope, setup_context=_saved)
BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "softsign": F.softsign,
    "an operator of one's own": clipped,
    "foreach": lambda u: torch._foreach_clamp_min([u], 0.0)[0],
    "atan2": lambda u: torch.atan2(u, torch.ones_like(u)),
    "soft_margin": lambda u: F.soft_margin_loss(u, torch.ones_like(u), reduction="none"),
}


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize("name", [*GATED, "fullgrad"])
def test_bends_in_one_call_that_no_list_has_are_refused(bend: str, name: str) -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        return net.head(BENT[bend](net.d(F.relu(net.c(x)))))

    with pytest.raises(Refused, match=r"by another name|no operator of torch's own"):
        explained(how, name, images())


def test_fullgrad_refuses_operators_that_may_have_a_bias() -> None:
    ops = pytest.importorskip("torchvision.ops")

    def deformed(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        offsets = y.new_zeros(len(y), 18, 12, 12)
        return net.head(F.relu(ops.deform_conv2d(y, offsets, net.d.weight, net.d.bias, padding=1)))

    with pytest.raises(Refused, match="no operator of torch's own, and may have a bias"):
        explained(deformed, "fullgrad", images())


@pytest.mark.parametrize("name", ["srd", "lrp_epsilon", *GATED])
def test_a_model_for_batches_of_four_is_asked_with_four(name: str) -> None:
    def hidden(net: Net, x: Tensor) -> Tensor:
        u = net.d(F.relu(net.c(x.view(4, 3, 12, 12))))
        return net.head(torch.stack([u, 0 * u]).amax(0))

    with pytest.raises(Refused, match="by another name"):
        explained(hidden, name, images(4))


def test_maps_taken_off_by_a_tensor_of_minus_one() -> None:
    def off(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        return net.head(F.relu(torch.add(F.relu(net.d(y)), y, alpha=torch.tensor(-1.0))))  # type: ignore[call-overload]

    for name in ("lrp_zplus", "lrp_gamma"):
        with pytest.raises(Refused, match="takes a map off another"):
            explained(off, name, images())


# --- what changes between two explanations ---------------------------------------------------------------


@pytest.mark.parametrize(
    "kept", [dict, lambda **parts: SimpleNamespace(inner=[parts]), lambda **parts: [parts]]
)
def test_settings_in_containers_and_objects_are_asked_again(kept: Callable[..., Any]) -> None:
    def gain_of(settings: Any) -> dict[str, float]:
        found = settings if isinstance(settings, dict) else getattr(settings, "inner", settings)[0]
        assert isinstance(found, dict)
        return found

    def mixed(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        return net.head(F.relu(net.d(y + gain_of(net.settings)["gain"] * y.mean(0, keepdim=True))))

    net = Net(mixed)
    net.settings = kept(gain=0.0)
    explained(net, "gradient", images())
    gain_of(net.settings)["gain"] = 1.0
    with pytest.raises(Refused, match="batch"):
        explained(net, "gradient", images())


def test_draws_do_not_depend_on_the_default_type() -> None:
    x, net = images(), Net(lambda net, x: net.head(F.relu(net.d(F.relu(net.c(x))))))
    before = explained(net, "smoothgrad", x)
    torch.set_default_dtype(torch.float64)
    try:
        the_same(before, explained(net, "smoothgrad", x))
    finally:
        torch.set_default_dtype(torch.float32)


class Magnified(Net):
    """Its logits are small differences of large numbers, which round otherwise for one image than for several."""

    def __init__(self, mixture: float) -> None:
        super().__init__(self.magnified)
        self.c, self.mixture = nn.Conv2d(3, 512, 3), mixture
        weight = torch.randn(5, 512)
        self.fc = nn.Linear(512, 5)
        self.fc.weight = nn.Parameter(weight - weight.mean(1, keepdim=True))
        self.eval().requires_grad_(False)

    @staticmethod
    def magnified(net: Net, x: Tensor) -> Tensor:
        assert isinstance(net, Magnified)
        features = F.relu(net.c(x)).mean((2, 3))
        out: Tensor = net.fc(features + net.mixture * features.mean(0) + 3000)
        return out


def test_rounding_that_a_model_magnifies_is_no_mixture_of_images() -> None:
    x = images(4)
    net = Magnified(0)
    assert far_apart(net(x)[:1], net(x[:1])) > 1e-4  # else this says nothing
    check_images_apart(net, x)
    with pytest.raises(Refused, match="mixes the images of a batch"):
        check_images_apart(Magnified(1e-3), x)
    for name in ("srd", "lrp_epsilon", "gradient", *GATED):  # followed, it may put out something else
        assert explained(net, name, x).isfinite().all()


@pytest.mark.parametrize("wrong", [1e-3, 1e-2])
def test_logits_that_differ_by_more_than_a_model_rounds_are_refused(wrong: float) -> None:
    x, net = images(), Magnified(0)
    same = SameOutput("a test", net, x)
    logits = net(x)
    same.check(logits)
    other = SameOutput("another test", net, x)
    logits[0, 0] += max(wrong, 20 * far_apart(net(x)[:1], net.double()(x.double())[:1])) * logits.abs().max()
    net.float()
    with pytest.raises(Refused, match="when its calls are followed"):
        other.check(logits)


# --- what is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda x: x, Net])
def test_what_is_no_module_is_one_line(model: Any) -> None:
    with pytest.raises(BadInput, match=r"the model must be a torch\.nn\.Module, got"):
        srd_lab.explain(model, images(), method="gradient")


def test_models_without_weights_yet_are_one_line() -> None:
    lazy = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(Refused, match="lazy modules that were never run"):
        srd_lab.explain(lazy.eval(), images(), method="gradient")


@pytest.mark.parametrize("x", [images().to_sparse(), images().to("meta")])
def test_images_without_values_are_one_line(x: Tensor) -> None:
    net = Net(lambda net, x: net.head(F.relu(net.c(x).detach())))
    with pytest.raises(BadInput, match="dense tensor with values"):
        srd_lab.explain(net, x, method="gradient")
