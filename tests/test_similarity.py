"""SSIM and PCC against scikit-image and scipy, and where those have no answer."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from skimage.metrics import structural_similarity
from torch import Tensor

from srd_lab.errors import BadInput, BadValue
from srd_lab.metrics.similarity import PCC, SSIM


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = [
    (maps(4, 9, 9), maps(4, 9, 9, seed=1)),
    (maps(3, 7, 20), 1 - maps(3, 7, 20)),
    (maps(2, 32, 16), maps(2, 32, 16) + 0.05 * maps(2, 32, 16, seed=2)),
    (maps(2, 12, 12) ** 8, maps(2, 12, 12, seed=3) ** 8),  # mostly dark, as saliency is
    (1e-9 * maps(2, 8, 8), 1e-9 * maps(2, 8, 8, seed=4)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(tuple(pair[0].shape)))
@pytest.mark.parametrize(("window", "data_range"), [(7, 1.0), (3, 1.0), (5, 2.5)])
def test_ssim_equals_scikit_image(pair: tuple[Tensor, Tensor], window: int, data_range: float) -> None:
    got = SSIM(window, data_range).score(*pair)
    for score, a, b in zip(got.tolist(), pair[0].numpy(), pair[1].numpy(), strict=True):
        expected = structural_similarity(a, b, win_size=window, data_range=data_range)
        assert score == pytest.approx(expected, rel=0, abs=1e-10)
    assert SSIM() == SSIM(7, 1.0)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(tuple(pair[0].shape)))
def test_pcc_equals_scipy(pair: tuple[Tensor, Tensor]) -> None:
    for score, a, b in zip(PCC().score(*pair).tolist(), pair[0].numpy(), pair[1].numpy(), strict=True):
        assert score == pytest.approx(pearsonr(a.ravel(), b.ravel()).statistic, rel=0, abs=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-160, 1e30])
def test_pcc_does_not_depend_on_scale(scale: float) -> None:
    a, b = maps(2, 8, 8), maps(2, 8, 8, seed=1)
    torch.testing.assert_close(PCC().score(scale * a, b), PCC().score(a, b), rtol=1e-9, atol=0)


@pytest.mark.parametrize("metric", [SSIM(), PCC()], ids=["ssim", "pcc"])
def test_equal_maps_score_one(metric: SSIM | PCC) -> None:
    same = torch.stack([maps(9, 9), torch.zeros(9, 9), torch.full((9, 9), 0.1)])
    torch.testing.assert_close(
        metric.score(same, same), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_constant_maps_have_a_score() -> None:
    zero, grey, light = torch.zeros(1, 9, 9), torch.full((1, 9, 9), 0.1), torch.full((1, 9, 9), 0.7)
    for a, b in product((zero, grey, light, maps(1, 9, 9).float()), repeat=2):
        pcc, ssim = float(PCC().score(a, b)), float(SSIM().score(a, b))
        assert pcc == (1.0 if torch.equal(a, b) else 0.0)
        assert np.isfinite(ssim)
        assert -1 <= ssim <= 1 + 1e-12
    # Not even where the mean of equal numbers is not that number.
    thirds = torch.stack([torch.full((7, 11), k / 3, dtype=torch.float64) for k in range(1, 9)])
    assert (thirds - thirds.mean((1, 2), keepdim=True)).abs().max() > 0
    assert PCC().score(thirds, maps(8, 7, 11)).abs().max() == 0
    # With the structure equal, what is left is luminance: (2 m n + c1) / (m^2 + n^2 + c1).
    m, n, c1 = 0.1, 0.7, 1e-4
    assert float(SSIM().score(grey, light)) == pytest.approx(
        (2 * m * n + c1) / (m * m + n * n + c1), rel=1e-6
    )
    assert float(SSIM().score(zero, grey)) == pytest.approx(c1 / (m * m + c1), rel=1e-6)


@pytest.mark.parametrize("metric", [SSIM(), SSIM(3), PCC()], ids=["ssim", "ssim3", "pcc"])
def test_scores_are_per_image(metric: SSIM | PCC) -> None:
    a, b = maps(5, 8, 10), maps(5, 8, 10, seed=1)
    b[3] = 0
    together = metric.score(a, b)
    assert together.shape == (5,)
    for i in range(5):
        torch.testing.assert_close(
            metric.score(a[i : i + 1], b[i : i + 1])[0], together[i], rtol=0, atol=1e-14
        )
    assert metric.score(a[:0], b[:0]).shape == (0,)
    torch.testing.assert_close(metric.score(a, b), metric.score(b, a))
    torch.testing.assert_close(metric.score(a.float(), b.float()), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2])
def test_tiny_maps_are_compared_by_luminance(side: int) -> None:
    a, b = maps(3, side, side), maps(3, side, side, seed=1)
    expected = ((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)).mean((1, 2))
    torch.testing.assert_close(SSIM(window=1).score(a, b), expected)


@pytest.mark.parametrize("metric", [SSIM(), PCC()], ids=["ssim", "pcc"])
def test_maps_that_cannot_be_compared_are_refused(metric: SSIM | PCC) -> None:
    for a, b in (
        (maps(2, 8, 8), maps(2, 8, 9)),
        (maps(8, 8), maps(8, 8)),
        (maps(2, 3, 8, 8), maps(2, 3, 8, 8)),
    ):
        with pytest.raises(BadInput, match=r"two batches of maps \(N, H, W\) of one shape"):
            metric.score(a, b)


@pytest.mark.parametrize("window", [0, 4, 9, -1])
def test_windows_that_do_not_fit_are_refused(window: int) -> None:
    with pytest.raises(BadValue, match=rf"odd and at most the map's side 8, got {window}"):
        SSIM(window).score(maps(1, 8, 8), maps(1, 8, 8))
