"""What a run stores is read back with MLflow's own client, or from the folder."""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun
from processes import in_a_copy, needs_copies, status_of
from sqlalchemy import event
from sqlalchemy.engine import Engine

from srd_lab.errors import BadRun, BadValue, OtherWork, SrdLabError, StoreTrouble, Unavailable
from srd_lab.runs import environment as record
from srd_lab.runs import guard, page, tracking
from srd_lab.runs.addresses import store_uri
from srd_lab.runs.chart_view import chart_view
from srd_lab.runs.environment import environment
from srd_lab.runs.sqlite_store import EXPERIMENT
from srd_lab.runs.store import open_store
from srd_lab.runs.tracking import Run, open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a project, with README")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store that the module shares, and mlruns/README.md as in the repository."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder / "mlruns").mkdir(exist_ok=True)
    (folder / "mlruns" / "README.md").write_text("artifacts appear here\n")
    return folder


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=store_uri())


def stored(run: Run) -> StoredRun:
    return client().get_run(run.id)


def fill(run: Run) -> None:
    run.save_text("pairs.csv", "pair,ssim\n0,0.5\n")
    run.save_arrays("parts/000.npz", {"ssim": np.arange(3.0), "name": np.array(["a", "b", "c"])})
    run.save_arrays("parts/001.npz", {"ssim": np.arange(2.0)})
    figure = Figure(figsize=(1, 1))
    run.save_figure("figure.png", figure)


def check_files(run: Run) -> None:
    assert run.load_text("pairs.csv") == "pair,ssim\n0,0.5\n"
    arrays = run.load_arrays("parts/000.npz")
    assert arrays["ssim"].tolist() == [0, 1, 2]
    assert arrays["name"].tolist() == ["a", "b", "c"]
    assert run.list("parts") == ["parts/000.npz", "parts/001.npz"]
    assert {"figure.png", "pairs.csv"} <= set(run.list())
    assert run.list("nowhere") == []


def test_content_of_a_run_and_its_child(here: Path) -> None:
    with open_run("attack", "both", {"steps": 3, "lr": 1e-3, "seed": None, **environment()}) as run:
        with run.child("srd", {"method": "srd"}) as part:
            fill(part)
            part.log_metrics({"ssim": 0.5, "pcc": math.nan, "linf": math.inf})
        run.log_metrics({"binarized/features.0": 1})
    parent, child = stored(run), stored(part)
    assert parent.info.run_name == "both"
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.params.items() >= {"steps": "3", "lr": "0.001", "seed": "None"}.items()
    assert parent.data.params["torch"] == environment()["torch"]
    assert parent.data.metrics == {"binarized/features.0": 1}
    assert parent.data.tags["mlflow.source.name"] == "srd-lab attack"
    assert child.data.params == part.params == {"method": "srd"}
    assert child.data.metrics == {"ssim": 0.5}
    assert child.data.tags["not_finite"] == "linf, pcc"
    assert child.data.tags["mlflow.parentRunId"] == run.id
    check_files(part)
    assert [item.path for item in client().list_artifacts(part.id)] == ["figure.png", "pairs.csv", "parts"]
    assert (here / "mlruns" / "srd-lab attack" / part.id / "artifacts" / "figure.png").read_bytes()[
        1:4
    ] == b"PNG"


def test_plain_mlflow_opens_the_same_store(here: Path) -> None:
    with open_run("attack", "one", {}):
        pass
    assert mlflow.get_tracking_uri().endswith("mlflow.db")
    names = mlflow.search_runs(experiment_names=["srd-lab attack"])["tags.mlflow.runName"]
    assert "one" in set(names)


def test_traces_come_in_batches_and_repeating_them_adds_nothing(here: Path) -> None:
    steps = np.arange(700)
    loss = np.cos(steps)
    loss[5] = np.nan
    with open_run("attack", "traces", {}) as run:
        for _ in range(2):
            run.log_traces({"loss/0": (steps, loss), "loss/1": (steps, -steps)})
    history = client().get_metric_history(run.id, "loss/0")
    assert [point.step for point in history] == [step for step in range(700) if step != 5]
    assert [point.value for point in history] == [loss[point.step] for point in history]
    assert stored(run).data.tags["not_finite"] == "loss/0"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_end_status_is_shared_by_open_children(here: Path, error: type[BaseException], status: str) -> None:
    runs: list[Run] = []
    with pytest.raises(error):
        _stop(runs, error)
    run, done, left_open, inside = runs
    assert [stored(each).info.status for each in (run, left_open, inside)] == [status] * 3
    assert stored(done).info.status == "FINISHED"


