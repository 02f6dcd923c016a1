"""``srd-lab evaluate``, ``explain`` and ``methods``: the numbers printed are those of the metrics, whatever the batch size,
whatever was interrupted; comparisons are the tests that they claim to be."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr, wilcoxon
from torch import Tensor, nn

from srd_lab import load_data, load_model, render
from srd_lab.catalogue import METHODS, METRICS, TABLE_2
from srd_lab.cli.main import main
from srd_lab.errors import BadValue, SrdLabError
from srd_lab.evaluation.experiment import Experiment
from srd_lab.evaluation.explaining import Classes
from srd_lab.evaluation.outputs import write_new
from srd_lab.evaluation.study import PICTURES, twins
from srd_lab.evaluation.tables import comparisons, ranks, score_table, signed_rank
from srd_lab.metrics.explained import Explained, Images
from srd_lab.metrics.faithfulness import Fidelity
from srd_lab.metrics.summary import holm
from srd_lab.models.cifar import cifar_network
from srd_lab.registry import EXPLAINERS, make_explainer, refusals
from srd_lab.registry import METRICS as SCORES
from srd_lab.reproduce.evaluation import activation_of
from srd_lab.reproduce.paper import paper
from srd_lab.runtime import Batcher

Rows = list[dict[str, str]]
SOME = ("--model", "resnet18", "--methods", "gradient,srd,gradcam,random", "--images", "7")
FIVE = ("--metrics", "pointing_game,attribution_localization,sparseness,fidelity,stability")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def succeed(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def table(file: Path) -> Rows:
    return list(csv.DictReader(file.read_text().splitlines()))


def cells(text: str, first: str) -> list[str]:
    """The line of the first table that begins so."""
    return next(line.split() for line in text.splitlines() if line.startswith(f"{first} "))


# --- comparisons ---------------------------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_by_most() -> None:
    corrected = holm(np.array([0.03, 0.005, np.nan, 0.04, 0.9]))
    np.testing.assert_allclose(corrected, [0.09, 0.02, np.nan, 0.09, 0.9])
    assert holm(np.array([0.8, 0.9]))[0] == 1.0  # never above 1, never falling


def test_signed_rank_is_wilcoxons() -> None:
    difference = np.random.default_rng(0).normal(0.3, 1, 40)
    assert signed_rank(difference) == wilcoxon(difference, method="exact").pvalue
    assert signed_rank(np.array([-0.01, 0.2, 0.3, 0.4, 0.5, 0.6])) == 0.0625
    for without in (np.append(difference, 0), np.append(difference, difference[0]), np.tile(difference, 2)):
        assert signed_rank(without) == wilcoxon(without, zero_method="pratt", method="approx").pvalue
    assert signed_rank(np.zeros(20)) == 1
    assert np.isnan(signed_rank(np.ones(5)))
    few = np.concatenate([np.zeros(100), np.full(4, 1.0), np.full(2, -1.0)])  # nearly all pairs tie
    assert signed_rank(few) > 0.3


def test_better_follows_the_direction_of_the_metric() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=50)
    scores = {
        "srd": {"fidelity": base, "stability": base},
        "gradient": {"fidelity": base + 1 + 0.1 * rng.normal(size=50), "stability": base + 1},
        "random": {"fidelity": base + rng.normal(size=50), "stability": np.full(50, np.nan)},
    }
    found = {(c.method, c.metric): c for c in comparisons(scores, "srd", 0)}
    assert found["gradient", "fidelity"].verdict == "better"
    assert found["gradient", "stability"].verdict == "worse"
    assert found["random", "fidelity"].verdict == "open"
    lost = found["random", "stability"]
    assert (lost.verdict, lost.n) == ("open", 0)
    assert np.isnan(lost.p)
    second = found["gradient", "fidelity"]  # the smallest of three times 3, this one times 2
    assert second.p_corrected == pytest.approx(2 * second.p)
    assert comparisons(scores, "gradcam", 0) == []


def test_only_images_that_both_score_are_compared() -> None:
    a, b = np.arange(20.0), np.arange(20.0) + 1
    a[3], b[5] = np.nan, np.nan
    (one,) = comparisons({"srd": {"morf": a}, "gradient": {"morf": b}}, "srd", 0)
    assert (one.n, one.difference, one.low, one.high) == (18, 1, 1, 1)


def test_equal_means_share_their_rank_and_neither_is_called_best_alone() -> None:
    scores = {
        name: {"stability": np.array([value, value])}
        for name, value in {"srd": 0.1, "gradient": 0.1, "random": 2.0, "gradcam": np.nan}.items()
    }
    assert ranks(scores) == {"stability": {"srd": 1.5, "gradient": 1.5, "random": 3}}
    _, lines = score_table(scores, ["stability"], [], 0)
    assert [line[1].strip() for line in lines] == [*["0.100 [0.100, 0.100]"] * 2, "2.000 [2.000, 2.000]", "–"]
    scores["sobel"] = scores["srd"]  # three share rank 2
    _, lines = score_table(scores, ["stability"], [], 0)
    assert not any("¹" in line[1] or "²" in line[1] for line in lines)
    scores["gradcam"] = {"stability": np.array([0.05, 0.05])}
    del scores["sobel"], scores["srd"]
    _, lines = score_table(scores, ["stability"], [], 0)
    assert [line[1][-2] for line in lines] == ["²", " ", "¹"]


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("evaluated")
    return succeed("evaluate", *SOME, *FIVE, "--no-track", "--out", str(out)), out


def test_its_scores_are_those_of_the_metrics(evaluated: tuple[str, Path]) -> None:
    text, out = evaluated
    rows = table(out / "images.csv")
    data, model = load_data("scenes"), load_model("resnet18", device="cpu")
    indices = [int(row["index"]) for row in rows if row["method"] == "srd"]
    assert len(set(indices)) == 7
    samples = [data[i] for i in indices]
    masks = [sample.mask for sample in samples if sample.mask is not None]
    x, target = torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])
    images = Images(model, x, target, indices, torch.stack(masks))
    for method in ("gradient", "srd", "gradcam", "random"):
        explained = Explained.by(EXPLAINERS[method], images)
        own = [row for row in rows if row["method"] == method]
        assert [row["name"] for row in own] == [sample.name for sample in samples]
        printed = cells(text, method)
        for k, metric in enumerate(FIVE[1].split(",")):
            expected = SCORES[metric].of(explained)
            scores = torch.tensor([float(row[metric]) for row in own], dtype=torch.float64)
            torch.testing.assert_close(scores, expected, rtol=2e-3, atol=1e-4, equal_nan=True)
            assert float(printed[1 + 3 * k]) == pytest.approx(float(expected.nanmean()), abs=1e-3)


def test_it_says_what_was_done(evaluated: tuple[str, Path]) -> None:
    text, out = evaluated
    assert text.startswith("resnet18 on scenes, 7 of 2000 images, their own class explained; accuracy ")
    assert "Localisation is scored against the objects' outlines." in text
    assert "Fidelity sets pixels to the baseline black." in text
    assert "than srd" in text
    assert "Holm's correction for 15 tests" in text
    said = "No test can settle any of 15 comparisons with 7 images: the smallest corrected p that is possible is 0.23"
    assert text.count(said) == 1
    assert "with 10 images or more" in text
    for name in ("ranks.png", "pictures.png"):
        assert (out / name).read_bytes()[1:4] == b"PNG"
    found = table(out / "comparisons.csv")
    assert {(row["method"], row["metric"]) for row in found} == {
        (method, metric) for method in ("gradient", "gradcam", "random") for metric in FIVE[1].split(",")
    }


@pytest.mark.usefixtures("unseen")
def test_its_scores_do_not_depend_on_the_batch_size(evaluated: tuple[str, Path], tmp_path: Path) -> None:
    succeed("evaluate", *SOME, *FIVE, "--batch-size", "3", "--no-track", "--out", str(tmp_path))
    for one, other in zip(table(evaluated[1] / "images.csv"), table(tmp_path / "images.csv"), strict=True):
        assert {k: one[k] for k in ("index", "method", "label")} == {
            k: other[k] for k in ("index", "method", "label")
        }
        for metric in FIVE[1].split(","):
            assert float(one[metric]) == pytest.approx(float(other[metric]), rel=5e-3, abs=1e-3)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("baseline", ["white", "mean", "minimum"])
def test_fidelity_sets_pixels_to_the_baseline_asked_for(
    baseline: str, evaluated: tuple[str, Path], tmp_path: Path
) -> None:
    command = ("evaluate", *SOME, "--metrics", "fidelity,sparseness", "--baseline", baseline, "--no-track")
    text = succeed(*command, "--out", str(tmp_path))
    assert f"Fidelity sets pixels to the baseline {baseline}." in text
    rows, black = (
        [row for row in table(out / "images.csv") if row["method"] == "srd"]
        for out in (tmp_path, evaluated[1])
    )
    assert [row["sparseness"] for row in rows] == [row["sparseness"] for row in black]
    data, model, keys = (
        load_data("scenes"),
        load_model("resnet18", device="cpu"),
        [int(r["index"]) for r in rows],
    )
    x, target = torch.stack([data[i].image for i in keys]), torch.tensor([data[i].label for i in keys])
    explained = Explained.by(EXPLAINERS["srd"], Images(model, x, target, keys))
    expected = Fidelity(baseline=baseline).of(explained).tolist()
    assert [float(row["fidelity"]) for row in rows] == pytest.approx(expected, abs=1e-4)
    assert [float(row["fidelity"]) for row in black] != pytest.approx(expected, abs=1e-2)


@pytest.mark.usefixtures("unseen")
def test_the_seed_reaches_the_metrics(evaluated: tuple[str, Path], tmp_path: Path) -> None:
    command = ("evaluate", "--methods", "srd,random", "--metrics", "sparseness,fidelity")
    for seed in ("0", "1"):
        succeed(
            *command, *on_dark_cifar(tmp_path), "--seed", seed, "--no-track", "--out", str(tmp_path / seed)
        )
    one, other = ({(r["index"], r["method"]): r for r in table(tmp_path / s / "images.csv")} for s in "01")
    for key, row in one.items():
        drawn = key[1] == "random"  # as maps are, too
        assert (row["sparseness"] != other[key]["sparseness"]) == drawn
        assert row["fidelity"] != other[key]["fidelity"] or row["fidelity"] == "nan"


def test_what_is_not_scored_is_said_without_masks_too(tmp_path: Path) -> None:
    command = ("evaluate", *on_dark_cifar(tmp_path), "--methods", "srd,gradient", "--no-track")
    text = succeed(*command, "--metrics", "fidelity,pointing_game")
    assert "No masks: localisation is not scored." in text
    assert "Not scored, of 6 images: Fidelity: 1 (all methods); Pointing game: 6 (all methods)." in text
    text = succeed(*command, "--metrics", "pointing_game", "--out", str(tmp_path / "out"))
    assert cells(text, "srd") == ["srd", "–"]
    assert not (tmp_path / "out" / "ranks.png").exists()


def on_dark_cifar(folder: Path) -> tuple[str, ...]:
    """Options: six images, the first of them black, and a network for them."""
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    images[0] = 0
    np.savez(folder / "dark.npz", images=images, labels=np.arange(6), classes=list("abcdefghij"))
    torch.manual_seed(0)
    state = {key: value.numpy() for key, value in cifar_network("resnet8", 10).state_dict().items()}
    np.savez(folder / "resnet8.npz", **state)  # type: ignore[arg-type]
    data, weights = f"cifar10:{folder / 'dark.npz'}", str(folder / "resnet8.npz")
    return ("--data", data, "--model", "resnet8", "--weights", weights, "--images", "all")


def test_a_reference_that_is_not_there_is_refused_and_the_default_missed() -> None:
    command = ("evaluate", "--no-track", "--model", "resnet18", "--images", "7", "--metrics", "sparseness")
    result = call(*command, "--methods", "gradient,sobel", "--reference", "gradcam")
    assert result.exit_code == 1
    assert "the reference gradcam is not among the methods (gradient, sobel)" in result.output
    assert "No comparisons: srd is not among the methods." in succeed(*command, "--methods", "gradient,sobel")


@pytest.mark.slow
def test_pictures_keep_their_labels_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, drawn = Experiment.run, []

    def tight(self: Experiment, model: nn.Module, items: Any, *given: Any) -> Any:
        if len(items) > 8:
            raise torch.OutOfMemoryError("too much")
        return whole(self, model, items, *given)

    monkeypatch.setattr(Experiment, "run", tight)
    sheet = render.method_sheet
    monkeypatch.setattr(render, "method_sheet", lambda rows, *said: drawn.append(rows) or sheet(rows, *said))
    succeed(
        *("evaluate", "--no-track", "--model", "resnet18", "--images", "16", "--batch-size", "16"),
        *("--methods", "sobel", "--metrics", "sparseness"),
    )
    data, (rows,) = load_data("scenes"), drawn
    assert len(rows) == PICTURES
    labels = {
        (s := data[i]).image.numpy().tobytes(): f"{s.name.rpartition('/')[2]}\n{data.classes[s.label]}"
        for i in range(len(data))
    }
    assert [row.label for row in rows] == [labels[np.asarray(row.image).tobytes()] for row in rows]


def test_methods_that_give_the_same_maps_are_counted_once() -> None:
    def table(*methods: str) -> dict[str, np.ndarray]:
        chance = np.random.default_rng(0)
        own = {"a": chance.random((2, 3, 3)), "b": chance.random((2, 3, 3))}
        maps = {f"{m}/map": own[m[0]] for m in methods}
        return maps | {f"{m}/x": np.array([0.1, np.nan if m[0] == "a" else 0.2]) for m in methods}

    names = ("a1", "b1", "a2", "a3", "b2")
    found = table(*names)
    assert twins(found, names, ["x"], "srd") == {"a2": "a1", "a3": "a1", "b2": "b1"}
    assert twins(found, names, ["x"], "a2") == {"a1": "a2", "a3": "a2", "b2": "b1"}
    found["a3/x"] = np.array([0.1, 0.1])  # equal maps of the first images, other scores further on
    assert twins(found, names, ["x"], "srd") == {"a2": "a1", "b2": "b1"}


def test_a_twin_is_left_out_of_the_tables_which_is_said(tmp_path: Path) -> None:
    methods = ("--methods", "srd,srd_low,srd_high", "--metrics", "sparseness", "--images", "7")
    text = succeed("evaluate", "--no-track", "--out", str(tmp_path / "out"), *methods, "--device", "cpu")
    assert "srd_high is left out: its maps and scores are those of srd_low here." in text
    assert not [line for line in text.splitlines() if line.startswith("srd_high  ")]
    assert "Holm's correction for 1 test)" in text


@pytest.mark.parametrize("older", [False, True])
def test_the_sheet_outlines_the_masks(older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that an older version stored have none."""
    drawn: list[Any] = []
    whole = Experiment.run

    def without(self: Experiment, *given: Any) -> Any:
        return {name: values for name, values in whole(self, *given).items() if name != "mask" or not older}

    monkeypatch.setattr(Experiment, "run", without)
    sheet = render.method_sheet
    monkeypatch.setattr(render, "method_sheet", lambda *given: drawn.append(given) or sheet(*given))
    options = ("--model", "resnet18", "--methods", "sobel", "--metrics", "sparseness", "--images", "3")
    succeed("evaluate", "--no-track", *options, "--device", "cpu")
    data, ((rows, _, outlined),) = load_data("scenes"), drawn
    assert outlined == ("" if older else "the object's outlines")
    masks = {(s := data[i]).image.numpy().tobytes(): s.mask for i in range(len(data))}
    for row in rows:
        mask = masks[np.asarray(row.image).tobytes()]
        assert mask is not None
        assert row.outline is None if older else (np.asarray(row.outline) == mask.numpy()).all()


