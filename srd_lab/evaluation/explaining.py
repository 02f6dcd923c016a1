"""Maps of single pictures: overlays, a contact sheet and the raw numbers in a folder."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from srd_lab import maps, render
from srd_lab.catalogue import METHODS
from srd_lab.data.labels import read_labels
from srd_lab.data.pictures import SkippedFile, decode, fit, upright
from srd_lab.errors import BadValue, Refused, meant
from srd_lab.evaluation.outputs import first_free, refuse_taken, write_new
from srd_lab.evaluation.settings import ExplainSettings
from srd_lab.logits import class_logits, probabilities
from srd_lab.models import Classifier
from srd_lab.overflow import refuse_overflow
from srd_lab.parts import is_own
from srd_lab.registry import make_explainer
from srd_lab.render.files import check_formats
from srd_lab.render.sheets import ROWS
from srd_lab.runs.inputs import network_for, preprocessing_for
from srd_lab.runs.report import text_table
from srd_lab.runtime import full_precision, pick_device

TOP = 5
OUT = "explanations"
SHEET = "contact_sheet"
LONGEST_LABEL = 60
_TOLD = 6  # classes whose probabilities stand beside a picture


class Explaining:
    """One call of ``srd-lab explain``: the network, the pictures and the folder for what is made of them.

    Raises BadValue where the contact sheet is there already, or for a name that is not known; else the errors are those
    of :func:`srd_lab.models.load_model`.
    """

    def __init__(self, settings: ExplainSettings) -> None:
        self.out = settings.out or first_free(OUT, lambda folder: [folder])
        self.formats = tuple(dict.fromkeys(("png", *settings.figure_formats)))
        check_formats(self.formats)
        refuse_taken(self._sheets(1))  # before a network is loaded; the other files are known after that
        full_precision()
        self.device = pick_device(settings.device)
        name = self.title = settings.model
        data = settings.data or ("" if is_own(name) else "scenes")
        settings = replace(settings, data=data)
        self.model: Classifier = network_for(settings, name, [name], self.device)
        self.wants = preprocessing_for(settings, name)
        self.size = self.wants.size
        asked: Sequence[str] = tuple(METHODS) if "all" in settings.methods else settings.methods
        self.methods = {method: make_explainer(method) for method in asked}
        self.classes = Classes.of(data, self.model.classes, settings.labels)
        self.overlay, self.share = settings.overlay, settings.share
        self.targets = list(dict.fromkeys(map(self.classes.index, settings.targets)))

    def run(self, files: Sequence[Path]) -> None:
        """Explain every picture; write overlays, raw maps and a contact sheet, and print the likeliest classes.

        A picture that cannot be decoded is named, and the others are explained.

        Raises BadValue where a file is there already, SkippedFile if no picture can be decoded, and Refused
        where no method explains a picture.
        """
        sheets = self._sheets(len(files))
        folders = [self.out / stem for stem in _stems(files, [sheet.name for sheet in sheets])]
        refuse_taken([*sheets, *(file for folder in folders for file in self._files(folder))])
        images, bad = list[tuple[Path, Path, Tensor]](), list[SkippedFile]()
        for file, folder in zip(files, folders, strict=True):
            try:
                images.append((file, folder, self._read(file)))
            except SkippedFile as error:
                bad.append(error)
        if not images:
            raise bad[0]
        for left_out in bad:
            click.echo(f"left out: {left_out}\n", err=True)
        rows = [self._explain(*image) for image in images]
        folders = [folder for _, folder, _ in images]
        sheets = self._draw_sheets(rows)
        click.echo(f"written: {', '.join(map(str, sheets))}, and the maps in {', '.join(map(str, folders))}")

    def _draw_sheets(self, rows: Sequence[render.SheetRow]) -> list[Path]:
        """Write the contact sheet, or several where there are many pictures; their files."""
        pages = render.sheet_pages(rows)
        for k, page in enumerate(pages):
            of = f", sheet {k + 1} of {len(pages)}" if len(pages) > 1 else ""
            count = "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
            figure = render.method_sheet(page, f"{self.title}: {count}{of}")
            for kind in self.formats:
                write_new(self._sheet(k, kind), render.figure_bytes(figure, kind))
        return self._sheets(len(rows))

    def _sheet(self, number: int, kind: str) -> Path:
        return self.out / (f"{SHEET}-{number + 1}.{kind}" if number else f"{SHEET}.{kind}")

    def _sheets(self, pictures: int) -> list[Path]:
        """The files of contact sheets of so many pictures, >= 1."""
        pages = -(-pictures // ROWS)
        return [self._sheet(k, kind) for k in range(pages) for kind in self.formats]

    def _files(self, folder: Path) -> Iterator[Path]:
        """What may be written for one picture."""
        for method in self.methods:
            for target in self.targets or [0]:
                stem = self._stem(method, target)
                yield from (folder / f"{stem}.{kind}" for kind in (*self.formats, "npy"))

    def _stem(self, method: str, target: int) -> str:
        return f"{method}-{self.classes.file_label(target)}" if len(self.targets) > 1 else method

    def _read(self, file: Path) -> Tensor:
        crop, interpolation = self.wants.crop, self.wants.interpolation
        picture, orientation = decode(file, str(file), "convert", self.size, crop)
        square = fit(upright(picture, orientation), self.size, crop=crop, interpolation=interpolation)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255

    def _explain(self, file: Path, folder: Path, image: Tensor) -> render.SheetRow:
        x = image[None].to(self.device)
        with torch.no_grad():
            output = self.model(x)
        refuse_overflow(self.model, x, class_logits(output))
        likely = probabilities(output).cpu().double()[0]
        top = likely.topk(min(TOP, len(likely)))
        targets = self.targets or [int(top.indices[0])]
        explained = [f"{self.classes.name(t)}, probability {float(likely[t]):.3f}" for t in targets]
        click.echo(f"{file}: explained for {'; '.join(explained)}\n")
        lines = [
            [self.classes.name(int(i)), f"{float(p):.3f}", str(int(i))]
            for p, i in zip(top.values, top.indices, strict=True)
        ]
        click.echo(text_table(["class", "probability", "index"], lines) + "\n")
        shown: dict[str, Any] = {}
        for method, explainer in self.methods.items():
            try:
                raws = {target: explainer.explain(self.model, x, target) for target in targets}
            except Refused as error:
                if len(self.methods) == 1:
                    raise
                click.echo(f"{method} is left out: {error}", err=True)
                continue
            for target, raw in raws.items():
                prepared = maps.prepared(raw, (self.size, self.size))[0].cpu()
                about = f"{self.classes.name(target)}, probability {float(likely[target]):.3f}"
                figure = render.explanation(image, prepared, method, about, self.overlay, self.share)
                self._write(folder / self._stem(method, target), raw[0], figure)
                column = f"{method}: {self.classes.label(target)}" if len(targets) > 1 else method
                shown[column] = prepared
        if not shown:
            raise Refused(f"none of the methods explains {file}; see above, and `srd-lab methods`")
        label = file.name
        if len(targets) > 1:
            label += "".join(f"\n{self.classes.label(t)}: {float(likely[t]):.3f}" for t in targets[:_TOLD])
        else:
            label += (
                f"\n{_short(self.classes.names[targets[0]])}\nprobability {float(likely[targets[0]]):.3f}"
            )
        return render.SheetRow(label, image, shown)

    def _write(self, place: Path, raw: Tensor, figure: Any) -> None:
        """The raw map as numbers, and its figure; place : their path without a suffix."""
        numbers = io.BytesIO()
        np.save(numbers, raw.cpu().numpy())
        write_new(Path(f"{place}.npy"), numbers.getvalue())
        for kind in self.formats:
            write_new(Path(f"{place}.{kind}"), render.figure_bytes(figure, kind))


class Classes:
    """The classes of a network: by index, by name, and on ImageNet by WordNet number.

    names : by index. wnids : WordNet numbers by index; () = none.

    Example
    -------
    >>> classes = Classes.of("scenes", 10)
    >>> classes.index("heart"), classes.index("7"), classes.name(7)
    (7, 7, 'heart')
    """

    def __init__(self, names: Sequence[str], wnids: Sequence[str] = ()) -> None:
        self.names, self.wnids = names, wnids

    @classmethod
    def of(cls, data: str, count: int, labels: str | None = None) -> Classes:
        """Those of a kind of data, as far as they are known without its files; else ``count`` of them by number.

        labels : a file of names that take their place, see :func:`srd_lab.data.labels.read_labels`.
        """
        source = data.partition(":")[0]
        if labels:
            return cls(read_labels(labels, count))
        if source in ("imagenet", "imagenet-s"):
            from srd_lab.data.imagenet import class_names, wnids

            return cls(class_names(), wnids())
        if source == "scenes":
            from srd_lab.data.scenes import CLASSES

            return cls(CLASSES)
        if source == "cifar10":
            from srd_lab.data.cifar import CIFAR10_CLASSES

            return cls(CIFAR10_CLASSES)
        return cls([str(i) for i in range(count)])

    def name(self, index: int) -> str:
        """Name, and WordNet number where there is one."""
        return f"{self.names[index]} ({self.wnids[index]})" if self.wnids else self.names[index]

    def label(self, index: int) -> str:
        """A short name that no other class of the network has."""
        short = _short(self.names[index])
        return f"{short} ({index})" if self._is_ambiguous(index) else short

    def file_label(self, index: int) -> str:
        """The same for the name of a file, on every file system."""
        plain = _plain(self.names[index])
        return f"{plain or 'class'}-{index}" if self._is_ambiguous(index) else plain

    def _is_ambiguous(self, index: int) -> bool:
        plain = _plain(self.names[index])
        # what ends in a number could be another class with its index
        return not plain or self._namesakes[plain.casefold()] > 1 or re.search(r"-\d+$", plain) is not None

    @cached_property
    def _namesakes(self) -> Counter[str]:
        return Counter(_plain(name).casefold() for name in self.names)

    def index(self, wanted: str) -> int:
        """The class that is meant by an index, a WordNet number, a name or a part of a name.

        Raises BadValue where no class or several are.
        """
        text = wanted.strip().lower()
        if text.isdecimal():
            if int(text) < len(self.names):
                return int(text)
            raise BadValue(f"there is no class {text}; the network has 0..{len(self.names) - 1}")
        if text in self.wnids:
            return self.wnids.index(text)
        lowered = [name.lower() for name in self.names]
        found = [i for i, name in enumerate(lowered) if name == text] or [
            i for i, name in enumerate(lowered) if text in name
        ]
        if len(found) == 1:
            return found[0]
        some = ", ".join(f"{self.names[i]} ({i})" for i in found[:TOP])
        raise BadValue(
            f"{wanted!r} may be {some}{' ...' if len(found) > TOP else ''}; give the index in brackets"
            if found
            else f"no class is called {wanted!r}; give an index 0..{len(self.names) - 1}, a name"
            + (", or a WordNet number such as n02123045" if self.wnids else "")
            + meant(text, [name for name in lowered if not name.isdecimal()])
        )


def _short(name: str) -> str:
    """The first of the synonyms that ImageNet's names are."""
    return name.split(",")[0].strip()


def _plain(name: str) -> str:
    """Letters and digits of a class name, with hyphens between them."""
    return re.sub(r"[\W_]+", "-", _short(name))[:LONGEST_LABEL].strip("-")


def _stems(files: Sequence[Path], taken: Sequence[str]) -> list[str]:
    """A folder's name for every file, none twice and none of those that are taken."""
    stems: list[str] = []
    for file in files:
        own = (
            file.stem if file.stem.strip(". ") else "picture"
        )  # of "...jpg" it is "..", which is another folder
        stem, k = own, 2
        while stem in (*stems, *taken):
            stem, k = f"{own}-{k}", k + 1
        stems.append(stem)
    return stems
