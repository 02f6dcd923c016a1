"""The robustness experiment: the same pairs of images attacked through every method, batch by batch."""

from __future__ import annotations

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
from srd_lab.backprop import normalisation_scale
from srd_lab.data import Loaded, load_batches
from srd_lab.registry import EXPLAINERS, make_explainer
from srd_lab.runtime import generator
from srd_lab.types import Dataset, Explainer, SrdLabError

Arrays = dict[str, np.ndarray]
SCREENED_AT_ONCE = 16


@dataclass(frozen=True)
class Pair:
    """An image to attack and the image whose explanation it shall take on, as indices of the data set."""

    original: int
    goal: int


def draw_pairs(
    dataset: Dataset,
    model: nn.Module,
    count: int,
    seed: int,
    device: torch.device,
    workers: int | None = None,
) -> tuple[list[Pair], dict[str, str]]:
    """``count`` random pairs of correctly classified images of different classes; no image is used twice.

    Fixed by the seed, the data and the model alone. Also the files met that could not be read, name -> reason.
    Raises SrdLabError if the data cannot give so many.
    """
    order = torch.randperm(len(dataset), generator=generator(seed, "pairs")).tolist()
    waiting: list[int] = []
    pairs: list[Pair] = []
    skipped: dict[str, str] = {}
    parts = (order[first : first + SCREENED_AT_ONCE] for first in range(0, len(order), SCREENED_AT_ONCE))
    for loaded in load_batches(dataset, parts, workers or 0):
        skipped |= loaded.skipped
        for index in _correct(loaded, model, device):
            partner = next((i for i in waiting if dataset.labels[i] != dataset.labels[index]), None)
            if partner is None:
                waiting.append(index)
                continue
            waiting.remove(partner)
            pairs.append(Pair(partner, index))
            if len(pairs) == count:
                return pairs, skipped
    raise SrdLabError(
        f"{count} pairs were asked for, but the {len(dataset)} images give only {len(pairs)} pairs of correctly "
        "classified images of different classes; ask for fewer with --pairs"
    )


def _correct(loaded: Loaded, model: nn.Module, device: torch.device) -> list[int]:
    if not loaded.samples:
        return []
    images = torch.stack([sample.image for sample in loaded.samples])
    labels = torch.tensor([sample.label for sample in loaded.samples])
    with torch.no_grad():
        right = model(images.to(device)).argmax(1).cpu() == labels
    return [index for index, hit in zip(loaded.indices, right.tolist(), strict=True) if hit]


def attack_explainer(method: str, start: str) -> Explainer:
    """The explainer as the attack sees it: SRD from ``start`` (the paper: ones), any other with absolute values
    summed over channels (Dombrowski et al. 2019), as far as it has the choice."""
    default: Any = EXPLAINERS[method]
    known = {field.name for field in fields(default)}
    if getattr(default, "level", "") == "low":
        return make_explainer(method)  # at the encoder output, a start of ones would be the map
    options = {"start": start} if "start" in known else {"channels": "abs_sum"} if "channels" in known else {}
    return make_explainer(method, **options)


def attack_batch(
    how: Manipulation,
    model: nn.Module,
    dataset: Dataset,
    numbered: Sequence[tuple[int, Pair]],
    seed: int,
    device: torch.device,
    on_step: Callable[[int], None],
) -> Arrays:
    """Attack some pairs, each with its number, and score them and their control; arrays whose first axis is the pair."""
    originals = [dataset[pair.original] for _, pair in numbered]
    goals = [dataset[pair.goal] for _, pair in numbered]
    x, goal_images = (torch.stack([s.image for s in some]).to(device) for some in (originals, goals))
    labels = torch.tensor([sample.label for sample in originals], device=device)
    result = how.run(model, x, goal_images, labels, on_step=on_step)
    control = control_scores(how, model, x, result, [number for number, _ in numbered], seed)
    arrays = {
        "pair": np.array([number for number, _ in numbered]),
        "original": np.array([sample.name for sample in originals]),
        "goal": np.array([sample.name for sample in goals]),
        "label": np.array([sample.label for sample in originals]),
        "goal_label": np.array([sample.label for sample in goals]),
        "images": x.cpu().numpy(),
        "goal_images": goal_images.cpu().numpy(),
        **result_arrays(result),
        **{f"{name}_noise": score.cpu().numpy() for name, score in control.items()},
    }
    return arrays


