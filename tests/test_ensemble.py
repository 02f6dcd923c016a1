"""Objectives, optimisers, one attack and the ensemble, on toys: what each computes, and what must not make a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import (
    Brightness,
    Broken,
    Detached,
    Fixed,
    Flat,
    Liar,
    Noise,
    images,
    small_model,
)
from torch import Tensor, nn

from attacks import ensemble as ensemble_module
from attacks.attack import Attack
from attacks.black_box import BlackBox
from attacks.budget import Budget, to_8_bits
from attacks.ensemble import MEMBERS, Ensemble
from attacks.judge import Found, Judge, noise_of_norm, transferred
from attacks.objective import (
    Combined,
    Dissimilarity,
    KeepClass,
    MassCentre,
    Objective,
    Reference,
    Structure,
    Sum,
    Target,
    TopK,
    View,
)
from attacks.optimiser import PGD, unit
from attacks.probe import NEAR, probe
from attacks.scores import SCORES, similarity, top_pixels
from attacks.surrogate import SURROGATES, Surrogate
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput, BadValue, NoGradient
from srd_lab.metrics.similarity import PCC, SSIM
from srd_lab.normalise import normalisation_scale
from srd_lab.registry import make_explainer
from srd_lab.types import Explainer

GRADIENT = make_explainer("gradient", channels="abs_sum")
TIMES_INPUT = make_explainer("grad_input")
L2 = Budget.named("l2", 2.0)


# --- objectives -----------------------------------------------------------------------------------


def views(goal: bool = True) -> View:
    chance = torch.Generator().manual_seed(3)
    raw, before, aim = torch.randn(3, 2, 7, 8, generator=chance, dtype=torch.float64)
    logits, logits0 = torch.randn(2, 2, 4, generator=chance, dtype=torch.float64)
    return View(raw, logits, Reference(before, logits0, (7, 8), aim if goal else None))


def read(raw: Tensor) -> np.ndarray:
    return (raw.abs() / raw.abs().max()).detach().numpy()


def centre(shown: np.ndarray) -> np.ndarray:
    total, found = 0.0, np.zeros(2)
    for row in range(shown.shape[0]):
        for column in range(shown.shape[1]):
            total += shown[row, column]
            found += shown[row, column] * np.array([row, column])
    return found / total / (shown.shape[0] ** 2 + shown.shape[1] ** 2) ** 0.5


def mass(shown: np.ndarray, before: np.ndarray, count: int) -> float:
    top = np.argsort(-before.ravel(), kind="stable")[:count]
    return float(sum(shown.ravel()[i] for i in top) / shown.sum())


def literal(name: str, shown: np.ndarray, before: np.ndarray, goal: np.ndarray) -> float:
    def pcc(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    ssim = float(SSIM(7).score(torch.from_numpy(shown)[None], torch.from_numpy(before)[None]))
    return {
        "dissimilarity": pcc(shown, before),
        "combined": ssim + pcc(shown, before) + mass(shown, before, 6),
        "top_k": pcc(shown, before) + mass(shown, before, 6),
        "mass_centre": -float(np.sqrt(((centre(shown) - centre(before)) ** 2).sum() + 1e-12)),
        "target": -pcc(shown, goal),
    }[name]


@pytest.mark.parametrize("name", list(ensemble_module.OBJECTIVES))
def test_objectives_are_their_formulas(name: str) -> None:
    view = views()
    got = ensemble_module.OBJECTIVES[name](view)
    assert got.shape == (2,)
    for i in range(2):
        reference = view.reference
        assert reference.goal is not None
        expected = literal(name, *(read(m[i]) for m in (view.map, reference.map, reference.goal)))
        assert got[i].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "objective",
    [Dissimilarity(), Combined(), TopK(0.2), Sum((TopK(), Structure())), MassCentre(), Target()],
    ids=str,
)
def test_objectives_have_the_slope_of_finite_differences(objective: Objective) -> None:
    view = views()
    raw = view.map.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(replace(view, map=raw)).sum(), raw)
    chance = torch.Generator().manual_seed(0)
    for _ in range(5):
        way = torch.randn(raw.shape, generator=chance, dtype=torch.float64)
        ahead, behind = (objective(replace(view, map=view.map + s * 1e-6 * way)) for s in (1, -1))
        expected = (ahead - behind) / 2e-6
        got = (slope * way).sum((1, 2))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_a_part_of_a_reference_is_that_of_its_images() -> None:
    view = views()
    some = torch.tensor([1])
    part = View(view.map[some], view.logits[some], view.reference.of(some))
    for objective in ensemble_module.OBJECTIVES.values():
        torch.testing.assert_close(objective(part), objective(view)[some])


@dataclass(frozen=True)
class Nothing:
    def __call__(self, view: View) -> Tensor:
        return torch.zeros(len(view.map), dtype=view.logits.dtype)


def test_the_hinge_is_zero_while_the_margin_holds_and_grows_from_there() -> None:
    """Margin 2 before: it must stay at least .1 * 2; the runner-up may change."""
    before = torch.tensor([[3.0, 1.0, 0.0]]).double()
    reference = Reference(torch.ones(1, 4, 4).double(), before, (4, 4))
    keep = KeepClass(Nothing())
    for logits, expected in (
        ([3.0, 1.0, 0.0], 0.0),
        ([1.3, 0.0, 1.0], 0.0),
        ([1.1, 1.0, 0.0], 10 * (0.1 - 0.05)),
        ([0.0, 0.0, 4.0], 10 * (0.1 + 2)),
    ):
        view = View(torch.ones(1, 4, 4).double(), torch.tensor([logits]).double(), reference)
        assert keep(view).item() == pytest.approx(expected, abs=1e-6)
        slope = torch.autograd.functional.jacobian(lambda z, v=view: keep(replace(v, logits=z)), view.logits)
        assert bool((slope == 0).all()) == (expected == 0)


def test_the_hinge_of_a_network_with_one_class_is_zero() -> None:
    one = torch.ones(2, 1)
    view = View(torch.ones(2, 4, 4), one, Reference(torch.ones(2, 4, 4), one, (4, 4)))
    assert KeepClass(Nothing())(view).tolist() == [0, 0]


def test_a_target_without_goal_maps_is_refused() -> None:
    with pytest.raises(BadInput, match="aims at a goal map; give the attack goal maps"):
        Target()(views(goal=False))
    with pytest.raises(BadValue, match=r"must lie in \(0, 1\), got 1"):
        TopK(1.0)


@dataclass(frozen=True)
class TopHalf:
    """The example of the documentation."""

    def __call__(self, view: View) -> Tensor:
        shown = view.shown
        return -shown[:, : shown.shape[1] // 2].sum((1, 2)) / shown.sum((1, 2))


def test_an_objective_of_ones_own() -> None:
    model, x = small_model(), images(3)
    outcome = Attack(TIMES_INPUT, KeepClass(TopHalf()), budget=Budget.named("linf", 16.0), steps=15).run(
        model, x
    )
    after = TIMES_INPUT.explain(model, outcome.adversarial, outcome.target).abs()
    before = outcome.reference.map.abs()
    share = [m[:, :6].sum((1, 2)) / m.sum((1, 2)) for m in (before, after)]
    assert (share[1] > share[0] + 0.05).all()
    torch.testing.assert_close(outcome.loss[:, 0].isfinite(), torch.ones(3, dtype=torch.bool))


# --- the optimiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [L2, Budget.named("linf", 8.0), Budget.named("legacy")], ids=str)
@pytest.mark.parametrize("size", [1e-20, 1e-8, 1e8, 1e20])
def test_the_step_does_not_know_the_size_of_the_gradient(budget: Budget, size: float) -> None:
    model, x = small_model(), images(2)
    scale = normalisation_scale(model, x)
    chance = torch.Generator().manual_seed(0)
    paths = []
    slopes = [torch.randn(x.shape, generator=chance) for _ in range(3)]
    for factors in ((1.0, 1.0, 1.0), (1.0, size, 1.0), (size, size, size)):  # a spike, and all of them
        moves, at = PGD().begin(x, budget, scale, 10), x
        for step, slope in enumerate(slopes):
            at = moves.move(torch.arange(2), at, factors[step] * slope, torch.zeros(2), step)
        paths.append(at)
    for path in paths[1:]:
        torch.testing.assert_close(paths[0], path, rtol=0, atol=1e-6)
    assert (budget.used(paths[0], x, scale) > 0.5).all()


def test_an_l2_step_has_its_length_and_a_linf_step_its_sign() -> None:
    x = torch.full((2, 3, 6, 6), 0.5, dtype=torch.float64)
    scale = 1 / torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64).view(1, 3, 1, 1)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for budget in (L2, Budget(linf=None, mse=1e-3)):
        weights = budget.weights(x, scale)
        for step, steps in ((0, 10), (5, 10), (9, 10)):
            size = 0.02 + (0.3 - 0.02) * (1 + np.cos(np.pi * step / steps)) / 2
            moves = PGD(0.3, 0.02, 0.0).begin(x, budget, scale, steps)
            change = (moves.move(torch.arange(2), x, slope, torch.zeros(2), step) - x) * weights
            length = change.flatten(1).norm(dim=1)
            torch.testing.assert_close(length, torch.full_like(length, size * budget.radius(x, scale)))
            torch.testing.assert_close(unit(change), -unit(slope / weights))  # steepest in the budget's norm
    linf = Budget.named("linf", 8.0)
    change = PGD(0.5, 0.5).begin(x, linf, scale, 10).move(torch.arange(2), x, slope, torch.zeros(2), 0) - x
    torch.testing.assert_close(change, -slope.sign() * 4 / 255)


def test_momentum_keeps_three_quarters_of_the_direction_for_every_image_by_itself() -> None:
    x = torch.full((3, 1, 1, 2), 0.5, dtype=torch.float64)
    first = torch.tensor([1.0, 0.0]).double().view(1, 1, 1, 2).expand(3, -1, -1, -1)
    second = torch.tensor([0.0, 1.0]).double().view(1, 1, 1, 2)
    one = torch.ones(1, 1, 1, 1).double()
    moves = PGD(0.1, 0.1).begin(x, L2, one, 10)
    moves.move(torch.tensor([0, 2]), x[:2], first[:2], torch.zeros(2), 0)
    change = moves.move(torch.tensor([1, 2]), x[:2], second.expand(2, -1, -1, -1), torch.zeros(2), 1) - x[:2]
    torch.testing.assert_close(unit(change)[0].flatten(), torch.tensor([0.0, -1.0]).double())
    torch.testing.assert_close(unit(change)[1].flatten(), -torch.tensor([0.6, 0.8]).double())


def test_nothing_moves_without_a_gradient() -> None:
    x = images(1)
    moves = PGD().begin(x, L2, torch.ones(1, 3, 1, 1), 5)
    assert torch.equal(moves.move(torch.arange(1), x, torch.zeros_like(x), torch.zeros(1), 0), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PGD(first=0),
        lambda: PGD(last=-1),
        lambda: PGD(momentum=1),
        lambda: Attack(GRADIENT, steps=0),
        lambda: Attack(GRADIENT, draws=0),
        lambda: Attack(GRADIENT, start=-1),
        lambda: Surrogate(0.0),
        lambda: Surrogate(None, 10.0),
        lambda: Surrogate.named("relu"),
        lambda: BlackBox(GRADIENT, queries=0),
        lambda: Ensemble(mode="fast"),
        lambda: Ensemble(("combined", "fgsm")),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(make: Any) -> None:
    with pytest.raises(BadValue) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- one attack -----------------------------------------------------------------------------------


class Recorder(Explainer):
    """Notes what its method was asked on the original network."""

    def __init__(self, method: Explainer) -> None:
        self.method = method
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        raw, logits = self.method.explain_with_logits(model, x, target)
        if not isinstance(model, SmoothModel):
            self.seen.append((x.detach().clone(), raw.detach(), logits.detach()))
        return raw, logits


@pytest.mark.parametrize("surrogate", ["none", "softplus_30_100"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_iterate_is_the_lowest_on_the_network_that_kept_its_class(seed: int, surrogate: str) -> None:
    """A budget so large that classes change on the way, without a hinge; every look is noted and judged by hand."""
    model, x = small_model(), images(4, seed=seed)
    method = TIMES_INPUT if surrogate == "none" else GRADIENT
    recorder = Recorder(method)
    attack = Attack(
        recorder, Combined(), budget=Budget.named("l2", 30.0), surrogate=Surrogate.named(surrogate), steps=12
    )
    outcome = attack.run(model, x)
    (_, map0, logits0), *looks = recorder.seen
    assert len(looks) == (13 if surrogate == "none" else 12)
    lost = 0
    for name in SCORES:
        best, image = torch.ones(4), x.clone()
        for at, raw, logits in looks:
            value = similarity(raw, map0, (12, 12))[name].float()
            kept = logits.argmax(1) == logits0.argmax(1)
            lost += int((~kept).sum())
            better = kept & (value < best)
            best[better], image[better] = value[better], at[better]
        torch.testing.assert_close(outcome.worst[name], best)
        assert torch.equal(outcome.images[name], image)
    assert lost


def test_a_liar_on_the_surrogate_is_judged_on_the_network() -> None:
    """On the surrogate the map moves at once; the scores must be those of the network's map."""
    model, x = small_model(), images(3)
    attack = Attack(Liar(), Dissimilarity(), budget=L2, surrogate=Surrogate.named("softplus_30"), steps=10)
    outcome = attack.run(model, x)
    before = GRADIENT_PLAIN.explain(model, x, outcome.target)
    for name, image in outcome.images.items():
        after = GRADIENT_PLAIN.explain(model, image, outcome.target)
        expected = similarity(after, before, (12, 12))[name].float()
        torch.testing.assert_close(outcome.worst[name], expected.clamp(max=1), rtol=0, atol=1e-5)


