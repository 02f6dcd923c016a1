"""Activation-Pattern-Only Prediction: what a network says when only its on/off pattern is kept (SRD paper, App. D).

Patterns are recorded from one image and replayed on another input; the study counts what is still predicted. It may
import methods, metrics, data, networks, figures and :mod:`srd_lab.runs`, but neither ``attacks`` nor the command line. Begin
with :mod:`apop.passes`, the functions that are public, and :mod:`apop.pattern`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apop.passes import binarize, record, replay
    from apop.pattern import ActivationPattern

_HOME = {
    "ActivationPattern": "apop.pattern",
    "binarize": "apop.passes",
    "record": "apop.passes",
    "replay": "apop.passes",
}
__all__ = ["ActivationPattern", "binarize", "record", "replay"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apop' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
