"""Networks from elsewhere, by name: what they are given, what is stored of them, and one line where they are none."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import command, tiny_study
from torch import nn
from torchvision.transforms import v2

from attacks.verification import _refuse_code
from srd_lab import parts
from srd_lab.data import load_data
from srd_lab.data.pictures import fit
from srd_lab.errors import BadData, BadEntry, BadValue, BadWeights, SrdLabError, Unavailable
from srd_lab.evaluation.settings import EvaluationSettings
from srd_lab.evaluation.study import Evaluation
from srd_lab.models import WEIGHTS, load_model, preprocessing, scenes_network, weights_digest
from srd_lab.models.own import state_digest
from srd_lab.registry import make_explainer
from srd_lab.types import INTERPOLATIONS, Preprocessing

MINE = """
import torch
from torch import nn
from srd_lab.models import Classifier
from srd_lab.types import Preprocessing

RAN = []

def net(width=4, classes=10):
    RAN.append(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )

class Wants(nn.Module):
    preprocessing = Preprocessing(48, (0, 0, 0), (1, 1, 1), 1.0, "bicubic")
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return {"logits": self.net(x)}

def pair():
    return net(), Preprocessing(40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

def classifier():
    return Classifier(net(), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

def fails():
    raise ZeroDivisionError("no such luck\\nnor another")

def needs(width):
    return net(width)

def number():
    return 3

def wrong_pair():
    return net(), {"size": 3}

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))

def no_logits():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of networks in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return "mine.py"


def test_a_factory_gives_the_network_behind_its_normalisation(mine: str) -> None:
    model = load_model(f"{mine}:net?width=6")
    x = torch.rand(2, 3, 16, 16)
    mean, std = (
        torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (Preprocessing().mean, Preprocessing().std)
    )
    torch.testing.assert_close(model(x), model.network((x - mean) / std))
    assert (model.network[0].out_channels, model.classes, model.training) == (6, 10, False)
    assert not any(p.requires_grad for p in model.parameters())
    assert make_explainer("srd").explain(model, x).shape == (2, 16, 16)


