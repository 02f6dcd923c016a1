"""Batches read by worker processes are those that are read here, and their errors and ends are quiet ones."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srd_lab.data import Loaded, load_batches, load_data, loading, skipped_report
from srd_lab.errors import BadValue, SrdLabError
from srd_lab.types import Sample

WORKERS = 0, 1, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of noise with a box each, but 3 is grey and 6 is text."""
    home = tmp_path / "n01440764"
    home.mkdir()
    rng = np.random.default_rng(0)
    for k in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(home / f"{k}.png")
    Image.new("L", (30, 40)).save(home / "3.png")
    (home / "6.png").write_text("no image")
    boxes = [f"n01440764/{k}.png,{k},5,20,30\n" for k in range(9)]
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\n" + "".join(boxes))
    return tmp_path


PLAN = [[7, 2], [3, 6], [], [9, 0, 3, 1], [-1, 6]]


def assert_same(one: Sample, other: Sample) -> None:
    assert (one.name, one.label) == (other.name, other.label)
    assert one.image.dtype == other.image.dtype
    assert one.image.stride() == other.image.stride()
    assert torch.equal(one.image, other.image)
    assert (one.mask is None) == (other.mask is None)
    if one.mask is not None and other.mask is not None:
        assert one.mask.dtype == torch.bool
        assert torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_come_in_order_with_what_was_skipped(folder: Path, workers: int) -> None:
    data = load_data(f"imagenet:{folder}", size=32)
    found = list(load_batches(data, (indices for indices in PLAN), workers))
    assert [batch.indices for batch in found] == [[7, 2], [], [], [9, 0, 1], [-1]]
    grey, text = {"n01440764/3.png": "not RGB but L"}, {"n01440764/6.png": "cannot be decoded: no image"}
    assert [batch.skipped for batch in found] == [{}, grey | text, {}, grey, text]
    for batch in found:
        assert isinstance(batch, Loaded)
        for index, sample in zip(batch.indices, batch.samples, strict=True):
            assert_same(sample, data[index])
            sample.image.add_(1)  # it can be written to
    assert [sample.mask is None for sample in found[3].samples] == [True, False, False]


def test_scenes_are_the_same_from_workers() -> None:
    data = load_data("scenes", limit=12)
    for batch in load_batches(data, [range(5), range(5, 12)], 2):
        for index, sample in zip(batch.indices, batch.samples, strict=True):
            assert_same(sample, data[index])


class Fractions:
    """Images that are not 8-bit, and an error of index 5."""

    classes = ["all"]  # noqa: RUF012 - as the protocol has it
    labels = torch.zeros(6, dtype=torch.int64)

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Sample:
        if self.error and index == 5:
            raise self.error
        return Sample(torch.full((3, 2, 2), index / 7), 0, None, str(index))


@pytest.mark.parametrize("workers", WORKERS)
def test_pixels_that_are_not_8_bit_arrive_whole(workers: int) -> None:
    data = Fractions()
    (batch,) = load_batches(data, [range(6)], workers)
    for index, sample in enumerate(batch.samples):
        assert_same(sample, data[index])


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_of_the_data_set_arrives_as_it_was(workers: int) -> None:
    batches = load_batches(Fractions(SrdLabError("one line; do that")), [[0], [5, 1], [2]], workers)
    assert next(batches).indices == [0]
    with pytest.raises(SrdLabError) as caught:
        next(batches)
    assert str(caught.value) == "one line; do that"
    assert next(batches, None) is None or workers == 0


class Threads(Fractions):
    """Images that hold the number of threads."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.full((1,), float(torch.get_num_threads())), 0, None, str(index))


def test_a_worker_has_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        counts = [next(load_batches(Threads(), [[0]], workers)).samples[0].image.item() for workers in (0, 1)]
    finally:
        torch.set_num_threads(1)
    assert counts == [2, 1]


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread may end meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are counted by Linux's /proc")
def test_workers_end_with_their_reader() -> None:
    before = children()
    batches = load_batches(load_data("scenes", limit=60), [[k] for k in range(60)], 2)
    assert next(batches).indices == [0]
    assert len(children() - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert children() <= before


def test_random_numbers_of_the_caller_stay_his(folder: Path) -> None:
    before = torch.get_rng_state()
    list(load_batches(load_data(f"imagenet:{folder}", size=8), [[0], [1]], 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("cores", "accelerator", "images", "expected"),
    [
        *((2, False, 1300, 0), (8, False, 1300, 2), (64, False, 1300, 4)),
        *((2, True, 1300, 2), (16, True, 1300, 4), (16, True, 99, 0)),
    ],
)
def test_workers_are_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cores: int, accelerator: bool, images: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert loading._worth(load_data(f"imagenet:{folder}"), images) == expected
    assert loading._worth(load_data("scenes"), images) == 0


def test_what_load_batches_cannot_do_is_said() -> None:
    with pytest.raises(BadValue, match="-1 workers; give 0 or more"):
        load_batches(load_data("scenes"), [[0]], -1)


INTERRUPTED = """
import signal, sys, time
from srd_lab.data import load_batches, load_data
def interrupt(*_): raise KeyboardInterrupt
for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a shell may have set to be ignored
    signal.signal(end, interrupt)
try:
    for batch in load_batches(load_data("scenes"), [range(k, k + 20) for k in range(0, 2000, 20)], 2):
        print("ready", flush=True)
        time.sleep(0.2)
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
def test_ctrl_c_and_hang_up_end_all_at_once_and_quietly() -> None:
    """A terminal sends them to every process of the group."""
    command = [sys.executable, "-c", INTERRUPTED]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        (subprocess.Popen(command, start_new_session=True, **pipes), end)
        for end in (signal.SIGINT, signal.SIGHUP)
    ]
    for process, end in started:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        os.killpg(process.pid, end)
        assert process.communicate(timeout=60)[1] == "interrupted\n"
        assert process.returncode == 1


KILLED = """
import time
from srd_lab.data import load_batches, load_data
for batch in load_batches(load_data("scenes"), [range(k, k + 20) for k in range(0, 2000, 20)], 2):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_soon_after_a_killed_parent() -> None:
    """Also while they wait for a full pipe to be read."""
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(2)  # they decode ahead
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) >= 2
        process.kill()
    ended = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < ended:
        time.sleep(0.1)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def test_the_report_is_one_line() -> None:
    skipped = {f"{k}.JPEG": "not RGB but L" for k in range(7)}
    assert skipped_report({}) == "0 files skipped"
    assert skipped_report({"a.JPEG": "not RGB but L"}) == "1 file skipped: a.JPEG (not RGB but L)"
    assert skipped_report(skipped, shown=2) == (
        "7 files skipped: 0.JPEG (not RGB but L), 1.JPEG (not RGB but L), ..."
    )
    assert skipped_report(skipped, shown=7).endswith("6.JPEG (not RGB but L)")
