"""SRD against the literal oracle, the authors' published numbers, and what must hold on any network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import reference as ref
import torch
import torchvision
from torch import Tensor, nn

from srd_lab.errors import BadValue, Refused, SrdLabError, SrdLabWarning
from srd_lab.methods.srd import SRD
from srd_lab.models import Classifier

DATA = Path(__file__).parent / "data"
GRAPHS = ref.toy_graphs()
STYLES: tuple[ref.Style, ...] = ("modules", "shared_inplace", "functional")
KINDS = ("relu", "leaky_relu", "elu", "silu", "gelu", "tanh", "softplus")
WHOLE = SRD(encoder="")


def images(graph: ref.Graph, n: int = 2) -> Tensor:
    return torch.stack([ref.toy_input(graph, seed) for seed in range(n)])


def starts(graph: ref.Graph, n: int = 2) -> Tensor:
    return torch.stack([ref.toy_start(graph, seed) for seed in range(n)])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def alive(relevance: dict[str, Tensor]) -> None:
    """A start that is zero everywhere would make any two maps equal."""
    assert all(layer.abs().max() > 0 for layer in relevance.values())


def same_layers(got: dict[str, Tensor], expected: dict[str, Tensor], image: int) -> None:
    """Keys are names here and there; values one by one in call order."""
    assert len(got) == len(expected)
    assert next(iter(got)) == next(iter(expected)) == "input"
    for a, b in zip(got.values(), expected.values(), strict=True):
        close(a[image], b)


# --- the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_equals_the_definition(name: str, kind: str) -> None:
    graph = ref.with_activation(GRAPHS[name], kind, beta=3.0)
    x, start = images(graph), starts(graph)
    expected = [ref.srd(graph, a, r) for a, r in zip(x, start, strict=True)]
    for style in STYLES:
        got = WHOLE.relevance(ref.as_module(graph, style), x, start=start)
        for image in range(2):
            same_layers(got, expected[image], image)
        if style == "modules":
            assert list(got) == list(expected[0])


@pytest.mark.parametrize(("unit", "values"), [("vector", "post"), ("scalar", "pre"), ("scalar", "post")])
@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize("name", ["vgg_bias", "residual", "inception", "dense", "pooled_input", "dead_field"])
def test_ablations_equal_their_definition(name: str, kind: str, unit: ref.Unit, values: ref.Values) -> None:
    graph = ref.with_activation(GRAPHS[name], kind)
    x, start = images(graph, 1), starts(graph, 1)
    expected = ref.srd(graph, x[0], start[0], unit=unit, values=values)
    method = SRD(encoder="", unit=unit, values=values)
    for style in STYLES:
        got = method.relevance(ref.as_module(graph, style), x, start=start)
        for a, b in zip(got.values(), expected.values(), strict=True):
            # A neuron's share v / u has no scale: where u nearly vanishes, rounding is all there is.
            torch.testing.assert_close(a[0], b, rtol=1e-7, atol=1e-7)


def published(name: str) -> tuple[nn.Sequential, dict[str, Tensor], list[str]]:
    """The authors' net up to its last ReLU, their data, and the keys of their layers in call order."""
    raw = dict(np.load(DATA / f"{name}.npz"))
    data = {key: torch.from_numpy(value) for key, value in raw.items() if key != "cfg"}
    layers: list[nn.Module] = []
    conv = 0
    for entry in raw["cfg"][:-1]:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        weight = data[f"conv{conv}.weight"]
        layers += [nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1).double(), nn.ReLU(inplace=True)]
        layers[-2].load_state_dict({"weight": weight, "bias": data[f"conv{conv}.bias"]})
        conv += 1
    net = nn.Sequential(*layers).eval()
    keys = [f"relu_{i}" for i, layer in enumerate(net) if isinstance(layer, nn.ReLU)]
    return net, data, keys


