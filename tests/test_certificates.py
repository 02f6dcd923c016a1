"""Certificates against literal re-implementations, and against attacks: nothing inside a certified radius may break what was
certified, and each part of the formula is needed for that."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, comb, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from attacks.certificates import (
    PixelCertificate,
    Sparsified,
    SparsifiedCertificate,
    certified_overlap,
    rejected,
    rms255,
    top_count,
)
from srd_lab.data import batch, load_data
from srd_lab.errors import BadValue, SrdLabError
from srd_lab.methods.cam import GradCAM
from srd_lab.models import load_model
from srd_lab.render.certificate import certificate_plot
from srd_lab.runtime import generator
from srd_lab.types import Explainer

NORMAL = NormalDist()


class Two(nn.Module):
    """Two logits; explanations here do not look at them, only at their class."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]


@dataclass(frozen=True)
class Made(Explainer):
    """A map by any function of the images (N, C, H, W)."""

    make: Callable[[Tensor], Tensor]

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.make(x), model(x)


def brightness(x: Tensor) -> Tensor:
    return x.mean(1)


def mixed(x: Tensor) -> Tensor:
    """A fixed linear map of the image, (N, H, W)."""
    n = x[0].numel()
    return (x.flatten(1) @ weights(n).to(x)).view(len(x), *x.shape[2:])


def weights(n: int) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def seesaw(x: Tensor) -> Tensor:
    """Of all pixels the first is largest where the image's first value is above 1/2, else the second is.

    So H of the two is Phi(s / sigma) and Phi(-s / sigma), s that value minus 1/2: they change places exactly at radius s.
    """
    s = x[:, 0, 0, 0] - 0.5
    found = torch.zeros_like(x[:, 0])
    found[:, 0, 0], found[:, 0, 1] = s.exp(), (-s).exp()
    return found


def images(n: int = 2, channels: int = 1, side: int = 4, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, side, side, generator=numbers, dtype=torch.float64)


def sparse(values: list[float], share: float, ones: float) -> list[float]:
    """Sparsified, by hand."""
    n = len(values)
    kept, full = (max(1, min(n - 1, round(part * n))) for part in (share, ones))
    order = sorted((abs(v) for v in values), reverse=True)
    low, high = order[kept], order[full - 1]
    return [
        0.0 if abs(v) <= low else 1.0 if abs(v) >= high else (abs(v) - low) / (high - low) for v in values
    ]


def mean_of_copies(certificate: Any, image: Tensor, share: float, ones: float) -> list[float]:
    total = [0.0] * image[0].numel()
    for k in range(certificate.draws):
        noise = torch.randn(image.shape, generator=generator(certificate.seed, "smoothed", k)).to(image)
        raw = certificate.explainer.make((image + certificate.sigma * noise)[None])[0].flatten().tolist()
        total = [a + b for a, b in zip(total, sparse(raw, share, ones), strict=True)]
    return [value / certificate.draws for value in total]


def phi(z: float) -> float:
    return NORMAL.cdf(z)


def phi_inverse(p: float) -> float:
    return -float("inf") if p <= 0 else float("inf") if p >= 1 else NORMAL.inv_cdf(p)


def overlap(h: list[float], k: int, reach: float, below: float, above: float, factor: float = 2.0) -> int:
    """The count of Levine et al. as it is printed, with c below and c above, and the 2, as parts that may be left out."""
    order = sorted(h, reverse=True)
    count = 0
    for i in range(1, k + 1):
        stays = 2 * k - i + 1 > len(order) or (
            phi(phi_inverse(order[i - 1] - below) - factor * reach) - above > order[2 * k - i]
        )
        count += stays
    return count


