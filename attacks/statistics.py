"""Statistics of robustness: rates above a threshold, paired comparisons, and what a curve over the budget comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attacks.thresholds import TAU
from srd_lab.metrics.summary import LEVEL, holm, smallest_p

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A method against the reference, by one score, on the same images.

    difference, low, high : mean of score - reference's score and its 95 % interval, over n images.
    p : two-sided, of the paired bootstrap (images drawn with repetition); p_corrected : after Holm's correction for all
        methods.
    verdict : "more robust", "less robust" or "open"; not open where the corrected p is below 0.05.
    """

    method: str
    reference: str
    score: str
    difference: float
    low: float
    high: float
    n: int
    p: float
    p_corrected: float
    verdict: str


def explanation_rate(worst: np.ndarray, score: str) -> np.ndarray:
    """Whether each image's explanation holds, (N,) bool: its worst score (N,) is at least the threshold. Its mean is the
    RER.

    score : a name in :data:`attacks.thresholds.TAU`.
    """
    return np.asarray(worst) >= TAU[score]


def paired_bootstrap(
    difference: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Ends of the 95 % interval of the mean of paired differences (N,), and the two-sided p of its being 0.

    The p is twice the smaller share of resampled means on one side of 0, counted with one added on both sides of the
    fraction (Davison & Hinkley 1997), so that it is never 0. NaN for fewer than two images.

    Example
    -------
    >>> paired_bootstrap(np.zeros(5), seed=0)
    (0.0, 0.0, 1.0)
    """
    values = np.asarray(difference, dtype=np.float64)
    if len(values) < 2:
        return np.nan, np.nan, np.nan
    if not values.any():
        return 0.0, 0.0, 1.0
    chance = np.random.default_rng(seed)
    means = values[chance.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    below, above = (1 + (means <= 0).sum()) / (resamples + 1), (1 + (means >= 0).sum()) / (resamples + 1)
    return float(low), float(high), float(min(1.0, 2 * min(below, above)))


def against(worst: Mapping[str, np.ndarray], score: str, seed: int, reference: str = "") -> list[Difference]:
    """Every method against the reference.

    worst : method -> score (N,) of the same images. score : its name. seed : of the bootstrap.
    reference : a method; "" = "srd" where it is among them, else the first.
    """
    base = reference or ("srd" if "srd" in worst else next(iter(worst)))
    others = [name for name in worst if name != base]
    differences = {name: worst[name] - worst[base] for name in others}
    found = {name: paired_bootstrap(difference, seed) for name, difference in differences.items()}
    # of few images the bootstrap is too sure: no exact test of paired differences gets below that of their signs
    found = {n: (low, high, max(p, smallest_p(len(differences[n])))) for n, (low, high, p) in found.items()}
    corrected = holm(np.array([p for *_, p in found.values()]))
    return [
        Difference(
            *(
                name,
                base,
                score,
                float(differences[name].mean()),
                low,
                high,
                len(differences[name]),
                p,
                float(after),
            ),
            verdict="open"
            if not after < LEVEL
            else "more robust"
            if differences[name].mean() > 0
            else "less robust",
        )
        for (name, (low, high, p)), after in zip(found.items(), corrected, strict=True)
    ]


def area(curve: Mapping[float, np.ndarray]) -> float:
    """Mean worst score over the budgets, by the trapezoid rule over the logarithm of the budget; NaN for one budget.

    curve : budget, > 0 -> worst score (N,); what a smaller budget reaches counts for a larger one too.
    """
    sizes = sorted(curve)
    if len(sizes) < 2:
        return float("nan")
    means = [float(np.mean(worst)) for worst in cumulative(curve).values()]
    return float(np.trapezoid(means, np.log(sizes)) / np.log(sizes[-1] / sizes[0]))


def breaking_budget(curve: Mapping[float, np.ndarray], score: str = "pcc") -> float:
    """Median over images of the smallest budget at which the score falls below its threshold; infinite where most hold.

    curve : as in :func:`area`. score : a name in :data:`attacks.thresholds.TAU`.
    """
    sizes, lowest = np.array(sorted(curve)), np.stack(list(cumulative(curve).values()))  # (budgets, N)
    broken = lowest < TAU[score]
    first = np.where(broken.any(0), sizes[broken.argmax(0)], np.inf)
    return float(np.quantile(first, 0.5, method="higher"))


def cumulative(curve: Mapping[float, np.ndarray]) -> dict[float, np.ndarray]:
    """The curve, budget -> worst score (N,), ascending, where what a smaller budget reaches counts for a larger one too.

    Example
    -------
    >>> {size: worst.tolist() for size, worst in cumulative({2.0: np.array([0.9]), 1.0: np.array([0.5])}).items()}
    {1.0: [0.5], 2.0: [0.5]}
    """
    sizes = sorted(curve)
    lowest = np.minimum.accumulate(np.stack([curve[size] for size in sizes]), axis=0)
    return dict(zip(sizes, lowest, strict=True))
