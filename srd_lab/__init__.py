"""srd-lab: find out whether a saliency explanation can be trusted.

The public names load what they need when first used, so that ``import srd_lab`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srd_lab.api import apop, attack, evaluate
    from srd_lab.catalogue import method as register_method
    from srd_lab.catalogue import metric as register_metric
    from srd_lab.data import load_data
    from srd_lab.errors import SrdLabError
    from srd_lab.methods.srd import SRD
    from srd_lab.models import load_model
    from srd_lab.registry import EXPLAINERS, METRICS, explain, make_explainer, make_metric
    from srd_lab.types import Explainer, Preprocessing, Sample

# public name -> the module that has it, and what it is called there
_HOME = {
    "EXPLAINERS": ("srd_lab.registry", "EXPLAINERS"),
    "METRICS": ("srd_lab.registry", "METRICS"),
    "Explainer": ("srd_lab.types", "Explainer"),
    "apop": ("srd_lab.api", "apop"),
    "attack": ("srd_lab.api", "attack"),
    "evaluate": ("srd_lab.api", "evaluate"),
    "Preprocessing": ("srd_lab.types", "Preprocessing"),
    "SRD": ("srd_lab.methods.srd", "SRD"),
    "Sample": ("srd_lab.types", "Sample"),
    "SrdLabError": ("srd_lab.errors", "SrdLabError"),
    "explain": ("srd_lab.registry", "explain"),
    "load_data": ("srd_lab.data", "load_data"),
    "load_model": ("srd_lab.models", "load_model"),
    "make_explainer": ("srd_lab.registry", "make_explainer"),
    "make_metric": ("srd_lab.registry", "make_metric"),
    "register_method": ("srd_lab.catalogue", "method"),
    "register_metric": ("srd_lab.catalogue", "metric"),
}
__all__ = [  # noqa: RUF022 (as above)
    "EXPLAINERS",
    "METRICS",
    "Explainer",
    "Preprocessing",
    "SRD",
    "Sample",
    "SrdLabError",
    "apop",
    "attack",
    "evaluate",
    "explain",
    "load_data",
    "load_model",
    "make_explainer",
    "make_metric",
    "register_method",
    "register_metric",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("srd-lab")
    if name not in _HOME:
        raise AttributeError(f"module 'srd_lab' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)
