"""Class activation maps and FullGrad against their formulas, written out slowly, and the layers that they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import skimage.transform
import torch
import torch.nn.functional as F
from test_methods import Mixed, chain, normalised, pixels
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.catalogue import for_any_network
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue, Refused, SrdLabError, SrdLabWarning
from srd_lab.methods.cam import GradCAM, GradCAMPlusPlus, LayerCAM, XGradCAM
from srd_lab.methods.cam_by_passes import AblationCAM, ScoreCAM
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.methods.lrp import ExcitationBackprop
from srd_lab.registry import make_explainer

CAMS = {
    "gradcam": GradCAM,
    "gradcam_pp": GradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "layercam": LayerCAM,
    "scorecam": ScoreCAM,
    "ablationcam": AblationCAM,
}
Forward = Callable[[nn.Module, Tensor], Tensor]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert b.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def leaning(*layers: nn.Module) -> None:
    """Weights that are positive more often than not: the maps, which keep what is positive, are not empty."""
    for layer in layers:
        layer.weight += 0.7 * layer.weight.abs().mean()


# --- the formulas ------------------------------------------------------------------------------------------------------

# A network in two parts, front and back: the layer is what the first puts out, (1, K, h, w) of one image.


def slope_of(back: Forward, a: Tensor, c: int) -> Tensor:
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad(back(leaf)[0, c], leaf)[0]


def gradcam(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    a = front(x)
    g, map_ = slope_of(back, a, c), torch.zeros_like(a[0, 0])
    for k in range(a.shape[1]):
        map_ += g[0, k].sum() / g[0, k].numel() * a[0, k]
    return map_.clamp_min(0)


def gradcam_pp(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    a = front(x)
    g, map_ = slope_of(back, a, c), torch.zeros_like(a[0, 0])
    for k in range(a.shape[1]):
        weight, total = 0.0, float(a[0, k].sum())
        for slope in g[0, k].flatten().tolist():
            below = 2 * slope**2 + total * slope**3
            weight += (slope**2 / below if below else 0) * max(slope, 0)
        map_ += weight * a[0, k]
    return map_.clamp_min(0)


def xgradcam(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    a = front(x)
    g, map_ = slope_of(back, a, c), torch.zeros_like(a[0, 0])
    for k in range(a.shape[1]):
        total = float(a[0, k].sum())
        pairs = zip(g[0, k].flatten().tolist(), a[0, k].flatten().tolist(), strict=True)
        weight = sum(slope * value / total for slope, value in pairs) if total else 0.0
        map_ += weight * a[0, k]
    return map_.clamp_min(0)


def layercam(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    a = front(x)
    g, map_ = slope_of(back, a, c), torch.zeros_like(a[0, 0])
    for k in range(a.shape[1]):
        map_ += g[0, k].clamp_min(0) * a[0, k]
    return map_.clamp_min(0)


def scorecam(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    """One pass per channel; scikit-image stretches the masks."""
    a, scores = front(x), []
    for channel in a[0]:
        large = skimage.transform.resize(
            channel.numpy(), x.shape[2:], order=1, mode="edge", anti_aliasing=False
        )
        mask = torch.from_numpy(large)
        flat = channel.max() == channel.min()
        mask = torch.zeros_like(mask) if flat else (mask - mask.min()) / (mask.max() - mask.min())
        scores.append(float(back(front(x * mask))[0, c]))
    exponentials = torch.tensor(scores, dtype=torch.float64).exp()
    return sum(
        e / exponentials.sum() * channel for e, channel in zip(exponentials, a[0], strict=True)
    ).clamp_min(0)


def ablationcam(front: Forward, back: Forward, x: Tensor, c: int) -> Tensor:
    a, map_ = front(x), torch.zeros(1)
    whole = float(back(a)[0, c])
    for k in range(a.shape[1]):
        without = a.clone()
        without[:, k] = 0
        map_ = map_ + (whole - float(back(without)[0, c])) / whole * a[0, k]
    return map_.clamp_min(0)


LITERAL = {
    "gradcam": gradcam,
    "gradcam_pp": gradcam_pp,
    "xgradcam": xgradcam,
    "layercam": layercam,
    "scorecam": scorecam,
    "ablationcam": ablationcam,
}


class Parts(nn.Module):
    """front and back in one; ``style`` is how the layer is made: its own module, a reused in-place one, a function."""

    def __init__(
        self, style: str = "modules", kind: Callable[[Tensor], Tensor] = F.relu, dead: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.style, self.kind = style, kind
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.c, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        self.first, self.act = nn.ReLU(), nn.ReLU(style == "in place")
        self.double().eval().requires_grad_(False)
        if dead:
            self.b.bias[2] = -100.0
            self.b.weight[4], self.b.bias[4] = 0, 0.7  # the same everywhere
        leaning(self.c, self.fc)

    def front(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.kind(self.a(x)), 2)
        return self.kind(self.b(x))

    def back(self, a: Tensor) -> Tensor:
        return self.fc(self.kind(self.c(a)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "functional":
            return self.back(self.front(x))
        first = self.first if self.style == "modules" else self.act
        x = self.act(self.b(F.max_pool2d(first(self.a(x)), 2)))
        return self.fc((self.kind if self.style == "modules" else self.act)(self.c(x)).mean((2, 3)))


LEVELS = {"modules": "act", "in place": "act#2", "functional": 1}


@pytest.mark.parametrize("style", LEVELS)
@pytest.mark.parametrize("name", CAMS)
def test_maps_equal_their_formulas(name: str, style: str) -> None:
    """Dead and constant channels are among them."""
    model, x, target = Parts(style), pixels(3, 3, 10, 8), torch.tensor([2, 0, 1])
    got = CAMS[name](level=LEVELS[style]).explain(normalised(model), x, target)
    for map_, image, c in zip(got, normalised(model).normalise(x), target.tolist(), strict=True):
        close(map_, LITERAL[name](model.front, model.back, image[None], c))


@pytest.mark.parametrize("kind", [F.silu, F.elu, F.gelu, torch.tanh], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CAMS)
def test_maps_of_layers_with_negative_values_equal_their_formulas(name: str, kind: Any) -> None:
    model, x = Parts("functional", kind, dead=False), pixels(2, 3, 10, 8)
    got = CAMS[name](level=1).explain(model, x, 1)
    for map_, image in zip(got, x, strict=True):
        close(map_, LITERAL[name](model.front, model.back, image[None], 1))


def test_a_negative_logit_turns_ablation_cam_around() -> None:
    """The share of a logit that goes has the sign of both; a logit of 0 has no shares."""
    model, x = Parts("functional"), pixels(1, 3, 10, 8)
    model.fc.weight[0] *= -1
    model.fc.bias[0] = 0
    assert model(x)[0, 0] < 0
    close(AblationCAM(level=1).explain(model, x, 0)[0], ablationcam(model.front, model.back, x, 0))
    model.fc.weight[0], model.fc.bias[0] = 0, 0
    assert (AblationCAM(level=1).explain(model, x, 0) == 0).all()


@pytest.mark.parametrize("style", LEVELS)
def test_gradcam_equals_captum(style: str) -> None:
    """Which reads modules, one call each: the plain network's, whose values are the same."""
    x, plain = pixels(2, 3, 10, 8), Parts()
    expected = captum.attr.LayerGradCam(plain, plain.act).attribute(x, 1, relu_attributions=True)
    close(GradCAM(level=LEVELS[style]).explain(Parts(style), x, 1), expected[:, 0].detach())
    expected = captum.attr.LayerGradCam(plain, plain.first).attribute(x, 1, relu_attributions=True)
    close(GradCAM(level=0).explain(Parts(style), x, 1), expected[:, 0].detach())


