"""What else belongs in the record of a run: versions, commit, machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "numpy", "scikit-image", "scipy", "mlflow", "srd-lab")
# parameters of a run that are no settings: what it ran on, and with which weights
SURROUNDINGS = (
    *("python", "platform", *_PACKAGES, "git_commit", "torch_threads", "device", "hardware"),
    *("weights_sha256", "preprocessing", "own_code"),
)


def environment() -> dict[str, str]:
    """Versions, git commit, platform and thread count, as run parameters: name -> text. What is not known is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if commit := git_commit():
        found["git_commit"] = commit
    if torch := sys.modules.get("torch"):
        found["torch_threads"] = str(torch.get_num_threads())
    return found


def device_name(device: object) -> str:
    """The name of a torch device's hardware, such as "NVIDIA H200" for ``cuda:0``; the processor's for all but CUDA."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(str(device))
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


@functools.cache
def git_commit() -> str:
    """Commit of the checkout that this package is in, "-dirty" if edited; "" if it is in none."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():  # an installed copy may lie inside somebody else's checkout
        return ""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