@pytest.mark.usefixtures("unseen")
def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = (
        "evaluate",
        *SOME,
        "--metrics",
        "sparseness,deletion",
        "--batch-size",
        "3",
        "--tracking-uri",
        store,
    )
    run, count = Batcher.run, 0

    def stops(self: Batcher, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(Batcher, "run", stops)
    assert call(*command).exit_code == 1
    client = MlflowClient(store)
    (stored,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    count = -10
    text = succeed("evaluate", "--resume", stored.info.run_id, "--tracking-uri", store)
    assert count == -9  # one batch was left
    whole = succeed(*command[:-2], "--no-track")
    assert text.partition("Cost:")[0] == whole.partition("Cost:")[0]
    runs = client.search_runs([stored.info.experiment_id])
    children = {
        r.info.run_name: r.data for r in runs if r.data.tags.get("mlflow.parentRunId") == stored.info.run_id
    }
    assert set(children) == {"gradient", "srd", "gradcam", "random"}
    assert float(cells(text, "srd")[1]) == pytest.approx(children["srd"].metrics["sparseness"], abs=1e-3)
    assert children["gradcam"].params["explainer.level"] == "low"


def test_without_masks_localisation_is_not_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "test.npz"
    np.savez(
        file,
        images=rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
        labels=np.arange(4),
        classes=list("abcdefghij"),
    )
    weights = tmp_path / "resnet8.npz"
    torch.manual_seed(0)
    np.savez(weights, **{k: v.numpy() for k, v in cifar_network("resnet8", 10).state_dict().items()})  # type: ignore[arg-type]
    text = succeed(
        *(
            "evaluate",
            "--data",
            f"cifar10:{file}",
            "--model",
            "resnet8",
            "--weights",
            str(weights),
            "--no-track",
        ),
        *(
            "--methods",
            "gradient,srd_low,srd_high",
            "--metrics",
            "pointing_game,sparseness",
            "--images",
            "all",
        ),
    )
    assert "No masks: localisation is not scored." in text
    assert cells(text, "gradient")[1] == "–"
    # resnet8 ends at 8 x 8 of 32 x 32: there is no 4 x 4, and the nearest has to do
    assert "srd_high does not go with this network" not in text


def test_what_does_not_go_with_a_network_is_said_and_the_rest_is_done() -> None:
    torch.manual_seed(0)
    smooth = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    smooth.eval().requires_grad_(False)
    asked = {name: make_explainer(name) for name in ("gradient", "lrp_zplus", "gradcam")}
    why = refusals(smooth, load_data("scenes")[0].image[None], asked)
    assert list(why) == ["lrp_zplus"]
    assert "silu" in why["lrp_zplus"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "gradient,nonsense"), "'nonsense' is not one of all, gradient"),
        (("--methods", "gradcan"), "did you mean 'gradcam'?"),
        (("--metrics", "sparsness"), "did you mean 'sparseness'?"),
        (("--data", "imagefoldr:photos"), "no module imagefoldr; did you mean 'imagefolder'?"),
        (("--methods", "sobel,smoothed(nonsense,0.1)"), "unknown method 'nonsense'"),
        (("--methods", "smoothed(srd,0.1"), "cannot be read as a method"),
        (("--metrics", "beauty"), "'beauty' is not one of all, pointing_game"),
        (("--metrics", "smoothed(pcc,1)"), "'smoothed(pcc,1)' is not one of all"),
        (("--images", "0"), "is not how many"),
        (("--model", "resnet99"), "there is no network 'resnet99' for scenes"),
    ],
)
def test_wrong_settings_are_one_clear_line(arguments: tuple[str, ...], said: str) -> None:
    result = call("evaluate", *arguments, "--no-track")
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())


