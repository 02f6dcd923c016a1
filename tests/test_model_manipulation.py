"""Manipulated networks: derivatives in the weights against finite differences, objectives by hand, and that they fool."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import model_study
from attacks.model_compare import compare, save_weights, shown_maps
from attacks.model_manipulation import ModelManipulation, load_plan
from attacks.model_objective import Active, Cases, CentreOfMass, Location, MapObjective, TopK, quartered
from attacks.model_study import ModelStudy
from attacks.model_tables import table, verdicts
from attacks.settings import ModelManipulationSettings
from srd_lab import load_model
from srd_lab.data import Loaded
from srd_lab.errors import BadData, BadInput, BadValue, BadWeights, NoGradient, Refused, SrdLabError
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer
from srd_lab.runs.tracking import FolderRun
from srd_lab.types import Explainer, Sample

SIDE = 16


class Toy(nn.Module):
    """Two convolutions (with batch norms if asked for) and a pool, and a linear layer on the mean over places."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm2d(8)] if batch_norm else []
        first = [nn.Conv2d(3, 8, 3, padding=1), *norm, nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*first, *second)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Squares:
    """Smooth grey images with a small square of red, green or blue: its class."""

    classes = ["red", "green", "blue"]  # noqa: RUF012

    def __init__(self, count: int, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        coarse = torch.rand(count, 1, 3, 3, generator=chance)
        grey = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
        self.images = (0.3 + 0.4 * grey).clone()
        for i, c in enumerate(self.labels.tolist()):
            row, column = torch.randint(3, SIDE - 7, (2,), generator=chance).tolist()
            self.images[i, c, row : row + 4, column : column + 4] = 1.0
        self.images = (255 * self.images).round() / 255

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], int(self.labels[index]), None, self.name(index))

    def name(self, index: int) -> str:
        return f"squares/{index}"


@lru_cache
def trained(batch_norm: bool = False) -> Classifier:
    """A toy that tells the colours apart."""
    torch.manual_seed(0)
    model, data = Classifier(Toy(batch_norm), (0.5,) * 3, (0.25,) * 3), Squares(96, 1)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(model(data.images), data.labels).backward()
        adam.step()
    model.zero_grad()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, data: Squares) -> float:
    with torch.no_grad():
        return float((model(data.images).argmax(1) == data.labels).double().mean())


METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "grad_input": {},
    "guided_backprop": {},
    "integrated_gradients": {"steps": 3},
    "lrp_zplus": {},
    "lrp_gamma": {},
    "gradcam": {},
    "srd": {},
    "srd ones": {"start": "ones"},
}


def method(name: str) -> Explainer:
    return make_explainer(name.split()[0], **METHODS[name])


def maps_of(*rows: list[list[float]]) -> Tensor:
    """Maps (1, M, H, W)."""
    return torch.tensor(rows)[None]


# --- derivatives in the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_derivative_in_the_weights_is_that_of_finite_differences(name: str, batch_norm: bool) -> None:
    model, data = copy.deepcopy(trained(batch_norm)).double(), Squares(4, 5)
    cases = Location(3).cases(data.images.double(), data.labels)
    weights = [p.requires_grad_() for p in model.parameters()]

    def score(differentiable: bool = False) -> Tensor:
        return Location(3).score(
            shown := shown_maps(method(name), model, cases, differentiable=differentiable), shown
        )

    slopes = torch.autograd.grad(score(True).sum(), weights, allow_unused=True)
    chance = torch.Generator().manual_seed(3)
    ways = [torch.randn(w.shape, generator=chance, dtype=w.dtype) for w in weights]
    expected = sum(float((w * s).sum()) for w, s in zip(ways, slopes, strict=True) if s is not None)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for weight, way in zip(weights, ways, strict=True):
                weight += sign * step * way
            values.append(float(score().sum()))
            for weight, way in zip(weights, ways, strict=True):
                weight -= sign * step * way
    found = (values[0] - values[1]) / (2 * step)
    assert abs(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-4)


def test_passes_that_would_be_recomputed_reach_the_weights_too() -> None:
    how = ModelManipulation(
        make_explainer("integrated_gradients", steps=3, images_at_once=1), Location(3), steps=1, batch=4
    )
    assert len(how.run(trained(), Squares(6, 2)).score) == 1  # it would be refused without a derivative


