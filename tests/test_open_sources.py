"""Data in other libraries' forms: webdataset's shards, and data sets of the datasets library."""

from __future__ import annotations

import csv
import gzip
import io
import pickle
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import OWN_NETWORK, command
from torch import Tensor

from srd_lab.data import SkippedFile, load_batches, load_data
from srd_lab.errors import BadData, BadValue, SrdLabWarning, Unavailable

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
LABELS = [3, 0, 9, 1, 1, 5]


def pixels(k: int) -> Tensor:
    return torch.from_numpy(PIXELS[k]).permute(2, 0, 1).float() / 255


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[k]).save(file, "png")
    return file.getvalue()


# --- shards ---------------------------------------------------------------------------------------------------------


def shard(file: Path, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    with tarfile.open(file, "w", format=form) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file.read_bytes()


def items(*which: int, before: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for k in which
        for member in ((f"{before}{k:03d}.png", png(k)), (f"{before}{k:03d}.cls", b"%d\n" % LABELS[k]))
    ]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_images_are_read_where_they_lie(form: int, tmp_path: Path) -> None:
    long = "" if form == tarfile.USTAR_FORMAT else "a/" * 60  # a name with headers of its own
    shard(
        tmp_path / "s-00.tar",
        *items(0, 1, 2, before=long),
        ("README", b"nothing"),
        ("._000.png", b"x"),
        form=form,
    )
    shard(tmp_path / "s-01.tar", *items(3, 4, 5), form=form)
    for pattern in ("s-{00..01}.tar", "s-0{0,1}.tar", "s-*.tar"):
        with pytest.warns(SrdLabWarning, match="README"):
            data = load_data(f"wds:{tmp_path}/{pattern}", size=64)
        assert data.labels.tolist() == LABELS
        assert [data.name(0), data.name(5)] == [f"s-00.tar/{long}000", "s-01.tar/005"]
        assert all(torch.equal(data[k].image, pixels(k)) for k in (5, 0, 3, 1, 4, 2))
    data = pickle.loads(pickle.dumps(data))
    for workers in (0, 1):
        (loaded,) = load_batches(data, [[4, 1]], workers)
        assert [sample.label for sample in loaded.samples] == [1, 0]
        assert torch.equal(loaded.samples[0].image, pixels(4))


def test_items_are_as_webdataset_groups_them(tmp_path: Path) -> None:
    """The key ends at the first dot of the file's name; folders are a part of it."""
    shard(
        tmp_path / "s.tar",
        *(("v1.0/a.seg.png", png(1)), ("v1.0/a.JPG", png(0)), ("v1.0/a.cls", b"7"), ("v1.0/b.cls", b"8")),
        *(("v1.0/b.seg.png", png(2)), ("v1.0/b.jpg", png(3)), ("v1.0/b.target", b"4")),
    )
    data = load_data(f"wds:{tmp_path}/s.tar", size=64)
    assert (data.labels.tolist(), data.name(0)) == ([7, 8], "s.tar/v1.0/a")
    assert torch.equal(data[1].image, pixels(3))
    with pytest.warns(SrdLabWarning, match=r"1 file skipped: s.tar/v1.0/a \(it has no \.target\)"):
        other = load_data(f"wds:{tmp_path}/s.tar?image=seg.png&label=target", size=64)
    assert other.labels.tolist() == [4]
    assert torch.equal(other[0].image, pixels(2))


@pytest.mark.filterwarnings("ignore")  # theirs
def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    theirs = pytest.importorskip("webdataset", reason="compares with webdataset where it is installed")
    names = (
        "v1.0/a.seg.png",
        "v1.0/a.jpg",
        "b/.c.jpg",
        "b/d.e.jpg",
        "b/d.cls",
        "f.jpg",
        "f.seg.cls",
        "h/f.jpg",
    )
    shard(tmp_path / "s.tar", *((name, png(0)) for name in names))
    items = list(theirs.WebDataset(f"{tmp_path}/s.tar", shardshuffle=False))
    for image in ("jpg", "e.jpg"):
        data = load_data(f"wds:{tmp_path}/s.tar?image={image}&label=none")
        keys = [item["__key__"] for item in items if image in item]
        assert [data.name(k) for k in range(len(data))] == [f"s.tar/{key}" for key in keys]


def test_damaged_items_are_left_out_by_name(tmp_path: Path) -> None:
    grey = io.BytesIO()
    Image.new("L", (64, 64)).save(grey, "png")
    members = [
        *items(0),
        *(("bad.png", b"no image"), ("bad.cls", b"2"), ("grey.png", grey.getvalue()), ("grey.cls", b"2")),
        *(("cat.png", png(1)), ("cat.cls", b"cat"), ("none.png", png(1)), ("only.cls", b"1"), *items(2)),
    ]
    shard(tmp_path / "s.tar", *members)
    with pytest.warns(SrdLabWarning, match="3 files skipped") as said:
        data = load_data(f"wds:{tmp_path}/s.tar", size=64)
    for what in (
        "cat (its .cls is no class index: 'cat')",
        "none (it has no .cls)",
        "only (it has no image, but .cls)",
    ):
        assert f"s.tar/{what}" in str(said[0].message)
    (loaded,) = load_batches(data, [range(len(data))])
    assert [sample.name for sample in loaded.samples] == ["s.tar/000", "s.tar/002"]
    assert loaded.skipped == {"s.tar/bad": "cannot be decoded: no image", "s.tar/grey": "not RGB but L"}
    with pytest.warns(SrdLabWarning):
        converted = load_data(f"wds:{tmp_path}/s.tar", size=64, non_rgb="convert")
    assert converted[2].image.shape == (3, 64, 64)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(SkippedFile, match=r"s\.tar/000 cannot be used: its shard cannot be read"):
        data[0]


@pytest.mark.parametrize("damage", ["cut off", "a header", "more behind its end"])
def test_what_is_behind_damage_is_not_lost_in_silence(damage: str, tmp_path: Path) -> None:
    whole = shard(tmp_path / "s.tar", *items(0, 1, 2))
    third = whole.index(b"002.png")
    content = {
        "cut off": whole[: third + 3000],
        "a header": whole[:third] + b"!" * 512 + whole[third + 512 :],
        "more behind its end": whole + shard(tmp_path / "t.tar", *items(3)),
    }[damage]
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.warns(SrdLabWarning, match=r"s\.tar \(damaged, or no tar file"):
        data = load_data(f"wds:{tmp_path}/s.tar", size=64)
    assert data.labels.tolist() == LABELS[: 3 if damage == "more behind its end" else 2]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            "nowhere-{0..3}.tar",
            r"there is no shard .*nowhere-0\.tar; expected files, as in wds:train-\{000\.\.009\}\.tar",
        ),
        ("s-{0..3}.tar", r"there is no shard .*s-1\.tar"),
        ("no*.tar", r"there is no shard .*no\*\.tar"),
        ("packed.tar", r"no images; .*left out: packed\.tar \(.*it is compressed: unpack it"),
        (
            "text.tar",
            r"no images; expected items such as 0\.jpg and 0\.cls; left out: text\.tar \(damaged, or no tar",
        ),
        ("two.tar", r"two\.tar/a has several images, \.jpg and \.png; say which: \?image=jpg"),
        ("s-0.tar?mask=png", r"has no option 'mask'; expected image=EXT or label=EXT"),
        ("s-0.tar?image=webp", r"no images; .*it has no image, but \.png, \.cls"),
    ],
)
@pytest.mark.filterwarnings("ignore::srd_lab.errors.SrdLabWarning")
def test_shards_that_cannot_be_used_are_one_line(pattern: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "packed.tar").write_bytes(gzip.compress(shard(tmp_path / "s-0.tar", *items(0))))
    (tmp_path / "text.tar").write_text("no tar file" * 99)
    shard(tmp_path / "two.tar", ("a.jpg", png(0)), ("a.png", png(1)))
    with pytest.raises((BadData, BadValue), match=said) as error:
        load_data(f"wds:{tmp_path}/{pattern}", size=64)
    assert str(error.value).isprintable()


