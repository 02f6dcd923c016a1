"""One table of several entries: Markdown and HTML.

Only entries that measured the same thing stand in one table: the same network and weights, the same images, the same budget
and mode. Ranked by the worst PCC are those that pass the gates and carry no flag that makes the figure unreliable; the
others stand below, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from attacks.entry import read_entry
from attacks.robustness_report import UNRANKING
from srd_lab.errors import BadEntry
from srd_lab.metrics.summary import interval_text

HEADER = (
    "rank",
    "method",
    "PCC",
    "SSIM",
    "top-10 %",
    "local top-10 %",
    "RER (PCC)",
    "noise PCC",
    "flags",
    "not ranked because",
)
EXPLAINED = {
    "rank": "By the worst PCC, of methods that pass all gates and carry no flag that makes their figure unreliable.",
    "PCC, SSIM": "Similarity of the map before and after the attack that moved it most, mean over the images "
    "[95 % interval]: 1 = unmoved, 0 = unrelated.",
    "top-10 %, local": "The share of the strongest tenth of the pixels that stays; local: one place further counts, too.",
    "RER": "The share of images whose map survives: its PCC stays above what JPEG compression or a shift by one pixel "
    "leave.",
    "noise PCC": "The same after random noise of the same size, which does not aim at the map.",
    "gates": "A map that ignores the network is perfectly robust. Gate class: the maps of two classes differ; gate weights: "
    "the map changes with new weights; gate faithful: it is more faithful than plain edges and than random numbers.",
    "flags": "Signs that the attack failed, not that the method is robust; docs/robustness.md lists them.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --paper: #fff; --line: #d6d9de }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181b; --line: #3a3f46 } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; padding: 0 1em; max-width: 75rem; color: var(--ink);
  background: var(--paper) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3em .6em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem } dt { font-weight: 600 } dd { margin: 0 0 .4em 1.2em }
"""
SAME = {
    "network": lambda e: (e["model"], e["weights_sha256"]),
    "images": lambda e: e["images"]["originals_sha256"],
    "preprocessing": lambda e: e.get("preprocessing"),
    "budget": lambda e: e["attack"]["budget"],
    "mode": lambda e: e["attack"]["mode"],
    "attack": lambda e: [str(e["attack"].get(name)) for name in ("iterations", "queries")],
    # what has no gradient is attacked by the black box as well, or alone, and carries a flag
    "members": lambda e: [e["attack"].get("track"), str(e["attack"]["members"])],
}


@dataclass(frozen=True)
class Leaderboard:
    """A table: title, header and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """The table as a Markdown document."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(escape(cell, quote=False).replace("|", "\\|") for cell in cells) + " |"

        rule = "|" + "---|" * len(self.header)
        return (
            "\n".join(
                [f"# {escape(self.title, quote=False)}", "", line(self.header), rule, *map(line, self.rows)]
            )
            + "\n"
        )

    @property
    def html(self) -> str:
        """The table as one HTML page."""

        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(row("td", cells) for cells in self.rows)
        title = escape(self.title)
        words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(said)}</dd>" for word, said in EXPLAINED.items())
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            f'<div class="wide"><table><thead>{row("th", self.header)}</thead>\n'
            f"<tbody>{body}</tbody></table></div>\n<h2>How to read it</h2><dl>{words}</dl></body></html>\n"
        )


def leaderboard(files: Sequence[Path]) -> Leaderboard:
    """The table of these entries.

    files : ``entry.json`` of each, at least one.

    Raises BadEntry where one cannot be read, or where they did not measure the same thing.
    """
    if not files:
        raise BadEntry("a leaderboard needs at least one entry; give the entry.json of a run")
    entries = {file: read_entry(file) for file in files}
    first = next(iter(entries.values()))
    firsts: dict[tuple[str, Any], tuple[Path, dict[str, Any]]] = {}
    for what, key in SAME.items():
        for file, entry in entries.items():
            track = entry["attack"].get("track") if what == "members" else None
            first_file, other = firsts.setdefault((what, str(track)), (file, entry))
            ours, theirs = key(entry), key(other)
            if ours != theirs and None not in (ours, theirs):  # entries of earlier versions say less
                raise BadEntry(
                    f"{file} and {first_file} differ in their {what}, so they cannot be compared; "
                    f"give only entries with the same {what}"
                )
    order = sorted(entries.values(), key=lambda e: (bool(reason(e)), -e["scores"]["worst_pcc"]))
    rows, rank = [], 0
    for entry in order:
        why = reason(entry)
        rank += not why
        rows.append(_row("-" if why else str(rank), entry, why))
    count = first["images"]["count"]
    return Leaderboard(
        f"Robustness of explanations: {first['model']} on {first['data']}, {count} images", HEADER, rows
    )


def reason(entry: dict[str, Any]) -> str:
    """Why an entry, as :func:`attacks.entry.read_entry` gives it, is not ranked; empty where it is."""
    gates = entry.get("gates")
    failed = (
        ["the gates were not measured"]
        if gates is None
        else [g for g, ok in gates["passed"].items() if not ok]
    )
    said = [f"gate {name}" if gates else name for name in failed]
    if not math.isfinite(entry["scores"]["worst_pcc"]):
        said.append("its PCC could not be measured")
    return ", ".join([*said, *(f"flag {name}" for name in entry["flags"] if name in UNRANKING)])


def _row(rank: str, entry: dict[str, Any], why: str) -> list[str]:
    s = entry["scores"]
    name = entry["method"] + (f"_{entry['start']}" if entry["method"] == "srd" else "")

    def interval(score: str) -> str:
        ends = (s[f"worst_{score}_{end}"] for end in ("low", "high"))
        return interval_text(s[f"worst_{score}"], *ends)

    cells = [
        rank,
        name,
        interval("pcc"),
        interval("ssim"),
        f"{s['worst_top_k']:.3f}",
        f"{s['worst_local_top_k']:.3f}",
    ]
    return [
        *cells,
        f"{s['rer_pcc']:.0%}",
        f"{s['noise_pcc']:.3f}",
        ", ".join(entry["flags"]) or "-",
        why or "-",
    ]
