"""What the list of runs shows of one: its name, tags, and the images that were drawn for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from srd_lab.runs.settings import PACE, Settings, as_text

# scores that stand for a run: the first of them that it has
HEADLINES = ("worst_pcc", "eq10_pcc", "zeros_apop_top1", "pointing_game", "insertion", "pcc", "top1")
_LONGEST = 40  # characters of one part of a name
# settings that the list shows as tags, by the tag's name
_TAGS = {"attack": "attacks", "norm": "norm", "budget": "budget", "mode": "mode", "start": "starts"}


@dataclass(frozen=True)
class Drawn:
    """The images that a study uses.

    source : of the data, as typed. images, of : how many were drawn, of how many.
    digest : 16 hexadecimal digits of the SHA-256 of their names, in order: runs with the same one used the same images.
    """

    source: str
    images: int
    of: int
    digest: str


def drawn_from(settings: Settings, dataset: Any, indices: Sequence[int]) -> Drawn:
    """What ``indices`` of ``dataset`` are; the settings say what the data are called."""
    names = "\n".join(str(dataset.name(int(index))) for index in indices)
    digest = hashlib.sha256(f"{settings.source}\n{names}".encode()).hexdigest()[:16]
    return Drawn(settings.data, len(indices), len(dataset), digest)


@dataclass(frozen=True)
class Label:
    """What is stored with a run to find it again and to hold it against others.

    name : of the run. tags : name -> text. settings : that its parts carry, too. drawn : None = not known.
    """

    name: str
    tags: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    drawn: Drawn | None = None


def label_of(settings: Settings, device: object = "", drawn: Drawn | None = None) -> Label:
    """The label of a study with these settings.

    Example
    -------
    >>> from attacks.settings import RobustnessSettings
    >>> label_of(RobustnessSettings(methods=("srd", "gradcam"), pairs=20)).name
    'srd + gradcam · vgg16 · scenes · 20 pairs · seed 0'
    """
    own = dict(vars(settings))
    if hasattr(settings, "effective_budget"):
        own["budget"] = f"{settings.effective_budget:g}"
    models = own.get("models") or (own.get("model", ""),)
    methods, number = own.get("methods", ()), own.get("pairs", own.get("images", ""))
    unit = "pairs" if "pairs" in own else "images"
    parts = [
        _some(methods),
        _some(models),
        settings.source if drawn is None else _short(drawn.source),
        f"{number} {unit}" if number != "" else "",
        f"seed {settings.seed}",
    ]
    tags = {
        "method": ", ".join(methods),
        "model": ", ".join(models),
        "data": settings.data,
        "images": str(drawn.images if drawn else number),
        "device": str(device),
        "srd_lab": version("srd-lab"),
        **{tag: as_text(own[name]).replace(",", ", ") for tag, name in _TAGS.items() if own.get(name)},
    }
    if drawn:
        tags["images_digest"] = drawn.digest
    shared = {name: text for name, text in settings.stored().items() if name != PACE}
    return Label(" · ".join(filter(None, parts)), {k: v for k, v in tags.items() if v}, shared, drawn)


def _some(names: Sequence[str]) -> str:
    """Up to three names; of more the first two, and how many others."""
    shown = [_short(name) for name in names if name]
    return " + ".join(shown if len(shown) < 4 else [*shown[:2], f"{len(shown) - 2} more"])


def _short(name: str) -> str:
    """A name without the folders of a path in it, and of bounded length."""
    kind, colon, place = name.partition(":")
    if colon and ("/" in place or "\\" in place) and "?" not in place:
        name = f"{kind}:{PurePath(place).name or place}"
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
