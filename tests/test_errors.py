"""The kinds of errors: every one has a code, and none is raised without a kind."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import apop
import attacks
import srd_lab
from srd_lab import errors
from srd_lab.errors import SrdLabError

CODES = {
    "BadValue": "value",
    "BadInput": "input",
    "Refused": "refused",
    "Leak": "leak",
    "BadData": "data",
    "BadWeights": "weights",
    "StoreTrouble": "store",
    "BadRun": "run",
    "OtherWork": "run",
    "BadEntry": "entry",
    "NoGradient": "gradient",
    "Unavailable": "unavailable",
}


def test_codes_are_a_promise() -> None:
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, SrdLabError) and kind is not SrdLabError
    }
    assert {name: kind.code for name, kind in kinds.items()} == CODES
    for name, code in CODES.items():
        assert f"| :class:`{name}` | ``{code}`` |" in (errors.__doc__ or "")


@pytest.mark.parametrize("package", [srd_lab, attacks, apop], ids=lambda package: package.__name__)
def test_whatever_is_raised_says_its_kind(package: object) -> None:
    folder = Path(inspect.getfile(package)).parent  # type: ignore[arg-type]
    files = sorted(folder.rglob("*.py"))
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "SrdLabError", f"{file.name}:{node.lineno} raises an error of no kind"
