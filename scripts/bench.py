"""What the tool costs, as ratios taken in one run, beside the bound that each must meet.

    python scripts/bench.py                  # VGG16 with random weights at 224 px
    python scripts/bench.py --device cuda --images 32
    python scripts/bench.py --end-to-end     # also `srd-lab attack --method srd --pairs 100` as a whole process
    python scripts/bench.py --ray            # also batches on a Ray cluster of one and of two workers, one thread each
    python scripts/bench.py --data imagenet:DIR --weights resnet18=FILE   # also APOP on ResNet18 with all images of DIR

Every repeat runs all the pieces of work one after the other; a ratio is the median over repeats of the ratio within
a repeat, so that a slow phase of the machine hits both sides alike. Exit code 1 if a bound is not met.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as srd_lab.cli does

import torch
import torchvision
from torch import Tensor, nn

from apop import record, replay
from apop.experiment import Experiment
from apop.settings import SurveySettings
from apop.study import Survey
from attacks.experiment import attack_explainer
from attacks.objective import Eq10, Reference, View
from srd_lab.cli.options import WeightsFile
from srd_lab.data import load_batches, load_data
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.evaluation.settings import EvaluationSettings
from srd_lab.evaluation.study import Evaluation
from srd_lab.models import load_model
from srd_lab.registry import make_explainer
from srd_lab.runs.batches import Stage
from srd_lab.runs.executors import Local
from srd_lab.runs.on_ray import OnRay
from srd_lab.runs.report import text_table
from srd_lab.runs.settings import weights_of
from srd_lab.runs.tracking import Run, open_run
from srd_lab.runs.work import Item, Part
from srd_lab.runtime import Batcher, keep_freed_memory, pick_device

Work = Callable[[], object]
Row = tuple[str, float, float | None]  # what, measured, bound
ATTACKS = {"gradient": 6.0, "srd": 8.0, "lrp_zplus": 12.0}
APOP_IMAGES = 64  # of all, for the ratio to plain passes
RAY_BATCH = 8  # images in a batch on Ray


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
    explainer, surrogate, objective = attack_explainer(method, "ones"), SmoothModel(model, 30.0), Eq10()
    target = model(x).argmax(1)
    goal, logits0 = explainer.explain(model, x.flip(3), target), model(x).detach()
    reference = Reference(goal, logits0, (x.shape[2], x.shape[3]), goal)

    def work() -> Tensor:
        leaf = x.clone().requires_grad_()
        raw, logits = explainer.explain_with_logits(surrogate, leaf, target)
        return torch.autograd.grad(objective(View(raw, logits, reference)).sum(), leaf)[0]

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
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def command(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of a command as a process of its own."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    call = [sys.executable, "-c", code, sys.executable, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(call, check=True, cwd=folder, capture_output=True, text=True)
        return time.perf_counter() - start, int(done.stdout) / 2**20


def demo() -> list[Row]:
    """The demo's attack as a whole process."""
    seconds, gib = command("-m", "srd_lab.cli", "attack", "--method", "srd", "--pairs", "100")
    return [("attack --method srd --pairs 100, s", seconds, 180), ("  its peak memory, GiB", gib, 3)]


def attack_memory(size: int) -> list[Row]:
    """What one image more takes in an attack: the difference of the peaks of two processes."""
    rows: list[Row] = []
    for method in ATTACKS:
        one, three = (
            command(__file__, "--only-attack", method, "--images", str(n), "--size", str(size))[1]
            for n in (1, 3)
        )
        rows.append((f"attack memory per image, {method}, GiB", (three - one) / 2, None))
    return rows


