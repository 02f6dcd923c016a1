"""Every explanation method and metric by name, for the command line and for ``explain``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from srd_lab.catalogue import METHODS, metric_of, with_options
from srd_lab.catalogue import METRICS as DECLARED_METRICS
from srd_lab.engine.preconditions import check_input
from srd_lab.errors import BadValue, Refused
from srd_lab.methods.own import own_method
from srd_lab.methods.smoothed import parse_explainer
from srd_lab.metrics.explained import Metric
from srd_lab.parts import EXPECTED, is_own, split_options
from srd_lab.types import Explainer

EXPLAINERS: dict[str, Explainer] = {name: known.explainer for name, known in METHODS.items()}
METRICS: dict[str, Metric] = {name: known.metric for name, known in DECLARED_METRICS.items()}


def make_explainer(method: str, **options: Any) -> Explainer:
    """The explainer of that name, with these options.

    method : a name of ``EXPLAINERS``, with options behind a ``?`` (``smoothgrad?samples=50``); a method from elsewhere
        (``package.module:Class?option=value``, ``captum:IntegratedGradients``, see :mod:`srd_lab.methods.own`); or a wrapper
        around one of these, such as ``smoothed(srd,0.1,64)``.
    options : fields of the method's class, for plain names only; a wrapper takes its own in the brackets.

    Raises BadValue for a name, option or value that is not known, and for a part from elsewhere that is no method.

    Example
    -------
    >>> make_explainer("srd", level="high").level
    'high'
    """
    if "(" in method:
        if options:
            raise BadValue(f"{method} takes its options in the brackets; leave out {', '.join(options)}")
        return parse_explainer(method, make_explainer)
    if is_own(method):
        if options:
            raise BadValue(f"{method} takes its options behind a ?; leave out {', '.join(options)}")
        return own_method(method)
    name, typed = split_options(method)
    if name not in EXPLAINERS:
        raise BadValue(f"unknown method {name!r}; expected one of {', '.join(EXPLAINERS)}, or {EXPECTED[9:]}")
    explainer: Explainer = with_options(name, EXPLAINERS[name], {**options, **typed})
    return explainer


def make_metric(metric: str) -> Metric:
    """The metric of that name: one of ``METRICS``, with options behind a ``?``, or ``package.module:Class?option=value``.

    Raises BadValue for a name or option that is not known, and for a part from elsewhere that is no metric.

    Example
    -------
    >>> make_metric("fidelity?baseline=white").baseline
    'white'
    """
    found: Metric = metric_of(metric).metric
    return found


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, method: str = "srd", **options: Any
) -> Tensor:
    """Raw maps (N, h, w) of images x (N, C, H, W) in [0, 1]; (N, H, W) for methods that explain the input.

    target : classes (N,), one for all, or None = the predicted ones.
    method, options : see :func:`make_explainer`.

    Maps are signed where the method is and reduced over channels as the method's docstring says; absolute value,
    normalisation and resizing are in :mod:`srd_lab.maps`. A bare network, which does not normalise, is given what it was
    trained on instead of pixels.

    Raises BadValue for an unknown method or option; BadInput for inputs of a wrong type or shape, and for pixels more
    than 0.1 outside of [0, 1] where the model normalises them itself; Refused where the model cannot be followed.

    Example
    -------
    >>> explain(model, x, method="gradcam").shape
    torch.Size([2, 2, 2])
    """
    explainer = make_explainer(method, **options)
    check_input(x, model)
    return explainer.explain(model, x, target)


def refusals(model: nn.Module, x: Tensor, explainers: Mapping[str, Explainer]) -> dict[str, str]:
    """Which methods refuse this network, and why: name -> sentence.

    x : an image (1, C, H, W) on which each is tried, for class 0. explainers : name -> method.

    Only Refused is caught; other errors of a method are passed on.
    """
    why = {}
    for name, explainer in explainers.items():
        try:
            explainer.explain(model, x, 0)
        except Refused as error:
            why[name] = str(error)
    return why
