"""Nothing mixes an accelerator and the CPU, and loops wait for the device once a round: on a device that the CPU plays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = ("maps", "attacks", "apop", "metrics")
REFUSED = -1
# what a single map waits for: the look at its pixels, that at its sum, noise that is drawn on the CPU
MAPS = {
    **dict.fromkeys(("gradient", "guided_backprop", "integrated_gradients", "gradcam", "lrp_epsilon"), 1),
    **dict.fromkeys(("smoothgrad", "lrp_zplus", "srd", "srd_high"), 2),
}
PER_IMAGE = {"scorecam": 2}  # which channels it has to try
METRICS = {  # for three images: what is drawn for each image or draw on the CPU, and one look
    **dict.fromkeys(("pointing_game", "attribution_localization", "sparseness", "roughness"), 0),
    **dict.fromkeys(("fidelity", "insertion", "deletion"), 3),
    **dict.fromkeys(("morf", "lerf"), 4),
    **dict.fromkeys(("infidelity", "stability", "ssim", "pcc", "max_sensitivity"), 6),
    "randomization": 1,
}
GUARD = {
    **dict.fromkeys(("item", "bool", "float", "tolist", "cpu", "to cpu", "to device", "tensor on device"), 1),
    **dict.fromkeys(("new_tensor", "equal", "allclose", "nonzero", "unique", "mask", "assign by mask"), 1),
    **dict.fromkeys(("assign a tensor's number by mask", "masked_fill by a tensor", "index on the cpu"), 1),
    "within backward": 1,
    **dict.fromkeys(("assign a number by mask", "masked_fill by a number", "index", "number of the cpu"), 0),
    **dict.fromkeys(("new on device", "arithmetic", "generator"), 0),
    **dict.fromkeys(("arange on the cpu", "zeros on the cpu", "number of the cpu among tensors"), REFUSED),
    "generator of the cpu": REFUSED,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What ``device_waits.py`` counts, in a process of its own: a backend is there for good."""
    command = [sys.executable, ROOT / "tests" / "device_waits.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def waits(counted: dict[str, Any], section: str) -> dict[str, int]:
    return {name: row["waits"] for name, row in counted[section]["rows"].items()}


def test_the_guard_counts_what_waits_and_refuses_what_mixes(counted: dict[str, Any]) -> None:
    assert waits(counted, "guard") == GUARD


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_mixes_devices(counted: dict[str, Any], section: str) -> None:
    assert counted[section]["mixed"] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_numbers_are_those_of_the_cpu(counted: dict[str, Any], section: str) -> None:
    """But for rounding: on devices SRD takes another way around overflow."""
    assert {n: row["apart"] for n, row in counted[section]["rows"].items() if row["apart"] > 1e-4} == {}


def test_a_map_waits_for_its_checks_alone(counted: dict[str, Any]) -> None:
    expected = {**MAPS, **{name: 2 + 3 * each for name, each in PER_IMAGE.items()}}
    explained = {f"{name}, explain": count + 2 for name, count in expected.items()}  # range and overflow
    assert waits(counted, "maps") == expected | explained


def test_a_step_of_an_attack_waits_once(counted: dict[str, Any]) -> None:
    found = waits(counted, "attacks")
    assert found.pop("srd, images end") == 3  # who ended and who goes on are picked, by indices of the CPU
    assert len(found) == 9
    assert set(found.values()) == {1}, {n: row["where"] for n, row in counted["attacks"]["rows"].items()}


def test_a_pass_of_apop_waits_once(counted: dict[str, Any]) -> None:
    assert waits(counted, "apop") == {"constants": 1, "noise": 2}  # which is drawn on the CPU


def test_metrics_wait_for_what_is_drawn_on_the_cpu(counted: dict[str, Any]) -> None:
    assert waits(counted, "metrics") == METRICS