# --- the manipulation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "objective", "weight", "lr", "least"),
    [
        ("gradient", Location(2), 3.0, 1e-2, 0.06),
        ("lrp_zplus", Location(3), 3.0, 5e-3, 0.05),
        ("srd", Location(3), 3.0, 5e-3, 0.02),
        ("gradient", TopK(0.1), 3.0, 1e-2, 0.06),
        ("grad_input", CentreOfMass(), 3.0, 5e-3, 0.008),
        ("gradcam", Active(0, 1), 1.0, 5e-3, 0.1),
    ],
)
def test_maps_say_what_the_attacker_wants_while_accuracy_holds(
    name: str, objective: MapObjective, weight: float, lr: float, least: float
) -> None:
    """More than with the control, which is fine-tuned alike without the map loss."""
    model, held = trained(), Squares(60, 9)
    how = ModelManipulation(method(name), objective, weight, steps=40, lr=lr, batch=12)
    done, control = (each.run(model, Squares(90, 3)) for each in (how, replace(how, weight=0.0)))
    cases = objective.cases(held.images, held.labels)
    found, plain = (compare(how.explainer, objective, model, r.model, cases) for r in (done, control))
    assert float((found.after - plain.after).mean()) > least
    assert float((plain.after - plain.before).abs().mean()) < least
    assert accuracy(model, held) > 0.95
    assert accuracy(done.model, held) > 0.9
    assert float(done.score[-5:].mean()) > float(done.score[:2].mean()) + 0.5 * least
    assert float(found.pcc.mean()) < float(plain.pcc.mean())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_given_network_stays_as_it_was_and_statistics_are_kept(batch_norm: bool) -> None:
    model = copy.deepcopy(trained(batch_norm))
    model.network.fc.bias.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    done = ModelManipulation(method("gradient"), Location(3), steps=3, batch=6).run(model, Squares(12, 3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in done.model.modules()]
    for old, new in zip(model.parameters(), done.model.parameters(), strict=True):
        assert old.grad is None
        assert new.grad is None
        assert old.requires_grad == new.requires_grad
        assert not torch.equal(old, new)
    fixed = [
        (key, value) for key, value in done.model.state_dict().items() if "running" in key or "batches" in key
    ]
    assert len(fixed) == (3 if batch_norm else 0)
    assert all(torch.equal(value, before[key]) for key, value in fixed)


def test_outputs_can_be_kept_instead_of_labels() -> None:
    """Nothing is to be learnt from the original's own outputs: without a map loss the network stays."""
    how = ModelManipulation(method("gradient"), Location(3), weight=0.0, steps=5, batch=6, keep="outputs")
    model = trained()
    done = how.run(model, Squares(12, 3))
    assert float(done.task.abs().max()) < 1e-5
    data = Squares(12, 4)
    far = replace(how, keep="labels", lr=1e-2).run(model, data)
    drift = [(r.model(data.images) - model(data.images)).abs().max() for r in (done, far)]
    assert drift[0] < 0.2 * drift[1]  # Adam makes steps of rounding errors, too


def test_the_seed_decides_and_some_images_can_be_chosen() -> None:
    model, data, steps = trained(), Squares(30, 3), []
    how = ModelManipulation(method("gradcam"), Location(3), steps=4, batch=6)
    first, again, other = (
        replace(how, seed=seed).run(model, data, on_step=steps.append) for seed in (0, 0, 1)
    )
    assert torch.equal(first.task, again.task)
    assert not torch.equal(first.task, other.task)
    assert sum(steps) == 12
    seen: list[int] = []

    class Spy(Squares):
        def __getitem__(self, index: int) -> Sample:
            seen.append(index)
            return super().__getitem__(index)

    how.run(model, Spy(30, 3), range(5, 9))
    assert set(seen) == {5, 6, 7, 8}


def test_every_image_is_used_as_often_as_any_other() -> None:
    plan = list(load_plan(torch.arange(10, 17), 4, 6, torch.Generator().manual_seed(0)))
    assert [len(part) for part in plan] == [4] * 6
    counts = np.bincount(np.concatenate(plan) - 10)
    assert counts.min() == 3
    assert counts.max() == 4


@dataclass(frozen=True)
class Spiky(Explainer):
    """A map whose derivative is infinite."""

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return x.sum(1) + (logits - logits.detach()).abs().sqrt().sum(1)[:, None, None], logits


def test_a_gradient_that_is_not_finite_ends_it_in_a_line() -> None:
    with pytest.raises(BadValue, match="gradient of step 1 is not finite"):
        ModelManipulation(Spiky(), Location(3), batch=6).run(trained(), Squares(12, 3))


@pytest.mark.parametrize(
    ("name", "objective"), [("sobel", Location(3)), ("random", Location(3)), ("srd ones", Active(0, 1))]
)
def test_maps_without_a_derivative_in_the_weights_are_refused(name: str, objective: MapObjective) -> None:
    explainer = method(name) if name in METHODS else make_explainer(name)
    with pytest.raises(NoGradient, match="no derivative"):
        ModelManipulation(explainer, objective, batch=12).run(trained(), Squares(12, 3))


@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
def test_methods_that_recompute_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="recomputes its passes"):
        ModelManipulation(make_explainer(name), Location())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps > 0"),
        ({"lr": 0.0}, "lr > 0"),
        ({"batch": 0}, "batch > 0"),
        ({"clip": 0.0}, "clip > 0"),
        ({"weight": -1.0}, "weight >= 0"),
        ({"weight": float("nan")}, "weight >= 0"),
        ({"keep": "all"}, "labels, outputs"),
    ],
)
def test_wrong_settings_of_the_manipulation(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        ModelManipulation(method("gradient"), Location(), **options)


def test_what_cannot_be_manipulated() -> None:
    how = ModelManipulation(method("gradient"), Location(3), steps=1, batch=4)
    with pytest.raises(BadInput, match="no images to train on"):
        how.run(trained(), Squares(6, 2), [])
    with pytest.raises(BadData, match="no training image is of class 1"):
        replace(how, objective=Active(0, 1)).run(trained(), Squares(6, 2), [0, 3])
    with pytest.raises(Refused, match="eval"):
        how.run(copy.deepcopy(trained(True)).train(), Squares(6, 2))
    with pytest.raises(Refused, match="no weights to change"):
        how.run(nn.Identity(), Squares(6, 2))


def test_a_batch_of_unreadable_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Loaded([], [], {"a.png": "damaged"})
    monkeypatch.setattr("attacks.model_manipulation.load_batches", lambda *a: iter([gone]))
    with pytest.raises(BadData, match=r"a\.png \(damaged\)"):
        ModelManipulation(method("gradient"), Location(3), steps=1).run(trained(), Squares(6, 2))


# --- objectives ---------------------------------------------------------------------------------------------------


def test_location_is_the_share_of_the_mass_in_the_region() -> None:
    now = maps_of([[1.0, 2, 1], [2, 5, 2], [1, 2, 4]])
    assert float(Location(1).score(now, now)) == pytest.approx(15 / 20)
    corner = torch.zeros(3, 3, dtype=torch.bool)
    corner[2, 2] = True
    assert float(Location(mask=corner).score(now, now)) == pytest.approx(4 / 20)
    assert float(Location(1).score(0 * now, now)) == 0
    frame = Location(2).region(6, 7)
    assert frame.sum() == 6 * 7 - 2 * 3
    assert not frame[2:4, 2:5].any()


def test_top_k_is_the_mass_off_the_pixels_that_were_on_top() -> None:
    before, now = maps_of([[9.0, 1], [8, 0]]), maps_of([[1.0, 2], [3, 4]])
    assert float(TopK(0.5).score(now, before)) == pytest.approx(6 / 10)
    assert float(TopK(0.25).score(now, before)) == pytest.approx(9 / 10)
    assert float(TopK(0.5).score(0 * now, before)) == 0


def test_the_centre_moves_towards_the_farther_border() -> None:
    left, right = maps_of([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]]), maps_of([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    score = CentreOfMass().score
    assert float(score(right, left)) == pytest.approx((-0.5 + 1) / 2)  # a row in the middle moves up
    assert float(score(left, left)) == 0
    assert float(score(left, right)) == pytest.approx((0.5 + 1) / 2)
    assert float(score(0 * left, right)) == 0
    start = (right + 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(score(start, start.detach()).sum(), start)
    assert slope.abs().max() > 0  # the distance itself would have none here


def test_active_is_likeness_to_the_other_map_less_that_to_the_own() -> None:
    one, other = [[1.0, 0], [0, 0]], [[0.0, 0], [0, 1]]
    before, swapped = maps_of(one, other), maps_of(other, one)
    score = Active().score
    pcc = np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]
    assert float(score(before, before)) == pytest.approx(pcc - 1)
    assert float(score(swapped, before)) == pytest.approx(1 - pcc)
    assert float(score(before, maps_of(one, one))) == 0


def test_images_of_two_classes_are_quartered() -> None:
    a, b = (torch.full((2, 3, 6, 8), value) for value in (0.0, 1.0))
    made = quartered(a, b)
    assert made.shape == a.shape
    assert made[0, 0, ::3, ::4].tolist() == [[0, 1], [1, 0]]
    assert made[1, 0, ::3, ::4].tolist() == [[1, 0], [0, 1]]
    assert quartered(a[..., :7, :5], b[..., :7, :5]).shape == (2, 3, 6, 5)
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        quartered(small, b[:1, :, :1, :1].expand(1, 3, 8, 8))[..., :4, :4], F.avg_pool2d(small, 2)
    )


def test_active_explains_both_classes_on_images_of_both() -> None:
    data = Squares(9, 2)
    cases = Active(2, 0).cases(data.images, data.labels)
    assert cases.images.shape == (3, 3, SIDE, SIDE)
    assert [c.tolist() for c in cases.classes] == [[2] * 3, [0] * 3]
    assert torch.equal(cases.images, quartered(data.images[data.labels == 2], data.images[data.labels == 0]))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Location(0), "1 pixel wide or more"),
        (lambda: Location(mask=torch.ones(4, 4)), "bool mask"),
        (lambda: Location(mask=torch.ones(4, 4, dtype=torch.bool)), "all pixels or none"),
        (lambda: Location(mask=torch.zeros(4, 4, dtype=torch.bool)), "all pixels or none"),
        (lambda: Location(8).region(16, 32), "leaves nothing"),
        (lambda: Location(mask=torch.eye(4).bool()).region(5, 5), r"\(4, 4\), but maps are read at \(5, 5\)"),
        (lambda: TopK(0.0), r"in \(0, 1\)"),
        (lambda: TopK(1.0), r"in \(0, 1\)"),
        (lambda: Active(3, 3), "two different classes"),
        (lambda: Active(-1, 3), "two different classes"),
        (lambda: Active(0, 1).cases(Squares(1, 0).images, Squares(1, 0).labels), "0 of class 1"),
    ],
)
def test_wrong_objectives(made: Any, said: str) -> None:
    with pytest.raises(SrdLabError, match=said):
        made()


