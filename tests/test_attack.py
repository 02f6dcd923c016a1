"""The manipulation attack: its arithmetic against literal loops, its bounds, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from attacks import AttackResult, Budget, Eq10, Manipulation, View
from attacks.experiment import at_equal_perturbation, common_reach, perturbation_curves, scores_at
from attacks.manipulation import noise_at_equal_mse, similarity
from attacks.objective import Reference
from srd_lab import maps
from srd_lab.catalogue import METHODS, attackable
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput, BadValue, Refused
from srd_lab.metrics.similarity import PCC, SSIM
from srd_lab.models import Classifier
from srd_lab.normalise import normalisation_scale
from srd_lab.registry import make_explainer
from srd_lab.types import Explainer

MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*first, *second)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def model_of(dtype: torch.dtype = torch.float64) -> Classifier:
    model = Classifier(Small(), MEAN, STD).to(dtype).eval().requires_grad_(False)
    for part, values in (("mean", MEAN), ("std", STD)):  # not rounded to float32 on the way
        setattr(model.normalise, part, torch.tensor(values, dtype=dtype).view(1, 3, 1, 1))
    return model


def pixels(n: int, seed: int = 1, side: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(
        n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def explainer(name: str) -> Explainer:
    options: dict[str, dict[str, Any]] = {"srd": {"start": "ones"}, "integrated_gradients": {"steps": 4}}
    if METHODS[name].resolution == "high":
        options[name] = {"level": "features.1"}  # these networks have no 1/8
    return make_explainer(name, **options.get(name, {}))


def forever(name: str, **options: Any) -> Manipulation:
    """An attack that no change of the image stops."""
    return Manipulation(explainer(name), **{"stop_mse": 1e9, **options})


# --- the arithmetic ---------------------------------------------------------------------------------------------


def shift(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


@pytest.mark.parametrize(("bound", "weight"), [(8.0, 1.0), (1e9, 1.0), (1e9, 1e-14)])
@pytest.mark.parametrize("name", ["gradient", "srd"])
def test_is_adam_on_the_normalised_image(name: str, bound: float, weight: float) -> None:
    """A literal loop around torch.optim.Adam on the bare network, betas and losses written out.

    Adam does not see the size of the gradient, but for its epsilon: with a small loss, a wrong unit shows.
    """
    model = model_of()
    x, goal = 0.3 + 0.4 * pixels(2), pixels(2, seed=2)
    steps, lr = 6, 0.05 if bound == 8 else 0.004
    objective = Eq10(1e11 * weight, 1e6 * weight)
    result = forever(name, steps=steps, lr=lr, budget=Budget(min(bound, 255.0)), objective=objective).run(
        model, x, goal
    )

    method, mean, std = explainer(name), shift(MEAN), shift(STD)
    target = model(x).argmax(1)
    goal_map = method.explain(model, goal).abs()
    goal_map = goal_map / goal_map.sum((1, 2), keepdim=True)
    probabilities = model(x).softmax(1)
    z = ((x - mean) / std).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    losses = []
    for i in range(steps):
        surrogate = SmoothModel(model.network, 10 * 10 ** (i / steps))
        map_ = method.explain(surrogate, z, target).abs()
        map_ = map_ / map_.sum((1, 2), keepdim=True)
        loss = 1e11 * (map_ - goal_map).square().mean((1, 2))
        loss = weight * (loss + 1e6 * (surrogate(z).softmax(1) - probabilities).square().mean(1))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            change = (z * std + mean - x).clamp(-bound / 255, bound / 255)
            z.copy_(((x + change).clamp(0, 1) - mean) / std)
    changed = result.adversarial - x
    assert (changed.abs().amax() >= 7.9 / 255) == (bound == 8)
    torch.testing.assert_close(result.adversarial, z.detach() * std + mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.loss, torch.stack(losses, 1), rtol=1e-6, atol=0)
    assert result.beta.tolist() == pytest.approx([10 * 10 ** ((steps - 1) / steps)] * 2)


@pytest.mark.parametrize("term", ["probabilities", "logits"])
def test_the_objective_is_the_formula(term: str) -> None:
    raw, goal = torch.randn(3, 4, 5, dtype=torch.float64), pixels(3)[:, 0, :4, :5]
    goal = goal / goal.sum((1, 2), keepdim=True)
    y, y0 = torch.randn(2, 3, 6, dtype=torch.float64)
    reference = Reference(map=raw, logits=y0, size=(4, 5), goal=goal)
    got = Eq10(map_weight=7.0, output_weight=3.0, output_term=term)(View(raw, y, reference))
    for i in range(3):
        shown = raw[i].abs() / raw[i].abs().sum()
        p, q = (y[i], y0[i]) if term == "logits" else (y[i].softmax(0), y0[i].softmax(0))
        expected = 7 * ((shown - goal[i]) ** 2).sum() / 20 + 3 * ((p - q) ** 2).sum() / 6
        torch.testing.assert_close(got[i], expected)
    assert (Eq10().map_weight, Eq10().output_weight, Eq10().output_term) == (
        1e11,
        1e6,
        "probabilities",
    )


def pair_of_images(dtype: type) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    width = np.dtype(dtype).itemsize * 8
    unit = arrays(dtype, (1, 1, 2, 3), elements=st.floats(0, 1, width=width))
    any_ = arrays(dtype, (1, 1, 2, 3), elements=st.floats(-2, 3, width=width))
    return st.tuples(any_, unit)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(pair_of_images(np.float32), pair_of_images(np.float64)),
    st.one_of(st.sampled_from([8.0, 1.0, 4.0, 16.0, 255.0]), st.floats(0.01, 255)),
)
def test_projection_never_leaves_the_bound(images: tuple[np.ndarray, np.ndarray], bound: float) -> None:
    wild, x = (torch.from_numpy(image) for image in images)
    budget = Budget(bound)
    got = budget.project(wild, x)
    limit = torch.tensor(bound / 255, dtype=x.dtype)
    assert got.dtype == x.dtype
    assert ((got - x).abs() <= limit).all()
    assert (255 * (got - x).abs().double() <= bound * (1 + 1e-6)).all()
    assert got.min() >= 0
    assert got.max() <= 1
    assert torch.equal(budget.project(got, x), got)
    # The nearest such image: within an ulp of the plain clamp, and untouched where nothing had to change.
    plain = wild.double().clamp(x.double() - bound / 255, x.double() + bound / 255).clamp(0, 1)
    torch.testing.assert_close(got.double(), plain, rtol=0, atol=3 * torch.finfo(x.dtype).eps)
    inside = ((wild - x).abs() < limit * (1 - 1e-5)) & (wild >= 0) & (wild <= 1)
    assert torch.equal(got[inside], wild[inside])


# --- what it does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", attackable())
def test_maps_move_towards_their_goal(name: str) -> None:
    model, x, goal = model_of(), pixels(3), pixels(3, seed=2)
    attack = forever(name, steps=40, lr=0.02, beta_start=15.0, beta_end=15.0)
    result = attack.run(model, x, goal)
    assert (result.loss[:, -1] < result.loss[:, 0]).all()
    assert result.scores["pcc_target"].mean() > result.scores_start["pcc_target"].mean() + 0.02
    assert (result.scores["pcc"] < 1).all()
    assert (result.linf <= 8).all()
    assert (result.linf > 4).all()
    assert ((result.adversarial - x).abs() <= 8 / 255).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1


def test_the_bound_is_kept_in_float32_too() -> None:
    x = pixels(4, dtype=torch.float32)
    result = forever("gradient", steps=5, lr=1.0).run(model_of(torch.float32), x, x.flip(0))
    assert ((result.adversarial - x).abs() <= torch.tensor(8 / 255)).all()
    assert (result.linf <= 8).all()
    assert result.adversarial.dtype == torch.float32
    with torch.no_grad():
        again = forever("gradient", steps=5, lr=1.0).run(model_of(torch.float32), x, x.flip(0))
    assert torch.equal(again.adversarial, result.adversarial)


def select(result: AttackResult, i: int) -> dict[str, Tensor]:
    """Row i of everything in the result, nested ones by dotted name; curves without the moments not looked at."""
    out = {}
    for field in fields(result):
        value = getattr(result, field.name)
        named = (
            {f"{field.name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {field.name: value}
        )
        for key, tensor in named.items():
            row = tensor[i]
            out[key] = row[~row.isnan()] if key.startswith(("curve", "loss")) else row
    return out


@pytest.mark.parametrize("name", ["srd", "gradient"])
def test_images_stop_one_by_one_and_a_batch_equals_its_images(name: str) -> None:
    model, x, goal = model_of(), pixels(4), pixels(4, seed=2)
    x[1] = 0.5 + 0.001 * x[1]  # moves at another speed
    x[3, :, :, 6:] = 0
    attack = Manipulation(explainer(name), steps=20, lr=0.02, stop_mse=6e-3, judge_every=3)
    taken: list[int] = []
    result = attack.run(model, x, goal, on_step=taken.append)
    assert sum(taken) == 4 * 20
    assert len(set(result.steps.tolist())) > 1
    for i in range(4):
        steps = int(result.steps[i])
        stopped = steps < 20
        assert bool(result.mse[i] >= 6e-3) == stopped or steps == 20
        assert result.loss[i].isnan().sum() == 20 - steps
        assert float(result.beta[i]) == pytest.approx(10 * 10 ** ((steps - 1) / 20))
        seen = result.curve["step"][i]
        assert seen[~seen.isnan()].tolist() == sorted({*range(3, steps + 1, 3), steps})
        alone = select(attack.run(model, x[i : i + 1], goal[i : i + 1]), 0)
        for key, value in select(result, i).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-9, msg=key)


def test_what_is_reported_is_measured_on_the_original_network() -> None:
    model, x, goal = model_of(), pixels(3), pixels(3, seed=2)
    method = explainer("srd")
    r = forever("srd", steps=7, lr=0.02, judge_every=2).run(model, x, goal, torch.tensor([4, 0, 2]))
    assert r.target.tolist() == [4, 0, 2]
    std = shift(STD)
    for got, expected in (
        (r.logits_original, model(x)),
        (r.logits_adversarial, model(r.adversarial)),
        (r.map_original, method.explain(model, x, r.target)),
        (r.map_adversarial, method.explain(model, r.adversarial, r.target)),
        (r.map_best, method.explain(model, r.best, r.target)),
        (r.map_target, method.explain(model, goal)),
        (r.mse, ((r.adversarial - x) / std).square().mean((1, 2, 3))),
        (r.mse_best, ((r.best - x) / std).square().mean((1, 2, 3))),
        (r.linf, 255 * (r.adversarial - x).abs().amax((1, 2, 3))),
        (r.prediction_kept, model(r.adversarial).argmax(1) == model(x).argmax(1)),
        (r.curve["mse"][:, -1], r.mse),
        (r.curve["linf"][:, -1], r.linf),
        (r.curve["ssim_target"][:, -1], r.scores["ssim_target"]),
    ):
        torch.testing.assert_close(got, expected)
    shown, before, wanted = (maps.max_to_one(m) for m in (r.map_adversarial, r.map_original, r.map_target))
    torch.testing.assert_close(r.scores["ssim"], SSIM().score(shown, before))
    torch.testing.assert_close(r.scores["pcc"], PCC().score(shown, before))
    torch.testing.assert_close(r.scores["ssim_target"], SSIM().score(shown, wanted))
    torch.testing.assert_close(r.scores["pcc_target"], PCC().score(shown, wanted))
    torch.testing.assert_close(r.scores_best["ssim"], SSIM().score(maps.max_to_one(r.map_best), before))
    torch.testing.assert_close(r.scores_start["ssim_target"], SSIM().score(before, wanted))
    assert r.curve["step"][0].tolist() == [2, 4, 6, 7]
    assert not any(
        getattr(r, f.name).requires_grad for f in fields(r) if isinstance(getattr(r, f.name), Tensor)
    )


def test_the_best_iterate_is_the_nearest_that_keeps_the_prediction() -> None:
    """Without an output term, and with classes that are hard to tell apart, the last iterate's class has changed."""
    model, x, goal = model_of(), pixels(6), pixels(6, seed=2)
    model.network.fc.bias -= model(x).mean(0)
    attack = forever(
        "gradient", steps=12, lr=0.05, objective=Eq10(output_weight=0), judge_every=1, budget=Budget(60)
    )
    result = attack.run(model, x, goal)
    kept = model(result.best).argmax(1) == model(x).argmax(1)
    lost = ~result.prediction_kept
    assert lost.any()
    # An image of another class at every iterate has no best one but the last.
    assert (kept | (result.best == result.adversarial).flatten(1).all(1)).all()
    assert (kept & lost).any()
    # Among the iterates that kept it, none is nearer to the goal: each is the last of a shorter attack, with the
    # beta of this one.
    goal_map = maps.sum_to_one(result.map_target)
    error = (maps.sum_to_one(result.map_best) - goal_map).square().mean((1, 2))
    for steps in range(1, 13):
        end = 10 * 10 ** (steps / 12)
        shorter = replace(attack, steps=steps, beta_end=end).run(model, x, goal)
        here = (maps.sum_to_one(shorter.map_adversarial) - goal_map).square().mean((1, 2))
        assert (error <= here * (1 + 1e-9))[shorter.prediction_kept & kept].all()


