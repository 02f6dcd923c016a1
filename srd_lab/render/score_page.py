"""The scores of every image as a page to point at: one HTML file that loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence

import numpy as np

from srd_lab.render.style import COLOURS

MOST = 4000  # points of a panel; more are slow to draw, and cover each other
DIGITS = 4  # of a score

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c1d1f; --paper: #fff; --faint: #62666d; --line: #d6d9de }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8eb; --paper: #16181b; --faint: #a3a9b2; --line: #3a3f46 }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 50rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word }}
h1 {{ font-size: 1.15rem }} summary {{ cursor: pointer; font-weight: 600 }} .faint {{ color: var(--faint) }}
svg {{ width: 100%; height: auto; font-size: 13px }} text {{ fill: var(--ink) }} .axis {{ stroke: var(--line) }}
circle {{ fill-opacity: .5 }} circle.same {{ fill-opacity: 1; stroke: var(--ink); stroke-width: 2 }}
.mean {{ stroke: var(--ink); stroke-width: 2.5 }}
#said {{ position: sticky; top: 0; padding: .3rem 0; background: var(--paper); min-height: 2.2rem }}
</style></head><body>
<h1>{title}</h1>
<p class="faint">A point is an image, a bar the mean of all.{left_out}</p>
<p id="said" class="faint">Point at an image to see its name and score, and where it stands in the other rows.</p>
<noscript>This page needs scripts, which load nothing; scores.csv has the same numbers.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script></body></html>
"""
_SCRIPT = r"""
const {images, panels, colours} = JSON.parse(document.getElementById("data").textContent);
const said = document.getElementById("said"), rest = said.textContent;
const RIGHT = 25, ROW = 34;
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(one => one * power >= rough), first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, k) => +((first + k) * step).toPrecision(6));
}
function part(kind, into, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  into.append(made);
  return made;
}
function show(panel, into) {
  const WIDTH = Math.max(300, Math.min(760, document.body.clientWidth - 32)); // a letter is as large on a small screen
  const LEFT = Math.min(200, .36 * WIDTH), LETTERS = Math.floor(LEFT / 7.6);
  const known = panel.rows.flatMap(row => row.values).filter(value => value !== null);
  const low = known.length ? Math.min(...known) : 0, high = known.length ? Math.max(...known, low + 1e-9) : 1;
  const across = value => LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT);
  const height = ROW * panel.rows.length + 26;
  const svg = part("svg", into, {viewBox: `0 0 ${WIDTH} ${height}`, role: "img"});
  panel.rows.forEach((row, k) => {
    const y = ROW * (k + .5), name = row.subject.length > LETTERS ? row.subject.slice(0, LETTERS - 1) + "…" : row.subject;
    part("text", svg, {x: LEFT - 12, y: y + 4, "text-anchor": "end"}, name);
    part("line", svg, {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y});
    row.values.forEach((value, i) => {
      if (value === null) return;
      const spread = ((i * 0.618034) % 1 - .5) * 20;
      const point = part("circle", svg,
        {"data-i": i, cx: across(value), cy: y + spread, r: 4, fill: colours[k % colours.length]});
      point.addEventListener("mouseenter", () => {
        document.querySelectorAll(`circle[data-i="${i}"]`).forEach(one => one.classList.add("same"));
        said.textContent = `${images[i]}: ${row.subject}, ${panel.score} ${value}`;
      });
      point.addEventListener("mouseleave", () => {
        document.querySelectorAll("circle.same").forEach(one => one.classList.remove("same"));
        said.textContent = rest;
      });
    });
    if (row.mean !== null) part("line", svg,
      {class: "mean", x1: across(row.mean), x2: across(row.mean), y1: y - 14, y2: y + 14});
  });
  for (const value of ticks(low, high, WIDTH < 500 ? 3 : 5)) {
    part("line", svg, {class: "axis", x1: across(value), x2: across(value), y1: 0, y2: height - 22});
    part("text", svg, {x: across(value), y: height - 8, "text-anchor": "middle"}, `${value}`);
  }
}
panels.forEach((panel, k) => {
  const box = document.createElement("details"), title = document.createElement("summary");
  title.textContent = panel.about ? `${panel.score} (${panel.about})` : panel.score;
  box.append(title);
  box.addEventListener("toggle", () => { if (box.open && box.childElementCount < 2) show(panel, box); });
  document.body.append(box);
  box.open = k === 0;
  window.addEventListener("resize", () => {
    box.querySelector("svg")?.remove();
    if (box.open) show(panel, box);
  });
});
"""


def score_page(
    images: Sequence[str],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    title: str = "",
    about: Mapping[str, str] | None = None,
) -> str:
    """A panel per score, a row per subject, a point per image, which says its name and score; a bar for the mean.

    images : (N,) names. scores : subject -> score -> (N,), not finite = not scored. title : of the page.
    about : score -> what its values mean, in a few words.

    Of more than 4000 points in a panel those of the first images are drawn; means are of all.
    """
    drawn = min(len(images), max(1, MOST // max(1, len(scores))))
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    panels = [
        {
            "score": name,
            "about": (about or {}).get(name, ""),
            "rows": [_row(subject, own[name], drawn) for subject, own in scores.items() if name in own],
        }
        for name in names
    ]
    content = {"images": [str(image) for image in images[:drawn]], "panels": panels, "colours": COLOURS}
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    left_out = f" The first {drawn} of {len(images)} images are drawn." if drawn < len(images) else ""
    return _PAGE.format(title=html.escape(title), left_out=left_out, data=data, script=_SCRIPT)


def _row(subject: str, values: np.ndarray, drawn: int) -> dict[str, object]:
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return {
        "subject": subject,
        "mean": round(float(known.mean()), DIGITS) if len(known) else None,
        "values": [round(float(v), DIGITS) if np.isfinite(v) else None for v in values[:drawn]],
    }
