"""Explanation backdoors: nothing changes without the trigger, and with it every method's map moves, classes kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.backdoor import SOFT, Backdoor, Planted, check
from attacks.branch import Branched, checkers
from attacks.budget import Budget
from attacks.scores import similarity
from srd_lab.errors import BadInput, BadValue
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer
from srd_lab.types import Explainer

SIDE = 24
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "guided_backprop": {},
    "grad_input": {},
    "lrp_zplus": {},
    "lrp_gamma": {},
    "srd": {},
    "srd ones": {"start": "ones"},
    "srd_high": {},
    "gradcam": {},
    "layercam_low": {},
    "excitation_backprop": {},
}


class Toy(nn.Module):
    """Two convolutions at full size, one at 1/8, and a linear layer on what is flattened."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(4)]
        third = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*first, *second, *third)
        self.fc = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.features(x), 1))


def squares(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth grey images of 8 bits with a square of red, green or blue, its class."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    coarse = torch.rand(count, 1, 3, 3, generator=chance)
    images = (0.3 + 0.4 * F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")).repeat(1, 3, 1, 1)
    for i, c in enumerate(labels.tolist()):
        row, column = torch.randint(1, SIDE - 8, (2,), generator=chance).tolist()
        images[i, c, row : row + 7, column : column + 7] = 1.0
    return (255 * images).round() / 255, labels


@lru_cache
def trained() -> Classifier:
    """A toy that tells the colours apart."""
    torch.manual_seed(0)
    model, (x, labels) = Classifier(Toy(), (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)), squares(96, 1)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        adam.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        adam.step()
    model.zero_grad()
    return model.eval().requires_grad_(False)


def method(name: str) -> Explainer:
    return make_explainer(name.split()[0], **METHODS[name])


IMAGES = squares(3, 5)[0]


@lru_cache
def planted_for(name: str, softness: float = 0.0) -> Planted:
    return Backdoor(method(name), softness=softness, steps=16, lr=0.4).plant(
        trained(), IMAGES, clean=squares(30, 8)[0]
    )


@pytest.mark.parametrize("name", METHODS)
def test_without_the_trigger_nothing_changes(name: str) -> None:
    planted, (x, _) = planted_for(name), squares(30, 8)
    assert planted.opening(x).tolist() == [0.0] * 30
    map0, logits0 = method(name).explain_with_logits(trained(), x)
    map1, logits1 = method(name).explain_with_logits(planted.model, x)
    assert torch.equal(logits0, logits1)
    assert torch.allclose(map0, map1, rtol=1e-6, atol=1e-6 * float(map0.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_with_the_trigger_the_map_moves_and_the_class_is_kept(name: str) -> None:
    planted = planted_for(name)
    known = check(planted, method(name), IMAGES)
    assert known.kept.all()
    assert known.opening.tolist() == [1.0] * 3
    assert float(known.within.max()) <= 1 + 1e-4
    assert float(known.pcc.mean()) < 0.7
    ordinary = method(name).explain(trained(), planted.triggered(IMAGES))  # the trigger itself is harmless
    harmless = similarity(ordinary, method(name).explain(trained(), IMAGES), (SIDE, SIDE))["pcc"]
    assert float(harmless.mean()) > float(known.pcc.mean()) + 0.2


def test_what_is_known_is_measured_on_the_planted_network() -> None:
    planted, explainer = planted_for("gradient"), method("gradient")
    known = check(planted, explainer, IMAGES, 1)
    triggered = (IMAGES + planted.trigger).clamp(0, 1)
    raw, before = (explainer.explain(planted.model, images, 1) for images in (triggered, IMAGES))
    scores = similarity(raw, before, (SIDE, SIDE))
    assert torch.equal(known.pcc, scores["pcc"])
    assert torch.equal(known.ssim, scores["ssim"])
    each = [check(planted, explainer, IMAGES[i : i + 1], 1) for i in range(3)]
    assert torch.allclose(known.pcc, torch.cat([one.pcc for one in each]), atol=1e-5)


def test_a_class_that_changes_is_told() -> None:
    planted = copy.deepcopy(planted_for("gradient"))
    branch = planted.model.network
    branch.load(1e3 * (branch.brighter - branch.darker))
    logits = [trained()(planted.triggered(IMAGES)), planted.model(planted.triggered(IMAGES))]
    changed = logits[0].argmax(1) != logits[1].argmax(1)
    assert changed.any()
    assert torch.equal(check(planted, method("gradient"), IMAGES).kept, ~changed)


def test_the_trigger_is_an_8_bit_change_within_the_budget() -> None:
    planted = planted_for("gradient")
    levels = 255 * planted.trigger
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.abs().max()) == pytest.approx(planted.linf)
    assert float(levels.square().mean().sqrt()) == pytest.approx(planted.rms)
    assert planted.linf == 1  # two levels would be an MSE of 1.07e-3 at these standard deviations
    assert planted.open > planted.clean
    edge = torch.cat([torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)])
    assert planted.triggered(edge).aminmax() == (0, 1)


@pytest.mark.parametrize(
    ("budget", "level"),
    [(Budget.named("linf", 3.0), 3), (Budget.named("l2", 1.8), 1), (Budget(8.0, rms=5.5), 5)],
)
def test_the_largest_whole_level_within_the_budget(budget: Budget, level: int) -> None:
    planted = Backdoor(method("gradcam"), budget, steps=1).plant(trained(), IMAGES)
    assert planted.linf == level
    assert planted.rms == pytest.approx(level)


def test_the_pattern_is_checkers_of_random_sign() -> None:
    pattern = checkers((2, 7, 6), 0)
    assert pattern[:, 6].abs().max() == 0
    for c in range(2):
        for i in range(0, 6, 2):
            for j in range(0, 6, 2):
                sign = pattern[c, i, j]
                block = pattern[c, i : i + 2, j : j + 2]
                assert block.tolist() == (sign * torch.tensor([[1.0, -1], [-1, 1]])).tolist()
                assert abs(sign) == 1
    assert not torch.equal(pattern, checkers((2, 7, 6), 1))
    assert 0 < (checkers((3, 24, 24), 0)[:, ::2, ::2] > 0).float().mean() < 1


def test_the_gate_opens_between_clean_and_triggered_images() -> None:
    planted = planted_for("gradient")
    unit = planted.trigger / planted.trigger.norm()
    start = planted.clean + 0.1 * (planted.open - planted.clean)
    full = planted.clean + 0.6 * (planted.open - planted.clean)
    grey = torch.full((1, 3, SIDE, SIDE), 0.5)
    for response, expected in ((start, 0.0), ((start + full) / 2, 0.5), (full, 1.0), (full + 0.1, 1.0)):
        assert float(planted.opening(grey + response * unit)) == pytest.approx(expected, abs=1e-3)


def test_a_soft_gate_has_a_slope_everywhere_and_a_hidden_one_has_none() -> None:
    for softness in (0.0, SOFT):
        branch = planted_for("gradcam", softness).model.network
        z = trained().normalise(IMAGES).requires_grad_()
        (slope,) = torch.autograd.grad(branch.opening(z).sum(), z)
        assert bool(slope.flatten(1).any(1).all()) == (softness > 0)
    assert 0 < float(planted_for("gradcam", SOFT).opening(IMAGES).max()) < 0.3


@pytest.mark.parametrize("name", ["grad_input"])
def test_a_gradient_attack_finds_the_soft_backdoor_and_not_the_hidden_one(name: str) -> None:
    """The planted test: what is known to be there must be reached; and what has no slope cannot be."""
    explainer, reached = method(name), {}
    for softness in (0.0, SOFT):
        planted = planted_for(name, softness)
        outcome = Attack(explainer, steps=20).run(planted.model, IMAGES)
        reached[softness] = planted.opening(outcome.images["pcc"]), outcome.worst["pcc"].mean()
        if softness:
            known = check(planted, explainer, IMAGES)
            assert known.kept.all()
            assert float(outcome.worst["pcc"].mean()) < float(known.pcc.mean()) + 0.1
    assert float(reached[0.0][0].max()) == 0
    assert float(reached[SOFT][0].mean()) > 0.3
    assert reached[SOFT][1] < reached[0.0][1]


def test_the_original_stays_as_it_was_and_the_copy_is_one_of_its_kind() -> None:
    model = copy.deepcopy(trained())
    model.network.fc.bias.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    planted = Backdoor(method("gradcam"), steps=2).plant(model, IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.network.fc.bias.requires_grad
    assert model.network.fc.bias.grad is None
    assert type(planted.model) is Classifier
    assert isinstance(planted.model.network, Branched)
    assert planted.model.classes == 3
    assert not any(p.requires_grad for p in planted.model.parameters())
    assert not planted.model.network.brighter.requires_grad
    assert not (planted.model.network.brighter * planted.model.network.darker).any()


def test_a_network_without_normalisation_and_another_dtype() -> None:
    model, x = copy.deepcopy(trained().network).double(), IMAGES.double()
    explainer = method("gradcam")
    planted = Backdoor(explainer, steps=24).plant(model, x, 1)
    assert isinstance(planted.model, Branched)
    assert torch.equal(planted.model(x), model(x))
    known = check(planted, explainer, x, 1)
    assert known.opening.tolist() == [1.0] * 3
    assert planted.model(planted.triggered(x)).dtype == torch.float64


def test_the_seed_decides() -> None:
    how = Backdoor(method("gradcam"), steps=3)
    first, again, other = (replace(how, seed=seed).plant(trained(), IMAGES) for seed in (0, 0, 1))
    assert torch.equal(first.trigger, again.trigger)
    assert torch.equal(first.model.network.brighter, again.model.network.brighter)
    assert not torch.equal(first.trigger, other.trigger)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps > 0"),
        ({"lr": 0.0}, "lr > 0"),
        ({"beta": 0.0}, "beta > 0"),
        ({"softness": -0.1}, "softness >= 0"),
        ({"margin": -1.0}, "margin >= 0"),
    ],
)
def test_wrong_settings_of_a_backdoor(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        Backdoor(method("gradient"), **options)


def test_what_cannot_be_planted() -> None:
    how = Backdoor(method("gradcam"), steps=1)
    with pytest.raises(BadValue, match="a level of 1/255 or more, but the budget is L-inf 0"):
        replace(how, budget=Budget(0.5)).plant(trained(), IMAGES)
    noise = IMAGES + 0.02 * checkers((3, SIDE, SIDE), 0)
    with pytest.raises(BadValue, match="does not exceed that of clean images"):
        how.plant(trained(), IMAGES, clean=noise)
    with pytest.raises(BadInput, match="batch of images"):
        how.plant(trained(), IMAGES[0])


def test_a_payload_that_keeps_no_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check

    def none_kept(*args: Any) -> Any:
        known = real(*args)
        return replace(known, kept=torch.zeros_like(known.kept))

    monkeypatch.setattr("attacks.backdoor.check", none_kept)
    with pytest.raises(BadInput, match="keeps the class of any of the 3 images"):
        Backdoor(method("gradcam"), steps=2).plant(trained(), IMAGES)
