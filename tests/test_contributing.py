"""The recipes of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from srd_lab.catalogue import METHODS, METRICS
from srd_lab.errors import SrdLabError
from srd_lab.metrics.explained import Explained, Images
from srd_lab.registry import make_explainer

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def declared() -> Iterator[None]:
    tuple(METHODS), tuple(METRICS)
    for recipe in RECIPES[:2]:
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


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which all three recipes were followed to the letter, and what they are tried on."""
    folder = tmp_path_factory.mktemp("followed")
    for package in ("srd_lab", "attacks", "apop"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    files = [f"srd_lab/{part}" for part in ("methods/squared.py", "metrics/peak.py", "data/dots.py")]
    for file, recipe in zip(files, RECIPES, strict=True):
        package, name = Path(file).parent, Path(file).name
        assert f"One file in `{package.as_posix()}/`, say `{name}`" in TEXT
        (folder / file).write_text(recipe, encoding="utf-8")
    table, line = folder / "srd_lab" / "parts.py", re.search(r'```\n( +"dots": .*\n)```', TEXT)
    assert line is not None
    assert "one line in `FOLDERS` in `srd_lab/parts.py`" in TEXT
    before, opening, after = table.read_text("utf-8").partition("FOLDERS = {\n")
    table.write_text(before + opening + line[1] + after, encoding="utf-8")
    (folder / "dots.txt").write_text("10 20\n50 70\n30 80\n", encoding="utf-8")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), folder / "net.pth")
    return folder


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srd_lab", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_the_three_recipes_work_to_the_letter(followed: Path) -> None:
    of = ("--model", "squeezenet1_1", "--weights", "net.pth", "--size", "64", "--device", "cpu", "--no-track")
    scored = ("--methods", "squared", "--metrics", "peak", "--images", "2", "--out", "out")
    done = ran(followed, "evaluate", "--data", "dots:dots.txt", *of, *scored)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "squared" in done.stdout.lower()
    assert "peak" in done.stdout.lower()
    stored = [file for file in (followed / "out").rglob("*") if file.is_file()]
    assert any("dots:dots.txt" in file.read_text("utf-8", "replace") for file in stored)


def test_a_data_set_of_the_recipe_is_known_everywhere(followed: Path) -> None:
    """In the help, in what errors name, and as no module of one's own."""
    assert "dots" in ran(followed, "evaluate", "--help").stdout
    for data, said in (
        ("dots:nowhere", "there is no file nowhere; give dots:FILE"),
        ("dot-s:x", "dots:FILE"),
    ):
        done = ran(followed, "evaluate", "--data", data, "--model", "squeezenet1_1", "--no-track")
        assert done.returncode
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    asked = "from srd_lab.models import networks; import json; print(json.dumps(networks('dots:x')))"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=followed,
        env=os.environ | {"PYTHONPATH": str(followed)},
        capture_output=True,
        text=True,
    )
    assert "squeezenet1_1" in json.loads(done.stdout)
