"""Data of one's own: data sets by name, tables of files, and pictures without labels."""

from __future__ import annotations

import csv
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import OWN_NETWORK, command
from torch.utils.data import Dataset as TorchDataset

from srd_lab.data import SkippedFile, load_batches, load_data
from srd_lab.data.own import OwnData
from srd_lab.data.pictures import fit
from srd_lab.data.predicted import Predicted
from srd_lab.errors import BadData, BadValue, BadWeights
from srd_lab.models import check_classes, load_model
from srd_lab.types import Sample

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


class Items(TorchDataset[Any]):
    """A data set of given items."""

    def __init__(self, *items: Any, **attributes: Any) -> None:
        self.items, self.read = items, 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def picture(k: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(PIXELS[k]).resize((width, height))


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


# --- any torch data set ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS[0]),
        PIXELS[0],
        as_tensor(PIXELS[0]),
        as_tensor(PIXELS[0]).float() / 255,
        as_tensor(PIXELS[0]).double() / 255,
    ],
    ids=["Pillow", "array", "uint8", "float32", "float64"],
)
@pytest.mark.parametrize("form", ["pair", "list", "dict", "sample"])
def test_an_item_is_the_same_sample_whatever_it_is_made_of(image: Any, form: str) -> None:
    if form == "sample" and not (isinstance(image, torch.Tensor) and image.dtype == torch.float32):
        pytest.skip("a Sample has float32 pixels")
    item: Any = {
        "pair": (image, 3),
        "list": [image, torch.tensor(3)],
        "dict": {"image": image, "label": np.int64(3)},
    }.get(form, Sample(image, 3, None, "theirs") if form == "sample" else None)
    data = OwnData("mine.py:photos?a=1", Items(item), 64)
    sample = data[0]
    assert (sample.label, sample.mask, sample.name, data.name(0)) == (
        3,
        None,
        "mine.py:photos/0",
        "mine.py:photos/0",
    )
    assert sample.image.dtype == torch.float32
    torch.testing.assert_close(sample.image, as_tensor(PIXELS[0]).float() / 255)
    assert data.labels.tolist() == [3]


def test_pillow_images_are_resized_with_their_masks() -> None:
    image, mask = picture(width=90, height=70), Image.new("L", (90, 70))
    mask.paste(255, (0, 0, 45, 70))
    data = OwnData(
        "it", Items({"image": image, "label": 0, "mask": mask}), 32, crop=0.8, interpolation="bicubic"
    )
    expected = np.array(fit(image, 32, crop=0.8, interpolation="bicubic"))
    torch.testing.assert_close(data[0].image, as_tensor(expected).float() / 255)
    covered = data[0].mask
    assert covered is not None
    assert covered.dtype == torch.bool
    assert covered[:, :14].all()
    assert not covered[:, 18:].any()
    given = OwnData("it", Items({"image": PIXELS[0], "label": 0, "mask": np.eye(64)}), 64)[0].mask
    assert given is not None
    assert torch.equal(given, torch.eye(64) > 0)


