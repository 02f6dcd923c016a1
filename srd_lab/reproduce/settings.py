"""Settings of the paper's experiments that no other study has; see :mod:`srd_lab.runs.settings` for what is stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from srd_lab.evaluation.settings import EvaluationSettings, ScoringSettings
from srd_lab.runs.settings import Settings


@dataclass(frozen=True, kw_only=True)
class AblationSettings(Settings):
    """Fig. 7.

    models : names of networks. images : how many, drawn by the seed; ``all``.
    """

    models: tuple[str, ...] = ("vgg16",)
    images: int | str = 200


@dataclass(frozen=True, kw_only=True)
class TableSettings(ScoringSettings):
    """Table 2 or 4: scores of methods on several networks.

    models : names of networks, at least one.
    """

    models: tuple[str, ...] = ()

    def of(self, model: str) -> EvaluationSettings:
        """The same for one of the networks."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(ScoringSettings)}
        return EvaluationSettings(model=model, **values)
