"""The network on which an attack takes its gradient: the original one, or one whose ReLUs are softplus(beta).

Maps that are made of a gradient alone (gradient, guided backprop) have no slope on ReLUs, and need a surrogate
(Dombrowski et al. 2019). SRD, LRP, gradient x input and the CAMs have one on the original network. Which surrogate predicts
the real change best is measured, not assumed: :func:`attacks.probe.probe`.

Example
-------
>>> Surrogate.named("softplus_30").at(model, step=0, steps=40).beta   # of a network to differentiate
30.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import nn

from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue


@dataclass(frozen=True)
class Surrogate:
    """Softplus surrogate with ``beta`` at the first step, growing geometrically to ``beta_end`` after the last.

    beta : > 0, or None for the original network itself; beta_end : > 0; None = it stays ``beta``.

    Raises BadValue for values out of range, and for a last beta without a first.
    """

    beta: float | None = None
    beta_end: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("beta_start", self.beta), ("beta_end", self.beta_end)):
            if value is not None and not value > 0:
                raise BadValue(f"the attack needs {name} > 0, got {value}")
        if self.beta is None and self.beta_end is not None:
            raise BadValue("a surrogate with a last beta needs a first one")

    @classmethod
    def named(cls, name: str) -> Self:
        """One of :data:`SURROGATES`. Raises BadValue for another name."""
        if name not in SURROGATES:
            raise BadValue(f"the surrogate {name!r} is not known; expected one of {', '.join(SURROGATES)}")
        return cls(*SURROGATES[name])

    @property
    def is_original(self) -> bool:
        """Whether the original network itself is differentiated."""
        return self.beta is None

    def beta_at(self, step: int, steps: int) -> float:
        """Beta of a step, counted from 0, of an attack of ``steps``; infinite on the original network."""
        if self.beta is None:
            return float("inf")
        end = self.beta if self.beta_end is None else self.beta_end
        return float(self.beta * (end / self.beta) ** (step / steps))

    def at(self, model: nn.Module, step: int, steps: int) -> nn.Module:
        """The network to differentiate at a step.

        model : the original. step : counted from 0. steps : of the whole attack, >= 1.
        """
        return model if self.beta is None else SmoothModel(model, self.beta_at(step, steps))

    def __str__(self) -> str:
        return next(
            (name for name, betas in SURROGATES.items() if betas == (self.beta, self.beta_end)), repr(self)
        )


SURROGATES: dict[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "softplus_30": (30.0, None),
    "softplus_30_100": (30.0, 100.0),
    "softplus_10_100": (10.0, 100.0),
}
