"""Mean, median and bootstrap interval of per-image scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """mean, median, and the 95 % percentile-bootstrap interval [low, high] of the mean, over n finite scores."""

    mean: float
    median: float
    low: float
    high: float
    n: int


def summarise(scores: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Summary:
    """Summary of scores (N,); what is not finite is left out and ``n`` says how many were used."""
    values = np.asarray(scores, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Summary(np.nan, np.nan, np.nan, np.nan, 0)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return Summary(float(values.mean()), float(np.median(values)), float(low), float(high), len(values))
