"""Entries: what a run stores verifies, whatever is altered does not, and a leaderboard compares only what is comparable."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_networks import command, tiny_study

from attacks.ensemble import LETTERS
from attacks.entry import read_entry
from attacks.leaderboard import Leaderboard, leaderboard, reason
from attacks.scores import SCORES
from attacks.verification import verify
from srd_lab.errors import BadEntry

METHODS = ("gradient", "sobel")
FIGURES = {
    "other_class": 0.1,
    "other_weights": 0.1,
    "faithfulness": 0.5,
    "over_random": 0.2,
    "over_sobel": 0.1,
}
PASSED = FIGURES | {"passed": {"class": True, "weights": True, "faithful": True}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods on three images of the bundled network."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patched:
        tiny_study(patched, gates=None)
        methods = [part for name in METHODS for part in ("--method", name)]
        options = ["--pairs", "3", "--device", "cpu", "--no-curve", "--no-eq10", "--no-track"]
        result = command("robustness", *methods, *options, "--out", str(out))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def entry(run: Path, tmp_path: Path) -> Path:
    """A copy of an entry, to be spoiled."""
    for name in ("entry.json", "adversarial.npz"):
        shutil.copy(run / "gradient" / name, tmp_path / name)
    return tmp_path / "entry.json"


def altered(entry: Path, change: Any) -> Path:
    content = json.loads(entry.read_text())
    change(content)
    entry.write_text(json.dumps(content))
    return entry


def repacked(entry: Path, change: Any) -> Path:
    """The images changed, and the entry's own sums made to fit, as a forger would."""
    file = entry.parent / "adversarial.npz"
    with np.load(file) as stored:
        arrays = {name: values.copy() for name, values in stored.items()}
    change(arrays)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    file.write_bytes(buffer.getvalue())
    return altered(
        entry, lambda e: e["images"].__setitem__("sha256", hashlib.sha256(buffer.getvalue()).hexdigest())
    )


def told(entry: Path) -> str:
    """The one line that ``srd-lab verify`` ends with, or the problems that it lists."""
    result = command("verify", str(entry), "--device", "cpu")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return result.output


def test_what_a_run_stores_verifies(run: Path) -> None:
    for name in METHODS:
        assert verify(run / name / "entry.json", device="cpu") == []
    result = command("verify", str(run / "gradient" / "entry.json"), "--device", "cpu")
    assert result.exit_code == 0
    assert "hashes, bounds, classes, maps, scores and gates agree" in result.output


def test_an_entry_says_what_was_done(run: Path) -> None:
    entry = read_entry(run / "gradient" / "entry.json")
    assert entry["method"] == "gradient"
    assert entry["attack"]["members"] == ["S", "K", "P", "X"]
    assert list(entry["checked"]) == [m for m in LETTERS if LETTERS[m] in "UTCB"]
    assert entry["attack"]["track"] == "white box"
    assert entry["attack"]["budget"] == {"linf": 8.0, "rms": None, "mse": 1e-3, "stop_mse": None}
    assert entry["images"]["count"] == 3
    with np.load(run / "gradient" / "adversarial.npz") as arrays:
        for score in SCORES:
            assert entry["scores"][f"worst_{score}"] == pytest.approx(arrays[f"score/{score}"].mean())
            lowest = min(values[score] for values in entry["members"].values())
            assert entry["scores"][f"worst_{score}"] <= lowest + 1e-6
            assert arrays[score].dtype == np.uint8
            assert arrays[score].shape == (3, 3, 64, 64)
    sobel = read_entry(run / "sobel" / "entry.json")["gates"]
    assert sobel["passed"] == {"class": False, "weights": False, "faithful": False}
    assert entry["gates"]["other_weights"] < sobel["other_weights"] == pytest.approx(1)


def test_an_image_altered_by_one_level_is_noticed(entry: Path) -> None:
    file = entry.parent / "adversarial.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["pcc"][0, 0, 0, 0] ^= 1
    np.savez_compressed(file, **arrays)
    (problem,) = verify(entry, device="cpu")
    assert problem == "adversarial.npz is not the file that the entry was made with (its SHA-256 differs)"
    assert f"disagrees: {problem}" in told(entry)


def test_an_altered_original_is_noticed(entry: Path) -> None:
    repacked(entry, lambda arrays: arrays["original"].__setitem__((0, 0, 0, 0), 7))
    assert verify(entry, device="cpu") == ["the original images are not those of the entry"]


