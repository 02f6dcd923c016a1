"""One function written in two ways has one map by every method, or is refused: never two maps without a word."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import normalize

from srd_lab.catalogue import for_any_network
from srd_lab.engine.hidden_activations import check_no_hidden_activation
from srd_lab.errors import Refused, SrdLabWarning
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer

LRP = ("lrp_zplus", "lrp_gamma", "excitation_backprop")  # by modified weights
MODIFIED = {*LRP, "contrastive_excitation"}
DECOMPOSED = {*MODIFIED, "lrp_epsilon", "srd", "srd_high"}  # srd_low goes no way back
CAMS = {"gradcam", "gradcam_pp", "xgradcam", "scorecam", "ablationcam", "layercam_low"}


class Net(nn.Module):
    """Some layers, and a way to call them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.c, self.d = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc, self.bn, self.out = nn.Linear(6, 4), nn.BatchNorm2d(6), nn.Identity()
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias, 0, 0.3)
        nn.init.constant_(self.fc.bias, 1)
        self.way = forward
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


Way = Callable[[Any, Tensor], Any]


@cache
def built(way: Way) -> Net:
    """One network for each way: what is tried once with every model is not tried again with every method."""
    return Net(way)


def head(s: Net, y: Tensor) -> Tensor:
    return s.fc(y.mean((2, 3)))


def plain(s: Net, x: Tensor) -> Tensor:
    return head(s, F.relu(s.d(F.relu(s.c(x)))))


def between(step: Callable[[Net, Tensor], Tensor]) -> Way:
    """A step between the second convolution and its ReLU."""
    return lambda s, x: head(s, F.relu(step(s, s.d(F.relu(s.c(x))))))


def joined(join: Callable[[Tensor, Tensor], Tensor]) -> Way:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = F.relu(s.c(x))
        return head(s, F.relu(join(y, s.d(y))))

    return forward


def normed(norm: Callable[[Net, Tensor], Tensor]) -> Way:
    return lambda s, x: head(s, F.relu(s.d(F.relu(norm(s, s.c(x))))))


def shuffled(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    return t.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


ORDER = torch.arange(6).view(2, 3).t().flatten()


def side(s: Net, x: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, s.c.weight.flip(0), padding=1))


def once(s: Net, x: Tensor) -> Tensor:
    x = (x - 0.5) / 0.25
    return head(s, F.relu(s.d(F.relu(s.c(x)))) + side(s, x))


def each(s: Net, x: Tensor) -> Tensor:
    return head(s, F.relu(s.d(F.relu(s.c((x - 0.5) / 0.25)))) + side(s, (x - 0.5) / 0.25))


def two_stems(s: Net, one: Tensor, other: Tensor) -> Tensor:
    return head(s, F.relu(s.d(F.relu(s.c(one) + F.conv2d(other, s.c.weight.flip(0), padding=1)))))


def in_place(s: Net, x: Tensor) -> Tensor:
    u = s.c(x)
    return head(s, s.d(F.relu_(u)) + u)


def out_of_place(s: Net, x: Tensor) -> Tensor:
    v = F.relu(s.c(x))
    return head(s, s.d(v) + v)


def frozen(s: Net, y: Tensor) -> Tensor:
    norm = FrozenBatchNorm2d(6).double()
    state = {k: v for k, v in s.bn.state_dict().items() if k in norm.state_dict()}
    norm.load_state_dict(state)
    return norm(y)


def by_hand_and_last(s: Net, y: Tensor) -> Tensor:
    scale = s.bn.weight / (s.bn.running_var + s.bn.eps).sqrt()
    return (y.permute(0, 2, 3, 1) * scale + (s.bn.bias - s.bn.running_mean * scale)).permute(0, 3, 1, 2)


def rows(layer: Callable[[Net, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    return lambda s, y: layer(s, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def by_layer(s: Net, t: Tensor) -> Tensor:
    return F.linear(t, s.c.weight[:, :, 0].repeat(1, 1, 2).flatten(1)[:, :6], s.d.bias)


def by_product(s: Net, t: Tensor) -> Tensor:
    return t @ s.c.weight[:, :, 0].repeat(1, 1, 2).flatten(1)[:, :6].T + s.d.bias


def without_bias(s: Net, x: Tensor) -> Tensor:
    return F.conv2d(F.relu(s.c(x)), s.d.weight, None, padding=1)


def everywhere(s: Net, x: Tensor) -> Tensor:
    return s.d.bias.view(1, -1, 1, 1).expand(1, 6, *x.shape[2:])


def pooled_and_normed(fused: bool) -> Way:
    def forward(s: Net, x: Tensor) -> Tensor:
        y, weight, bias = F.relu(s.c(x)).mean((2, 3)), s.d.weight[:, :, 1, 1], s.d.bias
        scale = s.bn.weight / (s.bn.running_var + s.bn.eps).sqrt()
        shift = s.bn.bias - s.bn.running_mean * scale
        if fused:
            return s.fc(F.relu(F.linear(y, weight * scale[:, None], bias * scale + shift)))
        norm = (s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)
        return s.fc(F.relu(F.batch_norm(F.linear(y, weight, bias), *norm)))

    return forward


@cache
def acting(activation: Callable[[Tensor], Tensor]) -> Way:
    return lambda s, x: head(s, activation(s.d(activation(s.c(x)))))


@cache
def behind(activation: Callable[[Tensor], Tensor]) -> Way:
    return lambda s, x: head(s, activation(s.d(F.relu(s.c(x)))))


def tanh_gelu(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * torch.pow(u, 3))))


def tanh_gelu_by_products(u: Tensor) -> Tensor:
    return u * 0.5 * (1 + F.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))


MEANS, DEVIATIONS = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.25]).double()


