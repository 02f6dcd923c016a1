"""One run of a command: its settings, numbers and files, wherever they are kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from srd_lab.errors import BadRun, BadValue, OtherWork, SrdLabError, first_line
from srd_lab.render.files import check_formats, figure_bytes
from srd_lab.runs.files import Files
from srd_lab.runs.label import Drawn, Label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_PARAM = 6000
NOT_FINITE = "not_finite"
_AS_BEFORE = "as before"

Params = Mapping[str, object]
Traces = Mapping[str, tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]]
Names = list[str]  # a method of Run is called ``list``


class Run(ABC):
    """One run of a command, or (``child``) one method's share of it; a context manager.

    It ends FINISHED, KILLED on a KeyboardInterrupt, as it was before on OtherWork, FAILED on any other exception (which goes
    on), and takes children that are still open along.

    id : what ``--resume`` takes: the store's id, without tracking the folder; "" where nothing is kept.
    where : one line: how to see the run.
    params : what is stored; on resume the settings to go on with.

    Methods raise StoreTrouble where the store or the folder cannot be used, and BadValue for a ``path`` that is no relative
    one inside the run.
    """

    id: str
    where: str
    params: dict[str, str]

    def __init__(self, files: Files) -> None:
        self._files = files
        self._children: list[Run] = []
        self._open = True
        self._before = "RUNNING"  # its status when it was opened
        self.params = {}
        self._label: Label | None = None
        self._figure_formats: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("FINISHED")
            return
        with contextlib.suppress(SrdLabError):  # a store that just broke must not hide the first error
            if isinstance(error, OtherWork):
                self._close(_AS_BEFORE)
            else:
                self._close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def interrupt(self) -> None:
        """End it as one that is to be gone on with."""
        self._close("KILLED")

    def _close(self, status: str) -> None:
        for child in self._children:
            child._close(status)
        if self._open:
            self._open = False
            self._end(status)

    def add_params(self, params: Params) -> None:
        """Store what is not stored yet, as text. Raises BadRun where a value differs from the stored one."""
        texts = {key: _param_text(value) for key, value in params.items()}
        for key, text in texts.items():
            if self.params.get(key, text) != text:
                raise BadRun(
                    f"run {self.id} was made with {key} = {self.params[key]}, not {text}; "
                    "leave the setting out, or start a new run"
                )
        new = {key: text for key, text in texts.items() if key not in self.params}
        self.params |= new
        self._add_params(new)

    def describe(self, label: Label) -> None:
        """Store what the list of runs shows; the parts that are made from now on carry its settings and tags, too."""
        self._label = label
        self._tag(label.tags)
        if label.drawn:
            self._log_drawn(label.drawn)

    def child(self, name: str, params: Params | None = None) -> Run:
        """The part called ``name``: found if this run has one (so on resume), else made.

        Raises BadRun if it was made with other values for ``params``.
        """
        own = dict(params or {})
        if self._label is None:
            part = self._child(name, own)
        else:
            part = self._child(name, self._label.settings | own)
            tags = {tag: str(own[tag]) for tag in ("method", "model") if tag in own}
            part.describe(replace(self._label, tags=self._label.tags | tags))
        part._figure_formats = self._figure_formats
        self._children.append(part)
        return part

    @abstractmethod
    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Store final numbers, name -> value; one that is not finite is left out and named in the tag ``not_finite``.

        Names are stored as :func:`metric_name` writes them.
        """

    @abstractmethod
    def log_traces(self, traces: Traces) -> None:
        """Store curves, name -> (steps (S,), values (S,)); storing the same again changes nothing.

        Points that are not finite are left out and the curve is named in the tag ``not_finite``.
        """

    def tag(self, tags: Mapping[str, str]) -> None:
        """Store tags, name -> text; those of other names stay as they are."""
        self._tag(tags)

    @abstractmethod
    def note(self, markdown: str) -> None:
        """Store the description that stands above the run, in Markdown."""

    @abstractmethod
    def _tag(self, tags: Mapping[str, str]) -> None: ...

    @abstractmethod
    def _log_drawn(self, drawn: Drawn) -> None: ...

    @abstractmethod
    def _add_params(self, new: dict[str, str]) -> None: ...

    @abstractmethod
    def _child(self, name: str, params: Params) -> Run: ...

    @abstractmethod
    def _end(self, status: str) -> None: ...

    def _status(self, status: str) -> str:
        """The status to end with: one that is as it was before may not be that of a run at work."""
        if status != _AS_BEFORE:
            return status
        return self._before if self._before != "RUNNING" else "FAILED"

    def save_text(self, path: str, text: str) -> None:
        """Store a text as file ``path`` (relative, forward slashes), replacing what was there."""
        self._files.write(_checked(path), text.encode())

    def save_bytes(self, path: str, content: bytes) -> None:
        """Store ``content`` as file ``path`` (relative, forward slashes), replacing what was there."""
        self._files.write(_checked(path), content)

    def save_arrays(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays, name -> array, as the compressed npz file ``path``, replacing what was there.

        Raises BadValue for arrays of Python objects.
        """
        if objects := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise BadValue(f"{path}: {objects[0]!r} holds Python objects; give numbers or strings")
        buffer = io.BytesIO()
        named: dict[str, Any] = dict(arrays)
        np.savez_compressed(buffer, **named)
        self._files.write(_checked(path), buffer.getvalue())

    def store_figures_as(self, formats: Sequence[str]) -> None:
        """Store figures in these formats, too: ``png``, ``pdf``, ``svg``; parts that are made from now on do so as well.

        Raises BadValue for another.
        """
        check_formats(formats)
        self._figure_formats = tuple(formats)

    def save_figure(self, path: str, figure: Figure) -> None:
        """Draw a matplotlib figure as file ``path`` (.png, .pdf or .svg), and beside it as :meth:`store_figures_as` says."""
        place = PurePosixPath(_checked(path))
        for kind in dict.fromkeys((place.suffix.lstrip("."), *self._figure_formats)):
            self._files.write(str(place.with_suffix(f".{kind}")), figure_bytes(figure, kind))

    def load_text(self, path: str) -> str:
        """What :meth:`save_text` stored. Raises BadRun if there is no such file."""
        return self._files.read(_checked(path)).decode()

    def load_arrays(self, path: str) -> dict[str, np.ndarray]:
        """What :meth:`save_arrays` stored. Raises BadRun if there is no such file, or it is damaged."""
        content = self._files.read(_checked(path))
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return dict(arrays)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file fails in any way
            raise BadRun(
                f"file {path} of run {self.id} is damaged ({first_line(error)}); remove it"
            ) from None

    def put_aside(self, path: str) -> str:
        """Rename file ``path``, which is damaged or none of ours, so that it is neither read nor lost; its new name."""
        return self._files.put_aside(_checked(path))

    def tidy(self) -> None:
        """Remove what writers that were killed left behind."""
        self._files.tidy()

    def list(self, folder: str = "") -> Names:
        """Paths of the files directly in ``folder``, sorted; empty if there is no such folder."""
        return self._files.names(_checked(folder) if folder else "")


def metric_name(name: str) -> str:
    """A name that MLflow takes.

    Example
    -------
    >>> metric_name("smoothed(srd,0.1,64)/pcc")
    'smoothed-srd-0.1-64/pcc'
    """
    return re.sub(r"[^\w. :/-]+", "-", name.replace(")", ""), flags=re.ASCII)


def _param_text(value: object) -> str:
    """``str(value)``; beyond MLflow's limit a digest replaces the end, so that equal still means equal."""
    text = str(value)
    if len(text) <= _LONGEST_PARAM:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()})"
    return text[: _LONGEST_PARAM - len(end)] + end


def _checked(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BadValue(f"{path!r} is not a path inside a run; give one like 'parts/000.npz'")
    return str(parts)