@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
@pytest.mark.parametrize("level", ["act", "first"])
def test_passes_in_parts_are_the_same_passes(name: str, level: str) -> None:
    x, target = pixels(2, 3, 10, 8), torch.tensor([2, 0])
    for model in (Parts(), SmoothModel(normalised(Parts()), 4.0)):
        found = []
        for at_once in (1, 3, 1000, None):
            leaf = x.clone().requires_grad_()
            map_ = CAMS[name](level=level, images_at_once=at_once).explain(model, leaf, target)
            plain = CAMS[name](level=level, images_at_once=at_once).explain(model, x, target)
            assert not plain.requires_grad
            close(map_.detach(), plain, 1e-12)
            found.append((map_.detach(), torch.autograd.grad(map_.square().sum(), leaf)[0]))
        for map_, slope in found[:-1]:
            close(map_, found[-1][0], 1e-12)
            close(slope, found[-1][1])


def test_no_pass_holds_more_images_than_allowed() -> None:
    sizes: dict[str, list[int]] = {"front": [], "back": []}
    model, x = Parts(), pixels(2, 3, 10, 8)
    model.a.register_forward_hook(lambda module, inputs, out: sizes["front"].append(len(out)))
    model.c.register_forward_hook(lambda module, inputs, out: sizes["back"].append(len(out)))
    for method in (ScoreCAM(level="act"), AblationCAM(level="act")):
        method.explain(model, x, 1)  # a model is tried out when it is first explained
    for found in sizes.values():
        found.clear()

    def batches(part: str) -> list[int]:
        return [size for size in sizes[part] if size > 1]

    ScoreCAM(level="act", images_at_once=3).explain(model, x, 1)
    # the batch itself, then for either image 4 lively channels and one of the other two for both
    assert batches("front") == batches("back") == [2, 3, 2, 3, 2]
    for found in sizes.values():
        found.clear()
    AblationCAM(level="act", images_at_once=3).explain(model, x, 1)
    assert (batches("front"), batches("back")) == ([2], [2, 3, 2, 3, 2])  # one channel is zero