def _stop(runs: list[Run], error: type[BaseException]) -> None:
    with open_run("attack", "stopped", {}) as run:
        with run.child("done", {}) as done:
            pass
        left_open = run.child("left open", {})
        with run.child("inside", {}) as inside:
            runs += [run, done, left_open, inside]
            raise error


def test_a_broken_store_does_not_hide_the_first_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise SrdLabError("the store is gone")

    run = open_run("attack", "x", {})
    monkeypatch.setattr(tracking.Store, "set_status", broken)
    with pytest.raises(ValueError, match="first"), run:
        raise ValueError("first")


def test_saving_again_replaces(here: Path) -> None:
    with open_run("attack", "twice", {}) as run:
        for text in ("first, and longer", "second"):
            run.save_text("a/b.txt", text)
    assert run.load_text("a/b.txt") == "second"
    assert run.list("a") == ["a/b.txt"]


def test_a_write_that_dies_leaves_the_old_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run("attack", "dies", {}) as run:
        run.save_text("a.txt", "old")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run.save_text("a.txt", "new")
        assert run.load_text("a.txt") == "old"
        assert run.list() == ["a.txt"]


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_resume_goes_on_with_the_same_run_and_child(here: Path) -> None:
    run = open_run("attack", "named", {"steps": 3, "seed": 0})
    part = run.child("srd", {"method": "srd"})
    part.save_arrays("parts/000.npz", {"ssim": np.ones(2)})
    with pytest.raises(KeyboardInterrupt), run, part:
        raise KeyboardInterrupt
    assert stored(run).info.status == stored(part).info.status == "KILLED"
    with open_run("attack", "ignored", {"steps": 3}, resume=run.id) as again:
        assert again.id == run.id
        assert again.params == {"steps": "3", "seed": "0"}
        assert stored(run).info.status == "RUNNING"
        with again.child("srd", {"method": "srd", "added": 1}) as same, again.child("new", {}) as new:
            assert same.id == part.id != new.id
            assert same.list("parts") == ["parts/000.npz"]
            assert same.params == {"method": "srd", "added": "1"}
    assert stored(run).info.status == stored(part).info.status == "FINISHED"
    assert stored(run).info.run_name == "named"


def test_resume_refusals(here: Path) -> None:
    with open_run("attack", "a", {"steps": 3}) as run, run.child("srd", {}) as part:
        pass
    with pytest.raises(BadRun, match=r"no run 0123 in sqlite:.*mlflow\.db; `srd-lab ui` lists them"):
        open_run("attack", "a", {}, resume="0123")
    with pytest.raises(BadRun, match="made by 'attack', not by 'apop'"):
        open_run("apop", "a", {}, resume=run.id)
    with pytest.raises(BadRun, match="steps = 3, not 4"):
        open_run("attack", "a", {"steps": 4}, resume=run.id)
    with pytest.raises(BadRun, match=f"part of run {run.id}"):
        open_run("attack", "a", {}, resume=part.id)
    with pytest.raises(BadRun, match="takes the folder that a run without tracking had"):
        open_run("attack", "a", {}, resume=run.id, track=False)
    assert stored(run).info.status == "FINISHED"
    client().delete_run(run.id)
    with pytest.raises(BadRun, match="mlflow runs restore"):
        open_run("attack", "a", {}, resume=run.id)


def test_long_and_many_params_survive_a_resume(here: Path) -> None:
    long = "x" * 7000
    many = {f"p{i}": i for i in range(230)}
    with open_run("attack", "long", {"long": long} | many) as run:
        pass
    assert len(run.params["long"]) == 6000
    assert stored(run).data.params == run.params
    with open_run("attack", "long", {"long": long}, resume=run.id):
        pass
    with pytest.raises(BadRun, match="made with long"):
        open_run("attack", "long", {"long": long + "y"}, resume=run.id)


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "a/../../x", "a\\b"])
def test_paths_outside_the_run_are_refused(tmp_path: Path, path: str) -> None:
    run = open_run("attack", "x", {}, track=False, out=tmp_path)
    with run, pytest.raises(BadValue, match="not a path inside a run"):
        run.save_text(path, "x")