# sparsified maps -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "ones"), [(0.25, 0.25), (0.5, 0.2), (0.9, 0.5), (0.01, 0.01), (0.99, 0.3)])
def test_sparsified_maps_are_what_they_are_by_hand(share: float, ones: float) -> None:
    x = images(3)
    found = Sparsified(Made(mixed), share, ones).explain(Two(), x)
    expected = [sparse(raw.flatten().tolist(), share, ones) for raw in mixed(x)]
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected, dtype=torch.float64))
    assert set(Sparsified(Made(mixed), share).explain(Two(), x).unique().tolist()) == {0.0, 1.0}


def test_sparsified_maps_do_not_depend_on_scale_or_sign_and_are_stretched_to_the_image() -> None:
    sparsified, x = Sparsified(Made(mixed), 0.3, 0.1), images(2, side=8)
    raw = images(2)[:, 0]
    torch.testing.assert_close(sparsified.of(-1e-20 * raw, (4, 4)), sparsified.of(raw, (4, 4)))
    coarse = Sparsified(Made(lambda x: x[:, 0, ::4, ::4]), 0.3).explain(Two(), x)
    assert coarse.shape == (2, 8, 8)
    assert coarse.sum((1, 2)).tolist() == [round(0.3 * 64)] * 2


def test_what_ties_with_the_largest_pixel_left_out_does_not_stand_out() -> None:
    raw = torch.tensor(
        [[[5.0, 3.0, 3.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]], [[2.0, 2.0, 2.0, 2.0]], [[9.0, 8.0, 1.0, 0.0]]]
    )
    expected = [[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    for ones in (None, 0.5):
        assert Sparsified(Made(brightness), 0.5, ones).of(raw, (1, 4))[:, 0].tolist() == expected
    raw[3, 0, 3] = torch.nan
    raw[0, 0, 0] = torch.inf
    assert not Sparsified(Made(brightness), 0.5).of(raw, (1, 4)).any()


def test_the_ramp_of_a_relaxed_map_can_be_differentiated() -> None:
    sparsified = Sparsified(Made(mixed), 0.6, 0.2)
    assert torch.autograd.gradcheck(lambda x: sparsified.explain(Two(), x), images(1).requires_grad_())


# overlap of the top K ------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [brightness, mixed, seesaw])
@pytest.mark.parametrize(
    ("k_share", "tau", "gamma"), [(0.25, None, None), (0.25, 0.5, 0.1), (0.4, 0.3, 0.3), (0.7, 0.8, 0.5)]
)
def test_the_certificate_is_the_published_formula(
    make: Callable[[Tensor], Tensor], k_share: float, tau: float | None, gamma: float | None
) -> None:
    certificate = SparsifiedCertificate(
        Made(make), k_share, sigma=0.2, draws=60, alpha=0.1, seed=3, tau=tau, gamma=gamma
    )
    x, radii = images(), [0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2]
    found = certificate.certify(Two(), x, None, radii)
    c, k = sqrt(log(2 * 16 / 0.1) / (2 * 60)), round(16 * k_share)
    assert certificate.deviation(16) == pytest.approx(c)
    tau = k_share if tau is None else tau
    for image, own, counts in zip(x, found.map, found.share, strict=True):
        h = mean_of_copies(certificate, image, tau, tau if gamma is None else gamma)
        assert own.flatten().tolist() == pytest.approx(h)
        assert counts.tolist() == [overlap(h, k, rho / 0.2, c, c) / k for rho in radii]


def test_the_formula_is_counted_as_printed_for_any_values() -> None:
    numbers = torch.Generator().manual_seed(0)
    reach = [0.0, 0.1, 0.3, 0.6, 1.0, 2.0]
    seen = set()
    for n, k in [(12, 3), (12, 6), (12, 9), (12, 11), (2, 1)]:
        for power in (0.3, 1, 3):
            h = torch.rand(n, generator=numbers, dtype=torch.float64) ** power
            expected = [overlap(h.tolist(), k, r, 0.03, 0.03) for r in reach]
            assert certified_overlap(h, k, 0.03, torch.tensor(reach)).tolist() == expected
            seen |= {count / k for count in expected}
    assert len(seen) >= 8  # shares of all sizes


def claimed(h: list[float], **parts: float) -> float:
    """The largest radius, in units of sigma, up to which the first pixel of a seesaw is claimed to stay on top, or 0."""
    reaches = [r / 50 for r in range(200)]
    return max((r for r in reaches if overlap(h, 1, r, **parts) == 1), default=0.0)


SEESAWS = [(s, seed) for s in (0.3, 1.0, 1.6) for seed in range(50)]


@pytest.fixture(scope="module")
def seesaws() -> list[tuple[float, list[float], float]]:
    """s / sigma, h, and c of certificates of seesaws, with few draws each, from which K = 1 pixel is on top at x."""
    found = []
    for s, seed in SEESAWS:
        certificate = SparsifiedCertificate(Made(seesaw), 0.5, sigma=0.1, draws=100, seed=seed)
        x = torch.tensor([0.5 + 0.1 * s, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
        share, h = certificate.certify(Two(), x, None, [r / 500 for r in range(200)])
        c, values = certificate.deviation(2), h.flatten().tolist()
        assert int(share.sum()) == sum(overlap(values, 1, r / 50, c, c) for r in range(200))
        if values[0] > values[1]:
            found.append((s, values, c))
    return found


def test_a_seesaw_never_tips_within_the_certified_radius(
    seesaws: list[tuple[float, list[float], float]],
) -> None:
    radii = [(s, claimed(h, below=c, above=c)) for s, h, c in seesaws]
    assert all(radius < s for s, radius in radii)
    assert sum(radius > 0.5 * s for s, radius in radii) > 40  # it does promise something


@pytest.mark.parametrize(
    "parts",
    [{"below": 0.0, "above": 1.0}, {"below": 1.0, "above": 0.0}, {"below": 1.0, "above": 1.0, "factor": 1.0}],
    ids=["c below left out", "c above left out", "2 left out"],
)
def test_every_part_of_the_formula_is_needed(
    seesaws: list[tuple[float, list[float], float]], parts: dict[str, float]
) -> None:
    broken = [
        s
        for s, h, c in seesaws
        if claimed(h, below=c * parts["below"], above=c * parts["above"], factor=parts.get("factor", 2.0)) > s
    ]
    assert len(broken) >= 5


def test_with_many_draws_the_certified_radius_is_all_but_the_true_one() -> None:
    certificate = SparsifiedCertificate(Made(seesaw), 0.5, sigma=0.1, draws=20000)
    x = torch.tensor([0.6, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    assert certificate.certify(Two(), x, None, [0.09, 0.1]).share.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("gamma", [None, 0.1])
def test_no_attack_inside_the_radius_lowers_the_overlap_below_the_certificate(gamma: float | None) -> None:
    """Of a linear map the directions that swap two pixels are known; H at the end is measured with many other draws."""
    certificate = SparsifiedCertificate(
        Made(mixed), 0.25, sigma=0.1, draws=400, tau=0.25, gamma=gamma, seed=1
    )
    x, k, radii = images(2, seed=4), 4, [0.0, 0.01, 0.02, 0.04, 0.3]
    share, h = certificate.certify(Two(), x, None, radii)
    assert 0 < share[:, 1:4].mean() < 1
    noise = 0.1 * torch.randn(1500, 1, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    lowest = torch.ones_like(share)
    for i, image in enumerate(x):
        top = set(h[i].flatten().topk(k).indices.tolist())
        for j, radius in enumerate(radii):
            for step in attacks_on(image, top):
                smoothed = certificate.sparsified.of(mixed(image + radius * step + noise), (4, 4)).mean(0)
                left = len(top & set(smoothed.flatten().topk(k).indices.tolist())) / k
                assert left >= share[i, j], (i, radius)
                lowest[i, j] = min(lowest[i, j], left)
    assert (lowest[:, -1] <= 0.75).all()  # the search can do it, where nothing forbids


def attacks_on(image: Tensor, top: set[int]) -> list[Tensor]:
    """Unit directions: those that take one pixel of the top down and another up, and their sum."""
    w, signs = weights(16), mixed(image[None]).flatten().sign()
    gains = (w * signs).T  # row i: where |map_i| grows fastest
    swaps = [gains[b] - gains[a] for a in sorted(top) for b in range(16) if b not in top]
    return [(d / d.norm()).view_as(image) for d in (*swaps, torch.stack(swaps).sum(0))]


def test_maps_of_new_draws_keep_what_the_fresh_certificate_says() -> None:
    """The image moves to the edge of the radius certified for it, or (wrongly) of the one that h without c would give."""
    certificate = SparsifiedCertificate(Made(seesaw), 0.5, sigma=0.1, draws=100, fresh=True)
    x = torch.tensor([0.65, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    radii, tipped = torch.arange(0, 0.2, 0.001), {"fresh": 0, "without c": 0}
    for seed in range(40):
        share, h = replace(certificate, seed=seed).certify(Two(), x, None, radii)
        edges = {
            "fresh": radii[share[0] == 1].max(),
            "without c": 0.1 * claimed(h.flatten().tolist(), below=0, above=0),
        }
        assert edges["fresh"] > 0.01
        for name, edge in edges.items():
            moved = x.clone()
            moved[..., 0] -= edge
            new = replace(certificate.smoothed, seed=1000 + seed).explain(Two(), moved)[0, 0]
            tipped[name] += bool(new[0] <= new[1])
    assert tipped["fresh"] == 0
    assert tipped["without c"] > 10


def test_the_fresh_certificate_by_hand() -> None:
    certificate = SparsifiedCertificate(Made(mixed), 0.25, sigma=0.2, draws=200, fresh=True)
    c, radii = sqrt(log(4 * 16 / 0.05) / 400), [0.0, 0.01, 0.03]
    share, h = certificate.certify(Two(), images(3), 1, radii)
    for own, counts in zip(h, share, strict=True):
        order = sorted(own.flatten().tolist(), reverse=True)
        expected = [
            sum(
                phi(phi_inverse(order[i] - c) - r / 0.2) - c
                > phi(phi_inverse(order[7 - i] + c) + r / 0.2) + c
                for i in range(4)
            )
            for r in radii
        ]
        assert counts.tolist() == [count / 4 for count in expected]
    assert share.any()
    assert (share <= replace(certificate, fresh=False).certify(Two(), images(3), 1, radii).share).all()


# pixels --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correction", ["holm", "bonferroni"])
@pytest.mark.parametrize("make", [brightness, mixed, seesaw])
def test_votes_are_the_binomial_tests_by_hand(make: Callable[[Tensor], Tensor], correction: str) -> None:
    certificate = PixelCertificate(
        Made(make), 0.25, 0.2, draws=50, tau=0.7, alpha=0.1, seed=3, correction=correction
    )
    x = images(2)
    found = certificate.certify(Two(), x)
    for image, votes, share, top in zip(x, found.votes, found.share, found.top, strict=True):
        ones = [round(50 * h) for h in mean_of_copies(certificate, image, 0.25, 0.25)]
        p = [min(1, 2 * stats.binomtest(max(k, 50 - k), 50, 0.7, "greater").pvalue) for k in ones]
        sure = holm(p, 0.1) if correction == "holm" else [value <= 0.1 / 16 for value in p]
        expected = [int(k > 25) if certain else -1 for k, certain in zip(ones, sure, strict=True)]
        assert votes.flatten().tolist() == expected
        assert float(share) == sum(sure) / 16
        assert float(top) == expected.count(1) / 4
    assert len(found.votes.unique()) > 1
    assert found.radius == pytest.approx(0.2 * NORMAL.inv_cdf(0.7))


def holm(p: list[float], alpha: float) -> list[bool]:
    sure = [False] * len(p)
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > alpha / (len(p) - rank):
            break
        sure[i] = True
    return sure


def test_holm_steps_down_and_bonferroni_does_not() -> None:
    p = torch.tensor([0.04, 0.01, 0.024, 0.015], dtype=torch.float64)
    assert rejected(p, 0.05).tolist() == [True] * 4
    assert rejected(p, 0.05, "bonferroni").tolist() == [False, True, False, False]
    p = torch.tensor(
        [0.02, 0.01, 0.03, 0.04], dtype=torch.float64
    )  # the second stops it, though the last would pass
    assert rejected(p, 0.05).tolist() == [False, True, False, False]


def test_the_chance_of_a_false_vote_is_at_most_alpha_though_the_same_draws_choose_the_majority() -> None:
    certificate = PixelCertificate(Made(seesaw), 0.5, draws=99, tau=0.5001)
    table, draws = certificate.p_values(), 99
    wrong = {
        factor: sum(
            comb(draws, k) / 2**draws for k in range(draws + 1) if factor * table[max(k, draws - k)] <= 0.05
        )
        for factor in (1.0, 0.5)
    }
    assert (
        wrong[1.0] <= 0.05 < wrong[0.5]
    )  # a pixel of which half of all copies are 1; halved: if only one vote were tested


def test_certified_pixels_keep_their_majority_within_the_radius() -> None:
    """H is known of a seesaw: certified pixels must have more than tau, wherever s lies."""
    for s in (0.4, 0.6, 0.8, 1.2, 2.5):
        x = torch.tensor([0.5 + 0.1 * s, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
        for seed in range(20):
            certificate = PixelCertificate(Made(seesaw), 0.5, 0.1, draws=200, tau=0.75, seed=seed)
            votes, radius, _, _ = certificate.certify(Two(), x)
            if s * 0.1 <= radius:  # a change of that length makes it 1/2
                assert votes.flatten().tolist() == [-1, -1]
            elif s > 2:
                assert votes.flatten().tolist() == [1, 0]


# both ----------------------------------------------------------------------------------------------------
CERTIFICATES: list[Any] = [
    SparsifiedCertificate(Made(mixed), 0.25, draws=80, sigma=0.05),
    SparsifiedCertificate(Made(mixed), 0.25, draws=80, sigma=0.05, tau=0.5, gamma=0.1, images_at_once=7),
    PixelCertificate(Made(mixed), 0.25, draws=80, sigma=0.05),
]


def certified(certificate: Any, model: nn.Module, x: Tensor, target: Any = None) -> list[Tensor]:
    if isinstance(certificate, PixelCertificate):
        votes, _, share, top = certificate.certify(model, x, target)
        return [votes, share, top]
    return list(certificate.certify(model, x, target, [0.0, 0.005, 0.05]))


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_no_digit_depends_on_the_batch(certificate: Any) -> None:
    x = images(3).float()
    together = certified(certificate, Two(), x)
    alone = [certified(certificate, Two(), x[i : i + 1]) for i in (2, 0, 1)]
    for whole, *parts in zip(together, alone[1], alone[2], alone[0], strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert not any(t.requires_grad for t in certified(certificate, Two(), x.requires_grad_()))


@pytest.mark.parametrize("make", [lambda x: 0 * x[:, 0], lambda x: 0 * x[:, 0] + 3, lambda x: x[:, 0] / 0])
def test_a_map_in_which_nothing_stands_out_has_no_certified_top(make: Callable[[Tensor], Tensor]) -> None:
    share, h = SparsifiedCertificate(Made(make), 0.25, draws=80).certify(Two(), images(), None, [0.0, 0.1])
    assert not h.any()
    assert not share.any()
    found = PixelCertificate(Made(make), 0.25, draws=80).certify(Two(), images())
    assert not found.votes.any()  # certainly not among the top, all of them
    assert not found.top.any()


def test_classes_are_those_of_the_images_or_the_ones_given() -> None:
    model, (x, _) = load_model("resnet18"), batch(load_data(), range(2))
    certificate = SparsifiedCertificate(GradCAM(), sigma=0.3, draws=30)
    predicted = model(x).argmax(1)
    by_default = certificate.certify(model, x, None, [0.0, 0.1])
    for given in (predicted, predicted.tolist()):
        assert torch.equal(certificate.certify(model, x, given, [0.0, 0.1]).map, by_default.map)
    other = int((predicted[0] + 1) % 10)
    found = certificate.certify(model, x, other, [0.0]).map
    assert torch.equal(found, certificate.certify(model, x, torch.full((2,), other), [0.0]).map)
    assert not torch.allclose(found, by_default.map)
    assert found.shape == (2, *x.shape[2:])


def test_radii_in_units_of_the_budget() -> None:
    assert rms255(0.5, 3 * 224 * 224) == pytest.approx(0.5 * 255 / 387.98, rel=1e-4)
    change = torch.full((3, 8, 8), 2 / 255)
    torch.testing.assert_close(rms255(change.norm(), 3 * 8 * 8), torch.tensor(2.0))
    assert [top_count(share, 10) for share in (0.01, 0.25, 0.99)] == [1, 2, 9]


@pytest.mark.parametrize("kind", [SparsifiedCertificate, PixelCertificate])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sigma": 0.0}, "sigma > 0"),
        ({"sigma": -1.0}, "sigma > 0"),
        ({"draws": 0}, "draws >= 1"),
        ({"k_share": 0.0}, r"k_share must be in \(0, 1\)"),
        ({"k_share": 1.0}, r"k_share must be in \(0, 1\)"),
        ({"k_share": float("nan")}, r"k_share must be in \(0, 1\)"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\)"),
        ({"images_at_once": 0}, "images_at_once >= 1"),
    ],
)
def test_fields_out_of_range_are_refused(kind: type[Any], options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        kind(Made(mixed), **options)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PixelCertificate(Made(mixed), tau=0.5), r"tau in \(0.5, 1\)"),
        (lambda: PixelCertificate(Made(mixed), tau=1.0), r"tau in \(0.5, 1\)"),
        (lambda: PixelCertificate(Made(mixed), correction="none"), "one of holm, bonferroni"),
        (lambda: SparsifiedCertificate(Made(mixed), tau=1.0), "kept"),
        (lambda: SparsifiedCertificate(Made(mixed), tau=0.0), "kept"),
        (lambda: SparsifiedCertificate(Made(mixed), gamma=0.2), "share of ones"),
        (lambda: SparsifiedCertificate("srd"), "explainer"),  # type: ignore[arg-type]
        (lambda: certified(CERTIFICATES[0], Two(), images()[0]), "batch of images"),
        (lambda: certified(CERTIFICATES[2], Two(), images()[0]), "batch of images"),
        (
            lambda: certified(CERTIFICATES[0], Two(), images(), torch.tensor([0, 1, 1])),
            "one target per image",
        ),
        (lambda: certified(CERTIFICATES[2], Two(), images(), 2), "out of range"),
        (lambda: CERTIFICATES[0].certify(Two(), images(), None, []), "radii"),
        (lambda: CERTIFICATES[0].certify(Two(), images(), None, [-0.1]), "radii"),
        (lambda: CERTIFICATES[0].certify(Two(), images(), None, [float("nan")]), "radii"),
        (lambda: CERTIFICATES[0].certify(Two(), images(), None, torch.tensor(0.1)), "radii"),
        (lambda: rms255(0.1, 0), "C \\* H \\* W"),
    ],
)
def test_refusals(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(SrdLabError, match=complaint) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "certificate",
    [
        SparsifiedCertificate(Made(brightness), 0.25),
        SparsifiedCertificate(Made(brightness), 0.25, fresh=True),
        PixelCertificate(Made(brightness), 0.25, tau=0.75),
        PixelCertificate(Made(brightness), 0.25, tau=0.6, correction="bonferroni"),
    ],
)
def test_draws_that_are_too_few_are_refused_and_the_number_named_is_enough(certificate: Any) -> None:
    clear = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    clear[0, 0, 0] = 100.0  # a top that no noise hides
    with pytest.raises(BadValue, match="can certify nothing of 16 pixels; take draws >=") as caught:
        certified(replace(certificate, draws=5), Two(), clear)
    enough = int(str(caught.value).rpartition(" ")[2])
    assert certified(replace(certificate, draws=enough), Two(), clear)[-2].flatten()[0] in (0, 1)
    assert any(
        t.double().flatten()[0] == 1 for t in certified(replace(certificate, draws=enough), Two(), clear)
    )
    with pytest.raises(BadValue, match="can certify nothing"):
        certified(
            replace(certificate, draws=enough - 1 - isinstance(certificate, SparsifiedCertificate)),
            Two(),
            clear,
        )
    assert enough == ceil(enough)


# figure --------------------------------------------------------------------------------------------------
def curves(methods: list[str], sizes: list[float]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (np.array(sizes), np.linspace(0.9 - 0.1 * i, 0.1, len(sizes))) for i, name in enumerate(methods)
    }


@pytest.mark.parametrize(
    "methods", [["srd"], ["srd", "gradient", "gradcam", "smoothed(beta_smoothed(srd,10),0.1)"]]
)
def test_the_figure_has_both_bounds_on_two_axes_that_agree(methods: list[str]) -> None:
    values = 3 * 64 * 64
    attacked, certified = curves(methods, [0.5, 1, 2]), curves(methods, [0.0, 0.1, 0.2])
    figure = certificate_plot(attacked, certified, values, title="vgg16")
    with io.BytesIO() as file:
        figure.savefig(file)
        pixels = np.asarray(Image.open(file).convert("RGB"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()  # nothing runs out of the picture
    (axes,) = figure.axes
    (above,) = axes.child_axes
    ends = np.array(axes.get_xlim())
    assert ends[0] < 0.1
    assert ends[1] > 2
    assert np.array(above.get_xlim()) == pytest.approx(ends * sqrt(values) / 255)
    drawn = [line.get_ydata() for line in axes.lines]
    for name in methods:
        assert any(np.array_equal(y, attacked[name][1]) for y in drawn)
    assert len(drawn) == 2 * len(methods)


def test_what_is_certified_up_to_a_size_is_drawn_up_to_it_and_no_further() -> None:
    certified = {"srd": (np.array([0.1, 0.2]), np.array([0.8, 0.4]))}
    (axes,) = certificate_plot({}, certified, 3072).axes
    (line,) = axes.lines
    assert line.get_drawstyle() == "steps-pre"  # a value reaches back from its size to the one before
    assert list(zip(line.get_xdata()[1:], line.get_ydata()[1:], strict=True)) == [
        (0.1, 0.8),
        (0.2, 0.4),
        (0.2, 0.0),
    ]


@pytest.mark.parametrize(
    ("sizes", "scores", "complaint"),
    [
        ([0.1, 0.2], [0.5], "as many sizes as scores"),
        ([], [], "as many sizes as scores"),
        ([0.2, 0.1], [0.5, 0.4], "ascending"),
        ([-0.1, 0.1], [0.5, 0.4], ">= 0"),
        ([0.1, 0.2], [1.5, 0.4], r"in \[0, 1\]"),
        ([0.1, 0.2], [0.5, float("nan")], r"in \[0, 1\]"),
        ([0.0], [0.5], "above 0"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(
    sizes: list[float], scores: list[float], complaint: str
) -> None:
    curve = {"srd": (np.array(sizes), np.array(scores))}
    for attacked, certified in ((curve, {}), ({}, curve)):
        with pytest.raises(BadValue, match=complaint):
            certificate_plot(attacked, certified, 3072)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(BadValue, match="nothing to draw"):
        certificate_plot({}, {}, 3072)
