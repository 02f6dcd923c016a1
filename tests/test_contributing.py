"""The recipes of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from srd_lab.catalogue import METHODS, METRICS
from srd_lab.errors import SrdLabError
from srd_lab.metrics.explained import Explained, Images
from srd_lab.registry import make_explainer

RECIPES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL
)


@pytest.fixture
def declared() -> Iterator[None]:
    tuple(METHODS), tuple(METRICS)
    for recipe in RECIPES:
        exec(compile(recipe, "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": "recipe"})
    yield
    del METHODS._found["squared"], METRICS._found["peak"]


def test_a_method_and_a_metric_are_a_file_each(declared: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    x, target = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    squared = METHODS["squared"].explainer
    gradient = make_explainer("gradient").explain(model, x, target)
    torch.testing.assert_close(squared.explain(model, x, target), gradient.square())
    explained = Explained.by(squared, Images(model, x, target, [0, 1]))
    scores = METRICS["peak"].metric.of(explained)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(
        scores, (gradient.square().flatten(1).amax(1) / gradient.square().flatten(1).sum(1)).double()
    )


def test_a_name_is_declared_once(declared: None) -> None:
    with pytest.raises(
        SrdLabError, match=r"'squared' is declared twice in srd_lab\.methods; choose another name"
    ):
        METHODS.add("squared", METHODS["srd"])
