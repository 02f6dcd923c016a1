"""How often a program waits for the device, counted with the guard of ``device_guard.py``.

    python tests/device_waits.py           # the table of docs/scale.md
    python tests/device_waits.py --json    # for tests/test_device_guard.py, with the places

Networks are small and not trained: how often a call waits does not hang on that. Numbers are compared with those of the CPU.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from device_guard import DEVICE, MIXED, Guard, Mixed, on_device
from small_networks import images, small_model
from torch import Tensor, nn
from torchvision.models import resnet18

from apop.experiment import Experiment
from attacks.attack import Attack, Outcome
from attacks.budget import Budget
from attacks.optimiser import Adam
from attacks.surrogate import Surrogate
from srd_lab.catalogue import METRICS
from srd_lab.metrics.explained import Explained, Images
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer, make_metric
from srd_lab.types import Sample

Row = dict[str, Any]
N, STEPS, STOP = 3, 4, 1e-3
MAPS = (
    *("gradient", "guided_backprop", "integrated_gradients", "smoothgrad", "gradcam", "scorecam"),
    *("lrp_zplus", "lrp_epsilon", "srd", "srd_high"),
)
ATTACKS = {"gradient": "softplus_30", "srd": "none", "lrp_zplus": "none"}
BUDGETS = ("legacy", "l2", "linf")


def row(waits: list[str], apart: float = 0.0) -> Row:
    return {"waits": len(waits), "where": waits, "apart": apart}


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite where only one has a number."""
    one, other = (getattr(t, "numbers", t).detach() for t in (one, other))
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def there(model: nn.Module) -> nn.Module:
    """A copy of a network on the device."""
    with Guard():
        return copy.deepcopy(model).to(DEVICE)


def residual_network() -> Classifier:
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return Classifier(network, (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)).eval().requires_grad_(False)


def maps() -> dict[str, Row]:
    """One map of N images each, after one of other images."""
    model, x, found = residual_network(), images(N, side=32), {}
    moved = there(model)
    for name in MAPS:
        explainer = make_explainer(name)
        expected, _ = explainer.explain_with_logits(model, x)
        with Guard() as guard:
            explainer.explain(moved, on_device(x.flip(3)))
            guard.waits.clear()
            raw, _ = explainer.explain_with_logits(moved, on_device(x))
            found[name] = row(guard.waits[:], apart(raw, expected))
            guard.waits.clear()
            explainer.explain(moved, on_device(x))
            found[f"{name}, explain"] = row(guard.waits[:])
    return found


def attacks() -> dict[str, Row]:
    """The step of an attack that waits most, of N images, those that look at the original network too."""
    model, x, found = small_model(), images(N), {}
    moved = there(model)
    for name, surrogate in ATTACKS.items():
        for norm in BUDGETS:
            attack = Attack(
                make_explainer(name),
                budget=Budget.named(norm),
                surrogate=Surrogate.named(surrogate),
                steps=STEPS,
            )
            expected = attack.run(model, x)
            waits, outcome = waits_between(lambda mark: attack.run(moved, on_device(x), on_step=mark))  # noqa: B023
            found[f"{name}, {norm}"] = row(max(waits, key=len), _apart(outcome, expected))
    ends = Budget(linf=8.0, stop_mse=STOP)
    attack = Attack(make_explainer("srd"), budget=ends, optimiser=Adam(5e-3), start=0.0, steps=12)
    expected = attack.run(model, x)
    waits, outcome = waits_between(lambda mark: attack.run(moved, on_device(x), on_step=mark))
    assert 1 < expected.steps.min() < 12
    found["srd, images end"] = row(max(waits, key=len), _apart(outcome, expected))
    return found


def waits_between(work: Callable[[Callable[[int], None]], Any]) -> tuple[list[list[str]], Any]:
    """What some work waits for between two calls of the function that it is given, and what comes of it."""
    with Guard() as guard:
        marks: list[int] = []
        out = work(lambda count: marks.append(len(guard.waits)))
    return [guard.waits[first:end] for first, end in pairwise(marks)], out


def _apart(outcome: Outcome, expected: Outcome) -> float:
    names = ("adversarial", "loss", "stuck")
    return max(apart(getattr(outcome, name), getattr(expected, name)) for name in names)


def apop() -> dict[str, Row]:
    """The pass of a batch that waits most: of constants and binarised layers, and where noise is drawn."""
    model, x, found = small_model(), images(N), {}
    samples, moved = [Sample(image, i, None, str(i)) for i, image in enumerate(x)], there(model)
    for name, inputs in (("constants", ("zeros", "ones")), ("noise", ("normal",))):
        experiment = Experiment(inputs)
        expected = experiment.run(model, samples, range(N)).right
        waits, hits = waits_between(lambda mark: experiment.run(moved, samples, range(N), DEVICE, mark))  # noqa: B023
        wrong = sum((hits.right[name] != of_cpu).any() for name, of_cpu in expected.items())
        found[name] = row(max(waits, key=len), float(wrong))
    return found


