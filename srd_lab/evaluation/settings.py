"""Settings of the evaluation; see :mod:`srd_lab.runs.settings` for what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srd_lab.runs.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """What is scored, and how.

    methods : names, wrapped or not; ``all``.
    metrics : names; ``all``.
    images : how many, drawn by the seed; ``all``.
    target : the class explained: ``label`` or ``predicted``.
    reference : the method that every other is compared with.
    baseline : what fidelity sets pixels to (:data:`srd_lab.catalogue.BASELINES`).
    """

    methods: tuple[str, ...] = ("all",)
    metrics: tuple[str, ...] = ("all",)
    images: int | Literal["all"] = 200
    target: Literal["label", "predicted"] = "label"
    reference: str = "srd"
    baseline: str = "black"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ScoringSettings):
    """Scores of methods on one network.

    model : the network's name.
    """

    model: str = "vgg16_8x8"


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """Maps of single pictures.

    model : the network's name.
    data : what it was made for, as in :class:`srd_lab.runs.settings.Settings`, which names its classes; "" = scenes for the
        networks of this package, while classes of networks from elsewhere have numbers.
    weights, size, mean, std, labels, device : likewise.
    methods : names, wrapped or not; ``all``.
    targets : classes to explain: index, name or WordNet number; () = the predicted one.
    out : folder for what is made; None = the first of ``explanations``, ``explanations-2``, ... that is free.
    overlay : how maps are laid over the pictures: ``heat`` or ``contour``.
    share : of the relevance that a contour encloses, in (0, 1).
    figure_formats : as in :class:`srd_lab.runs.settings.Settings`.
    """

    model: str = "vgg16_8x8"
    data: str = ""
    weights: tuple[str, ...] = ()
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    labels: str | None = None
    methods: tuple[str, ...] = ("srd",)
    targets: tuple[str, ...] = ()
    device: str = "auto"
    out: Path | None = None
    overlay: str = "heat"
    share: float = 0.5
    figure_formats: tuple[str, ...] = ("png",)
