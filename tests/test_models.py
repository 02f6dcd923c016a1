"""Models: bundled networks classify, weights files load strictly, all errors say what to do."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from click import ClickException
from safetensors.torch import save_file
from torch import Tensor, nn

from srd_lab.data import batch, load_data
from srd_lab.errors import BadValue, BadWeights, SrdLabError, Unavailable
from srd_lab.methods.cam import GradCAM
from srd_lab.methods.lrp import LRPZPlus
from srd_lab.methods.srd import SRD
from srd_lab.models import (
    FAMILIES,
    SCENES_NETWORKS,
    SPECS,
    WEIGHTS,
    Normalise,
    cards,
    check_classes,
    input_size,
    load_model,
    networks,
    preprocessing,
    read_state,
    scenes_network,
)
from srd_lab.models.cifar import CIFAR_NETWORKS, CIFAR_PREPROCESSING, Block, CifarResNet
from srd_lab.models.classifier import Colour, last_parameter
from srd_lab.models.imagenet import Head, torchvision_names, vgg_head
from srd_lab.types import Preprocessing

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


def _random_network(name: str, **more: Any) -> nn.Module:
    """torchvision's ``name`` with random weights and batch-norm statistics that are no defaults."""
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": True}
    network = torchvision.models.get_model(name, weights=None, **options, **more).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.uniform_(-0.1, 0.1)
    return network


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    return _random_network("squeezenet1_1")


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return _random_network("resnet18")


def _save_npz(file: Path, state: dict[str, Tensor]) -> Path:
    np.savez(file, **{key: value.numpy() for key, value in state.items()})  # type: ignore[arg-type]
    return file


def _save_pth(file: Path, state: object) -> Path:
    torch.save(state, file)
    return file


