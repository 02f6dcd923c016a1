"""Sparseness and Roughness against their definitions written out, known values, and where they have no answer."""

from __future__ import annotations

import tracemalloc
from itertools import permutations
from math import cos, pi

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon
from torch import Tensor

from srd_lab.errors import BadInput
from srd_lab.metrics import summary
from srd_lab.metrics.complexity import Roughness, Sparseness
from srd_lab.metrics.summary import few_note, holm, images_needed, smallest_p, summarise, unsettled_note

Metric = Sparseness | Roughness
BOTH = pytest.mark.parametrize("metric", [Sparseness(), Roughness()], ids=["sparseness", "roughness"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(metric: Metric, single: Tensor) -> float:
    return float(metric.score(single[None]))


def gini(single: np.ndarray) -> float:
    """Mean absolute difference of all pairs of pixels, over twice the mean: the index without any sorting."""
    v = np.abs(single).ravel()
    return float(np.abs(v[:, None] - v[None]).mean() / (2 * v.mean()))


def printed_gini(single: np.ndarray) -> float:
    """Eq. 26 of the SRD paper, as it is printed."""
    v = np.sort(np.abs(single).ravel())
    d = len(v)
    return float(1 - 2 * sum(v[k - 1] / np.abs(v).sum() * ((d - k + 0.5) / d) for k in range(1, d + 1)))


def geary(single: np.ndarray) -> float:
    """Geary's C with its full matrix of weights: 1 for pixels that share an edge."""
    height, width = single.shape
    rows, columns = np.divmod(np.arange(height * width), width)
    distance = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns)
    w = (distance == 1).astype(float)
    x = single.ravel()
    squares = (x[:, None] - x) ** 2
    return float((len(x) - 1) * (w * squares).sum() / (2 * w.sum() * ((x - x.mean()) ** 2).sum()))


MAPS = [noise(3, 9, 9), noise(2, 1, 7), noise(2, 12, 5) ** 9, noise(2, 8, 8).abs(), noise(2, 2, 2) + 5]


@pytest.mark.parametrize("maps", MAPS, ids=lambda maps: str(tuple(maps.shape)))
def test_scores_equal_their_definitions(maps: Tensor) -> None:
    for single, sparse, rough in zip(
        maps.numpy(), Sparseness().score(maps).tolist(), Roughness().score(maps).tolist(), strict=True
    ):
        assert sparse == pytest.approx(gini(single), rel=0, abs=1e-12)
        assert sparse == pytest.approx(printed_gini(single), rel=0, abs=1e-12)
        assert rough == pytest.approx(geary(single), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 10**6))
def test_scores_keep_to_their_ranges_and_to_what_they_do_not_depend_on(
    height: int, width: int, seed: int
) -> None:
    maps = noise(2, height, width, seed=seed) ** 3
    d, edges = height * width, (height - 1) * width + height * (width - 1)
    sparse, rough = Sparseness().score(maps), Roughness().score(maps)
    assert 0 <= sparse.min() <= sparse.max() <= 1 - 1 / d + 1e-12
    largest = 4 + 2 * cos(pi / height) + 2 * cos(pi / width)  # eigenvalue of the grid's Laplacian
    assert 0 <= rough.min() <= rough.max() <= largest * (d - 1) / (2 * edges) + 1e-12
    torch.testing.assert_close(Sparseness().score(-3 * maps), sparse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Roughness().score(7 - 3 * maps), rough, rtol=1e-6, atol=1e-12)
    shuffled = maps.flatten(1)[:, torch.randperm(d)].view_as(maps)
    torch.testing.assert_close(Sparseness().score(shuffled), sparse, rtol=1e-9, atol=1e-12)
    for turned in (maps.flip(1), maps.flip(2), maps.mT):
        torch.testing.assert_close(Roughness().score(turned), rough, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_scale_does_not_matter(metric: Metric, scale: float) -> None:
    maps = noise(3, 8, 8)
    torch.testing.assert_close(metric.score(scale * maps), metric.score(maps), rtol=1e-9, atol=0)


def test_known_sparseness() -> None:
    spot = torch.zeros(6, 5)
    spot[2, 3] = -4
    assert one(Sparseness(), spot) == pytest.approx(1 - 1 / 30, rel=1e-12)
    half = torch.zeros(6, 5)
    half[:3] = 0.1
    assert one(Sparseness(), half) == pytest.approx(0.5, rel=1e-12)
    for value in (0.1, -3.0, 1 / 3):
        assert one(Sparseness(), torch.full((7, 11), value)) == 0
    signs = torch.ones(4, 4)
    signs[::2] = -1
    assert one(Sparseness(), signs) == 0


def test_known_roughness() -> None:
    checkerboard = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(6))
    assert one(Roughness(), checkerboard) == pytest.approx(2 * (1 - 1 / 48), rel=1e-12)
    ramp = torch.arange(1.0, 101)[None]  # a line of d pixels has the ratio 6 / (d (d + 1))
    assert one(Roughness(), ramp) == pytest.approx(6 / (100 * 101), rel=1e-12)
    spot = torch.zeros(9, 9)
    spot[4, 4] = 2.0  # four edges around one pixel: 4 d / (2 E)
    assert one(Roughness(), spot) == pytest.approx(4 * 81 / (2 * 144), rel=1e-12)
    white = Roughness().score(noise(20, 64, 64))
    assert white.mean() == pytest.approx(1, abs=0.01)
    assert white.std() < 0.03


def test_the_mean_roughness_over_all_rearrangements_is_one() -> None:
    orders = torch.tensor(list(permutations([0.0, 1.0, -2.5, 7.0, 7.0, 30.0])))
    assert Roughness().score(orders.view(-1, 2, 3)).mean() == pytest.approx(1, rel=1e-12)


