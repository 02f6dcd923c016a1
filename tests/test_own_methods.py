"""Methods and metrics from elsewhere, by name: as good as the ones that come with the package, or one line."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from small_networks import command, tiny_study
from test_methods import Mixed, normalised, pixels
from torch import Tensor

import srd_lab
from attacks.experiment import attack_explainer
from srd_lab import catalogue
from srd_lab.adapters import captum_attribution, explain_func
from srd_lab.catalogue import Declared, Method, metric_of
from srd_lab.cli.main import main
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue, Refused, SrdLabWarning, Unavailable
from srd_lab.parts import code_in, code_of
from srd_lab.registry import EXPLAINERS, make_explainer, make_metric

MINE = """
from dataclasses import dataclass
import torch
from srd_lab import EXPLAINERS, Explainer

@dataclass(frozen=True)
class Powered(Explainer):
    power: float = 2.0
    def explain_with_logits(self, model, x, target=None):
        raw, logits = EXPLAINERS["gradient"].explain_with_logits(model, x, target)
        return raw.abs() ** self.power, logits

class Wrong(Powered):
    def explain_with_logits(self, model, x, target=None):
        raw, logits = super().explain_with_logits(model, x, target)
        channels, first = (raw[:, None], logits), (raw[:1, 0], logits)
        return {"pair": raw, "channels": channels, "first": first, "logits": (raw, logits[0])}[SHAPE]

SHAPE = "pair"

class Peak:
    better = "higher"
    title = "Peak"
    def of(self, explained):
        size = explained.maps.abs().double().flatten(1)
        return size.amax(1) / size.sum(1)

class OneNumber:
    better = "lower"
    def of(self, explained):
        return explained.maps.mean()

class Sideways(Peak):
    better = "sideways"

class Neither:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return "mine.py"


@pytest.fixture
def model() -> torch.nn.Module:
    return normalised(Mixed())


def test_a_method_of_ones_own_is_called_as_any_other(mine: str, model: torch.nn.Module) -> None:
    x = pixels(2, 3, 8, 8).requires_grad_()
    found = make_explainer(f"{mine}:Powered?power=3").explain(model, x, 1)
    torch.testing.assert_close(found, EXPLAINERS["gradient"].explain(model, x, 1).abs() ** 3)
    assert found.requires_grad
    smoothed = make_explainer(f"smoothed({mine}:Powered?power=3,0.1,4)")
    assert smoothed.explain(model, x.detach(), 1).shape == (2, 8, 8)
    assert attack_explainer(f"{mine}:Powered", "ones") == make_explainer(f"{mine}:Powered")


