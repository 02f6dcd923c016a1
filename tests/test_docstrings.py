"""Every parameter of a public name is in a docstring: of ``__all__`` of the packages, and of the pages in docs/reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import pytest

import apop
import attacks
import srd_lab
from srd_lab.metrics.explained import Metric
from srd_lab.types import Explainer

ROOT = Path(__file__).parents[1]
PACKAGES = (srd_lab, attacks, apop)
OURS = ("srd_lab", "attacks", "apop")
ELSEWHERE = re.compile(
    r"\b[Ss]ee :|\bas in :|[Aa]rguments|\bas for :"
)  # a docstring says where the parameters are
STANDS_FOR = {
    "explain_with_logits": Explainer,
    "explain": Explainer,
    "of": Metric,
}  # protocols that need no inheriting


def on_the_pages() -> Iterator[tuple[str, Any]]:
    """What autodoc shows, by name."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        directives = re.findall(
            r"\.\. auto(\w+):: ([\w.]+)(?:\(\))?\n((?: +:.*\n)*)", page.read_text("utf-8")
        )
        for kind, name, options in directives:
            if kind != "module":
                module, _, last = name.rpartition(".")
                yield name, getattr(import_module(module), last)
            elif ":no-members:" not in options:
                for last, made in vars(import_module(name)).items():
                    if not last.startswith("_") and getattr(made, "__module__", None) == name:
                        yield f"{name}.{last}", made


def public() -> dict[str, Any]:
    found = {
        f"{package.__name__}.{name}": getattr(package, name)
        for package in PACKAGES
        for name in package.__all__
    }
    known = set(map(id, found.values()))
    return found | {name: made for name, made in on_the_pages() if id(made) not in known}


PUBLIC = {name: made for name, made in public().items() if inspect.isclass(made) or inspect.isfunction(made)}


def parameters(function: Callable[..., Any]) -> list[str]:
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def unsaid(function: Callable[..., Any], docstrings: list[str | None]) -> list[str]:
    """Parameters whose names are in none of these; none where the first says where they are described."""
    said = " ".join(text or "" for text in docstrings)
    if ELSEWHERE.search(docstrings[0] or ""):
        return []
    return [name for name in parameters(function) if not re.search(rf"\b{name}\b", said)]


def bases(kind: type) -> list[type]:
    """A class and those of this project that it inherits from."""
    return [kind, *(base for base in kind.__mro__[1:] if base.__module__.split(".")[0] in OURS)]


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any], list[str | None]]]:
    """Name, function and docstrings of what a class defines: its own, that of the class, and those of what it overrides."""
    for name, entry in vars(kind).items():
        function = entry.__func__ if isinstance(entry, classmethod | staticmethod) else entry
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        stands_for = [STANDS_FOR[name]] if name in STANDS_FOR and hasattr(STANDS_FOR[name], name) else []
        overridden = [base for base in (*bases(kind)[1:], *stands_for) if name in vars(base)]
        texts = [vars(base)[name].__doc__ for base in overridden]
        if any(ELSEWHERE.search(text or "") for text in texts):
            texts.append(Explainer.explain.__doc__)
        yield name, function, [function.__doc__, kind.__doc__, *(base.__doc__ for base in overridden), *texts]


def missing(name: str, made: Any) -> dict[str, list[str]]:
    """By function: the parameters that no docstring names."""
    if inspect.isfunction(made):
        return {name: lacks} if (lacks := unsaid(made, [made.__doc__])) else {}
    found = {}
    if not issubclass(made, BaseException) and not getattr(made, "_is_protocol", False):
        found[name] = unsaid(made, [base.__doc__ for base in bases(made)] + [made.__init__.__doc__])
    for method, function, docstrings in methods(made):
        found[f"{name}.{method}"] = unsaid(function, docstrings)
    return {place: lacks for place, lacks in found.items() if lacks}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_of_a_public_name_is_documented(name: str) -> None:
    assert not missing(name, PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert PUBLIC[name].__doc__
    if inspect.isclass(PUBLIC[name]):
        assert not [method for method, _, texts in methods(PUBLIC[name]) if not any([texts[0], *texts[3:]])]


def test_all_public_names_are_looked_at() -> None:
    assert {"srd_lab.explain", "attacks.Budget", "apop.record", "srd_lab.api.Result"} <= set(PUBLIC)
    assert "srd_lab.methods.cam.GradCAM" in PUBLIC
    assert len(PUBLIC) > 100


def test_a_parameter_that_no_docstring_names_is_noticed() -> None:
    class Rule(Protocol):
        def of(self, explained: int) -> int:
            """Of ``explained``."""
            ...

    class Lacking:
        """A class. first : a number."""

        def __init__(self, first: int, second: int) -> None: ...

        def of(self, explained: int) -> None: ...

        def run(self, third: int) -> None:
            """Runs."""

    assert missing("Lacking", Lacking) == {"Lacking": ["second"], "Lacking.run": ["third"]}
    assert missing("Rule", Rule) == {}