def test_damaged_missing_and_object_arrays(tmp_path: Path) -> None:
    with open_run("attack", "x", {}, track=False, out=tmp_path) as run:
        run.save_arrays("a.npz", {"x": np.arange(1000)})
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
        with pytest.raises(BadRun, match="damaged"):
            run.load_arrays("a.npz")
        with pytest.raises(BadRun, match=r"the run has no file b\.npz"):
            run.load_arrays("b.npz")
        with pytest.raises(BadValue, match="'x' holds Python objects"):
            run.save_arrays("c.npz", {"x": np.array([None])})


def test_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(Unavailable, match="--no-track"):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    with open_run("attack", "x", {"steps": 3}, track=False, out=tmp_path / "out") as run:
        with run.child("lrp/z+", {"method": "lrp"}) as part:
            fill(part)
            check_files(part)
            part.log_metrics({"ssim": 0.5, "pcc": math.nan})
            part.log_traces({"loss": ([0, 1, 2], [3.0, math.nan, 1.0])})
        run.log_metrics({"ssim": 1})
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["params"] == {"steps": "3"}
    assert (about["command"], about["status"], about["metrics"]) == ("attack", "FINISHED", {"ssim": 1})
    inner = tmp_path / "out" / "lrp%2Fz+"
    assert (inner / "traces.csv").read_text() == "name,step,value\nloss,0,3.0\nloss,2,1.0\n"
    assert json.loads((inner / "run.json").read_text())["not_finite"] == ["loss", "pcc"]
    assert "out" in run.where


def test_a_folder_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = open_run("attack", "x", {"steps": 3}, track=False, out=out)
    with run.child("srd", {"method": "srd"}) as part:
        part.log_metrics({"ssim": 0.5, "pcc": math.nan})
        part.log_traces({"loss": ([0, 1], [3.0, 2.0])})
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    (out / ".a.npz.999999999.part").touch()
    with open_run("attack", "y", {"steps": 3, "seed": 0}, track=False, resume=run.id, out=out) as again:
        assert again.params == {"steps": "3", "seed": "0"}
        with again.child("srd") as part:
            assert part.params == {"method": "srd"}
            part.log_traces({"loss": ([2], [1.0])})
    assert not (out / ".a.npz.999999999.part").exists()
    about = json.loads((out / "run.json").read_text())
    assert (about["name"], about["status"]) == ("x", "FINISHED")
    inner = json.loads((out / "srd" / "run.json").read_text())
    assert (inner["metrics"], inner["not_finite"]) == ({"ssim": 0.5}, ["pcc"])
    assert (out / "srd" / "traces.csv").read_text() == "name,step,value\nloss,0,3.0\nloss,1,2.0\nloss,2,1.0\n"


def test_a_new_run_takes_nothing_over_from_what_lies_in_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_run("attack", "x", {}, track=False, out=out) as run,
        run.child("srd", {"method": "srd"}) as part,
    ):
        part.log_metrics({"ssim": 0.5})
    (out / "run.json").unlink()
    with (
        open_run("attack", "x", {}, track=False, out=out) as run,
        run.child("srd", {"method": "other"}) as part,
    ):
        part.log_metrics({"pcc": 0.25})
    inner = json.loads((out / "srd" / "run.json").read_text())
    assert (inner["params"], inner["metrics"]) == ({"method": "other"}, {"pcc": 0.25})


