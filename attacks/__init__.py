"""Attacks on explanations: how far can a small change of the image move a map while the prediction holds?

:class:`Attack` is objective x optimiser x budget x surrogate; each is a small object that may be replaced by one of
your own. ``Manipulation`` is the published attack (Dombrowski et al. 2019; Eq. 10 of the SRD paper) as one
configuration of it.

It imports methods, metrics, data, networks, figures and :mod:`srd_lab.runs`, but not :mod:`srd_lab.evaluation`, ``apop`` or
the command line. Begin with :mod:`attacks.attack`; docs/internals.md, "Where attacks are", has one step of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.attack import Attack, Outcome
    from attacks.backdoor import Backdoor
    from attacks.black_box import BlackBox
    from attacks.budget import Budget
    from attacks.certificates import PixelCertificate, SparsifiedCertificate
    from attacks.ensemble import Ensemble
    from attacks.manipulation import AttackResult, Manipulation
    from attacks.model_manipulation import ModelManipulation
    from attacks.objective import Combined, Dissimilarity, Eq10, KeepClass, MassCentre, Target, TopK, View
    from attacks.optimiser import PGD, Adam
    from attacks.surrogate import Surrogate

_HOME = {
    **dict.fromkeys(("Attack", "Outcome"), "attacks.attack"),
    "Backdoor": "attacks.backdoor",
    "BlackBox": "attacks.black_box",
    "Budget": "attacks.budget",
    **dict.fromkeys(("PixelCertificate", "SparsifiedCertificate"), "attacks.certificates"),
    "Ensemble": "attacks.ensemble",
    "ModelManipulation": "attacks.model_manipulation",
    **dict.fromkeys(("AttackResult", "Manipulation"), "attacks.manipulation"),
    **dict.fromkeys(
        ("Combined", "Dissimilarity", "Eq10", "KeepClass", "MassCentre", "Target", "TopK", "View"),
        "attacks.objective",
    ),
    **dict.fromkeys(("PGD", "Adam"), "attacks.optimiser"),
    "Surrogate": "attacks.surrogate",
}
__all__ = [
    "PGD",
    "Adam",
    "Attack",
    "AttackResult",
    "Backdoor",
    "BlackBox",
    "Budget",
    "Combined",
    "Dissimilarity",
    "Ensemble",
    "Eq10",
    "KeepClass",
    "Manipulation",
    "MassCentre",
    "ModelManipulation",
    "Outcome",
    "PixelCertificate",
    "SparsifiedCertificate",
    "Surrogate",
    "Target",
    "TopK",
    "View",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
