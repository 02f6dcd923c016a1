"""Flags: reasons to doubt a robustness figure. A method with a flag is reported as unreliable, never as robust.

Each flag is a name and a sentence with what was measured. Most look at what :class:`attacks.judge.Found` noted of every
image; the others come from short extra experiments (:func:`unlimited`, the planted test, the curve over the budget).

Example
-------
::

    raised(table, probe)      # {"not_converged": "the last fifth of the iterations still gained 0.021 ..."}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.backdoor import SOFT, Backdoor, check
from attacks.budget import Budget
from attacks.ensemble import WHITE_BOX, Ensemble
from attacks.probe import Probe
from attacks.scores import SCORES
from attacks.surrogate import Surrogate
from srd_lab.errors import SrdLabError, Unavailable
from srd_lab.types import Explainer

Arrays = Mapping[str, np.ndarray]

BEATS = 0.002  # a member beats another by more than this ...
SHARE = 0.05  # ... on more than this share of the images
GAINS = 0.01
HALF = 0.5
ALIKE = 0.9
WRONG = 0.05  # of the slope: methods of the package are below .01, maps of which a part is detached above .09
MISSES = 0.1  # of the PCC that a planted change is known to reach
BROKEN = 0.3  # to which mean PCC an unlimited budget must bring a map


def raised(table: Arrays, probe: Probe, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The flags of one method: name -> what was measured.

    table : arrays over the images: ``member/NAME/SCORE``, ``control/NAME/SCORE``, ``source/METHOD/SCORE``, ``used``,
        ``stuck``, ``diverged``, ``gain``, ``constant``, ``violation``, ``kept``.
    probe : what is known of the method's gradients.
    extra : flags of the experiments that are not in the table.
    """
    found: dict[str, str] = {}
    white = [name for name in WHITE_BOX if f"member/{name}/pcc" in table]
    if probe.random:
        found["random"] = (
            "the map of one image differs from call to call; gradients were averaged, one draw was judged"
        )
    if probe.best is None:
        found["no_gradient"] = f"attacked by the black box alone: {probe.why}"
    elif not probe.likeness >= ALIKE:
        found["surrogate_differs"] = (
            f"the map on the surrogate ({probe.best}) is not the network's (PCC {probe.likeness:.3f})"
        )
    if error := wrong_gradient(probe):
        found["wrong_gradient"] = error
    if probe.unchecked:
        found["unchecked_gradient"] = (
            f"whether the map's gradient is its slope cannot be told: {probe.unchecked}"
        )
    if white:
        found |= _of_white_box(table, white)
    if (constant := float(table["constant"].mean())) > 0:
        found["degenerate"] = f"the map is constant or not finite for {constant:.0%} of the images"
    if (largest := float(table["violation"].max())) > 1 + 1e-4 or not table["kept"].all():
        found["violated"] = (
            f"an adversarial image leaves the budget (by a factor of {largest:.4g}) or the predicted class"
        )
    for name, why in (extra or {}).items():
        found[name] = f"{found[name]}; {why}" if name in found else why
    return found


def wrong_gradient(probe: Probe) -> str:
    """What to say where the gradient of the map is not its slope; empty where it is, or that cannot be told."""
    if probe.slope_error is None or probe.slope_error < WRONG:
        return ""
    return (
        f"the gradient of the map is not its slope (off by {probe.slope_error:.0%}): a part of the map is detached, and a "
        "gradient attack is blind to it"
    )


def _of_white_box(table: Arrays, white: list[str]) -> dict[str, str]:
    found = {}
    own = {score: np.min([table[f"member/{m}/{score}"] for m in white], axis=0) for score in SCORES}
    if (stuck := float((table["stuck"] >= HALF).mean())) > 0:
        found["zero_gradient"] = f"no gradient in at least half of the steps of {stuck:.0%} of the images"
    if (unused := float((table["used"] < HALF).mean())) > 0:
        found["unused_budget"] = f"{unused:.0%} of the images ended below half of the budget"
    if (diverged := float(table["diverged"].mean())) > 0:
        found["diverged"] = f"the gradient was not finite for {diverged:.0%} of the images"
    gains = table["gain"][np.isfinite(table["gain"])]
    if len(gains) and (gain := float(gains.mean())) > GAINS:
        found["not_converged"] = f"the last fifth of the iterations still gained {gain:.3f} on average"
    if "member/transfer/pcc" in table and (lower := _gain(table, "transfer", own))[0] > GAINS:
        together = f"the other methods' images together lower {lower[1]} by {lower[0]:.3f}"
        found["not_converged"] = "; ".join(filter(None, (found.get("not_converged"), together)))
    beaten = {name: _beats(table, name, own) for name in ("black_box", "noise")}
    said = [f"{name} by more than {BEATS} on {where}" for name, where in beaten.items() if where]
    said += _stronger_source(table, own)
    if said:
        found["masked"] = f"the gradient attacks are beaten by {' and by '.join(said)}"
    if where := _beats(table, "one_step", own):
        found["one_step"] = f"one step beats many by more than {BEATS} on {where}"
    return found


