"""The normalisation in front of a network, and the network."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from srd_lab.errors import BadInput, Refused
from srd_lab.overflow import largest_square_root

# What noise and attacks may leave [0, 1] by, 26 of 256 grey levels: attacks use 16 at most, normalised images reach -1.
PIXEL_MARGIN = 0.1


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


def check_pixel_range(model: nn.Module, x: Tensor) -> None:
    """Refuse images that a model which normalises them cannot have been meant to see: of 0..255, or normalised already.

    model : any; a bare network, which is no :class:`Normalising` one, is fed with whatever it was trained on.
    x : images (N, C, H, W); what is no tensor of finite numbers whose squares are finite passes: what runs next says so.

    Raises BadInput for pixels below -``PIXEL_MARGIN`` or above 1 + ``PIXEL_MARGIN``.

    Example
    -------
    >>> check_pixel_range(model, 2 * x - 1)
    Traceback (most recent call last):
    ...
    srd_lab.errors.BadInput: the model expects pixels in [0, 1], got [-0.835, 0.961]; pass model.network, ...
    """
    if not isinstance(model, Normalising) or not isinstance(x, Tensor):
        return
    try:
        normalise, _ = model.normalisation_and_network()
    except Refused:  # methods that need the two parts say so
        return
    if isinstance(normalise, nn.Identity) or not (x.is_floating_point() and x.numel()):
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()  # one look at the device
    if low >= -PIXEL_MARGIN and high <= 1 + PIXEL_MARGIN:
        return
    if not max(-low, high) <= largest_square_root(x.dtype):  # or not a number
        return
    if low >= -PIXEL_MARGIN and high > 2:
        cure = "divide by 255"
    else:
        cure = "pass model.network, if they are normalised already, or clip noise with x.clamp(0, 1)"
    raise BadInput(f"the model expects pixels in [0, 1], got [{low:.3g}, {high:.3g}]; {cure}")


def check_box(model: nn.Module, x: Tensor, low: float, high: float) -> None:
    """Refuse (BadInput) images for a bare network that leave the box [low, high] which they are said to lie in.

    model : any; one that normalises its images is asked by :func:`check_pixel_range`. x : images (N, C, H, W).
    """
    if isinstance(model, Normalising) or not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
        return
    least, most = (float(end) for end in x.detach().aminmax())
    margin = PIXEL_MARGIN * (high - low)
    if not max(-least, most) <= largest_square_root(x.dtype):  # or not a number: what runs next says so
        return
    if least < low - margin or most > high + margin:
        raise BadInput(
            f"the images lie in [{least:.3g}, {most:.3g}], outside of the pixel box [{low:g}, {high:g}] of this rule; give "
            "low= and high= of the images that the network is fed with"
        )


def normalisation_scale(model: nn.Module, x: Tensor) -> Tensor:
    """What one unit of pixel value is in normalised units, (1, C, 1, 1): 1 / std, or 1 for a bare network.

    x : images (N, C, H, W), of which only shape, dtype and device count.

    Raises Refused as :func:`split_normalisation` does.
    """
    normalise, _ = split_normalisation(model)
    zero = torch.zeros_like(x[:1])
    with torch.no_grad():
        return (normalise(zero + 1) - normalise(zero)).mean((2, 3), keepdim=True)