def test_twice_is_the_same_and_no_chance_is_used() -> None:
    model, x, goal = model_of(), pixels(2), pixels(2, seed=2)
    state = torch.get_rng_state()
    first, second = (forever("lrp_zplus", steps=4, lr=0.02).run(model, x, goal) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(2):
        a, b = select(first, i), select(second, i)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_maps_that_are_zero_do_no_harm() -> None:
    """An image of the mean colour has no gradient times input, as start or as goal."""
    model = model_of()
    x = pixels(3)
    grey = shift(MEAN).expand(1, 3, 12, 12)
    x[0], goal = grey[0], pixels(3, seed=2)
    goal[1] = grey[0]
    result = forever("grad_input", steps=4, lr=0.01).run(model, x, goal)
    assert result.map_original[0].abs().max() == 0
    assert result.map_target[1].abs().max() == 0
    for i in range(3):
        assert all(torch.isfinite(value).all() for value in select(result, i).values())


@pytest.mark.parametrize("side", [4, 8, 16])
def test_maps_of_any_size_are_scored(side: int) -> None:
    """The encoder's output is 2 or 4 positions wide: less than the window of SSIM."""
    attack = replace(forever("srd", steps=2), explainer=make_explainer("srd", level="low"))
    result = attack.run(model_of(), pixels(2, side=side), pixels(2, seed=2, side=side))
    assert result.map_original.shape[1] == max(2, side // 4)  # a pool that leaves one is no end
    assert all(torch.isfinite(score).all() for score in result.scores.values())


def test_the_window_is_the_largest_that_fits() -> None:
    raw, original, goal = (pixels(2, seed=s)[:, 0, :6, :9] for s in (1, 2, 3))
    shown, reference = maps.max_to_one(raw), maps.max_to_one(original)
    torch.testing.assert_close(
        similarity(raw, original, goal, tuple(raw.shape[1:]))["ssim"], SSIM(5).score(shown, reference)
    )


def test_coarse_maps_are_scored_as_they_are_shown() -> None:
    """Divided by their maximum, then stretched to the image, as the paper does it."""
    raw, original, goal = (pixels(2, seed=s)[:, 0, :4, :4] for s in (1, 2, 3))
    scores = similarity(raw, original, goal, (16, 16))
    shown, reference, target = (maps.upsample(maps.max_to_one(m), (16, 16)) for m in (raw, original, goal))
    torch.testing.assert_close(scores["ssim"], SSIM().score(shown, reference))
    torch.testing.assert_close(scores["pcc_target"], PCC().score(shown, target))


class Diverges:
    """The gradient, but that its slope is NaN on surrogates from ``beta`` on, for an image whose first pixel is 0.5."""

    def __init__(self, beta: float) -> None:
        self.beta, self.method = beta, explainer("gradient")

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        return self.explain_with_logits(model, x, target)[0]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        raw, logits = self.method.explain_with_logits(model, x, target)
        bad = (x[:, 0, 0, 0] - 0.5).abs().detach() < 0.1
        if isinstance(model, SmoothModel) and x.requires_grad and model.beta >= self.beta and bad.any():
            raw = raw.clone()  # the map stays what it is, the root of 0 has no slope
            raw[bad] = raw[bad] + (0 * x[bad].sum((1, 2, 3))).sqrt()[:, None, None]
        return raw, logits


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
def test_an_image_whose_gradient_is_not_finite_ends_where_it_stands(steps: int) -> None:
    """The others go on as if it were not there; so does it as if they were not."""
    model, x, goal = model_of(), 0.2 + 0.6 * pixels(3), pixels(3, seed=2)
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.5, 0.8])
    attack = forever("gradient", steps=12, lr=0.02, judge_every=5)
    bad = replace(attack, explainer=Diverges(10 * 10 ** ((steps - 0.5) / 12)))
    taken: list[int] = []
    result, whole = bad.run(model, x, goal, on_step=taken.append), attack.run(model, x, goal)
    assert result.diverged.tolist() == [False, True, False]
    assert sum(taken) == 3 * 12
    assert result.steps.tolist() == [12, steps, 12]
    for key, value in select(result, 1).items():
        assert torch.isfinite(value).all(), key
    assert result.loss[1].isnan().sum() == 12 - steps
    assert result.curve["step"][1].nan_to_num(-1).max() == steps
    torch.testing.assert_close(result.curve["mse"][1].nan_to_num(-1).max(), result.mse[1])
    if steps:
        shorter = replace(attack, steps=steps, beta_end=10 * 10 ** (steps / 12)).run(model, x, goal)
        torch.testing.assert_close(result.adversarial[1], shorter.adversarial[1])
        assert float(result.beta[1]) == pytest.approx(float(shorter.beta[1]))
        torch.testing.assert_close(result.scores_surrogate["pcc"][1], shorter.scores_surrogate["pcc"][1])
    else:
        assert torch.equal(result.adversarial[1], x[1])
    for i in range(3):
        alone = select(bad.run(model, x[i : i + 1], goal[i : i + 1]), 0)
        untouched = select(whole, i)
        for key, value in select(result, i).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-9, msg=key)
            if i != 1:
                torch.testing.assert_close(value, untouched[key], rtol=1e-6, atol=1e-9, msg=key)


