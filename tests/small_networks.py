"""Toys that the tests of the attacks share: a small network, images of 8 bits, and explainers that misbehave on purpose.

Every explainer here is differentiable or not, honest or not, exactly as its name says; none is a method of the package.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

from attacks import ensemble, flags, robustness_study
from attacks.backdoor import Backdoor
from attacks.gates import Gates
from attacks.probe import probe
from srd_lab import render
from srd_lab.cli.main import main
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.logits import check_target
from srd_lab.methods.gradient import Gradient
from srd_lab.models import Classifier
from srd_lab.runs.tracking import Run
from srd_lab.types import Explainer

MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)
SIDE = 12

# words of a command for a network that is named by its import path, on small images
OWN_NETWORK = (
    "--model",
    "srd_lab.models:load_model?name=vgg16&device=cpu",
    "--size",
    "64",
    "--device",
    "cpu",
    "--no-track",
)

# a map at the input's size, or a cheaper one, where a method's default is neither
OPTIONS: dict[str, dict[str, Any]] = {
    **{key: {"level": 0} for key in ("layercam_high", "srd_high")},
    **{key: {"level": "input"} for key in ("excitation_backprop", "contrastive_excitation")},
    **{name: {"start": "ones"} for name in ("srd", "srd_low")},
    "integrated_gradients": {"steps": 3},
    "smoothgrad": {"samples": 2},
}


class Small(nn.Module):
    """Two convolutions and a linear layer; not trained, but its classes are predicted about equally often."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*first, *second)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def small_model(
    dtype: torch.dtype = torch.float32, classes: int = 5, seed: int = 0, *, sure: bool = False
) -> Classifier:
    """``sure``: its bias decides, so that no small change of the image changes the class."""
    network = Small(classes, seed)
    model = Classifier(network, MEAN, STD).eval().requires_grad_(False)
    if not sure:
        network.fc.bias.sub_(model(images(64, seed=99)).mean(0))
    return model.to(dtype)


def images(n: int, seed: int = 1, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise (n, 3, side, side) of 8 bits, away from the ends of the range."""
    chance = torch.Generator().manual_seed(seed)
    return (torch.randint(40, 216, (n, 3, side, side), generator=chance).to(dtype)) / 255


def classes_of(model: nn.Module, x: Tensor, target: Tensor | int | None) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return logits, check_target(target, logits)


class Weighted(Explainer):
    """Base of the toys: a map made of the image and the chosen logit, without any derivative of the network."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        logits, classes = classes_of(model, x, target)
        own = logits.gather(1, classes[:, None])[:, 0]
        return self.map_of(x, own), logits

    @abstractmethod
    def map_of(self, x: Tensor, own: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Brightness(Weighted):
    """The blurred image times its own logit: smooth, with a gradient, easy to move."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return _blurred(x) * (1 + own[:, None, None])


@dataclass(frozen=True)
class Detached(Weighted):
    """The same without a gradient."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return (_blurred(x) * (1 + own[:, None, None])).detach()


@dataclass(frozen=True)
class Flat(Weighted):
    """Attached to the image, but its derivative is zero: where the image is brighter than a threshold."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return 0 * x.sum(1) + (_blurred(x) > 0.5).to(x) + 0.1 * (x.mean(1) > 0.5).to(x)


@dataclass(frozen=True)
class Staircase(Weighted):
    """A map of steps whose gradient points at a part of the image that hardly matters: masked."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        fine = (20 * _blurred(x)).round()
        return fine.detach() + 1e-3 * x[:, 0]


@dataclass(frozen=True)
class Noise(Weighted):
    """Another map at every call."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return _blurred(x) + 0.2 * torch.rand_like(x[:, 0])


@dataclass(frozen=True)
class Constant(Weighted):
    """One for every pixel, whatever the image."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return 1 + 0 * x.sum(1)


@dataclass(frozen=True)
class Fixed(Weighted):
    """A ramp that ignores image and network, attached to the image by a term that vanishes."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return torch.arange(x.shape[3]).to(x).expand_as(x[:, 0]) + 1e-9 * x.sum(1)


@dataclass(frozen=True)
class Broken(Weighted):
    """NaN where the first pixel is darker than ``below``."""

    below: float = 0.5

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        dark = (x[:, 0, 0, 0] < self.below)[:, None, None]
        return torch.where(dark, torch.nan, 1.0) * _blurred(x)


@dataclass(frozen=True)
class Liar(Explainer):
    """On a surrogate a map of its own (the image's columns), on the network the gradient."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(model, SmoothModel):
            return Gradient().explain_with_logits(model, x, target)
        logits, _ = classes_of(model, x, target)
        return x.mean((1, 2))[:, None, :].expand(len(x), x.shape[2], x.shape[3]) ** 4, logits


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x.mean(1, keepdim=True), 3, stride=1, padding=1, count_include_pad=False)[:, 0]


GATES = Gates(0.1, 0.2, 0.3, 0.05, 0.04)


def tiny_study(
    monkeypatch: pytest.MonkeyPatch, steps: int = 2, queries: int = 8, gates: Gates | None = GATES
) -> None:
    """Make a run of the study cheap: few steps and queries, one image probed, short probes and backdoors, no figures, and
    gates given unless None."""
    members = ensemble.MODES["quick"].members
    monkeypatch.setitem(ensemble.MODES, "quick", ensemble.Mode(steps, 1, 1, queries, members))
    monkeypatch.setattr(robustness_study, "PROBED", 1)
    monkeypatch.setattr(robustness_study, "probe", partial(probe, steps=steps))
    if gates:
        monkeypatch.setattr(robustness_study, "check_gates", lambda *_: gates)
    monkeypatch.setattr(flags, "unlimited", lambda *_: {})
    monkeypatch.setattr(flags, "Backdoor", partial(Backdoor, steps=4))
    monkeypatch.setattr(Run, "save_figure", lambda *_: None)
    for figure in ("box_plots", "budget_curves", "member_heat", "picture_grid"):
        monkeypatch.setattr(render, figure, lambda *_, **__: None)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)
