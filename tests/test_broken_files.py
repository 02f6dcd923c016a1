"""Broken files of every kind (:mod:`broken_files`): read, left out by name, or one line, soon."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_files import WAYS, broken, main, sound
from PIL import Image

from srd_lab.data import SkippedFile, load_data
from srd_lab.errors import SrdLabError, SrdLabWarning
from srd_lab.models.files import read_state
from srd_lab.runs.tracking import open_run

SOUND = sound()
PICTURES = [name for name in SOUND if name.rpartition(".")[0] == name.rpartition(".")[2]]
CLASS = "n01440764"
SECONDS = 60.0  # for all ways to break one file


def images_of(spec: str) -> int:
    """How many images a data set gives; the others are left out by name."""
    found = 0
    data = load_data(spec, non_rgb="convert")
    for i in range(len(data)):
        try:
            sample = data[i]
        except SkippedFile:
            continue
        assert sample.image.shape[0] == 3
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        found += 1
    return found


def two_images(folder: Path) -> Path:
    home = folder / CLASS
    home.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (24, 24)).save(home / f"{name}.png")
    return home


def cifar(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> int:
        (folder / name).write_bytes(content)
        return images_of(f"cifar10:{folder / name if name.endswith('npz') else folder}")

    return read


def weights(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> Any:
        (folder / name).write_bytes(content)
        state = read_state(folder / name)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())

    return read


def batch(folder: Path, content: bytes) -> Any:
    with open_run("it", "it", {}, track=False, out=folder / "out") as run:
        run.save_bytes("batches/00000-00002.npz", content)
        return run.load_arrays("batches/00000-00002.npz")


def run(folder: Path, content: bytes) -> Any:
    (folder / "run.json").write_bytes(content)
    with open_run("it", "it", {}, track=False, resume=str(folder)) as found:
        return found.params


def table(folder: Path, content: bytes) -> int:
    two_images(folder)
    (folder / "boxes.csv").write_bytes(
        content.replace(b".png", b".png").replace(b"a.png", f"{CLASS}/a.png".encode())
    )
    return images_of(f"imagenet:{folder}")


def annotation(folder: Path, content: bytes) -> int:
    two_images(folder)
    home = folder / "Annotations" / "CLS-LOC" / "val"
    home.mkdir(parents=True)
    (home / "a.xml").write_bytes(content)
    return images_of(f"imagenet:{folder}")


def labels(folder: Path, content: bytes) -> int:
    for file in two_images(folder).iterdir():
        file.rename(folder / file.name)
    (folder / CLASS).rmdir()
    (folder / "val.txt").write_bytes(content)
    return images_of(f"imagenet:{folder}")


READERS: dict[str, Callable[[Path, bytes], Any]] = {
    **{name: cifar(name) for name in ("test_batch", "test_batch.bin", "cifar.npz")},
    **{name: weights(name) for name in ("weights.pth", "weights.npz", "weights.safetensors")},
    "batch.npz": batch,
    "run.json": run,
    "boxes.csv": table,
    "boxes.xml": annotation,
    "val.txt": labels,
}


def test_every_kind_of_file_is_tried() -> None:
    assert {*READERS, *PICTURES} == set(SOUND)


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    def read(content: bytes, place: str) -> Any:
        (tmp_path / place).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SrdLabWarning)
            return READERS[name](tmp_path / place, content)

    images = read(SOUND[name], "sound")
    assert images != 0
    began, said = time.monotonic(), dict[str, str]()
    for k, (how, content) in enumerate(broken(name, SOUND[name])):
        try:
            found = read(content, str(k))
            if isinstance(images, int) and found < images:
                said[f"{k}: {how}"] = "left out"
        except SrdLabError as error:
            said[f"{k}: {how}"] = str(error)
        except Exception as error:
            raise AssertionError(f"{name}, {how}: {error!r}") from error
    assert len(said) > WAYS // 5
    assert [line for line in said.items() if "\n" in line[1] or len(line[1]) > 1000] == []
    assert time.monotonic() - began < SECONDS


def test_entities_of_an_annotation_do_not_grow(tmp_path: Path) -> None:
    """Ten billion letters from a kilobyte."""
    grown = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 10))
    bomb = f'<!DOCTYPE annotation [<!ENTITY l0 "ten letters">{grown}]><annotation>&l9;</annotation>'
    began = time.monotonic()
    assert annotation(tmp_path, bomb.encode()) == 1
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("source", ["imagenet", "imagefolder"])
def test_a_broken_picture_is_read_or_left_out_by_name(name: str, source: str, tmp_path: Path) -> None:
    home = tmp_path / CLASS
    home.mkdir()
    (home / f"sound.{name}").write_bytes(SOUND[name])
    for k, (_, content) in enumerate(broken(name, SOUND[name])):
        (home / f"{k}.{name}").write_bytes(content)
    began = time.monotonic()
    found = images_of(f"{source}:{tmp_path}")
    assert 1 <= found <= WAYS
    assert time.monotonic() - began < SECONDS


def test_the_corpus_is_written_out(tmp_path: Path) -> None:
    main(str(tmp_path))
    assert len(list(tmp_path.rglob("*"))) == len(SOUND) * (WAYS + 1)
    assert dict(broken("a", b"content")) == dict(broken("a", b"content"))
