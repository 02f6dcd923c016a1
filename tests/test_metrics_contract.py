"""What every metric must do: score each image alone, by its own random numbers, with a clear answer at every edge, sharing
what can be shared and changing nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import metric_definitions as slow
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_definitions import METHODS, PIECES, Made, batch, given_maps, network, normalised, pixels
from torch import Tensor, nn

import srd_lab
from srd_lab import data, maps
from srd_lab.errors import BadValue
from srd_lab.methods.gradient import Gradient, GradInput
from srd_lab.metrics import explained as explained_module
from srd_lab.metrics import faithfulness, robustness
from srd_lab.metrics.explained import Explained, Images, Metric
from srd_lab.metrics.faithfulness import Deletion, Fidelity, Infidelity, Insertion, LeRF, MoRF
from srd_lab.metrics.localisation import AttributionLocalization, PointingGame
from srd_lab.metrics.robustness import NoisePCC, NoiseSSIM, Randomization, Stability
from srd_lab.types import Explainer

NAMES = tuple(PIECES)
EVERY = pytest.mark.parametrize("name", NAMES)
SEEDED = tuple(name for name in NAMES if "seed" in {field.name for field in fields(PIECES[name])})  # type: ignore[arg-type]
OF_THE_MAP = ("pointing_game", "attribution_localization", "sparseness", "roughness")


def part(images: Images, which: Sequence[int]) -> Images:
    """Some images of a batch, in that order, with nothing remembered."""
    index, masks = list(which), images.masks
    return Images(
        images.model,
        images.x[index],
        images.target[index],
        [images.keys[i] for i in index],
        None if masks is None else masks[index],
    )


# --- one image alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_the_batch(method: str) -> None:
    images = batch(normalised(network()), (10, 12))
    together = Explained.by(METHODS[method], images)
    others = {
        which: Explained.by(METHODS[method], part(images, which))
        for which in [(0,), (1,), (2,), (2, 0, 1, 2)]
    }
    for name, metric in PIECES.items():
        scores = metric.of(together)
        for which, explained in others.items():
            torch.testing.assert_close(
                metric.of(explained),
                scores[list(which)],
                rtol=1e-9,
                atol=1e-9,
                equal_nan=True,
                msg=f"{name} {which}",
            )


def test_orders_hold_in_float32_on_a_real_network() -> None:
    model = srd_lab.load_model("vgg16")
    x, target = data.batch(srd_lab.load_data(), range(3))
    images = Images(model, x, target, [0, 1, 2])
    for method in (GradInput(), srd_lab.SRD()):
        together, alone = Explained.by(method, images), Explained.by(method, part(images, [1]))
        for metric in (Insertion(steps=10), Deletion(steps=10), MoRF(steps=10), LeRF(steps=10)):
            assert metric.of(alone).item() == pytest.approx(metric.of(together)[1].item(), abs=1e-3)


# --- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEDED)
def test_the_seed_decides(name: str) -> None:
    images = batch(normalised(network()), (10, 12))
    method = METHODS["levels" if name in ("insertion", "deletion") else "grad_input"]  # whose ties are random
    scores = [
        replace(PIECES[name], seed=seed).of(Explained.by(method, part(images, range(3))))  # type: ignore[type-var]
        for seed in (11, 11, 12)
    ]
    assert torch.equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).all()


@pytest.mark.parametrize("name", [name for name in SEEDED if name != "randomization"])
def test_keys_decide_not_positions(name: str) -> None:
    images = batch(normalised(network()), (10, 12))
    method = METHODS["levels" if name in ("insertion", "deletion") else "grad_input"]
    same = Images(images.model, images.x[[0] * 4], images.target[[0] * 4], ["a", 5, "a", "5"])
    a, b, again, text = PIECES[name].of(Explained.by(method, same)).tolist()
    assert a == pytest.approx(again, rel=1e-12)
    assert b == pytest.approx(text, rel=1e-12)
    assert a != pytest.approx(b, rel=1e-6)


def test_draws_are_not_all_the_same() -> None:
    images = batch(normalised(network()), (10, 12))
    sets, drops = Fidelity(pixels=30, draws=8).drops(images)
    assert sets.shape == (3, 8, 30)
    assert drops.shape == (3, 8)
    assert len({tuple(sorted(drawn)) for drawn in sets.flatten(0, 1).tolist()}) == 24
    assert all(len(set(drawn)) == 30 for drawn in sets.flatten(0, 1).tolist())
    assert sets.min() == 0
    assert sets.max() == 119
    lengths = torch.stack(
        [size for _, size in robustness.under_noise(Explained.by(METHODS["sobel"], images), 0.1, 4, 0)]
    )
    assert len(set(lengths.flatten().tolist())) == 12
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1 * 360**0.5), rtol=0.15, atol=0)


# --- edges -----------------------------------------------------------------------------------------------------------


KINDS = ("plain", "zero", "constant", "nan", "infinite", "negative", "speck")


def odd(kind: str) -> Tensor:
    raw = pixels(1, 9, 9, seed=3) - 0.4
    if kind in ("zero", "constant"):
        raw[:] = 0 if kind == "zero" else 0.3
    elif kind in ("nan", "infinite"):
        raw[0, 4, 5] = torch.nan if kind == "nan" else -torch.inf
    elif kind == "negative":
        raw = -pixels(1, 9, 9, seed=3) - 0.1
    elif kind == "speck":
        raw[:] = 0
        raw[0, 0, 8] = 1e-300
    return raw


NOT_SCORED = {name: {"zero", "nan", "infinite"} for name in NAMES}
NOT_SCORED["pointing_game"] |= {"negative"}
NOT_SCORED["attribution_localization"] |= {"negative"}
NOT_SCORED["fidelity"] |= {"constant"}
NOT_SCORED["roughness"] |= {"constant"}
KNOWN = {  # of maps that stay as they are
    **dict.fromkeys(("stability", "max_sensitivity"), 0.0),
    **dict.fromkeys(("ssim", "pcc", "randomization"), 1.0),
}


@EVERY
def test_odd_maps_have_a_score_or_clearly_none(name: str) -> None:
    raw = torch.cat([odd(kind) for kind in KINDS])
    one = batch(normalised(network()), (9, 9), count=1)
    images = Images(
        one.model, one.x.repeat(7, 1, 1, 1), one.target.repeat(7), [4] * 7, torch.ones(7, 9, 9).bool()
    )
    metric = Fidelity(pixels=20, draws=40) if name == "fidelity" else PIECES[name]
    scores = metric.of(given_maps(images, raw))
    assert {kind for kind, score in zip(KINDS, scores, strict=True) if score.isnan()} == NOT_SCORED[name]
    assert scores[~scores.isnan()].isfinite().all()
    if name in KNOWN:
        assert scores[~scores.isnan()].tolist() == pytest.approx([KNOWN[name]] * 4, abs=1e-12)
    if name in ("pointing_game", "attribution_localization"):
        assert scores[[0, 2, 6]].tolist() == [1, 1, 1]  # all of the image is the object
    if name == "sparseness":
        assert scores[[2, 6]].tolist() == pytest.approx([0, 80 / 81], abs=1e-12)
    # An image whose map has no score leaves the others alone.
    for i in (0, 2, 5, 6):
        alone = metric.of(given_maps(part(images, [i]), raw[i : i + 1]))
        torch.testing.assert_close(alone[0], scores[i], rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["stability", "ssim", "pcc", "max_sensitivity", "randomization"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_maps_that_stop_being_finite_are_not_scored(name: str, bad: float) -> None:
    images = batch(normalised(network()), (9, 9))

    @dataclass(frozen=True)
    class Breaks(Made):
        def explain_with_logits(
            self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
        ) -> tuple[Tensor, Tensor]:
            raw, logits = super().explain_with_logits(model, x, target)
            broken = raw.clone()
            if model is not images.model or not torch.equal(x, images.x):
                broken[1, 2, 3] = bad
            return broken, logits

    steady = Made(lambda x: x[:, 0])
    scores = PIECES[name].of(Explained.by(Breaks(steady.make), images))
    expected = PIECES[name].of(Explained.by(steady, images))
    assert scores.isnan().tolist() == [False, True, False]
    assert torch.equal(scores[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", ["stability", "ssim", "pcc", "max_sensitivity", "randomization"])
def test_maps_that_vanish_are_scored(name: str) -> None:
    images = batch(normalised(network()), (9, 9))

    @dataclass(frozen=True)
    class Vanishes(Made):
        def explain_with_logits(
            self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
        ) -> tuple[Tensor, Tensor]:
            stays = model is images.model and torch.equal(x, images.x)
            raw, logits = super().explain_with_logits(model, x, target)
            return raw * float(stays), logits

    explained = Explained.by(Vanishes(lambda x: x[:, 0]), images)
    scores = PIECES[name].of(explained)
    if name in ("max_sensitivity", "pcc"):
        assert scores.tolist() == pytest.approx([1.0 if name == "max_sensitivity" else 0.0] * 3, abs=1e-12)
    elif name == "stability":
        lengths = torch.stack([size for _, size in robustness.under_noise(explained, 0.1, 3, 1)])
        torch.testing.assert_close(scores, explained.maps.flatten(1).norm(dim=1) / lengths.amin(0))
    else:
        assert ((scores > 0) & (scores < 0.1)).all()


@pytest.mark.parametrize(
    "metric", [PointingGame(), AttributionLocalization()], ids=["pointing", "localization"]
)
def test_images_without_an_object_are_not_scored(metric: Any) -> None:
    images = batch(network(), (9, 9))
    raw = pixels(3, 9, 9)
    images.masks[1] = False
    assert metric.of(given_maps(images, raw)).isnan().tolist() == [False, True, False]
    nothing = Images(images.model, images.x, images.target, images.keys)
    scores = metric.of(given_maps(nothing, raw))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float64
    assert scores.isnan().all()
    broken = raw.clone()
    broken[0, 4, 4], broken[2, 4, 4] = torch.inf, -torch.inf
    images.masks[1] = True
    assert metric.score(broken, images.masks).isnan().tolist() == [True, False, True]
    assert metric.score(raw[:0], images.masks[:0]).shape == (0,)


def test_fidelity_refuses_sets_as_large_as_the_image() -> None:
    images = batch(network(), (9, 9))
    for size in (81, 200):
        with pytest.raises(BadValue, match=f"sets of {size} pixels, but the images have 81; take fewer"):
            Fidelity(pixels=size).of(Explained.by(METHODS["sobel"], images))
    assert Fidelity(pixels=80, draws=30).of(Explained.by(METHODS["sobel"], images)).isfinite().all()


def test_fidelity_has_no_answer_where_nothing_changes() -> None:
    images = batch(network(), (9, 9))
    explained = given_maps(images, pixels(3, 9, 9))
    assert Fidelity(pixels=20).of(explained).isfinite().all()
    images.x[1] = 0  # which is what pixels are set to
    images.model[-1].weight[int(images.target[2])] = 0
    fresh = given_maps(part(images, range(3)), explained.maps)
    assert Fidelity(pixels=20).of(fresh).isnan().tolist() == [False, True, True]
    tenths = torch.full((1, 9), 0.1, dtype=torch.float64)  # whose mean may be off by a digit
    assert faithfulness.correlation(tenths, pixels(1, 9)).isnan().all()
    assert faithfulness.correlation(pixels(1, 9), tenths).isnan().all()


# --- what scores do not depend on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 0.01, 1e30])
def test_the_unit_of_a_map_does_not_matter(name: str, scale: float) -> None:
    images = batch(normalised(network()), (9, 9))
    method = Made(lambda x: x[:, 1] - 0.3)
    larger = Made(lambda x: scale * (x[:, 1] - 0.3))
    scores = [PIECES[name].of(Explained.by(m, images)) for m in (method, larger)]
    torch.testing.assert_close(*scores, rtol=1e-8, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", [*OF_THE_MAP, "fidelity", "infidelity"])
def test_nor_does_it_once_the_map_is_prepared(name: str) -> None:
    images = batch(normalised(network()), (9, 9))
    full = given_maps(images, pixels(3, 9, 9) - 0.3)
    faint = Explained(images, full.explainer, full.maps * 1e-3)
    torch.testing.assert_close(
        PIECES[name].of(faint), PIECES[name].of(full), rtol=1e-8, atol=1e-12, equal_nan=True
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.0, 15.0, 60.0]))
def test_localisation_turns_with_the_image(height: int, width: int, seed: int, margin: float) -> None:
    raw = (4 * pixels(2, height, width, seed=seed)).round() - 1
    masks = pixels(2, height, width, seed=seed + 1) > 0.8
    turns: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.flip(1),
        lambda t: t.flip(2),
        lambda t: t.mT,
        lambda t: t.flip(0).flip(0),
    )
    for metric in (PointingGame(margin), AttributionLocalization()):
        scores = metric.score(raw, masks)
        for turn in turns:
            torch.testing.assert_close(metric.score(turn(raw), turn(masks)), scores, equal_nan=True)
        known = scores[~scores.isnan()]
        assert ((known >= 0) & (known <= 1 + 1e-12)).all()
        everywhere = metric.score(raw, masks | True)
        assert everywhere[raw.amax((1, 2)) > 0].tolist() == pytest.approx(
            [1] * int((raw.amax((1, 2)) > 0).sum())
        )


# --- sharing ---------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts images; each pass holds at most ``most``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images, self.most = inner, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.most = max(self.most, len(x))
        return self.inner(x)


def test_what_the_network_says_of_an_image_is_asked_once_for_all_methods() -> None:
    model = Counting(network())
    images = batch(model, (9, 9))
    images.logits(0, lambda _: images.given[:1], 1)  # one more pass finds out which memory format is fast
    methods = [given_maps(images, pixels(3, 9, 9, seed=seed)) for seed in (0, 1)]
    for metric in (Fidelity(pixels=9, draws=7), Infidelity(draws=7), Fidelity(pixels=9, draws=7, seed=1)):
        model.images = 0
        first = metric.of(methods[0])
        assert model.images == 3 * 8
        second = metric.of(methods[1])
        assert model.images == 3 * 8
        assert not torch.equal(first, second)
    fresh = given_maps(part(images, range(3)), pixels(3, 9, 9, seed=1))
    torch.testing.assert_close(metric.of(fresh), second)


def test_maps_under_noise_are_made_once_for_all_metrics() -> None:
    calls: list[int] = []
    images = batch(network(), (9, 9))
    explained = Explained.by(Made(lambda x: calls.append(len(x)) or x[:, 0]), images)  # type: ignore[func-returns-value]
    for metric in (Stability(draws=4), NoiseSSIM(draws=4), NoisePCC(draws=4)):
        metric.of(explained)
        assert calls == [3] * 5
    Stability(draws=4, noise=0.2).of(explained)
    assert calls == [3] * 9


def test_what_all_methods_share_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: made.append(name) or real(*args))  # type: ignore[func-returns-value]

    watch(PointingGame, "grow")
    watch(faithfulness, "_blurred")
    watch(MoRF, "_uniform")
    watch(robustness, "randomised")
    model, of_model = normalised(network()), {}
    for seed in (0, 1):
        one = batch(model, (9, 9), seed=seed)
        images = Images(model, one.x, one.target, one.keys, one.masks, of_model)
        for method in (GradInput(), Gradient()):
            explained = Explained.by(method, images)
            for metric in (PointingGame(), Insertion(), MoRF(), LeRF(), Randomization()):
                metric.of(explained)
    assert sorted(made) == ["_blurred", "_blurred", "_uniform", "_uniform", "grow", "grow", "randomised"]
    metric = Randomization()
    torch.testing.assert_close(
        metric.of(Explained.by(Gradient(), part(images, range(3)))), metric.of(explained)
    )


@EVERY
def test_what_is_remembered_is_not_taken_for_other_settings(name: str) -> None:
    metric: Any = PIECES[name]
    images = batch(normalised(network()), (10, 12))
    method = METHODS["levels" if name in ("insertion", "deletion") else "grad_input"]
    explained, scores = Explained.by(method, images), metric.of(Explained.by(method, images))
    for field in fields(metric):
        value = getattr(metric, field.name)
        if isinstance(value, str):
            changed: Any = "white"
        elif isinstance(value, int):
            changed = value + 5 if value < 10 else value // 2
        else:
            changed = 4 * value
        other = replace(metric, **{field.name: changed})
        fresh = other.of(Explained.by(method, part(images, range(3))))
        torch.testing.assert_close(other.of(explained), fresh, equal_nan=True)
        # Any margin may hit, and of more draws an earlier one may be the largest.
        if name != "pointing_game" and (name, field.name) != ("max_sensitivity", "draws"):
            assert not torch.equal(fresh, scores), field.name


def test_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting(network())
    images = batch(model, (9, 9))
    explained = Explained.by(METHODS["levels"], images)
    names = ("fidelity", "infidelity", "insertion", "deletion", "morf", "lerf")
    scores = {name: PIECES[name].of(explained) for name in names}
    for pixels_at_once, most in ((1, 1), (81 * 4 - 1, 3), (81 * 4, 4)):
        monkeypatch.setattr(explained_module, "_PIXELS_AT_ONCE", pixels_at_once)
        model.most = 0
        again = Explained(part(images, range(3)), explained.explainer, explained.maps)
        for name in names:
            torch.testing.assert_close(PIECES[name].of(again), scores[name], rtol=1e-10, atol=1e-12)
        assert model.most == most


# --- nothing is changed ----------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.5).relu_())


@EVERY
@pytest.mark.parametrize("method", ["grad_input", "gradcam", "levels"])
def test_nothing_is_changed(name: str, method: str) -> None:
    model = InPlace()
    model.inner[0].weight.requires_grad_()
    images = batch(model, (9, 9))
    explained = Explained.by(METHODS[method], images)
    kept = [images.x, images.target, images.masks, explained.maps, *model.state_dict().values()]
    before = [tensor.clone() for tensor in kept]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    modes = [module.training for module in model.modules()]
    first = PIECES[name].of(explained)
    again = PIECES[name].of(Explained.by(METHODS[method], part(images, range(3))))
    assert not first.requires_grad
    assert torch.equal(first.nan_to_num(7), again.nan_to_num(7))
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert model.inner[0].weight.requires_grad
    assert model.inner[0].weight.grad is None
    for i in range(3):
        expected = slow.BY_NAME[name](PIECES[name], slow.Subject(explained, i))
        assert first[i].item() == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True)


def test_new_weights_do_not_seed_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    robustness.randomised(model, 2, 0)


# --- maps as they are scored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [(4, 5), (2, 3), (1, 1), (1, 6), (9, 12), (20, 25)], ids=str)
@pytest.mark.parametrize("size", [(9, 12), (8, 6), (1, 7)], ids=str)
def test_prepared_equals_its_definition(raw: tuple[int, int], size: tuple[int, int]) -> None:
    several = torch.stack([9 * pixels(*raw) - 4, -pixels(*raw, seed=1), 1e-200 * (pixels(*raw, seed=2) - 1)])
    got = maps.prepared(several, size)
    for single, expected in zip(got, several.numpy(), strict=True):
        np.testing.assert_allclose(single.numpy(), slow.prepared(expected, size), rtol=0, atol=1e-12)
    assert got.abs().max() <= 1
    if raw == size:
        assert got.flatten(1).abs().amax(1).tolist() == [1, 1, 1]
        assert torch.equal(got.sign(), several.sign())


def test_prepared_at_the_edges() -> None:
    raw = torch.ones(6, 3, 4)
    raw[0], raw[1, 0, 0], raw[2, 0, 0], raw[3, 0, 0], raw[4] = 0, torch.nan, torch.inf, -torch.inf, -0.2
    before = raw.clone()
    got = maps.prepared(raw, (6, 8))
    assert (got[0] == 0).all()
    assert got[1:4].isnan().all()
    assert (got[4] == -1).all()
    assert (got[5] == 1).all()
    torch.testing.assert_close(raw, before, equal_nan=True, rtol=0, atol=0)
    assert maps.prepared(raw, (3, 4)).dtype == torch.float32
    assert Explained.by(Made(lambda x: raw), batch(network(), (6, 8), count=6)).maps.shape == (6, 6, 8)


def test_metrics_keep_to_their_protocol() -> None:
    explained = Explained.by(METHODS["sobel"], batch(network(), (9, 9)))
    assert isinstance(explained.explainer, Explainer)
    for metric in PIECES.values():
        typed: Metric = metric
        scores = typed.of(explained)
        assert (scores.shape, scores.dtype) == ((3,), torch.float64)
    index, map_ = next(iter(explained.each()))
    assert (index, map_.shape, map_.dtype) == (0, (9, 9), torch.float64)


@EVERY
def test_counts_below_one_are_refused(name: str) -> None:
    metric: Any = PIECES[name]
    for field in {"draws", "steps", "stages", "pixels", "grid"} & set(vars(metric)):
        with pytest.raises(BadValue, match=f"{type(metric).__name__} needs {field} >= 1, got 0"):
            replace(metric, **{field: 0})
