"""Does an entry tell the truth? Recomputed from its images alone: hashes, bounds, classes, maps, scores and gates.

What needs the attack itself (flags, the curve over the budget, the scores of single members) is taken as the entry says it.

Example
-------
::

    verify(Path("entry.json"))        # [] = everything agrees
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attacks.budget import Budget
from attacks.entry import digest, figures_of, read_entry
from attacks.experiment import attack_explainer
from attacks.gates import GATED, Gates, check_gates
from attacks.robustness_experiment import images_of
from attacks.scores import SCORES, similarity
from srd_lab.errors import BadEntry, BadWeights
from srd_lab.methods.smoothed import plain_name
from srd_lab.models import load_model, weights_digest
from srd_lab.normalise import normalisation_scale
from srd_lab.parts import LIBRARIES, is_own
from srd_lab.runs.settings import options_of
from srd_lab.runtime import Batcher, full_precision, pick_device
from srd_lab.types import Preprocessing

USED = 0.75  # of the budget, by some image: else a larger one is claimed than was used
AGREES = 2e-3  # scores of float32 maps on other hardware
# insertion and deletion exchange pixels in the order of the map: equal ones may change places
GATES_AGREE = 2e-2


def verify(
    file: Path, weights: Path | None = None, device: str | None = None, *, run_code: bool = False
) -> list[str]:
    """What does not agree, each in one line; empty where everything does.

    file : the ``entry.json``, with its images beside it.
    weights : of the entry's network; None = those that ``load_model`` takes by itself.
    run_code : whether code that the entry names, as its network or its method, may be run.
    device : None or "auto" takes an accelerator where there is one.

    Raises BadEntry where the entry or its images cannot be read or lack something, BadWeights for weights that are not
    those of the entry, and the errors of :func:`srd_lab.models.load_model`.
    """
    full_precision()
    entry = read_entry(file)
    try:
        if not run_code:
            _refuse_code(entry["model"], entry["method"])
        return _verified(file, entry, weights, device)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadEntry(
            f"{file} is no whole entry ({type(error).__name__}: {error}); expected the entry.json of a run"
        ) from None


def _refuse_code(model: str, method: str) -> None:
    """Refuse (BadEntry) to run what a stranger's entry names; libraries that are installed here may be named."""
    for name in (model, plain_name(method)):
        if is_own(name) and name.partition(":")[0] not in LIBRARIES:
            raise BadEntry(
                f"the entry names code, {name}, which is not run for an entry's sake; read it, then give --run-code"
            )


def _verified(file: Path, entry: dict[str, Any], weights: Path | None, device: str | None) -> list[str]:
    arrays, problems = _images(file, entry)
    if problems:
        return problems
    if weights_digest(entry["model"], entry["data"], weights) != entry["weights_sha256"]:
        given = weights or f"what {entry['model']} comes with"
        raise BadWeights(f"{given} does not hold the weights of this entry; give them with --weights FILE")
    place = pick_device(device)
    # an entry of an earlier version has no preprocessing: it is the network's own
    wants = Preprocessing.from_dict(entry["preprocessing"]) if "preprocessing" in entry else None
    model = load_model(entry["model"], entry["data"], weights, str(place), wants)
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
    said = _disagreements(entry, arrays, found)
    if entry["gates"] is None:
        return said
    x, names = images_of(arrays["original"][:GATED], place), arrays["name"][:GATED].tolist()
    return said + _other_gates(
        entry["gates"], check_gates(explainer, model, x, names, entry["attack"]["seed"], batcher)
    )


def _images(file: Path, entry: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    name = entry["images"]["file"]
    place = file.parent / name
    if Path(name).name != name or not place.is_file():
        raise BadEntry(f"the images of {file} are not there; put {Path(name).name} beside it")
    try:
        content = place.read_bytes()
    except OSError as error:
        raise BadEntry(f"the images of {file} cannot be read ({error}); put {name} beside it") from None
    if hashlib.sha256(content).hexdigest() != entry["images"]["sha256"]:
        return {}, [f"{place.name} is not the file that the entry was made with (its SHA-256 differs)"]
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    if wrong := [n for n in ("original", *SCORES) if arrays[n].dtype != np.uint8]:
        return {}, [f"the images {wrong[0]} are not of 8 bits"]
    if digest(arrays["original"]) != entry["images"]["originals_sha256"]:
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


def _other_gates(stored: Mapping[str, Any], found: Gates) -> list[str]:
    """What the gates measure here, where the entry says something else."""
    told = asdict(found)
    said = [
        f"gate {name}: {value:.4f} here, {stored[name]:.4f} in the entry"
        for name, value in told.items()
        if not np.isclose(value, stored[name], rtol=0, atol=GATES_AGREE, equal_nan=True)
    ]
    verdicts = Gates(**{name: stored[name] for name in told}).passed
    if stored["passed"] != verdicts:
        said.append("the verdicts of the gates do not follow from what was measured")
    return said


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
    told = figures_of({name: arrays[f"score/{name}"] for name in SCORES}, entry["attack"]["seed"])
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
