"""A wheel holds all that the package needs: it runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "LICENSE", "docs/package_index.md", "srd_lab", "attacks", "apop")


@pytest.mark.slow
def test_a_wheel_runs_without_the_checkout(tmp_path: Path) -> None:
    checkout, place, elsewhere = (tmp_path / name for name in ("checkout", "place", "elsewhere"))
    (checkout / "docs").mkdir(parents=True)
    elsewhere.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, checkout / part)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    shutil.rmtree(checkout)

    def run(*arguments: str) -> str:
        environ = os.environ | {"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        "-c", "import srd_lab, attacks, apop; print(srd_lab.__file__, attacks.__file__, apop.__file__)"
    )
    assert all(file.startswith(str(place)) for file in where.split())
    assert "vgg16" in run("-m", "srd_lab", "models")
    options = ("--images", "2", "--inputs", "zeros", "--no-binarize", "--device", "cpu", "--no-track")
    assert "vgg16" in run("-m", "srd_lab", "apop", *options)
    assert run("-c", "from attacks.thresholds import TAU; print(TAU['pcc'])").strip() == "0.67"
    assert (place / "srd_lab" / "py.typed").is_file()
    assert (place / "srd_lab" / "reproduce" / "paper.json").is_file()
