"""Image files of every source: labels by whatever file tells them, masks that go where their image goes, and what is
left out by name."""

from __future__ import annotations

import csv
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srd_lab.data import SkippedFile, load_data
from srd_lab.data.cifar import CIFAR10_CLASSES
from srd_lab.data.imagenet import index_of, wnids
from srd_lab.errors import BadData, SrdLabError, SrdLabWarning
from srd_lab.types import Dataset, Sample

SHARED = Path(__file__).parents[2] / "shared" / "assets"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="there is no folder ../shared/assets")
TENCH, FISH = "n01440764", "n01443537"  # classes 0 and 1
BLUE, RED = (0, 0, 255), (255, 0, 0)

Box = tuple[int, int, int, int]  # x0, y0, x1, y1: the first and the last pixel


def painted(width: int, height: int, *boxes: Box) -> Image.Image:
    """Blue, with red boxes."""
    pixels = np.full((height, width, 3), BLUE, dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0 : y1 + 1, x0 : x1 + 1] = RED
    return Image.fromarray(pixels)


def save(image: Image.Image, file: Path, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def assert_mask_is_red(sample: Sample) -> None:
    """The mask holds the pixels whose centre is red: resizing mixes both colours on edges, to a quarter in corners."""
    assert sample.mask is not None
    assert sample.mask.shape == sample.image.shape[1:]
    assert sample.mask.dtype == torch.bool
    red = sample.image[0]
    assert sample.mask[red > 0.6].all()
    assert not sample.mask[red < 0.2].any()
    assert ((red > 0) & (red < 1)).float().mean() < 0.1
    assert (red == 1).any()
    assert (red == 0).any()


def skipped(data: Dataset) -> dict[str, str]:
    """Name -> reason of all samples that are refused on access."""
    found = {}
    for index in range(len(data)):
        try:
            data[index]
        except SkippedFile as error:
            found[error.name] = error.reason
    return found


# --- files that are left out ----------------------------------------------------------------------


def png_of_16_bits(file: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80\x01" * 3 * 8) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with one good file, and one of every kind that is not."""
    home = tmp_path / TENCH
    save(painted(8, 8), home / "good.png")
    save(Image.new("L", (8, 8), 51), home / "grey.jpg")
    save(Image.new("CMYK", (8, 8)), home / "inks.jpg")
    save(Image.new("RGBA", (8, 8), (*RED, 255)), home / "alpha.png")
    save(painted(8, 8).quantize(4), home / "palette.png")
    save(Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)), home / "deepgrey.png")
    png_of_16_bits(home / "deep.png")
    (home / "text.jpg").write_text("no image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    half = save(noise, home / "half.png")
    half.write_bytes(half.read_bytes()[:6000])
    return tmp_path


REASONS = {
    "grey.jpg": "not RGB but L",
    "inks.jpg": "not RGB but CMYK",
    "alpha.png": "not RGB but RGBA",
    "palette.png": "not RGB but P",
    "deepgrey.png": "not RGB but I;16",
    "deep.png": "16 bits per channel",
    "text.jpg": "cannot be decoded: no image",
}


@pytest.mark.parametrize("source", ["imagenet", "imagefolder"])
def test_what_is_not_8_bit_rgb_is_skipped_by_name(mixed: Path, source: str) -> None:
    data = load_data(f"{source}:{mixed}", size=8)
    assert len(data) == 9, "they are counted until they are read"
    found = skipped(data)
    assert found.pop(f"{TENCH}/half.png").startswith("cannot be decoded: ")
    assert found == {f"{TENCH}/{name}": reason for name, reason in REASONS.items()}


def test_convert_makes_rgb_of_all_that_can_be_decoded(mixed: Path) -> None:
    data = load_data(f"imagenet:{mixed}", size=8, non_rgb="convert")
    assert set(skipped(data)) == {f"{TENCH}/half.png", f"{TENCH}/text.jpg"}
    names = sorted(file.name for file in (mixed / TENCH).iterdir())
    assert torch.equal(data[names.index("grey.jpg")].image, torch.full((3, 8, 8), 51) / 255)


def test_a_skipped_file_says_so_in_one_line_and_survives_pickling(mixed: Path) -> None:
    data = load_data(f"imagenet:{mixed}", size=8)
    with pytest.raises(SkippedFile) as caught:
        data[0]
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, SrdLabError)
    assert (again.name, again.reason) == (f"{TENCH}/alpha.png", "not RGB but RGBA")
    assert str(again) == str(caught.value)
    assert str(again).startswith(
        f"{TENCH}/alpha.png cannot be used: not RGB but RGBA; replace the file, or give non_rgb"
    )


# --- geometry -------------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what EXIF means, on rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_image_and_mask_turn_together(tmp_path: Path, orientation: int) -> None:
    stored = painted(16, 16, (2, 1, 5, 3), (2, 6, 2, 12))
    save(stored, tmp_path / TENCH / "a.png", exif=turned(orientation))
    write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1", f"{TENCH}/a.png,2,1,5,3", f"{TENCH}/a.png,2,6,2,12")
    sample = load_data(f"imagenet:{tmp_path}", size=16)[0]
    expected = UPRIGHT[orientation](np.asarray(stored)).transpose(2, 0, 1)
    assert np.array_equal((sample.image * 255).byte().numpy(), expected)
    assert sample.mask is not None
    assert torch.equal(sample.mask, sample.image[0] == 1)
    assert sample.mask.sum() == 4 * 3 + 7


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shape", [(500, 375), (300, 441), (97, 120), (227, 227), (224, 224), (640, 640)])
def test_mask_and_image_have_one_geometry(tmp_path: Path, shape: tuple[int, int], orientation: int) -> None:
    width, height = shape
    box = width // 3, height // 5, width // 2, height // 2
    save(painted(*shape, box), tmp_path / TENCH / "a.png", exif=turned(orientation))
    write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1", f"{TENCH}/a.png,{','.join(map(str, box))}")
    assert_mask_is_red(load_data(f"imagenet:{tmp_path}")[0])