# --- where the layer is -----------------------------------------------------------------------------------------------


class Route(nn.Module):
    """The layer ``act`` in all sorts of company."""

    def __init__(self, join: Callable[[Tensor, Tensor, nn.Module], Tensor], wide: int = 4) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.act, self.join, self.fc = nn.ReLU(), join, nn.Linear(wide, 3)
        self.double().eval().requires_grad_(False)
        leaning(self.c, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.a(x))
        left = F.softplus(self.b(x))
        right = self.act(self.c(x))
        return self.fc(self.join(left, right, self).mean((2, 3)))


def added_to(left: Tensor, right: Tensor, model: Any) -> Tensor:
    left += right
    return left


def changed_in_place(left: Tensor, right: Tensor, model: Any) -> Tensor:
    right *= 2
    right += left
    return F.elu_(right)


def looked_at(left: Tensor, right: Tensor, model: Any) -> Tensor:
    """Properties are torch functions too, and no events."""
    return right + left if right.shape[1:] == left.shape[1:] else left


def reshaped(left: Tensor, right: Tensor, model: Any) -> Tensor:
    """By a batch size that was asked for before."""
    return right.view(len(left), 4, -1).view(left.shape) + left


ROUTES: dict[str, tuple[Callable[[Tensor, Tensor, nn.Module], Tensor], int]] = {
    "skip": (lambda left, right, model: model.c(right) + right, 4),
    "skip in place": (lambda left, right, model: F.elu_(model.c(right).add_(right)), 4),
    "sum": (lambda left, right, model: left + right, 4),
    "sum in place": (added_to, 4),
    "changed in place": (changed_in_place, 4),
    "concatenated": (lambda left, right, model: torch.cat([left, right], 1), 8),
    "looked at": (looked_at, 4),
    "reshaped": (reshaped, 4),
    "product": (lambda left, right, model: left * right, 4),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("at_once", [1, 3, None])
def test_ablation_reaches_all_that_the_layer_reaches(route: str, at_once: int | None) -> None:
    """One channel zeroed by a forward hook, image by image, channel by channel."""
    model, x = Route(*ROUTES[route]), pixels(2, 3, 8, 6)
    expected, layers = [], []
    watch = model.act.register_forward_hook(lambda module, inputs, out: layers.append(out.clone()))
    whole = model(x)[:, 1]
    watch.remove()
    drops = []
    for k in range(4):
        hook = model.act.register_forward_hook(
            lambda module, inputs, out, k=k: out.index_fill(1, torch.tensor([k]), 0)
        )
        drops.append((whole - model(x)[:, 1]) / whole)
        hook.remove()
    expected = torch.einsum("kn,nkhw->nhw", torch.stack(drops), layers[0]).clamp_min(0)
    method = AblationCAM(level="act", images_at_once=at_once)
    close(method.explain(model, x, 1), expected)
    leaf = x.clone().requires_grad_()
    map_ = method.explain(model, leaf, 1)
    close(map_.detach(), expected)
    assert torch.autograd.grad(map_.sum(), leaf)[0].abs().max() > 0


@pytest.mark.parametrize("at_once", [1, 3, None])
def test_a_layer_that_is_changed_behind_its_back_is_ablated_there(at_once: int | None) -> None:
    def unread(left: Tensor, right: Tensor, model: Any) -> Tensor:
        F.relu_(left)
        return left + right

    method, x = AblationCAM(level="relu", images_at_once=at_once), pixels(2, 3, 8, 6)
    expected = method.explain(Route(lambda left, right, model: F.relu(left) + right), x, 1)
    assert expected.any()
    close(method.explain(Route(unread), x, 1), expected)


@pytest.mark.parametrize("at_once", [1, None])
def test_a_layer_that_nobody_reads_cannot_be_ablated(at_once: int | None) -> None:
    def unread(left: Tensor, right: Tensor, model: Any) -> Tensor:
        F.relu(left)
        return left + right

    with pytest.raises(
        SrdLabError, match=r"level 'relu' cannot be ablated: the model does not use what that call"
    ):
        AblationCAM(level="relu", images_at_once=at_once).explain(Route(unread), pixels(2, 3, 8, 6), 1)


@pytest.mark.parametrize("name", CAMS)
def test_hooks_of_the_model_do_not_move_the_layer(name: str) -> None:
    """Where gradients are on, backward hooks look at tensors more often, which must not be counted."""
    x, found = pixels(2, 3, 8, 8), []
    for hooked in (False, True):
        model = Mixed()
        if hooked:
            model.last.register_full_backward_hook(lambda module, grad_in, grad_out: None)
            model.pool.register_full_backward_pre_hook(lambda module, grad_out: None)
            model.fc.register_forward_pre_hook(lambda module, inputs: None)
        for leaf in (x, x.clone().requires_grad_()):
            found.append(CAMS[name]().explain(model, leaf, 2).detach())
    for map_ in found[1:]:
        close(map_, found[0], 1e-12)


@pytest.mark.parametrize("name", CAMS)
def test_a_named_encoder_does_not_move_named_layers(name: str) -> None:
    model, x = Route(ROUTES["skip"][0]), pixels(2, 3, 8, 6)
    close(
        CAMS[name](level="act", encoder="a").explain(model, x, 1),
        CAMS[name](level="act").explain(model, x, 1),
    )
    close(CAMS[name](encoder="act").explain(model, x, 1), CAMS[name](level="act").explain(model, x, 1))


class Ladder(nn.Module):
    """A VGG in small: three max pools, the last of them the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        layers: list[nn.Module] = []
        for before, after in ((3, 4), (4, 5), (5, 6), (6, 5)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
        self.features, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(20, 6), nn.ReLU(True), nn.Linear(6, 3))
        self.double().eval().requires_grad_(False)
        for layer in layers[::3]:
            layer.bias += 0.3
            leaning(layer)
        leaning(self.classifier[0], self.classifier[2])

    def tail(self, t: Tensor, after: int) -> Tensor:
        return self.classifier(self.pool(self.features[after:](t)).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


@pytest.mark.parametrize("name", CAMS)
def test_low_is_the_last_pool_and_high_the_last_activation_at_an_eighth(name: str) -> None:
    model, x = Ladder(), pixels(2, 3, 48, 64)
    for level, after, size in (("low", 12, (3, 4)), ("high", 11, (6, 8))):
        got = CAMS[name](level=level).explain(model, x, 1)
        assert got.shape == (2, *size)
        for map_, image in zip(got, x, strict=True):
            front = lambda t, after=after: model.features[:after](t.clone())  # noqa: E731
            close(
                map_,
                LITERAL[name](front, lambda t, after=after: model.tail(t.clone(), after), image[None], 1),
            )
    same = CAMS[name](encoder="features").explain(model, x, 1)
    assert torch.equal(same, CAMS[name]().explain(model, x, 1))
    assert torch.equal(got, CAMS[name](level="features.10").explain(model, x, 1))
    with pytest.warns(
        SrdLabWarning, match=r"has 1/8 of the input's size, \(2, 3\); the nearest has \(3, 8\)"
    ):
        assert CAMS[name](level="high").explain(Parts(), pixels(1, 3, 10, 20), 1).shape == (1, 3, 8)
    with pytest.raises(BadValue, match=r"no activation call is named 'nine'"):
        CAMS[name](level="nine").explain(model, x, 1)


class ChannelsLast(nn.Module):
    """ConvNeXt's way: positions first, channels last, and back."""

    def __init__(self, kind: type[nn.Module] = nn.GELU, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.stem, self.norm = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4) if norm else nn.Identity()
        self.fc1, self.act, self.fc2, self.fc = nn.Linear(4, 7), kind(), nn.Linear(7, 4), nn.Linear(4, 3)
        self.double().eval().requires_grad_(False)
        self.fc1.bias += 0.5
        self.fc.bias += 2  # a logit > 0
        leaning(self.fc2, self.fc)

    def front(self, x: Tensor) -> Tensor:
        """(N, K, h, w)."""
        return self.act(self.fc1(self.norm(self.stem(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    def back(self, a: Tensor) -> Tensor:
        return self.fc(self.fc2(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.fc2(self.act(self.fc1(self.norm(x.permute(0, 2, 3, 1)))))
        return self.fc(x.permute(0, 3, 1, 2).mean((2, 3)))


@pytest.mark.parametrize("name", CAMS)
def test_channels_may_come_last(name: str) -> None:
    model, x = ChannelsLast(), pixels(2, 3, 10, 6)
    got = CAMS[name](level="act").explain(model, x, 1)
    assert got.shape == (2, 5, 3)
    for map_, image in zip(got, x, strict=True):
        close(map_, LITERAL[name](model.front, model.back, image[None], 1))


def test_excitation_of_channels_last_is_that_of_channels_first() -> None:
    model, x = ChannelsLast(nn.ReLU, norm=False), pixels(2, 3, 10, 6)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 7, 1).double(), nn.Conv2d(7, 4, 1).double()
            for conv, fc in ((self.one, model.fc1), (self.two, model.fc2)):
                conv.weight.data, conv.bias.data = fc.weight.data[..., None, None], fc.bias.data
            self.act = nn.ReLU()
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return model.fc(self.two(self.act(self.one(model.stem(x)))).mean((2, 3)))

    got = ExcitationBackprop(level="act").explain(model, x, 1)
    assert got.shape == (2, 5, 3)
    close(got, ExcitationBackprop(level="act").explain(First(), x, 1))
    close(got.sum((1, 2)), torch.ones(2).double())


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.stem, self.fc1, self.act = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 5), nn.ReLU()
        self.fc = nn.Linear(5, 3)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.fc1(F.relu(self.stem(x)).flatten(2).transpose(1, 2))).mean(1))

    def front(self, x: Tensor) -> Tensor:
        """(N, K, h, w)."""
        return self.act(self.fc1(F.relu(self.stem(x)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def back(self, a: Tensor) -> Tensor:
        return self.fc(a.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
@pytest.mark.parametrize("name", CAMS)
def test_rows_of_tokens_are_the_maps_that_they_were(name: str) -> None:
    model, x = Rows(), pixels(2, 3, 8, 6)
    for level in ("act", "low", "high"):
        got = CAMS[name](level=level).explain(model, x, 1)
        for map_, image in zip(got, x, strict=True):
            close(map_, LITERAL[name](model.front, model.back, image[None], 1))
    assert CAMS[name](level="relu").explain(model, x, 1).shape == (2, 4, 3)
    with pytest.raises(Refused, match=r"no map of relevance is at 'act'; choose another level"):
        ExcitationBackprop(level="act").explain(model, x, 1)


# --- FullGrad ---------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Convolutions with and without bias, batch norm behind them and alone, a skip, pools, linear layers."""

    def __init__(self, kind: Callable[[Tensor], Tensor], inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.kind, self.inplace = kind, inplace
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.c, self.on_b, self.alone = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.on_c, self.fc1, self.fc2 = nn.BatchNorm2d(4), nn.Linear(16, 5), nn.Linear(5, 3)
        for norm in (self.on_b, self.alone, self.on_c):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.4, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.double().eval().requires_grad_(False)

    def places(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Layers with a bias and what each made of x; the last is the whole."""
        made: list[tuple[nn.Module, Tensor]] = []

        def through(layer: nn.Module, t: Tensor) -> Tensor:
            made.append((layer, layer(t)))
            return made[-1][1]

        x = F.max_pool2d(self.kind(through(self.a, x)), 2)
        skip = through(self.alone, x)
        x = self.kind(through(self.on_b, self.b(self.kind(skip))))
        x = F.avg_pool2d(through(self.on_c, through(self.c, x)) + skip, 2)
        through(self.fc2, self.kind(through(self.fc1, x.flatten(1))))
        return made

    def forward(self, x: Tensor) -> Tensor:
        def kind(t: Tensor) -> Tensor:
            return F.relu(t, inplace=True) if self.inplace else self.kind(t)

        x = F.max_pool2d(kind(self.a(x)), 2)
        skip = self.alone(x)
        y = self.on_c(self.c(kind(self.on_b(self.b(kind(skip.clone()))))))
        y += skip
        return self.fc2(kind(self.fc1(F.avg_pool2d(y, 2).flatten(1))))


def bias_of(layer: nn.Module) -> Tensor:
    if not isinstance(layer, nn.BatchNorm2d):
        return layer.bias
    return layer.bias - layer.running_mean * layer.weight / (layer.running_var + layer.eps).sqrt()


@pytest.mark.parametrize("inplace", [False, True])
def test_fullgrad_is_the_sum_of_its_terms(inplace: bool) -> None:
    """Slope times bias, by the chain of layers as it stands; scikit-image stretches the maps."""
    model, x = Layers(F.relu, inplace), pixels(2, 3, 8, 8) - 0.3
    leaf = x.clone().requires_grad_()
    made = model.places(leaf)
    slopes = torch.autograd.grad(made[-1][1][:, 2].sum(), [leaf, *(y for _, y in made)])
    products = [leaf.detach() * slopes[0]]
    for (layer, y), slope in zip(made, slopes[1:], strict=True):
        bias = bias_of(layer)
        products.append(slope * (bias[:, None, None] if y.dim() == 4 else bias))
    expected = torch.stack([p.flatten(1).sum(1) for p in products], 1)
    close(FullGrad().terms(model, x, 2), expected)
    whole = torch.zeros(2, 8, 8).double()
    for product in (p for p in products if p.dim() == 4):
        for i in range(2):
            size = product[i].abs()
            size = (size - size.min()) / (size.max() - size.min())
            for channel in size.numpy():
                large = skimage.transform.resize(channel, (8, 8), order=1, mode="edge", anti_aliasing=False)
                whole[i] += torch.from_numpy(large)
    close(FullGrad().explain(model, x, 2), whole)


@pytest.mark.parametrize(
    "kind", [F.relu, F.leaky_relu, F.elu, F.silu, torch.tanh, F.relu6, F.softplus, F.gelu]
)
@pytest.mark.parametrize("target", [0, None])
def test_full_gradients_add_up_to_the_logit(kind: Any, target: int | None) -> None:
    x = pixels(3, 3, 8, 8) - 0.3
    for network in (Layers(kind), normalised(Layers(kind)), SmoothModel(normalised(Layers(kind)), 3.0)):
        terms, logits = FullGrad().terms(network, x, target), network(x)
        close(terms.sum(1), logits[:, 0] if target == 0 else logits.max(1).values)
        activations = 4 * (kind not in (F.relu, F.leaky_relu) or isinstance(network, SmoothModel))
        assert terms.shape == (3, 1 + 7 + activations)
        assert kind is F.relu6 or (terms.abs().amax(0) > 0).all()


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("inplace", [False, True])
def test_full_gradients_add_up_where_an_activation_overwrites_the_normalised_image(
    inplace: bool, kind: type[nn.Module]
) -> None:
    x = pixels(2, 3, 8, 8)
    network = nn.Sequential(normalised(nn.Identity()).normalise, kind(inplace), Layers(F.relu)).eval()
    for model in (network, SmoothModel(network, 5.0)):
        close(FullGrad().terms(model, x, 2).sum(1), model(x)[:, 2])
        assert FullGrad().explain(model, x, 2).any()


FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "to one axis": lambda y: (y.flatten() + 0.1).view_as(y),
    "in place": lambda y: y.clone().flatten().add_(0.1).view_as(y),
    "to two": lambda y: (y.flatten(1) + 0.1).view_as(y),
    "linear": lambda y: F.linear(y.flatten(), torch.eye(y.numel()), torch.full((y.numel(),), 0.1)).view_as(y),
}


@pytest.mark.parametrize("shifted", FLATTENED.values(), ids=FLATTENED)
def test_full_gradients_add_up_where_a_map_is_flattened_and_restored(
    shifted: Callable[[Tensor], Tensor],
) -> None:
    """A bias of what has no places any more counts for the sum alone."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.b(shifted(F.relu(self.a(x))))).mean((2, 3)))  # type: ignore[no-any-return]

    model, x = Flattened().eval(), pixels(2, 3, 8, 8).float()
    torch.testing.assert_close(FullGrad().terms(model, x, 1).sum(1), model(x)[:, 1])
    if shifted is not FLATTENED["linear"]:  # of which it is not known where its map lies
        assert FullGrad().explain(model, x, 1).shape == (2, 8, 8)


def test_full_gradients_of_channels_last_are_those_of_channels_first() -> None:
    model, x = ChannelsLast(norm=False), pixels(2, 3, 10, 6)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 7, 1).double(), nn.Conv2d(7, 4, 1).double()
            for conv, fc in ((self.one, model.fc1), (self.two, model.fc2)):
                conv.weight.data, conv.bias.data = fc.weight.data[..., None, None], fc.bias.data
            self.eval().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return model.fc(self.two(F.gelu(self.one(model.stem(x)))).mean((2, 3)))

    close(FullGrad().explain(model, x, 1), FullGrad().explain(First(), x, 1))
    close(FullGrad().terms(model, x, 1), FullGrad().terms(First(), x, 1))


class WithBias(nn.Module):
    """A network in which ``made`` adds a bias to a map (N, 6, h, w)."""

    def __init__(self, made: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.made, self.stem, self.fc = made, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.scale, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(6))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.made(self.stem(x), self.scale, self.bias)).flatten(2).mean(2))  # type: ignore[no-any-return]


def over_channels(norm: Callable[[Tensor, list[int], Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda y, scale, bias: norm(y.movedim(1, -1), [6], scale, bias).movedim(-1, 1)


OF_NONE = torch.zeros(6).double(), torch.ones(6).double()  # statistics that shift nothing
NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.layer_norm": over_channels(F.layer_norm),
    "torch.layer_norm": over_channels(torch.layer_norm),
    "F.group_norm": lambda y, w, b: F.group_norm(y, 2, w, b),
    "torch.group_norm": lambda y, w, b: torch.group_norm(y, 2, w, b),
    "F.instance_norm": lambda y, w, b: F.instance_norm(y, None, None, w, b),
    "F.batch_norm": lambda y, w, b: F.batch_norm(y, *OF_NONE, w, b),
    "torch.batch_norm": lambda y, w, b: torch.batch_norm(y, w, b, *OF_NONE, False, 0.1, 1e-5, False),
    "over channels last": lambda y, w, b: F.layer_norm(y.permute(0, 2, 3, 1), [6], w, b).permute(0, 3, 1, 2),
    "aten": lambda y, w, b: torch.ops.aten.batch_norm.default(y, w, b, *OF_NONE, False, 0.1, 1e-5, False),
    "a sum": lambda y, w, b: y * w.view(6, 1, 1) + b.view(6, 1, 1),
    "addcmul": lambda y, w, b: torch.addcmul(b.view(6, 1, 1), y, w.view(6, 1, 1)),
    "conv1d": lambda y, w, b: F.conv1d(y.flatten(2), torch.diag(w)[..., None], b),
    "lerp": lambda y, w, b: torch.lerp(y, b.view(6, 1, 1), 0.3),
    "index_add": lambda y, w, b: y.index_add(1, torch.arange(6), b.view(1, 6, 1, 1).expand_as(y)),
    "conv_transpose2d": lambda y, w, b: F.conv_transpose2d(y, torch.diag(w)[..., None, None], b),
}


@pytest.mark.parametrize("name", NORMS)
def test_fullgrad_sees_the_bias_of_every_norm(name: str) -> None:
    """However it is spelled: what it adds is the bias times the logit's derivative by it."""
    model, x = WithBias(NORMS[name]), pixels(1, 3, 8, 8)
    wanted = [
        (parameter * torch.autograd.grad(model(x)[0, 1], parameter)[0]).sum()
        for parameter in (model.stem.bias, model.bias, model.fc.bias)
    ]
    terms = FullGrad().terms(model, x, 1)[0, 1:]
    torch.testing.assert_close(terms, torch.stack(wanted).detach(), atol=1e-12, rtol=1e-9)
    assert abs(wanted[1]) > 0.1


@pytest.mark.parametrize(
    "made",
    [
        lambda y, w, b: torch.native_batch_norm(y, w, b, *OF_NONE, False, 0.1, 1e-5)[0],
        lambda y, w, b: torch.lerp(y, b.sum() * torch.arange(36).double().view(6, 6), 0.3),
    ],
    ids=["native_batch_norm", "lerp along rows"],
)
def test_fullgrad_refuses_a_bias_that_it_has_no_place_for(made: Callable[..., Tensor]) -> None:
    model, x = WithBias(made), pixels(1, 3, 8, 8)
    with pytest.raises(Refused, match="adds a bias that FullGrad has no place for"):
        FullGrad().explain(model, x, 1)
    model.bias.data.zero_()  # nothing is added
    assert FullGrad().explain(model, x, 1).isfinite().all()


def test_fullgrad_of_a_network_without_biases_is_its_input_gradient() -> None:
    model, x = chain(), pixels(2, 3, 8, 8) - 0.5
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias = None
    leaf = x.clone().requires_grad_()
    product = captum.attr.InputXGradient(model).attribute(leaf, 1).detach().abs()
    low, high = product.amin((1, 2, 3), True), product.amax((1, 2, 3), True)
    close(FullGrad().explain(model, x, 1), ((product - low) / (high - low)).sum(1))
    assert FullGrad().terms(model, x, 1).shape == (2, 1)
    assert torch.equal(maps.upsample(product[:, 0], (8, 8)), product[:, 0])


@pytest.mark.parametrize("kind", [nn.SiLU, nn.ELU])
@pytest.mark.parametrize("name", for_any_network())
def test_smooth_networks_are_explained_by_all_but_the_rules_for_positive_values(
    name: str, kind: type[nn.Module]
) -> None:
    network, x = Ladder(), pixels(1, 3, 32, 32)
    for i in (1, 4, 7, 10):
        network.features[i] = kind()
    network.classifier[1] = kind()
    network.classifier[2].weight[1] += 1  # a logit > 0, and above the mean
    short = {"integrated_gradients": {"steps": 2}, "smoothgrad": {"samples": 2}}.get(name, {})
    method = make_explainer(name, **short)
    if name in ("lrp_zplus", "lrp_gamma", "excitation_backprop", "contrastive_excitation"):
        said = rf"activations that are >= 0 .*'features.1' is {kind.__name__.lower()}; use another method"
        with pytest.raises(Refused, match=said):
            method.explain(network, x, 1)
        return
    map_ = method.explain(network, x, 1)
    assert map_.isfinite().all()
    assert map_.abs().max() > 0


@pytest.mark.parametrize("at_once", [1, 3, None])
def test_a_model_that_goes_through_the_batch_is_ablated_from_the_start(at_once: int | None) -> None:
    """One image meets many copies of a layer, image by image."""

    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.a, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
            self.double().eval().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return self.fc(torch.stack([part.mean((1, 2)) + x[i].mean() for i, part in enumerate(y)]))

    model, x = Loops(), pixels(2, 3, 8, 6)
    layer = F.relu(model.a(x))
    score = model(x)[:, 1]
    for i, map_ in enumerate(AblationCAM(level="relu", images_at_once=at_once).explain(model, x, 1)):
        weights = []
        for k in range(4):
            cut = layer[i].clone()
            cut[k] = 0
            weights.append((score[i] - model.fc(cut.mean((1, 2)) + x[i].mean())[1]) / score[i])
        close(map_, torch.relu((torch.stack(weights)[:, None, None] * layer[i]).sum(0)))