@pytest.mark.parametrize("name", ["authors_srd_nobias", "authors_srd_bias"])
def test_equals_the_authors_code(name: str) -> None:
    """To rounding without biases; with them they share by ||w x_i||, so maps agree in shape and sum."""
    net, data, keys = published(name)
    got = WHOLE.relevance(net, data["x"], start=data["start"])
    pairs = [(got["input"], data["input_relevance"])]
    pairs += [(got[key.removeprefix("relu_")], data[key]) for key in keys if key in data]
    assert len(pairs) == len(keys)  # theirs leave out the last, which is the start
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        if name.endswith("nobias"):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        for a, b in zip(ours, theirs, strict=True):
            assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.999
            close(a.sum(), b.sum())


@pytest.mark.parametrize("name", ref.SEQUENTIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_chain_holds_all_relevance(name: str, kind: str) -> None:
    graph = ref.with_activation(GRAPHS[name], kind, beta=3.0)
    x, start = images(graph), starts(graph)
    for layer in WHOLE.relevance(ref.as_module(graph, "shared_inplace"), x, start=start).values():
        close(layer.sum((1, 2)), start.sum((1, 2)))


@pytest.mark.parametrize("name", ["vgg_bias", "residual", "inception", "dense", "non_square", "dead_field"])
def test_receptive_fields_built_forwards_equal_the_backward_pass(name: str) -> None:
    graph = GRAPHS[name]
    x = images(graph)
    model = ref.as_module(graph, "shared_inplace")
    calls = list(WHOLE.relevance(model, x, start=starts(graph)))[1:]
    for layer, call in list(zip(graph.activations, calls, strict=True))[1::2]:
        fields = [ref.forward_erfs(graph, image)[layer] for image in x]
        h, w = ref.forward(graph, x[0])[layer].shape[1:]
        positions = [(0, 0), (1, 1), (h - 1, w - 1)]
        got = WHOLE.erf(model, x, call, positions)
        for image in range(2):
            expected = torch.stack([fields[image][row * w + column] for row, column in positions])
            torch.testing.assert_close(got[image], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(
        WHOLE.erf(model, x, len(calls) - 1, [(0, 1)]), WHOLE.erf(model, x, calls[-1], [(0, 1)])
    )


@pytest.mark.parametrize("name", ["vgg_bias", "geometry", "residual", "non_square"])
def test_sharing_ratios_equal_the_definition(name: str) -> None:
    graph = GRAPHS[name]
    x = images(graph)
    model = ref.as_module(graph, "modules")
    pairs = [("input", graph.activations[0]), graph.activations[:2]]
    if name == "residual":
        pairs.append(("relu_stem", "relu_a2"))  # by the identity branch and by the convolutions
    for source, target in pairs:
        got = WHOLE.sharing_ratio(model, x, source, target)
        for image in range(2):
            paths: Literal["direct", "all"] = "all" if name == "residual" else "direct"
            mu = ref.sharing_ratios(graph, x[image], source, target, paths=paths)
            assert got.shape[1:3].numel() == mu.shape[1]
            close(got[image].flatten(2).flatten(0, 1), mu.T)
    with pytest.raises(BadValue, match=r"does not come before"):
        WHOLE.sharing_ratio(model, x, graph.activations[1], graph.activations[0])


# --- the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["contrastive", "gradcam"])
@pytest.mark.parametrize("head", ["gap", "mlp"])
@pytest.mark.parametrize("name", ["vgg_bias", "residual", "preactivation", "dense"])
def test_starts_equal_grad_cam_class_by_class(
    name: str, head: Literal["gap", "mlp"], start: Literal["contrastive", "gradcam"]
) -> None:
    graph = GRAPHS[name]
    whole = ref.with_head(graph, head)
    x = images(graph)
    target = torch.tensor([3, 1])
    model = ref.as_module(whole, "shared_inplace")
    literal = ref.as_module(whole, "modules")
    features = literal.encode(x, graph.output)
    mu = torch.stack(
        [
            ref.gradcam_start(f, lambda a: literal.head(a, graph.output), int(k), mode=start)
            for f, k in zip(features, target, strict=True)
        ]
    )
    expected = WHOLE.relevance(ref.as_module(graph), x, start=mu)
    method = SRD(start=start)
    got = method.relevance(model, x, target)
    assert len(got) == len(expected)  # the head's own activation holds no relevance
    for a, b in zip(got.values(), expected.values(), strict=True):
        close(a, b)
    close(SRD(start=start, level="low").explain(model, x, target), mu)
    predicted = model(x).argmax(1)
    assert torch.equal(method.explain(model, x), method.explain(model, x, predicted))
    assert torch.equal(method.explain(model, x, 2), method.explain(model, x, torch.tensor([2, 2])))


def test_a_given_start_is_what_the_encoder_output_holds() -> None:
    graph = GRAPHS["residual"]
    model = ref.as_module(ref.with_head(graph, "gap"))
    x, start = images(graph), starts(graph)
    got = SRD().relevance(model, x, start=start.float())
    assert torch.equal(got["relu_b2"], start.float().double())
    close(got["input"].sum((1, 2)), start.sum((1, 2)), 1e-6)
    ones = SRD(start="ones").relevance(model, x)
    assert torch.equal(ones["relu_b2"], torch.ones_like(start))
    assert torch.equal(SRD().relevance(model, x, start="ones")["input"], ones["input"])
    for wrong in (start[:1], start[..., :1], start[:, None]):
        with pytest.raises(
            SrdLabError, match=r"relevance at the encoder output, shape \(2, 6, 6\)|shape \(2, 3, 3\)"
        ):
            SRD().relevance(model, x, start=wrong)


# --- where the encoder ends ------------------------------------------------------------------------------------


class VGGLike(nn.Module):
    """Ends in a pool, as torchvision's; an adaptive pool that does nothing follows, and hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        block = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(True)]
        more = [nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*block, nn.MaxPool2d(2), *more)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def small_resnet() -> nn.Module:
    torch.manual_seed(4)
    block = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=6)
    return lively(net).double()


def lively(net: nn.Module) -> nn.Module:
    """Batch-norm statistics as training leaves them: none of them neutral."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.2 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
            with torch.no_grad():
                module.bias.copy_(0.2 * torch.randn(module.num_features, generator=generator))
    return net.eval().requires_grad_(False)


def pixels(*shape: int, seed: int = 6) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_encoder_of_a_vgg_ends_in_its_last_pool() -> None:
    model, x = VGGLike(), pixels(2, 3, 8, 8)
    found = SRD().relevance(model, x)
    alive(found)
    for name in ("features", "features.7"):
        named = SRD(encoder=name).relevance(model, x)
        assert list(named) == list(found) == ["input", "features.1", "features.3", "features.6"]
        assert all(torch.equal(a, b) for a, b in zip(named.values(), found.values(), strict=True))
    bare = SRD(encoder="").relevance(model.features, x, start=SRD(level="low").explain(model, x))
    close(bare["input"], found["input"])
    assert SRD(level="low").explain(model, x).shape == (2, 2, 2)
    inner = SRD(encoder="features.3", level="low").explain(model, x)
    assert inner.shape == (2, 8, 8)
    wrapped = Classifier(model, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    close(SRD(encoder="features").explain(wrapped, x), found["input"])


def test_the_encoder_of_a_resnet_ends_in_its_last_activation() -> None:
    model, x = small_resnet(), pixels(2, 3, 64, 64)
    found = SRD().relevance(model, x)
    alive(found)
    named = SRD(encoder="layer4").relevance(model, x)
    assert list(found) == list(named)
    assert list(found)[-1] == "layer4.0.relu#2"
    assert all(torch.equal(a, b) for a, b in zip(named.values(), found.values(), strict=True))
    with pytest.raises(Refused, match=r"puts out shape \(2, 6\); expected a map"):
        SRD(encoder="fc").explain(model, x)


def test_levels_name_layers_of_the_same_pass() -> None:
    model, x = small_resnet(), pixels(1, 3, 64, 64)
    everywhere = SRD(start="ones").relevance(model, x)
    alive(everywhere)
    assert {name: tuple(r.shape[1:]) for name, r in everywhere.items()}["layer2.0.relu#2"] == (8, 8)
    expected = {
        "input": "input",
        "high": "layer2.0.relu#2",
        "low": "layer4.0.relu#2",
        "layer2": "layer2.0.relu#2",
        "layer1.0": "layer1.0.relu#2",
        "layer1.0.relu": "layer1.0.relu",
        "relu": "relu",
    }
    for level, name in expected.items():
        close(SRD(level=level, start="ones").explain(model, x), everywhere[name], 1e-12)
    with pytest.raises(
        SrdLabError, match=r"no activation call is named 'layer9'.*the calls are: relu, layer1"
    ):
        SRD(level="layer9").explain(model, x)
    with pytest.warns(
        SrdLabWarning, match=r"has 1/8 of the input's size, \(1, 1\); the nearest has \(2, 2\).*level="
    ):
        assert SRD(level="high").explain(VGGLike(), pixels(1, 3, 8, 8)).shape == (1, 2, 2)
    with pytest.raises(Refused, match=r"no relevance reaches 'classifier.1'.*behind"):
        SRD(level="classifier.1").explain(VGGLike(), pixels(1, 3, 8, 8))


class Excited(nn.Module):
    """Squeeze-and-excitation in the last block: its own global pool must not pass for the end."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.linear = linear
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        kind: Any = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.squeeze, self.excite = kind(4, 2), kind(2, 4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.relu(self.stem(x))
        y = self.conv(skip)
        pooled = y.mean((2, 3), keepdim=not self.linear)
        gate = torch.sigmoid(self.excite(self.relu(self.squeeze(pooled))))
        y = y * (gate[:, :, None, None] if self.linear else gate)
        y += skip
        return self.fc(self.relu(y).mean((2, 3)))


@pytest.mark.parametrize("linear", [True, False])
def test_gates_are_constants_and_their_pool_is_no_end(linear: bool) -> None:
    model, x = Excited(linear=linear), pixels(2, 3, 6, 6)
    relevance = SRD(start="ones").relevance(model, x)
    assert list(relevance) == ["input", "relu", "relu#2", "relu#3"]
    assert relevance["relu#2"].abs().max() == 0
    for layer in ("input", "relu", "relu#3"):
        close(relevance[layer].sum((1, 2)), torch.full((2,), 36.0, dtype=torch.float64))


def test_an_encoder_output_that_is_overwritten_later_is_taken_as_it_was() -> None:
    """DenseNet: ``F.relu(self.features(x), inplace=True)``; the encoder's output is what ``features`` returned."""

    class Net(VGGLike):
        inplace = True

        def forward(self, x: Tensor) -> Tensor:
            y = self.features[:3](x)
            y = nn.functional.relu(y, inplace=self.inplace)
            return self.classifier[3](self.tail(y).mean((2, 3)))

    model, x = Net(), pixels(2, 3, 8, 8)
    model.tail = nn.Conv2d(5, 8, 1).double().requires_grad_(False)
    method = SRD(encoder="features.2")
    got = method.relevance(model, x)
    model.inplace = False
    expected = method.relevance(model, x)
    alive(expected)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), expected.values(), strict=True))


