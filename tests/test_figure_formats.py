"""``--figure-format``: figures in the formats asked for, the same bytes each time, and pages that show each once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

import srd_lab
from srd_lab import render
from srd_lab.cli.main import main
from srd_lab.errors import BadValue
from srd_lab.runs.reading import find_run
from srd_lab.runs.tracking import open_run

CHEAP = (
    "--model",
    "resnet18",
    "--methods",
    "sobel",
    "--metrics",
    "sparseness",
    "--images",
    "2",
    "--device",
    "cpu",
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def succeed(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def figures(folder: Path) -> set[str]:
    found = (file for file in folder.rglob("*") if file.suffix in (".png", ".pdf", ".svg"))
    return {file.relative_to(folder).as_posix() for file in found}


def test_a_run_stores_figures_in_the_formats_asked_for_and_the_same_bytes_twice(tmp_path: Path) -> None:
    wanted = ("--figure-format", "pdf", "--figure-format", "svg")
    for name in ("one", "two"):
        succeed("evaluate", *CHEAP, *wanted, "--no-track", "--out", str(tmp_path / name))
    names = {f"{stem}.{kind}" for stem in ("ranks", "pictures") for kind in ("png", "pdf", "svg")}
    assert figures(tmp_path / "one") == figures(tmp_path / "two") == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for line in wanted[1::2]:
        assert f"--figure-format {line}" in (tmp_path / "one" / "command.txt").read_text()
    again = tmp_path / "again"
    succeed("evaluate", "--config", str(tmp_path / "one" / "run.toml"), "--no-track", "--out", str(again))
    assert figures(again) == names


def test_png_alone_is_the_default_and_always_there(tmp_path: Path) -> None:
    for k, wanted in enumerate(((), ("--figure-format", "png"))):
        succeed("evaluate", *CHEAP, *wanted, "--no-track", "--out", str(tmp_path / str(k)))
        assert figures(tmp_path / str(k)) == {"ranks.png", "pictures.png"}


def test_a_page_shows_every_figure_once(tmp_path: Path) -> None:
    out, page = tmp_path / "run", tmp_path / "page.html"
    succeed("evaluate", *CHEAP, "--figure-format", "svg", "--no-track", "--out", str(out))
    for kind in ("png", "svg+xml"):
        succeed("report", str(out), "--out", str(page))
        assert re.findall(r"data:image/(\S+?);base64", page.read_text()) == [kind, kind]
        page.unlink()
        (out / "report.html").unlink()
        for file in out.glob("*.png"):
            file.unlink()


def test_a_run_goes_on_with_another_format(tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("evaluate", *CHEAP, "--no-track", "--out", str(out))
    succeed("evaluate", "--no-track", "--resume", str(out), "--figure-format", "pdf")
    assert figures(out) == {f"{stem}.{kind}" for stem in ("ranks", "pictures") for kind in ("png", "pdf")}


def test_mlflow_has_the_formats_with_parts_and_comparisons(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    apop = ("--images", "6", "--inputs", "zeros", "--no-binarize", "--device", "cpu", "--tracking-uri", uri)
    said = succeed("apop", *apop, "--figure-format", "svg")
    number = re.search(r"[0-9a-f]{32}", said)
    assert number is not None
    (part,) = find_run(number[0], uri).parts
    assert {"apop.png", "apop.svg"} <= set(part.top_files)
    compared = ("--tracking-uri", uri, "--no-track", "--out", str(tmp_path / "compared"))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "run"
    succeed("apop", *apop[:-2], "--seed", "1", "--no-track", "--out", str(other))
    succeed("compare", number[0], str(other), *compared[:2], *compared[2:], "--figure-format", "pdf")
    assert figures(tmp_path / "compared") == {"comparison.png", "comparison.pdf"}


def test_a_result_lists_them_and_a_wrong_format_is_refused_before_any_work() -> None:
    few = {"images": 2, "methods": ["sobel"], "metrics": ["sparseness"], "device": "cpu"}
    found = srd_lab.evaluate("resnet18", **few, figure_formats=("pdf",))
    assert {file.name for file in found.plot()} == {"ranks.png", "ranks.pdf", "pictures.png", "pictures.pdf"}
    with pytest.raises(BadValue, match="figures cannot be stored as 'gif'; choose of png, pdf, svg"):
        srd_lab.evaluate("resnet18", **few, figure_formats=("gif",))
    result = call("evaluate", "--figure-format", "eps")
    assert result.exit_code == 2
    assert "'eps' is not one of 'png', 'pdf', 'svg'" in result.output


def test_parts_take_the_formats_over(tmp_path: Path) -> None:
    with open_run("attack", "some", {}, track=False, out=tmp_path / "run") as run:
        run.store_figures_as(["svg"])
        with run.child("srd") as part:
            part.save_figure("a.png", Figure(figsize=(1, 1)))
        with pytest.raises(BadValue, match="figures cannot be stored as 'tiff'"):
            run.store_figures_as(["tiff"])
    assert figures(tmp_path / "run") == {"srd/a.png", "srd/a.svg"}


def test_explain_writes_the_formats_and_overwrites_none(tmp_path: Path) -> None:
    from PIL import Image

    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(np.full((80, 240, 3), 90, dtype=np.uint8)).save(photo)
    given = ("explain", str(photo), "--methods", "sobel", "--device", "cpu", "--out", str(out))
    succeed(*given, "--figure-format", "pdf")
    assert figures(out) == {
        f"{stem}.{kind}" for stem in ("contact_sheet", "photo/sobel") for kind in ("png", "pdf")
    }
    for file in out.rglob("*.png"):
        file.unlink()
    (out / "photo" / "sobel.npy").unlink()
    before = {file: file.read_bytes() for file in out.rglob("*.pdf")}
    refused = call(*given, "--figure-format", "pdf")
    assert refused.exit_code == 1
    assert "contact_sheet.pdf would be overwritten" in refused.output.replace("\n", " ")
    assert {file: file.read_bytes() for file in out.rglob("*.pdf")} == before


@pytest.mark.parametrize(
    "option", [("--share", "0"), ("--share", "1"), ("--share", "nan"), ("--overlay", "glow")]
)
def test_wrong_options_of_explain_are_one_line(option: tuple[str, str], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(render.figure_bytes(Figure(figsize=(1, 1))))
    result = call("explain", str(photo), *option)
    assert result.exit_code == 2
    assert option[0] in result.output
    assert "Traceback" not in result.output