def test_random_weights_are_the_same_each_time_and_leave_the_stream_alone(mine: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = (load_model(f"{mine}:net").state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("factory", "wants"),
    [
        ("net", Preprocessing()),
        ("Wants", Preprocessing(48, (0, 0, 0), (1, 1, 1), 1.0, "bicubic")),
        ("pair", Preprocessing(40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    ],
)
def test_what_a_network_needs_comes_with_it(mine: str, factory: str, wants: Preprocessing) -> None:
    name = f"{mine}:{factory}"
    assert preprocessing(name) == wants
    assert preprocessing(name, "scenes").size == 64
    assert preprocessing(name, "cifar10").size == 32
    model = load_model(name, "imagenet")
    torch.testing.assert_close(model.normalise.mean.flatten(), torch.tensor(wants.mean))
    other = load_model(name, preprocessing=Preprocessing(16, (0.25, 0.25, 0.25), (2, 2, 2)))
    assert other.normalise.std.flatten().tolist() == [2, 2, 2]


def test_a_classifier_is_taken_as_it_is(mine: str) -> None:
    model = load_model(f"{mine}:classifier", preprocessing=Preprocessing(16))
    assert model.normalise.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_weights_from_a_file_fit_strictly_and_decide_the_digest(mine: str, tmp_path: Path) -> None:
    name = f"{mine}:net"
    state = {key: value + 1 for key, value in load_model(name).network.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    model = load_model(name, weights=tmp_path / "w.pth")
    assert all(torch.equal(model.network.state_dict()[key], value) for key, value in state.items())
    digests = {
        weights_digest(name),
        weights_digest(f"{name}?width=5"),
        weights_digest(name, weights=tmp_path / "w.pth"),
    }
    assert len(digests) == 3
    assert weights_digest(name) in digests
    with pytest.raises(BadWeights, match="does not fit"):
        load_model(f"{name}?width=5", weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:fails", r"mine\.py:fails fails: no such luck \(ZeroDivisionError\)"),
        (
            "mine.py:needs",
            r"missing a required argument: 'width'; options stand behind a \?, as in mine\.py:needs\?name=value",
        ),
        ("mine.py:net?wide=3", "unexpected keyword argument 'wide'"),
        ("mine.py:net?width", "'width' is no option; write name=value"),
        ("mine.py:net?width=3&width=4", "width is given twice"),
        ("mine.py:number", "gives a int; expected a torch.nn.Module"),
        ("mine.py:wrong_pair", "gives a dict as its preprocessing"),
        ("mine.py:NUMBER", "is a int and cannot be called"),
        ("mine.py:flat", r"does not take images \(1, 3, 224, 224\): .*; give its --size"),
        ("mine.py:no_logits", r"puts out \(1, 4, 222, 222\) for one image; expected logits \(1, classes\)"),
        ("mine.py:nothing", "mine.py has no 'nothing'; it has net, Wants, pair, "),
        ("nowhere.py:net", r"there is no file nowhere\.py"),
        ("nowhere.at_all:net", r"there is no module nowhere\.at_all; install it, or run where it lies"),
        ("bad.py:net", r"bad\.py cannot be imported: invalid syntax"),
        ("worse:net", r"worse cannot be imported: No module named 'not_there'"),
        ("mine.py:", "names no part of yours; expected package.module:name or path/file.py:name"),
        ("a b:c", "names no part of yours"),
        ("hub:mine", "expected hub:OWNER/REPO:NAME or hub:FOLDER:NAME"),
    ],
)
def test_what_gives_no_network_is_one_line(mine: str, name: str, said: str) -> None:
    Path("bad.py").write_text("def net(:\n")
    Path("worse.py").write_text("import not_there\n")
    with pytest.raises(BadValue, match=said) as error:
        load_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", ["imagenet:nowhere", "cifar10:nowhere", "voc:", "photos", "photos:."])
def test_data_that_are_not_there_show_before_the_network_is_made(data: str) -> None:
    """Its weights may have to be downloaded; this name would be an error of its own."""
    from srd_lab.runs.inputs import data_and_network

    with pytest.raises((BadValue, BadData), match=r"nowhere|there is no data set"):
        data_and_network(
            EvaluationSettings(data=data, model="nothing:net"), "nothing:net", ["nothing:net"], "cpu"
        )


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(Unavailable, match=r"timm:resnet18 needs timm; `pip install 'srd-lab\[timm\]'`"):
        load_model("timm:resnet18")
    with pytest.raises(Unavailable, match=r"needs transformers; `pip install 'srd-lab\[hf\]'`"):
        load_model("hf:x")


def test_a_repository_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(MINE)
    model = load_model(f"hub:{tmp_path}:net?width=3&classes=7")
    assert model.classes == 7
    with pytest.raises(BadValue, match="Cannot find callable nix"):
        load_model(f"hub:{tmp_path}:nix")


# --- from the command line ---------------------------------------------------------------------------------------

SCENES = "srd_lab.models:scenes_network?name=vgg16"
AS_BUNDLED = ("--weights", str(WEIGHTS / "vgg16_scenes.npz"), "--mean", "0.5", "--std", "0.25,0.25,0.25")
FEW = ("--images", "6", "--batch-size", "3", "--device", "cpu", "--no-track")


def table(folder: Path, name: str) -> str:
    (file,) = folder.rglob(name)
    return file.read_text()


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("apop", "--inputs", "zeros", "--no-binarize"), "images.csv"),
        (("evaluate", "--methods", "srd,gradcam", "--metrics", "sparseness,stability"), "images.csv"),
    ],
)
def test_the_bundled_network_by_its_factory_gives_the_same_table(
    arguments: tuple[str, ...], file: str, tmp_path: Path
) -> None:
    for name, options in {"vgg16": (), SCENES: AS_BUNDLED}.items():
        out = tmp_path / ("own" if options else "bundled")
        result = command(*arguments, *FEW, "--model", name, *options, "--out", str(out))
        assert result.exit_code == 0, result.output
    assert table(tmp_path / "own", file) == table(tmp_path / "bundled", file)
    about = json.loads((tmp_path / "own" / "run.json").read_text())["params"]
    assert (
        about["preprocessing"]
        == f"{SCENES}: 64 px; crop 0.875; bilinear; mean 0.5 0.5 0.5; std 0.25 0.25 0.25"
    )
    assert about["weights_sha256"].startswith(f"{SCENES}:")


