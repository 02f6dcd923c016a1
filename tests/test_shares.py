"""Shares of a run done apart, and the run that is made of them: the digits of one run; what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_networks import command as call
from small_networks import tiny_study

from srd_lab.errors import BadValue
from srd_lab.runs import executors
from srd_lab.runs.batches import share_of
from srd_lab.runs.shares import _close, read_shares

ON_CPU = ("--device", "cpu", "--batch-size", "2")
COMMANDS = {
    "apop": ("--images", "7", "--inputs", "zeros,normal", "--no-binarize", "--save-patterns", *ON_CPU),
    "evaluate": (
        "--methods",
        "gradient,gradcam",
        "--metrics",
        "sparseness,fidelity",
        "--images",
        "5",
        *ON_CPU,
    ),
    "attack": (
        *("--attack", "combined", "--attack", "transfer", "--method", "gradient,gradcam"),
        *("--pairs", "5", *ON_CPU),
    ),
    "reproduce table2": ("--model", "vgg16", "--methods", "gradcam", "--images", "3", *ON_CPU),
}
SLOW = ("attack", "reproduce table2")
TABLES = ("images.csv", "pairs.csv", "scores.csv", "comparisons.csv", "findings.csv", "methods.csv")
APOP = ("apop", "--images", "7", "--inputs", "zeros", "--no-binarize", *ON_CPU)

pytestmark = pytest.mark.usefixtures("unseen")


def succeed(*arguments: str | Path) -> str:
    result = call(*map(str, arguments))
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: str | Path) -> str:
    """What a command says that ends with one line."""
    result = call(*map(str, arguments))
    assert result.exit_code in (1, 2), result.output
    said = result.output.strip()
    assert "Traceback" not in said
    assert said.startswith("Error: ") or result.exit_code == 2
    return said.splitlines()[-1]


def tables(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in sorted(folder.rglob("*.csv"))
        if file.name in TABLES
    }


def batches(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.npz"))]


def share(text: str, folder: Path, command: tuple[str, ...] = APOP) -> Path:
    succeed(*command, "--shard", text, "--no-track", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def thirds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shares of one run; not to be changed."""
    home = tmp_path_factory.mktemp("thirds")
    return [share(f"{k}/3", home / str(k)) for k in (1, 2, 3)]


@pytest.fixture
def copies(thirds: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in thirds]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS]
)
def test_a_run_of_shares_says_what_one_run_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_study(monkeypatch, steps=1, queries=4)
    command = (*name.split(), *COMMANDS[name])
    succeed(*command, "--no-track", "--out", tmp_path / "whole")
    shares = [share(f"{k}/3", tmp_path / str(k), command) for k in (1, 2, 3)]
    assert not any(tables(folder) for folder in shares)
    done = [name for folder in shares for name in batches(folder) if "/transferred" not in name]
    assert sorted(done) == sorted(set(done)), "a batch was done twice"
    monkeypatch.setattr(executors, "worked", None)  # nothing is done again
    said = succeed("merge", *reversed(shares), "--no-track", "--out", tmp_path / "merged")
    assert tables(tmp_path / "merged") == tables(tmp_path / "whole") != {}
    assert batches(tmp_path / "merged") == batches(tmp_path / "whole")
    about, whole = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("merged", "whole"))
    assert about["params"] == whole["params"]
    assert about["status"] == "FINISHED"
    report = (tmp_path / "merged" / "summary.txt").read_text().strip()
    assert report.splitlines()[0] == (tmp_path / "whole" / "summary.txt").read_text().splitlines()[0]
    assert " ".join(report.split())[:60] in " ".join(said.split())
    for file in ("command.txt", "run.toml"):
        written = (tmp_path / "merged" / file).read_text()
        assert written == (tmp_path / "whole" / file).read_text()


