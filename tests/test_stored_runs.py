"""Runs that were stored: listed, compared, exported, reported, and repeated from their file of options."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from mlflow import MlflowClient
from scipy.stats import mannwhitneyu, wilcoxon

from srd_lab.cli.config import config_text
from srd_lab.cli.main import main
from srd_lab.cli.tracked import command_line
from srd_lab.errors import BadRun
from srd_lab.evaluation.comparing import Comparing
from srd_lab.metrics.summary import holm
from srd_lab.runs.document import Document, Table
from srd_lab.runs.label import Drawn, Label
from srd_lab.runs.outcome import Outcome, over_images, publish, read_scores, scores_text
from srd_lab.runs.reading import find_run, list_runs
from srd_lab.runs.tracking import open_run

IMAGES = [f"scenes/test/{i}" for i in range(12)]


def scores(seed: int, shift: float = 0.0, count: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, count)


def make(
    found: dict[str, dict[str, np.ndarray]],
    images: list[str] = IMAGES,
    command: str = "attack",
    name: str = "a run",
    **params: str,
) -> str:
    """A finished run with these scores, in the store of the working directory; its id."""
    given = {"data": "scenes", "pairs": str(len(images)), "seed": "0", **params}
    label = Label(
        name, {"model": "vgg16", "data": given["data"]}, {"seed": "0"}, Drawn("scenes", 12, 2000, "ab")
    )
    with open_run(command, name, given) as run:
        run.describe(label)
        run.save_text("command.txt", "srd-lab attack --pairs 12\n")
        for subject, own in found.items():
            with run.child(subject, {"method": subject, "explainer.level": "low"}) as child:
                child.log_traces(over_images(own))
                child.save_figure("pictures.png", Figure(figsize=(1, 1)))
        report = Document(
            "What was found", [Table(["method", "pcc"], [[m, "0.5"] for m in found]), "So it is."]
        )
        publish(run, Outcome(report, 1.5, images, found))
    return run.id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ids(folder: Path) -> dict[str, str]:
    """A store with five runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        a, b, c = scores(0, 1.0), scores(1), scores(2)
        others = [f"scenes/test/{i}" for i in range(100, 109)]
        return {
            "both": make({"srd": {"pcc": a, "ssim": c}, "lrp": {"pcc": b, "ssim": c}}, name="both"),
            "srd": make({"srd": {"pcc": a}}, name="srd", methods="srd"),
            "gradcam": make({"gradcam": {"pcc": b}}, name="gradcam", methods="gradcam"),
            "again": make({"srd": {"pcc": b[:8]}}, IMAGES[:8], name="again", pairs="8"),
            "elsewhere": make(
                {"srd": {"pcc": scores(3, 0, 9)}}, others, "robustness", name="elsewhere", mode="full"
            ),
        }


@pytest.fixture
def here(folder: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return ids


def cli(*args: str) -> str:
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args: str) -> str:
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code != 0
    assert "Traceback" not in done.output
    return done.stderr.strip().splitlines()[-1]


# what the store holds -------------------------------------------------------------------------------
def test_the_store_shows_what_a_run_is_of(here: dict[str, str]) -> None:
    client = MlflowClient("sqlite:///mlflow.db")
    run = client.get_run(here["both"])
    assert client.get_experiment(run.info.experiment_id).name == "srd-lab attack"
    assert (
        client.get_experiment(client.get_run(here["elsewhere"]).info.experiment_id).name
        == "srd-lab robustness"
    )
    assert run.data.metrics["srd/pcc"] == pytest.approx(scores(0, 1.0).mean())
    assert "pcc" not in run.data.metrics  # there is no single one
    single = client.get_run(here["srd"]).data.metrics
    assert set(single) == {"pcc", "srd/pcc", "srd/over_images/pcc", "seconds"}
    assert run.data.tags["headline"] == f"srd pcc {scores(0, 1.0).mean():.3f} (and 1 other)"
    curve = client.get_metric_history(here["both"], "lrp/over_images/ssim")
    assert [point.step for point in curve] == list(range(1, 13))
    assert run.data.tags["mlflow.note.content"].startswith(
        "### What was found\n\n| method&nbsp;&nbsp; | &nbsp;pcc |\n| --- | ---: |\n"
    )
    assert run.data.tags["model"] == "vgg16"
    data = run.inputs.dataset_inputs[0]
    assert (data.dataset.name, data.dataset.digest) == ("scenes", "ab")
    assert data.tags[0].value == "attack"


