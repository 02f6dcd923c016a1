"""Numbers that overflow: whatever makes a map of them, a method says so in one line and gives no map that is zero or NaN."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from small_networks import OPTIONS, images, small_model
from torch import Tensor, nn

import srd_lab
from srd_lab.catalogue import for_any_network
from srd_lab.cli.main import main
from srd_lab.errors import BadInput, Refused, SrdLabError
from srd_lab.methods.smoothed import BetaSmoothed, Smoothed
from srd_lab.registry import make_explainer
from srd_lab.types import Explainer

WAYS: dict[str, Callable[[str, nn.Module, Tensor], Tensor]] = {
    "srd_lab.explain": lambda name, m, x: srd_lab.explain(m, x, method=name, **OPTIONS.get(name, {})),
    "a method": lambda name, m, x: make_explainer(name, **OPTIONS.get(name, {})).explain(m, x),
}
# their maps need no number beyond those of the layer that they look at
INDIFFERENT = (
    "gradcam",
    "gradcam_pp",
    "xgradcam",
    "scorecam",
    "ablationcam",
    "layercam_low",
    "srd_low",
    "random",
    "sobel",
)


def scaled(factor: float) -> nn.Module:
    """A network with weights of about this size: it multiplies three of them."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter *= factor
    return model


class Inside(nn.Module):
    """A network whose logits are finite, whatever happens between its two convolutions."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 5),
        )
        self.way = way
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.way(self.d(F.relu(self.c(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def with_pixel(value: float) -> Tensor:
    x = images(2)
    x[1, 0, 3, 3] = value
    return x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", for_any_network())
@pytest.mark.parametrize("value", [1e20, -1e20, torch.inf, torch.nan])
def test_pixels_without_a_sensible_value_are_refused(name: str, way: str, value: float) -> None:
    for model in (small_model(), small_model().network):
        with pytest.raises(BadInput, match=r"^the input holds .*; expected .*pixels") as caught:
            WAYS[way](name, model, with_pixel(value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", for_any_network())
def test_logits_that_overflow_are_refused_where_it_begins(name: str, way: str) -> None:
    said = r"^numbers inside the model overflow float32 \(it begins at linear in network\.fc\), so there is no map; check"
    with pytest.raises(Refused, match=said) as caught:
        WAYS[way](name, scaled(1e15), images(2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", for_any_network())
def test_activations_that_overflow_give_no_zero_map_where_the_logits_are_finite(name: str) -> None:
    """ReLU6 of infinity is 6, and its slope is 0."""
    model, x = Inside(lambda y: F.relu6(y * 1e30 * 1e30)), images(2)
    assert model(x).isfinite().all()
    if name in INDIFFERENT:
        found = make_explainer(name, **OPTIONS.get(name, {})).explain(model, x)
        assert found.isfinite().all()
        assert found.flatten(1).any(1).all()
        return
    with pytest.raises(
        SrdLabError, match=r"overflow float32 \(it begins at mul in Inside\), so there is no map"
    ):
        make_explainer(name, **OPTIONS.get(name, {})).explain(model, x)


LARGE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weights of 1e12": (lambda: scaled(1e12), r"conv2d in network\.features\.3"),
    "activations of 1e21": (lambda: Inside(lambda y: F.relu(y * 1e21) / 1e21), r"mul in Inside"),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("name", [name for name in for_any_network() if name != "random"])
def test_maps_that_overflow_in_float32_alone_are_right_in_float64(name: str, case: str) -> None:
    made, place = LARGE[case]
    explainer, model, x = make_explainer(name, **OPTIONS.get(name, {})), made(), images(2)
    assert model(x).isfinite().all()
    exact = explainer.explain(copy.deepcopy(model).double(), x.double())
    assert exact.isfinite().all()
    if name in ("srd", "srd_high"):
        said = rf"so large \(\S+, at {place}\) that their squares overflow float32, so there is no map; .* or compute in"
        with pytest.raises(Refused, match=said):
            explainer.explain(model, x)
    else:
        found = explainer.explain(model, x).double()
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))


class Broken(Explainer):
    """A method whose own numbers overflow, for the second image."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        raw = x.mean(1)
        return torch.stack([raw[0], raw[1] * torch.inf]), model(x)


def test_a_map_that_alone_overflows_is_refused_by_its_image() -> None:
    with pytest.raises(
        SrdLabError,
        match=r"^the map of image 1 is not finite, though the model's numbers are.*another method$",
    ):
        Broken().explain(small_model(), images(2))
    assert Broken().explain_with_logits(small_model(), images(2))[0].isinf().any(), (
        "studies leave single images out"
    )


@pytest.mark.parametrize("wrapped", [Smoothed(Broken(), draws=2), BetaSmoothed(Broken())])
@pytest.mark.parametrize("target", [None, 1])
def test_wrappers_refuse_it_too(wrapped: Explainer, target: int | None) -> None:
    with pytest.raises(Refused, match=r"^the map of image \d is not finite"):
        wrapped.explain(small_model(), images(2), target)


def test_an_honest_zero_map_passes() -> None:
    """A logit that falls wherever the last layer is active; -inf in a mask is meant, and is no overflow."""

    def masked(y: Tensor) -> Tensor:
        mask = torch.zeros_like(y[:1, :1]).masked_fill(torch.ones(1, dtype=torch.bool), -torch.inf)
        return F.relu(y) * (1 + torch.softmax(torch.cat([mask, torch.zeros_like(mask)], 1), 1)[:, :1])

    model = Inside(masked)
    model.fc.weight.copy_(-model.fc.weight.abs())
    assert not make_explainer("gradcam").explain(model, images(2)).any()


def test_the_command_ends_in_one_line(tmp_path: Path) -> None:
    """A weights file of huge numbers: no table of NaN, no picture."""
    model = srd_lab.load_model("resnet18", device="cpu")
    state = {name: 1e30 * t if t.is_floating_point() else t for name, t in model.network.state_dict().items()}
    torch.save(state, tmp_path / "huge.pth")
    Image.new("RGB", (64, 64), (200, 90, 30)).save(tmp_path / "photo.png")
    command = [
        "explain",
        str(tmp_path / "photo.png"),
        "--model",
        "resnet18",
        "--weights",
        str(tmp_path / "huge.pth"),
    ]
    for methods in ("random", "all"):
        result = CliRunner().invoke(
            main, [*command, "--methods", methods, "--device", "cpu", "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 1
        assert re.fullmatch(
            r"Error: numbers inside the model overflow float32 \(it begins at .*\n", result.output
        )
        assert not (tmp_path / "out").exists()
