"""Distils a head for a frozen VGG from a stronger network: for convolutions that come without a classifier.

    python scripts/train_head.py --backbone vgg16 --backbone-weights CONVOLUTIONS --teacher resnet50 \\
        --teacher-weights FILE --data imagenet:DIR --held-out 0.2 --cache DIR --out vgg16_head.npz
    srd-lab attack --model vgg16 --weights vgg16_head.npz --data imagenet:DIR

For an image, z(x) are the last map's averages (``--pool 1``: 512 numbers, ``--pool 7``: 25,088), t(x) the teacher's
logits, s = head(z) the student's. The head minimises (Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531)

    (1 - w) T^2 KL(softmax(t / T) || softmax(s / T)) + w CE(s, label)

with temperature T and w = ``--label-weight``. The defaults suit a linear head on few images: chosen on images kept back
from training (one view of 1,700), a T of 8 in place of 2 was worth 9 points of top-1.

The backbone never changes, so its maps are computed once for every view and kept, in 16 bits, in ``--cache``: an
interrupted run goes on there, to the same numbers. View 0 is the square that srd-lab shows a network; each further one
is a random region, mirrored in half of the cases, which both networks see, the teacher at its own resolution. A smaller
``--view-size`` saves time, and brings objects nearer to the size that they have in view 0 (Touvron et al. 2019,
https://arxiv.org/abs/1906.06423).

Held-out images are drawn by the seed, or listed in a file, and never trained on, nor are byte-equal copies of them;
nothing is chosen by them. They measure the written file, as ``load_model`` reads it. Beside OUT stand a card
(OUT with .json) and the list of the held-out images (OUT with .held_out.txt), which ``--held-out`` takes again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from srd_lab.cli.errors import command_errors
from srd_lab.data import NON_RGB, load_data, skipped_report
from srd_lab.data.pictures import Picture, PictureFolder, SkippedFile, decode, fit, upright
from srd_lab.errors import SrdLabError
from srd_lab.models import Classifier, input_size, load_model, preprocessing, read_state
from srd_lab.models.files import fill
from srd_lab.models.imagenet import Head, torchvision_names, vgg_network
from srd_lab.runs.report import text_table
from srd_lab.runtime import derived_seed, fast_layout, full_precision, generator, pick_device

NOTE = "Accuracies are those on the held-out images in the list, and not on ImageNet's validation set."
BATCH = 128
CHUNK = 16  # images in one file of the cache
BACKBONES = tuple(name for name in torchvision_names() if name.startswith("vgg"))


# --- images -----------------------------------------------------------------------------------------------


def folders(data: Sequence[str]) -> dict[str, list[Picture]]:
    """The images of every ``imagenet:DIR``; SrdLabError for other data, and for a name that occurs twice."""
    found: dict[str, list[Picture]] = {}
    names: set[str] = set()
    for spec in data:
        if not spec.startswith("imagenet:"):
            raise SrdLabError(f"{spec!r} is not a folder of ImageNet's classes; give --data imagenet:DIR")
        dataset = load_data(spec)
        assert isinstance(dataset, PictureFolder)
        for picture in dataset.pictures:
            if picture.name in names:
                raise SrdLabError(
                    f"{picture.name} occurs twice in the folders of --data; give each image once"
                )
            names.add(picture.name)
        found[spec] = list(dataset.pictures)
    return found


def split(
    found: dict[str, list[Picture]], held_out: str, out_of: Sequence[str], seed: int
) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out images.

    held_out : a share in (0, 1) of the folders ``out_of`` (all where empty), drawn by the seed from the names alone, so
        that it depends on no order; or a file with the name of a held-out image in every line.
    """
    if unknown := [spec for spec in out_of if spec not in found]:
        raise SrdLabError(f"--held-out-from {unknown[0]} is none of the folders of --data; give it there too")
    pictures = [picture for group in found.values() for picture in group]
    candidates = [p for spec, group in found.items() if not out_of or spec in out_of for p in group]
    try:
        share = float(held_out)
    except ValueError:
        names = _listed(Path(held_out), {picture.name for picture in pictures})
    else:
        if not 0 < share < 1:
            raise SrdLabError(
                f"--held-out {held_out} is no share; expected a number between 0 and 1, or a file"
            )
        ranked = sorted(candidates, key=lambda p: (derived_seed(seed, "held-out", p.name), p.name))
        names = {picture.name for picture in ranked[: round(share * len(ranked))]}
    held = sorted((p for p in pictures if p.name in names), key=lambda p: p.name)
    train = [p for p in pictures if p.name not in names]
    if not held or not train:
        raise SrdLabError(
            f"--held-out {held_out} leaves {len(train)} images to train on and {len(held)} to measure by; "
            "expected one of each at least"
        )
    return train, held


