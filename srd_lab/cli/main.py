"""``srd-lab``: the command line. Commands import what they need when they run, so that help is quick."""

from __future__ import annotations

import json
import os

import click

from srd_lab.cli.apop import apop
from srd_lab.cli.attacks import attack, leaderboard, robustness, verify
from srd_lab.cli.errors import command_errors
from srd_lab.cli.evaluation import evaluate, explain
from srd_lab.cli.options import OWN_MODEL, json_option
from srd_lab.cli.reproduce import reproduce
from srd_lab.cli.runs import compare, export, list_, report, ui
from srd_lab.cli.shares import merge
from srd_lab.runs.report import text_table

# Read when PyTorch is loaded. Threads that wait actively cost 5 to 15 times the time once another process holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="srd-lab")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def main(debug: bool) -> None:
    """Find out whether a saliency explanation can be trusted.

    \b
      srd-lab attack --method srd --pairs 100    attack explanations, score what is left of them
      srd-lab robustness                         the standard evaluation: ranking, gates, flags, entries
      srd-lab apop --model vgg16                 predict from activation patterns alone
      srd-lab evaluate --images 200              score and rank every method by every metric
      srd-lab explain photo.jpg                  maps of your own pictures
      srd-lab reproduce table3                   the paper's experiments, its numbers beside yours
      srd-lab merge DIR DIR                      make a run of shares that --shard I/N did apart
      srd-lab runs                               list what was run; compare, export and report take runs from there
      srd-lab compare RUN RUN                    compare runs, paired where the images are the same
      srd-lab report RUN                         one HTML file to send
      srd-lab ui                                 look at the runs in MLflow
    """


@main.command()
@json_option
@command_errors
def models(as_json: bool) -> None:
    """List the bundled networks and how each was made."""
    from srd_lab.catalogue import cards

    if as_json:
        click.echo(json.dumps(cards(), indent=1, ensure_ascii=False))
        return

    rows = [
        [
            card["name"],
            card["width"],
            f"{card['parameters']:,}",
            f"{card['test_accuracy']:.1%}",
            str(card["seed"]),
            card["data"],
            card["command"],
        ]
        for card in cards()
    ]
    click.echo(text_table(["model", "width", "parameters", "test accuracy", "seed", "data", "made by"], rows))
    click.echo("\nWith --data imagenet:DIR, --model takes any torchvision classification network by name.")
    click.echo(f"With any data it takes networks from elsewhere: {OWN_MODEL}.")


@main.command()
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Of the cluster, or auto for that of this machine. [default: $RAY_ADDRESS, else auto]",
)
@command_errors
def cluster(ray_address: str | None) -> None:
    """List the machines of a Ray cluster.

    And how many batches it would work on at once.
    """
    from srd_lab.runs.executors import connected
    from srd_lab.runs.on_ray import cluster_text

    with connected("ray", ray_address or os.environ.get("RAY_ADDRESS") or "auto"):
        click.echo(cluster_text())


@main.command()
@json_option
@command_errors
def methods(as_json: bool) -> None:
    """List the explanation methods and the metrics."""
    from srd_lab.catalogue import METHODS, METRICS

    if as_json:
        told = ("title", "paper", "resolution", "attackable", "passes", "tested", "needs", "scores", "better")
        found = {
            kind: {
                name: {k: getattr(entry, k) for k in told if hasattr(entry, k)}
                for name, entry in known.items()
            }
            for kind, known in (("methods", METHODS), ("metrics", METRICS))
        }
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return

    rows = [
        [name, m.title, m.paper, m.resolution, "yes" if m.attackable else "no", m.passes, m.tested, m.needs]
        for name, m in METHODS.items()
    ]
    header = ["method", "", "paper", "resolution", "attackable", "forward passes", "tested against", "needs"]
    click.echo(text_table(header, rows))
    click.echo(
        "\nresolution: input, high = 1/8 of it, low = the encoder output. A backward pass counts as two forward ones;"
    )
    click.echo("K is the number of the layer's channels, a tail what lies behind the layer.\n")
    scored = [[name, m.title, m.paper, m.scores, m.better, m.tested] for name, m in METRICS.items()]
    click.echo(text_table(["metric", "", "paper", "what", "better", "tested against"], scored))


for command in (attack, robustness, verify, leaderboard, list_, compare, report, export, ui):
    main.add_command(command)
main.add_command(apop)
main.add_command(evaluate)
main.add_command(explain)
main.add_command(reproduce)
main.add_command(merge)

if __name__ == "__main__":
    main()
