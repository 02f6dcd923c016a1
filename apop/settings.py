"""Settings of the APOP study; see :mod:`srd_lab.runs.settings` for what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srd_lab.runs.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SurveySettings(Settings):
    """How well networks predict from activation patterns.

    models : names of networks.
    images : how many, drawn by the seed; ``all``.
    inputs : what is put in the place of the image: ``zeros``, ``ones``, ``normal``.
    binarize : whether each activation call is binarised in turn.
    save_patterns : whether the patterns are stored with the run.
    """

    models: tuple[str, ...] = ("vgg16",)
    images: int | Literal["all"] = 500
    inputs: tuple[str, ...] = ("zeros", "ones", "normal")
    binarize: bool = True
    save_patterns: bool = False
