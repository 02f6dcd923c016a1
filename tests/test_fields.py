"""Values that a field cannot have are refused where they are given: of methods, metrics, settings and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import Any, Literal

import numpy as np
import pytest
import torch

import srd_lab
from srd_lab.errors import BadValue
from srd_lab.evaluation.settings import EvaluationSettings
from srd_lab.fields import checked
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer, make_metric
from srd_lab.runs.settings import Settings, read_stored
from srd_lab.types import Preprocessing


@checked
@dataclass(frozen=True)
class Everything:
    flag: bool = False
    count: int = 1
    size: float = 0.5
    word: str = ""
    kind: Literal["a", "b"] = "a"
    most: int | None = None
    level: int | str = 0
    names: tuple[str, ...] = ()
    other: Any = None


@pytest.mark.parametrize(
    "values",
    [
        {"flag": True},
        {"count": np.int64(3)},
        {"size": 2},
        {"size": np.float32(0.5)},
        {"kind": "b"},
        {"most": 3},
        {"most": None},
        {"level": "low"},
        {"names": ("x", "y")},
        {"other": object()},
    ],
)
def test_what_a_field_may_be(values: dict[str, Any]) -> None:
    made = Everything(**values)
    assert all(getattr(made, name) is value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"flag": 1}, "flag must be True or False, got 1"),
        ({"count": 2.0}, "count must be a whole number, got 2.0"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"size": nan}, "size must be a finite number, got nan"),
        ({"size": inf}, "size must be a finite number, got inf"),
        ({"size": "0.5"}, "size must be a finite number, got '0.5'"),
        ({"kind": "c"}, "kind must be 'a' or 'b', got 'c'"),
        ({"most": "3"}, "most must be a whole number or None, got '3'"),
        ({"level": 1.0}, "level must be a whole number or text, got 1.0"),
        ({"names": "x"}, "names must be a tuple of text, got 'x'"),
        ({"names": (1,)}, "names must be a tuple of text, got (1,)"),
    ],
)
def test_what_a_field_may_not_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue) as caught:
        Everything(**values)
    assert str(caught.value) == f"Everything: {said}"


def test_a_value_by_place_is_looked_at_as_well() -> None:
    with pytest.raises(BadValue, match="count must be"):
        Everything(True, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smoothgrad", {"noise": nan}),
        ("smoothgrad", {"noise": inf}),
        ("integrated_gradients", {"steps": 2.5}),
        ("lrp_epsilon", {"epsilon": inf}),
        ("lrp_zplus", {"low": "0"}),
        ("lrp_zplus", {"low": 1.0, "high": 0.0}),
        ("excitation_backprop", {"contrastive": "no"}),
        ("layercam_high", {"level": None}),
        ("layercam_high", {"level": 1.0}),
        ("gradcam", {"encoder": 5}),
        ("srd", {"start": torch.ones(2, 3)}),
    ],
)
def test_methods_refuse_what_their_options_may_not_be(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadValue) as caught:
        make_explainer(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_sensitivity", {"radius": -1.0}),
        ("max_sensitivity", {"radius": nan}),
        ("stability", {"noise": nan}),
        ("pointing_game", {"margin": -1.0}),
        ("pointing_game", {"margin": nan}),
    ],
)
def test_metrics_refuse_what_their_options_may_not_be(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadValue):
        type(make_metric(name))(**options)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"images": "some"}, "images must be a whole number or 'all', got 'some'"),
        ({"images": 2.5}, "images must be a whole number or 'all', got 2.5"),
        ({"target": 2}, "target must be 'label' or 'predicted', got 2"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"executor": "dask"}, "executor must be 'local' or 'ray', got 'dask'"),
        ({"methods": ()}, "there is no method to evaluate"),
        ({"metrics": ()}, "there is no metric to evaluate"),
    ],
)
def test_an_evaluation_refuses_what_its_settings_may_not_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said.replace("(", r"\(")):
        srd_lab.evaluate(
            "vgg16_8x8", **{"images": 2, "methods": ("gradient",), "metrics": ("sparseness",)} | values
        )


def test_an_attack_refuses_no_members_and_another_start() -> None:
    model, x = srd_lab.load_model("vgg16_8x8"), torch.rand(1, 3, 32, 32)
    with pytest.raises(BadValue, match="there is no attack to run; choose of"):
        srd_lab.attack(model, x, members=())
    with pytest.raises(BadValue, match="the start 'two' is not known; expected one of"):
        srd_lab.attack(model, x, method="gradient", start="two")


def test_what_a_run_stores_of_choices_is_read_back() -> None:
    assert read_stored(EvaluationSettings, {"target": "predicted", "images": "all"}).images == "all"
    assert read_stored(EvaluationSettings, {"images": "30"}).images == 30
    assert Settings().executor == "local"


def test_means_of_pixels_up_to_255_are_refused() -> None:
    with pytest.raises(BadValue, match=r"divide numbers of 0..255 by 255"):
        Preprocessing(mean=(104.0, 117.0, 123.0))


@pytest.mark.parametrize("position", [(0.5, 0), 0, (0, 99)])
def test_positions_that_are_none_are_refused(position: Any) -> None:
    model = srd_lab.load_model("vgg16_8x8")
    with pytest.raises(BadValue, match=r"a position is a tuple|is outside the map"):
        SRD().erf(model, torch.rand(1, 3, 32, 32), 0, [position])