def test_all_images_may_end_early() -> None:
    x, goal = pixels(2), pixels(2, seed=2)
    taken: list[int] = []
    bad = replace(forever("gradient", steps=3), explainer=Diverges(0))
    x[:, 0, 0, 0] = 0.5
    result = bad.run(model_of(), x, goal, on_step=taken.append)
    assert result.diverged.all()
    assert torch.equal(result.adversarial, x)
    assert sum(taken) == 2 * 3


# --- the control ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_reaches_the_same_distance_within_the_budget(dtype: torch.dtype) -> None:
    model, x = model_of(dtype), pixels(4, dtype=dtype)
    x[3] = 0  # half of the noise has nowhere to go
    scale = normalisation_scale(model, x)
    torch.testing.assert_close(scale, 1 / shift(STD).to(dtype))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    mse = torch.tensor([1e-5, 1e-3, 8e-3, 2e-3], dtype=dtype)
    noisy = noise_at_equal_mse(x, mse, scale, Budget(), noise)
    reached = ((noisy - x) * scale).square().mean((1, 2, 3))
    torch.testing.assert_close(reached, mse, rtol=1e-3, atol=0)
    assert ((noisy - x).abs() <= torch.tensor(8 / 255, dtype=dtype)).all()
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    beyond = noise_at_equal_mse(x, torch.ones(4, dtype=dtype), scale, Budget(), noise)  # as far as it goes
    assert ((beyond - x).abs() <= torch.tensor(8 / 255, dtype=dtype)).all()
    still = noise_at_equal_mse(x, torch.zeros(4, dtype=dtype), scale, Budget(), noise)
    torch.testing.assert_close(still, x, rtol=0, atol=1e-9)


