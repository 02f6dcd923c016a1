"""The methods of this package in the hands of other libraries: captum and Quantus.

Example
-------
::

    import captum, quantus
    from srd_lab.adapters import captum_attribution, explain_func

    captum_attribution(model, "srd").attribute(x, target=3)                          # (N, 1, H, W)
    quantus.MaxSensitivity()(model, x, y, explain_func=explain_func, explain_func_kwargs={"method": "srd"})
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.errors import Unavailable
from srd_lab.registry import make_explainer
from srd_lab.types import finite_maps


def explain_func(
    model: nn.Module, inputs: Any, targets: Any, method: str = "srd", device: Any = None, **options: Any
) -> np.ndarray:
    """Maps (N, 1, H, W) as Quantus asks for them: signed, stretched to the images.

    model : in eval mode. inputs : images (N, C, H, W), array or tensor. targets : classes (N,), array or tensor.
    method : as for :func:`srd_lab.registry.make_explainer`. device : where to; None = that of the model.
    options : what Quantus passes on besides; not looked at.

    Errors are those of ``make_explainer`` and of :func:`srd_lab.types.finite_maps`.
    """
    place = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    x = torch.as_tensor(inputs).to(place)
    if not x.is_floating_point():
        x = x.float()
    classes = torch.as_tensor(targets).to(place).long().reshape(-1)
    raw = finite_maps(make_explainer(method), model, x.detach(), classes)  # Quantus adds noise
    size = (x.shape[2], x.shape[3])
    stretched = raw if raw.shape[1:] == size else maps.upsample(raw, size)
    return stretched[:, None].detach().cpu().numpy()


def captum_attribution(model: nn.Module, method: str = "srd") -> Any:
    """A method as an attribution of captum: its ``attribute(inputs, target)`` gives raw maps (N, 1, h, w), differentiable
    where the inputs ask for a gradient.

    model : in eval mode. method : as for :func:`srd_lab.registry.make_explainer`, whose errors are passed on.

    Raises Unavailable without captum.
    """
    try:
        from captum.attr import Attribution
    except ImportError:
        raise Unavailable("captum is not installed; `pip install captum`") from None
    explainer = make_explainer(method)

    class Explained(Attribution):  # type: ignore[misc]
        def attribute(self, inputs: Tensor, target: Tensor | int | None = None) -> Tensor:
            return finite_maps(explainer, self.forward_func, inputs, target)[:, None]

    return Explained(model)