def test_refusals_of_a_folder_to_go_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_run("attack", "x", {"steps": 3}, track=False, out=out):
        pass

    def refused(kind: type[Exception], said: str, **given: Any) -> None:
        usual: dict[str, Any] = {"command": "attack", "name": "x", "params": {}, "resume": str(out)}
        with pytest.raises(kind, match=said):
            open_run(**(usual | given), track=False)

    refused(BadValue, f"go on with it: --resume {out}", resume=None, out=out)
    refused(BadRun, "made by 'attack', not by 'apop'", command="apop")
    refused(BadRun, "steps = 3, not 4", params={"steps": 4})
    refused(BadValue, "goes on in its own folder", out=tmp_path / "elsewhere")
    with pytest.raises(OtherWork), open_run("attack", "x", {}, track=False, resume=str(out)):
        raise OtherWork("other")
    assert json.loads((out / "run.json").read_text())["status"] == "FINISHED"
    for content, said in {
        "{": "damaged",
        "[]": "damaged",
        '{"command": "attack"}': "damaged.*start a new run",
        '{"run": "0123"}': "copies of what run 0123 has stored",
    }.items():
        (out / "run.json").write_text(content)
        refused(BadRun, said)


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    run = open_run("attack", "x", {}, track=False)
    part = run.child("srd", {})
    fill(part)
    check_files(part)
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]
    assert "nothing is kept" in run.where


def test_which_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri() == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    assert store_uri() == "http://localhost:1"
    assert store_uri("sqlite:///other.db") == f"sqlite:///{tmp_path.resolve()}/other.db"
    assert store_uri("sqlite:////a%20b/other.db") == "sqlite:////a b/other.db"
    with pytest.raises(StoreTrouble, match="'%' or"):
        store_uri("sqlite:///100%/mlflow.db")


def test_stores_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(StoreTrouble, match="cannot be used: Connection refused"):
        open_run("attack", "x", {}, tracking_uri=nobody)
    (tmp_path / "bad.db").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreTrouble, match=r"bad\.db cannot be used: file is not a database"):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{tmp_path}/bad.db")
    with pytest.raises(StoreTrouble, match=r"cannot be used as an MLflow store"):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{tmp_path}/bad.db/mlflow.db")


@pytest.mark.usefixtures("stores_are_made")
def test_an_interrupted_first_use_leaves_no_half_made_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.MlflowClient", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()


def _open(folder: Path, at_each_statement: Callable[[], object]) -> None:
    """Open a store in a folder; something happens before each SQL statement."""

    def statement(*_: object) -> None:
        at_each_statement()

    event.listen(Engine, "before_cursor_execute", statement)
    open_store(f"sqlite:///{folder}/mlflow.db", EXPERIMENT, "attack")
    event.remove(Engine, "before_cursor_execute", statement)