def control_scores(
    how: Manipulation, model: nn.Module, x: Tensor, result: AttackResult, numbers: list[int], seed: int
) -> dict[str, Tensor]:
    """The same scores for random noise that changes the image as much as the attack did (equal MSE), seeded per pair."""
    scale = normalisation_scale(model, x)
    noise = torch.stack(
        [torch.randn(x.shape[1:], generator=generator(seed, "noise", n)) for n in numbers]
    ).to(x)
    noisy = noise_at_equal_mse(x, result.mse, scale, how.budget, noise)
    raw = how.explainer.explain(model, noisy, result.target)
    return similarity(raw, result.map_original, result.map_target)


def result_arrays(result: AttackResult) -> Arrays:
    """An attack's result as flat arrays: scores by name, curves under ``curve/``."""
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
)


def gather(batches: list[Arrays]) -> Arrays:
    """The arrays of all batches, in the order of the pairs; curves of different lengths are filled up with NaN."""
    order = np.argsort(np.concatenate([b["pair"] for b in batches]), kind="stable")
    return {name: _stack([b[name] for b in batches])[order] for name in batches[0]}


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].ndim != 2:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts]
    )


def rows(table: Arrays) -> list[dict[str, Any]]:
    """One row per pair, for the table of the run."""
    return [{name: table[name][i].item() for name in COLUMNS} for i in range(len(table["pair"]))]


def scores_at(table: Arrays, score: str, reached: np.ndarray, over: str = "mse") -> np.ndarray:
    """``score`` (``ssim`` or ``pcc``) of every pair at the moment when its perturbation first reached given values.

    reached : (S,) for all pairs or (P, S), in the units of ``over``: ``mse`` (normalised) or ``linf`` (0..255).
    Between two looks at a pair both go straight, from (0, 1) on; NaN where it never came so far. Returns (P, S).
    """
    moved, values = table[f"curve/{over}"], table[f"curve/{score}"]
    wanted = np.broadcast_to(reached, (len(moved), np.shape(reached)[-1]))
    lines = np.empty(wanted.shape)
    for i in range(len(moved)):
        there = np.isfinite(moved[i])
        xs, ys = np.r_[-1, 0, moved[i][there], np.inf], np.r_[1, 1, values[i][there], np.nan]
        first = np.searchsorted(np.maximum.accumulate(xs), wanted[i])  # Adam also comes back
        share = (wanted[i] - xs[first - 1]) / (xs[first] - xs[first - 1])
        lines[i] = (1 - share) * ys[first - 1] + share * ys[first]
    return lines


def common_reach(tables: Mapping[str, Arrays], over: str = "mse") -> np.ndarray:
    """The largest perturbation (P,) that every method reached on a pair."""
    return np.min([np.nanmax(table[f"curve/{over}"], axis=1) for table in tables.values()], axis=0)


def at_equal_perturbation(
    tables: Mapping[str, Arrays], score: str, over: str = "mse"
) -> dict[str, np.ndarray]:
    """``score`` (P,) of every method, each pair at its :func:`common_reach`: the same images, equally far away."""
    reach = common_reach(tables, over)[:, None]
    return {name: scores_at(table, score, reach, over)[:, 0] for name, table in tables.items()}


@dataclass(frozen=True)
class PerturbationCurves:
    """Scores as a function of the perturbation reached.

    reached : (S,) in the units of ``over``; pairs : (S,) how many pairs count there.
    bands : score -> method -> (median, lower quartile, upper quartile), each (S,).
    """

    over: str
    reached: np.ndarray
    pairs: np.ndarray
    bands: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]


def perturbation_curves(tables: Mapping[str, Arrays], over: str, points: int = 25) -> PerturbationCurves:
    """SSIM and PCC; at each point of the pairs that *every* method brought so far, so that all lines stand for the
    same pairs.

    Fewer pairs count to the right; the curves end where less than a quarter of them is left.
    """
    reach = common_reach(tables, over)
    grid = np.linspace(0, np.quantile(reach, 0.75, method="lower"), points)
    inside = grid <= reach[:, None]

    def band(table: Arrays, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lines = np.where(inside, scores_at(table, score, grid, over), np.nan)
        low, median, high = np.nanquantile(lines, (0.25, 0.5, 0.75), axis=0)
        return median, low, high

    bands = {score: {m: band(table, score) for m, table in tables.items()} for score in SCORES[:2]}
    return PerturbationCurves(over, grid, inside.sum(0), bands)