def at_once(x: Tensor) -> Tensor:
    return (x - MEANS.view(3, 1, 1)) / DEVIATIONS.view(3, 1, 1)


def into_a_buffer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i in range(3):
        out[:, i] = (x[:, i] - MEANS[i]) / DEVIATIONS[i]
    return out


def into_a_copy(x: Tensor) -> Tensor:
    out = x.clone()
    for i in range(3):
        out[:, i] = (out[:, i] - MEANS[i]) / DEVIATIONS[i]
    return out


def in_views(x: Tensor) -> Tensor:
    out = x.clone()
    for i in range(3):
        out[:, i].sub_(MEANS[i]).div_(DEVIATIONS[i])
    return out


def in_the_image(x: Tensor) -> Tensor:
    for i in range(3):
        x[:, i] -= MEANS[i]
        x[:, i] /= DEVIATIONS[i]
    return x


def whole_in_place(x: Tensor) -> Tensor:
    return x.clone().sub_(MEANS.view(3, 1, 1)).div_(DEVIATIONS.view(3, 1, 1))


def concatenated(x: Tensor) -> Tensor:
    return torch.cat([(x[:, i : i + 1] - MEANS[i]) / DEVIATIONS[i] for i in range(3)], 1)


def stacked(x: Tensor) -> Tensor:
    return torch.stack([(x[:, i] - MEANS[i]) / DEVIATIONS[i] for i in range(3)], 1)


