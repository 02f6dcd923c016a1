"""Networks from elsewhere, by name.

===========================  ==============================================================================================
``timm:NAME``                a network of timm with its pretrained weights and its preprocessing; needs ``srd-lab[timm]``
``hf:NAME_OR_DIR``           an image classifier of transformers, from the Hugging Face hub or a folder; ``srd-lab[hf]``
``hub:REPO:NAME``            an entry point of a repository on GitHub, or in a folder, by ``torch.hub``
``FILE.pt2``                 an exported program, see :mod:`srd_lab.models.exported`
``package.module:factory``   whatever a function or class of yours makes
``path/file.py:factory``     the same from a file
===========================  ==============================================================================================

Options stand behind a ``?``: ``timm:vit_tiny_patch16_224?img_size=64``, ``mine.py:Net?width=32``. All of these run code:
of timm, of the repository, of the file, or yours.

A factory gives a network of normalised images to logits (a tensor, or an object with ``logits``), a pair of it and a
:class:`srd_lab.types.Preprocessing`, or a network with one as its attribute ``preprocessing``; without one ImageNet's mean
and standard deviation and 224 pixels are taken. A network that normalises pixels itself says so by ``Preprocessing(mean=(0,
0, 0), std=(1, 1, 1))``, or is a :class:`srd_lab.models.Classifier`. Random weights are drawn from seed 0.

Example
-------
::

    # mine.py
    def net(width=16):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    # srd-lab explain --model "mine.py:net?width=32" --weights net.pth picture.jpg
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srd_lab.errors import BadValue, BadWeights, SrdLabError, Unavailable, first_line
from srd_lab.logits import class_logits
from srd_lab.models.classifier import Classifier
from srd_lab.parts import living, make, split_options
from srd_lab.types import INTERPOLATIONS, Preprocessing


@dataclass(frozen=True)
class Own:
    """A network from elsewhere and what it needs of an image."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing

    def classifier(self, preprocessing: Preprocessing | None = None) -> Classifier:
        """It behind its normalisation, or another one; errors as those of :func:`own_network`."""
        if isinstance(self.network, Classifier):
            return self.network
        wants = preprocessing or self.preprocessing
        return Classifier(self.network, wants.mean, wants.std, self._classes(wants.size))

    def _classes(self, size: int) -> int:
        """How many classes the logits are for, as an empty image shows."""
        self.network.eval()
        try:
            with torch.no_grad():
                logits = class_logits(self.network(torch.zeros(1, 3, size, size)))
        except SrdLabError:
            raise
        except Exception as error:
            raise BadValue(
                f"{self.name} does not take images (1, 3, {size}, {size}): {first_line(error)} ({type(error).__name__}); "
                "give its --size"
            ) from error
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise BadValue(f"{self.name} puts out {found} for one image; expected logits (1, classes)")
        return int(logits.shape[1])


def own_network(name: str, *, with_weights: bool = True) -> Own:
    """The network of that name, on the CPU, in eval mode.

    with_weights : whether pretrained weights are wanted; a factory of the user's own decides that itself.

    Raises BadValue for a name that is not known and a factory that fails or gives no network; BadWeights and Unavailable
    where weights, or a package, cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = _exported if name.partition("?")[0].endswith(".pt2") else SOURCES.get(name.partition(":")[0])
        found = source(name, with_weights) if source else _made(name, make(name))
    found.network.eval()
    return found


def state_digest(network: nn.Module) -> str:
    """SHA-256 over names, kinds, shapes and numbers of the network's tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _made(name: str, made: Any) -> Own:
    """What a factory has made."""
    network, wants = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise BadValue(
            f"{name} gives a {type(network).__name__}; expected a torch.nn.Module, or a pair of it and a Preprocessing"
        )
    wants = getattr(network, "preprocessing", None) if wants is None else wants
    if wants is not None and not isinstance(wants, Preprocessing):
        raise BadValue(
            f"{name} gives a {type(wants).__name__} as its preprocessing; expected srd_lab.types.Preprocessing"
        )
    return Own(name, network, wants or Preprocessing())


