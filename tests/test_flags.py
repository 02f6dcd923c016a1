"""Flags and gates: each fires on what it is for, none on a method that was attacked well, and edges are never ranked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import (
    Brightness,
    Broken,
    Constant,
    Detached,
    Fixed,
    Flat,
    Liar,
    Noise,
    Staircase,
    Weighted,
    images,
    small_model,
)
from torch import Tensor, nn

from attacks import attack as attack_module
from attacks import flags
from attacks.budget import Budget
from attacks.ensemble import Ensemble
from attacks.experiment import attack_explainer
from attacks.flags import checked, not_monotone, raised, unlimited
from attacks.gates import Gates, check_gates
from attacks.probe import Probe, probe, slope_error
from attacks.robustness_experiment import Experiment, transfer
from attacks.scores import SCORES
from attacks.statistics import explanation_rate
from attacks.surrogate import Surrogate
from attacks.thresholds import TAU
from srd_lab.data import load_data
from srd_lab.errors import Unavailable
from srd_lab.models import load_model
from srd_lab.registry import make_explainer
from srd_lab.runs.work import Arrays, Item
from srd_lab.types import Explainer, Sample

BUDGET = Budget.named("l2", 2.0)
DEVICE = torch.device("cpu")
MEMBERS = ("dissimilarity", "combined", "top_k", "black_box")


def items(x: Tensor) -> list[Item]:
    """Every image with another one as its goal."""
    samples = [Sample(image, 0, None, f"image/{i}") for i, image in enumerate(x)]
    return [Item(i, (i, i), (samples[i], samples[i - 1])) for i in range(len(x))]


def attacked(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    *,
    steps: int = 30,
    queries: int = 60,
    budget: Budget = BUDGET,
    seen: Probe | None = None,
    members: tuple[str, ...] = MEMBERS,
) -> tuple[Arrays, Probe]:
    """As the study does it: probe, ensemble, table."""
    seen = seen or probe(explainer, model, x[:2], budget)
    ensemble = Ensemble(members, "quick", budget, steps=steps, queries=queries)
    experiment = Experiment(explainer, ensemble, None, seen)
    return experiment.run(model, items(x), DEVICE, lambda _: None), seen


def flagged(explainer: Explainer, model: nn.Module, x: Tensor, **options: Any) -> dict[str, str]:
    return raised(*attacked(explainer, model, x, **options))


@pytest.mark.parametrize("size", [2.0, 6.0])
def test_a_method_that_was_attacked_well_has_no_flag(size: float) -> None:
    """SRD on a network whose class holds: it has a gradient, and a black box of few queries cannot win."""
    model, x, budget = small_model(sure=True), images(3), Budget.named("l2", size)
    method = make_explainer("srd", start="ones")
    assert flagged(method, model, x, steps=40, queries=30, budget=budget) == {}
    if size > 2:
        assert unlimited(method, model, x, Surrogate(), steps=30) == {}


def test_a_method_that_draws_at_random() -> None:
    said = flagged(Noise(), small_model(sure=True), images(2), steps=2)
    assert "differs from call to call" in said["random"]


def test_a_method_without_a_gradient_goes_to_the_black_box() -> None:
    said = flagged(Detached(), small_model(sure=True), images(2))
    assert set(said) == {"no_gradient"}
    assert "the map of Detached has no gradient" in said["no_gradient"]
    said = flagged(Flat(), small_model(sure=True), images(2))
    assert "its gradient is zero on every surrogate" in said["no_gradient"]


class HalfDetached(Explainer):
    """Gradient x input with the gradient taken for a constant, as attributions of other libraries are."""

    def explain_with_logits(self, model: nn.Module, x: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
        raw, logits = make_explainer("gradient").explain_with_logits(model, x, target)
        return raw.detach() * x.sum(1), logits


def test_a_gradient_that_is_not_the_maps_slope() -> None:
    said = flagged(HalfDetached(), small_model(sure=True), images(2))
    assert "the gradient of the map is not its slope (off by" in said["wrong_gradient"]


@pytest.mark.parametrize(
    "name",
    ["gradient", "grad_input", "srd", "lrp_zplus", "lrp_gamma", "gradcam", "smoothed(grad_input,0.1,2)"],
)
def test_the_gradient_of_a_method_is_its_slope(name: str) -> None:
    model, x = Surrogate(10.0).at(small_model(), 0, 1), images(2)
    error = slope_error(attack_explainer(name, "contrastive"), model, x, torch.zeros(2, dtype=torch.long), 0)
    assert error < 0.01


def test_a_map_that_jumps_everywhere_says_nothing_of_its_slope() -> None:
    class Jumping(Explainer):
        def explain_with_logits(
            self, model: nn.Module, x: Tensor, target: Any = None
        ) -> tuple[Tensor, Tensor]:
            return (x.sum(1) * 1e9).frac(), model(x)

    with pytest.raises(Unavailable, match="jumps however small"):
        slope_error(Jumping(), small_model(), images(2), torch.zeros(2, dtype=torch.long), 0)


def test_a_gradient_that_cannot_be_held_against_the_slope_says_so() -> None:
    class Single(Explainer):
        """Takes float32 alone."""

        def explain_with_logits(
            self, model: nn.Module, x: Tensor, target: Any = None
        ) -> tuple[Tensor, Tensor]:
            raw, logits = make_explainer("gradient").explain_with_logits(model, x, target)
            return torch.nn.functional.conv2d(raw[:, None], torch.ones(1, 1, 1, 1))[:, 0], logits

    said = flagged(Single(), small_model(sure=True), images(2), steps=2)["unchecked_gradient"]
    assert "cannot be told: in float64: expected scalar type" in said


def test_a_zero_gradient_and_an_unused_budget() -> None:
    """Attacked as if it had a gradient: the random start is all that moves it."""
    as_if = Probe(Surrogate(), {"none": 1.0})
    said = flagged(Flat(), small_model(sure=True), images(2), seen=as_if)
    assert "no gradient in at least half of the steps of 100% of the images" in said["zero_gradient"]
    assert "100% of the images ended below half of the budget" in said["unused_budget"]


def test_an_attack_that_stalls_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a hundred times too small, from the image itself: the map looks robust."""
    whole = attack_module.Attack.run

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        small = replace(self, optimiser=replace(self.optimiser, first=0.01, last=0.001), start=0.0)
        return whole(small, *args, **kwargs)

    seen = Probe(Surrogate.named("softplus_30"), {})
    monkeypatch.setattr(attack_module.Attack, "run", slow)
    said = flagged(
        make_explainer("grad_input"), small_model(sure=True), images(2), seen=seen, members=MEMBERS[:3]
    )
    assert "unused_budget" in said


