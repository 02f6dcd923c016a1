"""Smoothed and softplus explainers against literal loops, their gradients against finite differences, and the texts that
name them against what they should become or complain of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.data import batch, load_data
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue, SrdLabError
from srd_lab.methods.cam import GradCAM
from srd_lab.methods.gradient import Gradient, GradInput
from srd_lab.methods.smoothed import NORMALISE, BetaSmoothed, Smoothed, parse_explainer, plain_name
from srd_lab.methods.srd import SRD
from srd_lab.models import load_model
from srd_lab.registry import make_explainer
from srd_lab.runtime import generator
from srd_lab.types import Explainer


class Small(nn.Module):
    """Two convolutions and a head, in float64, whose ReLU changes maps in place; its classes are about as likely."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
        self.double().eval()
        with torch.no_grad():
            self.fc.bias -= self(images(32, seed=9)).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x), inplace=True)))
        return self.fc(20 * x.mean((2, 3)))


@dataclass(frozen=True)
class Recorded(Explainer):
    """Another explainer, and how many images each of its passes had."""

    explainer: Explainer
    passes: list[int] = field(default_factory=list)

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        self.passes.append(len(x))
        return self.explainer.explain_with_logits(model, x, target)


@dataclass(frozen=True)
class Zero(Explainer):
    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x[:, 0]), model(x)


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(
    smoothed: Smoothed, model: nn.Module, x: Tensor, classes: Tensor, keys: tuple[int, ...] = ()
) -> Tensor:
    """The mean map, image by image and copy by copy."""
    found = []
    for image, c in zip(x, classes, strict=True):
        total = torch.zeros(())
        for k in range(smoothed.draws):
            noise = torch.randn(image.shape, generator=generator(smoothed.seed, "smoothed", *keys, k)).to(x)
            raw = smoothed.explainer.explain(model, (image + smoothed.sigma * noise)[None], c[None])[0]
            size = {"max_abs": raw.abs().max(), "abs_sum": raw.abs().sum(), "none": torch.ones(())}
            total = total + (raw / size[smoothed.normalise] if raw.any() else 0)
        found.append(total / smoothed.draws)
    return torch.stack(found)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("inner", [SRD(), Gradient(), GradCAM()])
def test_smoothed_is_the_loop_over_copies_for_the_class_of_the_image_itself(
    inner: Explainer, normalise: str
) -> None:
    model, x = Small(), images()
    smoothed = Smoothed(inner, 0.7, 6, seed=5, normalise=normalise)
    classes = model(x).argmax(1)
    copies = x + smoothed.noise(x, range(6))[:, None]
    assert (
        model(copies.flatten(0, 1)).argmax(1) != classes.repeat(6)
    ).any()  # else the class would be no question
    found, logits = smoothed.explain_with_logits(model, x)
    torch.testing.assert_close(found, literal(smoothed, model, x, classes))
    torch.testing.assert_close(logits, model(x).detach())
    torch.testing.assert_close(smoothed.explain(model, x, classes), found)
    other = (classes + 1) % 4
    torch.testing.assert_close(smoothed.explain(model, x, other), literal(smoothed, model, x, other))


