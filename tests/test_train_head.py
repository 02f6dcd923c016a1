"""scripts/train_head.py: the loss, the split, the views, the cache and the file that comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from script_files import script_module
from torch import Tensor, nn

from srd_lab.data import load_data
from srd_lab.errors import BadWeights, SrdLabError
from srd_lab.models import load_model, read_state
from srd_lab.models.imagenet import Head
from srd_lab.runtime import generator

WNIDS = ("n01440764", "n01443537", "n01484850")
NARROW = [4, "M", 8, "M", 8, "M", 16, "M", 512, "M"]  # VGG's layout, in a hundredth of the time


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("train_head")


def _picture(file: Path, colour: int, seed: int) -> None:
    """A colour per class, with noise and a ramp from left to right."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (240, 260 + 4 * seed, 3))
    pixels[..., colour] += 120
    pixels += np.linspace(0, 60, pixels.shape[1]).astype(int)[None, :, None]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, ``a`` with 9 and ``b`` with 6 images of three classes."""
    root = tmp_path_factory.mktemp("data")
    for seed in range(15):
        name = f"{'a' if seed < 9 else 'b'}/{WNIDS[seed % 3]}/{seed:02d}.png"
        _picture(root / name, seed % 3, seed)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Convolutions of the narrow VGG without a classifier, and a teacher; random, 16 bits."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg.make_layers(NARROW)
    state = {f"features.{key}": 3 * value for key, value in vgg.state_dict().items()}
    np.savez(root / "convolutions.npz", **{key: value.half().numpy() for key, value in state.items()})  # type: ignore[arg-type]
    teacher = torchvision.models.shufflenet_v2_x0_5(weights=None)
    with torch.no_grad():  # else it says nearly the same of all classes
        teacher.get_parameter("fc.weight").mul_(50)
    save_file(
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in teacher.state_dict().items()
        },
        root / "teacher.safetensors",
    )
    return {"backbone": root / "convolutions.npz", "teacher": root / "teacher.safetensors"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchvision.models.vgg.cfgs, "D", NARROW)


def _options(root: Path, files: dict[str, Path], out: Path, **more: object) -> list[str]:
    given = {
        "backbone": "vgg16",
        "backbone-weights": files["backbone"],
        "teacher": "shufflenet_v2_x0_5",
        "teacher-weights": files["teacher"],
        "data": [f"imagenet:{root / 'a'}", f"imagenet:{root / 'b'}"],
        "view-size": 96,
        "epochs": 3,
        "out": out,
        **{key.replace("_", "-"): value for key, value in more.items()},
    }
    words = []
    for key, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{key}", str(one)]
    return words


def _run(script: ModuleType, words: list[str]) -> Result:
    return CliRunner().invoke(script.main, words)


def _extractor(script: ModuleType, files: dict[str, Path], folder: Path | None = None, **more: Any) -> Any:
    student = script.student_of("vgg16", files["backbone"], Head(1, ()), 0, torch.device("cpu"))
    options = {
        "backbone": "vgg16",
        "backbone_weights": files["backbone"],
        "teacher": "shufflenet_v2_x0_5",
        "teacher_weights": files["teacher"],
        "view_size": 96,
        "smallest": 0.3,
        "seed": 0,
        "non_rgb": "skip",
        "cache": folder,
        **more,
    }
    return script.extractor_of(options, student, torch.device("cpu"))


def _pictures(script: ModuleType, data: Path) -> list[Any]:
    return [
        p
        for group in script.folders([f"imagenet:{data / 'a'}", f"imagenet:{data / 'b'}"]).values()
        for p in group
    ]


# --- the loss and the training --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_formula(script: ModuleType, weight: float) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    labels, T = torch.tensor([0, 4, 2, 2]), 2.5

    def softmax(row: list[float], t: float) -> list[float]:
        powers = [math.exp(value / t) for value in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        kl = sum(p * math.log(p / q) for p, q in zip(softmax(t, T), softmax(s, T), strict=True))
        total += (1 - weight) * T**2 * kl - weight * math.log(softmax(s, 1)[label])
    loss = script.distillation_loss(student, teacher, labels, T, weight)
    assert float(loss) == pytest.approx(total / 4, rel=1e-12)


def _views(script: ModuleType, n: int = 60) -> Any:
    """Maps whose first channels tell three classes apart; a teacher who is wrong about the last one."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    maps = torch.rand(n, 512, 7, 7, generator=rng) + 5
    maps[torch.arange(n), labels] += 1
    teacher = torch.zeros(n, 1000)
    teacher[torch.arange(n), torch.tensor([10, 11, 12])[labels]] = 9
    return script.Views(maps.half(), teacher, labels, {})


