"""The page of every image's scores: what stands in it is what was scored, and it loads nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from srd_lab.render import score_page as module
from srd_lab.render.score_page import score_page


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    content: dict[str, Any] = json.loads(found)
    return content


def test_the_page_holds_every_score_and_the_mean_of_what_there_is() -> None:
    scores = {
        "srd": {"pcc": np.array([0.25, np.nan, 0.75]), "ssim": np.array([1.0, 1, 1])},
        "gradcam": {"pcc": np.array([-1.0, 0, 1 / 3])},
    }
    page = score_page(["a.png", "b.png", "c.png"], scores, "vgg16 & <scenes>", {"pcc": "1 = unmoved"})
    assert data_of(page)["images"] == ["a.png", "b.png", "c.png"]
    assert data_of(page)["panels"] == [
        {
            "score": "pcc",
            "about": "1 = unmoved",
            "rows": [
                {"subject": "srd", "mean": 0.5, "values": [0.25, None, 0.75]},
                {"subject": "gradcam", "mean": -0.2222, "values": [-1.0, 0.0, 0.3333]},
            ],
        },
        {"score": "ssim", "about": "", "rows": [{"subject": "srd", "mean": 1.0, "values": [1.0, 1.0, 1.0]}]},
    ]
    assert "<title>vgg16 &amp; &lt;scenes&gt;</title>" in page
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)


def test_a_name_cannot_end_the_script_that_it_stands_in() -> None:
    name = "</script><script>alert(1)</script>"
    page = score_page([name], {name: {"pcc": np.array([0.5])}}, name)
    assert page.count("</script>") == 2  # of the data and of the page
    assert data_of(page)["images"] == [name]


def test_of_many_images_the_first_are_drawn_and_the_mean_is_of_all() -> None:
    values = np.arange(module.MOST * 1.0)
    page = score_page([str(i) for i in range(len(values))], {"a": {"x": values}, "b": {"x": values}})
    (panel,) = data_of(page)["panels"]
    assert [len(row["values"]) for row in panel["rows"]] == 2 * [module.MOST // 2]
    assert panel["rows"][0]["mean"] == values.mean()
    assert f"The first {module.MOST // 2} of {module.MOST} images are drawn." in page
    assert "images are drawn" not in score_page(["a"], {"a": {"x": values[:1]}})


def test_scores_that_nobody_has_are_a_page_too() -> None:
    page = score_page(["a"], {"srd": {"pcc": np.array([np.nan])}})
    assert data_of(page)["panels"][0]["rows"][0] == {"subject": "srd", "mean": None, "values": [None]}
