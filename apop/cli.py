"""``srd-lab apop``: how well does a network predict when it keeps nothing of an image but the activation pattern?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from srd_lab import options as cli
from srd_lab.types import SrdLabError

if TYPE_CHECKING:
    from apop.experiment import Experiment, Hits, Interval
    from srd_lab.models import Classifier
    from srd_lab.tracking import Run

INPUTS = ("zeros", "ones", "normal")
TOP_5 = 5


class _Inputs(click.ParamType):
    """Some of INPUTS, separated by commas, as a tuple without repetitions."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))
        if wrong := [name for name in names if name not in INPUTS]:
            self.fail(f"{wrong[0]!r} is not one of {', '.join(INPUTS)}", param, ctx)
        return tuple(dict.fromkeys(names))


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=[cli.DEFAULT_MODEL],
    show_default=True,
    help="A bundled network, or with ImageNet data any torchvision one; repeatable.",
)
@click.option(
    "--images",
    default=500,
    show_default=True,
    type=click.IntRange(1),
    help="Random images, drawn by the seed; all, if there are not more.",
)
@click.option(
    "--inputs",
    type=_Inputs(),
    default=",".join(INPUTS),
    show_default=True,
    help="What is put in the place of the image, comma-separated, in normalised space.",
)
@click.option(
    "--binarize/--no-binarize",
    default=True,
    show_default=True,
    help="Binarise each activation call in turn (one forward pass each).",
)
@click.option("--save-patterns", is_flag=True, help="Store the activation patterns with the run.")
@click.option("--batch-size", type=click.IntRange(1), help="Images at once. [default: by image size]")
@cli.common_options
@click.pass_context
@cli.command_errors
def apop(ctx: click.Context, /, **_: Any) -> None:
    """Predict from activation patterns alone (APOP).

    The network sees an image; then it sees zeros, ones or noise instead, with the on/off pattern of its ReLUs and
    the winners of its max pools frozen: APOP. "& relu" applies ReLU after each frozen mask as well. Then each
    activation call in turn gives 1 where it is positive and 0 elsewhere, on the image itself.
    """
    cli.tracked(ctx, "apop", ", ".join(ctx.params["models"]), _Study)