@needs_copies
@pytest.mark.slow
@pytest.mark.usefixtures("stores_are_made")
def test_a_kill_while_the_store_is_made_is_harmless(tmp_path: Path) -> None:
    """At an early, a middle and a late one of the statements by which MLflow makes a store."""
    statements: builtins.list[int] = []
    _open(tmp_path / "whole", lambda: statements.append(1))
    for share in (0.1, 0.5, 0.9):
        folder = tmp_path / str(share)
        left = iter(range(int(share * len(statements))))

        def killed(folder: Path = folder, left: Iterator[int] = left) -> bool:
            _open(folder, lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
            return True

        assert status_of(in_a_copy(killed)) == -signal.SIGKILL
        assert (folder / ".mlflow.db.part").exists()
        assert not (folder / "mlflow.db").exists()
    _open(folder, lambda: None)
    assert (folder / "mlflow.db").exists()
    assert not (folder / ".mlflow.db.part").exists()


def test_half_a_store_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    half, other = tmp_path / "half.db", tmp_path / "other.db"
    for file, table in ((half, "runs"), (other, "recipes")):
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute(f"CREATE TABLE {table} (id INTEGER)")
    with pytest.raises(StoreTrouble, match=r"half\.db is half an MLflow store.*remove it"):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{half}")
    with pytest.raises(StoreTrouble, match=r"other\.db is a database, but not one of MLflow"):
        open_run("attack", "x", {}, tracking_uri=f"sqlite:///{other}")
    empty = tmp_path / "empty.db"
    empty.touch()
    with open_run("attack", "x", {}, tracking_uri=f"sqlite:///{empty}"):
        pass


def test_a_moved_directory_keeps_its_files(here: Path, tmp_path: Path) -> None:
    with open_run("attack", "moved", {}) as run, run.child("srd", {}) as part:
        fill(part)
    moved = tmp_path / "moved"
    shutil.copytree(here, moved)
    uri = f"sqlite:///{moved}/mlflow.db"
    with (
        open_run("attack", "moved", {}, tracking_uri=uri, resume=run.id) as again,
        again.child("srd") as same,
    ):
        check_files(same)
        same.save_text("new.txt", "x")
    assert (moved / "mlruns" / "srd-lab attack" / part.id / "artifacts" / "new.txt").exists()
    assert "new.txt" not in part.list()
    with sqlite3.connect(here / "mlflow.db") as database:
        (untouched,) = database.execute(
            "SELECT count(*) FROM runs WHERE artifact_uri LIKE ?", (f"{moved}%",)
        ).fetchone()
    database.close()
    assert untouched == 0


@needs_copies
@pytest.mark.slow
@pytest.mark.usefixtures("stores_are_made")
def test_four_processes_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    barrier = multiprocessing.get_context("fork").Barrier(4)

    def first_use() -> bool:
        barrier.wait()
        with open_run("attack", "first", {"n": 1}, tracking_uri=uri) as run, run.child("srd") as part:
            part.log_traces({"loss": (range(300), range(300))})
            part.save_text("a.txt", "x")
        return True

    workers = [in_a_copy(first_use) for _ in range(4)]
    assert [status_of(worker) for worker in workers] == [0] * 4
    fresh = MlflowClient(tracking_uri=uri)
    found = [e for e in fresh.search_experiments() if e.name == "srd-lab attack"]
    assert len(found) == 1
    runs = fresh.search_runs([found[0].experiment_id])
    assert len(runs) == 8
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_environment_names_versions_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment()
    assert found.keys() >= {
        "python",
        "platform",
        "torch",
        "torchvision",
        "numpy",
        "scikit-image",
        "scipy",
        "mlflow",
    }
    code = (
        "import sys, srd_lab.runs.tracking; print([m for m in ('mlflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert record.device_name("cpu")


def test_commit_is_that_of_the_own_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "srd_lab"
    package.mkdir()
    monkeypatch.setattr(record, "__file__", str(package / "runs" / "environment.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (package / "tracking.py").write_text("1")
    assert _commit() == ""
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        subprocess.run(git + command, check=True)
    assert len(_commit()) == 40
    (package / "tracking.py").write_text("2")
    assert _commit().endswith("-dirty")
    inner = tmp_path / "site-packages" / "srd_lab"
    inner.mkdir(parents=True)
    monkeypatch.setattr(record, "__file__", str(inner / "runs" / "environment.py"))
    assert _commit() == ""
    record.git_commit.cache_clear()


def _commit() -> str:
    record.git_commit.cache_clear()
    return record.git_commit()


def test_ui_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BadRun, match=r"no runs yet: .*mlflow\.db does not exist"):
        page.launch_ui()
    with pytest.raises(StoreTrouble, match="open it in a browser"):
        page.launch_ui("http://localhost:1")
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StoreTrouble, match=rf"cannot listen on 127\.0\.0\.1:{port} .*--port"):
            page.launch_ui(port=port)


def test_ui_command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run("attack", "x", {}):
        pass
    seen: builtins.list[list[str]] = []

    class Server:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append(command)
            assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Server)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    page.launch_ui(port=_free_port())
    assert seen[0][seen[0].index("--backend-store-uri") + 1] == store_uri()
    assert "/#/experiments/1/runs?workflowType=machine_learning" in capsys.readouterr().out


def test_the_address_shows_scores_and_settings_as_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for methods, pcc in (("srd", 0.4), ("gradcam", 0.2)):
        with open_run("attack", methods, {"methods": methods, "pairs": 3}) as run:
            run.log_metrics({f"{methods}/worst_pcc": pcc, f"{methods}/worst_ssim": pcc, "seconds": 1})
            run.child("part", {"explainer.level": "low"}).log_metrics({"hidden": 1.0})
    database = Path("mlflow.db").resolve()
    assert page._page("127.0.0.1", 5000, database).endswith("&viewStateShareKey=srd-lab")
    experiment = MlflowClient(store_uri()).get_experiment_by_name("srd-lab attack")
    assert experiment is not None
    view = json.loads(experiment.tags["mlflow.sharedViewState.srd-lab"])
    assert view["selectedColumns"] == [
        "tags.`headline`",
        *(f"metrics.`{name}/worst_pcc`" for name in ("gradcam", "srd")),
        *(f"metrics.`{name}/worst_ssim`" for name in ("gradcam", "srd")),
        "params.`methods`",
    ]
    assert view["columnWidths"].keys() == {"attributes.`Run Name`", *view["selectedColumns"]}
    first = next(chart for chart in view["compareRunCharts"])
    assert (first["displayName"], first["selectedMetricKeys"]) == (
        "worst_pcc by method",
        ["gradcam/worst_pcc", "srd/worst_pcc"],
    )


def test_the_charts_that_compare_runs_come_first() -> None:
    alone = {"pcc", "srd/pcc", "srd/over_images/pcc", "seconds"}
    several = {"a/pcc", "b/pcc", "a/over_images/pcc", "b/over_budget/pcc"}
    view = chart_view([alone, several], ["ssim", "pcc"])
    charts = [
        (chart["type"], chart["displayName"], chart.get("selectedMetricKeys"))
        for chart in view["compareRunCharts"]
    ]
    assert charts == [
        ("BAR", "pcc", None),
        ("BAR", "pcc by method", ["a/pcc", "b/pcc"]),
        ("LINE", "pcc over images", ["a/over_images/pcc", "srd/over_images/pcc"]),
    ]
    shown = {section["name"]: section["display"] for section in view["compareRunSections"]}
    assert next(iter(shown)) == "Model metrics"
    assert {name for name, is_shown in shown.items() if is_shown} == {"Model metrics", "b/over_budget"}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} <= {
        section["uuid"] for section in view["compareRunSections"]
    }