def _stronger_source(table: Arrays, own: Mapping[str, np.ndarray]) -> list[str]:
    """Which other method's images alone are on average stronger than all that the own gradients found, and by how much.

    The methods are compared one by one: the images of N others together are N more restarts, and win by that alone.
    """
    names = {key.removeprefix("source/").rpartition("/")[0] for key in table if key.startswith("source/")}
    lower = {
        (name, s): float((own[s] - table[f"source/{name}/{s}"]).mean())
        for name in sorted(names)
        for s in SCORES[:3]
    }
    if not lower or lower[most := max(lower, key=lambda pair: lower[pair])] <= GAINS:
        return []
    return [f"the images made for {most[0]} by {lower[most]:.3f} on average ({most[1]})"]


def checked(table: Arrays, members: Sequence[str]) -> dict[str, str]:
    """The flags from members that only some images were attacked by: do they go lower than what counts, ``worst/SCORE``?

    table : arrays over these images, with ``member/NAME/SCORE`` for ``members`` too.
    """
    own = {score: table[f"worst/{score}"] for score in SCORES}
    found = {}
    if where := _beats(table, "black_box", own):
        found["masked"] = (
            f"what counts is beaten by black_box by more than {BEATS} on {where} that were checked"
        )
    for name in members:
        gain, score = _gain(table, name, own)
        if name != "black_box" and gain > GAINS:
            found["left_out"] = (
                f"{name} lowers {score} by {gain:.3f} on the {len(own[score])} images that were checked; "
                "full mode counts it"
            )
    return found


def _gain(table: Arrays, name: str, own: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """By how much a member lowers a mean score below ``own``, where it lowers one most, and which score that is."""
    gains = {s: float((own[s] - table[f"member/{name}/{s}"]).clip(0).mean()) for s in SCORES[:3]}
    score = max(gains, key=lambda s: gains[s])
    return gains[score], score


def _beats(table: Arrays, name: str, own: Mapping[str, np.ndarray]) -> str:
    """On which share of the images, by which score, the member ``name`` goes lower than ``own``; empty where on few, or on a
    single one."""
    kind = "control" if f"control/{name}/pcc" in table else "member"
    if f"{kind}/{name}/pcc" not in table:
        return ""
    counts = {s: int((table[f"{kind}/{name}/{s}"] < own[s] - BEATS).sum()) for s in SCORES}
    worst = max(counts, key=lambda s: counts[s])
    share = counts[worst] / len(own[worst])
    return f"{share:.0%} of the images ({worst})" if counts[worst] > 1 and share > SHARE else ""


def unlimited(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    surrogate: Surrogate,
    target: Tensor | None = None,
    steps: int = 40,
) -> dict[str, str]:
    """The flag of a method whose maps an attack without any bound but the pixel range does not break; none where it does.

    x : images (N, C, H, W) in [0, 1]. surrogate : what is differentiated.
    target : (N,) the class that is explained, None = predicted. steps : of the attack.

    Errors are those of :meth:`Attack.run`.
    """
    attack = Attack(explainer, budget=Budget(linf=255.0), surrogate=surrogate, steps=steps)
    left = float(attack.run(model, x, target).worst["pcc"].mean())
    if left <= BROKEN:
        return {}
    return {
        "unlimited": f"an unlimited budget leaves a mean PCC of {left:.3f}, above {BROKEN}: the attack fails here"
    }


def planted_missed(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    clean: Tensor,
    surrogate: Surrogate,
    budget: Budget,
    seed: int = 0,
) -> dict[str, str]:
    """The flag of an attack that overlooks what is known to be there: a copy of the network in which a known trigger within
    the budget moves the maps (:mod:`attacks.backdoor`) must be broken as far, by images x (N, C, H, W) on average.

    clean : more images (M, C, H, W), on which the backdoor stays shut.
    surrogate : what the attack differentiates. budget : of trigger and attack. seed : decides both.

    Where no backdoor can be planted, the flag ``not_planted`` says why.
    """
    try:
        planted = Backdoor(explainer, budget, softness=SOFT, seed=seed).plant(model, x, clean=clean)
    except Unavailable:  # memory says nothing of the method
        raise
    except SrdLabError as error:
        return {"not_planted": f"the planted test could not be made: {error}"}
    known = check(planted, explainer, x)
    members = ("dissimilarity", "combined")
    found = Ensemble(members, "quick", budget, seed).run(planted.model, explainer, x, surrogate=surrogate)
    if not known.kept.any():
        return {"not_planted": "the planted test could not be made: the trigger keeps no class"}
    missed = float((found.worst["pcc"] - known.pcc.to(found.worst["pcc"]))[known.kept].mean())
    if missed <= MISSES:
        return {}
    return {
        "planted": f"a planted change leaves a mean PCC of {float(known.pcc[known.kept].mean()):.3f}, the attack "
        f"{missed:.3f} more"
    }


def not_monotone(curve: Mapping[float, np.ndarray]) -> dict[str, str]:
    """The flag of a method that a larger budget moves less: budget -> lowest PCC (N,) found by a run of its own."""
    sizes = sorted(curve)
    for small, large in pairwise(sizes):
        rise = float((curve[large] - curve[small]).mean())
        if rise > GAINS:
            return {"not_monotone": f"the budget {large:g} leaves {rise:.3f} more of the map than {small:g}"}
    return {}


def constant(raw: Tensor) -> Tensor:
    """Whether each map (N, h, w) is the same everywhere or not finite, (N,) bool."""
    flat = raw.flatten(1)
    return torch.isclose(flat.amax(1), flat.amin(1), rtol=1e-6, atol=0) | ~flat.isfinite().all(1)
