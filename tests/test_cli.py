"""The command line as a user meets it: tiny runs, wrong input, interruption and resumption, what MLflow then holds."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from attacks import manipulation_study as study
from attacks.settings import ManipulationSettings
from srd_lab.cli.main import main
from srd_lab.data import load_data, scenes
from srd_lab.data.draw import draw_pairs
from srd_lab.errors import BadValue
from srd_lab.methods.gradient import Gradient
from srd_lab.models import WEIGHTS, load_model
from srd_lab.runs import environment
from srd_lab.runtime import Batcher
from srd_lab.types import Sample

TINY = ("attack", "--attack", "eq10", "--pairs", "4", "--steps", "3", "--batch-size", "2", "--device", "cpu")
ONE_PAIR = (
    "attack",
    "--attack",
    "eq10",
    *["--pairs", "1", "--steps", "1", "--method", "gradient", "--device", "cpu"],
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def run_id(store: str, command: str = "attack") -> str:
    """The newest run of a command."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments, f"tags.`srd_lab.command` = '{command}'", order_by=["attributes.start_time DESC"]
    )
    return next(run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags)


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


def files(store: str, run: str) -> dict[str, Path]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    found = (f.path for f in client.list_artifacts(run) if not f.is_dir)
    return {path: Path(client.download_artifacts(run, path)) for path in found}


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
        assert child.data.params["weights_sha256"] == params["weights_sha256"]
        metrics = child.data.metrics
        rows = pair_rows(store, child.info.run_id)
        assert [int(row["pair"]) for row in rows] == [0, 1, 2, 3]
        for name in ("ssim", "pcc", "ssim_target", "pcc_target", "mse", "linf"):
            known_as = f"eq10_{name}" if name.startswith(("pcc", "ssim")) else name
            assert metrics[known_as] == pytest.approx(np.mean([float(row[name]) for row in rows]), rel=1e-5)
        assert metrics["prediction_kept"] == np.mean([row["prediction_kept"] == "True" for row in rows])
        assert 0 < metrics["mse"] < 1e-3
        assert len(client.get_metric_history(child.info.run_id, "over_steps/loss")) == 3
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


def interrupt_the_second_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = study.attack_batch, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(study, "attack_batch", interrupted)