def test_parts_carry_the_settings_and_their_own_with_another_name(here: dict[str, str]) -> None:
    part = find_run(here["both"]).parts[0]
    assert (part.name, part.params["seed"], part.params["explainer.level"]) == ("srd", "0", "low")
    assert part.tags["method"] == "srd"
    history = MlflowClient("sqlite:///mlflow.db").get_metric_history(part.id, "over_images/pcc")
    means = np.cumsum(scores(0, 1.0)) / np.arange(1, 13)
    assert [point.value for point in history] == pytest.approx(means)
    assert [point.step for point in history] == list(range(1, 13))


def test_curves_leave_out_what_was_not_scored_and_have_fifty_points() -> None:
    values = np.array([np.nan, 1.0, np.nan, 3.0])
    steps, means = over_images({"pcc": values})["over_images/pcc"]
    assert (list(steps), list(means)) == ([2, 3, 4], [1.0, 1.0, 2.0])
    steps, means = over_images({"pcc": np.arange(1000.0)})["over_images/pcc"]
    assert (len(steps), steps[-1], means[-1]) == (50, 1000, 499.5)


def test_scores_come_back_as_they_were() -> None:
    found = {
        "a, b": {"pcc": np.array([0.1, np.nan]), "x": np.array([1.0, 2.0])},
        "c": {"pcc": np.array([1e-300, -1.0])},
    }
    images, again = read_scores(scores_text(["one", 'two "2"'], found))
    assert images == ["one", 'two "2"']
    assert {m: list(own) for m, own in again.items()} == {"a, b": ["pcc", "x"], "c": ["pcc"]}
    for method, own in found.items():
        for name, values in own.items():
            np.testing.assert_array_equal(again[method][name], values)


@pytest.mark.parametrize(
    "text", ["subject,pcc\na,1\n", "subject,image,pcc\na,x,one\n", "subject,image,p\na,x,1\nb,y,1\n"]
)
def test_damaged_scores_are_one_line(text: str) -> None:
    with pytest.raises(BadRun, match=r"scores\.csv is damaged"):
        read_scores(text)


# the list --------------------------------------------------------------------------------------------
def test_runs_are_listed_the_newest_first(here: dict[str, str]) -> None:
    lines = cli("runs").splitlines()
    assert [line.split()[0] for line in lines[2:]] == [number[:8] for number in reversed(here.values())]
    assert "robustness" in lines[2]
    assert f"pcc {scores(1).mean():.3f}" in cli("runs", "--command", "attack").splitlines()[3]
    assert len(cli("runs", "--limit", "2").splitlines()) == 4
    assert [run["run"] for run in json.loads(cli("runs", "--json"))] == list(reversed(here.values()))


def test_a_run_is_found_by_the_beginning_of_its_id(here: dict[str, str]) -> None:
    assert find_run(here["srd"][:12]).id == here["srd"]
    with pytest.raises(BadRun, match="is no run; give an id"):
        find_run("srd")
    with pytest.raises(BadRun, match="no run 0000000000 in"):
        find_run("0000000000")


def test_without_a_store_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "no runs yet" in refused("runs")
    assert list(tmp_path.iterdir()) == []  # asking makes none
    Path("other.db").write_text("no database")
    assert "other.db" in refused("runs", "--tracking-uri", "sqlite:///other.db")


# comparisons -----------------------------------------------------------------------------------------
def test_the_same_images_are_compared_in_pairs(here: dict[str, str]) -> None:
    a, b = scores(0, 1.0), scores(1)
    (one,) = Comparing([find_run(here["srd"]), find_run(here["gradcam"])]).held()
    assert (one.subject, one.reference, one.same, one.n) == ("gradcam", "srd", True, 12)
    assert one.difference == pytest.approx((b - a).mean())
    assert one.p == pytest.approx(wilcoxon(b - a, method="exact").pvalue)
    draws = np.random.default_rng(5).integers(12, size=(20_000, 12))
    ends = np.quantile((b - a)[draws].mean(1), (0.025, 0.975))
    np.testing.assert_allclose((one.low, one.high), ends, atol=0.03)