# --- what the attacker sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 6])
@pytest.mark.parametrize("name", ["srd", "gradient"])
def test_surrogate_scores_are_those_of_the_last_step(name: str, steps: int) -> None:
    """Both maps of every image by itself, on softplus(beta) with the beta of the step that it stopped at."""
    model, x, goal = model_of(), pixels(4), pixels(4, seed=2)
    x[1] = 0.5 + 0.001 * x[1]
    x[3, :, :, 6:] = 0
    target = torch.tensor([4, 0, 2, 2])
    attack = Manipulation(explainer(name), steps=steps, lr=0.02, stop_mse=6e-3, judge_every=7)
    result = attack.run(model, x, goal, target)
    assert len(set(result.steps.tolist())) > 1
    assert (result.steps == steps).any() == (steps == 6)
    assert set(result.scores_surrogate) == {"ssim", "pcc"}
    for i in range(4):
        beta = 10 * (100 / 10) ** ((int(result.steps[i]) - 1) / steps)
        surrogate = SmoothModel(model, beta)
        shown = []
        for image in (x, result.adversarial):
            raw = attack.explainer.explain(surrogate, image[i : i + 1], target[i : i + 1]).abs()
            shown.append(raw / raw.max())
        for metric, score in (("ssim", SSIM()), ("pcc", PCC())):
            expected = score.score(shown[1], shown[0])[0]
            torch.testing.assert_close(result.scores_surrogate[metric][i], expected, rtol=1e-7, atol=1e-9)
            assert (
                abs(result.scores_surrogate[metric][i] - result.scores[metric][i]) > 1e-6
            )  # not the network's own


