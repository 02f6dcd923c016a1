"""What there is, by name: every method and metric with its source.

Each is declared where it is defined, by a decorator of this module, and found there when somebody asks for the first
time: adding one is one file in :mod:`srd_lab.methods` or :mod:`srd_lab.metrics`. Nothing heavy is imported before, so that
the command line starts quickly.

Example
-------
::

    @method("gradient", title="Saliency", paper="Simonyan et al. 2014", resolution="input", passes="3", tested="captum")
    @dataclass(frozen=True)
    class Gradient(Explainer): ...
"""

from __future__ import annotations

import json
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from srd_lab.errors import BadValue, SrdLabWarning, first_line
from srd_lab.fields import checked
from srd_lab.parts import EXPECTED, is_own, make, split_options

Class = TypeVar("Class", bound=type)
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Method:
    """What is known of an explanation method.

    title : as Table 2 of the SRD paper, or its own paper, writes it.
    paper : authors and year; "control" where it is none.
    resolution : of its maps: "input", "high" (1/8 of the image) or "low" (the encoder output).
    passes : its cost in forward passes of one image; a backward pass counts as two. K: channels of the layer.
    tested : what it is held against in the tests; "definition" is the formula, written out slowly.
    attackable : whether the map has a derivative in the image that an attack can use.
    explainer : an instance with the options that the name stands for.
    needs : what a network must have for it, "attention"; "" where any will do.
    """

    title: str
    paper: str
    resolution: str
    passes: str
    tested: str
    attackable: bool
    explainer: Any
    needs: str = ""


@dataclass(frozen=True)
class Metric:
    """What is known of a metric.

    title : as tables write it.
    paper : authors and year.
    better : "higher" or "lower".
    scores : what of an explanation it looks at: "localisation", "faithfulness", "robustness", "complexity" or "sanity".
    tested : what it is held against in the tests.
    metric : an instance with the options that the name stands for.
    """

    title: str
    paper: str
    better: str
    scores: str
    tested: str
    metric: Any


class Declared(Mapping[str, Entry]):
    """What the modules of a package declare, by name; they are imported when first asked.

    package : dotted name of the package; every module directly in it is imported, and what other packages name as entry
        points of the group of that name. One that does not import is left out, which a warning says.
    first : names in the order in which they are listed; others follow in that of their declaration.
    """

    def __init__(self, package: str, first: Sequence[str]) -> None:
        self._package, self._first = package, first
        self._found: dict[str, Entry] = {}
        self._loaded = False

    def add(self, name: str, entry: Entry) -> None:
        """Declare an entry. Raises BadValue if the name is taken."""
        if name in self._found:
            raise BadValue(f"{name!r} is declared twice in {self._package}; choose another name")
        self._found[name] = entry

    def _all(self) -> dict[str, Entry]:
        if not self._loaded:
            for module in pkgutil.iter_modules(import_module(self._package).__path__):
                import_module(f"{self._package}.{module.name}")
            for point in entry_points(group=self._package):
                try:
                    point.load()
                except Exception as error:
                    said = f"{first_line(error)} ({type(error).__name__})"
                    warnings.warn(
                        f"the entry point {point.name} = {point.value} of {self._package} is left out: {said}",
                        SrdLabWarning,
                        stacklevel=2,
                    )
            listed = [*(name for name in self._first if name in self._found), *self._found]
            self._found = {name: self._found[name] for name in listed}
            self._loaded = True
        return self._found

    def __getitem__(self, name: str) -> Entry:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


# the rows of Table 2 and Table 4 and the methods of Fig. 4, in the paper's order
TABLE_2 = (
    "gradient",
    "guided_backprop",
    "grad_input",
    "integrated_gradients",
    "lrp_zplus",
    "smoothgrad",
    "fullgrad",
    "gradcam",
    "gradcam_pp",
    "scorecam",
    "ablationcam",
    "xgradcam",
    "layercam_low",
    "layercam_high",
    "srd_low",
    "srd_high",
    "srd",
)
TABLE_4 = (
    *("guided_backprop", "grad_input", "integrated_gradients", "lrp_zplus", "smoothgrad", "fullgrad"),
    *("gradcam", "scorecam", "ablationcam", "xgradcam", "layercam_low", "srd"),
)
FIGURE_4 = ("srd", "gradient", "grad_input", "guided_backprop", "integrated_gradients", "lrp_zplus")
TABLE_2_METRICS = ("pointing_game", "attribution_localization", "sparseness", "fidelity", "stability")
_OTHER_METRICS = (
    *("ssim", "pcc", "insertion", "deletion", "morf", "lerf", "infidelity", "max_sensitivity"),
    *("randomization", "roughness"),
)
_OTHER_METHODS = (
    *("deconvnet", "lrp_epsilon", "lrp_gamma", "attnlrp", "excitation_backprop", "contrastive_excitation"),
    *("attention_rollout", "gradient_rollout"),
    *("random", "sobel"),
)

