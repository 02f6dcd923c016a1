"""The normalisation in front of a network, and the network."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from srd_lab.errors import Refused


@runtime_checkable
class Normalising(Protocol):
    """A model that is fed with pixels in [0, 1] and normalises them: :class:`srd_lab.models.Classifier`, say."""

    def normalisation_and_network(self) -> tuple[nn.Module, nn.Module]:
        """Normalisation and network: the model is the second applied to the result of the first."""
        ...


def split_normalisation(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The normalisation in front of a network, and the network.

    A model that does not say (:class:`Normalising`) is taken to be a bare network, behind an identity.

    Raises Refused if forward hooks are on the model as a whole: running its two parts one by one would skip them.
    """
    if not isinstance(model, Normalising):
        return nn.Identity(), model
    normalise, network = model.normalisation_and_network()
    if network is not model and (model._forward_hooks or model._forward_pre_hooks):
        raise Refused(
            "forward hooks are on the whole classifier, whose normalisation and network run one by one; put them on "
            "model.network"
        )
    return normalise, network


def normalisation_scale(model: nn.Module, x: Tensor) -> Tensor:
    """What one unit of pixel value is in normalised units, (1, C, 1, 1): 1 / std, or 1 for a bare network.

    x : images (N, C, H, W), of which only shape, dtype and device count.

    Raises Refused as :func:`split_normalisation` does.
    """
    normalise, _ = split_normalisation(model)
    zero = torch.zeros_like(x[:1])
    with torch.no_grad():
        return (normalise(zero + 1) - normalise(zero)).mean((2, 3), keepdim=True)
