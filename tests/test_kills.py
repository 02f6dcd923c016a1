"""A command that is killed at any store call and any file that it writes goes on to the same numbers."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import in_a_copy, needs_copies, status_of
from small_networks import command as call
from small_networks import tiny_study

from attacks import ensemble
from srd_lab.runs.addresses import local_folder
from srd_lab.runs.files import FolderFiles
from srd_lab.runs.store import Store

pytestmark = [pytest.mark.slow, needs_copies]
ON_CPU = ("--batch-size", "2", "--device", "cpu")
COMMANDS = {
    "apop": ("--images", "4", "--inputs", "zeros", "--no-binarize", *ON_CPU),
    "evaluate": ("--methods", "gradient", "--metrics", "sparseness", "--images", "4", *ON_CPU),
    "attack": ("--attack", "eq10", "--method", "gradient", "--pairs", "4", "--steps", "1", *ON_CPU),
    "robustness": ("--method", "gradient", "--pairs", "4", "--no-curve", "--no-eq10", *ON_CPU),
    "reproduce table1": ("--model", "vgg16", "--images", "4", *ON_CPU),
}
MOMENTS = {"apop": 12, "robustness": 4}  # that are tried; six of the others
TABLES = ("images.csv", "pairs.csv")


def at_each_moment(patch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Have ``happens`` called before and after each call of the store and each file that is written."""

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            happens()
            out = function(*given, **named)
            happens()
            return out

        return wrapped

    replace = Path.replace
    patch.setattr(Store, "_patiently", around(Store._patiently))
    patch.setattr(FolderFiles, "write", around(FolderFiles.write))
    patch.setattr(Path, "replace", lambda self, to: (happens(), replace(self, to))[1])


def moments_of(*arguments: str) -> int:
    """Run a command; the number of moments at which something is stored."""
    moments = []
    with pytest.MonkeyPatch.context() as patch:
        at_each_moment(patch, lambda: moments.append(1))
        ended = call(*arguments)
    assert ended.exit_code == 0, ended.output
    return len(moments)


def kill(at: int, *arguments: str) -> None:
    """Run a command in a copy of this process that is gone at the ``at``-th moment, without a word."""

    def work() -> bool:
        left = iter(range(at - 1))
        with pytest.MonkeyPatch.context() as patch:
            at_each_moment(patch, lambda: next(left, None) is None and os._exit(9))
            return call(*arguments).exit_code == 0

    assert status_of(in_a_copy(work)) == 9, "it was not killed"


def experiments(client: Any) -> list[str]:
    return [each.experiment_id for each in client.search_experiments()]


def tables(uri: str) -> dict[str, str]:
    """The tables of the last run and of its parts, by their paths."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs(experiments(client), order_by=["start_time DESC"])
    found = {}
    for run in runs:
        folder = local_folder(str(run.info.artifact_uri))
        assert folder is not None
        for table in TABLES:
            for file in folder.rglob(table):
                found[f"{run.info.run_name}/{table}"] = file.read_text()
    return found


def last_run(uri: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs(experiments(client), order_by=["start_time ASC"])
    return next((run for run in runs if "mlflow.parentRunId" not in run.data.tags), None)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: to make one takes seconds."""
    from srd_lab.runs.store import EXPERIMENT, open_store

    folder = tmp_path_factory.mktemp("fresh")
    open_store(f"sqlite:///{folder}/mlflow.db", EXPERIMENT, "apop")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_numbers(
    command: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(name: str) -> str:
        shutil.copytree(fresh, tmp_path / name)
        return f"sqlite:///{tmp_path / name}/mlflow.db"

    tiny_study(monkeypatch, steps=1, queries=4)
    monkeypatch.setattr(
        ensemble, "MEMBERS", ("dissimilarity", "combined", "transfer")
    )  # the first is checked only
    monkeypatch.setitem(ensemble.MODES, "quick", ensemble.Mode(1, 1, 1, 4, ("combined", "transfer")))
    arguments, whole = (*command.split(), *COMMANDS[command]), store("whole")
    moments, expected = moments_of(*arguments, "--tracking-uri", whole), tables(whole)
    assert expected
    gone_on = told = 0
    for at in range(1, moments + 1, max(1, moments // MOMENTS.get(command, 6))):
        uri = store(f"at-{at}")
        kill(at, *arguments, "--tracking-uri", uri)
        run = last_run(uri)
        if run is None:  # killed before there was one
            continue
        result = call(*command.split(), "--resume", run.info.run_id, "--tracking-uri", uri)
        if result.exit_code:
            assert "interrupted before its settings were stored; start a new run" in result.output
            told += 1
            continue
        assert tables(uri) == expected, at
        assert last_run(uri).info.status == "FINISHED"
        gone_on += 1
    assert gone_on > 2
    assert told < gone_on


def test_a_run_that_two_processes_go_on_with_ends_with_the_same_numbers(fresh: Path, tmp_path: Path) -> None:
    command = "apop"
    arguments = (command, *COMMANDS[command])
    uris = []
    for name in ("whole", "twice"):
        shutil.copytree(fresh, tmp_path / name)
        uris.append(f"sqlite:///{tmp_path / name}/mlflow.db")
    whole, twice = uris
    moments = moments_of(*arguments, "--tracking-uri", whole)
    kill(moments // 2, *arguments, "--tracking-uri", twice)
    resume = (command, "--resume", last_run(twice).info.run_id, "--tracking-uri", twice)
    both = [in_a_copy(lambda: call(*resume).exit_code == 0) for _ in range(2)]
    assert [status_of(child) for child in both] == [0, 0]
    assert tables(twice) == tables(whole)
    assert last_run(twice).info.status == "FINISHED"


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_limit_on_the_size_of_files_costs_one_line(share: float, fresh: Path, tmp_path: Path) -> None:
    """As a full disk does: MLflow's database cannot grow, or a run's file."""
    import resource

    shutil.copytree(fresh, tmp_path / "store")
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    arguments = ("apop", *COMMANDS["apop"])

    def limited_to(size: int, *options: str) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        ended = call(*arguments, *options)
        assert ended.exit_code == 1
        assert ended.output.count("\n") == 1
        return ended.output

    def limited() -> bool:
        logging.disable()  # whoever imported mlflow before us has it log
        size = int((tmp_path / "store" / "mlflow.db").stat().st_size * share)
        assert "cannot be used: disk I/O error" in limited_to(size, "--tracking-uri", uri)
        assert "run.json: File too large" in limited_to(100, "--no-track", "--out", str(tmp_path / "out"))
        return True

    assert status_of(in_a_copy(limited)) == 0
    run = last_run(uri)
    assert run is None or run.info.status in ("RUNNING", "FAILED")  # where not even that could be stored
    ended = call(*arguments, "--tracking-uri", uri)
    assert ended.exit_code == 0, ended.output