GRADIENT_PLAIN = make_explainer("gradient")


def test_random_starts_differ_by_seed_and_key_not_by_batch() -> None:
    model, x = small_model(), images(2)
    x[1] = x[0]
    attack = Attack(TIMES_INPUT, budget=L2, steps=1)

    def start(seed: int, keys: Sequence[int | str] | None = None, some: Tensor = x) -> Tensor:
        recorder = Recorder(TIMES_INPUT)
        replace(attack, explainer=recorder, seed=seed).run(model, some, keys=keys)
        return recorder.seen[1][0]

    first = start(0)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[0], start(1)[0])
    assert torch.equal(first, start(0, [0, 1]))
    assert torch.equal(start(0, ["b", "a"]).flip(0), start(0, ["a", "b"]))
    assert torch.equal(start(0, ["b"], x[:1])[0], start(0, ["a", "b"])[1])
    used = L2.used(first, x)
    torch.testing.assert_close(used, torch.full_like(used, 0.3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("surrogate", ["none", "softplus_10_100"])
def test_a_batch_is_its_images(surrogate: str) -> None:
    model, x = small_model(torch.float64), images(3, dtype=torch.float64)
    attack = Attack(TIMES_INPUT, budget=Budget.named("legacy"), surrogate=Surrogate.named(surrogate), steps=6)
    together = attack.run(model, x, keys=["a", "b", "c"])
    for i, key in enumerate("abc"):
        alone = attack.run(model, x[i : i + 1], keys=[key])
        torch.testing.assert_close(together.adversarial[i], alone.adversarial[0], rtol=0, atol=1e-9)
        for name in SCORES:
            torch.testing.assert_close(together.worst[name][i], alone.worst[name][0], rtol=0, atol=1e-7)
        torch.testing.assert_close(together.loss[i], alone.loss[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["legacy", "l2", "linf"])
def test_all_images_may_have_gradients_that_are_not_finite(norm: str) -> None:
    """Weights of 1e30, say: this ended in an IndexError."""
    x, ticks = images(2), list[int]()
    x[:, 0, 0, 0] = 50 / 255
    outcome = Attack(Broken(), budget=Budget.named(norm), steps=5).run(small_model(), x, on_step=ticks.append)
    assert outcome.diverged.all()
    assert outcome.steps.tolist() == [0, 0]  # they stay where they started
    assert outcome.worst["pcc"].isfinite().all()
    assert sum(ticks) == 10


def test_an_image_whose_gradient_is_not_finite_ends_alone() -> None:
    model, x = small_model(), images(3)
    x[:, 0, 0, 0] = torch.tensor([200.0, 50.0, 200.0]) / 255
    ticks: list[int] = []
    outcome = Attack(Broken(), budget=L2, steps=5).run(model, x, on_step=ticks.append)
    assert outcome.diverged.tolist() == [False, True, False]
    assert outcome.steps.tolist() == [5, 0, 5]
    assert sum(ticks) == 15
    assert outcome.worst["pcc"].isfinite().all()
    assert (outcome.worst["pcc"][[0, 2]] < 1).all()
    assert outcome.adversarial.isfinite().all()


def test_a_map_without_a_gradient_is_refused_and_one_with_a_zero_gradient_is_stuck() -> None:
    model, x = small_model(), images(2)
    with pytest.raises(NoGradient, match="the map of Detached has no gradient in the image"):
        Attack(Detached(), steps=2).run(model, x)
    outcome = Attack(Flat(), budget=L2, steps=4).run(model, x)
    assert outcome.stuck.tolist() == [1, 1]
    assert Attack(Brightness(), budget=L2, steps=4).run(model, x).stuck.tolist() == [0, 0]


def test_an_attack_is_stronger_than_noise_and_stays_in_its_budget() -> None:
    model, x = small_model(), images(4)
    scale = normalisation_scale(model, x)
    for budget in (L2, Budget.named("legacy"), Budget.named("linf", 4.0)):
        outcome = Attack(TIMES_INPUT, budget=budget, steps=20).run(model, x)
        noise = noise_of_norm(
            x, budget, scale, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        )
        noisy = similarity(TIMES_INPUT.explain(model, noise, outcome.target), outcome.reference.map, (12, 12))
        assert outcome.worst["pcc"].mean() < noisy["pcc"].mean() - 0.05
        for image in (*outcome.images.values(), outcome.adversarial):
            assert (budget.violation(image, x, scale) <= 1 + 1e-5).all()


# --- the black box --------------------------------------------------------------------------------


def test_the_black_box_finds_something_within_its_queries() -> None:
    model, x = small_model(), images(3)
    recorder, ticks = Recorder(Detached()), list[int]()
    best = BlackBox(recorder, L2, queries=90).run(model, x, on_step=ticks.append)
    assert len(recorder.seen) - 1 <= 90
    assert len(recorder.seen) - 1 > 60
    assert sum(ticks) == 270
    assert (best.values["pcc"] < 0.995).all()
    (_, map0, logits0), *_ = recorder.seen
    for name in SCORES:
        raw, logits = Detached().explain_with_logits(model, best.images[name], logits0.argmax(1))
        torch.testing.assert_close(
            similarity(raw, map0, (12, 12))[name].float(), best.values[name], rtol=0, atol=1e-5
        )
        assert torch.equal(logits.argmax(1), logits0.argmax(1))
        assert (L2.violation(best.images[name], x) <= 1 + 1e-5).all()
    alone = BlackBox(Detached(), L2, queries=90).run(model, x[1:2], keys=[1])
    torch.testing.assert_close(alone.values["pcc"][0], best.values["pcc"][1], rtol=0, atol=1e-5)


# --- the ensemble ---------------------------------------------------------------------------------


def quick(*members: str, **options: Any) -> Ensemble:
    return Ensemble(members or MEMBERS[:-1], **{"budget": L2, "steps": 6, "queries": 40, **options})


@pytest.fixture(scope="module")
def found() -> Found:
    model, x = small_model(), images(3)
    return quick().run(model, TIMES_INPUT, x, surrogate=Surrogate())


def test_the_worst_is_the_lowest_of_the_members_per_image_and_score(found: Found) -> None:
    assert found.names == MEMBERS[:-1]
    assert set(found.members) == {*found.names, "noise", "one_step"}
    for score in SCORES:
        each = torch.stack([found.members[name][score] for name in found.names])
        assert torch.equal(found.worst[score], each.amin(0))
        for i, by in enumerate(found.by[score].tolist()):
            if by >= 0:
                assert found.members[found.names[by]][score][i] == found.worst[score][i]
            else:
                assert found.worst[score][i] == 1
    assert (found.worst["pcc"] < 0.95).all()


def test_every_image_is_of_8_bits_in_the_budget_and_keeps_its_class_and_score(found: Found) -> None:
    model, x = small_model(), images(3)
    logits0 = model(x)
    assert torch.equal(found.target, logits0.argmax(1))
    before = TIMES_INPUT.explain(model, x, found.target)
    for score in SCORES:
        image = found.images[score]
        torch.testing.assert_close(image * 255, (image * 255).round(), rtol=0, atol=1e-4)
        assert (L2.violation(image, x) <= 1 + 1e-5).all()
        raw, logits = TIMES_INPUT.explain_with_logits(model, image, found.target)
        assert torch.equal(logits.argmax(1), logits0.argmax(1))
        torch.testing.assert_close(
            similarity(raw, before, (12, 12))[score].float(), found.worst[score], rtol=0, atol=1e-5
        )


def test_images_that_lose_their_class_do_not_count() -> None:
    """A budget that could change every pixel: without the rule the class would change at once."""
    model, x = small_model(), images(3)
    found = quick("combined", "black_box", budget=Budget.named("linf", 100.0)).run(
        model, TIMES_INPUT, x, surrogate=Surrogate()
    )
    for image in found.images.values():
        assert torch.equal(model(image).argmax(1), model(x).argmax(1))


def test_the_judge_takes_no_image_of_another_class() -> None:
    """Rounding to 8 bits may change a class that the attack had kept."""
    model, x = small_model(), images(64, seed=99)
    classes = model(x).argmax(1)
    other = x[(classes != classes[0]).nonzero()[0]]
    judge = Judge(Budget.named("linf", 255.0), model, TIMES_INPUT, x[:1], None)
    judge.add("any", {"pcc": other})
    assert all(value.tolist() == [1] for value in judge.best.values.values())
    assert all(torch.equal(image, x[:1]) for image in judge.best.images.values())


def test_a_member_that_returns_the_image_changes_nothing(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small_model(), images(3)
    whole = Attack.run

    def lazy(self: Attack, model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        outcome = whole(self, model, x, *args, **kwargs)
        if isinstance(self.objective, KeepClass) and isinstance(self.objective.objective, MassCentre):
            return replace(outcome, images={name: x.clone() for name in outcome.images})
        return outcome

    monkeypatch.setattr(Attack, "run", lazy)
    idle = quick().run(model, TIMES_INPUT, x, surrogate=Surrogate())
    for score in SCORES:
        assert idle.members["mass_centre"][score].tolist() == [1, 1, 1]
        others = [idle.members[name][score] for name in idle.names if name != "mass_centre"]
        assert torch.equal(idle.worst[score], torch.stack(others).amin(0))
        assert "mass_centre" not in [idle.names[i] for i in idle.by[score].tolist() if i >= 0]
        for name in idle.names:
            if name not in ("mass_centre", "polish"):  # polish starts from the best of all others
                assert torch.equal(idle.members[name][score], found.members[name][score])


@pytest.mark.parametrize(
    "budget", [L2, Budget.named("l2", 0.5), Budget.named("linf", 3.0), Budget.named("legacy")], ids=str
)
def test_the_noise_control_uses_the_whole_budget(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that are scored, after rounding; half of the norm would make the control say too little."""
    model, x = small_model(), images(3, side=24)
    offered: list[Tensor] = []
    whole = Judge._offer

    def spied(self: Any, images_: Tensor, best: Any) -> None:
        offered.append(images_)
        whole(self, images_, best)

    monkeypatch.setattr(Judge, "_offer", spied)
    Ensemble((), budget=budget).run(model, TIMES_INPUT, x)
    (noise,) = offered
    used = budget.used(noise, x, normalisation_scale(model, x))
    assert (used > 0.97).all()
    assert (budget.violation(noise, x, normalisation_scale(model, x)) <= 1 + 1e-4).all()
    change = noise - x
    assert change.mean().abs() < 0.1 * change.std()
    assert not torch.allclose(change[0], change[1])


def test_an_ensemble_does_not_depend_on_the_batch_or_on_who_else_is_a_member(found: Found) -> None:
    model, x = small_model(), images(3)
    alone = quick().run(model, TIMES_INPUT, x[1:2], surrogate=Surrogate(), keys=[1])
    fewer = quick("top_k", "black_box").run(model, TIMES_INPUT, x, surrogate=Surrogate())
    for score in SCORES:
        torch.testing.assert_close(alone.worst[score][0], found.worst[score][1], rtol=0, atol=2e-3)
        for name in fewer.names:
            assert torch.equal(fewer.members[name][score], found.members[name][score])


def test_restarts_and_repeats_start_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 restarts and 3 goals of a full run: no two with one seed; another seed of the ensemble moves them all."""
    seeds: list[tuple[str, int, str]] = []
    whole = Attack.run

    def noted(self: Attack, *args: Any, keys: Sequence[Any] = (), **kwargs: Any) -> Any:
        seeds.append((str(keys[0]), self.seed, str(self.surrogate)))
        return whole(self, *args, keys=keys, **kwargs)

    monkeypatch.setattr(Attack, "run", noted)
    model, x = small_model(), images(1)
    members = ("dissimilarity", "combined", "target")
    full = Ensemble(members, "full", L2, steps=1)
    full.run(model, TIMES_INPUT, x, surrogate=Surrogate())
    runs = seeds[:-1]  # the last one is the control
    assert len(runs) == 3 + 4 + 3 == full.cost()
    assert len(set(runs)) == len(runs)
    assert [seed for key, seed, _ in runs if "dissimilarity" in key] == [0, 1, 2]
    assert {way for key, _, way in runs if "combined" in key} == set(SURROGATES)
    seeds.clear()
    replace(full, seed=1000).run(model, TIMES_INPUT, x, surrogate=Surrogate())
    assert not set(runs) & set(seeds)


def test_the_goals_of_target_are_three_different_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    goals: list[Tensor] = []
    whole = Attack.run

    def noted(self: Attack, *args: Any, goal: Tensor | None = None, **kwargs: Any) -> Any:
        if goal is not None:
            goals.append(goal)
        return whole(self, *args, goal=goal, **kwargs)

    monkeypatch.setattr(Attack, "run", noted)
    model, x = small_model(), images(2)
    aim = torch.rand(2, 12, 12)
    result = Ensemble(("target",), "full", L2, steps=1).run(
        model, TIMES_INPUT, x, surrogate=Surrogate(), goal=aim
    )
    own = result.reference.map
    for got, expected in zip(goals, (aim, own.flip(-1), own.flip(-1, -2)), strict=True):
        assert torch.equal(got, expected)


def test_a_full_run_of_the_gradient_is_not_stalled_by_the_surrogates_that_cannot_work() -> None:
    """On ReLUs the gradient has no slope; the probe knows it, and the attack on softplus used its budget."""
    model, x = small_model(), images(3)
    best = Surrogate.named("softplus_30")
    result = Ensemble(("combined",), "full", L2, steps=6).run(model, GRADIENT, x, surrogate=best)
    assert (result.stuck < 0.5).all()
    assert (result.used > 0.5).all()


class OnSurrogatesOnly(Explainer):
    """Attached to the image on surrogates alone."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        raw, logits = Brightness().explain_with_logits(model, x, target)
        return (raw if isinstance(model, SmoothModel) else raw.detach()), logits


def test_a_full_run_passes_over_a_surrogate_without_a_gradient() -> None:
    model, x = small_model(), images(2)
    seen = probe(OnSurrogatesOnly(), model, x, L2)
    assert seen.best is not None
    assert not seen.best.is_original
    result = Ensemble(("combined",), "full", L2, steps=3).run(
        model, OnSurrogatesOnly(), x, surrogate=seen.best
    )
    assert (result.worst["pcc"] < 1).all()


def test_a_budget_below_half_a_level_is_an_unused_one() -> None:
    model, x = small_model(), images(2)
    result = quick("combined", budget=Budget.named("linf", 0.5)).run(
        model, TIMES_INPUT, x, surrogate=Surrogate()
    )
    assert all(torch.equal(image, x) for image in result.images.values())
    assert (result.used < 0.5).all()


# --- transfer and probe ---------------------------------------------------------------------------


def test_transfer_is_the_lowest_of_the_other_images_that_are_allowed(found: Found) -> None:
    model, x = small_model(), images(3)
    method = Brightness()
    far = (x + 0.2).clamp(0, 1)  # must be brought into the budget
    others = {"a": [found.images["pcc"], found.images["ssim"]], "b": [far]}
    judge = transferred(L2, model, method, x, found.target, others)
    best, reference = judge.best, judge.reference
    for score in SCORES:
        apart = [transferred(L2, model, method, x, found.target, {n: others[n]}).best for n in others]
        for name, alone in zip(others, apart, strict=True):
            assert torch.equal(judge.members[name][score], alone.values[score])
        assert torch.equal(best.values[score], apart[0].values[score].minimum(apart[1].values[score]))
    expected = torch.ones(3)
    for image in [*others["a"], *others["b"]]:
        inside = L2.quantise(image, x)
        raw, logits = method.explain_with_logits(model, inside, found.target)
        value = similarity(raw, reference.map, (12, 12))["pcc"].float()
        kept = logits.argmax(1) == model(x).argmax(1)
        expected = torch.where(kept, expected.minimum(value), expected)
    torch.testing.assert_close(best.values["pcc"], expected)
    assert (L2.violation(best.images["pcc"], x) <= 1 + 1e-5).all()
    unmoved = transferred(L2, model, method, x, found.target, {"none": [x]}).best
    assert unmoved.values["pcc"].tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(unmoved.images["pcc"], to_8_bits(x))


def test_the_probe_finds_a_surrogate_that_works() -> None:
    model, x = small_model(), images(3)
    budget = Budget.named("legacy")
    gradient = probe(GRADIENT, model, x, budget)
    assert gradient.best is not None
    assert not gradient.best.is_original
    assert "none" not in gradient.scores
    assert gradient.scores[str(gradient.best)] <= min(gradient.scores.values()) + NEAR
    assert not gradient.random
    srd = probe(make_explainer("srd", start="ones"), model, x, budget)
    assert srd.best is not None
    assert set(srd.scores) == set(SURROGATES)
    for seen in (gradient, srd):
        assert max(seen.scores.values()) < 0.99
        assert 0 < seen.likeness <= 1
    with_none = probe(TIMES_INPUT, model, x, budget)
    if with_none.best is not None and with_none.best.is_original:
        assert with_none.likeness == pytest.approx(1)


def test_the_probe_finds_none_for_maps_without_a_gradient() -> None:
    model, x = small_model(sure=True), images(2)
    detached, flat = (probe(method, model, x, L2) for method in (Detached(), Flat()))
    assert detached.best is None
    assert "has no gradient in the image" in detached.why
    assert flat.best is None
    assert flat.why == "its gradient is zero on every surrogate"
    assert detached.scores == flat.scores == {}
    assert probe(Noise(), model, x, L2).random
    assert not detached.random
    assert not probe(Fixed(), model, x, L2).random


def test_the_probe_knows_a_zero_gradient_after_any_number_of_steps() -> None:
    assert probe(Flat(), small_model(sure=True), images(1), L2, steps=12).best is None


def test_the_slope_of_the_hinge_is_none_of_the_map() -> None:
    assert probe(Flat(), small_model(), images(2), L2).best is None


def test_pcc_of_the_worst_is_pearsons(found: Found) -> None:
    """The score that is ranked by, once more from the images alone."""
    model, x = small_model(), images(3)
    before, after = (
        TIMES_INPUT.explain(model, image, found.target).abs() for image in (x, found.images["pcc"])
    )
    torch.testing.assert_close(PCC().score(after, before).float(), found.worst["pcc"], rtol=0, atol=1e-5)
    assert top_pixels(before).sum((1, 2)).tolist() == [14, 14, 14]
