"""Studies from Python: on live objects as by name, with results that show and keep themselves."""

from __future__ import annotations

import csv
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import command
from torch import nn

import srd_lab
from srd_lab import Preprocessing, load_data, load_model
from srd_lab.errors import BadRun, BadValue
from srd_lab.models.scenes import SCENES_PREPROCESSING

FEW: dict[str, Any] = {"images": 5, "batch_size": 5, "device": "cpu"}


class First:
    """The first of the scenes, as a data set of pairs."""

    def __init__(self, count: int) -> None:
        self.data = load_data("scenes")
        self.classes, self.labels = self.data.classes, self.data.labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[Any, int]:
        sample = self.data[k]
        return sample.image, sample.label


def as_rows(result: srd_lab.api.Result) -> list[dict[str, Any]]:  # type: ignore[name-defined]
    table = result.table()
    return table if isinstance(table, list) else table.to_dict("records")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model("vgg16", device="cpu")


def test_a_live_network_is_scored_as_by_name_and_left_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    network = model.network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    chosen: dict[str, Any] = {"methods": ["srd", "gradient"], "metrics": ["sparseness"]}
    live = srd_lab.evaluate(network, "scenes", **chosen, **FEW, preprocessing=SCENES_PREPROCESSING)
    named = srd_lab.evaluate("vgg16", **chosen, **FEW)
    options = (
        "--images",
        "5",
        "--batch-size",
        "5",
        "--device",
        "cpu",
        "--no-track",
        "--out",
        str(tmp_path / "out"),
    )
    assert (
        command(
            "evaluate", "--model", "vgg16", "--methods", "srd,gradient", "--metrics", "sparseness", *options
        ).exit_code
        == 0
    )
    with (tmp_path / "out" / "images.csv").open(newline="") as lines:
        expected = list(csv.DictReader(lines))
    for found in (live, named):
        rows = as_rows(found)
        assert [float(row["sparseness"]) for row in rows] == [float(row["sparseness"]) for row in expected]
    assert network.training
    network.eval()
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_a_live_data_set(model: nn.Module) -> None:
    options: dict[str, Any] = {
        "methods": ["gradient"],
        "metrics": ["pointing_game"],
        "images": "all",
        "size": 64,
    }
    found = srd_lab.evaluate(model, First(6), **options, device="cpu", batch_size=6)
    rows = as_rows(found)
    assert [row["name"].rpartition("/")[2] for row in rows] == list("012345")
    ours = srd_lab.evaluate(
        model, load_data("scenes", limit=6), **options | {"size": None}, device="cpu", batch_size=6
    )
    assert [int(row["predicted"]) for row in rows] == [int(row["predicted"]) for row in as_rows(ours)]


def test_patterns_of_a_live_network(model: nn.Module) -> None:
    found = srd_lab.apop(model, images=6, device="cpu", binarize=False, inputs=("zeros",))
    assert "live:" not in found.summary
    assert len(as_rows(found)) == 6


def test_an_attack_has_a_row_per_image(model: nn.Module) -> None:
    x = torch.stack([load_data("scenes")[k].image for k in (0, 1)])
    found = srd_lab.attack(model, x, method="grad_input", members=("combined",))
    rows = as_rows(found)
    assert [int(row["image"]) for row in rows] == [0, 1]
    assert all(-1 <= float(row["pcc"]) < 0.6 for row in rows)
    assert all(row["by"] == "combined" for row in rows)
    assert found.images["pcc"].shape == x.shape
    assert (found.images["pcc"] - x).abs().max() <= 8.01 / 255
    assert "grad_input under combined; " in found.summary
    other = srd_lab.attack(model, x[:1], 3, "sobel", members=("combined",))
    assert (
        "by gradients" in other.summary or "no gradient" in other.summary or as_rows(other)[0]["class"] == 3
    )