def test_tensors_around_an_activation_may_be_overwritten_later() -> None:
    """What a ReLU was given, and what a SiLU gave: neither did torch itself save."""

    class Net(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(10)
            self.inplace = inplace
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.double().eval().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            u = self.a(x)
            v = torch.relu(u)
            u = u.mul_(0.5) if self.inplace else u * 0.5
            w = nn.functional.silu(self.b(v + u))
            w = w.add_(v) if self.inplace else w + v
            return w * 2

    x = pixels(2, 3, 6, 6)
    got, expected = (SRD(encoder="", start="ones").relevance(Net(inplace), x) for inplace in (True, False))
    alive(expected)
    for a, b in zip(got.values(), expected.values(), strict=True):
        close(a, b)


def test_a_head_behind_the_encoder_may_be_anything() -> None:
    class Cosine(VGGLike):
        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x).mean((2, 3))
            y = nn.functional.layer_norm(y, (6,))
            return nn.functional.softmax(y / y.norm(dim=1, keepdim=True), 1)

    model, x = Cosine(), pixels(2, 3, 8, 8)
    assert torch.equal(SRD().explain(model, x), SRD(encoder="features").explain(model, x))
    assert SRD().explain(model, x).abs().max() > 0


# --- what input relevance refers to ------------------------------------------------------------------------------