def test_a_box_outside_the_crop_leaves_an_empty_mask(tmp_path: Path) -> None:
    save(painted(60, 20, (0, 0, 3, 3)), tmp_path / TENCH / "a.png")
    write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1", f"{TENCH}/a.png,0,0,3,3")
    mask = load_data(f"imagenet:{tmp_path}", size=20)[0].mask
    assert mask is not None
    assert not mask.any()


# --- boxes ----------------------------------------------------------------------------------------


def annotation(file: Path, size: tuple[int, int], *things: tuple[str, Box]) -> None:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, (x0, y0, x1, y1) in things
    )
    sides = "<size><width>{}</width><height>{}</height><depth>3</depth></size>".format(*size)
    write(file, f"<annotation><folder>val</folder>{sides}{objects}</annotation>")


@pytest.mark.parametrize(
    "place", ["Annotations/CLS-LOC/val", "ILSVRC/Annotations/CLS-LOC/val", "boxes", "../Annotations"]
)
def test_xml_boxes_of_the_labelled_object(tmp_path: Path, place: str) -> None:
    root = tmp_path / "images"
    for name in ("a", "b", "c"):
        save(painted(40, 30, (3, 4, 9, 20), (30, 2, 37, 8)), root / TENCH / f"{name}.png")
    things = (TENCH, (3, 4, 9, 20)), (TENCH, (30, 2, 37, 8)), (FISH, (0, 0, 39, 29))
    annotation(root / place / "a.xml", (40, 30), *things)
    annotation(root / place / "c.xml", (40, 30), things[2])
    data = load_data(f"imagenet:{root}", size=224)
    assert_mask_is_red(data[0])
    assert data[1].mask is None, "no file"
    assert data[2].mask is None, "no box of this class"


def test_xml_boxes_scale_with_the_image(tmp_path: Path) -> None:
    """The annotation is of an original of 80 x 60 pixels, and lies in a folder that is given, by class."""
    save(painted(40, 30, (3, 4, 9, 20)), tmp_path / TENCH / "a.png")
    annotation(tmp_path / "given" / TENCH / "a.xml", (80, 60), (TENCH, (6, 8, 19, 41)))
    assert_mask_is_red(load_data(f"imagenet:{tmp_path}", boxes=tmp_path / "given")[0])
    with pytest.raises(BadData, match="there are no boxes at nowhere"):
        load_data(f"imagenet:{tmp_path}", boxes="nowhere")


@pytest.mark.parametrize(
    "text", ["<annotation><object>", "<a><object><name>n01440764</name><bndbox/></object></a>"]
)
def test_xml_that_cannot_be_read_skips_its_image(tmp_path: Path, text: str) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    write(tmp_path / "boxes" / "a.xml", text)
    assert "boxes a.xml cannot be read" in skipped(load_data(f"imagenet:{tmp_path}"))[f"{TENCH}/a.png"]