def metrics() -> dict[str, Row]:
    """A batch of N images each, of gradient's maps, after another batch; none remembers what another one asked."""
    model, x, found = small_model(), images(N), {}
    moved, masks = there(model), torch.zeros(N, *x.shape[2:], dtype=torch.bool)
    masks[:, 3:8, 2:7] = True
    explainer = make_explainer("gradient")
    for name in METRICS:
        metric = make_metric(name)
        if name == "fidelity":
            metric = replace(metric, pixels=20)  # type: ignore[type-var]
        given = (model, x, model(x).argmax(1), range(N), masks)
        expected = metric.of(Explained.by(explainer, Images(*given)))
        with Guard() as guard:
            of_model: dict[Any, Any] = {}
            for _ in range(2):
                here = on_device(x)
                own = (moved, here, moved(here).argmax(1), range(N), on_device(masks), of_model)
                explained = Explained.by(explainer, Images(*own))
                guard.waits.clear()
                scores = metric.of(explained)
            found[name] = row(guard.waits[:], apart(scores, expected))
    return found


def guarded() -> dict[str, Row]:
    """What the guard counts and refuses: one call each; -1 where it is refused."""
    values, place = torch.tensor([3.0, 1.0, 2.0]), torch.tensor(1)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "item": lambda t: t[0].item(),
        "bool": lambda t: bool((t > 0).all()),
        "float": lambda t: float(t.sum()),
        "tolist": lambda t: t.tolist(),
        "cpu": lambda t: t.cpu(),
        "to cpu": lambda t: t.to("cpu"),
        "to device": lambda t: values.to(t.device),
        "tensor on device": lambda t: torch.tensor([1.0, 2.0], device=t.device),
        "new_tensor": lambda t: t.new_tensor([1.0]),
        "equal": lambda t: torch.equal(t, t),
        "allclose": lambda t: torch.allclose(t, t),
        "nonzero": lambda t: t.nonzero(),
        "unique": lambda t: t.unique(),
        "mask": lambda t: t[t > 1],
        "assign by mask": lambda t: t.__setitem__(t > 1, t[:2].clone()),
        "assign a tensor's number by mask": lambda t: t.__setitem__(t > 1, t[0].clone()),
        "masked_fill by a tensor": lambda t: t.masked_fill(t > 1, t[0]),
        "index on the cpu": lambda t: t[torch.tensor([0, 2])],
        "within backward": lambda t: (Waiting.apply(t.requires_grad_()) * t).sum().backward(),
        "assign a number by mask": lambda t: t.__setitem__(t > 1, 0.0),
        "masked_fill by a number": lambda t: t.masked_fill(t > 1, 0.0),
        "index": lambda t: t[torch.arange(2, device=t.device)],
        "number of the cpu": lambda t: t * torch.tensor(2.0),
        "new on device": lambda t: t + torch.zeros(3, device=t.device) + t.new_ones(3),
        "arithmetic": lambda t: torch.where(t > 1, t.cumsum(0), 0).sort().values.sum(),
        "arange on the cpu": lambda t: t + torch.arange(3),
        "zeros on the cpu": lambda t: torch.cat([t, torch.zeros(1)]),
        "number of the cpu among tensors": lambda t: torch.stack([t[0], place]),
        "generator": lambda t: torch.rand(3, generator=torch.Generator(t.device), device=t.device),
        "generator of the cpu": lambda t: torch.rand(3, generator=torch.Generator(), device=t.device),
    }
    found = {}
    for name, call in calls.items():
        t = on_device(values)
        with Guard() as guard:
            try:
                call(t)
                found[name] = row(guard.waits[:])
            except Mixed as error:
                found[name] = {"waits": -1, "where": [str(error)], "apart": 0.0}
    return found


class Waiting(torch.autograd.Function):
    """Waits for a number in its backward pass, which a thread of the device runs."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * float(grads[0].sum())


SECTIONS = {
    "maps": ("a map", maps),
    "attacks": ("a step of an attack", attacks),
    "apop": ("a pass of APOP", apop),
    "metrics": (f"a metric, for {N} images", metrics),
    "guard": ("one call; -1 where it is refused", guarded),
}


def main(as_json: bool) -> None:
    """Print what is counted. as_json : all of it, for a program."""
    warnings.simplefilter("ignore")  # small maps have no layer of 1/8 of the image
    found = {}
    for section, (title, count) in SECTIONS.items():
        MIXED.clear()
        found[section] = {"rows": count(), "mixed": MIXED[:]}
        if not as_json:
            print(f"\n{title}: waits")
            for name, counted in found[section]["rows"].items():
                print(f"  {name:36}{counted['waits']:4}")
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    main("--json" in sys.argv)
