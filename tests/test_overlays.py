"""Overlays: the photograph stays, colours tell the sign, lines enclose what they say, and figures say what they show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from srd_lab import render
from srd_lab.errors import BadValue
from srd_lab.render.overlays import AGAINST, FOR

NUMBERS = np.random.default_rng(0)
IMAGE = NUMBERS.random((3, 32, 32))


def spot(sign: float = 1.0) -> np.ndarray:
    """A map (32, 32) of a round spot, and exactly 0 elsewhere."""
    y, x = np.mgrid[:32, :32] - 15.5
    return sign * np.maximum(0, 1 - (y**2 + x**2) / 64)


def bytes_of(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.moveaxis(image, 0, -1)).astype(np.uint8)


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("how", render.OVERLAYS)
def test_where_the_map_is_zero_the_photograph_is_untouched_to_the_bit(how: str, sign: float) -> None:
    map_ = spot(sign)
    drawn = render.overlay(IMAGE, map_, how, blur=0)
    assert drawn.shape == (32, 32, 3)
    assert drawn.dtype == np.uint8
    assert (drawn[map_ == 0] == bytes_of(IMAGE)[map_ == 0]).all()
    assert (drawn[map_ != 0] != bytes_of(IMAGE)[map_ != 0]).any()


@pytest.mark.parametrize("how", render.OVERLAYS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_map_of_nothing_leaves_the_photograph(how: str, value: float) -> None:
    assert (render.overlay(IMAGE, np.full((32, 32), value), how) == bytes_of(IMAGE)).all()


@pytest.mark.parametrize("grey", [0.02, 0.5, 0.98])
def test_red_is_for_the_class_and_blue_against_it_on_dark_and_light(grey: float) -> None:
    map_ = np.zeros((8, 8))
    map_[:, :3], map_[:, 5:] = 1, -1
    for how in render.OVERLAYS:
        drawn = render.overlay(np.full((3, 8, 8), grey), map_, how, share=1, blur=0).astype(int)
        assert (drawn[0, 0, 0] - drawn[0, 0, 2]) > 100
        assert (drawn[0, 7, 2] - drawn[0, 7, 0]) > 100
        assert len(set(drawn[0, 4])) == 1


def test_a_map_without_a_sign_has_one_scale_from_yellow_to_red() -> None:
    drawn = render.overlay(np.full((3, 1, 64), 0.5), np.linspace(0, 1, 64)[None])[0].astype(int)
    assert (np.diff(drawn[:, 0]) >= 0).all()
    assert drawn[16, 1] > drawn[16, 2], "yellow"
    assert drawn[63, 0] > 200 > 100 > drawn[63, 1], "red"
    assert np.ptp(drawn[0]) == 0


def test_the_photograph_is_seen_even_where_the_map_is_strongest() -> None:
    dark, light = (render.overlay(np.full((3, 4, 4), grey), np.ones((4, 4))).astype(int) for grey in (0, 1))
    assert (light - dark >= 40).all()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("signed", [True, False])
def test_the_strongest_pixels_hold_the_share_and_no_fewer_would(share: float, signed: bool) -> None:
    map_ = NUMBERS.normal(size=(16, 16))
    map_ = map_ if signed else abs(map_)
    inside = render.strongest(map_, share)
    size = abs(map_)
    assert size[inside].sum() >= share * size.sum() * (1 - 1e-9)
    assert size[inside].sum() - size[inside].min() < share * size.sum()
    assert not inside.all() or share == 1
    assert size[inside].min() > size[~inside].max(initial=0)


def test_strongest_of_equal_broken_and_empty_maps() -> None:
    assert render.strongest(np.ones((2, 2)), 0.5).all(), "equals are not told apart"
    assert not render.strongest(np.zeros((2, 2)), 0.5).any()
    assert render.strongest(np.array([[np.nan, 1.0], [np.inf, 0.0]])).tolist() == [
        [False, True],
        [False, False],
    ]
    for share in (0, -1, 1.1, np.nan):
        with pytest.raises(BadValue, match=r"the share of the relevance is in \(0, 1\], got"):
            render.strongest(np.ones((2, 2)), share)


def test_the_contour_is_the_border_of_the_strongest_pixels() -> None:
    map_ = np.zeros((9, 9))
    map_[2:7, 2:7], map_[0, 8] = 1, -0.1
    grey = np.full((3, 9, 9), 0.5)
    drawn = render.overlay(grey, map_, "contour", share=0.9, blur=0)
    changed = (drawn != bytes_of(grey)).any(-1)
    ring = np.zeros((9, 9), dtype=bool)
    ring[2:7, 2:7], ring[3:6, 3:6] = True, False
    assert (changed == ring).all()
    assert (drawn[ring] == np.round(255 * np.array(FOR))).all()


def test_a_contour_of_noise_runs_around_places_and_not_around_pixels() -> None:
    map_ = spot() + 0.3 * NUMBERS.normal(size=(32, 32))
    fine, smooth = (render.overlay(IMAGE, map_, "contour", 0.3, blur) for blur in (0, 3))
    counts = [int((drawn != bytes_of(IMAGE)).any(-1).sum()) for drawn in (fine, smooth)]
    assert counts[1] < counts[0] / 2


def test_edges_are_the_sides_of_pixels_between_inside_and_outside() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1, 2] = True
    lines = {tuple(map(tuple, line)) for line in render.edges(mask).tolist()}
    assert lines == {
        ((1.5, 0.5), (2.5, 0.5)),
        ((1.5, 1.5), (2.5, 1.5)),
        ((1.5, 0.5), (1.5, 1.5)),
        ((2.5, 0.5), (2.5, 1.5)),
    }
    assert len(render.edges(np.ones((4, 5), dtype=bool))) == 2 * (4 + 5), "the image's border, too"
    assert render.edges(np.zeros((4, 5), dtype=bool)).shape == (0, 2, 2)


def test_overlays_refuse_what_does_not_fit() -> None:
    with pytest.raises(BadValue, match="there is no overlay 'glow'; choose of heat, contour"):
        render.overlay(IMAGE, spot(), "glow")
    for image, map_ in ((IMAGE, spot()[:7]), (IMAGE[:1], spot()), (IMAGE[0], spot())):
        with pytest.raises(BadValue, match=r"expected an image \(3, H, W\) and a map \(H, W\) of its size"):
            render.overlay(image, map_)


def test_an_explanation_says_method_class_probability_and_what_colours_mean() -> None:
    figure = render.explanation(IMAGE, spot() - 0.1, "SRD, input", "tabby (n02123045), probability 0.873")
    said = words(figure)
    for word in (
        "SRD, input",
        "tabby (n02123045)",
        "probability 0.873",
        "for the class",
        "against the class",
    ):
        assert word in said
    left, right, scale = figure.axes
    assert (np.asarray(left.images[0].get_array()) == np.moveaxis(IMAGE, 0, -1)).all()
    assert (np.asarray(right.images[0].get_array()) == render.overlay(IMAGE, spot() - 0.1)).all()
    bar = np.asarray(scale.images[0].get_array()).astype(int)[0]
    assert bar[0, 2] > bar[0, 0], "blue on the left"
    assert bar[-1, 0] > bar[-1, 2], "red on the right"


def test_an_explanation_of_an_unsigned_or_empty_map_says_so() -> None:
    unsigned = words(render.explanation(IMAGE, spot(), "Grad-CAM"))
    assert "none strongest" in unsigned
    assert "against" not in unsigned
    assert "The map is zero everywhere" in words(render.explanation(IMAGE, 0 * spot(), "Grad-CAM"))


def test_an_explanation_with_lines_says_which_share_they_enclose() -> None:
    figure = render.explanation(IMAGE, spot(), "SRD", "ring, probability 0.5", "contour", 0.25)
    assert "25% of the relevance." in words(figure)
    lines = [c for c in figure.axes[1].collections if isinstance(c, LineCollection) and c.get_segments()]
    colours = [line.get_edgecolor()[0][:3] for line in lines]  # type: ignore[index]
    assert [tuple(colour) for colour in colours] == [(1, 1, 1), FOR]
    both = render.explanation(IMAGE, spot() - 0.4, "SRD", "", "contour", 1.0)
    assert "red: for the class, blue: against it" in words(both)
    assert AGAINST in {tuple(c.get_edgecolor()[0][:3]) for c in both.axes[1].collections}  # type: ignore[index]


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (8, 8)])
def test_photographs_keep_their_shape(height: int, width: int) -> None:
    image, map_ = NUMBERS.random((3, height, width)), NUMBERS.normal(size=(height, width))
    figure = render.explanation(image, map_, "SRD")
    row = render.SheetRow("a", image, {"SRD": map_})
    for axes in (*figure.axes[:2], *render.method_sheet([row]).axes[:2]):
        axes.apply_aspect()
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(width / height, rel=0.01)


# --- sheets ----------------------------------------------------------------------------------------------------------


def test_a_mask_is_outlined_on_the_image_where_it_is_and_nowhere_else() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[3:9, 4:12] = True
    image = NUMBERS.random((3, 16, 16))
    rows = [
        render.SheetRow("with", image, {"SRD": image[0]}, mask),
        render.SheetRow("without", image, {"SRD": image[0]}),
    ]
    figure = render.method_sheet(rows, outlined="the object's bounding boxes")
    with_mask, map_, *others, _ = figure.axes
    under, over = with_mask.collections
    for lines in (under, over):
        assert isinstance(lines, LineCollection)
        assert (np.array(lines.get_segments()) == render.edges(mask)).all()
    colours = [lines.get_edgecolor()[0][:3].sum() for lines in (under, over)]  # type: ignore[index]
    assert sorted(colours) == [0, 3], "black and white, so that it is seen on dark and on light"
    assert not any(axes.collections for axes in (map_, *others))
    assert "line on the images: the object's bounding boxes" in words(figure)
    assert "line on the images" not in words(render.method_sheet(rows[1:]))


@pytest.mark.parametrize("name", ["a.png", "ILSVRC2012_val_00000293.JPEG", f"{'x' * 90}-end.jpg"])
def test_names_of_files_are_whole_or_shortened_in_the_middle(name: str) -> None:
    row = render.SheetRow(f"{name}\nring", IMAGE, {"SRD": spot()})
    shown = render.method_sheet([row]).texts[0].get_text().replace("\n", "")
    if len(name) <= 54:
        assert shown == f"{name}ring"
    else:
        assert shown.startswith("xxxxx")
        assert shown.endswith("-end.jpgring")
        assert shown.count("…") == 1


@pytest.mark.parametrize(
    ("count", "pages"), [(1, [1]), (30, [30]), (31, [16, 15]), (40, [20, 20]), (95, [24, 24, 23, 24])]
)
def test_sheets_of_many_images_are_split_into_equal_pages(count: int, pages: list[int]) -> None:
    rows = [render.SheetRow(str(k), IMAGE, {}) for k in range(count)]
    split = render.sheet_pages(rows)
    assert [row for page in split for row in page] == rows
    assert sorted(map(len, split)) == sorted(pages)


def test_sheets_stay_readable_and_of_a_size_that_opens() -> None:
    small = render.method_sheet([render.SheetRow("a", IMAGE, {"SRD": spot()})])
    many = [render.SheetRow("a", IMAGE, {f"method {k}": spot() for k in range(27)}) for _ in range(30)]
    large = render.method_sheet(many)
    for figure, least in ((small, 1.5), (large, 0.75)):
        across, up = figure.get_size_inches()
        assert max(across, up) < 30
        assert figure.axes[0].get_position().width * across > least
    heads = [text for text in small.texts if text.get_text() in ("image", "SRD")]
    assert all(text.get_rotation() == 0 for text in heads), "what fits stands upright"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_has_the_same_bytes_each_time(
    kind: str, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for year in (2001, 2031):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str((year - 1970) * 31_556_952))
        figure = render.explanation(IMAGE, spot(), "SRD, input", "tabby, probability 0.9", "contour")
        files.append(render.figure_bytes(figure, kind))
    assert files[0] == files[1]
    assert files[0].startswith(head)


def test_text_stays_text_in_vector_formats() -> None:
    figure = render.explanation(IMAGE, spot(), "SRD, input", "tabby, probability 0.9")
    assert b">SRD, input</text>" in render.figure_bytes(figure, "svg")
    assert b"/TrueType" in render.figure_bytes(figure, "pdf") or b"/CIDFontType2" in render.figure_bytes(
        figure, "pdf"
    )
    with pytest.raises(BadValue, match="figures cannot be stored as 'gif'; choose of png, pdf, svg"):
        render.figure_bytes(figure, "gif")


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_names_in_letters_that_no_font_has_and_signs_of_formulas_are_drawn_as_they_are(kind: str) -> None:
    name = "$5_x^2$ <\u00fc> & \u65e5\u672c.png"
    row = render.SheetRow(name, IMAGE, {"SRD $x$": spot()})
    for figure in (render.method_sheet([row], name), render.explanation(IMAGE, spot(), name, name)):
        drawn = render.figure_bytes(figure, kind)
        assert kind != "svg" or "&lt;\u00fc&gt; &amp; \u65e5" in drawn.decode()


def test_a_white_photograph_has_a_frame() -> None:
    figure = render.explanation(np.ones((3, 8, 8)), np.zeros((8, 8)), "SRD")
    with Image.open(io.BytesIO(render.figure_bytes(figure))) as drawn:
        row = np.asarray(drawn.convert("L"))[drawn.height // 2]
    assert (row < 230).sum() >= 4, "two photographs, two sides each"
