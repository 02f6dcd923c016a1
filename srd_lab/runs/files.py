"""The files of a run: in a folder, or with a server."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from srd_lab.errors import BadRun, StoreTrouble
from srd_lab.runs.store import Store

ASIDE = ".damaged"


class Files(Protocol):
    """Named contents; names are relative, with forward slashes. Methods raise StoreTrouble where that fails."""

    def write(self, path: str, content: bytes) -> None:
        """Store ``content`` under ``path``, replacing what was there."""
        ...

    def read(self, path: str) -> bytes:
        """What is stored under ``path``; BadRun if nothing is."""
        ...

    def names(self, folder: str) -> list[str]:
        """Paths of the files directly in ``folder`` ("" = the top), sorted; empty if there is no such folder."""
        ...

    def everything(self) -> list[str]:
        """Paths of all files in all folders, sorted."""
        ...

    def put_aside(self, path: str) -> str:
        """Give the file ``path`` a name under which nobody looks for it; that name."""
        ...

    def tidy(self) -> None:
        """Remove what killed writers left."""
        ...


@dataclass(frozen=True)
class FolderFiles:
    """Files below ``folder``. A write is seen whole or not at all, even if the process is killed."""

    folder: Path

    def write(self, path: str, content: bytes) -> None:
        """See :meth:`Files.write`."""
        place = self.folder / path
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(place)
        except OSError as error:
            raise StoreTrouble(f"cannot write {place}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    def read(self, path: str) -> bytes:
        """See :meth:`Files.read`."""
        try:
            return (self.folder / path).read_bytes()
        except FileNotFoundError:
            raise BadRun(f"the run has no file {path} ({self.folder / path} is not there)") from None
        except OSError as error:
            raise StoreTrouble(f"cannot read {self.folder / path}: {error.strerror}") from None

    def names(self, folder: str) -> list[str]:
        """See :meth:`Files.names`; hidden files are left out."""
        found = (self.folder / folder).glob("[!.]*")
        return sorted(item.relative_to(self.folder).as_posix() for item in found if item.is_file())

    def everything(self) -> list[str]:
        """See :meth:`Files.everything`; hidden files are left out."""
        found = (item for item in self.folder.rglob("[!.]*") if item.is_file())
        return sorted(item.relative_to(self.folder).as_posix() for item in found)

    def put_aside(self, path: str) -> str:
        """See :meth:`Files.put_aside`."""
        place = self.folder / path
        try:
            return place.rename(place.with_name(f"{place.name}{ASIDE}")).name
        except OSError as error:
            raise StoreTrouble(f"cannot rename {place}: {error.strerror}") from None

    def tidy(self) -> None:
        """See :meth:`Files.tidy`; the files of writers that still run stay."""
        for part in self.folder.rglob(".*.part"):
            writer = part.name.split(".")[-2]
            if not (writer.isdecimal() and _runs(int(writer))):
                part.unlink(missing_ok=True)


@dataclass(frozen=True)
class ServerFiles:
    """The artifacts of a run whose store is a server or a cloud bucket.

    store : opened. run_id : the run.
    """

    store: Store
    run_id: str

    def write(self, path: str, content: bytes) -> None:
        """See :meth:`Files.write`."""
        target = PurePosixPath(path)
        with tempfile.TemporaryDirectory() as folder, self.store.errors():
            local = Path(folder, target.name)
            local.write_bytes(content)
            parent = None if target.parent == PurePosixPath() else str(target.parent)
            self.store.client.log_artifact(self.run_id, str(local), parent)

    def read(self, path: str) -> bytes:
        """See :meth:`Files.read`."""
        if path not in self.names("" if "/" not in path else path.rpartition("/")[0]):
            raise BadRun(f"run {self.run_id} has no file {path}")
        with tempfile.TemporaryDirectory() as folder, self.store.errors():
            return Path(self.store.client.download_artifacts(self.run_id, path, folder)).read_bytes()

    def names(self, folder: str) -> list[str]:
        """See :meth:`Files.names`."""
        with self.store.errors():
            found = self.store.client.list_artifacts(self.run_id, folder or None)
        return sorted(item.path for item in found if not item.is_dir)

    def everything(self) -> list[str]:
        """See :meth:`Files.everything`."""
        found, folders = list[str](), [""]
        while folders:
            with self.store.errors():
                for item in self.store.client.list_artifacts(self.run_id, folders.pop() or None):
                    (folders if item.is_dir else found).append(item.path)
        return sorted(found)

    def put_aside(self, path: str) -> str:
        """See :meth:`Files.put_aside`: a copy, as servers rename nothing; the file itself is written anew."""
        aside = f"{path}{ASIDE}"
        self.write(aside, self.read(path))
        return PurePosixPath(aside).name

    def tidy(self) -> None:
        """See :meth:`Files.tidy`: a server sees a write whole or not at all."""


def _runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