def test_options_of_the_methods_that_come_with_it(model: torch.nn.Module) -> None:
    assert make_explainer("srd?level=high&start=ones") == make_explainer("srd", level="high", start="ones")
    assert make_explainer("smoothed(gradient?channels=abs_sum,0.1,4)").explainer.channels == "abs_sum"  # type: ignore[attr-defined]
    assert attack_explainer("srd?start=contrastive", "ones").start == "contrastive"  # type: ignore[attr-defined]
    assert attack_explainer("gradient?channels=max_abs", "ones").channels == "max_abs"  # type: ignore[attr-defined]
    assert attack_explainer("srd?level=low", "ones") == make_explainer("srd?level=low")
    assert make_metric("fidelity?baseline=white&draws=3").draws == 3  # type: ignore[attr-defined]
    assert metric_of("fidelity?draws=3").better == "higher"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:Neither", r"gives a Neither without explain_with_logits\(model, x, target\)"),
        ("mine.py:Powered?strength=2", "unexpected keyword argument 'strength'"),
        ("mine.py:Nothing", "mine.py has no 'Nothing'; it has Powered, Wrong, Peak, OneNumber"),
        ("srd?levels=high", "srd has no option levels; it takes encoder, start, level"),
        ("smoothgrad?samples=many", "SmoothGrad: samples must be a whole number, got 'many'"),
        ("nothing?x=3", "unknown method 'nothing'; expected one of gradient, "),
        ("captum:Nothing", "captum.attr has no attribution 'Nothing'"),
        ("captum:LayerGradCam", "the attributions of a layer take layer=NAME, and no others do"),
        ("captum:Saliency?layer=a", "the attributions of a layer take layer=NAME"),
        ("zennit:Nothing", "zennit has no composite 'Nothing'; it has BetaSmooth, "),
        ("zennit:EpsilonPlus?canonise=Nothing", "zennit has no canonizer 'Nothing'"),
    ],
)
def test_what_is_no_method_is_one_line(mine: str, name: str, said: str) -> None:
    with pytest.raises(BadValue, match=said) as error:
        make_explainer(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("pair", "gives a Tensor; expected a pair of tensors: maps and logits"),
        ("channels", r"gives maps of shape \(2, 1, 8, 8\) for 2 images; expected \(2, h, w\)"),
        ("first", r"gives maps of shape \(1, 8\) for 2 images"),
        ("logits", r"gives logits of shape \(\d+,\) for 2 images; expected \(2, classes\)"),
    ],
)
def test_results_of_a_wrong_shape_name_the_method(
    mine: str, model: torch.nn.Module, shape: str, said: str
) -> None:
    method = make_explainer(f"{mine}:Wrong")
    from srd_lab.parts import find

    sys.modules[find(f"{mine}:Wrong").__module__].SHAPE = shape  # type: ignore[attr-defined]
    with pytest.raises(BadValue, match=f"mine.py:Wrong {said}"):
        method.explain(model, pixels(2, 3, 8, 8), 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:Neither", r"gives a Neither without a method of\(explained\)"),
        ("mine.py:Sideways", "has better = 'sideways'; expected 'higher' or 'lower'"),
        ("fidelity?pixel=3", "fidelity has no option pixel; it takes pixels, draws, seed, baseline"),
        ("nothing", "unknown metric 'nothing'; expected one of pointing_game, "),
    ],
)
def test_what_is_no_metric_is_one_line(mine: str, name: str, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        make_metric(name)


# --- from the command line ------------------------------------------------------------------------------------------

FEW = ("--images", "7", "--batch-size", "3", "--device", "cpu", "--no-track")


def test_own_methods_and_metrics_stand_in_the_tables(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = f"srd,{mine}:Powered?power=3,gradient?channels=abs_sum,smoothed({mine}:Powered,0.1,2)"
    options = (
        "--methods",
        methods,
        "--metrics",
        f"sparseness,{mine}:Peak,fidelity?draws=2",
        *FEW,
        "--out",
        str(out),
    )
    result = command("evaluate", *options)
    assert result.exit_code == 0, result.output
    assert "Peak ↑" in result.output
    for method in methods.split(",")[:3]:
        assert f"\n{method} " in result.output
    rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    assert len(rows) == 7 * 4
    peaks = [float(row[f"{mine}:Peak"]) for row in rows]
    assert all(0 < peak < 1 for peak in peaks)
    code = json.loads((out / "run.json").read_text())["params"]["own_code"]
    digits = hashlib.sha256((tmp_path / mine).read_bytes()).hexdigest()[:12]
    assert code == f"{mine}:Powered {digits}, {mine}:Peak {digits}"
    against = list(csv.DictReader((out / "comparisons.csv").read_text().splitlines()))
    assert {row["metric"] for row in against} == {"sparseness", f"{mine}:Peak", "fidelity?draws=2"}
    wrong = command("evaluate", "--methods", "srd", "--metrics", f"{mine}:OneNumber", *FEW)
    assert (
        "the metric mine.py:OneNumber gives () for 3 images; expected one number per image, (3,)"
        in wrong.output
    )
    assert wrong.exit_code == 1


@pytest.mark.slow
def test_own_methods_are_attacked_ranked_and_put_on_the_leaderboard(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_study(monkeypatch, steps=2, queries=6)
    out = tmp_path / "out"
    methods = [f"{mine}:Powered?power=3", "captum:Saliency?abs=False", "gradient?channels=abs_sum"]
    asked = [part for method in methods for part in ("--method", method)]
    options = ("--pairs", "2", "--no-curve", "--no-eq10", "--device", "cpu", "--no-track", "--out", str(out))
    result = command("robustness", *asked, *options)
    assert result.exit_code == 0, result.output
    assert (
        "no_gradient: attacked by the black box alone: the map of captum:Saliency?abs=False has no gradient"
        in result.output
    )
    entries = sorted(out.rglob("entry.json"))
    assert {json.loads(entry.read_text())["method"] for entry in entries} == set(methods)
    board = command("leaderboard", *map(str, entries), "--out", str(tmp_path / "board"))
    assert board.exit_code == 0, board.output
    written = (tmp_path / "board.md").read_text()
    assert all(method in written for method in methods)
    eq10 = ("--attack", "eq10", "--pairs", "2", "--steps", "2", "--device", "cpu", "--no-track")
    assert command("attack", "--method", methods[0], *eq10).exit_code == 0


# --- other libraries ------------------------------------------------------------------------------------------------


def test_a_layer_is_found_by_its_name_as_written_and_on_a_surrogate() -> None:
    pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 4, 3),
        *(torch.nn.ReLU() for _ in range(9)),
        torch.nn.ReLU(),
    ]
    net = torch.nn.Sequential(
        torch.nn.Sequential(*layers), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).eval()
    x = torch.rand(2, 3, 8, 8)
    explainer = make_explainer("captum:LayerGradCam?layer=0.10")
    found = explainer.explain(net, x, 1)
    assert found.shape == (2, 6, 6)
    torch.testing.assert_close(explainer.explain(SmoothModel(net, 1e4), x, 1), found, rtol=1e-3, atol=1e-4)
    assert not torch.equal(make_explainer("captum:LayerGradCam?layer=0.0").explain(net, x, 1), found)


def test_attributions_of_captum(model: torch.nn.Module) -> None:
    attr = pytest.importorskip("captum.attr")
    x, classes = pixels(2, 3, 8, 8), torch.tensor([1, 2])
    given = model.normalise(x)
    found = make_explainer("captum:IntegratedGradients?n_steps=5").explain(model, x, classes)
    theirs = attr.IntegratedGradients(model.network).attribute(given, target=classes, n_steps=5)
    torch.testing.assert_close(found, theirs.sum(1).detach())
    layer = next(
        name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Conv2d)
    )
    found = make_explainer(f"captum:LayerGradCam?layer={layer}").explain(model, x, classes)
    theirs = attr.LayerGradCam(model.network, dict(model.network.named_modules())[layer]).attribute(
        given, target=classes
    )
    torch.testing.assert_close(found, theirs.sum(1).detach())
    with pytest.raises(BadValue, match=r"the network has no module 'nowhere'; its first ones are "):
        make_explainer("captum:LayerGradCam?layer=nowhere").explain(model, x, classes)
    with pytest.raises(Refused, match=r"captum:IntegratedGradients\?method=magic fails: "):
        make_explainer("captum:IntegratedGradients?method=magic").explain(model, x, classes)