def test_a_wrapped_method_is_a_method_everywhere(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name has commas, and characters that MLflow refuses in the name of a metric."""
    monkeypatch.chdir(tmp_path)
    name = "smoothed(gradient,0.1,2)"
    options = ("--metrics", "sparseness", "--images", "2", "--reference", name, "--device", "cpu")
    assert name in succeed("evaluate", "--methods", f"sobel,{name}", *options)
    methods = ("--model", "vgg16", "--methods", f"srd,{name}")
    succeed("explain", str(pictures[0]), *methods, "--out", "out", "--device", "cpu")
    x = load_data("scenes")[0].image[None]
    expected = make_explainer(name).explain(load_model("vgg16", device="cpu"), x)[0]
    np.testing.assert_allclose(np.load(f"out/photo/{name}.npy"), expected.numpy(), atol=1e-6)


# --- explain ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = []
    for k, mode in enumerate(("RGB", "L")):
        image = Image.fromarray((255 * load_data("scenes")[k].image.permute(1, 2, 0)).round().byte().numpy())
        (tmp_path / str(k)).mkdir()
        files.append(tmp_path / str(k) / "photo.png")
        image.convert(mode).save(files[-1])
    return files


def test_explain_writes_the_maps_of_the_methods(pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = succeed(
        "explain", *map(str, pictures), "--methods", "srd,gradcam", "--out", str(out), "--device", "cpu"
    )
    model, x = load_model("vgg16_8x8", device="cpu"), load_data("scenes")[0].image[None]
    for method in ("srd", "gradcam"):
        stored = np.load(out / "photo" / f"{method}.npy")
        np.testing.assert_allclose(stored, EXPLAINERS[method].explain(model, x)[0].numpy(), atol=1e-6)
        with Image.open(out / "photo-2" / f"{method}.png") as overlay:
            assert overlay.width > overlay.height > 400, "photograph and overlay, side by side"
    assert (out / "contact_sheet.png").read_bytes()[1:4] == b"PNG"
    top = torch.softmax(model(x).double(), 1)[0].topk(5)
    classes = load_data("scenes").classes
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class"))
    shown = [line.split() for line in lines[first + 2 : first + 7]]
    assert shown == [
        [classes[int(i)], f"{float(p):.3f}", str(int(i))]
        for p, i in zip(top.values, top.indices, strict=True)
    ]


def test_explain_says_in_every_figure_what_it_shows(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    sheets: list[Any] = []
    one, sheet = render.explanation, render.method_sheet
    monkeypatch.setattr(render, "explanation", lambda *given: figures.append(one(*given)) or figures[-1])
    monkeypatch.setattr(render, "method_sheet", lambda *given: sheets.append(sheet(*given)) or sheets[-1])
    options = ("--target", "ring", "--methods", "srd,gradcam", "--overlay", "contour", "--share", "0.2")
    text = succeed("explain", str(pictures[0]), *options, "--out", str(tmp_path / "out"), "--device", "cpu")
    said = re.search(r"ring, probability 0\.\d{3}", text)
    assert said is not None
    for figure, method in zip(figures, ("srd", "gradcam"), strict=True):
        words = " ".join(part.get_text() for part in figure.texts).replace("\n", " ")
        assert f"{method} {said[0]}" in words
        assert "20% of the relevance" in words
    words = " ".join(part.get_text() for part in sheets[0].texts).replace("\n", " ")
    for part in (
        "photo.png ring probability 0.",
        "srd",
        "gradcam",
        "vgg16_8x8: 1 picture",
        "for the class",
    ):
        assert part in words
    assert "1 pictures" not in words


def test_explain_splits_the_sheet_of_many_pictures(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "explanation", lambda *given: Figure(figsize=(1, 1)))
    monkeypatch.setattr(
        render, "method_sheet", lambda rows, title: titles.append(title) or Figure(figsize=(1, 1))
    )
    titles: list[str] = []
    files = []
    for k in range(31):
        files.append(tmp_path / f"{k}.png")
        files[-1].write_bytes(pictures[0].read_bytes())
    out = tmp_path / "out"
    options = ("--methods", "sobel", "--out", str(out), "--device", "cpu", "--figure-format", "svg")
    out.mkdir()
    (out / "contact_sheet-2.svg").write_text("mine")
    refused = call("explain", *map(str, files), *options)
    assert f"{out / 'contact_sheet-2.svg'} would be overwritten" in refused.output
    assert "explained for" not in refused.output
    (out / "contact_sheet-2.svg").unlink()
    text = succeed("explain", *map(str, files), *options)
    sheets = [f"contact_sheet{page}.{kind}" for page in ("", "-2") for kind in ("png", "svg")]
    assert f"written: {', '.join(str(out / sheet) for sheet in sheets)}, and" in text
    assert {file.name for file in out.iterdir() if file.is_file()} == set(sheets)
    assert titles == [f"vgg16_8x8: 31 pictures, sheet {k} of 2" for k in (1, 2)]


def test_the_sheet_has_the_probability_of_every_target(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    monkeypatch.setattr(render, "explanation", lambda *given: Figure(figsize=(1, 1)))
    monkeypatch.setattr(
        render, "method_sheet", lambda page, title: rows.extend(page) or Figure(figsize=(1, 1))
    )
    options = ("--target", "ring", "--target", "star", "--out", str(tmp_path / "out"), "--device", "cpu")
    succeed("explain", str(pictures[0]), *options)
    assert re.fullmatch(r"photo\.png\nring: 0\.\d{3}\nstar: [01]\.\d{3}", rows[0].label)


def test_explain_computes_in_full_precision(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    succeed("explain", str(pictures[0]), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_explain_takes_a_class_by_name_or_number(pictures: list[Path], tmp_path: Path) -> None:
    found = []
    for target in ("ring", str(load_data("scenes").classes.index("ring"))):
        out = tmp_path / target
        text = succeed("explain", str(pictures[0]), "--target", target, "--out", str(out), "--device", "cpu")
        assert "explained for ring, probability" in text
        found.append(np.load(out / "photo" / "srd.npy"))
    assert np.array_equal(*found)
    other = EXPLAINERS["srd"].explain(
        load_model("vgg16_8x8", device="cpu"), load_data("scenes")[0].image[None]
    )[0]
    assert not np.allclose(found[0], other.numpy())


def explained(file: Path, out: Path, *more: str) -> dict[str, np.ndarray]:
    """Name -> raw map of what ``explain`` writes for a picture; each has its overlay."""
    succeed("explain", str(file), *more, "--out", str(out), "--device", "cpu")
    found = {map_.stem: np.load(map_) for map_ in (out / file.stem).glob("*.npy")}
    assert sorted(found) == sorted(overlay.stem for overlay in (out / file.stem).glob("*.png"))
    return found


def test_several_targets_give_a_map_per_class_side_by_side(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    sheet = render.method_sheet
    monkeypatch.setattr(render, "method_sheet", lambda rows, *said: drawn.append(rows) or sheet(rows, *said))
    methods = ("--methods", "srd,gradcam")
    ring = str(load_data("scenes").classes.index("ring"))
    twice = ("--target", "ring", "--target", "star", "--target", ring)  # one class by name and by number
    both = explained(pictures[0], tmp_path / "both", *methods, *twice)
    assert sorted(both) == ["gradcam-ring", "gradcam-star", "srd-ring", "srd-star"]
    assert list(drawn[0][0].maps) == [
        "srd: ring",
        "srd: star",
        "gradcam: ring",
        "gradcam: star",
    ]
    assert drawn[0][0].label.splitlines()[0] == "photo.png"
    assert [line.split(":")[0] for line in drawn[0][0].label.splitlines()[1:]] == ["ring", "star"]
    for name in ("ring", "star"):
        alone = explained(pictures[0], tmp_path / name, *methods, "--target", name)
        assert sorted(alone) == ["gradcam", "srd"]
        for method, map_ in alone.items():
            assert np.array_equal(map_, both[f"{method}-{name}"])
    assert not np.array_equal(both["srd-ring"], both["srd-star"])
    one = explained(pictures[0], tmp_path / "one", "--target", "ring", "--target", ring)
    assert sorted(one) == ["srd"], "the same class twice is one class"
    text = succeed("explain", str(pictures[0]), *twice, "--out", str(tmp_path / "said"), "--device", "cpu")
    assert "photo.png: explained for ring, probability 0." in text.splitlines()[0]
    assert "; star, probability 0." in text.splitlines()[0]


def test_a_wrong_target_among_several_is_one_line(pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--target", "ring", "--target", "unicorn", "--out", str(out), "--device", "cpu")
    result = call("explain", str(pictures[0]), *options)
    assert result.exit_code == 1
    assert "no class is called 'unicorn'" in result.output
    near = call(
        "explain", str(pictures[0]), "--target", "rign", "--out", str(tmp_path / "out"), "--device", "cpu"
    )
    assert "did you mean 'ring'?" in near.output
    assert not out.exists()


def test_labels_of_classes_are_unambiguous_and_names_of_files() -> None:
    for classes in (
        Classes.of("imagenet", 1000),
        Classes(["a/b", "A B", "a", "a 1", "...", "\u00c4pfel", "", "c" * 300]),
    ):
        indices = range(len(classes.names))
        files = [classes.file_label(i) for i in indices]
        assert len({file.casefold() for file in files}) == len(files) == len(set(map(classes.label, indices)))
        for file in files:
            assert re.fullmatch(r"[^\W_](?:[\w-]*\w)?", file)
            assert len(file.encode()) < 100
    classes = Classes.of("imagenet", 1000)
    assert (classes.file_label(281), classes.file_label(2)) == ("tabby", "great-white-shark")
    assert (classes.file_label(264), classes.label(474)) == ("Cardigan-264", "cardigan (474)")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("taken", ["contact_sheet.png", "photo/srd.npy", "photo-2/srd.png"])
def test_explain_overwrites_nothing(pictures: list[Path], tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    (out / taken).parent.mkdir(parents=True)
    (out / taken).write_text("mine")
    result = call("explain", *map(str, pictures), "--out", str(out), "--device", "cpu")
    assert result.exit_code == 1
    assert f"{out / taken} would be overwritten; give another --out" in result.output
    assert "explained for" not in result.output, "it is said before any work"
    assert contents(out) == {taken: b"mine"}
    (out / taken).rename(out / "notes.txt")
    succeed("explain", *map(str, pictures), "--out", str(out), "--device", "cpu")
    assert contents(out)["notes.txt"] == b"mine"


def test_without_out_every_call_gets_a_folder_of_its_own(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "written: explanations/contact_sheet.png" in succeed(
        "explain", str(pictures[0]), "--device", "cpu"
    )
    before = contents(Path("explanations"))
    said = succeed("explain", str(pictures[0]), "--target", "star", "--device", "cpu")
    assert "written: explanations-2/contact_sheet.png" in said
    assert contents(Path("explanations")) == before
    assert set(contents(Path("explanations-2"))) == set(before)


def test_what_another_process_wrote_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    write_new(tmp_path / "new" / "a", b"mine")
    with pytest.raises(BadValue, match=r"has been written by somebody else meanwhile"):
        write_new(tmp_path / "new" / "a", b"other")
    assert (tmp_path / "new" / "a").read_bytes() == b"mine"


def test_pictures_called_as_the_sheet_get_folders_of_another_name(
    pictures: list[Path], tmp_path: Path
) -> None:
    file = pictures[0].rename(tmp_path / "contact_sheet.png.png")
    succeed("explain", str(file), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert (tmp_path / "out" / "contact_sheet.png-2" / "srd.npy").is_file()


def test_classes_of_imagenet_by_index_name_and_wnid() -> None:
    classes = Classes.of("imagenet", 1000)
    assert classes.index("281") == classes.index("n02123045") == classes.index("Tabby") == 281
    assert classes.name(281) == "tabby (n02123045)"
    with pytest.raises(
        SrdLabError, match=r"'shark' may be .*tiger shark \(3\).*; give the index in brackets"
    ):
        classes.index("shark")
    with pytest.raises(BadValue, match=r"no class is called 'unicorn'.*WordNet number"):
        classes.index("unicorn")
    with pytest.raises(BadValue, match=r"there is no class 1000; the network has 0\.\.999"):
        classes.index("1000")


def test_explain_leaves_a_bad_picture_out_and_does_the_others(pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    out = tmp_path / "out"
    result = call(
        "explain", str(pictures[0]), str(bad), str(pictures[1]), "--out", str(out), "--device", "cpu"
    )
    assert result.exit_code == 0
    assert f"left out: {bad} cannot be used: cannot be decoded: no image" in result.output
    assert {path.name for path in out.iterdir()} == {"contact_sheet.png", "photo", "photo-2"}


@pytest.mark.parametrize("name", ["...jpg", "....png", ". .jpg"])
def test_no_name_of_a_file_leads_out_of_the_folder(name: str, pictures: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "in" / name
    odd.parent.mkdir()
    odd.write_bytes(pictures[0].read_bytes())
    before = sorted(tmp_path.iterdir())
    succeed("explain", str(odd), "--out", str(tmp_path / "in" / "out"), "--device", "cpu")
    assert sorted(tmp_path.iterdir()) == before
    assert sorted(path.name for path in (tmp_path / "in" / "out").iterdir()) == [
        "contact_sheet.png",
        "picture",
    ]


def test_explain_names_what_is_no_picture(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no picture")
    result = call("explain", str(file), "--device", "cpu", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "notes.txt cannot be used: cannot be decoded: no image" in result.output
    assert not (tmp_path / "out").exists()


def test_methods_lists_everything() -> None:
    lines = succeed("methods").splitlines()
    starts = [line.split()[0] for line in lines if line]
    assert [name for name in starts if name in METHODS and name not in METRICS] == list(METHODS)
    assert [name for name in starts if name in METRICS] == list(METRICS)


def test_the_reference_is_what_others_are_held_against(tmp_path: Path) -> None:
    command = ("evaluate", *SOME, "--metrics", "sparseness", "--reference", "gradcam", "--no-track", "--out")
    text = succeed(*command, str(tmp_path))
    assert "than gradcam" in text
    scores: dict[str, Tensor] = {}
    for row in table(tmp_path / "images.csv"):
        scores.setdefault(row["method"], []).append(float(row["sparseness"]))  # type: ignore[attr-defined]
    row = next(r for r in table(tmp_path / "comparisons.csv") if r["method"] == "srd")
    difference = np.array(scores["srd"]) - np.array(scores["gradcam"])
    assert float(row["difference"]) == pytest.approx(difference.mean())
    assert float(row["p"]) == pytest.approx(signed_rank(difference))


# --- Table 2 and Table 4 ------------------------------------------------------------------------------------------------


def test_table_2_stands_beside_the_papers(tmp_path: Path) -> None:
    command = (
        "reproduce",
        "table2",
        "--model",
        "resnet18",
        "--model",
        "resnet50",
        "--images",
        "4",
        "--methods",
        "srd_high,gradient,gradcam",
        "--no-track",
    )
    text = succeed(*command, "--out", str(tmp_path))
    report = text[text.index("Table 2 of the paper on scenes, 4 images") :]
    assert "- data: scenes with outlines, not ImageNet-S50 with segmentation masks" in report
    assert "- images: 4, not 752" in report
    assert "- networks that the paper does not have: resnet18" in report
    left_out = [method for method in TABLE_2 if method not in ("gradient", "gradcam", "srd_high")]
    assert f"- methods left out: {', '.join(left_out)}\n" in report
    found = {row["what"]: row for row in table(tmp_path / "findings.csv")}
    assert len(found) == 3 * 5  # the paper has resnet50 alone
    inside = sum(row["verdict"] == "inside" for row in found.values())
    assert f"{inside} of the paper's 15 values lie inside" in report
    rows = table(tmp_path / "resnet50" / "images.csv")
    for metric in ("sparseness", "stability"):
        scores = [float(row[metric]) for row in rows if row["method"] == "srd_high"]
        one = found[f"resnet50: {metric} of srd_high"]
        assert float(one["measured"]) == pytest.approx(np.mean(scores))
        assert float(one["paper"]) == paper()["table2"]["resnet50"]["srd_high"][metric]
        assert (float(one["low"]) <= float(one["paper"]) <= float(one["high"])) == (
            one["verdict"] == "inside"
        )
    block = report[report.index("\nresnet50 ") :]
    means = [
        np.nanmean([float(row["sparseness"]) for row in rows if row["method"] == method])
        for method in ("gradient", "gradcam", "srd_high")
    ]
    correlation = spearmanr(means, [0.488, 0.411, 0.628]).statistic
    assert cells(block, "rank correlation")[4] == f"{correlation:.2f}"


@pytest.mark.usefixtures("unseen")
def test_table_4_goes_by_the_networks_activation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(6), classes=list("abcdefghij"))
    given: list[str] = []
    for name in ("resnet8", "resnet8_elu"):
        torch.manual_seed(0)
        state = cifar_network(name, 10).state_dict()
        np.savez(tmp_path / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})  # type: ignore[arg-type]
        given += ["--model", name, "--weights", f"{name}={tmp_path / name}.npz"]
    data = f"cifar10:{tmp_path / 'test.npz'}"
    text = succeed(
        *("reproduce", "table4", "--data", data, *given, "--methods", "srd,grad_input,lrp_zplus"),
        *("--baseline", "mean", "--no-track", "--out", str(tmp_path / "out")),
    )
    assert "- the 0 that fidelity sets pixels to: mean here, not stated in the paper" in text
    found = {row["what"]: row for row in table(tmp_path / "out" / "findings.csv")}
    assert {what: row["paper"] for what, row in found.items()} == {
        "resnet8: fidelity of grad_input": "-0.01",
        "resnet8: fidelity of lrp_zplus": "0.039",
        "resnet8: fidelity of srd": "0.078",
        "resnet8_elu: fidelity of grad_input": "-0.007",
        "resnet8_elu: fidelity of srd": "0.214",
    }
    report = text[text.index("Table 4 of the paper on cifar10") :]
    assert cells(report, "lrp_zplus")[-1] == "–"
    assert "- resnet8_elu: without lrp_zplus: " in report
    assert cells(report, "accuracy")[2::2] == ["(0.780)", "(0.746)"]
    assert "- networks that the paper does not have: resnet8, resnet8_elu" in report


def test_table_4_wants_networks() -> None:
    result = call("reproduce", "table4", "--no-track")
    assert result.exit_code == 1
    assert (
        "Table 4 has no network for this data; give --data cifar100:PATH, and --model NAME" in result.output
    )


@pytest.mark.usefixtures("unseen")
def test_one_image_is_too_few_for_the_papers_values(tmp_path: Path) -> None:
    command = ("reproduce", "table2", "--no-track", "--images", "1", "--methods", "srd,gradient")
    text = succeed(*command, "--model", "vgg16", "--out", str(tmp_path))
    assert "Too few images for intervals to hold the paper's values against." in text
    assert {row["verdict"] for row in table(tmp_path / "findings.csv")} == {"too few"}
    assert "nan" not in text
    assert "no value and no claim" in succeed(*command, "--model", "resnet18")


@pytest.mark.parametrize("name", ["resnet8_elu", "resnet20_leaky_relu", "resnet18_3x3_tanh", "resnet14"])
def test_cifar_networks_have_the_activation_of_their_name(name: str) -> None:
    network = cifar_network(name, 10)
    kinds = {type(module) for module in network.modules()} & {nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Tanh}
    wanted = {"resnet8_elu": nn.ELU, "resnet20_leaky_relu": nn.LeakyReLU, "resnet18_3x3_tanh": nn.Tanh}
    assert kinds == {wanted.get(name, nn.ReLU)}
    network.eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    kind = {"resnet8_elu": "elu", "resnet20_leaky_relu": "leaky_relu", "resnet18_3x3_tanh": "tanh"}
    assert activation_of(name) == kind.get(name, "relu")


def test_the_papers_tables_2_and_4_are_those_of_the_source() -> None:
    source = Path(__file__).parents[2] / "shared" / "paper" / "tables.json"
    if not source.is_file():
        pytest.skip("shared/paper/tables.json, which the tables are checked against, is not here")
    tables = json.loads(source.read_text())
    rows = list(tables["table2"].values())
    for network in ("vgg16", "resnet50"):
        assert list(paper()["table2"][network].values()) == [row[network] for row in rows]
    assert list(paper()["table2"]["vgg16"]) == list(TABLE_2)
    assert [list(v.values()) for v in paper()["table4"]["fidelity"].values()] == [
        list(v.values()) for v in tables["table4"]["fidelity"].values()
    ]
    assert list(paper()["table4"]["accuracy"].values()) == list(tables["table4"]["accuracy"].values())