@pytest.mark.parametrize(
    ("pool", "hidden", "weight", "expected"),
    [(1, (), 0.0, [10, 11, 12]), (7, (64,), 0.0, [10, 11, 12]), (1, (32, 32), 1.0, [0, 1, 2])],
)
def test_the_head_learns_what_it_is_taught(
    script: ModuleType, pool: int, hidden: tuple[int, ...], weight: float, expected: list[int]
) -> None:
    views = _views(script)
    torch.manual_seed(0)
    head = Head(pool, hidden).classifier()
    before = script.distillation_loss(
        head(script.pooled(views.maps, pool)), views.teacher, views.labels, 2, weight
    )
    how = script.Training(2.0, weight, 60 if pool == 7 else 200, lr=0.01, weight_decay=0.1)
    script.train(head, [views], pool, how, seed=0)
    out = head(script.pooled(views.maps, pool))  # raw inputs: the standardisation is inside
    assert script.distillation_loss(out, views.teacher, views.labels, 2, weight) < 0.2 * before
    assert torch.equal(out.argmax(1), torch.tensor(expected)[views.labels])
    assert not head.training


def test_training_is_decided_by_the_seed_alone(script: ModuleType) -> None:
    def weights(seed: int, stream: int) -> Tensor:
        torch.manual_seed(0)
        head = Head(1, (8,)).classifier()
        torch.manual_seed(stream)
        script.train(head, [_views(script, 300)], 1, script.Training(epochs=2), seed)
        assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(stream)))
        return torch.nn.utils.parameters_to_vector(head.parameters()).detach()

    first = weights(0, 1)
    assert torch.equal(first, weights(0, 2))
    assert not torch.allclose(first, weights(1, 1))


def test_standardised_inputs_end_up_in_the_first_layer(script: ModuleType) -> None:
    torch.manual_seed(0)
    z = 5 + torch.rand(40, 512) * torch.linspace(0.5, 3, 512)
    z[:, 7] = 2.0  # never moves
    mean, deviation = script.statistics(z)
    torch.testing.assert_close(mean, z.mean(0))
    usual = z.std(0, correction=0)
    torch.testing.assert_close(deviation, usual.clamp_min(0.1 * float(usual.mean())))
    head = Head(1, (4,)).classifier().eval()
    expected = head((z - mean) / deviation)
    script.unstandardise(head, mean, deviation)
    torch.testing.assert_close(head(z), expected, rtol=1e-4, atol=1e-4)


def test_only_weights_decay(script: ModuleType) -> None:
    head = Head(1, (4,)).classifier()
    decayed, kept = script.groups(head, 0.5)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert [p.dim() for p in kept["params"]] == [1, 1]


# --- the split --------------------------------------------------------------------------------------------


