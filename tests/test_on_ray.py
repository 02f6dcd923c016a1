"""Batches on Ray's own test cluster of several nodes on this machine: the digits of a local run, whatever dies meanwhile."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import command as call
from small_networks import small_model

from srd_lab.errors import BadInput, SrdLabWarning, Unavailable
from srd_lab.runs import on_ray
from srd_lab.runs.executors import Local, connected
from srd_lab.runs.on_ray import OnRay, _Flight
from srd_lab.runs.work import Advance, Arrays, Item, Part, Work
from srd_lab.runtime import Batcher
from srd_lab.types import Sample

ray = pytest.importorskip("ray")

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
ON_CPU = ("--device", "cpu", "--batch-size", "2", "--threads", "1", "--no-track")
APOP = ("apop", "--images", "7", "--inputs", "zeros,normal", "--no-binarize", *ON_CPU)
COMMANDS = {
    "apop": APOP,
    "evaluate": ("evaluate", "--methods", "gradient", "--metrics", "sparseness", "--images", "5", *ON_CPU),
    "attack": ("attack", "--attack", "eq10", "--method", "gradient", "--pairs", "3", "--steps", "2", *ON_CPU),
}
TABLES = ("images.csv", "pairs.csv", "scores.csv")

pytestmark = [
    pytest.mark.slow,
    # what Ray leaves to be collected in the process that uses it: files of its logs, sockets, processes that it ended
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored.*:pytest.PytestUnraisableExceptionWarning"),
]


def collect() -> None:
    """What Ray leaves open goes here, and not as an error of a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    collect()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; the first is this process's own and stays."""
    from ray.cluster_utils import Cluster

    # else it ends workers for want of the memory that other processes of this machine hold
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8},
        )
        on_ray.connect(made.address)
        made.add_node(num_cpus=1, object_store_memory=10**8)
        yield made
        on_ray.close()
        made.shutdown()
    collect()


class Numbers:
    """A data set of grey images of their own number."""

    classes: tuple[str, ...] = ("a", "b")
    labels = torch.zeros(100, dtype=torch.long)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.full((3, 12, 12), index / 100), 0, None, self.name(index))

    def name(self, index: int) -> str:
        return f"image {index}"


@dataclass(frozen=True)
class Logits(Work):
    """Logits of every image, and the process that they were made by; ``folder`` is where batches leave their traces."""

    folder: str = ""
    seconds: float = 0.0

    def __call__(self, some: list[Item], advance: Advance) -> Arrays:
        self.before(some)
        time.sleep(self.seconds)
        x = torch.stack([item.sample.image for item in some])
        with torch.no_grad():
            logits = self.model(x).numpy()
        return {"logits": logits, "pid": np.full(len(some), os.getpid())}

    def before(self, some: list[Item]) -> None:
        """Nothing."""

    def first_time(self, some: list[Item]) -> bool:
        trace = Path(self.folder, str(some[0].number))
        if trace.exists():
            return False
        trace.touch()
        return True


@dataclass(frozen=True)
class DiesOnce(Logits):
    def before(self, some: list[Item]) -> None:
        if some[0].number == 4 and self.first_time(some):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class AlwaysDies(Logits):
    def before(self, some: list[Item]) -> None:
        if some[0].number == 4:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class StuckOnOneNode(Logits):
    """There a batch takes forever; until then the others wait."""

    node: str = ""

    def before(self, some: list[Item]) -> None:
        stuck = Path(self.folder, "stuck")
        if not self.node:
            return
        if ray.get_runtime_context().get_node_id() == self.node:
            stuck.touch()
            time.sleep(600)
        elif some[0].number >= 4:
            soon(stuck.exists)