def test_the_seed_decides_and_every_image_has_the_same_noise() -> None:
    model, x = Small(), images()
    smoothed = Smoothed(Gradient(), 0.3, 4)
    assert torch.equal(smoothed.explain(model, x), smoothed.explain(model, x))
    assert not torch.allclose(smoothed.explain(model, x), replace(smoothed, seed=1).explain(model, x))
    twice = smoothed.explain(model, x[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(twice[0], twice[1])


@pytest.mark.parametrize("at_once", [None, 1, 5])
def test_maps_do_not_depend_on_the_batch(at_once: int | None) -> None:
    model, x = Small(), images()
    smoothed = Smoothed(BetaSmoothed(SRD()), 0.3, 7, images_at_once=at_once)
    alone = torch.cat([smoothed.explain(model, x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(smoothed.explain(model, x), alone, rtol=1e-10, atol=1e-12)


def test_passes_are_as_large_as_asked_and_run_again_backwards() -> None:
    model, x, inner = Small(), images(2), Recorded(Gradient())
    smoothed = Smoothed(inner, 0.3, 7, images_at_once=6)
    smoothed.explain(model, x)
    assert inner.passes == [6, 6, 2]
    inner.passes.clear()
    found = smoothed.explain(SmoothModel(model, 5.0), x.requires_grad_())
    found.square().sum().backward()
    assert sorted(inner.passes) == [2, 2, 6, 6, 6, 6]  # each part a second time, for its gradient


DIFFERENTIABLE: list[tuple[str, Explainer]] = [
    ("one pass", Smoothed(SRD(), 0.3, 5)),
    ("three passes", Smoothed(SRD(), 0.3, 5, images_at_once=4)),
    ("sum", Smoothed(GradInput(), 0.3, 5, normalise="abs_sum")),
    ("softplus", BetaSmoothed(Gradient(), 4.0)),
    ("both", Smoothed(BetaSmoothed(Gradient(), 4.0), 0.3, 5, images_at_once=2)),
    ("both, the other way round", BetaSmoothed(Smoothed(Gradient(), 0.3, 5, images_at_once=2), 4.0)),
    ("nested", Smoothed(Smoothed(SRD(), 0.2, 3, images_at_once=2), 0.3, 3, images_at_once=4)),
]


@pytest.mark.parametrize(
    "explainer", [e for _, e in DIFFERENTIABLE], ids=[name for name, _ in DIFFERENTIABLE]
)
def test_gradients_of_maps_and_logits_are_finite_differences(explainer: Explainer) -> None:
    model, x = Small(), images(2)
    numbers = torch.Generator().manual_seed(1)
    weight, head = (
        torch.randn(2, 8, 8, generator=numbers).double(),
        torch.randn(2, 4, generator=numbers).double(),
    )
    classes = torch.tensor([1, 2])

    def score(image: Tensor) -> Tensor:
        found, logits = explainer.explain_with_logits(model, image, classes)
        return (weight * found).sum() + (head * logits).sum()

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(leaf), leaf)
    for seed in range(3):
        step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        measured = (score(x + 1e-6 * step) - score(x - 1e-6 * step)) / 2e-6
        torch.testing.assert_close((slope * step).sum(), measured, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", [Smoothed(SRD(), 0.3, 3), BetaSmoothed(SRD())])
def test_differentiable_only_on_request_and_without_traces(wrapper: Explainer) -> None:
    model, x = Small(), images()  # parameters ask for gradients
    before = x.clone()
    assert not any(t.requires_grad for t in wrapper.explain_with_logits(model, x))
    with torch.no_grad():
        assert not any(
            t.requires_grad for t in wrapper.explain_with_logits(model, x.clone().requires_grad_())
        )
    asked = x.clone().requires_grad_()
    assert all(t.requires_grad for t in wrapper.explain_with_logits(model, asked))
    assert torch.equal(x, before)
    assert asked.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_nested_smoothing_draws_noise_of_its_own() -> None:
    model, x = Small(), images(1)
    inner = Smoothed(SRD(), 0.2, 3)
    outer = Smoothed(BetaSmoothed(inner, 30.0), 0.2, 3)
    assert not torch.allclose(outer.noise(x, range(3)), inner.noise(x, range(3)))
    torch.testing.assert_close(
        outer.explain(model, x), literal(outer, model, x, model(x).argmax(1), keys=(1,))
    )
    outermost = Smoothed(outer, 0.2, 3)
    assert not torch.allclose(outermost.noise(x, range(3)), outer.noise(x, range(3)))


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    drawn = Smoothed(SRD(), 0.25, 200).noise(images(1), range(200))
    assert float(drawn.std()) == pytest.approx(0.25, rel=0.01)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_zero_map_stays_zero(normalise: str) -> None:
    found = Smoothed(Zero(), 0.1, 3, normalise=normalise).explain(Small(), images())
    assert torch.equal(found, torch.zeros(3, 8, 8, dtype=torch.float64))


def test_beta_smoothed_explains_the_softplus_network_for_the_class_of_the_network_itself() -> None:
    model, x = Small(), images(40)
    own, softplus = model(x).argmax(1), SmoothModel(model, 1.0)(x).argmax(1)
    assert (own != softplus).any()  # else it would not matter whose class it is
    wrapper = BetaSmoothed(SRD(), 1.0)
    found, logits = wrapper.explain_with_logits(model, x)
    torch.testing.assert_close(logits, model(x).detach())
    torch.testing.assert_close(found, SRD().explain(SmoothModel(model, 1.0), x, own))
    assert not torch.allclose(found, SRD().explain(SmoothModel(model, 1.0), x, softplus))
    torch.testing.assert_close(wrapper.explain(model, x), found)
    torch.testing.assert_close(wrapper.explain(model, x, own), found)


def test_on_an_attacks_surrogate_beta_smoothed_is_what_it_is_on_the_network() -> None:
    model, x = Small(), images()
    wrapper = BetaSmoothed(Gradient(), 4.0)
    for surrogate in (SmoothModel(model, 30.0), SmoothModel(SmoothModel(model, 30.0), 2.0)):
        for found, expected in zip(
            wrapper.explain_with_logits(surrogate, x), wrapper.explain_with_logits(model, x), strict=True
        ):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(wrapper.explain(surrogate, x, 1), wrapper.explain(model, x, 1))


def test_a_given_class_costs_no_pass_of_the_network_itself() -> None:
    model, x, calls = Small(), images(), []
    model.register_forward_hook(lambda *call: calls.append(1))
    BetaSmoothed(Gradient()).explain(model, x, 1)  # a model is tried out when it is first explained
    calls.clear()
    BetaSmoothed(Gradient()).explain(model, x, 1)
    assert len(calls) == 1


def test_a_bundled_network() -> None:
    model, (x, _) = load_model("vgg16"), batch(load_data(), range(2))
    smoothed = make_explainer("srd")
    found, logits = Smoothed(BetaSmoothed(smoothed), 0.1, 3).explain_with_logits(model, x)
    assert found.shape == (2, 64, 64)
    torch.testing.assert_close(logits, model(x).detach())
    assert torch.isfinite(found).all()
    assert float(found.abs().amax()) <= 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Smoothed(SRD(), sigma=0.0), "sigma > 0"),
        (lambda: Smoothed(SRD(), sigma=-0.1), "sigma > 0"),
        (lambda: Smoothed(SRD(), sigma=float("nan")), "sigma > 0"),
        (lambda: Smoothed(SRD(), sigma=float("inf")), "sigma > 0"),
        (lambda: Smoothed(SRD(), draws=0), "draws >= 1"),
        (lambda: Smoothed(SRD(), images_at_once=0), "images_at_once >= 1"),
        (lambda: Smoothed(SRD(), normalise="mean"), "one of max_abs, abs_sum, none"),
        (lambda: Smoothed("srd"), "wraps an explainer"),  # type: ignore[arg-type]
        (lambda: Smoothed(SRD), "wraps an explainer"),  # type: ignore[arg-type]
        (lambda: BetaSmoothed(None), "wraps an explainer"),  # type: ignore[arg-type]
        (lambda: BetaSmoothed(SRD(), 0.0), "beta > 0"),
        (lambda: BetaSmoothed(SRD(), float("inf")), "beta > 0"),
        (lambda: Smoothed(SRD()).explain(Small(), images()[0]), "batch of images"),
        (lambda: Smoothed(SRD()).explain(Small(), images(), 4), "out of range"),
        (
            lambda: BetaSmoothed(SRD()).explain(Small(), images(), torch.tensor([0, 1])),
            "one target per image",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(SrdLabError, match=complaint) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("srd", SRD()),
        (" smoothed( srd ) ", Smoothed(SRD())),
        ("smoothed(srd,0.2,32)", Smoothed(SRD(), 0.2, 32)),
        ("smoothed(srd, sigma=0.2, draws=32)", Smoothed(SRD(), 0.2, 32)),
        ("smoothed(srd,0.2,draws = 32,normalise=abs_sum)", Smoothed(SRD(), 0.2, 32, normalise="abs_sum")),
        ("smoothed(srd,2e-1,4,7,none,16)", Smoothed(SRD(), 0.2, 4, 7, "none", 16)),
        ("beta_smoothed(gradient,10)", BetaSmoothed(Gradient(), 10.0)),
        ("beta_smoothed(gradient,beta=3.5)", BetaSmoothed(Gradient(), 3.5)),
        ("smoothed(beta_smoothed(srd,5),draws=8)", Smoothed(BetaSmoothed(SRD(), 5.0), draws=8)),
        ("beta_smoothed(smoothed(smoothed(srd,0.1,2),0.2,seed=3),5)",
         BetaSmoothed(Smoothed(Smoothed(SRD(), 0.1, 2), 0.2, seed=3), 5.0)),
    ],
)  # fmt: skip
def test_texts_name_explainers(text: str, expected: Explainer) -> None:
    found = parse_explainer(text, make_explainer)
    assert found == expected
    assert repr(found) == repr(expected)  # 10 and 10.0 are equal, but not the same in a file
    assert plain_name(text) == ("gradient" if "gradient" in text else "srd")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read"),
        ("smoothed(srd", "cannot be read"),
        ("smoothed srd", "cannot be read"),
        ("smoothed(srd))", "cannot be read"),
        ("smoothed(srd)(64)", "cannot be read"),
        ("smoothed((srd)", "cannot be read"),
        ("smoothed(srd) more", "cannot be read"),
        ("(srd)", "cannot be read"),
        ("srd,0.1", "cannot be read"),
        ("smoothed\n", "lacks the method that it wraps"),
        ("smoothed(beta_smoothed,0.1)", "lacks the method that it wraps"),
        ("smooth(srd)", "no wrapper; wrappers are smoothed, beta_smoothed"),
        ("srd()", "no wrapper"),
        ("smoothed(srd(ones),0.1)", "no wrapper"),
        ("smoothed()", "empty"),
        ("smoothed(srd,)", "empty"),
        ("smoothed(srd,,64)", "empty"),
        ("smoothed(sigma=0.1)", "not a method first"),
        ("smoothed(explainer=srd)", "not a method first"),
        ("smoothed(0.1,srd)", "unknown method '0.1'"),
        ("smoothed(nothing,0.1)", "unknown method 'nothing'"),
        ("nothing", "unknown method 'nothing'"),
        ("smoothed(srd,0.1)(2)", "sigma must be a number, got '0.1)(2'"),
        ("smoothed(srd),(srd)", "cannot be read"),
        ("smoothed(srd,much)", "sigma must be a number, got 'much'"),
        ("smoothed(srd,0.1,6.5)", "draws must be a whole number, got '6.5'"),
        ("smoothed(srd,draws=)", "draws must be a whole number, got ''"),
        ("smoothed(srd,sigma=smoothed(srd))", "sigma must be a number"),
        ("smoothed(srd,0.1,sigma=0.2)", "given sigma twice"),
        ("smoothed(srd,draws=3,draws=3)", "given draws twice"),
        ("smoothed(srd,explainer=srd)", "no option 'explainer'; it takes sigma, draws, seed, normalise"),
        ("smoothed(srd,noise=0.1)", "no option 'noise'"),
        ("smoothed(srd,sigma=draws=3)", "no option 'sigma=draws'"),
        ("smoothed(srd,sigma=0.1,64)", "'64' stands behind a named value"),
        ("beta_smoothed(srd,1,2)", "at most 1 values"),
        ("smoothed(srd,0)", "sigma > 0"),
        ("smoothed(srd,nan)", "sigma > 0"),
        ("smoothed(srd,normalise=mean)", "max_abs"),
        ("beta_smoothed(srd,-1)", "beta > 0"),
    ],
)
def test_malformed_texts_are_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(BadValue) as caught:
        parse_explainer(text, make_explainer)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "smoothed(srd", "smooth(srd)", "smoothed()", "smoothed(beta_smoothed,1)"]
)
def test_the_name_of_a_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        plain_name(text)
