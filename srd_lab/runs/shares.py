"""Shares of a run's batches, done apart and joined: many machines without anything between them.

Share ``I/N`` of a run does the batches number I, I + N, ... of every stage of its study and stores them in a folder. What
:func:`join` makes of all N is a run that has every batch and no report yet: the command itself goes on with it, so that rows
are in the order of one run and everything is aggregated once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from srd_lab.errors import BadRun, SrdLabWarning
from srd_lab.runs.batches import BATCH_NAME, SHARE, Stage, batches_of_share, in_batches, share_of
from srd_lab.runs.environment import SURROUNDINGS
from srd_lab.runs.folder_run import ABOUT, about_folder
from srd_lab.runs.run import Run
from srd_lab.runs.settings import Settings

_DECISIVE = ("weights_sha256", "preprocessing", "own_code")  # of the surroundings
_COPIED = ("command.txt", "run.toml")
_PROBE = "probe.json"
_NOTES = "notes.txt"
_ROUNDING = 1e-3  # by which what was found on the first images may differ between machines


class InStages(Protocol):
    """A study whose work is stages, so that it can be done in shares."""

    @property
    def settings(self) -> Settings: ...

    def stages(self, run: Run) -> Iterator[Stage]:
        """The stretches of its work."""
        ...


def do_share(study: InStages, run: Run) -> int:
    """Do and store the batches of the share that the study's settings name; how many they are.

    Errors are those of :func:`srd_lab.runs.batches.in_batches`.
    """
    return sum(1 for stage in study.stages(run) for _ in in_batches(stage, study.settings))


@dataclass(frozen=True)
class Share:
    """A share in a folder.

    folder : as typed. about : what its ``run.json`` says.
    stages : names of the run's parts that lead to a stage, () for the run itself -> what its ``share.json`` says.
    """

    folder: Path
    about: dict[str, Any]
    stages: dict[tuple[str, ...], dict[str, Any]]

    @property
    def params(self) -> dict[str, str]:
        """Of the run."""
        return dict(self.about["params"])

    @property
    def number(self) -> int:
        """Which share, from 1."""
        return share_of(self.params["share"])[0]

    @property
    def count(self) -> int:
        """How many there are."""
        return share_of(self.params["share"])[1]

    def place(self, stage: tuple[str, ...]) -> Path:
        """The folder of a stage."""
        found = [file.parent for file in self.folder.rglob(SHARE) if _names(self.folder, file) == stage]
        return found[0]


def read_shares(folders: Sequence[Path]) -> list[Share]:
    """The shares in these folders, in their order, after it is certain that they make a run.

    Raises BadRun for a folder without a share, for shares of different runs or numbers of shares, and for one that is
    missing, doubled or not finished, or has other batches than its own.
    """
    shares = sorted((_read(folder) for folder in folders), key=lambda share: share.number)
    _check_numbers(shares)
    for share in shares:
        if (status := share.about.get("status")) != "FINISHED":
            raise BadRun(
                f"share {share.params['share']} in {share.folder} is not finished ({status}); go on with it: "
                f"srd-lab {share.about['command']} --no-track --resume {share.folder}"
            )
        _check_alike(shares[0], share)
        for stage in share.stages:
            _check_batches(share, stage)
    _warn_of_surroundings(shares)
    return shares


def join(shares: Sequence[Share], run: Run) -> None:
    """Copy all batches of all shares into a new run, which is then to be gone on with.

    shares : from :func:`read_shares`. run : opened with the shares' own settings, without what makes them shares.

    Raises BadRun where what was found on the first images is not the same, and StoreTrouble where copying fails.
    """
    first = shares[0]
    for name in (name for name in _COPIED if (first.folder / name).is_file()):
        run.save_bytes(name, (first.folder / name).read_bytes())
    files = [share.folder / _NOTES for share in shares if (share.folder / _NOTES).is_file()]
    if lines := [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]:
        run.save_text(_NOTES, "\n".join(dict.fromkeys(lines)) + "\n")
    for stage in first.stages:
        part = run
        for name in stage:
            part = part.child(name)
        probes = [file for share in shares if (file := share.place(stage) / _PROBE).is_file()]
        if probes:
            _check_probes(probes)
            part.save_bytes(_PROBE, probes[0].read_bytes())
        for share in shares:
            for kind in ("batches", "patterns"):
                for file in sorted((share.place(stage) / kind).glob("[!.]*.npz")):
                    part.save_bytes(f"{kind}/{file.name}", file.read_bytes())


def _read(folder: Path) -> Share:
    if not (folder / ABOUT).is_file():
        raise BadRun(f"there is no share in {folder}; expected the --out of a command with --shard I/N")
    about = about_folder(folder)
    if "share" not in about.get("params", {}) or "command" not in about:
        raise BadRun(f"{folder} is no share; expected the --out of a command with --shard I/N")
    try:
        stages = {
            _names(folder, file): json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(folder.rglob(SHARE))
        }
    except (OSError, ValueError) as error:
        raise BadRun(f"{SHARE} of {folder} is damaged ({error}); begin this share anew") from None
    return Share(folder, about, stages)


def _names(folder: Path, file: Path) -> tuple[str, ...]:
    """The parts of a run that lead to a file."""
    return tuple(unquote(part) for part in file.parent.relative_to(folder).parts)


def _check_numbers(shares: Sequence[Share]) -> None:
    """Refuse shares that are not one to N, each once."""
    first = shares[0]
    for share in shares:
        if share.count != first.count:
            raise BadRun(
                f"{share.folder} is share {share.params['share']} and {first.folder} is {first.params['share']}; "
                "expected the same number of shares"
            )
    for share, other in pairwise(shares):
        if share.number == other.number:
            raise BadRun(
                f"share {share.params['share']} is there twice, in {share.folder} and {other.folder}; leave one of them out"
            )
    if missing := sorted(set(range(1, first.count + 1)) - {share.number for share in shares}):
        said = ", ".join(f"{number}/{first.count}" for number in missing)
        raise BadRun(f"share{'s' if len(missing) > 1 else ''} {said} missing; do each, or name its folder")


def _check_alike(first: Share, share: Share) -> None:
    """Refuse a share of another run."""
    free = {"share", *SURROUNDINGS} - set(_DECISIVE)
    one, other = ({k: v for k, v in s.params.items() if k not in free} for s in (first, share))
    one, other = ({**p, "command": s.about["command"]} for p, s in ((one, first), (other, share)))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise BadRun(
                f"{share.folder} was made with {name} = {other.get(name, '')}, and {first.folder} with "
                f"{one.get(name, '')}; expected shares of one run"
            )
    if first.about.get("data") != share.about.get("data"):
        raise BadRun(
            f"{share.folder} and {first.folder} are not of the same images; expected shares of one run"
        )
    cut, cut_here = ({k: v | {"share": ""} for k, v in s.stages.items()} for s in (first, share))
    if cut != cut_here:
        raise BadRun(
            f"{share.folder} was not cut into the same batches as {first.folder}; expected one batch size in all shares"
        )


def _check_batches(share: Share, stage: tuple[str, ...]) -> None:
    """Refuse a share that lacks a batch, or has one of another's."""
    about, said = share.stages[stage], share.params["share"]
    plan = batches_of_share(said, about["items"], about["batch_size"])
    expected = {f"{first:05d}-{last - 1:05d}.npz" for first, last in plan}
    found = {f.name for f in (share.place(stage) / "batches").glob("*") if BATCH_NAME.fullmatch(f.name)}
    place = share.place(stage) / "batches"
    if more := sorted(found - expected):
        raise BadRun(f"{place / more[0]} is no batch of share {said}; take it away, or begin the share anew")
    if lost := sorted(expected - found):
        raise BadRun(
            f"share {said} lacks {place / lost[0]}; go on with it: "
            f"srd-lab {share.about['command']} --no-track --resume {share.folder}"
        )


def _warn_of_surroundings(shares: Sequence[Share]) -> None:
    free = [name for name in SURROUNDINGS if name not in _DECISIVE]
    differ = [name for name in free if len({share.params.get(name) for share in shares}) > 1]
    if differ:
        warnings.warn(
            f"the shares were not all done with the same {', '.join(differ)}: last digits may differ from those of one run",
            SrdLabWarning,
            stacklevel=3,
        )


def _check_probes(files: Sequence[Path]) -> None:
    """Refuse shares that found different things on the first images, which decide how the others are attacked."""
    first = json.loads(files[0].read_text(encoding="utf-8"))
    for file in files[1:]:
        if not _close(first, json.loads(file.read_text(encoding="utf-8"))):
            raise BadRun(
                f"{file} does not say what {files[0]} says: the shares were not attacked alike; "
                "do them on one kind of device"
            )


def _close(one: Any, other: Any) -> bool:
    """Whether two values as JSON has them are the same but for rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return (
            one == other
            or abs(one - other) <= _ROUNDING * max(1.0, abs(one), abs(other))
            or one != one != other
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    return bool(one == other)
