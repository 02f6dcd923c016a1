"""Faults of a trial, by kind: passwords, hosts and ports, printing, memory, weights, and stores that are locked or full."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sqlalchemy import event
from sqlalchemy.engine import Engine

from attacks.black_box import BlackBox
from attacks.model_compare import save_weights
from srd_lab.cli.errors import Notes
from srd_lab.cli.main import main
from srd_lab.data import load_batches, load_data
from srd_lab.data.draw import draw_images
from srd_lab.errors import BadValue, BadWeights, SrdLabWarning, StoreTrouble, Unavailable
from srd_lab.methods.gradient import Gradient
from srd_lab.metrics.robustness import under_noise
from srd_lab.models import load_model
from srd_lab.models.files import read_state
from srd_lab.reproduce.paper import against_claim, against_value
from srd_lab.runs import page, store
from srd_lab.runs.addresses import secrets_in, shown
from srd_lab.runs.tracking import open_run
from srd_lab.runtime import Batcher, is_out_of_memory
from srd_lab.types import Sample

APOP = ("apop", "--images", "2", "--inputs", "zeros", "--no-binarize", "--device", "cpu")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# --- passwords, hosts and ports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cr%21t@127.0.0.1:9",
        "https://me:s3cr%21t@127.0.0.1:9/path",
        "postgresql+psycopg2://me:s3cr%21t@127.0.0.1:9/runs",
        "mysql://127.0.0.1:9/runs?user=me&password=s3cr%21t",
        "http://127.0.0.1:9/?api_key=s3cr%21t",
    ],
)
def test_a_password_is_neither_printed_nor_stored(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "s3cr" not in shown(uri)
    assert "***" in shown(uri)
    result = call(*APOP, "--tracking-uri", uri)
    assert result.exit_code == 1
    assert "s3cr" not in result.output
    assert result.output.count("\n") == 1
    assert "s3cr" not in store._one_line(Exception(f"cannot reach {uri} with s3cr!t"), uri)


def test_an_address_without_a_secret_stays(tmp_path: Path) -> None:
    for uri in (
        f"sqlite:///{tmp_path}/mlflow.db",
        "http://localhost:5000",
        "http://[::1]:5000",
        str(tmp_path),
    ):
        assert (shown(uri), secrets_in(uri)) == (uri, [])


@pytest.mark.parametrize("host", ["", " "])
def test_no_host_is_not_all_networks(host: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="--host is empty"):
        page.launch_ui(f"sqlite:///{tmp_path}/mlflow.db", host=host)


@pytest.mark.parametrize(
    ("host", "alone", "address"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:5000"),
        ("::1", True, "http://[::1]:5000"),
        ("localhost", True, "http://localhost:5000"),
        ("0.0.0.0", False, "http://0.0.0.0:5000"),
        ("::", False, "http://[::]:5000"),
        ("lab.example.org", False, "http://lab.example.org:5000"),
    ],
)
def test_who_can_reach_the_page_is_known(host: str, alone: bool, address: str) -> None:
    assert page._is_loopback(host) == alone
    assert page._page(host, 5000, None) == address


def test_a_taken_port_is_found_on_ipv6_too() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, pytest.raises(StoreTrouble, match="cannot listen on ::1"):
        page._require_free("::1", server.getsockname()[1])


# --- printing ----------------------------------------------------------------------------------------------------


def run_with(stdout: Any, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "srd_lab.cli.main", *APOP, "--no-track", "--out", str(out)]
    env = {**os.environ, **environment}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, check=False)


def is_finished(out: Path) -> bool:
    return (
        json.loads((out / "run.json").read_text())["status"] == "FINISHED" and (out / "summary.txt").is_file()
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_does_not_fail_a_finished_run(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run_with(full, tmp_path / "out")
    assert done.returncode == 0
    assert is_finished(tmp_path / "out")
    assert done.stderr == "Note: cannot print (No space left on device); what is left is stored only.\n"


def test_a_closed_pipe_does_not_fail_a_finished_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_with(writing, tmp_path / "out")
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_finished(tmp_path / "out")


def test_what_an_encoding_lacks_does_not_fail_a_finished_run(tmp_path: Path) -> None:
    file = tmp_path / "printed.txt"
    with file.open("wb") as printed:
        done = run_with(printed, tmp_path / "out", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert is_finished(tmp_path / "out")
    assert b"vgg16" in file.read_bytes()


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "could not create a primitive",
        "could not create a memory object",
        "std::bad_alloc",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ...",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "MPS backend out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "UR backend failed: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    ],
)
def test_whatever_a_library_calls_it_a_lack_of_memory_is_known(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


def test_a_lack_of_memory_halves_the_batch() -> None:
    sizes = []

    def work(some: Sequence[int]) -> int:
        sizes.append(len(some))
        if len(some) > 1:
            raise RuntimeError("could not create a primitive")
        return sum(some)

    assert Batcher(4).run(work, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_an_image_that_does_not_fit_alone_is_named() -> None:
    def work(some: Sequence[Sample]) -> None:
        raise MemoryError

    sample = Sample(torch.zeros(3, 1, 1), 0, None, "large.png")
    with pytest.raises(Unavailable, match=r"not even one image \(large\.png\) fits"):
        Batcher(4).run(work, [sample])


class Hungry:
    """Images that a worker has no memory for, or is killed for."""

    classes = ("it",)
    labels = torch.zeros(12, dtype=torch.long)

    def __init__(self, killed: bool) -> None:
        self.killed, self.parent = killed, os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        if index == 4 and os.getpid() != self.parent:
            if self.killed:
                os.kill(os.getpid(), 9)
            raise MemoryError
        return Sample(torch.full((3, 1, 1), index / 255), 0, None, self.name(index))


@pytest.mark.parametrize("killed", [False, True])
def test_a_worker_without_memory_leaves_its_work_to_the_command(killed: bool) -> None:
    plan = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.warns(SrdLabWarning, match="memory ran out in a worker; the rest is decoded without workers"):
        found = [loaded.indices for loaded in load_batches(Hungry(killed), plan, 2)]
    assert found == plan


# --- weights, and what is compared with the paper ---------------------------------------------------------------------


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(load_model("vgg16").network.state_dict())
    key = next(iter(state))
    return state | {key: change(state[key].clone())}


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda w: w.index_fill_(0, torch.tensor([0]), torch.nan), "holds NaN or infinite values"),
    "inf": (lambda w: w.index_fill_(0, torch.tensor([0]), -torch.inf), "holds NaN or infinite values"),
    "too large for half": (lambda w: (w * 1e9).half(), "holds NaN or infinite values"),
    "complex": (lambda w: w.to(torch.complex64), "holds complex numbers"),
    "integer": (lambda w: w.to(torch.int8), "of another kind of numbers"),
    "bool": (lambda w: w > 0, "of another kind of numbers"),
    "meta": (lambda w: w.to("meta"), "has a shape and no numbers"),
    "sparse": (lambda w: w.to_sparse(), "is sparse"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantised"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds of tensors that it will drop
def test_weights_that_cannot_be_right_are_refused_by_key_and_file(kind: str, tmp_path: Path) -> None:
    change, said = WRONG[kind]
    state, file = changed(change), tmp_path / "w.pth"
    torch.save(state, file)
    with pytest.raises(BadWeights, match=said) as error:
        load_model("vgg16", weights=file)
    assert str(file) in str(error.value)
    assert next(iter(state)) in str(error.value)


def test_weights_as_they_should_be_are_read(tmp_path: Path) -> None:
    torch.save(changed(lambda w: w.half()), tmp_path / "w.pth")
    assert next(iter(read_state(tmp_path / "w.pth").values())).dtype == torch.float32


@pytest.mark.parametrize("numbers", [(np.nan, 0.1, 0.3), (0.2, np.nan, 0.3), (0.2, 0.1, np.nan)])
def test_nan_is_never_compared_with_the_paper(numbers: tuple[float, float, float]) -> None:
    assert against_value("it", 0.2, *numbers, n=100).verdict == "too few"
    assert against_claim("it", 0.0, *numbers, n=100).verdict == "too few"


# --- the store ----------------------------------------------------------------------------------------------------


def history(uri: str, run_id: str, name: str) -> list[float]:
    from mlflow import MlflowClient

    return [point.value for point in MlflowClient(tracking_uri=uri).get_metric_history(run_id, name)]


def test_going_on_with_a_run_stores_no_point_twice(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with open_run("it", "it", {"seed": 0}, tracking_uri=uri) as run:
        run.log_metrics({"ssim": 0.5, "pcc": 0.25})
        run.log_traces({"loss": ([0, 1], [3.0, 2.0])})
    for _ in range(2):
        time.sleep(0.01)
        with open_run("it", "it", {"seed": 0}, tracking_uri=uri, resume=run.id) as again:
            again.log_metrics({"ssim": 0.5, "pcc": 0.75})
            again.log_traces({"loss": ([0, 1], [3.0, 2.0])})
    assert history(uri, run.id, "ssim") == [0.5]
    assert history(uri, run.id, "pcc") == [0.25, 0.75]
    assert history(uri, run.id, "loss") == [3.0, 2.0]


def test_a_run_without_its_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    """The defaults of the options would take the place of what was asked for."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(KeyboardInterrupt), open_run("apop", "apop vgg16", {}, tracking_uri=uri) as run:
        raise KeyboardInterrupt
    result = call("apop", "--resume", run.id, "--tracking-uri", uri)
    assert result.exit_code == 1
    assert f"run {run.id} was interrupted before its settings were stored; start a new run" in result.output


