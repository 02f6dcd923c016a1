"""Settings: typed, frozen, stored and read back; and that every option is one."""

from __future__ import annotations

import csv
import dataclasses
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apop.settings import SurveySettings
from attacks.settings import ManipulationSettings, ModelManipulationSettings, RobustnessSettings
from srd_lab.cli.main import main
from srd_lab.cli.tracked import OUTSIDE, Given
from srd_lab.errors import BadRun, SrdLabError
from srd_lab.evaluation.settings import EvaluationSettings, ExplainSettings
from srd_lab.reproduce.settings import AblationSettings, TableSettings
from srd_lab.runs.settings import FREE, Settings, as_text, read_stored

COMMON = "batch_size data labels mean non_rgb seed size std weights"
PAIRS = f"{COMMON} attacks methods model pairs starts"
EQ10 = f"{PAIRS} beta_end beta_start bound lr output_term steps stop_mse"
SCORED = f"{COMMON} baseline images methods metrics reference target"
# What runs are stored with: a name that goes is one that older runs can no longer be resumed by.
STORED = {
    SurveySettings: f"{COMMON} binarize images inputs models save_patterns",
    ManipulationSettings: EQ10,
    RobustnessSettings: f"{EQ10} budget certify curve entries gates mode norm seeds sigma",
    ModelManipulationSettings: f"{COMMON} frame keep manipulate_model map_weight methods model others pairs swap "
    "top_share train_batch train_images train_lr train_steps",
    EvaluationSettings: f"{SCORED} model",
    AblationSettings: f"{COMMON} images models",
    TableSettings: f"{SCORED} models",
}
# The kinds of settings that a command's options end in.
COMMANDS = {
    "attack": (RobustnessSettings, ManipulationSettings, ModelManipulationSettings),
    "robustness": (RobustnessSettings,),
    "apop": (SurveySettings,),
    "evaluate": (EvaluationSettings,),
    "explain": (ExplainSettings,),
    "reproduce table1": (SurveySettings,),
    "reproduce table3": (SurveySettings,),
    "reproduce fig6": (SurveySettings,),
    "reproduce fig4": (ManipulationSettings,),
    "reproduce fig7": (AblationSettings,),
    "reproduce table2": (TableSettings,),
    "reproduce table4": (TableSettings,),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type; text without line breaks, as a command line has it."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(values_of(get_args(kind)[0]), max_size=3).map(tuple)
    if kinds := get_args(kind):
        return st.one_of(*map(values_of, kinds))
    return {
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(1, 10**9),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(codec="utf-8", categories=("L", "P", "S", "Zs")), min_size=1),
    }[kind]


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_what_is_stored_is_read_back(kind: type[Settings], data: st.DataObject) -> None:
    """Also names with commas and quotes, and numbers to the last digit."""
    types = get_type_hints(kind)
    values = {f.name: data.draw(values_of(types[f.name]), f.name) for f in dataclasses.fields(kind)}
    settings = kind(**values)
    stored = settings.stored()
    assert set(stored) == set(STORED[kind].split())
    free = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.metadata == FREE}
    assert read_stored(kind, stored | {"of_another_version": "x"}, free) == settings


def test_a_tuple_is_a_line_of_csv() -> None:
    files = ("x=a, b.npz", '"quoted", twice.npz')
    assert next(csv.reader([as_text(files)])) == list(files)
    assert as_text(("srd", "gradient")) == "srd,gradient"
    assert (as_text(None), as_text(()), as_text(True), as_text(1e-3)) == ("", "", "True", "0.001")


@pytest.mark.parametrize(("name", "text"), [("seed", "many"), ("seed", ""), ("pairs", "1.5"), ("lr", "x")])
def test_a_stored_text_of_another_type_is_named(name: str, text: str) -> None:
    with pytest.raises(
        SrdLabError, match=f"the stored run has {name} = '{text}', which this version cannot read"
    ):
        read_stored(ManipulationSettings, {name: text})
    with pytest.raises(BadRun, match="binarize = 'yes'"):
        read_stored(SurveySettings, {"binarize": "yes"})


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().seed = 1  # type: ignore[misc]


def test_stored_goes_before_fixed_and_fixed_before_options() -> None:
    options = {"seed": 1, "steps": 2, "lr": 0.5, "batch_size": None, "workers": 3, "of_the_command": 1}
    fresh = Given(options).read(ManipulationSettings, steps=4)
    assert (fresh.seed, fresh.steps, fresh.lr, fresh.workers, fresh.resumed) == (1, 4, 0.5, 3, False)
    stored = {"seed": "7", "batch_size": "9", "workers": "5"}
    again = Given(options, stored).read(ManipulationSettings, steps=4)
    assert (again.seed, again.steps, again.lr, again.workers, again.resumed) == (7, 4, 0.5, 3, True)
    assert again.batch_size == 9
    assert Given(options | {"batch_size": 2}, stored).read(ManipulationSettings).batch_size == 2


def command_of(path: str) -> click.Command:
    found: click.Command = main
    for name in path.split():
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_a_setting(path: str) -> None:
    """So none is without effect; and what a command says it does by default, its settings do too."""
    command, kinds = command_of(path), COMMANDS[path]
    fields = {f.name: f.default for kind in reversed(kinds) for f in dataclasses.fields(kind)}
    options = command.make_context(path, [__file__] if path == "explain" else []).params
    options = {name: value for name, value in options.items() if name not in OUTSIDE}
    if path == "explain":
        del options["images"]  # the pictures
    assert set(options) - set(fields) == set()
    ours = ("attacks", "starts", "methods") if path == "attack" else ()  # of three studies
    if path in ("evaluate", "explain"):
        assert options.pop("model") is None  # hangs on --data
    paper = ("models", "methods", "pairs", "images") if path.startswith("reproduce") else ()
    for name in set(options) - set(ours) - set(paper):
        assert options[name] == fields[name], name


def test_every_command_is_looked_at() -> None:
    groups = {name: c for name, c in main.commands.items() if isinstance(c, click.Group)}
    names = {
        name
        for name, c in main.commands.items()
        if name not in groups and "resume" in {p.name for p in c.params}
    }
    names |= {f"{group} {name}" for group, c in groups.items() for name in c.commands}
    assert names | {"explain"} == set(COMMANDS)
