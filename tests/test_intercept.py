"""Interception: every activation call is seen however it is spelled, and nothing changes by being seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine.interceptor import Interceptor
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import Call
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import Refused
from srd_lab.methods.srd import SRD

Function = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A convolution, then any function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.function = function
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Kinky(Interceptor):
    """Replaces every activation by one that shows."""

    def activation(self, call: Call, u: Tensor) -> Tensor:
        return call.function(u) + 1


def image(*shape: int) -> Tensor:
    return torch.randn(
        *(shape or (2, 2, 4, 5)), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


SLOPES = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
SPELLED: dict[str, tuple[str, Function]] = {
    "F.relu": ("relu", F.relu),
    "F.relu(inplace)": ("relu", lambda t: F.relu(t, True)),
    "F.relu_": ("relu", lambda t: F.relu_(t)),
    "F.relu(input=)": ("relu", lambda t: F.relu(input=t)),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "Tensor.relu": ("relu", lambda t: t.relu()),
    "Tensor.relu_": ("relu", lambda t: t.relu_()),
    "nn.ReLU": ("relu", nn.ReLU()),
    "nn.ReLU(inplace)": ("relu", nn.ReLU(inplace=True)),
    "clamp(min=0)": ("relu", lambda t: t.clamp(min=0)),
    "clamp(0)": ("relu", lambda t: t.clamp(0)),
    "torch.clamp": ("relu", lambda t: torch.clamp(t, min=0.0)),
    "torch.clamp(input=)": ("relu", lambda t: torch.clamp(input=t, min=0.0)),
    "clamp_": ("relu", lambda t: t.clamp_(min=0)),
    "clamp_min": ("relu", lambda t: t.clamp_min(0)),
    "torch.clamp_min": ("relu", lambda t: torch.clamp_min(t, 0)),
    "clamp_min_": ("relu", lambda t: t.clamp_min_(0)),
    "clip": ("relu", lambda t: t.clip(min=0)),
    "clip_": ("relu", lambda t: t.clip_(0)),
    "torch.clip": ("relu", lambda t: torch.clip(t, 0)),
    "clamp(0, 6)": ("hardtanh", lambda t: t.clamp(0, 6)),
    "clamp_(-1, 1)": ("hardtanh", lambda t: t.clamp_(-1, max=1)),
    "F.threshold": ("relu", lambda t: F.threshold(t, 0, 0)),
    "nn.Threshold": ("relu", nn.Threshold(0.0, 0.0, inplace=True)),
    "F.leaky_relu": ("leaky_relu", lambda t: F.leaky_relu(t, 0.2)),
    "F.leaky_relu(inplace)": ("leaky_relu", lambda t: F.leaky_relu(t, 0.2, True)),
    "F.leaky_relu_": ("leaky_relu", lambda t: F.leaky_relu_(t, 0.2)),
    "nn.LeakyReLU": ("leaky_relu", nn.LeakyReLU(0.2)),
    "nn.LeakyReLU(inplace)": ("leaky_relu", nn.LeakyReLU(0.2, inplace=True)),
    "F.relu6": ("relu6", lambda t: F.relu6(t, True)),
    "nn.ReLU6": ("hardtanh", nn.ReLU6(inplace=True)),
    "F.hardtanh": ("hardtanh", lambda t: F.hardtanh(t, -0.5, 0.5)),
    "F.hardtanh_": ("hardtanh", lambda t: F.hardtanh_(t, -0.5, 0.5)),
    "nn.Hardtanh": ("hardtanh", nn.Hardtanh()),
    "F.elu": ("elu", lambda t: F.elu(t, 0.5)),
    "F.elu_": ("elu", lambda t: F.elu_(t, 0.5)),
    "nn.ELU(inplace)": ("elu", nn.ELU(inplace=True)),
    "torch.selu": ("selu", torch.selu),
    "torch.selu_": ("selu", torch.selu_),
    "nn.SELU(inplace)": ("selu", nn.SELU(inplace=True)),
    "torch.celu": ("celu", torch.celu),
    "torch.celu_": ("celu", lambda t: torch.celu_(t, 0.7)),
    "nn.CELU": ("celu", nn.CELU(0.7)),
    "F.prelu": ("prelu", lambda t: F.prelu(t, SLOPES)),
    "Tensor.prelu": ("prelu", lambda t: t.prelu(SLOPES)),
    "F.silu": ("silu", F.silu),
    "nn.SiLU(inplace)": ("silu", nn.SiLU(inplace=True)),
    "nn.Mish": ("mish", nn.Mish()),
    "nn.Hardswish(inplace)": ("hardswish", nn.Hardswish(inplace=True)),
    "F.gelu": ("gelu", F.gelu),
    "nn.GELU(tanh)": ("gelu", nn.GELU(approximate="tanh")),
    "torch.tanh": ("tanh", torch.tanh),
    "F.tanh": ("tanh", F.tanh),
    "Tensor.tanh_": ("tanh", lambda t: t.tanh_()),
    "torch.tanh_": ("tanh", torch.tanh_),
    "nn.Tanh": ("tanh", nn.Tanh()),
    "F.softplus": ("softplus", lambda t: F.softplus(t, beta=3)),
    "nn.Softplus": ("softplus", nn.Softplus(3)),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_every_spelling_is_seen_once_and_changes_nothing(spelling: str) -> None:
    kind, function = SPELLED[spelling]
    model = Apply(function)
    x = image()
    plain = model(x)
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            seen = Interceptor(model)
            assert torch.equal(seen.run(x), plain)
            assert [call.kind for call in seen.calls] == [kind]
            torch.testing.assert_close(Kinky(model).run(x), plain + 1, rtol=0, atol=1e-12)
            # The call as a pure function of the pre-activation, whatever the model wrote.
            u = model.conv(x)
            kept = u.clone()
            torch.testing.assert_close(seen.calls[0].function(u), plain, rtol=0, atol=1e-12)
            assert torch.equal(u, kept)
    # And SRD starts from the right pre-activation: G_u = u / ||u||^2, then one transposed convolution.
    relevance = SRD(encoder="", start="ones").explain(model, x)
    signal = u / (u * u).sum(1, keepdim=True)
    back = F.conv_transpose2d(signal, model.conv.weight, padding=1)
    torch.testing.assert_close(relevance, (x * back).sum(1))


@pytest.mark.parametrize("spelling", SPELLED)
def test_gradients_pass_an_intercepted_activation_as_they_did(spelling: str) -> None:
    model = Apply(SPELLED[spelling][1])
    x = image().requires_grad_()
    weight = image(2, 3, 4, 5)
    (expected,) = torch.autograd.grad(model(x), x, weight)
    (got,) = torch.autograd.grad(Interceptor(model).run(x), x, weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "function",
    [F.softsign, torch.abs, torch.square, lambda t: t**2, lambda t: torch.maximum(t, -t), F.hardshrink,
     F.tanhshrink, lambda t: F.glu(t, 3), lambda t: F.rrelu(t), lambda t: t.clamp(max=1), lambda t: t * t,
     lambda t: F.threshold(t, 0.1, 20), torch.sin, lambda t: t.exp_(), F.logsigmoid],
)  # fmt: skip
def test_what_is_neither_affine_nor_known_is_refused_by_decompositions(function: Function) -> None:
    class Net(Apply):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x)).mean((2, 3))

    model = Net(lambda t: function(t[..., :4]))  # glu wants an even width
    with pytest.raises(Refused, match=r"neither affine nor an activation|is an activation by another name"):
        SRD(start="ones").explain(model, image())


def test_an_aliased_tensor_sees_the_in_place_activation() -> None:
    read: list[Tensor] = []

    class Alias(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            t = x * 2
            alias, view = t, t.view(-1)
            out = F.relu(t, inplace=True)
            read.extend([alias.detach().clone(), view.detach().clone()])
            assert out is t
            return out + alias

    x = torch.tensor([-1.0, 2.0])
    for grad in (torch.enable_grad, torch.no_grad):
        read.clear()
        with grad():
            out = Interceptor(Alias()).run(x)
        assert [t.tolist() for t in read] == [[0, 4], [0, 4]]
        assert out[:, 1].tolist() == [0, 8]  # one output stands for two classes
    leaf = x.clone().requires_grad_()
    Interceptor(Alias()).run(leaf)[:, 1].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 4]


def test_an_in_place_activation_of_a_view_reaches_the_whole_tensor() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            t = x * 1
            F.leaky_relu_(t[:, :1], 0.3)
            return t * 2

    x = image().requires_grad_()
    expected = Half()(x)
    got = Interceptor(Half()).run(x)
    assert torch.equal(got, expected)
    weight = image()
    grads = [torch.autograd.grad(y, x, weight)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_what_a_function_saved_survives_its_overwriting() -> None:
    x = image().requires_grad_()
    y = in_place(x * 1, F.silu)
    y.mul_(2)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(2 * F.silu(x).sum(), x)
    torch.testing.assert_close(got, expected)


class Named(nn.Module):
    """Shared, nested and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh(), nn.Sequential(nn.ELU()))
        self.also = self.block[1]
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.block(self.relu(x * 1)))
        return F.relu(self.also(F.gelu(F.gelu(x)))) + self.relu(x).tanh()