def test_noise_averaged_over_windows_of_side_k_has_roughness_1_over_k() -> None:
    maps = noise(4, 1, 128, 128)
    for k in (1, 2, 3, 5):  # neighbours share k (k - 1) of their k k pixels
        smooth = torch.nn.functional.avg_pool2d(maps, k, 1)[:, 0]
        assert Roughness().score(smooth).mean() == pytest.approx(1 / k, abs=0.01)


def test_the_absolute_value_hides_changes_of_sign() -> None:
    signs = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    alternating = torch.linspace(1, 2, 16) * signs
    assert one(Roughness(), alternating) > 1.8
    assert one(Roughness(), alternating.abs()) < 0.02


@BOTH
def test_maps_that_have_no_score_are_left_out(metric: Metric) -> None:
    maps = noise(6, 7, 11)
    expected = metric.score(maps)
    maps[1] = 0
    maps[2, 3, 3] = torch.nan
    maps[3, 0, 0] = torch.inf
    maps[4, 6, 10] = -torch.inf
    scores = metric.score(maps)
    assert scores.isnan().tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(scores[[0, 5]], expected[[0, 5]])
    assert summarise(scores.numpy()).n == 2


def test_constant_maps_have_no_roughness() -> None:
    # Not even where the mean of equal numbers is not that number.
    thirds = torch.stack([torch.full((7, 11), k / 3, dtype=torch.float64) for k in range(1, 9)])
    assert (thirds - thirds.mean((1, 2), keepdim=True)).abs().max() > 0
    assert Roughness().score(thirds).isnan().all()
    assert np.isnan(one(Roughness(), torch.ones(1, 1)))
    assert one(Sparseness(), torch.ones(1, 1)) == 0


@BOTH
def test_scores_are_per_image_and_of_any_dtype(metric: Metric) -> None:
    maps = noise(5, 8, 10)
    before = maps.clone()
    together = metric.score(maps)
    assert together.shape == (5,)
    assert together.dtype == torch.float64
    for i in range(5):
        torch.testing.assert_close(metric.score(maps[i : i + 1])[0], together[i], rtol=0, atol=1e-14)
    assert metric.score(maps[:0]).shape == (0,)
    torch.testing.assert_close(metric.score(maps.float()), together, rtol=0, atol=1e-6)
    torch.testing.assert_close(metric.score(maps.half()), together, rtol=0, atol=1e-2)
    torch.testing.assert_close(metric.score(maps.mT.contiguous().mT), together)
    assert metric.score((maps > 0).byte()).isfinite().all()
    assert torch.equal(maps, before)
    assert metric == type(metric)()


@BOTH
@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 8, 8), (2, 0, 8)])
def test_what_is_no_batch_of_maps_is_refused(metric: Metric, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"a batch of maps \(N, H, W\) is scored, got shape .*maps\[None\]"):
        metric.score(torch.zeros(shape))


# --- summaries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 100])
@pytest.mark.parametrize("at_once", [1, 50, 1000])
def test_draws_in_parts_are_the_same_draws(n: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).normal(size=n)
    draws = np.random.default_rng(3).integers(n, size=(500, n))
    expected = np.quantile(scores[draws].mean(1), (0.025, 0.975))
    monkeypatch.setattr(summary, "_DRAWN_AT_ONCE", at_once)
    got = summarise(scores, seed=3, resamples=500)
    assert (got.low, got.high, got.mean, got.n) == (*expected, scores.mean(), n)


def test_many_scores_take_little_memory() -> None:
    tracemalloc.start()
    try:
        summarise(np.arange(20_000.0), resamples=1000)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # 320 MB at once
    finally:
        tracemalloc.stop()


def test_one_score_has_no_interval() -> None:
    one = summarise(np.array([np.nan, 0.25]))
    assert (one.mean, one.median, one.n) == (0.25, 0.25, 1)
    assert np.isnan([one.low, one.high]).all()
    assert str(one) == "0.250 [–]"
    assert str(summarise(np.array([0.25, 0.25]))) == "0.250 [0.250, 0.250]"
    assert few_note(10, "pairs") == ""
    assert few_note(9, "pairs").startswith("fewer than 10 pairs: the intervals are too narrow")


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 14])
def test_the_smallest_p_is_that_of_the_signed_rank_test_where_all_differences_have_one_sign(n: int) -> None:
    assert smallest_p(n) == wilcoxon(np.arange(1, n + 1), method="exact").pvalue


@pytest.mark.parametrize("tests", [1, 2, 13, 26, 26 * 15])
def test_with_one_image_fewer_than_needed_no_corrected_p_is_below_the_level(tests: int) -> None:
    n = images_needed(tests)
    for images, reached in ((n, True), (n - 1, False)):
        p = wilcoxon(np.arange(1, images + 1), method="exact").pvalue
        assert bool((holm(np.full(tests, p)) < 0.05).any()) == reached
        assert bool(unsettled_note([images] * tests)) != reached


def test_the_note_says_how_many_images_are_needed_and_is_silent_where_something_is_settled() -> None:
    assert unsettled_note([4] * 2) == (
        "No test can settle any of 2 comparisons with 4 images: the smallest corrected p that is possible is 0.25; "
        "below 0.05 it can be with 7 images or more."
    )
    assert unsettled_note([]) == unsettled_note([0, 0]) == unsettled_note([6]) == ""
    assert "settle the comparison with 1 image: " in unsettled_note([1, 0])
    assert "any of 2 comparisons with 6 images" in unsettled_note([6, 6, 5], [np.nan, 0.06, np.nan]), (
        "no p of 5"
    )
    assert unsettled_note([6] * 2, [0.03, 1.0]) == "", "ties, which the normal approximation takes"