def test_a_run_of_an_own_network_goes_on_and_notices_another(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    start = (
        "apop",
        "--inputs",
        "zeros",
        "--no-binarize",
        *FEW,
        "--model",
        f"{mine}:net?width=5",
        "--out",
        str(out),
    )
    assert command(*start).exit_code == 0
    resume = ("apop", "--no-track", "--resume", str(out), "--model", f"{mine}:net?width=5")
    unsaid = command(*resume[:4])
    assert (
        f"run {out} names code, {mine}:net, which is not run for a stored run's sake; name it again: --model"
        in unsaid.output
    )
    assert json.loads((out / "run.json").read_text())["status"] == "FINISHED"
    assert command(*resume).exit_code == 0
    monkeypatch.setattr(parts.find(f"{mine}:net"), "__defaults__", (4, 10))
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(re.sub(r"width=5:\w{6}", "width=5:000000", text))
    said = command(*resume).output
    assert f"the weights of {mine}:net?width=5 are not those that run {out} was made with" in said


def test_an_attack_and_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study(monkeypatch, steps=1, queries=4)
    options = (
        "--method",
        "gradient",
        "--pairs",
        "2",
        "--no-curve",
        "--no-eq10",
        "--device",
        "cpu",
        "--no-track",
    )
    result = command("robustness", "--model", SCENES, *AS_BUNDLED, *options, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    entry = tmp_path / "out" / "gradient" / "entry.json"
    content = json.loads(entry.read_text())
    assert Preprocessing.from_dict(content["preprocessing"]) == Preprocessing(64, (0.5,) * 3, (0.25,) * 3)
    content["gates"] = None  # they are made up in a tiny study
    entry.write_text(json.dumps(content))
    said = command("verify", str(entry), *AS_BUNDLED[:2]).output
    assert (
        f"the entry names code, {SCENES}, which is not run for an entry's sake; read it, then give --run-code"
        in said
    )
    again = command("verify", str(entry), *AS_BUNDLED[:2], "--run-code")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("model", "method", "runs"),
    [
        ("mine.py:net", "srd", True),
        ("hub:somebody/repo:net", "srd", True),
        ("hf:somebody/net", "srd", True),
        ("vgg16", "mine.py:Method", True),
        ("vgg16", "smoothed(mine.py:Method?a=1,0.1)", True),
        ("timm:resnet18", "captum:Saliency", False),
        ("vgg16", "smoothed(zennit:EpsilonPlus,0.1)", False),
        ("vgg16", "srd?level=high", False),
    ],
)
def test_an_entry_runs_no_code_that_it_names(model: str, method: str, runs: bool) -> None:
    with pytest.raises(BadEntry, match="names code") if runs else nullcontext():
        _refuse_code(model, method)


def test_pictures_are_explained_at_the_networks_size(mine: str, tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), "orange").save(tmp_path / "a.png")
    for options, side in (((), 40), (("--size", "20"), 20)):
        out = tmp_path / f"out{side}"
        model = ("--model", f"{mine}:pair", "--methods", "gradient", *options, "--out", str(out))
        result = command("explain", str(tmp_path / "a.png"), *model)
        assert result.exit_code == 0, result.output
        assert np.load(out / "a" / "gradient.npy").shape == (side, side)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "0"), "--size"),
        (("--mean", "1,2"), "is not three numbers, such as 0.485,0.456,0.406"),
        (("--mean", "nan"), "is not three numbers"),
        (("--std", "0"), "std above 0"),
        (("--std", "a,b,c"), "is not three numbers"),
        (("--size", "96"), "scenes are 64 x 64 pixels, size 96 is not to be had"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_one_line(options: tuple[str, ...], said: str) -> None:
    result = command("apop", "--images", "2", "--no-track", *options)
    assert result.exit_code in (1, 2)
    assert said in result.output.splitlines()[-1]


# --- preprocessing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", [name for name in INTERPOLATIONS if name != "nearest"])
@pytest.mark.parametrize(("size", "crop"), [(48, 1.0), (48, 0.875), (40, 0.8), (31, 31 / 35)])
def test_pictures_are_resized_as_torchvision_does(size: int, crop: float, interpolation: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(drawn)
    mode = v2.InterpolationMode(interpolation)
    usual = v2.Compose([v2.Resize(round(size / crop), interpolation=mode), v2.CenterCrop(size)])
    found = fit(image, size, crop=crop, interpolation=interpolation)
    assert np.array_equal(np.asarray(found), np.asarray(usual(image)))


def test_folders_are_read_as_the_network_wants_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "a" / "x.png")
    data = load_data(f"imagefolder:{tmp_path}", size=30, crop=0.6, interpolation="lanczos")
    expected = (
        torch.from_numpy(np.array(fit(image, 30, crop=0.6, interpolation="lanczos"))).permute(2, 0, 1) / 255
    )
    torch.testing.assert_close(data[0].image, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"crop": 0},
        {"crop": 1.5},
        {"std": (1, 0, 1)},
        {"mean": (1, 2)},
        {"interpolation": "magic"},
    ],
)
def test_preprocessing_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadValue):
        Preprocessing(**wrong)
    with pytest.raises(BadValue):
        Preprocessing.from_dict({"size": 3})


# --- libraries --------------------------------------------------------------------------------------------------