def _listed(file: Path, known: set[str]) -> set[str]:
    try:
        names = {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, ValueError):
        raise SrdLabError(
            f"--held-out {file} is neither a share nor a file that can be read; "
            "expected a number between 0 and 1, or a list of names"
        ) from None
    if strange := sorted(names - known):
        raise SrdLabError(
            f"{file} lists {strange[0]!r}, which is no image of --data ({len(strange)} such lines); "
            "expected names like n01440764/image.JPEG"
        )
    return names


def list_text(pictures: Sequence[Picture]) -> str:
    """The names in alphabetical order, one a line; its SHA-256 is the hash of the list on the card."""
    return "".join(f"{name}\n" for name in sorted(picture.name for picture in pictures))


@cache
def digest(file: Path) -> str:
    """SHA-256 of what is in a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def region(
    size: tuple[int, int], smallest: float, rng: torch.Generator
) -> tuple[tuple[float, float, float, float], bool]:
    """A random rectangle (left, top, right, bottom) in an image of that width and height, and whether it is mirrored.

    Its area is uniform in [smallest, 1] of the image, its ratio of sides log-uniform in [3/4, 4/3]; a side that would
    be longer than the image's is cut to it.
    """
    area, ratio, left, top, mirror = torch.rand(5, generator=rng, dtype=torch.float64).tolist()
    pixels = size[0] * size[1] * (smallest + (1 - smallest) * area)
    stretch = math.exp((2 * ratio - 1) * math.log(4 / 3))
    width = min(math.sqrt(pixels * stretch), size[0])
    height = min(math.sqrt(pixels / stretch), size[1])
    x, y = left * (size[0] - width), top * (size[1] - height)
    return (x, y, x + width, y + height), mirror < 0.5


# --- maps and teacher's logits, once per view -------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """What is known of one view of some images.

    maps : (N, 512, h, w) float16, the backbone's last map. teacher : (N, 1000) logits. labels : (N,).
    skipped : name -> reason of the images that cannot be used; they are not among the N.
    """

    maps: Tensor
    teacher: Tensor
    labels: Tensor
    skipped: dict[str, str]


@dataclass(frozen=True)
class Extractor:
    """Both networks on views of images.

    student, teacher : classifiers of pixels; of the student only ``features`` are used. layout : of what the
    teacher sees. sizes : pixels that the
    student, the student from view 1 on, and the teacher see. smallest : of a region, as share of the image.
    identity : what else decides the numbers (the networks and their weights). folder : the cache, None for none.
    """

    student: Classifier
    teacher: Classifier
    layout: torch.memory_format
    sizes: tuple[int, int, int]
    smallest: float
    seed: int
    non_rgb: str
    identity: str
    folder: Path | None = None

    def view(self, pictures: Sequence[Picture], number: int) -> Views:
        """View ``number`` of the images; chunks that lie in the cache are read, all others computed and put there."""
        parts, began, last = [], time.perf_counter(), 0.0
        for first in range(0, len(pictures), CHUNK):
            parts.append(self._chunk(pictures[first : first + CHUNK], number))
            seconds = time.perf_counter() - began
            if seconds - last > 60:
                click.echo(f"view {number}: {first + CHUNK} of {len(pictures)} images, {seconds:.0f} s")
                last = seconds
        maps, teacher, labels = (
            torch.cat([getattr(part, key) for part in parts]) for key in ("maps", "teacher", "labels")
        )
        skipped = _merged(part.skipped for part in parts)
        if not len(labels):
            raise SrdLabError(f"no image to train on can be used ({skipped_report(skipped, 1)}); mend them")
        return Views(maps, teacher, labels, skipped)

    def pixels(self, picture: Picture, number: int) -> tuple[Tensor, Tensor]:
        """What the student (3, h, h) and the teacher (3, H, H) see of an image, in [0, 1]; may raise SkippedFile."""
        image = upright(*decode(picture.file, picture.name, self.non_rgb))
        own, later, teachers = self.sizes
        if number == 0:
            return _tensor(fit(image, own)), _tensor(fit(image, teachers))
        box, mirrored = region(image.size, self.smallest, generator(self.seed, "view", number, picture.name))
        x, y = (
            _tensor(image.resize((side, side), Image.Resampling.BILINEAR, box)) for side in (later, teachers)
        )
        return (x.flip(2), y.flip(2)) if mirrored else (x, y)

    def _chunk(self, pictures: Sequence[Picture], number: int) -> Views:
        if self.folder is None:
            return self._computed(pictures, number)
        # Named by all that decides what is in it: nothing stale is ever read.
        regions = (number, self.sizes[1:], self.smallest, self.seed) if number else (0, *self.sizes[::2])
        images = [(picture.name, picture.label, digest(picture.file)) for picture in pictures]
        key = hashlib.sha256(repr((self.identity, self.non_rgb, regions, images)).encode()).hexdigest()
        file = self.folder / f"{key}.npz"
        if not file.is_file():
            _store(file, self._computed(pictures, number))
        return _stored(file)

    @torch.no_grad()
    def _computed(self, pictures: Sequence[Picture], number: int) -> Views:
        seen, labels, skipped = [], [], {}
        for picture in pictures:
            try:
                seen.append(self.pixels(picture, number))
                labels.append(picture.label)
            except SkippedFile as error:
                skipped[error.name] = error.reason
        if not seen:
            return Views(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), skipped)
        xs, ys = (torch.stack(part) for part in zip(*seen, strict=True))
        maps = last_map(self.student, xs)
        if maps.abs().max() > torch.finfo(torch.float16).max:
            raise SrdLabError("the backbone's maps do not fit into 16 bits; check --backbone-weights")
        return Views(maps.half(), logits(self.teacher, ys, self.layout), torch.tensor(labels), skipped)


def _merged(skipped: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: why for part in skipped for name, why in part.items()}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def _store(file: Path, views: Views) -> None:
    """Whole or not at all: an interrupted run leaves no part of a file under that name."""
    part = file.with_suffix(f".{os.getpid()}.part")
    arrays = {key: getattr(views, key).numpy() for key in ("maps", "teacher", "labels")}
    with part.open("wb") as stream:
        np.savez(stream, skipped=np.array(json.dumps(views.skipped)), **arrays)
    part.replace(file)


def _stored(file: Path) -> Views:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            maps, teacher, labels = (torch.from_numpy(arrays[key]) for key in ("maps", "teacher", "labels"))
            return Views(maps, teacher, labels, json.loads(str(arrays["skipped"])))
    except Exception as error:  # NumPy's reader fails on a damaged file in every way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrdLabError(f"{file} in the cache is damaged ({reason}); remove it and start again") from None


def last_map(student: Classifier, x: Tensor) -> Tensor:
    """The backbone's last map (N, 512, h, w) of pixels x (N, 3, H, W), on the CPU."""
    x = x.to(student.normalise.mean.device).contiguous(memory_format=torch.channels_last)
    return student.network.get_submodule("features")(student.normalise(x)).contiguous().cpu()


