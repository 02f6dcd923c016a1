"""Weights files: read without running what is in them, made float32, loaded strictly."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_lab.errors import BadWeights, first_line


def _read_npz(file: Path) -> dict[str, Any]:
    # numpy leaves a damaged file open that it has opened itself
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _read_pth(file: Path) -> Any:
    # torchvision's training script writes its arguments beside the weights: a Namespace, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(file)


# How a file of that name is read, and how it begins.
_TORCH = _read_pth, rb"PK|\x80"
READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    ".pth": _TORCH,
    ".pt": _TORCH,
    ".th": _TORCH,
    ".tar": _TORCH,  # model_best.pth.tar, as the ImageNet example of PyTorch names it
    ".safetensors": (_read_safetensors, rb".{8}\{"),
    ".npz": (_read_npz, rb"PK"),
}


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a .pth, .pt, .th, .tar, .safetensors or .npz file, in float32, its keys as torchvision has them.

    It may lie under ``state_dict`` or ``model``, where training scripts put it. Nothing is unpickled but tensors and
    plain data, so that a file cannot run code.

    Raises BadWeights where the file is missing, damaged, of another kind, or does not hold a state dict of tensors: plain
    ones with finite numbers.
    """
    file = Path(file).expanduser()
    if file.suffix not in READERS:
        raise BadWeights(f"{file} is no weights file that is known here; expected {', '.join(READERS)}")
    if not file.is_file():
        raise BadWeights(f"there is no weights file {file}; give the path of a {file.suffix} state dict")
    reader, beginning = READERS[file.suffix]
    try:
        _check_beginning(file, beginning)
        return _plain(_unwrapped(reader(file)))
    except Exception as error:  # the readers fail on a damaged file in every way there is
        raise BadWeights(
            f"{file} cannot be read as a state dict ({_reason(error)}); save model.state_dict() there"
        ) from None


def _check_beginning(file: Path, beginning: bytes) -> None:
    """ValueError where a download has left a web page, nothing, or a part."""
    with file.open("rb") as stream:
        head = stream.read(16)
    if not head:
        raise ValueError("it is empty")
    if not re.match(beginning, head, re.DOTALL):
        raise ValueError(f"it begins with {head!r}, as no {file.suffix} file does")
    if head.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise ValueError("its end is missing")


def _reason(error: Exception) -> str:
    """What is wrong, in a line. What PyTorch says of a refused pickle begins with the advice to trust it."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error).partition(". ")[0]
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it asks for {asked[1]}, and only tensors and plain data are unpickled: all else can run code"
    return "it is damaged, or was not written by torch.save"


def _unwrapped(state: Any) -> Mapping[str, Tensor]:
    """The state dict in what a file holds; ValueError where there is none."""
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}")
    if not state:
        raise ValueError("it is empty")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError("not all that it holds are tensors")
    return state


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in float32, its keys as torchvision's modules have them today.

    Without the prefixes of DataParallel and torch.compile and the auxiliary heads (nothing of them shows in eval
    mode), and with the dotless layer names that DenseNet has had since PyTorch 0.4.1: the files on torchvision's
    server are older.
    """
    plain = {}
    for key, value in state.items():
        key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
        if re.match(r"(aux\d|AuxLogits)\.", key):
            continue
        if reason := _no_weight(value):
            raise ValueError(f"{key} {reason}")
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)
        plain[key] = value.float() if value.is_floating_point() else value
    return plain


def _no_weight(value: Tensor) -> str:
    """Why a tensor cannot be one of a network's; empty where it can."""
    if value.is_meta:
        return "has a shape and no numbers"
    if value.is_sparse or value.layout != torch.strided:
        return "is sparse"
    if value.is_quantized:
        return "is quantised"
    if value.is_complex():
        return "holds complex numbers"
    if value.is_floating_point() and not value.isfinite().all():
        return "holds NaN or infinite values"
    return ""


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
    whole = [
        f"{key} {str(found[key].dtype).removeprefix('torch.')}"
        for key, value in expected.items()
        if key in found and not key.endswith("num_batches_tracked")
        if found[key].is_floating_point() != value.is_floating_point()
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": reshaped,
        "of another kind of numbers": whole,
    }
    return [_some(what, keys) for what, keys in kinds.items() if keys]


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state``, as :func:`read_state` gives it, into ``network``.

    source : what the error calls it. Raises BadWeights, with what does not fit, unless all keys and shapes do.
    """
    own, state = network.state_dict(), OrderedDict(state)
    complaints = _complaints(own, state)
    if complaints:
        raise BadWeights(
            f"{source} does not fit: {', '.join(complaints)}; give the weights of this very architecture"
        )
    # A module that changed between versions (MNASNet) reads its own here, and would else rebuild itself.
    state._metadata = own._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict=False)