SCORED = ("--method", "gradient", "--metrics", "sparseness", "--images", "all")


def test_shards_are_evaluated(tmp_path: Path) -> None:
    shard(tmp_path / "s-0.tar", *items(0, 1))
    shard(tmp_path / "s-1.tar", *items(2))
    shard(tmp_path / "n.tar", *items(3, 4)[::2])
    out = tmp_path / "out"
    result = command(
        "evaluate", "--data", f"wds:{tmp_path}/s-{{0..1}}.tar", *OWN_NETWORK, *SCORED, "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    assert "on wds, 3 of 3 images" in result.output
    rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    assert sorted((row["name"], int(row["label"])) for row in rows) == [
        *(("s-0.tar/000", 3), ("s-0.tar/001", 0), ("s-1.tar/002", 9))
    ]
    result = command("evaluate", "--data", f"wds:{tmp_path}/n.tar", *OWN_NETWORK, *SCORED)
    assert result.exit_code == 0, result.output
    assert "the predicted class explained" in result.output


# --- the datasets library -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data sets in every form that the library stores."""
    home = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home / "home"))  # where it is not imported yet
        datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'srd-lab[datasets]'")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        of = datasets.Features
        image, names = datasets.Image(), datasets.ClassLabel(names=list("abcdefghij"))
        encoded = [{"bytes": png(k), "path": None} for k in range(6)]

        def made(columns: dict[str, Any], **kinds: Any) -> Any:
            return datasets.Dataset.from_dict(columns, features=of(kinds) if kinds else None)

        one = made({"img": encoded, "fine": LABELS}, img=image, fine=names)
        one.save_to_disk(home / "one")
        datasets.DatasetDict({"test": one, "val": one.select([1, 2])}).save_to_disk(home / "splits")
        datasets.DatasetDict({"val": one}).save_to_disk(home / "val")
        one.to_parquet(home / "one.parquet")
        for label in ("cat", "dog"):
            (home / "folder" / label).mkdir(parents=True)
            (home / "folder" / label / "0.png").write_bytes(png(len(label)))
        bad = [{"bytes": b"no image", "path": None}, None, encoded[0]]
        made({"img": bad, "label": ["x", None, "w"]}, img=image, label=datasets.Value("string")).save_to_disk(
            home / "bad"
        )
        made({"a": encoded, "b": encoded}, a=image, b=image).save_to_disk(home / "ab")
        made({"image": [[1, 2], [3]]}).save_to_disk(home / "list")
        made(
            {"image": encoded[:1], "label": [1.5]}, image=image, label=datasets.Value("float32")
        ).save_to_disk(home / "float")
        made(
            {"image": encoded[:2], "label": [7, 10**8]}, image=image, label=datasets.Value("int64")
        ).save_to_disk(home / "big")
        (home / "nothing").mkdir()
        (home / "text.parquet").write_text("no parquet")
        yield home


