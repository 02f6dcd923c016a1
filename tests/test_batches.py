"""Work batch by batch: stored, resumed with the rest, refused where the stored part is of something else."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srd_lab.data import SkippedFile
from srd_lab.errors import BadData, OtherWork, SrdLabWarning
from srd_lab.runs import batches
from srd_lab.runs.batches import Stage, in_batches
from srd_lab.runs.files import FolderFiles
from srd_lab.runs.settings import Settings
from srd_lab.runs.tracking import FolderRun
from srd_lab.runs.work import Advance, Arrays, Item, joined, skipped_in
from srd_lab.runtime import Batcher
from srd_lab.types import Sample

INDICES = [3, 4, 8, 9, 11, 12, 20]


class Numbers:
    """Images whose pixels are their index; those in ``broken`` cannot be read."""

    classes = ("it",)
    labels = torch.zeros(30, dtype=torch.long)

    def __init__(self, prefix: str = "it", broken: Sequence[int] = ()) -> None:
        self.prefix, self.broken = prefix, broken

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise SkippedFile(self.name(index), "no image")
        return Sample(torch.full((3, 1, 1), float(index)), 0, None, self.name(index))


class Work:
    """Doubles the pixels; keeps the item numbers of every call, and fails at the call ``fails``."""

    def __init__(self, fails: int | None = None, room: int = 99) -> None:
        self.calls, self.fails, self.room = list[list[int]](), fails, room

    def __call__(self, some: Sequence[Item], advance: Advance) -> Arrays:
        self.calls.append([item.number for item in some])
        if len(self.calls) == self.fails:
            raise KeyboardInterrupt
        advance(2 * len(some))
        if len(some) > self.room:
            raise MemoryError
        values = [[float(sample.image[0, 0, 0]) * 2 for sample in item.samples] for item in some]
        return {
            "number": np.array([item.number for item in some]),
            "name": np.array([item.sample.name for item in some]),
            "double": np.array(values)[:, 0],
            "curve": np.ones((len(some), len(some))),
        }


def parts(folder: Path, work: Work, size: int, *, resume: bool = False, **given: Any) -> list[Arrays]:
    run = FolderRun("it", "it", {}, folder)
    settings = Settings(resumed=resume, workers=0)
    options: dict[str, Any] = {"dataset": Numbers(), "items": INDICES, "steps": 2, **given}
    dataset, items = options.pop("dataset"), options.pop("items")
    return list(in_batches(Stage(run, dataset, items, work, Batcher(size), **options), settings))


def stored(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "batches").iterdir())


def test_batches_come_in_order_and_are_stored(tmp_path: Path) -> None:
    found = parts(tmp_path, work := Work(), 3)
    assert work.calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert stored(tmp_path) == ["00000-00002.npz", "00003-00005.npz", "00006-00006.npz"]
    table = joined(found)
    assert table["double"].tolist() == [2 * index for index in INDICES]
    assert table["files"].tolist() == table["name"].tolist() == [f"it/{index}" for index in INDICES]
    assert table["number"].tolist() == list(range(7))
    # Curves of several lengths: as long as the longest.
    assert np.isnan(table["curve"]).sum(1).tolist() == [0] * 6 + [2]
    with np.load(tmp_path / "batches" / "00003-00005.npz") as arrays:
        assert set(arrays) == {"number", "name", "double", "curve", *batches.ADDED}


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_a_resumed_session_does_the_rest_at_any_batch_size(size: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        parts(tmp_path, Work(fails=3), 2)
    assert stored(tmp_path) == ["00000-00001.npz", "00002-00003.npz"]
    found = parts(tmp_path, work := Work(), size, resume=True)
    assert [number for call in work.calls for number in call] == [4, 5, 6]
    assert max(map(len, work.calls)) == min(size, 3)
    assert joined(found)["double"].tolist() == [2 * index for index in INDICES]
    again = parts(tmp_path, work := Work(), 4, resume=True)
    assert work.calls == []
    assert joined(again)["double"].tolist() == [2 * index for index in INDICES]


def test_what_another_run_left_in_the_folder_is_not_read(tmp_path: Path) -> None:
    parts(tmp_path, Work(), 3)
    parts(tmp_path, work := Work(), 3)
    assert len(work.calls) == 3


def test_a_batch_that_was_removed_is_done_again(tmp_path: Path) -> None:
    parts(tmp_path, Work(), 2)
    (tmp_path / "batches" / "00002-00003.npz").unlink()
    found = parts(tmp_path, work := Work(), 5, resume=True)
    assert work.calls == [[2, 3]]
    assert joined(found)["number"].tolist() == list(range(7))


def cut_short(batch: Path) -> None:
    batch.write_bytes(batch.read_bytes()[:200])


def flip_a_bit(batch: Path) -> None:
    content = bytearray(batch.read_bytes())
    content[len(content) // 2] ^= 16
    batch.write_bytes(bytes(content))


def without(*names: str) -> Callable[[Path], None]:
    def change(batch: Path) -> None:
        with np.load(batch) as arrays:
            left = {name: array for name, array in arrays.items() if name not in names}
        np.savez_compressed(batch, **left)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut short": cut_short,
    "a bit flipped": flip_a_bit,
    "empty": lambda batch: batch.write_bytes(b""),
    "no archive": lambda batch: batch.write_text("hello"),
    "of objects": lambda batch: np.savez(batch, files=np.array([{}], dtype=object)),
    "without files": without("files"),
    "without seconds": without("seconds"),
    "without results": without("double"),
    "numbers the wrong way round": lambda batch: batch.rename(batch.with_name("00002-00000.npz")),
    "twice": lambda batch: batch.with_name("00003-00004.npz").write_bytes(batch.read_bytes()),
}


@pytest.mark.parametrize("way", DAMAGE)
def test_a_disturbed_batch_is_put_aside_and_made_again(way: str, tmp_path: Path) -> None:
    expected = joined(parts(tmp_path, Work(), 2))
    before = stored(tmp_path)
    DAMAGE[way](tmp_path / "batches" / "00002-00003.npz")
    with pytest.warns(
        SrdLabWarning, match=r"^batches/\d+-\d+\.npz is made again, and is now called .*\.damaged: "
    ):
        found = joined(parts(tmp_path, work := Work(), 2, resume=True))
    assert work.calls == ([] if way == "twice" else [[2, 3]])
    for name in ("double", "number", "files"):
        np.testing.assert_array_equal(found[name], expected[name])
    aside = [name for name in stored(tmp_path) if name.endswith(".damaged")]
    assert len(aside) == 1  # nothing is thrown away
    assert [name for name in stored(tmp_path) if name not in aside] == before
    parts(tmp_path, work := Work(), 2, resume=True)  # and it is whole again
    assert work.calls == []


def test_what_a_server_keeps_under_its_old_name_is_put_aside_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(files: FolderFiles, path: str) -> str:
        aside = f"{path}.damaged"
        files.write(aside, files.read(path))
        return aside

    monkeypatch.setattr(FolderFiles, "put_aside", copied)
    parts(tmp_path, Work(), 2)
    DAMAGE["twice"](tmp_path / "batches" / "00002-00003.npz")
    with pytest.warns(SrdLabWarning, match="its numbers are not in order"):
        parts(tmp_path, Work(), 2, resume=True)
    parts(tmp_path, work := Work(), 2, resume=True)  # warnings are errors
    assert work.calls == []


def test_other_files_beside_batches_are_left_alone(tmp_path: Path) -> None:
    parts(tmp_path, Work(), 2)
    strangers = ("foo.npz", "Thumbs.db", "00000-00001.npz.bak", "1-2.npz", "-.npz", "x-00001.npz")
    for name in strangers:
        (tmp_path / "batches" / name).write_bytes(b"mine")
    parts(tmp_path, work := Work(), 2, resume=True)
    assert work.calls == []
    assert all((tmp_path / "batches" / name).read_bytes() == b"mine" for name in strangers)


def test_what_killed_writers_left_is_removed_on_resume(tmp_path: Path) -> None:
    parts(tmp_path, Work(), 2)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, other = (tmp_path / "batches" / f".00000-00001.npz.{pid}.part" for pid in (ended.pid, os.getpid()))
    for part in (left, other):
        part.write_bytes(b"half")
    parts(tmp_path, Work(), 2, resume=True)
    assert (left.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize(
    "given",
    [
        {"dataset": Numbers("other")},
        {"items": [*INDICES[:3], 7, *INDICES[4:]]},
        {"items": [1, *INDICES]},
        {"items": INDICES[:4]},
        {"items": INDICES[:3]},
        {"items": [(index, index + 1) for index in INDICES]},
    ],
    ids=["renamed", "another", "one more", "cut at a batch", "cut in a batch", "pairs"],
)
def test_stored_batches_of_other_images_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    parts(tmp_path, Work(), 2)
    with pytest.raises(
        OtherWork, match=r"^run .* was made with other images in batch batches/0000\d-0000\d.npz; "
    ):
        parts(tmp_path, Work(), 2, resume=True, **given)


def test_files_that_cannot_be_read_are_left_out_by_name_with_their_pair(tmp_path: Path) -> None:
    data, pairs = Numbers(broken=(4, 20)), [(3, 4), (8, 9), (11, 12), (1, 20)]
    for resume in (False, True):
        table = joined(parts(tmp_path, Work(), 3, dataset=data, items=pairs, resume=resume))
        assert table["number"].tolist() == [1, 2]
        assert table["files"].tolist() == [f"it/{index}" for pair in pairs for index in pair]
        assert skipped_in(table) == {"it/4": "no image", "it/20": "no image"}
        assert "double" not in parts(tmp_path, Work(), 3, dataset=data, items=pairs, resume=True)[-1]
    with pytest.raises(BadData, match=r"^not one image is left; 1 file skipped: it/4 \(no image\)$"):
        parts(tmp_path / "none", Work(), 3, dataset=data, items=[4])


def test_seconds_are_those_of_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(KeyboardInterrupt):
        parts(tmp_path, Work(fails=2), 3)
    assert float(joined(parts(tmp_path, Work(), 3, resume=True))["seconds"]) == 3 * 10


@pytest.mark.parametrize("resume", [False, True])
def test_the_bar_ends_where_it_should(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where work is done twice for lack of memory, is stored already, or cannot be read."""
    if resume:
        with pytest.raises(KeyboardInterrupt):
            parts(tmp_path, Work(fails=2), 3, dataset=Numbers(broken=(4, 12)))
    seen = list[int]()

    class Bar:
        def __enter__(self) -> Any:
            return seen.append

        def __exit__(self, *_: object) -> None: ...

    totals = []
    monkeypatch.setattr(batches, "progress", lambda total, label: totals.append(total) or Bar())
    found = parts(tmp_path, Work(room=1), 3, dataset=Numbers(broken=(4, 12)), resume=resume)
    assert joined(found)["number"].tolist() == [0, 2, 3, 4, 6]
    assert totals == [2 * 7]
    assert sum(seen) == 2 * 7
    assert min(seen) >= 0