def scattered(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(3):
        out = torch.select_scatter(out, (x[:, i] - MEANS[i]) / DEVIATIONS[i], 1, i)
    return out


def in_one_call(x: Tensor) -> Tensor:
    return torch.addcmul(-(MEANS / DEVIATIONS).view(3, 1, 1), x, 1 / DEVIATIONS.view(3, 1, 1))


def by_einsum(x: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nchw", x - MEANS.view(3, 1, 1), 1 / DEVIATIONS)


def by_batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, MEANS, DEVIATIONS**2, eps=0)


def by_torchvision(x: Tensor) -> Tensor:
    return normalize(x, MEANS.tolist(), DEVIATIONS.tolist())


NORMALISING = (
    *(by_batch_norm, by_torchvision, in_one_call, by_einsum),
    *(into_a_buffer, into_a_copy, in_views, in_the_image, whole_in_place, concatenated, stacked, scattered),
)


def gated_copy(u: Tensor) -> Tensor:
    gate, out = torch.sigmoid(u), u.clone()
    out *= gate
    return out


# an activation, and how models write it out
WRITTEN_OUT: dict[str, tuple[Callable[[Tensor], Tensor], list[Callable[[Tensor], Tensor]]]] = {
    "silu": (
        F.silu,
        [
            lambda u: u * torch.sigmoid(u),
            lambda u: u.sigmoid() * u,
            lambda u: u.mul_(u.sigmoid()),
            lambda u: u[:] * u.sigmoid(),
            lambda u: (u.permute(0, 2, 3, 1) * u.permute(0, 2, 3, 1).sigmoid()).permute(0, 3, 1, 2),
            gated_copy,
            lambda u: u / (1 + torch.exp(-u)),
            lambda u: u * (1 / (1 + (-u).exp())),
            lambda u: torch.mul(input=u, other=torch.sigmoid(u)),
        ],
    ),
    "gelu": (
        F.gelu,
        [
            lambda u: 0.5 * u * (1 + torch.erf(u / math.sqrt(2))),
            lambda u: u * 0.5 * (1 + (u * 0.5**0.5).erf_()),
            lambda u: u * torch.special.ndtr(u),
        ],
    ),
    "gelu by tanh": (lambda u: F.gelu(u, approximate="tanh"), [tanh_gelu, tanh_gelu_by_products]),
    "mish": (F.mish, [lambda u: u * torch.tanh(F.softplus(u)), lambda u: u.mul(F.softplus(u).tanh())]),
    "hardswish": (
        F.hardswish,
        [
            lambda u: u * (F.relu6(u + 3, inplace=True) / 6),
            lambda u: u * F.hardsigmoid(u),
            lambda u: u * (torch.clamp(u + 3, 0, 6) / 6),
        ],
    ),
}


# name: two ways, and the methods for which they are two functions
EQUAL: dict[str, tuple[Way, Way, set[str]]] = {
    "stacked": (joined(torch.add), joined(lambda y, z: torch.stack([y, z]).sum(0)), set()),
    "shuffled by views": (between(lambda s, t: t[:, ORDER]), between(lambda s, t: shuffled(t)), set()),
    "shuffled at the end": (
        lambda s, x: head(s, F.relu(s.c(x))[:, ORDER]),
        lambda s, x: head(s, shuffled(F.relu(s.c(x)))),
        set(),
    ),
    "a copy before batch norm": (normed(lambda s, y: s.bn(y)), normed(lambda s, y: s.bn(y.clone())), set()),
    "the same shape again": (normed(lambda s, y: s.bn(y)), normed(lambda s, y: s.bn(y.view(y.shape))), set()),
    "times one": (normed(lambda s, y: s.bn(y)), normed(lambda s, y: s.bn(y * 1)), set()),
    "another memory format": (
        normed(lambda s, y: s.bn(y)),
        normed(lambda s, y: s.bn(y.contiguous(memory_format=torch.channels_last))),
        set(),
    ),
    "frozen batch norm": (normed(lambda s, y: s.bn(y)), normed(frozen), set()),
    **{
        f"{what} before batch norm": (normed(lambda s, y: s.bn(y)), normed(step), apart)
        for what, step, apart in (
            ("a crop of all", lambda s, y: s.bn(y[:, :, : y.shape[2], : y.shape[3]]), set()),
            ("a pad by nothing", lambda s, y: s.bn(F.pad(y, (0, 0, 0, 0))), set()),
            ("there and back", lambda s, y: s.bn(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2)), set()),
            ("halves put together", lambda s, y: s.bn(torch.cat(y.chunk(2, 1), 1)), set()),
        )
    },
    "an instance norm with fixed statistics": (
        normed(lambda s, y: s.bn(y)),
        normed(
            lambda s, y: F.instance_norm(
                *(y, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, False, 0.1, s.bn.eps)
            )
        ),
        set(),
    ),
    "a batch norm by hand, channels last": (
        between(lambda s, t: s.bn(t)),
        between(by_hand_and_last),
        MODIFIED,  # refused, as some of the scales are negative
    ),
    "a linear layer's bias by hand": (between(rows(by_layer)), between(rows(by_product)), set()),
    "a bias by hand": (
        between(lambda s, t: t),
        lambda s, x: head(
            s,
            F.relu(
                F.conv2d(F.relu(s.c(x)), s.d.weight, None, padding=1) + s.d.bias.view(-1, 1, 1),
            ),
        ),
        set(),
    ),
    "a bias by hand, at every place": (
        between(lambda s, t: t),
        lambda s, x: head(s, F.relu(without_bias(s, x) + everywhere(s, x))),
        set(),
    ),
    "twice half a bias": (
        between(lambda s, t: t),
        lambda s, x: head(s, F.relu(torch.add(without_bias(s, x), s.d.bias.view(-1, 1, 1) / 2, alpha=2))),
        set(),
    ),
    "a matrix product": (
        plain,
        lambda s, x: F.relu(s.d(F.relu(s.c(x)))).mean((2, 3)) @ s.fc.weight.T + s.fc.bias,
        {"contrastive_excitation"},  # wants to know the last layer
    ),
    "a linear layer and its batch norm": (
        pooled_and_normed(fused=False),
        pooled_and_normed(fused=True),
        {"srd", "srd_high"},
    ),
    "a linear layer's operator": (
        plain,
        lambda s, x: torch.addmm(s.fc.bias, F.relu(s.d(F.relu(s.c(x)))).mean((2, 3)), s.fc.weight.T),
        set(),
    ),
    "a batch norm's operator": (
        normed(lambda s, y: s.bn(y)),
        normed(
            lambda s, y: torch.batch_norm(
                *(y, s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var, False, 0.1, s.bn.eps, False)
            )
        ),
        set(),
    ),
    "winners' indices": (
        between(lambda s, t: F.max_pool2d(t, 2)),
        between(lambda s, t: F.max_pool2d(t, 2, return_indices=True)[0]),
        set(),
    ),
    "an adaptive pool": (
        between(lambda s, t: F.max_pool2d(t, 2)),
        between(lambda s, t: F.adaptive_max_pool2d(t, (t.shape[2] // 2, t.shape[3] // 2))),
        set(),
    ),
    "a pool over all": (
        lambda s, x: s.fc(F.adaptive_max_pool2d(F.relu(s.c(x)), 1).flatten(1)),
        lambda s, x: s.fc(F.max_pool2d(F.relu(s.c(x)), x.shape[2:]).flatten(1)),
        set(),
    ),
    "read under its old name": (out_of_place, in_place, set()),
    **{
        f"normalised: {norm.__name__}": (
            lambda s, x: plain(s, at_once(x)),
            lambda s, x, norm=norm: plain(s, norm(x)),
            set(),
        )
        for norm in NORMALISING
    },
    "centred": (
        lambda s, x: plain(s, x - x.mean((2, 3), keepdim=True)),
        lambda s, x: plain(s, x + (-x.mean((2, 3), keepdim=True))),
        set(),
    ),
    "a negative image": (
        lambda s, x: plain(s, 1 - x),
        lambda s, x: plain(s, torch.rsub(x, 1)),
        set(),
    ),
}


def maps(way: Way, name: str, x: Tensor) -> Tensor:
    return make_explainer(name, **OPTIONS.get(name, {})).explain(built(way), x, 1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", for_any_network())
@pytest.mark.parametrize("spelling", EQUAL)
def test_two_ways_to_write_a_function_have_one_map(spelling: str, name: str, x: Tensor) -> None:
    one, other, apart = EQUAL[spelling]
    torch.testing.assert_close(built(one)(x.clone()), built(other)(x.clone()))
    if name in apart:
        pytest.skip("a function of its own to this method")
    expected = maps(one, name, x)
    assert expected.any() or name in CAMS
    torch.testing.assert_close(maps(other, name, x), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", for_any_network())
@pytest.mark.parametrize(
    ("kind", "i"), [(kind, i) for kind, (_, others) in WRITTEN_OUT.items() for i in range(len(others))]
)
def test_an_activation_that_is_written_out_has_the_map_of_the_activation(
    kind: str, i: int, name: str, x: Tensor
) -> None:
    one, others = WRITTEN_OUT[kind]
    ways = [acting(one), acting(others[i])]
    torch.testing.assert_close(built(ways[0])(x), built(ways[1])(x))
    if name in MODIFIED:
        for way in ways:
            with pytest.raises(Refused, match="activations that are >= 0"):
                maps(way, name, x)
        return
    # the first call may be an activation within the one that is written out
    level = {"level": -1} if name in ("srd_high", "layercam_high") else {}
    expected, found = (
        make_explainer(name, **OPTIONS.get(name, {}) | level).explain(built(way), x, 1) for way in ways
    )
    assert expected.any() or name in CAMS
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def by_identity(u: Tensor) -> Tensor:
    return F.conv2d(u, torch.eye(u.shape[1], dtype=u.dtype)[:, :, None, None])


def paired(u: Tensor) -> Tensor:
    return torch.stack([u, 0 * u])


# SiLU through calls that are not followed
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda u: (u.flatten(1) * torch.sigmoid(u).flatten(1)).view_as(u),
    "softmax": lambda u: u * torch.stack([u, torch.zeros_like(u)]).softmax(0)[0],
    "einsum": lambda u: torch.einsum("nchw,nchw->nchw", u, torch.sigmoid(u)),
    "einsum turned": lambda u: torch.einsum("nchw,nhwc->nchw", u, torch.sigmoid(u).permute(0, 2, 3, 1)),
    "addcmul": lambda u: torch.addcmul(torch.zeros_like(u), u, torch.sigmoid(u)),
    "addcdiv": lambda u: torch.zeros_like(u).addcdiv(u, 1 + torch.exp(-u)),
    "glu": lambda u: F.glu(torch.cat([u, u], 1), 1),
    "prod": lambda u: torch.stack([u, torch.sigmoid(u)]).prod(0),
    "prod by name": lambda u: torch.stack([u, torch.sigmoid(u)], 1).prod(dim=1),
    "identity": lambda u: u * torch.sigmoid(by_identity(u)),
    "mirrored": lambda u: (u.flip(3) * torch.sigmoid(u).flip(3)).flip(3),
    "one axis more": lambda u: (u[None] * u.sigmoid())[0],
    "stacked": lambda u: (paired(u) * paired(u).softmax(0)).sum(0),
    "lerp": lambda u: torch.lerp(torch.zeros_like(u), u, u.flatten(1).sigmoid().view_as(u)),
    "matrices": lambda u: (u.reshape(-1, 1, 1) @ u.sigmoid().reshape(-1, 1, 1)).view_as(u),
    "diagonal": lambda u: (u.unsqueeze(-2) @ torch.diag_embed(u.sigmoid())).squeeze(-2),
    "einsum of one": lambda u: torch.einsum("nchwk,nchwk->nchw", u[..., None], u.sigmoid()[..., None]),
    "cumprod": lambda u: torch.stack([u, u.sigmoid()]).cumprod(0)[1],
    "logits": lambda u: (
        u * torch.exp(-F.binary_cross_entropy_with_logits(u, torch.ones_like(u), reduction="none"))
    ),
    "shifted": lambda u: (u + 0.0) * (torch.cat([u[:, :3], u[:, 3:]], 1).sigmoid()),
}


# and ReLU
CHOSEN: dict[str, Callable[[Tensor], Tensor]] = {
    "masked": lambda u: (u.flatten(1) * (u > 0).flatten(1).to(u)).view_as(u),
    "filled": lambda u: u.flatten(1).masked_fill(u.flatten(1) < 0, 0).view_as(u),
    "where": lambda u: torch.where(u.flatten(1) > 0, u.flatten(1), 0).view_as(u),
    "largest": lambda u: paired(u).amax(0),
    "sorted": lambda u: paired(u).sort(0).values[1],
    "sorted and turned": lambda u: (paired(u).sort(0).values * 1).flip(0)[0],
    "sorted and moved": lambda u: paired(u).sort(0).values.transpose(2, 3)[1].transpose(1, 2).contiguous(),
    "pooled": lambda u: F.max_pool2d(torch.stack([u, 0 * u], -1).flatten(3), (1, 2)),
    "half and half": lambda u: (u + torch.stack([u, -u]).amax(0)) / 2,
    "rounded gate": lambda u: u * torch.round(torch.sigmoid(u)),
    "lower gate": lambda u: u * torch.floor(torch.sigmoid(u) + 0.5),
    "sign of a gate": lambda u: u * (torch.sign(torch.sigmoid(u) - 0.5) + 1) / 2,
    "remainder": lambda u: u * (torch.sigmoid(u) + 0.5 - torch.fmod(torch.sigmoid(u) + 0.5, 1)),
    "steep gate": lambda u: u * (1e9 * (torch.sigmoid(u) - 0.5)).clamp(0, 1),
    "steep choice": lambda u: u * torch.stack([1e9 * u, 0 * u]).softmax(0)[0],
    "norm of one": lambda u: (u + torch.linalg.vector_norm(torch.stack([u, 0 * u]), dim=0)) / 2,
    "distances": lambda u: (u + torch.cdist(u.reshape(-1, 1, 1), 0 * u.reshape(-1, 1, 1)).view_as(u)) / 2,
    "absolute errors": lambda u: (u + F.l1_loss(u, 0 * u, reduction="none")) / 2,
    "margins": lambda u: F.margin_ranking_loss(-u, 0 * u, torch.ones_like(u), reduction="none"),
    "scattered": lambda u: (
        (0 * u).flatten().scatter_reduce(0, torch.arange(u.numel()), u.flatten(), "amax").view_as(u)
    ),
    "by index": lambda u: (
        (0 * u).flatten().index_reduce(0, torch.arange(u.numel()), u.flatten(), "amax").view_as(u)
    ),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("way", CHOSEN)
@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop"])
def test_a_relu_in_disguise_is_refused(way: str, name: str, x: Tensor) -> None:
    torch.testing.assert_close(CHOSEN[way](x - 0.5), F.relu(x - 0.5), check_stride=False)
    try:
        found = maps(behind(CHOSEN[way]), name, x)
    except Refused:
        return
    assert way == "steep gate"  # an activation that is written out
    torch.testing.assert_close(found, maps(behind(F.relu), name, x), rtol=1e-2, atol=1e-6)


# an activation, and a bent function that no activation call makes: gradients see no difference, other methods would
BENT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda u: 2 * torch.sigmoid(2 * u) - 1),
    "softplus": (F.softplus, lambda u: torch.log1p(torch.exp(u))),
    "softplus as a loss": (F.softplus, lambda u: -F.logsigmoid(-u)),
    "hardtanh": (lambda u: F.hardtanh(u, 0, 1), lambda u: F.hardsigmoid(6 * u - 3)),
    "elu": (F.elu, lambda u: F.relu(u) + torch.exp(-F.relu(-u)) - 1),
    "squared relu": (lambda u: F.relu(u) ** 2, lambda u: u * F.relu(u)),
    "leaky relu": (lambda u: F.leaky_relu(u, 0.25), lambda u: F.relu(u) - 0.25 * F.relu(-u)),
}


@pytest.mark.parametrize("way", BENT)
@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "fullgrad"])
@pytest.mark.parametrize("read", ["by the head", "by a convolution", "by a product"])
def test_a_bend_without_an_activation_call_is_refused(way: str, name: str, read: str, x: Tensor) -> None:
    known, bent = BENT[way]
    torch.testing.assert_close(bent(x - 0.5), known(x - 0.5))
    if way == "leaky relu" and name == "fullgrad":
        pytest.skip("two ReLUs, of which FullGrad's terms are those of the leaky one")

    def forward(s: Net, x: Tensor) -> Tensor:
        y = bent(s.d(F.relu(s.c(x))))
        if read == "by a product":
            return y.mean((2, 3)) @ s.fc.weight.T
        return head(s, F.relu(s.d(y)) if read == "by a convolution" else y)

    with pytest.raises(Refused, match="is an activation by another name"):
        maps(forward, name, x)


@pytest.mark.parametrize("name", ["guided_backprop", "fullgrad"])
def test_gates_and_squares_are_no_activations(name: str, x: Tensor) -> None:
    """Squeeze and excitation, spatial attention, a variance, a response norm."""

    def gated(s: Net, x: Tensor) -> Tensor:
        y = F.relu(s.c(x))
        y = y * torch.sigmoid(y.mean((2, 3)) @ s.d.weight[:, :, 1, 1].T)[:, :, None, None]
        y = y * torch.exp(-y.mean(1, keepdim=True))
        y = y / (1 + (y * y).mean((2, 3), keepdim=True)).sqrt()
        return head(s, F.relu(s.d(y)))

    assert maps(gated, name, x).any()


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "fullgrad"])
@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell"])
def test_activations_inside_of_a_recurrent_cell_are_refused(name: str, cell: str, x: Tensor) -> None:
    made = getattr(nn, cell)(6, 6).double()

    def forward(s: Net, x: Tensor) -> Tensor:
        found = made(F.relu(s.c(x)).mean((2, 3)))
        return s.fc(found[0] if cell == "LSTMCell" else found)

    with pytest.raises(Refused, match="has activations"):
        maps(forward, name, x)


