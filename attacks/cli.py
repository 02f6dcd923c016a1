"""``srd-lab attack``: how far does a targeted manipulation move the explanations of a method?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from srd_lab import options as cli

if TYPE_CHECKING:
    import numpy as np

    from attacks.experiment import Arrays, Pair
    from srd_lab.render import PictureRow
    from srd_lab.tracking import Run

METHODS = ("srd", "gradient", "grad_input", "guided_backprop", "integrated_gradients", "lrp_zplus")
PICTURES = 6


@click.command()
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([*METHODS, "all"]),
    default=["srd"],
    show_default=True,
    help="Explanation method; repeatable.",
)
@click.option(
    "--pairs",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Random pairs of images to attack.",
)
@click.option(
    "--model",
    default=cli.DEFAULT_MODEL,
    show_default=True,
    help="A bundled network, or with ImageNet data any torchvision one.",
)
@click.option("--steps", default=100, show_default=True, type=click.IntRange(1), help="Adam steps at most.")
@click.option(
    "--lr",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Step size in normalised units.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Pairs attacked at once. [default: by image size]")
@click.option(
    "--output-term",
    type=click.Choice(["probabilities", "logits"]),
    default="probabilities",
    show_default=True,
    help="What shall stay: probabilities, or logits as Eq. 10 prints it.",
)
@click.option(
    "--bound",
    default=8.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Largest change of a pixel, in units of 0..255.",
)
@click.option(
    "--stop-mse",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Stop an image at this mean squared change (normalised).",
)
@click.option(
    "--beta-start",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Softplus beta of the surrogate at the first step.",
)
@click.option(
    "--beta-end",
    default=100.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="... and after the last.",
)
@click.option(
    "--start",
    type=click.Choice(["ones", "contrastive", "gradcam"]),
    default="ones",
    show_default=True,
    help="Where SRD starts; the paper attacks 'ones', which is class-agnostic.",
)
@cli.common_options
@click.pass_context
@cli.command_errors
def attack(ctx: click.Context, /, **_: Any) -> None:
    """Attack the explanations of random image pairs and score how far they moved.

    Scores: SSIM and PCC of the map before and after (high = robust), of the map after and the map aimed at
    (high = the attack succeeded), and before and after random noise of equal MSE (the control).
    """
    cli.tracked(ctx, "attack", ctx.params["model"], _Robustness)


class _Robustness:
    """One run of the command, from settings to tables and figures."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from attacks.experiment import draw_pairs
        from srd_lab.data import load_data
        from srd_lab.models import load_model
        from srd_lab.runtime import pick_device

        self.settings = settings
        self.watch = cli.Stopwatch()
        self.methods = _chosen(settings["methods"])
        self.device = pick_device(settings["device"])
        self.dataset = load_data(settings["data"], seed=settings["seed"])
        self.model = load_model(settings["model"], settings["data"], settings["weights"], str(self.device))
        self.pairs = draw_pairs(self.dataset, self.model, settings["pairs"], settings["seed"], self.device)
        settings["batch_size"] = settings["batch_size"] or _batch_size(
            self.dataset[0].image.shape, self.device.type
        )

    def run(self, run: Run) -> None:
        """Attack every method and report."""
        tables = {}
        for method in self.methods:
            with run.child(method, {"method": method}) as child:
                tables[method] = self._attack(method, child)
        self._report(run, tables)

    def _attack(self, method: str, child: Run) -> Arrays:
        from attacks.experiment import gather

        watch = cli.Stopwatch()
        how = self._manipulation(method)
        numbered = list(enumerate(self.pairs))
        size = self.settings["batch_size"]
        batches = [numbered[i : i + size] for i in range(0, len(numbered), size)]
        done = set(child.list("batches"))
        with cli.progress(len(numbered) * how.steps, method) as advance:
            parts = [self._batch(how, child, part, done, advance) for part in batches]
        table = gather(parts)
        self._log(method, child, table, watch.seconds())
        # the report needs scores and curves; images and maps of every method would pile up
        return {name: values for name, values in table.items() if values.ndim <= 2}

    def _manipulation(self, method: str) -> Any:
        from attacks.experiment import attack_explainer
        from attacks.manipulation import Manipulation
        from attacks.objective import Budget, Objective

        s = self.settings
        return Manipulation(
            attack_explainer(method, s["start"]),
            steps=s["steps"],
            lr=s["lr"],
            objective=Objective(output_term=s["output_term"]),
            budget=Budget(s["bound"]),
            stop_mse=s["stop_mse"],
            beta_start=s["beta_start"],
            beta_end=s["beta_end"],
        )

    def _batch(
        self, how: Any, child: Run, part: list[tuple[int, Pair]], done: set[str], advance: Any
    ) -> Arrays:
        from attacks.experiment import attack_batch

        path = f"batches/{part[0][0]:05d}-{part[-1][0]:05d}.npz"
        if path in done:
            advance(len(part) * how.steps)
            return child.load_arrays(path)
        arrays = attack_batch(
            how, self.model, self.dataset, part, self.settings["seed"], self.device, advance
        )
        child.save_arrays(path, arrays)
        return arrays

    # what is stored ------------------------------------------------------------------------------------
    def _log(self, method: str, child: Run, table: Arrays, seconds: float) -> None:
        from attacks.experiment import rows
        from srd_lab import render

        child.save_text("pairs.csv", cli.csv_text(rows(table)))
        child.log_metrics({**_metrics(table, self.settings["seed"]), "seconds": seconds})
        loss = _nanmean(table["loss"])
        child.log_traces({"loss": (range(1, len(loss) + 1), loss)})
        child.save_figure("pictures.png", render.picture_grid(self._pictures(table)))

    def _pictures(self, table: Arrays) -> list[PictureRow]:
        from srd_lab.render import PictureRow

        name = self.dataset.classes
        return [
            PictureRow(
                label=f"pair {table['pair'][i]}: {name[table['label'][i]]} → {name[table['goal_label'][i]]}",
                original=table["images"][i],
                adversarial=table["adversarial"][i],
                map_original=table["map_original"][i],
                map_adversarial=table["map_adversarial"][i],
                map_target=table["map_target"][i],
                target=table["goal_images"][i],
                scores=f"SSIM {table['ssim'][i]:.2f}, PCC {table['pcc'][i]:.2f}\n"
                f"to target: SSIM {table['ssim_target'][i]:.2f}, PCC {table['pcc_target'][i]:.2f}",
            )
            for i in range(min(PICTURES, len(table["pair"])))
        ]

    def _report(self, run: Run, tables: dict[str, Arrays]) -> None:
        from attacks.experiment import perturbation_curve
        from srd_lab import render

        scores = {m: {"ssim": t["ssim"], "pcc": t["pcc"]} for m, t in tables.items()}
        control = {m: {"ssim": t["ssim_noise"], "pcc": t["pcc_noise"]} for m, t in tables.items()}
        title = (
            f"{self.settings['model']} on {self.settings['data'].partition(':')[0]}, {len(self.pairs)} pairs"
        )
        run.save_figure("scores.png", render.box_plots(scores, control, title))
        curves = {m: perturbation_curve(t, "ssim") for m, t in tables.items()}
        run.save_figure("scores_over_mse.png", render.curves(curves, title))
        header, lines = summary_table(tables, self.settings["seed"])
        text = cli.text_table(header, lines)
        run.save_text("summary.txt", text + "\n")
        run.log_metrics({"seconds": self.watch.seconds()})
        click.echo(f"{title}; original map against the map after the attack, mean [95 % interval]\n\n{text}")
        click.echo(
            "\nssim, pcc: to the original's map (1 = unmoved); noise: the same after random noise of equal MSE;\n"
            "target: to the map aimed at, before -> after; kept: predictions that held; mse: normalised units;\n"
            "linf: largest change of a pixel (0..255); beta: the surrogate's at the last step."
        )


