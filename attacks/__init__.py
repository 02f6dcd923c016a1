"""Targeted manipulation of explanations (Dombrowski et al. 2019; Eq. 10 of the SRD paper)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.manipulation import AttackResult, Manipulation
    from attacks.objective import Budget, Objective

_HOME = {
    "AttackResult": "attacks.manipulation",
    "Budget": "attacks.objective",
    "Manipulation": "attacks.manipulation",
    "Objective": "attacks.objective",
}
__all__ = ["AttackResult", "Budget", "Manipulation", "Objective"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