METHODS: Declared[Method] = Declared("srd_lab.methods", (*TABLE_2, *_OTHER_METHODS))
METRICS: Declared[Metric] = Declared("srd_lab.metrics", (*TABLE_2_METRICS, *_OTHER_METRICS))
BASELINES = ("black", "white", "mean", "minimum")  # what fidelity sets pixels to


def method(
    name: str,
    *,
    title: str = "",
    paper: str = "-",
    resolution: str = "-",
    passes: str = "-",
    tested: str = "-",
    attackable: bool = True,
    needs: str = "",
    **options: Any,
) -> Callable[[Class], Class]:
    """Declare the decorated class as the method ``name``, with these ``options``; the rest as in :class:`Method`.

    Raises BadValue if the name is taken, and whatever the class refuses ``options`` with.

    Example
    -------
    ::

        @srd_lab.register_method("mine")
        @dataclass(frozen=True)
        class Mine(Explainer): ...
    """

    def declare(cls: Class) -> Class:
        checked(cls)
        METHODS.add(
            name, Method(title or name, paper, resolution, passes, tested, attackable, cls(**options), needs)
        )
        return cls

    return declare


def metric(
    name: str,
    *,
    better: str,
    title: str = "",
    paper: str = "-",
    scores: str = "-",
    tested: str = "-",
    **options: Any,
) -> Callable[[Class], Class]:
    """Declare the decorated class as the metric ``name``, with these ``options``; the rest as in :class:`Metric`.

    Raises BadValue if the name is taken, for a ``better`` that is neither "higher" nor "lower", and whatever the class
    refuses ``options`` with.
    """
    _check_better(name, better)

    def declare(cls: Class) -> Class:
        checked(cls)
        METRICS.add(name, Metric(title or name, paper, better, scores, tested, cls(**options)))
        return cls

    return declare


def _check_better(name: str, better: Any) -> None:
    if better not in ("higher", "lower"):
        raise BadValue(f"{name} has better = {better!r}; expected 'higher' or 'lower'")


def metric_of(name: str) -> Metric:
    """What is known of a metric: of the list, with options behind a ``?``, or from elsewhere (``package.module:Class``).

    One from elsewhere has a method ``of``, as :class:`srd_lab.metrics.explained.Metric` says, and an attribute ``better``,
    "higher" or "lower"; also ``title``, if its name is not to stand in tables.

    Raises BadValue for a name or an option that is not known, and for a part that is no metric.
    """
    if is_own(name):
        made = make(name)
        if not callable(getattr(made, "of", None)):
            raise BadValue(
                f"{name} gives a {type(made).__name__} without a method of(explained); expected a metric"
            )
        _check_better(name, getattr(made, "better", None))
        return Metric(str(getattr(made, "title", name)), "-", made.better, "-", "-", made)
    plain, options = split_options(name)
    if plain not in METRICS:
        raise BadValue(f"unknown metric {plain!r}; expected one of {', '.join(METRICS)}, or {EXPECTED[9:]}")
    known = METRICS[plain]
    if not options:
        return known
    return replace(known, title=name, metric=with_options(plain, known.metric, options))


def with_options(name: str, default: Any, options: Mapping[str, Any]) -> Any:
    """A method or metric with other values of its fields. Raises BadValue for options that it does not have."""
    known = [field.name for field in fields(default)]
    if unknown := sorted(set(options) - set(known)):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise BadValue(f"{name} has no option {', '.join(unknown)}; {takes}")
    try:
        return replace(default, **options)
    except TypeError as error:  # a text where a number belongs
        raise BadValue(f"{name} does not take {dict(options)}: {first_line(error)}") from None


def cards() -> list[dict[str, Any]]:
    """What is known of each network in this package: file, size, data, accuracies, and how it was trained."""
    file = Path(__file__).parent / "weights" / "cards.json"
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def for_any_network() -> tuple[str, ...]:
    """The names of the methods that need nothing of a network in particular, in the order of the list."""
    return tuple(name for name, known in METHODS.items() if not known.needs)


def attackable() -> tuple[str, ...]:
    """Those of :func:`for_any_network` whose maps have a derivative in the image."""
    return tuple(name for name in for_any_network() if METHODS[name].attackable)


def outer_parts(text: str) -> list[str]:
    """The parts of a list, split at the commas outside of all parentheses, without spaces around them.

    Example
    -------
    >>> outer_parts("smoothed(srd,0.1), gradient")
    ['smoothed(srd,0.1)', 'gradient']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
