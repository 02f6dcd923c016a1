"""Class activation maps against grad-cam, on layers that both know. Where a definition differs, theirs and ours are each
held against their own, written out, and agree once the difference is taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_networks import command, tiny_study
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.errors import SrdLabError
from srd_lab.methods.fullgrad import _products
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer

grad_cam = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam: pip install -e '.[dev,peers-cam]'")

SIZE = 64
TARGETS = torch.tensor([3, 7])


def resnet() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.bias.data.uniform_(-0.2, 0.2)
    return model, model.layer4[-1]


def vgg() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 12)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    features = nn.Sequential(*layers)
    head = [nn.Flatten(), nn.Linear(12 * 64, 20), nn.ReLU(inplace=True), nn.Linear(20, 10)]
    return nn.Sequential(features, *head).double().eval(), features[-1]


NETWORKS = {"resnet18": resnet, "vgg": vgg}
on_both = pytest.mark.parametrize("network", NETWORKS)


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def theirs(kind: Any, model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """grad-cam's map at the layer, before it is scaled, and the one that it gives out."""
    raw: list[np.ndarray] = []
    with kind(model, [layer]) as method:
        inner = method.get_cam_image

        def noted(*args: Any, **kwargs: Any) -> np.ndarray:
            raw.append(inner(*args, **kwargs))
            return raw[-1]

        method.get_cam_image = noted
        out = method(x, [lambda logits, k=int(k): logits[k] for k in TARGETS])
    return torch.from_numpy(raw[0]).to(x).clamp_min(0), torch.from_numpy(out).to(x)


def as_shown(raw: Tensor) -> Tensor:
    """What grad-cam gives out for a map: its least value taken off, divided by the largest, stretched, and that once more.
    Ours leave zero where it is: srd_lab.maps.prepared divides only."""
    for size in (SIZE, None):
        raw = raw - raw.amin((1, 2), keepdim=True)
        raw = raw / (1e-7 + raw.amax((1, 2), keepdim=True))
        raw = maps.upsample(raw, (size, size)) if size else raw
    return raw


def equal(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.max() > 0
    assert (got - expected).abs().max() <= tolerance * expected.max()


def layer_and_slope(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    held: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, out: held.append(out))
    score = model(x).gather(1, TARGETS[:, None]).sum()
    handle.remove()
    return held[0].detach(), torch.autograd.grad(score, held[0])[0]


@on_both
@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("gradcam", "GradCAM", 1e-12),
        ("xgradcam", "XGradCAM", 1e-5),  # theirs adds 1e-7 to the sum of a channel
        ("layercam_low", "LayerCAM", 1e-12),
    ],
)
def test_cams_of_one_backward_pass(network: str, name: str, kind: str, tolerance: float) -> None:
    model, layer = NETWORKS[network]()
    ours = make_explainer(name).explain(model, images(), TARGETS)
    raw, shown = theirs(getattr(grad_cam, kind), model, layer, images())
    equal(ours, raw, tolerance)
    equal(as_shown(ours), shown, 1e-4)  # OpenCV stretches with coarser weights


def test_layers_in_the_middle() -> None:
    model, x = resnet()[0], images()
    for kind, name in (("LayerCAM", "layercam_high"), ("GradCAM", "gradcam")):
        ours = make_explainer(name, level="layer2").explain(model, x, TARGETS)
        equal(ours, theirs(getattr(grad_cam, kind), model, model.layer2[-1], x)[0], 1e-12)
    assert torch.equal(
        make_explainer("layercam_high").explain(model, x, TARGETS),
        make_explainer("layercam_high", level="layer2").explain(model, x, TARGETS),
    )


@on_both
def test_gradcam_pp(network: str) -> None:
    """Theirs adds 1e-6 to 2 g^2 + g^3 sum A, which is more than g^2 for slopes below 1e-3: most of a real network."""
    model, layer = NETWORKS[network]()
    a, g = layer_and_slope(model, layer, images())

    def definition(added: float) -> Tensor:
        below = 2 * g**2 + g**3 * a.sum((2, 3), keepdim=True) + added
        share = torch.where(g == 0, 0, g**2 / torch.where(g == 0, 1, below))
        return torch.relu(((share * torch.relu(g)).sum((2, 3), keepdim=True) * a).sum(1))

    equal(make_explainer("gradcam_pp").explain(model, images(), TARGETS), definition(0), 1e-9)
    equal(theirs(grad_cam.GradCAMPlusPlus, model, layer, images())[0], definition(1e-6), 1e-9)
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    last.weight.data *= 1e6  # slopes beside which 1e-6 is nothing
    ours = make_explainer("gradcam_pp").explain(model, images(), TARGETS)
    equal(ours, theirs(grad_cam.GradCAMPlusPlus, model, layer, images())[0], 1e-6)