def test_one_run_of_several_methods_compares_these_with_holms_correction(here: dict[str, str]) -> None:
    comparing = Comparing([find_run(here["both"])], reference="lrp")
    held = comparing.held()
    assert [(one.subject, one.score) for one in held] == [("srd", "pcc"), ("srd", "ssim")]
    assert held[1].p == 1.0  # nothing differs
    np.testing.assert_allclose([one.p_corrected for one in held], holm(np.array([one.p for one in held])))


def test_other_images_are_compared_as_groups(here: dict[str, str]) -> None:
    (one,) = Comparing([find_run(here["gradcam"]), find_run(here["elsewhere"])]).held()
    a, b = scores(3, 0, 9), scores(1)
    assert (one.same, one.n, one.reference_n) == (False, 9, 12)
    assert one.difference == pytest.approx(a.mean() - b.mean())
    assert one.p == pytest.approx(mannwhitneyu(a, b).pvalue)
    assert one.low < one.difference < one.high
    assert "different images" in cli("compare", here["gradcam"], here["elsewhere"], "--no-track")


def test_images_that_only_one_has_are_left_out_which_is_said(here: dict[str, str]) -> None:
    comparing = Comparing([find_run(here["srd"]), find_run(here["again"])])
    (one,) = comparing.held()
    assert (one.same, one.n) == (True, 8)
    assert one.difference == pytest.approx((scores(1)[:8] - scores(0, 1.0)[:8]).mean())
    assert [s.name for s in comparing.subjects] == ["srd (pairs 12)", "srd (pairs 8)"]
    assert "on the 8 images that both have" in comparing.document([one]).text()


def test_the_same_names_in_other_data_are_other_images(
    here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_run(here["srd"])
    monkeypatch.chdir(tmp_path)
    second = find_run(make({"srd": {"pcc": scores(1)}}, data="imagefolder:elsewhere"))
    (one,) = Comparing([first, second]).held()
    assert not one.same


def test_a_comparison_is_a_run_with_table_figure_and_report(here: dict[str, str]) -> None:
    said = cli("compare", here["srd"][:10], here["gradcam"][:10], "--out", "compared")
    assert "the reference is srd" in said
    made = list_runs(command="compare")[0]
    assert {"comparison.png", "comparisons.csv", "report.json", "summary.txt"} <= set(made.top_files)
    assert made.name == "srd against gradcam · vgg16 · scenes · 12 images"
    assert made.load_text("command.txt").startswith(
        f"srd-lab compare {here['srd'][:10]} {here['gradcam'][:10]}"
    )
    assert made.params["runs"] == f"{here['srd']},{here['gradcam']}"
    assert Path("compared/summary.txt").read_text() == made.load_text("summary.txt")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["srd"], "is of srd alone; give a second run"),
        (["srd", "srd"], "is named 2 times"),
        (
            ["srd", "gradcam", "--reference", "lrp"],
            "the reference 'lrp' is not among what is compared: srd, gradcam",
        ),
        (["srd", "gradcam", "--score", "ssim"], "no score 'ssim' in all of the runs; they share pcc"),
    ],
)
def test_wrong_comparisons_are_one_line(here: dict[str, str], args: list[str], said: str) -> None:
    assert said in refused("compare", "--no-track", *(here.get(arg, arg) for arg in args))


def test_a_run_without_scores_says_why(here: dict[str, str]) -> None:
    with pytest.raises(RuntimeError), open_run("attack", "broken", {}) as run:
        raise RuntimeError
    with pytest.raises(BadRun, match="has no report: it has not finished"):
        find_run(run.id).scores()
    MlflowClient("sqlite:///mlflow.db").delete_run(run.id)


