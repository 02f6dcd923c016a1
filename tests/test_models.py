"""Models: bundled networks classify, weights files load strictly, all errors say what to do."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from click import ClickException
from torch import Tensor, nn

from srd_lab import models
from srd_lab.data import batch, load_data
from srd_lab.models import SCENES_NETWORKS, WEIGHTS, Normalise, cards, load_model, read_state, scenes_network
from srd_lab.types import SrdLabError


def _random_network(name: str) -> nn.Module:
    """torchvision's ``name`` with random weights and batch-norm statistics that are no defaults."""
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, weights=None, **options).eval()
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


def _imagenet_logits(network: nn.Module, x: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return network((x - mean) / std)


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


def test_pth_gives_torchvisions_network_on_pixels(squeezenet: nn.Module, tmp_path: Path) -> None:
    torch.save(squeezenet.state_dict(), tmp_path / "w.pth")
    model = load_model("squeezenet1_1", "imagenet:some/folder", tmp_path / "w.pth", "cpu")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


def test_wrapped_and_prefixed_states_are_unwrapped(squeezenet: nn.Module, tmp_path: Path) -> None:
    state = OrderedDict((f"module.{key}", value) for key, value in squeezenet.state_dict().items())
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    model = load_model("squeezenet1_1", "imagenet", str(tmp_path / "w.pt"), "cpu")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


def test_npz_in_16_bits_becomes_float32_and_keeps_integers(resnet18: nn.Module, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v + 7 for k, v in resnet18.state_dict().items()}
    model = load_model("resnet18", "imagenet", _save_npz(tmp_path / "w.npz", state), "cpu")
    loaded = model.network.state_dict()
    assert loaded["conv1.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv1.weight"], state["conv1.weight"].float())
    assert loaded["bn1.num_batches_tracked"] == 7
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


def test_auxiliary_heads_in_the_file_are_left_out(tmp_path: Path) -> None:
    network = _random_network("googlenet")
    network.get_submodule("aux1")  # it is there
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = load_model("googlenet", "imagenet", tmp_path / "w.pth", "cpu")
    x = torch.rand(1, 3, 64, 64)
    out = model(x)
    assert isinstance(out, Tensor)
    # torchvision's weights of this network want (x - 0.5) / 0.5.
    torch.testing.assert_close(out, network((x - 0.5) / 0.5), rtol=1e-3, atol=1e-4)


def test_densenet_keys_of_old_files_are_renamed() -> None:
    old = {
        "features.denseblock1.denselayer2.norm.1.weight": torch.ones(1),
        "features.denseblock1.denselayer2.conv.2.weight": torch.ones(1),
        "features.norm0.weight": torch.ones(1),
    }
    assert list(models._plain(old)) == [
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
    with pytest.raises(SrdLabError) as caught:
        load_model("squeezenet1_1", "imagenet", tmp_path / "w.pth", "cpu")
    text = str(caught.value)
    assert "w.pth" in text
    assert "6 missing (features.3.squeeze.weight, " in text
    assert ", ...)" in text
    assert "1 unexpected (extra.weight)" in text
    assert "1 of another shape (classifier.1.bias (10,) where (1000,) is expected)" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.npz"])
def test_files_that_are_no_state_dict(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(SrdLabError, match=rf"{name} cannot be read as a state dict"):
        read_state(tmp_path / name)
    with pytest.raises(SrdLabError, match=r"no weights file .*absent"):
        read_state(tmp_path / f"absent{Path(name).suffix}")


def test_states_that_hold_no_tensors(tmp_path: Path) -> None:
    for value in ({"a": 1}, {}, [torch.ones(1)]):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(SrdLabError, match=r"w\.pth cannot be read as a state dict"):
            read_state(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", a=np.array([None, 1], dtype=object))  # would need pickle
    with pytest.raises(SrdLabError, match=r"w\.npz cannot be read as a state dict"):
        read_state(tmp_path / "w.npz")
    with pytest.raises(SrdLabError, match=r"\.npz, \.pth, \.pt"):
        read_state(tmp_path / "w.safetensors")


# --- names and downloads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alexnet",), r"'alexnet' for scenes.*vgg16, resnet18, resnet50"),
        (("vgg17", "imagenet"), r"'vgg17'.*vgg16"),
        (("vgg16", "cifar"), r"'cifar'.*scenes or imagenet:DIR"),
        (("vgg16", "scenes", None, "warp"), r"'warp'"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(arguments: tuple, message: str) -> None:
    with pytest.raises(SrdLabError, match=message):
        load_model(*arguments)


def test_without_a_network_the_error_names_file_and_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SrdLabError, match=r"squeezenet1_1-[0-9a-f]+\.pth .*no route to host.*--weights FILE"):
        load_model("squeezenet1_1", "imagenet", device="cpu")


def test_torchvisions_own_weights_go_the_same_way(
    squeezenet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = squeezenet.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    model = load_model("squeezenet1_1", "imagenet", device="cpu")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), _imagenet_logits(squeezenet, x))


def test_networks_without_v1_weights_say_so() -> None:
    with pytest.raises(SrdLabError, match=r"IMAGENET1K_V1.*--weights FILE"):
        models._torchvision_state("vit_h_14")
