"""What an attack's work buys: the fall of PCC per 100 forward passes, member by member.

    python scripts/bench_attacks.py                                  # SRD and LRP z+ on the bundled vgg16, 8 images
    python scripts/bench_attacks.py --method gradcam --images 16
    python scripts/bench_attacks.py --data imagenet:DIR --model resnet18 --weights FILE

Beside the members of the standard evaluation stand the published attack (Eq. 10) and a plain projected gradient descent,
written out below, as anybody would write it. The cost is the time of the attack over the time of a forward pass of the same
images, in turn, so that a slow phase of the machine hits both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import click

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as srd_lab.cli does

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.budget import Budget
from attacks.ensemble import OBJECTIVES, Ensemble
from attacks.experiment import attack_explainer
from attacks.manipulation import Manipulation
from attacks.objective import KeepClass
from attacks.probe import probe
from attacks.scores import similarity
from attacks.surrogate import Surrogate
from srd_lab.data import batch, load_data
from srd_lab.data.draw import draw_pairs
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.models import input_size, load_model
from srd_lab.runs.report import text_table
from srd_lab.types import Explainer

MSE, BOX = 1e-3, 8 / 255


def plain_pgd(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    beta: float | None,
    scale: Tensor,
    steps: int,
) -> Tensor:
    """PGD on the cosine of the maps with constant steps, clamped to the box, then scaled into the ball."""
    network = model if beta is None else SmoothModel(model, beta)
    before = explainer.explain(model, x, target).flatten(1)
    before = before / before.norm(dim=1, keepdim=True)
    radius = (MSE * x[0].numel()) ** 0.5
    change = 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    for _ in range(steps):
        leaf = (x + change).clamp(0, 1).requires_grad_()
        raw = explainer.explain(network, leaf, target).flatten(1)
        cosine = (raw * before).sum(1) / raw.norm(dim=1)
        (slope,) = torch.autograd.grad(cosine.sum(), leaf)
        slope = slope / slope.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
        change = (change - 0.1 * radius * slope / scale).clamp(-BOX, BOX)
        change = (x + change).clamp(0, 1) - x
        size = (change * scale).flatten(1).norm(dim=1)[:, None, None, None]
        change = change * (radius / size.clamp_min(radius))
    return x + change


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_seconds(model: nn.Module, x: Tensor, repeats: int = 5) -> float:
    """The median time of a forward pass."""
    with torch.no_grad():
        times = sorted(seconds(lambda: model(x)) for _ in range(repeats))
    return times[len(times) // 2]


def rows_of(
    method: str, start: str, model: nn.Module, x: Tensor, goals: Tensor, steps: int
) -> list[list[str]]:
    """A line per attack on one method."""
    explainer, budget = attack_explainer(method, start), Budget.named("legacy")
    raw, logits = explainer.explain_with_logits(model, x)
    target, size = logits.argmax(1), (x.shape[2], x.shape[3])
    found = probe(explainer, model, x[:4], budget)
    surrogate = found.best or Surrogate()
    goal = explainer.explain(model, goals)
    scale = Attack(explainer, steps=1).run(model, x[:1]).scale

    def pcc(images: Tensor) -> Tensor:
        after, logits = explainer.explain_with_logits(model, images, target)
        return similarity(after, raw, size)["pcc"].masked_fill(logits.argmax(1) != target, 1.0)

    def member(name: str) -> Callable[[], Tensor]:
        attack = Attack(
            explainer, KeepClass(OBJECTIVES[name]), budget=budget, surrogate=surrogate, steps=steps
        )
        return lambda: attack.run(model, x, target, goal=goal if name == "target" else None).worst["pcc"]

    attacks: dict[str, Callable[[], Tensor]] = {name: member(name) for name in OBJECTIVES}
    whole = Ensemble(budget=budget, steps=steps)
    attacks["ensemble"] = lambda: whole.run(model, explainer, x, target, surrogate=surrogate).worst["pcc"]
    attacks["eq10"] = lambda: pcc(Manipulation(explainer, steps=100).run(model, x, goals, target).adversarial)
    attacks["plain PGD"] = lambda: pcc(plain_pgd(explainer, model, x, target, surrogate.beta, scale, steps))
    lines = []
    for name, attack in attacks.items():
        unit, left = forward_seconds(model, x), []
        cost = seconds(lambda a=attack, out=left: out.append(float(a().mean()))) / unit  # type: ignore[misc]
        lines.append(
            [
                f"{method} ({surrogate})",
                name,
                f"{left[0]:.3f}",
                f"{cost:.0f}",
                f"{100 * (1 - left[0]) / cost:.3f}",
            ]
        )
    return lines


@click.command()
@click.option("--method", "methods", multiple=True, default=["srd", "lrp_zplus"], show_default=True)
@click.option("--images", default=8, show_default=True, type=click.IntRange(1))
@click.option(
    "--steps", default=40, show_default=True, type=click.IntRange(1), help="Of the members and plain PGD."
)
@click.option("--start", default="ones", show_default=True, type=click.Choice(["ones", "contrastive"]))
@click.option("--model", "name", default="vgg16", show_default=True)
@click.option("--data", default="scenes", show_default=True)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(
    methods: tuple[str, ...], images: int, steps: int, start: str, name: str, data: str, weights: Path | None
) -> None:
    """Compare attacks by what their work buys."""
    dataset, model = load_data(data, size=input_size(name, data)), load_model(name, data, weights, "cpu")
    pairs, _ = draw_pairs(dataset, model, images, 0, torch.device("cpu"))
    x, goals = (batch(dataset, [getattr(p, side) for p in pairs])[0] for side in ("original", "goal"))
    rows = [row for method in methods for row in rows_of(method, start, model, x, goals, steps)]
    header = ["method (surrogate)", "attack", "PCC left", "forward passes", "fall of PCC per 100"]
    click.echo(text_table(header, rows))


if __name__ == "__main__":
    main()
