"""Where results go that no run keeps: nothing that is there already is overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from srd_lab.errors import BadValue


def refuse_taken(files: Iterable[Path]) -> None:
    """Raise BadValue where one of the files to be written is there already."""
    taken = [file for file in files if os.path.lexists(file)]
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise BadValue(
            f"{taken[0]}{more} would be overwritten; give another --out, or move away what is there"
        )


def first_free(name: str, files: Callable[[Path], Iterable[Path]]) -> Path:
    """``name``, or the first of ``name-2``, ``name-3``, ... of whose files none is there yet.

    files : gives the files that would be written for a place.
    """
    place, k = Path(name), 2
    while any(map(os.path.lexists, files(place))):
        place, k = Path(f"{name}-{k}"), k + 1
    return place


def write_new(file: Path, content: bytes) -> None:
    """Write a file that is not there yet, and its folder. Raises BadValue if by now it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("xb") as new:
            new.write(content)
    except FileExistsError:
        raise BadValue(f"{file} has been written by somebody else meanwhile; give another --out") from None
