"""A store in a file of SQLite: whether it is one, its lock, and what MLflow has written down of where it lies."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from srd_lab.errors import StoreTrouble

EXPERIMENT = "srd-lab"  # the names of all experiments begin so


def is_there(file: Path) -> bool:
    """Whether ``file`` is an MLflow store; raises StoreTrouble if it is half of one, or something else."""
    if not file.exists() or file.stat().st_size == 0:
        return False
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # MLflow makes its first experiment last
        whole = "experiments" in tables and database.execute("SELECT 1 FROM experiments").fetchone()
    if not whole and tables & {"experiments", "runs", "alembic_version"}:
        raise StoreTrouble(
            f"{file} is half an MLflow store: a process was killed while it made it; it holds no runs, so remove it"
        )
    if not whole:
        raise StoreTrouble(f"{file} is a database, but not one of MLflow; give another --tracking-uri")
    return True


def artifact_folder(file: Path, experiment: str) -> str:
    """Where MLflow puts the files of an experiment's runs, beside the database."""
    return str(file.parent / "mlruns" / quote(experiment, safe=" "))


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold the store's lock; raises StoreTrouble if ``file`` cannot be a store."""
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=120):
            yield
    except Timeout:
        raise StoreTrouble(f"another process has held {file} locked for two minutes; is it stuck?") from None
    except (OSError, sqlite3.Error) as error:
        raise StoreTrouble(
            f"{file} cannot be used as an MLflow store ({error}); see --tracking-uri"
        ) from None


def follow_move(file: Path) -> str:
    """Point the store at the artifacts beside it after its directory was moved or copied.

    MLflow records absolute paths; without this the files of a renamed project's runs are not found and new ones are
    written under the old name. Gives the id of the experiment that the newest run is in, "" if the store has none of this
    package's.
    """
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
        query = "SELECT experiment_id, name, artifact_location FROM experiments WHERE name = ? OR name LIKE ?"
        found = database.execute(query, (EXPERIMENT, f"{EXPERIMENT} %")).fetchall()
        for number, name, old in found:
            folder = artifact_folder(file, name)
            beside = Path(old).parts[-2:] == Path(folder).parts[-2:]  # else somebody chose another place
            if old != folder and beside and Path(folder).is_dir():
                for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE experiment_id = ? AND substr({column}, 1, ?) = ?",
                        (folder, len(old) + 1, number, len(old), old),
                    )
        numbers = [number for number, *_ in found]
        newest = database.execute(
            f"SELECT experiment_id FROM runs WHERE lifecycle_stage = 'active' AND experiment_id IN "
            f"({','.join('?' * len(numbers))}) ORDER BY start_time DESC LIMIT 1",
            numbers,
        ).fetchone()
        return str(newest[0] if newest else numbers[-1] if numbers else "")
