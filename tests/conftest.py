"""What all tests share: how torch is set up, an empty MLflow store, and runs whose figures nobody looks at."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from attacks import manipulation_study
from srd_lab.runs import store
from srd_lab.runs.tracking import Run

MAKE_STORE = store._make


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """These tensors are so small that more would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def seeds_for_the_cpu_alone() -> Iterator[None]:
    """Without an accelerator torch.manual_seed writes down the stack for each kind of them, which takes longer than to
    make one of the networks here."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            for device in (torch.cuda, torch.xpu, torch.mtia):
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def stores_are_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow takes seconds to make an empty store: the first one is made, the others are copies of it."""
    first = tmp_path_factory.mktemp("store") / "mlflow.db"

    def copy(file: Path, experiment: str, location: str | None) -> None:
        if not first.exists():
            MAKE_STORE(first, store.EXPERIMENT, str(first.parent))
        shutil.copyfile(first, file)
        with closing(sqlite3.connect(file)) as database, database:
            names = "UPDATE experiments SET name = ?, artifact_location = ? WHERE name = ?"
            database.execute(names, (experiment, location, store.EXPERIMENT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_make", copy)
        yield


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not written, which takes most of a small run's time; those of pairs show one."""
    monkeypatch.setattr(Run, "save_figure", lambda run, path, figure: None)
    monkeypatch.setattr(manipulation_study, "PICTURES", 1)


@pytest.fixture
def stores_are_made(stores_are_copies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how a store is made."""
    monkeypatch.setattr(store, "_make", MAKE_STORE)