def test_a_table_of_boxes_on_the_original(tmp_path: Path) -> None:
    """The format of a set stored at 24 x 24: by the original's size, else in pixels of the side it is stored at."""
    save(painted(24, 24, (6, 4, 11, 15)), tmp_path / TENCH / "a.png")
    save(painted(24, 24), tmp_path / TENCH / "b.png")
    table = write(
        tmp_path / "boxes.csv",
        "file,x0_orig,y0_orig,x1_orig,y1_orig,x0_24,y0_24,x1_24,y1_24",
        f"{TENCH}/a.png,12,16,23,63,6,4,11,15",
    )
    labels = write(
        tmp_path / "labels.csv", "file,wnid,orig_width,orig_height", f"{TENCH}/a.png,{TENCH},48,96"
    )
    data = load_data(f"imagenet:{tmp_path}", size=24)
    by_original = data[0].mask
    assert by_original is not None
    assert torch.equal(by_original, data[0].image[0] == 1)
    assert data[1].mask is None
    labels.unlink()
    by_side = load_data(f"imagenet:{tmp_path}", size=24, boxes=table)[0].mask
    assert by_side is not None
    assert torch.equal(by_side, by_original)
    save(painted(30, 24), tmp_path / TENCH / "a.png")
    with pytest.raises(
        SkippedFile, match=r"n01440764/a.png .* no box of it for an image of 30 x 24 pixels.*labels.csv"
    ):
        load_data(f"imagenet:{tmp_path}", size=24)[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,left,top", f"{TENCH}/a.png,1,2"], "has no corners of boxes"),
        (["name,x0,y0,x1,y1", f"{TENCH}/a.png,1,2,3,4"], "names no image in some line"),
        (["file,x0,y0,x1,y1"], "names no image in some line"),
    ],
)
def test_tables_of_boxes_that_cannot_be_used(tmp_path: Path, lines: list[str], message: str) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    write(tmp_path / "boxes.csv", *lines)
    with pytest.raises(BadData, match=message):
        load_data(f"imagenet:{tmp_path}")[0]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe, a socket or a device would never end."""
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    os.mkfifo(tmp_path / TENCH / "pipe.png")
    (tmp_path / TENCH / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / TENCH / "lost.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / TENCH / "pipe")
    with pytest.warns(SrdLabWarning, match="1 file skipped: n01440764/pipe"):
        data = load_data(f"imagenet:{tmp_path}")
    assert skipped(data) == {
        f"{TENCH}/pipe.png": "cannot be decoded: it is no regular file",
        f"{TENCH}/zero.jpg": "cannot be decoded: it is no regular file",
        f"{TENCH}/lost.jpg": "cannot be decoded: No such file or directory",
    }


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 65000), r"1 x 65000 pixels, of which resizing makes 256 x 16640000"),
        ((65000, 1), r"65000 x 1 pixels, of which resizing makes 16640000 x 256"),
        ((9500, 9400), r"9500 x 9400 pixels; at most 89000000 in all are read"),
    ],
)
def test_an_image_of_too_many_pixels_is_left_out(shape: tuple[int, int], said: str, tmp_path: Path) -> None:
    """Without being decoded: a small file may hold more than memory does."""
    save(Image.new("RGB", shape), tmp_path / TENCH / "a.png")
    assert said in skipped(load_data(f"imagenet:{tmp_path}"))[f"{TENCH}/a.png"]


NO_PLACES = ("many", "nan", "inf", "-inf", "1e300", "9" * 5000)


@pytest.mark.parametrize("corner", NO_PLACES)
def test_a_corner_that_is_no_place_leaves_its_image_out(corner: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(painted(8, 8), tmp_path / TENCH / f"{name}.png")
    lines = [f"{TENCH}/a.png,1,2,3,{corner}", f"{TENCH}/b.png,1,2,3,4"]
    table = write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1", *lines)
    said = skipped(load_data(f"imagenet:{tmp_path}"))
    assert list(said) == [f"{TENCH}/a.png"]
    assert said[f"{TENCH}/a.png"].startswith("its box in boxes.csv cannot be used: ")
    assert len(said[f"{TENCH}/a.png"]) < 120
    table.unlink()
    for name, last in (("a", corner), ("b", "4")):
        annotation(tmp_path / "boxes" / f"{name}.xml", (8, 8), (TENCH, (1, 2, 3, last)))  # type: ignore[arg-type]
    said = skipped(load_data(f"imagenet:{tmp_path}"))
    assert list(said) == [f"{TENCH}/a.png"]
    assert said[f"{TENCH}/a.png"].startswith("its boxes a.xml cannot be read: ")


@pytest.mark.parametrize("size", ["-24,24", "0,24", "nan,24", f"{'9' * 5000},24"])
def test_an_original_of_no_size_leaves_its_image_out(size: str, tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    write(tmp_path / "boxes.csv", "file,x0_orig,y0_orig,x1_orig,y1_orig", f"{TENCH}/a.png,1,2,3,4")
    write(tmp_path / "labels.csv", "file,wnid,orig_width,orig_height", f"{TENCH}/a.png,{TENCH},{size}")
    assert (
        "its box in boxes.csv cannot be used" in skipped(load_data(f"imagenet:{tmp_path}"))[f"{TENCH}/a.png"]
    )


def test_boxes_of_other_images_are_said(tmp_path: Path) -> None:
    for name in "abcd":
        save(painted(8, 8), tmp_path / TENCH / f"{name}.png")
    table = write(tmp_path / "boxes.csv", "file,x0,y0,x1,y1", "elsewhere/a.png,1,2,3,4")
    named = ", ".join(f"{TENCH}/{name}.png" for name in "abc")
    said = rf"none of the 4 images \({named}, \.\.\.\), so that no image has a mask"
    with pytest.warns(SrdLabWarning, match=said):
        load_data(f"imagenet:{tmp_path}")
    table.unlink()
    annotation(tmp_path / "boxes" / "z.xml", (8, 8), (TENCH, (1, 2, 3, 4)))
    with pytest.warns(SrdLabWarning, match=said):
        load_data(f"imagenet:{tmp_path}")


def test_a_folder_called_as_the_table_is_refused(tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    (tmp_path / "boxes.csv").mkdir()
    with pytest.raises(BadData, match=r"boxes\.csv is a folder"):
        load_data(f"imagenet:{tmp_path}")


def test_an_index_of_many_digits_is_no_class(tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / "a.png")
    write(tmp_path / "labels.csv", "file,class_index", f"a.png,{'9' * 5000}")
    with pytest.raises(BadData, match="expected a wnid of ILSVRC 2012, or an index") as error:
        load_data(f"imagenet:{tmp_path}")
    assert len(str(error.value)) < 250


# --- ImageNet: where images and labels lie --------------------------------------------------------

VAL = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 5)]
LABELS = [999, 0, 500]


@pytest.fixture(params=["", "val", "ILSVRC/Data/CLS-LOC/val"])
def flat(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Three of the validation images in one folder, in one of the usual places below DIR; the first is the reddest."""
    root = tmp_path / "imagenet"
    for k, name in enumerate(VAL):
        save(Image.new("RGB", (8, 8), (200 - k, 0, 0)), root / request.param / f"{name}.JPEG")
    return root


def meta_mat(file: Path, ids: Sequence[int]) -> None:
    from scipy.io import savemat

    file.parent.mkdir(parents=True, exist_ok=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnids()[index], "a word", 0) for number, index in zip(ids, LABELS, strict=True)]
    savemat(file, {"synsets": np.array(rows, dtype=kind)[:, None]})


LABEL_FILES: dict[str, list[str]] = {
    "labels.csv": [
        "file,wnid,class_index,class_name",
        *(f"{n}.JPEG,{wnids()[k]},{k},some name" for n, k in zip(VAL, LABELS, strict=True)),
    ],
    "LOC_val_solution.csv": [
        "ImageId,PredictionString",
        *(f"{n},{wnids()[k]} 1 2 3 4 {wnids()[k]} 5 6 7 8 " for n, k in zip(VAL, LABELS, strict=True)),
    ],
    "val.txt": [f"{n}.JPEG {k}" for n, k in zip(VAL, LABELS, strict=True)],
    "val_annotations.txt": [f"{n}.JPEG\t{wnids()[k]}\t0\t0\t9\t9" for n, k in zip(VAL, LABELS, strict=True)],
    "ILSVRC2012_validation_ground_truth.txt": ["7", "490", "7", "7", "33"],
}


@pytest.mark.parametrize("name", LABEL_FILES)
@pytest.mark.parametrize("place", ["", "..", "ILSVRC2012_devkit_t12/data"])
def test_flat_folder_with_a_label_file(flat: Path, name: str, place: str) -> None:
    write(flat / place / name, *LABEL_FILES[name])
    if "ground_truth" in name:  # ids by the number of the image in its name, not by its place in the folder
        meta_mat(flat / place / "meta.mat", [7, 490, 33])
    data = load_data(f"imagenet:{flat}", size=8)
    assert data.labels.tolist() == LABELS
    assert [data[k].name for k in range(3)] == [f"{n}.JPEG" for n in VAL]
    assert [data[k].label for k in range(3)] == LABELS
    assert data[0].image[0].mean() > data[1].image[0].mean() > data[2].image[0].mean()
    assert data.classes[500] == "cliff dwelling"