def _timm(name: str, with_weights: bool) -> Own:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError:
        raise Unavailable(f"{name} needs timm; `pip install 'srd-lab[timm]'`") from None
    network_name, options = split_options(name.removeprefix("timm:"))
    if not timm.is_model(network_name.partition(".")[0]):
        raise BadValue(f"timm has no network {network_name!r}; timm.list_models() tells all")
    options = {"pretrained": with_weights} | options
    try:
        network = timm.create_model(network_name, **options)
    except (OSError, ImportError) as error:  # what the hub's client raises where it is not reached
        raise _no_download(name, error) from None
    except Exception as error:
        if options["pretrained"] and not timm.is_model_pretrained(network_name):
            raise BadWeights(
                f"timm has no weights of {network_name}; give your own with --weights FILE"
            ) from None
        raise BadValue(f"{name} fails: {first_line(error)} ({type(error).__name__})") from error
    wants = resolve_model_data_config(network)
    if isinstance(side := options.get("img_size"), int):
        wants["input_size"] = (3, side, side)
    if len(set(wants["input_size"][1:])) > 1:
        raise BadValue(
            f"{name} wants images of {wants['input_size'][1:]} pixels; squares alone are made here"
        )
    interpolation = wants["interpolation"] if wants["interpolation"] in INTERPOLATIONS else "bicubic"
    preprocessing = Preprocessing(
        wants["input_size"][1], tuple(wants["mean"]), tuple(wants["std"]), wants["crop_pct"], interpolation
    )
    return Own(name, network, preprocessing)


def _hf(name: str, with_weights: bool) -> Own:
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    except ImportError:
        raise Unavailable(f"{name} needs transformers; `pip install 'srd-lab[hf]'`") from None
    place, options = split_options(name.removeprefix("hf:"))
    try:
        if with_weights:
            # weights that would be unpickled are not taken
            network = AutoModelForImageClassification.from_pretrained(place, use_safetensors=True, **options)
        else:
            network = AutoModelForImageClassification.from_config(
                AutoConfig.from_pretrained(place), **options
            )
        processor = AutoImageProcessor.from_pretrained(place, use_fast=False)
    except (OSError, ImportError) as error:
        raise _no_download(name, error) from None
    except Exception as error:
        raise BadValue(f"{name} fails: {first_line(error)} ({type(error).__name__})") from error
    return Own(name, network.float(), _of_processor(processor.to_dict()))


def _of_processor(wants: dict[str, Any]) -> Preprocessing:
    """What a processor of transformers does, as far as it is known here."""
    usual = Preprocessing()
    size, cut = wants.get("size") or {}, wants.get("crop_size") or {}
    resized = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height") or usual.size
    side = resized
    if wants.get("do_center_crop"):
        side = cut if isinstance(cut, int) else cut.get("height", resized)
    crop = side / resized
    if wants.get("crop_pct") and not wants.get("do_center_crop"):
        crop = wants["crop_pct"]
    names = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
    normalises = wants.get("do_normalize", True)
    return replace(
        usual,
        size=int(side),
        mean=tuple(wants.get("image_mean") or usual.mean) if normalises else (0.0, 0.0, 0.0),
        std=tuple(wants.get("image_std") or usual.std) if normalises else (1.0, 1.0, 1.0),
        crop=crop,
        interpolation=names.get(wants.get("resample", 2), "bilinear"),
    )


def _hub(name: str, with_weights: bool) -> Own:
    text, options = split_options(name.removeprefix("hub:"))
    repository, _, entry = text.rpartition(":")
    if not repository or not entry:
        raise BadValue(f"{name} names no network; expected hub:OWNER/REPO:NAME or hub:FOLDER:NAME")
    local = Path(repository).expanduser().is_dir()
    try:
        made = torch.hub.load(
            str(Path(repository).expanduser()) if local else repository,
            entry,
            source="local" if local else "github",
            trust_repo=True,  # it was named, as any code of the user's
            skip_validation=True,
            **options,
        )
    except OSError as error:
        raise _no_download(name, error) from None
    except Exception as error:
        raise BadValue(f"{name} fails: {first_line(error)} ({type(error).__name__})") from error
    return _made(name, made)


def _exported(name: str, with_weights: bool) -> Own:
    from srd_lab.models.exported import exported_network

    if "?" in name:
        raise BadValue(f"{name}: an exported program takes no options; leave the ? out")
    return Own(name, *exported_network(Path(name).expanduser()))


def _no_download(name: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"{name} cannot be had: {first_line(error)}; give weights with --weights FILE, or bring its files here first"
    )


def _live(name: str, with_weights: bool) -> Own:
    """A copy of a network in hand: the study changes modes and places."""
    return _made(name, copy.deepcopy(living(name)))


SOURCES: dict[str, Callable[[str, bool], Own]] = {"timm": _timm, "hf": _hf, "hub": _hub, "live": _live}