class OwnNormalise(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in_place":
            return x.sub_(self.mean).div_(self.std)
        if self.how == "shift_first":
            return (x + (-self.mean)) * (1 / self.std)
        if self.how == "negative":
            return -1 * (self.mean - x) / self.std
        if self.how == "channels":
            parts = [(x[:, k] - float(self.mean[k])) / float(self.std[k]) for k in range(3)]
            return torch.stack(parts, 1)
        if self.how == "inception":  # torchvision's transform_input
            parts = [(x[:, k, None] - float(self.mean[k])) / float(self.std[k]) for k in range(3)]
            return torch.cat(parts, 1)
        return (x - self.mean) / self.std


@pytest.mark.parametrize(
    "how",
    [
        "out_of_place",
        "in_place",
        "shift_first",
        "negative",
        "channels",
        "inception",
        "torchvision",
        "classifier",
    ],
)
def test_input_relevance_refers_to_the_normalised_tensor(how: str) -> None:
    network, x = VGGLike(), pixels(2, 3, 8, 8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    if how == "torchvision":
        model: nn.Module = nn.Sequential(torchvision.transforms.Normalize(mean, std), network)
    elif how == "classifier":
        model = Classifier(network, mean, std).double()
        for part, values in (("mean", mean), ("std", std)):
            setattr(model.normalise, part, torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1))
    else:
        model = nn.Sequential(OwnNormalise(how), network)
    fed = (x - torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        std, dtype=torch.float64
    ).view(3, 1, 1)
    kept = x.clone()
    expected = SRD(start="ones").relevance(network, fed)
    alive(expected)
    got = SRD(start="ones").relevance(model, x)
    for a, b in zip(got.values(), expected.values(), strict=True):
        close(a, b, 1e-8)
    close(got["input"].sum((1, 2)), torch.full((2,), 4.0, dtype=torch.float64), 1e-8)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Tanh(), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(1)])
