"""What metrics and class activation maps by passes cost here, beside quantus and grad-cam: same maps, network and draws.

    pip install -e ".[peers-quantus]"   # one environment, for the metrics
    pip install -e ".[peers-cam]"       # another one, for the maps: both bring OpenCV, in different builds
    python scripts/bench_metrics.py
    python scripts/bench_metrics.py --sizes 224 --data imagenet:DIR --weights resnet18=FILE

What cannot be imported is left out. ResNet18; with --data and --weights on photographs, else random. Both sides run one
after the other, ``--repeats`` times; times are medians, ratios are medians over repeats. The CPU ratio is that of
processor time, which other work on the machine does not touch. ``difference`` is the largest one of a score, or of a map
over its maximum, once both sides have the same random draws and the same memory format, which rounds the network's
output in its own way (their own ones are timed).
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

import click

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as srd_lab.cli does

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.cli.options import WeightsFile
from srd_lab.data import batch, load_data
from srd_lab.metrics import explained
from srd_lab.metrics.complexity import Sparseness
from srd_lab.metrics.explained import Explained, Images
from srd_lab.metrics.faithfulness import Fidelity
from srd_lab.metrics.localisation import PointingGame
from srd_lab.metrics.robustness import Stability
from srd_lab.models import load_model
from srd_lab.normalise import split_normalisation
from srd_lab.registry import EXPLAINERS, make_explainer
from srd_lab.runs.report import text_table
from srd_lab.runs.settings import weights_of
from srd_lab.runtime import keep_freed_memory

# without those whose maps would take most of the time
PASSES = ("integrated_gradients", "smoothgrad", "scorecam", "ablationcam")
METHODS = tuple(name for name in EXPLAINERS if name not in PASSES)
PIXELS, NOISE, STABILITY_DRAWS = 200, 0.1, 5
Work = Callable[[], Any]


class Setting:
    """Images, their maps by several methods, and the same as quantus wants them."""

    def __init__(self, model: nn.Module, x: Tensor, masks: Tensor, draws: int) -> None:
        self.model, self.x, self.masks, self.draws = model, x, masks, draws
        with torch.no_grad():
            self.target = model(x).argmax(1)
        self.network = split_normalisation(model)[1]
        self.maps = {name: Explained.by(make_explainer(name), self.images()).maps for name in METHODS}

    def images(self) -> Images:
        """As new: nothing remembered."""
        return Images(self.model, self.x, self.target, range(len(self.x)), self.masks)

    def scored(self, metric: Any, methods: Sequence[str]) -> list[Tensor]:
        images = self.images()
        return [metric.of(Explained(images, make_explainer(m), self.maps[m])) for m in methods]

    def theirs(self, metric: Any, methods: Sequence[str], **given: Any) -> list[Tensor]:
        data = {
            "x_batch": self.images().given.numpy(),
            "y_batch": self.target.numpy(),
            "s_batch": self.masks[:, None].numpy(),
        }
        found = [metric(model=self.network, a_batch=self.maps[m].numpy(), **data, **given) for m in methods]
        return [torch.as_tensor(np.asarray(scores, dtype=np.float64)) for scores in found]


def optional(name: str, extra: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        click.echo(f"left out, for want of {error.name}: pip install -e '.[{extra}]'\n")
        return None


@contextmanager
def changed(where: Any, name: str, to: Any) -> Iterator[None]:
    """Within: another value under that name."""
    before = getattr(where, name)
    setattr(where, name, to)
    try:
        yield
    finally:
        setattr(where, name, before)


def drawing(function: str, draws: Iterator[np.ndarray]) -> AbstractContextManager[None]:
    """Within: a function of numpy.random returns these."""
    return changed(np.random, function, lambda *_, **__: next(draws))


def measured(work: Work) -> tuple[float, float]:
    """Seconds and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def row(name: str, here: Work, there: Work, difference: float, repeats: int) -> list[str]:
    pairs = [(measured(here), measured(there)) for _ in range(repeats)]
    times = [median(pair[side][0] for pair in pairs) for side in (0, 1)]
    ratios = [median(pair[1][kind] / pair[0][kind] for pair in pairs) for kind in (0, 1)]
    return [name, *(f"{t:.3g}" for t in times), *(f"{r:.3g}" for r in ratios), f"{difference:.1e}"]