def test_the_split_hangs_on_seed_and_names_alone(script: ModuleType, data: Path) -> None:
    a, b = f"imagenet:{data / 'a'}", f"imagenet:{data / 'b'}"
    train, held = script.split(script.folders([a, b]), "0.4", (), 0)
    assert len(held) == 6
    assert len(train) == 9
    assert {p.name for p in train} | {p.name for p in held} == {p.name for p in _pictures(script, data)}
    again = script.split(script.folders([b, a]), "0.4", (), 0)[1]
    assert [p.name for p in again] == [p.name for p in held]
    others = {script.list_text(script.split(script.folders([a, b]), "0.4", (), seed)[1]) for seed in range(4)}
    assert len(others) == 4
    assert script.list_text(held) == "".join(f"{name}\n" for name in sorted(p.name for p in held))
    only_b = script.split(script.folders([a, b]), "0.5", (b,), 0)[1]
    assert len(only_b) == 3
    assert all(p.file.is_relative_to(data / "b") for p in only_b)


def test_a_list_of_names_is_a_split(script: ModuleType, data: Path, tmp_path: Path) -> None:
    found = script.folders([f"imagenet:{data / 'a'}", f"imagenet:{data / 'b'}"])
    names = ["n01440764/03.png", "n01443537/10.png"]
    (tmp_path / "list.txt").write_text("\n".join([*names, ""]))
    train, held = script.split(found, str(tmp_path / "list.txt"), (), 0)
    assert [p.name for p in held] == names
    assert len(train) == 13


def test_copies_of_held_out_images_are_not_trained_on(script: ModuleType, data: Path, tmp_path: Path) -> None:
    pictures = _pictures(script, data)
    copy = tmp_path / "c" / WNIDS[0] / "other_name.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(pictures[0].file.read_bytes())
    train = [*pictures[1:], *script.folders([f"imagenet:{tmp_path / 'c'}"]).popitem()[1]]
    assert script.without_copies(train, pictures[:1]) == pictures[1:]


# --- views ------------------------------------------------------------------------------------------------


def test_the_first_view_is_what_srd_lab_shows_a_network(
    script: ModuleType, data: Path, files: dict[str, Path]
) -> None:
    extractor = _extractor(script, files)
    dataset = load_data(f"imagenet:{data / 'a'}")
    for k, picture in enumerate(_pictures(script, data)[:3]):
        own, teachers = extractor.pixels(picture, 0)
        assert torch.equal(own, dataset[k].image)
        assert torch.equal(teachers, own)


def test_both_networks_see_the_same_region(script: ModuleType, data: Path, files: dict[str, Path]) -> None:
    extractor = _extractor(script, files)
    slopes = []
    for picture in _pictures(script, data):
        own, teachers = extractor.pixels(picture, 1)
        assert own.shape == (3, 96, 96)
        assert teachers.shape == (3, 224, 224)
        smaller = nn.functional.interpolate(teachers[None], (96, 96), mode="bilinear", antialias=True)[0]
        assert float((smaller - own).abs().mean()) < 0.01 < float((smaller.flip(2) - own).abs().mean())
        slopes.append(float(own[..., 48:].mean() - own[..., :48].mean()))
        assert torch.equal(own, extractor.pixels(picture, 1)[0])
        assert not torch.equal(own, extractor.pixels(picture, 2)[0])
    assert min(slopes) < -0.02 < 0.02 < max(slopes)  # some are mirrored


def test_regions_lie_in_the_image_and_have_their_size(script: ModuleType) -> None:
    shares, ratios, mirrored, places = [], [], 0, []
    for k in range(400):
        (x0, y0, x1, y1), mirror = script.region((300, 300), 0.1, generator(0, k))
        assert 0 <= x0 < x1 <= 300.000001
        assert 0 <= y0 < y1 <= 300.000001
        shares.append((x1 - x0) * (y1 - y0) / 90_000)
        if shares[-1] < 0.5:  # no side is cut
            ratios.append((x1 - x0) / (y1 - y0))
            places.append(x0 / (300 - (x1 - x0)))
        mirrored += mirror
    assert 0.1 <= min(shares) < 0.13
    assert 0.9 < max(shares) <= 1
    assert 0.5 < np.mean(shares) < 0.58
    assert 0.75 <= min(ratios) < 0.77
    assert 1.3 < max(ratios) <= 4 / 3 + 1e-9
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.05)
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)
    assert 160 < mirrored < 240
    box, _ = script.region((50, 400), 0.9, generator(0, "narrow"))
    assert (box[0], box[2]) == (0, 50)


