"""Every explanation method and every similarity score by name, for the command line and for ``explain``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from srd_lab.methods.gradient import Gradient, GradInput, GuidedBackprop, IntegratedGradients
from srd_lab.methods.lrp import LRPZPlus
from srd_lab.methods.srd import SRD
from srd_lab.metrics.similarity import PCC, SSIM
from srd_lab.types import Explainer, SrdLabError

EXPLAINERS: dict[str, type] = {
    "srd": SRD,
    "gradient": Gradient,
    "grad_input": GradInput,
    "guided_backprop": GuidedBackprop,
    "integrated_gradients": IntegratedGradients,
    "lrp_zplus": LRPZPlus,
}
METRICS: dict[str, type] = {
    "ssim": SSIM,
    "pcc": PCC,
}


def make_explainer(method: str, **options: Any) -> Explainer:
    """The explainer of that name; options are its fields."""
    if method not in EXPLAINERS:
        raise SrdLabError(f"unknown method {method!r}; expected one of {', '.join(EXPLAINERS)}")
    kind = EXPLAINERS[method]
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SrdLabError(f"{method} has no option {', '.join(unknown)}; it takes {', '.join(known)}")
    return kind(**options)  # type: ignore[no-any-return]


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, method: str = "srd", **options: Any
) -> Tensor:
    """Raw map (N, H, W) of images x (N, C, H, W) in [0, 1] for classes ``target`` (N,); None = the predicted class.

    Maps are signed where the method is and reduced over channels as the method's docstring says; absolute value,
    normalisation and resizing are in :mod:`srd_lab.maps`. ``options`` are the fields of ``EXPLAINERS[method]``.
    """
    return make_explainer(method, **options).explain(model, x, target)
