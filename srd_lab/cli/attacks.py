"""``srd-lab attack``, ``robustness``, ``verify`` and ``leaderboard``: how far do attacks move the explanations of a
method?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from attacks.settings import ManipulationSettings, ModelManipulationSettings, RobustnessSettings
from srd_lab.cli.attack_options import (
    BUDGET_OPTIONS,
    EQ10_OPTIONS,
    MANIPULATION_OPTIONS,
    positive,
)
from srd_lab.cli.errors import command_errors
from srd_lab.cli.options import (
    batch_size_option,
    common_options,
    json_option,
    methods_option,
    model_option,
    pairs_option,
    tracking_uri_option,
    whole,
    with_options,
)
from srd_lab.cli.tracked import Given, Study, tracked

MEMBERS = ("dissimilarity", "combined", "top_k", "target", "mass_centre", "polish", "black_box", "transfer")
ATTACKS = ("standard", *MEMBERS, "eq10")
DEFAULT_ATTACKS = ("combined", "polish", "eq10")
entries_argument = click.argument("entries", nargs=-1, required=True, metavar="ENTRY...")


@click.command()
@methods_option(["srd"], "Explanation method (`srd-lab methods` lists them), or all = the six of Fig. 4.")
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    type=click.Choice(ATTACKS),
    default=DEFAULT_ATTACKS,
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(ATTACKS)}; repeatable. standard = all of the evaluation; eq10 alone prints its own table.",
)
@pairs_option
@model_option
@with_options(BUDGET_OPTIONS)
@with_options(EQ10_OPTIONS)
@batch_size_option
@click.option(
    "--start",
    "starts",
    multiple=True,
    type=click.Choice(["ones", "contrastive", "gradcam"]),
    default=["ones"],
    show_default=True,
    help="Where SRD starts; the paper attacks 'ones', which is class-agnostic. Repeatable.",
)
@with_options(MANIPULATION_OPTIONS)
@common_options
@click.pass_context
@command_errors
def attack(ctx: click.Context, /, **_: Any) -> None:
    """Attack the explanations of random images.

    Scored is what is left of them: the worst case per image over several attacks, on images of 8 bits within the budget
    whose predicted class holds; beside it, not counted, random noise of the same norm and the published attack (Eq.
    10). With --manipulate-model the network is changed instead of the images.
    """

    def study(given: Given) -> Study:
        from attacks.manipulation_study import ManipulationStudy
        from attacks.model_study import OTHERS, ModelStudy
        from attacks.robustness_study import RobustnessStudy

        model = given.read(ModelManipulationSettings, others=OTHERS)
        if model.manipulate_model:
            return ModelStudy(model)
        published = given.read(ManipulationSettings)
        if published.attacks == ("eq10",):
            return ManipulationStudy(published)
        return RobustnessStudy(given.read(RobustnessSettings, gates=False, curve=False, entries=False))

    tracked(ctx, "attack", study)


@click.command()
@methods_option(
    RobustnessSettings.methods,
    "Explanation method; all = the six of Fig. 4, attackable = every one with a gradient.",
    more=("all", "attackable"),
)
@click.option(
    "--pairs",
    "--images",
    "pairs",
    default=100,
    show_default=True,
    type=whole(1),
    help="Random images to attack; each has another one, whose map is a goal.",
)
@model_option
@with_options(BUDGET_OPTIONS)
@click.option(
    "--curve/--no-curve", default=True, show_default=True, help="Also a quarter, half and twice the budget."
)
@click.option(
    "--certify",
    default=0,
    show_default=True,
    type=whole(0),
    help="Draws of a certificate of the smoothed maps (Levine et al. 2019), on four images; 1000 makes sense, 0 = none.",
)
@positive("--sigma", 0.1, "Standard deviation of these draws, pixels in [0, 1].")
@click.option(
    "--eq10/--no-eq10",
    "attacks",
    default=True,
    show_default=True,
    callback=lambda ctx, option, beside: ("standard", "eq10") if beside else ("standard",),
    help="Also the published attack, not counted.",
)
@batch_size_option
@common_options
@click.pass_context
@command_errors
def robustness(ctx: click.Context, /, **_: Any) -> None:
    """Rank methods by the standard evaluation of robustness.

    Under the whole ensemble of attacks, with gates, flags and entries. SRD is ranked from its class-specific start; the
    class-agnostic one, which the paper attacks, stands beside it. docs/robustness.md explains the protocol.
    """

    def study(given: Given) -> Study:
        from attacks.robustness_study import RobustnessStudy

        return RobustnessStudy(given.read(RobustnessSettings))

    tracked(ctx, "robustness", study)


@click.command()
@entries_argument
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The network's weights file.",
)
@click.option(
    "--run-code",
    is_flag=True,
    help="Run the code that the entries name as network or method, such as mine.py:net; read it first.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto takes the first it finds.",
)
@json_option
@tracking_uri_option
@command_errors
def verify(
    entries: tuple[str, ...],
    weights: Path | None,
    run_code: bool,
    device: str,
    as_json: bool,
    tracking_uri: str | None,
) -> None:
    """Recompute entries from their images alone.

    Bounds, classes, maps, scores and gates of each ENTRY: an entry.json, a folder that holds some, or a run, whose parts
    have one each.
    """
    from attacks.found_entries import entry_files
    from attacks.verification import verify as check
    from srd_lab.errors import BadEntry

    found: dict[str, list[str]] = {}
    with entry_files(entries, tracking_uri) as files:
        for file in files:
            found[str(file)] = problems = check(file, weights, device, run_code=run_code)
            if not as_json:
                click.echo(
                    "\n".join(f"disagrees: {problem}" for problem in problems)
                    or f"{file} verifies: hashes, bounds, classes, maps, scores and gates agree"
                )
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    if wrong := [name for name, problems in found.items() if problems]:
        raise BadEntry(f"{', '.join(wrong)} {'does' if len(wrong) == 1 else 'do'} not verify; see above")


@click.command()
@entries_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where to write OUT.md and OUT.html; no file is overwritten. [default: leaderboard, else leaderboard-2, ...]",
)
@json_option
@tracking_uri_option
@command_errors
def leaderboard(entries: tuple[str, ...], out: Path | None, as_json: bool, tracking_uri: str | None) -> None:
    """One table of entries that measured the same thing.

    ENTRY is an entry.json, a folder that holds some, or a run, whose parts have one each.
    """
    from attacks.found_entries import entry_files
    from attacks.leaderboard import leaderboard as table
    from srd_lab.evaluation.outputs import first_free, refuse_taken, write_new

    def files(place: Path) -> tuple[Path, Path]:
        return place.with_name(f"{place.name}.md"), place.with_name(f"{place.name}.html")

    markdown, html = files(out or first_free("leaderboard", files))
    refuse_taken((markdown, html))
    with entry_files(entries, tracking_uri) as given:
        found = table(given)
    write_new(markdown, found.markdown.encode())
    write_new(html, found.html.encode())
    if as_json:
        rows = [dict(zip(found.header, row, strict=True)) for row in found.rows]
        click.echo(json.dumps({"title": found.title, "rows": rows}, indent=1, ensure_ascii=False))
        return
    click.echo(found.markdown)
    click.echo(f"written: {markdown} and {html}")
