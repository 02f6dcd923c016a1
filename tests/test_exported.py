"""Exported programs: every method gives the map of the network that was exported, to the last digit; else one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_networks import Small, command
from torch import Tensor, nn

from srd_lab.catalogue import METHODS
from srd_lab.errors import BadValue, BadWeights, SrdLabError
from srd_lab.models import Classifier, load_model, preprocessing, weights_digest
from srd_lab.models.exported import function_of
from srd_lab.parts import code_in, code_of
from srd_lab.registry import make_explainer

SIDE = 32


class Residual(nn.Module):
    """Batch norms with statistics, a shared ReLU in place, a concatenation, squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(2)
        )
        self.relu, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Dropout()
        self.squeeze, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.bias.data.uniform_(-0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.relu(self.two(self.relu(self.one(x))) + x)
        y = torch.cat([x, y], 1)
        y = y * self.squeeze(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(self.relu(y), 1), 1)))


class Tokens(nn.Module):
    """Patches, a class token, attention, layer and group norm, slices and indices."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.group, self.norm, self.qkv = nn.GroupNorm(4, 16), nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp, self.fc = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 10)
        self.order: Tensor
        self.register_buffer("order", torch.arange(16).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.patches(x)).flatten(2).transpose(1, 2)[:, self.order]
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 17, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 17, 16)
        x = x + self.mlp(self.norm(x))
        return self.fc(x[:, 1:].mean(1))


NETWORKS: dict[str, Any] = {"small": lambda: Small(10), "residual": Residual, "tokens": Tokens}


def export(network: nn.Module, file: Path, *given: Tensor, batch: Any = None) -> str:
    given = given or (torch.zeros(2, 3, SIDE, SIDE),)
    shapes = ({0: batch or torch.export.Dim("n")},) + (None,) * (len(given) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on deprecated parts of it
        torch.export.save(torch.export.export(network, given, dynamic_shapes=shapes), file)
    return str(file)


@pytest.mark.filterwarnings("ignore::srd_lab.errors.SrdLabWarning")  # of layers that small networks lack
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_gives_the_map_of_the_network_itself(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval().requires_grad_(False)
    exported = load_model(export(network, tmp_path / "net.pt2"), device="cpu")
    own, x = (
        Classifier(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval(),
        torch.rand(3, 3, SIDE, SIDE),
    )
    assert torch.equal(own(x), exported(x))
    assert torch.equal(own(x[:1]), exported(x[:1]))
    answers = {"map": 0, "refusal": 0}
    for method in METHODS:
        found: list[Any] = []
        for model in (own, exported):
            try:
                found.append(make_explainer(method).explain(model, x, 1))
            except SrdLabError as error:
                found.append(str(error))
        kind = "map" if isinstance(found[0], Tensor) else "refusal"
        answers[kind] += 1
        assert torch.equal(*found) if kind == "map" else found[0] == found[1], (method, found)
    assert answers["map"] >= 12


def test_names_of_modules_are_the_networks_own(tmp_path: Path) -> None:
    model = load_model(export(Residual().eval(), tmp_path / "net.pt2"), device="cpu")
    assert {"stem.0", "two.1", "fc"} <= {name for name, _ in model.network.named_modules()}
    assert make_explainer("gradcam", level="stem.2").explain(model, torch.rand(1, 3, SIDE, SIDE)).shape == (
        1,
        16,
        16,
    )


def test_it_is_weights_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = Small(10).eval()
    name = export(network, Path("net.pt2"))
    assert code_in(f"{name},timm:resnet18") == [name]
    assert list(code_of(name)) == [name]
    assert preprocessing(name).size == SIDE
    model = load_model(name, device="cpu")
    assert model.weights_sha256 == weights_digest(name)
    torch.save({key: value + 1 for key, value in network.state_dict().items()}, "w.pth")
    other = load_model(name, weights="w.pth", device="cpu")
    assert torch.equal(other.network.fc.bias, network.fc.bias + 1)
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)}
    torch.export.save(
        torch.export.export(network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=(sizes,)), "any.pt2"
    )
    assert preprocessing("any.pt2").size == 224


class Two(Small):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x if y is None else x + y)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda file: export(Small().eval(), file, batch=torch.export.Dim.STATIC),
            r"batches of 2 images alone; export it",
        ),
        (
            lambda file: export(Small().eval(), file, batch=torch.export.Dim("n", max=8)),
            r"batches of 0 to 8 images alone",
        ),
        (
            lambda file: export(Residual().train(), file),
            r"was exported in training mode; call eval\(\) before the export",
        ),
        (
            lambda file: export(Two().eval(), file, torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)),
            r"takes inputs of shape .*; expected one, images \(N, 3, H, W\)",
        ),
        (
            lambda file: export(Small().eval(), file, torch.zeros(2, 3, 16, 8)),
            r"wants images of 16 x 8 pixels; squares alone",
        ),
        (
            lambda file: file.write_bytes(b"no program"),
            r"cannot be loaded as an exported program: .*write it by torch.export",
        ),
        (lambda file: torch.save({}, file), r"cannot be loaded as an exported program"),
        (lambda file: None, r"there is no file .*net\.pt2; expected what torch\.export\.save has written"),
    ],
    ids=["batch", "few", "training", "two", "oblong", "text", "state", "none"],
)
def test_what_is_no_network_of_images_is_one_line(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "net.pt2")
    with pytest.raises((BadValue, BadWeights), match=said) as error:
        load_model(str(tmp_path / "net.pt2"), device="cpu")
    assert str(error.value).isprintable()


def test_a_program_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(
        BadValue, match=r"net\.pt2\?width=3: an exported program takes no options; leave the \? out"
    ):
        load_model(f"{tmp_path}/net.pt2?width=3")


def test_operators_without_a_function_stay_as_they_are() -> None:
    assert function_of(torch.ops.aten.relu_.default) is torch.relu_
    assert function_of(torch.ops.aten._to_copy.default) is torch.ops.aten._to_copy.default
    assert function_of(len) is len


def test_explained_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(Residual().eval(), Path("net.pt2"))
    Image.new("RGB", (50, 40), (200, 30, 90)).save("photo.png")
    result = command("explain", "photo.png", "--model", "net.pt2", "--method", "srd", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert Path("explanations/photo/srd.png").is_file()