@on_both
def test_scorecam(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs stretches the masks corner to corner (align_corners=True); ours, and the authors' code, do not."""
    model, layer = NETWORKS[network]()
    model, x = model.float(), images().float()
    ours = make_explainer("scorecam").explain(model, x, TARGETS)

    def stretched(corners: bool) -> Callable[..., Any]:
        return lambda size: nn.Upsample(size, mode="bilinear", align_corners=corners)

    def corner_to_corner(channels: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(channels[:, None], size, mode="bilinear", align_corners=True)[:, 0]

    apart, _ = theirs(grad_cam.ScoreCAM, model, layer, x)
    with monkeypatch.context() as patch:
        patch.setattr(nn, "UpsamplingBilinear2d", stretched(False))
        raw, shown = theirs(grad_cam.ScoreCAM, model, layer, x)
        equal(ours, raw, 1e-5)
        equal(as_shown(ours), shown, 1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(maps, "upsample", corner_to_corner)
        equal(make_explainer("scorecam").explain(model, x, TARGETS), apart, 1e-5)


@on_both
def test_ablationcam(network: str) -> None:
    model, layer = NETWORKS[network]()
    model, x = model.float(), images().float()
    ours = make_explainer("ablationcam").explain(model, x, TARGETS)
    raw, shown = theirs(grad_cam.AblationCAM, model, layer, x)
    equal(ours, raw, 1e-3)  # drops of logits in float32
    equal(as_shown(ours), shown, 1e-3)


def test_ablation_sets_channels_to_zero_whatever_the_layer() -> None:
    """Theirs sets them to the layer's least value - 1e7 where that is not 0, after an ELU, say."""
    model, _ = vgg()
    model[0][7] = nn.ELU()
    layer, x = model[0][8], images()
    ours = make_explainer("ablationcam").explain(model, x, TARGETS)
    with torch.no_grad():
        a = model[0](x)
        score, rows = model(x).gather(1, TARGETS[:, None]), []
        for k in range(a.shape[1]):
            without = a.clone()
            without[:, k] = 0
            rows.append(score - model[1:](without).gather(1, TARGETS[:, None]))
        definition = torch.relu((torch.stack(rows, 1)[..., None] / score[:, :, None, None] * a).sum(1))
    equal(ours, definition, 1e-9)
    assert theirs(grad_cam.AblationCAM, model, layer, x)[0].max() > 1e4 * ours.max()


def test_hooks_of_theirs_are_no_part_of_the_network() -> None:
    """They call .cpu() on what the layer puts out, which returns the same tensor, and throw it away."""
    model, layer = resnet()
    expected = make_explainer("ablationcam").explain(model, images(), TARGETS)
    with grad_cam.GradCAM(model, [layer]):
        equal(make_explainer("ablationcam").explain(model, images(), TARGETS), expected, 1e-12)


@on_both
def test_fullgrad(network: str) -> None:
    """Theirs stretches every channel to [0, 1] by itself, with 1e-7 added to its largest; ours every layer, as the
    authors' code does. Stretched as theirs, our gradients and biases make their map."""
    model, _ = NETWORKS[network]()
    terms = [p.detach().abs() for p in _products(model, images(), TARGETS)[0] if p.dim() == 4]

    def stretched(axes: tuple[int, ...], added: float) -> Tensor:
        low = [p.amin(axes, True) for p in terms]
        scaled = [(p - z) / ((p - z).amax(axes, True) + added) for p, z in zip(terms, low, strict=True)]
        return torch.stack([maps.upsample(s.sum(1), (SIZE, SIZE)) for s in scaled]).sum(0)

    with grad_cam.FullGrad(model, []) as method:
        out = method(images(), [lambda logits, k=int(k): logits[k] for k in TARGETS])
    expected = stretched((2, 3), 1e-7)
    low, high = expected.amin((1, 2), True), expected.amax((1, 2), True)
    equal((expected - low) / (high - low), torch.from_numpy(out).double(), 1e-3)
    equal(make_explainer("fullgrad").explain(model, images(), TARGETS), stretched((1, 2, 3), 1e-30), 1e-9)


@on_both
@pytest.mark.parametrize("kind", ["GradCAM", "GradCAMPlusPlus", "LayerCAM", "ScoreCAM", "FullGrad"])
def test_theirs_by_name_are_theirs(network: str, kind: str) -> None:
    """``pytorch_grad_cam:CLASS``: their map on the network proper, as they give it out; the model is left as it was."""
    net, layer = NETWORKS[network]()
    net = net.float()
    model = Classifier(net, (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)).eval()
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with getattr(grad_cam, kind)(net, [layer]) as method:
        expected = method(model.normalise(x), [lambda logits, k=int(k): logits[k] for k in TARGETS])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    name = next(name for name, module in net.named_modules() if module is layer)
    options = "" if kind == "FullGrad" else f"?layer={name}"
    explainer = make_explainer(f"pytorch_grad_cam:{kind}{options}")
    found = explainer.explain(model, x, TARGETS)
    equal(found, torch.from_numpy(expected), 1e-5)
    assert all(bool((p.grad == 1).all()) for p in net.parameters() if p.grad is not None)
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    asked = x.clone().requires_grad_()
    assert not explainer.explain(model, asked, TARGETS).requires_grad
    assert asked.grad is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GradCAM", r"take layer=NAME, all but FullGrad"),
        ("FullGrad?layer=layer4", r"take layer=NAME, all but FullGrad"),
        ("BaseCAM?layer=layer4", r"pytorch_grad_cam has no method 'BaseCAM'"),
        ("Nothing?layer=layer4", r"pytorch_grad_cam has no method 'Nothing'; expected one such as GradCAM"),
        ("GradCAM?layer=nowhere", r"the network has no module 'nowhere'; its first ones are conv1, bn1"),
        ("GradCAM?layer=layer4&width=3", r"got an unexpected keyword argument 'width'"),
    ],
)
def test_a_name_that_is_none_of_theirs_is_one_line(name: str, said: str) -> None:
    with pytest.raises(SrdLabError, match=said):
        make_explainer(f"pytorch_grad_cam:{name}").explain(resnet()[0].float(), images().float(), TARGETS)


@pytest.mark.slow
def test_theirs_goes_to_the_black_box(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study(monkeypatch, steps=2, queries=6)
    method = "pytorch_grad_cam:GradCAM?layer=layer4"
    few = ("--pairs", "2", "--no-curve", "--no-eq10", "--device", "cpu", "--no-track")
    result = command("robustness", "--method", method, "--model", "resnet18", *few)
    assert result.exit_code == 0, result.output
    assert (
        f"no_gradient: attacked by the black box alone: the map of {method} has no gradient" in result.output
    )