def test_composites_of_zennit() -> None:
    composites = pytest.importorskip("zennit.composites")
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)]
    network = torch.nn.Sequential(*layers).double()
    x, classes = pixels(2, 3, 8, 8), torch.tensor([1, 2])
    found = make_explainer("zennit:EpsilonPlus?epsilon=0.1").explain(network, x, classes)
    leaf = x.clone().requires_grad_()
    with composites.EpsilonPlus(epsilon=0.1).context(network) as changed:
        chosen = changed(leaf).gather(1, classes[:, None]).sum()
        (expected,) = torch.autograd.grad(chosen, leaf)
    torch.testing.assert_close(found, expected.sum(1))
    assert not any(module._forward_hooks for module in network.modules())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "zennit", None)
    for name in ("captum:Deconvolution", "zennit:GuidedBackprop"):
        with pytest.raises(Unavailable, match=f"{name} needs {name.partition(':')[0]}; `pip install"):
            make_explainer(name)


# --- declared by other packages -------------------------------------------------------------------------------------


def test_decorators_declare_methods_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(catalogue.METHODS, "add", found.__setitem__)
    monkeypatch.setattr(catalogue.METRICS, "add", found.__setitem__)

    @srd_lab.register_method("flat", level=2)
    class Flat:
        def __init__(self, level: int) -> None:
            self.level = level

    @srd_lab.register_metric("zero", better="lower")
    class Zero:
        def of(self, explained: Any) -> Tensor:
            return torch.zeros(len(explained.maps))

    assert (found["flat"].title, found["flat"].explainer.level, found["flat"].attackable) == ("flat", 2, True)
    assert (found["zero"].title, found["zero"].better) == ("zero", "lower")
    with pytest.raises(BadValue, match="zero has better = 'up'; expected 'higher' or 'lower'"):
        srd_lab.register_metric("zero", better="up")
    assert isinstance(Flat(1), Flat)
    assert isinstance(Zero(), Zero)


def test_entry_points_are_loaded_and_broken_ones_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Works(EntryPoint):
        def load(self) -> None:
            loaded.append(self.name)
            declared.add("theirs", "entry")

    points = [
        Works("theirs", "their.package", "srd_lab.reproduce"),
        EntryPoint("broken", "not.there:at_all", "x"),
    ]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: points if group == "srd_lab.metrics" else [])
    declared: Declared[Any] = Declared("srd_lab.metrics", ())
    said = (
        r"the entry point broken = not\.there:at_all of srd_lab\.metrics is left out: No module named 'not'"
    )
    with pytest.warns(SrdLabWarning, match=said):
        assert declared["theirs"] == "entry"
    assert loaded == ["theirs"]
    assert callable(entry_points)


