"""Odd ways to lay maps out, to end an encoder and to write a norm: each has the map of the plain way, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_arrangements import Forward, Net, explained, images, the_same
from torch import Tensor, nn

from srd_lab.engine.layers import call_index
from srd_lab.engine.model_memory import _state_and_weights, memory_of, trained
from srd_lab.engine.spellings import Call
from srd_lab.errors import BadInput, BadValue, Refused
from srd_lab.registry import make_explainer

GENERATOR = torch.Generator().manual_seed(5)
MEAN, SHIFT, SHIFT_2 = (0.4 * torch.randn(8, generator=GENERATOR) for _ in range(3))
VARIANCE, SCALE, SCALE_2 = (torch.rand(8, generator=GENERATOR) + 0.5 for _ in range(3))


def wide(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def read(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.c(x))


def four(net: Net, y: Tensor) -> Tensor:
    """Logits of a map of four channels."""
    return net.fc(F.pad(y.mean((2, 3)), (0, 4)))


# --- where channels lie ------------------------------------------------------------------------------------


def pairs_of_channels(net: Net, x: Tensor) -> Tensor:
    y = net.d(read(net, x))
    return F.relu((y[:, ::2] + y[:, 1::2]) / 2)


VECTORS: dict[str, tuple[Forward, Forward]] = {
    "rows": (
        lambda net, x: net.fc(F.relu(net.d(read(net, x)).mean(3)).mean(2)),
        lambda net, x: net.head(F.relu(net.d(read(net, x)).mean(3, keepdim=True))),
    ),
    "pairs": (
        lambda net, x: four(net, F.relu(net.d(read(net, x)).unflatten(1, (4, 2)).mean(2))),
        lambda net, x: four(net, pairs_of_channels(net, x)),
    ),
    "pairs, channels last": (
        lambda net, x: four(
            net,
            F.relu(net.d(read(net, x)).permute(0, 2, 3, 1).unflatten(3, (4, 2)).mean(4)).permute(0, 3, 1, 2),
        ),
        lambda net, x: four(net, pairs_of_channels(net, x)),
    ),
    "a product by ones": (
        lambda net, x: net.head(
            F.relu(torch.stack([net.d(read(net, x)), net.e(read(net, x))], -1) @ torch.ones(2))
        ),
        lambda net, x: net.head(F.relu(net.d(read(net, x)) + net.e(read(net, x)))),
    ),
    "windows": (
        lambda net, x: net.head(F.relu(F.unfold(net.d(read(net, x)), 1).view(len(x), 8, 1, 144).mean(2))[..., None]),
        lambda net, x: net.head(F.relu(F.unfold(net.d(read(net, x)), 1))[..., None]),
    ),
    "one channel": (
        lambda net, x: net.head(F.relu(net.d(read(net, x)).movedim(1, -1) @ -SCALE)[:, None].expand(-1, 8, -1, -1)),
        lambda net, x: net.head(
            F.relu((net.d(read(net, x)) * wide(-SCALE)).sum(1, keepdim=True)).expand(-1, 8, -1, -1)
        ),
    ),
    "a layer by hand": (
        lambda net, x: net.head(F.relu((net.d(read(net, x))[:, None] * net.e.weight[:, :, :1, :1]).sum(2))),
        lambda net, x: net.head(F.relu(F.conv2d(net.d(read(net, x)), net.e.weight[:, :, :1, :1]))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VECTORS)
def test_vectors_run_along_channels_wherever_these_lie(case: str) -> None:
    odd, plain = VECTORS[case]
    the_same(explained(odd, "srd", images(), start="ones"), explained(plain, "srd", images(), start="ones"))


def test_vectors_along_what_may_be_places_or_channels_are_refused() -> None:
    def spread(net: Net, x: Tensor) -> Tensor:
        weights = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
        y = F.relu(net.d(read(net, x)).mean((2, 3), keepdim=True) * weights)
        return net.head(F.relu(net.e(y)))

    with pytest.raises(Refused, match="of which nothing tells along which axis the vectors of SRD lie"):
        explained(spread, "srd", images(), start="ones")


# --- where the encoder ends --------------------------------------------------------------------------------


class Headed(Net):
    """With a last layer as large as the map."""

    def __init__(self, how: Forward) -> None:
        super().__init__(how)
        torch.manual_seed(2)
        self.whole = nn.Conv2d(8, 5, 12).requires_grad_(False).eval()


ENDS: dict[str, tuple[Forward, Forward]] = {
    "along one axis, then along the other": (
        lambda net, y: net.fc(y.mean(3, keepdim=True).mean(2, keepdim=True).flatten(1)),
        lambda net, y: net.head(y),
    ),
    "by strips": (
        lambda net, y: net.fc(F.avg_pool2d(F.avg_pool2d(y, (1, 12)), (12, 1)).flatten(1)),
        lambda net, y: net.head(y),
    ),
    "by name": (
        lambda net, y: net.fc(F.avg_pool2d(input=y, kernel_size=12).flatten(1)),
        lambda net, y: net.head(y),
    ),
    "a convolution as large as the map": (
        lambda net, y: net.whole(y).flatten(1),
        lambda net, y: F.linear(y.flatten(1), net.whole.weight.flatten(1), net.whole.bias),
    ),
}


@pytest.mark.parametrize("name", ["gradcam", "layercam_low", "srd_low", "srd"])
@pytest.mark.parametrize("case", ENDS)
def test_the_encoder_ends_where_pooling_begins(case: str, name: str) -> None:
    def made(head: Forward) -> Headed:
        return Headed(lambda net, x: head(net, F.relu(net.d(read(net, x)))))

    odd, plain = (explained(made(head), name, images()) for head in ENDS[case])
    assert odd.shape[1:] == (12, 12)
    the_same(odd, plain)


@pytest.mark.parametrize("name", ["gradcam", "srd_low", "srd"])
def test_a_head_that_has_no_part_in_the_logits_does_not_count(name: str) -> None:
    """Deep supervision: the second output is that of an earlier map, pooled last."""

    def trained_twice(net: Net, x: Tensor) -> Any:
        early = read(net, x)
        main = net.head(F.relu(net.d(early)))
        return main, net.fc(early.mean((2, 3)) * 2)

    def once(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(read(net, x))))

    the_same(explained(trained_twice, name, images()), explained(once, name, images()))


def test_an_encoder_that_einsum_pools() -> None:
    by_letters = Net(lambda net, x: net.fc(torch.einsum("nchw->nc", read(net, x)) / 144))
    by_mean = Net(lambda net, x: net.head(read(net, x)))
    for name in ("gradcam", "srd"):
        the_same(explained(by_letters, name, images()), explained(by_mean, name, images()))


# --- what is remembered ------------------------------------------------------------------------------------


class Ordered(Net):
    """Rows of the map in the order of a buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__(lambda net, x: net.head(F.relu(net.d(read(net, x)))[:, :, net.order]))
        self.register_buffer("order", torch.arange(12))


