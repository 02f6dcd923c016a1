"""A command that is killed at any store call and any file that it writes goes on to the same numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from srd_lab.cli.main import main
from srd_lab.runs.addresses import local_folder
from srd_lab.runs.files import FolderFiles
from srd_lab.runs.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are copies of this one"),
]
COMMANDS = {
    "apop": (
        "apop",
        "--images",
        "4",
        "--batch-size",
        "2",
        "--inputs",
        "zeros",
        "--no-binarize",
        "--device",
        "cpu",
    ),
    "evaluate": (
        *(
            "evaluate",
            "--methods",
            "gradient",
            "--metrics",
            "sparseness",
            "--images",
            "4",
            "--batch-size",
            "2",
        ),
        *("--device", "cpu"),
    ),
}
TABLE = "images.csv"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def killed(at: int, *arguments: str) -> bool:
    """Run a command in a copy of this process that is gone at the ``at``-th moment at which something is stored, without a
    word; whether it got there."""
    child = os.fork()
    if child == 0:
        moments = 0

        def moment() -> None:
            nonlocal moments
            moments += 1
            if moments == at:
                os._exit(9)

        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*given: Any, **named: Any) -> Any:
                moment()
                out = function(*given, **named)
                moment()
                return out

            return wrapped

        Store._patiently = around(Store._patiently)  # type: ignore[method-assign]
        FolderFiles.write = around(FolderFiles.write)  # type: ignore[method-assign]
        replace = Path.replace
        Path.replace = lambda self, to: (moment(), replace(self, to))[1]  # type: ignore[assignment,func-returns-value,method-assign]
        os._exit(0 if call(*arguments).exit_code == 0 else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the command itself failed"
    return status == 9


def tables(uri: str) -> dict[str, str]:
    """The tables of the last run and of its parts, by their paths."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("srd-lab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    found = {}
    for run in runs:
        folder = local_folder(str(run.info.artifact_uri))
        assert folder is not None
        for file in folder.rglob(TABLE):
            found[f"{run.info.run_name}/{file.name}"] = file.read_text()
    return found


def last_run(uri: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("srd-lab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
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
    command: str, fresh: Path, tmp_path: Path
) -> None:
    def store(name: str) -> str:
        shutil.copytree(fresh, tmp_path / name)
        return f"sqlite:///{tmp_path / name}/mlflow.db"

    arguments = COMMANDS[command]
    whole = store("whole")
    assert call(*arguments, "--tracking-uri", whole).exit_code == 0
    expected = tables(whole)
    assert expected
    gone_on = told = 0
    for at in range(1, 400, 3):
        uri = store(f"at-{at}")
        if not killed(at, *arguments, "--tracking-uri", uri):
            break
        run = last_run(uri)
        if run is None:  # killed before there was one
            continue
        result = call(command, "--resume", run.info.run_id, "--tracking-uri", uri)
        if result.exit_code:
            assert "interrupted before its settings were stored; start a new run" in result.output
            told += 1
            continue
        assert tables(uri) == expected, at
        assert last_run(uri).info.status == "FINISHED"
        gone_on += 1
    assert gone_on > 5
    assert told < gone_on
