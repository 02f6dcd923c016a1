"""What MLflow's chart view opens with: by itself it shows one chart for each metric, sorted by name, so that the scores of
``gradcam`` come first, each as the only bar of its chart.

Here the scores that runs are compared by come first: those of runs of one method as a bar for each run, those of runs of
several as a bar for each method, and how they came about over the images, a line for each method. MLflow adds the others
behind, folded away but for further curves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_UNNAMED = "Model metrics"  # what MLflow calls the section of metrics without a prefix
_MOST_RUNS = 10  # of a chart of bars
_MOST_METHODS = 12  # of one chart
_OVER = "over_images"


def chart_view(runs: Collection[Collection[str]], scores: Sequence[str]) -> dict[str, Any]:
    """The part of MLflow's shared view that says which charts stand where.

    runs : the names of the metrics of each run. scores : names, less any prefix, of which charts come first, in this order.

    Example
    -------
    >>> [chart["displayName"] for chart in chart_view([{"pcc"}, {"a/pcc", "b/pcc"}], ["pcc"])["compareRunCharts"]]
    ['pcc', 'pcc by method']
    """
    every = {name for names in runs for name in names}
    prefixes = sorted({name.rpartition("/")[0] for name in every} - {""})
    sections = [
        _section(_UNNAMED, shown=True),
        *(_section(name, shown=_is_a_further_curve(name)) for name in prefixes),
    ]
    of_methods = Counter(name.rpartition("/")[2] for name in every if "/" in name and not _is_curve(name))
    others = sorted(score for score, methods in of_methods.items() if methods > 1)
    charts = [chart for score in dict.fromkeys((*scores, *others)) for chart in _charts(runs, score)]
    return {"compareRunSections": sections, "compareRunCharts": charts, "isAccordionReordered": True}


def _section(name: str, shown: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": shown,
        "isReordered": name == _UNNAMED,
        "isGenerated": True,
    }


def _charts(runs: Collection[Collection[str]], score: str) -> Iterator[dict[str, Any]]:
    """Of one score: a bar for each run that has it as its own, one for each method of the others, and curves."""
    if any(score in names for names in runs):
        yield _chart("BAR", score, [score])
    by_method = {name for names in runs if score not in names for name in names if not _is_curve(name)}
    if keys := [name for name in sorted(by_method) if name.endswith(f"/{score}")]:
        yield _chart("BAR", f"{score} by method", keys)
    curves = {name for names in runs for name in names if f"/{name}".endswith(f"/{_OVER}/{score}")}
    if curves:
        yield _chart("LINE", f"{score} over images", sorted(curves))


def _chart(kind: str, title: str, keys: list[str]) -> dict[str, Any]:
    """A chart of MLflow's; one of several metrics is drawn by ``selectedMetricKeys``."""
    several = {} if keys == [title] else {"selectedMetricKeys": keys[:_MOST_METHODS]}
    return {
        "uuid": f"{kind} {title}",
        "type": kind,
        "metricSectionId": _UNNAMED,
        "metricKey": title,
        "displayName": title,
        "runsCountToCompare": _MOST_RUNS,
        "isGenerated": False,
        "deleted": False,
        **several,
    }


def _is_curve(name: str) -> bool:
    return "over_" in name


def _is_a_further_curve(section: str) -> bool:
    return _is_curve(section) and not section.endswith(_OVER)
