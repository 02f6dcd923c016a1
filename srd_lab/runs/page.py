"""MLflow's web page on a store."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import webbrowser
from contextlib import suppress
from pathlib import Path

from srd_lab.errors import BadValue, StoreTrouble
from srd_lab.runs.addresses import database_of, existing_store, shown
from srd_lab.runs.guard import guarded
from srd_lab.runs.list_view import VIEW, offer_views
from srd_lab.runs.sqlite_store import follow_move
from srd_lab.runs.store import quiet_mlflow

_PATIENCE = 60.0  # seconds until MLflow answers


def launch_ui(
    tracking_uri: str | None = None, port: int = 5000, host: str = "127.0.0.1", *, browse: bool = False
) -> None:
    """Serve MLflow's web page on the store until Ctrl-C.

    tracking_uri : see :func:`store_uri`. port, host : where it listens; by default on this machine alone.
    browse : whether a browser is opened on it, once it answers, where there is a screen to show it on.

    Raises BadValue for an empty host, BadRun if there is no store yet, and StoreTrouble if it is a server already or no
    MLflow store, if the port is taken, or if the page stops by itself.
    """
    if not host.strip():
        raise BadValue(
            "--host is empty, which would mean all networks; give 127.0.0.1, or 0.0.0.0 for all of them"
        )
    uri = existing_store(tracking_uri)
    if uri.startswith("http"):
        raise StoreTrouble(f"{shown(uri)} is a server already: open it in a browser")
    file = database_of(uri)
    _require_free(host, port)
    quiet_mlflow()
    page = _page(host, port, file)
    print(f"{shown(uri)} will be shown at {page} (Ctrl-C ends it)", flush=True)
    if not _is_loopback(host):
        print(
            f"Note: everybody who reaches {host} port {port} over the network can read and change these runs.",
            file=sys.stderr,
            flush=True,
        )
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    options = ["--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=warning"]
    calm = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the page would outlive its command
    server = subprocess.Popen(guarded(command + options), env=os.environ | calm)
    if browse and has_screen():
        threading.Thread(target=_open, args=(host, port, page), daemon=True).start()
    try:
        status = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    if status:
        raise StoreTrouble(f"`mlflow ui` stopped with exit status {status}; what it said stands above")


def has_screen() -> bool:
    """Whether a browser could be shown: not over a remote shell, in a job without a terminal, or without a display."""
    remote = any(os.environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY", "CI"))
    display = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return display and not remote and sys.stdout.isatty()


def _open(host: str, port: int, page: str) -> None:
    """Open the page in a browser once the server answers; where that fails the printed address is left."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    began = time.monotonic()
    while time.monotonic() - began < _PATIENCE:
        with suppress(OSError), socket.create_connection((reached, port), timeout=1):
            break
        time.sleep(0.2)
    with suppress(Exception):
        webbrowser.open(page.replace(f"//{host}:", f"//{reached}:"))


def _page(host: str, port: int, file: Path | None) -> str:
    """The address of the runs, with the columns that tell them apart; MLflow's own start page shows tools for language
    models first."""
    try:
        number = follow_move(file) if file else ""
        view = f"&viewStateShareKey={VIEW}" if file and number in offer_views(file) else ""
    except sqlite3.Error as error:
        raise StoreTrouble(f"{file} is not an MLflow store ({error}); see --tracking-uri") from None
    path = f"/#/experiments/{number}/runs?workflowType=machine_learning{view}" if number else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _require_free(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreTrouble(f"cannot listen on {host}:{port} ({reason}); give another --port") from None