def test_labels_and_names_are_known_without_reading() -> None:
    items = [(PIXELS[k], k % 3) for k in range(6)]
    for attributes in ({"targets": [k % 3 for k in range(6)]}, {"labels": torch.arange(6) % 3}):
        source = Items(*items, classes=("a", "b", "c"), names=list("uvwxyz"), **attributes)
        data = OwnData("it", source, 64, limit=3)
        assert (data.labels.tolist(), data.classes, data.name(1), len(data)) == (
            [0, 2, 1],
            ["a", "b", "c"],
            "w",
            3,
        )
        assert source.read == 0
    source = Items(*items)
    assert OwnData("it", source, 64).labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.read == 6


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Items(), "it is empty"),
        (3, "it gives a int; expected a data set with __len__ and __getitem__"),
        (
            Items("text"),
            r"it/0 is a str; expected \(image, label\), a dict with image and label, or a Sample",
        ),
        (Items({"pixels": 3}), "it/0 is a dict; expected"),
        (Items((1, 2, 3)), "it/0 is a tuple; expected"),
        (Items((PIXELS[0], "cat")), "it/0: the label 'cat' is no class index"),
        (Items((PIXELS[0], 1.5)), "it/0: the label 1.5 is no class index"),
        (Items((PIXELS[0], 10**9)), "the label 1000000000 is no class index"),
        (Items((PIXELS[0], 0), targets=[None]), "label 0 of it: the label None is no class index"),
        (
            Items((PIXELS[0][:, :, :1], 0)),
            r"it/0 has an image \(64, 64, 1\); expected a Pillow image, or pixels",
        ),
        (Items(("file.png", 0)), "it/0 has an image str; expected a Pillow image"),
        (
            Items((PIXELS[0], 0), (PIXELS[0][:40], 0)),
            "it/1 has 64 x 40 pixels where 64 x 64 are wanted; give --size",
        ),
        (
            Items((torch.randn(3, 64, 64), 0)),
            r"it/0 has values in \[.*\]; expected pixels in \[0, 1\], not normalised",
        ),
        (Items((torch.full((3, 64, 64), torch.nan), 0)), r"it/0 has values in \[nan, nan\]"),
        (
            Items({"image": PIXELS[0], "label": 0, "mask": np.eye(3)}),
            r"it/0 has a mask \(3, 3\), the image \(64, 64\)",
        ),
    ],
)
def test_what_is_no_data_set_is_one_line(source: Any, said: str) -> None:
    with pytest.raises(BadData, match=said) as error:
        OwnData("it", source, 64)[0]
    assert str(error.value).isprintable()


def test_an_item_that_cannot_be_read_is_left_out_by_name() -> None:
    data = OwnData("it", Items((PIXELS[0], 1), OSError("a disk\nof stone"), (PIXELS[2], 2)), 64)
    assert data.labels.tolist() == [1, -1, 2]
    (loaded,) = load_batches(data, [[0, 1, 2]])
    assert (loaded.indices, loaded.skipped) == ([0, 2], {"it/1": "it fails: a disk (OSError)"})
    with pytest.raises(SkippedFile):
        data[1]


def _read(data: OwnData, index: int) -> tuple[float, int]:
    return data[index].image.sum().item(), data[index].label


def test_data_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from srd_lab.data import load_data\n"
        "class Scenes:\n"
        "    def __init__(self, first=0):\n"
        "        self.data, self.first = load_data('scenes'), first\n"
        "        self.classes = self.data.classes\n"
        "        self.labels = self.data.labels[first:]\n"
        "    def __len__(self):\n"
        "        return len(self.data) - self.first\n"
        "    def __getitem__(self, k):\n"
        "        return self.data[k + self.first]\n"
    )
    own, theirs = load_data("mine.py:Scenes?first=5", size=64), load_data("scenes")
    assert torch.equal(own[3].image, theirs[8].image)
    assert own.classes == theirs.classes
    for workers in (0, 1):
        (loaded,) = load_batches(own, [[0, 7]], workers)
        assert [sample.label for sample in loaded.samples] == [theirs[5].label, theirs[12].label]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # as other systems start their workers
        image, label = pool.apply(_read, (own, 7))
    assert (image, label) == (theirs[12].image.sum().item(), theirs[12].label)
    assert pickle.loads(pickle.dumps(OwnData("it", Items((PIXELS[0], 1)), 64)))[0].label == 1
    with pytest.raises(BadValue, match=r"mine\.py has no 'Nothing'; it has Scenes"):
        load_data("mine.py:Nothing")
    out = tmp_path / "out"
    options = ("--model", "srd_lab.models:load_model?name=vgg16&device=cpu", "--images", "4", "--size", "64")
    evaluated = (
        "--methods",
        "srd",
        "--metrics",
        "pointing_game",
        "--device",
        "cpu",
        "--no-track",
        "--out",
        str(out),
    )
    result = command("evaluate", "--data", "mine.py:Scenes", *options, *evaluated)
    assert result.exit_code == 0, result.output
    assert "accuracy 1.000" in result.output
    rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    assert all(row["name"].startswith("mine.py:Scenes/") for row in rows)


# --- tables of files ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for k, name in enumerate(("a.png", "b.png", "sub/c.png")):
        picture(k).save(tmp_path / name)
    return tmp_path


def table(folder: Path, *lines: str) -> str:
    (folder / "files.csv").write_text("\n".join(lines) + "\n")
    return f"table:{folder}/files.csv"