def test_a_masked_gradient_loses_against_the_black_box() -> None:
    table, seen = attacked(Staircase(), small_model(sure=True), images(4), queries=300, steps=10)
    assert "masked" in raised(table, seen)
    alone = {name: values for name, values in table.items() if "noise" not in name}
    assert "beaten by black_box by more than 0.002 on" in raised(alone, seen)["masked"]


def test_every_attack_that_beats_the_gradient_is_named() -> None:
    """By what counts and by what is only checked, in one sentence each."""
    table = arrays(member__black_box__pcc=LOW, control__noise__ssim=LOW)
    assert raised(table, CLEAN, {"masked": "and more"})["masked"] == (
        "the gradient attacks are beaten by black_box by more than 0.002 on 50% of the images (pcc) and by "
        "noise by more than 0.002 on 50% of the images (ssim); and more"
    )


def arrays(n: int = 4, **changed: Any) -> Arrays:
    """A table of a clean run, made by hand."""
    table: Arrays = {}
    for score in ("pcc", "ssim", "top_k", "local_top_k"):
        for name in ("member/combined", "member/top_k"):
            table[f"{name}/{score}"] = np.full(n, 0.5)
        others = ("source/a", "source/b", "source/srd (ones)")
        for name in ("member/black_box", "member/transfer", "control/noise", "control/one_step", *others):
            table[f"{name}/{score}"] = np.full(n, 0.9)
    table |= {"used": np.ones(n), "stuck": np.zeros(n), "diverged": np.zeros(n, bool), "gain": np.zeros(n)}
    table |= {"constant": np.zeros(n, bool), "violation": np.ones(n), "kept": np.ones(n, bool)}
    return table | {name.replace("__", "/"): value for name, value in changed.items()}


CLEAN = Probe(Surrogate(), {"none": 0.5})
LOW = np.array([0.9, 0.497, 0.497, 0.9])