# --- comparing and keeping ----------------------------------------------------------------------------------------


def test_a_comparison_does_not_depend_on_the_batch() -> None:
    data, objective, explainer = Squares(12, 7), Active(0, 1), method("gradcam")
    other = ModelManipulation(explainer, objective, steps=3, batch=12).run(trained(), Squares(12, 3)).model
    cases = objective.cases(data.images, data.labels)
    whole = compare(explainer, objective, trained(), other, cases)
    parts = [compare(explainer, objective, trained(), other, cases.part(i, i + 1)) for i in range(4)]
    for name in ("before", "after", "pcc", "ssim", "blank"):
        assert torch.allclose(
            getattr(whole, name).double(), torch.cat([getattr(p, name).double() for p in parts]), atol=1e-6
        )


def test_a_map_that_is_zero_is_blank_and_no_success() -> None:
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.network.fc.weight.zero_()
    data = Squares(3, 7)
    cases = Cases(data.images, (data.labels,))
    found = compare(method("gradient"), TopK(), trained(), model, cases)
    assert found.blank.tolist() == [True] * 3
    assert found.after.tolist() == [0] * 3
    assert not compare(method("gradient"), TopK(), trained(), trained(), cases).blank.any()


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_manipulated_network_is_loaded_back(tmp_path: Path, suffix: str) -> None:
    model = load_model("vgg16", device="cpu")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.network.classifier[0].weight += 0.01
        save_weights(model, tmp_path / f"fooled{suffix}")
        again = load_model("vgg16", weights=tmp_path / f"fooled{suffix}", device="cpu")
        assert torch.equal(again(x), model(x))
        assert not torch.equal(again(x), load_model("vgg16", device="cpu")(x))


