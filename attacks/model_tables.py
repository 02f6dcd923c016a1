"""Tables of manipulated networks: which method was fooled, and which still tells the truth.

The gain of a method is how much more the objective's score rose, per image, than on the control network. The attacked method
is "fooled" if the 95 % interval of its mean gain lies above zero, else "not moved". Of the others, one whose interval lies
above zero is "fooled" as well with half of the attacked method's gain or more, "partly" with a tenth or more; else it
"holds".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from srd_lab.metrics.summary import Summary, summarise

Maps = dict[str, dict[str, np.ndarray]]  # method -> score -> one value per image (N,)
LEGEND = """
objective: {what}, on the original -> the manipulated network (in brackets: on the control, fine-tuned alike without the
map loss); gain: what it rose by beyond the control, mean [95 % interval]; pcc, ssim: of the maps to the original's, and the
control's; blank: maps that are zero; verdict: fooled, partly (a tenth of the attacked method's gain or more), holds."""


@dataclass(frozen=True)
class Verdict:
    """Whether a method was fooled.

    gain : of the objective's score beyond the control's. word : what that means, see the module.
    """

    gain: Summary
    word: str


def verdicts(attacked: str, found: Maps, untouched: Maps, seed: int) -> dict[str, Verdict]:
    """Per method, whether it was fooled: see the module.

    attacked : the method that the network was manipulated against. found, untouched : on the manipulated network and on
        the control. seed : of the bootstrap intervals.
    """
    gains = {m: summarise(found[m]["after"] - untouched[m]["after"], seed) for m in found}
    reached = gains[attacked].mean if gains[attacked].low > 0 else np.nan

    def word(method: str, gain: Summary) -> str:
        if method == attacked:
            return "fooled (attacked)" if gain.low > 0 else "not moved (attacked)"
        if not np.isfinite(reached):
            return "-"  # nothing happened to compare with
        share = gain.mean / reached if gain.low > 0 else 0.0
        return "fooled" if share >= 0.5 else "partly" if share >= 0.1 else "holds"

    return {m: Verdict(gain, word(m, gain)) for m, gain in gains.items()}


def table(found: Maps, untouched: Maps, judged: Mapping[str, Verdict]) -> tuple[list[str], list[list[str]]]:
    """Header and one line of text per method; arguments as in :func:`verdicts`, and what it gave."""
    header = ["method", "objective", "gain", "pcc", "control", "ssim", "control", "blank", "verdict"]
    lines = []
    for method, scores in found.items():
        now, control = ({name: float(v.mean()) for name, v in s.items()} for s in (scores, untouched[method]))
        cells = [method, f"{now['before']:.3f} -> {now['after']:.3f} ({control['after']:.3f})"]
        cells.append(str(judged[method].gain))
        for name in ("pcc", "ssim"):
            cells += [f"{now[name]:.3f}", f"{control[name]:.3f}"]
        lines.append([*cells, f"{now['blank']:.0%}", judged[method].word])
    return header, lines