def test_a_table_names_files_labels_and_boxes(files: Path) -> None:
    spec = table(
        files,
        "path,label,x0,y0,x1,y1",
        "sub/c.png,dog,0,0,9,19",
        "sub/c.png,dog,60,60,63,63",
        "a.png,cat,,,,",
    )
    data = load_data(spec, size=64)
    assert (data.classes, data.labels.tolist(), data.name(0)) == (["cat", "dog"], [1, 0], "sub/c.png")
    mask = data[0].mask
    assert mask is not None
    assert mask.sum() == 10 * 20 + 4 * 4
    assert mask[:20, :10].all()
    assert data[1].mask is None
    numbers = load_data(table(files, "path,label", "a.png,7", "b.png,0"), size=64)
    assert (numbers.classes, numbers.labels.tolist()) == ([], [7, 0])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("file,label", "a.png,1"), "has no column path with a file in its first line"),
        (("path",), "has no column path"),
        (("path,label", "../a.png,1"), r"line 2: '\.\./a\.png' is no path below the table's folder"),
        (("path,label", "/etc/passwd,1"), "is no path below the table's folder"),
        (("path,label", "a.png,1", "a.png,2"), "line 3: 'a.png' has two labels, '1' and '2'"),
        (("path,label", "a.png,1", "b.png,"), "some files have a label and 1 have none; give all or none"),
        (("path,label,x0,y0,x1,y1", "a.png,1,5,5,2,9"), "line 2: the corners x0, y0, x1, y1 are no box"),
        (("path,label,x0,y0,x1,y1", "a.png,1,nan,5,2,9"), "are no box"),
        (("path,label,x0,y0", "a.png,1,1,5"), "are no box"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(files: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadData, match=said) as error:
        load_data(table(files, *lines))
    assert str(error.value).isprintable()


def test_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"there is no table .*nowhere\.csv; give table:FILE"):
        load_data(f"table:{tmp_path}/nowhere.csv")


def test_labels_beyond_the_networks_classes_are_refused(files: Path) -> None:
    model = load_model("vgg16", device="cpu")
    data = load_data(table(files, "path,label", "a.png,9", "b.png,0"), size=64)
    check_classes(model, data)
    assert data.classes == [str(k) for k in range(10)]
    with pytest.raises(BadWeights, match=r"an image has class 10, but the model knows 0\.\.9"):
        check_classes(model, load_data(table(files, "path,label", "a.png,10"), size=64))


# --- pictures without labels ----------------------------------------------------------------------------------------


def test_predictions_stand_in_for_labels(files: Path) -> None:
    (files / "broken.png").write_bytes(b"no image")
    data, model = load_data(f"pictures:{files}", size=64), load_model("vgg16", device="cpu")
    assert ([data.name(k) for k in range(4)], data.labels.tolist()) == (
        ["a.png", "b.png", "broken.png", "sub/c.png"],
        [-1] * 4,
    )
    check_classes(model, data)
    predicted = Predicted(data, model, torch.device("cpu"))
    with torch.no_grad():
        expected = [int(model(data[k].image[None]).argmax()) for k in (0, 1, 3)]
    assert predicted.labels.tolist() == [*expected[:2], -1, expected[2]]
    assert predicted[3].label == expected[2]
    assert torch.equal(predicted[3].image, data[3].image)
    assert predicted.name(3) == "sub/c.png"


def test_pictures_without_labels_are_evaluated_and_not_compared_with_labels(files: Path) -> None:
    scored = ("--methods", "gradient", "--metrics", "sparseness")
    result = command("evaluate", "--data", f"pictures:{files}", "--images", "3", *OWN_NETWORK, *scored)
    assert result.exit_code == 0, result.output
    assert "the predicted class explained. Mean" in result.output
    assert (
        "Note: the images have no labels: the classes that the network predicts stand in their place"
        in result.stderr
    )
    refused = command("apop", "--data", f"pictures:{files}", "--images", "3", *OWN_NETWORK)
    assert refused.exit_code == 1
    assert (
        "has no labels, which this command compares predictions with; give data that have" in refused.output
    )


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_no_pictures(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        BadData, match=r"is not a folder; give pictures:DIR|holds no images; expected files such as"
    ):
        load_data(f"pictures:{tmp_path / folder}")
