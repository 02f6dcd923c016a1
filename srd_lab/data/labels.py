"""Names of classes from a file, ``--labels FILE``: a name on each line, in the order of the class indices, or JSON."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from srd_lab.errors import BadValue, SrdLabWarning, first_line

LONGEST = 200  # characters of a name


def read_labels(file: str | Path, count: int) -> list[str]:
    """The names of ``count`` classes, by index.

    file : text with a name on each line; or JSON (``.json``): a list of names, or an object of index -> name, as
        ``id2label`` of transformers is.

    A name that several classes have is followed by the index, ``crane (134)``, which a warning says.

    Raises BadValue where the file cannot be read, has more or fewer names, or one that is empty or no line of text.
    """
    file = Path(file).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        names: list[Any] = _of_json(file, text) if file.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise BadValue(
            f"{file} cannot be read as names of classes: {first_line(error)}; expected a name on each line, or JSON"
        ) from None
    for index, name in enumerate(names):
        if (
            not isinstance(name, str)
            or not name.strip().isprintable()
            or not 0 < len(name.strip()) <= LONGEST
        ):
            what = "is empty" if isinstance(name, str) and not name.strip() else f"is {name!r:.40}"
            raise BadValue(
                f"{file}: the name of class {index} {what}; expected 1 to {LONGEST} characters of text for each class"
            )
    names = [name.strip() for name in names]
    if len(names) != count:
        raise BadValue(f"{file} has {len(names)} names, but the network tells {count} classes apart")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        warnings.warn(
            f"{file} has {twice[0]!r}{more} for several classes; these names are followed by the index",
            SrdLabWarning,
            stacklevel=2,
        )
    return [f"{name} ({k})" if name in twice else name for k, name in enumerate(names)]


def _of_json(file: Path, text: str) -> list[Any]:
    found = json.loads(text)
    if isinstance(found, dict):
        if set(found) != {str(k) for k in range(len(found))}:
            raise ValueError(f"its keys are not the indices 0..{len(found) - 1}")
        return [found[str(k)] for k in range(len(found))]
    if not isinstance(found, list):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found
