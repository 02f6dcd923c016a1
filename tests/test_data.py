"""Data sets: drawn scenes are what they say, and an ImageNet folder is read as it lies on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srd_lab.data import SOURCES, batch, load_data, scenes
from srd_lab.data.imagenet import ImageNetFolder, class_names, wnids
from srd_lab.data.pictures import SkippedFile, decode, fit
from srd_lab.data.scenes import BANDS, CLASSES, DISTRACTORS, LENGTHS, SHAPES, SIZE, Scenes
from srd_lab.errors import BadData, BadInput, SrdLabError

# --- scenes -------------------------------------------------------------------------------------


def test_a_scene_depends_on_its_index_alone() -> None:
    forward, backward = Scenes("val", seed=3), Scenes("val", seed=3, length=40)
    first = [forward[k] for k in range(30)]
    second = [backward[k] for k in reversed(range(30))][::-1]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.mask is not None
        assert other.mask is not None
        assert torch.equal(one.mask, other.mask)
        assert (one.label, one.name) == (other.label, other.name)


def test_seed_split_and_index_each_change_the_picture() -> None:
    pictures = [
        Scenes(split, seed=seed)[index].image
        for split, seed, index in [
            ("test", 0, 7),
            ("val", 0, 7),
            ("train", 0, 7),
            ("test", 1, 7),
            ("test", 0, 17),
        ]
    ]
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)


def test_neither_global_random_state_is_touched() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the state that a caller may rely on
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    Scenes()[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002


def test_images_are_8_bit_exact_and_of_the_promised_types() -> None:
    sample = Scenes()[5]
    assert sample.image.shape == (3, SIZE, SIZE)
    assert sample.image.dtype == torch.float32
    assert sample.mask is not None
    assert sample.mask.dtype == torch.bool
    assert sample.name == "scenes/test/5"
    bits = (sample.image * 255).round().to(torch.uint8)
    assert torch.equal(bits.float() / 255, sample.image)
    assert bits.unique().numel() > 50


def test_labels_are_balanced_and_agree_with_the_samples() -> None:
    for split, length in LENGTHS.items():
        counts = torch.bincount(Scenes(split).labels)
        assert counts.tolist() == [length // 10] * 10
    data = Scenes(length=20)
    assert [sample.label for sample in data] == data.labels.tolist()  # type: ignore[attr-defined]
    assert data.classes == CLASSES


def test_index_counts_from_the_end_and_stops_at_it() -> None:
    data = Scenes(length=12)
    assert data[-1].name == data[11].name == "scenes/test/11"
    with pytest.raises(IndexError):
        data[12]


@pytest.fixture
def coded_photographs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Photographs whose columns say where they are: red is the position from 0 to 1 in steps of 1/255."""

    def coded(name: str) -> np.ndarray:
        photograph = np.zeros((120, 510, 3), dtype=np.uint8)
        photograph[..., 0] = np.arange(510)[None, :] // 2
        return photograph

    scenes._backgrounds.cache_clear()
    monkeypatch.setattr(scenes, "_read_photograph", coded)
    yield
    scenes._backgrounds.cache_clear()


@pytest.mark.usefixtures("coded_photographs")
def test_splits_crop_from_disjoint_bands_of_the_photographs() -> None:
    seen = {}
    for split, (start, stop) in BANDS.items():
        rng = np.random.default_rng(0)
        crops = np.stack([scenes._crop(rng, split)[..., 0] for _ in range(200)])
        seen[split] = crops.min(), crops.max()
        assert start - 0.004 <= crops.min() < crops.max() <= stop + 0.004
        assert crops.max() - crops.min() > 0.8 * (stop - start), "the whole band is used"
    assert seen["train"][1] < seen["val"][0] < seen["val"][1] < seen["test"][0]