@pytest.mark.parametrize(
    ("changed", "flag", "words"),
    [
        (
            {"member__black_box__ssim": LOW},
            "masked",
            r"by black_box by more than 0.002 on 50% of .* \(ssim\)",
        ),
        (
            {"member__transfer__pcc": np.array([0.9, 0.475, 0.475, 0.9])},
            "not_converged",
            r"the other methods' images together lower pcc by 0.013",
        ),
        (
            {"source__srd (ones)__ssim": np.full(4, 0.489)},
            "masked",
            r"the images made for srd \(ones\) by 0.011 on average \(ssim\)",
        ),
        ({"control__noise__top_k": LOW}, "masked", r"by noise by more than"),
        ({"control__one_step__local_top_k": LOW}, "one_step", r"one step beats many .* \(local_top_k\)"),
        ({"gain": np.full(4, 0.011)}, "not_converged", r"still gained 0.011"),
        ({"used": np.array([1, 1, 1, 0.49])}, "unused_budget", r"25% of the images"),
        ({"stuck": np.array([0.5, 0, 0, 0])}, "zero_gradient", r"25% of the images"),
        ({"diverged": np.array([True, False, False, False])}, "diverged", r"not finite for 25%"),
        ({"constant": np.array([True, True, False, False])}, "degenerate", r"constant or not finite for 50%"),
        ({"violation": np.array([1, 1.01, 1, 1])}, "violated", r"by a factor of 1.01"),
        ({"kept": np.array([True, True, True, False])}, "violated", r"the predicted class"),
    ],
)
def test_each_flag_has_its_threshold(changed: dict[str, Any], flag: str, words: str) -> None:
    import re

    assert raised(arrays(), CLEAN) == {}
    said = raised(arrays(**changed), CLEAN)
    assert list(said) == [flag]
    assert re.search(words, said[flag])


@pytest.mark.parametrize(
    "changed",
    [
        {"member__black_box__pcc": np.array([0.9, 0.4985, 0.4985, 0.9])},  # less than .002
        {"member__black_box__pcc": np.array([0.9, 0.1, 0.9, 0.9])},  # a single image
        {"member__transfer__pcc": np.array([0.9, 0.482, 0.482, 0.9])},  # lowers the mean by .009
        {  # each of two methods is luckier on half of the images, neither stronger on the whole
            "source__a__pcc": np.array([0.3, 0.3, 0.7, 0.7]),
            "source__b__pcc": np.array([0.7, 0.7, 0.3, 0.3]),
        },
        {"source__a__pcc": np.full(4, 0.491)},
        {"gain": np.full(4, 0.009)},
        {"used": np.full(4, 0.51)},
        {"stuck": np.full(4, 0.49)},
        {"violation": np.full(4, 1.00005)},
    ],
)
def test_just_below_its_threshold_a_flag_is_silent(changed: dict[str, Any]) -> None:
    assert raised(arrays(**changed), CLEAN) == {}


def test_members_that_are_only_checked_have_flags_of_their_own() -> None:
    """The black box by its share of images; the others by how far they lower a mean, where they do at all."""
    own = {f"worst/{s}": np.array([0.5, 0.5, 0.5, 0.9]) for s in ("pcc", "ssim", "top_k", "local_top_k")}
    names = ("target", "black_box")
    alike = own | {f"member/{m}/{s}": own[f"worst/{s}"] for m in names for s in SCORES}
    assert checked(alike, names) == {}
    near = alike | {"member/target/ssim": np.array([0.465, 0.9, 0.9, 0.9])}  # lowers the mean by .00875
    assert checked(near, names) == {}
    lower = alike | {"member/target/ssim": np.array([0.455, 0.9, 0.9, 0.9])}
    assert list(checked(lower, names)) == ["left_out"]
    assert (
        "target lowers ssim by 0.011 on the 4 images that were checked" in checked(lower, names)["left_out"]
    )
    once = alike | {"member/black_box/pcc": np.array([0.1, 0.9, 0.9, 0.9])}
    assert checked(once, names) == {}
    twice = alike | {"member/black_box/pcc": np.array([0.1, 0.4, 0.9, 0.9])}
    assert list(checked(twice, names)) == ["masked"]
    assert (
        "by black_box by more than 0.002 on 50% of the images (pcc) that were checked"
        in checked(twice, names)["masked"]
    )


def test_few_images_do_not_raise_the_flag_of_the_black_box() -> None:
    low = np.full(25, 0.9)
    low[0] = 0.1
    table = arrays(25)
    table["member/black_box/pcc"] = low
    assert raised(table, CLEAN) == {}
    low[1] = 0.1
    assert list(raised(table, CLEAN)) == ["masked"]


