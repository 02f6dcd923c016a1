"""One HTML file about one or several runs that can be sent, printed and read without a network.

Tables, figures, pictures, settings, the command, how to read it, and what it does not say.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from srd_lab.runs.document import Document
from srd_lab.runs.environment import SURROUNDINGS
from srd_lab.runs.glossary import explained
from srd_lab.runs.outcome import REPORT
from srd_lab.runs.reading import StoredRun

_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}
_CAPTIONS = {
    "scores": "Every point is an image; boxes hold the middle half of them, the line in a box is the median, and whiskers "
    "reach the farthest point within 1.5 box heights. Pale: random noise instead of an attack.",
    "members": "Mean correlation of the maps before and after each attack of the ensemble. A star marks an attack that was "
    "tried on some images and does not count.",
    "worst": "The images that came off worst: the image, the attacked one, the difference between them (magnified), "
    "the map before and after.",
    "robustness": "Worst-case correlation over the size of the budget.",
    "pictures": "Images and their maps; what their colours and lines mean stands below them.",
    "ranks": "Rank of every method by every metric, 1 is best; best on average on top.",
    "apop": "Accuracy of ordinary passes, and from the activation pattern alone, with 95 % intervals.",
    "binarisation": "Accuracy with one activation call binarised at a time.",
    "comparison": "Points are means, lines 95 % intervals, the dashed line is the reference.",
    "certificate": "What an attack leaves of the map, and what is certified that none can take.",
}
_UNDER_ATTACK = (
    "A score near 1 means that the attacks within the budget did not move the map; near 0, that nothing of it is left. "
    "It is an upper bound: a stronger attack can only lower it.",
    "Compare with the noise column. A method whose map random noise of the same size moves as much is not attacked, "
    "but unstable.",
    "Robust does not mean right: a map that ignores the network is the most robust of all. `srd-lab robustness` has "
    "gates for that, and `srd-lab evaluate` scores other sides.",
)
_READING: Mapping[str, Sequence[str]] = {
    "attack": _UNDER_ATTACK,
    "robustness": _UNDER_ATTACK,
    "apop": (
        "APOP is what the network answers when it is given nothing of the image but which of its activations were on.",
        "Far above guessing, the pattern holds the answer, and the values of the image add little.",
        "It says nothing of which explanation method to trust.",
    ),
    "evaluate": (
        "No single metric says which explanation is right: localisation asks whether the map lies on the object, "
        "faithfulness whether the network needs what is marked, complexity how few pixels it is, "
        "robustness whether small changes move it.",
        "Where an interval holds the other's mean, the images do not settle which is better.",
        "Metrics that set pixels to a baseline show the network images that it never saw; their absolute values mean "
        "little.",
    ),
    "compare": (
        "A difference counts where its interval does not hold 0 and the corrected p is below 0.05.",
        "On the same images the comparison is paired, which is far more precise; different images are compared as groups.",
    ),
    "reproduce": (
        "The paper's value lies inside the interval, or does not: with other weights or images it need not.",
        "What differs from the paper's setting stands under the tables.",
    ),
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --paper: #fff; --faint: #62666d; --line: #d6d9de; --fill: #f5f6f8;
  --link: #0b62a8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181b; --faint: #a3a9b2; --line: #3a3f46; --fill: #20242a; --link: #79b8f3 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1.25rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
a { color: var(--link) }
.faint, figcaption { color: var(--faint); font-size: .9rem }
/* a shadow at the side to which a table that is wider than the page can be moved */
.wide { overflow-x: auto; background:
  linear-gradient(90deg, var(--paper) 2rem, transparent) left / 4rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 2rem, transparent) right / 4rem 100% no-repeat local,
  linear-gradient(90deg, #8889, transparent) left / .9rem 100% no-repeat scroll,
  linear-gradient(270deg, #8889, transparent) right / .9rem 100% no-repeat scroll }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal }
th { vertical-align: bottom } .whole, td:not(:has(.whole)):not(:last-child) { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
table.about td { text-align: left; white-space: normal; overflow-wrap: anywhere }
figure { margin: 1rem 0 1.5rem }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
pre { background: var(--fill); padding: .75rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .86rem }
dt { font-weight: 600 } dd { margin: 0 0 .4rem 1.25rem }
details { margin: .75rem 0 } summary { cursor: pointer }
@media print { html { font-size: 10px } body { max-width: none; font-size: 11px }
  h2, h3 { break-after: avoid } figure img { max-height: 15cm; width: auto }
  details::details-content { content-visibility: visible; block-size: auto }
  figure, tr { break-inside: avoid }
  details > *:not(summary) { display: block } }
"""

_CODE = re.compile("`(.*?)`")


@dataclass(frozen=True)
class Joint:
    """What stands before the runs of a page: how they compare.

    document : tables, and what they mean. figure : PNG; b"" = none.
    """

    document: Document
    figure: bytes = b""


