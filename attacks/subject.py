"""One method under evaluation: what a study attacks, reports and writes an entry of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attacks.certified import Sides
from attacks.gates import Gates
from attacks.robustness_experiment import Experiment
from srd_lab.runs.tracking import Run
from srd_lab.runs.work import Arrays
from srd_lab.types import Explainer


@dataclass
class Subject:
    """One method under evaluation, and what came out so far.

    name : of the variant, see :func:`attacks.pair_study.variants`. explainer : as the attack sees it.
    child : the run that its results are stored in. experiment : that attacks it.
    table : its scores, arrays over the images, see :mod:`attacks.flags`.
    curve : budget, in its own units -> lowest PCC (n,) of the first images; empty if it was not asked for.
    gates : None if they were not asked for. flags : name -> what was measured.
    checks : scores by members that do not count, on the first images; empty without any.
    sides : attack and certificate of the smoothed map; None if they were not asked for.
    """

    name: str
    explainer: Explainer
    child: Run
    experiment: Experiment
    table: Arrays
    curve: dict[float, np.ndarray]
    gates: Gates | None
    flags: dict[str, str]
    checks: Arrays
    sides: Sides | None = None

    def stored(self, numbers: np.ndarray, name: str, folder: str = "batches") -> np.ndarray:
        """An array of the pairs with these numbers (n,), in their order, as this method's batches hold it.

        name : of the array. folder : of the stored batches.
        """
        found: dict[int, np.ndarray] = {}
        for path in self.child.list(folder):
            first, last = (int(part) for part in path.rpartition("/")[2].removesuffix(".npz").split("-"))
            if ((numbers >= first) & (numbers <= last)).any():
                arrays = self.child.load_arrays(path)
                found |= dict(zip(arrays["pair"].tolist(), arrays[name], strict=True))
        return np.stack([found[int(number)] for number in numbers])

    def final(self, numbers: np.ndarray, name: str) -> np.ndarray:
        """The same as :meth:`stored`, after the other methods' images were tried."""
        return self.stored(numbers, name, "transferred" if self.child.list("transferred") else "batches")
