"""Maps of a manipulated network beside those of the original, and the files that its weights are kept in.

Example
-------
::

    cases = objective.cases(x, labels)
    compare(explainer, objective, original, manipulated, cases).pcc     # (N,)
    save_weights(manipulated, "fooled.pth")          # load_model("vgg16", weights="fooled.pth") reads it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.model_objective import Cases, MapObjective
from attacks.scores import as_read, similarity
from srd_lab.errors import BadWeights
from srd_lab.normalise import split_normalisation
from srd_lab.types import Explainer


@dataclass(frozen=True)
class Comparison:
    """What became of the maps of N images, each (N,).

    before, after : the objective's score on the original and on the manipulated network.
    pcc, ssim : of both networks' maps, in [-1, 1], as :func:`attacks.scores.similarity`; of a pair of maps the mean.
    blank : bool, whether a map of the manipulated network is zero all over, and says nothing.
    """

    before: Tensor
    after: Tensor
    pcc: Tensor
    ssim: Tensor
    blank: Tensor


def shown_maps(
    explainer: Explainer, model: nn.Module, cases: Cases, *, differentiable: bool = False
) -> Tensor:
    """The maps (N, M, H, W) in [0, 1] that are looked at, each |map| / its maximum, stretched to the image.

    cases : images and M classes for each. differentiable : in the model's weights, as far as they ask for a gradient.

    Errors are those of the explainer.
    """
    x = cases.images.detach().requires_grad_(differentiable)
    size = (x.shape[2], x.shape[3])
    return torch.stack(
        [as_read(explainer.explain_with_logits(model, x, c)[0], size) for c in cases.classes], 1
    )


def compare(
    explainer: Explainer, objective: MapObjective, original: nn.Module, manipulated: nn.Module, cases: Cases
) -> Comparison:
    """What the manipulation did to the maps of ``cases``, which ``objective.cases`` makes of images and labels.

    Errors are those of the explainer.
    """
    before, after = (shown_maps(explainer, model, cases) for model in (original, manipulated))
    size = (before.shape[2], before.shape[3])
    alike = [similarity(now, was, size) for now, was in zip(after.unbind(1), before.unbind(1), strict=True)]
    return Comparison(
        before=objective.score(before, before).double(),
        after=objective.score(after, before).double(),
        pcc=torch.stack([scores["pcc"] for scores in alike]).mean(0),
        ssim=torch.stack([scores["ssim"] for scores in alike]).mean(0),
        blank=(after == 0).flatten(2).all(2).any(1),
    )


def save_weights(model: nn.Module, file: str | Path) -> None:
    """Write the network's state dict to a .pth, .npz or .safetensors file, which ``load_model(..., weights=FILE)`` reads.

    Folders on the way are made. Raises BadWeights for another suffix.
    """
    file, state = Path(file), weights_of(model)
    if file.suffix in (".npz", ".safetensors", ".pth"):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in state.items()}
        np.savez_compressed(file, **arrays)
    elif file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    elif file.suffix == ".pth":
        torch.save(state, file)
    else:
        raise BadWeights(f"{file} is no weights file that is known here; expected .pth, .npz or .safetensors")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network behind the normalisation, on the CPU, as weights files hold it."""
    _, network = split_normalisation(model)
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
