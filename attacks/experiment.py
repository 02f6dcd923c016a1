"""The robustness experiment: the same pairs of images attacked through every method, batch by batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.manipulation import (
    SCORES,
    AttackResult,
    Manipulation,
    noise_at_equal_mse,
    similarity,
)
from srd_lab.errors import BadValue
from srd_lab.methods.smoothed import parse_explainer
from srd_lab.methods.srd import STARTS
from srd_lab.normalise import normalisation_scale
from srd_lab.parts import split_options
from srd_lab.registry import EXPLAINERS, make_explainer
from srd_lab.runtime import generator
from srd_lab.types import Explainer, Sample

Arrays = dict[str, np.ndarray]


def attack_explainer(method: str, start: str) -> Explainer:
    """The explainer as the attack sees it: SRD from ``start`` (the paper: ones), any other with absolute values
    summed over channels (Dombrowski et al. 2019), as far as it has the choice.

    method : a name, or a wrapper around one, as in ``smoothed(srd,0.1,64)``.

    Raises BadValue for a name, an option or a start that is not known.

    Example
    -------
    >>> attack_explainer("gradient", "ones").channels, attack_explainer("srd", "ones").start
    ('abs_sum', 'ones')
    """

    if start not in STARTS:
        raise BadValue(f"the start {start!r} is not known; expected one of {', '.join(STARTS)}")

    def make(name: str) -> Explainer:
        plain, typed = split_options(name)
        default: Any = EXPLAINERS.get(plain)
        known = {field.name for field in fields(default)} - set(typed) if default else set()
        if typed.get("level", getattr(default, "level", "")) == "low":
            return make_explainer(name)  # at the encoder output, a start of ones would be the map
        options = (
            {"start": start} if "start" in known else {"channels": "abs_sum"} if "channels" in known else {}
        )
        return make_explainer(name, **options)

    return parse_explainer(method, make)


def attack_batch(
    how: Manipulation,
    model: nn.Module,
    numbers: list[int],
    originals: Sequence[Sample],
    goals: Sequence[Sample],
    seed: int,
    device: torch.device,
    on_step: Callable[[int], None],
) -> Arrays:
    """Attack some pairs and score them and their control; arrays whose first axis is the pair.

    how : the attack. model : on ``device``.
    numbers : of the pairs in the study; with ``seed``, they decide the control's noise.
    originals, goals : the pairs' samples, of one size. on_step : see :meth:`Manipulation.run`.

    Errors are those of :meth:`Manipulation.run`.
    """
    x, goal_images = (torch.stack([s.image for s in some]).to(device) for some in (originals, goals))
    labels = torch.tensor([sample.label for sample in originals], device=device)
    result = how.run(model, x, goal_images, labels, on_step=on_step)
    control = control_scores(how, model, x, result, numbers, seed)
    return {
        "pair": np.array(numbers),
        "original": np.array([sample.name for sample in originals]),
        "goal": np.array([sample.name for sample in goals]),
        "label": np.array([sample.label for sample in originals]),
        "goal_label": np.array([sample.label for sample in goals]),
        "images": x.cpu().numpy(),
        "goal_images": goal_images.cpu().numpy(),
        **result_arrays(result),
        **{f"{name}_noise": score.cpu().numpy() for name, score in control.items()},
    }


def control_scores(
    how: Manipulation, model: nn.Module, x: Tensor, result: AttackResult, numbers: list[int], seed: int
) -> dict[str, Tensor]:
    """The scores (N,) by name for random noise that changes the images x (N, C, H, W) as much as the attack did (equal
    MSE).

    numbers : of the pairs; with ``seed``, they decide the noise. result : of the attack ``how``.
    """
    scale = normalisation_scale(model, x)
    noise = torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, "noise", n), dtype=torch.float32)
            for n in numbers
        ]
    ).to(x)
    noisy = noise_at_equal_mse(x, result.mse, scale, how.budget, noise)
    raw, _ = how.explainer.explain_with_logits(model, noisy, result.target)
    return similarity(raw, result.map_original, result.map_target, (x.shape[2], x.shape[3]))


def result_arrays(result: AttackResult) -> Arrays:
    """An attack's result as flat arrays: fields by name, scores as ``ssim``, ``ssim_best``, ``ssim_before`` and
    ``ssim_surrogate``, curves under ``curve/``."""
    arrays: Arrays = {}
    for field in fields(result):
        value: Any = getattr(result, field.name)
        if isinstance(value, Tensor):
            arrays[field.name] = value.detach().cpu().numpy()
            continue
        prefix, suffix = {
            "scores": ("", ""),
            "scores_best": ("", "_best"),
            "scores_start": ("", "_before"),
            "scores_surrogate": ("", "_surrogate"),
        }.get(field.name, ("curve/", ""))
        arrays.update({f"{prefix}{name}{suffix}": t.detach().cpu().numpy() for name, t in value.items()})
    return arrays


COLUMNS = (
    "pair",
    "original",
    "goal",
    "label",
    "goal_label",
    *SCORES,
    *(f"{name}_noise" for name in SCORES),
    *(f"{name}_before" for name in SCORES[2:]),
    *(f"{name}_best" for name in SCORES),
    *(f"{name}_surrogate" for name in SCORES[:2]),
    "prediction_kept",
    "mse",
    "mse_best",
    "linf",
    "steps",
    "beta",
    "diverged",
)


def rows(table: Arrays) -> list[dict[str, Any]]:
    """One row per pair, the columns ``COLUMNS``, for the table of the run."""
    return [{name: table[name][i].item() for name in COLUMNS} for i in range(len(table["pair"]))]


def scores_at(table: Arrays, score: str, reached: np.ndarray, over: str = "mse") -> np.ndarray:
    """``score`` (``ssim`` or ``pcc``) of every pair at the moment when its perturbation first reached given values.

    reached : (S,) for all pairs or (P, S), in the units of ``over``: ``mse`` (normalised) or ``linf`` (0..255).
    Between two looks at a pair both go straight, from (0, 1) on; NaN where it never came so far, and beside a look
    that has no score. Returns (P, S).
    """
    moved, values = table[f"curve/{over}"], table[f"curve/{score}"]
    wanted = np.broadcast_to(reached, (len(moved), np.shape(reached)[-1]))
    lines = np.empty(wanted.shape)
    for i in range(len(moved)):
        there = np.isfinite(moved[i])
        xs, ys = np.r_[-1, 0, moved[i][there], np.inf], np.r_[1, 1, values[i][there], np.nan]
        first = np.searchsorted(np.maximum.accumulate(xs), wanted[i])  # Adam also comes back
        first = np.minimum(first, len(xs) - 1)  # where what is wanted is NaN
        share = (wanted[i] - xs[first - 1]) / (xs[first] - xs[first - 1])
        between = (1 - share) * ys[first - 1] + share * ys[first]
        lines[i] = np.where(share == 1, ys[first], between)  # on a look, nothing counts of the one before
    return lines


def common_reach(tables: Mapping[str, Arrays], over: str = "mse") -> np.ndarray:
    """The largest perturbation (P,) that every method reached on a pair, in the units of ``over`` (see :func:`scores_at`);
    NaN where one was never looked at."""
    return np.min([np.fmax.reduce(table[f"curve/{over}"], axis=1) for table in tables.values()], axis=0)


def at_equal_perturbation(
    tables: Mapping[str, Arrays], score: str, over: str = "mse"
) -> dict[str, np.ndarray]:
    """``score`` (P,) of every method, each pair at its :func:`common_reach`: the same images, equally far away.

    A pair that lacks a score with one method is NaN with all.
    """
    reach = common_reach(tables, over)[:, None]
    found = {name: scores_at(table, score, reach, over)[:, 0] for name, table in tables.items()}
    complete = np.isfinite(list(found.values())).all(0)
    return {name: np.where(complete, scores, np.nan) for name, scores in found.items()}


@dataclass(frozen=True)
class PerturbationCurves:
    """Scores as a function of the perturbation reached.

    over : ``mse`` (normalised) or ``linf`` (0..255).
    reached : (S,) in the units of ``over``; pairs : (S,) how many pairs count there.
    bands : score -> method -> (median, lower quartile, upper quartile), each (S,).
    """

    over: str
    reached: np.ndarray
    pairs: np.ndarray
    bands: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]


def perturbation_curves(tables: Mapping[str, Arrays], over: str, points: int = 25) -> PerturbationCurves:
    """SSIM and PCC; at each point of the pairs that *every* method brought so far and that have both scores with all
    of them, so that all lines stand for the same pairs.

    tables : method -> arrays over the pairs. over : ``mse`` or ``linf``. points : S, on an even grid from 0.

    Fewer pairs count to the right; the curves end where less than a quarter of them is left.
    """
    reach = common_reach(tables, over)
    seen = reach[np.isfinite(reach)]
    grid = np.linspace(0, np.quantile(seen, 0.75, method="lower") if len(seen) else 0, points)
    lines = {s: {m: scores_at(table, s, grid, over) for m, table in tables.items()} for s in SCORES[:2]}
    complete = np.isfinite([each for methods in lines.values() for each in methods.values()]).all(0)
    inside = (grid <= reach[:, None]) & complete

    def band(line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a point without pairs is NaN
            low, median, high = np.nanquantile(np.where(inside, line, np.nan), (0.25, 0.5, 0.75), axis=0)
        return median, low, high

    bands = {score: {m: band(line) for m, line in methods.items()} for score, methods in lines.items()}
    return PerturbationCurves(over, grid, inside.sum(0), bands)