# --- equal perturbation ---------------------------------------------------------------------------------------------------

Tables = dict[str, dict[str, np.ndarray]]


def made_up(seed: int, pairs: int = 9, looks: int = 8) -> Tables:
    """Curves that come back, stop early, and were not looked at now and then; no two methods alike."""
    chance = np.random.default_rng(seed)
    tables: Tables = {}
    for name in ("srd", "gradient", "lrp_zplus"):
        table: dict[str, np.ndarray] = {"pair": np.arange(pairs)}
        unseen = chance.random((pairs, looks)) < 0.2
        unseen |= np.arange(looks) >= chance.integers(1, looks + 1, (pairs, 1))
        unseen[:, 0] = False
        for over in ("mse", "linf"):
            table[f"curve/{over}"] = np.abs(chance.normal(0.3, 1, (pairs, looks)).cumsum(1)).astype(
                np.float32
            )
        for score in ("ssim", "pcc"):
            table[f"curve/{score}"] = chance.uniform(-0.2, 1, (pairs, looks)).astype(np.float32)
        for values in table.values():
            if values.ndim == 2:
                values[unseen] = np.nan
        tables[name] = table
    return tables


def first_passage(moved: np.ndarray, values: np.ndarray, wanted: float) -> float:
    """The score where the line from look to look first comes as far as ``wanted``."""
    x, y = 0.0, 1.0
    if wanted <= 0:
        return y
    for x_next, y_next in zip(moved.tolist(), values.tolist(), strict=True):
        if np.isnan(x_next):
            continue
        if x_next >= wanted:
            return y + (y_next - y) * (wanted - x) / (x_next - x)
        x, y = x_next, y_next
    return float("nan")


