"""Metrics against quantus: the same maps, the same network and the same random draws, put into it.

It is told not to normalise: its default divides by the largest value of the whole batch, so that a score depends on what
else is in it; ours divides each map by its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.metrics import robustness
from srd_lab.metrics.complexity import Sparseness
from srd_lab.metrics.explained import Explained, Images
from srd_lab.metrics.faithfulness import Fidelity
from srd_lab.metrics.localisation import AttributionLocalization, PointingGame
from srd_lab.metrics.robustness import MaxSensitivity, Randomization, Stability
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer

quantus = pytest.importorskip("quantus", reason="needs quantus: pip install -e '.[dev,peers-quantus]'")

N, SIZE = 3, 24
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 81, 6)).eval().requires_grad_(False)


def explained(method: str = "grad_input") -> Explained:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(N, SIZE, SIZE, dtype=torch.bool)
    masks[:, 4:15, 6:20] = True
    model = Classifier(network(), MEAN, STD).eval()
    images = Images(model, x, torch.tensor([2, 0, 5]), [10, 11, 12], masks)
    return Explained.by(make_explainer(method), images)


def theirs(metric: Any, e: Explained, **given: Any) -> Any:
    """Their scores of our maps; the network is the one behind the normalisation, and is fed with normalised images."""
    data = {"x_batch": e.images.given.numpy(), "y_batch": e.images.target.numpy(), "a_batch": e.maps.numpy()}
    scores = metric(model=network(), **data, **given)
    return scores if isinstance(scores, dict) else torch.as_tensor(np.asarray(scores, dtype=np.float64))


def options(**more: Any) -> dict[str, Any]:
    return {"normalise": False, "disable_warnings": True, "display_progressbar": False, **more}


def equal(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def prepared(e: Explained) -> Callable[..., np.ndarray]:
    """What explains perturbed images: our method, by a model without normalisation."""

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        raw = e.explainer.explain(model, torch.as_tensor(inputs).float(), torch.as_tensor(targets))
        return maps.prepared(raw, (SIZE, SIZE)).numpy()

    return explain


# --- of the map alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam"])
def test_sparseness(method: str) -> None:
    """Theirs adds 1e-7 to every pixel."""
    e = explained(method)
    found = theirs(quantus.Sparseness(**options()), e)
    equal(Sparseness().of(e), found)
    equal(Sparseness().score(e.maps.double().abs() + 1e-7), found, 1e-6)
    e.maps[0] = 0  # of equal pixels, by what it adds
    assert Sparseness().of(e).isnan().tolist() == [True, False, False]
    assert theirs(quantus.Sparseness(**options()), e)[0].abs() < 1e-5


def test_their_normalisation_is_that_of_the_batch() -> None:
    e = explained()
    scaled = Explained(e.images, e.explainer, e.maps * torch.tensor([1.0, 1e-6, 1e-8])[:, None, None])
    apart = theirs(quantus.Sparseness(**options(normalise=True)), scaled) - Sparseness().of(scaled)
    assert (apart.abs() > 1e-3).tolist() == [False, True, True]


# --- where it points --------------------------------------------------------------------------------------------


def game(e: Explained, masks: Tensor) -> Tensor:
    return theirs(quantus.PointingGame(**options()), e, s_batch=masks[:, None].numpy())


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam", "random"])
def test_pointing_game(method: str) -> None:
    """Theirs has no margin: it is given the masks that ours has grown."""
    e = explained(method)
    masks = torch.stack([e.images.masks[0], e.maps[1] == e.maps[1].max(), e.maps[2] < e.maps[2].max()])
    e.images.masks.copy_(masks)
    for margin in (0.0, 30.0):
        ours = PointingGame(margin)
        assert torch.equal(ours.of(e), game(e, ours.grow(masks)))


def test_pointing_game_where_it_differs() -> None:
    """Of an empty mask theirs makes a hit (NaN in an array of bool); among equal maxima any hit is one; and it scores maps
    that are nowhere positive."""
    e = explained()
    masks = e.images.masks.clone()
    masks[0] = False
    tied = torch.zeros(N, SIZE, SIZE)
    tied[:, 5, 7] = tied[:, 0, 0] = 1.0
    tied[2] = -1.0
    scored = Explained(e.images, e.explainer, tied)
    assert game(scored, masks).tolist() == [1, 1, 1]
    ours = PointingGame(margin=0).score(tied, masks)
    assert ours.isnan().tolist() == [True, False, True]
    assert ours[1] == 0.5


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam"])
def test_attribution_localization(method: str) -> None:
    """By default theirs counts |map|; of a map that is nowhere positive ours has no share, and theirs 0."""
    e = explained(method)
    metric = quantus.AttributionLocalisation(**options(abs=False, positive_attributions=True))
    s_batch = e.images.masks[:, None].numpy()
    equal(AttributionLocalization().of(e), theirs(metric, e, s_batch=s_batch))
    negative = Explained(e.images, e.explainer, -e.maps.abs())
    assert AttributionLocalization().of(negative).isnan().all()
    assert (theirs(metric, negative, s_batch=s_batch) == 0).all()
    empty = AttributionLocalization().score(e.maps, torch.zeros_like(e.images.masks))
    found = theirs(metric, e, s_batch=np.zeros_like(s_batch))
    assert empty.isnan().all()
    assert found.isnan().all()


# --- of the network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam", "srd"])
@pytest.mark.parametrize(("baseline", "called"), [("minimum", "black"), ("mean", 0.0)])
def test_fidelity_is_their_faithfulness_correlation(
    method: str, baseline: str, called: str | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs draws numbers among all colours of all pixels, ours pixels; it is given the pixels of ours, in all colours.
    Its "black", the default, is the least value of the normalised image."""
    e, ours = explained(method), Fidelity(pixels=30, draws=25, baseline=baseline)
    sets, _ = ours.drops(e.images)
    numbers = torch.cat([sets + colour * SIZE**2 for colour in range(3)], 2)
    order = iter([numbers[i, k].numpy() for k in range(25) for i in range(N)])
    metric = quantus.FaithfulnessCorrelation(
        **options(nr_runs=25, subset_size=90, perturb_baseline=called, return_aggregate=False)
    )
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "choice", lambda *_, **__: next(order))
        equal(ours.of(e), theirs(metric, e))


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam"])
def test_stability_is_their_local_lipschitz_estimate(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    e, ours = explained(method), Stability(noise=0.1, draws=4)

    def draws() -> Iterator[np.ndarray]:
        for k in range(4):
            keys = [e.images.generator(i, 0, "stability", k) for i in range(N)]
            yield (
                0.1 * torch.stack([torch.randn(3, SIZE, SIZE, generator=g) for g in keys]).flatten(1).numpy()
            )

    drawn = draws()
    metric = quantus.LocalLipschitzEstimate(**options(nr_samples=4, perturb_std=0.1))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "normal", lambda **_: next(drawn))
        equal(ours.of(e), theirs(metric, e, explain_func=prepared(e)))


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam"])
def test_max_sensitivity(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default radius is ten times ours, which is that of the paper."""
    e, ours = explained(method), MaxSensitivity(radius=0.02, draws=4)

    def draws() -> Iterator[np.ndarray]:
        for k in range(4):
            keys = [e.images.generator(i, 0, "max_sensitivity", k) for i in range(N)]
            drawn = torch.stack([torch.rand(3, SIZE, SIZE, generator=g) for g in keys])
            yield (0.02 * (2 * drawn - 1)).flatten(1).numpy()

    drawn = draws()
    metric = quantus.MaxSensitivity(**options(nr_samples=4, lower_bound=0.02))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "uniform", lambda **_: next(drawn))
        equal(ours.of(e), theirs(metric, e, explain_func=prepared(e)))


@pytest.mark.parametrize("method", ["grad_input", "gradient", "gradcam"])
def test_randomization_is_their_mprt(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer from the top; theirs draws every layer from one seed, and compares by rank correlation unless told
    otherwise."""

    def ssim(before: np.ndarray, after: np.ndarray, **_: Any) -> np.ndarray:
        pairs = zip(before.reshape(N, SIZE, SIZE), after.reshape(N, SIZE, SIZE), strict=True)
        return np.array([structural_similarity(a, b, data_range=1.0) for a, b in pairs])

    e = explained(method)
    found = theirs(quantus.MPRT(**options(similarity_func=ssim, seed=41)), e, explain_func=prepared(e))
    monkeypatch.setattr(robustness, "derived_seed", lambda *_: 42)
    expected = torch.tensor([scores for name, scores in found.items() if name != "original"]).T.double()
    equal(Randomization(stages=None).curve(e), expected)