@pytest.mark.parametrize("name", ["gradcam", "layercam_low", "excitation_backprop"])
def test_maps_are_asked_again_where_a_buffer_moves_them(name: str) -> None:
    net, options = Ordered(), {"level": 1} if name.startswith("exc") else {}
    net.how = lambda net, x: net.head(F.relu(net.d(read(net, x)[:, :, net.order])))
    assert explained(net, name, images(), **options).any()
    net.order.copy_(torch.arange(11, -1, -1))
    with pytest.raises(Refused, match="not known to be those of the image"):
        explained(net, name, images(), **options)


def test_a_bend_that_weights_make_later_is_found() -> None:
    net = Net(lambda net, x: net.head(net.bend(net.d(read(net, x)))))
    net.beta = nn.Parameter(torch.zeros(()))
    net.bend = lambda u: u.flatten(1).mul((net.beta * u).flatten(1).unsqueeze(0).sigmoid()[0]).view_as(u)
    assert explained(net, "guided_backprop", images()).any()
    with torch.no_grad():
        net.beta.fill_(1.5)
    with pytest.raises(Refused, match="an activation by another name"):
        explained(net, "guided_backprop", images())


def test_every_number_in_dictionaries_is_told_and_told_alike() -> None:
    """Pairs of a dictionary are made for the look, and one had the id of the next."""
    net = Net(lambda net, x: net.head(read(net, x)))
    net.info = [{"channels": i, "stride": 2 * i, "name": f"layer{i}"} for i in range(5)]
    states = [_state_and_weights(net) for _ in range(3)]
    assert states[0] == states[1] == states[2]
    for i in range(5):
        for key in ("channels", "stride", "name"):
            kept, net.info[i][key] = net.info[i][key], "other"
            assert _state_and_weights(net) != states[0], (i, key)
            net.info[i][key] = kept
    assert _state_and_weights(net) == states[0]