def test_images_of_another_budget_class_or_score_are_noticed(entry: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["pcc"][0] = 255 - arrays["original"][0]  # far out of the budget
        arrays["score/ssim"][1] -= 0.01

    problems = verify(repacked(entry, spoil), device="cpu")
    assert any(p.startswith("pcc: an image leaves the budget by a factor of ") for p in problems)
    assert any(p.startswith("ssim: 1 scores differ, by up to 0.0100") for p in problems)
    assert any(p.startswith("ssim: the images say ") for p in problems)


def test_a_target_that_is_not_predicted_is_noticed(entry: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["target"][0] = (arrays["target"][0] + 1) % 10

    assert "1 originals are not of the class that the entry explains" in verify(
        repacked(entry, spoil), device="cpu"
    )


def test_a_changed_score_is_noticed(entry: Path) -> None:
    altered(entry, lambda e: e["scores"].__setitem__("worst_ssim", e["scores"]["worst_ssim"] + 1e-3))
    (problem,) = verify(entry, device="cpu")
    assert problem.startswith("ssim: the images say ")
    assert "disagrees: ssim" in told(entry)


def test_a_smaller_budget_is_noticed(entry: Path) -> None:
    altered(entry, lambda e: e["attack"]["budget"].__setitem__("mse", 5e-4))
    problems = verify(entry, device="cpu")
    assert problems
    assert all("an image leaves the budget by a factor of 1.4" in p for p in problems)


FORGED = {
    "a larger budget": lambda e: e["attack"]["budget"].update(mse=4e-3, linf=16.0),
    "a rate": lambda e: e["scores"].__setitem__("rer_pcc", 2.0),
    "a mean of several repeats": lambda e: (
        e["attack"].__setitem__("seeds", 2),
        e["scores"].__setitem__("worst_pcc", 1.0),
    ),
    "the number of images": lambda e: e["images"].__setitem__("count", 1000),
    "a gate": lambda e: e["gates"].__setitem__("over_sobel", 0.5),
    "the verdict of a gate": lambda e: e["gates"]["passed"].__setitem__(
        "faithful", not e["gates"]["passed"]["faithful"]
    ),
}


@pytest.mark.parametrize("what", list(FORGED))
def test_what_a_leaderboard_prints_cannot_be_forged(entry: Path, what: str) -> None:
    assert verify(altered(entry, FORGED[what]), device="cpu")


def test_images_that_are_not_of_8_bits_are_noticed(entry: Path) -> None:
    repacked(entry, lambda arrays: arrays.__setitem__("pcc", arrays["pcc"].astype(np.float32)))
    assert verify(entry, device="cpu")


def test_other_weights_are_refused(entry: Path) -> None:
    altered(entry, lambda e: e.__setitem__("weights_sha256", "0" * 64))
    said = told(entry)
    assert "does not hold the weights of this entry; give them with --weights FILE" in said
    assert said.count("\n") == 1


def test_other_options_of_the_method_are_noticed(entry: Path) -> None:
    altered(entry, lambda e: e["options"].__setitem__("channels", "max_abs"))
    (problem,) = verify(entry, device="cpu")
    assert "the options of gradient are" in problem


def test_missing_images_are_refused(entry: Path) -> None:
    (entry.parent / "adversarial.npz").unlink()
    said = told(entry)
    assert "put adversarial.npz beside it" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as an entry"),
        ("[1, 2]", "is no entry: it is no table"),
        ("3", "is no entry"),
        ('{"version": 1}', "is no entry: method is missing, start is missing"),
        ("[" * 100_000, "cannot be read as an entry"),
        ("", "cannot be read as an entry"),
    ],
)
def test_a_file_that_is_no_entry_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "entry.json"
    file.write_text(text)
    said = told(file)
    assert message in said
    assert said.count("\n") == 1


def test_another_version_is_refused(entry: Path) -> None:
    assert "is of version 2, but this program reads version 1" in told(
        altered(entry, lambda e: e.__setitem__("version", 2))
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.__setitem__("images", 3),
        lambda e: e["images"].pop("file"),
        lambda e: e["attack"].pop("budget"),
        lambda e: e["scores"].pop("worst_pcc"),
        lambda e: e["attack"]["budget"].__setitem__("l7", 1.0),
    ],
    ids=["images", "file", "budget", "score", "unknown bound"],
)
def test_an_entry_that_lacks_something_inside_is_refused(entry: Path, change: Any) -> None:
    with pytest.raises(BadEntry):
        verify(altered(entry, change), device="cpu")


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from parts(value[key], (*path, key))


