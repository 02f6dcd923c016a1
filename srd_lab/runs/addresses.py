"""The addresses of stores: where runs go by default, which file or folder is behind one, and what may be printed of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from srd_lab.errors import BadRun, StoreTrouble

DEFAULT_STORE = "sqlite:///mlflow.db"


def store_uri(tracking_uri: str | None = None) -> str:
    """The store to use: the argument, else MLFLOW_TRACKING_URI, else ``mlflow.db`` right here; an SQLite path is absolute.

    Raises StoreTrouble for an SQLite path with a "%" or "?" in it.
    """
    return absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def existing_store(tracking_uri: str | None = None) -> str:
    """The same for a store that is to be read. Raises BadRun where it is a file that is not there."""
    uri = store_uri(tracking_uri)
    file = database_of(uri)
    if file and not file.is_file():
        raise BadRun(f"no runs yet: {file} does not exist; run a command first, or give --tracking-uri")
    return uri


def shown(uri: str) -> str:
    """A store's address as it may be printed and kept: without the password in it.

    Example
    -------
    >>> shown("postgresql://me:secret@db.example.org/runs?password=secret")
    'postgresql://me:***@db.example.org/runs?password=***'
    """
    for secret in secrets_in(uri):
        uri = uri.replace(secret, "***")
    return uri


def secrets_in(uri: str) -> list[str]:
    """What in a store's address must not be told: passwords, as they stand there and as they are meant."""
    own = re.search(r"//[^/?#]*?:([^/?#]*)@", uri)
    named = re.findall(r"[?&](?:password|passwd|pwd|token|secret|[\w-]*key)=([^&#]+)", uri, re.IGNORECASE)
    found = {secret for secret in (own[1] if own else "", *named) if secret}
    return sorted(found | {unquote(secret) for secret in found}, key=len, reverse=True)


def database_of(uri: str) -> Path | None:
    """The file behind an SQLite URI; None for any other store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(unquote(found[1])) if found else None


def absolute(uri: str) -> str:
    # MLflow keeps one engine per URI: a relative one would outlive a change of directory.
    file = database_of(uri)
    if file is None:
        return uri
    path = (Path.cwd() / file).as_posix()
    if "%" in path or "?" in path:  # read as an escape by some versions of MLflow and SQLAlchemy only
        raise StoreTrouble(f"MLflow cannot use {path} because of its '%' or '?'; give another --tracking-uri")
    return f"sqlite:///{path}"


def local_folder(uri: str) -> Path | None:
    """The folder that a URI or a path names; None where it names a server or a bucket.

    Example
    -------
    >>> local_folder("file:///tmp/runs").as_posix(), local_folder("https://example.org")
    ('/tmp/runs', None)
    """
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(uri).path))
    return None if scheme else Path(uri)