def test_flags_of_the_probe_and_of_other_experiments() -> None:
    assert list(raised(arrays(), replace(CLEAN, random=True))) == ["random"]
    assert list(raised(arrays(), replace(CLEAN, likeness=0.89))) == ["surrogate_differs"]
    assert list(raised(arrays(), replace(CLEAN, best=None, why="no"))) == ["no_gradient"]
    assert raised(arrays(), CLEAN, {"planted": "it stands"}) == {"planted": "it stands"}


def test_a_surrogate_without_a_likeness_differs() -> None:
    assert "surrogate_differs" in raised(arrays(), replace(CLEAN, likeness=float("nan")))


def test_a_map_of_the_surrogates_own() -> None:
    model, x = small_model(sure=True), images(2)
    seen = probe(Liar(), model, x, BUDGET)
    assert seen.likeness < 0.9
    forced = replace(seen, best=Surrogate.named("softplus_30"))
    assert "is not the network's (PCC" in flagged(Liar(), model, x, seen=forced, steps=3)["surrogate_differs"]


@dataclass(frozen=True)
class HardToMove(Weighted):
    """Almost all of it stands still: the attack cannot break it, and that says nothing about the network."""

    def map_of(self, x: Tensor, own: Tensor) -> Tensor:
        return Fixed().map_of(x, own) + 1e-2 * x[:, 0]


def test_what_no_budget_breaks_is_flagged() -> None:
    model, x = small_model(sure=True), images(2)
    for method in (HardToMove(), Fixed()):
        said = unlimited(method, model, x, Surrogate(), steps=10)
        assert "an unlimited budget leaves a mean PCC of" in said["unlimited"]
    assert unlimited(Brightness(), model, x, Surrogate(), steps=10) == {}


def test_constant_maps_are_degenerate() -> None:
    said = flagged(Constant(), small_model(sure=True), images(2), steps=2, seen=CLEAN)
    assert "the map is constant or not finite for 100% of the images" in said["degenerate"]
    raw = torch.rand(3, 4, 4)
    raw[1] = 7
    raw[2] = 0
    assert flags.constant(raw).tolist() == [False, True, True]


def test_maps_that_are_not_finite_are_degenerate() -> None:
    x = images(2)
    x[:, 0, 0, 0] = 50 / 255
    black = Probe(None, {}, "none")
    table, _ = attacked(Broken(), small_model(sure=True), x, seen=black)
    assert np.isnan(table["worst/pcc"]).all()
    assert np.isnan(table["control/noise/pcc"]).all()
    assert "degenerate" in raised(table, black)
    assert not explanation_rate(table["worst/pcc"], "pcc").any()


@pytest.mark.filterwarnings("error")
def test_a_run_without_any_finite_gain_is_no_warning() -> None:
    assert list(raised(arrays(gain=np.full(4, np.nan)), CLEAN)) == []


def test_a_projection_that_forgets_the_budget_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged is the stored image, with the budget that was declared."""
    monkeypatch.setattr(Budget, "project", lambda self, x_adv, x, scale=None: x_adv.clamp(0, 1))
    monkeypatch.setattr(
        Budget, "quantise", lambda self, x_adv, x, scale=None: (x_adv.clamp(0, 1) * 255).round() / 255
    )
    said = flagged(Brightness(), small_model(sure=True), images(2), steps=5)
    assert "leaves the budget (by a factor of" in said["violated"]


def test_an_attack_that_still_gains_at_its_end_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five equal steps from the image, the last of which is the last fifth."""
    whole = attack_module.Attack.run

    def steady(self: Any, *args: Any, **kwargs: Any) -> Any:
        straight = replace(
            self, optimiser=replace(self.optimiser, first=0.3, last=0.3, momentum=0.0), start=0.0
        )
        return whole(straight, *args, **kwargs)

    monkeypatch.setattr(attack_module.Attack, "run", steady)
    method, budget = make_explainer("grad_input"), Budget.named("l2", 8.0)
    options: dict[str, Any] = {"seen": CLEAN, "members": ("combined",), "budget": budget}
    said = flagged(method, small_model(sure=True), images(3), steps=5, **options)
    assert "the last fifth of the iterations still gained 0.0" in said["not_converged"]