def test_calls_are_named_by_module_and_counted() -> None:
    seen = Interceptor(Named())
    seen.run(image())
    assert [call.name for call in seen.calls] == [
        "relu",
        "block.1",
        "block.2.0",
        "relu#2",
        "gelu",
        "gelu#2",
        "block.1#2",
        "relu#3",  # the functional one: a name of its own all the same
        "relu#4",
        "tanh",
    ]
    assert [call.index for call in seen.calls] == list(range(10))
    assert len({call.name for call in seen.calls}) == 10


def test_functional_calls_carry_the_name_of_the_module_that_made_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.relu(self.conv(x)))

    seen = Interceptor(nn.Sequential(Block(), nn.Sequential(Block())))
    seen.run(image().float())
    assert [call.name for call in seen.calls] == ["0.relu", "0.relu#2", "1.0.relu", "1.0.relu#2"]


class Pair(nn.Module):
    """Two layers with any activations between them, in place and functional."""

    def __init__(self, first: nn.Module, second: Function) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)
        self.first, self.second = first, second
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.b(self.first(self.a(x))))


def test_the_surrogate_is_the_softplus_network() -> None:
    x = image()
    relu = Pair(nn.ReLU(inplace=True), torch.relu)
    by_hand = Pair(nn.Softplus(beta=7), lambda t: F.softplus(t, beta=7))
    torch.testing.assert_close(SmoothModel(relu, 7.0)(x), by_hand(x), rtol=0, atol=1e-14)
    leaky = Pair(nn.LeakyReLU(0.2, inplace=True), lambda t: F.leaky_relu_(t, 0.3))
    by_hand = Pair(SmoothLeaky(0.2), lambda t: 0.3 * t + 0.7 * F.softplus(t, beta=7))
    torch.testing.assert_close(SmoothModel(leaky, 7.0)(x), by_hand(x), rtol=0, atol=1e-14)


class SmoothLeaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + (1 - self.slope) * F.softplus(x, beta=7)


@pytest.mark.parametrize(
    "model",
    [
        Pair(nn.ReLU(), F.relu),
        Pair(nn.LeakyReLU(0.2, inplace=True), lambda t: F.leaky_relu(t, 0.1)),
        Pair(nn.ReLU6(inplace=True), F.relu6),
        Pair(nn.Hardtanh(-0.3, 0.4), lambda t: F.hardtanh_(t, -0.2, 0.1)),
        Pair(nn.ReLU(), lambda t: t.clamp(-0.1, 0.3)),
    ],
    ids=["relu", "leaky", "relu6", "hardtanh", "clamp"],
)
def test_surrogates_become_the_original_as_beta_grows(model: nn.Module) -> None:
    x = 2 * image()
    errors = [float((SmoothModel(model, beta)(x) - model(x)).abs().max()) for beta in (1e1, 1e2, 1e3, 1e4)]
    assert errors[0] > 1e-3
    assert all(later < earlier / 5 for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 1e-3


def test_smooth_activations_stay_as_they_are() -> None:
    model = Pair(nn.SiLU(inplace=True), torch.tanh)
    assert torch.equal(SmoothModel(model, 5.0)(image()), model(image()))


@pytest.mark.parametrize("style", ["relu", "leaky", "relu6"])
@pytest.mark.parametrize("inplace", [False, True])
def test_srd_of_a_surrogate_is_srd_of_the_smooth_network(style: str, inplace: bool) -> None:
    """The rule sees each smoothed call as one activation, and no others, under the same name."""
    kinds = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "relu6": nn.ReLU6}
    original = Pair(kinds[style](inplace=inplace), F.relu)
    x = image()
    names = list(SRD(encoder="", start="ones").relevance(original, x))
    got = SRD(encoder="", start="ones").relevance(SmoothModel(original, 6.0), x)
    assert [name.removeprefix("model.") for name in got] == names
    if style == "relu":
        by_hand = Pair(nn.Softplus(beta=6), lambda t: F.softplus(t, beta=6))
        expected = SRD(encoder="", start="ones").relevance(by_hand, x)
        for a, b in zip(got.values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b)
    for name in names[1:]:
        SRD(encoder="", start="ones", level=name).explain(SmoothModel(original, 6.0), x)


@pytest.mark.parametrize("training", [True, False])
def test_a_surrogate_changes_no_training_flag(training: bool) -> None:
    """A fresh container around a network in eval mode is itself in training mode; that is nobody's business."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()).eval())
    model.training = training
    before = {name: module.training for name, module in model.named_modules()}
    SmoothModel(model, 5.0)(image().float())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_network_without_activations_is_refused() -> None:
    with pytest.raises(Refused, match=r"no activation call was seen.*expected ReLU"):
        Interceptor(nn.Sequential(nn.Conv2d(2, 2, 1))).run(image().float())


def test_activations_of_other_threads_are_not_mixed_in() -> None:
    import threading

    other = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())

    class Starts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = other

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: other(x))
            thread.start()
            thread.join()
            return torch.tanh(x)

    seen = Interceptor(Starts())
    seen.run(image().float())
    assert [call.name for call in seen.calls] == ["tanh"]