@pytest.mark.parametrize(
    "minus",
    [
        lambda z, y: z - y,
        lambda z, y: torch.add(z, y, alpha=-1),
        lambda z, y: z.index_add(1, torch.arange(6), y, alpha=-1),
        lambda z, y: torch.stack([y, z]).diff(dim=0)[0],
    ],
)
@pytest.mark.parametrize("name", LRP)
def test_a_map_taken_off_another_is_refused_however_it_is_written(
    minus: Callable[[Tensor, Tensor], Tensor], name: str, x: Tensor
) -> None:
    with pytest.raises(Refused, match="takes a map off another"):
        maps(joined(lambda y, z: F.relu(minus(F.relu(z), y))), name, x)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", sorted(DECOMPOSED))
def test_the_operator_of_a_linear_layer_may_be_trained(name: str, trainable: bool, x: Tensor) -> None:
    def operator(s: Net, x: Tensor) -> Tensor:
        return torch.addmm(s.fc.bias, F.relu(s.d(F.relu(s.c(x)))).mean((2, 3)), s.fc.weight.T)

    net = Net(operator).requires_grad_(trainable)
    found = make_explainer(name, **OPTIONS.get(name, {})).explain(net, x, 1).detach()
    torch.testing.assert_close(found, maps(plain, name, x), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "lrp_gamma", "lrp_epsilon", "fullgrad"])