class Lock:
    """Holds a database locked for a while."""

    def __init__(self, file: Path, seconds: float) -> None:
        self._held = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(file, seconds))

    def _hold(self, file: Path, seconds: float) -> None:
        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            self._held.set()
            time.sleep(seconds)
            database.execute("COMMIT")

    def __enter__(self) -> None:
        self._thread.start()
        self._held.wait()

    def __exit__(self, *error: object) -> None:
        self._thread.join()


@pytest.fixture
def mlflow_waits_for_a_moment() -> Iterator[None]:
    """For a tenth of a second, and not 20, before it says that a database is locked."""

    def sooner(_: object, __: object, statement: str, parameters: object, *___: object) -> tuple[str, object]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", sooner, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", sooner)


@pytest.mark.usefixtures("mlflow_waits_for_a_moment")
def test_a_locked_store_is_waited_for(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with open_run("it", "it", {"seed": 0}, tracking_uri=uri) as run:
        with (
            Lock(tmp_path / "mlflow.db", 1),
            pytest.warns(SrdLabWarning, match="locked; waiting for a minute at most"),
        ):
            run.log_metrics({"ssim": 0.5})
        assert history(uri, run.id, "ssim") == [0.5]


def test_a_store_that_stays_locked_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def locked() -> None:
        tries.append(time.monotonic())
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(store, "_PATIENCE", 1.0)
    opened = store.open_store(f"sqlite:///{tmp_path}/mlflow.db", "it", "it")
    with (
        pytest.warns(SrdLabWarning),
        pytest.raises(StoreTrouble, match=r"mlflow\.db cannot be used: database is locked"),
    ):
        opened._patiently(locked)
    assert len(tries) > 2
    assert 1 <= tries[-1] - tries[0] < 3
    monkeypatch.setattr(store, "_LOCKED", "another trouble")
    with pytest.raises(StoreTrouble):
        opened._patiently(locked)


def test_a_store_of_another_version_of_mlflow_is_one_line(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with open_run("it", "it", {}, tracking_uri=uri):
        pass
    other = shutil.copyfile(tmp_path / "mlflow.db", tmp_path / "other.db")  # MLflow looks at each store once
    with closing(sqlite3.connect(other)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    uri = f"sqlite:///{other}"
    with pytest.raises(StoreTrouble) as error:
        open_run("it", "it", {}, tracking_uri=uri)
    said = str(error.value)
    assert said.startswith(f"the MLflow store {uri} cannot be used: another version of MLflow made it")
    assert f"`mlflow db upgrade {uri}`" in said
    assert "\n" not in said


def test_what_a_command_notes_is_kept_with_its_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(*APOP, "--workers", "99", "--no-track", "--out", str(out))
    assert result.exit_code == 0, result.output
    said = "1 worker decodes, and not 99: there is no work for more"
    assert result.stderr == f"Note: {said}\n"
    assert (out / "notes.txt").read_text() == f"{said}\n"


def test_notes_are_kept_from_before_a_run_until_its_end(tmp_path: Path) -> None:
    for session in ("first", "second"):
        resume = str(tmp_path / "out") if session == "second" else None
        with warnings.catch_warnings(record=True), Notes() as notes:
            warnings.simplefilter("always")
            warnings.warn(f"{session}, early", SrdLabWarning, stacklevel=1)
            with open_run("it", "it", {}, track=False, out=tmp_path / "out", resume=resume) as run:
                notes.keep_in(run)
                warnings.warn("late", SrdLabWarning, stacklevel=1)
    said = (tmp_path / "out" / "notes.txt").read_text()
    assert said == "first, early\nlate\nsecond, early\n"


def test_a_store_of_corrupt_pages_is_one_line(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with open_run("it", "it", {"seed": 0}, tracking_uri=uri):
        pass
    file = tmp_path / "mlflow.db"
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(bytes(content))
    result = call(*APOP, "--tracking-uri", uri)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "cannot be used" in result.output
    assert "SELECT" not in result.output


# --- numbers given in Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 0.0},
        {"sigma": float("nan")},
        {"step": float("inf")},
        {"step": -1.0},
        {"squares": 1.5},
        {"squares": -0.1},
    ],
)
def test_numbers_of_a_black_box_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(BadValue, match=f"the black-box attack needs .*{next(iter(options))}"):
        BlackBox(Gradient(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.0, -0.1, float("nan"), float("inf")])
def test_noise_of_a_metric_is_checked(noise: float) -> None:
    with pytest.raises(BadValue, match="noise of standard deviation"):
        under_noise(None, noise, 1, 0)  # type: ignore[arg-type]


def test_weights_are_written_into_a_folder_that_is_made(tmp_path: Path) -> None:
    for name in ("w.pth", "w.npz", "w.safetensors"):
        save_weights(load_model("vgg16"), file := tmp_path / "new" / "er" / name)
        assert read_state(file)


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_cannot_be_drawn(count: int) -> None:
    with pytest.raises(BadValue, match="images cannot be drawn"):
        draw_images(load_data("scenes"), count, 0)


def test_more_images_than_there_are_is_said() -> None:
    with pytest.warns(
        SrdLabWarning, match="3000 images were asked for, and the data have 2000: all are taken"
    ):
        assert len(draw_images(load_data("scenes"), 3000, 0)) == 2000
