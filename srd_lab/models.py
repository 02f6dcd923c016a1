"""Classifiers on pixels: a normalisation layer and a torchvision-style network, frozen, in eval mode.

``load_model("vgg16")`` is one of the three small networks that come with the package, trained on ``scenes``;
``load_model("vgg16", "imagenet")`` is torchvision's, from torchvision's own cache or from ``--weights FILE``.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from srd_lab.runtime import pick_device
from srd_lab.types import SrdLabError

WEIGHTS = Path(__file__).parent / "weights"
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENES_STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

Colour = tuple[float, float, float]


class Normalise(nn.Module):
    """(x - mean) / std per channel, for pixels x (N, 3, H, W) in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Pixels (N, 3, H, W) in [0, 1] to logits (N, classes): ``normalise``, then ``network``."""

    def __init__(self, network: nn.Module, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalise(x))


# --- the small networks for scenes ------------------------------------------------------------------------


class SmallVGG(nn.Module):
    """VGG16 at an eighth of its width, for 64 x 64 pixels: 13 convolutions of 3x3, five pools, three layers.

    ``batch_norm`` puts one after each convolution: only for training, the weights are saved without.
    """

    LAYERS = (8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M")

    def __init__(self, classes: int = 10, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(list(self.LAYERS), batch_norm=batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            *(nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            *(nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            nn.Linear(128, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class SmallResNet(nn.Module):
    """torchvision's ResNet (7x7 stem, pool, four groups of its blocks) at a quarter of its width."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int], classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        expansion = block.expansion
        self.layer1 = _group(block, 16, 16, depths[0], stride=1)
        self.layer2 = _group(block, 16 * expansion, 32, depths[1], stride=2)
        self.layer3 = _group(block, 32 * expansion, 64, depths[2], stride=2)
        self.layer4 = _group(block, 64 * expansion, 128, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128 * expansion, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _group(
    block: type[BasicBlock] | type[Bottleneck], before: int, width: int, depth: int, *, stride: int
) -> nn.Sequential:
    """``depth`` blocks; the first one changes resolution and channels, with a projection where it must."""
    after = width * block.expansion
    shortcut = None
    if stride != 1 or before != after:
        shortcut = nn.Sequential(
            nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
        )
    first = block(before, width, stride, shortcut)
    return nn.Sequential(first, *(block(after, width) for _ in range(depth - 1)))


SCENES_NETWORKS = ("vgg16", "resnet18", "resnet50")


def scenes_network(name: str, *, batch_norm: bool = False) -> nn.Module:
    """The untrained small network ``name``; ``batch_norm`` concerns vgg16 in training alone."""
    if name == "vgg16":
        return SmallVGG(batch_norm=batch_norm)
    if name == "resnet18":
        return SmallResNet(BasicBlock, (2, 2, 2, 2))
    if name == "resnet50":
        return SmallResNet(Bottleneck, (3, 4, 6, 3))
    raise SrdLabError(
        f"there is no network {name!r} for scenes; choose one of {', '.join(SCENES_NETWORKS)}, "
        "or data imagenet:DIR for torchvision's networks"
    )


# --- torchvision's networks for ImageNet ------------------------------------------------------------------


def _imagenet_network(name: str) -> nn.Module:
    """torchvision's network, untrained, without auxiliary heads, for inputs normalised as all the others'."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = ", ".join(get_close_matches(name, names, n=5, cutoff=0.4) or names[:5])
        raise SrdLabError(
            f"torchvision has no classifier {name!r}; near to it are {near} "
            f"(torchvision.models.list_models() tells all {len(names)})"
        )
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False, "transform_input": True}
    return torchvision.models.get_model(name, weights=None, **options)


def _torchvision_state(name: str) -> dict[str, Any]:
    """torchvision's IMAGENET1K_V1 weights, from its cache or its server."""
    entries = torchvision.models.get_model_weights(name)
    if "IMAGENET1K_V1" not in entries.__members__:
        raise SrdLabError(
            f"torchvision has no IMAGENET1K_V1 weights for {name}; give your own with --weights FILE"
        )
    entry = entries["IMAGENET1K_V1"]
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        file = entry.url.rsplit("/", 1)[-1]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrdLabError(
            f"torchvision's {file} is not in its cache and cannot be downloaded ({reason}); "
            "bring the file from elsewhere and give it with --weights FILE"
        ) from None


# --- weights files ----------------------------------------------------------------------------------------


def _read_npz(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _read_pth(file: Path) -> dict[str, Any]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}")
    return dict(state)


def read_state(file: str | Path) -> dict[str, Any]:
    """The state dict in a .pth, .pt or .npz file, as it stands there.

    Raises SrdLabError where the file is missing, of another kind, or does not hold a state dict of tensors.
    """
    file = Path(file).expanduser()
    readers = {".npz": _read_npz, ".pth": _read_pth, ".pt": _read_pth}
    if file.suffix not in readers:
        raise SrdLabError(f"{file} is no weights file that is known here; expected {', '.join(readers)}")
    if not file.is_file():
        raise SrdLabError(f"there is no weights file {file}; give the path of a {file.suffix} state dict")
    try:
        state = readers[file.suffix](file)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("not all that it holds are tensors" if state else "it is empty")
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrdLabError(
            f"{file} cannot be read as a state dict ({reason}); save model.state_dict() there"
        ) from None
    return state


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in float32, its keys as torchvision's modules have them today.

    Without the prefix of DataParallel and the auxiliary heads (nothing of them shows in eval mode), and with
    the dotless layer names that DenseNet has had since PyTorch 0.4.1: the files on torchvision's server are
    older.
    """
    plain = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if re.match(r"(aux\d|AuxLogits)\.", key):
            continue
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)
        plain[key] = value.float() if value.is_floating_point() else value
    return plain


def _some(what: str, keys: list[str], shown: int = 3) -> str:
    more = ", ..." if len(keys) > shown else ""
    return f"{len(keys)} {what} ({', '.join(keys[:shown])}{more})"


def _complaints(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``found`` from being loaded, in words; files older than it lack ``num_batches_tracked``."""
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} {tuple(found[key].shape)} where {tuple(value.shape)} is expected"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [_some(what, keys) for what, keys in kinds.items() if keys]