def test_whatever_stands_in_an_entry_it_makes_a_table_or_one_line(run: Path, tmp_path: Path) -> None:
    entry = json.loads((run / "gradient" / "entry.json").read_text())
    file, refused = tmp_path / "entry.json", 0
    for *way, last in parts(entry):
        for value in (None, "x", [], {}, float("nan"), -1, 10**400, True, "\x1b[31m\n<b>", "x" * 10_000, ...):
            changed = copy.deepcopy(entry)
            inner = changed
            for key in way:
                inner = inner[key]
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
            file.write_text(json.dumps(changed))
            try:
                board = leaderboard([file])
                printed = board.markdown + board.html + str(board.rows)
                assert "\x1b" not in printed
                assert "<b>" not in board.markdown + board.html
            except BadEntry as error:
                refused += 1
                said = str(error)
            else:
                said = ""
            assert said.isprintable(), (way, last, value)
            assert len(said) < 1000
    assert refused > 300


def test_images_elsewhere_are_refused(entry: Path, tmp_path: Path) -> None:
    """An entry of a stranger names no file outside its folder, and none that never ends."""
    (tmp_path / "inside").mkdir()
    shutil.copy(tmp_path / "adversarial.npz", tmp_path / "inside")
    for name in (
        "../adversarial.npz",
        "inside/adversarial.npz",
        str(tmp_path / "adversarial.npz"),
        "/dev/zero",
        "",
        ".",
    ):
        with pytest.raises(BadEntry, match="are not there; put"):
            verify(altered(entry, lambda e, name=name: e["images"].__setitem__("file", name)), device="cpu")


def test_images_that_lack_an_array_are_refused(entry: Path) -> None:
    repacked(entry, lambda arrays: arrays.pop("ssim"))
    with pytest.raises(BadEntry):
        verify(entry, device="cpu")


# --- the leaderboard ------------------------------------------------------------------------------


