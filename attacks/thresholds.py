"""Below which similarity a map counts as broken: fixed once, from changes of the image that mean nothing.

``scripts/fix_thresholds.py`` explains images after JPEG compression of quality 90, after a shift by one pixel and after
noise of one level of 8 bits, and writes ``thresholds.json`` with the data that they come from. A map that an attack leaves
at least as alike as such a change does is not broken.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("thresholds.json")
TAU: dict[str, float] = json.loads(FILE.read_text(encoding="utf-8"))["tau"]
