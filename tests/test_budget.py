"""Budgets and scores: the projection is the nearest point, 8-bit images stay inside, scores are those of other libraries."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.stats import pearsonr
from skimage.metrics import structural_similarity
from small_networks import STD, images
from torch import Tensor

from attacks.budget import LEGACY_MSE, Budget, mean_square, to_8_bits
from attacks.scores import SCORES, as_read, more_scores, scores_of, similarity, ssim_for, top_pixels
from srd_lab.errors import BadValue

SHAPE = (3, 2, 2)
SCALE = 1 / torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
BUDGETS = [
    Budget.named("legacy"),
    Budget.named("l2", 2.0),
    Budget.named("linf", 8.0),
    Budget(linf=3.0, rms=2.0),
    Budget(linf=20.0, mse=2e-3),
    Budget(linf=None, mse=1e-3),
]
NAMES = [str(budget) for budget in BUDGETS]


def bounds(budget: Budget, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    limit = np.inf if budget.linf is None else budget.linf / 255
    return np.maximum(0, x - limit), np.minimum(1, x + limit)


def units(budget: Budget) -> np.ndarray:
    """What a pixel's unit counts in the norm, (3, 1, 1)."""
    return SCALE[0].numpy() if budget.mse is not None else np.full((3, 1, 1), 255.0)


def largest(budget: Budget) -> float:
    if budget.mse is not None:
        return budget.mse**0.5
    return np.inf if budget.rms is None else budget.rms


def nearest(budget: Budget, wished: np.ndarray, x: np.ndarray) -> np.ndarray:
    """By bisection on the multiplier of the ball: argmin over the box of |z - wished|^2 + l |z - x|^2."""
    low, high = bounds(budget, x)

    def at(multiplier: float) -> np.ndarray:
        return np.clip(x + (wished - x) / (1 + multiplier), low, high)

    def size(z: np.ndarray) -> float:
        return float(np.sqrt(np.mean((units(budget) * (z - x)) ** 2)))

    if size(at(0)) <= largest(budget):
        return at(0)
    few, many = 0.0, 1e12
    for _ in range(200):
        middle = (few + many) / 2 if few > 1 else np.sqrt((few + 1e-9) * many)
        few, many = (middle, many) if size(at(middle)) > largest(budget) else (few, middle)
    return at(many)


unit_pixels = arrays(np.float64, SHAPE, elements=st.floats(0, 1, width=32))
changes = arrays(np.float64, SHAPE, elements=st.floats(-1, 1, width=32))
sizes = st.sampled_from([1e-3, 3e-2, 1.0, 30.0])


# --- the projection -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS, ids=NAMES)
@given(x=unit_pixels, change=changes, size=sizes)
@settings(max_examples=60, deadline=None)
def test_the_projection_is_the_nearest_point(
    budget: Budget, x: np.ndarray, change: np.ndarray, size: float
) -> None:
    wished = x + size * change
    got = budget.project(torch.from_numpy(wished)[None], torch.from_numpy(x)[None], SCALE)[0].numpy()
    np.testing.assert_allclose(got, nearest(budget, wished, x), rtol=0, atol=3e-6 * (1 + largest(BUDGETS[1])))
    low, high = bounds(budget, x)
    assert (got >= low - 1e-15).all()
    assert (got <= high + 1e-15).all()
    assert np.sqrt(np.mean((units(budget) * (got - x)) ** 2)) <= largest(budget)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", BUDGETS, ids=NAMES)
