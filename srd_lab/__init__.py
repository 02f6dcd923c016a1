"""srd-lab: find out whether a saliency explanation can be trusted.

The public names load what they need when first used, so that ``import srd_lab`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srd_lab.data import load_data
    from srd_lab.errors import SrdLabError
    from srd_lab.methods.srd import SRD
    from srd_lab.models import load_model
    from srd_lab.registry import EXPLAINERS, METRICS, explain

_HOME = {
    "EXPLAINERS": "srd_lab.registry",
    "METRICS": "srd_lab.registry",
    "SRD": "srd_lab.methods.srd",
    "SrdLabError": "srd_lab.errors",
    "explain": "srd_lab.registry",
    "load_data": "srd_lab.data",
    "load_model": "srd_lab.models",
}
__all__ = ["EXPLAINERS", "METRICS", "SRD", "SrdLabError", "explain", "load_data", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'srd_lab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