@pytest.mark.parametrize(
    ("spec", "labels", "name"),
    [
        ("one", LABELS, "one/0"),
        ("splits", LABELS, "splits/test/0"),
        ("splits?split=val", [0, 9], "splits/val/0"),
        ("val", LABELS, "val/val/0"),
        ("one.parquet", LABELS, "one.parquet/train/0"),
        ("folder", [0, 1], "folder/train/0"),
        ("ab?image=b", [-1] * 6, "ab/0"),
    ],
)
def test_a_data_set_is_read_in_every_form(spec: str, labels: list[int], name: str, hub: Path) -> None:
    data = load_data(f"hf-dataset:{hub}/{spec}", size=64)
    assert (data.labels.tolist(), data.name(0)) == (labels, name)
    assert data.classes == {"folder": ["cat", "dog"], "ab?image=b": []}.get(spec, list("abcdefghij"))
    first = {"splits?split=val": 1, "folder": 3}.get(spec, 0)
    assert torch.equal(data[0].image, pixels(first))
    assert torch.equal(pickle.loads(pickle.dumps(data))[1].image, data[1].image)
    (loaded,) = load_batches(load_data(f"hf-dataset:{hub}/{spec}", size=32, limit=2), [[0, 1]], 1)
    assert loaded.samples[1].image.shape == (3, 32, 32)


def test_damaged_rows_are_left_out_by_name(hub: Path) -> None:
    data = load_data(f"hf-dataset:{hub}/bad", size=64)
    assert (data.classes, data.labels.tolist()) == (["w", "x"], [1, -1, 0])
    (loaded,) = load_batches(data, [[0, 1, 2]])
    assert (loaded.indices, loaded.skipped) == (
        [2],
        {"bad/0": "cannot be decoded: no image", "bad/1": "it has no image"},
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("splits?split=train", r"has no split 'train'; say which: \?split=NAME, one of test, val"),
        ("ab", r"has several columns for image; say which: \?image=COLUMN, of a \(Image\), b \(Image\)"),
        ("ab?image=c", r"has no column 'c'; it has a \(Image\), b \(Image\)"),
        ("one?image=fine", r"the column fine is of ClassLabel, not of images; cast it"),
        ("list", r"has no column of images; say which"),
        ("float", r"the label 1\.5 is no class index, nor a name"),
        ("big", r"the label 100000000 is no class index"),
        (
            "nothing",
            r"cannot be read: .*expected what save_to_disk writes, a folder of images or Parquet files",
        ),
        ("text.parquet", r"cannot be read: "),
        ("nowhere", r"cannot be read: |cannot be had: "),
        ("one?split_=test", r"has no option 'split_'; expected split, name, image, label"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_one_line(spec: str, said: str, hub: Path) -> None:
    with pytest.raises((BadData, BadValue, Unavailable), match=said) as error:
        load_data(f"hf-dataset:{hub}/{spec}", size=64)
    assert str(error.value).isprintable()


def test_without_the_hub_or_the_library(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        Unavailable, match=r"hf-dataset:nobody/nothing cannot be had: .*a name of the Hugging Face hub"
    ):
        load_data("hf-dataset:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        Unavailable, match=r"hf-dataset:x needs datasets; `pip install 'srd-lab\[datasets\]'`"
    ):
        load_data("hf-dataset:x")


def test_a_data_set_is_evaluated(hub: Path) -> None:
    result = command("evaluate", "--data", f"hf-dataset:{hub}/one", *OWN_NETWORK, *SCORED)
    assert result.exit_code == 0, result.output
    assert "on hf-dataset, 6 of 6 images" in result.output
    refused = command("evaluate", "--data", f"hf-dataset:{hub}/folder", *OWN_NETWORK, *SCORED)
    assert "the model tells 10 classes apart, but the data has 2" in refused.output
