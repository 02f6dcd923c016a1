"""What the tool costs, as ratios taken in one run, beside the bound that each must meet.

    python scripts/bench.py                 # VGG16 with random weights at 224 px
    python scripts/bench.py --end-to-end    # also `srd-lab attack --method srd --pairs 100` as a whole process

Every repeat runs all the pieces of work one after the other; a ratio is the median over repeats of the ratio within
a repeat, so that a slow phase of the machine hits both sides alike. Exit code 1 if a bound is not met.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as srd_lab.cli does

import torch
import torchvision
from torch import Tensor, nn

from apop import record, replay
from attacks import Objective
from attacks.experiment import attack_explainer
from srd_lab import maps
from srd_lab.intercept import SmoothModel
from srd_lab.options import text_table
from srd_lab.registry import make_explainer
from srd_lab.runtime import keep_freed_memory

Work = Callable[[], object]


def plain_forward(model: nn.Module, x: Tensor) -> Work:
    def work() -> Tensor:
        with torch.no_grad():
            return model(x)

    return work


def plain_gradient(model: nn.Module, x: Tensor) -> Work:
    def work() -> Tensor:
        leaf = x.clone().requires_grad_()
        score = model(leaf).amax(1).sum()
        return torch.autograd.grad(score, leaf)[0].abs().sum(1)

    return work


def attack_iteration(method: str, model: nn.Module, x: Tensor) -> Work:
    """One step's gradient of the attack's loss on the surrogate."""
    explainer, surrogate, objective = attack_explainer(method, "ones"), SmoothModel(model, 30.0), Objective()
    target = model(x).argmax(1)
    goal, logits0 = maps.sum_to_one(explainer.explain(model, x.flip(3), target)), model(x).detach()

    def work() -> Tensor:
        leaf = x.clone().requires_grad_()
        raw, logits = explainer.explain_with_logits(surrogate, leaf, target)
        return torch.autograd.grad(objective(raw, goal, logits, logits0).sum(), leaf)[0]

    return work


def apop_passes(model: nn.Module, x: Tensor) -> Work:
    """The recording and six replays."""
    inputs = (torch.zeros_like(x), torch.ones_like(x), torch.randn_like(x))

    def work() -> None:
        _, pattern = record(model, x)
        for given in inputs:
            for relu in (False, True):
                replay(model, given, pattern, relu)

    return work


def ratios(over: dict[str, Work], base: Work, repeats: int) -> dict[str, float]:
    """Median over repeats of (time of each / time of ``base``)."""
    for work in (base, *over.values()):
        work()
    found: dict[str, list[float]] = {name: [] for name in over}
    for _ in range(repeats):
        unit = _seconds(base)
        for name, work in over.items():
            found[name].append(_seconds(work) / unit)
    return {name: median(values) for name, values in found.items()}


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def end_to_end() -> tuple[float, float]:
    """Seconds and peak memory (GiB) of the demo's attack as a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "srd_lab.cli", "attack", "--method", "srd", "--pairs", "100"]
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=Path(folder), stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--images", default=2, show_default=True, help="Images per batch.")
@click.option("--size", default=224, show_default=True, help="Pixels.")
@click.option("--end-to-end", "whole", is_flag=True, help="Also time the demo's command.")
def main(repeats: int, threads: int, images: int, size: int, whole: bool) -> None:
    """Print measured ratios beside their bounds."""
    seconds, gib = end_to_end() if whole else (0.0, 0.0)  # first: a child's peak counts what its parent held
    keep_freed_memory()  # as the commands do
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).eval().requires_grad_(False)
    x = torch.rand(images, 3, size, size)

    srd = make_explainer("srd")
    maps_ = ratios(
        {"SRD map / gradient map": lambda: srd.explain(model, x)}, plain_gradient(model, x), repeats
    )
    attacked = {
        f"attack iteration / forward: {m}": attack_iteration(m, model, x)
        for m in ("gradient", "srd", "lrp_zplus")
    }
    steps = ratios(attacked, plain_forward(model, x), repeats)
    seven = plain_forward(model, x)
    patterns = ratios(
        {"APOP, 7 passes / 7 forwards": apop_passes(model, x)}, lambda: [seven() for _ in range(7)], repeats
    )

    bounds = (1.3, 6.0, 8.0, 12.0, 1.3)
    measured = {**maps_, **steps, **patterns}
    rows = [
        [name, f"{value:.2f}", f"{bound}"]
        for (name, value), bound in zip(measured.items(), bounds, strict=True)
    ]
    met = all(value <= bound for value, bound in zip(measured.values(), bounds, strict=True))
    if whole:
        rows += [
            ["attack --method srd --pairs 100, s", f"{seconds:.0f}", "180"],
            ["  its peak memory, GiB", f"{gib:.2f}", "3"],
        ]
        met = met and seconds <= 180 and gib <= 3
    click.echo(text_table(["work", "measured", "bound"], rows))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
