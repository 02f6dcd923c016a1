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

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from srd_lab.errors import BadValue

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
    """

    title: str
    paper: str
    resolution: str
    passes: str
    tested: str
    attackable: bool
    explainer: Any


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

    package : dotted name of the package; every module directly in it is imported.
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
    *("deconvnet", "lrp_epsilon", "lrp_gamma", "excitation_backprop", "contrastive_excitation"),
    *("random", "sobel"),
)

METHODS: Declared[Method] = Declared("srd_lab.methods", (*TABLE_2, *_OTHER_METHODS))
METRICS: Declared[Metric] = Declared("srd_lab.metrics", (*TABLE_2_METRICS, *_OTHER_METRICS))
BASELINES = ("black", "white", "mean", "minimum")  # what fidelity sets pixels to


def method(
    name: str,
    *,
    title: str,
    paper: str,
    resolution: str,
    passes: str,
    tested: str,
    attackable: bool = True,
    **options: Any,
) -> Callable[[Class], Class]:
    """Declare the decorated class as the method ``name``, with these ``options``; the rest as in :class:`Method`.

    Raises BadValue if the name is taken, and whatever the class refuses ``options`` with.
    """

    def declare(cls: Class) -> Class:
        METHODS.add(name, Method(title, paper, resolution, passes, tested, attackable, cls(**options)))
        return cls

    return declare


def metric(
    name: str, *, title: str, paper: str, better: str, scores: str, tested: str, **options: Any
) -> Callable[[Class], Class]:
    """Declare the decorated class as the metric ``name``, with these ``options``; the rest as in :class:`Metric`.

    Raises BadValue if the name is taken, and whatever the class refuses ``options`` with.
    """

    def declare(cls: Class) -> Class:
        METRICS.add(name, Metric(title, paper, better, scores, tested, cls(**options)))
        return cls

    return declare


def attackable() -> tuple[str, ...]:
    """The names of the methods whose maps have a derivative in the image, in the order of the list."""
    return tuple(name for name, known in METHODS.items() if known.attackable)


def title_of(method: str) -> str:
    """A method as tables write it; the text of a wrapper, such as ``smoothed(srd,0.1,64)``, is handed back as it is."""
    return METHODS[method].title if method in METHODS else method


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