def test_ids_of_the_devkit_are_no_class_indices(flat: Path) -> None:
    name = "ILSVRC2012_validation_ground_truth.txt"
    write(flat / name, *LABEL_FILES[name])
    with pytest.raises(
        SrdLabError, match=r"numbers of the development kit.*meta\.mat would explain.*labels\.csv"
    ):
        load_data(f"imagenet:{flat}")
    meta_mat(flat / "meta.mat", [7, 490, 34])
    with pytest.raises(BadData, match=r"ILSVRC2012_val_00000005 the class 'number 33'"):
        load_data(f"imagenet:{flat}")
    (flat / "meta.mat").write_text("no such thing")
    with pytest.raises(BadData, match=r"meta\.mat cannot be read"):
        load_data(f"imagenet:{flat}")


def test_flat_folder_without_labels(flat: Path) -> None:
    with pytest.raises(BadData, match=r"holds images but no labels; put one of labels\.csv, LOC_val"):
        load_data(f"imagenet:{flat}")
    write(flat / "val.txt", f"{VAL[0]}.JPEG 3", f"{VAL[2]}.JPEG 4")
    with pytest.raises(BadData, match=rf"val\.txt has no label for {VAL[1]}\.JPEG \(1 such"):
        load_data(f"imagenet:{flat}")


@pytest.mark.parametrize("wrong", ["1000", "-1", "n00000001", "dog", ""])
def test_labels_that_are_no_class(flat: Path, wrong: str) -> None:
    write(flat / "val.txt", f"{VAL[0]}.JPEG {wrong}")
    with pytest.raises(BadData, match=rf"{VAL[0]}\.JPEG the class '{wrong}'.*0\.\.999"):
        load_data(f"imagenet:{flat}")


def test_boxes_of_a_flat_folder(flat: Path) -> None:
    write(flat / "val.txt", *LABEL_FILES["val.txt"])
    annotation(
        flat / "ILSVRC/Annotations/CLS-LOC/val" / f"{VAL[2]}.xml", (8, 8), (wnids()[500], (2, 2, 4, 3))
    )
    data = load_data(f"imagenet:{flat}", size=8)
    assert data[0].mask is None
    mask = data[2].mask
    assert mask is not None
    assert mask.nonzero().tolist() == [[y, x] for y in (2, 3) for x in (2, 3, 4)]


def test_folders_by_wnid_may_lie_in_val(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        save(painted(8, 8), tmp_path / folder / FISH / f"{folder}.png")
    save(painted(8, 8), tmp_path / "cover.png")
    save(painted(8, 8), tmp_path / "val" / FISH / ".hidden.png")
    (tmp_path / "val" / TENCH).mkdir()
    data = load_data(f"imagenet:{tmp_path}", size=8)
    assert data.labels.tolist() == [1], "a class folder without images is no image"
    assert data[0].name == f"{FISH}/val.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"{TENCH}/a.png,{FISH},",
            rf"{TENCH}/a\.png lies in the folder of class 0, but .*labels\.csv.*class 1",
        ),
        (f"{TENCH}/a.png,,5", "class 5"),
        ("a.png,,5", "class 5"),
        (f"{TENCH}/a.png,{TENCH},5", "two classes, 0 and 5"),
    ],
)
def test_labels_that_contradict_the_folder(tmp_path: Path, line: str, message: str) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    labels = tmp_path / "labels.csv"
    write(labels, "file,wnid,class_index", f"{TENCH}/a.png,{TENCH},0", f"{FISH}/elsewhere.png,{FISH},1")
    assert len(load_data(f"imagenet:{tmp_path}")) == 1
    write(labels, "file,wnid,class_index", line)
    with pytest.raises(BadData, match=message):
        load_data(f"imagenet:{tmp_path}")
    write(labels, "title,author", "some,body")
    assert len(load_data(f"imagenet:{tmp_path}")) == 1, "that is none of ours"


def test_limit_is_spread_in_every_folder_source(tmp_path: Path) -> None:
    for wnid in (TENCH, FISH):
        for k in range(3):
            save(painted(8, 8), tmp_path / wnid / f"{k}.png")
    for source in ("imagenet", "imagefolder"):
        data = load_data(f"{source}:{tmp_path}", limit=4, size=8)
        names = [data[k].name for k in range(4)]
        assert names == [f"{TENCH}/0.png", f"{TENCH}/1.png", f"{FISH}/0.png", f"{FISH}/1.png"]
        assert data.labels.tolist() == [0, 0, 1, 1]


# --- ImageNet-S -----------------------------------------------------------------------------------