def test_input_relevance_of_a_bare_network_refers_to_x(first: nn.Module) -> None:
    """Also where its first layer is not a convolution, and where it overwrites what it is given."""
    torch.manual_seed(8)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    model = nn.Sequential(first, conv, nn.ReLU(inplace=True)).double().eval().requires_grad_(False)
    x = pixels(2, 3, 6, 6) - 0.4
    kept = x.clone()
    relevance = SRD(encoder="", start="ones").relevance(model, x)
    leaf = x.clone().requires_grad_()
    v = first(leaf.clone())
    u = conv(v)
    signal = (u / (u * u).sum(1, keepdim=True)).detach()
    g_v, g_x = torch.autograd.grad(u, (v, leaf), signal)
    expected = (x * g_x).sum(1)
    if "0" in relevance:  # x R / ||x||^2, times x
        close(relevance["0"], (v * g_v).sum(1))
        expected = relevance["0"]
    close(relevance["input"], expected)
    assert torch.equal(x, kept)


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_float32_follows_float64(name: str) -> None:
    graph = GRAPHS[name]
    x, start = images(graph), starts(graph)
    double = WHOLE.relevance(ref.as_module(graph), x, start=start)
    single = WHOLE.relevance(ref.as_module(graph).float(), x.float(), start=start)
    for a, b in zip(single.values(), double.values(), strict=True):
        assert a.dtype == torch.float32
        error = (a - b).abs().amax((1, 2)) / b.abs().amax((1, 2))
        assert (error < 1e-4).all()


