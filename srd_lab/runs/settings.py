"""What decides a run: frozen values of known types, stored with the run and read back from it.

Every study has settings of its own, a dataclass that extends :class:`Settings`. A field is stored under its own name, so
the option that sets it may be spelled anew; a field that is renamed no longer finds what older runs stored.

Example
-------
>>> restored = read_stored(Settings, {"data": "cifar10:DIR", "weights": "a.npz,b.npz", "seed": "3"})
>>> restored.source, restored.weights, restored.seed, restored.batch_size
('cifar10', ('a.npz', 'b.npz'), 3, None)
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from srd_lab.errors import BadRun, BadValue
from srd_lab.fields import check_fields
from srd_lab.parts import spoken

FREE = {"free": True}  # how the work is done, not what: never stored, free to differ on resume
_LEAST = {"seed": 0, "size": 1, "batch_size": 1, "workers": 0, "workers_per_gpu": 1, "threads": 1}
PACE = (
    "batch_size"  # free to differ as well, but a resumed run goes on as it was told: to the same last digits
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every study is told.

    data : ``scenes``, or ``SOURCE:PATH`` (see :func:`srd_lab.data.load_data`).
    weights : files as typed, ``FILE`` or ``NAME=FILE``; () = the networks' default weights.
    size, mean, std : side in pixels and statistics per channel that take the place of the network's own preprocessing;
        None and () = its own.
    labels : file of class names that take the place of the data's (:func:`srd_lab.data.labels.read_labels`); None = those.
    non_rgb : ``skip`` or ``convert`` images that are not RGB.
    seed : decides everything that is drawn, >= 0.
    batch_size : items at once, >= 1; None = by the size of the images.
    device : ``auto``, or a name that PyTorch knows.
    workers : processes that decode images; None = by data and cores, 0 = none.
    executor : who does the work, ``local`` or ``ray`` (:mod:`srd_lab.runs.executors`).
    ray_address : of the Ray cluster, HOST:PORT or ``auto``; None = that of the environment, else one is started here.
    workers_per_gpu : batches that share an accelerator on a Ray cluster, >= 1.
    threads : of PyTorch, in each process, >= 1; None = PyTorch's choice, and one on a Ray cluster. Sums are rounded by them.
    share : ``I/N`` = the I-th of N shares of the batches alone (:mod:`srd_lab.runs.shares`); None = all.
    figure_formats : what figures are stored as: ``png``, ``pdf``, ``svg``; PNG is always among them.
    resumed : whether there may be batches of an earlier session.
    """

    data: str = "scenes"
    weights: tuple[str, ...] = ()
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    labels: str | None = None
    non_rgb: str = "skip"
    seed: int = 0
    batch_size: int | None = None
    device: str = field(default="auto", metadata=FREE)
    workers: int | None = field(default=None, metadata=FREE)
    executor: Literal["local", "ray"] = field(default="local", metadata=FREE)
    ray_address: str | None = field(default=None, metadata=FREE)
    workers_per_gpu: int = field(default=1, metadata=FREE)
    threads: int | None = field(default=None, metadata=FREE)
    share: str | None = field(default=None, metadata=FREE)
    figure_formats: tuple[str, ...] = field(default=("png",), metadata=FREE)
    resumed: bool = field(default=False, metadata=FREE)

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self), "settings")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadValue(f"settings: {name} must be {least} or more, got {value}")

    @property
    def source(self) -> str:
        """The kind of data, without its path."""
        return self.data.partition(":")[0]

    @property
    def shown_source(self) -> str:
        """The same for titles; of an object in hand its class."""
        return spoken(self.data) if self.source == "live" else self.source

    def stored(self) -> dict[str, str]:
        """Name -> text of everything that decides a number."""
        return {f.name: as_text(getattr(self, f.name)) for f in dataclasses.fields(self) if not f.metadata}


S = TypeVar("S", bound=Settings)