def test_weights_go_into_known_files_only(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match=r"expected \.pth, \.npz or \.safetensors"):
        save_weights(trained(), tmp_path / "fooled.bin")


# --- the study ----------------------------------------------------------------------------------------------------


def scores(after: float, spread: float = 0.01, pcc: float = 0.5) -> dict[str, np.ndarray]:
    noise = spread * np.linspace(-1, 1, 20)
    fixed = {"before": 0.2, "pcc": pcc, "ssim": pcc, "blank": 0.0}
    return {"after": after + noise, **{name: np.full(20, value) for name, value in fixed.items()}}


def test_who_was_fooled() -> None:
    control = {m: scores(0.25, 0) for m in "abcde"}
    found = {
        "a": scores(0.65),
        "b": scores(0.50),
        "c": scores(0.32),
        "d": scores(0.26),
        "e": scores(0.3, 1.0),
    }
    words = {m: verdict.word for m, verdict in verdicts("a", found, control, 0).items()}
    assert words == {"a": "fooled (attacked)", "b": "fooled", "c": "partly", "d": "holds", "e": "holds"}
    words = {m: verdict.word for m, verdict in verdicts("e", found, control, 0).items()}
    assert words["e"] == "not moved (attacked)"
    assert words["a"] == "-"
    header, lines = table(found, control, verdicts("a", found, control, 0))
    assert len(header) == len(lines[0])
    assert lines[0][1] == "0.200 -> 0.650 (0.250)"
    assert lines[0][2].startswith("0.400 [")


