"""Metrics of explanations against their slow definitions, against peers, and where their score is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captum.metrics
import metric_definitions as slow
import numpy as np
import pytest
import torch
from metric_definitions import METHODS, PIECES, Linear, Made, batch, given_maps, network, normalised, pixels
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from srd_lab import catalogue, maps
from srd_lab.errors import BadValue, Refused
from srd_lab.methods.gradient import Gradient, GradInput
from srd_lab.metrics.explained import Explained, Images, Metric
from srd_lab.metrics.faithfulness import Deletion, Fidelity, Infidelity, Insertion, LeRF, MoRF
from srd_lab.metrics.localisation import AttributionLocalization, PointingGame
from srd_lab.metrics.robustness import (
    MaxSensitivity,
    NoisePCC,
    NoiseSSIM,
    Randomization,
    Stability,
    randomised,
)
from srd_lab.registry import EXPLAINERS, METRICS
from srd_lab.runtime import generator

NAMES = tuple(METRICS)


# --- definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [normalised, lambda model: model], ids=["normalised", "bare"])
@pytest.mark.parametrize("method", METHODS)
def test_metrics_equal_their_definitions(method: str, front: Callable[[nn.Module], nn.Module]) -> None:
    explained = Explained.by(METHODS[method], batch(front(network()), (15, 12)))
    subjects = [slow.Subject(explained, i) for i in range(3)]
    for name, metric in PIECES.items():
        if isinstance(metric, PointingGame):
            metric = PointingGame(margin=31)  # 1.66 pixels: diagonals, and no knight's moves
        scores = metric.of(explained)
        assert scores.shape == (3,)
        assert scores.dtype == torch.float64
        for score, subject in zip(scores.tolist(), subjects, strict=True):
            expected = slow.BY_NAME[name](metric, subject)
            assert score == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True), name


def test_metrics_as_registered_equal_their_definitions() -> None:
    explained = Explained.by(GradInput(), batch(normalised(network()), (18, 16), count=2))
    for name in ("pointing_game", "fidelity", "stability", "insertion", "deletion", "morf", "infidelity"):
        expected = [slow.BY_NAME[name](METRICS[name], slow.Subject(explained, i)) for i in range(2)]
        assert METRICS[name].of(explained).tolist() == pytest.approx(expected, rel=1e-8), name


def test_fidelity_knows_four_baselines() -> None:
    for model in (normalised(network()), network()):
        explained, found = Explained.by(GradInput(), batch(model, (15, 12))), {}
        for baseline in catalogue.BASELINES:
            metric = Fidelity(pixels=20, draws=9, baseline=baseline)
            expected = [slow.fidelity(metric, slow.Subject(explained, i)) for i in range(3)]
            found[baseline] = metric.of(explained).tolist()
            assert found[baseline] == pytest.approx(expected, rel=1e-8)
        without = isinstance(model, nn.Sequential)  # a normalisation, black is the 0 of its units
        assert (found["mean"] == found["black"]) == without
        assert len({tuple(scores) for scores in found.values()}) == (3 if without else 4)
    with pytest.raises(BadValue, match="fidelity has no baseline 'grey'; expected one of black, white,"):
        Fidelity(baseline="grey")


@pytest.mark.parametrize("size", [(1, 20), (20, 1), (9, 40)])
def test_narrow_images_are_scored_by_the_same_definitions(size: tuple[int, int]) -> None:
    explained = Explained.by(GradInput(), batch(normalised(network()), size))
    for name, metric in PIECES.items():
        if min(size) < 7 and name in ("ssim", "randomization"):
            with pytest.raises(BadValue, match="SSIM window"):
                metric.of(explained)
            continue
        small = Fidelity(pixels=5, draws=6) if name == "fidelity" else metric
        expected = [slow.BY_NAME[name](small, slow.Subject(explained, i)) for i in range(3)]
        assert np.isfinite([expected[0], expected[2]]).all(), name
        assert small.of(explained).tolist() == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True), name


def test_randomization_takes_the_layers_of_a_network_from_the_top() -> None:
    model = normalised(network())
    explained = Explained.by(GradInput(), batch(model, (10, 10)))
    for stages in (1, 2, 3, None, 99):
        metric = Randomization(stages, seed=8)
        expected = [slow.randomization(metric, slow.Subject(explained, i)) for i in range(3)]
        assert metric.of(explained).tolist() == pytest.approx(expected, rel=1e-8)
        assert metric.curve(explained).shape == (3, 3 if stages is None else min(3, stages))
    for stage, still in zip(randomised(model, None, 0), (4, 2, 0), strict=True):
        equal = [torch.equal(a, b) for a, b in zip(model.parameters(), stage.parameters(), strict=True)]
        assert equal == [True] * still + [False] * (6 - still)
        assert not stage.training
    with pytest.raises(Refused, match="no layer that can be initialised anew"):
        randomised(nn.Sequential(nn.Flatten()), 1, 0)


def test_randomization_takes_all_weights_of_attention_and_statistics_of_batch_norm() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm2d(3)})
    for tensor in model.state_dict().values():
        tensor.copy_(torch.full_like(tensor, 7))
    for name, tensor in randomised(model, 1, 0)[0].state_dict().items():
        assert not (tensor == 7).any(), name


# --- peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad_input", "gradcam"])
def test_infidelity_equals_captum(method: str) -> None:
    images = batch(normalised(network()), (8, 9))
    explained, metric = Explained.by(METHODS[method], images), Infidelity(noise=0.3, draws=6, seed=4)
    drawn = [torch.randn(6, 8, 9, generator=generator(4, "infidelity", key)) for key in images.keys]
    noise = 0.3 * torch.cat(drawn).double()[:, None].expand(-1, 3, -1, -1)
    given = images.model.normalise(images.x)
    expected = captum.metrics.infidelity(
        images.model.network,
        lambda x: (noise, x - noise),
        given,
        (explained.maps / 3)[:, None].expand_as(given),
        target=images.target,
        n_perturb_samples=6,
        normalize=True,
    )
    torch.testing.assert_close(metric.of(explained), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", ["grad_input", "srd"])
def test_max_sensitivity_equals_captum(method: str) -> None:
    images = batch(network(), (8, 9))
    explained, metric = Explained.by(METHODS[method], images), MaxSensitivity(radius=0.05, draws=4, seed=2)
    drawn = [
        torch.rand(3, 8, 9, generator=generator(2, "max_sensitivity", k, key))
        for key in images.keys
        for k in range(4)
    ]
    noise = 0.05 * (2 * torch.stack(drawn).double() - 1)

    def explain(x: tuple[Tensor] | Tensor, target: Tensor) -> tuple[Tensor]:
        raw = METHODS[method].explain(images.model, x[0] if isinstance(x, tuple) else x, target)
        return (maps.prepared(raw, images.size),)

    expected = captum.metrics.sensitivity_max(
        explain, images.x, lambda x: x + noise, n_perturb_samples=4, target=images.target
    )
    torch.testing.assert_close(metric.of(explained), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (40, 150), (5, 5)])
@pytest.mark.parametrize("margin", [0.0, 15.0, 20.0])
def test_masks_grow_by_the_distance_transform(size: tuple[int, int], margin: float) -> None:
    masks = torch.zeros(3, *size, dtype=torch.bool)
    masks[0, 0, -1] = masks[0, size[0] // 2, size[1] // 3] = True
    masks[1, size[0] // 4 : size[0] // 2, 1:] = True
    grown = PointingGame(margin).grow(masks)
    assert grown.dtype == torch.bool
    for got, mask in zip(grown[:2].numpy(), masks.numpy(), strict=False):
        assert np.array_equal(got, distance_transform_edt(~mask) <= margin * min(size) / 224)
    assert not grown[2].any()
    if margin == 0:
        assert torch.equal(grown, masks)


# --- known answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_x_input_is_faithful_to_a_linear_network(channels: int) -> None:
    images = batch(Linear(channels, 8, 8), (8, 8), channels=channels)
    explained = Explained.by(GradInput(), images)
    assert Fidelity(pixels=9).of(explained).tolist() == pytest.approx([1] * 3, abs=1e-12)
    against = given_maps(images, -explained.maps)
    assert Fidelity(pixels=9).of(against).tolist() == pytest.approx([-1] * 3, abs=1e-12)


def test_the_gradient_has_no_infidelity_to_a_linear_network() -> None:
    images = batch(Linear(1, 8, 8), (8, 8), channels=1)
    exact = Explained.by(Gradient(channels="sum"), images)
    drops = Infidelity().drops(images).square().mean(1)
    assert (Infidelity().of(exact) < 1e-20 * drops).all()
    # The best scale may be negative: the sign of a map is not judged.
    torch.testing.assert_close(
        Infidelity().of(given_maps(images, -exact.maps)), Infidelity().of(exact), atol=1e-20, rtol=0
    )
    wrong = Infidelity().of(given_maps(images, pixels(3, 8, 8, seed=9)))
    assert (wrong > 0.5 * drops).all()
    assert (wrong <= drops).all()


def test_curves_know_a_perfect_map_from_its_negative() -> None:
    images = batch(Linear(1, 12, 12), (12, 12), channels=1)
    good = Explained.by(GradInput(), images)
    bad = given_maps(images, -good.maps)
    for metric, better in ((Deletion(), -1), (Insertion(), 1), (MoRF(), 1), (LeRF(), -1)):
        assert (better * (metric.of(good) - metric.of(bad)) > 0.05).all(), metric
    # A curve whose every pixel is a step is the lowest there is: pixels fall by what they give.
    every = Deletion(steps=144)
    best = every.of(good)
    for seed in range(20):
        assert (every.of(given_maps(images, pixels(3, 12, 12, seed=seed))) > best).all()


def test_least_relevant_first_is_most_relevant_first_of_the_negative() -> None:
    images = batch(normalised(network()), (16, 12))
    for method in METHODS.values():
        explained = Explained.by(method, images)
        negative = given_maps(images, -explained.maps)
        assert torch.equal(LeRF().of(explained), MoRF().of(negative))
        assert torch.equal(MoRF().of(explained), LeRF().of(negative))
        assert not torch.equal(MoRF().of(explained), LeRF().of(explained))


def test_regions_are_exchanged_as_a_whole() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.mean((2, 3))

    x = pixels(1, 3, 12, 12)
    images = Images(Spy(), x, torch.tensor([0]), [0])
    raw = torch.zeros(1, 12, 12, dtype=torch.float64)
    raw[:, 4:8, 8:] = 1  # one region of nine is relevant, the others are tied
    MoRF(steps=9, grid=3).of(given_maps(images, raw))
    changed = (seen[-1] != x).any(1)
    blocks = changed.view(10, 3, 4, 3, 4).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(blocks.any(3), blocks.all(3))
    assert blocks.all(3).sum((1, 2)).tolist() == list(range(10))
    assert blocks[1, 1, 2].all()


CURVES = (Deletion(steps=4), Insertion(steps=4), MoRF(steps=4, grid=4), LeRF(steps=4))


@pytest.mark.parametrize("metric", CURVES, ids=lambda metric: type(metric).__name__)
def test_a_curve_starts_and_ends_where_it_should(metric: Any) -> None:
    images = batch(normalised(network()), (8, 8), count=1)
    before, after = metric.ends(images, 0)
    curves: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(metric), "area", lambda _, curve: curves.append(curve) or curve.sum())
        metric.of(Explained.by(GradInput(), images))
    ends = torch.softmax(images.model.network(torch.stack([before, after])), 1)[:, images.target[0]]
    assert len(curves[0]) == 5
    torch.testing.assert_close(curves[0][[0, -1]], ends)


def test_areas_of_known_curves() -> None:
    falling = torch.tensor([1.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert float(Deletion(steps=3).area(falling)) == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    assert float(Insertion(steps=3).area(falling)) == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    assert float(MoRF(steps=3).area(falling)) == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)


def test_a_map_that_never_moves_is_robust_and_explains_nothing() -> None:
    images = batch(normalised(network()), (9, 9))
    still = given_maps(images, pixels(3, 9, 9, seed=5) - 0.5)
    for metric in (Stability(), MaxSensitivity()):
        assert metric.of(still).tolist() == [0, 0, 0]
    for metric in (NoiseSSIM(), NoisePCC(), Randomization()):
        assert metric.of(still).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert Randomization().of(Explained.by(EXPLAINERS["sobel"], images)).tolist() == pytest.approx([1] * 3)
    assert (Randomization().of(Explained.by(Gradient(), images)) < 0.95).all()


def test_a_map_that_is_its_image_has_the_stability_of_its_scale() -> None:
    images = batch(network(1), (8, 8), channels=1)
    own = Explained(images, Made(lambda x: x[:, 0]), images.x[:, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "prepared", lambda raw, size: 3 * raw)  # no clamping, no maximum
        own = Explained.by(own.explainer, images)
        assert Stability(noise=0.7).of(own).tolist() == pytest.approx([3] * 3, rel=1e-12)
        moved = MaxSensitivity(radius=0.1, draws=40).of(own) * images.x.flatten(1).norm(dim=1)
    assert (moved < 0.1 * 8).all()  # at most the corner of the box
    assert (moved > 0.1 * 8 / 3**0.5).all()  # a uniform number has a third of its square


def test_localisation_of_known_maps() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:4, 2:6] = True
    raw = torch.zeros(1, 8, 8, dtype=torch.float64)
    raw[:, 3, 3], raw[:, 7, 7], raw[:, 0, 0] = 1.0, 3.0, -9.0
    exact, located = PointingGame(margin=0), AttributionLocalization()
    assert (exact.score(raw, mask).item(), located.score(raw, mask).item()) == (0, 0.25)
    raw[:, 3, 3] = 3.0
    assert (exact.score(raw, mask).item(), located.score(raw, mask).item()) == (0.5, 0.5)  # a tie
    raw[:, 2, 5] = 3.0
    assert exact.score(raw, mask).item() == pytest.approx(2 / 3, abs=1e-15)
    assert PointingGame(margin=28 * 10).score(raw, mask).item() == 1  # 10 pixels
    uniform = torch.ones(1, 8, 8)
    assert (exact.score(uniform, mask).item(), located.score(uniform, mask).item()) == (8 / 64, 8 / 64)
    far = torch.zeros(1, 8, 8)
    far[:, 3, 7] = 1  # two pixels from the mask
    assert [PointingGame(28 * reach).score(far, mask).item() for reach in (1.99, 2.0)] == [0, 1]


# --- what is said of them ----------------------------------------------------------------------------------------


def test_the_catalogue_names_the_metrics_of_the_registry() -> None:
    assert tuple(catalogue.METRICS) == tuple(METRICS) == tuple(slow.BY_NAME)
    assert catalogue.TABLE_2_METRICS == (
        "pointing_game",
        "attribution_localization",
        "sparseness",
        "fidelity",
        "stability",
    )
    assert all(
        metric == type(metric)() and hash(metric) == hash(type(metric)()) for metric in METRICS.values()
    )


def pair(name: str) -> tuple[Explained, Explained]:
    """A good and a bad explanation, as this metric should see it."""
    images = batch(Linear(1, 16, 16), (16, 16), channels=1)
    images.masks[:] = False
    images.masks[:, 4:9, 5:11] = True
    on_object, noise = images.masks.double(), pixels(3, 16, 16, seed=8)
    exact, slope = (Explained.by(method, images) for method in (GradInput(), Gradient("sum")))
    still, moving = given_maps(images, noise), Explained.by(EXPLAINERS["random"], images)
    smooth = torch.linspace(0, 1, 16, dtype=torch.float64).expand(3, 16, 16)
    spot = (noise == noise.amax((1, 2), keepdim=True)).double()
    curve = exact, given_maps(images, -exact.maps)
    found: dict[str, tuple[Explained, Explained]] = {
        **dict.fromkeys(("fidelity", "insertion", "deletion", "morf", "lerf"), curve),
        **dict.fromkeys(("stability", "ssim", "pcc", "max_sensitivity"), (still, moving)),
        "pointing_game": (given_maps(images, on_object), given_maps(images, 1 - on_object)),
        "attribution_localization": (
            given_maps(images, on_object + noise),
            given_maps(images, 1 - on_object),
        ),
        "sparseness": (given_maps(images, spot), still),
        "infidelity": (slope, still),
        "randomization": (slope, Explained.by(EXPLAINERS["sobel"], images)),
        "roughness": (given_maps(images, smooth), still),
    }
    return found[name]


@pytest.mark.parametrize("name", NAMES)
def test_better_is_the_side_of_the_better_map(name: str) -> None:
    metric: Metric = PointingGame(0) if name == "pointing_game" else METRICS[name]
    good, bad = (metric.of(explained) for explained in pair(name))
    assert catalogue.METRICS[name].better in ("higher", "lower")
    assert ((good > bad) if catalogue.METRICS[name].better == "higher" else (good < bad)).all(), (good, bad)
    unbounded = {"stability": np.inf, "infidelity": np.inf, "max_sensitivity": np.inf, "roughness": 4}
    low, high = (0, unbounded[name]) if name in unbounded else (-1 - 1e-12, 1 + 1e-12)
    assert all(((low <= scores) & (scores <= high)).all() for scores in (good, bad))