def test_a_leaderboard_of_two(run: Path, tmp_path: Path) -> None:
    files = [run / name / "entry.json" for name in METHODS]
    result = command("leaderboard", *map(str, files), "--out", str(tmp_path / "table"))
    assert result.exit_code == 0, result.output
    board = leaderboard(files)
    assert (tmp_path / "table.md").read_text() == board.markdown
    assert (tmp_path / "table.html").read_text() == board.html
    assert board.title == "Robustness of explanations: vgg16 on scenes, 3 images"
    assert sorted(row[1] for row in board.rows) == sorted(METHODS)
    entries = {name: read_entry(run / name / "entry.json") for name in METHODS}
    for row in board.rows:
        assert row[2].startswith(f"{entries[row[1]]['scores']['worst_pcc']:.3f} [")
    assert leaderboard(files[::-1]).rows == board.rows


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same study with tracking: the folder with the store, and what the command printed."""
    here = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        tiny_study(patched, gates=None)
        methods = [part for name in METHODS for part in ("--method", name)]
        result = command(
            "robustness",
            *methods,
            "--pairs",
            "2",
            "--device",
            "cpu",
            "--no-curve",
            "--no-eq10",
            "--out",
            "rob",
        )
    assert result.exit_code == 0, result.output
    return here, result.output


def test_verify_and_leaderboard_take_a_run_and_a_folder(
    tracked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, said = tracked
    monkeypatch.chdir(here)
    number = re.findall(r"^run ([0-9a-f]{32})", said, re.MULTILINE)[0]
    for reference in (number[:8], "rob"):
        result = command("verify", reference, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert result.output.count("entry.json verifies") == 2
        board = json.loads(command("leaderboard", reference, "--json").stdout)
        assert sorted(row["method"] for row in board["rows"]) == sorted(METHODS)
        assert board["title"].endswith("2 images")


def test_a_run_says_what_takes_its_entries(tracked: tuple[Path, str], run: Path) -> None:
    line = next(line for line in tracked[1].splitlines() if line.startswith("its entries: "))
    assert "`srd-lab verify rob`" in line
    assert "`srd-lab leaderboard rob`" in line
    assert "rob/*/entry.json" in line


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nowhere", "there is no nowhere; give an entry.json, a folder that holds some, or a run"),
        ("empty", "empty holds no entry.json; `srd-lab robustness` writes one for each method"),
    ],
)
def test_where_no_entry_is_there_is_one_line(
    reference: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for verb in ("verify", "leaderboard"):
        result = command(verb, reference)
        assert result.exit_code == 1
        assert said in result.output


def test_a_leaderboard_overwrites_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = str(run / "gradient" / "entry.json")
    mine = tmp_path / "table.html"
    mine.write_text("mine")
    result = command("leaderboard", entry, "--out", str(tmp_path / "table"))
    assert result.exit_code == 1
    assert f"{mine} would be overwritten; give another --out" in result.output
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.html", "mine")]
    monkeypatch.chdir(tmp_path)
    assert "leaderboard.md and leaderboard.html" in command("leaderboard", entry).output
    Path("leaderboard.md").unlink()
    assert "leaderboard-2.md and leaderboard-2.html" in command("leaderboard", entry).output


def write(folder: Path, entry: dict[str, Any], name: str) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(entry))
    return file


def board_of(run: Path, folder: Path, **changes: dict[str, Any]) -> Leaderboard:
    files = []
    for name, changed in changes.items():
        entry = read_entry(run / "gradient" / "entry.json") | {"method": name, "flags": {}, "gates": PASSED}
        entry["scores"] = entry["scores"] | {"worst_pcc": changed.pop("pcc", 0.5)}
        files.append(write(folder, entry | changed, name))
    return leaderboard(files)


def test_ranked_are_those_without_a_reason_by_their_worst_pcc(run: Path, tmp_path: Path) -> None:
    edges = FIGURES | {"passed": {"class": False, "weights": True, "faithful": False}}
    board = board_of(
        run,
        tmp_path,
        low={"pcc": 0.2},
        edges={"pcc": 0.99, "gates": edges},
        high={"pcc": 0.8, "flags": {"not_converged": "..."}},
        unmeasured={"pcc": 0.9, "gates": None},
        masked={"pcc": 0.95, "flags": {"masked": "...", "random": "..."}},
    )
    rows = {row[1]: row for row in board.rows}
    assert [row[0] for row in board.rows] == ["1", "2", "-", "-", "-"]
    assert [row[1] for row in board.rows] == ["high", "low", "edges", "masked", "unmeasured"]
    assert rows["edges"][-1] == "gate class, gate faithful"
    assert rows["masked"][-1] == "flag masked"
    assert rows["masked"][-2] == "masked, random"
    assert rows["unmeasured"][-1] == "the gates were not measured"
    assert rows["high"][-2:] == ["not_converged", "-"]


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param("diverged"),
        "unused_budget",
        "zero_gradient",
        "violated",
        "no_gradient",
    ],
)
def test_a_flag_that_makes_a_figure_unreliable_takes_the_rank(run: Path, flag: str) -> None:
    entry = read_entry(run / "gradient" / "entry.json") | {"flags": {flag: "..."}, "gates": PASSED}
    assert reason(entry) == f"flag {flag}"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("network", lambda e: e.__setitem__("weights_sha256", "0" * 64)),
        ("network", lambda e: e.__setitem__("model", "resnet18")),
        ("images", lambda e: e["images"].__setitem__("originals_sha256", "0" * 64)),
        ("budget", lambda e: e["attack"]["budget"].__setitem__("linf", 4.0)),
        ("mode", lambda e: e["attack"].__setitem__("mode", "full")),
        pytest.param("members", lambda e: e["attack"].__setitem__("members", ["S"])),
        pytest.param("attack", lambda e: e["attack"].__setitem__("iterations", 1)),
    ],
)
def test_what_measured_something_else_is_refused(run: Path, entry: Path, what: str, change: Any) -> None:
    with pytest.raises(BadEntry, match=f"differ in their {what}, so") as caught:
        leaderboard([run / "gradient" / "entry.json", altered(entry, change)])
    assert "\n" not in str(caught.value)
    result = command("leaderboard", str(run / "gradient" / "entry.json"), str(entry))
    assert result.exit_code == 1
    assert result.output.count("\n") == 1


def test_no_entry_is_refused() -> None:
    with pytest.raises(BadEntry, match="needs at least one entry"):
        leaderboard([])
    assert command("leaderboard").exit_code == 2


def test_names_are_escaped(run: Path, tmp_path: Path) -> None:
    entry = read_entry(run / "gradient" / "entry.json") | {"flags": {"<b>|x": "..."}}
    board = leaderboard([write(tmp_path, entry | {"method": "<script>alert(1)</script>|&"}, "bad")])
    assert "<script>" not in board.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|&amp;" in board.html
    assert "<b>" not in board.html
    line = board.markdown.splitlines()[-1]
    assert "&lt;/script&gt;\\|&amp;" in line
    assert line.replace("\\|", "").count("|") == len(board.header) + 1