@pytest.mark.parametrize("pool", [1, 7])
def test_maps_are_those_that_the_whole_network_has(
    script: ModuleType, pool: int, data: Path, files: dict[str, Path]
) -> None:
    extractor = _extractor(script, files)
    model = script.student_of("vgg16", files["backbone"], Head(pool, (5,)), 0, torch.device("cpu"))
    pictures = _pictures(script, data)[:3]
    views = extractor.view(pictures, 0)
    x = torch.stack([extractor.pixels(picture, 0)[0] for picture in pictures])
    head = model.network.get_submodule("classifier")
    torch.testing.assert_close(head(script.pooled(views.maps, pool)), model(x), rtol=2e-3, atol=2e-3)
    teacher = load_model("shufflenet_v2_x0_5", "imagenet", files["teacher"], "cpu")
    torch.testing.assert_close(views.teacher, teacher(x), rtol=1e-4, atol=1e-4)
    assert views.labels.tolist() == [picture.label for picture in pictures]
    alone = extractor.view(pictures[1:2], 0)
    torch.testing.assert_close(alone.maps[0].float(), views.maps[1].float(), rtol=2e-3, atol=1e-4)


# --- the cache --------------------------------------------------------------------------------------------


def _counted(script: ModuleType, monkeypatch: pytest.MonkeyPatch, stop_at: int = -1) -> list[int]:
    """Images in every forward pass of the backbone from now on; the ``stop_at``-th is interrupted."""
    passes: list[int] = []
    original = script.last_map

    def last_map(student: Any, x: Tensor) -> Tensor:
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        passes.append(len(x))
        return original(student, x)

    monkeypatch.setattr(script, "last_map", last_map)
    return passes


def _equal(first: Any, second: Any) -> bool:
    return all(
        torch.equal(getattr(first, key), getattr(second, key)) for key in ("maps", "teacher", "labels")
    )


