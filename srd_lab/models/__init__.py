"""Classifiers on pixels: a normalisation layer and a torchvision-style network, frozen, in eval mode.

``load_model("vgg16")`` is one of the small networks that come with the package, trained on ``scenes``;
``load_model("vgg16", "imagenet")`` is torchvision's, from torchvision's own cache or from ``--weights FILE``;
for all other data the weights are the user's own. One file per family of networks; networks from elsewhere
(``timm:NAME``, ``package.module:factory``) are in :mod:`srd_lab.models.own`.

It imports the modules at the top of ``srd_lab`` and nothing else of this project. Begin with :func:`load_model` and
:mod:`srd_lab.models.classifier`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch

from srd_lab.catalogue import cards
from srd_lab.errors import BadValue, BadWeights
from srd_lab.models.cifar import Cifar
from srd_lab.models.classifier import Classifier, Family, Normalise, check_classes
from srd_lab.models.files import fill, read_state
from srd_lab.models.imagenet import AnyClasses, FineTuned, ImageNet
from srd_lab.models.own import Own, own_network, state_digest
from srd_lab.models.scenes import SCENES_NETWORKS, SCENES_PREPROCESSING, WEIGHTS, Scenes, scenes_network
from srd_lab.parts import FOLDERS, is_own, is_place
from srd_lab.runtime import pick_device
from srd_lab.types import Preprocessing

__all__ = [
    "SCENES_NETWORKS",
    "SCENES_PREPROCESSING",
    "WEIGHTS",
    "Classifier",
    "Normalise",
    "cards",
    "check_classes",
    "input_size",
    "load_model",
    "make_own",
    "networks",
    "preprocessing",
    "read_state",
    "scenes_network",
    "weights_digest",
    "weights_file",
]

FAMILIES: dict[str, Family] = {
    "scenes": Scenes(),
    **{source: AnyClasses() for source in FOLDERS},  # but for those that are named here
    "imagenet": ImageNet(),
    "imagenet-s": ImageNet(),
    "imagefolder": FineTuned(),
    "voc": FineTuned(),
    "cifar10": Cifar(10),
    "cifar100": Cifar(100),
    "own": AnyClasses(),
}
SIDES = {"scenes": 64, "cifar10": 32, "cifar100": 32}  # of data whose images have one size
_PLACES = {source: f":{place}" for source, (place, _) in FOLDERS.items()} | {"imagenet": "[:DIR]"}
SPECS = (
    f"scenes, {', '.join(f'{source}{place}' for source, place in _PLACES.items())}, cifar10:PATH, cifar100:PATH or "
    "package.module:factory"
)


def load_model(
    name: str,
    data: str = "scenes",
    weights: str | Path | None = None,
    device: str | None = None,
    preprocessing: Preprocessing | None = None,
    made: Own | None = None,
) -> Classifier:
    """A frozen float32 classifier of pixels (N, 3, H, W) in [0, 1], in eval mode, on ``device``.

    name : one of ``networks(data)``, or one from elsewhere: ``timm:NAME``, ``hf:NAME_OR_DIR``, ``hub:REPO:NAME``,
        ``FILE.pt2``, ``package.module:factory``, ``path/file.py:factory``; see :mod:`srd_lab.models.own`.
    data : what the network is for; nothing behind a colon matters here, and nothing at all for networks from elsewhere.
        ``scenes``: ten classes, 64 x 64 pixels.
        ``imagenet``, ``imagenet-s``: torchvision's networks of 1,000 classes.
        ``imagefolder``, ``voc``: the same with as many classes as the last layer in the weights file has.
        ``cifar10``, ``cifar100``: 32 x 32 pixels; the residual networks of He et al. 2016 (resnet20 .. resnet110), and
        torchvision's as they are: its resnet18 has the 7x7 stem that it has for ImageNet.
    weights : a .pth, .pt, .safetensors or .npz state dict of that architecture; None is the file in this package for
        scenes, torchvision's IMAGENET1K_V1 for ImageNet, what the factory gives for networks from elsewhere, and an error
        for all other data.
    device : None or "auto" takes an accelerator where there is one.
    preprocessing : of which mean and std count; None = :func:`preprocessing` of the network.
    made : what :func:`make_own` has made of the name, if it did; its network is used, not copied.

    Raises BadValue for a name or data that is not there, and for a factory that fails; BadWeights for weights that are not
    there or do not fit; Unavailable for a package, a device or a download that cannot be had.

    Example
    -------
    >>> load_model("resnet18", device="cpu")(x).shape
    torch.Size([2, 10])
    """
    if is_own(name):
        place, own = pick_device(device), made or make_own(name, with_weights=weights is None)
        if weights is not None:
            fill(own.network, read_state(weights), f"{weights} for {name}")
        model = own.classifier(preprocessing)
        model.weights_sha256 = state_digest(own.network) if weights is None else ""
        return _finished(model, place)
    _, family = _family(name, data)
    place = pick_device(device)
    file = weights_file(name, data, weights)
    state = read_state(file)
    # Initial weights are drawn and thrown away: not from the caller's stream.
    with torch.random.fork_rng(devices=[]):
        network = family.network(name, state)
    fill(network, state, f"{file} for {name}")
    wants = preprocessing or family.preprocessing(name)
    return _finished(Classifier(network, wants.mean, wants.std), place)


def make_own(name: str, *, with_weights: bool = True) -> Own:
    """The network from elsewhere of that name; :func:`preprocessing` knows from then on what it needs. Arguments and errors
    are those of :func:`srd_lab.models.own.own_network`."""
    own = own_network(name, with_weights=with_weights)
    _wants[name, os.getcwd()] = own.preprocessing
    return own


# of the networks from elsewhere that were made last; a name may be that of a file in the working directory
_wants: dict[tuple[str, str], Preprocessing] = {}


def _finished(model: Classifier, place: torch.device) -> Classifier:
    return model.float().eval().requires_grad_(False).to(place)


def weights_file(name: str, data: str = "scenes", weights: str | Path | None = None) -> Path:
    """The file that ``load_model`` with these arguments reads; torchvision's is downloaded if it is not in the cache.

    Raises BadValue for a name or data that is not there, BadWeights where there is no file of weights to take, and
    Unavailable where a download fails. Whether a given file exists is not checked.
    """
    kind, family = _family(name, data)
    file = weights or family.file(name)
    if file is None:
        raise BadWeights(f"there are no weights of {name} for {kind} here; give your own with --weights FILE")
    return Path(file)


def networks(data: str = "scenes") -> tuple[str, ...]:
    """The names that ``load_model`` knows for this data. Raises BadValue for data that is not known.

    Example
    -------
    >>> networks("scenes")
    ('vgg16', 'vgg16_8x8', 'resnet18', 'resnet50')
    """
    return FAMILIES[_kind(data)].names()


def weights_digest(name: str, data: str = "scenes", weights: str | Path | None = None) -> str:
    """SHA-256, in hexadecimal digits, of the weights that ``load_model`` with these arguments has: of the file, or where
    there is none, of the tensors that the factory gives.

    Errors are those of :func:`load_model` and :func:`weights_file`.
    """
    if is_own(name) and weights is None:
        return state_digest(own_network(name).network)
    file = Path(weights) if is_own(name) and weights is not None else weights_file(name, data, weights)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def preprocessing(name: str, data: str = "imagenet") -> Preprocessing:
    """What the network needs of an image of this data: as torchvision's weights are tested (224 pixels for most, 299 for
    inception_v3, up to 600 for efficientnet_b7), as other libraries say; 64 pixels on scenes and 32 on CIFAR.

    Nothing is downloaded for torchvision's and timm's. Raises BadValue for a name or data that is not there, and the errors
    of :func:`load_model` for networks from elsewhere.

    Example
    -------
    >>> str(preprocessing("vgg16"))
    '224 px; crop 0.875; bilinear; mean 0.485 0.456 0.406; std 0.229 0.224 0.225'
    """
    if not is_own(name):
        return _family(name, data)[1].preprocessing(name)
    wants = _wants.get((name, os.getcwd())) or make_own(name, with_weights=False).preprocessing
    return replace(wants, size=SIDES.get(data.partition(":")[0], wants.size))


def input_size(name: str, data: str = "imagenet") -> int:
    """Side in pixels of the images that the network is made for; arguments and errors as for :func:`preprocessing`.

    Example
    -------
    >>> input_size("vgg16"), input_size("vgg16", "scenes")
    (224, 64)
    """
    return preprocessing(name, data).size


def _kind(data: str) -> str:
    kind, colon, _ = data.partition(":")
    if kind == "live" or (is_place(data.partition("?")[0]) and kind not in FAMILIES):
        return "own"
    if kind not in FAMILIES or (kind == "scenes" and colon):
        raise BadValue(f"there are no models for data {data!r}; choose {SPECS}")
    return kind


def _family(name: str, data: str) -> tuple[str, Family]:
    """The kind of data and its networks; BadValue where ``name`` is none of them."""
    kind = _kind(data)
    known = networks(kind)
    if name not in known:
        near = known if len(known) <= 5 else get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        more = (
            "torchvision's are for imagenet:DIR" if kind == "scenes" else "srd_lab.models.networks tells all"
        )
        raise BadValue(f"there is no network {name!r} for {kind}; choose one like {', '.join(near)} ({more})")
    return kind, FAMILIES[kind]
