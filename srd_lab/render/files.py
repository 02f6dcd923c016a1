"""Figures as files: PNG, and PDF and SVG for papers, in which text stays text; the same figure has the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srd_lab.errors import BadValue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
# what a file of a format would say of the moment in which it was made
_MADE: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
_TEXT_AS_TEXT: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "srd-lab"}


def check_formats(kinds: Sequence[str]) -> None:
    """Raise BadValue for a format that figures cannot be stored in."""
    for kind in kinds:
        if kind not in FORMATS:
            raise BadValue(f"figures cannot be stored as {kind!r}; choose of {', '.join(FORMATS)}")


def figure_bytes(figure: Figure, kind: str = "png") -> bytes:
    """The file of a figure; kind : ``png``, ``pdf`` or ``svg``. Raises BadValue for another."""
    from matplotlib import rc_context

    check_formats([kind])
    buffer = io.BytesIO()
    with rc_context(_TEXT_AS_TEXT), warnings.catch_warnings():
        # of a letter that no font here has a box is drawn; SVG, whose text is text, has the letter
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(buffer, format=kind, metadata=_MADE[kind])
    return buffer.getvalue()
