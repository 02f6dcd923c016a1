"""Where entries are: files, folders of them, or the runs that have stored them.

Example
-------
::

    with entry_files(["25b2778d", "others/gradcam.json"]) as files:
        leaderboard(files)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attacks.entry import ENTRY, IMAGES
from srd_lab.errors import BadEntry
from srd_lab.runs.files import FolderFiles
from srd_lab.runs.reading import StoredRun, find_run


@contextmanager
def entry_files(references: Sequence[str], tracking_uri: str | None = None) -> Iterator[list[Path]]:
    """Within: the files of the entries that are meant, each once, with their images beside them.

    references : files; folders, of which all ``entry.json`` count; runs by id or its beginning, of which all parts do.
    tracking_uri : of the store that the runs are in, see :func:`srd_lab.runs.addresses.store_uri`.

    Raises BadEntry where one is none of these or holds no entry, and the errors of :func:`srd_lab.runs.reading.find_run`.
    """
    with ExitStack() as stack:
        found = [file for name in references for file in _of(name, tracking_uri, stack)]
        yield list(dict.fromkeys(found))


def _of(reference: str, tracking_uri: str | None, stack: ExitStack) -> list[Path]:
    place = Path(reference)
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(place.rglob(ENTRY))
    elif re.fullmatch(r"[0-9a-f]{4,32}", reference):
        run = find_run(reference, tracking_uri)
        files = [file for one in (run, *run.parts) for file in _of_run(one, stack)]
    else:
        raise BadEntry(
            f"there is no {reference}; give an {ENTRY}, a folder that holds some, or a run (`srd-lab runs` lists them)"
        )
    if not files:
        raise BadEntry(f"{reference} holds no {ENTRY}; `srd-lab robustness` writes one for each method")
    return files


def _of_run(run: StoredRun, stack: ExitStack) -> list[Path]:
    if ENTRY not in run.top_files:
        return []
    if isinstance(run.files, FolderFiles):
        return [run.files.folder / ENTRY]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # of a run that a server keeps
    for name in (ENTRY, IMAGES):
        (folder / name).write_bytes(run.files.read(name))
    return [folder / ENTRY]
