"""Names of classes from a file: --labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_networks import command
from torchvision.utils import save_image

import srd_lab
from srd_lab.data import load_data
from srd_lab.data.labels import read_labels
from srd_lab.errors import BadValue, SrdLabWarning

NAMES = [f"kind {k} of $thing$" for k in range(10)]
FEW = ("--images", "4", "--method", "gradient", "--metrics", "sparseness", "--device", "cpu", "--no-track")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8-sig")


def test_names_are_read_in_every_form() -> None:
    Path("list.json").write_text(json.dumps(NAMES))
    Path("index.json").write_text(json.dumps({str(k): name for k, name in reversed(list(enumerate(NAMES)))}))
    for file in ("names.txt", "list.json", "index.json"):
        assert read_labels(file, 10) == NAMES
    Path("twice.txt").write_text("\n".join(["crane", *NAMES[1:9], " crane "]))
    with pytest.warns(
        SrdLabWarning, match=r"twice\.txt has 'crane' for several classes; these names are followed by"
    ):
        assert read_labels("twice.txt", 10) == ["crane (0)", *NAMES[1:9], "crane (9)"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("short.txt", b"a\nb\n", "short.txt has 2 names, but the network tells 10 classes apart"),
        ("hole.txt", b"a\n\nb\n", "hole.txt: the name of class 1 is empty; expected 1 to 200 characters"),
        ("long.txt", b"x" * 300, "long.txt: the name of class 0 is 'xxxx"),
        ("number.json", b"[1, 2]", "number.json: the name of class 0 is 1;"),
        ("line.json", b'["a\\nb"]', "line.json: the name of class 0 is 'a"),
        (
            "keys.json",
            b'{"1": "a"}',
            r"cannot be read as names of classes: its keys are not the indices 0\.\.0",
        ),
        ("text.json", b'"a"', "it holds a str; expected a name on each line, or JSON"),
        ("half.json", b'["a"', "cannot be read as names of classes: Expecting"),
        ("bytes.txt", b"\xff\xfea", "cannot be read as names of classes: 'utf-8' codec"),
    ],
)
def test_a_file_without_a_name_for_each_class_is_one_line(file: str, content: bytes, said: str) -> None:
    Path(file).write_bytes(content)
    with pytest.raises(BadValue, match=said) as error:
        read_labels(file, 10)
    assert str(error.value).isprintable()
    result = command("evaluate", *FEW, "--labels", file)
    assert result.exit_code == 1
    assert str(error.value) in result.output


def test_pictures_are_explained_by_these_names() -> None:
    save_image(load_data("scenes")[3].image, "photo.png")
    result = command(
        "explain", "photo.png", "--labels", "names.txt", "--method", "gradient", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "photo.png: explained for kind 3 of $thing$, probability" in result.output
    result = command("explain", "photo.png", "--labels", "names.txt", "--target", "kind 7", "--device", "cpu")
    assert "explained for kind 7 of $thing$" in result.output


def test_a_run_keeps_them_and_is_resumed_with_them(tmp_path: Path) -> None:
    result = command("evaluate", *FEW, "--labels", "names.txt", "--out", "out")
    assert result.exit_code == 0, result.output
    assert Path("out/labels.txt").read_bytes() == Path("names.txt").read_bytes()
    assert json.loads(Path("out/run.json").read_text())["params"]["labels"] == "names.txt"
    assert command("evaluate", *FEW, "--resume", "out").exit_code == 0
    Path("names.txt").write_text("\n".join(reversed(NAMES)))
    changed = command("evaluate", *FEW, "--resume", "out")
    assert changed.exit_code == 1
    assert (
        "the names in names.txt are not those that run out was made with; put the file back" in changed.output
    )


def test_the_users_own_data_set_keeps_its_names() -> None:
    data = load_data("scenes")
    before = list(data.classes)
    network = srd_lab.load_model("vgg16", device="cpu")
    few = {"images": 2, "device": "cpu", "methods": ["gradient"], "metrics": ["sparseness"]}
    result = srd_lab.evaluate(network, data, labels="names.txt", **few)
    assert "gradient" in result.summary
    assert list(data.classes) == before
    assert torch.is_tensor(data.labels)
