"""MLflow's web page on a store."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from srd_lab.errors import BadValue, StoreTrouble
from srd_lab.runs.addresses import database_of, existing_store, shown
from srd_lab.runs.guard import guarded
from srd_lab.runs.sqlite_store import follow_move
from srd_lab.runs.store import quiet_mlflow


def launch_ui(tracking_uri: str | None = None, port: int = 5000, host: str = "127.0.0.1") -> None:
    """Serve MLflow's web page on the store until Ctrl-C.

    tracking_uri : see :func:`store_uri`. port, host : where it listens; by default on this machine alone.

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
    print(f"{shown(uri)} will be shown at {_page(host, port, file)} (Ctrl-C ends it)", flush=True)
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
    try:
        status = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    if status:
        raise StoreTrouble(f"`mlflow ui` stopped with exit status {status}; what it said stands above")


def _page(host: str, port: int, file: Path | None) -> str:
    """The address of the runs; MLflow's own start page shows tools for language models first."""
    try:
        number = follow_move(file) if file else ""
    except sqlite3.Error as error:
        raise StoreTrouble(f"{file} is not an MLflow store ({error}); see --tracking-uri") from None
    path = f"/#/experiments/{number}/runs?workflowType=machine_learning" if number else ""
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
