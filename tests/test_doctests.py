"""The examples in docstrings run. ``model`` in them is the small VGG16 on scenes, ``x`` two of its images."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

from srd_lab.data import batch, load_data
from srd_lab.models import load_model

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    """Those of every docstring that has some."""
    found: list[doctest.DocTest] = []
    for package in ("srd_lab", "attacks", "apop"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if ">>>" in file.read_text("utf-8"):
                parts = file.relative_to(ROOT).with_suffix("").parts
                module = import_module(".".join(part for part in parts if part != "__init__"))
                found += [test for test in doctest.DocTestFinder().find(module) if test.examples]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_examples_run(example: doctest.DocTest) -> None:
    model = load_model("vgg16", device="cpu")
    x, _ = batch(load_data("scenes"), range(2))
    example.globs.update(torch=torch, model=model, x=x)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not said, "".join(said)


def test_a_wrong_example_is_noticed() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        test_examples_run(wrong)
