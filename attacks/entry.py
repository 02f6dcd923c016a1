"""Entries: a robustness figure that somebody else can check.

An entry is a JSON file and, beside it, the adversarial images as 8-bit arrays. These two and the network are enough to
check it (:mod:`attacks.verification`); entries on the same network, images and budget make a table
(:mod:`attacks.leaderboard`).

Example
-------
::

    read_entry(Path("entry.json"))["scores"]["worst_pcc"]
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.ensemble import LETTERS
from attacks.gates import Gates
from attacks.scores import SCORES
from attacks.settings import RobustnessSettings
from attacks.statistics import explanation_rate
from attacks.subject import Subject
from attacks.thresholds import TAU
from srd_lab.catalogue import METHODS
from srd_lab.errors import BadEntry, first_line
from srd_lab.methods.smoothed import plain_name
from srd_lab.metrics.summary import summarise
from srd_lab.runs.environment import device_name, environment
from srd_lab.runs.inputs import preprocessing_for
from srd_lab.runs.settings import options_of

if TYPE_CHECKING:
    from attacks.robustness_study import RobustnessStudy

VERSION = 1
ENTRY, IMAGES = "entry.json", "adversarial.npz"
_LARGEST = 1e300
_LONGEST = 4000  # characters
_FIGURES = ("worst_{}", "worst_{}_low", "worst_{}_high", "rer_{}", "noise_{}")
# What an entry has to hold, and of which kind; a table that may be null stands behind None.
FORM: dict[str, Any] = {
    "version": int,
    "method": str,
    "start": str,
    "options": {},
    "model": str,
    "data": str,
    "weights_sha256": str,
    "images": {"file": str, "sha256": str, "count": int, "originals_sha256": str},
    "attack": {"members": list, "mode": str, "budget": {}, "iterations": int, "queries": int, "seed": int},
    "scores": {name.format(score): float for score in SCORES for name in _FIGURES},
    "flags": {},
    "gates": (None, {**dict.fromkeys((f.name for f in fields(Gates)), float), "passed": {}}),
}


def write_entry(study: RobustnessStudy, subject: Subject, figures: Mapping[str, float]) -> None:
    """Store the entry of one method in its child run: ``entry.json`` and the images.

    figures : name -> value of what is stored as ``scores``, beside those that the images alone tell.
    """
    table, arrays = subject.table, _arrays(subject)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    subject.child.save_bytes(IMAGES, buffer.getvalue())
    own = figures_of({name: table[f"repeats/{name}"][:, 0] for name in SCORES}, study.settings.seed)
    scores = {k: v for k, v in (dict(figures) | own).items() if np.isfinite(v)}
    entry = {
        "version": VERSION,
        **_what(study, subject),
        "input": list(arrays["original"].shape[1:]),
        "images": {
            "file": IMAGES,
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "count": len(arrays["original"]),
            "originals_sha256": digest(arrays["original"]),
        },
        "attack": _attack(study, subject),
        "scores": scores,
        "thresholds": TAU,
        "members": _means(table),
        "checked": _means(subject.checks) if subject.checks else {},
        "curve": {f"{size:g}": float(values.mean()) for size, values in subject.curve.items()},
        "certificate": _certificate(subject, study.settings) if subject.sides else None,
        "flags": subject.flags,
        "gates": asdict(subject.gates) | {"passed": subject.gates.passed} if subject.gates else None,
        "environment": environment() | {"hardware": device_name(study.device)},
    }
    subject.child.save_text(ENTRY, json.dumps(entry, indent=1) + "\n")


def _arrays(subject: Subject) -> dict[str, np.ndarray]:
    """What the file of images holds."""
    table, numbers = subject.table, subject.table["pair"]
    arrays = {
        "original": subject.final(numbers, "images"),
        "target": table["target"],
        "name": table["original"],
    }
    arrays |= {name: subject.final(numbers, f"image/{name}") for name in SCORES}
    return arrays | {f"score/{name}": subject.final(numbers, f"repeats/{name}")[:, 0] for name in SCORES}


def _what(study: RobustnessStudy, subject: Subject) -> dict[str, Any]:
    """What was attacked."""
    method, start = study.variants[subject.name]
    s = study.settings
    return {
        "method": method,
        "start": start,
        "options": options_of(subject.explainer),
        "passes": METHODS[plain].passes if (plain := plain_name(method)) in METHODS else "-",
        "model": s.model,
        "data": s.source,
        "weights_sha256": study.weights_sha256[0].rpartition(":")[2],
        "preprocessing": asdict(preprocessing_for(s, s.model)),
    }


def _attack(study: RobustnessStudy, subject: Subject) -> dict[str, Any]:
    """What attacked it."""
    s, ensemble, best = study.settings, subject.experiment.ensemble, subject.experiment.probe.best
    return {
        "ensemble": "standard",
        "track": "black box" if best is None else "white box",
        "members": [LETTERS[m] for m in LETTERS if f"member/{m}/pcc" in subject.table],
        "mode": s.mode,
        "norm": s.norm,
        "budget": asdict(ensemble.budget),
        "iterations": ensemble.how.steps,
        "queries": ensemble.how.queries,
        "surrogate": str(best),
        "seed": s.seed,
        "seeds": s.seeds,
    }


def _means(table: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean scores by member."""
    ran = [m for m in LETTERS if f"member/{m}/pcc" in table]
    return {m: {k: float(table[f"member/{m}/{k}"].mean()) for k in SCORES} for m in ran}


