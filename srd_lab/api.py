"""The studies from Python, on live objects: a model and a data set in hand, and a result that shows itself.

Example
-------
::

    result = srd_lab.evaluate(model, dataset, methods=["srd", "gradcam"], metrics=["sparseness", "fidelity"], images=50)
    result.table()                     # one row per image and method: a pandas.DataFrame, or a list of dicts without pandas
    result.save("evaluation")          # tables, figures and settings, as the command leaves them
    print(result.summary)

    srd_lab.attack(model, images, method="srd").table()      # worst case per image over the quick ensemble
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apop.settings import SurveySettings
from apop.study import Survey
from attacks.budget import Budget, to_8_bits
from attacks.ensemble import MEMBERS, Ensemble
from attacks.experiment import attack_explainer
from attacks.flags import wrong_gradient
from attacks.judge import Found
from attacks.probe import probe
from attacks.scores import SCORES
from srd_lab.errors import BadValue
from srd_lab.evaluation.settings import EvaluationSettings
from srd_lab.evaluation.study import Evaluation
from srd_lab.parts import live
from srd_lab.render.files import FORMATS
from srd_lab.runs.active import log_to_active
from srd_lab.runs.document import Document, Table
from srd_lab.runs.outcome import REPORT, Outcome, publish
from srd_lab.runs.report import csv_text
from srd_lab.runs.tracking import open_run
from srd_lab.types import Preprocessing

TABLES = ("images.csv", "pairs.csv")
PROBED = 4  # images that tell which surrogate to attack


@dataclass(frozen=True)
class Result:
    """What a study found.

    summary : the report, as the command prints it. folder : its tables, figures and settings; gone with the result unless
        :meth:`save` has copied it. images : of an attack, the worst adversarial images (N, C, H, W) by score; else empty.
    """

    summary: str
    folder: Path
    images: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def table(self) -> Any:
        """One row per image (and method): a pandas.DataFrame where pandas is installed, else a list of dicts of text."""
        rows = [
            row
            for name in TABLES
            for file in sorted(self.folder.rglob(name))
            for row in _rows(file, self.folder)
        ]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows).apply(_numbers)

    def plot(self) -> list[Path]:
        """The figures in :attr:`folder`: PNG files, and those of the ``figure_formats`` that were asked for."""
        return sorted(file for file in self.folder.rglob("*") if file.suffix[1:] in FORMATS)

    def save(self, folder: str | Path) -> Path:
        """Copy everything into a new folder, which is returned. Raises BadValue where it exists already."""
        if Path(folder).exists():
            raise BadValue(f"{folder} exists already; give the name of a new folder")
        return Path(shutil.copytree(self.folder, folder))

    def log(self, prefix: str = "") -> str:
        """Log everything into the MLflow run that is active: settings, numbers, tables and figures, by the names that a
        tracked command gives them; those of one method with its name in front, as in ``srd/sparseness``. Its id.

        prefix : in front of all names, as a folder, for several results in one run.

        Raises BadRun where no run is active, or it has another value for one of the settings already.
        """
        return log_to_active(self.folder, prefix)

    def __str__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return Document.from_json((self.folder / REPORT).read_text(encoding="utf-8")).html()


def _rows(file: Path, root: Path) -> list[dict[str, str]]:
    """The rows of a table, with the part of the run that it is of where there are several."""
    part = {} if file.parent == root else {"part": file.parent.relative_to(root).as_posix()}
    with file.open(encoding="utf-8", newline="") as lines:
        return [part | row for row in csv.DictReader(lines)]


def _numbers(column: Any) -> Any:
    """A column of numbers as such, whole ones as integers."""
    import pandas

    try:
        return pandas.to_numeric(column)
    except (ValueError, TypeError):
        return column


def evaluate(
    model: nn.Module | str,
    dataset: Any = "scenes",
    methods: Sequence[str] = ("all",),
    metrics: Sequence[str] = ("all",),
    images: int | str = 200,
    *,
    preprocessing: Preprocessing | None = None,
    **settings: Any,
) -> Result:
    """Score methods on the same images, as ``srd-lab evaluate`` does.

    model : a network, which is left as it is, or a name (:func:`srd_lab.load_model`).
    dataset : a data set (:mod:`srd_lab.data.own`), or a name (:func:`srd_lab.load_data`).
    methods, metrics : names, ``all``. images : how many, drawn by the seed, or ``all``.
    preprocessing : what the network needs of an image; None = what it says itself, else ImageNet's at 224 pixels.
    settings : further fields of :class:`srd_lab.evaluation.settings.EvaluationSettings`.

    Errors are those of the command.
    """
    with _named(model, dataset, preprocessing) as names:
        settings |= {**names, "methods": tuple(methods), "metrics": tuple(metrics), "images": images}
        return _result("evaluate", Evaluation(EvaluationSettings(**settings)))


def apop(
    model: nn.Module | str,
    dataset: Any = "scenes",
    images: int | str = 500,
    *,
    preprocessing: Preprocessing | None = None,
    **settings: Any,
) -> Result:
    """Predict from activation patterns alone, as ``srd-lab apop`` does; arguments as in :func:`evaluate`.

    settings : further fields of :class:`apop.settings.SurveySettings`.
    """
    with _named(model, dataset, preprocessing) as names:
        settings |= {"data": names["data"], "models": (names["model"],), "images": images}
        return _result("apop", Survey(SurveySettings(**settings)))


def attack(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    method: str = "srd",
    *,
    members: Sequence[str] = Ensemble.members,
    budget: Budget | None = None,
    mode: str = "quick",
    seed: int = 0,
    start: str = "ones",
) -> Result:
    """The worst case of an explanation over an ensemble of attacks, image by image.

    model : in eval mode; takes pixels. images : pixels (N, C, H, W) in [0, 1], rounded to 8 bits first.
    target : (N,) the class that is explained; None = predicted. method : as for :func:`srd_lab.make_explainer`.
    members : of :data:`attacks.ensemble.MEMBERS`; a method without a gradient goes to ``black_box``.
    budget : None = the published attack's, MSE 1e-3 (normalised) and 8/255. mode : "quick" or "full".
    seed : decides what is drawn. start : where SRD starts.

    The table has a row per image: the lowest score of each kind, which member found it, the share of the budget it used.

    Errors are those of :class:`attacks.ensemble.Ensemble`.
    """
    members = (members,) if isinstance(members, str) else tuple(members)
    if not members:
        raise BadValue(f"there is no attack to run; choose of {', '.join(MEMBERS)}")
    ensemble = Ensemble(members, mode, budget or Budget.named("legacy"), seed)
    explainer, x = attack_explainer(method, start), to_8_bits(images)
    known = probe(explainer, model, x[:PROBED], ensemble.budget, seed=seed)
    if known.best is None and "black_box" not in ensemble.members:
        ensemble = Ensemble((*ensemble.members, "black_box"), mode, ensemble.budget, seed)
    began = time.perf_counter()
    found = ensemble.run(model, explainer, x, target, surrogate=known.best)
    rows = [_attacked(found, i) for i in range(len(x))]
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    why = wrong_gradient(known) if known.best else f"no gradient: {known.why}"
    note = f"{method}: {why}" if why else ""
    said = Document(
        f"{method} under {', '.join(ensemble.members)}; {ensemble.budget}",
        [Table(list(rows[0]), cells), note],
    )
    scores = {f"worst_{score}": found.worst[score].cpu().numpy() for score in SCORES}
    outcome = Outcome(said, time.perf_counter() - began, [str(i) for i in range(len(x))], {method: scores})
    folder = Path(tempfile.mkdtemp())
    about = {"method": method, "members": ",".join(ensemble.members), "budget": ensemble.budget}
    about |= {"mode": mode, "seed": seed, "start": start}
    with _silent(), open_run("attack", f"attack {method}", about, track=False, out=folder) as run:
        run.save_text(TABLES[0], csv_text(rows))
        publish(run, outcome)
    return _passing(Result(said.text(), folder, found.images), folder)


def _attacked(found: Found, i: int) -> dict[str, Any]:
    """The row of image ``i``."""
    by = int(found.by["pcc"][i])
    scores = {score: round(float(found.worst[score][i]), 6) for score in SCORES}
    ends = {"by": found.names[by] if by >= 0 else "none", "used": float(found.used[i])}
    return {"image": i, "class": int(found.target[i]), **scores, **ends}


@contextlib.contextmanager
def _named(model: Any, dataset: Any, preprocessing: Preprocessing | None) -> Iterator[dict[str, Any]]:
    """Settings that name the live objects, as long as they are needed."""
    with contextlib.ExitStack() as held:
        network = (model, preprocessing) if preprocessing else model
        yield {
            "model": model if isinstance(model, str) else held.enter_context(live(network)),
            "data": dataset if isinstance(dataset, str) else held.enter_context(live(dataset)),
        }


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Within: nothing is printed to stdout."""
    return contextlib.redirect_stdout(io.StringIO())


def _result(command: str, study: Any) -> Result:
    """Run a study without tracking; what it prints is the summary."""
    if study.settings.share:
        raise BadValue("a share makes no result; leave share out, or use the command with --shard")
    home = Path(tempfile.mkdtemp())
    folder = home / command
    stored = study.settings.stored()
    with (
        _silent(),
        open_run(command, command, stored, track=False, out=folder) as run,
    ):
        run.store_figures_as(study.settings.figure_formats)
        study.run(run)
    said = Document.from_json((folder / REPORT).read_text(encoding="utf-8")).text()
    return _passing(Result(said, folder), home)


def _passing(result: Result, home: Path) -> Result:
    """A result whose folder goes when it does."""
    weakref.finalize(result, shutil.rmtree, home, ignore_errors=True)
    return result