def soon(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 180  # a worker imports PyTorch first
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


@dataclass(frozen=True)
class Fails(Logits):
    error: Exception = field(default_factory=lambda: BadInput("an image is wrong"))

    def before(self, some: list[Item]) -> None:
        if some[0].number == 4:
            raise self.error


@dataclass(frozen=True)
class Warns(Logits):
    def before(self, some: list[Item]) -> None:
        warnings.warn("a result to be known of", SrdLabWarning, stacklevel=2)


@dataclass(frozen=True)
class Narrow(Logits):
    """Memory suffices for one image."""

    def before(self, some: list[Item]) -> None:
        if len(some) > 1:
            raise MemoryError


def parts(count: int, size: int = 2) -> list[Part]:
    return [
        Part(k, tuple((i,) for i in range(k, k + size)), tuple(f"image {i}" for i in range(k, k + size)))
        for k in range(0, count, size)
    ]


def local(work: Work, count: int) -> list[Arrays]:
    return list(Local(0).run(work, Numbers(), parts(count), Batcher(2), lambda steps: None))


def on_cluster(work: Any, count: int, batcher: Batcher | None = None, **how: Any) -> Iterator[Arrays]:
    given = (work, Numbers(), parts(count), batcher or Batcher(2), lambda steps: None)
    return OnRay("cpu", **how).run(*given)


def the_same(found: list[Arrays], expected: list[Arrays]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["logits"], other["logits"])
        np.testing.assert_array_equal(one["files"], other["files"])


def fields(folder: Path | str = "", **more: Any) -> dict[str, Any]:
    return {"model": small_model(), "device": CPU, "folder": str(folder), **more}


def succeed(*arguments: str | Path) -> str:
    result = call(*map(str, arguments))
    assert result.exit_code == 0, result.output
    return result.output


def tables(folder: Path) -> dict[str, str]:
    found = (file for file in sorted(folder.rglob("*.csv")) if file.name in TABLES)
    return {file.relative_to(folder).as_posix(): file.read_text() for file in found}


@pytest.mark.usefixtures("unseen", "cluster")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_on_ray_what_it_says_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(*COMMANDS[name], "--out", tmp_path / "here")
    monkeypatch.setattr("srd_lab.runs.executors.worked", None)  # this process does nothing of it
    succeed(*COMMANDS[name], "--executor", "ray", "--out", tmp_path / "there")
    assert tables(tmp_path / "there") == tables(tmp_path / "here") != {}


def test_both_nodes_work_and_batches_keep_their_order(cluster: Any) -> None:
    work = Logits(**fields(seconds=0.1))
    found = list(on_cluster(work, 24))
    the_same(found, local(work, 24))
    pids = {int(pid) for arrays in found for pid in arrays["pid"]}
    assert len(pids) >= 2
    assert os.getpid() not in pids
    assert all(array.flags.writeable for array in found[0].values())


def test_a_node_that_is_lost_costs_its_batches_alone(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    work = StuckOnOneNode(**fields(tmp_path, node=node.node_id))

    def work_on() -> Iterator[Arrays]:
        for number, arrays in enumerate(on_cluster(work, 40)):
            if number == 1:
                soon((tmp_path / "stuck").exists)
                cluster.remove_node(node, allow_graceful=False)
            yield arrays

    with pytest.warns(
        SrdLabWarning, match=r"^1 batches were done again: 1 as a (worker died|machine was lost)"
    ):
        found = list(work_on())
    the_same(found, local(Logits(**fields()), 40))


def test_errors_of_the_work_arrive_as_they_are(cluster: Any) -> None:
    with pytest.raises(BadInput, match=r"^an image is wrong$"):
        list(on_cluster(Fails(**fields()), 10))
    with pytest.raises(KeyError, match=r"^'x'$"):
        list(on_cluster(Fails(**fields(), error=KeyError("x")), 10))


def test_what_workers_warn_of_is_said_once_here(cluster: Any) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        list(on_cluster(Warns(**fields()), 10))
    assert [str(w.message) for w in heard if w.category is SrdLabWarning] == ["a result to be known of"]


def test_memory_that_runs_out_halves_the_batch(cluster: Any) -> None:
    batcher = Batcher(2)
    the_same(list(on_cluster(Narrow(**fields()), 6, batcher)), local(Narrow(**fields()), 6))
    assert batcher.size == 1


def test_a_node_that_joins_late_is_used(cluster: Any) -> None:
    work = Logits(**fields(seconds=0.2))
    found, nodes = [], []
    for arrays in on_cluster(work, 120):
        found.append(arrays)
        if len(found) == 4:
            nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    before = {int(arrays["pid"][0]) for arrays in found[:4]}
    assert len({int(arrays["pid"][0]) for arrays in found} - before) >= 2
    assert OnRay()._at_once(gpus=False) == 4
    the_same(found, local(Logits(**fields()), 120))
    for node in nodes:
        cluster.remove_node(node)


def test_what_cannot_be_sent_is_one_line(cluster: Any) -> None:
    model = small_model()
    model.lock = threading.Lock()
    with pytest.raises(Unavailable, match=r"cannot be sent to other processes \(.*leave --executor ray"):
        list(on_cluster(Logits(model, CPU), 4))


def test_more_threads_than_a_machine_has_are_one_line(cluster: Any) -> None:
    with pytest.raises(Unavailable, match="no machine of the Ray cluster has the 99 CPUs"):
        list(on_cluster(Logits(**fields()), 4, threads=99))
    with pytest.raises(Unavailable, match="the Ray cluster has no GPU for --device cuda:1"):
        list(OnRay("cuda:1").run(None, Numbers(), parts(4), Batcher(2), lambda steps: None))  # type: ignore[arg-type]


@pytest.mark.usefixtures("unseen", "cluster")
def test_code_of_the_user_s_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and a method whose class stands in a file of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mean(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Conv2d(3, 10, 1)\n        self.act = nn.ReLU()\n"
        "    def forward(self, x):\n        return self.act(self.fc(x)).mean((2, 3))\n\n\n"
        "def net():\n    torch.manual_seed(0)\n    return Mean()\n"
    )
    options = ("--model", "mine.py:net", "--size", "64", "--inputs", "zeros", "--images", "4")
    command = ("apop", *options, *ON_CPU)
    succeed(*command, "--out", "here")
    succeed(*command, "--executor", "ray", "--out", "there")
    assert tables(tmp_path / "there") == tables(tmp_path / "here") != {}


@pytest.mark.usefixtures("cluster")
def test_a_command_leaves_the_cluster_that_was_there(cluster: Any) -> None:
    with connected("ray", cluster.address):
        pass
    assert len(on_ray.nodes()) == 2


@pytest.mark.usefixtures("cluster")
def test_the_cluster_is_shown() -> None:
    said = call("cluster").output
    assert said.splitlines()[0].split() == ["node", "CPUs", "GPUs", "memory", "alive"]
    assert "2 batches at once on CPUs, of one thread each" in said


def test_the_driver_killed_in_mid_run_resumes_to_the_same_digits(cluster: Any, tmp_path: Path) -> None:
    command = [*APOP[:2], "41", *APOP[3:], "--executor", "ray", "--ray-address", cluster.address]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folder = tmp_path / "killed"
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen(
            [sys.executable, "-m", "srd_lab", *command, "--out", str(folder)],
            env=environment,
            cwd=tmp_path,
            stdout=said,
            stderr=said,
        )
    stored = folder / "vgg16" / "batches"
    try:
        while started.poll() is None and (not stored.is_dir() or len(list(stored.glob("[!.]*"))) < 2):
            time.sleep(0.02)
    finally:
        started.kill()
        started.wait()
    assert json.loads((folder / "run.json").read_text())["status"] == "RUNNING", (
        tmp_path / "said"
    ).read_text()
    before = {file.name: file.stat().st_mtime_ns for file in stored.glob("[!.]*")}
    assert 2 <= len(before) < 21
    succeed("apop", "--no-track", "--resume", folder, "--executor", "ray", "--threads", "1")
    assert {name: (stored / name).stat().st_mtime_ns for name in before} == before
    succeed(*APOP[:2], "41", *APOP[3:], "--out", tmp_path / "whole")
    assert tables(folder) == tables(tmp_path / "whole") != {}


def test_a_worker_that_dies_is_replaced(cluster: Any, tmp_path: Path) -> None:
    with pytest.warns(SrdLabWarning, match="^1 batches were done again: 1 as a worker died$"):
        found = list(on_cluster(DiesOnce(**fields(tmp_path)), 10))
    the_same(found, local(Logits(**fields()), 10))


def test_a_batch_that_always_kills_its_worker_is_given_up(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "MOST_TRIES", 2)  # each takes a process that imports PyTorch
    arriving = on_cluster(AlwaysDies(**fields()), 10)
    with pytest.raises(Unavailable, match="batch 00004-00005 was given up after 2 tries: a worker died"):
        list(arriving)


# --- without a cluster ----------------------------------------------------------------------------------


class Kinds:
    """Ray's exceptions, less what makes them."""

    class RayError(Exception): ...

    class RayTaskError(RayError): ...

    class OutOfMemoryError(RayError): ...

    class NodeDiedError(RayError): ...

    class LocalRayletDiedError(RayError): ...

    class WorkerCrashedError(RayError): ...

    class ObjectLostError(RayError): ...

    class TaskUnschedulableError(RayError): ...

    class RuntimeEnvSetupError(RayError): ...


class Pretended:
    """In the place of Ray: a task is done when it is asked for; the first tries of batch 1 end in ``errors``."""

    exceptions = Kinds

    def __init__(self, errors: list[Exception], place: int = -1) -> None:
        self.place = place  # of the one that is done first, among those under way
        self.errors, self.sizes, self.most, self.cancelled = errors, list[int](), 0, list[Any]()

    def submit(self, part: Part, size: int) -> tuple[int, int]:
        self.sizes.append(size)
        return part.first, len(self.sizes)

    def wait(self, tasks: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(tasks))
        task = tasks.pop(self.place)
        return [task], tasks

    def get(self, task: tuple[int, int]) -> Any:
        if task[0] == 2 and self.errors:
            raise self.errors.pop(0)
        return {"first": np.array(task[0])}, [], 8

    def cancel(self, task: Any) -> None:
        self.cancelled.append(task)


def flight(pretended: Pretended, count: int = 20, slots: int = 2) -> _Flight:
    return _Flight(pretended, pretended.submit, parts(count), Batcher(8), lambda: slots)


def test_memory_of_a_machine_that_runs_out_halves_the_batch_until_it_is_given_up() -> None:
    pretended = Pretended([Kinds.OutOfMemoryError()] * 2)
    with pytest.warns(SrdLabWarning, match="^2 batches were done again: 2 as memory ran out on a machine$"):
        found = [int(arrays["first"]) for arrays in flight(pretended)]
    assert found == list(range(0, 20, 2))
    assert sorted(pretended.sizes) == [2, 4, *[8] * 10]
    with pytest.raises(Unavailable, match="batch 00002-00003 was given up after 5 tries: memory ran out"):
        list(flight(Pretended([Kinds.OutOfMemoryError()] * 5)))


def test_four_batches_are_under_way_for_each_that_is_worked_on() -> None:
    pretended = Pretended([])
    list(flight(pretended, 100, slots=3))
    assert pretended.most == 12


def test_every_reason_is_counted() -> None:
    errors = [Kinds.NodeDiedError(), Kinds.ObjectLostError(), Kinds.RayError("odd\nindeed")]
    with pytest.warns(
        SrdLabWarning, match="3 batches were done again: 1 as a machine was lost, 1 as a result"
    ):
        list(flight(Pretended(errors)))
    with pytest.raises(Unavailable, match="the Ray cluster cannot start a batch: no room"):
        list(flight(Pretended([Kinds.TaskUnschedulableError("no room")])))


def test_what_is_under_way_is_cancelled() -> None:
    pretended = Pretended([], place=0)
    on_its_way = flight(pretended)
    next(iter(on_its_way))
    on_its_way.end()
    assert len(pretended.cancelled) == 7


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call(*APOP, "--executor", "ray", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "install srd-lab[ray]" in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "nowhere.invalid:6379", "ray://127.0.0.1:1", "127.0.0.1:port"]
)
def test_a_cluster_that_cannot_be_reached_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    result = call(*APOP, "--executor", "ray", "--ray-address", address)
    assert result.exit_code == 1
    assert f"the Ray cluster {address} cannot be reached" in result.output
    assert result.output.count("\n") == 1


def test_an_address_that_nobody_goes_to_is_refused() -> None:
    assert "add --executor ray" in call(*APOP, "--ray-address", "127.0.0.1:6379").output