def _certificate(subject: Subject, settings: RobustnessSettings) -> dict[str, Any]:
    """Both sides for the smoothed map."""
    assert subject.sides is not None
    means = {
        name: values.mean(0).tolist() if values.ndim == 2 else values.tolist()
        for name, values in vars(subject.sides).items()
    }
    return means | {
        "sigma": settings.sigma,
        "draws": settings.certify,
        "images": len(subject.sides.attacked),
    }


def read_entry(file: Path) -> dict[str, Any]:
    """The entry in a JSON file. Raises BadEntry where it cannot be read, is not of the form of one or is of another
    version."""
    try:
        if not file.is_file():
            raise ValueError("there is no such file")  # a pipe would never end
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadEntry(
            f"{file} cannot be read as an entry ({first_line(error)}); expected the entry.json of a run"
        ) from None
    if isinstance(entry, dict) and (version := entry.get("version", VERSION)) != VERSION:
        raise BadEntry(f"{file} is of version {version!r:.20}, but this program reads version {VERSION}")
    if wrong := [*_misfits(entry, FORM), *_unprintable(entry)]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadEntry(f"{file} is no entry: {', '.join(wrong[:3])}{more}; expected the entry.json of a run")
    return dict(entry)


def _misfits(found: Any, form: Any, name: str = "it") -> Iterator[str]:
    """What of a JSON value is not as ``form`` says."""
    if isinstance(form, tuple):
        if found is not None:
            yield from _misfits(found, form[1], name)
    elif isinstance(form, dict):
        if not isinstance(found, dict):
            yield f"{name} is no table"
            return
        for key, inner in form.items():
            if key not in found:
                yield f"{key} is missing"
            else:
                yield from _misfits(found[key], inner, key)
    elif form is float or form is int:
        kinds = (int, float) if form is float else (int,)
        number = isinstance(found, kinds) and not isinstance(found, bool)
        if not number or abs(found) > _LARGEST:  # NaN stands for what could not be measured
            yield f"{name} is no {'number' if form is float else 'whole number'}"
    elif not isinstance(found, form):
        yield f"{name} is no {'text' if form is str else 'list'}"


def _unprintable(found: Any) -> Iterator[str]:
    """Texts that would forge what is printed: with line ends or other control characters, or endless."""
    texts = [found] if isinstance(found, str) else []
    if isinstance(found, dict):
        texts, found = list(found), list(found.values())
    if isinstance(found, list):
        for inner in found:
            yield from _unprintable(inner)
    for text in texts:
        if not text.isprintable() or len(text) > _LONGEST:
            yield f"{text!r:.20} is no text of one line"


def figures_of(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    """What the scores of the images alone tell: mean, interval and rate by name, ``worst_pcc``, ``worst_pcc_low``,
    ``rer_pcc``...

    scores : score -> (N,), of the first repeat. seed : of the bootstrap intervals.
    """
    found: dict[str, float] = {}
    for name, values in scores.items():
        s = summarise(values, seed)
        found |= {f"worst_{name}": s.mean, f"worst_{name}_low": s.low, f"worst_{name}_high": s.high}
        found[f"rer_{name}"] = float(explanation_rate(values, name).mean())
    return found


def digest(levels: np.ndarray) -> str:
    """SHA-256 of an array's bytes, in hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest()