def _imagenet_logits(network: nn.Module, x: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return network((x - mean) / std)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache: an empty folder, on a machine without a network."""

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


# --- the networks in the package ----------------------------------------------------------------


@pytest.mark.parametrize("name", SCENES_NETWORKS)
def test_bundled_networks_classify_scenes(name: str) -> None:
    images, labels = batch(load_data("scenes", "test"), range(200))
    model = load_model(name, device="cpu")
    assert (model(images).argmax(1) == labels).float().mean() >= 0.93


@pytest.mark.parametrize("name", SCENES_NETWORKS)
def test_models_are_frozen_float32_and_in_eval_mode(name: str) -> None:
    model = load_model(name, device="cpu")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert [child for child, _ in model.named_children()] == ["normalise", "network"]
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_cards_tell_of_the_files_that_are_there() -> None:
    assert [card["name"] for card in cards()] == list(SCENES_NETWORKS)
    for card in cards():
        file = WEIGHTS / card["file"]
        assert file.stat().st_size <= 4 * 2**20
        network = scenes_network(card["name"])
        assert card["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert min(card["test_accuracy"], card["val_accuracy"]) >= 0.95
        assert {"data", "width", "seed", "epochs", "command"} <= set(card)


def test_small_networks_have_torchvisions_structure() -> None:
    """Same modules of the same kinds, at the same places, with the channels divided by the width."""
    for name, divisor in (("vgg16", 8), ("resnet18", 4), ("resnet50", 4)):
        own = scenes_network(name)
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name, weights=None)
        kinds = {key: type(module) for key, module in theirs.named_modules() if key}
        assert {key: type(module) for key, module in own.named_modules() if key} == kinds
        for key, module in own.named_modules():
            if isinstance(module, nn.Conv2d):
                full = theirs.get_submodule(key)
                assert isinstance(full, nn.Conv2d)
                assert module.out_channels * divisor == full.out_channels
                assert (module.kernel_size, module.stride) == (full.kernel_size, full.stride)


def test_small_resnet_computes_what_torchvisions_forward_computes() -> None:
    own = scenes_network("resnet18").eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(own(x), torchvision.models.ResNet._forward_impl(own, x))


def test_normalise() -> None:
    layer = Normalise((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    out = layer(torch.full((1, 3, 1, 1), 0.5)).flatten()
    torch.testing.assert_close(out, torch.tensor([0.8, 0.3, 0.1]))
    assert layer.mean.shape == layer.std.shape == (1, 3, 1, 1)


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    load_model("vgg16", device="cpu")
    assert torch.equal(before, torch.get_rng_state())


def _training_script() -> ModuleType:
    spec = spec_from_file_location("train_scenes", Path(__file__).parents[1] / "scripts" / "train_scenes.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folding_the_batch_norm_changes_nothing_in_eval_mode() -> None:
    torch.manual_seed(0)
    trained = scenes_network("vgg16", batch_norm=True)
    x = torch.rand(8, 3, 64, 64)
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(10):
        trained(x)  # in training mode: moves the running statistics
    features = trained.eval().get_submodule("features")
    plain = scenes_network("vgg16").eval()
    plain.get_submodule("features").load_state_dict(
        {key.removeprefix("features."): value for key, value in _training_script().fold(features).items()}
    )
    torch.testing.assert_close(plain.get_submodule("features")(x), features(x), rtol=1e-4, atol=1e-5)


def test_saving_in_16_bits_refuses_what_does_not_fit() -> None:
    rounded = _training_script().rounded
    kept = rounded({"w": torch.tensor([1.0, 1e-3]), "bn.num_batches_tracked": torch.tensor(70_000)})
    assert kept["w"].dtype == np.float16
    assert kept["bn.num_batches_tracked"] == 70_000
    for key, value in (("w", 1e5), ("bn.running_var", 1e-8)):
        with pytest.raises(ClickException, match=key):
            rounded({key: torch.tensor([value])})


# --- weights files ------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "w.pth": lambda file, state: torch.save(state, file),
    "w.pt": lambda file, state: torch.save(state, file, _use_new_zipfile_serialization=False),
    "w.pth.tar": lambda file, state: torch.save({"state_dict": state, "best_acc1": torch.tensor(1.0)}, file),
    "w.th": lambda file, state: torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, file),
    "w.safetensors": lambda file, state: save_file(state, file),
    "w.npz": _save_npz,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_torchvisions_network_on_pixels(
    name: str, squeezenet: nn.Module, tmp_path: Path
) -> None:
    FORMATS[name](tmp_path / name, squeezenet.state_dict())
    model = load_model("squeezenet1_1", "imagenet:some/folder", tmp_path / name, "cpu")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, squeezenet: nn.Module, tmp_path: Path) -> None:
    state = OrderedDict((prefix + key, value) for key, value in squeezenet.state_dict().items())
    file = _save_pth(tmp_path / "w.pt", {"state_dict": state, "epoch": 3})
    model = load_model("squeezenet1_1", "imagenet", str(file), "cpu")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("w.npz", torch.float16), ("w.npz", torch.float64)]
    + [(name, dtype) for name in ("w.pth", "w.safetensors") for dtype in (torch.float16, torch.bfloat16)],
)
def test_other_floats_become_float32_and_integers_stay(
    name: str, dtype: torch.dtype, resnet18: nn.Module, tmp_path: Path
) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v + 7 for k, v in resnet18.state_dict().items()}
    FORMATS[name](tmp_path / name, state)
    loaded = load_model("resnet18", "imagenet", tmp_path / name, "cpu").network.state_dict()
    assert loaded["conv1.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv1.weight"], state["conv1.weight"].float())
    assert loaded["bn1.num_batches_tracked"] == 7
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


def test_densenet_keys_of_old_files_are_renamed(tmp_path: Path) -> None:
    old = {
        "features.denseblock1.denselayer2.norm.1.weight": torch.ones(1),
        "features.denseblock1.denselayer2.conv.2.weight": torch.ones(1),
        "features.norm0.weight": torch.ones(1),
    }
    assert list(read_state(_save_pth(tmp_path / "w.pth", old))) == [
        "features.denseblock1.denselayer2.norm1.weight",
        "features.denseblock1.denselayer2.conv2.weight",
        "features.norm0.weight",
    ]


def test_files_older_than_num_batches_tracked_load(resnet18: nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in resnet18.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    model = load_model("resnet18", "imagenet", tmp_path / "w.pth", "cpu")
    assert torch.equal(model.network.state_dict()["fc.bias"], state["fc.bias"])


def test_weights_given_for_scenes_go_into_its_network(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in read_state(WEIGHTS / "vgg16_scenes.npz").items()}
    state["classifier.6.bias"] += 1
    model = load_model("vgg16", weights=_save_npz(tmp_path / "w.npz", state), device="cpu")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), load_model("vgg16", device="cpu")(x) + 1, rtol=1e-3, atol=1e-2)


def test_a_mismatch_lists_what_does_not_fit(squeezenet: nn.Module, tmp_path: Path) -> None:
    state = dict(squeezenet.state_dict())
    state["extra.weight"] = torch.ones(1)
    state["classifier.1.bias"] = torch.ones(10)
    for key in [key for key in state if key.startswith("features.3.")]:
        del state[key]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadWeights) as caught:
        load_model("squeezenet1_1", "imagenet", tmp_path / "w.pth", "cpu")
    text = str(caught.value)
    assert "w.pth" in text
    assert "6 missing (features.3.squeeze.weight, " in text
    assert ", ...)" in text
    assert "1 unexpected (extra.weight)" in text
    assert "1 of another shape (classifier.1.bias (10,) where (1000,) is expected)" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_no_state_dict(name: str, squeezenet: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / name
    FORMATS[name](file, squeezenet.state_dict())
    whole = file.read_bytes()
    damaged = [whole[: len(whole) // 2], whole[:-1000], whole[:20], b"", b"\x80", b"PK\x03\x04"]
    for content in (b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1", *damaged):
        file.write_bytes(content)
        with pytest.raises(
            SrdLabError, match=rf"{name} cannot be read as a state dict \(.+\); save"
        ) as caught:
            read_state(file)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    file.write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(BadWeights, match=r"begins with b'<!DOCTYPE html><', as no \.\w+ file does"):
        read_state(file)
    with pytest.raises(BadWeights, match=r"no weights file .*absent"):
        read_state(tmp_path / f"absent{file.suffix}")


@pytest.mark.parametrize("written", ["w.pth", "w.pt", "w.npz", "w.safetensors"])
@pytest.mark.parametrize("named", [".pth", ".npz", ".safetensors"])
def test_files_under_a_wrong_name(written: str, named: str, squeezenet: nn.Module, tmp_path: Path) -> None:
    FORMATS[written](tmp_path / written, squeezenet.state_dict())
    file = (tmp_path / written).rename(tmp_path / f"other{named}")
    if named == (".pth" if written == "w.pt" else Path(written).suffix):
        assert read_state(file)
        return
    with pytest.raises(BadWeights, match=rf"other{named} cannot be read as a state dict \(.+\); save"):
        read_state(file)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "npz"])
@pytest.mark.parametrize("where", ["all", "state_dict", "beside", "value"])
def test_no_file_can_run_code(how: str, where: str, tmp_path: Path) -> None:
    trap, w = Trap(tmp_path / "sprung"), torch.ones(1)
    value = {
        "all": trap,
        "state_dict": {"state_dict": trap},
        "beside": {"state_dict": {"w": w}, "args": trap},
        "value": {"w": w, "v": trap},
    }[where]
    file = tmp_path / ("w.npz" if how == "npz" else "w.pth")
    if how == "pickle":
        file.write_bytes(pickle.dumps(value, protocol=2))  # torch.save's
    elif how == "npz":
        np.savez(file, w=np.array([value], dtype=object))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(BadWeights, match=r"cannot be read as a state dict") as caught:
        read_state(file)
    assert not trap.made.exists()
    assert "weights_only" not in str(caught.value)  # no advice to trust it all the same
    if how in ("zip", "legacy"):  # of what torch.save has not written, nothing is looked at
        assert "only tensors and plain data are unpickled: all else can run code" in str(caught.value)
    pickle.loads(pickle.dumps(value))
    assert trap.made.exists()  # the trap is one


def test_a_whole_module_is_refused(resnet18: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        SrdLabError, match=r"asks for torchvision\.models\.resnet\.ResNet.*save model\.state_dict"
    ):
        read_state(_save_pth(tmp_path / "w.pth", resnet18))


def test_states_that_hold_no_tensors(tmp_path: Path) -> None:
    for value in (
        {"a": 1},
        {},
        [torch.ones(1)],
        {"state_dict": {}},
        {"model": {"a": None}},
        {1: torch.ones(1)},
    ):
        with pytest.raises(BadWeights, match=r"w\.pth cannot be read as a state dict"):
            read_state(_save_pth(tmp_path / "w.pth", value))
    with pytest.raises(BadWeights, match=r"\.pth, .*\.safetensors, \.npz"):
        read_state(tmp_path / "w.onnx")


# --- torchvision's networks ---------------------------------------------------------------------

SMALL = (
    "densenet121",
    "efficientnet_b0",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "shufflenet_v2_x0_5",
)


@pytest.mark.parametrize("name", SMALL)
def test_networks_of_all_families_are_torchvisions(name: str, tmp_path: Path) -> None:
    network = _random_network(name)
    FORMATS["w.safetensors"](tmp_path / "w.safetensors", network.state_dict())  # which knows no versions
    model = load_model(name, "imagenet", tmp_path / "w.safetensors", "cpu")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(network, x))
    assert model.classes == 1000


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_are_what_torchvision_makes_of_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _random_network(name).state_dict()
    assert any(key.lower().startswith("aux") for key in state)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    theirs = torchvision.models.get_model(name, weights="IMAGENET1K_V1").eval()
    assert theirs.transform_input
    model = load_model(name, "imagenet", _save_pth(tmp_path / "w.pth", state), "cpu")
    x = torch.rand(1, 3, 96, 96)
    out = model(x)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, _imagenet_logits(theirs, x))
    # That is: these two want (x - 0.5) / 0.5.
    theirs.transform_input = False
    torch.testing.assert_close(out, theirs((x - 0.5) / 0.5), rtol=1e-3, atol=1e-4)


def test_sizes_and_statistics_are_those_of_torchvisions_recipe() -> None:
    sizes = {name: input_size(name) for name in torchvision_names()}
    assert sizes["vgg16"] == sizes["vit_b_16"] == sizes["efficientnet_b0"] == 224
    assert (sizes["inception_v3"], sizes["efficientnet_b7"]) == (299, 600)
    assert sizes["vit_h_14"] == sizes["regnet_y_128gf"] == 224  # without IMAGENET1K_V1
    assert input_size("resnet18", "imagenet-s:DIR") == input_size("resnet18", "voc:DIR") == 224
    assert input_size("resnet18", "scenes") == 64
    assert input_size("resnet18", "cifar10:FILE") == input_size("resnet20", "cifar100") == 32
    wants = {name: preprocessing(name) for name in torchvision_names()}
    assert wants["vgg16"] == wants["resnet50"] == Preprocessing()
    assert (wants["efficientnet_b0"].interpolation, wants["efficientnet_b7"].crop) == ("bicubic", 1)
    assert round(wants["convnext_tiny"].size / wants["convnext_tiny"].crop) == 236
    statistics = {name: (found.mean, found.std) for name, found in wants.items()}
    assert statistics.pop("efficientnet_v2_l") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert set(statistics.values()) == {((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet"])
@pytest.mark.parametrize("data", ["imagefolder:DIR", "voc:DIR"])
def test_the_number_of_classes_comes_from_the_weights_file(name: str, data: str, tmp_path: Path) -> None:
    network = _random_network(name, num_classes=7)
    FORMATS["w.safetensors"](tmp_path / "w.safetensors", network.state_dict())  # sorted by name
    model = load_model(name, data, tmp_path / "w.safetensors", "cpu")
    assert model.classes == 7
    x = torch.rand(1, 3, 64, 64)
    if name == "googlenet":
        network.transform_input = True
    torch.testing.assert_close(model(x), _imagenet_logits(network, x))
    with pytest.raises(BadWeights, match=r"of another shape \(.* where \(1000,.*\) is expected\)"):
        load_model(name, "imagenet", tmp_path / "w.safetensors", "cpu")


def test_a_thousand_classes_are_a_number_of_classes_too(squeezenet: nn.Module, tmp_path: Path) -> None:
    file = _save_pth(tmp_path / "w.pth", squeezenet.state_dict())
    assert load_model("squeezenet1_1", "imagefolder:DIR", file, "cpu").classes == 1000
    for odd in (torch.ones(()), torch.ones(0, 512, 1, 1)):
        _save_pth(file, {**squeezenet.state_dict(), "classifier.1.bias": odd})
        with pytest.raises(BadWeights, match=r"classifier\.1\.bias .* where \(1000,\) is expected"):
            load_model("squeezenet1_1", "imagefolder:DIR", file, "cpu")


def test_data_with_other_classes_than_the_models_is_refused() -> None:
    model, data = load_model("vgg16", device="cpu"), load_data()
    check_classes(model, data)
    data.classes = data.classes[:3]
    with pytest.raises(BadWeights, match=r"tells 10 classes apart, but the data has 3; .*--weights FILE"):
        check_classes(model, data)


# --- CIFAR --------------------------------------------------------------------------------------


def test_cifar_networks_are_those_of_the_paper() -> None:
    """Table 6 of He et al. 2016: layers and millions of parameters."""
    table = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
    assert set(table) < set(CIFAR_NETWORKS)
    for name, millions in table.items():
        network = CifarResNet(int(name.removeprefix("resnet")), 10)
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert f"resnet{len(layers)}" == name
        # Two digits; 110 layers have 1.73 million.
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.031)
        assert last_parameter(network)[0] == "linear.bias"


def test_option_a_takes_every_second_pixel_and_pads_with_empty_channels() -> None:
    block = Block(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for i in range(3):
        for j in range(3):
            expected[:, 2:6, i, j] = x[:, :, 2 * i, 2 * j]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "data"),
    [("resnet20", "cifar10:FILE"), ("resnet32", "cifar100:FILE"), ("resnet18", "cifar10:FILE")],
)
def test_cifar_networks_load_strictly(name: str, data: str, tmp_path: Path) -> None:
    classes, others = (10, 100) if data.startswith("cifar10:") else (100, 10)
    assert name in networks(data)
    own = name in CIFAR_NETWORKS
    network = CifarResNet(int(name[6:]), classes) if own else _random_network(name, num_classes=classes)
    file = _save_pth(tmp_path / "w.pth", network.eval().state_dict())
    model = load_model(name, data, file, "cpu")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), _imagenet_logits(network, x))
    assert model(x).shape == (2, model.classes) == (2, classes)
    with pytest.raises(BadWeights, match=rf"where \({others},\) is expected"):
        load_model(name, f"cifar{others}", file, "cpu")


def _published(file: str, split: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """State of a published network for CIFAR-10, and exact pixels with labels; skips where they are not there."""
    weights, pixels = ASSETS / "weights/cifar10" / file, ASSETS / "cifar10/lossless_test1000_train4000.npz"
    if not (weights.is_file() and pixels.is_file()):
        pytest.skip("needs published weights and images, which are not beside this checkout (shared/assets)")
    with np.load(pixels) as arrays:
        images, labels = (torch.from_numpy(arrays[f"{split}_{what}"]) for what in ("images", "labels"))
    return read_state(weights), images.permute(0, 3, 1, 2).float() / 255, labels


@pytest.mark.parametrize(
    ("file", "accuracy"), [("resnet20-12fca82f.pth", 0.915), ("resnet56-4bfd9763.pth", 0.926)]
)
def test_published_cifar_networks_have_their_accuracy(file: str, accuracy: float) -> None:
    _, x, labels = _published(file, "test")
    model = load_model(file.partition("-")[0], "cifar10", ASSETS / "weights/cifar10" / file, "cpu")
    hits = torch.cat([model(part).argmax(1) for part in x.split(250)]) == labels
    assert float(hits.float().mean()) == pytest.approx(accuracy, abs=0.002)


@pytest.mark.parametrize("file", ["resnet20-12fca82f.pth", "resnet56-4bfd9763.pth"])
def test_the_statistics_for_cifar_are_those_of_training(file: str) -> None:
    """The first batch norm remembers the mean of its input; only images normalised as then have it again."""
    state, x, _ = _published(file, "train")
    x = nn.functional.pad(x, (4, 4, 4, 4))  # trained on crops at random places, black outside
    rng = torch.Generator().manual_seed(0)
    places = [torch.randint(9, (2,), generator=rng).tolist() for _ in range(100)]
    crops = [part[:, :, i : i + 32, j : j + 32] for part, (i, j) in zip(x.chunk(100), places, strict=True)]

    def deviation(mean: Colour, std: Colour) -> float:
        y = nn.functional.conv2d(Normalise(mean, std)(torch.cat(crops)), state["conv1.weight"], padding=1)
        off = (y.mean((0, 2, 3)) - state["bn1.running_mean"]) / state["bn1.running_var"].sqrt()
        return float(off.abs().max())

    cifars_own = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    assert deviation(CIFAR_PREPROCESSING.mean, CIFAR_PREPROCESSING.std) < 0.06 < 0.15 < deviation(*cifars_own)


# --- names and downloads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alexnet",), r"'alexnet' for scenes.*vgg16, vgg16_8x8, resnet18, resnet50"),
        (("vgg17", "imagenet"), r"'vgg17' for imagenet; .*vgg16"),
        (("resnet21", "cifar10:FILE", "w.pth"), r"'resnet21' for cifar10; .*resnet20"),
        (("resnet20", "imagefolder:DIR", "w.pth"), r"'resnet20' for imagefolder; .*resnet18"),
        (("vgg16", "cifar"), r"'cifar'.*scenes, imagenet\[:DIR\], .*voc:DIR.*cifar10:PATH"),
        (("vgg16", "scenes:DIR"), r"'scenes:DIR'.*choose scenes, "),
        (("vgg16", "imagenetDIR"), r"'imagenetDIR'.*choose scenes, "),
        (("resnet18", "imagefolder:DIR"), r"no weights of resnet18 for imagefolder here; .*--weights FILE"),
        (("resnet18", "voc:DIR"), r"no weights of resnet18 for voc here; .*--weights FILE"),
        (("resnet20", "cifar10:FILE"), r"no weights of resnet20 for cifar10 here; .*--weights FILE"),
        (("vgg16", "scenes", None, "warp"), r"'warp'"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(arguments: tuple, message: str) -> None:
    with pytest.raises(SrdLabError, match=message) as caught:
        load_model(*arguments)
    assert "\n" not in str(caught.value)


def test_names_are_known_for_each_data() -> None:
    named = [spec.strip(",").split("[")[0].split(":")[0] for spec in SPECS.replace(" or", "").split()]
    assert set(FAMILIES) == {*named[:-1], "own"}
    assert named[-1] == "package.module"
    assert networks() == SCENES_NETWORKS
    assert networks("imagenet") == networks("imagenet-s:DIR") == networks("voc") == torchvision_names()
    assert networks("cifar100:FILE") == (*CIFAR_NETWORKS, *torchvision_names())
    for name in ("vgg17", "resnet20"):
        with pytest.raises(BadValue, match=f"no network '{name}' for imagenet"):
            input_size(name)


def test_without_a_network_the_error_names_file_folder_and_way_out(hub: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        load_model("squeezenet1_1", "imagenet", device="cpu")
    assert str(caught.value) == (
        f"torchvision's squeezenet1_1-b8a52dc0.pth is not in {hub} and cannot be downloaded "
        "(<urlopen error no route to host>); put the file there, or give it with --weights FILE"
    )


@pytest.mark.parametrize("data", ["imagenet:DIR", "imagenet-s:DIR"])
def test_torchvisions_cache_is_read(data: str, hub: Path, squeezenet: nn.Module) -> None:
    _save_pth(hub / "squeezenet1_1-b8a52dc0.pth", squeezenet.state_dict())
    model = load_model("squeezenet1_1", data, device="cpu")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


def test_torchvisions_cache_is_filled(
    hub: Path, squeezenet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.rmdir()

    def download(url: str, file: str, hash_prefix: str, progress: bool) -> None:
        assert url == "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
        assert (file, hash_prefix) == (str(hub / "squeezenet1_1-b8a52dc0.pth"), "b8a52dc0")
        torch.save(squeezenet.state_dict(), file)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    model = load_model("squeezenet1_1", "imagenet", device="cpu")
    assert torch.equal(last_parameter(model.network)[1], last_parameter(squeezenet)[1])


def test_what_lies_in_the_cache_is_not_trusted_either(hub: Path, tmp_path: Path) -> None:
    _save_pth(hub / "squeezenet1_1-b8a52dc0.pth", Trap(tmp_path / "sprung"))
    with pytest.raises(BadWeights, match=r"squeezenet1_1-b8a52dc0\.pth cannot be read as a state dict"):
        load_model("squeezenet1_1", "imagenet", device="cpu")
    assert not (tmp_path / "sprung").exists()


def test_networks_without_v1_weights_say_so() -> None:
    with pytest.raises(BadWeights, match=r"IMAGENET1K_V1.*--weights FILE"):
        load_model("vit_h_14", "imagenet", device="cpu")


# --- VGGs with another head ---------------------------------------------------------------------

NARROW = [4, "M", 8, "M", 8, "M", 16, "M", 512, "M"]  # VGG's layout, in a hundredth of the time


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """torchvision's vgg16 with few channels before the last map; the state of its convolutions, not negative at the
    end: a map that is 0 everywhere would prove little."""
    monkeypatch.setitem(torchvision.models.vgg.cfgs, "D", NARROW)
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(NARROW)
    state = {f"features.{key}": value.detach() for key, value in features.state_dict().items()}
    return {key: value + 0.02 if key.endswith("weight") else value.abs() for key, value in state.items()}


def _head(widths: list[int]) -> dict[str, Tensor]:
    """A classifier with these widths, inputs first; torchvision's numbering."""
    torch.manual_seed(1)
    return {
        f"classifier.{3 * k}.{key}": value.detach()
        for k, (inputs, outputs) in enumerate(pairwise(widths))
        for key, value in nn.Linear(inputs, outputs).state_dict().items()
    }


def _head_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same network literally: convolutions, averages, matrices."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    z = (x - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for place in range(0, 15, 3):
        weight, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
        z = nn.functional.max_pool2d(nn.functional.conv2d(z, weight, bias, padding=1).clamp(min=0), 2)
    sides = {512: 1, 25088: 7}[state["classifier.0.weight"].shape[1]]
    rows = [z[:, :, 7 // sides * i : 7 // sides * (i + 1)] for i in range(sides)]
    cells = [
        [row[..., 7 // sides * j : 7 // sides * (j + 1)].mean((2, 3)) for j in range(sides)] for row in rows
    ]
    z = torch.stack([torch.stack(row, 2) for row in cells], 2).flatten(1)
    places = sorted(int(key.split(".")[1]) for key in state if re.match(r"classifier\..*weight", key))
    for place in places:
        z = z @ state[f"classifier.{place}.weight"].T + state[f"classifier.{place}.bias"]
        z = z if place == places[-1] else z.clamp(min=0)
    return z


@pytest.mark.parametrize(
    ("inputs", "hidden"),
    [
        (512, []),
        (512, [6]),
        (512, [6, 5, 4]),
        (512, [4096, 4096]),
        (25088, []),
        (25088, [6]),
        (25088, [6, 5]),
    ],
)
def test_the_head_of_a_vgg_is_seen_in_the_shapes(
    inputs: int, hidden: list[int], narrow: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {**narrow, **_head([inputs, *hidden, 1000])}
    model = load_model("vgg16", "imagenet", _save_npz(tmp_path / "w.npz", state), "cpu")
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(model(x), _head_logits(state, x), rtol=1e-4, atol=1e-5)
    assert model.classes == 1000
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*hidden, 1000]


@pytest.mark.parametrize("name", ["vgg11", "vgg16", "vgg19_bn"])
def test_torchvisions_own_files_make_torchvisions_network(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
        own = FAMILIES["imagenet"].network(name, theirs.state_dict())
        seven = torchvision.models.get_model(name, num_classes=7)
        tuned = FAMILIES["imagefolder"].network(name, seven.state_dict())
    assert repr(own) == repr(theirs)
    assert repr(tuned) == repr(seven)


def test_only_a_vgg_has_such_a_head(narrow: dict[str, Tensor]) -> None:
    state = {**narrow, **_head([512, 1000])}
    assert vgg_head("vgg16", state) == Head(1, (), 1000)
    assert vgg_head("squeezenet1_1", state) is None
    assert vgg_head("vgg16", _head([512, 1000])) is None  # all else that fits badly is answered as before


def test_a_head_has_as_many_classes_as_its_data(narrow: dict[str, Tensor], tmp_path: Path) -> None:
    file = _save_npz(tmp_path / "w.npz", {**narrow, **_head([512, 6, 7])})
    assert load_model("vgg16", "imagefolder:DIR", file, "cpu").classes == 7
    with pytest.raises(BadWeights, match=r"classifier\.3\.bias \(7,\) where \(1000,\) is expected"):
        load_model("vgg16", "imagenet", file, "cpu")


def _without(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(start)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _without(s, "classifier."),
            r"weights of vgg16 have no classifier; .*scripts/train_head\.py",
        ),
        (lambda s: _without(s, "features.6."), r"does not fit: 2 missing \(features\.6\.weight, "),
        (lambda s: _without(s, "classifier.3.bias"), r"does not fit: 1 missing \(classifier\.3\.bias\)"),
        (lambda s: {**s, "more.weight": torch.ones(1)}, r"does not fit: 1 unexpected \(more\.weight\)"),
        (
            lambda s: {**_without(s, "classifier.0"), **_head([100, 6])},
            r"\(0: \(6, 100\), 3: .* 512 or 25088 inputs",
        ),
        (
            lambda s: {**s, "classifier.3.weight": torch.ones(1000, 5)},
            r"classifier\.3\.weight \(1000, 5\) where",
        ),
        (
            lambda s: {**s, "classifier.3.weight": torch.ones(6)},
            r"no known shape \(0: \(6, 512\), 3: \(6,\)\)",
        ),
        (lambda s: {**s, "classifier.3.weight": torch.ones(0, 6)}, r"no known shape .*3: \(0, 6\)"),
        (
            lambda s: {**s, "classifier.5.weight": torch.ones(6, 6)},
            r"5: \(6, 6\)\); expected linear layers 0, 3, 6",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_a_line(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    narrow: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    file = _save_npz(tmp_path / "w.npz", change({**narrow, **_head([512, 6, 1000])}))
    with pytest.raises(BadWeights, match=message) as caught:
        load_model("vgg16", "imagenet", file, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("widths", [[512, 1000], [512, 6, 1000], [25088, 6, 1000]])
def test_methods_follow_a_vgg_with_another_head(
    widths: list[int], narrow: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {**narrow, **_head(widths)}
    state[f"classifier.{3 * (len(widths) - 2)}.bias"] += 1  # a positive logit
    model = load_model("vgg16", "imagenet", _save_npz(tmp_path / "w.npz", state), "cpu").double()
    x = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    conserved = SRD(start="ones").conserved(model, x)
    torch.testing.assert_close(conserved, torch.ones_like(conserved), rtol=1e-3, atol=0)
    contrastive = SRD(start="contrastive").conserved(model, x)
    torch.testing.assert_close(contrastive, torch.ones_like(conserved), rtol=1e-2, atol=0)
    map_, logits = LRPZPlus().explain_with_logits(model, x)
    torch.testing.assert_close(map_.sum((1, 2)), logits.amax(1), rtol=1e-3, atol=0)
    # Grad-CAM literally, on the map that the head is given.
    features = model.network.get_submodule("features")(model.normalise(x)).requires_grad_()
    score = model.network.get_submodule("classifier")(
        model.network.get_submodule("avgpool")(features).flatten(1)
    ).amax(1)
    slope = torch.autograd.grad(score.sum(), features)[0].mean((2, 3), keepdim=True)
    expected = (slope * features).sum(1).clamp(min=0)
    got = GradCAM().explain(model, x)
    assert got.shape == (2, 7, 7)
    assert float(expected.detach().sum()) > 0
    torch.testing.assert_close(got, expected.detach())