def test_dead_positions_pass_nothing_on() -> None:
    """A blank image, a dead layer, and zero padding next to a dead field: 0, never NaN, in value and derivative."""
    graph = GRAPHS["dead_field"]
    model = ref.as_module(ref.with_head(graph, "gap"), "shared_inplace")
    live = ref.toy_input(graph)
    x = torch.stack([live, torch.zeros_like(live)])
    for unit in ("vector", "scalar"):
        for values in ("pre", "post"):
            for start in ("ones", "contrastive"):
                method = SRD(start=start, unit=unit, values=values)
                for layer in method.relevance(model, x).values():
                    assert torch.isfinite(layer).all()
                leaf = x.clone().requires_grad_()
                map_ = method.explain(model, leaf)
                assert map_[1].abs().max() == 0
                (slope,) = torch.autograd.grad(map_.square().sum(), leaf)
                assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", ["residual", "dense", "geometry"])
def test_a_batch_equals_its_images(name: str) -> None:
    graph = GRAPHS[name]
    model = ref.as_module(ref.with_head(graph, "mlp"), "shared_inplace")
    x = images(graph, 3)
    for start in ("ones", "contrastive"):
        together = SRD(start=start).relevance(model, x, torch.tensor([0, 4, 2]))
        for image, target in enumerate((0, 4, 2)):
            alone = SRD(start=start).relevance(model, x[image : image + 1], target)
            for a, b in zip(together.values(), alone.values(), strict=True):
                torch.testing.assert_close(a[image], b[0], rtol=1e-12, atol=1e-14)


# --- asking for what is not there --------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    model, x = VGGLike(), pixels(1, 3, 8, 8)
    for options, message in (
        ({"start": "random"}, r"SRD start='random' is not known; expected one of contrastive, gradcam, ones"),
        ({"unit": "matrix"}, r"unit='matrix'.*vector, scalar"),
        ({"values": "both"}, r"values='both'.*pre, post"),
    ):
        with pytest.raises(BadValue, match=message):
            SRD(**options)
    with pytest.raises(
        SrdLabError, match=r"no submodule 'featurs'; its parts are features, avgpool, classifier"
    ):
        SRD(encoder="featurs").explain(model, x)
    with pytest.raises(BadValue, match=r"start='random' is not known"):
        SRD().relevance(model, x, start="random")
    with pytest.raises(Refused, match=r"needs class logits behind the encoder; use start=\"ones\""):
        SRD(encoder="").explain(model.features, x)
    with pytest.raises(Refused, match=r"no end of an encoder was found.*encoder="):
        SRD(start="ones").explain(model.features, x)
    with pytest.raises(BadValue, match=r"position \(8, 0\) is outside the map of features.1, \(8, 8\)"):
        SRD().erf(model, x, "features.1", [(8, 0)])
    with pytest.raises(BadValue, match=r"activation call 9 does not exist; the model makes 4 calls"):
        SRD().erf(model, x, 9, [(0, 0)])


def test_conserved_reports_what_dead_fields_absorb() -> None:
    shares = {}
    for name in ("vgg_bias", "dead_field"):
        graph = ref.toy_graphs()[name]
        x, start = ref.toy_input(graph), ref.toy_start(graph)
        want = ref.srd(graph, x, start)["input"].sum() / start.sum()
        got = SRD(encoder="").conserved(ref.as_module(graph), x[None], start=start[None])
        assert got.shape == (1,)
        torch.testing.assert_close(got[0], want, rtol=1e-9, atol=0)
        shares[name] = float(want)
    assert shares["vgg_bias"] == pytest.approx(1)
    assert shares["dead_field"] < 0.95