# to send ---------------------------------------------------------------------------------------------
def test_the_page_holds_everything_and_needs_nothing(here: dict[str, str]) -> None:
    cli("report", here["both"], "--out", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert find_run(here["both"]).load_text("report.html") == page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "url(" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    for said in ("What was found", "srd-lab attack --pairs 12", "How to read it", "So it is."):
        assert said in page


def test_several_runs_share_a_page_and_none_is_overwritten(here: dict[str, str]) -> None:
    said = cli("report", here["srd"], here["elsewhere"])
    name = said.split()[-1]
    assert name == f"report-{here['srd'][:8]}-{here['elsewhere'][:8]}.html"
    assert cli("report", here["srd"], here["elsewhere"]).split()[-1] == name.replace(".html", "-2.html")
    assert "would be overwritten" in refused("report", here["srd"], "--out", name)


def test_a_page_of_several_runs_begins_with_how_they_compare(here: dict[str, str]) -> None:
    cli("report", here["srd"], here["gradcam"], "--out", "joint.html")
    page = Path("joint.html").read_text(encoding="utf-8")
    assert "<h1>2 runs compared</h1>" in page
    first = page.index("<section")
    assert page.index("the reference is srd") < first
    assert page.index("data:image/png") < first
    assert page.count("What was found") == 2
    assert "<h1>Mine</h1>" in _page_of(
        "report", here["srd"], here["gradcam"], "--title", "Mine", "--out", "m.html"
    )


def test_runs_that_share_no_score_are_reported_without_a_comparison(here: dict[str, str]) -> None:
    other = make({"srd": {"top1": scores(4)}})
    done = CliRunner().invoke(main, ["report", here["srd"], other, "--out", "apart.html"])
    assert done.exit_code == 0, done.output
    assert "the runs are not compared: the runs have no score in common" in done.stderr


def _page_of(*args: str) -> str:
    cli(*args)
    return Path(args[-1]).read_text(encoding="utf-8")


def test_the_page_says_what_its_words_mean_and_no_others(here: dict[str, str]) -> None:
    page = _page_of("report", here["both"], "--out", "words.html")
    words = page[page.index('id="words"') :]
    assert "<dt>PCC</dt><dd>Pearson" in words
    assert "<dt>SRD</dt>" in words
    assert "insertion" not in words


def test_the_options_of_a_run_are_printed_for_config(here: dict[str, str], tmp_path: Path) -> None:
    with open_run("attack", "x", {}, track=False, out=tmp_path / "run") as run:
        run.save_text("run.toml", 'command = "attack"\n')
    assert cli("export", str(tmp_path / "run"), "--to", "config") == 'command = "attack"\n'


def test_a_comparison_is_printed_as_json(here: dict[str, str]) -> None:
    found = json.loads(cli("compare", here["srd"], here["gradcam"], "--no-track", "--json"))
    (one,) = found["comparisons"]
    assert (one["subject"], one["reference"], one["n"]) == ("gradcam", "srd", 12)


def test_exports_hold_what_was_found(here: dict[str, str]) -> None:
    images, found = read_scores(cli("export", here["both"], "--to", "csv"))
    assert images == IMAGES
    np.testing.assert_array_equal(found["lrp"]["pcc"], scores(1))
    everything = json.loads(cli("export", here["both"], "--to", "json"))
    assert everything["scores"]["srd"]["pcc"] == list(scores(0, 1.0))
    assert set(everything["parts"]) == {"srd", "lrp"}
    assert r"\begin{tabular}{lr}" in cli("export", here["both"], "--to", "latex")
    assert "| srd | 0.5 |" in cli("export", here["both"], "--to", "markdown")
    cli("export", here["both"], "--to", "csv", "--out", "scores-out.csv")
    assert "would be overwritten" in refused("export", here["both"], "--to", "csv", "--out", "scores-out.csv")


def test_a_folder_is_a_run_too(here: dict[str, str], tmp_path: Path) -> None:
    with open_run("attack", "in a folder", {"data": "scenes"}, track=False, out=tmp_path / "run") as run:
        run.describe(Label("in a folder", {"model": "vgg16"}, {}, Drawn("scenes", 12, 2000, "ab")))
        with run.child("gradcam", {"method": "gradcam"}) as child:
            child.log_metrics({"pcc": 0.5})
        publish(run, Outcome(Document("Found", []), 0.0, IMAGES, {"gradcam": {"pcc": scores(1)}}))
    assert (tmp_path / "run" / "summary.md").read_text() == "### Found\n"
    found = find_run(str(tmp_path / "run"))
    assert [part.name for part in found.parts] == ["gradcam"]
    (one,) = Comparing([find_run(here["srd"]), found]).held()
    assert one.same
    with pytest.raises(BadRun):
        find_run(str(tmp_path))


def test_the_copy_of_a_tracked_run_is_that_run(here: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    with open_run("attack", "srd · vgg16", {"data": "scenes"}, out=out) as run:
        run.describe(Label("srd · vgg16", {"model": "vgg16"}, {}, Drawn("scenes", 12, 2000, "ab")))
        run.save_text("command.txt", "srd-lab attack --pairs 12\n")
        publish(run, Outcome(Document("Found", []), 0.0, IMAGES, {"srd": {"pcc": scores(1)}}))
    tracked, copy = find_run(run.id), find_run(str(out))
    assert (copy.name, copy.command, copy.status) == ("srd · vgg16", "attack", "FINISHED")
    assert (copy.started, copy.tags["model"]) == (tracked.started, "vgg16")
    cli("report", str(out), "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "How to read it" in page
    assert "srd-lab attack;" in page
    about = json.loads((out / "run.json").read_text())  # as older versions wrote it
    (out / "run.json").write_text(json.dumps({k: about[k] for k in ("run", "params", "metrics")}))
    assert find_run(str(out)).command == "attack"


def test_the_list_shows_the_first_ranked_and_of_older_runs_the_first_asked_for(
    here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {"sobel": {"worst_pcc": np.ones(12)}, "srd": {"worst_pcc": np.full(12, 0.5)}}
    with open_run("robustness", "new", {"methods": "sobel,srd"}) as run:
        publish(run, Outcome(Document("Found", []), 0.0, IMAGES, found, "srd"))
    with open_run("robustness", "old", {"methods": "srd,sobel"}) as run:
        run.log_metrics({"sobel/worst_pcc": 1.0, "srd_ones/worst_pcc": 0.4})
    said = cli("runs")
    assert "srd worst_pcc 0.500 (and 1 other)" in said
    assert "srd_ones worst_pcc 0.400 (and 1 other)" in said


def test_the_published_attack_has_one_name_whoever_made_it(here: dict[str, str]) -> None:
    old = make({"srd": {"pcc": scores(0), "pcc_target": scores(1), "noise_pcc": scores(2)}})
    assert list(find_run(old).scores()[1]["srd"]) == ["eq10_pcc", "eq10_pcc_target", "noise_pcc"]


# options in a file -----------------------------------------------------------------------------------
TRACKED = [
    ["attack"], ["robustness"], ["apop"], ["evaluate"],
    *(["reproduce", name] for name in ("table1", "table2", "table3", "table4", "fig4", "fig6", "fig7")),
]  # fmt: skip


def context(args: list[str]) -> click.Context:
    """The command's context after reading these arguments."""
    group, parent = main, click.Context(main, info_name="srd-lab")
    while isinstance(group.commands[args[0]], click.Group):
        name, *args = args
        parent = click.Context(group.commands[name], info_name=name, parent=parent)
        group = group.commands[name]  # type: ignore[assignment]
    name, *args = args
    return group.commands[name].make_context(name, args, parent=parent)


@pytest.mark.parametrize("command", TRACKED, ids=" ".join)
def test_the_file_of_options_gives_the_same_options(command: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "a,b.npz"
    weights.write_text("x")
    typed = ["--seed", "7", "--mean", "0.1,0.2,0.3", "--weights", str(weights), "--data", 'imagefolder:a "b"']
    if command == ["robustness"]:
        typed += ["--no-eq10", "--method", "smoothed(srd,0.1,64)"]
    if command == ["attack"]:
        typed += ["--swap", "2", "3", "--method", "srd?level=high,gradcam"]
    before = context([*command, *typed])
    file = tmp_path / "run.toml"
    file.write_text(config_text(before, " ".join(command)), encoding="utf-8")
    after = context([*command, "--config", str(file)])
    assert after.params == before.params
    assert context([*command, "--config", str(file), "--seed", "8"]).params["seed"] == 8
    for made in (before, after):  # and so does the line that a run stores
        line = command_line(made, " ".join(command))
        assert context(_words(line)[1:]).params == before.params


def _words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = ", "is no TOML file"),
        ("seed = 1", "expected command and [options] alone"),
        ('command = "attack"\n[options]\nseed = 1', "is of srd-lab attack, not of srd-lab apop"),
        ("[options]\nsteps = 1", "srd-lab apop has no option 'steps'"),
        ("[options]\nseed = -1", "-1 is not in the range"),
        ('[options]\nimages = "some"', "is not how many"),
    ],
)
def test_wrong_files_of_options_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert said in refused("apop", "--config", str(file))


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    out = cli("apop", "--images", "2", "--inputs", "zeros", "--no-binarize", "--no-track", "--json")
    found = json.loads(out)
    assert found["settings"]["images"] == "2"
    assert found["report"]["blocks"][0]["rows"][0][0] == "vgg16"
    assert len(found["images"]) == 2
    assert found["scores"]["vgg16"]["zeros_apop_top1"][0] in (0.0, 1.0)