SETTINGS = ModelManipulationSettings(
    device="cpu", workers=0, methods=("gradcam",), others=("gradcam", "srd_high"), manipulate_model="location",
    train_steps=3, train_batch=4, train_images=8, pairs=4, batch_size=3,
)  # fmt: skip


def studied(folder: Path, **settings: Any) -> ModelStudy:
    study = ModelStudy(replace(SETTINGS, **settings))
    with FolderRun("attack", "attack vgg16", study.settings.stored(), folder) as run:
        study.run(run)
    return study


def test_the_study_prints_stores_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = studied(tmp_path)
    said = capsys.readouterr().out
    assert "accuracy on 4 held-out images: original 100.0%" in said
    assert "mass within 8 px of the border" in said
    assert "(attacked)" in said
    for name in (
        "summary.txt",
        "gradcam/weights.npz",
        "gradcam/maps.csv",
        "gradcam/pictures.png",
        "control/weights.npz",
    ):
        assert (tmp_path / name).stat().st_size > 0
    assert "score,3," in (tmp_path / "gradcam/traces.csv").read_text()
    assert "accuracy_manipulated" in (tmp_path / "gradcam/run.json").read_text()
    assert study.weights_sha256[0].startswith("vgg16:")
    kept = load_model("vgg16", weights=tmp_path / "gradcam/weights.npz", device="cpu")
    assert not torch.equal(kept.network.features[0].weight, study.model.network.features[0].weight)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ModelManipulation, "run", never)
    with pytest.raises(AssertionError, match="trained again"):
        studied(tmp_path)
    known = {"train": study.source, "test": study.dataset}
    monkeypatch.setattr(model_study, "data_for", lambda settings, name, split="test": known[split])
    capsys.readouterr()
    for child in ("control", "gradcam"):
        assert 0 < float((tmp_path / child / "seconds.txt").read_text()) < 100
        (tmp_path / child / "seconds.txt").write_text("1000\n")
    studied(tmp_path, resumed=True)
    assert capsys.readouterr().out == said
    assert 2000 < json.loads((tmp_path / "run.json").read_text())["metrics"]["seconds"] < 2100


def test_no_image_is_trained_on_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    study = ModelStudy(SETTINGS)
    assert study.source.name(0).startswith("scenes/train")
    assert study.dataset.name(0).startswith("scenes/test")
    monkeypatch.setattr(model_study, "_SPLIT", ())
    study = ModelStudy(SETTINGS)
    assert not set(study.training) & set(study.held)
    assert (len(study.training), len(study.held)) == (8, 4)
    with pytest.raises(BadValue, match="leaves none to train on"):
        ModelStudy(replace(SETTINGS, pairs=5000))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("location", Location(8)),
        ("top-k", TopK(0.1)),
        ("centre-of-mass", CentreOfMass()),
        ("active", Active(0, 1)),
    ],
)
def test_objectives_by_name(kind: str, expected: MapObjective) -> None:
    assert model_study.objective_of(replace(SETTINGS, manipulate_model=kind), 64) == expected
    assert model_study.objective_of(replace(SETTINGS, frame=5), 64) == Location(5)


def test_wrong_settings_show_before_a_run() -> None:
    with pytest.raises(BadValue, match="location, top-k, centre-of-mass, active"):
        ModelStudy(replace(SETTINGS, manipulate_model="colour"))
    with pytest.raises(Refused, match="recomputes its passes"):
        ModelStudy(replace(SETTINGS, methods=("scorecam",)))