def test_a_general_solver_finds_nothing_nearer(budget: Budget, seed: int) -> None:
    """By the budget's own norm, in units of the largest change; some pixels sit at the ends of the range."""
    chance = np.random.default_rng(seed)
    x = np.clip(chance.uniform(-0.2, 1.2, SHAPE), 0, 1)
    wished = x + chance.normal(0, 0.03, SHAPE) * chance.choice([0.2, 1, 3], SHAPE)
    weight, unit = units(budget), 8 / 255
    low, high = bounds(budget, x)

    def apart(z: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (np.broadcast_to(weight, SHAPE) * unit * (z.reshape(SHAPE) - (other - x) / unit)).ravel()

    rule = {"type": "ineq", "fun": lambda z: largest(budget) ** 2 - np.mean(apart(z, x) ** 2)}
    found = minimize(
        lambda z: np.sum(apart(z, wished) ** 2),
        np.zeros(x.size),
        bounds=list(zip(((low - x) / unit).ravel(), ((high - x) / unit).ravel(), strict=True)),
        constraints=[rule] if budget.has_l2 else [],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    got = budget.project(torch.from_numpy(wished)[None], torch.from_numpy(x)[None], SCALE)[0].numpy()
    ours = np.sum(apart((got - x) / unit, wished) ** 2)
    assert ours <= found.fun * (1 + 1e-4) + 1e-9
    np.testing.assert_allclose((got - x) / unit, found.x.reshape(SHAPE), atol=2e-3)


def stressed(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with black, white and grey parts, and changes over six orders of magnitude, in single precision."""
    chance = torch.Generator().manual_seed(seed)
    x = (1.6 * torch.rand(n, 3, 16, 16, generator=chance) - 0.3).clamp(0, 1)
    tails = torch.exp(3 * torch.randn(x.shape, generator=chance))
    return x, x + 0.02 * torch.randn(x.shape, generator=chance) * tails


@pytest.mark.parametrize("budget", BUDGETS, ids=NAMES)
def test_single_precision_never_leaves_the_budget_and_a_second_projection_changes_nothing(
    budget: Budget,
) -> None:
    scale = SCALE.float()
    for seed in range(10):
        x, wished = stressed(4, seed)
        once = budget.project(wished, x, scale)
        assert (budget.violation(once, x, scale) <= 1 + 1e-6).all()
        assert once.amin() >= 0
        assert once.amax() <= 1
        twice = budget.project(once, x, scale)
        torch.testing.assert_close(twice, once, rtol=0, atol=1e-6)
        if budget.has_l2:  # the whole ball, or all that the box leaves of it
            boxed = budget.used(wished.clamp(*budget.box(x)), x, scale).clamp(max=1)
            assert (budget.used(once, x, scale) > 0.999 * boxed).all()
        inside = x + 0.3 * (once - x)
        torch.testing.assert_close(budget.project(inside, x, scale), inside, rtol=0, atol=1e-7)


def test_the_projection_of_an_image_does_not_depend_on_the_batch() -> None:
    x, wished = stressed(5, 3)
    for budget in BUDGETS:
        together = budget.project(wished, x, SCALE.float())
        for i in range(5):
            alone = budget.project(wished[i : i + 1], x[i : i + 1], SCALE.float())
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "tail",
    [
        20,
        pytest.param(45),
    ],
)
def test_changes_over_many_magnitudes_still_use_the_whole_ball(tail: int) -> None:
    """Every Newton step passes one bend here; ending early leaves most of the budget unused."""
    x = torch.full((1, 3, 4, 8), 0.5, dtype=torch.float64)
    change = torch.zeros(96, dtype=torch.float64)
    change[:tail] = torch.tensor([10.0**-i for i in range(tail)], dtype=torch.float64) * 10.0**tail
    budget = Budget(linf=2.0, rms=2.0 * ((tail - 2) / 96) ** 0.5)
    got = budget.project(x + change.view(x.shape), x)
    assert budget.used(got, x) > 0.999


# --- 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS, ids=NAMES)
def test_8_bit_images_are_whole_levels_within_the_budget(budget: Budget) -> None:
    scale = SCALE.float()
    for seed in range(5):
        x, wished = stressed(4, seed)
        x = to_8_bits(x)
        got = budget.quantise(wished, x, scale)
        levels = got * 255
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert (budget.violation(got, x, scale) <= 1 + 2e-5).all()  # x + 3/255 in single precision
        assert 0 <= got.amin() <= got.amax() <= 1
        torch.testing.assert_close(budget.quantise(got, x, scale), got, rtol=0, atol=0)
        projected = budget.project(wished, x, scale)
        assert (got - projected).abs().amax() <= 1.01 / 255
        if budget.has_l2:
            assert (budget.used(got, x, scale) > 0.9 * budget.used(projected, x, scale)).all()
        assert torch.equal(budget.quantise(x, x, scale), x)


def test_8_bit_images_do_not_depend_on_the_batch() -> None:
    x, wished = stressed(4, 1)
    x = to_8_bits(x)
    for budget in BUDGETS:
        together = budget.quantise(wished, x, SCALE.float())
        alone = [budget.quantise(wished[i : i + 1], x[i : i + 1], SCALE.float()) for i in range(4)]
        assert torch.equal(together, torch.cat(alone))


# --- numbers of a budget --------------------------------------------------------------------------


def test_named_budgets() -> None:
    assert Budget.named("legacy") == Budget(linf=8.0, mse=1e-3)
    assert Budget.named("legacy", 0.5) == Budget(linf=4.0, mse=LEGACY_MSE / 4)
    assert Budget.named("legacy", 100.0).linf == 255
    assert Budget.named("l2") == Budget(linf=None, rms=2.0)
    assert Budget.named("l2", 0.5) == Budget(linf=None, rms=0.5)
    assert Budget.named("linf") == Budget(linf=8.0)
    assert Budget.named("linf", 1) == Budget(linf=1)
    assert str(Budget.named("legacy")) == "L-inf 8/255 and MSE 0.001 (normalised)"
    assert str(Budget(linf=3.0, rms=2.0)) == "L-inf 3/255 and RMS 2/255"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linf": 0}, r"the budget's linf must lie in \(0, 255\] \(units of 0\.\.255\), got 0$"),
        ({"linf": 256.0}, r"the budget's linf must lie in"),
        ({"rms": -1.0}, r"the budget's rms must lie in"),
        ({"rms": float("nan")}, r"the budget's rms must lie in"),
        ({"mse": 0.0}, r"the budget needs mse > 0 and finite \(normalised units\), got 0"),
        ({"mse": float("nan")}, r"the budget needs mse > 0"),
        ({"stop_mse": -1.0}, r"the budget needs stop_mse > 0"),
        ({"rms": 1.0, "mse": 1e-3}, r"rms or mse, not both"),
        ({"linf": None}, r"needs a bound: give linf, rms or mse"),
        pytest.param({"linf": None, "mse": float("inf")}, r"the budget needs"),
    ],
)
def test_bounds_that_are_none_are_refused_in_one_line(options: dict[str, float | None], message: str) -> None:
    with pytest.raises(BadValue, match=message) as caught:
        Budget(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", ["legacy", "l2", "linf"])
@pytest.mark.parametrize("size", [0, -1.0, 255.5, float("nan"), float("inf")])
def test_sizes_that_are_none_are_refused_in_one_line(norm: str, size: float) -> None:
    with pytest.raises(BadValue, match=r"the budget must lie in \(0, 255\]") as caught:
        Budget.named(norm, size)
    assert "\n" not in str(caught.value)


def test_unknown_norms_and_a_missing_scale_are_refused() -> None:
    with pytest.raises(BadValue, match="'l1' is not known; expected one of legacy, l2, linf"):
        Budget.named("l1")
    x = images(1)
    with pytest.raises(BadValue, match="needs the scale of the normalisation"):
        Budget.named("legacy").project(x, x)


def test_radius_use_and_violation_by_hand() -> None:
    x = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    moved = x.clone()
    moved[0, 1, 0, 0] += 6 / 255
    moved[1] -= 1 / 255
    root = 12**0.5
    assert Budget.named("l2", 2.0).radius(x, None) == pytest.approx(2 * root)
    assert Budget.named("linf", 8.0).radius(x, None) == pytest.approx(8 * root)
    assert Budget.named("legacy").radius(x, SCALE) == pytest.approx(1e-3**0.5 * root)
    l2, linf = Budget.named("l2", 2.0), Budget.named("linf", 4.0)
    assert l2.rms_of(moved, x).tolist() == pytest.approx([6 / root, 1])
    assert l2.used(moved, x).tolist() == pytest.approx([3 / root, 0.5])
    assert linf.used(moved, x).tolist() == pytest.approx([6 / 12 / 4, 0.25])
    assert l2.violation(moved, x).tolist() == pytest.approx([3 / root, 0.5])
    assert linf.violation(moved, x).tolist() == pytest.approx([1.5, 0.25])
    mse = ((6 / 255 / STD[1]) ** 2) / 12
    assert mean_square(moved, x, SCALE)[0].item() == pytest.approx(mse)
    legacy = Budget.named("legacy")
    assert legacy.used(moved, x, SCALE)[0].item() == pytest.approx((mse / 1e-3) ** 0.5)
    assert legacy.violation(moved, x, SCALE)[0].item() == pytest.approx(max(6 / 8, (mse / 1e-3) ** 0.5))
    outside = torch.ones_like(x) + 1e-9
    for budget in (l2, linf, legacy):
        assert budget.violation(outside, torch.ones_like(x), SCALE).tolist() == [np.inf] * 2
        assert budget.violation(-outside + 1, torch.zeros_like(x), SCALE).tolist() == [np.inf] * 2


def test_what_the_pixel_range_forbids_is_no_unused_budget() -> None:
    """Half of a black image's pixels want to become darker; the other half went all the way."""
    x = torch.zeros(1, 3, 8, 8)
    wished = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    budget = Budget.named("linf")
    moved = budget.project(x + wished * 8 / 255, x)
    assert budget.used(moved, x) > 0.9
    assert budget.used(x, x) == 0


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 8, 31])
def test_scores_are_those_of_other_libraries(side: int) -> None:
    chance = torch.Generator().manual_seed(side)
    before = torch.randn(3, side, side, generator=chance)
    after = before + 0.5 * torch.randn(before.shape, generator=chance)
    found = similarity(after, before, (side, side))
    assert tuple(found) == SCORES
    window = min(7, side if side % 2 else side - 1)
    assert ssim_for((side, side)).window == window
    for i in range(3):
        a, b = (np.abs(m[i].double().numpy()) / np.abs(m[i].double().numpy()).max() for m in (after, before))
        count = max(1, round(0.1 * side * side))
        top = [set(np.argsort(-m.ravel(), kind="stable")[:count].tolist()) for m in (a, b)]
        near = {
            (r + dr) * side + c + dc
            for r, c in (divmod(p, side) for p in top[0])
            for dr in (-1, 0, 1)
            for dc in (-1, 0, 1)
            if 0 <= r + dr < side and 0 <= c + dc < side
        }
        assert found["pcc"][i].item() == pytest.approx(pearsonr(a.ravel(), b.ravel())[0], abs=1e-5)
        expected = structural_similarity(a, b, win_size=window, data_range=1.0)
        assert found["ssim"][i].item() == pytest.approx(expected, abs=1e-5)
        assert found["top_k"][i].item() == pytest.approx(len(top[0] & top[1]) / count)
        assert found["local_top_k"][i].item() == pytest.approx(len(near & top[1]) / count)


def test_a_coarse_map_is_stretched_before_it_is_scored() -> None:
    before, after = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = similarity(after, before, (12, 12))
    reference = scores_of(as_read(after, (12, 12)), as_read(before, (12, 12)))
    assert as_read(after, (12, 12)).shape == (2, 12, 12)
    for name, value in found.items():
        assert torch.equal(value, reference[name])
    assert not torch.allclose(found["ssim"], similarity(after, before, (4, 4))["ssim"], atol=1e-3)


def dots(*places: tuple[int, int], side: int = 10) -> Tensor:
    found = torch.zeros(1, side, side)
    for row, column in places:
        found[0, row, column] = 1
    return found


def test_a_shift_by_one_pixel_is_no_loss_for_the_local_score_alone() -> None:
    """10 bright pixels of 100, far from each other; the last shift is by two."""
    places = [(r, c) for r in (1, 4, 7) for c in (1, 4, 7)] + [(9, 9)]
    before = dots(*places)
    for step, local in (((0, 1), 1.0), ((1, 1), 1.0), ((1, 0), 1.0)):
        moved = dots(*(((r + step[0]) % 10, (c + step[1]) % 10) for r, c in places[:9]), (8, 8))
        found = similarity(moved, before, (10, 10))
        assert found["top_k"].item() == 0
        assert found["local_top_k"].item() == local
    far = dots(*((r, c) for r, c in places[:5]), *[(0, 9), (2, 9), (6, 9), (9, 0), (9, 5)])
    found = similarity(far, before, (10, 10))
    assert found["top_k"].item() == 0.5
    assert found["local_top_k"].item() == 0.5


def test_top_pixels_by_hand() -> None:
    shown = torch.tensor([[[5.0, 1.0, 4.0], [2.0, 9.0, 0.0]]])
    assert top_pixels(shown, 0.5).flatten().tolist() == [True, False, True, False, True, False]
    assert top_pixels(shown, 0.01).sum() == 1
    equal = torch.ones(1, 2, 3)
    assert top_pixels(equal, 0.34).flatten().tolist() == [True, True, False, False, False, False]


def test_signed_and_pooled_scores() -> None:
    chance = torch.Generator().manual_seed(0)
    before = torch.randn(2, 56, 56, generator=chance)
    after = before + torch.randn(before.shape, generator=chance)
    found = more_scores(after, before, (56, 56))
    for i in range(2):
        a, b = (m[i].double().numpy() for m in (after, before))
        assert found["pcc_signed"][i].item() == pytest.approx(pearsonr(a.ravel(), b.ravel())[0], abs=1e-5)
        small = [np.abs(m).reshape(28, 2, 28, 2).mean((1, 3)) / np.abs(m).max() for m in (a, b)]
        r = pearsonr(small[0].ravel(), small[1].ravel())[0]
        assert found["pcc_28"][i].item() == pytest.approx(r, abs=1e-5)
        top = [set(np.argsort(-m.ravel(), kind="stable")[:78].tolist()) for m in small]
        assert found["top_k_28"][i].item() == pytest.approx(len(top[0] & top[1]) / 78)
    assert torch.allclose(more_scores(-before, before, (56, 56))["pcc_signed"], torch.tensor(-1.0).double())
    assert torch.allclose(more_scores(-before, before, (56, 56))["pcc_28"], torch.tensor(1.0).double())


def test_equal_maps_score_one_and_maps_with_nan_score_nan() -> None:
    raw = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    raw[2] = 0  # a zero map, equal to itself
    for value in similarity(raw, raw, (9, 9)).values():
        torch.testing.assert_close(value, torch.ones(3).double())
    broken = raw.clone()
    broken[1, 4, 4] = torch.nan
    for pair in ((broken, raw), (raw, broken)):
        for value in similarity(*pair, (9, 9)).values():
            assert value.isnan().tolist() == [False, True, False]
            assert value[0] == pytest.approx(1)


def test_more_scores_of_maps_with_nan_are_nan() -> None:
    raw = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(0))
    for name, value in more_scores(raw * torch.nan, raw, (9, 9)).items():
        assert value.isnan().all(), name