@pytest.mark.usefixtures("unseen")
def test_resume_ends_with_the_numbers_of_an_uninterrupted_run(
    store: str, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    whole = study.attack_batch
    interrupt_the_second_batch(monkeypatch)
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


@pytest.mark.usefixtures("unseen")
@pytest.mark.slow
def test_a_resumed_run_says_what_has_changed_since(
    store: str, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = ("attack", "--resume", finished, "--tracking-uri", store, "--device", "cpu")
    assert "Note: resumed with" not in call(*resume).output
    assert "notes.txt" not in files(store, finished)
    monkeypatch.setattr(environment, "git_commit", lambda: "0123")
    for version in ("98.0", "99.0"):
        monkeypatch.setattr(environment.platform, "python_version", lambda version=version: version)
        result = call(*resume)
        assert result.exit_code == 0
        assert "Note: resumed with " in result.stderr
        assert f"-> {version}" in result.stderr
        assert "-> 0123" in result.stderr
    first, second = files(store, finished)["notes.txt"].read_text().splitlines()
    assert "-> 0123" in first
    assert "-> 98.0" in first
    assert "-> 99.0" in second


@pytest.mark.usefixtures("unseen")
def test_a_run_without_tracking_goes_on_in_its_folder(
    tmp_path: Path, store: str, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = study.attack_batch, tmp_path / "the run"
    interrupt_the_second_batch(monkeypatch)
    result = call(*TINY, "--method", "srd", "--method", "gradient", "--no-track", "--out", str(out))
    assert f"go on with: srd-lab attack --no-track --resume '{out}'" in result.output
    assert json.loads((out / "run.json").read_text())["status"] == "KILLED"
    monkeypatch.setattr(study, "attack_batch", whole)
    result = call("attack", "--no-track", "--resume", str(out), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["status"] == "FINISHED"
    for method, run in children(store, finished).items():
        with (out / method / "pairs.csv").open() as table:
            assert list(csv.DictReader(table)) == pair_rows(store, run.info.run_id)


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


@pytest.mark.usefixtures("unseen")
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
def test_wrong_input_gets_one_clear_line(
    arguments: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scenes.LENGTHS, "test", 20)  # all are looked at for pairs
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
    assert code == 2 or len(result.output.strip().splitlines()[-1:]) == 1


def test_debug_shows_the_traceback() -> None:
    result = call("--debug", "attack", "--data", "mnist", "--no-track")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "BadValue"


def test_models_prints_a_card_for_each_bundled_network() -> None:
    result = call("models")
    assert result.exit_code == 0
    for name in ("vgg16", "resnet18", "resnet50"):
        assert f"train_scenes.py {name}" in result.output


def test_every_command_is_summed_up_in_a_line() -> None:
    lines = call("--help").output.partition("Commands:")[2].splitlines()
    assert len(lines) > 10
    assert not [line for line in lines if line.endswith("...")]


def test_lists_are_printed_as_json() -> None:
    assert {card["name"] for card in json.loads(call("models", "--json").stdout)} >= {"vgg16", "vgg16_8x8"}
    found = json.loads(call("methods", "--json").stdout)
    assert found["methods"]["srd"]["resolution"] == "input"
    assert found["metrics"]["deletion"]["better"] == "lower"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, srd_lab.cli; print(sorted({'torch', 'mlflow', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


# --- memory ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("unseen")
def test_where_memory_runs_out_an_attack_ends_with_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The explainer holds two images at most; the bar of a terminal stands the steps that are taken twice."""
    command = [
        "attack",
        "--attack",
        "eq10",
        "--pairs",
        "5",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--method",
        "gradient",
        "--no-track",
    ]
    assert call(*command, "--batch-size", "2", "--out", str(tmp_path / "roomy")).exit_code == 0

    whole, sizes = Gradient.explain_with_logits, list[int]()

    def narrow(self: Gradient, model: Any, x: Any, target: Any = None) -> Any:
        sizes.append(len(x))
        if len(x) > 2 and len(sizes) > 4:  # in the middle of the attack
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, model, x, target)

    monkeypatch.setattr(Gradient, "explain_with_logits", narrow)
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        main.main([*command, "--batch-size", "5", "--out", str(tmp_path / "narrow")], standalone_mode=False)
    assert sizes[0] == 1  # whether the method goes with the network
    assert sizes[1] == sizes[4] == 5
    assert max(sizes[5:]) == 2
    assert "100%" in terminal.getvalue()
    tables = [(tmp_path / run / "gradient" / "pairs.csv").read_text() for run in ("roomy", "narrow")]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + 5


def test_what_does_not_fit_into_memory_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_fits(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(study, "attack_batch", nothing_fits)
    result = call(*TINY, "--no-track")
    assert result.exit_code == 1
    assert result.output.startswith("Error: not even one image (scenes/test/1979) fits into memory; take ")
    assert result.output.count("\n") == 1


# --- weights, how many, and where files go ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled files, but that VGG16 says class 3 to everything and ResNet18 class 4."""
    files = {}
    folder = tmp_path_factory.mktemp("weights")
    for name, bias, label in (("vgg16", "classifier.6.bias", 3), ("resnet18", "fc.bias", 4)):
        with np.load(WEIGHTS / f"{name}_scenes.npz") as arrays:
            state = dict(arrays)
        state[bias] = np.where(np.arange(10) == label, 1000, 0).astype(state[bias].dtype)
        files[name] = folder / f"{name}, stubborn.npz"  # a comma, since settings are stored as lists
        np.savez(files[name], **state)
    return files


SURVEY = ("apop", "--images", "20", "--inputs", "zeros", "--no-binarize", "--device", "cpu")
BOTH = ("--model", "vgg16", "--model", "resnet18")


def surveyed(out: Path, model: str) -> list[dict[str, str]]:
    return list(csv.DictReader((out / model / "images.csv").read_text().splitlines()))


def says_always(rows: list[dict[str, str]], label: int) -> bool:
    return [row["top1/original"] == "1" for row in rows] == [row["label"] == str(label) for row in rows]


def test_each_model_gets_its_weights_file(weights: dict[str, Path], tmp_path: Path) -> None:
    given = [part for name in reversed(weights) for part in ("--weights", f"{name}={weights[name]}")]
    result = call(*SURVEY, *BOTH, *given, "--no-track", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for model, label in (("vgg16", 3), ("resnet18", 4)):
        assert len(surveyed(tmp_path, model)) == 20
        assert says_always(surveyed(tmp_path, model), label)
    params = json.loads((tmp_path / "run.json").read_text())["params"]
    sums = [f"{n}:{hashlib.sha256(weights[n].read_bytes()).hexdigest()}" for n in ("vgg16", "resnet18")]
    assert params["weights_sha256"] == ",".join(sums)


def test_one_named_file_leaves_the_other_model_its_own(weights: dict[str, Path], tmp_path: Path) -> None:
    given = ("--weights", f"resnet18={weights['resnet18']}")
    result = call(*SURVEY, *BOTH, *given, "--no-track", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert says_always(surveyed(tmp_path, "resnet18"), 4)
    rows = surveyed(tmp_path, "vgg16")
    assert sum(row["top1/original"] == "1" for row in rows) > 15


def test_a_resumed_run_finds_its_weights_files(
    weights: dict[str, Path], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Batcher, "run", interrupt)
        result = call(*SURVEY, "--weights", str(weights["vgg16"]), "--tracking-uri", store)
    stopped = run_id(store, "apop")
    assert f"srd-lab apop --resume {stopped}" in result.output
    result = call("apop", "--resume", stopped, "--tracking-uri", store, "--device", "cpu")
    assert result.exit_code == 0, result.output
    wrong = [line for line in result.output.splitlines() if line.startswith("vgg16")]
    assert float(wrong[0].split()[2]) < 0.5


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("apop", *BOTH, "--weights", "{}"), 1, "--weights {} does not say which of 2 models it is for"),
        (
            ("apop", *BOTH, "--weights", "vgg19={}"),
            1,
            "vgg19={} is for a model that is not asked for; the models",
        ),
        (("apop", "--weights", "vgg16={}", "--weights", "{}"), 1, "two --weights files for vgg16; give one"),
        (("attack", "--weights", "{}", "--weights", "{}"), 1, "two --weights files for vgg16; give one"),
        (
            ("attack", "--weights", "resnet18={}"),
            1,
            "for a model that is not asked for; the models are vgg16",
        ),
        (
            ("apop", *BOTH, "--weights", "vgg16=gone.npz"),
            2,
            "there is no file gone.npz; expected FILE or NAME=FILE",
        ),
        (("attack", "--weights", "resnet18_{}"), 2, "there is no file resnet18_"),
        (("reproduce", "table1", "--weights", "{}"), 1, "does not say which of 3 models"),
        (("reproduce", "fig4", "--weights", "resnet18={}"), 1, "not asked for; the models are vgg16"),
        (("reproduce", "fig7", "--weights", "vgg19={}"), 1, "not asked for; the models are resnet50, vgg16"),
        (("apop", "--images", "0"), 2, "'0' is not how many; expected a number from 1 on, or all"),
        (("apop", "--images", "many"), 2, "'many' is not how many"),
        (("reproduce", "fig7", "--images", "-1"), 2, "'-1' is not how many"),
        (("apop", *BOTH, "--model", "vgg61", "--images", "1"), 1, "no network 'vgg61'"),
        (
            ("reproduce", "fig7", "--model", "vgg16", "--model", "vgg61", "--images", "1"),
            1,
            "no network 'vgg61'",
        ),
    ],
)
def test_weights_and_numbers_that_make_no_sense_are_one_line(
    arguments: tuple[str, ...], code: int, message: str, weights: dict[str, Path], store: str
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    before = len(client.search_runs([e.experiment_id for e in client.search_experiments()]))
    file = str(weights["vgg16"])
    result = call(*(text.replace("{}", file) for text in arguments), "--tracking-uri", store)
    assert result.exit_code == code, result.output
    *usage, last = result.output.strip().splitlines()
    assert message.replace("{}", file) in last
    assert last.startswith("Error: ")
    assert bool(usage) == (code == 2)
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == before


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("track", ["--no-track", "--track"])
def test_a_folder_with_another_runs_files_is_left_as_it_is(track: str, tmp_path: Path, store: str) -> None:
    """The same batches by name would be there, of another seed."""
    apop = ("apop", "--images", "3", "--inputs", "zeros", "--no-binarize", "--device", "cpu")
    out = tmp_path / "out"
    where = ("--tracking-uri", store) if track == "--track" else ()
    assert call(*apop, "--seed", "0", track, *where, "--out", str(out)).exit_code == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert out / "run.json" in before
    result = call(*apop, "--seed", "1", track, *where, "--out", str(out))
    assert result.exit_code == 1
    assert f"{out} holds another run's run.json; give another --out" in result.output
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_tracked_run_leaves_its_tables_and_figures_in_a_folder_too(tmp_path: Path, store: str) -> None:
    tracked, plain = tmp_path / "tracked", tmp_path / "plain"
    assert call(*ONE_PAIR, "--tracking-uri", store, "--out", str(tracked)).exit_code == 0
    assert call(*ONE_PAIR, "--no-track", "--out", str(plain)).exit_code == 0
    files = {p.relative_to(plain) for p in plain.rglob("*") if p.is_file()}
    assert {p.relative_to(tracked) for p in tracked.rglob("*") if p.is_file()} >= {
        file
        for file in files
        if file.name != "traces.csv"  # curves, which MLflow has as metrics
    }
    for table in ("gradient/pairs.csv", "summary.csv"):
        if (plain / table).exists():
            assert (tracked / table).read_text() == (plain / table).read_text()
    about = json.loads((tracked / "run.json").read_text())
    assert about["metrics"].keys()
    resumed = ("attack", "--resume", about["run"], "--tracking-uri", store)
    assert call(*resumed, "--out", str(tracked)).exit_code == 0  # its own files
    assert call(*resumed, "--out", str(plain)).exit_code == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--resume", ""), "--resume is empty"),
        (("--tracking-uri", " "), "--tracking-uri is empty"),
        (("--tracking-uri", "sqlite:///a.db", "--no-track"), "leave one of them out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: tuple[str, ...], said: str) -> None:
    result = call("apop", "--images", "1", *options)
    assert result.exit_code == 1
    assert said in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("attack", "--steps", "1" + "0" * 30),
        ("attack", "--pairs", "9" * 5000),
        ("attack", "--lr", "inf"),
        ("attack", "--lr", "nan"),
        ("attack", "--stop-mse", "1e308"),
        ("robustness", "--sigma", "1e308"),
        ("apop", "--images", "9" * 5000),
        ("evaluate", "--images", "0"),
        ("apop", "--seed", "1" + "0" * 30),
    ],
)
def test_numbers_that_nobody_means_are_refused(options: tuple[str, ...]) -> None:
    result = call(*options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# --- going on with a run --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    "command",
    [
        ("apop", "--images", "3", "--inputs", "zeros", "--no-binarize"),
        ("attack", "--attack", "eq10", "--pairs", "1", "--steps", "1", "--method", "gradient"),
        ("reproduce", "fig7", "--model", "vgg16", "--images", "2"),
    ],
    ids=["apop", "attack", "fig7"],
)
def test_a_weights_file_that_changed_is_not_gone_on_with(
    command: tuple[str, ...], weights: dict[str, Path], store: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    file = tmp_path / "net.npz"
    file.write_bytes((WEIGHTS / "vgg16_scenes.npz").read_bytes())
    where = ("--device", "cpu", "--tracking-uri", store)
    result = call(*command, "--weights", str(file), *where)
    assert result.exit_code == 0, result.output
    name = " ".join(part for part in command[:2] if not part.startswith("--"))
    run = run_id(store, name)
    with np.load(file) as arrays:
        state = dict(arrays)
    state["classifier.6.bias"] = state["classifier.6.bias"] + np.float16(1e-3)
    np.savez(file, **state)
    result = call(*name.split(), "--resume", run, *where)
    assert result.exit_code == 1
    assert result.output == (
        f"Error: the weights of vgg16 are not those that run {run} was made with; "
        "put the file back as it was, or start a new run\n"
    )
    assert MlflowClient(store).get_run(run).info.status == "FINISHED"  # as it was


@pytest.mark.usefixtures("unseen")
def test_fixed_settings_and_options_of_the_explainer_are_stored_and_must_not_change(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    where = ("--device", "cpu", "--tracking-uri", store)
    small = ("--pairs", "1", "--steps", "1", "--method", "gradient")
    assert call("reproduce", "fig4", *small, *where).exit_code == 0
    run = run_id(store, "reproduce fig4")
    fixed = {"lr": "0.001", "stop_mse": "0.001", "bound": "8.0", "output_term": "probabilities"}
    fixed |= {"beta_start": "10.0", "beta_end": "100.0", "starts": "ones,contrastive"}
    stored = MlflowClient(store).get_run(run).data.params
    assert fixed.items() <= stored.items()
    assert {"methods": "gradient", "batch_size": ""}.items() <= stored.items()
    params = children(store, run)["gradient"].data.params  # type: ignore[attr-defined]
    settings = {name: stored[name] for name in ManipulationSettings().stored() if name != "batch_size"}
    own = {"method": "gradient", "explainer.channels": "abs_sum", "weights_sha256": stored["weights_sha256"]}
    assert params == settings | own
    with monkeypatch.context() as patched:
        patched.setattr("srd_lab.reproduce.manipulation.PUBLISHED", ManipulationSettings(bound=4.0))
        result = call("reproduce", "fig4", "--resume", run, *where)
    assert f"run {run} was made with bound = 8.0, not 4.0" in result.output
    # How many at once is free.
    assert call("reproduce", "fig4", "--resume", run, "--batch-size", "7", *where).exit_code == 0


@pytest.mark.usefixtures("unseen")
def test_the_settings_of_a_table_are_stored(tmp_path: Path) -> None:
    arguments = ("--model", "resnet18", "--images", "1", "--device", "cpu", "--no-track")
    for name, inputs, binarize in (("table1", "zeros", "False"), ("fig6", "", "True")):
        assert call("reproduce", name, *arguments, "--out", str(tmp_path / name)).exit_code == 0
        params = json.loads((tmp_path / name / "run.json").read_text())["params"]
        assert (params["inputs"], params["binarize"]) == (inputs, binarize)
        bundled = hashlib.sha256((WEIGHTS / "resnet18_scenes.npz").read_bytes()).hexdigest()
        assert params["weights_sha256"] == f"resnet18:{bundled}"


@pytest.mark.usefixtures("unseen")
def test_the_variants_of_figure_7_are_stored(tmp_path: Path) -> None:
    command = ("reproduce", "fig7", "--model", "vgg16", "--images", "1", "--device", "cpu", "--no-track")
    assert call(*command, "--out", str(tmp_path)).exit_code == 0
    params = json.loads((tmp_path / "vgg16" / "run.json").read_text())["params"]
    assert params["scalar/unit"] == "scalar"
    assert (params["vector post/values"], params["vector pre SRD/values"]) == ("post", "pre")


@pytest.mark.parametrize("command", [("apop",), ("reproduce", "table1"), ("reproduce", "fig7")])
def test_every_network_is_looked_at_before_a_run_is_opened(
    command: tuple[str, ...], store: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    bad = tmp_path / "bad.npz"
    np.savez(bad, nothing=np.zeros(3))
    client = MlflowClient(store)
    before = len(client.search_runs([e.experiment_id for e in client.search_experiments()]))
    result = call(*command, *BOTH, "--images", "1", "--weights", f"resnet18={bad}", "--tracking-uri", store)
    assert result.exit_code == 1
    assert "bad.npz for resnet18" in result.output
    assert "resume" not in result.output
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == before


# --- few pairs, and pairs that ended early ---------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
def test_what_is_said_of_few_pairs_and_of_those_that_ended_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pair 0 is said to have ended early, and pair 1 has no SSIM with one of the methods."""
    whole = study.attack_batch

    def diverging(*args: Any) -> Any:
        arrays = whole(*args)
        arrays["diverged"][:1] = True
        if "gradient" in str(args[0].explainer).lower():
            arrays["curve/ssim"][1:2] = np.nan
        return arrays

    monkeypatch.setattr(study, "attack_batch", diverging)
    methods = ("--method", "gradient", "--method", "srd")
    result = call(*TINY, *methods, "--batch-size", "4", "--no-track", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    ended = (
        "1 pair ended early: the attack's gradient was not finite (smaller --beta-end helps; Manipulation("
    )
    lines = result.output.splitlines()
    assert [line.partition(":")[0] for line in lines if ended in line] == ["gradient", "srd"]
    assert "ssim at equal mse: 3 of 4 pairs, which have a score with every method" in lines
    assert not any(line.startswith("pcc at equal") for line in lines)
    assert any(line.startswith("fewer than 10 pairs: the intervals are too narrow") for line in lines)
    table = list(csv.DictReader((tmp_path / "srd" / "pairs.csv").read_text().splitlines()))
    assert [row["diverged"] for row in table] == ["True", "False", "False", "False"]
    curves = [np.load(tmp_path / name / "batches" / "00000-00003.npz") for name in ("srd", "gradient")]
    reach = [
        np.minimum(*(np.nanmax(arrays[f"curve/{over}"], 1) for arrays in curves)).mean()
        for over in ("mse", "linf")
    ]
    assert f"(by mse, {reach[0]:.1e} on average; by linf, {reach[1]:.1f})" in result.output


@pytest.mark.usefixtures("unseen")
def test_pairs_that_hardly_moved_are_no_sign_of_robustness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the budget is a quarter of the mean square."""
    whole = study.attack_batch

    def stalling(*args: Any) -> Any:
        arrays = whole(*args)
        arrays["mse"][:] = (
            [2.4e-4, 2.6e-4, 1e-3, 1e-3] if "gradient" in str(args[0].explainer).lower() else 1e-3
        )
        return arrays

    monkeypatch.setattr(study, "attack_batch", stalling)
    methods = ("--method", "gradient", "--method", "srd")
    result = call(*TINY, *methods, "--batch-size", "4", "--no-track", "--out", str(tmp_path))
    said = [line for line in result.output.splitlines() if "the attack stalled" in line]
    assert [line.partition(" used")[0] for line in said] == ["gradient: 1 of 4 pairs"]


@pytest.mark.usefixtures("unseen")
def test_one_pair_has_no_interval() -> None:
    result = call(*ONE_PAIR, "--no-track")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("gradient "))
    assert line.split()[2] == line.split()[6] == "[–]"


@pytest.mark.parametrize(
    ("class_", "words"), [(3, "are all of one class"), (None, "are none: do the labels and --weights belong")]
)
def test_where_there_is_no_pair_the_message_says_why(class_: int | None, words: str) -> None:
    """A network that answers with one class, or with one that no image has."""

    class Grey:
        def __init__(self) -> None:
            self.labels = torch.arange(24) % 6
            self.classes = [f"class {i}" for i in range(6)]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> Sample:
            return Sample(torch.full((3, 8, 8), 0.5), int(self.labels[index]), None, self.name(index))

        def name(self, index: int) -> str:
            return f"grey/{index}"

    def single(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(11)[10 if class_ is None else class_].expand(len(x), -1)

    with pytest.raises(BadValue, match=words) as caught:
        draw_pairs(Grey(), single, 2, 0, torch.device("cpu"))  # type: ignore[arg-type]
    assert "--pairs" not in str(caught.value)


@pytest.mark.usefixtures("unseen")
def test_pairs_are_screened_in_parts_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model, cpu = load_data(), load_model("vgg16"), torch.device("cpu")
    expected = draw_pairs(data, model, 6, 0, cpu)
    sizes = list[int]()

    def narrow(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return model(x)

    assert draw_pairs(data, narrow, 6, 0, cpu) == expected  # type: ignore[arg-type]
    assert sizes[:5] == [16, 8, 4, 4, 4]