def test_what_was_made_of_parameters_before_the_model_ran_is_a_constant(name: str, x: Tensor) -> None:
    def embedded(embedding: Tensor) -> Tensor:
        net = Net(lambda s, x: head(s, F.relu(s.d(F.relu(s.c(x))) + embedding)))
        return make_explainer(name, **OPTIONS.get(name, {})).explain(net, x, 1).detach()

    learned = nn.Parameter(torch.rand(1, 6, 1, 1, generator=torch.Generator().manual_seed(0), dtype=x.dtype))
    torch.testing.assert_close(embedded(learned * 1), embedded(learned.detach()))


@pytest.mark.parametrize("cut", [Tensor.detach, lambda u: u.data])
@pytest.mark.parametrize("name", [*sorted(DECOMPOSED), "guided_backprop"])
def test_a_map_that_is_changed_through_a_detached_view_is_refused(
    cut: Callable[[Tensor], Tensor], name: str, x: Tensor
) -> None:
    def clamped(u: Tensor) -> Tensor:
        cut(u).clamp_(min=0)
        return u

    with pytest.raises(Refused, match="detached view"):
        maps(behind(clamped), name, x)


@pytest.mark.parametrize(
    "layer",
    {
        "rows of all images": lambda s, t: s.d.bias + t.permute(0, 2, 3, 1).reshape(-1, 6),
        "frames": lambda s, t: F.batch_norm(
            t[:, :, None], s.bn.running_mean, s.bn.running_var, None, s.bn.bias
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_biases_of_other_rows_than_images_are_refused(layer: Any, x: Tensor) -> None:
    """FullGrad left them out of the map."""

    def forward(s: Net, x: Tensor) -> Tensor:
        t = F.relu(s.c(x))
        made = layer[1](s, t)
        back = made[:, :, 0] if made.dim() == 5 else made.view(len(t), *t.shape[2:], 6).permute(0, 3, 1, 2)
        return head(s, F.relu(s.d(F.relu(back))))

    with pytest.raises(Refused, match="expected the batch first"):
        FullGrad().explain(Net(forward), x, 1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_an_activation_in_disguise_is_found_at_any_scale(scale: float, x: Tensor) -> None:
    net = Net(lambda s, x: head(s, HIDDEN["softmax"](scale * s.d(F.relu(s.c(x)))))).float()
    with pytest.raises(Refused, match="is an activation by another name"):
        check_no_hidden_activation(net, x.float())


@pytest.mark.parametrize("way", HIDDEN)
@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "guided_backprop"])
def test_an_activation_in_disguise_is_refused(way: str, name: str, x: Tensor) -> None:
    torch.testing.assert_close(HIDDEN[way](x), F.silu(x))
    with pytest.raises(Refused, match="is an activation by another name"):
        maps(behind(HIDDEN[way]), name, x)


def test_biases_of_single_images_are_refused(x: Tensor) -> None:
    """FullGrad left them out, as it does what has no place."""
    by_image: Way = lambda s, x: head(s, torch.stack([F.gelu(v) for v in s.d(F.gelu(s.c(x)))]))  # noqa: E731
    with pytest.raises(Refused, match="expected the batch first"):
        maps(by_image, "fullgrad", x)


def deviations(u: Tensor) -> Tensor:
    return ((u - u.mean(1, keepdim=True)) * (u - u.mean(1, keepdim=True))).mean(1, keepdim=True)


def responses(u: Tensor) -> Tensor:
    """ConvNeXt V2's global response normalisation: one mean per image."""
    norm = u.norm(p=2, dim=(2, 3), keepdim=True)
    return u + u * (norm / (norm.mean(1, keepdim=True) + 1e-6))


# products that are no activations
PRODUCTS: dict[str, Way] = {
    "channels": lambda s, u: u * s.d(u.mean((2, 3), keepdim=True)).sigmoid(),
    "places": lambda s, u: u * u.mean(1, keepdim=True).sigmoid(),
    "large kernel": lambda s, u: u * s.d(u).sigmoid(),
    "gated linear unit": lambda s, u: F.glu(torch.cat([s.d(u), s.c(u[:, :3])], 1), 1),
    "halves": lambda s, u: torch.cat([u[:, :3] * u[:, 3:].sigmoid(), u[:, 3:]], 1),
    "square": lambda s, u: u * u,
    "cube": lambda s, u: u * u * u,
    "maxout": lambda s, u: torch.stack([s.d(u), s.c(u[:, :3])]).amax(0),
    "largest neighbour": lambda s, u: F.max_pool3d(u[:, None], (1, 3, 3), 1, (0, 1, 1))[:, 0],
    "sorted channels": lambda s, u: u.sort(1).values,
    "highway": lambda s, u: s.d(u).sigmoid() * u + (1 - s.d(u).sigmoid()) * s.c(u[:, :3]),
    "layer norm": lambda s, u: (u - u.mean(1, keepdim=True)) * torch.rsqrt(deviations(u) + 1e-3),
    "neighbours": lambda s, u: u * u.roll(1, 3).sigmoid(),
    "norms of the response, twice": lambda s, u: responses(s.d(responses(u))),
    "one place": lambda s, u: F.adaptive_avg_pool2d(u, 1) * s.d(F.adaptive_avg_pool2d(u, 1)).sigmoid(),
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_other_products_are_no_activations(way: str, x: Tensor) -> None:
    net = Net(lambda s, x: head(s, PRODUCTS[way](s, F.relu(s.c(x)))))
    check_no_hidden_activation(net, x)
    assert net(x).isfinite().all()  # an error of the network would have passed for "nothing found"


SUMS: list[Callable[[Tensor], Tensor]] = [
    lambda u: u - u * torch.sigmoid(-u),
    lambda u: u + u * (u.sigmoid() - 1),
    lambda u: 0.5 * (u + u * torch.erf(u / math.sqrt(2))),
]


@pytest.mark.parametrize("name", ["srd", "lrp_epsilon", "guided_backprop", "deconvnet"])
@pytest.mark.parametrize("sum_", SUMS)
def test_an_activation_that_is_written_as_a_sum_is_refused(
    sum_: Callable[[Tensor], Tensor], name: str, x: Tensor
) -> None:
    """As a residual of the map and what gates it, it would have another map."""
    with pytest.raises(Refused, match="is an activation by another name"):
        maps(acting(sum_), name, x)


def test_stacked_colours_are_an_image(x: Tensor) -> None:
    """Not a map of colours by columns, in which "high" would be looked for."""
    colours = [
        maps(way, "layercam_low", x)
        for way in (plain, lambda s, x: plain(s, torch.stack([x[:, i] for i in range(3)], 1)))
    ]
    torch.testing.assert_close(*colours)
    with pytest.warns(SrdLabWarning):
        found = [
            make_explainer("srd_high").explain(Net(way), x, 1)
            for way in (plain, lambda s, x: plain(s, torch.stack([x[:, i] for i in range(3)], 1)))
        ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "step",
    [
        lambda s, u: u * torch.sigmoid(u.mean(1, keepdim=True)),  # of all channels
        lambda s, u: u * torch.sigmoid(u.roll(1, 2)),
        lambda s, u: u * torch.sigmoid(s.d(u)),
    ],
)
def test_a_gate_of_anything_else_stays_a_factor(step: Callable[[Net, Tensor], Tensor], x: Tensor) -> None:
    """SRD: relevance goes through the map alone; as an activation it would not be the plain product of values and signal."""

    class Frozen(nn.Module):
        """The same network with the gate's values given."""

        def __init__(self, network: Net, gate: Tensor) -> None:
            super().__init__()
            self.network, self.gate = network, gate

        def forward(self, x: Tensor) -> Tensor:
            s = self.network
            return head(s, F.relu(s.d(F.relu(s.c(x) * self.gate))))

    network = Net(lambda s, x: head(s, F.relu(s.d(F.relu(step(s, s.c(x)))))))
    u = network.c(x)
    explainer = make_explainer("srd", start="ones")
    gate = step(network, u) / u
    torch.testing.assert_close(
        explainer.explain(network, x, 1), explainer.explain(Frozen(network, gate), x, 1)
    )


@pytest.mark.parametrize("name", [*sorted(MODIFIED), "lrp_epsilon"])
@pytest.mark.parametrize("front", [lambda x: x, at_once])
def test_a_first_layer_is_one_however_it_is_written(
    front: Callable[[Tensor], Tensor], name: str, x: Tensor
) -> None:
    """A convolution as large as the image, a linear layer and a matrix product: z^B for all of them."""

    class First(nn.Module):
        def __init__(self, layer: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.fc = nn.Conv2d(3, 16, (8, 10)), nn.Linear(16, 16), nn.Linear(16, 5)
            self.layer = layer
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.b(F.relu(self.layer(self.a, front(x))))))

    def explained(layer: Callable[[nn.Conv2d, Tensor], Tensor]) -> Tensor:
        return make_explainer(name, **OPTIONS.get(name, {})).explain(First(layer), x, 1)

    expected = explained(lambda a, x: a(x).flatten(1))
    assert expected.any()
    for layer in (
        lambda a, x: F.linear(x.flatten(1), a.weight.flatten(1), a.bias),
        lambda a, x: x.flatten(1) @ a.weight.flatten(1).T + a.bias,
        lambda a, x: torch.einsum("nchw,ochw->no", x, a.weight) + a.bias,
    ):
        torch.testing.assert_close(explained(layer), expected, rtol=1e-7, atol=1e-10)


def test_a_second_normalisation_brings_relevance_back_to_the_image(x: Tensor) -> None:
    """With one, relevance refers to what it puts out; conserved are both."""

    def norm(x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25

    stems = (
        lambda s, x: two_stems(s, *[norm(x)] * 2),
        lambda s, x: two_stems(s, norm(x), norm(x)),
    )
    for one, other in ((once, each), stems):
        for name in ("srd", "lrp_epsilon"):
            totals = [maps(way, name, x).sum((1, 2)) for way in (one, other)]
            assert totals[0].all()
            torch.testing.assert_close(*totals)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * (x > 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0] > 0)


def sliced(y: Tensor, z: Tensor) -> Tensor:
    z[:, :3] += y[:, :3]
    z[:, 3:] += y[:, 3:]
    return z


def viewed(y: Tensor, z: Tensor) -> Tensor:
    z[:, :3].add_(y[:, :3])
    return z


def buffered(y: Tensor, z: Tensor) -> Tensor:
    whole = torch.empty_like(y)
    whole[:] = z
    return whole + y


def apart(s: Net, x: Tensor) -> Tensor:
    a, b = F.relu(s.c(x)[:, :3]), F.relu(F.conv2d(x, s.c.weight[3:], padding=1))
    return s.fc(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))


# name: a way, who refuses it, and what is said
REFUSED: dict[str, tuple[Way, set[str], str]] = {
    "largest of two": (between(lambda s, t: torch.max(t, 0 * t)), DECOMPOSED, "torch.max in"),
    "masked": (
        between(lambda s, t: t.masked_fill(t < 0, 0)),
        DECOMPOSED,
        "(chooses by a comparison of maps|is an activation by another name)",
    ),
    "where": (
        between(lambda s, t: torch.where(t > 0, t, 0)),
        DECOMPOSED,
        "(chooses by a comparison of maps|is an activation by another name)",
    ),
    "times": (
        between(lambda s, t: t * (t > 0).double()),
        DECOMPOSED,
        "(chooses by a comparison of maps|is an activation by another name)",
    ),
    "an operator": (between(lambda s, t: torch.ops.aten.sin(t)), DECOMPOSED, "torch.sin in"),
    "logaddexp": (between(lambda s, t: torch.logaddexp(t, 0 * t)), DECOMPOSED, "torch.logaddexp in"),
    "a method": (
        between(lambda s, t: (t.abs() + 1).log2()),
        DECOMPOSED,
        "is neither affine nor an activation",
    ),
    "in place": (between(lambda s, t: (t + 9).log2_()), DECOMPOSED, "is neither affine nor an activation"),
    "a function of one's own": (
        between(lambda s, t: Own.apply(t)),
        DECOMPOSED,
        "an autograd function of its own",
    ),
    "one over a map": (between(lambda s, t: 1 / (t + 9)), DECOMPOSED, "is neither affine nor an activation"),
    "slices": (joined(sliced), MODIFIED, "writes into a part of a tensor"),
    "a view": (joined(viewed), MODIFIED, "reads a tensor of which a part was overwritten"),
    "a buffer": (joined(buffered), MODIFIED, "writes into a part of a tensor"),
    "a difference": (joined(lambda y, z: z - y), MODIFIED, "takes a map off another"),
    "a turned sign": (
        lambda s, x: -F.linear(F.relu(s.d(F.relu(s.c(x)))).mean((2, 3)), -s.fc.weight, -s.fc.bias),
        MODIFIED,
        "turns the sign of a map|ends in a linear layer",
    ),
    "branches": (apart, {*CAMS, "srd", "srd_low"}, "several maps are pooled, each by itself"),
    "logits among others": (lambda s, x: (None, plain(s, x)), set(for_any_network()), "must be logits"),
    "recomputation": (
        lambda s, x: head(s, F.relu(checkpoint(s.d, F.relu(s.c(x)), use_reentrant=False))),
        {"srd", "srd_low", "lrp_zplus", "lrp_epsilon"},
        "'d' is checkpointed",
    ),
}


@pytest.mark.parametrize(
    ("way", "name"), [(way, name) for way in REFUSED for name in sorted(REFUSED[way][1])]
)
def test_what_cannot_be_followed_is_refused(way: str, name: str, x: Tensor) -> None:
    forward, _, why = REFUSED[way]
    with pytest.raises(Refused, match=why):
        maps(forward, name, x)


@pytest.mark.parametrize("name", ["gradcam", "layercam_low", "ablationcam"])
@pytest.mark.parametrize(
    "step",
    [
        lambda s, y: y + F.conv2d(y.mean((2, 3), keepdim=True), s.d.weight[:, :, :1, :1]),
        lambda s, y: y * torch.sigmoid(F.conv2d(y.mean((2, 3), keepdim=True), s.d.weight[:, :, :1, :1])),
    ],
    ids=["context", "gate"],
)
def test_the_encoder_ends_behind_a_gate(step: Callable[[Net, Tensor], Tensor], name: str, x: Tensor) -> None:
    net = Net(lambda s, x: head(s, s.out(step(s, F.relu(s.c(x))))))
    expected = make_explainer(name, encoder="out").explain(net, x, 1)
    assert expected.any()
    torch.testing.assert_close(make_explainer(name).explain(net, x, 1), expected)


@pytest.mark.parametrize("asks", [False, True])
def test_activations_of_parameters_are_no_biases(asks: bool, x: Tensor) -> None:
    net = Net(lambda s, x: head(s, F.relu(s.d(F.relu(s.c(x)))) * torch.tanh(s.out.g)))
    net.out.g = nn.Parameter(torch.linspace(0.1, 1, 6).double().view(1, 6, 1, 1), requires_grad=asks)
    torch.testing.assert_close(FullGrad().terms(net, x, 1).sum(1), net(x)[:, 1])


def test_biases_by_hand_are_biases_in_place_too(x: Tensor) -> None:
    def shifted(s: Net, y: Tensor) -> Tensor:
        y += 0.3
        y.sub_(torch.ones(6, 1, 1).double())
        return y

    net = Net(between(shifted))
    torch.testing.assert_close(FullGrad().terms(net, x, 1).sum(1), net(x)[:, 1])


def test_what_differs_from_place_to_place_is_no_bias(x: Tensor) -> None:
    """The position biases of windows, say, of which an image has several."""

    def windows(s: Net, y: Tensor) -> Tensor:
        parts = y.reshape(-1, 6, 4, y.shape[3])
        return (parts + torch.arange(4.0).double().view(4, 1)).reshape(y.shape)

    assert FullGrad().explain(Net(between(windows)), x, 1).shape == (2, 8, 10)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_whole_classifier_are_refused(register: str, x: Tensor) -> None:
    model = Classifier(Net(plain), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double().eval()
    getattr(model, register)(lambda *_: None)
    with pytest.raises(Refused, match=r"put them on model\.network"):
        make_explainer("gradient").explain(model, x, 1)


def test_any_other_model_is_run_as_a_whole(x: Tensor) -> None:
    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise, self.network = nn.Identity(), Net(plain)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(self.normalise(x.flip(-1))) / 4

    model, leaf = Mirrored(), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(make_explainer("gradient").explain(model, x, 1), expected.abs().sum(1))


def test_threads_leave_the_switches_of_attention_as_they_were(x: Tensor) -> None:
    """The first thread that comes in goes first, while the second is still there."""
    inside, leave = threading.Barrier(2), threading.Event()
    cuda = torch.backends.cuda

    def waits(s: Net, x: Tensor) -> Tensor:
        if threading.current_thread().name in ("first", "second"):
            inside.wait(10)
        if threading.current_thread().name == "second":
            leave.wait(10)
        return plain(s, x)

    net = Net(waits)
    make_explainer("gradient").explain(net, x, 1)  # a model is tried out when it is first explained
    first, second = (
        threading.Thread(name=name, target=make_explainer("gradient").explain, args=(net, x, 1))
        for name in ("first", "second")
    )
    first.start()
    second.start()
    first.join()
    assert not cuda.flash_sdp_enabled()  # the second is still at it
    leave.set()
    second.join()
    assert cuda.flash_sdp_enabled()
    assert cuda.mem_efficient_sdp_enabled()
    assert cuda.cudnn_sdp_enabled()
    assert cuda.math_sdp_enabled()