@pytest.mark.parametrize(
    ("screen", "browse", "opened"), [(True, True, 1), (False, True, 0), (True, False, 0)]
)
def test_a_browser_is_opened_where_there_is_a_screen_and_may_fail(
    screen: bool, browse: bool, opened: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run("attack", "x", {}):
        pass
    told, seen = threading.Event(), list[str]()

    def show(address: str) -> None:
        seen.append(address)
        told.set()
        raise OSError("no browser")

    class Server:
        def __init__(self, *_: object, **__: object) -> None:
            self.socket = socket.create_server(("127.0.0.1", port))

        def wait(self) -> int:
            told.wait(5 if opened else 0.3)
            self.socket.close()
            return 0

    port = _free_port()
    monkeypatch.setattr(page, "has_screen", lambda: screen)
    monkeypatch.setattr("webbrowser.open", show)
    monkeypatch.setattr(subprocess, "Popen", Server)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    page.launch_ui(port=port, browse=browse)
    assert len(seen) == opened
    assert all(address.startswith(f"http://127.0.0.1:{port}/#/experiments/1/runs") for address in seen)


def test_no_browser_is_opened_over_a_remote_shell_or_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "SSH_TTY", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert page.has_screen()
    monkeypatch.setenv("SSH_CONNECTION", "1")
    assert not page.has_screen()
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr("sys.stdout", type("Pipe", (), {"isatty": lambda self: False})())
    assert not page.has_screen()


_GUARDED = """
import subprocess, sys, time
from srd_lab.runs.guard import guarded

shell = "sleep 300 & echo $! $$; wait"
server = subprocess.Popen(guarded(["sh", "-c", shell]))
sys.exit(server.wait())
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT"])
def test_a_guarded_command_ends_with_its_parent_and_takes_its_children_along(end: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parents[2])}
    command = [sys.executable, "-c", _GUARDED]
    with subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        running = [int(number) for number in parent.stdout.readline().split()]
        assert len(running) == 2
        if end == "SIGKILL":
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    last = time.monotonic() + 10
    while any(map(_runs, running)) and time.monotonic() < last:
        time.sleep(0.1)
    assert not any(map(_runs, running))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_guarded_command_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of this process stay
    assert guard.run(os.getppid(), ["sh", "-c", "exit 3"]) == 3


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