def test_an_interrupted_extraction_goes_on_to_the_same_numbers(
    script: ModuleType, data: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CHUNK", 4)
    pictures = _pictures(script, data)[:10]
    without = _extractor(script, files).view(pictures, 1)
    with monkeypatch.context() as patch:
        done = _counted(script, patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            _extractor(script, files, tmp_path / "c").view(pictures, 1)
        assert done == [4, 4]
    assert len(list((tmp_path / "c").glob("*.npz"))) == 2
    with monkeypatch.context() as patch:
        done = _counted(script, patch)
        resumed = _extractor(script, files, tmp_path / "c").view(pictures, 1)
        assert done == [2]
        assert _equal(_extractor(script, files, tmp_path / "c").view(pictures, 1), resumed)
        assert done == [2]
    assert _equal(resumed, without)
    assert not list((tmp_path / "c").glob("*.part"))


def test_what_decides_the_numbers_decides_what_is_read(
    script: ModuleType, data: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = _pictures(script, data)[:2]
    folder = tmp_path / "c"
    state = {key: value.numpy() for key, value in read_state(files["backbone"]).items()}
    np.savez(tmp_path / "other.npz", **{**state, "features.0.bias": state["features.0.bias"] + 1})  # type: ignore[arg-type]
    done = _counted(script, monkeypatch)

    def passes(of: list[Any] = pictures, number: int = 1, **more: Any) -> int:
        before = len(done)
        given = {**files, **({"backbone": more.pop("backbone")} if "backbone" in more else {})}
        _extractor(script, given, folder, **more).view(of, number)
        return len(done) - before

    assert passes() == 1
    assert passes() == 0
    for change in (
        {"number": 2},
        {"number": 0},
        {"seed": 1},
        {"smallest": 0.4},
        {"view_size": 64},
        {"backbone": tmp_path / "other.npz"},
        {"of": pictures[::-1]},
    ):
        assert passes(**change) == 1, change  # type: ignore[arg-type]
        assert passes(**change) == 0  # type: ignore[arg-type]
    assert passes(number=0, seed=5, view_size=64) == 0  # of these, the first view knows nothing
    # The same name with another image.
    (tmp_path / WNIDS[0]).mkdir()
    changed = tmp_path / WNIDS[0] / "x.png"
    changed.write_bytes(pictures[0].file.read_bytes())
    [picture] = script.folders([f"imagenet:{tmp_path}"])[f"imagenet:{tmp_path}"]
    assert passes([picture]) == 1
    _picture(changed, 2, 99)
    script.digest.cache_clear()  # as in another process
    assert passes([picture]) == 1


def test_a_damaged_file_in_the_cache_is_named(
    script: ModuleType, data: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    pictures = _pictures(script, data)[:2]
    _extractor(script, files, tmp_path).view(pictures, 0)
    [file] = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        SrdLabError, match=rf"{file.name} in the cache is damaged \(.+\); remove it"
    ) as caught:
        _extractor(script, files, tmp_path).view(pictures, 0)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_used_are_named_and_left_out(
    script: ModuleType, data: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CHUNK", 1)
    _picture(tmp_path / "d" / WNIDS[0] / "good.png", 0, 1)
    Image.new("L", (240, 240)).save(tmp_path / "d" / WNIDS[0] / "grey.png")
    pictures = script.folders([f"imagenet:{tmp_path / 'd'}"]).popitem()[1]
    for _ in range(2):  # computed, then read
        views = _extractor(script, files, tmp_path / "c").view(pictures, 1)
        assert len(views.maps) == len(views.teacher) == len(views.labels) == 1
        assert views.skipped == {f"{WNIDS[0]}/grey.png": "not RGB but L"}
    assert len(_extractor(script, files, tmp_path / "c", non_rgb="convert").view(pictures, 1).labels) == 2
    with pytest.raises(SrdLabError, match=r"no image to train on can be used \(1 file skipped: .*grey"):
        _extractor(script, files, tmp_path / "c").view(pictures[1:], 1)


# --- the whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "hidden", "kind"), [(1, [], ".npz"), (7, [6, 5], ".safetensors")])
def test_the_file_and_its_card(
    script: ModuleType,
    pool: int,
    hidden: list[int],
    kind: str,
    data: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "new" / f"head{kind}"
    words = _options(data, files, out, pool=pool, hidden=hidden, cache=tmp_path / "c", held_out=0.4)
    result = _run(script, words)
    assert result.exit_code == 0, result.output
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["head"] == {"pool": pool, "hidden": hidden, "classes": 1000}
    assert (card["train"]["images"], card["held_out"]["images"]) == (9, 6)
    assert card["sha256"] == script.hashlib.sha256(out.read_bytes()).hexdigest()
    assert card["command"].startswith("python scripts/train_head.py --backbone vgg16 ")
    assert "--epochs 3" in card["command"]
    assert "--lr" not in card["command"]

    # The accuracies are those of the file, with the tool's own images of the list.
    names = (out.parent / card["held_out"]["file"]).read_text().splitlines()
    assert (
        card["held_out"]["list_sha256"]
        == script.hashlib.sha256("".join(f"{n}\n" for n in names).encode()).hexdigest()
    )
    samples = [s for part in "ab" for s in load_data(f"imagenet:{data / part}") if s.name in names]  # type: ignore[attr-defined]
    x, labels = torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])
    student = load_model("vgg16", "imagenet", out, "cpu")(x)
    teacher = load_model("shufflenet_v2_x0_5", "imagenet", files["teacher"], "cpu")(x)
    for who, logits in (("student", student), ("teacher", teacher)):
        scores = card["held_out"][who]
        hits = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).double()
        assert scores["top1"]["share"] == pytest.approx(float(hits[:, 0].mean()), abs=1e-4)
        assert scores["top5"]["share"] == pytest.approx(float(hits.sum(1).mean()), abs=1e-4)
    agreement = float((student.argmax(1) == teacher.argmax(1)).double().mean())
    assert card["held_out"]["agreement"]["share"] == pytest.approx(agreement, abs=1e-4)
    assert f"{card['held_out']['student']['top1']['share']:.1%}" in result.output
    assert "6 held-out images" in result.output

    # The convolutions are those that were given; a second run reads them from the cache, and ends alike.
    given, kept = read_state(files["backbone"]), read_state(out)
    assert all(torch.equal(kept[key], given[key]) for key in given)
    before = out.read_bytes()
    done = _counted(script, monkeypatch)
    again = [*words, "--held-out", str(out.parent / card["held_out"]["file"])]
    assert _run(script, again).exit_code == 0
    assert done == []
    assert read_state(out).keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in read_state(out).items())
    assert kind == ".npz" or out.read_bytes() == before


def test_the_written_file_is_what_is_measured(
    script: ModuleType,
    data: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that says class 1 of everything has the accuracy of that, whatever the head in memory does."""
    original = script.save

    def save(network: nn.Module, file: Path) -> None:
        last = network.get_submodule("classifier")[-1]  # type: ignore[index]
        with torch.no_grad():
            kept = last.bias.clone()
            last.bias[1] = 1e4
            original(network, file)
            last.bias.copy_(kept)

    monkeypatch.setattr(script, "save", save)
    out = tmp_path / "w.npz"
    words = _options(data, files, out, views=1, held_out=0.5, label_weight=1, epochs=50)
    assert _run(script, words).exit_code == 0
    scores = json.loads(out.with_suffix(".json").read_text())["held_out"]
    names = out.with_suffix(".held_out.txt").read_text().splitlines()
    ones = sum(name.startswith(WNIDS[1]) for name in names) / len(names)
    assert scores["student"]["top1"]["share"] == pytest.approx(ones, abs=1e-4)
    assert scores["student_before_rounding"]["top1"]["share"] > ones + 0.2  # it has learned the colours
    assert scores["agreement"]["share"] == 0 < ones  # a random teacher knows 1,000 classes


def test_accuracies_count_the_first_and_the_first_five(script: ModuleType) -> None:
    out = torch.arange(1000.0).flip(0).repeat(4, 1)  # class 0 first, then 1, 2, ...
    scores = script.accuracies(out, torch.tensor([0, 0, 4, 5]))
    assert (scores["top1"]["share"], scores["top5"]["share"]) == (0.5, 0.75)


def test_a_share_has_its_interval(script: ModuleType) -> None:
    """Wilson's interval, from his paper's formula worked out for 5 of 10, and for none of 10."""
    assert script.share(torch.tensor([True, False] * 5)) == {"share": 0.5, "interval": [0.2366, 0.7634]}
    none = script.share(torch.zeros(10, dtype=torch.bool))
    assert none["interval"] == [0.0, 0.2775]


def test_a_head_too_large_for_16_bits_is_refused(script: ModuleType, tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 1e5)
    with pytest.raises(SrdLabError, match=r"weight does not fit into 16 bits"):
        script.save(layer, tmp_path / "w.npz")
    assert not (tmp_path / "w.npz").exists()


def test_of_the_backbones_file_only_the_classifier_may_be_missing(
    script: ModuleType, files: dict[str, Path], tmp_path: Path
) -> None:
    state = {key: value.numpy() for key, value in read_state(files["backbone"]).items()}

    def student(changed: dict[str, Any]) -> Any:
        np.savez(tmp_path / "w.npz", **changed)
        return script.student_of("vgg16", tmp_path / "w.npz", Head(1, ()), 0, torch.device("cpu"))

    whole = student({**state, **{f"classifier.{k}.weight": np.ones((7, 7), np.float32) for k in (0, 3)}})
    assert whole.network.classifier[0].weight.shape == (1000, 512)
    assert torch.equal(whole.network.features[0].weight, torch.from_numpy(state["features.0.weight"]))
    for changed, message in (
        ({k: v for k, v in state.items() if k != "features.3.bias"}, r"1 missing \(features\.3\.bias\)"),
        ({**state, "more": np.ones(1)}, r"1 unexpected \(more\)"),
        ({**state, "features.0.bias": np.ones(3)}, r"features\.0\.bias \(3,\) where \(4,\)"),
    ):
        with pytest.raises(BadWeights, match=message):
            student(changed)


def test_a_teacher_from_timm(script: ModuleType, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    name = "timm:mobilenetv3_small_050"
    model, side = script.teacher_of(name, tmp_path / "w.pth", torch.device("cpu"))
    assert side == network.pretrained_cfg["input_size"][-1]
    x = torch.rand(1, 3, side, side)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), network((x - mean) / std))
    with pytest.raises(SrdLabError, match="timm has no network 'nothing'"):
        script.teacher_of("timm:nothing", tmp_path / "w.pth", torch.device("cpu"))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": "scenes"}, "'scenes' is not a folder of ImageNet's classes; give --data imagenet:DIR"),
    ({"data": "imagenet:nowhere"}, "nowhere is not a folder"),
    ({"data": ["imagenet:{a}", "imagenet:{a}"]}, "occurs twice in the folders of --data"),
    ({"held_out": "1.5"}, "--held-out 1.5 is no share; expected a number between 0 and 1, or a file"),
    ({"held_out": "nan"}, "--held-out nan is no share"),
    ({"held_out": "0.01"}, "--held-out 0.01 leaves 15 images to train on and 0 to measure by"),
    ({"held_out": "0.99"}, "--held-out 0.99 leaves 0 images to train on and 15 to measure by"),
    ({"held_out": "absent.txt"}, "absent.txt is neither a share nor a file that can be read"),
    ({"held_out": "{list}"}, "lists 'n01440764/none.png', which is no image of --data (1 such lines)"),
    ({"held_out_from": "imagenet:c"}, "--held-out-from imagenet:c is none of the folders of --data"),
    ({"out": "head.pth"}, "--out head.pth is of no kind that is written here; expected .npz or .safetensors"),
    ({"teacher": "resnet17"}, "no network 'resnet17' for imagenet"),
    ({"teacher": "resnet18"}, "teacher.safetensors for resnet18 does not fit"),
    ({"backbone_weights": "{teacher}"}, "for the convolutions of vgg16 does not fit"),
    ({"device": "warp"}, "device 'warp' cannot be used here"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_input_is_answered_in_a_line(
    script: ModuleType,
    change: dict[str, Any],
    message: str,
    data: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("n01440764/00.png\nn01440764/none.png\n")
    places = {"a": data / "a", "list": tmp_path / "list.txt", "teacher": files["teacher"]}

    def filled(value: Any) -> Any:
        return [filled(one) for one in value] if isinstance(value, list) else str(value).format(**places)

    given = {"out": tmp_path / "head.npz", **{key: filled(value) for key, value in change.items()}}
    result = _run(script, _options(data, files, **given))
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
    assert len([line for line in result.output.splitlines() if not line.startswith("9 images")]) <= 2
    assert not (tmp_path / "head.npz").exists()


def test_a_teacher_of_other_classes_is_refused(
    script: ModuleType, data: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = nn.Sequential(nn.Conv2d(3, 7, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    extractor = _extractor(script, files)
    monkeypatch.setattr(extractor.teacher, "network", few)
    with pytest.raises(SrdLabError, match=r"teacher does not give ImageNet's 1,000 logits"):
        extractor.view(_pictures(script, data)[:1], 0)
