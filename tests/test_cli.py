"""The command line as a user meets it: tiny runs, wrong input, interruption and resumption, what MLflow then holds."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from attacks import study
from srd_lab.cli import main

TINY = ("attack", "--pairs", "4", "--steps", "3", "--batch-size", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def run_id(store: str, name: str = "attack vgg16", latest: int = 0) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments, f"attributes.run_name = '{name}'", order_by=["attributes.start_time DESC"]
    )
    return runs[latest].info.run_id


def children(store: str, parent: str) -> dict[str, object]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_name: run for run in found}


def pair_rows(store: str, run: str) -> list[dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    path = client.download_artifacts(run, "pairs.csv")
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


@pytest.fixture(scope="module")
def finished(store: str) -> str:
    """An uninterrupted run of two methods; its id."""
    result = call(*TINY, "--method", "srd", "--method", "gradient", "--tracking-uri", store)
    assert result.exit_code == 0, result.output
    assert "srd " in result.output
    assert "gradient " in result.output
    return run_id(store)


def test_a_run_holds_settings_scores_pairs_and_figures(store: str, finished: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    parent = client.get_run(finished)
    assert parent.info.status == "FINISHED"
    params = parent.data.params
    wanted = {
        "methods": "srd,gradient",
        "pairs": "4",
        "steps": "3",
        "seed": "0",
        "data": "scenes",
        "bound": "8.0",
    }
    assert wanted.items() <= params.items()
    assert {"torch", "git_commit"} <= {key.rpartition(".")[2] for key in params}, params
    assert {f.path for f in client.list_artifacts(finished)} >= {
        "scores.png",
        "scores_over_mse.png",
        "summary.txt",
    }
    for child in children(store, finished).values():
        metrics = child.data.metrics
        rows = pair_rows(store, child.info.run_id)
        assert [int(row["pair"]) for row in rows] == [0, 1, 2, 3]
        for name in ("ssim", "pcc", "ssim_target", "pcc_target", "mse", "linf"):
            assert metrics[name] == pytest.approx(np.mean([float(row[name]) for row in rows]), rel=1e-5)
        assert metrics["prediction_kept"] == np.mean([row["prediction_kept"] == "True" for row in rows])
        assert 0 < metrics["mse"] < 1e-3
        assert len(client.get_metric_history(child.info.run_id, "loss")) == 3
        assert {f.path for f in client.list_artifacts(child.info.run_id)} >= {
            "pairs.csv",
            "pictures.png",
            "batches",
        }


def test_every_method_attacks_the_same_pairs(store: str, finished: str) -> None:
    srd, gradient = (pair_rows(store, run.info.run_id) for run in children(store, finished).values())
    assert [(r["original"], r["goal"]) for r in srd] == [(r["original"], r["goal"]) for r in gradient]
    assert all(r["label"] != r["goal_label"] for r in srd)
    assert len({name for r in srd for name in (r["original"], r["goal"])}) == 8


def test_resume_ends_with_the_numbers_of_an_uninterrupted_run(
    store: str, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    whole = study.attack_batch
    calls = []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(study, "attack_batch", interrupted)
    result = call(*TINY, "--method", "srd", "--method", "gradient", "--tracking-uri", store)
    stopped = run_id(store)
    assert result.exit_code == 1
    assert f"srd-lab attack --resume {stopped}" in result.output
    assert MlflowClient(store).get_run(stopped).info.status == "KILLED"

    monkeypatch.setattr(study, "attack_batch", whole)
    result = call("attack", "--resume", stopped, "--tracking-uri", store, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert MlflowClient(store).get_run(stopped).info.status == "FINISHED"
    resumed, reference = children(store, stopped), children(store, finished)
    assert set(resumed) == set(reference) == {"srd", "gradient"}
    for method, run in resumed.items():
        assert pair_rows(store, run.info.run_id) == pair_rows(store, reference[method].info.run_id)
        timeless = [
            {k: v for k, v in r.data.metrics.items() if k != "seconds"} for r in (run, reference[method])
        ]
        assert timeless[0] == timeless[1]


def test_resume_refuses_other_settings(store: str, finished: str) -> None:
    result = call("attack", "--resume", finished, "--pairs", "9", "--tracking-uri", store)
    assert result.exit_code == 1
    assert "pairs" in result.output


def test_resume_of_an_unknown_run(store: str) -> None:
    result = call("attack", "--resume", "0123456789abcdef", "--tracking-uri", store)
    assert result.exit_code == 1
    assert "0123456789abcdef" in result.output
    assert "Traceback" not in result.output


def test_without_tracking_files_go_to_the_folder(tmp_path: Path) -> None:
    result = call(*TINY, "--method", "lrp_zplus", "--no-track", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"pairs.csv", "pictures.png", "scores.png", "summary.txt", "run.json"} <= names
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["params"]["methods"] == "lrp_zplus"


def test_the_batch_size_does_not_change_the_numbers(tmp_path: Path) -> None:
    scores = []
    for size in ("1", "4"):
        out = tmp_path / size
        arguments = [*TINY, "--method", "srd", "--batch-size", size, "--no-track", "--out", str(out)]
        assert call(*arguments).exit_code == 0
        (table,) = out.rglob("pairs.csv")
        rows = csv.DictReader(table.read_text().splitlines())
        scores.append([[float(row[name]) for name in ("ssim", "pcc", "mse", "ssim_noise")] for row in rows])
    np.testing.assert_allclose(scores[0], scores[1], rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("attack", "--method", "lime"), 2, "lime"),
        (("attack", "--pairs", "0"), 2, "--pairs"),
        (("attack", "--weights", "nowhere.pth"), 2, "nowhere.pth"),
        (("attack", "--model", "alexnet", "--no-track"), 1, "vgg16"),
        (("attack", "--data", "imagenet:nowhere", "--no-track"), 1, "nowhere"),
        (("attack", "--data", "mnist", "--no-track"), 1, "scenes"),
        (("attack", "--device", "cuda:99", "--no-track"), 1, "--device"),
        (("attack", "--pairs", "5000", "--no-track"), 1, "--pairs"),
        (("attack", "--resume", "x", "--no-track"), 1, "resume"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_wrong_input_gets_one_clear_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
    assert code == 2 or len(result.output.strip().splitlines()[-1:]) == 1


def test_debug_shows_the_traceback() -> None:
    result = call("--debug", "attack", "--data", "mnist", "--no-track")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "SrdLabError"


def test_models_prints_a_card_for_each_bundled_network() -> None:
    result = call("models")
    assert result.exit_code == 0
    for name in ("vgg16", "resnet18", "resnet50"):
        assert f"train_scenes.py {name}" in result.output


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, srd_lab.cli; print(sorted({'torch', 'mlflow', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