def logits(teacher: Classifier, x: Tensor, layout: torch.memory_format) -> Tensor:
    """The teacher's logits (N, 1000) of pixels x (N, 3, H, W), on the CPU."""
    out = teacher(x.to(teacher.normalise.mean.device).contiguous(memory_format=layout))
    if not isinstance(out, Tensor) or out.shape != (len(x), 1000):
        raise SrdLabError("the teacher does not give ImageNet's 1,000 logits; choose a classifier of these")
    return out.cpu()


# --- networks ---------------------------------------------------------------------------------------------


def student_of(name: str, weights: Path, head: Head, seed: int, device: torch.device) -> Classifier:
    """The VGG with convolutions from ``weights``, and a new head; of the file only the classifier may be missing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "head"))
        network = vgg_network(name, head)
    state = {key: value for key, value in read_state(weights).items() if not key.startswith("classifier.")}
    new = {key: value for key, value in network.state_dict().items() if key.startswith("classifier.")}
    fill(network, {**state, **new}, f"{weights} for the convolutions of {name}")
    wants = preprocessing(name)
    model = Classifier(network, wants.mean, wants.std).eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)


def teacher_of(name: str, weights: Path, device: torch.device) -> tuple[Classifier, int]:
    """A torchvision classifier, or timm's under ``timm:NAME``; and the side of the images that it is made for."""
    return load_model(name, "imagenet", weights, str(device)), input_size(name)


