"""Mean, median and bootstrap interval of per-image scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

FEW = 10  # below, a bootstrap interval is too narrow to settle anything
LEVEL = 0.05
_DRAWN_AT_ONCE = 2**20


@dataclass(frozen=True)
class Summary:
    """mean, median, and the 95 % percentile-bootstrap interval [low, high] of the mean, over n finite scores.

    With fewer than two scores there is no interval: low and high are NaN.
    """

    mean: float
    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return interval_text(self.mean, self.low, self.high)


def interval_text(mean: float, low: float, high: float) -> str:
    """``0.787 [0.763, 0.811]``, or ``0.787 [–]`` where there is no interval (``low`` is NaN)."""
    return f"{mean:.3f} [–]" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def few_note(n: int, what: str) -> str:
    """What to say below intervals over n ``what`` ("pairs"); empty where n is enough."""
    if n >= FEW:
        return ""
    return (
        f"fewer than {FEW} {what}: the intervals are too narrow (even of {FEW}, a 95 % bootstrap interval holds "
        "the true mean in 85 to 92 % of cases)"
    )


def smallest_p(n: int) -> float:
    """The smallest two-sided p of Wilcoxon's signed-rank test of n >= 1 differences without ties: all of one sign.

    Example
    -------
    >>> smallest_p(6)
    0.03125
    """
    return min(1.0, 2.0 ** (1 - n))


def images_needed(tests: int) -> int:
    """With how many images the smallest p, after Holm's correction for ``tests`` >= 1, is below 0.05.

    Example
    -------
    >>> images_needed(1), images_needed(26 * 15)
    (6, 14)
    """
    return next(n for n in count(1) if tests * smallest_p(n) < LEVEL)


def unsettled_note(counts: Sequence[int], corrected: Sequence[float] = (), of: str = "") -> str:
    """What to say below paired comparisons of which none can reach a corrected p below 0.05; empty where one can or does.

    counts : (M,) images of each; those of none are not compared. corrected : (M,) their p, NaN = none; () = not looked at.
    of : which comparisons are meant, in words, where it is not all.
    """
    least = min(images_needed(1), max(counts, default=0))
    tests, most = sum(n >= max(1, least) for n in counts), max(counts, default=0)
    if not tests or tests * smallest_p(most) < LEVEL or any(p < LEVEL for p in corrected):
        return ""
    smallest = min(1.0, tests * smallest_p(most))
    reached = (
        f"the smallest corrected p that is possible is {smallest:.2g}"
        if smallest < 1
        else "every corrected p is 1"
    )
    return (
        f"No test can settle {'the comparison' if tests == 1 else f'any of {tests} comparisons'}{of} with {most} "
        f"image{'' if most == 1 else 's'}: {reached}; below {LEVEL} it can be with {images_needed(tests)} images or more."
    )


def summarise(scores: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Summary:
    """Summary of scores (N,); what is not finite is left out and ``n`` says how many were used.

    seed : of the bootstrap. resamples : how many times n scores are drawn from the n, with repetition.

    The percentile bootstrap is too sure of itself where n is small: in simulations with n = 10 the interval held the
    true mean in 85 to 92 % of cases, by the scores' distribution, instead of 95.

    Example
    -------
    >>> str(summarise(np.array([0.5, 0.5, np.nan])))
    '0.500 [0.500, 0.500]'
    """
    values = np.asarray(scores, dtype=np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    if n < 2:
        mean = float(values[0]) if n else np.nan
        return Summary(mean, mean, np.nan, np.nan, n)
    chance, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, resamples, rows):
        part = means[first : first + rows]  # all draws at once would take n * resamples * 16 bytes
        part[:] = values[chance.integers(n, size=(len(part), n))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Summary(float(values.mean()), float(np.median(values)), float(low), float(high), n)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (Holm 1979) of p values (N,), in their order, at most 1; NaN stays and is not counted.

    Example
    -------
    >>> holm(np.array([0.03, 0.01])).tolist()
    [0.03, 0.02]
    """
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = np.full(len(p), np.nan)
    steps = p[order] * (len(order) - np.arange(len(order)))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