class _Study:
    """One run of the command, from settings to tables and figures."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from apop.experiment import Experiment, draw_images
        from srd_lab.data import load_data
        from srd_lab.runtime import pick_device

        self.settings = settings
        self.watch = cli.Stopwatch()
        self.models = list(dict.fromkeys(settings["models"]))
        if settings["weights"] and len(self.models) > 1:
            raise SrdLabError(f"one --weights file does not fit {len(self.models)} models; give one --model")
        self.device = pick_device(settings["device"])
        self.experiment = Experiment(settings["inputs"], settings["binarize"], settings["seed"])
        self.dataset = load_data(settings["data"], seed=settings["seed"])
        self.indices = draw_images(self.dataset, settings["images"], settings["seed"])
        settings["batch_size"] = settings["batch_size"] or _batch_size(self.dataset[0].image.shape)
        source = settings["data"].partition(":")[0]
        self.about = f"{source}, {len(self.indices)} of {len(self.dataset)} images"

    def run(self, run: Run) -> None:
        """Survey every model and report."""
        results = {}
        for name in self.models:
            with run.child(name, {"model": name}) as child:
                results[name] = self._model(name, child)
        self._report(run, results)

    def _model(self, name: str, child: Run) -> Hits:
        from apop.experiment import Hits
        from srd_lab.models import load_model

        watch = cli.Stopwatch()
        model = load_model(name, self.settings["data"], self.settings["weights"], str(self.device))
        passes = self._survey(model)
        places = range(0, len(self.indices), self.settings["batch_size"])
        done = set(child.list("batches"))
        with cli.progress(len(self.indices) * passes, name) as advance:
            parts = [self._batch(model, child, first, done, passes, advance) for first in places]
        hits = Hits.join(parts)
        self._log(name, child, hits, watch.seconds())
        return hits

    def _survey(self, model: Classifier) -> int:
        """Forward passes per image; refuses an unfit model and says what patterns will take before the work starts."""
        from apop.pattern import record

        image = self.dataset[self.indices[0]].image[None].to(self.device)
        _, pattern = record(model, image)
        if self.settings["save_patterns"]:
            one, count = pattern.packed_bytes, len(self.indices)
            click.echo(
                f"patterns: {_size(one)} per image, {_size(one * count)} for {count} images before compression",
                err=True,
            )
        return self.experiment.passes(len(pattern.masks))

    def _batch(
        self,
        model: Classifier,
        child: Run,
        first: int,
        done: set[str],
        passes: int,
        advance: Callable[[int], None],
    ) -> Hits:
        from apop.experiment import Hits

        indices = self.indices[first : first + self.settings["batch_size"]]
        file = f"{first:05d}-{first + len(indices) - 1:05d}.npz"
        if f"batches/{file}" in done:
            advance(len(indices) * passes)
            return Hits.from_arrays(child.load_arrays(f"batches/{file}"))
        keep = None
        if self.settings["save_patterns"]:

            def keep(pattern: Any) -> None:
                child.save_arrays(f"patterns/{file}", pattern.to_arrays())

        hits = self.experiment.run(model, self.dataset, indices, self.device, advance, keep)
        child.save_arrays(f"batches/{file}", hits.to_arrays())
        return hits

    # what is stored ------------------------------------------------------------------------------------
    def _log(self, name: str, child: Run, hits: Hits, seconds: float) -> None:
        child.save_text("images.csv", cli.csv_text(hits.rows()))
        child.save_text("summary.csv", cli.csv_text(_summary(hits)))
        metrics = {
            key: hits.interval(key).accuracy for key in hits.right if not key.startswith("binarized_top5")
        }
        child.log_metrics({**metrics, "seconds": seconds})
        self._draw(name, child, hits)

    def _draw(self, name: str, child: Run, hits: Hits) -> None:
        from apop.experiment import SETTINGS
        from srd_lab import render

        title = f"{name} on {self.about}"
        original, chance = hits.interval("top1/original").accuracy, 1 / len(self.dataset.classes)
        bars = {
            (kind, setting): hits.interval(f"top1/{kind}/{setting}").accuracy
            for kind in self.experiment.inputs
            for setting in SETTINGS
        }
        child.save_figure("apop.png", render.apop_bars(bars, original, chance, title))
        if hits.layers:
            curve = [interval.accuracy for interval in hits.curve()]
            figure = render.binarisation_curve(hits.layers, curve, original, chance, title)
            child.save_figure("binarisation.png", figure)

    def _report(self, run: Run, results: dict[str, Hits]) -> None:
        classes = len(self.dataset.classes)
        chance = f"Guessing: {1 / classes:.3f} top-1, {min(TOP_5, classes) / classes:.3f} top-5."
        text = "\n".join(
            [
                f"APOP on {self.about}: accuracy ±half the 95 % Wilson interval",
                "",
                cli.text_table(*table_3(results, self.experiment)),
                "",
                chance,
                *(line for name, hits in results.items() if hits.layers for line in _curve(name, hits)),
            ]
        )
        run.save_text("summary.txt", text + "\n")
        run.log_metrics({"seconds": self.watch.seconds()})
        click.echo(text)


def table_3(results: dict[str, Hits], experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the paper's Table 3: a line per model and input, the original's accuracy in the first."""
    header = ["Model", "Input"]
    header += [f"{top} {what}" for top in ("Top-1", "Top-5") for what in ("Ori.", "APOP", "APOP & relu")]
    lines = []
    for model, hits in results.items():
        for i, kind in enumerate(experiment.inputs):
            cells = [model if i == 0 else "", kind]
            for top in ("top1", "top5"):
                cells.append(_cell(hits.interval(f"{top}/original")) if i == 0 else "")
                cells += [_cell(hits.interval(f"{top}/{kind}/{s}")) for s in ("apop", "apop_relu")]
            lines.append(cells)
    return header, lines


def _cell(interval: Interval) -> str:
    return f"{interval.accuracy:.3f} ±{interval.half_width:.3f}"


def _curve(model: str, hits: Hits) -> list[str]:
    """Fig. 6 as text: a line per activation call."""
    original = hits.interval("top1/original").accuracy
    lines = [
        [layer, f"{one.accuracy:.3f}", f"[{one.low:.3f}, {one.high:.3f}]", f"{five.accuracy:.3f}"]
        for layer, one, five in zip(hits.layers, hits.curve(), hits.curve(TOP_5), strict=True)
    ]
    table = cli.text_table(["Activation call", "Top-1", "95 % interval", "Top-5"], lines)
    title = f"{model}: one activation call binarised, all else as it is (untouched: {original:.3f} top-1)"
    return ["", title, "", table]


def _summary(hits: Hits) -> list[dict[str, Any]]:
    """A row per condition: accuracy and its 95 % Wilson interval."""
    intervals = {condition: hits.interval(condition) for condition in hits.right}
    return [
        {"condition": name, "accuracy": each.accuracy, "low": each.low, "high": each.high, "images": each.n}
        for name, each in intervals.items()
    ]


def _batch_size(shape: tuple[int, ...]) -> int:
    """Images at once: 50 of 64 x 64, 8 of 224 x 224; the same on every device, so that a run can go on elsewhere."""
    return max(1, min(50, 8 * 224 * 224 // (shape[-1] * shape[-2])))


def _size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