def html_report(runs: Sequence[StoredRun], title: str = "", joint: Joint | None = None) -> str:
    """The page.

    runs : that it is about; one that has not finished says so. title : of the page; "" = made of the runs' names.
    joint : what compares them; None = nothing does.

    Raises BadRun where a report is damaged.
    """
    many = len(runs) > 1
    name = title or (
        f"{len(runs)} runs compared" if joint else " | ".join(f"{r.command} {r.name}" for r in runs)
    )
    listed = "".join(f'<li><a href="#{run.short}">{_(run.command)}: {_(run.name)}</a></li>' for run in runs)
    contents = f"<ul>{listed}</ul>" if many else ""
    together = [joint.document.html(), _picture(joint.figure, "comparison.png")] if joint else []
    sections = "\n".join([*together, *map(_section, runs), _glossary(runs, joint)])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_(name)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{_(name)}</h1>\n"
        f"{contents}\n{sections}\n</body></html>\n"
    )


def _section(run: StoredRun) -> str:
    made = f"{run.started:%d %B %Y, %H:%M}" if run.started else "at an unknown time"
    head = (
        f'<section id="{_(run.short)}"><p class="faint">Run {_(run.id)}, made {made} by '
        f"srd-lab {_(run.command)}; {_(run.status.lower())}.</p>"
    )
    parts = [head]
    names = run.top_files
    if "report.json" in names:
        parts.append(run.document().html())
    else:
        parts.append("<h2>No report</h2><p>This run has not finished.</p>")
    parts += [_figure(run, name) for name in _shown(names)]
    for part in run.parts:
        shown = _shown(part.top_files)
        if shown:
            parts.append(f"<h3>{_(part.name)}</h3>" + "".join(_figure(part, name) for name in shown))
    parts.append(_how_to_read(run.command.partition(" ")[0]))
    parts.append(_made(run, names))
    return "\n".join(parts) + "</section>"


def _shown(names: Sequence[str]) -> list[str]:
    """The figures among a run's files that a page can show, each in one format: PNG, else SVG."""
    found: dict[str, str] = {}
    for kind in _KINDS:
        for name in names:
            if PurePosixPath(name).suffix == kind:
                found.setdefault(PurePosixPath(name).stem, name)
    return sorted(found.values())


def _figure(run: StoredRun, name: str) -> str:
    return _picture(run.files.read(name), name)


def _picture(content: bytes, name: str) -> str:
    """A figure with its caption; nothing where it has no content."""
    if not content:
        return ""
    path = PurePosixPath(name)
    data = base64.b64encode(content).decode()
    caption = _CAPTIONS.get(path.stem, "")
    alt = caption or path.stem.replace("_", " ")
    return (
        f'<figure><img alt="{_(alt)}" src="data:{_KINDS[path.suffix]};base64,{data}">'
        f"<figcaption>{_(caption)}</figcaption></figure>"
    )


def _how_to_read(command: str) -> str:
    said = _READING.get(command, ())
    items = [_CODE.sub(r"<code>\1</code>", _(line)) for line in said]
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f"<h2>How to read it, and what it does not say</h2><ul>{lines}</ul>" if said else ""


def _glossary(runs: Sequence[StoredRun], joint: Joint | None) -> str:
    """What the words mean that stand in the reports."""
    reports = [run.document().text() for run in runs if REPORT in run.top_files]
    words = explained("\n".join([*reports, joint.document.text() if joint else ""]))
    items = "".join(f"<dt>{_(word)}</dt><dd>{_(said)}</dd>" for word, said in words)
    return f'<section id="words"><h2>What the words mean</h2><dl>{items}</dl></section>' if items else ""


def _made(run: StoredRun, names: Sequence[str]) -> str:
    """How to make it again: the command, the settings, the surroundings, what was noted on the way."""
    parts = ["<h2>How it was made</h2>"]
    if "command.txt" in names:
        parts.append(f"<pre>{_(run.load_text('command.txt').strip())}</pre>")
    if "notes.txt" in names:
        parts.append(f"<h3>Noted on the way</h3><pre>{_(run.load_text('notes.txt').strip())}</pre>")
    settings = {k: v for k, v in run.params.items() if k not in SURROUNDINGS and v}
    around = {k: run.params[k] for k in SURROUNDINGS if run.params.get(k)}
    for title, values in (("Settings", settings), ("Versions, machine and weights", around)):
        rows = "".join(f"<tr><td>{_(k)}</td><td>{_(v)}</td></tr>" for k, v in values.items())
        parts.append(
            f'<details><summary>{title}</summary><table class="about"><tbody>{rows}</tbody></table></details>'
        )
    return "\n".join(parts)


def _(text: str) -> str:
    return html.escape(text)