def _fill(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads ``state`` strictly; SrdLabError names ``source`` and what does not fit."""
    own, state = network.state_dict(), OrderedDict(_plain(state))
    complaints = _complaints(own, state)
    if complaints:
        raise SrdLabError(
            f"{source} does not fit: {', '.join(complaints)}; give the weights of this very architecture"
        )
    # A module that changed between versions (MNASNet) reads its own here, and would else rebuild itself.
    state._metadata = own._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict=False)


# --- the way in -------------------------------------------------------------------------------------------


def _is_imagenet(data: str) -> bool:
    if data == "scenes":
        return False
    if data == "imagenet" or data.startswith("imagenet:"):
        return True
    raise SrdLabError(f"there are no models for data {data!r}; choose scenes or imagenet:DIR")


def load_model(
    name: str, data: str = "scenes", weights: str | Path | None = None, device: str | None = None
) -> Classifier:
    """A frozen float32 classifier of pixels (N, 3, H, W) in [0, 1], in eval mode, on ``device``.

    name : for scenes, one of ``SCENES_NETWORKS`` (ten classes, 64 x 64 pixels); for ImageNet, any classifier
        that torchvision lists.
    data : ``scenes``, or ``imagenet`` or ``imagenet:DIR``, which are the same here.
    weights : a .pth, .pt or .npz state dict of that architecture; None is the file in this package for
        scenes, torchvision's IMAGENET1K_V1 for ImageNet.
    device : None or "auto" takes an accelerator where there is one.

    Raises SrdLabError for a name, data or device that is not there, and for weights that cannot be had or do
    not fit.
    """
    imagenet = _is_imagenet(data)
    place = pick_device(device)
    with torch.random.fork_rng(
        devices=[]
    ):  # initial weights are drawn and thrown away: not from the caller's stream
        network = _imagenet_network(name) if imagenet else scenes_network(name)
    if weights is None and imagenet:
        _fill(network, _torchvision_state(name), f"torchvision's file for {name}")
    else:
        file = WEIGHTS / f"{name}_scenes.npz" if weights is None else weights
        _fill(network, read_state(file), f"{file} for {name}")
    model = Classifier(network, *(IMAGENET_STATISTICS if imagenet else SCENES_STATISTICS))
    return model.float().eval().requires_grad_(False).to(place)


def cards() -> list[dict[str, Any]]:
    """What is known of each network in this package: file, size, data, accuracies, and how it was trained."""
    return json.loads((WEIGHTS / "cards.json").read_text(encoding="utf-8"))