def _chosen(methods: tuple[str, ...]) -> list[str]:
    return list(METHODS) if "all" in methods else list(dict.fromkeys(methods))


def _batch_size(shape: tuple[int, ...], device: str) -> int:
    """Pairs at once: about 24 of 64 x 64 or 2 of 224 x 224 on a CPU, 32 times as many on an accelerator."""
    pixels = 2 * 224 * 224 * (1 if device == "cpu" else 32)
    return max(1, pixels // (shape[-1] * shape[-2]))


def _metrics(table: Arrays, seed: int) -> dict[str, float]:
    from attacks.manipulation import SCORES
    from srd_lab.metrics.summary import summarise

    metrics: dict[str, float] = {}
    for name in SCORES:
        summary = summarise(table[name], seed)
        metrics |= {
            name: summary.mean,
            f"{name}_median": summary.median,
            f"{name}_low": summary.low,
            f"{name}_high": summary.high,
            f"{name}_noise": float(table[f"{name}_noise"].mean()),
            f"{name}_best": float(table[f"{name}_best"].mean()),
        }
    for name in (
        "ssim_target_before",
        "pcc_target_before",
        "prediction_kept",
        "mse",
        "linf",
        "steps",
        "beta",
    ):
        metrics[name] = float(table[name].mean())
    return metrics


def summary_table(tables: dict[str, Arrays], seed: int) -> tuple[list[str], list[list[str]]]:
    """Header and one line of text per method."""
    from srd_lab.metrics.summary import summarise

    header = [
        "method",
        "ssim",
        "median",
        "noise",
        "pcc",
        "median",
        "noise",
        "ssim target",
        "pcc target",
        "kept",
        "mse",
        "linf",
        "steps",
        "beta",
    ]
    lines = []
    for method, table in tables.items():
        cells = [method]
        for name in ("ssim", "pcc"):
            s = summarise(table[name], seed)
            cells += [
                f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]",
                f"{s.median:.3f}",
                f"{table[f'{name}_noise'].mean():.3f}",
            ]
        for name in ("ssim_target", "pcc_target"):
            cells.append(f"{table[f'{name}_before'].mean():.3f} -> {table[name].mean():.3f}")
        kept, mse, linf = table["prediction_kept"].mean(), table["mse"].mean(), table["linf"].mean()
        cells += [
            f"{kept:.0%}",
            f"{mse:.1e}",
            f"{linf:.1f}",
            f"{table['steps'].mean():.0f}",
            f"{table['beta'].mean():.0f}",
        ]
        lines.append(cells)
    return header, lines


def _nanmean(loss: np.ndarray) -> np.ndarray:
    """Mean over the images still under attack at each step, as far as any is."""
    import numpy as np

    running = np.isfinite(loss).any(0)
    return np.nanmean(loss[:, running], axis=0)