def apop_on_images(data: str, weights: str | None, repeats: int) -> list[Row]:
    """ResNet18, decoding included: seven passes of APOP over seven plain ones; then all images as a command."""
    source, _, place = data.partition(":")
    data = f"{source}:{Path(place).resolve()}"
    dataset, model = load_data(data), load_model("resnet18", data, weights, "cpu")
    parts = [range(first, first + 8) for first in range(0, min(APOP_IMAGES, len(dataset)), 8)]
    experiment = Experiment(binarized=False)

    def plain() -> None:
        for loaded in load_batches(dataset, parts):
            x = torch.stack([sample.image for sample in loaded.samples])
            with torch.no_grad():
                for _ in range(7):
                    model(x)

    def survey() -> None:
        for loaded in load_batches(dataset, parts):
            experiment.run(model, loaded.samples, loaded.indices)

    rows: list[Row] = [
        (f"{name}, {APOP_IMAGES} images", value, 1.3)
        for name, value in ratios({"APOP / 7 forwards, with decoding": survey}, plain, repeats).items()
    ]
    call = ["-m", "srd_lab.cli", "apop", "--model", "resnet18", "--data", data, "--no-binarize", "--no-track"]
    call += ["--weights", str(Path(weights).resolve())] if weights else []
    for images in (str(max(1, len(dataset) // 10)), "all"):
        seconds, gib = command(*call, "--images", images)
        rows += [(f"apop --images {images}, s", seconds, None), ("  its peak memory, GiB", gib, 3)]
    return rows


def on_ray(images: int, repeats: int) -> list[Row]:
    """APOP and an evaluation of scenes by one and by two workers of one thread; what a batch costs beside its work."""
    import ray

    torch.set_num_threads(1)
    rows: list[Row] = []
    seconds: dict[tuple[str, int], float] = {}
    with open_run("bench", "bench", {}, track=False) as run:
        stages = _stages(images, run)
        for name, stage in stages.items():
            seconds[name, 0] = _pass(Local(0), stage, repeats)[0]
        for workers in (1, 2):
            ray.init(
                "local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error"
            )
            executor = OnRay("cpu")
            for name, stage in stages.items():
                _pass(executor, stage, 1)  # workers start
                seconds[name, workers], stored = _pass(executor, stage, repeats)
                rows.append((f"{name}, images / s, {workers} workers", images / seconds[name, workers], None))
                if workers == 2:
                    rows += _stored(name, stored[-1], run)
            empty = replace(stages["apop"], work=_nothing)
            _pass(executor, empty, 1)
            each = _pass(executor, empty, repeats)[0] / len(_parts(empty))
            rows.append((f"a batch without work, s, {workers} workers", each, None))
            ray.shutdown()
    for name in stages:
        one, two = seconds[name, 1], seconds[name, 2]
        rows.append((f"{name}, two workers: time / half of one's", 2 * two / one, 1 / 0.85))
        rows.append((f"{name}, one worker: time / this process's", one / seconds[name, 0], None))
    return rows


def _stages(images: int, run: Run) -> dict[str, Stage]:
    about: dict[str, Any] = {"images": images, "batch_size": RAY_BATCH, "device": "cpu"}
    apop = Survey(SurveySettings(models=("vgg16",), binarize=False, **about))
    chosen = {"methods": ("gradient", "srd"), "metrics": ("sparseness", "fidelity")}
    scored = Evaluation(EvaluationSettings(model="vgg16", **chosen, **about))
    return {"apop": next(apop.stages(run)), "evaluate": next(scored.stages(run))}


def _parts(stage: Stage) -> list[Part]:
    items, name = [int(i) for i in stage.items], stage.dataset.name
    starts = range(0, len(items), RAY_BATCH)
    some = {k: items[k : k + RAY_BATCH] for k in starts}
    return [Part(k, tuple((i,) for i in own), tuple(map(name, own))) for k, own in some.items()]


def _nothing(some: Sequence[Item], advance: Callable[[int], None]) -> dict[str, np.ndarray]:
    return {"index": np.array([item.index for item in some])}


def _pass(executor: Any, stage: Stage, repeats: int) -> tuple[float, list[dict[str, np.ndarray]]]:
    """Median of the seconds that all batches take, and their arrays."""
    taken, found = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        given = (stage.work, stage.dataset, _parts(stage), Batcher(RAY_BATCH), lambda steps: None)
        found = list(executor.run(*given))
        taken.append(time.perf_counter() - start)
    return median(taken), found


def _stored(name: str, arrays: dict[str, np.ndarray], run: Run) -> list[Row]:
    """What this process does with a batch that arrives."""
    start = time.perf_counter()
    run.save_arrays("batch.npz", arrays)
    taken = time.perf_counter() - start
    size = sum(array.nbytes for array in arrays.values())
    return [(f"{name}, to store a batch, s", taken, None), ("  its arrays, MB", size / 1e6, None)]


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--images", default=2, show_default=True, help="Images per batch.")
@click.option("--size", default=224, show_default=True, help="Pixels.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--end-to-end", "whole", is_flag=True, help="Also time the demo's command.")
@click.option("--memory", is_flag=True, help="Also measure the attack's memory per image.")
@click.option("--ray", "cluster", is_flag=True, help="Also time batches on Ray.")
@click.option("--only-ray", is_flag=True, help="Only these.")
@click.option("--ray-images", default=64, show_default=True, help="Images of each of them.")
@click.option("--data", help="imagenet:DIR: also time APOP on these images.")
@click.option("--weights", type=WeightsFile(), multiple=True, help="resnet18=FILE, for --data.")
@click.option("--only-attack", hidden=True)
def main(
    repeats: int,
    threads: int,
    images: int,
    size: int,
    device: str,
    whole: bool,
    memory: bool,
    cluster: bool,
    only_ray: bool,
    ray_images: int,
    data: str | None,
    weights: tuple[str, ...],
    only_attack: str | None,
) -> None:
    """Print measured values beside their bounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = pick_device(device)
    if only_attack:
        attack_iteration(only_attack, *_vgg16(images, size, place))()
        return
    keep_freed_memory()  # as the commands do
    if only_ray:
        _show(on_ray(ray_images, repeats))
    rows = demo() if whole else []
    rows += attack_memory(size) if memory else []
    rows += apop_on_images(data, _file(weights), repeats) if data else []
    model, x = _vgg16(images, size, place)
    rows = [*_ratios(model, x, repeats), *rows]
    if place.type == "cuda":
        iteration = attack_iteration("srd", model, x)
        rows.append(
            ("pair-iterations per second, srd", images / median(_seconds(iteration) for _ in range(10)), None)
        )
    _show(rows + (on_ray(ray_images, repeats) if cluster else []))


def _show(rows: list[Row]) -> None:
    """Print measured values beside their bounds, and end."""
    table = [[name, f"{value:.3g}", "" if bound is None else f"{bound:g}"] for name, value, bound in rows]
    click.echo(text_table(["work", "measured", "bound"], table))
    sys.exit(0 if all(bound is None or value <= bound for _, value, bound in rows) else 1)


def _file(weights: tuple[str, ...]) -> str | None:
    file = weights_of(weights, ["resnet18"])["resnet18"]
    return None if file is None else str(file)


def _vgg16(images: int, size: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """torchvision's, with random weights, and random images."""
    model = torchvision.models.vgg16(weights=None).eval().requires_grad_(False).to(device)
    return model, torch.rand(images, 3, size, size).to(device)


def _ratios(model: nn.Module, x: Tensor, repeats: int) -> list[Row]:
    """Maps, attack steps and APOP, as multiples of a gradient and of plain passes."""
    srd, forward = make_explainer("srd"), plain_forward(model, x)
    found = ratios(
        {"SRD map / gradient map": lambda: srd.explain(model, x)}, plain_gradient(model, x), repeats
    )
    rows: list[Row] = [(name, value, 1.3) for name, value in found.items()]
    steps = ratios({method: attack_iteration(method, model, x) for method in ATTACKS}, forward, repeats)
    rows += [(f"attack iteration / forward: {m}", value, ATTACKS[m]) for m, value in steps.items()]
    found = ratios(
        {"APOP, 7 passes / 7 forwards": apop_passes(model, x)}, lambda: [forward() for _ in range(7)], repeats
    )
    return [*rows, *((name, value, 1.3) for name, value in found.items())]


if __name__ == "__main__":
    main()