def test_public_names_are_there() -> None:
    assert srd_lab.__version__.count(".") == 2
    assert all(getattr(srd_lab, name) is not None for name in srd_lab.__all__)
    assert isinstance(next(iter(catalogue.METHODS.values())), Method)


# --- what the documentation shows -------------------------------------------------------------------------------------

SHOWN = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[1] / "docs" / "own_parts.md").read_text("utf-8"),
    re.DOTALL,
)


def test_the_examples_of_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = [text for text in SHOWN if text.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text("\n".join(own))
    options = (
        "--model",
        "mine.py:net?width=6",
        "--methods",
        "mine.py:Powered,srd",
        "--metrics",
        "mine.py:Peak",
    )
    result = command("evaluate", *options, *FEW)
    assert result.exit_code == 0, result.output
    assert "Peak ↑" in result.output
    (attack,) = [text for text in SHOWN if "from attacks import" in text]
    found: dict[str, Any] = {
        "model": srd_lab.load_model("vgg16", device="cpu"),
        "x": torch.rand(1, 3, 64, 64),
    }
    exec(attack.replace("steps=40", "steps=2"), found)
    assert found["outcome"].worst["pcc"].shape == (1,)


# --- one spelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["attack", "robustness", "evaluate", "explain", "reproduce fig4", "reproduce table2"]
)
def test_methods_are_spelled_and_repeated_alike_in_all_commands(name: str) -> None:
    found: Any = main
    for part in name.split():
        found = found.commands[part]
    (option,) = [p for p in found.params if p.name == "methods"]
    assert option.opts == ["--method", "--methods"]
    ctx = click.Context(found)
    given = option.type_cast_value(ctx, ("srd,gradient", "gradient", "grad_input"))
    assert option.callback(ctx, option, given) == ("srd", "gradient", "grad_input")
    with pytest.raises(click.BadParameter, match="'nothing' is not one of all, "):
        option.type_cast_value(ctx, ("srd,nothing",))
    if name.startswith("reproduce"):
        with pytest.raises(click.BadParameter):
            option.type_cast_value(ctx, ("mine.py:Method",))
    else:
        free = ("mine.py:Method?a=1,srd?level=high", "smoothed(gradient,0.1,4)")
        flat = option.callback(ctx, option, option.type_cast_value(ctx, free))
        assert flat == ("mine.py:Method?a=1", "srd?level=high", "smoothed(gradient,0.1,4)")


# --- the way back ---------------------------------------------------------------------------------------------------


def test_methods_in_the_hands_of_captum(model: torch.nn.Module) -> None:
    attr = pytest.importorskip("captum.attr")
    x = pixels(2, 3, 8, 8).requires_grad_()
    ours = captum_attribution(model, "grad_input?channels=sum")
    assert isinstance(ours, attr.Attribution)
    theirs = attr.InputXGradient(model).attribute(x, target=torch.tensor([1, 2]))
    found = ours.attribute(x, target=torch.tensor([1, 2]))
    assert found.shape == (2, 1, 8, 8)
    assert found.requires_grad
    # on the normalised image here, on the pixels there: the same where the image is its own normalised one
    bare = captum_attribution(model.network, "grad_input?channels=sum").attribute(x, target=1)
    expected = attr.InputXGradient(model.network).attribute(x, target=1).sum(1, keepdim=True)
    torch.testing.assert_close(bare.detach(), expected.detach())
    assert theirs.shape == x.shape
    with pytest.raises(BadValue, match="unknown method 'nothing'"):
        captum_attribution(model, "nothing")


def test_methods_in_the_hands_of_quantus(model: torch.nn.Module) -> None:
    x, y = pixels(2, 3, 8, 8).numpy(), np.array([1, 2])
    for method in ("srd", "gradcam"):
        found = explain_func(model, x, y, method=method, normalise=True)
        assert (found.shape, found.dtype) == ((2, 1, 8, 8), np.float64)
    expected = make_explainer("srd").explain(model, torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(explain_func(model, torch.from_numpy(x), y[:, None])[:, 0], expected.numpy())


def test_sources_of_data_are_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the working directory that is called as a source of data is not imported for it."""
    monkeypatch.chdir(tmp_path)
    for name in ("voc", "imagenet", "timm", "table", "pictures"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it ran')\n")
    for text in ("voc:DIR", "imagenet:DIR", "timm:resnet18", "table:DIR,pictures:DIR", "live:Net-1"):
        assert code_in(text) == []
        assert code_of(text) == {}
    assert code_in("srd,smoothed(mine.py:Method?a=1,0.1),hub:a/b:net?x=1") == [
        "mine.py:Method",
        "hub:a/b:net",
    ]