def test_training_forgets_nothing() -> None:
    net = Net(lambda net, x: net.head(read(net, x)))
    with trained(net):
        known = memory_of(net)
        net.fc.weight.add_(1)
        assert memory_of(net) is known
    assert memory_of(net) is not known


def test_an_activation_on_a_parameter_counts_for_nobody() -> None:
    """Which call a level names is counted by one and looked up by another."""

    def flipped(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(F.relu(net.c(x)).flip(2))) * F.softplus(net.gain))

    net = Net(flipped)
    net.gain = nn.Parameter(torch.ones(()))
    assert explained(net, "excitation_backprop", images(), level=0).any()
    with pytest.raises(Refused, match="not known to be those of the image"):
        explained(net, "excitation_backprop", images(), level=1)


# --- norms and shifts --------------------------------------------------------------------------------------


def normed(net: Net, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(net.d(read(net, x)), MEAN, VARIANCE, scale, shift)


NORMS: dict[str, tuple[Forward, Forward]] = {
    "scale and shift apart": (
        lambda net, x: F.batch_norm(net.d(read(net, x)), MEAN, VARIANCE) * wide(SCALE) + wide(SHIFT),
        lambda net, x: normed(net, x, SCALE, SHIFT),
    ),
    "shift apart": (
        lambda net, x: normed(net, x, SCALE, torch.zeros(8)) + wide(SHIFT),
        lambda net, x: normed(net, x, SCALE, SHIFT),
    ),
    "two norms": (
        lambda net, x: F.batch_norm(
            normed(net, x, SCALE, SHIFT), torch.zeros(8), torch.ones(8) - 1e-5, SCALE_2, SHIFT_2
        ),
        lambda net, x: normed(net, x, SCALE * SCALE_2, SHIFT * SCALE_2 + SHIFT_2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "lrp_gamma", "lrp_epsilon", "excitation_backprop"])
@pytest.mark.parametrize("case", NORMS)
def test_norms_in_several_calls_are_one(case: str, name: str) -> None:
    options: dict[str, Any] = {"srd": {"start": "ones"}, "excitation_backprop": {"level": 0}}.get(name, {})
    odd, plain = (
        explained(lambda net, x, u=u: net.head(F.relu(u(net, x))), name, images(), **options)
        for u in NORMS[case]
    )
    the_same(odd, plain)


JOINED: dict[str, tuple[Forward, Forward]] = {
    "side by side": (
        lambda net, x: F.conv2d(
            torch.cat([read(net, x), x], 1), torch.cat([net.d.weight, net.c.weight], 1), net.d.bias, padding=1
        ),
        lambda net, x: F.conv2d(read(net, x), net.d.weight, padding=1)
            + F.conv2d(x, net.c.weight, net.d.bias, padding=1),
    ),
    "added up": (
        lambda net, x: net.c(x + read(net, x)[:, :3]),
        lambda net, x: net.c(x) + F.conv2d(read(net, x)[:, :3], net.c.weight, padding=1),
    ),
    "the mean of both": (
        lambda net, x: net.c(torch.stack([x, read(net, x)[:, :3]]).mean(0)),
        lambda net, x: (F.conv2d(x, net.c.weight / 2, net.c.bias, padding=1)
            + F.conv2d(read(net, x)[:, :3], net.c.weight / 2, padding=1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["lrp_zplus", "lrp_gamma", "excitation_backprop"])
@pytest.mark.parametrize("case", JOINED)
def test_a_layer_that_reads_the_image_beside_activations_is_two_layers(case: str, name: str) -> None:
    """z^B for what is the image's, and the rule for activations for the rest."""
    options: dict[str, Any] = {"level": "input"} if name.startswith("exc") else {}
    one, two = (
        explained(lambda net, x, u=u: net.head(F.relu(u(net, x))), name, images(), low=-0.3, **options)
        for u in JOINED[case]
    )
    the_same(one, two)


@pytest.mark.parametrize("name", ["lrp_zplus", "lrp_gamma", "excitation_backprop"])
def test_the_image_beside_what_a_layer_is_not_done_with_is_refused(name: str) -> None:
    def joined(net: Net, x: Tensor) -> Tensor:
        both = torch.cat([net.c(x)[:, :5], x], 1)
        return net.head(F.relu(net.d(both)))

    with pytest.raises(Refused, match="joins the image with what a layer has made before an activation"):
        explained(joined, name, images())


def test_the_image_beside_what_a_layer_makes_of_it() -> None:
    """z+ of ``relu(conv(x) + x)``, by hand: each summand has the relevance that its share of z^B gives it."""

    def residual(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.c(x)[:, :3] + x).repeat(1, 3, 1, 1)[:, :8])

    net, x = Net(residual), images(1).requires_grad_()
    weight, positive = net.c.weight[:3], net.fc.weight[2].clamp_min(0)
    low, high = (torch.full_like(x, end).requires_grad_() for end in (-0.5, 1.0))
    v = F.relu(F.conv2d(x, weight, net.c.bias[:3], padding=1) + x)
    above = v * torch.stack([positive[k::3].sum() for k in range(3)]).view(1, 3, 1, 1)
    of_weights = ((x, weight), (low, -weight.clamp_min(0)), (high, -weight.clamp_max(0)))
    below = torch.stack([F.conv2d(t, w, padding=1) for t, w in of_weights]).sum(0) + x - low
    signal = torch.where(v > 0, above / above.sum() / below, 0).detach()
    slopes = torch.autograd.grad(below, [x, low, high], signal)
    by_hand = sum((t * slope).sum(1) for t, slope in zip((x, low, high), slopes, strict=True))
    by_hand = (by_hand * net(x)[0, 2]).detach()
    the_same(explained(net, "lrp_zplus", images(1), low=-0.5), by_hand)


def added(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.d(read(net, x))).mean((2, 3))
    return net.fc.bias.expand(len(x), -1).clone().addmm_(y, net.fc.weight.t())


@pytest.mark.parametrize("name", ["lrp_zplus", "lrp_gamma"])
def test_layers_in_place_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="is a layer or a pool of its own"):
        explained(added, name, images())


@pytest.mark.filterwarnings("ignore:This overload of add")
@pytest.mark.parametrize("name", ["lrp_zplus", "lrp_gamma"])
def test_differences_in_an_old_spelling_are_refused(name: str) -> None:
    def differing(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(torch.add(net.d(read(net, x)), -1, net.e(read(net, x)))))

    with pytest.raises(Refused, match="takes a map off another"):
        make_explainer(name).explain(Net(differing), images(), 2)


# --- by name, and one image at a time ----------------------------------------------------------------------


def attended(attend: Callable[[Tensor], Tensor], name: str) -> Net:
    """Over tokens (N, T, D); rollouts want (N, heads, T, D)."""
    heads = 1 if name.endswith("rollout") else 0

    def how(net: Net, x: Tensor) -> Tensor:
        tokens = F.avg_pool2d(read(net, x), 4).flatten(2).transpose(1, 2)
        tokens = tokens.unsqueeze(1) if heads else tokens
        tokens = tokens + attend(tokens + 0.3)
        return net.fc((tokens.squeeze(1) if heads else tokens).mean(1))

    return Net(how)


@pytest.mark.parametrize("name", ["fullgrad", "attention_rollout", "attnlrp", "srd"])
def test_attention_is_one_by_name_and_by_place(name: str) -> None:
    options = {"start": "ones"} if name == "srd" else {}
    by_place = attended(lambda t: F.scaled_dot_product_attention(t, t, t), name)
    by_name = attended(lambda t: F.scaled_dot_product_attention(query=t, key=t, value=t), name)
    the_same(explained(by_name, name, images(), **options), explained(by_place, name, images(), **options))


def test_biases_of_tokens_that_lie_nowhere_are_refused() -> None:
    """FullGrad left out, without a word, the biases of tokens of which it did not know where they lie."""

    def read_by(t: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return F.layer_norm(attend(t, F.linear(t, torch.eye(8), SHIFT)), (8,), SCALE, SHIFT_2)

    def turned(t: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ torch.softmax(t @ t.mT * 8**-0.5, -2)).mT

    def plain(t: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(t @ t.mT * 8**-0.5, -1) @ v

    assert explained(attended(lambda t: read_by(t, plain), "fullgrad"), "fullgrad", images()).any()
    with pytest.raises(Refused, match="where in the image they lie"):
        explained(attended(lambda t: read_by(t, turned), "fullgrad"), "fullgrad", images())


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop", "gradcam"])
def test_calls_by_name_are_calls_by_place(name: str) -> None:
    def by_name(net: Net, x: Tensor) -> Tensor:
        y = torch.add(input=net.d(read(net, x)), other=net.e(read(net, x)))
        return net.fc(torch.mean(input=torch.relu(input=y), dim=(2, 3)))

    def by_place(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(read(net, x)) + net.e(read(net, x))))

    the_same(explained(by_name, name, images()), explained(by_place, name, images()))


@pytest.mark.parametrize("level", [0, 1])
def test_what_one_image_takes_other_calls_for_is_not_ablated(level: int) -> None:
    def one_by_one(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(read(net, torch.stack([image * 2 for image in x])))))

    def at_once(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(read(net, x * 2))))

    with pytest.raises(Refused, match="explain one image at a time"):
        explained(one_by_one, "ablationcam", images(), level=level)
    x = images(1)
    the_same(
        explained(one_by_one, "ablationcam", x, level=level),
        explained(at_once, "ablationcam", x, level=level),
    )
    the_same(
        explained(one_by_one, "gradcam", images(4), level=level),
        explained(at_once, "gradcam", images(4), level=level),
    )


@pytest.mark.parametrize("last", [torch.sigmoid, lambda y: y.sigmoid().squeeze(1)])
def test_a_probability_is_no_logit(last: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Refused, match="take the sigmoid off"):
        explained(lambda net, x: last(net.head(read(net, x))[:, :1]), "gradient", images())


@pytest.mark.parametrize(
    "last",
    [
        lambda y: y.sigmoid().clamp(1e-6, 1 - 1e-6),
        lambda y: y.sigmoid() * 1.0,
        lambda y: 1 / (1 + torch.exp(-y)),
        lambda y: (torch.tanh(y / 2) + 1) / 2,
    ],
)
def test_what_looks_like_a_probability_is_no_logit(last: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Refused, match=r"lies in .0, 1. whatever it is fed with"):
        explained(lambda net, x: last(net.head(net.c(x))[:, :1]), "gradient", images())


# --- limits to the pixels, and names of layers -------------------------------------------------------------


@pytest.mark.parametrize("name", ["lrp_zplus", "lrp_gamma", "excitation_backprop"])
@pytest.mark.parametrize("limit", [lambda x: x.clamp(0, 1), F.relu, lambda x: x.clone().relu_()])
def test_a_limit_to_the_pixels_is_no_layer(limit: Callable[[Tensor], Tensor], name: str) -> None:
    def limited(net: Net, x: Tensor) -> Tensor:
        return plain(net, limit(x))

    def plain(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.d(read(net, x))))

    options = {"level": "input"} if name.startswith("exc") else {}
    the_same(explained(limited, name, images(), **options), explained(plain, name, images(), **options))


def test_pixels_outside_of_the_box_are_refused() -> None:
    net = Net(lambda net, x: net.head(read(net, x)))
    with pytest.raises(BadInput, match=r"lie in \[-2.99, .*outside of the pixel box \[0, 1\]"):
        make_explainer("lrp_zplus").explain(net, 6 * images() - 3, 2)
    assert make_explainer("lrp_zplus", low=-3.0, high=3.0).explain(net, 6 * images() - 3, 2).any()


def calls(*names: str) -> list[Call]:
    return [Call(i, name, "relu", F.relu, F.relu) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "layer", "index"),
    [
        (["0.1", "1.0", "1.1"], "1", 2),  # the submodule, and not what ends so
        (["relu", "b.relu", "b.relu#2"], "relu", 0),
        (["b.relu", "b.relu#2", "c.relu"], "b", 1),
        (["net.relu", "net.b.relu", "net.b.relu#2"], "relu", 0),  # in a wrapper
        (["net.relu", "net.b.relu", "net.b.relu#2"], "b", 2),
        (["net.relu", "net.b.relu", "net.b.relu#2"], "b.relu", 1),
        (["net.b.relu", "net.c.relu"], "c.relu", 1),
    ],
)
def test_a_layer_is_named_by_its_call_its_module_and_without_its_wrapper(
    names: list[str], layer: str, index: int
) -> None:
    assert call_index(calls(*names), layer) == index


def test_a_name_of_several_layers_is_refused() -> None:
    with pytest.raises(BadValue, match=r"'relu' may be any of b\.relu, c\.relu; give the whole name"):
        call_index(calls("b.relu", "c.relu"), "relu")