def literal(table: dict[str, np.ndarray], score: str, pair: int, wanted: float, over: str) -> float:
    return first_passage(table[f"curve/{over}"][pair], table[f"curve/{score}"][pair], wanted)


def farthest(table: dict[str, np.ndarray], pair: int, over: str) -> float:
    return max(float(v) for v in table[f"curve/{over}"][pair] if not np.isnan(v))


@pytest.mark.parametrize("over", ["mse", "linf"])
@pytest.mark.parametrize("seed", range(6))
def test_scores_at_are_read_where_the_line_first_gets_there(seed: int, over: str) -> None:
    came_back = 0
    for table in made_up(seed).values():
        shared = np.linspace(0, 4, 9)
        own = np.stack([np.linspace(0.1 * i, farthest(table, i, over) + 0.1, 5) for i in range(9)])
        at_ends = np.array([[farthest(table, i, over)] for i in range(9)])
        came_back += sum(bool((np.diff(row[~np.isnan(row)]) < 0).any()) for row in table[f"curve/{over}"])
        for wanted in (shared, own, at_ends):
            got = scores_at(table, "pcc", wanted, over)
            each = np.broadcast_to(wanted, got.shape)
            expected = [[literal(table, "pcc", i, w, over) for w in each[i].tolist()] for i in range(9)]
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        assert (scores_at(table, "ssim", np.zeros(1), over) == 1).all()
        assert np.isfinite(scores_at(table, "ssim", at_ends, over)).all()
        assert np.isnan(scores_at(table, "ssim", at_ends * 1.001, over)).all()
    assert came_back


