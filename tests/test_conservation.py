"""The second net below the list of what is affine: what arrives is held against what started. "high" is where all passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine import affine
from srd_lab.errors import BadValue, Leak, Refused, SrdLabError, SrdLabWarning
from srd_lab.methods.cam import LayerCAM
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.methods.lrp import ExcitationBackprop, LRPZPlus
from srd_lab.methods.srd import SRD
from srd_lab.types import Explainer

CONSERVING: dict[str, Callable[[str], Explainer]] = {
    "srd": lambda on_leak: SRD(start="ones", on_leak=on_leak),
    "srd_high": lambda on_leak: SRD(start="ones", level="high", on_leak=on_leak),
    "lrp_zplus": lambda on_leak: LRPZPlus(on_leak=on_leak),
    "excitation_backprop": lambda on_leak: ExcitationBackprop(on_leak=on_leak),
    "contrastive_excitation": lambda on_leak: ExcitationBackprop(contrastive=True, on_leak=on_leak),
}


class Squared(nn.Module):
    """Squares a map half way down: nothing that a rule of these decomposes."""

    def __init__(self, power: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.c, self.fc, self.power = nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Linear(6, 3), power
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(F.relu(self.power(F.relu(self.b(F.relu(self.a(x))))))))
        return self.fc(F.relu(y).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# contrastive excitation starts from a sum of 0, which a wrong factor leaves 0
@pytest.mark.parametrize("name", ["srd", "lrp_zplus", "excitation_backprop"])
def test_an_operation_that_slips_through_the_list_is_caught_by_the_sum(
    name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Squared(torch.square)
    with pytest.raises(Refused, match=r"torch\.square in .* is neither affine nor an activation"):
        CONSERVING[name]("error").explain(model, x, 1)
    monkeypatch.setattr(affine, "_AFFINE", affine._AFFINE | {torch.square})
    with pytest.raises(SrdLabError, match=r"differs from what started by [0-9.]+%, for no known reason"):
        CONSERVING[name]("error").explain(model, x, 1)
    with pytest.warns(SrdLabWarning, match=r"differs from what started"):
        assert CONSERVING[name]("warn").explain(model, x, 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONSERVING)
def test_the_sum_holds_where_the_rule_fits(name: str, dtype: torch.dtype, x: Tensor) -> None:
    model = Bottlenecks().to(dtype)
    map_ = CONSERVING[name]("error").explain(model, x.to(dtype), 1)
    assert map_.any()


def test_what_one_image_gains_and_another_loses_is_a_leak(x: Tensor) -> None:
    """Their sum holds."""

    def exchange(y: Tensor) -> Tensor:
        by = torch.tensor([0.3, -0.3]).view(-1, 1, 1, 1)
        if y.requires_grad and len(y) == 2:
            y.register_hook(lambda g: g * (1 + by))
        return y * 1

    with pytest.raises(SrdLabError, match="differs from what started"):
        SRD(start="ones").explain(Squared(exchange), x)


def test_an_unknown_reaction_to_leaks_is_refused() -> None:
    for name in ("srd", "lrp_zplus", "excitation_backprop"):
        with pytest.raises(BadValue, match=r"on_leak='ignore' is not known; expected one of error, warn"):
            CONSERVING[name]("ignore")


class Bottlenecks(nn.Module):
    """Residual bottlenecks: the last activation at 1/8 of the image is inside a branch of the next stage."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, last: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.act, self.last = act, last
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.one = nn.ModuleList(
            [nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, stride=2)]
        )
        self.two = nn.ModuleList(
            [nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, stride=2)]
        )
        self.fc = nn.Linear(8, 3)
        self.eval().requires_grad_(False)

    def block(self, y: Tensor, layers: nn.ModuleList) -> Tensor:
        narrow, wide, beside = layers
        out = wide(self.act(narrow(y))) + beside(y)
        return self.act(out) if self.last else out  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = self.block(self.block(y, self.one), self.two)
        return self.fc(self.act(y).mean((2, 3)))  # type: ignore[no-any-return]


def test_high_is_the_trunk_and_not_a_branch_behind_it(x: Tensor) -> None:
    model = Bottlenecks()
    trunk, branch = "relu#3", "relu#4"
    high = SRD(start="ones", level="high").explain(model, x)
    assert high.shape == (2, 4, 4)
    torch.testing.assert_close(high, SRD(start="ones", level=trunk).explain(model, x))
    started = SRD(start="ones").relevance(model, x)
    whole = started["input"].sum((1, 2))
    torch.testing.assert_close(high.sum((1, 2)), whole, rtol=1e-5, atol=0)
    assert (SRD(start="ones", level=branch).explain(model, x).sum((1, 2)) < 0.9 * whole).all()
    for method in (LayerCAM, ExcitationBackprop):
        torch.testing.assert_close(
            method(level="high").explain(model, x, 1), method(level=trunk).explain(model, x, 1)
        )
    torch.testing.assert_close(ExcitationBackprop().explain(model, x, 1).sum((1, 2)), torch.ones(2))