@dataclass(frozen=True)
class Pair:
    """A metric here and there.

    timed, compared : the methods whose maps both score; same_draws : within, both draw the same random numbers and take
    the same memory format; given : what theirs wants besides.
    """

    name: str
    ours: Any
    theirs: Any
    timed: Sequence[str] = METHODS[:1]
    compared: Sequence[str] = METHODS
    same_draws: Callable[[], AbstractContextManager[None]] = nullcontext
    given: Mapping[str, Any] = field(default_factory=dict)

    def apart(self, s: Setting) -> float:
        """The largest difference of two scores."""
        with self.same_draws():
            a = torch.cat(s.scored(self.ours, self.compared))
            b = torch.cat(s.theirs(self.theirs, self.compared, **self.given))
        return float((a - b).abs()[a.isfinite() & b.isfinite()].max())

    def row(self, s: Setting, repeats: int) -> list[str]:
        return row(
            f"{self.name}, {len(s.x)} images of {s.x.shape[2]}",
            lambda: s.scored(self.ours, self.timed),
            lambda: s.theirs(self.theirs, self.timed, **self.given),
            self.apart(s),
            repeats,
        )


def metrics(quantus: ModuleType, s: Setting) -> list[Pair]:
    plain = {"normalise": False, "disable_warnings": True}
    return [
        Pair("sparseness", Sparseness(), quantus.Sparseness(**plain)),
        Pair("pointing game", PointingGame(margin=0), quantus.PointingGame(**plain)),
        *fidelity(quantus, s, plain),
        stability(quantus, s, plain),
    ]


def fidelity(quantus: ModuleType, s: Setting, plain: Mapping[str, Any]) -> list[Pair]:
    """Of one method, and of all on the same images."""
    size = s.x.shape[2]
    ours = Fidelity(PIXELS, s.draws, baseline="minimum")
    theirs = quantus.FaithfulnessCorrelation(
        nr_runs=s.draws, subset_size=3 * PIXELS, perturb_baseline="black", return_aggregate=False, **plain
    )

    @contextmanager
    def same_draws() -> Iterator[None]:
        sets, _ = ours.drops(s.images())
        numbers = torch.cat([sets + colour * size**2 for colour in range(3)], 2).numpy()
        ordered = (numbers[i, k] for _ in METHODS for k in range(s.draws) for i in range(len(s.x)))
        with (
            drawing("choice", ordered),
            changed(explained, "fast_layout", lambda *_: torch.contiguous_format),
        ):
            yield

    one = Pair(f"fidelity ({s.draws} draws)", ours, theirs, same_draws=same_draws)
    return [one, replace(one, name=f"  of {len(METHODS)} methods", timed=METHODS)]


def stability(quantus: ModuleType, s: Setting, plain: Mapping[str, Any]) -> Pair:
    size, first = s.x.shape[2], METHODS[:1]

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        x, target = torch.as_tensor(inputs).float(), torch.as_tensor(targets)
        return maps.prepared(make_explainer(*first).explain(model, x, target), (size, size)).numpy()

    def same_draws() -> AbstractContextManager[None]:
        images = s.images()

        def noise(k: int) -> np.ndarray:
            seeded = (images.generator(i, 0, "stability", k) for i in range(len(s.x)))
            drawn = [torch.randn(s.x.shape[1:], generator=generator) for generator in seeded]
            return NOISE * torch.stack(drawn).flatten(1).numpy()

        return drawing("normal", map(noise, range(STABILITY_DRAWS)))

    theirs = quantus.LocalLipschitzEstimate(nr_samples=STABILITY_DRAWS, perturb_std=NOISE, **plain)
    return Pair(
        f"stability ({STABILITY_DRAWS} draws)",
        *(Stability(NOISE, STABILITY_DRAWS), theirs),
        compared=first,
        same_draws=same_draws,
        given={"explain_func": explain},
    )