def read_stored(kind: type[S], stored: Mapping[str, str], more: Mapping[str, Any] | None = None) -> S:
    """The settings of a stored run.

    kind : the class of the settings.
    stored : name -> text, as :meth:`Settings.stored` made it; other names are ignored, missing ones have their default.
    more : values of fields that are not stored.

    Raises BadRun where a text is not of the field's type.
    """
    types, values = get_type_hints(kind), dict(more or {})
    for f in dataclasses.fields(kind):
        if f.name in stored and not f.metadata:
            try:
                values[f.name] = _from_text(types[f.name], stored[f.name])
            except ValueError:
                raise BadRun(
                    f"the stored run has {f.name} = {stored[f.name]!r}, which this version cannot read; "
                    "go on with the version that made it, or start a new run"
                ) from None
    return kind(**values)


def as_text(value: Any) -> str:
    """A value as a run stores it; None is the empty string, a tuple a line of CSV.

    Example
    -------
    >>> as_text(("a", "b,c")), as_text(None), as_text(0.5)
    ('a,"b,c"', '', '0.5')
    """
    if not isinstance(value, tuple):
        return "" if value is None else str(value)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(value)  # quotes what holds a comma
    return line.getvalue()


def _from_text(kind: Any, text: str) -> Any:
    """The reverse of :func:`as_text` for a field of this type."""
    if get_origin(kind) is Literal:
        return text
    kinds = [k for k in get_args(kind) if k not in (NoneType, ...)]
    if get_origin(kind) is tuple:
        return tuple(_from_text(kinds[0], part) for part in next(csv.reader([text]), ()))
    if text == "" and NoneType in get_args(kind):
        return None
    if kind is bool or kinds == [bool]:
        if text not in ("True", "False"):
            raise ValueError
        return text == "True"
    if int in kinds and len(kinds) > 1:  # or a word
        return int(text) if text.isdecimal() else text
    return (kinds or [kind])[0](text)


def options_of(explainer: Any) -> dict[str, str]:
    """An explainer's hyper-parameters as a run stores them, name -> text."""
    return {name: as_text(value) for name, value in _fields_of(explainer).items()}


def explainer_params(explainer: Any) -> dict[str, str]:
    """The same as parameters of a run, ``explainer.NAME`` -> text: a study's settings have names of their own."""
    return {f"explainer.{name}": text for name, text in options_of(explainer).items()}


def _fields_of(value: Any) -> Any:
    """A dataclass as a dict, and those inside it; without fields whose metadata say ``"stored": False``."""
    if not dataclasses.is_dataclass(value):
        return value
    stored = (f.name for f in dataclasses.fields(value) if f.metadata.get("stored", True))
    return {name: _fields_of(getattr(value, name)) for name in stored}


# --- weights ------------------------------------------------------------------------------------------


def named_file(text: str) -> tuple[str, Path]:
    """The model's name ("" where none is said) and the file, of ``FILE`` or ``NAME=FILE``.

    A file whose name holds a "=" is taken as it is if it exists; so a model's name may hold some, too.
    """
    if "=" not in text or Path(text).is_file():
        return "", Path(text)
    parts = text.split("=")
    splits = [("=".join(parts[:k]), Path("=".join(parts[k:]))) for k in range(1, len(parts))]
    return next((split for split in splits if split[1].is_file()), splits[0])


def weights_of(given: Sequence[str], models: Sequence[str]) -> dict[str, Path | None]:
    """The weights file of every model, None where none was given (its default weights).

    given : files as typed, ``FILE`` or ``NAME=FILE``. models : names, at least one.

    Raises BadValue for a file without a name among several models, for a name that is not asked for, and for two files of
    one model.
    """
    files: dict[str, Path | None] = dict.fromkeys(models)
    for text in given:
        name, file = named_file(text)
        if not name and len(models) > 1:
            raise BadValue(
                f"--weights {text} does not say which of {len(models)} models it is for; give NAME={text}"
            )
        if name and name not in files:
            raise BadValue(
                f"--weights {text} is for a model that is not asked for; the models are {', '.join(models)}"
            )
        if files[name or models[0]]:
            raise BadValue(f"two --weights files for {name or models[0]}; give one")
        files[name or models[0]] = file
    return files