def test_high_is_no_activation_where_none_is_on_the_trunk(x: Tensor) -> None:
    """As in ConvNeXt and GoogLeNet: the sum of the branches is what all relevance passes."""
    model = Bottlenecks(last=False)
    high = SRD(start="ones", level="high").explain(model, x)
    whole = SRD(start="ones").relevance(model, x)["input"].sum((1, 2))
    assert high.shape == (2, 4, 4)
    torch.testing.assert_close(high.sum((1, 2)), whole, rtol=1e-4, atol=1e-4)
    block = model.block(F.relu(model.stem(x)), model.one).requires_grad_()
    logits = model.fc(F.relu(model.block(block, model.two)).mean((2, 3)))
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), block)
    expected = F.relu((F.relu(slope) * block).sum(1))
    torch.testing.assert_close(LayerCAM(level="high").explain(model, x, 1), expected)


def test_a_size_that_is_not_there_is_said_once(x: Tensor) -> None:
    model = Bottlenecks()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            assert SRD(start="ones", level="high").explain(model, x[:, :, :24, :24]).shape == (2, 3, 3)
            assert SRD(start="ones", level="high").explain(model, x[:, :, :20, :20]).shape[1:] == (3, 3)
            assert SRD(start="ones", level="high").explain(model, F.pad(x, (0, 8, 0, 8))).shape[1:] == (5, 5)
    assert not seen
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            SRD(start="ones", level="high", encoder="stem").explain(model, x)
    assert ["the nearest has (8, 8)" in str(warning.message) for warning in seen] == [True]


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant that is stacked": lambda y: torch.stack([y, torch.ones_like(y)]).sum(0),
    "a channel of ones": lambda y: torch.cat([y[:, :3], torch.ones_like(y[:, :1])], 1),
    "a channel that is written": lambda y: y.index_fill(1, torch.tensor([0]), 0.5),
    "a clamp at a number": lambda y: torch.maximum(y, torch.full_like(y, 0.3)),
    "a pad of ones": lambda y: F.pad(y, (1, 1, 1, 1), value=1.0),
}


class Between(nn.Module):
    """Two convolutions with ``made`` of a map between them."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 3)
        self.made = made
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.made(F.relu(self.a(x))))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_fullgrad_notices_a_constant_that_is_no_layers_bias(constant: str, x: Tensor) -> None:
    model = Between(CONSTANTS[constant])
    for asked in (FullGrad().explain, FullGrad().terms):
        with pytest.raises(Leak, match=r"\Ainput and biases add up to .* where the model puts out [^\n]*\Z"):
            asked(model, x, 1)


AS_DOCUMENTED: dict[str, Callable[[Tensor], Tensor]] = {
    "its terms add up": lambda y: F.avg_pool2d(torch.cat([y[:, 2:], y[:, :2].abs()], 1) * 0.5 - 0.1, 2),
    "a position embedding": lambda y: y + torch.linspace(0, 1, y[0, 0].numel()).view(y.shape[2:]),
    "a product of two maps": lambda y: y * y.mean((2, 3), keepdim=True),
    "a norm of the image": lambda y: F.layer_norm(
        y, y.shape[1:], y[0].detach() * 0 + 1, y[0].detach() * 0 + 1
    ),
}


@pytest.mark.parametrize("way", AS_DOCUMENTED)
def test_fullgrad_explains_what_its_sum_does_not_hold_for(way: str, x: Tensor) -> None:
    model = Between(AS_DOCUMENTED[way])
    assert FullGrad().explain(model, x, 1).any()
    missed = (FullGrad().terms(model, x, 1).sum(1) - model(x)[:, 1]).abs()
    assert bool((missed < 1e-6).all()) == (way == "its terms add up")


class Spread(nn.Module):
    """A gate and a constant that take the shape of the map."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.place, self.by_name = nn.Parameter(torch.rand(1, 6, 1, 1)), by_name
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate, place = torch.sigmoid(self.b(y.mean((2, 3), keepdim=True))), self.place
        if self.by_name:
            gate, place = gate.expand_as(y), place.expand_as(y)
        return self.fc(F.relu(y * gate + place).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*CONSERVING, "fullgrad"])
def test_what_takes_the_shape_of_a_map_is_not_made_of_it(name: str, x: Tensor) -> None:
    explainer = CONSERVING[name]("error") if name in CONSERVING else FullGrad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SrdLabWarning)
        found, expected = (explainer.explain(Spread(by_name), x.double(), 1) for by_name in (True, False))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_map_in_coarse_numbers_excuses_no_leak(dtype: torch.dtype) -> None:
    """A leak of a hundredth is seen behind one map in half precision, and the map itself passes."""

    class Rounded(nn.Module):
        def __init__(self, lost: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.fc, self.lost = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), lost

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x)).to(dtype).float()
            if self.lost:
                y.register_hook(lambda g: g * (1 - self.lost))
            return self.fc(torch.relu(y.mean((2, 3))))

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for method in (SRD(start="ones"), LRPZPlus()):
        assert method.explain(Rounded(0).eval(), x).any()
        with pytest.raises(Leak):
            method.explain(Rounded(0.02).eval(), x)