def test_a_way_back_counts_for_what_lies_beyond_it() -> None:
    """5, back to 3, on to 7: 4 is passed on the way to 5, and 6 on the way from 3."""
    row = {
        "curve/mse": np.array([[5.0, 3.0, np.nan, 7.0]]),
        "curve/ssim": np.array([[0.8, 0.6, np.nan, 0.4]]),
    }
    got = scores_at(row, "ssim", np.array([0, 4, 5, 6, 7, 7.1]))
    np.testing.assert_allclose(got, [[1, 0.84, 0.8, 0.45, 0.4, np.nan]], rtol=1e-12)
    still = {"curve/mse": np.zeros((1, 3)), "curve/ssim": np.array([[0.9, 0.8, 0.7]])}
    np.testing.assert_array_equal(scores_at(still, "ssim", np.array([0, 1e-9])), [[1, np.nan]])


@pytest.mark.parametrize("over", ["mse", "linf"])
@pytest.mark.parametrize("seed", range(6))
def test_methods_are_compared_at_equal_perturbation(seed: int, over: str) -> None:
    tables = made_up(seed)
    reach = [min(farthest(table, i, over) for table in tables.values()) for i in range(9)]
    np.testing.assert_array_equal(common_reach(tables, over), np.array(reach, np.float32))
    for score in ("ssim", "pcc"):
        got = at_equal_perturbation(tables, score, over)
        assert list(got) == list(tables)
        for name, table in tables.items():
            expected = [literal(table, score, i, reach[i], over) for i in range(9)]
            np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-6)
            assert np.isfinite(got[name]).all()


@pytest.mark.parametrize(("pairs", "over"), [(1, "mse"), (4, "linf"), (9, "mse"), (23, "linf")])
@pytest.mark.parametrize("seed", range(3))
def test_curves_stand_for_the_pairs_that_every_method_brought_so_far(
    seed: int, pairs: int, over: str
) -> None:
    tables = made_up(seed, pairs)
    curves = perturbation_curves(tables, over, points=7)
    reach = [min(farthest(table, i, over) for table in tables.values()) for i in range(pairs)]
    assert curves.over == over
    assert curves.reached[0] == 0
    assert curves.reached[-1] in reach
    assert np.diff(curves.reached).min() > 0
    for at, s in enumerate(curves.reached.tolist()):
        inside = [i for i in range(pairs) if reach[i] >= s]
        assert curves.pairs[at] == len(inside)
        for score, bands in curves.bands.items():
            for name, (median, low, high) in bands.items():
                values = [literal(tables[name], score, i, s, over) for i in inside]
                expected = np.quantile(values, (0.5, 0.25, 0.75))
                np.testing.assert_allclose([median[at], low[at], high[at]], expected, rtol=1e-6, atol=1e-6)
    assert set(curves.bands) == {"ssim", "pcc"}
    assert curves.pairs.tolist() == sorted(curves.pairs.tolist(), reverse=True)
    assert curves.pairs[0] == pairs
    assert curves.pairs[-1] >= pairs / 4
    assert sum(each > curves.reached[-1] for each in reach) < pairs / 4 + 1


def test_all_methods_are_compared_over_the_pairs_that_all_have_scores_of() -> None:
    """Pair 2 has no SSIM with one method, pair 5 none of anything with another."""
    tables = made_up(0)
    whole = {score: at_equal_perturbation(tables, score) for score in ("ssim", "pcc")}
    tables["gradient"]["curve/ssim"][2] = np.nan
    for values in tables["srd"].values():
        if values.ndim == 2:
            values[5] = np.nan
    assert np.isnan(common_reach(tables)).nonzero()[0].tolist() == [5]
    for score, lost in (("ssim", [2, 5]), ("pcc", [5])):
        for name, got in at_equal_perturbation(tables, score).items():
            assert np.isnan(got).nonzero()[0].tolist() == lost
            kept = np.isfinite(got)
            np.testing.assert_allclose(got[kept], whole[score][name][kept])
    curves = perturbation_curves(tables, "mse", points=5)
    reach = common_reach(tables)
    beside = [i for i in range(9) if i not in (2, 5)]
    # At 0 every line starts at 1, whatever was seen later.
    assert curves.pairs[0] == 8
    for at, s in enumerate(curves.reached.tolist()[1:], 1):
        inside = [i for i in beside if reach[i] >= s]
        assert curves.pairs[at] == len(inside)
        for score, bands in curves.bands.items():
            for name, (median, _, _) in bands.items():
                expected = np.median([literal(tables[name], score, i, s, "mse") for i in inside])
                np.testing.assert_allclose(median[at], expected, rtol=1e-6)