def test_a_result_shows_and_keeps_itself(model: nn.Module, tmp_path: Path) -> None:
    found = srd_lab.evaluate(model, methods=["gradient"], metrics=["sparseness"], **FEW)
    assert str(found) == found.summary
    assert found._repr_html_().startswith("<h2>SmallVGG on scenes, 5 of 2000 images")
    assert {file.name for file in found.plot()} >= {"pictures.png"}
    saved = found.save(tmp_path / "kept")
    assert (saved / "summary.txt").read_text().split() == found.summary.split()
    with pytest.raises(BadValue, match="kept exists already; give the name of a new folder"):
        found.save(tmp_path / "kept")
    folder = found.folder
    del found
    gc.collect()
    assert not folder.exists()
    assert (saved / "images.csv").is_file()


def test_results_are_logged_into_the_active_run(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names that the tracked command gives them; the user's run stays open, and what is the user's stays."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    result = srd_lab.evaluate("vgg16", methods=["gradient"], metrics=["sparseness"], images=2, device="cpu")
    options = ("--method", "gradient", "--metrics", "sparseness", "--images", "2", "--device", "cpu")
    assert (
        command(
            "evaluate", "--model", "vgg16", *options, "--tracking-uri", f"sqlite:///{tmp_path}/theirs.db"
        ).exit_code
        == 0
    )
    theirs = mlflow.MlflowClient(f"sqlite:///{tmp_path}/theirs.db")
    tracked = theirs.search_runs([each.experiment_id for each in theirs.search_experiments()])
    child, parent = sorted(tracked, key=lambda run: len(run.data.params))
    with pytest.raises(BadRun, match=r"no MLflow run is active; log inside `with mlflow.start_run\(\):`"):
        result.log()
    with mlflow.start_run() as active:
        mlflow.log_param("mine", 3)
        assert result.log() == active.info.run_id
        attacked = srd_lab.attack(model, torch.rand(2, 3, 64, 64), method="gradient", members=["combined"])
        attacked.log("attack")
        mlflow.log_metric("mine_too", 1)
    found = mlflow.get_run(active.info.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["mine"] == "3"
    about = {"git_commit", "device", "hardware", "weights_sha256", "preprocessing"}
    for name in set(parent.data.params) - about:
        if name in found.data.params:
            assert found.data.params[name] == parent.data.params[name]
    assert {"methods", "images", "seed"} <= set(found.data.params)
    assert {f"gradient/{name}" for name in child.data.metrics} | set(parent.data.metrics) <= set(
        found.data.metrics
    )
    assert found.data.metrics["gradient/sparseness"] == child.data.metrics["sparseness"]
    assert found.data.metrics["attack/worst_pcc"] == pytest.approx(
        np.mean([float(r["pcc"]) for r in as_rows(attacked)]), abs=1e-5
    )
    files = {file.path for file in mlflow.MlflowClient().list_artifacts(active.info.run_id)}
    of_commands = {"notes.txt", "command.txt", "run.toml"}
    assert {file.path for file in theirs.list_artifacts(parent.info.run_id)} - of_commands <= files
    with mlflow.start_run():
        mlflow.log_param("seed", 7)
        with pytest.raises(BadRun, match="was made with seed = 7, not 0"):
            result.log()
        assert not mlflow.MlflowClient().list_artifacts(mlflow.active_run().info.run_id)
        result.log(prefix="first")


def test_wrong_arguments_are_one_line(model: nn.Module) -> None:
    with pytest.raises(BadValue, match="live:list-1 gives a list; expected a torch"):
        srd_lab.evaluate([1, 2], **FEW)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="unknown method 'nothing'"):
        srd_lab.evaluate(model, methods=["nothing"], **FEW)
    with pytest.raises(BadValue, match="live:gone-1 is no object of this process"):
        load_model("live:gone-1")
    with pytest.raises(TypeError):
        srd_lab.evaluate(model, nothing=3)
    assert isinstance(Preprocessing(), Preprocessing)
