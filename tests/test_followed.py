"""What a hostile reviewer found: numbers of the model that interception changed, axes and pixels that it did not follow, and
maps that it did not see. Each is right or refused; "right" is the same function written in another way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_refusals import Net, explain, x
from torch import Tensor, nn

from srd_lab.errors import Refused
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer

__all__ = ["x"]  # a fixture

RULES = ("srd", "lrp_zplus", "lrp_gamma", "lrp_epsilon", "excitation_backprop", "fullgrad", "guided_backprop")
pytestmark = pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
Step = Callable[[Net, Tensor], Tensor]


def inside(step: Step) -> Net:
    """A network of positive weights in the head, with ``step`` between its ReLUs."""
    net = Net(lambda s, x: s.head(F.relu(F.conv2d(step(s, F.relu(s.c(x))), s.d.weight.flip(0), padding=1))))
    net.fc.weight.data[1].abs_()
    net.fc.bias.data.fill_(1)
    return net


def before(step: Callable[[Tensor], Tensor]) -> Net:
    """A network that does something with the image first."""
    return Net(lambda s, x: s.head(s.features(step(x) * 2 - 1)))


# --- numbers of the model -------------------------------------------------------------------------


def added_up(s: Net, y: Tensor) -> Tensor:
    total = torch.zeros_like(y)
    for branch in (s.d(y), s.d(y / 2)):
        total += F.relu(branch)
    return total


def scaled_ones(s: Net, y: Tensor) -> Tensor:
    total = torch.ones_like(y)
    total *= y
    return total


def shifted_half(s: Net, y: Tensor) -> Tensor:
    total = torch.full_like(y, 0.5)
    total += y
    return total


IN_PLACE: dict[str, tuple[Step, Step]] = {
    "zeros +=": (added_up, lambda s, y: F.relu(s.d(y)) + F.relu(s.d(y / 2))),
    "ones *=": (scaled_ones, lambda s, y: y * 1),
    "half +=": (shifted_half, lambda s, y: y + 0.5),
}


@pytest.mark.parametrize("way", IN_PLACE)
@pytest.mark.parametrize("name", RULES)
def test_a_constant_that_a_map_is_written_into_stays_what_it_was(name: str, way: str, x: Tensor) -> None:
    one, other = map(inside, IN_PLACE[way])
    _, logits = make_explainer(name).explain_with_logits(one, x, 1)
    torch.testing.assert_close(logits, one(x))
    torch.testing.assert_close(explain(name, one, x), explain(name, other, x))


# --- axes and pixels ------------------------------------------------------------------------------


def non_local(first: bool) -> Step:
    """Attention over positions, which lie last in one spelling and second in the other."""

    def step(s: Net, y: Tensor) -> Tensor:
        v = y.flatten(2)
        a = torch.softmax(v.transpose(1, 2) @ v, -1)
        out = torch.bmm(v, a.transpose(1, 2)) if first else torch.bmm(a, v.transpose(1, 2)).transpose(1, 2)
        return F.relu(0.7 * out.reshape(y.shape) + y)

    return step


def mixed(s: Net, y: Tensor) -> Tensor:
    return F.relu((s.d.weight.mean((2, 3)) @ y.flatten(2)).view_as(y))


def mixed_by_convolution(s: Net, y: Tensor) -> Tensor:
    return F.relu(F.conv2d(y, s.d.weight.mean((2, 3))[:, :, None, None]))


def kernel(s: Net) -> Tensor:
    return s.d.weight.mean((2, 3))


def last(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2)


MIXED: list[Step] = [
    mixed,
    lambda s, y: last(F.relu(torch.einsum("nchw,oc->nhwo", y, kernel(s)))),
    lambda s, y: last(F.relu(torch.einsum("oc, ...chw -> ...hwo", kernel(s), y))),
    lambda s, y: F.relu(torch.einsum("nchw,oc->onhw", y, kernel(s))).permute(1, 0, 2, 3),
    lambda s, y: last(F.relu(torch.tensordot(y, kernel(s), dims=([1], [1])))),
    lambda s, y: F.relu(torch.tensordot(kernel(s), y, dims=([1], [1]))).permute(1, 0, 2, 3),
    lambda s, y: F.relu(torch.stack([(y * w.view(-1, 1, 1)).sum(1) for w in kernel(s)], 1)),
    lambda s, y: last(F.relu(torch.stack([(y * w.view(-1, 1, 1)).sum(dim=1) for w in kernel(s)], -1))),
    lambda s, y: F.relu(torch.cat([(y * w.view(-1, 1, 1)).sum(1).unsqueeze(1) for w in kernel(s)], 1)),
]


@pytest.mark.parametrize("name", RULES)
def test_a_map_of_one_channel_is_one_without_its_axis_too(name: str, x: Tensor) -> None:
    """Activations and shifts of it: SRD would take rows of pixels for vectors."""

    def summed(keep: bool) -> Step:
        def step(s: Net, y: Tensor) -> Tensor:
            gate = F.relu(y.sum(1, keepdim=keep) - 0.5)
            return F.relu(s.d(y)) + (gate if keep else gate[:, None])

        return step

    maps = [explain(name, inside(summed(keep)), x) for keep in (True, False)]
    assert maps[0].any()
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    ("one", "other"),
    [(non_local(True), non_local(False)), *((step, mixed_by_convolution) for step in MIXED)],
)
@pytest.mark.parametrize("name", ["srd", "gradcam", "layercam_low"])
def test_channels_are_found_behind_products_of_matrices(name: str, one: Step, other: Step, x: Tensor) -> None:
    maps = [explain(name, inside(step), x) for step in (one, other)]
    assert maps[0].any()
    torch.testing.assert_close(*maps)


MOVED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mirrored by an index": (lambda x: x[..., torch.arange(7, -1, -1)], lambda x: x.flip(-1)),
    "halves exchanged": (lambda x: torch.cat(x.chunk(2, 3)[::-1], 3), lambda x: x.roll(4, 3)),
    "transposed by columns": (lambda x: torch.stack(x.unbind(3), 2), lambda x: x.transpose(2, 3)),
    "colours exchanged": (lambda x: torch.stack([x[:, 2], x[:, 1], x[:, 0]], 1), lambda x: x.flip(1)),
}


@pytest.mark.parametrize("way", MOVED)
def test_relevance_is_of_the_pixels_that_the_caller_gave(way: str, x: Tensor) -> None:
    one, other = (SRD(start="ones").explain(before(step), x) for step in MOVED[way])
    torch.testing.assert_close(one.sum((1, 2)), other.sum((1, 2)))
    torch.testing.assert_close(one, other)


class AttentionPool(nn.Module):
    """Positions weighted by scores, a map of one channel that is no end of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.score = Net(lambda s, x: s.features(x)), nn.Conv2d(6, 1, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        a = self.score(y).flatten(2).softmax(-1).view(len(x), 1, 8, 8)
        return self.net.fc((y * a).sum((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["srd", "srd_low", "gradcam", "layercam_low"])
def test_an_end_that_only_a_part_of_the_logits_is_made_of_is_refused(name: str, x: Tensor) -> None:
    two_heads = Net(lambda s, x: s.head(F.relu(s.c(x))) + s.head(s.features(x)))
    for model in (AttentionPool().eval(), two_heads):
        with pytest.raises(Refused, match="name the submodule"):
            make_explainer(name).explain(model, x, 1)
    assert make_explainer(name, encoder="net").explain(AttentionPool().eval(), x, 1).any()


# --- what is not seen -----------------------------------------------------------------------------


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in use
    TRACED = torch.jit.trace(torch.relu, torch.zeros(1))
    TRACED_IN_PLACE = torch.jit.trace(lambda t: t.relu_(), torch.zeros(1))


def elsewhere(t: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.relu, t).result()


def beside_the_mode(t: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return t.relu_()


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "traced": TRACED,
    "in a thread": elsewhere,
    "vmap": torch.vmap(F.relu),
    "traced, in place": lambda t: TRACED_IN_PLACE(t * 1),
    "in place beside the mode": lambda t: beside_the_mode(t * 1),
}


@pytest.mark.parametrize("way", UNSEEN)
@pytest.mark.parametrize("name", RULES)
def test_maps_that_no_intercepted_call_made_are_refused(name: str, way: str, x: Tensor) -> None:
    with pytest.raises(Refused, match="cannot be seen"):
        explain(name, inside(lambda s, y: UNSEEN[way](s.d(y))), x)
    gradient = [
        explain("gradient", inside(lambda s, y, f=f: f(s.d(y))), x)  # type: ignore[misc]
        for f in (UNSEEN[way], F.relu)
    ]
    torch.testing.assert_close(*gradient)


OUTSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda t: t * torch.from_numpy((t.detach().numpy() > 0).astype("f8")),
    "asarray": lambda t: t * torch.from_numpy((np.asarray(t.detach()) > 0).astype("f8")),
    "lists": lambda t: t * (torch.tensor(t.flatten().tolist(), dtype=t.dtype).view_as(t) > 0),
    "dlpack": lambda t: t * (torch.from_dlpack(t.detach()) > 0),
}


@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.parametrize("name", RULES)
def test_maps_that_leave_torch_are_refused(name: str, way: str, x: Tensor) -> None:
    """What comes back would be taken for a constant."""
    with pytest.raises(Refused, match="out of torch"):
        explain(name, inside(lambda s, y: OUTSIDE[way](s.d(y))), x)


def test_views_that_are_written_into_one_by_one_are_seen(x: Tensor) -> None:
    def halves(t: Tensor) -> Tensor:
        t = t * 1
        one, other = t[:, :3], t[:, 3:]
        one.relu_()
        other.relu_()
        return t

    found = [explain("srd", inside(lambda s, y, f=f: f(s.d(y))), x) for f in (halves, F.relu)]  # type: ignore[misc]
    assert found[0].isfinite().all()


def edited(u: Tensor) -> Tensor:
    mask = torch.zeros_like(u)
    mask[u > 0] = 1
    return u * mask


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "an edited mask": edited,
    "a compared gate": lambda u: u * (torch.sigmoid(u) > 0.5),
    "of a detached ReLU": lambda u: u * (F.relu(u.detach()) > 0),
    "an index": lambda u: u * torch.stack([torch.zeros_like(u), u]).argmax(0),
}


@pytest.mark.parametrize("way", MASKS)
@pytest.mark.parametrize("name", [name for name in RULES if name != "fullgrad"])  # which needs gradients only
def test_masks_do_not_lose_what_they_are(name: str, way: str, x: Tensor) -> None:
    with pytest.raises(Refused, match=r"(chooses by a comparison of maps|is an activation by another name)"):
        explain(name, inside(lambda s, y: MASKS[way](s.d(y))), x)


DETACHED: dict[str, Step] = {
    "straight through": lambda s, y: s.d(y) + (F.relu(s.d(y)) - s.d(y)).detach(),
    "a frozen branch": lambda s, y: y + F.relu(s.d(y)).detach(),
    "a factor": lambda s, y: y * y.detach(),
}


@pytest.mark.parametrize("way", DETACHED)
@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "lrp_gamma", "lrp_epsilon", "excitation_backprop"])
def test_detached_parts_of_the_image_are_no_constants(name: str, way: str, x: Tensor) -> None:
    with pytest.raises(
        Refused, match=r"takes a detached part of the image for a constant|is an activation by another name"
    ):
        explain(name, inside(DETACHED[way]), x)


def test_frozen_parameters_in_the_shape_of_a_map_are_constants(x: Tensor) -> None:
    net = inside(lambda s, y: y * s.fc.weight[0].view(1, -1, 1, 1).expand_as(y) + s.c.bias.view(1, -1, 1, 1))
    frozen = SRD(start="ones").explain(net, x)
    torch.testing.assert_close(frozen, SRD(start="ones").explain(net.requires_grad_(True), x))


@pytest.mark.parametrize("name", RULES)
def test_what_torch_cannot_do_is_one_line(name: str, x: Tensor) -> None:
    def numbers(s: Net, y: Tensor) -> Tensor:
        return (y * 1).resize_(y.shape)

    with pytest.raises(Refused, match="cannot be followed: cannot resize"):
        explain(name, inside(numbers), x)