# --- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How the head is trained: AdamW with a one-cycle learning rate.

    temperature : T above 0. label_weight : w in [0, 1]. epochs : times that every view is shown. lr : highest learning
    rate. weight_decay : of weights, for standardised inputs.
    """

    temperature: float = 8.0
    label_weight: float = 0.0
    epochs: int = 60
    lr: float = 0.01
    weight_decay: float = 0.3


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, label_weight: float
) -> Tensor:
    """The loss at the top of this module, mean over logits (N, K) of student and teacher and labels (N,)."""
    own, given = (F.log_softmax(values / temperature, 1) for values in (student, teacher))
    imitation = temperature**2 * F.kl_div(own, given, reduction="batchmean", log_target=True)
    if label_weight == 0:
        return imitation
    return (1 - label_weight) * imitation + label_weight * F.cross_entropy(student, labels)


def train(head: nn.Sequential, views: Sequence[Views], pool: int, how: Training, seed: int) -> float:
    """Trains ``head`` in place; the mean loss of the last epoch.

    It sees inputs of mean 0 and deviation 1 / pool, whose squares sum to 512 in the mean for either pool, so that one
    learning rate suits both; at the end that is put into its first layer.
    """
    # 25,088 inputs a view are kept in 16 bits: they fill the memory.
    inputs = torch.cat(
        [pooled(part.maps, pool).to(torch.float32 if pool == 1 else part.maps.dtype) for part in views]
    )
    teacher, labels = (torch.cat([getattr(part, key) for part in views]) for key in ("teacher", "labels"))
    mean, deviation = statistics(inputs)
    deviation = pool * deviation
    optimiser = torch.optim.AdamW(groups(head, how.weight_decay), lr=how.lr)
    steps = how.epochs * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, how.lr, total_steps=steps, pct_start=0.25)
    rng, loss_of_epoch = generator(seed, "order"), 0.0
    head.train().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "dropout"))
        for epoch in range(how.epochs):
            losses = []
            for some in torch.randperm(len(inputs), generator=rng).split(BATCH):
                out = head((inputs[some].float() - mean) / deviation)
                loss = distillation_loss(out, teacher[some], labels[some], how.temperature, how.label_weight)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
            loss_of_epoch = sum(losses) / len(losses)
            if (epoch + 1) % max(1, how.epochs // 10) == 0:
                click.echo(f"epoch {epoch + 1} loss {loss_of_epoch:.4f}")
    head.eval().requires_grad_(False)
    unstandardise(head, mean, deviation)
    return loss_of_epoch


def pooled(maps: Tensor, pool: int) -> Tensor:
    """The inputs of a head (N, 512 pool^2), as a VGG makes them of its last map (N, 512, h, w)."""
    return F.adaptive_avg_pool2d(maps.float(), pool).flatten(1)


def groups(head: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay, biases do not."""
    weights = [p for p in head.parameters() if p.dim() > 1]
    biases = [p for p in head.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every input, which is a tenth of their mean at least: some are almost never on."""
    mean = inputs.mean(0, dtype=torch.float32)
    deviation = torch.stack([(part.float() - mean).pow(2).sum(0) for part in inputs.split(BATCH)]).sum(0)
    deviation = (deviation / len(inputs)).sqrt()
    return mean, deviation.clamp_min(max(0.1 * float(deviation.mean()), 1e-6))


@torch.no_grad()
def unstandardise(head: nn.Sequential, mean: Tensor, deviation: Tensor) -> None:
    """W (z - mean) / deviation + b as one layer of z, in place of the first layer W, b."""
    first: Any = head[0]
    weight = first.weight.double() / deviation
    first.bias.copy_(first.bias.double() - weight @ mean.double())
    first.weight.copy_(weight)


# --- what is written, and what it is worth ----------------------------------------------------------------


def save(network: nn.Module, file: Path) -> None:
    """The state in 16 bits, as .npz or .safetensors by the file's name; SrdLabError where a value does not fit."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if wrong := [key for key, value in half.items() if not value.isfinite().all()]:
        raise SrdLabError(f"{wrong[0]} does not fit into 16 bits; try a lower --lr or more --weight-decay")
    if file.suffix == ".safetensors":
        save_file(half, file)
    else:
        np.savez_compressed(file, **{key: value.numpy() for key, value in half.items()})  # type: ignore[arg-type]


@torch.no_grad()
def measure(
    extractor: Extractor, pictures: Sequence[Picture], exact: nn.Module
) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``extractor.student``, the written file, and the teacher are worth on view 0; and what was skipped.

    exact : the head before it was rounded to 16 bits, on the same maps.
    """
    student, rows, skipped = extractor.student, [], {}
    inputs: list[Tensor] = []
    hook = student.network.get_submodule("classifier").register_forward_pre_hook(
        lambda module, given: inputs.append(given[0])
    )
    for picture in pictures:
        try:
            x, y = extractor.pixels(picture, 0)
        except SkippedFile as error:
            skipped[error.name] = error.reason
            continue
        x = x[None].to(student.normalise.mean.device).contiguous(memory_format=torch.channels_last)
        own = student(x).cpu()
        rows.append(
            (
                own,
                exact(inputs.pop().cpu()),
                logits(extractor.teacher, y[None], extractor.layout),
                picture.label,
            )
        )
    hook.remove()
    if not rows:
        raise SrdLabError(f"none of the held-out images can be used ({skipped_report(skipped, 1)})")
    own, before, teacher = (torch.cat([row[k] for row in rows]) for k in range(3))  # type: ignore[misc]
    labels = torch.tensor([row[3] for row in rows])
    scores = {
        "images": len(rows),
        "student": accuracies(own, labels),
        "student_before_rounding": accuracies(before, labels),
        "teacher": accuracies(teacher, labels),
        "agreement": share(own.argmax(1) == teacher.argmax(1)),
    }
    return scores, skipped


def share(hits: Tensor) -> dict[str, Any]:
    """The share of True among hits (N,), and its 95 % interval after Wilson (1927)."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return {"share": round(p, 4), "interval": [round(centre - half, 4), round(centre + half, 4)]}


def accuracies(out: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 of logits (N, 1000) with labels (N,)."""
    right = out.topk(5, 1).indices == labels[:, None]
    return {"top1": share(right[:, 0]), "top5": share(right.any(1))}


def report(scores: dict[str, Any]) -> str:
    """The scores as a table."""

    def cell(found: dict[str, Any]) -> str:
        return "{:.1%} [{:.1%}, {:.1%}]".format(found["share"], *found["interval"])

    rows = [
        [what, cell(scores[key]["top1"]), cell(scores[key]["top5"]), agreement]
        for what, key, agreement in (
            ("written file", "student", cell(scores["agreement"])),
            ("head before rounding", "student_before_rounding", ""),
            ("teacher", "teacher", ""),
        )
    ]
    return text_table(("network", "top-1", "top-5", "class as the teacher"), rows)


def command(ctx: click.Context) -> str:
    """The command line with all that the user gave."""
    words = ["python", "scripts/train_head.py"]
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        if ctx.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(one)]
    return shlex.join(words)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)
_POSITIVE = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0, 1, min_open=True)


def _option(name: str, **more: Any) -> Any:
    return click.option(name, show_default=more.get("default") is not None, **more)


@click.command()
@_option("--backbone", required=True, type=click.Choice(BACKBONES), metavar="NAME", help="vgg11 .. vgg19_bn.")
@_option("--backbone-weights", required=True, type=_FILE, help="Convolutions; a classifier is ignored.")
@_option("--teacher", required=True, help="A torchvision classifier, or timm:NAME if timm is installed.")
@_option("--teacher-weights", required=True, type=_FILE, help="State dict of the teacher.")
@_option("--data", required=True, multiple=True, help="imagenet:DIR, repeatable.")
@_option("--held-out", default="0.2", help="Share of the images, or a file with one name in every line.")
@_option("--held-out-from", multiple=True, help="The --data that the share is drawn from. [default: all]")
@_option("--non-rgb", default="skip", type=click.Choice(NON_RGB), help="Grey images, CMYK and the like.")
@_option("--pool", default="1", type=click.Choice(["1", "7"]), help="Side of the averaged map.")
@_option("--hidden", multiple=True, type=click.IntRange(1), help="Width of a hidden layer, repeatable.")
@_option("--views", default=2, type=click.IntRange(1), help="Of every image.")
@_option("--view-size", type=click.IntRange(32), help="Pixels from view 1 on. [default: the backbone's]")
@_option("--smallest", default=0.3, type=_SHARE, help="Region of a view, as share of the image.")
@_option("--temperature", default=8.0, type=_POSITIVE, help="T: how soft the teacher's answers are.")
@_option("--label-weight", default=0.0, type=click.FloatRange(0, 1), help="w: of true labels in the loss.")
@_option("--epochs", default=60, type=click.IntRange(1), help="Times that every view is shown.")
@_option("--lr", default=0.01, type=_POSITIVE, help="Highest learning rate.")
@_option("--weight-decay", default=0.3, type=click.FloatRange(0), help="AdamW's, of weights.")
@_option("--seed", default=0, type=click.IntRange(0), help="Decides everything that is drawn.")
@_option("--threads", default=1, type=click.IntRange(1), help="Of the CPU.")
@_option("--device", default="cpu", help="Of both networks; the head is trained on the CPU.")
@_option("--cache", type=_FOLDER, help="Folder for maps and logits, from which a later run goes on.")
@_option("--out", required=True, type=_NEW_FILE, help=".npz or .safetensors.")
@click.pass_context
@command_errors
def main(ctx: click.Context, **options: Any) -> None:
    """Train a head for a VGG's convolutions; writes OUT, its card and the list of held-out images."""
    card = run(options, command(ctx))
    if card["skipped"]:
        click.echo(skipped_report(card["skipped"]))
    click.echo(f"\n{report(card['held_out'])}\n")
    click.echo(f"{options['out']}: the above on {card['held_out']['images']} held-out images. {NOTE}")


def run(o: dict[str, Any], typed: str) -> dict[str, Any]:
    """All the work that the options ``o`` describe; the card that was written. ``typed`` is the command line."""
    torch.set_num_threads(o["threads"])
    full_precision()
    out, device = _writable(o["out"]), pick_device(o["device"])
    head = Head(int(o["pool"]), o["hidden"])
    drawn, held = split(folders(o["data"]), o["held_out"], o["held_out_from"], o["seed"])
    images = without_copies(drawn, held)
    click.echo(f"{len(images)} images to train on, {len(held)} held out")
    student = student_of(o["backbone"], o["backbone_weights"], head, o["seed"], device)
    extractor = extractor_of(o, student, device)
    views = [extractor.view(images, number) for number in range(o["views"])]
    exact: Any = student.network.get_submodule("classifier").cpu()
    loss = train(exact, views, head.pool, training(o), o["seed"])
    save(student.network, out)
    written = load_model(o["backbone"], "imagenet", out, str(device)).to(memory_format=torch.channels_last)
    scores, unread = measure(replace(extractor, student=written), held, exact)
    listed = out.with_suffix(".held_out.txt")
    listed.write_text(list_text(held), encoding="utf-8")
    used = {"images": len(views[0].labels), "copies_of_held_out": len(drawn) - len(images), **_list(images)}
    card = {
        **_networks(o, head),
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "train": {**used, **{key: o[key] for key in ("views", "view_size", "smallest")}},
        "training": {**asdict(training(o)), "batch": BATCH, "seed": o["seed"], "loss": round(loss, 5)},
        "held_out": {"file": listed.name, **_list(held), **scores},
        "skipped": _merged([unread, *(part.skipped for part in views)]),
        "note": NOTE,
        "command": typed,
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def without_copies(images: Sequence[Picture], held: Sequence[Picture]) -> list[Picture]:
    """The images that are equal to no held-out one, byte by byte."""
    known = {digest(picture.file) for picture in held}
    return [picture for picture in images if digest(picture.file) not in known]


def _networks(o: dict[str, Any], head: Head) -> dict[str, Any]:
    """Which files went in, and which one came out."""
    given = {
        key: {"name": o[key], "file": o[f"{key}_weights"].name, "sha256": digest(o[f"{key}_weights"])}
        for key in ("backbone", "teacher")
    }
    written = {"file": o["out"].name, "sha256": digest(o["out"]), "bits": 16}
    return {"name": o["backbone"], **written, "head": asdict(head), **given}


def _writable(out: Path) -> Path:
    """``out``, in a folder that is there; SrdLabError for a kind of file that is not written, before the work."""
    if out.suffix not in (".npz", ".safetensors"):
        raise SrdLabError(f"--out {out} is of no kind that is written here; expected .npz or .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _list(pictures: Sequence[Picture]) -> dict[str, str]:
    return {"list_sha256": hashlib.sha256(list_text(pictures).encode()).hexdigest()}


def training(o: dict[str, Any]) -> Training:
    """The options that say how the head is trained."""
    return Training(**{field.name: o[field.name] for field in fields(Training)})


def extractor_of(o: dict[str, Any], student: Classifier, device: torch.device) -> Extractor:
    """The extractor that the options describe; the folder of its cache is made."""
    teacher, side = teacher_of(o["teacher"], o["teacher_weights"], device)
    with torch.no_grad():
        layout = fast_layout(teacher, torch.zeros(1, 3, side, side, device=device))
    own = input_size(o["backbone"])
    identity = " ".join(f"{o[key]} {digest(o[f'{key}_weights'])}" for key in ("backbone", "teacher"))
    if o["cache"]:
        o["cache"].mkdir(parents=True, exist_ok=True)
    sizes = (own, o["view_size"] or own, side)
    return Extractor(
        *(student, teacher, layout, sizes, o["smallest"], o["seed"], o["non_rgb"], identity, o["cache"])
    )


if __name__ == "__main__":
    main()