def test_a_budget_that_moves_a_map_less_than_a_smaller_one() -> None:
    curve = {2.0: np.array([0.5, 0.5]), 1.0: np.array([0.6, 0.7]), 4.0: np.array([0.51, 0.5])}
    assert not_monotone(curve) == {}
    curve[4.0] = np.array([0.53, 0.5])
    said = not_monotone(curve)["not_monotone"]
    assert said == "the budget 4 leaves 0.015 more of the map than 2"
    assert not_monotone({1.0: np.ones(2)}) == {}


# --- the member that is added afterwards ----------------------------------------------------------


def test_transfer_is_added_to_the_scores_and_the_images() -> None:
    model, x = small_model(), images(3)
    method = make_explainer("grad_input")
    own, seen = attacked(method, model, x, steps=3, members=("top_k",))
    other, _ = attacked(make_explainer("srd", start="ones"), model, x, steps=20, members=("combined",))
    experiment = Experiment(method, Ensemble(("top_k",), budget=BUDGET), None, seen)
    target = torch.from_numpy(own["target"])
    images_ = [torch.from_numpy(other[f"image/{s}"]).float() / 255 for s in ("pcc", "ssim")]
    after = transfer(experiment, model, x, target, {"srd": images_}, own)
    assert raised(after, seen).get("violated") is None
    lowered = 0
    for score in ("pcc", "ssim", "top_k", "local_top_k"):
        reached = after[f"member/transfer/{score}"]
        np.testing.assert_array_equal(after[f"source/srd/{score}"], reached)
        np.testing.assert_allclose(after[f"worst/{score}"], np.minimum(own[f"worst/{score}"], reached))
        for i in range(3):
            better = reached[i] < own[f"worst/{score}"][i]
            lowered += better
            assert (after[f"by/{score}"][i] == "transfer") == better
            same = np.array_equal(after[f"image/{score}"][i], own[f"image/{score}"][i])
            assert same or better
    assert lowered


# --- gates ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> tuple[nn.Module, Tensor]:
    data = load_data("scenes")
    return load_model("vgg16", device="cpu"), torch.stack([data[i].image for i in range(8)])


def test_edges_and_noise_pass_no_gate_that_counts_and_the_gradient_does(
    scenes: tuple[nn.Module, Tensor],
) -> None:
    model, x = scenes
    found = {
        name: check_gates(make_explainer(name), model, x, list(range(8)))
        for name in ("sobel", "random", "grad_input")
    }
    assert found["sobel"].passed == {"class": False, "weights": False, "faithful": False}
    assert not found["random"].ranked
    assert not found["random"].passed["faithful"]
    assert found["sobel"].other_class == pytest.approx(1)
    assert found["sobel"].other_weights == pytest.approx(1)
    assert found["random"].over_random == pytest.approx(0)
    good = found["grad_input"]
    assert good.passed == {"class": True, "weights": True, "faithful": True}, good
    assert good.ranked
    assert good.why == ""
    assert "maps of other classes are alike" in found["sobel"].why
    assert "not more faithful than the controls" in found["random"].why


def test_the_class_gate_passes_srd_from_its_class_specific_start_alone(
    scenes: tuple[nn.Module, Tensor],
) -> None:
    """The runner-up has the same map; the least likely class has not, unless the start is the same for all."""
    model, x = scenes
    found = {
        start: check_gates(make_explainer("srd", start=start), model, x[:4], list(range(4)))
        for start in ("contrastive", "ones")
    }
    assert found["contrastive"].passed["class"]
    assert not found["ones"].passed["class"]
    assert found["ones"].other_class == pytest.approx(1)


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        (Gates(0.1, 0.1, 0.2, 0.01, 0.01), (True, True, True)),
        (Gates(TAU["pcc"], 0.1, 0.2, 0.01, 0.01), (False, True, True)),
        (Gates(0.1, TAU["pcc"], 0.2, 0.01, 0.01), (True, False, True)),
        (Gates(0.1, 0.1, 0.2, 0.0, 0.01), (True, True, False)),
        (Gates(0.1, 0.1, 0.2, 0.01, 0.0), (True, True, False)),
        (Gates(float("nan"), float("nan"), 0.2, float("nan"), 0.1), (False, False, False)),
    ],
)
def test_each_gate_by_hand(gates: Gates, passed: tuple[bool, ...]) -> None:
    assert tuple(gates.passed.values()) == passed
    assert gates.ranked == all(passed)
    assert bool(gates.why) != gates.ranked
    assert gates.why.count(";") == max(0, passed.count(False) - 1)