def test_a_network_of_timm_comes_with_its_preprocessing() -> None:
    timm = pytest.importorskip("timm")
    name = "timm:mobilenetv3_small_050?pretrained=False"
    wants = timm.data.resolve_model_data_config(timm.create_model("mobilenetv3_small_050"))
    found = preprocessing(name)
    assert (found.size, found.crop, found.interpolation) == (
        wants["input_size"][1],
        wants["crop_pct"],
        wants["interpolation"],
    )
    assert (found.mean, found.std) == (wants["mean"], wants["std"])
    assert load_model(name).classes == 1000
    small = "timm:vit_tiny_patch16_224?pretrained=False&img_size=64&depth=1&num_classes=7"
    assert (preprocessing(small).size, load_model(small).classes) == (64, 7)
    with pytest.raises(BadValue, match="timm has no network 'nosuch'"):
        load_model("timm:nosuch")
    with pytest.raises(BadValue, match="unexpected keyword argument 'foo'"):
        load_model("timm:resnet18?pretrained=False&foo=1")


def test_weights_of_timm_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def unreachable(*_: Any, **__: Any) -> nn.Module:
        raise OSError("the hub is not reached\nat all")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        Unavailable, match="cannot be had: the hub is not reached; give weights with --weights FILE"
    ):
        load_model("timm:resnet18")


def test_a_network_of_transformers_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        attn_implementation="eager",
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path)
    name = f"hf:{tmp_path}"
    wants = preprocessing(name)
    assert (wants.size, wants.crop, wants.mean, wants.std) == (32, 1, (0.5,) * 3, (0.25,) * 3)
    model, x = load_model(name), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, theirs((x - 0.5) / 0.25).logits)
    assert model.classes == 5
    assert make_explainer("gradient").explain(model, x).shape == (2, 32, 32)


def test_own_and_bundled_networks_are_told_apart() -> None:
    with pytest.raises(SrdLabError, match="there is no network 'nosuch' for scenes"):
        load_model("nosuch")
    assert isinstance(scenes_network("vgg16"), nn.Module)


@pytest.fixture
def pictures(mine: str) -> str:
    """A folder of pictures in the working directory."""
    Path("photos").mkdir()
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"photos/{k}.png")
    return "pictures:photos"


SCORED = ("--method", "gradient", "--metrics", "sparseness", "--images", "2", "--device", "cpu", "--no-track")


@pytest.mark.parametrize("run", ["evaluate", "explain", "apop", "attack"])
def test_a_network_is_made_once(run: str, mine: str, pictures: str) -> None:
    name = f"{mine}:pair"
    scenes = ("--data", "scenes", "--device", "cpu", "--no-track")
    options = {
        "evaluate": ("--data", pictures, *SCORED),
        "explain": ("photos/0.png", "--device", "cpu"),
        "apop": (*scenes, "--images", "2"),
        "attack": (*scenes, "--pairs", "1", "--steps", "1", "--method", "gradient", "--attack", "eq10"),
    }[run]
    ran = parts.find(f"{mine}:RAN")
    ran.clear()
    result = command(run, "--model", name, *options)
    assert result.exit_code == 0, result.output
    assert len(ran) == (2 if run == "apop" else 1)  # checked before the work on any, and made again for it


def test_the_digest_is_that_of_the_very_network(mine: str) -> None:
    """A factory that gives another network each time is not stored as if it were one."""
    Path("other.py").write_text(
        "import os, torch\nfrom torch import nn\n"
        "def net():\n"
        "    torch.manual_seed(int.from_bytes(os.urandom(4)))\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))\n"
    )
    settings = EvaluationSettings(
        model="other.py:net", images=1, methods=("gradient",), metrics=("sparseness",), size=64, device="cpu"
    )
    study = Evaluation(settings)
    assert study.weights_sha256 == (f"other.py:net:{state_digest(study.model.network)}",)


@pytest.mark.parametrize(("factory", "goes_on"), [("net", True), ("Wants", False)])
def test_a_run_from_before_networks_had_a_crop_is_not_gone_on_with_another(
    factory: str, goes_on: bool, mine: str, pictures: str
) -> None:
    options = ("--data", pictures, "--model", f"{mine}:{factory}", *SCORED)
    assert command("evaluate", *options, "--out", "out").exit_code == 0
    about = json.loads(Path("out/run.json").read_text())
    del about["params"]["preprocessing"], about["params"]["labels"]  # as it was stored then
    Path("out/run.json").write_text(json.dumps(about))
    again = command("evaluate", *options, "--resume", "out")
    if goes_on:
        assert again.exit_code == 0, again.output
    else:
        assert (
            "run out was made before networks had a crop and an interpolation of their own: 0.875, bilinear; "
            "mine.py:Wants now takes 1 and bicubic; start a new run" in again.output
        )