def test_curves_without_any_score_are_no_error() -> None:
    tables = made_up(0)
    for table in tables.values():
        for values in table.values():
            if values.ndim == 2:
                values[:] = np.nan
    assert all(np.isnan(got).all() for got in at_equal_perturbation(tables, "pcc").values())
    assert perturbation_curves(tables, "mse").pairs.max() == 0


def test_a_look_without_a_score_does_not_spoil_the_next_one() -> None:
    row = {"curve/mse": np.array([[1.0, 2.0]]), "curve/ssim": np.array([[np.nan, 0.7]])}
    got = scores_at(row, "ssim", np.array([0, 0.5, 1, 1.5, 2]))
    np.testing.assert_array_equal(got, [[1, np.nan, np.nan, np.nan, 0.7]])


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Manipulation(explainer("srd"), steps=0), r"the attack needs steps > 0, got 0"),
        (lambda: Manipulation(explainer("srd"), lr=-1.0), r"needs lr > 0, got -1"),
        (lambda: Manipulation(explainer("srd"), lr=float("nan")), r"needs lr > 0, got nan"),
        (lambda: Manipulation(explainer("srd"), stop_mse=0), r"needs stop_mse > 0"),
        (lambda: Manipulation(explainer("srd"), beta_start=0), r"needs beta_start > 0"),
        (lambda: Manipulation(explainer("srd"), beta_end=-3), r"needs beta_end > 0"),
        (lambda: Budget(0), r"linf must lie in \(0, 255\] \(units of 0\.\.255\), got 0"),
        (lambda: Budget(float("nan")), r"linf must lie in \(0, 255\]"),
        (
            lambda: Eq10(output_term="softmax"),
            r"'softmax' is not known; expected one of probabilities, logits",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        make()


def test_images_that_make_no_sense_are_refused() -> None:
    model, x = model_of(), pixels(2)
    attack = forever("gradient", steps=1)
    for wrong, goal, message in (
        (x, x[:1], r"one goal image of its shape, got \(2, 3, 12, 12\) and \(1, 3, 12, 12\)"),
        (x[0], x[0], r"non-empty batch of images"),
        (x * 2, x, r"pixels must lie in \[0, 1\]"),
        (x - 0.5, x, r"pixels must lie in \[0, 1\]"),
        (x, x * 3 - 1, r"pixels must lie in \[0, 1\]"),
        (x, x * torch.nan, r"NaN"),
        (x.float(), x.float(), r"the input is torch.float32, but the model's weights are torch.float64"),
    ):
        with pytest.raises(BadInput, match=message):
            attack.run(model, wrong, goal)
    with pytest.raises(BadInput, match=r"target out of range"):
        attack.run(model, x, x, 5)


def test_a_model_in_training_mode_is_refused_before_it_runs() -> None:
    """One forward pass would already have moved the batch-norm statistics."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = network.double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(Refused, match=r"call model\.eval\(\)"):
        forever("gradient", steps=1).run(model, pixels(2), pixels(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", attackable())
def test_the_caller_keeps_what_he_gave(name: str) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), model_of().network).requires_grad_(True)
    x, goal = pixels(2).requires_grad_(), pixels(2, seed=2)
    kept, weights = x.detach().clone(), [p.clone() for p in model.parameters()]
    attack = forever(name, steps=2, lr=0.02)
    result = attack.run(model, x, goal)
    assert torch.equal(x.detach(), kept)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert model.training  # the container's own flag, as it was
    assert (result.adversarial - kept).abs().max() > 0
