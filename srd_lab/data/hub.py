"""Data sets of the ``datasets`` library: ``hf-dataset:NAME_OR_DIR``, needs ``srd-lab[datasets]``.

NAME_OR_DIR is a name on the Hugging Face hub, a folder that ``save_to_disk`` has written, a folder of images or Parquet
files as ``datasets.load_dataset`` reads it, or a Parquet file. Options stand behind a ``?``:

===================  ====================================================================================
``split=NAME``       where there are several; else ``test``
``name=NAME``        of the hub's configuration
``image=COLUMN``     where several columns hold images
``label=COLUMN``     where several hold classes; without any the predicted class is explained
===================  ====================================================================================

No code of a data set is run: the library has done without since version 4.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from srd_lab.data.pictures import Picture, PictureFolder, SkippedFile
from srd_lab.errors import BadData, BadValue, Unavailable, first_line
from srd_lab.parts import split_options

OPTIONS = ("split", "name", "image", "label")


class HubData(PictureFolder):
    """The images of ``hf-dataset:NAME_OR_DIR``; ``name`` is ``NAME_OR_DIR/SPLIT/ROW``.

    spec : NAME_OR_DIR, with options. split : to take where there are several and the options name none.
    Other arguments and errors are those of :class:`srd_lab.data.pictures.PictureFolder`; Unavailable where the library is
    not installed or the hub cannot be reached.
    """

    def __init__(self, spec: str, size: int = 224, *, split: str = "test", **options: Any) -> None:
        self.called, self._given = split_options(spec)
        if unknown := [name for name in self._given if name not in OPTIONS]:
            raise BadValue(f"hf-dataset:{spec} has no option {unknown[0]!r}; expected {', '.join(OPTIONS)}")
        self._split = str(self._given.get("split", split))
        self._rows: Any = None
        super().__init__(self.called, size, **options)

    def _find(self) -> list[Picture]:
        self.classes = []
        rows, split = self._one_split(_loaded(self.called, self._given.get("name")))
        image, label = self._image(rows), self._label(rows)
        labels = [-1] * len(rows) if label is None else self._indices(rows, label)
        self._rows = _undecoded(rows, image)
        place = f"{Path(self.called).name}/{split}" if split else Path(self.called).name
        if not labels:
            raise BadData(f"hf-dataset:{self.called} is empty")
        return [_Row(Path(image), index, f"{place}/{k}", k) for k, index in enumerate(labels)]

    def _one_split(self, found: Any) -> tuple[Any, str]:
        """The rows that are wanted, and the name of their split, "" where there is but one of no name."""
        if not isinstance(found, dict):
            if "split" in self._given and str(found.split or self._split) != self._split:
                raise BadValue(f"hf-dataset:{self.called} is the split {found.split}; leave split out")
            return found, str(found.split or "")
        if self._split in found:
            return found[self._split], self._split
        if len(found) == 1 and "split" not in self._given:
            return next(iter(found.values())), next(iter(found))
        raise BadData(
            f"hf-dataset:{self.called} has no split {self._split!r}; say which: ?split=NAME, one of {', '.join(found)}"
        )

    def _image(self, rows: Any) -> str:
        kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
        return self._column(kinds, "image", [name for name, kind in kinds.items() if kind == "Image"])

    def _label(self, rows: Any) -> str | None:
        kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
        known = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        known = known or [name for name in kinds if name in ("label", "labels")]
        if not known and "label" not in self._given:
            return None
        return self._column(kinds, "label", ["label"] if "label" in known else known)

    def _column(self, kinds: dict[str, str], what: str, known: Sequence[str]) -> str:
        """The column that an option names, or the only one of its kind."""
        wanted = self._given.get(what)
        has = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        if wanted is not None and wanted not in kinds:
            raise BadData(f"hf-dataset:{self.called} has no column {wanted!r}; it has {has}")
        if wanted is None and len(known) != 1:
            few = "no column of images" if not known else f"several columns for {what}"
            raise BadData(f"hf-dataset:{self.called} has {few}; say which: ?{what}=COLUMN, of {has}")
        column = str(wanted if wanted is not None else known[0])
        if what == "image" and kinds[column] != "Image":
            raise BadData(
                f"hf-dataset:{self.called}: the column {column} is of {kinds[column]}, not of images; "
                f"cast it: dataset.cast_column({column!r}, datasets.Image())"
            )
        return column

    def _indices(self, rows: Any, column: str) -> list[int]:
        """Class indices of all rows; on the way ``self.classes``."""
        values = rows.with_format(None)[column][:]
        self.classes = list(getattr(rows.features[column], "names", None) or [])
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            self.classes = sorted(set(texts))
            numbers = {name: k for k, name in enumerate(self.classes)}
            return [numbers.get(value, -1) for value in values]
        if odd := [v for v in values if v is not None and not (type(v) is int and -1 <= v < 10**7)]:
            raise BadData(
                f"hf-dataset:{self.called}: the {column} {odd[0]!r:.40} is no class index, nor a name"
            )
        return [-1 if value is None else value for value in values]

    def _open(self, picture: Picture) -> Path | IO[bytes]:
        assert isinstance(picture, _Row)
        try:
            found = self._rows[picture.row][picture.file.name]
        except Exception as error:  # whatever Arrow stumbles over
            raise SkippedFile(picture.name, f"its row cannot be read: {first_line(error)}") from None
        if found and found.get("bytes"):
            return io.BytesIO(found["bytes"])
        if found and found.get("path"):
            return Path(found["path"])
        raise SkippedFile(picture.name, "it has no image")


@dataclass(frozen=True, slots=True)
class _Row(Picture):
    """A row of a table; ``file`` is its column of images."""

    row: int


def _undecoded(rows: Any, image: str) -> Any:
    """The images alone, as they are stored: what cannot be decoded is found when it is, and named."""
    import datasets

    return rows.with_format(None).select_columns([image]).cast_column(image, datasets.Image(decode=False))


def _loaded(place: str, name: Any) -> Any:
    """A Dataset, or a dict of them by split."""
    try:
        import datasets
    except ImportError:
        raise Unavailable(f"hf-dataset:{place} needs datasets; `pip install 'srd-lab[datasets]'`") from None
    folder = Path(place).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    datasets.disable_progress_bars()
    try:
        if saved:
            return datasets.load_from_disk(str(folder))
        if folder.is_file():
            return datasets.load_dataset("parquet", data_files=str(folder))
        return datasets.load_dataset(str(folder) if folder.exists() else place, name)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, TimeoutError) as error:
        raise Unavailable(
            f"hf-dataset:{place} cannot be had: {first_line(error)}; give a folder, or a name of the Hugging Face hub"
        ) from None
    except Exception as error:  # its readers let through whatever they stumble over
        raise BadData(
            f"hf-dataset:{place} cannot be read: {first_line(error)} ({type(error).__name__}); expected what save_to_disk "
            "writes, a folder of images or Parquet files, or a name of the Hugging Face hub"
        ) from None