def _plain_materials(monkeypatch: pytest.MonkeyPatch, brightness: float) -> None:
    """Flat colours in even light: the object in ``brightness``, distractors in grey."""
    monkeypatch.setattr(
        scenes,
        "_material",
        lambda rng, split, u, v, radius, around: np.full_like(around, brightness if radius > 10 else 0.5),
    )
    monkeypatch.setattr(scenes, "_expose", lambda rng, canvas: canvas)


def test_mask_holds_the_pixels_that_the_object_covers_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drawings of one scene, with a black and a white object, differ by its coverage (and rim)."""
    for index in range(30):
        drawn = []
        for brightness in (0.0, 1.0):
            with monkeypatch.context() as patch:
                _plain_materials(patch, brightness)
                drawn.append(Scenes().render(index))
        (black, mask), (white, _) = drawn
        touched = (white.astype(int) - black).max(axis=2)
        assert (touched[mask] > 60).all(), (
            "each pixel of the mask shows the object (at half cover and dark rim)"
        )
        assert (touched[~mask] < 128).all(), "no other pixel shows half of it or more"
        assert touched[mask].max() > 200


def test_masks_have_the_size_and_place_of_their_object() -> None:
    for index in range(100):
        mask = Scenes().render(index)[1]
        rows, columns = np.nonzero(mask)
        assert 120 < mask.sum() < 1700
        assert rows.min() >= 1
        assert rows.max() <= SIZE - 2
        assert columns.min() >= 1
        assert columns.max() <= SIZE - 2
        inside = mask[round(rows.mean()), round(columns.mean())]
        assert inside or CLASSES[index % 10] in ("ring", "crescent")


def _area(shape: Callable[..., np.ndarray], radius: float) -> float:
    v, u = np.mgrid[-40:40:400j, -40:40:400j].astype(np.float32)
    inside = shape(u, v, radius) < 0
    assert np.hypot(u, v)[inside].max() <= radius, "the place that is drawn ends there"
    return float(inside.mean() * 80**2)


def test_silhouettes_keep_to_their_circle_and_have_their_area() -> None:
    areas = {name: _area(shape, 30.0) / 30**2 for name, shape in SHAPES.items()}
    assert areas["disc"] == pytest.approx(np.pi * 0.86**2, rel=0.02)
    assert areas["ring"] == pytest.approx(np.pi * (0.97**2 - 0.53**2), rel=0.02)
    assert areas["square"] == pytest.approx(1.4**2, rel=0.02)
    assert areas["triangle"] == pytest.approx(1.299, rel=0.02)
    assert areas["cross"] == pytest.approx(0.54 * 1.84 * 2 - 0.54**2, rel=0.02)
    for shape in DISTRACTORS:
        assert _area(shape, 30.0) > 0


def test_distance_to_a_polygon_is_the_distance() -> None:
    v, u = np.mgrid[-3:3:61j, -3:3:61j].astype(np.float32)
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float32)
    out = np.hypot(np.maximum(np.abs(u) - 1, 0), np.maximum(np.abs(v) - 1, 0))
    expected = out + np.minimum(np.maximum(np.abs(u), np.abs(v)) - 1, 0)
    np.testing.assert_allclose(scenes._polygon_distance(u, v, square), expected, atol=1e-6)


def test_a_photograph_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadData, match=r"nowhere\.png.*scikit-image"):
        scenes._read_photograph("nowhere.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"spec": spec}, f"'{spec}'.*{', '.join(SOURCES)}")
            for spec in ("cifarre", "imagenet:", "voc", ":x")
        ),
        ({"spec": "cifar"}, r"'cifar'.*did you mean 'cifar10'"),
        ({"split": "valid"}, r"'valid'.*train, val, test"),
        ({"seed": -1}, r"0 or more"),
        ({"size": 32}, r"64 x 64"),
        ({"limit": 0}, r"1 or more"),
        ({"spec": "imagenet:no/such/folder"}, r"no/such/folder is not a folder"),
        ({"spec": "imagefolder:no/such/folder"}, r"no/such/folder is not a folder"),
        ({"spec": "imagenet-s:no/such/folder"}, r"no/such/folder/validation is not a folder"),
        ({"spec": "voc:no/such/folder"}, r"no/such/folder holds no ImageSets/Segmentation/val.txt"),
        ({"spec": "cifar10:no/such/file.npz"}, r"there is no no/such/file.npz"),
        ({"spec": "cifar10:.", "split": "val"}, r"cifar10 has no split 'val'.*train, test"),
        ({"spec": "cifar100:.", "size": 64}, r"cifar100 has 32 x 32 pixels"),
        ({"spec": "imagenet:.", "non_rgb": "drop"}, r"'drop'.*skip or convert"),
        ({"spec": "imagefolder:.", "boxes": "x"}, r"boxes go with imagenet:DIR"),
        ({"spec": "imagefolder:.", "limit": 0}, r"1 or more"),
        ({"spec": "cifar10:.", "limit": 0}, r"1 or more"),
    ],
)
def test_what_load_data_cannot_do_is_said(arguments: dict, message: str) -> None:
    with pytest.raises(SrdLabError, match=message):
        load_data(**arguments)


def test_limit_and_batch() -> None:
    data = load_data("scenes", "val", limit=30)
    assert len(data) == 30
    assert len(load_data("scenes", "val", limit=10**6)) == 2000
    images, labels = batch(data, [12, 3])
    assert images.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(images[1], data[3].image)
    assert labels.tolist() == [2, 3]
    assert labels.dtype == torch.int64
    with pytest.raises(BadInput, match="at least one"):
        batch(data, [])


def test_the_package_imports_no_image_library() -> None:
    code = (
        "import sys, srd_lab.data; print([m for m in ('torchvision', 'skimage', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- ImageNet folders ---------------------------------------------------------------------------


def _ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def _save(image: Image.Image, file: Path, **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _save(_ramp(40, 30), tmp_path / "n01443537" / "b.png")
    _save(_ramp(40, 30), tmp_path / "n01443537" / "a.PNG", format="PNG")
    _save(_ramp(30, 40), tmp_path / "n15075141" / "z.JPEG", format="JPEG")
    (tmp_path / "n01443537" / "Thumbs.db").write_text("not an image")
    (tmp_path / "labels.csv").write_text("file,wnid")
    (tmp_path / "other").mkdir()
    (tmp_path / "n01440764").mkdir()
    return tmp_path


def test_class_index_comes_from_the_wnid_in_a_partial_folder(folder: Path) -> None:
    data = load_data(f"imagenet:{folder}", size=16)
    assert data.labels.tolist() == [1, 1, 999]
    assert [data[k].name for k in range(3)] == ["n01443537/a.PNG", "n01443537/b.png", "n15075141/z.JPEG"]
    assert data.classes[1] == "goldfish"
    assert len(data.classes) == 1000
    sample = data[2]
    assert sample.label == 999
    assert sample.mask is None
    assert sample.image.shape == (3, 16, 16)
    assert batch(data, range(3))[0].shape == (3, 3, 16, 16)


def test_wnids_are_in_class_order() -> None:
    assert len(wnids()) == len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())
    names = class_names()
    known = {"n01440764": "tench", "n02123045": "tabby", "n03126707": "crane", "n15075141": "toilet tissue"}
    assert {wnid: names[wnids().index(wnid)] for wnid in known} == {**known, "n03126707": names[517]}


def test_the_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert len(load_data(f"imagenet:~/{folder.name}")) == 3


def test_limit_spreads_over_the_folder(folder: Path) -> None:
    assert load_data(f"imagenet:{folder}", limit=2).labels.tolist() == [1, 1]
    for k in range(3):
        _save(_ramp(30, 30), folder / "n15075141" / f"{k}.bmp")
    assert load_data(f"imagenet:{folder}", limit=2).labels.tolist() == [1, 999]


def test_all_kinds_of_images_become_upright_rgb(tmp_path: Path) -> None:
    home = tmp_path / "n01440764"
    _save(Image.new("L", (20, 20), 51), home / "grey.png")
    _save(Image.new("CMYK", (20, 20), (0, 0, 0, 0)), home / "inks.jpg")
    _save(Image.new("RGBA", (20, 20), (255, 0, 0, 255)), home / "alpha.png")
    _save(Image.new("RGB", (20, 20), (0, 0, 255)).quantize(4), home / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: to be turned clockwise
    _save(_ramp(20, 20), home / "turned.png", exif=turned)
    data = ImageNetFolder(tmp_path, size=20, non_rgb="convert")
    means = {sample.name[10:]: sample.image.mean(dim=(1, 2)) for sample in (data[k] for k in range(4))}
    torch.testing.assert_close(means["grey.png"], torch.full((3,), 0.2))
    torch.testing.assert_close(means["inks.jpg"], torch.ones(3))
    torch.testing.assert_close(means["alpha.png"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(means["palette.png"], torch.tensor([0.0, 0.0, 1.0]))
    upright = data[4].image
    assert upright[0, 0, 0] < 0.05 < 0.95 < upright[0, -1, 0], "red grows downwards now"
    assert upright[1, 0, -1] < 0.05 < 0.95 < upright[1, 0, 0], "green grows to the left"


def test_fit_is_torchvisions_resize_and_crop() -> None:
    from torchvision.transforms import v2

    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    for shape in [(500, 375), (300, 441), (97, 120), (256, 300), (600, 600)]:
        image = _ramp(*shape)
        assert np.array_equal(np.asarray(fit(image, 224)), np.asarray(usual(image))), shape


@pytest.mark.parametrize("side", [224, 227, 256])
def test_squares_of_about_the_size_are_only_cropped(side: int) -> None:
    image = _ramp(side, side)
    start = (side - 224) // 2  # 1 for 227, where rounding would give 2
    expected = np.asarray(image)[start : start + 224, start : start + 224]
    assert np.array_equal(np.asarray(fit(image, 224)), expected)


def test_a_corrupt_file_is_named(folder: Path) -> None:
    (folder / "n01443537" / "a.PNG").write_bytes(b"no image at all")
    whole = (folder / "n01443537" / "b.png").read_bytes()
    (folder / "n01443537" / "b.png").write_bytes(whole[: len(whole) // 2])
    data = ImageNetFolder(folder, size=16)
    for index, name in enumerate(["a.PNG", "b.png"]):
        with pytest.raises(SkippedFile, match=name):
            data[index]
    assert data[2].image.shape == (3, 16, 16)


def test_folders_that_cannot_be_used(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadData, match="is not a folder"):
        ImageNetFolder(folder / "labels.csv")
    with pytest.raises(BadData, match="no class folders"):
        ImageNetFolder(folder / "other")
    (folder / "other" / "n01440764").mkdir()
    with pytest.raises(BadData, match=r"hold no images.*\.jpeg"):
        ImageNetFolder(folder / "other")
    (folder / "n00000001").mkdir()
    with pytest.raises(BadData, match=r"n00000001 is none of the 1,000 classes"):
        ImageNetFolder(folder)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_grey_of_16_bits_is_the_picture_of_8(mode: str, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = tmp_path / "deep.tif"
    Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257).save(file)
    image, _ = decode(file, "deep", "convert")
    assert np.array_equal(np.asarray(image), np.repeat(grey[..., None], 3, 2))
    with pytest.raises(SkippedFile, match="deep cannot be used: not RGB but I"):
        decode(file, "deep")


def test_numbers_without_a_known_range_are_no_picture(tmp_path: Path) -> None:
    for k, (values, why) in enumerate(
        (
            (np.ones((4, 4), np.float32), "floating point"),
            (np.full((4, 4), 70000, np.int32), "more than 16 bits"),
        )
    ):
        file = tmp_path / f"{k}.tif"
        Image.fromarray(values).save(file)
        with pytest.raises(SkippedFile, match=f"cannot be decoded: pixels of {why}"):
            decode(file, "deep", "convert")