def cams(grad_cam: ModuleType, s: Setting, repeats: int) -> list[list[str]]:
    """One image; the whole of what either gives out, theirs at the image's size."""
    x, target, size = s.images().given[:1], s.target[:1], s.x.shape[2]
    layer = s.network.layer4[-1]
    rows = []
    for name, kind in (("ablationcam", grad_cam.AblationCAM), ("scorecam", grad_cam.ScoreCAM)):
        found: dict[str, Tensor] = {}

        def here(name: str = name, found: dict[str, Tensor] = found) -> None:
            found["here"] = maps.prepared(make_explainer(name).explain(s.network, x, target), (size, size))

        def there(kind: Any = kind, found: dict[str, Tensor] = found) -> None:
            with kind(s.network, [layer]) as method:
                found["there"] = torch.from_numpy(method(x, [lambda logits: logits[int(target)]]))

        line = row(f"{name}, 1 image of {size}", here, there, 0.0, repeats)
        ours = found["here"] - found["here"].amin()  # theirs takes off the least value
        line[-1] = f"{float((ours / ours.amax() - found['there']).abs().max()):.1e}"
        rows.append(line)
    return rows


def pictures(data: str | None, images: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels and masks; boxes in the middle where there are none."""
    masks = torch.zeros(images, size, size, dtype=torch.bool)
    masks[:, size // 4 : -size // 4, size // 4 : -size // 4] = True
    if data is None:
        return torch.rand(images, 3, size, size), masks
    dataset = load_data(data, size=size)
    step = max(1, len(dataset) // images)
    x, _ = batch(dataset, range(0, step * images, step))
    return x, masks


@click.command()
@click.option("--images", default=16, show_default=True)
@click.option(
    "--sizes", default=(64, 224), multiple=True, show_default=True, help="Pixels; repeat for several."
)
@click.option("--draws", default=20, show_default=True, help="Sets of pixels of fidelity.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cams/--no-cams", "with_cams", default=True, show_default=True)
@click.option("--data", help="imagenet:DIR, for --weights.")
@click.option("--weights", type=WeightsFile(), multiple=True, help="resnet18=FILE")
def main(
    images: int,
    sizes: tuple[int, ...],
    draws: int,
    repeats: int,
    threads: int,
    with_cams: bool,
    data: str | None,
    weights: tuple[str, ...],
) -> None:
    """Print times here and there, and how far the values are apart."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as the commands do
    quantus = optional("quantus", "peers-quantus")
    grad_cam = optional("pytorch_grad_cam", "peers-cam") if with_cams else None
    if grad_cam:
        for part in ("score_cam", "ablation_cam"):
            importlib.import_module(f"pytorch_grad_cam.{part}").tqdm.tqdm = lambda steps: steps  # no bars
        # masks stretched as ours; corner to corner, as theirs are, the maps are 1e-2 apart
        nn.UpsamplingBilinear2d = partial(nn.Upsample, mode="bilinear", align_corners=False)
    if data:
        model = load_model("resnet18", data, weights_of(weights, ["resnet18"])["resnet18"], "cpu")
    else:
        model = torchvision.models.resnet18(weights=None).eval().requires_grad_(False)
    rows = []
    for size in sizes:
        x, masks = pictures(data, images, size)
        setting = Setting(model, x, masks, draws)
        if quantus:
            rows += [pair.row(setting, repeats) for pair in metrics(quantus, setting)]
        rows += cams(grad_cam, setting, repeats) if grad_cam and size == max(sizes) else []
    if rows:
        head = ["work", "here, s", "there, s", "ratio", "CPU ratio", "difference"]
        click.echo(text_table(head, rows))


if __name__ == "__main__":
    main()
