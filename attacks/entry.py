"""Entries: a robustness figure that somebody else can check.

An entry is a JSON file and, beside it, the adversarial images as 8-bit arrays. ``verify`` needs these two and the
network: it recomputes hashes, bounds, classes, maps and scores from the images alone, and says what does not agree.
Entries on the same network, images and budget make a ``leaderboard``.

Example
-------
>>> problems = verify(Path("entry.json"))            # [] = everything agrees
>>> print(leaderboard([Path("a.json"), Path("b.json")]).markdown)
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attacks.budget import Budget
from attacks.ensemble import LETTERS
from attacks.experiment import attack_explainer
from attacks.robustness_experiment import images_of
from attacks.scores import SCORES, similarity
from attacks.statistics import explanation_rate
from attacks.thresholds import TAU
from srd_lab.backprop import normalisation_scale
from srd_lab.environment import device_name, environment
from srd_lab.metrics.summary import summarise
from srd_lab.models import load_model, weights_file
from srd_lab.options import options_of
from srd_lab.runtime import Batcher, full_precision, pick_device
from srd_lab.types import SrdLabError

if TYPE_CHECKING:
    from attacks.robustness_study import RobustnessStudy, Subject

VERSION = 1
IMAGES = "adversarial.npz"
USED = 0.75  # of the budget, by some image: else a larger one is claimed than was used
AGREES = 2e-3  # scores of float32 maps on other hardware
NEEDED = (
    "version",
    "method",
    "start",
    "model",
    "data",
    "weights_sha256",
    "images",
    "attack",
    "scores",
    "flags",
)


def write_entry(study: RobustnessStudy, subject: Subject, figures: Mapping[str, float]) -> None:
    """Store the entry of one method: ``entry.json`` and the images."""
    table, numbers = subject.table, subject.table["pair"]
    figures = dict(figures) | _figures(
        {name: table[f"repeats/{name}"][:, 0] for name in SCORES}, study.settings["seed"]
    )
    arrays = {
        "original": subject.final(numbers, "images"),
        "target": table["target"],
        "name": table["original"],
    }
    arrays |= {name: subject.final(numbers, f"image/{name}") for name in SCORES}
    arrays |= {f"score/{name}": subject.final(numbers, f"repeats/{name}")[:, 0] for name in SCORES}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    subject.child.save_bytes(IMAGES, buffer.getvalue())
    method, start = study.variants[subject.name]
    s, ensemble = study.settings, study.ensemble
    entry = {
        "version": VERSION,
        "method": method,
        "start": start,
        "options": options_of(subject.explainer),
        "model": s["model"],
        "data": s["data"].partition(":")[0],
        "weights_sha256": s["weights_sha256"][0].rpartition(":")[2],
        "input": list(arrays["original"].shape[1:]),
        "images": {
            "file": IMAGES,
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "count": len(numbers),
            "originals_sha256": _digest(arrays["original"]),
        },
        "attack": {
            "ensemble": "standard",
            "members": [LETTERS[m] for m in study.members if f"member/{m}/pcc" in table],
            "mode": s["mode"],
            "norm": s["norm"],
            "budget": asdict(ensemble.budget),
            "iterations": ensemble.how.steps,
            "queries": ensemble.how.queries,
            "surrogate": str(subject.experiment.probe.best),
            "seed": s["seed"],
            "seeds": s["seeds"],
        },
        "scores": {k: v for k, v in figures.items() if np.isfinite(v)},
        "thresholds": TAU,
        "members": {
            m: {k: float(table[f"member/{m}/{k}"].mean()) for k in SCORES}
            for m in LETTERS
            if f"member/{m}/pcc" in table
        },
        "flags": subject.flags,
        "gates": asdict(subject.gates) | {"passed": subject.gates.passed} if subject.gates else None,
        "environment": environment() | {"hardware": device_name(study.device)},
    }
    subject.child.save_text("entry.json", json.dumps(entry, indent=1) + "\n")


def read_entry(file: Path) -> dict[str, Any]:
    """The entry in a JSON file; SrdLabError where it is none."""
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SrdLabError(
            f"{file} cannot be read as an entry ({error}); expected the entry.json of a run"
        ) from None
    missing = [name for name in NEEDED if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise SrdLabError(
            f"{file} is no entry: {', '.join(missing)} missing; expected the entry.json of a run"
        )
    if entry["version"] != VERSION:
        raise SrdLabError(
            f"{file} is of version {entry['version']}, but this program reads version {VERSION}"
        )
    return entry


def _figures(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    """What the images alone tell: of the first repeat."""
    found: dict[str, float] = {}
    for name, values in scores.items():
        s = summarise(values, seed)
        found |= {f"worst_{name}": s.mean, f"worst_{name}_low": s.low, f"worst_{name}_high": s.high}
        found[f"rer_{name}"] = float(explanation_rate(values, name).mean())
    return found


def verify(file: Path, weights: Path | None = None, device: str | None = None) -> list[str]:
    """What does not agree, each in one line; empty where everything does.

    weights : of the entry's network; None = those that ``load_model`` takes by itself.
    """
    full_precision()
    entry = read_entry(file)
    try:
        return _verified(file, entry, weights, device)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SrdLabError(
            f"{file} is no whole entry ({type(error).__name__}: {error}); expected the entry.json of a run"
        ) from None


def _verified(file: Path, entry: dict[str, Any], weights: Path | None, device: str | None) -> list[str]:
    arrays, problems = _images(file, entry)
    if problems:
        return problems
    given = weights_file(entry["model"], entry["data"], weights)
    with given.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry["weights_sha256"]:
            raise SrdLabError(
                f"{given} does not hold the weights of this entry; give them with --weights FILE"
            )
    place = pick_device(device)
    model = load_model(entry["model"], entry["data"], weights, str(place))
    explainer = attack_explainer(entry["method"], entry["start"])
    if options_of(explainer) != entry["options"]:
        return [
            f"the options of {entry['method']} are {options_of(explainer)} here, {entry['options']} in the entry"
        ]
    side = arrays["original"].shape[-1]
    batcher = Batcher(max(1, 2 * 224 * 224 // side**2))
    parts = batcher.run(
        lambda some: _recomputed(entry, arrays, list(some), model, explainer, place),
        range(len(arrays["original"])),
    )
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _disagreements(entry, arrays, found)


def _images(file: Path, entry: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    place = file.parent / entry["images"]["file"]
    try:
        content = place.read_bytes()
    except OSError as error:
        raise SrdLabError(
            f"the images of {file} cannot be read ({error}); put {place.name} beside it"
        ) from None
    if hashlib.sha256(content).hexdigest() != entry["images"]["sha256"]:
        return {}, [f"{place.name} is not the file that the entry was made with (its SHA-256 differs)"]
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    if wrong := [n for n in ("original", *SCORES) if arrays[n].dtype != np.uint8]:
        return {}, [f"the images {wrong[0]} are not of 8 bits"]
    if _digest(arrays["original"]) != entry["images"]["originals_sha256"]:
        return {}, ["the original images are not those of the entry"]
    return arrays, []


def _recomputed(
    entry: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    some: list[int],
    model: Any,
    explainer: Any,
    place: Any,
) -> dict[str, np.ndarray]:
    """Classes, bounds and scores of some images."""
    x, target = images_of(arrays["original"][some], place), torch.from_numpy(arrays["target"][some]).to(place)
    budget, scale = Budget(**entry["attack"]["budget"]), normalisation_scale(model, x)
    map0, logits0 = explainer.explain_with_logits(model, x, target)
    found = {"class": (logits0.argmax(1) == target).cpu().numpy()}
    for name in SCORES:
        image = images_of(arrays[name][some], place)
        raw, logits = explainer.explain_with_logits(model, image, target)
        score = similarity(raw, map0, (x.shape[2], x.shape[3]))[name]
        found[f"score/{name}"] = score.cpu().numpy()
        found[f"kept/{name}"] = (logits.argmax(1) == logits0.argmax(1)).cpu().numpy()
        found[f"bound/{name}"] = budget.violation(image, x, scale).cpu().numpy()
    return found


def _disagreements(
    entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[str]:
    said = []
    if not found["class"].all():
        said.append(f"{(~found['class']).sum()} originals are not of the class that the entry explains")
    for name in SCORES:
        if lost := int((~found[f"kept/{name}"]).sum()):
            said.append(f"{name}: {lost} adversarial images have another predicted class")
        if (largest := float(found[f"bound/{name}"].max())) > 1 + 1e-4:
            said.append(f"{name}: an image leaves the budget by a factor of {largest:.4g}")
        apart = np.abs(found[f"score/{name}"] - arrays[f"score/{name}"])
        if not (apart <= AGREES).all():
            said.append(
                f"{name}: {(~(apart <= AGREES)).sum()} scores differ, by up to {np.nanmax(apart):.4f}"
            )
    told = _figures({name: arrays[f"score/{name}"] for name in SCORES}, entry["attack"]["seed"])
    for name, value in told.items():
        if np.isfinite(value) and not abs(value - entry["scores"][name]) <= 1e-6:
            said.append(
                f"{name.removeprefix('worst_')}: the images say {value:.4f}, the entry {entry['scores'][name]:.4f}"
            )
    if (count := len(arrays["original"])) != entry["images"]["count"]:
        said.append(f"there are {count} images, the entry says {entry['images']['count']}")
    if (used := max(float(found[f"bound/{name}"].max()) for name in SCORES)) < USED:
        said.append(f"no image uses more than {used:.2f} of the budget that the entry claims")
    return said


def _digest(levels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest()