def test_the_run_of_shares_is_tracked(thirds: list[Path], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    succeed("merge", *thirds, "--tracking-uri", uri, "--out", tmp_path / "out")
    succeed(*APOP, "--no-track", "--out", tmp_path / "whole")
    assert tables(tmp_path / "out") == tables(tmp_path / "whole") != {}
    client = MlflowClient(uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert sorted(run.info.run_name.partition(" ")[0] for run in runs) == ["vgg16", "vgg16"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("share" not in run.data.params for run in runs)


def test_a_share_says_what_it_is_and_makes_no_report(thirds: list[Path], tmp_path: Path) -> None:
    said = succeed(*APOP, "--shard", "2/3", "--no-track", "--out", tmp_path / "2")
    assert "share 2/3: 1 batches, and no report" in said
    assert str(tmp_path / "2") in said
    assert not (tmp_path / "2" / "summary.txt").exists()
    assert batches(tmp_path / "2") == ["vgg16/batches/00002-00003.npz"] == batches(thirds[1])
    assert json.loads((tmp_path / "2" / "run.json").read_text())["params"]["share"] == "2/3"


def test_more_shares_than_batches(tmp_path: Path) -> None:
    shares = [share(f"{k}/6", tmp_path / str(k)) for k in range(1, 7)]
    assert batches(shares[5]) == []
    succeed("merge", *shares, "--no-track", "--out", tmp_path / "merged")
    succeed(*APOP, "--no-track", "--out", tmp_path / "whole")
    assert tables(tmp_path / "merged") == tables(tmp_path / "whole")


def test_an_interrupted_share_is_named_and_goes_on(
    copies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, done = executors.worked, list[int]()

    def once(*given: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return work(*given)

    with monkeypatch.context() as patched:
        patched.setattr(executors, "worked", once)
        said = fails(*APOP, "--shard", "1/3", "--no-track", "--out", tmp_path / "half")
    assert f"srd-lab apop --no-track --resume {tmp_path / 'half'}" in said
    assert len(batches(tmp_path / "half")) == 1
    said = fails("merge", tmp_path / "half", *copies[1:], "--no-track", "--out", tmp_path / "merged")
    assert f"share 1/3 in {tmp_path / 'half'} is not finished (KILLED)" in said
    assert not (tmp_path / "merged").exists()
    resume = ("apop", "--no-track", "--resume", tmp_path / "half")
    assert "is share 1/3; leave --shard out" in fails(*resume, "--shard", "2/3")
    assert "leave --batch-size out" in fails(*resume, "--batch-size", "3")
    succeed(*resume)
    assert batches(tmp_path / "half") == batches(copies[0])
    succeed("merge", tmp_path / "half", *copies[1:], "--no-track", "--out", tmp_path / "merged")


def test_shares_that_make_no_run_are_named(copies: list[Path], tmp_path: Path) -> None:
    one, two, three = copies

    def said(*folders: Path) -> str:
        return fails("merge", *folders, "--no-track", "--out", tmp_path / "merged")

    assert "share 2/3 missing" in said(one, three)
    assert "shares 1/3, 3/3 missing" in said(two)
    assert f"share 2/3 is there twice, in {two} and {two}" in said(one, two, two, three)
    other = share("2/4", tmp_path / "quarter")
    assert f"{other} is share 2/4 and {one} is 1/3" in said(one, other, three)
    assert f"there is no share in {tmp_path}" in said(one, tmp_path, three)
    succeed(*APOP, "--no-track", "--out", tmp_path / "whole")
    assert f"{tmp_path / 'whole'} is no share" in said(one, tmp_path / "whole", three)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--batch-size", "3"), "batch_size = 3"),
        (("--seed", "1"), "seed = 1"),
        (("--images", "8"), "images = 8"),
        (("--inputs", "ones"), "inputs = ones"),
    ],
)
def test_a_share_of_another_run_is_named(
    options: tuple[str, str], names: str, copies: list[Path], tmp_path: Path
) -> None:
    other = share("2/3", tmp_path / "other", (*APOP, *options))
    said = fails("merge", copies[0], other, copies[2], "--no-track", "--out", tmp_path / "merged")
    assert f"{other} was made with {names}, and {copies[0]} with" in said


def test_other_weights_and_other_images_are_no_share_of_the_run(copies: list[Path], tmp_path: Path) -> None:
    file = copies[1] / "run.json"
    about = json.loads(file.read_text())
    weights = about["params"]["weights_sha256"]
    file.write_text(json.dumps(about | {"params": about["params"] | {"weights_sha256": "vgg16:00"}}))
    said = fails("merge", *copies, "--no-track", "--out", tmp_path / "merged")
    assert f"was made with weights_sha256 = vgg16:00, and {copies[0]} with {weights}" in said
    file.write_text(json.dumps(about | {"data": about["data"] | {"digest": "0"}}))
    assert "not of the same images" in fails("merge", *copies, "--no-track", "--out", tmp_path / "merged")


def test_a_share_on_another_machine_is_noted(copies: list[Path], tmp_path: Path) -> None:
    file = copies[1] / "run.json"
    about = json.loads(file.read_text())
    about["params"] |= {"torch_threads": "7", "hardware": "another"}
    file.write_text(json.dumps(about))
    said = succeed("merge", *copies, "--no-track", "--out", tmp_path / "merged")
    assert "not all done with the same torch_threads, hardware" in said


def test_batches_that_are_lost_or_another_share_s_are_named(copies: list[Path], tmp_path: Path) -> None:
    lost = copies[1] / "vgg16" / "batches" / "00002-00003.npz"
    shutil.copyfile(lost, copies[2] / "vgg16" / "batches" / lost.name)
    said = fails("merge", *copies, "--no-track", "--out", tmp_path / "merged")
    assert f"{copies[2] / 'vgg16' / 'batches' / lost.name} is no batch of share 3/3" in said
    (copies[2] / "vgg16" / "batches" / lost.name).unlink()
    lost.unlink()
    assert f"share 2/3 lacks {lost}" in fails("merge", *copies, "--no-track", "--out", tmp_path / "merged")
    succeed("apop", "--no-track", "--resume", copies[1])
    succeed("merge", *copies, "--no-track", "--out", tmp_path / "merged")


def test_code_of_the_user_s_is_named_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from srd_lab.models import load_model\n\ndef net():\n    return load_model('vgg16', device='cpu')\n"
    )
    command = ("apop", "--model", "mine.py:net", "--size", "64", *APOP[1:])
    shares = [share(f"{k}/2", tmp_path / str(k), command) for k in (1, 2)]
    said = fails("merge", *shares, "--no-track", "--out", "merged")
    assert "-- --model mine.py:net" in said
    assert not Path("merged").exists()
    succeed("merge", *shares, "--no-track", "--out", "merged", "--", "--model", "mine.py:net")
    assert tables(tmp_path / "merged")


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "²/3"])
def test_what_is_no_share(wrong: str, tmp_path: Path) -> None:
    assert "is no share" in fails(*APOP, f"--shard={wrong}", "--no-track", "--out", tmp_path / "out")
    with pytest.raises(BadValue, match="is no share"):
        share_of(wrong)