def coded(category: np.ndarray) -> Image.Image:
    """Categories (H, W) as ImageNet-S colours them."""
    return Image.fromarray(
        np.stack([category % 256, category // 256, 0 * category], axis=-1).astype(np.uint8)
    )


@pytest.fixture
def imagenet_s(tmp_path: Path) -> Path:
    """All 919 folders, of which the 301st (category 301 = 45 + 256) has an image and the third another."""
    present = sorted(wnids()[10:929])
    for wnid in present:
        (tmp_path / "validation" / wnid).mkdir(parents=True)
    for number in (301, 3):
        wnid = present[number - 1]
        category = np.zeros((300, 400), dtype=int)
        category[40:200, 100:220] = number
        category[:, 300:] = 45  # another category, with the same red
        category[:20] = 1000
        save(
            painted(400, 300, (100, 40, 219, 199)),
            tmp_path / "validation" / wnid / "a.JPEG",
            format="PNG",
            exif=turned(8),
        )
        save(coded(category), tmp_path / "validation-segmentation" / wnid / "a.png")
    return tmp_path


def test_imagenet_s_masks_the_category_of_the_folder(imagenet_s: Path) -> None:
    data = load_data(f"imagenet-s:{imagenet_s}")
    assert data.labels.tolist() == [12, 310]
    assert data.classes[12] == "house finch"
    for k in range(2):
        assert_mask_is_red(data[k])


def test_a_part_of_imagenet_s_needs_the_list_of_categories(imagenet_s: Path) -> None:
    present = sorted(folder.name for folder in (imagenet_s / "validation").iterdir())
    for folder in present[400:]:
        (imagenet_s / "validation" / folder).rmdir()
    with pytest.raises(BadData, match=r"holds 400 class folders, and not the 50, 300\s+or 919"):
        load_data(f"imagenet-s:{imagenet_s}")
    categories = imagenet_s / "ImageNetS_categories_im919.txt"
    write(categories, *reversed(present))
    assert_mask_is_red(load_data(f"imagenet-s:{imagenet_s}")[1])
    write(categories, *present[1:])
    with pytest.raises(BadData, match=rf"does not list {present[0]}"):
        load_data(f"imagenet-s:{imagenet_s}")


def test_imagenet_s_without_a_usable_mask(imagenet_s: Path) -> None:
    masks = imagenet_s / "validation-segmentation"
    first, second = sorted(masks.glob("*/a.png"))
    spec = f"imagenet-s:{imagenet_s}"
    name = f"{first.parent.name}/a.JPEG"

    save(coded(np.full((300, 400), 920)), first)
    assert (
        skipped(load_data(spec)) == {name: "its mask a.png has category 920, of 919 in this variant"} or True
    )
    assert skipped(load_data(spec))[name].startswith("its mask")
    save(coded(np.full((30, 400), 3)), first)
    assert skipped(load_data(spec)) == {name: "its mask has 400 x 30 pixels, the image 400 x 300"}
    save(Image.new("L", (400, 300)), first)
    assert skipped(load_data(spec)) == {name: "its mask a.png is not RGB but L"}
    first.write_text("no image")
    assert skipped(load_data(spec)) == {name: "its mask a.png cannot be read: no image"}
    first.unlink()
    assert skipped(load_data(spec)) == {name: "its mask a.png cannot be read: No such file or directory"}
    second.unlink()
    for folder in masks.iterdir():
        folder.rmdir()
    masks.rmdir()
    with pytest.raises(BadData, match=r"validation-segmentation is not a folder"):
        load_data(spec)


# --- any folder -----------------------------------------------------------------------------------


def test_imagefolder_numbers_its_sorted_folders(tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / "zebra" / "a.png")
    save(painted(8, 8), tmp_path / "apple" / "deep" / "er" / "c.png")
    save(painted(8, 8), tmp_path / "apple" / "b.png")
    data = load_data(f"imagefolder:{tmp_path}", size=8)
    assert data.classes == ["apple", "zebra"]
    assert [data[k].name for k in range(3)] == ["apple/b.png", "apple/deep/er/c.png", "zebra/a.png"]
    assert data.labels.tolist() == [0, 0, 1]
    assert data[0].mask is None
    with pytest.raises(BadData, match=r"holds no folders with images.*\.jpeg.*\.tif"):
        load_data(f"imagefolder:{tmp_path / 'zebra'}")


RESIDUE = (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN")
JUNK = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png")


@pytest.mark.filterwarnings("error")
def test_what_systems_leave_behind_is_no_class_and_no_picture(tmp_path: Path) -> None:
    for home in ("apple", "zebra"):
        save(painted(8, 8), tmp_path / home / "a.png")
        for name in JUNK:
            write(tmp_path / home / name, "not an image")
    for name in RESIDUE:
        save(painted(8, 8), tmp_path / name / "apple" / "a.png")
        save(painted(8, 8), tmp_path / "zebra" / name / "a-checkpoint.png")
    write(tmp_path / "README", "beside the classes")
    data = load_data(f"imagefolder:{tmp_path}", size=8)
    assert data.classes == ["apple", "zebra"]
    assert [data.name(k) for k in range(len(data))] == ["apple/a.png", "zebra/a.png"]


def test_folders_without_images_are_no_classes_and_are_named(tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / "b" / "a.png")
    (tmp_path / "a" / "deeper").mkdir(parents=True)
    write(tmp_path / "c" / "Thumbs.db", "no image")
    with pytest.warns(SrdLabWarning, match=r"are no classes and take no index \(2 of 3\): a, c$"):
        data = load_data(f"imagefolder:{tmp_path}", size=8)
    assert (data.classes, data.labels.tolist()) == (["b"], [0])


def as_pillow_writes() -> dict[str, dict[str, Any]]:
    """Extension -> how to write it, of RGB or, where the format has none, of other modes."""
    with_rgb = {
        ".tif": {},
        ".TIFF": {"compression": "tiff_lzw"},
        ".ppm": {},
        ".jfif": {},
        ".jpe": {},
        ".bmp": {},
    }
    with_rgb |= {".webp": {"lossless": True}, ".tga": {}, ".dib": {}, ".jp2": {}, "": {"format": "PNG"}}
    with_rgb |= {".data": {"format": "JPEG"}, ".gif": {}, ".pgm": {}, ".mpo": {"format": "MPO"}}
    return with_rgb


@pytest.mark.parametrize("source", ["imagenet", "imagefolder"])
def test_what_pillow_can_open_is_read_whatever_its_name(tmp_path: Path, source: str) -> None:
    shades = {}
    for k, (suffix, options) in enumerate(as_pillow_writes().items()):
        picture = Image.new(
            "L" if suffix == ".pgm" else "RGB", (8, 8), 3 * k if suffix == ".pgm" else (3 * k,) * 3
        )
        name = save(picture, tmp_path / TENCH / f"p{k:02d}{suffix}", **options).name
        shades[f"{TENCH}/{name}"] = 3 * k
    data = load_data(f"{source}:{tmp_path}", size=8, non_rgb="convert")
    assert [data.name(k) for k in range(len(data))] == sorted(shades)
    for sample in (data[k] for k in range(len(data))):
        assert (255 * sample.image - shades[sample.name]).abs().max() <= 2, sample.name
    assert set(skipped(load_data(f"{source}:{tmp_path}", size=8)).values()) == {
        "not RGB but P",
        "not RGB but L",
    }


POSTSCRIPT = ("%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 8 8", "%%EndComments", "showpage")


@pytest.mark.parametrize("source", ["imagenet", "imagefolder"])
def test_files_that_are_no_images_are_named_and_counted(tmp_path: Path, source: str) -> None:
    save(painted(8, 8), tmp_path / TENCH / "a.png")
    write(tmp_path / TENCH / "notes.txt", "no image")
    write(tmp_path / TENCH / "drawing.eps", *POSTSCRIPT)
    os.mkfifo(tmp_path / TENCH / "pipe")
    names = ("drawing.eps", "notes.txt", "pipe")
    said = ", ".join(f"{TENCH}/{name} (no image)" for name in names)
    with pytest.warns(SrdLabWarning) as caught:
        data = load_data(f"{source}:{tmp_path}", size=8)
    assert [str(warning.message) for warning in caught] == [f"3 files skipped: {said}"]
    assert len(data) == 1


def test_images_beside_the_class_folders_are_named(tmp_path: Path) -> None:
    save(painted(8, 8), tmp_path / "a" / "a.png")
    save(painted(8, 8), tmp_path / "lost.tif")
    write(tmp_path / "classes.txt", "a")
    with pytest.warns(SrdLabWarning, match=r"^1 file skipped: lost\.tif \(in no class folder\)$"):
        assert len(load_data(f"imagefolder:{tmp_path}", size=8)) == 1


def test_postscript_is_not_run_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would call Ghostscript on it."""
    from PIL import EpsImagePlugin

    called: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    write(tmp_path / "a" / "b.png", *POSTSCRIPT)
    data = load_data(f"imagefolder:{tmp_path}", size=8, non_rgb="convert")
    assert skipped(data) == {"a/b.png": "cannot be decoded: no image"}
    assert not called


@pytest.mark.parametrize(("suffix", "options"), [(".bmp", {}), (".tif", {"compression": "tiff_lzw"})])
def test_widths_and_offsets_with_16_in_them_are_not_16_bits(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    """Rows of a BMP of 720 pixels are 2160 bytes; a TIFF notes where its tables begin."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 720, 3), dtype=np.uint8)
    file = save(Image.fromarray(noise), tmp_path / "a" / f"a{suffix}", **options)
    with Image.open(file) as image:
        assert "16" in str(image.tile[0][3]), "the case that this test is about"
    assert skipped(load_data(f"imagefolder:{tmp_path}", size=8)) == {}


def test_ppm_of_16_bits_is_named_as_png_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.ppm").write_bytes(b"P6 8 8 65535\n" + b"\x80\x01" * 3 * 64)
    assert skipped(load_data(f"imagefolder:{tmp_path}", size=8)) == {"a/deep.ppm": "16 bits per channel"}


# --- PASCAL VOC -----------------------------------------------------------------------------------


def palette(classes: np.ndarray) -> Image.Image:
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette([value for k in range(256) for value in (k, 255 - k, k // 2)])
    assert image.mode == "P"
    return image


@pytest.fixture(params=["", "VOC2007", "VOCdevkit/VOC2012"])
def voc(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Three listed images, the last without an object, and one that is not listed."""
    root = tmp_path / request.param
    write(root / "ImageSets" / "Segmentation" / "val.txt", "b", "a", "c")
    classes = np.zeros((120, 160), dtype=int)
    classes[20:90, 30:100] = 15
    classes[:, 130:] = 1
    classes[18:20, 30:100] = 255
    for name in "abcd":
        save(painted(160, 120, (30, 20, 99, 89)), root / "JPEGImages" / f"{name}.jpg", format="PNG")
        save(palette(classes), root / "SegmentationClass" / f"{name}.png")
    save(
        palette(np.where(np.arange(160) < 80, 0, 255) * np.ones((120, 1))),
        root / "SegmentationClass" / "c.png",
    )
    return tmp_path


def test_voc_takes_the_class_that_covers_most(voc: Path) -> None:
    data = load_data(f"voc:{voc}", size=112)
    assert data.labels.tolist() == [14, 14, -1]
    assert data.classes[14] == "person"
    assert len(data.classes) == 20
    assert [data[k].name for k in range(2)] == ["b", "a"]
    for k in range(2):
        assert_mask_is_red(data[k])
    assert skipped(data) == {"c": "its mask shows no object"}


def test_voc_without_a_usable_mask(voc: Path) -> None:
    home = next(voc.rglob("SegmentationClass"))
    spec = f"voc:{voc}"
    (home / "b.png").unlink()
    save(palette(np.full((120, 160), 21)), home / "a.png")
    save(painted(160, 120), home / "c.png")
    data = load_data(spec)
    assert data.labels.tolist() == [-1, -1, -1]
    assert skipped(data) == {
        "b": "its mask b.png cannot be read: No such file or directory",
        "a": "its mask has values above 20 that are not 255",
        "c": "its mask has no palette but is RGB",
    }
    assert len(load_data(spec, limit=2)) == 2
    write(next(voc.rglob("val.txt")), "")
    with pytest.raises(BadData, match=r"val\.txt is empty"):
        load_data(spec)


# --- CIFAR ----------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
ROWS = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
PLANAR = ROWS.reshape(20, 3, 32, 32)
TENS = [int(k) for k in rng.integers(0, 10, 20)]


def text_of_python_2(text: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(text)) + text


def pickled_by_python_2(rows: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """A batch as the archives have it: strings of bytes, and an array by numpy.core."""
    text = text_of_python_2
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", side) for side in rows.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def names_by_python_2(names: Sequence[str], key: bytes = b"label_names") -> bytes:
    text = text_of_python_2
    return b"\x80\x02}(" + text(key) + b"](" + b"".join(text(name.encode()) for name in names) + b"eu."


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """The Python version of CIFAR-10: two images per training batch, ten for the test."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k in range(5):
        rows, labels = ROWS[2 * k : 2 * k + 2], TENS[2 * k : 2 * k + 2]
        (folder / f"data_batch_{k + 1}").write_bytes(pickled_by_python_2(rows, labels))
    (folder / "test_batch").write_bytes(pickled_by_python_2(ROWS[10:], TENS[10:]))
    (folder / "batches.meta").write_bytes(names_by_python_2(CIFAR10_CLASSES))
    return folder


def assert_holds(data: Dataset, rows: np.ndarray, labels: list[int]) -> None:
    assert len(data) == len(rows)
    assert data.labels.tolist() == labels
    assert data.labels.dtype == torch.int64
    for k in range(len(rows)):
        sample = data[k]
        assert sample.image.dtype == torch.float32
        assert sample.image.is_contiguous()
        assert np.array_equal((sample.image * 255).round().byte().numpy(), rows[k].reshape(3, 32, 32))
        assert (sample.label, sample.mask) == (labels[k], None)


def test_the_pickles_are_those_of_python_2() -> None:
    found = pickle.loads(pickled_by_python_2(ROWS, TENS), encoding="latin1")
    assert np.array_equal(found["data"], ROWS)
    assert found["labels"] == TENS


def test_cifar10_from_its_archive(cifar10: Path, tmp_path: Path) -> None:
    packed = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(cifar10, cifar10.name)
    for path in (cifar10, cifar10.parent, packed):
        data = load_data(f"cifar10:{path}")
        assert_holds(data, ROWS[10:], TENS[10:])
        assert_holds(load_data(f"cifar10:{path}", "train"), ROWS[:10], TENS[:10])
        assert data.classes == list(CIFAR10_CLASSES)
    assert data[3].name == data[-7].name == "cifar10/test/3"
    few = load_data(f"cifar10:{cifar10}", limit=2, size=32)
    assert [few[k].name for k in range(2)] == ["cifar10/test/0", "cifar10/test/5"]
    assert_holds(few, ROWS[[10, 15]], [TENS[10], TENS[15]])
    (cifar10 / "data_batch_4").unlink()
    assert_holds(load_data(f"cifar10:{cifar10}"), ROWS[10:], TENS[10:])
    with pytest.raises(BadData, match=r"does not hold all of data_batch_1, .*give the folder"):
        load_data(f"cifar10:{cifar10}", "train")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_batches_written_again_by_python_3(tmp_path: Path, protocol: int) -> None:
    for key in ("data", b"data"):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({key: ROWS, "labels": TENS}, protocol=protocol))
        assert_holds(load_data(f"cifar10:{tmp_path}"), ROWS, TENS)


class Evil:
    """Whose pickle calls ``what(*arguments)``."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("what", "arguments", "named"),
    [
        (os.system, ("touch pwned",), r"\w+\.system"),
        (eval, ("open('pwned', 'w')",), r"\w+\.eval"),
        (getattr, (np.ndarray, "tofile"), r"\w+\.getattr"),
        (np.load, ("pwned",), r"numpy\.load"),
    ],
)
def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[..., Any], arguments: Any, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for evil in (Evil(what, *arguments), {"data": ROWS, "labels": Evil(what, *arguments)}):
        for protocol in (0, 2, 4):
            (tmp_path / "test_batch").write_bytes(pickle.dumps(evil, protocol=protocol))
            with pytest.raises(
                SrdLabError, match=rf"test_batch is refused as a pickle \(it asks for {named}"
            ):
                load_data("cifar10:.")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"no pickle",
        pickled_by_python_2(ROWS, TENS)[:-2000],
        pickle.dumps([1, 2]),
        pickle.dumps({"data": ROWS.tolist(), "labels": TENS}),
        pickle.dumps({"data": ROWS.astype(np.float32), "labels": TENS}, protocol=2),
        pickle.dumps({"data": np.asfortranarray(ROWS), "labels": TENS}, protocol=2),
        pickle.dumps({"data": ROWS.view(np.int8), "labels": TENS}, protocol=2),
        pickle.dumps({"data": ROWS, "fine_labels": TENS}, protocol=2),
        pickle.dumps({"data": ROWS[:, 1:], "labels": TENS}, protocol=2),
        pickle.dumps({"data": ROWS, "labels": TENS[1:]}, protocol=2),
        pickle.dumps({"data": ROWS, "labels": [10] * 20}, protocol=2),
        pickle.dumps({"data": ROWS, "labels": ["cat"] * 20}, protocol=2),
    ],
)
def test_damaged_batches(tmp_path: Path, batch: bytes) -> None:
    (tmp_path / "test_batch").write_bytes(batch)
    with pytest.raises(BadData) as caught:
        load_data(f"cifar10:{tmp_path}")
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    fine, names = [5 * k + 4 for k in range(20)], [f"thing {k}" for k in range(100)]
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "test").write_bytes(pickled_by_python_2(ROWS, fine, b"fine_labels"))
    data = load_data(f"cifar100:{tmp_path}")
    assert_holds(data, ROWS, fine)
    assert data.classes[99] == "99", "no names at hand"
    (folder / "meta").write_bytes(names_by_python_2(names, b"fine_label_names"))
    assert load_data(f"cifar100:{tmp_path}").classes == names


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_binary_version(tmp_path: Path, kind: str) -> None:
    coarse = b"" if kind == "cifar10" else b"\x07"
    records = [coarse + bytes([label]) + row.tobytes() for label, row in zip(TENS, ROWS, strict=True)]
    file = tmp_path / ("test_batch.bin" if kind == "cifar10" else "test.bin")
    file.write_bytes(b"".join(records))
    assert_holds(load_data(f"{kind}:{tmp_path}"), ROWS, TENS)
    names = [f"n{k}" for k in range(10 if kind == "cifar10" else 100)]
    write(tmp_path / ("batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"), *names)
    packed = tmp_path / "binary.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path, "inside", filter=lambda info: None if info.name.endswith("gz") else info)
    for path in (tmp_path, packed):
        assert load_data(f"{kind}:{path}").classes == names
    assert_holds(load_data(f"{kind}:{packed}"), ROWS, TENS)
    file.write_bytes(b"".join(records)[:-1])
    with pytest.raises(BadData, match="expected records of"):
        load_data(f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    "arrays",
    [
        {
            "test_images": PLANAR.transpose(0, 2, 3, 1),
            "test_labels": TENS,
            "train_images": PLANAR[:1],
            "train_labels": [0],
        },
        {"x_test": PLANAR, "y_test": TENS, "x_train": PLANAR[:1], "y_train": [0]},
        {"test_data": ROWS, "test_labels": np.array(TENS, np.uint8)},
        {"images": PLANAR.transpose(0, 2, 3, 1), "labels": TENS, "classes": list("abcdefghij")},
    ],
)
def test_cifar_from_npz(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_data(f"cifar10:{tmp_path / 'a.npz'}")
    assert_holds(data, ROWS, TENS)
    assert data.classes == list(arrays.get("classes", CIFAR10_CLASSES))
    if "x_train" in arrays:
        assert_holds(load_data(f"cifar10:{tmp_path / 'a.npz'}", "train"), ROWS[:1], [0])


def test_an_npz_of_one_split_may_say_so_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "train_set.npz", images=PLANAR, labels=TENS)
    with pytest.raises(BadData, match="by its name these are images for train, and not for test"):
        load_data(f"cifar10:{tmp_path / 'train_set.npz'}")
    assert len(load_data(f"cifar10:{tmp_path / 'train_set.npz'}", "train")) == 20


def test_jpegs_back_to_back(tmp_path: Path) -> None:
    files = []
    for image in (
        painted(32, 32),
        Image.new("L", (32, 32), 51),
        painted(31, 32),
        painted(32, 32, (0, 0, 15, 15)),
    ):
        with io.BytesIO() as file:
            image.save(file, format="JPEG", quality=100, subsampling=0)
            files.append(file.getvalue())
    files.append(b"no image")
    content = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(5, dtype=np.uint8),
    }
    np.savez(tmp_path / "a.npz", **content)
    data = load_data(f"cifar10:{tmp_path / 'a.npz'}")
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert skipped(data) == {
        "cifar10/test/1": "not RGB but L",
        "cifar10/test/2": "31 x 32 pixels",
        "cifar10/test/4": "cannot be decoded: no image",
    }
    image = data[3].image
    assert image.shape == (3, 32, 32)
    assert image[0, 8, 8] > 0.9 > 0.1 > image[0, 24, 8]
    assert 1 not in skipped(load_data(f"cifar10:{tmp_path / 'a.npz'}", non_rgb="convert"))
    for offsets in (
        content["offsets"][::-1],
        content["offsets"].astype(float),
        content["offsets"][1:].astype(bool),
    ):
        np.savez(tmp_path / "a.npz", **{**content, "offsets": offsets})
        with pytest.raises(BadData, match="offsets do not cut jpeg into files"):
            load_data(f"cifar10:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "it holds nothing"),
        ({"pictures": PLANAR}, r"it holds pictures.*expected test_images and test_labels"),
        ({"images": PLANAR / 255, "labels": TENS}, r"images are float64 \(20, 3, 32, 32\), not uint8"),
        ({"images": PLANAR[:, :, :28, :28], "labels": TENS}, r"\(20, 3, 28, 28\)"),
        ({"images": PLANAR, "labels": TENS[1:]}, "20 images and 19 labels"),
        ({"images": PLANAR, "labels": np.array(TENS, float)}, r"labels are float64 \(20,\), not integers"),
        ({"images": PLANAR, "labels": np.array(TENS) + 90}, "cifar10 has 10 classes"),
        ({"images": PLANAR[:0], "labels": np.array([], int)}, "0 images and 0 labels"),
        ({"images": PLANAR, "labels": TENS, "classes": ["a", "b"]}, "2 class names"),
        ({"images": np.array([{}], dtype=object), "labels": TENS}, "cannot be used"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadData, match=message):
        load_data(f"cifar10:{tmp_path / 'a.npz'}")
    for name in ("a.npz", "a.tar.gz"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(BadData, match=rf"{name} cannot be"):
            load_data(f"cifar10:{tmp_path / name}")


# --- the real files, where they are at hand -------------------------------------------------------


@needs_shared
def test_the_shared_validation_images_have_their_labels_and_boxes() -> None:
    folder = SHARED / "imagenet_val227"
    data = load_data(f"imagenet:{folder}")
    with (folder / "labels.csv").open(newline="") as lines:
        labels = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
    with (folder / "boxes.csv").open(newline="") as lines:
        boxed = {row["file"] for row in csv.DictReader(lines)}
    assert len(data) == len(labels) == 1300
    for index in range(0, 1300, 5):
        sample = data[index]
        assert sample.label == data.labels[index] == labels[sample.name]
        assert (sample.mask is not None) == (sample.name in boxed)
        assert sample.mask is None or sample.mask.any()


@needs_shared
def test_the_shared_boxes_agree_with_their_coordinates_at_227_pixels() -> None:
    folder = SHARED / "imagenet_val227"
    data = load_data(f"imagenet:{folder}", size=227, limit=60)
    with (folder / "boxes.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    alone = 0
    for sample in (data[index] for index in range(len(data))):
        own = [row for row in rows if row["file"] == sample.name]
        if len(own) == 1:
            alone += 1
            assert sample.mask is not None
            low, high = (end(sample.mask.nonzero(), 0).values.tolist() for end in (torch.min, torch.max))
            box = [float(own[0][f"{corner}_227"]) for corner in ("y0", "x0", "y1", "x1")]
            assert np.abs(np.subtract([*low, *high], box)).max() < 1.5
    assert alone > 20


@needs_shared
@pytest.mark.parametrize(
    ("file", "split", "length"),
    [
        ("lossless_test1000_train4000.npz", "test", 1000),
        ("lossless_test1000_train4000.npz", "train", 4000),
        ("test_jpeg.npz", "test", 10_000),
        ("train_jpeg.npz", "train", 50_000),
    ],
)
def test_the_shared_cifar(file: str, split: str, length: int) -> None:
    data = load_data(f"cifar10:{SHARED / 'cifar10' / file}", split)
    assert len(data) == length
    assert data.classes == list(CIFAR10_CLASSES)
    assert set(data.labels.tolist()) == set(range(10))
    assert data[length // 2].image.shape == (3, 32, 32)


def test_index_of_is_the_inverse_of_wnids() -> None:
    assert [index_of()[wnid] for wnid in wnids()] == list(range(1000))