def test_a_share_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    for where in ((), ("--no-track",), ("--out", tmp_path / "out")):
        assert "add --no-track --out DIR" in fails(*APOP, "--shard", "1/2", *where)
    beside = ("--no-track", "--out", tmp_path / "out")
    assert "leave --json out" in fails(*APOP, "--shard", "1/2", "--json", *beside)
    assert "add --out DIR" in fails("merge", tmp_path, "--no-track")


def test_work_without_batches_has_no_shares(tmp_path: Path) -> None:
    said = fails(
        "attack", "--manipulate-model", "location", "--shard", "1/2", "--no-track", "--out", tmp_path / "out"
    )
    assert "does a share of the batches, and this work has none; leave --shard out" in said
    assert not (tmp_path / "out").exists()


def test_live_objects_have_no_shares() -> None:
    import srd_lab

    with pytest.raises(BadValue, match="a share makes no result"):
        srd_lab.apop("vgg16", images=2, inputs=("zeros",), binarize=False, device="cpu", share="1/2")


def test_first_looks_are_the_same_but_for_rounding() -> None:
    look = {"best": "softplus(30)", "scores": {"a": 0.25}, "slope_error": None}
    assert _close(look, {"best": "softplus(30)", "scores": {"a": 0.2501}, "slope_error": None})
    assert _close({"a": float("nan")}, {"a": float("nan")})
    assert not _close(look, look | {"best": "elu"})
    assert not _close(look, look | {"scores": {"a": 0.3}})
    assert not _close(look, look | {"scores": {}})


def test_a_damaged_share_is_named(copies: list[Path]) -> None:
    (copies[0] / "vgg16" / "share.json").write_text("{")
    with pytest.raises(Exception, match=r"share\.json of .* is damaged"):
        read_shares(copies)


def test_threads_are_set_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    succeed(*APOP, "--threads", "3", "--no-track", "--out", tmp_path / "out")
    assert found == [3]
